"""Configs for whole models, built from public names only: each takes a model's name and gives a config."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from coreai_opt.quantization import ModuleQuantizerConfig, QuantizerConfig
from coreai_opt.quantization.config import OpQuantizerConfig, QATSchedule
from coreai_opt.quantization.spec import (
    PerBlockGranularity,
    PerChannelGranularity,
    PerTensorGranularity,
    QuantizationGranularity,
    QuantizationScheme,
    QuantizationSpec,
)

__all__ = ["CONFIGS"]


def spec(dtype: Any = torch.int8, granularity: QuantizationGranularity | None = None, **rest: Any) -> Any:
    return QuantizationSpec(dtype=dtype, granularity=granularity or PerTensorGranularity(), **rest)


OFF: dict[str, Any] = {"op_input_spec": None, "op_output_spec": None, "op_state_spec": None}
ASYMMETRIC = spec(torch.uint8, qscheme=QuantizationScheme.ASYMMETRIC, qparam_calculator_cls="moving_average")
GLOBAL = spec(torch.int8, qparam_calculator_cls="global_minmax")
DYNAMIC = spec(torch.int8, qparam_calculator_cls="dynamic")
FP8 = spec(torch.float8_e4m3fn)
INT4 = spec(torch.int4, PerChannelGranularity(axis=0))


def eager(**arguments: Any) -> QuantizerConfig:
    return QuantizerConfig(execution_mode="eager", **arguments)


def module(**arguments: Any) -> ModuleQuantizerConfig:
    """A module's config in which everything not named is off."""
    return ModuleQuantizerConfig(**(OFF | arguments))


def default(name: str) -> QuantizerConfig:
    return eager()


def int4_blocks(name: str) -> QuantizerConfig:
    """Weights only. Blocks that do not divide an axis leave that weight alone; the weights of Llama's norms,
    which are no module of torch's, have no default axis.
    """
    config = QuantizerConfig.presets.w4_per_block(block_size=4, execution_mode="eager")
    return config.only_for(nn.Linear) if name == "llama" else config


def activations(name: str) -> QuantizerConfig:
    return eager(global_config=module(op_input_spec={"*": ASYMMETRIC}, op_output_spec={"*": GLOBAL}))


def floats(name: str) -> QuantizerConfig:
    state = {"weight": spec(torch.float8_e5m2, PerChannelGranularity(axis=0)), "bias": FP8}
    return eager(
        global_config=module(op_input_spec={"*": FP8}, op_output_spec={"*": DYNAMIC}, op_state_spec=state)
    )


NAMES = {
    "mlp": "3",
    "cnn": r"blocks\.0\.conv.*",
    "depthwise": r"3(\..*)?",
    "transposed": "up.",
    "lstm": "head",
    "encoder": r"layers\.0\.linear1",
    "llama": r"model\.layers\.0\.self_attn\..*",
    "vit": r".*\.fc1",
    "convolutions": "up1",
    "shared": "mixer",
}


def overrides(name: str) -> QuantizerConfig:
    """Types, a pattern of names, one type of operation and one single operation, each with its own wish."""
    asymmetric = OpQuantizerConfig(
        op_input_spec={"*": ASYMMETRIC, 1: None}, op_output_spec=None, op_state_spec=None
    )
    weight = spec(torch.int4, PerBlockGranularity(axis=1, block_size=2)) if name == "mlp" else INT4
    return eager(
        global_config=ModuleQuantizerConfig(
            op_type_config={"add": asymmetric, "matmul": None, "max_pool2d": None},
            op_name_config={r"(.*\.)?mul_1": None},
        ),
        module_type_configs={
            nn.Linear: module(op_state_spec={"*": INT4}, op_input_spec={0: GLOBAL}),
            "torch.nn.Conv2d": ModuleQuantizerConfig(op_output_spec=None),
            nn.Embedding: None,
        },
        module_name_configs={NAMES[name]: module(op_state_spec={"weight": weight})},
    )


def boundaries(name: str) -> QuantizerConfig:
    """What enters and leaves some modules, and the tensors that they own."""
    block = ModuleQuantizerConfig(
        module_input_spec={"*": ASYMMETRIC}, module_output_spec={0: GLOBAL}, module_state_spec={"*": INT4}
    )
    norms = (nn.BatchNorm2d, nn.LayerNorm)
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d, nn.Conv1d, nn.Embedding, nn.ReLU6)
    scale = spec(torch.int8, PerChannelGranularity(axis=0))
    state = {"*": spec(torch.int8), "weight": scale, "running_mean": None, "running_var": None}
    norm = module(module_state_spec=state, module_output_spec={"*": GLOBAL})
    return eager(
        global_config=None,
        module_type_configs=dict.fromkeys(kinds, block) | dict.fromkeys(norms, norm),
        module_name_configs={NAMES[name]: None},
    )


def off(name: str) -> QuantizerConfig:
    """Everything but one module."""
    return eager(global_config=None, module_name_configs={NAMES[name]: ModuleQuantizerConfig()})


def schedule(name: str) -> QuantizerConfig:
    """Two schedules in one model."""
    late = QATSchedule(enable_observer=1, enable_fake_quant=2, disable_observer=4)
    return eager(
        global_config=ModuleQuantizerConfig(qat_schedule=QATSchedule(disable_observer=2)),
        module_name_configs={NAMES[name]: ModuleQuantizerConfig(qat_schedule=late)},
    )


CONFIGS: dict[str, Callable[[str], QuantizerConfig]] = {
    function.__name__: function
    for function in (default, int4_blocks, activations, floats, overrides, boundaries, off, schedule)
}
