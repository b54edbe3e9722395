"""Checkpoints, copies, moves; and the switches, which are read without waiting for the device."""

import copy
import io
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from coreai_opt.quantization.spec import PerBlockGranularity, PerChannelGranularity

PER_ROW = PerChannelGranularity(axis=0)
FLAGS = ["fake_quant_enabled", "observer_enabled", "_disabled"]
CALCULATORS = {
    "static": ["scale", "zero_point", "minval"],
    "moving_average": ["scale", "zero_point", "minval", "running_min", "running_max"],
    "global_minmax": ["scale", "zero_point", "minval", "running_min", "running_max"],
    "dynamic": [],
}


def same_state(first, second):
    first, second = first.state_dict(), second.state_dict()
    return list(first) == list(second) and all(
        torch.equal(first[key], second[key]) and first[key].dtype == second[key].dtype for key in first
    )


@pytest.mark.parametrize("calculator", CALCULATORS)
def test_keys_and_their_order(make_activation, calculator):
    module = make_activation(qparam_calculator_cls=calculator)
    state = module.state_dict()
    assert list(state) == FLAGS + [f"qparams_calculator.{name}" for name in CALCULATORS[calculator]]
    assert all(value.shape == (0,) for key, value in state.items() if key not in FLAGS)


@pytest.mark.parametrize("calculator", CALCULATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_loads_into_a_fresh_module(make_activation, x, calculator, dtype):
    def make():
        return make_activation(qparam_calculator_cls=calculator, granularity=PER_ROW)

    trained, fresh = make(), make()
    trained(x.to(dtype))
    trained(2 * x.to(dtype))
    fresh.load_state_dict(trained.state_dict())
    assert same_state(trained, fresh)
    assert torch.equal(trained(3 * x.to(dtype)), fresh(3 * x.to(dtype)))
    assert same_state(trained, fresh)


def test_a_checkpoint_loads_into_a_fresh_model(make, make_activation, x):
    def model():
        return torch.nn.Sequential(make_activation(), make(granularity=PER_ROW))

    trained, fresh = model(), model()
    trained(x)
    fresh.load_state_dict(trained.state_dict(), assign=True)
    assert same_state(trained, fresh)


def test_shapes_and_keys_are_checked(make, make_activation, x):
    def observed(module):
        module(x)
        return module

    rows = observed(make(granularity=PER_ROW))
    columns = observed(make(granularity=PerChannelGranularity(axis=1)))
    with pytest.raises(RuntimeError, match=r"size mismatch for qparams_calculator.scale"):
        rows.load_state_dict(columns.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        rows.load_state_dict(make().state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*running_min"):
        make_activation().load_state_dict(observed(make()).state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*running_min"):
        make().load_state_dict(observed(make_activation()).state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*zero_point"):
        make(dtype="float8_e4m3fn").load_state_dict(observed(make()).state_dict())


def test_loaded_switches_take_effect(make, x):
    module = make()
    module(x)
    scale = module.qparams_calculator.scale.clone()
    module.load_state_dict({**module.state_dict(), "observer_enabled": torch.zeros(1, dtype=torch.uint8)})
    module(9 * x)
    assert torch.equal(module.qparams_calculator.scale, scale)
    module.load_state_dict({**module.state_dict(), "_disabled": torch.tensor(True)})
    assert module.is_disabled()
    assert module(x) is x


def test_written_switches_take_effect(make, x):
    module = make()
    module(x)
    scale = module.qparams_calculator.scale.clone()
    module.observer_enabled[0] = 0
    module(9 * x)
    assert torch.equal(module.qparams_calculator.scale, scale)
    module.fake_quant_enabled = torch.zeros(1, dtype=torch.uint8)
    assert module(x) is x
    with torch.inference_mode():
        module.fake_quant_enabled = torch.ones(1, dtype=torch.uint8)
    assert module(x) is not x
    with torch.inference_mode():
        module.fake_quant_enabled.zero_()
    assert module(x) is x


@pytest.mark.parametrize("duplicate", ["deepcopy", "pickle", "save"])
@pytest.mark.parametrize("calculator", CALCULATORS)
def test_copies(make_activation, x, duplicate, calculator):
    module = make_activation(qparam_calculator_cls=calculator)
    module(x)
    module.enable_observer(False)
    if duplicate == "deepcopy":
        other = copy.deepcopy(module)
    elif duplicate == "pickle":
        other = pickle.loads(pickle.dumps(module))
    else:
        torch.save(module, file := io.BytesIO())
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert same_state(module, other)
    other.enable_observer()
    # A stateless calculator observes always: there the switch does nothing.
    assert module.observer_enabled.tolist() == [1 if calculator == "dynamic" else 0]
    module.enable_observer()
    assert torch.equal(module(2 * x), other(2 * x))
    assert same_state(module, other)


def test_other_dtypes(make_activation, x):
    module = make_activation(granularity=PER_ROW).to(torch.bfloat16)
    y = module(x.bfloat16())
    assert y.dtype == torch.bfloat16
    state = module.state_dict()
    for name in ("scale", "minval", "running_min", "running_max"):
        assert state[f"qparams_calculator.{name}"].dtype == torch.bfloat16
    assert state["qparams_calculator.zero_point"].dtype == torch.int32
    module.disable_observer()
    assert torch.equal(module(x.bfloat16()), y)


def test_tensors_without_data(make_activation, x):
    module = make_activation()
    module.disable_observer()
    module.to("meta")
    assert "observer=off" in repr(module)


class NoWait(TorchDispatchMode):
    """Fails at whatever makes the host wait for a device."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal.default", "masked_select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in str(func) for name in self.FORBIDDEN), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"qparam_calculator_cls": "moving_average", "granularity": PER_ROW, "qscheme": "asymmetric"},
        {"qparam_calculator_cls": "global_minmax", "float_range": [-1.0, None]},
        {"qparam_calculator_cls": "static", "float_range": [-1.0, 1.0]},
        {"qparam_calculator_cls": "dynamic", "dtype": "float8_e4m3fn"},
        {"dtype": "float4_e2m1fn", "granularity": PerBlockGranularity(axis=1, block_size=4)},
    ],
)
def test_nothing_waits_for_the_device(make_activation, x, fields):
    x.requires_grad_()
    with NoWait():
        module = make_activation(**fields)
        for _ in range(2):
            module(x).sum().backward()
        module.disable_observer()
        module(x).sum().backward()
        module.enable_observer()
        moved = copy.deepcopy(module).to(torch.bfloat16)
        moved(x.bfloat16()).sum().backward()


def test_nothing_waits_in_the_methods_of_a_subclass_either(make, x, registration):
    from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

    @registration(FakeQuantizeImplBase, "plain")
    class Plain(FakeQuantizeImplBase):
        def quantize(self, tensor, scale, zero_point, minval, cast_to_target_dtype=True):
            return tensor / scale

        def dequantize(self, tensor, scale, zero_point, minval, output_dtype=torch.float32):
            return tensor * scale

    x.requires_grad_()
    with NoWait():
        module = make(fake_quantize_cls="plain")
        module(x).sum().backward()
        module(x).sum().backward()
