"""Run by ``test_cuda_fast_path.py``: fake quantizers on two emulated GPUs, with the kernels in CUDA C++."""

# isort: off
from tests.kernels import emulated_gpu as gpu  # first, see there

# isort: on
import pytest
import torch
from torch import nn

from coreai_kernels import native, use_backend
from coreai_kernels.runtime import fast_path_counts
from coreai_opt.config.spec import CompressionTargetTensor
from coreai_opt.quantization.spec import (
    PerBlockGranularity,
    PerChannelGranularity,
    PerTensorGranularity,
    QuantizationComponentFactory,
    QuantizationSpec,
)

gpu.capture_calls()
OUTPUT_AND_MASK = ["memory on 0, stream 0"] * 2
LAUNCH = "launch by 0 on 0, stream 0"
SPECS = [
    {"dtype": "int4", "qparam_calculator_cls": "static", "granularity": PerChannelGranularity(axis=0)},
    {"dtype": "int8", "qparam_calculator_cls": "moving_average", "granularity": PerTensorGranularity()},
    {"dtype": "uint8", "qparam_calculator_cls": "global_minmax", "qscheme": "asymmetric"},
    {
        "dtype": "float8_e4m3fn",
        "qparam_calculator_cls": "static",
        "granularity": PerChannelGranularity(axis=1),
    },
    {
        "dtype": "float4_e2m1fn",
        "scale_dtype": "float8_e8m0fnu",
        "qparam_calculator_cls": "static",
        "granularity": PerBlockGranularity(axis=1, block_size=32),
    },
    {
        "dtype": "float4_e2m1fn",
        "scale_dtype": "float8_e4m3fn",
        "qparam_calculator_cls": "static",
        "granularity": PerBlockGranularity(axis=1, block_size=16),
    },
]


def make(device="cuda:0", **fields):
    target = CompressionTargetTensor.WEIGHT
    if fields["qparam_calculator_cls"] != "static":
        target = CompressionTargetTensor.ACTIVATION
    return QuantizationComponentFactory.create_fake_quantizer(QuantizationSpec(**fields), target).to(device)


def values(seed, dtype=torch.float32, shape=(16, 64)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def step(module, x, grad):
    x = x.detach().requires_grad_()
    y = module(x)
    y.backward(grad)
    return y.detach(), x.grad


def hits():
    return fast_path_counts()["hits"]


@pytest.fixture
def x():
    return values(0).to("cuda:0")


@pytest.fixture
def settled(x):
    """A module that takes the fast path for `x`."""
    module = make(**SPECS[0])
    for _ in range(3):
        module(x)
    before = hits()
    module(x)
    assert hits() == before + 1
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fields", SPECS, ids=lambda fields: "-".join(map(str, fields.values())))
def test_results_are_those_of_the_cpu(fields, dtype):
    module, twin = make(**fields), make("cpu", **fields)
    for i in range(5):
        x, grad = values(i, dtype), values(-i, dtype)
        wanted = step(twin, x, grad)
        before = hits()
        found = step(module, x.to("cuda:0"), grad.to("cuda:0"))
        assert hits() == before + 1 or i < 2
        for got, want in zip(found, wanted, strict=True):
            assert got.device == torch.device("cuda:0")
            assert torch.equal(got.cpu(), want)
    for (name, got), want in zip(module.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(got.cpu(), want), name


def test_parameters_without_observation(x):
    module = make(**SPECS[0])
    module(x)
    module.disable_observer()
    wanted = module(x)
    before = hits()
    assert torch.equal(module(x).cpu(), wanted.cpu())
    assert hits() == before + 1


def test_a_call_allocates_its_results_launches_once_and_waits_for_nothing(settled, x):
    x.requires_grad_()
    with gpu.heard() as events:
        settled(x)
    assert events == [*OUTPUT_AND_MASK, LAUNCH]
    with gpu.heard() as events, torch.no_grad():
        settled(x)
    assert events == [*OUTPUT_AND_MASK[:1], LAUNCH]


@pytest.mark.parametrize(("rows", "launches"), [(40, 1), (64, 2)])
def test_what_a_large_tensor_needs_besides_is_allocated_at_each_call(rows, launches):
    """Whatever a graph was captured with, another call does not overwrite. The GPU has room for 48 rows."""
    module = make(**SPECS[1])
    x = values(1, shape=(rows, 512)).to("cuda:0")
    for _ in range(3):
        module(x)
    for _ in range(2):
        before = hits()
        with gpu.heard() as events:
            module(x)
        assert hits() == before + 1
        assert events == [*OUTPUT_AND_MASK, *[LAUNCH] * launches]  # the output, and workspace


def test_the_current_stream_is_launched_on(settled, x):
    x.requires_grad_()
    with gpu.heard() as events, gpu.stream(0, 7):
        y = settled(x)
    assert events == ["memory on 0, stream 7"] * 2 + ["launch by 7 on 0, stream 7"]
    # As for torch's own operators, the backward takes the stream of the forward.
    with gpu.heard() as events:
        y.backward(torch.ones_like(x))
    assert "launch by 7 on 0, stream 7" in events


def test_another_device_than_the_current_one():
    module = make("cuda:1", **SPECS[0])
    x = values(0).to("cuda:1")
    for _ in range(2):
        module(x)
    before = hits()
    with gpu.heard() as events, gpu.stream(0, 3), gpu.stream(1, 5):
        y = module(x)
    assert hits() == before + 1
    assert y.device == torch.device("cuda:1")
    assert events == ["memory on 1, stream 5", "launch by 5 on 1, stream 5"]
    assert gpu.current_device() == 0
    with gpu.device(1), gpu.heard() as events:
        module(x)
        assert gpu.current_device() == 1
    assert events == ["memory on 1, stream 0", "launch by 0 on 1, stream 0"]


def test_out_of_memory(settled, x):
    """Loops that go on with smaller batches look for torch's error, and its words."""
    with gpu.exhausted(), pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory\."):
        settled(x)
    assert gpu.current_device() == 0
    settled(x)
    slow = make(**SPECS[0])
    slow(x)
    slow.__dict__["_captured"] = None
    with gpu.exhausted(), pytest.raises(RuntimeError, match=r"CUDA out of memory\. .* 4096 bytes"):
        slow(x)


def outcome(module, x):
    with pytest.raises(RuntimeError) as error:
        module(x)
    return str(error.value)


def test_an_input_on_another_device_than_the_state(settled, x):
    slow = make(**SPECS[0])
    slow(x)
    slow.__dict__["_captured"] = None
    wanted = outcome(slow, x.to("cuda:1"))
    assert "is on cuda:1, its fake quantizer on cuda:0" in wanted
    before = hits()
    for _ in range(2):
        assert outcome(settled, x.to("cuda:1")) == wanted
    assert hits() == before
    settled(x)
    assert hits() == before + 1
    with pytest.raises(RuntimeError):
        settled(x.cpu())


def test_a_module_that_moved(settled, x):
    wanted = settled(x)
    for place in ("cuda:1", "cpu", "cuda:0"):
        settled.to(place)
        for _ in range(3):
            y = settled(x.to(place))
            assert y.device == torch.device(place)
            assert torch.equal(y.cpu(), wanted.cpu())


def test_switches(settled, x):
    for _ in range(2):
        settled.disable_fake_quant()
        assert settled(x) is x
        settled.enable_fake_quant()
        settled.fake_quant_enabled.fill_(0)
        assert settled(x) is x
        settled.fake_quant_enabled.fill_(1)
        scale = settled.qparams_calculator.scale.cpu()
        settled.disable_observer()
        for _ in range(2):
            settled(100 * x)
        assert torch.equal(settled.qparams_calculator.scale.cpu(), scale)
        settled.enable_observer()
        settled(100 * x)
        assert not torch.equal(settled.qparams_calculator.scale.cpu(), scale)
        settled(x)


def test_buffers_replaced_by_others(settled, x):
    calculator = settled.qparams_calculator
    for replace in (
        lambda new: setattr(calculator, "scale", new),
        lambda new: calculator._buffers.update(scale=new),
    ):
        new = torch.zeros_like(calculator.scale)
        replace(new)
        settled(x)
        assert calculator.scale is new
        assert (new.cpu() != 0).all()


def test_a_loaded_state_is_gone_on_from():
    module, other = make(**SPECS[1]), make(**SPECS[1])
    x = values(3).to("cuda:0")
    for _ in range(4):
        module(x)
    other(50 * x)
    module.load_state_dict(other.state_dict())
    for seed in range(3):
        x = values(seed).to("cuda:0")
        assert torch.equal(module(x).cpu(), other(x).cpu())


def test_hooks_are_called(settled, x):
    heard = []
    for module in (settled, settled.qparams_calculator):
        module.register_forward_hook(lambda *args: heard.append(1))
    settled(x)
    assert len(heard) == 2


def test_autocast_changes_nothing(settled, x):
    wanted = settled(x)
    before = hits()
    torch.set_autocast_enabled("cuda", True)
    try:
        assert torch.equal(settled(x).cpu(), wanted.cpu())
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert hits() == before + 1


def test_forced_backends(settled, x):
    wanted, before = settled(x), hits()
    with use_backend("reference"):
        assert torch.equal(settled(x).cpu(), wanted.cpu())
    assert hits() == before


def test_memory_formats_and_others_than_dense():
    fields = {**SPECS[1], "granularity": PerTensorGranularity()}
    module, twin = make(**fields), make("cpu", **fields)
    base = values(5, shape=(2, 8, 4, 4))
    for view, is_dense in (
        (lambda x: x.to(memory_format=torch.channels_last), True),
        (lambda x: x[:, ::2], False),
        (lambda x: x.mT, True),
    ):
        for i in range(4):
            x = base * (i + 1)
            before = hits()
            found = module(view(x.to("cuda:0")))
            assert hits() == before + is_dense or i < 2
            wanted = twin(view(x))
            assert found.stride() == wanted.stride()
            assert torch.equal(found.cpu(), wanted)


def test_without_the_library_calls_take_the_slow_path(x):
    native.autograd.use_cuda(0)
    try:
        module = make(**SPECS[0])
        before = fast_path_counts()
        for _ in range(4):
            module(x)
        after = fast_path_counts()
        assert after["hits"] == before["hits"]
        assert after["refused"]["device"] > before["refused"].get("device", 0)
    finally:
        gpu.capture_calls()


def test_a_training_step_of_a_layer():
    weights = make(**SPECS[0])
    layer = nn.Linear(64, 16)
    wanted = nn.Linear(64, 16)
    wanted.load_state_dict(layer.state_dict())
    layer.to("cuda:0")
    twin = make("cpu", **SPECS[0])
    for seed in range(4):
        x = values(seed)
        for each, simulator, where in ((layer, weights, "cuda:0"), (wanted, twin, "cpu")):
            each.zero_grad()
            nn.functional.linear(x.to(where), simulator(each.weight), each.bias).square().sum().backward()
            with torch.no_grad():
                for parameter in each.parameters():
                    parameter -= 1e-3 * parameter.grad
    for got, want in zip(layer.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(got.detach().cpu(), want.detach())
