"""``choose_qparams``: scale, zero point and minimum from a range."""

import torch
from torch import Tensor

from coreai_kernels.formats import Format, ScaleFormat
from coreai_kernels.ops import checks
from coreai_kernels.ops.library import define, implementation
from coreai_kernels.reference.qparams import choose_qparams as reference
from coreai_kernels.triton import registry as triton
from coreai_kernels.types import Scheme

__all__ = ["choose_qparams"]


def _fake(min_val: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    scale = torch.empty_like(min_val, dtype=torch.float32, memory_format=torch.contiguous_format)
    return scale, torch.empty_like(scale, dtype=torch.int32), torch.empty_like(scale)


define(
    "choose_qparams",
    "(Tensor min_val, Tensor max_val, int scheme, int format, float quant_min, float quant_max, "
    "int scale_format) -> (Tensor, Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    triton=triton.get("choose_qparams"),
)


def choose_qparams(
    min_val: Tensor,
    max_val: Tensor,
    *,
    scheme: int,
    quant_min: float,
    quant_max: float,
    format: int = Format.INT,
    scale_format: int = ScaleFormat.FLOAT32,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Quantization parameters of a range.

    If a bound requires a gradient, the reference computes them, so that torch differentiates it. Zero points,
    scales of the format E8M0 and those at their smallest value have no gradient.

    The range is widened to contain zero, ``lo = min(min_val, 0)``, ``hi = max(max_val, 0)``, and
    ``amax = max(-lo, hi)``. The arithmetic is done in the wider dtype of the two bounds, as a chain of torch
    operators would do it.

    ================  ==========================================  ============================  =========
    scheme            scale (at least 2**-23)                     zero point                    minimum
    ================  ==========================================  ============================  =========
    symmetric (both)  ``amax / ((quant_max - quant_min) / 2)``    ``(qmin + qmax + 1) // 2``    ``-amax``
    asymmetric        ``(hi - lo) / (quant_max - quant_min)``     ``clamp(qmin - rne(lo/s))``   ``lo``
    float formats     ``amax / quant_max``                        --                            --
    ================  ==========================================  ============================  =========

    Scales of other formats than FLOAT32 replace those of symmetric schemes: see
    :class:`coreai_kernels.ScaleFormat`. Integers then have zero point 0 and minimum ``-amax``.

    Args:
        min_val: float32, bfloat16, float16 or float64 tensor.
        max_val: same shape.
        scheme: a :class:`coreai_kernels.Scheme`.
        quant_min: smallest quantized value; symmetric-with-clipping callers pass the raised one.
        quant_max: largest quantized value.
        format: a :class:`coreai_kernels.Format`.
        scale_format: a :class:`coreai_kernels.ScaleFormat`; but for FLOAT32, integers need a symmetric range.

    Returns:
        ``(scale, zero_point, minval)``: float32, int32 and float32, of the shape of ``min_val``. The last two
        are ``None`` for floating-point formats. A NaN bound gives a NaN scale and zero point ``-2**31``.

    Raises:
        ValueError: shapes differ, the range is empty, or the values cannot have such scales.
        TypeError: the bounds are not floating point.
    """
    fmt = Format(format)
    checks.check_float_input("min_val", min_val)
    checks.check_float_input("max_val", max_val)
    checks.check_range(fmt, quant_min, quant_max)
    if min_val.shape != max_val.shape:
        raise ValueError(
            f"min_val and max_val must have one shape; got {tuple(min_val.shape)} and {tuple(max_val.shape)}"
        )
    checks.check_scale_format(scale_format, fmt, scheme, quant_min, quant_max)
    arguments = (Scheme(scheme), fmt, quant_min, quant_max, scale_format)
    if (min_val.requires_grad or max_val.requires_grad) and torch.is_grad_enabled():
        scale, zero_point, minval = reference(min_val, max_val, *arguments)
    else:
        scale, zero_point, minval = implementation("choose_qparams")(
            min_val.detach(), max_val.detach(), *arguments
        )
    return (scale, zero_point, minval) if fmt == Format.INT else (scale, None, None)
