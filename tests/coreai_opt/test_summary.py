"""What compressors tell of a prepare: a line, a table, and warnings of what had no effect."""

import logging

import pytest
import torch
from torch import nn

from coreai_opt.palettization import KMeansPalettizer, KMeansPalettizerConfig
from coreai_opt.pruning import MagnitudePruner, MagnitudePrunerConfig, ModuleMagnitudePrunerConfig
from coreai_opt.quantization import ModuleQuantizerConfig, Quantizer, QuantizerConfig

X = (torch.zeros(2, 3, 8, 8),)
MODES = ("eager", "graph")


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10, bias=False)
    )


def weights_only(mode, **fields):
    return QuantizerConfig(global_config=ModuleQuantizerConfig.presets.w8(), execution_mode=mode, **fields)


def messages(caplog, level):
    return [each.getMessage() for each in caplog.records if each.levelno == level]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Quantizer(network(), weights_only("eager")),
        lambda: Quantizer(network(), weights_only("graph")),
        lambda: MagnitudePruner(network()),
        lambda: KMeansPalettizer(network()),
    ],
    ids=["eager", "graph", "pruner", "palettizer"],
)
def test_prepare_logs_how_much_is_compressed(make, caplog):
    compressor = make()
    assert "not prepared" in repr(compressor)
    with caplog.at_level(logging.INFO, "coreai_opt"):
        compressor.prepare(X)
    summary = compressor.summary()
    # Weights of 216 and 2880 elements; biases and the batch norm's, 8 each, are left.
    assert summary.coverage == pytest.approx(3096 / 3120)
    assert [each.name for each in summary.compressed] == ["0.weight", "4.weight"]
    beginning = f"{type(compressor).__name__}: 2 of 5 tensors compressed, 99.2% of the parameters, "
    (line,) = messages(caplog, logging.INFO)
    assert line.startswith(beginning)
    assert line.endswith("bits per weight; left out: 3 without a specification")
    assert messages(caplog, logging.WARNING) == []
    assert repr(compressor) == f"<{line}>"
    rows = [row for row in str(summary).splitlines() if ".weight" in row or ".bias" in row]
    assert len(rows) == 5
    assert "10 × 288" in rows[-1]
    assert "2,880" in rows[-1]
    assert type(summary.tensors[-1].simulator).__name__.lstrip("_") in rows[-1]


def bits_of_8_bit_weights():
    """Weights in int8 with a float32 scale for each of 18 channels; 24 other elements in float32."""
    return (3096 * 8 + 18 * 32 + 24 * 32) / 3120


@pytest.mark.parametrize("mode", MODES)
def test_bits_per_weight(mode):
    quantizer = Quantizer(network(), weights_only(mode))
    quantizer.prepare(X)
    assert quantizer.summary().bits_per_weight == pytest.approx(bits_of_8_bit_weights())
    assert f"{bits_of_8_bit_weights():.2f} bits per weight" in repr(quantizer)
    (row,) = (row for row in str(quantizer.summary()).splitlines() if "4.weight" in row)
    assert f"{8 + 32 / 288:.2f}" in row


def test_bits_of_several_compressors():
    model = network()
    MagnitudePruner(model).prepare(X)
    quantizer = Quantizer(model, weights_only("eager"))
    quantizer.prepare(X)
    # Half of the elements in 8 bits, and a mask of one bit.
    bits = 3096 / 2 * 8 + 3096 + 18 * 32 + 24 * 32
    assert quantizer.summary().bits_per_weight == pytest.approx(bits / 3120)


@pytest.mark.parametrize("mode", MODES)
def test_why_parameters_are_left_out(mode):
    config = QuantizerConfig(
        global_config=ModuleQuantizerConfig.presets.w4_per_block(), execution_mode=mode
    ).set_module_name("0", None)
    model = nn.Sequential(*network(), nn.Linear(10, 3, bias=False), nn.Linear(3, 3, bias=False))
    quantizer = Quantizer(model, config)
    quantizer.prepare(X)
    why = {each.name: each.why for each in quantizer.summary().tensors}
    assert why["4.weight"] is None
    assert why["0.weight"] == why["0.bias"] == "by the configuration"
    assert why["1.weight"] == "without a specification"
    assert "that blocks do not fit (PerBlockGranularity" in why["5.weight"]
    assert "left out: 2 by the configuration, 2 without a specification, 2 that blocks do not fit" in repr(
        quantizer
    )


def test_why_weights_are_not_read_or_not_cut():
    quantizer = Quantizer(nn.Sequential(nn.GRU(8, 8)), QuantizerConfig(execution_mode="eager"))
    quantizer.prepare((torch.zeros(2, 3, 8),))
    assert quantizer.summary().left_out["that no operation reads which can be simulated"] == 2
    palettizer = KMeansPalettizer(
        nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 3)), KMeansPalettizerConfig.presets.w4()
    )
    palettizer.prepare((torch.zeros(2, 8),))
    why = {each.name: each.why for each in palettizer.summary().tensors}
    assert "that palettes do not fit (PerGroupedChannelGranularity" in why["1.weight"]
    assert why["0.weight"] is None


@pytest.mark.parametrize("mode", MODES)
def test_activations_are_counted_apart(mode):
    quantizer = Quantizer(network(), QuantizerConfig(execution_mode=mode))
    quantizer.prepare(X)
    summary = quantizer.summary()
    assert len(summary.compressed) == 2
    assert summary.activations > 0
    assert f"and {summary.activations} activations" in repr(quantizer)


def test_shared_weight_counts_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    pruner = MagnitudePruner(model)
    pruner.prepare((torch.zeros(2, 4),))
    assert len(pruner.summary().tensors) == 1
    assert pruner.summary().coverage == 1.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: Quantizer(network(), QuantizerConfig(global_config=None, execution_mode="eager")),
        lambda: Quantizer(network(), QuantizerConfig(global_config=None, execution_mode="graph")),
        lambda: MagnitudePruner(network(), MagnitudePrunerConfig(global_config=None)),
        lambda: KMeansPalettizer(network(), KMeansPalettizerConfig(global_config=None)),
    ],
    ids=["eager", "graph", "pruner", "palettizer"],
)
def test_nothing_compressed_is_a_warning(make, caplog):
    make().prepare(X)
    assert [each for each in messages(caplog, logging.WARNING) if "nothing was compressed" in each]


@pytest.mark.parametrize("mode", MODES)
def test_unknown_type_of_module_is_a_warning_with_the_nearest(mode, caplog):
    Quantizer(network(), weights_only(mode, module_type_configs={"torch.nn.Linaer": None})).prepare(X)
    (message,) = messages(caplog, logging.WARNING)
    assert "'torch.nn.Linaer' matches nothing" in message
    assert "'torch.nn.modules.linear.Linear'" in message


@pytest.mark.parametrize("mode", MODES)
def test_unknown_state_is_a_warning_with_the_nearest(mode, caplog):
    entry = ModuleQuantizerConfig.presets.w8()
    entry.op_state_spec = {**entry.op_state_spec, "bais": None}
    Quantizer(network(), QuantizerConfig(global_config=entry, execution_mode=mode)).prepare(X)
    (message,) = messages(caplog, logging.WARNING)
    assert "op_state_spec: 'bais' matches nothing" in message
    assert "'bias'" in message


def test_unknown_type_of_operation_is_a_warning_with_the_nearest(caplog):
    entry = ModuleMagnitudePrunerConfig(op_type_config={"lineer": None})
    MagnitudePruner(network(), MagnitudePrunerConfig(global_config=entry)).prepare(X)
    (message,) = messages(caplog, logging.WARNING)
    assert "'lineer'" in message
    assert "'linear'" in message


def test_summary_needs_a_prepared_model():
    with pytest.raises(RuntimeError, match="not prepared"):
        MagnitudePruner(network()).summary()
