"""``simulate_together`` is ``simulator(tensor)`` for each, whatever the simulators are and do."""

import copy
import logging

import pytest
import torch

from coreai_kernels.ops import foreach
from coreai_opt.quantization.spec import PerBlockGranularity, PerChannelGranularity, PerTensorGranularity
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase
from coreai_opt.quantization.spec.together import simulate_together

WEIGHTS = [
    {"dtype": "int4", "granularity": PerBlockGranularity(axis=1, block_size=32)},
    {"dtype": "int4", "granularity": PerChannelGranularity(axis=0)},
    {"dtype": "int8", "granularity": PerTensorGranularity()},
    {"dtype": "int8", "qscheme": "asymmetric", "qformulation": "minval"},
    {"dtype": "float8_e4m3fn", "granularity": PerChannelGranularity(axis=1)},
]
ACTIVATIONS = [
    {"dtype": "int8", "qparam_calculator_cls": "moving_average"},
    {"dtype": "uint8", "qparam_calculator_cls": "global_minmax", "qscheme": "asymmetric"},
    {"dtype": "int8", "qparam_calculator_cls": "dynamic"},
]
SHAPES = [(64, 64), (128, 96), (4, 32), (600, 320)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.fixture
def simulators(make, make_activation):
    return [make(**fields) for fields in WEIGHTS for _ in SHAPES] + [
        make_activation(**fields) for fields in ACTIVATIONS for _ in SHAPES
    ]


def tensors_for(simulators, seed, dtypes=DTYPES):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(SHAPES[i % len(SHAPES)], generator=generator).to(dtypes[i % len(dtypes)]).requires_grad_()
        for i in range(len(simulators))
    ]


def one_by_one(simulators, tensors):
    return [simulator(tensor) for simulator, tensor in zip(simulators, tensors, strict=True)]


def assert_alike(simulators, steps=3, between=lambda step, simulators: None):
    """Outputs, gradients and states of some steps are equal."""
    twins = copy.deepcopy(simulators)
    for step in range(steps):
        found = []
        for simulate, modules in ((one_by_one, simulators), (simulate_together, twins)):
            between(step, modules)
            tensors = tensors_for(simulators, step)
            outputs = simulate(modules, tensors)
            losses = [(y.float() ** 2).sum() for y in outputs]
            torch.stack(losses).sum().backward()
            found.append((outputs, [x.grad for x in tensors]))
        for ours, theirs in zip(*found, strict=True):
            for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
                assert a.dtype == b.dtype
                assert torch.equal(a, b), f"step {step}, tensor {i}"
        for one, twin in zip(simulators, twins, strict=True):
            state, other = one.state_dict(), twin.state_dict()
            assert state.keys() == other.keys()
            assert all(torch.equal(state[name], other[name]) for name in state)


@pytest.fixture
def launches(monkeypatch):
    """Numbers of tensors of the launches of the list operators."""
    counts = []
    for name in ("apply", "apply_step"):
        function = getattr(foreach, name)
        monkeypatch.setattr(
            foreach, name, lambda xs, *args, function=function: counts.append(len(xs)) or function(xs, *args)
        )
    return counts


def test_all_kinds(simulators, launches):
    assert_alike(simulators)
    large = sum(SHAPES[i % len(SHAPES)][0] == 600 for i in range(len(simulators)))
    stateless = len(SHAPES) - 1  # observed in the first step already
    assert sum(launches) == 2 * (len(simulators) - large) + stateless


def test_switches(simulators, launches):
    def between(step, modules):
        if step == 1:
            for module in modules:
                module.disable_observer()
        if step == 2:
            for module in modules[::2]:
                module.disable_fake_quant()
        if step == 3:
            modules[1].enable_observer()
            modules[2].set_export_mode()

    assert_alike(simulators, steps=4, between=between)
    assert launches


def test_one_launch_for_one_setting(make, launches):
    fields = WEIGHTS[0]
    simulators = [make(**fields) for _ in range(7)]
    tensors = [torch.randn(3 + i, 32 * (i + 1)) for i in range(7)]
    for _ in range(2):
        outputs = simulate_together(simulators, tensors)
    assert launches == [7]
    assert len({y.untyped_storage().data_ptr() for y in outputs}) == 7


def test_a_launch_is_bounded(make, launches):
    simulators = [make(**WEIGHTS[1]) for _ in range(40)]
    tensors = [torch.randn(256, 256) for _ in simulators]
    for _ in range(2):
        simulate_together(simulators, tensors)
    assert launches == [32, 8]


def test_hooks_are_called(make, launches):
    simulators = [make(**WEIGHTS[1]) for _ in range(3)]
    called = []
    simulators[1].register_forward_hook(lambda module, args, output: called.append(module))
    simulators[2].qparams_calculator.register_forward_hook(lambda module, args, output: called.append(module))
    for _ in range(2):
        simulate_together(simulators, [torch.randn(4, 32)] * 3)
    assert called == [simulators[1], simulators[2].qparams_calculator] * 2
    assert launches == [1]


def test_methods_of_a_subclass_are_called(make, registration, launches):
    @registration(FakeQuantizeImplBase, "doubled")
    class Doubled(FakeQuantizeImplBase.get_class("default")):
        def forward(self, tensor):
            return 2 * super().forward(tensor)

    simulators = [make(fake_quantize_cls="doubled"), make()]
    x = torch.randn(4, 32)
    for _ in range(2):
        doubled, plain = simulate_together(simulators, [x, x])
    assert torch.equal(doubled, 2 * plain)
    assert launches == [1]


def test_a_simulator_that_is_there_twice(make_activation):
    one, twin = (make_activation(qparam_calculator_cls="moving_average") for _ in range(2))
    xs = [torch.randn(4, 32), 3 * torch.randn(4, 32), torch.randn(4, 32)]
    for _ in range(2):
        wanted = one_by_one([one] * 3, xs)
        got = simulate_together([twin] * 3, xs)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert torch.equal(one.qparams_calculator.running_max, twin.qparams_calculator.running_max)


def test_blocks_that_do_not_fit_disable_their_simulator(make, caplog):
    simulators = [make(**WEIGHTS[0]), make(**WEIGHTS[0])]
    x = torch.randn(4, 33)
    with caplog.at_level(logging.WARNING):
        _, unchanged = simulate_together(simulators, [torch.randn(4, 32), x])
    assert unchanged is x
    assert simulators[1].is_disabled()
    assert "incompatible with block size" in caplog.text


def test_bad_input_leaves_the_others_alone(make):
    simulators = [make(**WEIGHTS[1]), make(**WEIGHTS[1])]
    x = torch.randn(4, 32)
    simulate_together(simulators, [x, x])
    scale = simulators[0].calculate_qparams()[0].clone()
    with pytest.raises(TypeError, match="must be floating point"):
        simulate_together(simulators, [2 * x, x.int()])
    assert torch.equal(simulators[0].calculate_qparams()[0], scale)
    with pytest.raises(ValueError, match="one length; got 2 and 1"):
        simulate_together(simulators, [x])


def test_without_observation_before(make):
    simulators = [make(), make()]
    for module in simulators:
        module.disable_observer()
    message = "has no quantization parameters"
    with pytest.warns(UserWarning, match="no tensor"), pytest.raises(RuntimeError, match=message):
        simulate_together(simulators, [torch.randn(4, 32)] * 2)


def test_compiled(make):
    simulators = [make(**WEIGHTS[1]) for _ in range(3)]
    tensors = [torch.randn(4, 32) for _ in simulators]
    wanted = simulate_together(simulators, tensors)
    got = torch.compile(simulate_together, fullgraph=True)(simulators, tensors)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
