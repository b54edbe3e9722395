"""Quantizer.finalize in graph mode: what the graph holds and computes, and what is refused."""

import copy

import pytest
import torch
from torch import nn

from coreai_opt import CoreMLExportError, ExportBackend
from coreai_opt.quantization import _export_utils as handlers
from coreai_opt.quantization.spec import (
    DynamicQParamsCalculator,
    PerBlockGranularity,
    PerChannelGranularity,
    QuantizationSpec,
)
from tests.coreai_opt.export import core_ai, core_ml
from tests.coreai_opt.export.models import cnn, example, mlp, palettizer, pruner, quantizer

CHANNELS = PerChannelGranularity(axis=0)
BLOCKS_8, BLOCKS_32 = (PerBlockGranularity(axis=1, block_size=size) for size in (8, 32))
SHIFT, LUT = "blockwise_shift_scale", "lut_to_dense"
PAIRS = {"quantize": 3, "dequantize": 3}


@pytest.fixture(autouse=True)
def _converters():
    pytest.importorskip("coreai_torch", reason="needs the extra coreai")
    pytest.importorskip("coremltools", reason="needs the extra coreml")


def prepared(make, weight, activation=None):
    """The quantizer, the prepared graph module, inputs, and the output for them."""
    model = make()
    inputs = example(model)
    made = quantizer(model, weight, activation, mode="graph")
    graph = made._model.eval()
    with torch.no_grad():
        return made, graph, inputs, graph(*inputs)


CASES = {
    "1": (mlp, {"granularity": CHANNELS}, None, {SHIFT: 2}, ["32x64xsi8", "32x1xf32", "32x1xsi8"]),
    "2": (cnn, {"dtype": "int4", "granularity": BLOCKS_8}, None, {SHIFT: 2}, ["32x16x3x3xsi4"]),
    "3": (mlp, {"granularity": CHANNELS}, {}, {SHIFT: 2, **PAIRS}, ["32x64xsi8", "si8"]),
    "4c": (
        mlp, {"granularity": CHANNELS}, {"dtype": "float8_e4m3fn"}, {SHIFT: 2, **PAIRS}, ["f8E4M3FN"],
    ),
    "5": (
        mlp, {"dtype": "float4_e2m1fn", "granularity": BLOCKS_32}, None, {SHIFT: 2},
        ["32x64xf4E2M1FN", "32x2xf8E8M0FNU"],
    ),
    "clipping": (
        mlp, {"granularity": CHANNELS}, {"qscheme": "symmetric_with_clipping"}, {SHIFT: 2, **PAIRS}, [],
    ),
    "minimum": (
        mlp, {"granularity": CHANNELS, "qformulation": "minval", "qscheme": "symmetric_with_clipping"},
        {"qformulation": "minval", "qscheme": "asymmetric"}, {SHIFT: 2, **PAIRS}, [],
    ),
    "activations per channel": (
        mlp, None, {"granularity": PerChannelGranularity(axis=-1)}, PAIRS, ["64xf32"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_core_ai(case, tmp_path):
    make, weight, activation, operations, constants = CASES[case]
    made, graph, inputs, expected = prepared(make, weight, activation)
    finalized = made.finalize()
    assert finalized is not graph
    with torch.no_grad():
        assert torch.equal(finalized(*inputs), expected)
        assert torch.equal(graph(*inputs), expected)
    program = core_ai.convert(finalized, inputs)
    found = core_ai.operations(program)
    assert {name: found[name] for name in (SHIFT, "quantize", "dequantize") if name in found} == operations
    assert set(constants) <= set(core_ai.constants(program))
    assert (core_ai.run(program, inputs, tmp_path) - expected).abs().max() <= 3e-7


@pytest.mark.parametrize("case", ["1", "2", "3", "clipping"])
def test_core_ml(case):
    make, weight, activation, operations, _ = CASES[case]
    made, _, inputs, expected = prepared(make, weight, activation)
    finalized = made.finalize(backend=ExportBackend.CoreML)
    with torch.no_grad():
        assert torch.equal(finalized(*inputs), expected)
    found = core_ml.operations(core_ml.convert(finalized, inputs))
    names = {SHIFT: "constexpr_blockwise_shift_scale", "quantize": "quantize", "dequantize": "dequantize"}
    assert {name: found[names[name]] for name in operations} == operations
    state = finalized.state_dict()
    assert state["0._COREML_/weight/compression_type"].tolist() == [3]
    assert state["_COREML_/metadata_version"] == 1


def test_buffers_have_apples_names():
    made, *_ = prepared(mlp, {"granularity": CHANNELS}, {})
    state = {name: tuple(value.shape) for name, value in made.finalize().state_dict().items()}
    expected = {"0_weight_quantized": (32, 64), "0_weight_scale": (32, 1), "0_weight_zero_point": (32, 1)}
    assert expected.items() <= state.items()
    assert state["activation_post_process_0_scale"] == state["activation_post_process_0_zero_point"] == ()
    assert state["0.weight"] == state["2.weight"] == (0,)


def with_batch_norm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    nn.init.normal_(model[1].running_mean)
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    return model.eval()


@pytest.mark.parametrize("backend", [ExportBackend.CoreAI, ExportBackend.CoreML])
def test_batch_norms_are_folded(backend):
    made, _, inputs, expected = prepared(with_batch_norm, {"granularity": CHANNELS}, {})
    finalized = made.finalize(backend=backend)
    with torch.no_grad():
        assert (finalized(*inputs) - expected).abs().max() <= 2e-6
    names = [str(node.target) for node in finalized.graph.nodes]
    assert not any("batch_norm" in name for name in names)


def test_the_prepared_model_can_be_finalized_for_several_backends():
    made, graph, inputs, expected = prepared(mlp, {"granularity": CHANNELS}, {})
    for backend in (ExportBackend.CoreAI, ExportBackend.CoreML, ExportBackend.Torch, ExportBackend.CoreAI):
        with torch.no_grad():
            assert torch.equal(made.finalize(backend=backend)(*inputs), expected)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(made.finalize(graph))(*inputs), expected)


def test_palettes_then_activations(tmp_path):
    model = mlp()
    palettizer(model, n_bits=4, lut_qspec=QuantizationSpec(dtype="int8")).finalize()
    made, _, inputs, expected = prepared(lambda: model, {"granularity": CHANNELS}, {})
    program = core_ai.convert(made.finalize(), inputs)
    found = core_ai.operations(program)
    assert (found[LUT], found[SHIFT], found["quantize"], found["dequantize"]) == (2, 2, 3, 3)
    assert (core_ai.run(program, inputs, tmp_path) - expected).abs().max() <= 3e-7


def test_pruning_then_activations(tmp_path):
    model = mlp()
    pruner(model).finalize()
    made, _, inputs, expected = prepared(lambda: model, None, {})
    program = core_ai.convert(made.finalize(), inputs)
    assert core_ai.operations(program)["sparse_with_bitmask_to_dense"] == 2
    assert (core_ai.run(program, inputs, tmp_path) - expected).abs().max() <= 3e-7


def test_core_ml_palettes_then_activations():
    model = mlp()
    fields = {"n_bits": 4, "lut_qspec": QuantizationSpec(dtype="int8")}
    palettizer(model, **fields).finalize(backend=ExportBackend.CoreML)
    made, _, inputs, _ = prepared(lambda: model, None, {})
    found = core_ml.operations(core_ml.convert(made.finalize(backend=ExportBackend.CoreML), inputs))
    assert (found["constexpr_lut_to_dense"], found["quantize"], found["dequantize"]) == (2, 3, 3)


def test_one_file_a_weight(tmp_path):
    made, _, inputs, expected = prepared(mlp, {"granularity": CHANNELS}, {})
    finalized = made.finalize(mmap_dir=tmp_path / "new")
    files = sorted(each.name for each in (tmp_path / "new").iterdir())
    assert files == ["0_weight.safetensors", "2_weight.safetensors"]
    with torch.no_grad():
        assert torch.equal(finalized(*inputs), expected)


REFUSED = {
    "nothing": (None, None, ValueError, ValueError),
    "int4 activations": (None, {"dtype": "int4"}, RuntimeError, CoreMLExportError),
    "dynamic": (
        None, {"qparam_calculator_cls": DynamicQParamsCalculator}, NotImplementedError, NotImplementedError,
    ),
    "float4 in other blocks": (
        {"dtype": "float4_e2m1fn", "granularity": PerBlockGranularity(axis=1, block_size=16)}, None,
        RuntimeError, CoreMLExportError,
    ),
    "minimum": ({"qformulation": "minval"}, None, None, RuntimeError),
    "int5": ({"dtype": "int5"}, None, NotImplementedError, NotImplementedError),
    "nvfp4": (
        {
            "dtype": "float4_e2m1fn",
            "scale_dtype": "float8_e4m3fn",
            "granularity": PerBlockGranularity(axis=1, block_size=16),
        },
        None, NotImplementedError, NotImplementedError,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_expressed_is_refused(case):
    weight, activation, core_ai_error, core_ml_error = REFUSED[case]
    made, graph, inputs, expected = prepared(mlp, weight, activation)
    for backend, error in ((ExportBackend.CoreAI, core_ai_error), (ExportBackend.CoreML, core_ml_error)):
        if error is not None:
            with pytest.raises(error, match=r"finalize|CoreML export does not support"):
                made.finalize(backend=backend)
    with torch.no_grad():
        assert torch.equal(graph(*inputs), expected)


def test_granularities_of_other_packages_are_finalized_by_their_handlers(monkeypatch):
    class Rows(PerBlockGranularity):
        pass

    monkeypatch.setattr(handlers, "_graph", {})
    made, *_ = prepared(mlp, None, {"granularity": Rows(axis=1, block_size=8)})
    seen = []

    def handler(model, node, simulator):
        seen.append(simulator)
        node.replace_all_uses_with(node.args[0])
        model.graph.erase_node(node)

    handlers.register_graph_activation_export_handler(Rows, handler)
    finalized = made.finalize()
    assert len(seen) == 3
    assert not any("activation_post_process" in str(node.target) for node in finalized.graph.nodes)
