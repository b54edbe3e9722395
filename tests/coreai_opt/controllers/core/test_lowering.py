"""Controlled models as Core AI programs, Core ML models and torch programs."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coreai_opt.controllers import create_compressed_model
from coreai_opt.controllers.nncf1 import CompressionAlgorithm
from tests.coreai_opt.export import core_ai

from ..support import configured, make_model, make_transformer

NEEDED = {"coreai": "coreai_torch", "coreml": "coremltools", "torch": "torch"}
SUFFIXES = {"coreai": ".aimodel", "coreml": ".mlpackage", "torch": ".pt2"}

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:.*only been validated with torch.*"
)


@pytest.fixture(params=NEEDED)
def save_format(request: Any) -> str:
    pytest.importorskip(NEEDED[request.param], reason=f"needs the extra {request.param}")
    return str(request.param)


def outputs(path: Path, *inputs: Tensor) -> Tensor:
    """What a program of Core AI or torch computes."""
    if path.suffix == ".pt2":
        result: Tensor = torch.export.load(path).module()(*inputs).detach()
        return result
    computed: Tensor = core_ai.run_program(path, {"x": inputs[0]})
    return computed


def compressions(path: Path) -> dict[str, int]:
    """Operations for compressed tensors in a Core AI program, or a Core ML model."""
    if path.suffix == ".aimodel":
        from coreai.authoring import AIModelAsset

        found = core_ai.operations(AIModelAsset.load(path).program)
    else:
        import coremltools

        spec = coremltools.models.MLModel(str(path), skip_model_load=True).get_spec()
        block = next(iter(spec.mlProgram.functions["main"].block_specializations.values()))
        found = Counter(each.type for each in block.operations)
    kinds = ("blockwise", "lut", "sparse", "quantize")
    return {name: count for name, count in found.items() if any(kind in name for kind in kinds)}


INT8 = {"algorithm": "quantization"}
SPARSE = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5}
PALETTES = {"algorithm": "palettization", "bits": 4}
# Algorithms; the operations in a Core AI program and a Core ML model.
SHIFT, LUT, TO_DENSE = "blockwise_shift_scale", "lut_to_dense", "sparse_with_bitmask_to_dense"
ML_SHIFT, ML_LUT, ML_SPARSE = (
    "constexpr_blockwise_shift_scale",
    "constexpr_lut_to_dense",
    "constexpr_sparse_to_dense",
)
PAIRS = {"quantize": 3, "dequantize": 3}
CASES: dict[str, tuple[tuple[dict[str, Any], ...], dict[str, int], dict[str, int]]] = {
    "int8": ((INT8,), {SHIFT: 3, **PAIRS}, {ML_SHIFT: 3, **PAIRS}),
    "learned ranges": (
        ({**INT8, "preset": "mixed", "learnable_ranges": True},), {SHIFT: 3, **PAIRS}, {ML_SHIFT: 3, **PAIRS},
    ),
    "narrow": (
        ({**INT8, "weights": {"bits": 3}, "activations": {"bits": 6}},), {SHIFT: 3, **PAIRS},
        {ML_SHIFT: 3, **PAIRS},
    ),
    "sparse": ((SPARSE,), {TO_DENSE: 3}, {ML_SPARSE: 3}),
    "palettes": ((PALETTES,), {LUT: 3}, {ML_LUT: 3}),
    "palettes of groups with scales": (
        ({**PALETTES, "group_size": 2, "per_channel_scale": True},), {LUT: 3, SHIFT: 3}, {},
    ),
    "sparse, then palettes": (
        (SPARSE, PALETTES), {LUT: 3, TO_DENSE: 3}, {"constexpr_lut_to_sparse": 3, ML_SPARSE: 3},
    ),
    "sparse, then int8": (
        (SPARSE, INT8), {SHIFT: 3, **PAIRS},
        {"constexpr_sparse_blockwise_shift_scale": 3, ML_SPARSE: 3, **PAIRS},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:.*takes them for pruned ones")
def test_formats(case: str, save_format: str, tmp_path: Path) -> None:
    algorithms, core_ai_operations, core_ml_operations = CASES[case]
    controller, model = create_compressed_model(make_model().eval(), configured(*algorithms))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = tmp_path / f"model{SUFFIXES[save_format]}"
    controller.export_model(path, save_format=save_format)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    expected_operations = {"coreai": core_ai_operations, "coreml": core_ml_operations}.get(save_format)
    if expected_operations:
        found = compressions(path)
        assert {name: found.get(name, 0) for name in expected_operations} == expected_operations
    if save_format != "coreml":
        x = torch.randn(2, 1, 8, 8)
        with torch.no_grad():
            expected = model(x)
        found_output = outputs(path, x)
        assert (found_output - expected).norm() <= 0.02 * expected.norm()


def test_removed_filters(save_format: str, tmp_path: Path) -> None:
    from ..algorithms.test_filter_pruning import Net16

    pruned = {"algorithm": "filter_pruning", "pruning_init": 0.5, "params": {"prune_first_conv": True}}
    controller, model = create_compressed_model(Net16().eval(), configured(INT8, pruned))
    path = tmp_path / f"model{SUFFIXES[save_format]}"
    controller.export_model(path, save_format=save_format)
    if save_format == "coreai":
        from coreai.authoring import AIModelAsset

        constants = core_ai.constants(AIModelAsset.load(path).program)
        assert constants["8x8x3x3xsi8"]
        assert not constants["16x16x3x3xsi8"]
    if save_format != "coreml":
        x = torch.randn(2, 1, 8, 8)
        with torch.no_grad():
            expected = model(x)
        assert (outputs(path, x) - expected).norm() <= 0.05 * expected.norm()


def test_removed_filters_of_groups_are_named(tmp_path: Path) -> None:
    pytest.importorskip("coreai_torch", reason="needs the extra coreai")
    from ..algorithms.test_filter_pruning import Net16

    pruned = {"algorithm": "filter_pruning", "pruning_init": 0.5, "params": {"prune_first_conv": True}}
    grouped = {**PALETTES, "group_size": 2}
    controller, _ = create_compressed_model(Net16().eval(), configured(grouped, pruned))
    with pytest.raises(ValueError, match=r"weight' has lost channels that share a table"):
        controller.export_model(tmp_path / "model.aimodel")
    assert not any(tmp_path.iterdir())
    whole, model = create_compressed_model(Net16().eval(), configured(PALETTES, pruned))
    whole.export_model(tmp_path / "model.aimodel")
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(outputs(tmp_path / "model.aimodel", x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("save_format", ["coreai", "torch"], indirect=True)
def test_attention_and_quantized_outputs(save_format: str, tmp_path: Path) -> None:
    config = configured({**INT8, "quantize_outputs": True})
    controller, model = create_compressed_model(make_transformer(heads=4).eval(), config)
    path = tmp_path / f"model{SUFFIXES[save_format]}"
    controller.export_model(path, input_names=["x"])
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        expected = model(x)
    assert (outputs(path, x) - expected).norm() <= 0.05 * expected.norm()


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor, bias: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        y = self.layer(x) * scale
        return y if bias is None else y + bias


def test_arguments(tmp_path: Path) -> None:
    config = {"input_info": {"sample_size": [2, 4]}, "compression": SPARSE}
    controller, model = create_compressed_model(Scaled().eval(), config)
    x, bias, path = torch.randn(2, 4), torch.randn(3), tmp_path / "model.pt2"
    controller.export_model(path, model_args=({"bias": bias},))
    with torch.no_grad():
        torch.testing.assert_close(outputs(path, x, bias), model(x, bias))
    with pytest.raises(ValueError, match=r"positional arguments alone; \['scale'\] are not"):
        controller.export_model(path, model_args=({"scale": 2.0},))


def test_the_older_interface_goes_by_the_suffix(tmp_path: Path) -> None:
    algorithm = CompressionAlgorithm(make_model().eval(), configured(SPARSE), input_size=(2, 1, 8, 8))
    algorithm.export_model(tmp_path / "model.pt2")
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(outputs(tmp_path / "model.pt2", x), algorithm.model(x))


@pytest.mark.parametrize(
    ("name", "save_format", "message"),
    [
        ("m.onnx", "coreai", r"must end in \.aimodel for save_format 'coreai'"),
        ("m.pt2", "coreml", r"must end in \.mlpackage for save_format 'coreml'"),
        ("m", "torch", r"must end in \.pt2"),
        ("m.pt2", "tf", r"'coreai', 'coreml', 'torch', 'onnx' or"),
    ],
)
def test_bad_arguments_are_named(name: str, save_format: str, message: str, tmp_path: Path) -> None:
    controller, _ = create_compressed_model(make_model(), configured(SPARSE))
    with pytest.raises(ValueError, match=message):
        controller.export_model(tmp_path / name, save_format=save_format)
    with pytest.raises(FileNotFoundError, match="no folder"):
        controller.export_model(tmp_path / "missing" / "m.pt2")
    assert not any(tmp_path.iterdir())
