"""What a prepared model carries: that it is, by which compressors, how, and how many steps they have done.

The mark is a buffer that no ``state_dict`` holds. Steps are in the metadata that torch keeps beside a model's
``state_dict`` (``torch.save`` writes it, too), where a strict load by other packages does not mind them.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coreai_opt._embeddings import guard_embeddings
from coreai_opt._plain_names import from_plain_names, steps_key
from coreai_opt.common import CompressionType
from coreai_opt.config.spec import CompressionSimulatorBase

__all__ = [
    "MARKS",
    "PREPARED_MARK",
    "Preparation",
    "count_step",
    "finalized_of",
    "is_prepared",
    "load_prepared",
    "load_simulators",
    "mark_finalized",
    "mark_prepared",
    "marks_of",
    "preparations_of",
    "set_steps",
    "steps_of",
    "with_all_names",
]

# The buffer that says so.
PREPARED_MARK = "_coreai_opt_prepared"
# The attribute with the steps of each compressor that has prepared the model: {kind: steps}.
_STEPS = "_coreai_opt_steps"
# The attribute with what each of them was given: {kind: Preparation}.
_PREPARATIONS = "_coreai_opt_preparations"
# What a prepared model has and others have not.
MARKS = (PREPARED_MARK, _STEPS, _PREPARATIONS)
# The attribute of a finalized model that goes on simulating activations, with the same of whom it is from.
_FINALIZED = "_coreai_opt_finalized"
# The steps' key in the metadata of a state_dict.
_METADATA = "coreai_opt_steps"


@dataclass(frozen=True)
class Preparation:
    """What a compressor was given, so that the same can be done to another model.

    Attributes:
        config: its configuration, a copy.
        inputs: the example inputs' :func:`~coreai_opt._input_outlines.outline_of`.
        options: other arguments, by name.
    """

    config: Any
    inputs: Any
    options: dict[str, Any]


def is_prepared(model: nn.Module, kind: CompressionType | None = None) -> bool:
    """Whether a compressor of this kind, for None of any, has prepared the model and not finalized it."""
    if getattr(model, PREPARED_MARK, None) is None:
        return False
    return kind is None or str(kind) in getattr(model, _STEPS, {})


def mark_prepared(
    model: nn.Module,
    kind: CompressionType,
    preparation: Preparation,
    state_dict: Mapping[str, Any] | None = None,
) -> None:
    """Say that a compressor of this kind has prepared the model. Steps are those of ``state_dict``, or 0."""
    if getattr(model, PREPARED_MARK, None) is None:
        # Beside the parameters: what distributes a model's buffers may know one kind of device alone.
        device = next((tensor.device for tensor in model.parameters()), None)
        model.register_buffer(PREPARED_MARK, torch.tensor(True, device=device), persistent=False)
        setattr(model, _STEPS, {})
    if not hasattr(model, _PREPARATIONS):
        setattr(model, _PREPARATIONS, {})
    if hasattr(model, _FINALIZED):
        delattr(model, _FINALIZED)
    if _save_steps not in model._state_dict_hooks.values():
        model.register_state_dict_post_hook(_save_steps)
        model.register_load_state_dict_pre_hook(_load_steps)
        model.register_load_state_dict_pre_hook(from_plain_names)
    getattr(model, _STEPS)[str(kind)] = 0
    getattr(model, _PREPARATIONS)[str(kind)] = preparation
    guard_embeddings(model)
    if state_dict is not None:
        _load_steps(model, state_dict, "", getattr(state_dict, "_metadata", {}).get("", {}))


def marks_of(kind: CompressionType) -> dict[str, Any]:
    """The marks as plain attributes, for modules whose copies keep no buffers."""
    return {PREPARED_MARK: True, _STEPS: {str(kind): 0}, _PREPARATIONS: {}}


def preparations_of(model: nn.Module) -> dict[CompressionType, Preparation]:
    """What the compressors that have prepared the model were given, in their order."""
    return {CompressionType(kind): each for kind, each in getattr(model, _PREPARATIONS, {}).items()}


def finalized_of(model: nn.Module) -> dict[CompressionType, Preparation]:
    """What :func:`preparations_of` had of a finalized model, if it goes on simulating activations."""
    return {CompressionType(kind): each for kind, each in getattr(model, _FINALIZED, {}).items()}


def mark_finalized(model: nn.Module, kind: CompressionType, simulates: bool = False) -> None:
    """Say that the compressor of this kind is done with the model; ``simulates`` if its activations stay."""
    if getattr(model, PREPARED_MARK, None) is None:
        return
    guard_embeddings(model)
    steps = getattr(model, _STEPS)
    steps.pop(str(kind), None)
    # Pickles of early versions have none.
    preparation = getattr(model, _PREPARATIONS, {}).pop(str(kind), None)
    if simulates and preparation is not None:
        setattr(model, _FINALIZED, {str(kind): preparation})
    if steps:
        return
    for mark in MARKS:
        if hasattr(model, mark):
            delattr(model, mark)
    for hooks, function in (
        (model._state_dict_hooks, _save_steps),
        (model._load_state_dict_pre_hooks, _load_steps),
        (model._load_state_dict_pre_hooks, from_plain_names),
    ):
        for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is function]:
            del hooks[key]


def steps_of(model: nn.Module, kind: CompressionType) -> int:
    """Training steps that the compressor of this kind has counted; 0 if the model is not prepared."""
    return int(getattr(model, _STEPS, {}).get(str(kind), 0))


def set_steps(model: nn.Module, kind: CompressionType, steps: int) -> None:
    """Set what :func:`steps_of` returns for a prepared model."""
    getattr(model, _STEPS)[str(kind)] = steps


def count_step(model: nn.Module, kind: CompressionType) -> None:
    """Count a training step of a prepared model."""
    set_steps(model, kind, steps_of(model, kind) + 1)


def _save_steps(model: nn.Module, state_dict: Any, prefix: str, local_metadata: dict[str, Any]) -> None:
    # A model without steps has the metadata of torch alone.
    if any(getattr(model, _STEPS, {}).values()):
        local_metadata[_METADATA] = dict(getattr(model, _STEPS))


def _load_steps(
    model: nn.Module, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *args: Any
) -> None:
    saved = local_metadata.get(_METADATA, {})
    for kind in CompressionType:
        # As of plain states, in files without metadata.
        if (steps := state_dict.get(prefix + steps_key(kind))) is not None:
            saved = {**saved, str(kind): int(steps)}
    present = getattr(model, _STEPS, {})
    present.update({kind: int(saved[kind]) for kind in present if kind in saved})


def load_prepared(
    model: nn.Module, state_dict: Mapping[str, Any], uninitialized: Callable[[nn.Module], list[str]]
) -> None:
    """Load the state of a prepared model strictly, into one that has just been prepared in the same way.

    It is loaded twice: first with the model's own parameters and buffers replaced, parameters by tensors
    without memory, so that nothing of theirs is written unless all fits.

    Args:
        model: has its simulators.
        state_dict: the state of a model prepared with the same configuration. Of several names of a shared
            tensor it may have one alone.
        uninitialized: the names of the simulators of the model that have no state.

    Raises:
        RuntimeError: names or shapes do not fit, or the state leaves simulators without what they need.
        TypeError: ``state_dict`` is no mapping.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping of names to tensors; got {type(state_dict).__name__}")
    state_dict = with_all_names(model, state_dict)
    with _without_values(_own_tensors(model)):
        _load(model, state_dict, uninitialized)
    _load(model, state_dict, uninitialized)


def with_all_names(model: nn.Module, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """``state_dict`` with all the names of the model's shared tensors and simulators of which it has one."""
    missing: dict[str, Any] = {}
    for names in _names_by_identity(model.state_dict(keep_vars=True).items()):
        given = next((state_dict[name] for name in names if name in state_dict), None)
        if given is not None:
            missing.update({name: given for name in names if name not in state_dict})
    # Tensors that a simulator will have once it is loaded are not among those.
    for places in _names_by_identity(model.named_modules(remove_duplicate=False)):
        for place in places if len(places) > 1 else ():
            given = {name: value for name, value in state_dict.items() if name.startswith(f"{place}.")}
            for other in places:
                for name, value in given.items():
                    if (alias := other + name.removeprefix(place)) not in state_dict:
                        missing[alias] = value
    if not missing:
        return state_dict
    result: Any = OrderedDict(state_dict) | missing
    result._metadata = getattr(state_dict, "_metadata", OrderedDict())
    return result  # type: ignore[no-any-return]


def _names_by_identity(named: Iterable[tuple[str, Any]]) -> Iterable[list[str]]:
    names: dict[int, list[str]] = {}
    for name, value in named:
        names.setdefault(id(value), []).append(name)
    return names.values()


def _load(
    model: nn.Module, state_dict: Mapping[str, Any], uninitialized: Callable[[nn.Module], list[str]]
) -> None:
    with warnings.catch_warnings():
        # torch's, of the tensors without memory.
        warnings.filterwarnings("ignore", message=".*which is a no-op")
        try:
            model.load_state_dict(state_dict, strict=True)
        except RuntimeError as error:
            raise RuntimeError(
                f"state_dict does not fit the prepared model. It must be the state of a model that was "
                f"prepared with the same configuration and the same code: {error}"
            ) from error
    names = uninitialized(model)
    if names:
        raise RuntimeError(
            f"state_dict fits the model, but has no compression state for {', '.join(names)}: it was saved "
            f"before these were prepared"
        )


def load_simulators(
    model: nn.Module, state_dict: Mapping[str, Any], kind: type[CompressionSimulatorBase]
) -> None:
    """Load the states of the simulators of class ``kind`` alone: other compressors are yet to come.

    Raises:
        RuntimeError: names or shapes of one do not fit.
    """
    state_dict = with_all_names(model, state_dict)
    for name, module in model.named_modules():
        if isinstance(module, kind):
            own = {
                key.removeprefix(f"{name}."): value
                for key, value in state_dict.items()
                if key.startswith(f"{name}.")
            }
            try:
                module.load_state_dict(own, strict=True)
            except RuntimeError as error:
                raise RuntimeError(
                    f"the state does not fit the simulator {name!r}, which the configuration puts there: "
                    f"{error}"
                ) from error


# A module's table of parameters or buffers, and a name in it.
_Entry = tuple[dict[str, Any], str]


def _own_tensors(model: nn.Module) -> Iterator[_Entry]:
    """The tensors of the modules that are no part of a simulator."""
    simulators: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, CompressionSimulatorBase):
            simulators.update(module.modules())
    for module in model.modules():
        if module not in simulators:
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        yield table, name


@contextmanager
def _without_values(entries: Iterable[_Entry]) -> Iterator[None]:
    """While it is active, these entries hold parameters on the meta device, and copies of buffers."""
    before = [(table, name, table[name]) for table, name in entries]
    stand_ins: dict[int, Tensor] = {}
    for table, name, tensor in before:
        if id(tensor) not in stand_ins:
            if isinstance(tensor, nn.Parameter):
                empty = torch.empty_like(tensor, device="meta")
                stand_ins[id(tensor)] = nn.Parameter(empty, tensor.requires_grad)
            else:
                stand_ins[id(tensor)] = tensor.detach().clone()
        table[name] = stand_ins[id(tensor)]
    try:
        yield
    finally:
        for table, name, tensor in before:
            table[name] = tensor
