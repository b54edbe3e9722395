"""Input tensors and upstream gradients of a case: reproducible, with exceptional values, in many layouts."""

import torch
from torch import Tensor

from .cases import Case

__all__ = ["draw_gradient", "draw_input"]

PATTERNS: dict[str, tuple[float, ...]] = {
    "nan": (float("nan"),),
    "posinf": (float("inf"),),
    "neginf": (float("-inf"),),
    "zeros": (-0.0, 0.0),
    "subnormal": (1e-41, -3e-42, 2e-39),
    "huge": (3e38, -3.2e38, 1e38),
    "tiny_range": (1e-7, -2e-7, 3e-8),
}
HALF_PATTERNS = {"subnormal": (6e-8, -3e-6, 5e-5), "huge": (6e4, -6.5e4, 3e4)}


def draw_input(case: Case, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=generator)
    scale = torch.randn((), generator=generator).exp()
    values = add_specials(values * scale, case.special, dtype, generator).to(dtype)
    return in_layout(values, case.layout)


def add_specials(x: Tensor, special: str, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """``x`` with exceptional values: in each row others for ``rows``, of the named kind else."""
    if special == "one_sided":
        return x.abs()
    if not special:
        return x
    patterns = PATTERNS | (HALF_PATTERNS if dtype == torch.float16 else {})
    if special != "rows":
        return _sprinkle(x, patterns[special], special in ("zeros", "subnormal", "tiny_range"), generator)
    if x.dim() == 0:
        return x * -0.0
    kinds = [*patterns, ""]
    start = int(torch.randint(len(kinds), (), generator=generator))
    rows = []
    for index, row in enumerate(x.unbind(0)):
        kind = kinds[(start + index) % len(kinds)]
        everywhere = kind in ("zeros", "subnormal", "tiny_range")
        rows.append(_sprinkle(row, patterns[kind], everywhere, generator) if kind else row)
    return torch.stack(rows)


def _sprinkle(x: Tensor, values: tuple[float, ...], everywhere: bool, generator: torch.Generator) -> Tensor:
    flat = x.flatten().clone()
    chosen = torch.randint(len(values), flat.shape, generator=generator)
    places = torch.rand(flat.shape, generator=generator) < (1.0 if everywhere else 0.1)
    return torch.where(places, torch.tensor(values)[chosen], flat).reshape(x.shape)


def in_layout(x: Tensor, layout: str) -> Tensor:
    """The same values in another layout; contiguous where the rank does not allow it."""
    if layout == "channels_last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed" and x.dim() >= 2:
        return x.transpose(-1, 0).contiguous().transpose(-1, 0)
    if layout == "sliced" and x.dim() >= 1:
        return torch.stack((x, x + 1), -1).flatten(-2)[..., ::2]
    if layout == "offset":
        return torch.cat((torch.zeros(1, dtype=x.dtype), x.flatten()))[1:].view(x.shape)
    if layout == "expanded" and x.dim() >= 2:
        return x[:1].expand(x.shape)
    return x.contiguous()


def draw_gradient(case: Case, y: Tensor, generator: torch.Generator) -> Tensor:
    gradient = torch.randn(y.shape, generator=generator)
    if case.gradient == "special":
        exceptional = (float("nan"), float("inf"), float("-inf"), -0.0, 0.0)
        gradient = _sprinkle(gradient, exceptional, False, generator)
        return gradient.to(y.dtype)
    return in_layout(gradient.to(y.dtype), case.gradient)
