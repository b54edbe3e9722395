"""Weights that no known operation reads as its weight: compressed by the modules that hold them."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from coreai_opt._utils.config_utils import original_type, qualified_name
from coreai_opt.quantization.spec import PerBlockGranularity, PerChannelGranularity, QuantizationSpec

__all__ = ["UnusualWeight", "attention_weights", "quantized", "unusual_weights"]

# Of GPT-2 and its like: a linear layer whose weight is [inputs, outputs].
_TRANSPOSED_LINEAR = "transformers.pytorch_utils.Conv1D"


class UnusualWeight(NamedTuple):
    """A parameter, and which of its axes is that of the inputs; the others are of outputs, or of experts.

    Attributes:
        module_name: of the module that owns it.
        attribute: its name there.
        weight: the parameter.
        input_axis: 0, 1 or 2.
        factors: how many arguments of the module's forward it, or a part of it, is multiplied with: from the
            first on. 0 where these are not the forward's arguments.
    """

    module_name: str
    attribute: str
    weight: Tensor
    input_axis: int
    factors: int = 1


def unusual_weights(model: nn.Module) -> Iterator[UnusualWeight]:
    """The weights of transposed linear layers, and those of experts that are stacked in one parameter."""
    for name, module in model.named_modules():
        if qualified_name(original_type(module)) == _TRANSPOSED_LINEAR:
            yield UnusualWeight(name, "weight", module.weight, 0)  # type: ignore[arg-type]
        elif name.rpartition(".")[2] == "experts":
            for attribute, tensor in module.named_parameters(recurse=False):
                if tensor.dim() == 3 and tensor.is_floating_point():
                    # Which operations experts run depends on the data: their activations stay as they are.
                    yield UnusualWeight(name, attribute, tensor, 1 if _is_transposed(module) else 2, 0)


def attention_weights(model: nn.Module) -> Iterator[UnusualWeight]:
    """The projections of ``nn.MultiheadAttention``, which reads them within one operation of torch."""
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            for attribute in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
                weight = getattr(module, attribute)
                if weight is not None:
                    yield UnusualWeight(name, attribute, weight, 1, 3)
            # Of a layer that is never called.
            yield UnusualWeight(f"{name}.out_proj".lstrip("."), "weight", module.out_proj.weight, 1, 0)


def _is_transposed(module: Any) -> bool:
    return bool(getattr(module, "is_transposed", False))


def quantized(found: UnusualWeight, spec: QuantizationSpec) -> QuantizationSpec:
    """What ``spec``, for the weight of a linear layer, is for this one: blocks lie along its inputs."""
    granularity: Any = spec.granularity
    along_inputs: Any
    if isinstance(granularity, PerBlockGranularity):
        along_inputs = granularity.block_size
    elif isinstance(granularity, PerChannelGranularity):
        along_inputs = -1
    else:
        return spec
    sizes: list[Any] = [1] * found.weight.dim()
    sizes[found.input_axis] = along_inputs
    blocks = PerBlockGranularity(axis=None, block_size=tuple(sizes))
    return QuantizationSpec.model_validate({**spec.model_dump(), "granularity": blocks.model_dump()})
