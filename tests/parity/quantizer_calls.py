"""The life of a quantizer in single calls: what each gives, or which exception it raises and what is left."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from coreai_opt import ExportBackend
from coreai_opt.quantization import ExecutionMode, InvalidExecutionModeError, Quantizer, QuantizerConfig
from coreai_opt.quantization.config import KVCacheQuantConfig, OpQuantizerConfig, QATSchedule

from .quantizer_configs import ASYMMETRIC, eager, module, schedule
from .quantizer_models import Model, X, prepared, switched
from .quantizer_runs import places, simulators
from .quantizer_states import STATES
from .runner import captured_log
from .snapshots import Raised, freeze

__all__ = ["CALLS", "call"]


def kept(model: nn.Module, *inputs: Any) -> Any:
    """Preparation that fails, and what it leaves behind."""
    keys, modes = list(model.state_dict()), [child.training for child in model.modules()]
    try:
        Quantizer(model, eager()).prepare(*inputs)
    except Exception as error:  # noqa: BLE001 - compared
        same = keys == list(model.state_dict()) and modes == [child.training for child in model.modules()]
        return {"raised": Raised.of(error), "untouched": same, "then": places(prepared(model=Model()).model)}
    return places(model)


def within(context: str, action: Callable[[Quantizer], Any], config: QuantizerConfig | None = None) -> Any:
    """An action within a mode, and the switches before, inside and after."""
    quantizer = prepared(config)
    seen = [switched(quantizer), quantizer.model.training]
    with getattr(quantizer, context)() as given:
        seen += [given, action(quantizer), switched(quantizer), quantizer.model.training]
    return [*seen, switched(quantizer), quantizer.model.training]


def steps(quantizer: Quantizer) -> list[Any]:
    return [(quantizer.step(), switched(quantizer)) for _ in range(6)]


def trained_twice(quantizer: Quantizer) -> list[Any]:
    seen = []
    for _ in range(2):
        with quantizer.training_mode():
            seen.append([switched(quantizer), steps(quantizer)[:2]])
    return seen


def nested(mode: str) -> Callable[[Quantizer], Any]:
    """Entering another mode inside of one."""

    def action(quantizer: Quantizer) -> Any:
        with getattr(quantizer, mode)():
            inside = switched(quantizer), quantizer.model.training
        return inside, switched(quantizer), quantizer.model.training

    return action


def switches_of_a_part(name: str) -> Any:
    quantizer = prepared()
    getattr(quantizer, name)(quantizer.model.layer)
    part = switched(quantizer)
    getattr(quantizer, name)()
    return part, switched(quantizer)


def left_by_an_exception() -> Any:
    quantizer = prepared()
    quantizer.model.eval()
    try:
        with quantizer.training_mode():
            raise KeyError("inside")
    except KeyError:
        return switched(quantizer), quantizer.model.training


def goes_on_after_a_failure() -> Any:
    quantizer = prepared()
    before = quantizer.model(X)
    try:
        quantizer.model(X, 2, True)
    except KeyError:
        return torch.equal(before, quantizer.model(X))


def warned(make: Callable[[], Any]) -> tuple[str, ...]:
    """Categories of the warnings that speak of the package's own matters."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make()
    words = ("prepared", "graph mode", "eager mode", "qat_schedule")
    return tuple(w.category.__name__ for w in caught if any(word in str(w.message) for word in words))


def twice() -> Any:
    quantizer = prepared()
    before = list(quantizer.model.state_dict())
    again = quantizer.prepare((X,))
    other = Quantizer(quantizer.model, eager()).prepare((X,))
    same = again is quantizer.model, other is quantizer.model
    return same, list(quantizer.model.state_dict()) == before


def observed_once() -> Any:
    """Two calls in evaluation mode, without gradients, the second of which is observed."""
    seen: list[Any] = []

    class Recorder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            seen.append((self.training, self.layer.training, torch.is_grad_enabled()))
            return self.layer(x * 0 + float(len(seen)))

    quantizer = prepared(model=Recorder())
    ranges = [s.qparams_calculator.state_dict() for s in simulators(quantizer.model).values()]
    return seen, ranges, quantizer.model.training


def batch_norm_statistics() -> Any:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    quantizer = prepared(model=model)
    untouched = dict(model[1].state_dict())
    with quantizer.calibration_mode():
        quantizer.model(X)
    calibrated = dict(model[1].state_dict())
    with quantizer.training_mode():
        quantizer.model(X)
    return untouched, calibrated, model[1].num_batches_tracked


def with_attribute() -> nn.Module:
    model = Model()
    model.add_quantize_input = nn.Identity()
    return model


def cache() -> OpQuantizerConfig:
    return OpQuantizerConfig(op_input_spec={1: ASYMMETRIC}, op_output_spec=None, op_state_spec=None)


def raised(error: Exception) -> None:
    raise error


CALLS: dict[str, Callable[[], Any]] = {
    "calibration mode": lambda: within("calibration_mode", lambda q: q.model(X)),
    "training mode": lambda: within("training_mode", lambda q: q.model(X).shape),
    "training mode, stepped": lambda: within("training_mode", steps),
    "training mode, scheduled": lambda: within("training_mode", steps, schedule("lstm")),
    "training mode, twice with a schedule": lambda: trained_twice(prepared(schedule("lstm"))),
    "calibration in training": lambda: within("training_mode", nested("calibration_mode")),
    "training in training": lambda: within("training_mode", nested("training_mode")),
    "training in calibration": lambda: within("calibration_mode", nested("training_mode")),
    "calibration in calibration": lambda: within("calibration_mode", nested("calibration_mode")),
    "left by an exception": left_by_an_exception,
    "goes on after a failure": goes_on_after_a_failure,
    "disable_observer": lambda: switches_of_a_part("disable_observer"),
    "enable_observer": lambda: switches_of_a_part("enable_observer"),
    "disable_fake_quant": lambda: switches_of_a_part("disable_fake_quant"),
    "enable_fake_quant": lambda: switches_of_a_part("enable_fake_quant"),
    "observed once": observed_once,
    "batch norm statistics": batch_norm_statistics,
    "prepared twice": twice,
    "prepared twice, warnings": lambda: warned(twice),
    "graph arguments, warnings": lambda: warned(lambda: Quantizer(Model(), eager()).prepare((X,), {}, False)),
    "preserved attributes, warnings": lambda: warned(
        lambda: Quantizer(Model(), eager(preserved_attributes=[]))
    ),
    "step without a schedule, warnings": lambda: warned(lambda: within("training_mode", lambda q: q.step())),
    "a submodule alone": lambda: prepared().model.layer(X),
    "another branch": lambda: prepared().model(X, 2, False, torch.ones(4)),
    "more calls than prepared": lambda: prepared().model(X, 3),
    "fewer calls than prepared": lambda: prepared().model(X, 1),
    "step unprepared": lambda: Quantizer(Model(), eager()).step(),
    "step outside": lambda: prepared().step(),
    "step in calibration": lambda: within("calibration_mode", lambda q: q.step()),
    "calibration unprepared": lambda: Quantizer(Model(), eager()).calibration_mode().__enter__(),
    "training unprepared": lambda: Quantizer(Model(), eager()).training_mode().__enter__(),
    "calibration of another model": lambda: prepared().calibration_mode(Model()).__enter__(),
    "switch unprepared": lambda: Quantizer(Model(), eager()).enable_observer(),
    "finalize unprepared": lambda: Quantizer(Model(), eager()).finalize(backend=ExportBackend.Torch),
    "finalize another model": lambda: prepared().finalize(Model(), ExportBackend.Torch),
    "finalize twice": lambda: [
        quantizer := prepared(),
        [quantizer.finalize(backend=ExportBackend.Torch) is quantizer.model for _ in range(2)],
    ][1],
    "finalize by name": lambda: prepared().finalize(backend="torch").training,
    "finalize unknown backend": lambda: prepared().finalize(backend="x"),
    "finalize None": lambda: prepared().finalize(backend=None),
    "finalize mmap_dir": lambda: prepared().finalize(backend=ExportBackend.Torch, mmap_dir="x"),
    "no config": lambda: Quantizer(Model()) and None,
    "config a dict": lambda: Quantizer(Model(), {}),
    "config of a module": lambda: Quantizer(Model(), module()),
    "model None": lambda: Quantizer(None, eager()),
    "model a class": lambda: Quantizer(Model, eager()),
    "example a list": lambda: kept(Model(), [X]),
    "example a tensor": lambda: kept(Model(), torch.ones(6, 4)),
    "example a dict": lambda: kept(Model(), {"x": X}),
    "example None": lambda: kept(Model(), None),
    "example empty": lambda: kept(Model(), ()),
    "example a string": lambda: kept(Model(), ("a",)),
    "example of a wrong shape": lambda: kept(Model(), (torch.ones(3, 5),)),
    "example of a wrong dtype": lambda: kept(Model(), (X.half(),)),
    "example of too many": lambda: kept(Model(), (X,) * 9),
    "example with positional rest": lambda: kept(Model(), (X, 1, False, X)),
    "name taken": lambda: kept(with_attribute(), (X,)),
    "global config with module specs": lambda: eager(
        global_config=module(module_input_spec={0: None} | {1: ASYMMETRIC})
    ),
    "key value caches": lambda: eager(
        kv_cache_quant_configs={"a": KVCacheQuantConfig(op_quantizer_config=cache())}
    ),
    "key value cache config": lambda: KVCacheQuantConfig(op_quantizer_config=cache()).quant_input_idx,
    "key value cache config of all inputs": lambda: KVCacheQuantConfig(
        op_quantizer_config=OpQuantizerConfig()
    ),
    "execution mode unknown": lambda: eager().set_execution_mode("lazy"),
    "execution mode": lambda: (
        QuantizerConfig().set_execution_mode("eager").execution_mode is ExecutionMode.EAGER
    ),
    "execution mode error": lambda: raised(InvalidExecutionModeError("lazy")),
    "schedule observer after fake quant": lambda: QATSchedule(enable_observer=1),
    "schedule off before on": lambda: QATSchedule(enable_fake_quant=3, disable_observer=2),
    "schedule off at 0": lambda: QATSchedule(disable_observer=0),
    "schedule negative": lambda: QATSchedule(enable_observer=-1),
    "schedule off when on": lambda: QATSchedule(enable_fake_quant=2, disable_observer=2).disable_observer,
    "schedule changed": lambda: setattr(QATSchedule(), "enable_observer", 3),
    **STATES,
}


def call(name: str) -> Any:
    """The value or the exception of one entry."""
    torch.manual_seed(0)
    with warnings.catch_warnings(), captured_log():
        warnings.simplefilter("ignore")
        try:
            return freeze(CALLS[name]())
        except Exception as error:  # noqa: BLE001 - compared
            return Raised.of(error)
