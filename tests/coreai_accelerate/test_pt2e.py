"""The engine under models that torchao's PT2E has prepared: the same bits in training, conversion, copies."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchao.quantization.pt2e as pt2e
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torchao.quantization.pt2e import observer
from torchao.quantization.pt2e.fake_quantize import FakeQuantize, FusedMovingAvgObsFakeQuantize
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

import coreai_accelerate
from coreai_accelerate import torchao_pt2e
from coreai_accelerate.torchao_pt2e import FusedFakeQuantize, FusedMovingAverageFakeQuantize
from coreai_kernels import native
from tests.coreai_accelerate.test_torchao import same

pytestmark = pytest.mark.skipif(
    native.extension is None, reason="without a compiled library torchao's methods run"
)

INT8: dict[str, Any] = {"quant_min": -128, "quant_max": 127, "dtype": torch.int8}
TENSOR = INT8 | {"qscheme": torch.per_tensor_affine}
CHANNELS: dict[str, Any] = INT8 | {"qscheme": torch.per_channel_symmetric, "ch_axis": 0}
SIMULATORS: dict[str, Callable[[], nn.Module]] = {
    "tensor": lambda: FakeQuantize(observer.MovingAverageMinMaxObserver, **TENSOR),
    "tensor, symmetric": lambda: FakeQuantize(
        observer.MinMaxObserver,
        **INT8 | {"quant_min": -7, "quant_max": 7},
        qscheme=torch.per_tensor_symmetric,
    ),
    "tensor, 16 bits": lambda: FakeQuantize(
        observer.MovingAverageMinMaxObserver,
        quant_min=-32768,
        quant_max=32767,
        dtype=torch.int32,
        qscheme=torch.per_tensor_affine,
    ),
    "dynamic": lambda: FakeQuantize(
        observer.MovingAverageMinMaxObserver, **TENSOR, is_dynamic=True, averaging_constant=1
    ),
    "channels": lambda: FakeQuantize(observer.PerChannelMinMaxObserver, **CHANNELS),
    "channels, affine": lambda: FakeQuantize(
        observer.MovingAveragePerChannelMinMaxObserver,
        quant_min=0,
        quant_max=255,
        dtype=torch.uint8,
        qscheme=torch.per_channel_affine,
        ch_axis=0,
    ),
    "fused": lambda: FusedMovingAvgObsFakeQuantize(observer.MovingAverageMinMaxObserver, **TENSOR),
    "fused, symmetric": lambda: FusedMovingAvgObsFakeQuantize(
        observer.MovingAverageMinMaxObserver, **INT8, qscheme=torch.per_tensor_symmetric
    ),
    "fused, channels": lambda: FusedMovingAvgObsFakeQuantize(
        observer.MovingAveragePerChannelMinMaxObserver, **CHANNELS
    ),
}
KINDS = ("plain", "ties", "zeros", "not finite", "large", "tiny")


class Mine(torch.Tensor):
    pass


@pytest.fixture(autouse=True)
def small_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchao_pt2e, "_FEWEST", 1)


def draw(kind: str, *shape: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3
    flat = x.view(-1)
    if kind == "ties":
        return (x * 4).round() / 8
    if kind == "zeros":
        return torch.where(x > 1, 0.0, -0.0)
    if kind == "not finite":
        flat[0], flat[1], flat[9] = float("nan"), float("inf"), -float("inf")
    if kind == "large":
        flat[3] = 1e30
    return x * 1e-38 if kind == "tiny" else x


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    alone, module = SIMULATORS[name](), SIMULATORS[name]()
    report = coreai_accelerate.torchao(module)
    assert (report.replaced, report.left) == ([""], {})
    return alone, module


def values(module: nn.Module) -> list[torch.Tensor]:
    """The state; without the sign of a minimum of zero, for which torch takes that of any zero."""
    return [each.clone().reshape(-1) + 0 for each in module.state_dict().values()]


def fallbacks() -> dict[str, int]:
    return dict(coreai_accelerate.status().fallbacks)


def formats(x: torch.Tensor) -> list[torch.Tensor]:
    return [x, x.to(memory_format=torch.channels_last), x.transpose(2, 3), x.transpose(0, 1), x[:, ::2], x[0]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SIMULATORS)
def test_values_gradients_and_parameters(name: str, kind: str) -> None:
    found = []
    for module in pair(name):
        seen = []
        if kind == "not finite":  # which torchao's observers refuse
            module(draw("plain", 8, 64))
            module.disable_observer()
        for seed, x in enumerate(formats(draw(kind, 8, 8, 4, 16))):
            if "channels" in name and len(x) != 8:
                continue
            leaf = x.detach().requires_grad_()
            output = module(leaf)
            output.backward(draw(kind, *x.shape, seed=seed))
            assert leaf.grad is not None
            seen += [output.detach(), leaf.grad, *values(module)]
            seen.append(torch.tensor([*output.stride(), *leaf.grad.stride()]))
            with torch.no_grad():
                seen.append(module(x * 1.5))
        found.append(seen)
    assert same(*found)


@pytest.mark.parametrize("name", SIMULATORS)
def test_they_run_on_the_engine(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of plain tensors, and torch's operators see extremes alone."""
    _, module = pair(name)
    before = fallbacks()
    largest = []
    for operator in (
        "fake_quantize_per_tensor_affine",
        "fake_quantize_per_channel_affine",
        "fused_moving_avg_obs_fake_quant",
    ):
        original = getattr(torch, operator)

        def listen(x: torch.Tensor, *args: Any, original: Any = original) -> torch.Tensor:
            largest.append(x.numel())
            return original(x, *args)

        monkeypatch.setattr(torch, operator, listen)
    for x in formats(draw("plain", 8, 8, 4, 16))[:2]:
        module(x)
    assert fallbacks() == before
    assert max(largest) <= 128


@pytest.mark.parametrize("name", ["tensor", "channels", "fused", "fused, channels"])
def test_switches_and_loaded_states(name: str) -> None:
    found = []
    for module in pair(name):
        x = draw("plain", 8, 64)
        seen = [module(x)]
        module.disable_observer()
        seen += [module(x * 3), *values(module)]
        module.enable_observer()
        module.disable_fake_quant()
        seen += [module(x * 2), *values(module)]
        module.enable_fake_quant()
        module.disable_observer()
        module.scale.mul_(0.37)
        module.zero_point.add_(3)
        seen.append(module(x))
        other = SIMULATORS[name]()
        other(draw("ties", 8, 64))
        module.load_state_dict(other.state_dict())
        seen += [module(x), *values(module)]
        module.scale.fill_(1e-30)
        seen += [module(x), *values(module)]
        found.append(seen)
    assert same(*found)


def test_what_is_left_and_why() -> None:
    class Mine(FakeQuantize):  # type: ignore[misc]
        pass

    floats = {"dtype": torch.quint8, "qscheme": torch.per_channel_affine_float_qparams, "ch_axis": 0}
    modules = {
        "histogram": FakeQuantize(observer.HistogramObserver),
        "floats": FakeQuantize(observer.PerChannelMinMaxObserver, **floats),
        "axis": FakeQuantize(observer.PerChannelMinMaxObserver, **CHANNELS | {"ch_axis": 1}),
        "scale": FakeQuantize(observer.MinMaxObserver, **TENSOR, eps=1e-20),
        "bits": FakeQuantize(observer.MinMaxObserver, quant_min=-(2**20), quant_max=2**20, dtype=torch.int32),
        "mine": Mine(),
        "torch": torch.ao.quantization.FakeQuantize(),
    }
    report = coreai_accelerate.torchao(nn.ModuleDict(modules))
    assert not report.replaced
    assert report.left == {
        "histogram": "the observer HistogramObserver",
        "floats": "zero points that are no integers",
        "axis": "channels that are not axis 0",
        "scale": "scales below 2**-40",
        "bits": "more than 16 bits",
        "mine": "a subclass",
        "torch": "not a class of torchao",
    }


@pytest.mark.parametrize(
    ("reason", "make"),
    [
        ("bfloat16", lambda: draw("plain", 8, 64).bfloat16()),
        ("block size", lambda: draw("plain", 3, 5)),
        ("strides", lambda: draw("plain", 8, 64)[:, ::2]),
        ("values beyond 2**20, or not finite", lambda: draw("large", 8, 64)),
        ("compiled, traced or transformed", lambda: draw("plain", 8, 64).as_subclass(Mine)),
        ("few elements", lambda: torch.empty(0, 8)),
    ],
)
def test_what_goes_to_torchaos_method(reason: str, make: Callable[[], torch.Tensor]) -> None:
    before = fallbacks().get(f"torchao: {reason}", 0)
    assert same(*([module(make()), *values(module)] for module in pair("tensor")))
    assert fallbacks()[f"torchao: {reason}"] == before + 1


@pytest.mark.parametrize("place", ["hook", "every module's", "method"])
def test_who_looks_at_the_observer_sees_the_tensor(place: str) -> None:
    _, module = pair("tensor")
    seen = []
    its = module.activation_post_process
    original = its.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape)
        return original(x)

    handle = None
    if place == "hook":
        its.register_forward_hook(lambda _, args, __: seen.append(args[0].shape))
    elif place == "method":
        its.forward = forward
    else:
        handle = nn.modules.module.register_module_forward_pre_hook(
            lambda each, args: seen.append(args[0].shape) if each is its else None
        )
    module(draw("plain", 8, 64))
    if handle:
        handle.remove()
    assert seen == [(8, 64)]


def test_threads_share_the_work_and_the_result_is_the_same() -> None:
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append([pair("tensor")[1](draw("plain", 64, 4096))])
    finally:
        torch.set_num_threads(threads)
    assert same(*found)


def test_copies_pickles_compiled_programs_and_disable() -> None:
    alone, module = pair("fused")
    for each in (alone, module):
        each(draw("ties", 8, 64))
        each.disable_observer()
    x = draw("plain", 8, 64)
    expected = [alone(x)]
    for copied in (copy.deepcopy(module), copy.copy(module)):
        assert type(copied) is FusedMovingAverageFakeQuantize
        assert same(expected, [copied(x)])
    assert same(expected, [pickle.loads(pickle.dumps(module))(x)])
    assert same(expected, [torch.compile(module, backend="eager", fullgraph=True)(x)])
    _, other = pair("tensor")
    assert (type(module), type(other)) == (FusedMovingAverageFakeQuantize, FusedFakeQuantize)
    assert str(module).startswith("FusedMovingAvgObsFakeQuantize(")
    assert str(other).startswith("FakeQuantize(")
    coreai_accelerate.disable()
    assert (type(module), type(other)) == (FusedMovingAvgObsFakeQuantize, FakeQuantize)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["tensor", "fused"])
def test_parameters_in_other_dtypes_and_out_of_range(name: str, dtype: torch.dtype) -> None:
    found = []
    for module in pair(name):
        x = draw("plain", 8, 64)
        module(x)
        module.disable_observer()
        seen = [module.to(dtype)(x)]
        module.float().zero_point.fill_(2**24 + 1)
        found.append([*seen, module(x)])
    assert same(*found)


def test_a_zero_point_of_a_channel_that_is_no_quantized_value() -> None:
    _, module = pair("channels")
    module(draw("plain", 8, 64))
    module.disable_observer()
    module.zero_point.fill_(300)
    with pytest.raises(RuntimeError, match="`zero_point` must be between `quant_min` and `quant_max`"):
        module(draw("plain", 8, 64))


@pytest.mark.parametrize("name", ["tensor", "fused"])
def test_transformed_and_traced(name: str) -> None:
    found = []
    for module in pair(name):
        x = draw("plain", 8, 64)
        module(x)
        seen = (
            [torch.func.grad(lambda x, module=module: module(x).square().sum())(x)] if name == "fused" else []
        )
        module.disable_observer()
        seen.append(torch.func.grad(lambda x, module=module: module(x).square().sum())(x))
        seen.append(make_fx(module)(x)(x * 2) if name == "fused" else torch.func.vmap(module)(x))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            shape = module(mode.from_tensor(x)).shape if name == "fused" else x.shape
        seen.append(torch.tensor(shape))
        found.append([each.detach() for each in seen])
    assert same(*found)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, stride=2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(8 * 7 * 7, 16)),
    )


def prepared() -> nn.Module:
    example = (torch.randn(2, 3, 16, 16),)
    exported = torch.export.export(network(), example, strict=True).module()
    config = get_default_x86_inductor_quantization_config(is_qat=True)
    # Without a batch norm prepare_qat_pt2e does the same, after minutes of looking for one.
    return prepare_pt2e(exported, X86InductorQuantizer().set_global(config))


def test_models_train_the_same_and_convert() -> None:
    models = [prepared(), prepared()]
    report = coreai_accelerate.torchao(models[1])
    assert len(report.replaced) >= 6
    assert not report.left
    found = []
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        seen = []
        for step in range(3):
            optimizer.zero_grad()
            output = model(draw("plain", 2, 3, 16, 16, seed=step))
            output.square().mean().backward()
            seen += [output.detach(), *(each.grad.clone() for each in model.parameters())]
            optimizer.step()
        seen += [each.clone() for each in model.state_dict().values() if each.dim()]
        pt2e.move_exported_model_to_eval(model)
        converted = convert_pt2e(model)
        seen.append(converted(draw("plain", 2, 3, 16, 16)))
        found.append(seen)
    assert same(*found)
    assert list(models[0].state_dict()) == list(models[1].state_dict())
