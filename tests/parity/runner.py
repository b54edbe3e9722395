"""Runs cases and calls on whichever package ``import coreai_opt`` finds, through its public names only."""

import copy
import io
import logging
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .calls import CALLS
from .cases import Case, all_cases
from .inputs import draw_gradient, draw_input
from .snapshots import Raised, Snapshot, freeze

__all__ = ["answer", "build", "run_call", "run_case", "run_exchange"]


class Run:
    """A case in progress: the simulator, its generator of inputs, and what was seen so far."""

    def __init__(self, case: Case, state: dict[str, Snapshot] | None = None) -> None:
        self.case = case
        self.module = build(case)
        self.shape = case.shape
        self.input_dtype = getattr(torch, case.input_dtype)
        self.generator = torch.Generator().manual_seed(case.seed)
        self.log: list[Any] = []
        if state is not None:
            self.load(state)

    def load(self, state: dict[str, Snapshot]) -> None:
        self.module.load_state_dict({key: value.tensor() for key, value in state.items()}, strict=True)

    def draw(self) -> Tensor:
        return draw_input(self.case, self.shape, self.input_dtype, self.generator)

    def play(self, script: tuple[str, ...]) -> None:
        for word in script:
            name, _, argument = word.partition("=")
            try:
                seen = ACTIONS[name](self, argument) if argument else ACTIONS[name](self)
            except Exception as error:  # noqa: BLE001 - which exception it is, is what we compare
                self.log.append({"action": word, "raised": Raised.of(error)})
            else:
                if seen is not None:
                    self.log.append({"action": word} | freeze(seen))


def build(case: Case) -> Any:
    """The simulator that the case asks for."""
    from coreai_opt.config.spec import CompressionTargetTensor
    from coreai_opt.quantization.spec import (
        QuantizationComponentFactory,
        QuantizationFormulation,
        QuantizationGranularity,
        QuantizationScheme,
        QuantizationSpec,
    )

    arguments = dict(case.spec)
    if "qscheme" in arguments:
        arguments["qscheme"] = QuantizationScheme(arguments["qscheme"])
    if "qformulation" in arguments:
        arguments["qformulation"] = QuantizationFormulation(arguments["qformulation"])
    if "granularity" in arguments:
        fields = dict(arguments["granularity"])
        arguments["granularity"] = QuantizationGranularity.get_class(fields.pop("type"))(**fields)
    spec = QuantizationSpec(**arguments)
    module: Any = QuantizationComponentFactory.construct(spec, CompressionTargetTensor(case.target))
    if case.averaging_constant is not None:
        module.qparams_calculator.averaging_constant = case.averaging_constant
    return module


def strides(x: Tensor) -> tuple[int, ...]:
    """Strides of the axes that have more than one element; those of the others carry no meaning."""
    return tuple(stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1)


def step(run: Run, times: str = "1") -> dict[str, Any]:
    x = run.draw().detach().requires_grad_()
    with captured_log() as messages:
        y = run.module(x)
    seen = {
        "same_object": y is x,
        "logged": [record.levelname for record in messages],
        "output": y,
        "strides": strides(y),
        "differentiable": y.requires_grad,
    }
    gradient = draw_gradient(run.case, y, run.generator)
    for _ in range(int(times)):
        (seen["gradient"],) = torch.autograd.grad(y, x, gradient, retain_graph=int(times) > 1)
    return seen | parameters(run)


def plain(run: Run) -> dict[str, Any]:
    """A forward of an input that needs no gradient."""
    y = run.module(run.draw())
    return {"output": y, "strides": strides(y), "differentiable": y.requires_grad} | parameters(run)


def no_grad(run: Run) -> dict[str, Any]:
    with torch.no_grad():
        return plain(run)


def parameters(run: Run) -> dict[str, Any]:
    return {"qparams": qparams(run), "state": dict(run.module.state_dict())}


def qparams(run: Run) -> Any:
    try:
        return run.module.calculate_qparams()
    except Exception as error:  # noqa: BLE001 - compared
        return Raised.of(error)


def convert(run: Run) -> dict[str, Any]:
    """Quantized values in both forms, and back."""
    x = run.draw()
    found = run.module.calculate_qparams()
    values = run.module.quantize(x, *found, cast_to_target_dtype=False)
    stored = run.module.quantize(x, *found)
    back = {
        str(dtype): run.module.dequantize(stored, *found, output_dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    return {"values": values, "stored": stored, "default": run.module.dequantize(stored, *found)} | back


def reload_into_stepped(run: Run) -> None:
    """Move the state to another simulator that has seen other data, and go on with that one."""
    state = run.module.state_dict()
    fresh = build(run.case)
    fresh(run.draw())
    fresh.load_state_dict(state, strict=True)
    run.module = fresh


def set_shape(run: Run, shape: str) -> None:
    run.shape = tuple(map(int, shape.split("x")))


def set_input_dtype(run: Run, name: str) -> None:
    run.input_dtype = getattr(torch, name)


def cast(dtype: torch.dtype) -> Callable[[Run], None]:
    def action(run: Run) -> None:
        run.module.to(dtype)
        run.input_dtype = dtype

    return action


def replace(make: Callable[[Any], Any]) -> Callable[[Run], None]:
    def action(run: Run) -> None:
        run.module = make(run.module)

    return action


def call(name: str, *arguments: Any) -> Callable[[Run], None]:
    def action(run: Run) -> None:
        getattr(run.module, name)(*arguments)

    return action


def _through_pickle(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


ACTIONS: dict[str, Callable[..., dict[str, Any] | None]] = {
    "step": step,
    "backward_twice": lambda run: step(run, "2"),
    "plain": plain,
    "no_grad": no_grad,
    "convert": convert,
    "observer_on": call("enable_observer"),
    "observer_off": call("disable_observer"),
    "fake_quant_on": call("enable_fake_quant"),
    "fake_quant_off": call("disable_fake_quant"),
    "export_on": call("set_export_mode", True),
    "export_off": call("set_export_mode", False),
    "train": call("train"),
    "eval": call("eval"),
    "bfloat16": cast(torch.bfloat16),
    "float16": cast(torch.float16),
    "float32": cast(torch.float32),
    "deepcopy": replace(copy.deepcopy),
    "pickle": replace(_through_pickle),
    "reload_into_stepped": reload_into_stepped,
    "repr": lambda run: {"repr": repr(run.module)},
    "shape": set_shape,
    "input": set_input_dtype,
}


class _Recorder(logging.Handler):
    def __init__(self, records: list[logging.LogRecord]) -> None:
        super().__init__()
        self.records = records

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def captured_log() -> Iterator[list[logging.LogRecord]]:
    """The log records that the package under test writes."""
    records: list[logging.LogRecord] = []
    handler = _Recorder(records)
    logger = logging.getLogger("coreai_opt")
    before = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield records
    finally:
        logger.propagate = before
        logger.removeHandler(handler)


def run_case(case: Case) -> list[Any]:
    """What each word of the case's script showed, or how the package refused the spec."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            run = Run(case)
        except Exception as error:  # noqa: BLE001 - compared
            return [{"action": "build", "raised": Raised.of(error)}]
        run.play(case.script)
    return run.log


def run_exchange(case: Case, state: dict[str, Snapshot], stepped: bool) -> list[Any]:
    """Load ``state`` (strictly) and take two steps, one with and one without observer.

    ``stepped`` says that the simulator is to see an input of the right shape before it takes the state.
    """
    run = Run(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if stepped:
            run.module(run.draw().abs() + 100)
        run.load(state)
        run.generator = torch.Generator().manual_seed(case.seed + 1)
        run.log.append({"state": freeze(run.module.state_dict())})
        run.play(("step", "observer_off", "step"))
    return run.log


def run_call(name: str) -> Any:
    """The value or the exception of one entry of `calls.CALLS`."""
    torch.manual_seed(0)
    random.seed(0)
    with warnings.catch_warnings(), captured_log():
        warnings.simplefilter("ignore")
        try:
            return freeze(CALLS[name]())
        except Exception as error:  # noqa: BLE001 - compared
            return Raised.of(error)


def answer(job: dict[str, Any]) -> Any:
    """The table of all cases and calls, or what follows on states that the other package wrote."""
    if job["what"] == "table":
        return {
            "cases": {case.name: run_case(case) for case in all_cases()},
            "calls": {name: run_call(name) for name in CALLS},
        }
    cases = {case.name: case for case in all_cases()}
    states = job["states"].items()
    return {name: run_exchange(cases[name], state, stepped=True) for name, state in states}
