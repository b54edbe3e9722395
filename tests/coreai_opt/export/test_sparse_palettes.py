"""Palettized weights whose zeros are left out."""

import logging

import pytest
import torch
from torch import nn

from coreai_opt import ExportBackend
from coreai_opt.palettization import KMeansPalettizer, KMeansPalettizerConfig, PalettizationSpec
from coreai_opt.palettization.config import ModuleKMeansPalettizerConfig
from coreai_opt.palettization.spec import PerGroupedChannelGranularity
from coreai_opt.quantization.spec import QuantizationSpec
from tests.coreai_opt.export import core_ai, core_ml
from tests.coreai_opt.export.models import example, mlp, output, palettizer, pruner

GROUPS, COLUMNS = (PerGroupedChannelGranularity(axis=axis, group_size=8) for axis in (0, 1))
INT8 = QuantizationSpec(dtype="int8")
LUT, SHIFT = "lut_to_dense", "blockwise_shift_scale"
SPARSE = ("build_sparse_with_bitmask", "sparse_with_bitmask_to_dense")


def half_zero(**fields):
    """A palettizer for a model half of whose weights are zeros, and that model."""
    model = mlp()
    pruner(model).finalize(backend=ExportBackend.Torch)
    return palettizer(model, n_bits=4, sparsity_detection_threshold=0.3, **fields), model


CASES = {
    "10": ({}, 0, ["1024xui4", "1x16x1xf32", "32x64xui1"]),
    "groups of unequal numbers": ({"granularity": GROUPS}, 0, ["4x16x1xf32", "32x64xui1"]),
    "vectors": ({"cluster_dim": 2}, 0, ["512xui4", "1x16x2xf32"]),
    "scale of channels": ({"enable_per_channel_scale": True}, 2, ["1024xui4", "32x1xf32"]),
    "int8 tables": ({"lut_qspec": INT8}, 2, ["1x16x1xsi8", "1x1xf32"]),
    "groups, int8 tables, scale of channels": (
        {"granularity": GROUPS, "lut_qspec": INT8, "enable_per_channel_scale": True},
        2,
        ["4x16x1xsi8", "32x1xf32"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_core_ai(case, tmp_path):
    pytest.importorskip("coreai_torch", reason="needs the extra coreai")
    fields, scales, constants = CASES[case]
    made, model = half_zero(**fields)
    expected = output(model)
    finalized = made.finalize()
    assert (output(finalized) - expected).abs().max() <= 1.2e-7
    program = core_ai.convert(finalized, example(model))
    found = core_ai.operations(program)
    assert [found[name] for name in (LUT, *SPARSE, SHIFT)] == [2, 2, 2, scales]
    assert set(constants) <= set(core_ai.constants(program))
    assert (core_ai.run(program, example(model), tmp_path) - expected).abs().max() <= 3e-7


FOURS = PerGroupedChannelGranularity(axis=0, group_size=4)


@pytest.mark.parametrize(
    ("fields", "indices", "lut"),
    [
        ({}, (134,), (1, 4, 1)),
        # Groups that keep fewer values than the fullest, which keeps 35, store zeros.
        ({"granularity": FOURS}, (140,), (4, 4, 1)),
        ({"cluster_dim": 2}, (67,), (1, 4, 2)),
    ],
    ids=["scalars", "groups", "vectors"],
)
def test_sizes_are_those_of_coreai_opt_0_4_0(fields, indices, lut):
    """Of a (16, 16) weight of which 134 values are kept."""
    pytest.importorskip("coreai_torch", reason="needs the extra coreai")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16)).eval()
    with torch.no_grad():
        weight = model[0].weight
        weight[weight.abs() < 0.12] = 0
    assert int(weight.count_nonzero()) == 134
    config = ModuleKMeansPalettizerConfig(
        op_state_spec={"weight": PalettizationSpec(n_bits=2, sparsity_detection_threshold=0.2, **fields)},
        enable_fast_kmeans_mode="cluster_dim" not in fields,
    )
    x = torch.randn(2, 16)
    made = KMeansPalettizer(model, KMeansPalettizerConfig(global_config=config))
    made.prepare((x,))
    expected = model(x)
    finalized = made.finalize()
    shapes = {name.rpartition(".")[2]: tuple(value.shape) for name, value in finalized.state_dict().items()}
    assert (shapes["nonzero_indices"], shapes["lut"], shapes["mask"]) == (indices, lut, (16, 16))
    assert torch.equal(finalized(x), expected)


def test_all_zeros_are_stored_densely(caplog):
    pytest.importorskip("coreai_torch", reason="needs the extra coreai")
    model = mlp()
    with torch.no_grad():
        model[0].weight.zero_()
    made = palettizer(model, n_bits=4, sparsity_detection_threshold=0.3)
    expected = output(model)
    with caplog.at_level(logging.WARNING):
        made.finalize()
    assert "0.weight" in caplog.text
    assert torch.equal(output(model), expected)
    assert model[0].parametrizations.weight[0].indices.shape == (32, 64)


REFUSED = {
    "columns": ({"granularity": COLUMNS}, r"^'0\.weight'"),
    "quantized tables of vectors": ({"cluster_dim": 2, "lut_qspec": INT8}, r"^'0\.weight'"),
    "zero points": ({"lut_qspec": QuantizationSpec(dtype="uint8", qscheme="asymmetric")}, "zero points"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_stored_is_refused_and_changes_nothing(case):
    pytest.importorskip("coreai_torch", reason="needs the extra coreai")
    fields, message = REFUSED[case]
    made, model = half_zero(**fields)
    expected = output(model)
    with pytest.raises(ValueError, match=message):
        made.finalize()
    assert torch.equal(output(model), expected)
    made.finalize(backend=ExportBackend.Torch)


def test_core_ml():
    pytest.importorskip("coremltools", reason="needs the extra coreml")
    made, model = half_zero()
    expected = output(model)
    made.finalize(backend=ExportBackend.CoreML)
    assert torch.equal(output(model), expected)
    assert model.state_dict()["0._COREML_/weight/compression_type"].tolist() == [1, 2]
    converted = core_ml.convert(model, example(model))
    found = core_ml.operations(converted)
    assert (found["constexpr_lut_to_sparse"], found["constexpr_sparse_to_dense"]) == (2, 2)
    constants = core_ml.constants(converted, "constexpr_lut_to_sparse")[0]
    assert constants["indices_nonzero_data"] == ("uint4", (1024,))
    assert constants["lut"] == ("fp16", (1, 1, 16, 1))


@pytest.mark.parametrize("fields", [{"cluster_dim": 2}, {"lut_qspec": INT8}])
def test_core_ml_refuses(fields):
    made, model = half_zero(**fields)
    expected = output(model)
    with pytest.raises(ValueError, match="zeros"):
        made.finalize(backend=ExportBackend.CoreML)
    assert torch.equal(output(model), expected)
