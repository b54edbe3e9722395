"""Steps, states and the life cycle of pruning: what each call returns, or how it is refused."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .pruning_api import X, api, module, pruner, simulator
from .pruning_runs import sparsities

__all__ = ["STATES"]


def fresh_checkpoint() -> Any:
    trained, fresh = simulator(), simulator()
    trained(torch.arange(4.0))
    fresh.load_state_dict(trained.state_dict())
    return fresh.mask


def step_count() -> Any:
    """The sparsity after one more step, training being resumed after five of ten."""
    ramp = api().PolynomialDecaySchedule(total_iters=10)
    found = []
    state: Any = None
    for steps in (5, 1):
        made = pruner(model := nn.Sequential(nn.Linear(4, 4)), global_config=module(sparsity_schedule=ramp))
        made.prepare(X)
        if state is not None:
            model.load_state_dict(state)
        for _ in range(steps):
            made.step()
        state = model.state_dict()
        found.append(sparsities(model))
    return found


def finalized_weights() -> Any:
    made = pruner(model := nn.Sequential(nn.Linear(4, 4)))
    made.prepare(X)
    made.finalize(backend="torch")
    return sorted(model.state_dict())


def ramped(**fields: Any) -> tuple[nn.Module, Any]:
    """A model on a schedule of five steps, and its pruner."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    ramp = api().PolynomialDecaySchedule(total_iters=5, begin_step=1)
    made = pruner(model, global_config=module(**{"sparsity_schedule": ramp} | fields))
    return model, made


EIGHT = (torch.zeros(2, 8),)


def saved() -> dict[str, torch.Tensor]:
    """The state of :func:`ramped` after three steps."""
    model, made = ramped()
    made.prepare(EIGHT)
    for _ in range(3):
        made.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


def without_steps() -> dict[str, torch.Tensor]:
    return {name: value for name, value in saved().items() if "step_count" not in name}


def prepared_with(state: dict[str, torch.Tensor]) -> Any:
    """What prepare makes of a state, and how often it runs the model."""
    model, made = ramped()
    with torch.no_grad():
        model[0].weight.mul_(2)
    forwards: list[int] = []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    made.prepare(EIGHT, state_dict=state)
    return dict(model.state_dict()), sparsities(model), made._step_count, len(forwards)


def after_failure() -> Any:
    model, made = ramped()
    try:
        made.prepare(EIGHT, state_dict=nn.Linear(8, 8).state_dict())
    except RuntimeError:
        return sorted(model.state_dict())


def loaded(state: dict[str, torch.Tensor]) -> Any:
    model, made = ramped()
    made.prepare(EIGHT)
    try:
        model.load_state_dict(state)
    finally:
        found = dict(model.state_dict()), sparsities(model), made._step_count
    return found


def loaded_counts() -> Any:
    """The steps in the model after loading different ones, which is refused."""
    model, made = ramped()
    made.prepare(EIGHT)
    try:
        model.load_state_dict(different_steps())
    except RuntimeError:
        return [int(value) for name, value in model.state_dict().items() if "step_count" in name]


def different_steps() -> dict[str, torch.Tensor]:
    return saved() | {"0.parametrizations.weight.0.step_count": torch.tensor(7)}


def third_argument(default: bool) -> Any:
    base = api().SparsityScheduleBase
    if default:

        class Schedule(base):  # type: ignore[misc, valid-type]
            def compute_sparsity(self, step_count: int, target_sparsity: float, prev: Any = None) -> float:
                return 0.25 if prev is None else 0.75

    else:

        class Schedule(base):  # type: ignore[misc, valid-type, no-redef]
            def compute_sparsity(self, step_count: int, target_sparsity: float, prev: float) -> float:
                return 0.25

    model, made = ramped(sparsity_schedule=Schedule())
    made.prepare(EIGHT)
    made.step()
    return sparsities(model)


def cast() -> Any:
    made = simulator()
    made(torch.randn(4, 4))
    out = made(torch.randn(4, 4, dtype=torch.bfloat16))
    return out.dtype, made.mask.dtype


def finalized_model(change: Callable[[nn.Module], Any] = lambda model: None) -> Any:
    model, made = ramped(sparsity_schedule=None)
    weights = model[0].weight, model[2].weight
    made.prepare(EIGHT)
    change(model)
    found = made.finalize(backend="torch")
    same = found is model, model[0].weight is weights[0], model[2].weight is weights[1]
    return same, dict(found.state_dict()), [module.training for module in found.modules()]


def finalized_tie() -> Any:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    made = pruner(model)
    made.prepare(X)
    expected = model(torch.ones(1, 4))
    made.finalize(backend="torch")
    return model[0].weight is model[1].weight, torch.equal(model(torch.ones(1, 4)), expected), model[0].weight


def finalized_copy() -> Any:
    model, made = ramped(sparsity_schedule=None)
    made.prepare(EIGHT)
    twin = copy.deepcopy(model)
    made.finalize(twin, backend="torch")
    return model[0].weight


def after_finalize(action: Callable[[Any], Any]) -> Any:
    model, made = ramped(sparsity_schedule=None)
    made.prepare(EIGHT)
    made.finalize(backend="torch")
    action(made)
    return sorted(model.state_dict())


def mark() -> Any:
    model, made = ramped()
    made.prepare(EIGHT)
    buffer = model._coreai_opt_prepared
    found = buffer.dtype, tuple(buffer.shape), "_coreai_opt_prepared" in model.state_dict()
    made.finalize(backend="torch")
    return found, hasattr(model, "_coreai_opt_prepared")


STATES: dict[str, Callable[[], Any]] = {
    "checkpoint of 0.3.0": lambda: loaded(without_steps()),
    "prepare with a checkpoint of 0.3.0": lambda: prepared_with(without_steps()),
    "schedule with three arguments": lambda: third_argument(default=False),
    "finalize a copy": finalized_copy,
    "failed prepare with a state": after_failure,
    # Steps and states.
    "schedule off its boundaries": lambda: [
        api()
        .PolynomialDecaySchedule(begin_step=2, total_iters=9, update_frequency=4, initial_sparsity=0.1)
        .compute_sparsity(step, 0.8)
        for step in range(14)
    ],
    "schedule takes two arguments": lambda: (
        api().PolynomialDecaySchedule(total_iters=9).compute_sparsity(3, 0.8, 0.1)
    ),
    "constant takes two arguments": lambda: api().ConstantSparsitySchedule().compute_sparsity(3, 0.8, 0.1),
    "schedule with a default": lambda: third_argument(default=True),
    "state": saved,
    "load in mid-schedule": lambda: loaded(saved()),
    "load different steps": lambda: loaded(different_steps()),
    "steps after different ones": loaded_counts,
    "steps set": lambda: setattr(pruner(), "_step_count", 3),
    "steps unprepared": lambda: pruner()._step_count,
    "mask cast": cast,
    "prepare with a state": lambda: prepared_with(saved()),
    "prepare with different steps": lambda: prepared_with(different_steps()),
    "prepare with a float model's state": lambda: prepared_with(nn.Linear(8, 8).state_dict()),
    "prepare with one key more": lambda: prepared_with(saved() | {"x": torch.zeros(1)}),
    "prepare with no mask": lambda: prepared_with(
        saved() | {"0.parametrizations.weight.0.mask": torch.empty(0)}
    ),
    "prepare with a number": lambda: prepared_with(3),  # type: ignore[arg-type]
    # The end.
    "finalize": finalized_model,
    "finalize in evaluation": lambda: finalized_model(lambda model: model.eval()),
    "finalize a tie": finalized_tie,
    "finalize twice": lambda: after_finalize(lambda made: made.finalize(backend="torch")),
    "step after finalize": lambda: after_finalize(lambda made: made.step()),
    "prepare after finalize": lambda: after_finalize(lambda made: made.prepare(EIGHT)),
    "mark": mark,
    "finalized weights": lambda: finalized_weights(),
    "fresh checkpoint": lambda: fresh_checkpoint(),
    "step count": lambda: step_count(),
}
