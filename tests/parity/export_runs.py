"""Finalizes compressed models for Core AI and Core ML, and writes down their states.

Runs in the oracle's process, too: it uses what both packages have.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from coreai_opt import ExportBackend
from coreai_opt.palettization import KMeansPalettizer, KMeansPalettizerConfig, PalettizationSpec
from coreai_opt.palettization.config import ModuleKMeansPalettizerConfig
from coreai_opt.palettization.spec import PerGroupedChannelGranularity
from coreai_opt.pruning import MagnitudePruner, MagnitudePrunerConfig, PruningSpec
from coreai_opt.pruning.config import ModuleMagnitudePrunerConfig
from coreai_opt.quantization import ModuleQuantizerConfig, Quantizer, QuantizerConfig
from coreai_opt.quantization.spec import (
    PerBlockGranularity,
    PerChannelGranularity,
    QuantizationSpec,
    default_activation_quantization_spec,
)

from .snapshots import freeze

__all__ = ["CASES", "answer", "finalized"]

CHANNELS = PerChannelGranularity(axis=0)
GROUPS = PerGroupedChannelGranularity(axis=0, group_size=8)


def blocks(size: int) -> PerBlockGranularity:
    return PerBlockGranularity(axis=1, block_size=size)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)).eval()


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 3, padding=1)).eval()


def example(model: Any) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return (torch.randn(1, 16, 8, 8) if isinstance(model[0], nn.Conv2d) else torch.randn(4, 64),)


def quantized(model: nn.Module, weight: Any, activation: Any = None, mode: Any = "eager") -> Quantizer:
    act = None
    if activation is not None:
        act = {"*": QuantizationSpec(**activation) if activation else default_activation_quantization_spec()}
    config = QuantizerConfig(
        global_config=ModuleQuantizerConfig(
            op_state_spec=None if weight is None else {"weight": QuantizationSpec(**weight)},
            op_input_spec=act,
            op_output_spec=act,
        ),
        execution_mode=mode,
    )
    made = Quantizer(model, config)
    made.prepare(example(model))
    return made


def palettized(model: nn.Module, **fields: Any) -> KMeansPalettizer:
    module_config = ModuleKMeansPalettizerConfig(op_state_spec={"weight": PalettizationSpec(**fields)})
    made = KMeansPalettizer(model, KMeansPalettizerConfig(global_config=module_config))
    made.prepare(example(model))
    return made


def pruned(model: nn.Module) -> MagnitudePruner:
    module_config = ModuleMagnitudePrunerConfig(op_state_spec={"weight": PruningSpec(target_sparsity=0.5)})
    made = MagnitudePruner(model, MagnitudePrunerConfig(global_config=module_config))
    made.prepare(example(model))
    return made


def sparse(model: nn.Module, **fields: Any) -> KMeansPalettizer:
    pruned(model).finalize(backend=ExportBackend.Torch)
    return palettized(model, sparsity_detection_threshold=0.3, **fields)


INT8 = QuantizationSpec(dtype="int8")
FLOAT4 = {"dtype": "float4_e2m1fn", "granularity": blocks(32)}
Prepare = Callable[[nn.Module], Any]
CASES: dict[str, tuple[Callable[[], nn.Module], Prepare]] = {
    "int8": (mlp, lambda m: quantized(m, {"granularity": CHANNELS})),
    "int8 asymmetric": (mlp, lambda m: quantized(m, {"granularity": CHANNELS, "qscheme": "asymmetric"})),
    "int4 in blocks": (cnn, lambda m: quantized(m, {"dtype": "int4", "granularity": blocks(8)})),
    "int8 activations": (mlp, lambda m: quantized(m, {"granularity": CHANNELS}, {})),
    "uint4 in blocks": (
        mlp,
        lambda m: quantized(m, {"dtype": "uint4", "qscheme": "asymmetric", "granularity": blocks(32)}),
    ),
    "int4 minimum": (
        mlp, lambda m: quantized(m, {"dtype": "int4", "qformulation": "minval", "granularity": CHANNELS}),
    ),
    "float8": (mlp, lambda m: quantized(m, {"dtype": "float8_e4m3fn"}, {"dtype": "float8_e5m2"})),
    "float8 powers of two": (
        mlp,
        lambda m: quantized(
            m, {"dtype": "float8_e4m3fn", "scale_dtype": "float8_e8m0fnu", "granularity": blocks(32)}
        ),
    ),
    "float4": (mlp, lambda m: quantized(m, FLOAT4)),
    "int6": (mlp, lambda m: quantized(m, {"dtype": "int6"})),
    "mxint8": (
        mlp,
        lambda m: quantized(m, {"scale_dtype": "float8_e8m0fnu", "granularity": blocks(32)}),
    ),
    "graph int8": (mlp, lambda m: quantized(m, {"granularity": CHANNELS}, {}, "graph")),
    "graph float4": (mlp, lambda m: quantized(m, FLOAT4, None, "graph")),
    "palettes": (mlp, lambda m: palettized(m, n_bits=4)),
    "palettes of groups": (cnn, lambda m: palettized(m, n_bits=4, granularity=GROUPS)),
    "int8 palettes": (mlp, lambda m: palettized(m, n_bits=4, lut_qspec=INT8)),
    "8 bits of int8": (mlp, lambda m: palettized(m, n_bits=8, lut_qspec=INT8)),
    "groups, int8, scale": (
        mlp,
        lambda m: palettized(
            m, n_bits=4, granularity=GROUPS, lut_qspec=INT8, enable_per_channel_scale=True
        ),
    ),
    "sparse palettes": (mlp, lambda m: sparse(m, n_bits=4)),
    "sparse palettes of groups": (mlp, lambda m: sparse(m, n_bits=4, granularity=GROUPS)),
    "pruned": (mlp, pruned),
}  # fmt: skip


def finalized(name: str, backend: str) -> Any:
    """The state of a model finalized for a backend, and its output; or the class of the error."""
    make, prepare = CASES[name]
    model = make()
    inputs = example(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compressor = prepare(model)
        try:
            result = compressor.finalize(backend=ExportBackend(backend))
        except (ValueError, RuntimeError) as error:
            return type(error).__name__
        with torch.no_grad():
            output = result(*inputs)
    # Apple's 4-bit floating-point weights are a subclass that holds the bytes.
    state = {key: getattr(value, "elem", value) for key, value in sorted(result.state_dict().items())}
    return freeze({"state": state, "output": output})


def answer(job: dict[str, Any]) -> Any:
    return {(name, backend): finalized(name, backend) for name in CASES for backend in job["backends"]}
