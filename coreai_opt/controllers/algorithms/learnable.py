"""A simulator whose range is trained."""

import torch
from torch import Tensor, nn

import coreai_kernels
from coreai_opt.controllers.core.gradients import scaled_gradient, with_zero_gradients
from coreai_opt.quantization.spec import PerTensorGranularity
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

__all__ = ["LearnableRangeQuantize"]

# Ranges that training drives towards zero stay this wide.
_NARROWEST = 1e-6


class LearnableRangeQuantize(nn.Module):
    """Quantizes as a simulator does, with a range that gets a gradient.

    Symmetric: ``level * range / level_high``, the levels those of the integers. Asymmetric: ``(level -
    zero_point) * range / level_high``; the zero point is ``-low * level_high / range``, rounded so that zero
    is exact, with a straight-through gradient to ``low``.

    Args:
        simulator: gives integers, scheme, granularity and the first range.
        shape: of the blocks' grid.
        device: of the parameters.
        logarithm_scale: train the logarithm of the range.
        gradient_factor: on the gradients of the parameters.
    """

    range: nn.Parameter
    low: nn.Parameter | None

    def __init__(
        self,
        simulator: FakeQuantizeImplBase,
        shape: tuple[int, ...],
        device: torch.device,
        logarithm_scale: bool = False,
        gradient_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.logarithm_scale = logarithm_scale
        self.gradient_factor = gradient_factor
        self.n_bits = simulator.n_bits
        self.dtype = simulator.dtype
        self.qscheme = simulator.qscheme
        self.granularity = simulator.granularity
        self.is_symmetric = str(self.qscheme) != "asymmetric"
        low, high = float(simulator.quant_min), float(simulator.quant_max)
        self.quant_min, self.quant_max = low, high
        self.level_low, self.level_high = (low, high) if self.is_symmetric else (0.0, high - low)
        self.enabled = True
        self.range = nn.Parameter((torch.zeros if logarithm_scale else torch.ones)(shape, device=device))
        low_end = None if self.is_symmetric else nn.Parameter(torch.zeros(shape, device=device))
        self.register_parameter("low", low_end)

    @torch.no_grad()
    def adopt(self, simulator: FakeQuantizeImplBase) -> None:
        """Take the range of a simulator that has observed one."""
        scale, zero_point, _ = simulator.calculate_qparams()
        span = (scale * self.level_high).reshape(self.range.shape)
        self.range.copy_(span.clamp(min=_NARROWEST).log() if self.logarithm_scale else span)
        if self.low is not None:
            assert zero_point is not None  # integers have one
            self.low.copy_(((self.quant_min - zero_point) * scale).reshape(self.range.shape))

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Switch quantization on or off."""
        self.enabled = bool(enabled)

    def enable_observer(self, enabled: bool = True) -> None:
        """Nothing is observed: the range is trained."""

    def _ends(self) -> tuple[Tensor, Tensor | None]:
        # In float32, whatever the model was cast to.
        span = scaled_gradient(self.range, self.gradient_factor).float()
        span = (span.exp() if self.logarithm_scale else span.abs()).clamp(min=_NARROWEST)
        if self.low is None:
            return span, None
        low = scaled_gradient(self.low, self.gradient_factor).float()
        with torch.no_grad():
            step = span / self.level_high
            exact = -(torch.round(-low / step).clamp(0.0, self.level_high) * step)
        return span, low + (exact - low).detach()

    def calculate_qparams(self) -> tuple[Tensor, Tensor, None]:
        """Scale, float32, and zero point, int32, as a simulator's."""
        span, low = self._ends()
        scale = span.detach() / self.level_high
        if low is None:
            return scale, torch.zeros_like(scale, dtype=torch.int32), None
        return scale, (torch.round(-low.detach() / scale) + self.quant_min).int(), None

    def forward(self, tensor: Tensor) -> Tensor:
        """Quantized values of ``tensor``."""
        if not self.enabled:
            unused = [self.range] if self.low is None else [self.range, self.low]
            return with_zero_gradients(tensor, *unused) if torch.is_grad_enabled() else tensor
        span, low = self._ends()
        if isinstance(self.granularity, PerTensorGranularity):
            grid = (1,) * tensor.dim()
            block_size = tuple(tensor.shape)
            span, low = span.reshape(grid), None if low is None else low.reshape(grid)
        else:
            block_size = self.granularity.get_block_size(tensor.shape)
        return coreai_kernels.learnable_range(
            tensor,
            span,
            low,
            block_size=block_size,
            level_low=self.level_low,
            level_high=self.level_high,
        )
