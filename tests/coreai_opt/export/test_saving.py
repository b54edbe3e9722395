"""coreai_opt.export.save: from a compressed model to a file that was run."""

import errno
import os
import shutil
import sys

import pytest
import torch
from torch import nn

from coreai_opt.export import SavedModel, save
from coreai_opt.export.files import relative_difference, written
from coreai_opt.quantization.spec import (
    DynamicQParamsCalculator,
    PerBlockGranularity,
    PerChannelGranularity,
    QuantizationSpec,
)
from tests.coreai_opt.export.core_ai import run_program
from tests.coreai_opt.export.models import cnn, example, mlp, output, palettizer, pruner, quantizer

CHANNELS = PerChannelGranularity(axis=0)
BLOCKS_8 = PerBlockGranularity(axis=1, block_size=8)
NEEDED = {".aimodel": "coreai_torch", ".mlpackage": "coremltools", ".onnx": "onnxscript", ".pt2": "torch"}
SUFFIXES = list(NEEDED)


@pytest.fixture
def suffix(request):
    pytest.importorskip(NEEDED[request.param], reason=f"needs the extra for {request.param}")
    return request.param


MODELS = {
    "plain": (mlp, lambda model: None),
    "int8 weights": (mlp, lambda model: quantizer(model, {"granularity": CHANNELS})),
    "int8 activations": (mlp, lambda model: quantizer(model, {"granularity": CHANNELS}, {})),
    "int4 in blocks": (cnn, lambda model: quantizer(model, {"dtype": "int4", "granularity": BLOCKS_8})),
    "clipping": (mlp, lambda model: quantizer(model, None, {"qscheme": "symmetric_with_clipping"})),
    "palettes": (mlp, lambda model: palettizer(model, n_bits=4)),
    "int8 palettes": (
        mlp,
        lambda model: palettizer(model, n_bits=4, lut_qspec=QuantizationSpec(dtype="int8")),
    ),
    "pruned": (mlp, lambda model: pruner(model)),
}


@pytest.mark.parametrize("suffix", SUFFIXES, indirect=True)
@pytest.mark.parametrize("case", MODELS)
@pytest.mark.filterwarnings("ignore:.*takes them for pruned ones")
def test_models(case, suffix, tmp_path):
    make, prepare = MODELS[case]
    model = make()
    prepare(model)
    before, keys = output(model), list(model.state_dict())
    path = tmp_path / f"model{suffix}"
    saved = save(model, path, example(model), progress=False)
    assert isinstance(saved, SavedModel)
    assert saved.path == path
    assert saved.size > 1000
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    if suffix == ".mlpackage":
        assert saved.difference is None or saved.difference < 1e-3
    else:
        assert saved.difference <= 1e-6
    assert list(model.state_dict()) == keys
    assert torch.equal(output(model), before)


@pytest.mark.parametrize("suffix", SUFFIXES, indirect=True)
def test_in_graph_mode(suffix, tmp_path):
    model = mlp()
    inputs = example(model)
    graph = quantizer(model, {"granularity": CHANNELS}, {}, mode="graph")._model.eval()
    saved = save(graph, tmp_path / f"model{suffix}", inputs, progress=False)
    assert saved.difference is None or saved.difference <= 1e-6


@pytest.mark.parametrize("suffix", [".aimodel", ".mlpackage", ".onnx"], indirect=True)
def test_compressed_files_are_smaller(suffix, tmp_path):
    torch.manual_seed(0)

    def size(prepare):
        model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 64)).eval()
        prepare(model)
        return save(model, tmp_path / f"model{suffix}", example(model), progress=False).size

    plain = size(lambda model: None)
    assert size(lambda model: quantizer(model, {"granularity": CHANNELS})) < 0.35 * plain
    assert size(lambda model: quantizer(model, {"dtype": "int4", "granularity": CHANNELS})) < 0.25 * plain


@pytest.mark.parametrize("suffix", [".aimodel", ".mlpackage"], indirect=True)
def test_half(suffix, tmp_path):
    model = mlp()
    path = tmp_path / f"model{suffix}"
    plain = save(model, path, example(model), progress=False)
    half = save(model, path, example(model), half=True, progress=False)
    assert half.size < plain.size
    assert half.difference is None or 0 < half.difference < 5e-3


class Convolution(nn.Module):
    """Has "lut" in the name of a layer, and two inputs and outputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Linear(64, 32)

    def forward(self, image, scale):
        y = self.convolution(image) * scale
        return y, {"sum": y.sum(-1)}


def test_names_that_confuse_the_converter(tmp_path):
    pytest.importorskip("coreai_torch", reason="needs the extra coreai")
    from coreai_opt.palettization import KMeansPalettizer

    model = Convolution().eval()
    inputs = (torch.randn(4, 64), torch.randn(4, 32))
    KMeansPalettizer(model).prepare(inputs)
    saved = save(model, tmp_path / "model.aimodel", inputs, progress=False)
    assert saved.difference <= 1e-6


@pytest.mark.parametrize("suffix", [".aimodel", ".onnx", ".mlpackage"], indirect=True)
def test_names_of_inputs_and_outputs(suffix, tmp_path):
    inputs = (torch.randn(4, 64), torch.randn(4, 32))

    class First(Convolution):
        def forward(self, image, scale):
            return super().forward(image, scale)[0]

    path = tmp_path / f"model{suffix}"
    save(First().eval(), path, inputs, output_names=["y"], progress=False)
    if suffix == ".onnx":
        import onnx

        graph = onnx.load(path).graph
        assert [each.name for each in graph.input] == ["image", "scale"]
        assert [each.name for each in graph.output] == ["y"]
    elif suffix == ".mlpackage":
        import coremltools

        spec = coremltools.models.MLModel(str(path), skip_model_load=True).get_spec()
        assert [each.name for each in spec.description.input] == ["image", "scale"]
        assert [each.name for each in spec.description.output] == ["y"]
    with pytest.raises(ValueError, match="input_names must hold 2 different names"):
        save(First(), path, inputs, input_names=["a"], progress=False)


def test_onnx_holds_integers(tmp_path):
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    import onnx

    model = mlp()
    quantizer(model, {"dtype": "int4", "granularity": CHANNELS}, {})
    save(model, tmp_path / "model.onnx", example(model), progress=False)
    graph = onnx.load(tmp_path / "model.onnx").graph
    types = {onnx.TensorProto.DataType.Name(each.data_type): list(each.dims) for each in graph.initializer}
    assert "INT4" in types
    operators = [node.op_type for node in graph.node]
    assert (operators.count("QuantizeLinear"), operators.count("DequantizeLinear")) == (4, 6)
    assert not any(node.metadata_props for node in graph.node)


BAD = {
    "no module": (lambda: (3, "m.pt2", ()), TypeError, "model must be"),
    "no tuple": (lambda: (mlp(), "m.pt2", torch.zeros(4, 64)), TypeError, "example_inputs must be a tuple"),
    "suffix": (lambda: (mlp(), "m.bin", (torch.zeros(4, 64),)), ValueError, "path must end in .aimodel"),
    "no folder": (lambda: (mlp(), "none/m.pt2", (torch.zeros(4, 64),)), FileNotFoundError, "no folder"),
    "wrong inputs": (lambda: (mlp(), "m.pt2", (torch.zeros(4, 63),)), ValueError, "example_inputs"),
    "too few inputs": (lambda: (mlp(), "m.pt2", ()), ValueError, "example_inputs"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case, tmp_path):
    arguments, error, message = BAD[case]
    model, name, inputs = arguments()
    with pytest.raises(error, match=message):
        save(model, tmp_path / name, inputs, progress=False)
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="cannot be written to"):
        save(mlp(), tmp_path / "m.pt2", (torch.zeros(4, 64),), progress=False)


@pytest.mark.parametrize("name", ["m.pt2", "m.safetensors"])
def test_folders_that_take_no_files(name):
    """For root, too, whom permissions do not stop."""
    with pytest.raises(OSError, match=r"/proc|cannot be written to"):
        save(mlp(), f"/proc/{name}", (torch.zeros(4, 64),), progress=False)


@pytest.fixture
def small_files():
    """Files end at 200 kB, as on a full disk."""
    resource = pytest.importorskip("resource", reason="limits are of POSIX")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("suffix", [".onnx", ".safetensors", ".mlpackage"])
def test_a_full_disk_leaves_the_old_file(suffix, tmp_path, small_files):
    pytest.importorskip(NEEDED.get(suffix, "torch"), reason=f"needs the extra for {suffix}")
    model, path = nn.Sequential(nn.Linear(64, 4096)).eval(), tmp_path / f"model{suffix}"
    path.write_text("old")
    if suffix != ".safetensors":  # what converters do once in a process may write files of its own
        save(model, tmp_path / f"first{suffix}", example(model), progress=False)
    before = {each.name for each in tmp_path.iterdir()}
    small_files()
    with pytest.raises((OSError, RuntimeError), match=r"too large|while writing"):
        save(model, path, example(model), progress=False)
    assert path.read_text() == "old"
    assert {each.name for each in tmp_path.iterdir()} == before


@pytest.mark.parametrize("suffix", [".aimodel", ".pt2"], indirect=True)
def test_a_full_disk_is_told_before_a_writer_ends_the_process(suffix, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    path = tmp_path / f"model{suffix}"
    path.write_text("old")
    with pytest.raises(OSError, match="too little space") as raised:
        save(mlp(), path, example(mlp()), progress=False)
    assert raised.value.errno == errno.ENOSPC
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("suffix", "package", "extra"),
    [
        (".aimodel", "coreai_torch", "coreai"),
        (".mlpackage", "coremltools", "coreml"),
        (".onnx", "onnxscript", "onnx"),
        (".onnx", "onnxruntime", "onnx"),
    ],
)
def test_a_missing_extra_is_told_and_no_file_is_written(suffix, package, extra, tmp_path, monkeypatch):
    for name in [*sys.modules]:
        if name.partition(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"pip install 'coreai-opt-fused\[{extra}\]'"):
        save(mlp(), tmp_path / f"m{suffix}", example(mlp()), progress=False)
    assert not any(tmp_path.iterdir())


REFUSED = {
    "arguments that are no tensors": (
        ".aimodel", lambda model: setattr(model, "forward", lambda x, n: x), {"inputs": (torch.zeros(2), 3)},
        ValueError, "example_inputs: inputs of this kind of file are tensors; got int",
    ),
    "options": (".pt2", lambda model: None, {"opset": 3}, ValueError, "no options"),
    "options of Core AI": (".aimodel", lambda model: None, {"opset": 3}, ValueError, "no options"),
    "opset that the exporter lacks": (".onnx", lambda model: None, {"opset": 3}, ValueError, "cannot write"),
    "opset": (
        ".onnx", lambda model: quantizer(model, {"dtype": "int4"}), {"opset": 20}, ValueError, "opset",
    ),
    "minimum": (
        ".onnx", lambda model: quantizer(model, {"qformulation": "minval"}), {}, ValueError, "minval",
    ),
    "dynamic": (
        ".onnx", lambda model: quantizer(model, None, {"qparam_calculator_cls": DynamicQParamsCalculator}),
        {}, NotImplementedError, "dynamically",
    ),
    "float4": (
        ".onnx",
        lambda model: quantizer(
            model, {"dtype": "float4_e2m1fn", "granularity": PerBlockGranularity(axis=1, block_size=32)}
        ),
        {}, ValueError, "float4",
    ),
    "no such system": (
        ".mlpackage", lambda model: None, {"minimum_deployment_target": "iOS3"}, ValueError, "must be one of",
    ),
    "4 bits on an older system": (
        ".mlpackage", lambda model: quantizer(model, {"dtype": "int4"}),
        {"minimum_deployment_target": "iOS17"}, ValueError, "4-bit integers, which needs iOS18",
    ),
    "activations on an older system": (
        ".mlpackage", lambda model: quantizer(model, None, {}), {"minimum_deployment_target": "iOS16"},
        ValueError, "quantized activation, which needs iOS17",
    ),
    "what would be stored as plain weights": (
        ".mlpackage", lambda model: palettizer(model, n_bits=4), {"minimum_deployment_target": "iOS15"},
        ValueError, "compressed weight, which needs iOS16",
    ),
    "finalized for Core AI": (
        ".mlpackage", lambda model: palettizer(model, n_bits=4).finalize(), {}, ValueError, "for Core AI",
    ),
    "another result": (".pt2", lambda model: None, {"tolerance": -1.0}, ValueError, "something else"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_written_leaves_the_old_file(case, tmp_path):
    suffix, prepare, options, error, message = REFUSED[case]
    pytest.importorskip(NEEDED[suffix], reason=f"needs the extra for {suffix}")
    pytest.importorskip("coreai_torch", reason="needs the extra coreai")
    model = mlp()
    prepare(model)
    path = tmp_path / f"model{suffix}"
    path.write_text("old")
    with pytest.raises(error, match=message):
        save(model, path, options.pop("inputs", example(model)), progress=False, **options)
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 32), nn.Linear(32, 16)

    def forward(self, x):
        return self.second(self.first(x).relu())


@pytest.mark.parametrize("suffix", [".aimodel", ".onnx", ".pt2"], indirect=True)
def test_dynamic_shapes(suffix, tmp_path):
    model = Scaled().eval()
    inputs = (torch.randn(4, 64),)
    quantizer(model, {"granularity": CHANNELS}, {})
    batch = torch.export.Dim("batch", min=2, max=64)
    path = tmp_path / f"model{suffix}"
    save(model, path, inputs, dynamic_shapes=({0: batch},), progress=False)
    with torch.no_grad():
        expected = model(other := torch.randn(7, 64))
    if suffix == ".pt2":
        found = torch.export.load(path).module()(other).detach()
    elif suffix == ".onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {"x": other.numpy()})[0])
    else:
        found = run_program(path, {"x": other})
    assert relative_difference([found], [expected]) < 0.02


@pytest.mark.parametrize("suffix", [".mlpackage"], indirect=True)
def test_fixed_shapes(suffix, tmp_path):
    with pytest.raises(ValueError, match=r"dynamic_shapes: \.mlpackage has fixed shapes"):
        save(mlp(), tmp_path / f"m{suffix}", example(mlp()), dynamic_shapes=({0: None},), progress=False)


def test_onnx_weights_in_a_file_beside_it(tmp_path, monkeypatch):
    """Files of ONNX end at 2 GiB: a small one is told to end earlier."""
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    from coreai_opt.export import onnx_program

    model, path = mlp(), tmp_path / "model.onnx"
    quantizer(model, {"dtype": "int4", "granularity": BLOCKS_8})
    inputs = example(model)
    whole = save(model, path, inputs, progress=False)
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]
    monkeypatch.setattr(onnx_program, "_MOST_IN_ONE_FILE", 1000)
    for _ in range(2):  # the second time over the first
        saved = save(model, path, inputs, progress=False)
        assert sorted(each.name for each in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
        assert saved.difference <= 1e-6
        assert saved.size >= whole.size - 1000
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        (tmp_path / name).rename(moved / name)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(moved / "model.onnx"), providers=["CPUExecutionProvider"])
    assert session.run(None, {"input": inputs[0].numpy()})[0].shape == (4, 16)


def test_two_files_are_both_there_or_both_as_before(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_text("old")
    (tmp_path / "model.onnx.data").write_text("old data")
    replace = os.replace

    def full(source, target):
        if str(source).endswith("written/model.onnx"):
            raise OSError("No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)

    def write():
        with written(path) as temporary:
            temporary.write_text("new")
            temporary.with_name("model.onnx.data").write_text("new data")

    with pytest.raises(OSError, match="No space"):
        write()
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == {
        "model.onnx": "old",
        "model.onnx.data": "old data",
    }


def test_weights_that_onnx_runtime_would_quantize_are_told(tmp_path):
    """By itself, it computes with int8 weights where only activations are quantized."""
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    import onnxruntime

    model, path = mlp(), tmp_path / "model.onnx"
    quantizer(model, None, {})
    (inputs,) = example(model)
    with pytest.warns(UserWarning, match=r"disabled_optimizers=\['WeightBiasQuantization'\]") as warned:
        saved = save(model, path, (inputs,), progress=False)
    assert saved.difference <= 1e-6
    assert "0.weight" in str(warned[0].message)
    expected = output(model)
    differences = []
    for disabled in ([], ["WeightBiasQuantization"]):
        session = onnxruntime.InferenceSession(
            str(path), providers=["CPUExecutionProvider"], disabled_optimizers=disabled
        )
        found = torch.from_numpy(session.run(None, {"input": inputs.numpy()})[0])
        differences.append(relative_difference([found], [expected]))
    assert differences[1] <= 1e-6
    assert differences[0] > differences[1]


def test_small_values_of_pruned_weights_are_told(tmp_path):
    pytest.importorskip("coremltools", reason="needs the extra coreml")
    model = mlp()
    pruner(model, sparsity=0.0)
    with pytest.warns(UserWarning, match="stores zeros"):
        save(model, tmp_path / "model.mlpackage", example(model), progress=False)


def test_a_folder_takes_the_place_of_a_file_and_of_a_folder(tmp_path):
    pytest.importorskip("coreai_torch", reason="needs the extra coreai")
    model, path = mlp(), tmp_path / "model.aimodel"
    path.write_text("old")
    for _ in range(2):
        save(model, path, example(model), progress=False)
        assert path.is_dir()
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_what_is_finalized_for_core_ai_can_be_saved(tmp_path):
    pytest.importorskip("coreai_torch", reason="needs the extra coreai")
    model = mlp()
    palettizer(model, n_bits=4).finalize()
    assert save(model, tmp_path / "model.aimodel", example(model), progress=False).difference <= 1e-6


def test_differences():
    a = [torch.tensor([3.0, 4.0])]
    assert relative_difference(a, a) == 0
    assert relative_difference([torch.tensor([3.0, 4.5])], a) == pytest.approx(0.1)
    assert relative_difference([torch.zeros(2)], [torch.zeros(2)]) == 0
    with pytest.raises(ValueError, match="shapes"):
        relative_difference([torch.zeros(3)], a)


class Residual(nn.Module):
    """Operations in the model's own forward, one layer called twice, and attention."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x):
        y = self.layer(self.layer(x).relu()) + x
        return y + self.attention(y, y, y, need_weights=False)[0], torch.matmul(x, y.transpose(-1, -2))


@pytest.mark.parametrize("suffix", [".aimodel", ".onnx", ".pt2"], indirect=True)
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_operations_in_a_models_own_forward(mode, suffix, tmp_path):
    from coreai_opt.quantization import Quantizer, QuantizerConfig

    inputs = (torch.randn(2, 5, 16),)
    model = Quantizer(Residual().eval(), QuantizerConfig(execution_mode=mode)).prepare(inputs)
    saved = save(model, tmp_path / f"model{suffix}", inputs, progress=False)
    assert saved.difference < 0.01
