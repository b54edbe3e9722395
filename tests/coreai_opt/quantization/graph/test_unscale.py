"""The division behind a convolution with a scaled weight: torch's own, bit for bit."""

import pytest
import torch

from coreai_opt.quantization._graph.unscale import unscale

from .support import x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3, 8, 9), (4, 5, 6, 7), (32, 16, 12, 12), (2, 3, 4, 5, 6)], ids=str)
def test_value_and_gradients_are_those_of_the_division(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    output, incoming = x(*shape).to(dtype), x(*shape).sin()
    scale = x(1, shape[1], *[1] * (len(shape) - 2))
    results = []
    for function in (unscale, torch.div):
        a, b = output.clone().requires_grad_(), scale.clone().requires_grad_()
        quotient = function(a, b)
        quotient.backward(incoming.to(quotient.dtype))
        results.append((quotient, a.grad, b.grad))
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_derivatives_of_both_orders_and_of_one_operand() -> None:
    output, scale = x(2, 3, 4).double().requires_grad_(), (x(1, 3, 1).double().abs() + 1).requires_grad_()
    assert torch.autograd.gradcheck(unscale, (output, scale))
    assert torch.autograd.gradgradcheck(unscale, (output, scale))
    assert torch.autograd.gradcheck(unscale, (output, scale.detach()))
    assert torch.autograd.gradcheck(unscale, (output.detach(), scale))


def test_a_gradient_of_nothing_but_zeros() -> None:
    scale = torch.ones(1, 3, 1).requires_grad_()
    unscale(x(2, 3, 4), scale).backward(torch.zeros(2, 3, 4))
    assert not scale.grad.signbit().any()


def test_it_compiles_without_graph_breaks() -> None:
    compiled = torch.compile(unscale, fullgraph=True, backend="aot_eager")
    for scale in (x(1, 3, 1), x(1, 3, 1).requires_grad_()):
        assert torch.equal(compiled(x(2, 3, 4), scale), unscale(x(2, 3, 4), scale))
