"""Compressors one after the other, and what becomes of both in each kind of file."""

import pytest
import torch

from coreai_opt import ExportBackend
from coreai_opt.export import load_checkpoint, save, save_checkpoint
from coreai_opt.quantization.spec import PerBlockGranularity, PerChannelGranularity
from tests.coreai_opt.export import core_ai
from tests.coreai_opt.export.models import example, mlp, output, palettizer, pruner, quantizer

CHANNELS = PerChannelGranularity(axis=0)
NEEDED = {".aimodel": "coreai_torch", ".mlpackage": "coremltools", ".onnx": "onnxscript", ".pt2": "torch"}
# Between two compressors a model is finalized for what the file is read by.
BACKENDS = {".aimodel": "coreai", ".mlpackage": "coreml", ".onnx": "torch", ".pt2": "torch"}


@pytest.fixture(params=NEEDED)
def suffix(request):
    pytest.importorskip(NEEDED[request.param], reason=f"needs the extra for {request.param}")
    return request.param


def palettes_then_activations(model, backend, mode):
    palettizer(model, n_bits=4).finalize(backend=backend)
    return quantizer(model, None, {}, mode)._model


def pruning_then_activations(model, backend, mode):
    pruner(model).finalize(backend=backend)
    return quantizer(model, None, {}, mode)._model


def pruning_then_weights(model, backend, mode):
    # What Core AI holds sparse is not quantized again: for it, zeros are quantized.
    pruner(model).finalize(backend="torch" if backend == "coreai" else backend)
    return quantizer(model, {"granularity": CHANNELS}, None, mode)._model


def pruning_then_palettes(model, backend, mode):
    pruner(model).finalize(backend=ExportBackend.Torch)
    palettizer(model, n_bits=4, sparsity_detection_threshold=0.3)
    return model


SEQUENCES = [palettes_then_activations, pruning_then_activations, pruning_then_weights, pruning_then_palettes]


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("sequence", SEQUENCES)
@pytest.mark.filterwarnings("ignore:.*takes them for pruned ones", "ignore:.*quantizes these to 8 bits")
def test_files(sequence, mode, suffix, tmp_path):
    if mode == "graph" and sequence is pruning_then_palettes:
        pytest.skip("palettes are eager")
    model = mlp()
    inputs = example(model)
    prepared = sequence(model, BACKENDS[suffix], mode).eval()
    with torch.no_grad():
        expected = prepared(*inputs)
    saved = save(prepared, tmp_path / f"model{suffix}", inputs, progress=False)
    assert saved.difference is None or saved.difference <= 1e-6
    with torch.no_grad():
        assert torch.equal(prepared(*inputs), expected)
    if suffix == ".aimodel" and sequence is pruning_then_palettes:
        found = core_ai.run_program(saved.path, {"input": inputs[0]})
        assert (found - expected).abs().max() <= 3e-7


@pytest.mark.parametrize("sequence", [pruning_then_weights, pruning_then_palettes])
def test_checkpoints(sequence, tmp_path):
    model = mlp()
    prepared = sequence(model, "torch", "eager")
    expected = output(prepared)
    path = tmp_path / "model.safetensors"
    assert save(prepared, path, example(model), progress=False).difference <= 1e-6
    other = mlp()
    load_checkpoint(other, path)
    assert torch.equal(output(other), expected)
    assert (other[0].weight == 0).float().mean() >= 0.5


def test_graphs_are_no_checkpoints(tmp_path):
    model = mlp()
    graph = quantizer(model, {"granularity": CHANNELS}, None, "graph")._model.eval()
    with pytest.raises(ValueError, match=r"model is a graph: .*execution_mode='eager'"):
        save(graph, tmp_path / "model.safetensors", example(model), progress=False)
    with pytest.raises(TypeError, match="model of transformers"):
        save_checkpoint(graph, tmp_path / "folder")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".onnx", ".mlpackage", ".safetensors"])
def test_graphs_for_core_ai_are_for_it_alone(suffix, tmp_path):
    pytest.importorskip("coreai_torch", reason="needs the extra coreai")
    model = mlp()
    finalized = quantizer(model, {"granularity": CHANNELS}, {}, "graph").finalize()
    with pytest.raises(ValueError, match="the model is finalized for Core AI"):
        save(finalized, tmp_path / f"model{suffix}", example(model), progress=False)
    assert not any(tmp_path.iterdir())
    saved = save(finalized, tmp_path / "model.aimodel", example(model), progress=False)
    assert saved.difference <= 1e-6


@pytest.mark.parametrize("suffix", [".aimodel", ".mlpackage"])
@pytest.mark.parametrize("dtype", ["int3", "int5", "int7", "nvfp4"])
def test_dtypes_that_the_converters_lack_give_no_file(dtype, suffix, tmp_path):
    pytest.importorskip(NEEDED[suffix], reason=f"needs the extra for {suffix}")
    fields = {"dtype": dtype, "granularity": CHANNELS}
    if dtype == "nvfp4":
        block = PerBlockGranularity(axis=1, block_size=16)
        fields = {"dtype": "float4_e2m1fn", "scale_dtype": "float8_e4m3fn", "granularity": block}
    model = mlp()
    quantizer(model, fields)
    with pytest.raises(NotImplementedError, match=r"'0\.weight' has the dtype torch\..* which Core"):
        save(model, tmp_path / f"model{suffix}", example(model), progress=False)
    assert not any(tmp_path.iterdir())
