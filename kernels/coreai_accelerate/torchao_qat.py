"""The integer fake quantizer of torchao's quantization-aware training, on the engine.

torchao multiplies by the reciprocal of a scale where Apple's package divides, and its gradient is multiplied
by the scale and by the reciprocal: the engine has an operation of its own for that.
"""

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
    ZeroPointDomain,
)

import coreai_kernels
from coreai_accelerate import torchao_pt2e
from coreai_accelerate.state import STATE, TorchaoReport, fall_back, has_kernels, is_traced
from coreai_accelerate.torchao_pt2e import OnTheEngine
from coreai_kernels.ops.fake_quantize import has_tangent

__all__ = ["FusedIntxFakeQuantizer", "accelerate", "restore"]

# Why the engine does not compute the same bits; for subclasses of these, that they are subclasses.
_LEFT: dict[type, str] = {
    FakeQuantizer: "a class that torchao has deprecated",
    Float8FakeQuantizer: "its scale has a gradient, too",
    Int4WeightFakeQuantizer: "its scale has a gradient, too",
}
_METHODS = {"_per_token_forward", "_per_channel_or_group_forward", "_should_compute_qparams"}
_INT32_MIN = -(2**31)
_LEAST_SCALE = torch.finfo(torch.float32).smallest_normal  # unless the configuration has one


def accelerate(model: nn.Module) -> TorchaoReport:
    """See :func:`coreai_accelerate.torchao`."""
    report = TorchaoReport()
    for name, module in model.named_modules():
        kind = type(module)
        if kind in _FUSED.values():
            report.replaced.append(name)
        elif kind in _FUSED:
            reason = _refusal(module) if kind is IntxFakeQuantizer else torchao_pt2e.refusal(module)
            if reason is None:
                module.__class__ = _FUSED[kind]
                STATE.of_torchao.add(module)
                report.replaced.append(name)
            else:
                report.left[name] = reason
        elif isinstance(module, FakeQuantizerBase | FakeQuantizeBase):
            report.left[name] = _LEFT.get(kind, "a subclass")
        elif any(base.__name__ == "FakeQuantizeBase" for base in kind.__mro__):
            report.left[name] = "not a class of torchao"
        elif "FakeQuantized" in kind.__name__ and not any(
            isinstance(each, FakeQuantizerBase) for each in module.children()
        ):
            report.left[name] = "a layer that has no fake quantizers of its own"
    return report


def restore() -> None:
    """Give the simulators that :func:`accelerate` has replaced torchao's class again.

    Those that somebody has given another class since keep that one.
    """
    torchaos = {fused: kind for kind, fused in _FUSED.items()}
    for module in STATE.of_torchao:
        kind = type(module)
        module.__class__ = torchaos.get(kind, kind)
    STATE.of_torchao.clear()


class FusedIntxFakeQuantizer(IntxFakeQuantizer, OnTheEngine):  # type: ignore[misc]
    """torchao's integer fake quantizer, whose forward and gradient are the engine's."""

    _pickled_as = IntxFakeQuantizer

    def forward(self, x: Tensor) -> Tensor:
        """What torchao's forward returns."""
        run = None if torch.compiler.is_compiling() else self._run(x)
        if run is None:
            return super().forward(x)
        chooses, config = self._should_compute_qparams(), self.config
        if chooses:
            shape = x.shape[:-1] if isinstance(config.granularity, PerToken) else (len(x), x.shape[-1] // run)
            scale = torch.empty(shape, dtype=torch.float32, device=x.device)
            zero_point = torch.empty(shape, dtype=torch.int32, device=x.device)
        else:
            scale, zero_point = self.scale, self.zero_point
            if zero_point.dtype == config.zero_point_precision == torch.float32:
                whole = zero_point.to(torch.int32)
                zero_point = whole if torch.equal(whole.float(), zero_point) else zero_point
            kinds = ((scale, torch.float32), (zero_point, torch.int32))
            if not all(_fits(tensor, dtype, x.numel() // run) for tensor, dtype in kinds):
                fall_back("torchao: parameters of another kind")
                return super().forward(x)
        low, high = _DTYPE_TO_QVALUE_BOUNDS[config.dtype]
        output = coreai_kernels.fake_quantize_by_reciprocal(
            x,
            scale,
            zero_point,
            run=run,
            chooses=chooses,
            is_symmetric=config.is_symmetric,
            quant_min=low,
            quant_max=high,
            eps=_LEAST_SCALE if config.eps is None else config.eps,
        )
        if chooses:
            if config.zero_point_precision == torch.float32:
                # Of ranges that are not finite torchao's is NaN, and so is more of its output.
                if zero_point.numel() and zero_point.amin().item() == _INT32_MIN:
                    fall_back("torchao: not finite")
                    return super().forward(x)  # type: ignore[no-any-return]
                zero_point = zero_point.float()
            self.scale, self.zero_point = scale, zero_point
        return output

    def _run(self, x: Tensor) -> int | None:
        """Elements of a block, which lie one after another; None where torchao's forward has to decide."""
        if not self.enabled:
            return None
        reason = _refusal(self) or ("methods" if _METHODS & vars(self).keys() else None)
        if reason is None and self.config.zero_point_precision == torch.float32:
            # The host looks at them.
            reason = None if x.is_cpu else "precision of the parameters"
            reason = "compiled, traced or transformed" if is_traced(x) else reason
        if reason is None and x.dtype != torch.float32:
            reason = str(x.dtype).removeprefix("torch.")
        if reason is None and (type(x) not in (Tensor, nn.Parameter) or x.numel() == 0 or x.dim() < 2):
            reason = "kind of tensor"
        if reason is None and not x.is_contiguous():
            reason = "strides"
        if reason is None and has_tangent(x):
            reason = "tangent"
        if reason is None and not has_kernels(x):
            reason = "no compiled library"
        if reason is None:
            granularity, last = self.config.granularity, x.shape[-1]
            size = granularity.group_size if isinstance(granularity, PerGroup) else last
            is_served = x.dim() == 2 or isinstance(granularity, PerToken)
            if is_served and size % 8 == 0 and 0 < size <= last and last % size == 0:
                return size
            reason = "block size"
        fall_back(f"torchao: {reason}")
        return None


def _fits(parameter: Tensor, dtype: torch.dtype, count: int) -> bool:
    return parameter.dtype == dtype and parameter.numel() == count and parameter.is_contiguous()


def _refusal(module: IntxFakeQuantizer) -> str | None:
    """Why the engine does not compute what the configuration asks for; None if it does."""
    config = module.config
    granularity = config.granularity
    if config.range_learning:
        return "range learning"
    if _DTYPE_TO_BIT_WIDTH[config.dtype] > 8:
        return "more than 8 bits"
    if config.eps is not None and config.eps <= 0:
        return "scales of zero"
    # No precision of scales is the tensor's.
    if config.scale_precision not in (None, torch.float32):
        return "precision of the parameters"
    if config.zero_point_precision not in (torch.int32, torch.float32):
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


# Classes on the engine, by torchao's.
_FUSED: dict[type, type] = {IntxFakeQuantizer: FusedIntxFakeQuantizer, **torchao_pt2e.FUSED}
