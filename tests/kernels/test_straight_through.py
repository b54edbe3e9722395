"""The straight-through gradient in autograd's graph: nodes in C++, and in Python where those are missing."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import coreai_kernels
from coreai_kernels import RangeUpdate, Scheme, native, use_backend
from tests.kernels.gradient_support import DENSITIES, check_masked_in_place

Call = Callable[[list[Tensor]], list[Tensor]]


@pytest.fixture(params=["C++", "Python"])
def nodes(request, monkeypatch) -> Iterator[str]:
    if request.param == "Python":
        monkeypatch.setattr(native, "autograd_missing", native.Missing("left out", "none"))
    elif native.autograd_missing is not None:
        pytest.skip(str(native.autograd_missing))
    return request.param


def _params(x: Tensor) -> tuple[Tensor, Tensor]:
    grid = (1,) * x.dim()
    return torch.ones(grid), torch.zeros(grid, dtype=torch.int32)


def _one(xs: list[Tensor]) -> list[Tensor]:
    return [
        coreai_kernels.fake_quantize(x, *_params(x), block_size=tuple(x.shape), quant_min=-1, quant_max=1)
        for x in xs
    ]


def _list(xs: list[Tensor]) -> list[Tensor]:
    scales, zero_points = zip(*map(_params, xs), strict=True)
    blocks = [tuple(x.shape) for x in xs]
    return coreai_kernels.foreach_fake_quantize(
        xs, scales, zero_points, block_sizes=blocks, quant_min=-1, quant_max=1
    )


# A step with a fixed range: scale 1 and zero point 0, as above.
_STEP: dict[str, Any] = {
    "scheme": Scheme.SYMMETRIC,
    "quant_min": -1,
    "quant_max": 1,
    "range_min": -1.0,
    "range_max": 1.0,
    "update": RangeUpdate.LATEST,
}


def _step(xs: list[Tensor]) -> list[Tensor]:
    return [
        coreai_kernels.observe_and_fake_quantize(x, *_params(x), block_size=tuple(x.shape), **_STEP)
        for x in xs
    ]


def _step_list(xs: list[Tensor]) -> list[Tensor]:
    scales, zero_points = zip(*map(_params, xs), strict=True)
    blocks = [tuple(x.shape) for x in xs]
    return coreai_kernels.foreach_observe_and_fake_quantize(
        xs, scales, zero_points, block_sizes=blocks, **_STEP
    )


CALLS = pytest.mark.parametrize("call", [_one, _list, _step, _step_list])


def _inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 7), (2, 8, 3, 5), (), (3, 1, 4), (0, 2)]
    xs = [2 * torch.randn(shape, generator=generator) for shape in shapes]
    xs[1] = xs[1].contiguous(memory_format=torch.channels_last)
    xs[3] = xs[3].permute(2, 0, 1)
    return [x.requires_grad_() for x in xs if x.numel()]


def _strides(x: Tensor) -> list[int]:
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1]


def _inside(x: Tensor) -> Tensor:
    return (x.detach().round().abs() <= 1).to(x.dtype)


@CALLS
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradients_and_their_gradients(call: Call, backend: str, nodes: str) -> None:
    xs = _inputs()
    with use_backend(backend):
        ys = call(xs)
        loss = sum(y.square().sum() for y in ys)
        grads = torch.autograd.grad(loss, xs, create_graph=True)
        for x, y, grad in zip(xs, ys, grads, strict=True):
            assert torch.equal(grad, 2 * y.detach() * _inside(x))
            assert _strides(grad) == _strides(y)
        again = torch.autograd.grad(sum(grad.square().sum() for grad in grads), xs, create_graph=True)
        for x, y, grad in zip(xs, ys, again, strict=True):
            assert torch.equal(grad, 8 * y.detach() * _inside(x))
        # And a third time: all of them go through the same mask.
        third = torch.autograd.grad(sum(grad.square().sum() for grad in again), xs)
        for x, y, grad in zip(xs, ys, third, strict=True):
            assert torch.equal(grad, 128 * y.detach() * _inside(x))


@CALLS
def test_the_node_is_where_it_should_be(call: Call, nodes: str) -> None:
    for y in call(_inputs()):
        assert isinstance(y.grad_fn, torch.autograd.function.BackwardCFunction) == (nodes == "Python")


@CALLS
def test_nothing_is_recorded_without_need(call: Call, nodes: str) -> None:
    xs = _inputs()
    with torch.no_grad():
        assert not any(y.requires_grad for y in call(xs))
    assert not any(y.requires_grad for y in call([x.detach() for x in xs]))


@CALLS
def test_no_second_backward(call: Call, nodes: str) -> None:
    xs = _inputs()
    loss = sum(y.sum() for y in call(xs))
    loss.backward(retain_graph=True)
    loss.backward()
    assert torch.equal(xs[0].grad, 2 * _inside(xs[0]))
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


@CALLS
def test_the_mask_is_saved_as_autograd_saves(call: Call, nodes: str) -> None:
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> int:
        saved.append(tensor)
        return len(saved) - 1

    xs = _inputs()
    with torch.autograd.graph.saved_tensors_hooks(pack, saved.__getitem__):
        ys = call(xs)
    assert {tensor.dtype for tensor in saved} == {torch.uint8}
    torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
    for x in xs:
        assert torch.equal(x.grad, _inside(x))


@pytest.mark.parametrize("call", [_list, _step_list])
@pytest.mark.parametrize("create_graph", [False, True])
def test_no_gradient_where_none_came(call: Call, create_graph: bool, nodes: str) -> None:
    xs = _inputs()
    ys = call(xs)
    used = [1, 3]
    loss = sum(ys[i].sum() for i in used)
    grads = torch.autograd.grad(loss, xs, allow_unused=True, create_graph=create_graph)
    assert [i for i, grad in enumerate(grads) if grad is not None] == used
    for i in used:
        assert torch.equal(grads[i], _inside(xs[i]))
        assert _strides(grads[i]) == _strides(ys[i])


@CALLS
def test_other_threads_may_run_the_backward(call: Call, nodes: str) -> None:
    xs = _inputs()
    ys = call(xs)
    loss = sum(y.sum() for y in ys)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: torch.autograd.grad(loss, xs, retain_graph=True), range(8)))
    for grads in found:
        for x, grad in zip(xs, grads, strict=True):
            assert torch.equal(grad, _inside(x))


needs_cpp = pytest.mark.skipif(native.autograd_missing is not None, reason=str(native.autograd_missing))


def _operators_in(backward: Callable[[], Any]) -> set[str]:
    with torch.profiler.profile() as profile:
        backward()
    return {event.key for event in profile.key_averages() if event.key.startswith("coreai_kernels::")}


def _consumed(ys: list[Tensor]) -> Tensor:
    """A loss whose gradients to the outputs are new tensors, views (of the first one) among them."""
    loss = torch.nn.functional.linear(torch.ones(2, ys[0].shape[1]), ys[0]).sum()
    return loss + sum((y * torch.full_like(y, 2)).sum() for y in ys[1:])


def _check_consumed(xs: list[Tensor]) -> None:
    for i, x in enumerate(xs):
        assert torch.equal(x.grad, 2 * _inside(x)), i


@needs_cpp
@CALLS
def test_gradients_that_nobody_holds_are_overwritten(call: Call) -> None:
    xs = _inputs()
    loss = _consumed(call(xs))
    names = _operators_in(loss.backward)
    assert names == {"coreai_kernels::" + "foreach_" * ("list" in call.__name__) + "fake_quantize_backward_"}
    _check_consumed(xs)


@needs_cpp
@CALLS
@pytest.mark.parametrize("holder", ["hook", "retain_grad", "another tensor", "another leaf", "a view's base"])
def test_gradients_that_somebody_holds_are_not(call: Call, holder: str) -> None:
    xs = _inputs()
    ys = call(xs)
    held: list[Tensor] = []
    others: list[Tensor] = []
    if holder == "hook":
        for y in ys:
            y.register_hook(held.append)
    elif holder == "retain_grad":
        for y in ys:
            y.retain_grad()
    elif holder == "another tensor":
        for y in ys:
            y.register_hook(lambda grad: held.append(grad.detach()))
    elif holder == "another leaf":  # an addition hands the same gradient to both
        others = [torch.zeros_like(y, requires_grad=True) for y in ys]
    loss = _consumed([y + other for y, other in zip(ys, others, strict=True)] if others else ys)
    if holder == "a view's base":
        whole = torch.full((sum(y.numel() for y in ys),), 2.0)
        pieces = whole.split([y.numel() for y in ys])
        torch.autograd.backward(ys, [piece.view(y.shape) for piece, y in zip(pieces, ys, strict=True)])
        held = list(pieces)
    else:
        loss.backward()
    if holder == "retain_grad":
        held = [y.grad for y in ys]
    for grad in (*held, *(other.grad for other in others)):
        assert torch.equal(grad, torch.full_like(grad, 2))
    assert len(held) + len(others) == len(ys)
    _check_consumed(xs)


@needs_cpp
@CALLS
def test_gradients_that_are_asked_for_are_not(call: Call) -> None:
    xs = _inputs()
    ys = call(xs)
    found = torch.autograd.grad(_consumed(ys), [*ys, *xs])
    for x, to_y, to_x in zip(xs, found[: len(ys)], found[len(ys) :], strict=True):
        assert torch.equal(to_y, torch.full_like(to_y, 2))
        assert torch.equal(to_x, 2 * _inside(x))


@needs_cpp
@CALLS
def test_function_transforms(call: Call) -> None:
    x = 2 * torch.randn(5, 7)
    gradient = torch.func.grad(lambda t: (call([t])[0] * 3).sum())(x)
    assert torch.equal(gradient, 3 * _inside(x))


@needs_cpp
@CALLS
def test_gradients_of_dispatched_tensors_are_not(call: Call) -> None:
    seen: list[str] = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    xs = _inputs()
    loss = _consumed(call(xs))
    with Log():
        loss.backward()
    ours = [name for name in seen if name.startswith("coreai_kernels.")]
    assert ours
    assert all(name.endswith("fake_quantize_backward.default") for name in ours)
    _check_consumed(xs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("density", DENSITIES)
def test_masked_in_place(dtype: torch.dtype, density: float) -> None:
    if dtype != torch.float64:  # lists are of the others
        check_masked_in_place("auto", "cpu", dtype, density)
    grad = torch.randn(3, 50, dtype=dtype)
    mask = torch.randint(256, (19,), dtype=torch.uint8)
    wanted = torch.ops.coreai_kernels.fake_quantize_backward(grad, mask, [])
    torch.ops.coreai_kernels.fake_quantize_backward_(grad, mask, [])
    assert torch.equal(grad, wanted)


@pytest.mark.skipif(native.missing is not None, reason=str(native.missing))
def test_a_gradient_in_another_order_is_refused() -> None:
    grad, mask = torch.randn(4, 6).t(), torch.zeros(3, dtype=torch.uint8)
    before = grad.clone()
    for name, args in (("", (grad, mask, [])), ("foreach_", ([grad], mask, [0], []))):
        with pytest.raises(RuntimeError, match="must lie in memory as order says"):
            getattr(torch.ops.coreai_kernels, f"{name}fake_quantize_backward_")(*args)
    assert torch.equal(grad, before)
