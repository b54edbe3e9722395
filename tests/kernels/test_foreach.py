"""Lists of tensors in one launch: the bits of the single calls, for outputs, states and gradients."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import coreai_kernels as ck
from coreai_kernels import Format, RangeUpdate, ScaleFormat, Scheme
from tests.kernels.support import Case, assert_same_bits, assert_same_memory_format, cases

State = dict[str, Tensor]

LISTS = {
    "scale": "scales",
    "zero_point": "zero_points",
    "minval": "minvals",
    "running_min": "running_mins",
    "running_max": "running_maxs",
}


@st.composite
def lists_of_cases(draw: st.DrawFn) -> list[Case]:
    """Tensors of several shapes, layouts and dtypes, with one number format."""
    first = draw(cases())
    others = draw(st.lists(cases(formats=[first.format]), max_size=4))
    for case in others:
        case.quant_min, case.quant_max = first.quant_min, first.quant_max
    return [first, *others]


def states_of(chosen: list[Case], update: RangeUpdate) -> list[State]:
    states: list[State] = []
    for case in chosen:
        state = {"scale": torch.zeros(case.grid)}
        if case.format == Format.INT:
            state["zero_point"] = torch.zeros(case.grid, dtype=torch.int32)
            state["minval"] = torch.zeros(case.grid)
        if update != RangeUpdate.LATEST:
            state |= {
                name: torch.zeros(case.grid, dtype=case.dtype) for name in ("running_min", "running_max")
            }
        states.append(state)
    return states


def in_lists(states: list[State]) -> dict[str, list[Tensor]]:
    return {LISTS[name]: [state[name] for state in states] for name in states[0]}


def leaves(chosen: list[Case], needs_grad: list[bool], step: int) -> list[Tensor]:
    return [
        case.tensor(seed=step).detach().requires_grad_(needed)
        for case, needed in zip(chosen, needs_grad, strict=True)
    ]


def backward(outputs: list[Tensor], chosen: list[Case], used: list[bool]) -> None:
    """Gradients come to some of the outputs only, and in other memory formats than theirs."""
    pairs = [
        (output, case.tensor(seed=9))
        for output, case, wanted in zip(outputs, chosen, used, strict=True)
        if wanted and output.requires_grad
    ]
    if pairs:
        torch.autograd.backward(*map(list, zip(*pairs, strict=True)))


def compare(got: list[Tensor | None], wanted: list[Tensor | None], what: str) -> None:
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert (a is None) == (b is None), f"{what} {i}"
        if a is not None and b is not None:
            assert a.requires_grad == b.requires_grad, f"{what} {i}"
            assert_same_bits(a.detach(), b.detach(), f"{what} {i}")
            assert_same_memory_format(a, b)


flags = st.lists(st.booleans(), min_size=5, max_size=5)


@settings(max_examples=150, deadline=None)
@given(lists_of_cases(), st.sampled_from(["zero_point", "minval", "none"]), flags, flags)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_fake_quantize(
    backend: str, chosen: list[Case], formulation: str, needs_grad: list[bool], used: list[bool]
) -> None:
    needs_grad, used = needs_grad[: len(chosen)], used[: len(chosen)]
    params = []
    for case in chosen:
        row = {"scale": (torch.rand(case.grid) + 0.01) * case.magnitude}
        if case.format == Format.INT and formulation == "zero_point":
            row["zero_point"] = torch.randint(-3, 4, case.grid, dtype=torch.int32)
        if case.format == Format.INT and formulation == "minval":
            row["minval"] = -torch.rand(case.grid) * case.magnitude
        params.append(row)
    config = {name: value for name, value in chosen[0].quant.items() if name != "block_size"}
    results = []
    with ck.use_backend(backend):
        for together in (False, True):
            inputs = leaves(chosen, needs_grad, 0)
            if together:
                blocks = [case.block_size for case in chosen]
                outputs = ck.foreach_fake_quantize(inputs, **in_lists(params), block_sizes=blocks, **config)
            else:
                outputs = [
                    ck.fake_quantize(x, **row, block_size=case.block_size, **config)
                    for x, row, case in zip(inputs, params, chosen, strict=True)
                ]
            backward(outputs, chosen, used)
            results.append((outputs, [x.grad for x in inputs]))
    for wanted, got, what in zip(*results, ("output", "gradient"), strict=True):
        compare(got, wanted, what)


@settings(max_examples=150, deadline=None)
@given(
    lists_of_cases(),
    st.sampled_from(list(Scheme)),
    st.sampled_from(list(RangeUpdate)),
    st.booleans(),
    st.sampled_from(list(ScaleFormat)),
    flags,
    flags,
)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_step(
    backend: str,
    chosen: list[Case],
    scheme: Scheme,
    update: RangeUpdate,
    use_minval: bool,
    scale_format: ScaleFormat,
    needs_grad: list[bool],
    used: list[bool],
) -> None:
    needs_grad, used = needs_grad[: len(chosen)], used[: len(chosen)]
    config: dict[str, Any] = {name: value for name, value in chosen[0].quant.items() if name != "block_size"}
    config |= {"scheme": scheme, "update": update, "averaging_constant": 0.1, "use_minval": use_minval}
    config["scale_format"] = chosen[0].suited(scale_format, scheme)
    results = []
    with ck.use_backend(backend):
        for together in (False, True):
            states = states_of(chosen, update)
            found: list[list[Tensor | None]] = []
            for step in range(2):
                inputs = leaves(chosen, needs_grad, step)
                if together:
                    outputs = ck.foreach_observe_and_fake_quantize(
                        inputs,
                        **in_lists(states),
                        block_sizes=[case.block_size for case in chosen],
                        has_running=step > 0,
                        **config,
                    )
                else:
                    outputs = [
                        ck.observe_and_fake_quantize(
                            x, **state, block_size=case.block_size, has_running=step > 0, **config
                        )
                        for x, state, case in zip(inputs, states, chosen, strict=True)
                    ]
                backward(outputs, chosen, used)
                values = [value.clone() for state in states for value in state.values()]
                found += [list(outputs), [x.grad for x in inputs], values]
            results.append(found)
    for wanted, got, what in zip(*results, ("output", "gradient", "state") * 2, strict=True):
        compare(got, wanted, what)


def mixed_list() -> tuple[list[Tensor], list[tuple[int, ...]], list[State]]:
    """Large and small tensors, so that some have threads of their own and the others share."""
    shapes = [(64, 64), (700, 301), (3, 5), (1, 200_001), (128, 96), (0, 4), (30, 40), (512, 300)]
    inputs = [torch.randn(shape) for shape in shapes]
    blocks = [(1, shape[1]) for shape in shapes]
    states = [
        {"scale": torch.zeros(shape[0], 1), "zero_point": torch.zeros(shape[0], 1, dtype=torch.int32)}
        for shape in shapes
    ]
    return inputs, blocks, states


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_does_not_show(threads: int) -> None:
    torch.manual_seed(3)
    inputs, blocks, states = mixed_list()
    config: dict[str, Any] = {"scheme": Scheme.ASYMMETRIC, "quant_min": -8, "quant_max": 7}
    wanted_states = [{name: value.clone() for name, value in state.items()} for state in states]
    with ck.use_backend("reference"):
        wanted = ck.foreach_observe_and_fake_quantize(
            inputs, **in_lists(wanted_states), block_sizes=blocks, **config
        )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = ck.foreach_observe_and_fake_quantize(inputs, **in_lists(states), block_sizes=blocks, **config)
    finally:
        torch.set_num_threads(before)
    compare(list(got), list(wanted), "output")
    for a, b in zip(states, wanted_states, strict=True):
        compare(list(a.values()), list(b.values()), "state")


def small_list(count: int = 3) -> tuple[list[Tensor], dict[str, list[Tensor]], dict[str, Any]]:
    inputs = [torch.randn(4, 8).requires_grad_() for _ in range(count)]
    lists = in_lists([{"scale": torch.rand(4, 2) + 0.1} for _ in range(count)])
    return inputs, lists, {"block_sizes": [(1, 4)] * count, "quant_min": -8, "quant_max": 7}


def test_outputs_are_separate_tensors() -> None:
    inputs, lists, config = small_list()
    outputs = ck.foreach_fake_quantize(inputs, **lists, **config)
    outputs[0].sin().sum().backward(retain_graph=True)
    outputs[1].mul_(2.0)  # must not invalidate what the others saved
    outputs[0].sum().backward()
    assert len({y.untyped_storage().data_ptr() for y in outputs}) == len(outputs)
    assert inputs[0].grad is not None
    assert inputs[1].grad is None


def test_backward_keeps_one_tensor_of_bits() -> None:
    saved: list[Tensor] = []
    inputs, lists, config = small_list(50)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ck.foreach_fake_quantize(inputs, **lists, **config)
    assert [(t.dtype, t.numel()) for t in saved] == [(torch.uint8, 50 * 16)]


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_compiles_without_a_graph_break(backend: str) -> None:
    inputs, lists, config = small_list()

    def run(xs: list[Tensor]) -> Tensor:
        return torch.stack(ck.foreach_fake_quantize([x * 1.5 for x in xs], **lists, **config)).sin().sum()

    with ck.use_backend(backend):
        wanted = torch.autograd.grad(run(inputs), inputs)
        got = torch.autograd.grad(torch.compile(run, fullgraph=True)(inputs), inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def test_empty_list() -> None:
    assert ck.foreach_fake_quantize([], [], block_sizes=[], quant_min=-8, quant_max=7) == []


@pytest.mark.parametrize(
    ("error", "text", "arguments"),
    [
        (
            ValueError,
            "scales must have one entry for each of the 3 inputs; it has 2",
            {"scales": [torch.ones(4, 2)] * 2},
        ),
        (ValueError, "block_sizes must have one entry", {"block_sizes": [(1, 4)]}),
        (ValueError, "does not divide shape", {"block_sizes": [(1, 4), (1, 3), (1, 4)]}),
        (ValueError, "quant_min must be below quant_max", {"quant_min": 7}),
        (
            TypeError,
            "input must be one of torch.float32",
            {"inputs": [torch.ones(4, 8, dtype=torch.int32)] * 3},
        ),
    ],
)
def test_bad_arguments(error: type[Exception], text: str, arguments: dict[str, Any]) -> None:
    inputs, lists, config = small_list()
    with pytest.raises(error, match=text):
        ck.foreach_fake_quantize(**{"inputs": inputs, **lists, **config, **arguments})


def test_bad_steps_leave_the_states_alone() -> None:
    inputs, lists, config = small_list()
    before = [scale.clone() for scale in lists["scales"]]
    for blocks, scales in (
        ([(1, 4), (1, 4), (1, 3)], lists["scales"]),
        (config["block_sizes"], lists["scales"][:1] * 3),
    ):
        with pytest.raises(ValueError, match=r"does not divide|given states is there twice"):
            ck.foreach_observe_and_fake_quantize(
                inputs, scales, **{**config, "block_sizes": blocks}, scheme=Scheme.SYMMETRIC
            )
    compare(list(lists["scales"]), list(before), "scale")
