"""Export to ONNX, run in ONNX Runtime."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coreai_opt.controllers import create_compressed_model

from ..support import configured, make_model

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

INT8 = {"algorithm": "quantization"}


def exported(controller: Any, path: Path, **options: Any) -> tuple[Any, Any]:
    controller.export_model(path, **options)
    model = onnx.load(path)
    onnx.checker.check_model(model)
    return model, runtime.InferenceSession(path, providers=["CPUExecutionProvider"])


def outputs(session: Any, *inputs: Tensor) -> Tensor:
    names = [each.name for each in session.get_inputs()]
    feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


def kinds(model: Any) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"preset": "mixed", "learnable_ranges": True},
        {
            "preset": "mixed",
            "weights": {"bits": 4, "per_channel": False, "mode": "asymmetric", "signed": False},
        },
    ],
    ids=["int8", "learned", "int4"],
)
def test_quantized_models_run_in_onnx_runtime(tmp_path: Path, more: dict[str, Any]) -> None:
    controller, model = create_compressed_model(make_model().eval(), configured({**INT8, **more}))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    file, session = exported(
        controller, tmp_path / "model.onnx", input_names=["image"], output_names=["digit"]
    )
    assert kinds(file).count("QuantizeLinear") == 6
    assert kinds(file).count("DequantizeLinear") == 6
    four_bits = controller.weights["head"].n_bits == 4
    assert [(each.domain, each.version) for each in file.opset_import] == [("", 21 if four_bits else 20)]
    assert [each.name for each in file.graph.input] == ["image"]
    assert [each.name for each in file.graph.output] == ["digit"]
    x = torch.randn(2, 1, 8, 8)
    # Sums in another order may end on the other side of a rounding: one step of the last activation.
    step = float(controller.activations["head"].calculate_qparams()[0].max())
    largest = float(model.head.weight.detach().abs().sum(1).max())
    torch.testing.assert_close(outputs(session, x), model(x), rtol=0, atol=step * largest)
    assert float((outputs(session, x) - model(x)).detach().abs().mean()) < 0.05 * step * largest
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7])
def test_widths_that_onnx_lacks_become_the_next_wider_one(tmp_path: Path, bits: int) -> None:
    narrow = {**INT8, "weights": {"bits": bits}, "activations": {"bits": max(bits, 5)}}
    controller, model = create_compressed_model(make_model().eval(), configured(narrow))
    file, session = exported(controller, tmp_path / "model.onnx")
    types = {each.data_type for each in file.graph.initializer}
    assert onnx.TensorProto.INT8 in types
    x = torch.randn(2, 1, 8, 8) * 3  # beyond the ranges, too
    step = float(controller.activations["head"].calculate_qparams()[0].max())
    largest = float(model.head.weight.detach().abs().sum(1).max())
    torch.testing.assert_close(outputs(session, x), model(x), rtol=0, atol=step * largest)
    assert float((outputs(session, x) - model(x)).detach().abs().mean()) < 0.05 * step * largest


def test_quantized_outputs(tmp_path: Path) -> None:
    controller, _ = create_compressed_model(
        make_model().eval(), configured({**INT8, "quantize_outputs": True})
    )
    file, session = exported(controller, tmp_path / "model.onnx")
    assert kinds(file).count("QuantizeLinear") == 7
    x = torch.randn(2, 1, 8, 8)
    scale = float(controller.activations["output_quantizers.0"].calculate_qparams()[0])
    levels = outputs(session, x) / scale
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)


def test_pruned_quantized_and_distilled(tmp_path: Path) -> None:
    from ..algorithms.test_filter_pruning import Net16

    algorithms = (
        INT8,
        {"algorithm": "filter_pruning", "pruning_init": 0.5, "params": {"prune_first_conv": True}},
        {"algorithm": "knowledge_distillation", "type": "mse"},
    )
    controller, model = create_compressed_model(Net16().eval(), configured(*algorithms))
    file, session = exported(controller, tmp_path / "model.onnx")
    shapes = {tuple(each.dims) for each in file.graph.initializer}
    assert (8, 8, 3, 3) in shapes
    assert (16, 16, 3, 3) not in shapes
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(outputs(session, x), model(x), rtol=0, atol=0.05)


def test_masked_and_palettized_weights_are_plain_ones(tmp_path: Path) -> None:
    algorithms = (
        {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5},
        {"algorithm": "palettization", "bits": 4},
    )
    controller, model = create_compressed_model(make_model().eval(), configured(*algorithms))
    file, session = exported(controller, tmp_path / "model.onnx", save_format="onnx_18")
    assert [each.version for each in file.opset_import] == [18]
    assert not set(kinds(file)) & {"QuantizeLinear", "DequantizeLinear"}
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(outputs(session, x), model(x), rtol=1e-4, atol=1e-5)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor, bias: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        y = self.layer(x) * scale
        return y if bias is None else y + bias


def test_further_arguments(tmp_path: Path) -> None:
    sparse = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5}
    config = {"input_info": {"sample_size": [2, 4]}, "compression": sparse}
    controller, model = create_compressed_model(Scaled().eval(), config)
    x, bias = torch.randn(2, 4), torch.randn(3)
    _, session = exported(controller, tmp_path / "model.onnx", model_args=(bias, {"scale": 2.0}))
    torch.testing.assert_close(outputs(session, x, bias), model(x, bias, scale=2.0))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"save_format": "onnx_9"}, ValueError, "opset from 10 to 23; got 'onnx_9'"),
        ({"save_format": "tf"}, ValueError, "'onnx' or 'onnx_<opset>'"),
        ({"model_args": (torch.ones(1),)}, ValueError, "last element is the dict"),
        ({"model_args": ()}, ValueError, "last element is the dict"),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, options: Any, error: Any, message: str) -> None:
    controller, _ = create_compressed_model(make_model(), configured({"algorithm": "magnitude_sparsity"}))
    with pytest.raises(error, match=message):
        controller.export_model(tmp_path / "model.onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_no_file_is_left_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    controller, _ = create_compressed_model(make_model(), configured({"algorithm": "magnitude_sparsity"}))
    with pytest.raises(FileNotFoundError):
        controller.export_model(tmp_path / "missing" / "model.onnx")
    with pytest.raises(IsADirectoryError):
        controller.export_model(tmp_path)
    old = tmp_path / "model.onnx"
    old.write_text("old")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        controller.export_model(old)
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]
    assert old.read_text() == "old"


def test_what_onnx_lacks_is_refused(tmp_path: Path) -> None:
    controller, _ = create_compressed_model(make_model(), configured({**INT8, "weights": {"bits": 4}}))
    with pytest.raises(ValueError, match="opset 20 has no 4-bit integers"):
        controller.export_model(tmp_path / "model.onnx", save_format="onnx_20")
    later = {**INT8, "params": {"activations_quant_start_epoch": 1}}
    controller, _ = create_compressed_model(make_model(), configured(later))
    with pytest.raises(RuntimeError, match="once weights and activations are quantized"):
        controller.export_model(tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
