"""Tensors that a configuration asks to quantize and that get no simulator."""

import logging
from collections.abc import Iterator

from torch import Tensor, nn

from coreai_opt.export.parametrized import is_finalized
from coreai_opt.quantization._eager.operations import MODULES
from coreai_opt.quantization._eager.resolution import ModuleConfigs, PlacementPlan
from coreai_opt.quantization._eager.trace import is_quantizable
from coreai_opt.quantization.config import ModuleQuantizerConfig

__all__ = ["UNSERVED", "warn_of_unserved_states"]

UNSERVED = "that no operation reads which can be simulated"

logger = logging.getLogger(__name__)

# Modules of torch whose weights no operation reads that can be simulated.
_OPAQUE = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)


def warn_of_unserved_states(model: nn.Module, configs: ModuleConfigs, plan: PlacementPlan) -> list[str]:
    """The parameters with a specification that no simulator will serve; the log names them."""
    served = {(owner.module, owner.name) for state in plan.states for owner in state.owners}
    by_name = {name: config for level in configs.values() for name, config in level.items()}
    names = [
        f"{module_name}.{name}".lstrip(".")
        for module_name, module in model.named_modules()
        if module_name in by_name
        for name, tensor in _own_parameters(module)
        if (module, name) not in served
        and _is_asked_for(module, name, by_name[module_name])
        and is_quantizable(tensor)
        and not is_finalized(module, name)
    ]
    if names:
        logger.warning(
            f"{len(names)} parameters have a specification and are not quantized: {', '.join(names)}. "
            f"The example inputs do not reach them; or what reads them is no operation that can be "
            f"simulated, such as a recurrent layer or packed attention."
        )
    return names


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in module._parameters.items():
        if tensor is not None:
            yield name, tensor


def _is_asked_for(module: nn.Module, name: str, config: ModuleQuantizerConfig) -> bool:
    own = config.module_state_spec or {}
    if own.get(name, own.get("*")) is not None:
        return True
    specs = config.op_state_spec or {}
    if isinstance(module, _OPAQUE):
        # Their weights are called weight_ih_l0, in_proj_weight, ...
        return any(spec is not None and (key == "*" or key in name) for key, spec in specs.items())
    return isinstance(module, MODULES) and specs.get(name, specs.get("*")) is not None
