from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from coreai_opt.common import ExportBackend
from coreai_opt.inspection import bits_per_weight
from coreai_opt.palettization import KMeansPalettizer, KMeansPalettizerConfig, ModuleKMeansPalettizerConfig
from coreai_opt.palettization import PalettizationSpec as Palettes
from coreai_opt.palettization.spec import PerGroupedChannelGranularity
from coreai_opt.pruning import (
    MagnitudePruner,
    MagnitudePrunerConfig,
    ModuleMagnitudePrunerConfig,
    PruningSpec,
)
from coreai_opt.pruning.spec import PruneImplBase, Unstructured
from coreai_opt.quantization import ModuleQuantizerConfig, Quantizer, QuantizerConfig
from coreai_opt.quantization.spec import (
    PerBlockGranularity,
    PerChannelGranularity,
    default_activation_quantization_spec,
)
from coreai_opt.quantization.spec import QuantizationSpec as Spec

CHANNELS, BLOCKS = PerChannelGranularity(axis=0), PerBlockGranularity(axis=1, block_size=32)
GROUPS = PerGroupedChannelGranularity(axis=0, group_size=8)
# Weights of 32 x 64 and 16 x 32; 32 biases, a norm's 128 values and its count of 64 bits.
ELEMENTS, REST = 2721, 32 * 32 + 128 * 32 + 64


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Linear(32, 16, bias=False))
    return layers.to(dtype).eval()


def weight_only(spec: Spec, **names: Any) -> QuantizerConfig:
    config = ModuleQuantizerConfig(op_state_spec={"weight": spec}, op_input_spec=None, op_output_spec=None)
    return QuantizerConfig(global_config=config, execution_mode="eager")


def quantized(spec: Spec, dtype: torch.dtype = torch.float32) -> nn.Module:
    return Quantizer(model(dtype), weight_only(spec)).prepare((torch.randn(4, 64, dtype=dtype),))


def palettized(spec: Palettes, dtype: torch.dtype = torch.float32) -> nn.Module:
    config = ModuleKMeansPalettizerConfig(
        op_state_spec={"weight": spec}, enable_fast_kmeans_mode=spec.cluster_dim == 1
    )
    return KMeansPalettizer(model(dtype), KMeansPalettizerConfig(global_config=config)).prepare(
        (torch.randn(4, 64, dtype=dtype),)
    )


@pytest.mark.parametrize(
    ("spec", "bits"),
    [
        (Spec(dtype="int8", granularity=CHANNELS), 27200),
        (Spec(dtype="int4", granularity=BLOCKS), 17984),
        (Spec(dtype="int4", qscheme="asymmetric", granularity=BLOCKS), 18304),
        (Spec(dtype="int4", qformulation="minval", granularity=BLOCKS), 20544),
        (Spec(dtype="uint4", granularity=CHANNELS), 16960),
        (Spec(dtype="int6"), 20608),
        (Spec(dtype="int8", scale_dtype=torch.float8_e8m0fnu, granularity=BLOCKS), 26304),
        (Spec(dtype="float8_e4m3fn"), 25728),
        (Spec(dtype="float4_e2m1fn", granularity=BLOCKS), 16064),
    ],
)
def test_quantized_weights(spec: Spec, bits: int):
    found = bits_per_weight(quantized(spec))
    assert (found.total_bits, found.total_weights) == (bits, ELEMENTS)
    assert found.bpw == bits / ELEMENTS


def test_formats_beyond_apples():
    sixteen = PerBlockGranularity(axis=1, block_size=16)
    nvfp4 = Spec(dtype="float4_e2m1fn", scale_dtype=torch.float8_e4m3fn, granularity=sixteen)
    assert bits_per_weight(quantized(nvfp4)).total_bits == REST + 2560 * 4 + 160 * 8 + 2 * 32
    assert bits_per_weight(quantized(Spec(dtype="int3"))).total_bits == REST + 2560 * 3 + 2 * 32


def test_dense_models():
    found = bits_per_weight(model())
    assert (found.total_bits, found.total_weights) == (87104, ELEMENTS)
    assert found.per_module_map == {"0": 32.0, "1": (128 * 32 + 64) / 129, "2": 32.0}
    assert bits_per_weight(model(torch.float16)).total_bits == 43584
    assert (
        repr(bits_per_weight(nn.Linear(2, 2)))
        == "BitsPerWeightResult(bpw=32.0000, total_bits=192, total_weights=6)"
    )
    empty = bits_per_weight(nn.ReLU())
    assert (empty.bpw, empty.total_bits, empty.total_weights, empty.per_module_map) == (0.0, 0, 0, {})


def test_simulators_of_activations_store_nothing():
    spec = Spec(dtype="int8", granularity=CHANNELS)
    config = ModuleQuantizerConfig(
        op_state_spec={"weight": spec}, op_input_spec={"*": default_activation_quantization_spec()}
    )
    prepared = Quantizer(model(), QuantizerConfig(global_config=config, execution_mode="eager")).prepare(
        (torch.randn(4, 64),)
    )
    assert bits_per_weight(prepared).total_bits == 27200


def test_scales_have_the_bits_of_the_weights_dtype():
    assert (
        bits_per_weight(quantized(Spec(dtype="int8", granularity=CHANNELS), torch.float16)).total_bits
        == 23872
    )


@pytest.mark.parametrize(
    ("spec", "bits"),
    [
        (Palettes(n_bits=4), 16448),
        (Palettes(n_bits=4, granularity=GROUPS), 18496),
        (Palettes(n_bits=4, cluster_dim=2), 12352),
        (Palettes(n_bits=4, enable_per_channel_scale=True), 17984),
        (Palettes(n_bits=4, lut_qspec=Spec(dtype="int8")), 15744),
        (Palettes(n_bits=4, lut_qspec=Spec(dtype="float8_e4m3fn")), 15744),
        (Palettes(n_bits=4, granularity=GROUPS, lut_qspec=Spec(dtype="uint8", qscheme="asymmetric")), 16432),
    ],
)
def test_palettized_weights(spec: Palettes, bits: int):
    found = bits_per_weight(palettized(spec))
    assert (found.total_bits, found.total_weights) == (bits, ELEMENTS)


def test_palettes_of_half_precision():
    assert bits_per_weight(palettized(Palettes(n_bits=4), torch.float16)).total_bits == 13376


def pruned(sparsity: float, base: nn.Module | None = None) -> nn.Module:
    config = ModuleMagnitudePrunerConfig(op_state_spec={"weight": PruningSpec(target_sparsity=sparsity)})
    return MagnitudePruner(base or model(), MagnitudePrunerConfig(global_config=config)).prepare(
        (torch.randn(4, 64),)
    )


def test_pruned_weights_count_as_a_mask_and_the_values_that_stay():
    # Apple's package raises NotImplementedError.
    kept = (2048 + 512) // 4
    assert bits_per_weight(pruned(0.75)).total_bits == REST + 2560 + kept * 32
    # A mask that saves less than it takes is not stored.
    assert bits_per_weight(pruned(0.0)).total_bits == 87104


def test_a_tensor_that_is_pruned_and_quantized():
    layers = quantized(Spec(dtype="int8", granularity=CHANNELS))
    for index in (0, 2):
        mask = PruneImplBase.get_class("default")(target_sparsity=0.75, pruning_scheme=Unstructured())
        parametrize.register_parametrization(layers[index], "weight", mask, unsafe=True)
    assert bits_per_weight(layers).total_bits == REST + 2560 + 640 * 8 + 48 * 32


def finalized(
    spec: Spec | Palettes | float, backend: ExportBackend, dtype: torch.dtype = torch.float32
) -> int:
    """The bits of a finalized model, checked against those of the prepared one."""
    x = (torch.randn(4, 64, dtype=dtype),)
    compressor: Any
    if isinstance(spec, Spec):
        compressor = Quantizer(model(dtype), weight_only(spec))
    elif isinstance(spec, Palettes):
        config = ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
        compressor = KMeansPalettizer(model(dtype), KMeansPalettizerConfig(global_config=config))
    else:
        sparse = ModuleMagnitudePrunerConfig(op_state_spec={"weight": PruningSpec(target_sparsity=spec)})
        compressor = MagnitudePruner(model(dtype), MagnitudePrunerConfig(global_config=sparse))
    prepared = bits_per_weight(compressor.prepare(x))
    found = bits_per_weight(compressor.finalize(backend=backend))
    assert found.total_weights == prepared.total_weights == ELEMENTS
    if backend != ExportBackend.Torch:
        assert found.total_bits == prepared.total_bits
        assert found.per_module_map == prepared.per_module_map
    return found.total_bits


@pytest.mark.parametrize(
    "spec",
    [
        Spec(dtype="int8", granularity=CHANNELS),
        Spec(dtype="int4", granularity=BLOCKS),
        Spec(dtype="int4", qscheme="asymmetric", granularity=BLOCKS),
        Spec(dtype="uint4", granularity=CHANNELS),
        Palettes(n_bits=4),
        Palettes(n_bits=2, granularity=GROUPS),
        0.75,
    ],
)
@pytest.mark.parametrize("backend", ExportBackend)
def test_finalized_models(spec: Spec | Palettes | float, backend: ExportBackend):
    # Apple's package loses the weights of models for Core AI, and counts those for Core ML densely.
    bits = finalized(spec, backend)
    assert (bits == 87104) == (backend == ExportBackend.Torch)


def test_finalized_models_in_half_precision():
    for spec in (Spec(dtype="int8", granularity=CHANNELS), Palettes(n_bits=4)):
        finalized(spec, ExportBackend.CoreAI, torch.float16)


@pytest.mark.parametrize(
    "spec",
    [
        Spec(dtype="float8_e4m3fn"),
        Spec(dtype="float4_e2m1fn", granularity=BLOCKS),
        Spec(dtype="int4", qformulation="minval", granularity=BLOCKS),
    ],
)
def test_formats_for_core_ai(spec: Spec):
    finalized(spec, ExportBackend.CoreAI)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


def test_shared_tensors_count_once():
    found = bits_per_weight(Tied())
    assert (found.total_bits, found.total_weights, found.per_module_map) == (2048, 64, {"a": 32.0})
    prepared = Quantizer(Tied(), weight_only(Spec(dtype="int8"))).prepare((torch.randn(1, 8),))
    found = bits_per_weight(prepared)
    assert (found.total_bits, found.total_weights, found.per_module_map) == (544, 64, {"a": 8.5})


def test_other_parametrizations():
    orthogonal = torch.nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))
    assert (bits_per_weight(orthogonal).total_bits, bits_per_weight(orthogonal).total_weights) == (640, 20)
    normed = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(NotImplementedError, match=r"'0\.weight'"):
        bits_per_weight(normed)


def test_graphs_are_refused():
    program = torch.export.export(nn.Linear(2, 2), (torch.randn(1, 2),))
    for each in (program, program.module()):
        with pytest.raises(NotImplementedError, match="graph"):
            bits_per_weight(each)  # type: ignore[arg-type]


def test_which_layers_are_palettized_decides():
    def bits(**n_bits: int) -> int:
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16, bias=False)).eval()
        configs = {
            name.removeprefix("layer"): ModuleKMeansPalettizerConfig(
                op_state_spec={"weight": Palettes(n_bits=n)}
            )
            for name, n in n_bits.items()
        }
        KMeansPalettizer(
            layers, KMeansPalettizerConfig(global_config=None, module_name_configs=configs)
        ).prepare((torch.randn(16, 64),))
        return bits_per_weight(layers).total_bits

    assert bits(layer0=2) == 21632
    assert bits(layer0=6) == 31744
    assert bits(layer2=2) == 67712
    assert bits(layer2=6) == 71680
    assert bits(layer0=6, layer2=2) == 16512
