"""The integer fake quantizer of torchao's quantization-aware training, on the engine.

torchao multiplies by the reciprocal of a scale where the engine divides, and its gradient is multiplied by
the scale and by the reciprocal. So the engine gets ``x * (1 / scale)`` and a scale of one: rounded, clipped
and masked in one pass, that gives torchao's values and gradients bit for bit. The ranges of the blocks are
the engine's, too; from their ends torchao's own functions compute the parameters.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization import PerAxis, PerGroup, PerToken
from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase
from torchao.quantization.qat import IntxFakeQuantizer
from torchao.quantization.qat.fake_quantizer import (
    FakeQuantizer,
    FakeQuantizerBase,
    Float8FakeQuantizer,
    Int4WeightFakeQuantizer,
)
from torchao.quantization.quant_primitives import (
    _DTYPE_TO_BIT_WIDTH,
    _DTYPE_TO_QVALUE_BOUNDS,
    MappingType,
    ZeroPointDomain,
    choose_qparams_affine,
)
from torchao.quantization.utils import get_group_qparams_symmetric

import coreai_kernels
from coreai_accelerate.state import STATE, TorchaoReport, fall_back, has_kernels
from coreai_kernels.formats import Format
from coreai_kernels.ops.library import implementation

__all__ = ["FusedIntxFakeQuantizer", "accelerate", "restore"]

# Why the engine does not compute the same bits; for subclasses of these, that they are subclasses.
_LEFT: dict[type, str] = {
    FakeQuantizer: "a class that torchao has deprecated",
    Float8FakeQuantizer: "its scale has a gradient, too",
    Int4WeightFakeQuantizer: "its scale has a gradient, too",
}
_OF_PT2E = "one kernel of torch's, which rounds by the reciprocal of the scale"


def accelerate(model: nn.Module) -> TorchaoReport:
    """See :func:`coreai_accelerate.torchao`."""
    report = TorchaoReport()
    for name, module in model.named_modules():
        if type(module) is FusedIntxFakeQuantizer:
            report.replaced.append(name)
        elif type(module) is IntxFakeQuantizer:
            reason = _refusal(module)
            if reason is None:
                module.__class__ = FusedIntxFakeQuantizer
                STATE.of_torchao.add(module)
                report.replaced.append(name)
            else:
                report.left[name] = reason
        elif isinstance(module, FakeQuantizerBase):
            report.left[name] = _LEFT.get(type(module), "a subclass")
        elif isinstance(module, FakeQuantizeBase):
            is_torchaos = type(module).__module__.startswith("torchao.")
            report.left[name] = _OF_PT2E if is_torchaos else "not a class of torchao"
    return report


def restore() -> None:
    """Give the simulators that :func:`accelerate` has replaced torchao's class again."""
    for module in STATE.of_torchao:
        module.__class__ = IntxFakeQuantizer
    STATE.of_torchao.clear()


class FusedIntxFakeQuantizer(IntxFakeQuantizer):  # type: ignore[misc]
    """torchao's integer fake quantizer, whose forward and gradient are the engine's."""

    def forward(self, x: Tensor) -> Tensor:
        """What torchao's forward returns."""
        block_size = None if torch.compiler.is_compiling() else self._block_size(x)
        if block_size is None:
            return super().forward(x)
        if self._should_compute_qparams():
            ends = torch.stack(coreai_kernels.observe_range(x, block_size=block_size), dim=-1).flatten(-2)
            self.scale, self.zero_point = self._chosen(ends)
        low, high = _DTYPE_TO_QVALUE_BOUNDS[self.config.dtype]
        grid = coreai_kernels.grid_shape(x.shape, block_size)
        if self.scale.dtype != torch.float32 or self.scale.numel() != math.prod(grid):
            return super().forward(x)
        scale, zero_point = self.scale.view(grid), self.zero_point.view(grid)
        return _ByReciprocal.apply(x, scale, zero_point, block_size, float(low), float(high))  # type: ignore[no-any-return]

    def _chosen(self, ends: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point for blocks of two elements, a range's ends: ``(..., blocks * 2)``."""
        config = self.config
        if isinstance(config.granularity, PerToken):
            low, high = _DTYPE_TO_QVALUE_BOUNDS[config.dtype]
            return choose_qparams_affine(  # type: ignore[no-any-return]
                ends,
                mapping_type=MappingType.ASYMMETRIC,
                block_size=(1,) * (ends.dim() - 1) + (2,),
                target_dtype=config.dtype,
                quant_min=low,
                quant_max=high,
                eps=config.eps,
                scale_dtype=config.scale_precision,
                zero_point_dtype=config.zero_point_precision,
            )
        bits = _DTYPE_TO_BIT_WIDTH[config.dtype]
        scale, zero_point = get_group_qparams_symmetric(ends, bits, 2, config.scale_precision, eps=config.eps)
        return scale, zero_point.to(config.zero_point_precision)

    def _block_size(self, x: Tensor) -> tuple[int, ...] | None:
        """Extent of a block along each axis; None where torchao's forward has to decide."""
        if not self.enabled:
            return None
        reason = _refusal(self)
        if reason is None and x.dtype != torch.float32:
            reason = str(x.dtype).removeprefix("torch.")
        if reason is None and (type(x) not in (Tensor, nn.Parameter) or x.numel() == 0 or x.dim() < 2):
            reason = "kind of tensor"
        if reason is None and not x.is_contiguous():
            reason = "strides"
        if reason is None and not has_kernels(x):
            reason = "no compiled library"
        if reason is None:
            granularity, last = self.config.granularity, x.shape[-1]
            if isinstance(granularity, PerToken):
                return (1,) * (x.dim() - 1) + (last,)
            size = last if isinstance(granularity, PerAxis) else granularity.group_size
            if x.dim() == 2 and 1 < size <= last and last % size == 0:
                return 1, size
            reason = "block size"
        fall_back(f"torchao: {reason}")
        return None


def _refusal(module: IntxFakeQuantizer) -> str | None:
    """Why the engine does not compute what the configuration asks for; None if it does."""
    config = module.config
    granularity = config.granularity
    if config.range_learning:
        return "range learning"
    # No precision of scales is the tensor's.
    if config.scale_precision not in (None, torch.float32) or config.zero_point_precision != torch.int32:
        return "precision of the parameters"
    if isinstance(granularity, PerToken):
        return "symmetric tokens" if config.is_symmetric else None
    if config.zero_point_domain != ZeroPointDomain.INT:
        return "domain of the zero point"
    if not config.is_symmetric:
        return "asymmetric groups"
    is_known = isinstance(granularity, PerGroup) or (
        isinstance(granularity, PerAxis) and granularity.axis == 0
    )
    return None if is_known else "granularity"


class _ByReciprocal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        block_size: tuple[int, ...],
        quant_min: float,
        quant_max: float,
    ) -> Tensor:
        last = block_size[-1]
        factor = scale.unsqueeze(-1)
        needs_grad = ctx.needs_input_grad[0]
        output, mask = implementation("fake_quantize_forward")(
            (x.unflatten(-1, (-1, last)) * (1.0 / factor)).view(x.shape),
            torch.ones_like(scale),
            zero_point,
            None,
            block_size,
            int(Format.INT),
            quant_min,
            quant_max,
            needs_grad,
        )
        output.view(*scale.shape, last).mul_(factor)
        if needs_grad:
            ctx.save_for_backward(mask, factor)
        return output  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        mask, factor = ctx.saved_tensors
        blocks = grad.reshape(*factor.shape[:-1], -1) * factor
        # Not a product with the mask, which has a sign where torchao's zero has none.
        if grad.requires_grad and torch.is_grad_enabled():  # for a gradient of this gradient
            outside = coreai_kernels.unpack_bits(mask, 1, grad.numel()).view(blocks.shape) == 0
            blocks = blocks.masked_fill_(outside, 0.0)
        elif not _is_full(mask, grad.numel()):
            keep = coreai_kernels.unpack_bits(mask, 1, grad.numel(), signed=True)
            blocks.view(torch.int32).bitwise_and_(keep.to(torch.int32).view(blocks.shape))
        return blocks.mul_(1.0 / factor).view(grad.shape), *(None,) * 5


def _is_full(mask: Tensor, count: int) -> bool:
    """Whether every bit is known to be set. Costs no wait for a device."""
    return mask.is_cpu and count % 8 == 0 and int(mask.min()) == 255
