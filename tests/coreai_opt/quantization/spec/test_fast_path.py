"""The fast path of a fake quantizer: nothing tells it from the slow one but the time."""

import copy
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from coreai_kernels import native, use_backend
from coreai_kernels.runtime import fast_path_counts, reset_fast_path_counts
from coreai_opt.quantization.spec import PerBlockGranularity, PerChannelGranularity, PerTensorGranularity
from coreai_opt.quantization.spec import fake_quantize as module_of_forward

pytestmark = pytest.mark.skipif(
    native.missing is not None or native.autograd_missing is not None,
    reason=f"no fast path: {native.missing or native.autograd_missing}",
)

GRANULARITIES = [
    PerTensorGranularity(),
    PerChannelGranularity(axis=0),
    PerChannelGranularity(axis=1),
    PerBlockGranularity(axis=1, block_size=4),
]
SPECIAL = torch.tensor([0.0, -0.0, 1e-42, 3e38, float("inf"), -float("inf"), float("nan")])


@pytest.fixture
def slow_path(monkeypatch):
    """Counts the forwards that take the slow path."""
    taken = []

    def counted(operator):
        def apply(*args):
            taken.append(1)
            return operator(*args)

        return apply

    for operators in (module_of_forward.training_step_op, module_of_forward.fake_quantize_op):
        monkeypatch.setattr(operators, "apply", counted(operators.apply))
    return taken


@pytest.fixture
def settled(make_activation, x, slow_path):
    """A module that takes the fast path for `x`."""
    module = make_activation()
    for _ in range(3):
        module(x)
    assert slow_path
    slow_path.clear()
    module(x)
    assert not slow_path
    return module


def values(shape, dtype, seed, special=False):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if special:
        places = torch.randint(x.numel(), (len(SPECIAL),), generator=generator)
        x.view(-1)[places] = SPECIAL
    return x.to(dtype)


def step(module, x, grad):
    x = x.detach().requires_grad_()
    y = module(x)
    y.backward(grad)
    return y.detach(), x.grad


def bits(tensor):
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(words[tensor.element_size()]).tolist()


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        assert a.stride() == b.stride()
        assert bits(a) == bits(b)


def assert_same_state(one, other):
    for (name, a), (other_name, b) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert name == other_name
        assert torch.equal(a, b) or (a != a).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "granularity", GRANULARITIES, ids=lambda g: f"{type(g).__name__}{getattr(g, 'axis', '')}"
)
@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "int4", "qparam_calculator_cls": "static"},
        {"dtype": "int8", "qparam_calculator_cls": "moving_average"},
        {"dtype": "uint8", "qparam_calculator_cls": "global_minmax", "qscheme": "asymmetric"},
        {
            "dtype": "int8",
            "qparam_calculator_cls": "static",
            "qformulation": "minval",
            "qscheme": "asymmetric",
        },
        {"dtype": "float8_e4m3fn", "qparam_calculator_cls": "static"},
        {"dtype": "int8", "scale_dtype": "float8_e8m0fnu", "qparam_calculator_cls": "moving_average"},
        {"dtype": "float4_e2m1fn", "scale_dtype": "float8_e4m3fn", "qparam_calculator_cls": "moving_average"},
    ],
    ids=lambda fields: "-".join(fields.values()),
)
def test_results_are_those_of_the_slow_path(make, make_activation, slow_path, fields, granularity, dtype):
    build = make if fields["qparam_calculator_cls"] == "static" else make_activation
    module = build(granularity=granularity, **fields)
    twin = copy.deepcopy(module)
    for i in range(6):
        x, grad = values((12, 20), dtype, i, special=i == 4), values((12, 20), dtype, -i, special=True)
        twin.__dict__["_captured"] = None
        wanted = step(twin, x, grad)
        count = len(slow_path)
        found = step(module, x, grad)
        assert len(slow_path) == count or i < 2
        assert_same(found, wanted)
        assert_same_state(module, twin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "granularity", GRANULARITIES, ids=lambda g: f"{type(g).__name__}{getattr(g, 'axis', '')}"
)
@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "int4"},
        {"dtype": "uint8", "qscheme": "asymmetric"},
        {"dtype": "int8", "qformulation": "minval", "qscheme": "asymmetric"},
        {"dtype": "float4_e2m1fn"},
    ],
    ids=lambda fields: "-".join(fields.values()),
)
def test_without_observation(make, slow_path, fields, granularity, dtype):
    module = make(granularity=granularity, **fields)
    module(values((12, 20), dtype, 0))
    module.disable_observer()
    twin = copy.deepcopy(module)
    for i in range(4):
        x, grad = values((12, 20), dtype, i, special=True), values((12, 20), dtype, -i, special=True)
        twin.__dict__["_captured"] = None
        wanted = step(twin, x, grad)
        count = len(slow_path)
        assert_same(step(module, x, grad), wanted)
        assert len(slow_path) == count or i == 0
    assert_same_state(module, twin)


def test_observation_on_and_off(make_activation, x):
    module = make_activation(qparam_calculator_cls="moving_average")
    twin = copy.deepcopy(module)
    for i in range(12):
        for each in (module, twin):
            each.enable_observer(i % 6 < 3)
        twin.__dict__["_captured"] = None
        assert torch.equal(module((i + 1) * x), twin((i + 1) * x))
    assert_same_state(module, twin)


def test_parameters_given_by_a_method_of_ones_own(make, x):
    module = make()
    module(x)
    module.disable_observer()
    module(x)
    calculator = module.qparams_calculator
    doubled = (2 * calculator.scale, calculator.zero_point, calculator.minval)
    calculator.get_qparams = lambda: doubled
    for _ in range(3):
        assert torch.equal(module(x), module._simulate(x, doubled))


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((), lambda x: x),
        ((7,), lambda x: x),
        ((2, 8, 3, 5), lambda x: x.to(memory_format=torch.channels_last)),
        ((6, 4), lambda x: x.t()),
        ((3, 1, 5), lambda x: x.permute(2, 1, 0)),
    ],
)
def test_memory_formats(make_activation, slow_path, shape, layout):
    module = make_activation(qparam_calculator_cls="moving_average")
    twin = copy.deepcopy(module)
    for i in range(4):
        x, grad = (layout(values(shape, torch.float32, seed)) for seed in (i, i + 9))
        twin.__dict__["_captured"] = None
        wanted = step(twin, x, grad)
        slow_path.clear()
        assert_same(step(module, x, grad), wanted)
    assert not slow_path


def test_tensors_that_are_not_dense_take_the_slow_path(make_activation, slow_path):
    module = make_activation(qparam_calculator_cls="static")
    x = values((8, 8), torch.float32, 0)
    for view in (x[:, ::2], x[:1].expand(4, 8)):
        wanted = module(view.contiguous())
        slow_path.clear()
        for _ in range(3):
            assert torch.equal(module(view), wanted)
        assert len(slow_path) == 3


def test_gradients_only_where_they_are_wanted(settled, x, slow_path):
    assert settled(x).grad_fn is None
    y = settled(x.requires_grad_())
    assert y.requires_grad
    assert "StraightThrough" in y.grad_fn.name()
    with torch.no_grad():
        assert not settled(x).requires_grad
    assert settled(nn.Parameter(x.detach())).requires_grad
    assert not slow_path


def test_second_derivatives(settled, x, slow_path):
    x = (x / 10).requires_grad_()
    (first,) = torch.autograd.grad((settled(x) ** 2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert not slow_path
    assert torch.equal(second, torch.full_like(x, 2.0))


def test_switches_written_by_anybody(settled, x):
    settled.fake_quant_enabled[0] = 0
    assert settled(x) is x
    settled.fake_quant_enabled.fill_(1)
    scale = settled.qparams_calculator.scale.clone()
    settled.observer_enabled.data[0] = 0  # counted by no version
    settled(100 * x)
    assert torch.equal(settled.qparams_calculator.scale, scale)
    with torch.autograd._unsafe_preserve_version_counter(settled.observer_enabled):  # as DDP's broadcast does
        settled.observer_enabled.fill_(1)
    settled(100 * x)
    assert not torch.equal(settled.qparams_calculator.scale, scale)
    settled._disabled.fill_(True)
    assert settled(x) is x


def test_buffers_replaced_by_others(settled, x):
    calculator = settled.qparams_calculator
    for replace in (
        lambda new: setattr(calculator, "scale", new),
        lambda new: calculator._buffers.update(scale=new),
        lambda new: setattr(calculator.scale, "data", new),
    ):
        old = calculator.scale
        new = torch.zeros_like(old)
        replace(new)
        settled(x)
        assert calculator.scale.item() != 0
        assert calculator.scale is old or calculator.scale is new
        settled(2 * x)
        settled(3 * x)


def test_a_loaded_state_is_gone_on_from(make_activation, settled, x):
    other = make_activation()
    other(50 * x)
    settled.load_state_dict(other.state_dict())
    for seed in range(3):
        tensor = values(x.shape, x.dtype, seed)
        assert torch.equal(settled(tensor), other(tensor))
    assert_same_state(settled, other)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.double(),
        lambda x: x.t().contiguous().t(),
        lambda x: x[:2],
        lambda x: x.reshape(2, 2, 8),
    ],
    ids=["dtype", "strides", "shape", "rank"],
)
def test_other_tensors(make_activation, x, slow_path, change):
    fresh, module = make_activation(), make_activation()
    for _ in range(3):
        module(x)
        fresh(x.clone())
    fresh.__dict__["_captured"] = None
    other = change(x)
    if other.dtype == x.dtype and other.dim() == x.dim():
        assert torch.equal(module(other), fresh(other))
    else:
        outcomes = []
        for each in (module, fresh):
            try:
                outcomes.append(each(other).tolist())
            except RuntimeError as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]


def test_hooks_are_called(settled, x):
    heard = []
    for module in (settled, settled.qparams_calculator, settled.qparams_calculator.range_calculator):
        module.register_forward_hook(lambda *args: heard.append(1))
        settled(x)
    assert len(heard) == 1 + 2 + 3


def test_replaced_calculators_are_used(make_activation, settled, x):
    other = make_activation(qparam_calculator_cls="global_minmax").qparams_calculator
    settled.qparams_calculator = other
    settled(x)
    assert other.scale.numel() == 1


def test_forced_backends(settled, x, slow_path):
    wanted = settled(x)
    with use_backend("reference"):
        assert torch.equal(settled(x), wanted)
    assert len(slow_path) == 1
    with use_backend("native"):
        settled(x)
        slow_path.clear()
        settled(x)
    assert not slow_path


class _Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class _Called(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [_Dispatched, _Called])
def test_modes_see_the_operator(settled, x, mode):
    with mode() as seen:
        settled(x)
    assert any("observe_and_fake_quantize" in name for name in seen.names)


def test_subclasses_see_the_operator(settled, x):
    seen = []

    class Listening(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs or {})

    assert type(settled(x.as_subclass(Listening))) is Listening
    assert any("observe_and_fake_quantize" in name for name in seen)


def test_modes_that_change_nothing(settled, x, slow_path):
    wanted = settled(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(settled(x), wanted)
    with torch.autograd.set_detect_anomaly(True):
        assert torch.equal(settled(x.requires_grad_()), wanted)
    assert not slow_path


def test_inference_mode(settled, x):
    wanted = settled(x)
    with torch.inference_mode():
        y = settled(x)
    assert y.is_inference()
    assert torch.equal(y, wanted)


def test_function_transforms(settled, x):
    gradient = torch.func.grad(lambda x: settled(x).sum())(x / 10)
    assert torch.equal(gradient, torch.ones_like(x))


def test_the_profiler_sees_the_operator(settled, x):
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
    ) as profile:
        settled(x)
    (event,) = [e for e in profile.events() if e.name == "coreai_kernels::observe_and_fake_quantize_"]
    assert event.input_shapes == [list(x.shape)]


def test_compiled_and_eager_in_turns(settled, x):
    compiled = torch.compile(settled, fullgraph=True, backend="aot_eager")
    for i in range(3):
        wanted = copy.deepcopy(settled)((i + 1) * x)
        assert torch.equal(compiled((i + 1) * x), wanted)
        settled((i + 2) * x)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_have_a_state_of_their_own(settled, x, duplicate):
    other = duplicate(settled)
    before = settled.qparams_calculator.running_max.clone()
    for _ in range(4):
        other(100 * x)
    assert torch.equal(settled.qparams_calculator.running_max, before)
    assert other.qparams_calculator.running_max > before


def test_a_module_that_moved(settled, x):
    settled.to(torch.float64)
    for _ in range(3):
        settled(x)
    settled.to(torch.float32)
    wanted = copy.deepcopy(settled)(x)
    assert torch.equal(settled(x), wanted)


def test_threads(make_activation):
    modules = [make_activation(qparam_calculator_cls="global_minmax") for _ in range(4)]
    inputs = [[values((64, 64), torch.float32, 10 * i + j) for j in range(200)] for i in range(4)]
    found = [None] * 4

    def run(i):
        found[i] = [modules[i](x) for x in inputs[i]][-1]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, output in enumerate(found):
        wanted = make_activation(qparam_calculator_cls="global_minmax")
        for x in inputs[i]:
            last = wanted(x)
        assert torch.equal(output, last)


def _as_module_is(module, x):
    """What the module gives where nothing is captured."""
    return copy.deepcopy(module)(x)


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.disable_fake_quant(),
        lambda module: module.fake_quant_enabled.zero_(),
        lambda module: setattr(module, "quant_max", 3),
        lambda module: setattr(module.qparams_calculator, "scale", torch.full((1, 1), 0.25)),
    ],
    ids=["a switch", "a buffer of a switch", "a setting", "a buffer"],
)
@pytest.mark.parametrize("observes", [True, False])
def test_what_another_thread_changes_during_a_forward_is_not_missed(
    make_activation, x, monkeypatch, change, observes
):
    module = make_activation()
    module(x)
    module.enable_observer(observes)
    operators = module_of_forward.training_step_op if observes else module_of_forward.fake_quantize_op
    apply = operators.apply

    def meanwhile(*args):
        output = apply(*args)
        thread = threading.Thread(target=change, args=(module,))
        thread.start()
        thread.join()
        return output

    module._captured = None
    monkeypatch.setattr(operators, "apply", meanwhile)
    module(x)
    monkeypatch.setattr(operators, "apply", apply)
    for _ in range(2):
        wanted = _as_module_is(module, x)
        assert torch.equal(module(x), wanted)


def test_nothing_is_kept_of_a_module_that_is_gone(make_activation, x):
    import gc
    import weakref

    module = make_activation()
    for _ in range(4):
        module(x)
    gone = [weakref.ref(module), weakref.ref(module.qparams_calculator.scale)]
    del module
    gc.collect()
    assert all(each() is None for each in gone)


def counts():
    found = fast_path_counts()
    return found["hits"], sum(found["misses"].values())


def test_what_happens_elsewhere_does_not_matter(make_activation, settled, x):
    other, parameter = make_activation(), nn.Parameter(torch.ones(3))
    hits, misses = counts()
    for i in range(20):
        handle = parameter.register_hook(lambda grad: grad)
        other.quant_max = 100 - i
        nn.Linear(2, 2).register_forward_hook(lambda *args: None)
        settled(x)
        handle.remove()
    assert counts() == (hits + 20, misses)


def test_training_mode_does_not_matter(settled, x):
    hits, misses = counts()
    for i in range(4):
        settled.train(i % 2 == 0)
        settled(x)
    assert counts() == (hits + 4, misses)


def test_shapes_that_alternate_are_all_captured(make, slow_path):
    module = make(dtype="int8", granularity=PerTensorGranularity())
    batches = [values((n, 8), torch.float32, n) for n in range(1, 9)]
    for _ in range(3):
        for batch in batches:
            module(batch)
    slow_path.clear()
    for batch in batches:
        module(batch)
    assert not slow_path


@pytest.mark.parametrize("part", ["", "qparams_calculator", "qparams_calculator.range_calculator"])
def test_an_assigned_setting_holds_at_once(settled, x, part):
    module = settled.get_submodule(part)
    if part.endswith("range_calculator"):
        module.forward = lambda tensor: (tensor.amin().view(1, 1) * 0 - 2, tensor.amax().view(1, 1) * 0 + 2)
    else:
        module.quant_max = 3
        settled.qparams_calculator.quant_max = settled.quant_max = 3
    wanted = copy.deepcopy(settled)
    wanted.__dict__["_captured"] = None
    assert torch.equal(settled(x), wanted(x))


def test_a_method_assigned_to_a_subclass_is_called(settled, x):
    class Mine(type(settled)):
        pass

    settled.__class__ = Mine
    for _ in range(3):
        settled(x)
    called = []
    given = Mine.get_block_size
    Mine.get_block_size = lambda *args, **kwargs: called.append(1) or given(*args, **kwargs)
    settled(x)
    assert called


def test_a_calculator_added_by_add_module_is_used(make_activation, settled, x):
    other = make_activation(qparam_calculator_cls="global_minmax").qparams_calculator
    settled.add_module("qparams_calculator", other)
    settled(x)
    assert other.scale.numel() == 1


def test_global_hooks_are_called(settled, x):
    heard = []
    handle = nn.modules.module.register_module_forward_hook(lambda *args: heard.append(args[0]))
    try:
        settled(x)
    finally:
        handle.remove()
    assert len(heard) == 3


def test_misses_are_counted_by_reason(settled, x):
    reset_fast_path_counts()
    settled(x)
    settled.fake_quant_enabled.fill_(0)
    settled(x)
    found = fast_path_counts()
    assert found["hits"] == 1
    assert found["misses"]["switch"] == 1


def test_forward_mode_derivatives(settled, x):
    tangent = torch.randn_like(x)
    settled.disable_observer()
    settled(x), settled(x)
    x = x.clone()
    x[0, 0] = 1e6  # outside of the range
    y = x.clone().requires_grad_()
    settled(y).backward(tangent)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        found = torch.autograd.forward_ad.unpack_dual(settled(dual)).tangent
    assert torch.equal(found, y.grad)
    assert torch.equal(torch.func.jvp(settled, (x,), (tangent,))[1], y.grad)


def test_batched_gradients(settled, x):
    x = x.clone().requires_grad_()
    y = settled(x)
    directions = torch.randn(3, *y.shape)
    (batched,) = torch.autograd.grad(y, x, directions, is_grads_batched=True, retain_graph=True)
    for one, direction in zip(batched, directions, strict=True):
        assert torch.equal(one, torch.autograd.grad(y, x, direction, retain_graph=True)[0])


def test_switched_off_by_the_environment():
    script = (
        "import torch, coreai_kernels.runtime as runtime\n"
        "from coreai_opt.config.spec import CompressionTargetTensor\n"
        "from coreai_opt.quantization.spec import QuantizationComponentFactory, QuantizationSpec\n"
        "make = QuantizationComponentFactory.create_fake_quantizer\n"
        "module = make(QuantizationSpec(), CompressionTargetTensor.WEIGHT)\n"
        "for _ in range(4): module(torch.ones(4, 4))\n"
        "counts = runtime.fast_path_counts()\n"
        "print(counts['enabled'], counts['captures'], counts['hits'])"
    )
    environment = {**os.environ, "COREAI_FAST_PATH": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "0", "0"]


@pytest.mark.parametrize(
    ("slots", "switches", "hooks", "classes", "message"),
    [
        ([({}, 1)], [], [], [], "slots must be a list of"),
        ([], [1], [], [], "switches must be a list of tensors"),
        ([], [], [()], [], "hooks must be a list of dict"),
        ([], [], [], [1], "classes must be a list of type"),
    ],
)
def test_guards_of_other_things_are_refused(slots, switches, hooks, classes, message):
    with pytest.raises(TypeError, match=message):
        native.autograd.CapturedCalls(slots, switches, hooks, classes)


def test_captured_calls_refuse_other_arguments():
    calls = native.autograd.CapturedCalls([], [], [], [])
    assert calls(torch.ones(2)) is None
    for args in ((), (torch.ones(2), 1)):
        with pytest.raises(TypeError, match="expected one tensor"):
            calls(*args)
    with pytest.raises(TypeError, match="wrong number of arguments"):
        calls.capture_step(torch.ones(2))
    with pytest.raises(TypeError, match="integer"):
        calls.capture_simulation(torch.ones(2), torch.ones(1), None, None, ("a",), 0, -8.0, 7.0)


@pytest.mark.parametrize("how", ["parameter", "attribute"])
@pytest.mark.parametrize("name", ["scale", "running_min", "running_max"])
def test_a_buffer_that_is_one_no_more_is_used(make_activation, x, name, how):
    module, expected = make_activation(), make_activation()
    for each in (module, expected):
        for _ in range(3):
            each(x)
    calculator = module.qparams_calculator
    value = getattr(calculator, name) * 2
    getattr(expected.qparams_calculator, name).copy_(value)
    if how == "attribute":
        calculator._buffers.pop(name)
    setattr(calculator, name, nn.Parameter(value) if how == "parameter" else value)
    for _ in range(3):
        assert torch.equal(module(x), expected(x))
    assert torch.equal(getattr(calculator, name), getattr(expected.qparams_calculator, name))


@pytest.mark.parametrize("name", ["running_min", "running_max"])
def test_a_buffer_that_is_gone_is_an_error(make_activation, x, name):
    module = make_activation()
    for _ in range(3):
        module(x)
    delattr(module.qparams_calculator, name)
    with pytest.raises(AttributeError, match=name):
        module(x)


@pytest.mark.parametrize("name", ["scale", "running_max"])
def test_a_buffer_on_another_device_is_an_error(make_activation, x, name):
    module = make_activation()
    for _ in range(3):
        module(x)
    setattr(module.qparams_calculator, name, getattr(module.qparams_calculator, name).to("meta"))
    with pytest.raises(RuntimeError, match="the tensor is on cpu, its fake quantizer on meta"):
        module(x)


@pytest.fixture
def swapped():
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


def test_tensors_that_torch_swaps_are_not_held(settled, x, swapped):
    expected, state = settled(x), copy.deepcopy(settled.state_dict())
    settled.load_state_dict(state)
    assert torch.equal(settled(x), expected)
    settled.load_state_dict(state)
    settled.double().float()
    settled.load_state_dict(state)
    assert torch.equal(settled(x), expected)
