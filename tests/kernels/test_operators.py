"""What torch expects of an operator: schema, shape function, gradient, compilation, and clear errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import coreai_kernels as ck
from coreai_kernels import Format, RangeUpdate, Scheme
from tests.kernels.operator_samples import INT4, MAIN, leaf, params
from tests.kernels.support import assert_same_bits

ops = torch.ops.coreai_kernels

# Operators with their own ``test_opcheck``, by the file that has it.
CHECKED_ELSEWHERE = {
    "test_gptq_columns": {"gptq_columns"},
    "test_kmeans": {"lloyd"},
    "test_kmeans_1d": {"kmeans_1d"},
    "test_learnable_range": {"learnable_range_backward"},
    "test_lookup": {"lookup", "lookup_backward", "lookup_packed"},
    "test_palettize": {"palettize"},
    "test_sampled_mask": {"sampled_mask", "sampled_mask_backward", "sampled_mask_forward"},
    "test_soft_palettize": {
        "soft_centroids",
        "soft_centroids_backward",
        "soft_palettize",
        "soft_palettize_backward",
    },
}


def test_every_operator_has_a_sample() -> None:
    names = [name.split("::") for name in torch._C._dispatch_get_all_op_names()]
    found = {name for namespace, name in names if namespace == "coreai_kernels"}
    assert found == set(MAIN).union(*CHECKED_ELSEWHERE.values())


# torch does not trace operators that mutate and return a list. Nobody does: compiled programs call the single
# operators.
EAGER_ONLY = ("foreach_observe_and_fake_quantize_",)


@pytest.mark.parametrize("name", MAIN)
def test_opcheck(name: str) -> None:
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    checks += [] if name in EAGER_ONLY else ["test_aot_dispatch_dynamic"]
    torch.library.opcheck(getattr(ops, name).default, MAIN[name](), test_utils=checks)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_opcheck_of_four_axes(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 4, 3, 5).contiguous(memory_format=memory_format).requires_grad_()
    scale, zero_point = params(1, 4, 1, 1)
    torch.library.opcheck(ops.fake_quantize.default, (x, scale, zero_point, None, [2, 1, 3, 5], *INT4, True))


def straight_through(x: Tensor, scale: Tensor, zero_point: Tensor, low: float, high: float) -> Tensor:
    """The definition: 1 where the rounded, offset value is in range, else 0."""
    q = torch.round(x.detach().double() / scale.double()) + zero_point
    return ((q >= low) & (q <= high)).to(x.dtype)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_gradient_is_the_straight_through_estimate(backend: str) -> None:
    x, (scale, zero_point) = leaf(16, 32), params(16, 1)
    gradient = torch.randn(16, 32)
    gradient[0, :4] = torch.tensor([float("inf"), float("nan"), -float("inf"), -0.0])
    with ck.use_backend(backend):
        y = ck.fake_quantize(x, scale, zero_point, block_size=(1, 32), quant_min=-8, quant_max=7)
        y.backward(gradient)
    assert_same_bits(x.grad, gradient * straight_through(x, scale, zero_point, -8, 7))


def test_backward_keeps_one_bit_per_element() -> None:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        scale, zero_point = params(64, 1)
        ck.fake_quantize(leaf(64, 100), scale, zero_point, block_size=(1, 100), quant_min=-8, quant_max=7)
    assert [(t.dtype, t.numel()) for t in saved] == [(torch.uint8, 64 * 100 // 8)]


class NoHostReads(TorchDispatchMode):
    """Fails where the host would have to wait for a device."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "masked_select")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"{name} makes the host wait"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_nothing_waits_for_the_device(backend: str) -> None:
    state = (*params(4, 2), torch.zeros(4, 2), torch.zeros(4, 2), torch.zeros(4, 2))
    with ck.use_backend(backend), NoHostReads():
        for has_running in (False, True):
            y = ck.observe_and_fake_quantize(
                leaf(4, 8),
                *state,
                block_size=(1, 4),
                scheme=Scheme.ASYMMETRIC,
                quant_min=-8,
                quant_max=7,
                update=RangeUpdate.MOVING_AVERAGE,
                has_running=has_running,
            )
            y.sum().backward()


def step(x: Tensor, state: list[Tensor]) -> Tensor:
    """With a connection around the simulation: two read the gradient, so that neither may change it."""
    scale, zero_point, low, high = state
    wide = x * 1.5
    simulated = ck.observe_and_fake_quantize(
        wide,
        scale,
        zero_point,
        None,
        low,
        high,
        block_size=(1, 4),
        scheme=Scheme.SYMMETRIC,
        quant_min=-8,
        quant_max=7,
        update=RangeUpdate.GLOBAL_MINMAX,
        has_running=True,
    )
    return (simulated + wide).sin()


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_compiles_without_a_graph_break(backend: str) -> None:
    x = torch.randn(4, 8)
    results = []
    with ck.use_backend(backend):
        for function in (step, torch.compile(step, fullgraph=True)):
            state = [*params(4, 2), torch.zeros(4, 2), torch.zeros(4, 2)]
            inputs = x.clone().requires_grad_()
            function(inputs, state).sum().backward()
            results.append([inputs.grad, *state])
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)


def test_exports() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return ck.fake_quantize(x, scale, block_size=(1, 4), quant_min=-8, quant_max=7)

    x, scale = torch.randn(4, 8), torch.rand(4, 2) + 0.1
    program = torch.export.export(Module(), (x, scale))
    assert "coreai_kernels.fake_quantize" in str(program.graph)
    assert_same_bits(program.module()(x, scale), Module()(x, scale))


def test_autocast_leaves_the_dtype_alone() -> None:
    x, (scale, zero_point) = leaf(4, 8, dtype=torch.bfloat16), params(4, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ck.fake_quantize(x, scale, zero_point, block_size=(1, 4), quant_min=-8, quant_max=7)
    assert y.dtype == torch.bfloat16


def test_empty_tensors() -> None:
    scale, zero_point = torch.ones(0, 1), torch.ones(0, 1, dtype=torch.int32)
    x = torch.empty(0, 4, requires_grad=True)
    y = ck.fake_quantize(x, scale, zero_point, block_size=(1, 4), quant_min=-8, quant_max=7)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 4)
    assert ck.observe_range(x, block_size=(1, 4))[0].shape == (0, 1)
    with pytest.raises(IndexError, match="empty"):
        ck.observe_range(x, block_size=(0, 4))


def test_block_parameters_of_any_strides() -> None:
    x, (scale, zero_point) = torch.randn(4, 8), params(4, 2)
    strided = scale.t().contiguous().t(), zero_point.t().contiguous().t()
    kwargs: dict[str, Any] = {"block_size": (1, 4), "quant_min": -8, "quant_max": 7}
    assert_same_bits(
        ck.fake_quantize(x, *strided, **kwargs), ck.fake_quantize(x, scale, zero_point, **kwargs)
    )
    values = ck.quantize(x, scale, zero_point, **kwargs, dtype=torch.int8)
    assert torch.equal(ck.quantize(x, *strided, **kwargs, dtype=torch.int8), values)
    del kwargs["quant_max"]
    assert_same_bits(
        ck.dequantize(values, *strided, **kwargs), ck.dequantize(values, scale, zero_point, **kwargs)
    )


GOOD = {"block_size": (1, 4), "quant_min": -8, "quant_max": 7}


@pytest.mark.parametrize(
    ("error", "text", "arguments"),
    [
        (TypeError, "input must be one of torch.float32", {"input": torch.ones(4, 8, dtype=torch.int32)}),
        (ValueError, "block_size .*does not divide shape", {"block_size": (1, 3)}),
        (ValueError, "block_size .*one entry per dimension", {"block_size": (4,)}),
        (ValueError, "scale must have one value per block, shape", {"scale": torch.ones(4, 1)}),
        (ValueError, "zero_point must have one value", {"zero_point": torch.ones(1, dtype=torch.int32)}),
        (ValueError, "exclude each other", {"minval": torch.ones(4, 2)}),
        (ValueError, "quant_min must be below quant_max", {"quant_min": 7}),
        (ValueError, "must lie in", {"format": Format.E2M1, "quant_max": 7.0, "zero_point": None}),
    ],
)
def test_bad_arguments(error: type[Exception], text: str, arguments: dict[str, Any]) -> None:
    scale, zero_point = params(4, 2)
    call = {"input": torch.randn(4, 8), "scale": scale, "zero_point": zero_point, **GOOD, **arguments}
    with pytest.raises(error, match=text):
        ck.fake_quantize(**call)


def test_a_bad_step_leaves_the_state_alone() -> None:
    state = [torch.ones(4, 2), torch.ones(4, 2, dtype=torch.int32)]
    with pytest.raises(ValueError, match="running_min and running_max"):
        ck.observe_and_fake_quantize(
            torch.randn(4, 8), *state, **GOOD, scheme=Scheme.SYMMETRIC, update=RangeUpdate.MOVING_AVERAGE
        )
    assert bool((state[0] == 1).all() and (state[1] == 1).all())


@pytest.mark.parametrize("bits", [0, 9])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(ValueError, match=r"bits must be in 1\.\.8"):
        ck.pack_bits(torch.zeros(3, dtype=torch.uint8), bits)


def test_unpacking_the_wrong_number_of_bytes() -> None:
    with pytest.raises(ValueError, match="2 bytes for 3 values of 4 bits"):
        ck.unpack_bits(torch.zeros(3, dtype=torch.uint8), 4, 3)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "fake_quantize": lambda x: ck.fake_quantize(
        x, torch.full((4, 2), 0.3), block_size=(1, 4), quant_min=-8, quant_max=7
    ),
    "learnable_range": lambda x: ck.learnable_range(
        x, torch.full((4, 2), 1.5), block_size=(1, 4), level_low=-8, level_high=7
    ),
    "apply_mask": lambda x: ck.apply_mask(x, x > 0),
    "palettize": lambda x: ck.lookup(
        torch.zeros(4, 8, dtype=torch.uint8), x.new_ones(1, 2, 1), block_size=(4, 8), weight=x
    ),
    "soft_palettize": lambda x: ck.soft_palettize(
        x, torch.linspace(-1, 1, 4).view(1, 4, 1), 0.1, block_size=(4, 8)
    ),
    "sampled_mask": lambda x: ck.sampled_mask(x, x.detach(), torch.tensor(3), seed=1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_gradients_under_the_compiler(backend: str, name: str) -> None:
    function, x = FUNCTIONS[name], torch.randn(4, 8)
    found = []
    with ck.use_backend(backend):
        for each in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
            leaf = x.clone().requires_grad_()
            each(leaf * 1.5).sin().sum().backward()
            found.append(leaf.grad)
    torch.testing.assert_close(*found)
    assert bool(found[0].any())
