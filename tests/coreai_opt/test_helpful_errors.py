"""Mistakes of the first minutes: the error says what was given, and what to do."""

import re

import pytest
import torch
from torch import nn

from coreai_opt.palettization import KMeansPalettizer, KMeansPalettizerConfig, PalettizationSpec
from coreai_opt.pruning import MagnitudePruner, MagnitudePrunerConfig
from coreai_opt.pruning.spec import PruningSpec
from coreai_opt.quantization import ModuleQuantizerConfig, QuantizationSpec, Quantizer, QuantizerConfig

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
CONFIGS = [QuantizerConfig, MagnitudePrunerConfig, KMeansPalettizerConfig]


def network():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


@pytest.mark.parametrize(
    ("make", "cure"),
    [
        (
            lambda: QuantizationSpec(granularity="per_channel"),
            "PerChannelGranularity(axis=0) or {'type': 'per_channel', 'axis': 0}; got the string",
        ),
        (lambda: QuantizationSpec(granularity="per_chanel"), "Did you mean 'per_channel'"),
        (
            lambda: PalettizationSpec(granularity="per_grouped_channel"),
            "PerGroupedChannelGranularity(axis=0, group_size=16)",
        ),
        (lambda: PruningSpec(pruning_scheme="n_m_structured"), "NMStructured(axis=0, n=2, m=4)"),
    ],
)
def test_a_string_for_an_object(make, cure):
    with pytest.raises(ValueError, match=re.escape(cure)):
        make()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("given", [3, None, [1]])
def test_from_dict_of_something_else(config, given):
    with pytest.raises(TypeError, match=f"config_dict must be a dict .*; got {type(given).__name__}"):
        config.from_dict(given)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_name_that_is_no_regular_expression_is_refused_when_it_is_set(config):
    with pytest.raises(re.error, match=r"'\*\.fc' is not a valid regular expression"):
        config(module_name_configs={"*.fc": None})
    made = config()
    with pytest.raises(re.error, match=r"'layers\[0' is not"):
        made.set_module_name("layers[0", None)
    assert made == config()


COMPRESSORS = {
    "eager": lambda model: Quantizer(model, QuantizerConfig(execution_mode="eager")),
    "graph": Quantizer,
    "pruner": MagnitudePruner,
    "palettizer": KMeansPalettizer,
}


@pytest.mark.parametrize("make", COMPRESSORS.values(), ids=COMPRESSORS)
def test_compiled_models(make):
    model = network()
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(RuntimeError, match=r"'the model' is the result of torch\.compile.*its _orig_mod"):
        make(compiled).prepare((X,))
    with pytest.raises(RuntimeError, match=r"'0' is the result of torch\.compile"):
        make(nn.Sequential(compiled)).prepare((X,))
    make(compiled._orig_mod).prepare((X,))
    in_place = network()
    in_place[0].compile(backend="eager")
    with pytest.raises(RuntimeError, match=r"'0' is compiled in place.*on the prepared model"):
        make(in_place).prepare((X,))


def test_a_mapping_in_a_tuple():
    with pytest.raises(TypeError) as caught:
        COMPRESSORS["eager"](network()).prepare(({"input": X},))
    assert "give the mapping itself" in caught.value.__notes__[0]
    COMPRESSORS["eager"](network()).prepare({"input": X})
    with pytest.raises(TypeError, match=r"example_inputs does not fit Sequential\.forward\(input\)"):
        COMPRESSORS["eager"](network()).prepare({"x": X})


@pytest.mark.parametrize("mode", ["eager", "pruner", "palettizer"])
def test_a_compressed_weight_that_is_assigned(mode):
    model = COMPRESSORS[mode](network()).prepare((X,))
    with pytest.raises(NotImplementedError, match=r"'0\.weight' is compressed.*before prepare"):
        model[0].weight = torch.zeros(8, 8)


class Norm(nn.Module):
    """As in language models: its weight is read by a multiplication."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))

    def forward(self, x):
        return self.weight * x


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("preset", ["w4", "w4_per_block", "w8"])
def test_presets_pass_over_the_weights_of_norms(mode, preset):
    config = getattr(ModuleQuantizerConfig.presets, preset)()
    model = nn.Sequential(nn.Linear(32, 32), Norm(), nn.Linear(32, 8))
    quantizer = Quantizer(model, QuantizerConfig(global_config=config, execution_mode=mode))
    quantizer.prepare((torch.randn(2, 32),))
    summary = quantizer.summary()
    assert [each.name for each in summary.compressed] == ["0.weight", "2.weight"]
    assert summary.left_out["with one axis, where the granularity names none"] == 1
