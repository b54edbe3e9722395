"""Inputs for ``fake_quantize_by_reciprocal``, and the comparison of two backends."""

import torch
from torch import Tensor

import coreai_kernels as ck
from tests.kernels.support import assert_same_bits

__all__ = ["KINDS", "check_by_reciprocal", "draw", "run"]

KINDS = ("plain", "ties", "zeros", "not finite", "tiny", "huge")


def draw(kind: str, seed: int, *shape: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3
    if kind == "ties":
        return (x * 4).round() / 8
    if kind == "zeros":
        return torch.where(x > 1, x, -0.0)
    if kind == "not finite":
        flat = x.view(-1)
        flat[:: max(3, flat.numel() // 7)] = torch.tensor(float("nan"))
        flat[1 :: max(5, flat.numel() // 3)] = torch.tensor(float("-inf"))
        return x
    return x * {"plain": 1.0, "tiny": 1e-38, "huge": 1e38}[kind]


def run(backend: str, x: Tensor, gradient: Tensor, chooses: bool, **options: object) -> list[Tensor]:
    blocks = x.numel() // int(options["run"])  # type: ignore[call-overload]
    generator = torch.Generator().manual_seed(1)
    scale = (torch.rand(blocks, generator=generator) + 0.1).to(x.device)
    zero_point = torch.randint(-8, 8, (blocks,), dtype=torch.int32, generator=generator).to(x.device)
    leaf = x.clone().requires_grad_()
    with ck.use_backend(backend):
        output = ck.fake_quantize_by_reciprocal(leaf, scale, zero_point, chooses=chooses, **options)  # type: ignore[arg-type]
        output.backward(gradient)
        plain = ck.fake_quantize_by_reciprocal(x, scale, zero_point, chooses=False, **options)  # type: ignore[arg-type]
    assert leaf.grad is not None
    return [output.detach(), leaf.grad, scale, zero_point, plain]


def check_by_reciprocal(
    backend: str,
    x: Tensor,
    gradient: Tensor,
    chooses: bool,
    bits: int,
    device: str = "cpu",
    **options: object,
) -> None:
    """Compare values, gradients and parameters with the reference's."""
    options |= {"quant_min": -(2 ** (bits - 1)), "quant_max": 2 ** (bits - 1) - 1}
    x, gradient = x.to(device), gradient.to(device)
    actual, expected = (run(name, x, gradient, chooses, **options) for name in (backend, "reference"))
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one, other)
