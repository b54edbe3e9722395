"""Configurations and pruning through public names: what each call returns, or how it is refused."""

import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .pruning_api import X, api, module, pruner, simulator
from .pruning_masks import (
    SCHEDULES,
    channel_masks,
    compute_mask,
    kept_by_sparsity,
    masks,
    random_channel_masks,
    schedule_values,
    ties,
)
from .pruning_runs import CONFIGS, MODELS, entry, resume, run
from .pruning_states import STATES
from .snapshots import Raised, freeze

__all__ = ["CALLS", "answer", "call"]


def from_text(text: str) -> Any:
    from coreai_opt.pruning import MagnitudePrunerConfig

    return plain(MagnitudePrunerConfig.from_yaml(io.StringIO(text)))


def plain(found: Any) -> Any:
    """A dump without what ours adds."""
    if found is None:
        return None
    dump = found.to_dict()["magnitude_pruning_config"]
    dump.pop("global_threshold", None)
    return dump


def make(**fields: Any) -> Any:
    return plain(api().MagnitudePrunerConfig(**fields))


def changed(change: Callable[[Any], Any], **fields: Any) -> Any:
    made = api().MagnitudePrunerConfig(**fields)
    change(made)
    return plain(made)


def levels(**fields: Any) -> dict[str, Any]:
    """The sparsity of each module of a small model by the level that gives it."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Conv2d(1, 1, 1)))
    model.alias = model[1][0]
    found = api().MagnitudePrunerConfig(**fields).build_module_config_dict(model)
    return {
        level.name: {
            name: {key: spec and spec.target_sparsity for key, spec in entry.op_state_spec.items()}
            for name, entry in sorted(entries.items())
        }
        for level, entries in found.items()
    }


def twice() -> None:
    made = pruner()
    made.prepare(X)
    made.prepare(X)


def by_another() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    pruner(model).prepare(X)
    pruner(model).prepare(X)


def finalized(backend: Any) -> Any:
    made = pruner()
    made.prepare(X)
    return type(made.finalize(backend=backend)).__name__


def statistics() -> Any:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    pruner(model).prepare((torch.randn(8, 4),))
    return model[1].running_mean


CALLS: dict[str, Callable[[], Any]] = {
    **{f"schedule {name}": (lambda name=name: schedule_values(name)) for name in SCHEDULES},
    "kept by sparsity": kept_by_sparsity,
    **{
        f"masks {dtype}": (lambda dtype=dtype: tuple(masks(dtype)))
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    },
    **{f"channel masks {axis}": (lambda axis=axis: tuple(channel_masks(axis))) for axis in (0, 1, -1)},
    **{
        f"random channel masks {axis}": (lambda axis=axis: tuple(random_channel_masks(axis)))
        for axis in (0, 1, -1)
    },
    **{f"ties {dtype}": (lambda dtype=dtype: ties(dtype)) for dtype in (torch.float32, torch.bfloat16)},
    **{
        f"run {model} {name}": (lambda model=model, name=name: run(model, name))
        for model in MODELS
        for name in CONFIGS
    },
    # Configurations.
    "config default": make,
    "config off": lambda: make(global_config=None),
    "config by type": lambda: make(module_type_configs={nn.Linear: module(), "a.B": None}),
    "config by name": lambda: make(module_name_configs={"a": module(), "b": None}),
    "config empty levels": lambda: make(module_type_configs=None, module_name_configs=None),
    "config unknown field": lambda: make(globals=None),
    "config type without package": lambda: make(module_type_configs={"Linear": None}),
    "config type no module": lambda: make(module_type_configs={int: None}),
    "config global 3": lambda: make(global_config=3),
    "config global boundary": lambda: make(global_config=module(module_state_spec={"w": None})),
    "module off": lambda: module(op_state_spec=None).model_dump(),
    "module part": lambda: module(op_type_config={"linear": {}, "x": None}).model_dump(),
    "module name": lambda: module(op_name_config={"l.*": {"op_state_spec": None}}).model_dump(),
    "module input": lambda: module(op_input_spec={0: api().PruningSpec()}),
    "module input None": lambda: module(op_input_spec={"0": None, "*": None, "x": None}).model_dump(),
    "module clash": lambda: module(op_input_spec={"0": None, 0: None}),
    "module output": lambda: module(module_output_spec={0: api().PruningSpec()}),
    "module unknown field": lambda: module(foo=1),
    "module list": lambda: module(op_state_spec=[None]),
    "module number": lambda: module(op_state_spec={0: None}),
    "op default": lambda: api().OpMagnitudePrunerConfig().model_dump(),
    "op input": lambda: api().OpMagnitudePrunerConfig(op_input_spec={0: api().PruningSpec()}),
    "defaults of a dict": lambda: sorted(api().ModuleMagnitudePrunerConfig.apply_defaults({"x": 1})),
    "defaults of no dict": lambda: api().ModuleMagnitudePrunerConfig.apply_defaults(3),
    "set global": lambda: changed(lambda c: c.set_global(module(op_state_spec=None))),
    "set global None": lambda: changed(lambda c: c.set_global(None)),
    "set global 3": lambda: changed(lambda c: c.set_global(3)),
    "set type": lambda: changed(lambda c: c.set_module_type(nn.Linear, None)),
    "set type by name": lambda: changed(lambda c: c.set_module_type("torch.nn.Linear", module())),
    "set type without package": lambda: changed(lambda c: c.set_module_type("Linear", None)),
    "set type 3": lambda: changed(lambda c: c.set_module_type(3, None)),
    "set type int": lambda: changed(lambda c: c.set_module_type(int, None)),
    "set name": lambda: changed(lambda c: c.set_module_name("a", module())),
    "only for": lambda: changed(lambda c: c.only_for("a", nn.Linear)),
    "only for list": lambda: changed(lambda c: c.only_for(["a", nn.Linear])),
    "only for replaces": lambda: changed(lambda c: c.only_for("a"), module_name_configs={"a": None}),
    "only for nothing": lambda: changed(lambda c: c.only_for()),
    "only for twice": lambda: changed(lambda c: c.only_for("a").only_for("b")),
    "only for off": lambda: changed(lambda c: c.only_for("a"), global_config=None),
    "only for 3": lambda: changed(lambda c: c.only_for(3)),
    "only for int": lambda: changed(lambda c: c.only_for(int)),
    "only for nested": lambda: changed(lambda c: c.only_for("a", ["b"])),
    "without": lambda: changed(lambda c: c.without("a", nn.Linear)),
    "without nothing": lambda: changed(lambda c: c.without()),
    "without a module": lambda: changed(lambda c: c.without(nn.Linear(1, 1))),
    "levels default": levels,
    "levels off": lambda: levels(global_config=None),
    "levels by type": lambda: levels(module_type_configs={nn.Linear: None}),
    "levels by container": lambda: levels(module_type_configs={nn.Linear: entry(0.1), nn.Sequential: None}),
    "levels by container first": lambda: levels(
        module_type_configs={nn.Sequential: None, nn.Linear: entry(0.1)}
    ),
    "levels by base": lambda: levels(module_type_configs={nn.Module: None}),
    "levels by name": lambda: levels(module_name_configs={"1": None, r"1\.0": entry(0.2)}),
    "levels by name reversed": lambda: levels(module_name_configs={r"1\.0": entry(0.2), "1": None}),
    "levels by part of a name": lambda: levels(module_name_configs={"0": None, "": entry(0.3)}),
    "levels by alias": lambda: levels(module_name_configs={"alias": None}),
    "levels name before type": lambda: levels(
        module_name_configs={"1": entry(0.2)}, module_type_configs={nn.Linear: None}
    ),
    "levels no pattern": lambda: levels(module_name_configs={"(": None}),
    "dict without key": lambda: api().MagnitudePrunerConfig.from_dict({}),
    "dict with another key": lambda: api().MagnitudePrunerConfig.from_dict({"x": {}}),
    "dict None": lambda: api().MagnitudePrunerConfig.from_dict({"magnitude_pruning_config": None}),
    "yaml": lambda: from_text(
        "pruning_spec: {a: &a {target_sparsity: 0.3}}\n"
        "magnitude_pruning_config: {global_config: {op_state_spec: {weight: *a}}, "
        "module_type_configs: {torch.nn.Conv2d: null}}"
    ),
    "yaml empty": lambda: from_text(""),
    "yaml list": lambda: from_text("- 1"),
    "yaml broken": lambda: from_text("a: ["),
    # Specifications, schemes and schedules.
    "spec": lambda: api().PruningSpec().model_dump(),
    "spec default": lambda: api().default_weight_pruning_spec().model_dump(),
    "spec scheme as dict": lambda: (
        api().PruningSpec(pruning_scheme={"type": "channel_structured", "axis": 2}).model_dump()
    ),
    "spec sparsity 1.5": lambda: api().PruningSpec(target_sparsity=1.5),
    "spec sparsity -1": lambda: api().PruningSpec(target_sparsity=-1),
    "spec sparsity None": lambda: api().PruningSpec(target_sparsity=None),
    "spec sparsity NaN": lambda: api().PruningSpec(target_sparsity=float("nan")),
    "spec algorithm unknown": lambda: api().PruningSpec(pruning_algo="x"),
    "spec algorithm of another kind": lambda: api().PruningSpec(pruning_algo=nn.Linear),
    "spec scheme string": lambda: api().PruningSpec(pruning_scheme="unstructured"),
    "spec scheme unknown": lambda: api().PruningSpec(pruning_scheme={"type": "x"}),
    "spec scheme without type": lambda: api().PruningSpec(pruning_scheme={"axis": 1}),
    "spec frozen": lambda: setattr(api().PruningSpec(), "target_sparsity", 0.1),
    "scheme with axis": lambda: api().Unstructured(axis=1),
    "scheme without axis": lambda: api().ChannelStructured(axis=None),
    "schedule without length": lambda: api().PolynomialDecaySchedule(),
    "schedule length 0": lambda: api().PolynomialDecaySchedule(total_iters=0),
    "schedule power 0": lambda: api().PolynomialDecaySchedule(total_iters=1, power=0),
    "schedule frequency 0": lambda: api().PolynomialDecaySchedule(total_iters=1, update_frequency=0),
    "schedule begins before 0": lambda: api().ConstantSparsitySchedule(begin_step=-1),
    "schedule base": lambda: api().SparsityScheduleBase(),
    "schedule between updates": lambda: (
        api().PolynomialDecaySchedule(total_iters=9, update_frequency=2).compute_sparsity(1, 0.5)
    ),
    "schedule from a dict": lambda: repr(
        sorted(
            api().SparsityScheduleBase.maybe_build_from_dict({"type": "polynomial_decay", "total_iters": 3})
        )
    ),
    # What differs on purpose, see INTENDED in test_pruning.
    "int weights": lambda: compute_mask(torch.arange(8), 0.5),
    "complex weights": lambda: compute_mask(torch.ones(4, dtype=torch.complex64), 0.5),
    "sparsity 1.5": lambda: simulator(1.5),
    "mask sparsity -1": lambda: compute_mask(torch.ones(4), -1.0),
    "vector channels": lambda: compute_mask(torch.arange(4.0), 0.5, 0),
    "spec unknown field": lambda: api().PruningSpec(sparsity=0.5),
    "type by a shorter name": lambda: levels(module_type_configs={"torch.nn.Linear": None}),
    "set name 3": lambda: changed(lambda c: c.set_module_name("a", 3)),
    "yaml schedule": lambda: from_text(
        "magnitude_pruning_config: {global_config: {sparsity_schedule: {type: constant, begin_step: 2}}}"
    ),
    "model None": lambda: api().MagnitudePruner(None),
    "config dict": lambda: api().MagnitudePruner(nn.Linear(2, 2), {}),
    "statistics": lambda: statistics(),
    "finalize for Core ML": lambda: finalized("coreml"),
    "supported modules": lambda: len(api().MagnitudePruner.supported_modules()) > 0,
    # The simulator and the pruner.
    "axis too large": lambda: compute_mask(torch.ones(4, 4), 0.5, 2),
    "axis of a number": lambda: compute_mask(torch.tensor(1.0), 0.5, 0),
    "empty": lambda: compute_mask(torch.zeros(0), 0.5),
    "no schedule": lambda: simulator().update_sparsity(1),
    "another shape": lambda: [simulator_called := simulator(), simulator_called(torch.ones(4, 4))][0](
        torch.ones(3, 3)
    ),
    "prepare twice": twice,
    "prepare by another": by_another,
    "prepare without inputs": lambda: pruner().prepare(None),
    "prepare with too few": lambda: pruner().prepare(()),
    "prepare with another shape": lambda: pruner().prepare((torch.zeros(2, 5),)),
    "prepare axis too large": lambda: pruner(global_config=entry(0.5, channels=3)).prepare(X),
    "step before prepare": lambda: pruner().step(),
    "finalize before prepare": lambda: pruner().finalize(),
    "finalize for torch": lambda: finalized("torch"),
    "finalize for nothing": lambda: finalized("x"),
    "finalize for None": lambda: finalized(None),
    "calibrate": lambda: pruner().calibration_mode(),
    "training mode": lambda: pruner().training_mode(),
    **STATES,
}


def call(name: str) -> Any:
    """The value or the exception of one entry of ``CALLS``."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return freeze(CALLS[name]())
        except Exception as error:  # noqa: BLE001 - compared
            return Raised.of(error)


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """``{"calls": {name: value}, "resumed": {model: what it does with the job's state}}``."""
    return {
        "calls": {name: call(name) for name in CALLS},
        "resumed": {name: resume(name, state) for name, state in job["states"].items()},
    }
