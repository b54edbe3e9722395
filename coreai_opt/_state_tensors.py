"""Which parameters of a model its operations read, seen in one forward, and what is configured for them."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from coreai_opt._restoring import side_effects_undone
from coreai_opt._transposed_weights import is_product, is_transposition
from coreai_opt._utils.config_utils import full_match
from coreai_opt.config.compression_config import CompressionConfig, ModuleCompressionConfig
from coreai_opt.config.spec import CompressionSpec

__all__ = [
    "StateTarget",
    "StateUse",
    "check_example_inputs",
    "configured_targets",
    "put_on_owners",
    "record_state_uses",
    "refuse_meta",
    "side_effects_undone",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StateUse:
    """An operation that reads parameters or buffers of the model.

    Fields:
        op_type: its type, None if it is not among those that are looked for.
        op_name: the function's name with that of the running module before it, and ``_1``, ``_2``, ... behind
            it from the second on in a module, e.g. ``block.fc.linear_1``.
        module_name: name of the running module.
        tensors: what it reads.
    """

    op_type: str | None
    op_name: str
    module_name: str
    tensors: tuple[Tensor, ...]


@dataclass
class StateTarget:
    """A parameter or buffer to compress.

    Fields:
        spec: its specification.
        config: the module configuration that it comes from.
        owners: modules and attribute names that hold the tensor: several, where it is shared.
        fqn: its qualified name, the first of several.
    """

    tensor: Tensor
    spec: CompressionSpec
    config: ModuleCompressionConfig[Any, Any]
    owners: list[tuple[nn.Module, str]]
    fqn: str


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module, op_types: Mapping[Callable[..., Any], str]) -> None:
        super().__init__()
        self.op_types = op_types
        self.states = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        # The root, whatever hooks run before ours.
        self.running = [""]
        self.uses: list[StateUse] = []
        self.counts: dict[str, int] = {}
        # Transposed views of states, which are weights where they are multiplied from the right.
        self.transposed: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        op_type = self.op_types.get(func)
        leaves = tree_leaves((args, kwargs))
        read = [leaf for leaf in leaves if id(leaf) in self.states]
        if is_product(func) and id(leaves[1]) in self.transposed:
            op_type = "linear"
            read.append(self.transposed[id(leaves[1])][0])
        if op_type is not None or read:
            self.uses.append(StateUse(op_type, self._name(func, op_type), self.running[-1], tuple(read)))
        result = func(*args, **(kwargs or {}))
        if is_transposition(func) and args and id(args[0]) in self.states and result.dim() == 2:
            self.transposed[id(result)] = (args[0], result)
        return result

    def _name(self, func: Any, op_type: str | None) -> str:
        if op_type is None:
            return ""
        name = ".".join(filter(None, (self.running[-1], func.__name__)))
        count = self.counts[name] = self.counts.get(name, -1) + 1
        return f"{name}_{count}" if count else name


def record_state_uses(
    model: nn.Module, example_inputs: Sequence[Any], op_types: Mapping[Callable[..., Any], str]
) -> list[StateUse]:
    """Run ``model(*example_inputs)`` once, without gradients, and list the operations in order.

    Args:
        model: is left as it was: buffers and generators included.
        example_inputs: positional arguments.
        op_types: torch functions to look for, and the names of their types.

    Raises:
        TypeError: ``example_inputs`` is no sequence. What the model raises passes.
    """
    check_example_inputs(example_inputs)
    recorder = _Recorder(model, op_types)

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: recorder.running.append(name)

    def leave(*_: Any) -> None:
        recorder.running.pop()

    hooks = []
    try:
        for name, module in model.named_modules():
            hooks.append(module.register_forward_pre_hook(enter(name), prepend=True))
            hooks.append(module.register_forward_hook(leave, always_call=True))
        with side_effects_undone(model), torch.no_grad(), recorder:
            model(*example_inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return recorder.uses


def check_example_inputs(example_inputs: Any) -> None:
    """TypeError unless ``example_inputs`` is a tuple or list of positional arguments."""
    if not isinstance(example_inputs, tuple | list):
        raise TypeError(
            f"example_inputs must be a tuple of the model's positional arguments, e.g. (images,); "
            f"got {type(example_inputs).__name__}"
        )


def check_model(model: Any) -> None:
    """TypeError unless ``model`` is a module with a forward in Python."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"model must be an nn.Module with a forward in Python, got {type(model).__name__}, which "
            f"torch.jit made. Give the module that it was made of"
        )


def refuse_meta(model: nn.Module) -> None:
    """RuntimeError if a parameter or buffer of ``model`` is on the meta device."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise RuntimeError(
                f"{name!r} is on the meta device and has no values. Give the model its parameters first: "
                f"model.to_empty(device=...) and load_state_dict, or load_state_dict(assign=True)."
            )


def configured_targets(
    model: nn.Module, config: CompressionConfig[Any], uses: Sequence[StateUse]
) -> list[StateTarget]:
    """The tensors that ``config`` gives a specification, in the order of the model's parameters and buffers.

    A specification for the state of the module that holds the tensor comes first. Else the last operation
    that reads it there decides, by its name, its type, or what holds for all operations. Of the owners that
    share a tensor, the one that is used last with a specification decides.
    """
    configs = {
        name: entry
        for level in config.build_module_config_dict(model).values()
        for name, entry in level.items()
    }
    modules = dict(model.named_modules())
    owners = _owners(modules)
    by_module: dict[int, _Choice] = {}
    by_op: dict[int, dict[tuple[str, str], _Choice | None]] = {}
    for use in uses:
        for tensor in use.tensors:
            key = id(tensor)
            for owner, attribute in owners[key]:
                spec = _lookup(configs[owner].module_state_spec, attribute)
                if spec is not _MISSING:
                    by_module[key] = (spec, configs[owner])
            if use.op_type is not None:
                named = next((each for each in owners[key] if each[0] == use.module_name), owners[key][0])
                chosen = by_op.setdefault(key, {})
                chosen.pop(named, None)
                chosen[named] = _choose(use, named[1], configs[use.module_name])
    targets = []
    for key, where in owners.items():
        choice = by_module.get(key)
        if choice is None:
            choice = next((each for each in reversed(by_op.get(key, {}).values()) if each), None)
        if choice is not None and choice[0] is not None:
            owner, attribute = where[0]
            tensor = getattr(modules[owner], attribute)
            if not tensor.is_floating_point() or tensor.numel() <= 1:
                logger.warning(
                    f"{owner}.{attribute} has a specification, but is no floating-point tensor of several "
                    f"elements ({tensor.dtype}, shape {tuple(tensor.shape)}): it is left as it is."
                )
                continue
            held_by = [(modules[name], each) for name, each in where]
            targets.append(
                StateTarget(tensor, choice[0], choice[1], held_by, f"{owner}.{attribute}".lstrip("."))
            )
    return targets


_Choice = tuple[CompressionSpec | None, ModuleCompressionConfig[Any, Any]]
_MISSING: Any = object()


def _lookup(specs: Mapping[str, CompressionSpec | None] | None, attribute: str) -> Any:
    return (specs or {}).get(attribute, (specs or {}).get("*", _MISSING))


def _choose(use: StateUse, attribute: str, config: ModuleCompressionConfig[Any, Any]) -> _Choice | None:
    """What ``config`` says about an attribute that an operation reads; None for no compression."""
    by_name = config.op_name_config or {}
    by_type = config.op_type_config or {}
    entry: Any = config
    if use.op_type in by_type:
        entry = by_type[use.op_type]
    for pattern, named in by_name.items():
        if full_match(pattern, use.op_name):
            entry = named
    spec = _lookup(entry.op_state_spec, attribute)
    return None if spec is _MISSING or spec is None else (spec, config)


def _owners(modules: Mapping[str, nn.Module]) -> dict[int, list[tuple[str, str]]]:
    """Names of the modules and attributes that hold each parameter and buffer, by its identity."""
    found: dict[int, list[tuple[str, str]]] = {}
    for name, module in modules.items():
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found.setdefault(id(tensor), []).append((name, attribute))
    return found


def put_on_owners(simulator: nn.Module, owners: Sequence[tuple[nn.Module, str]]) -> None:
    """Register one parametrization for a tensor, in all the modules that share it.

    Args:
        simulator: the parametrization.
        owners: the modules, and what they call the tensor. The first one owns it.
    """
    for index, (module, attribute) in enumerate(owners):
        parametrize.register_parametrization(module, attribute, simulator, unsafe=True)
        if index:
            # transformers saves no tensor twice, and asks modules which of their names stand for others:
            # here all that begin with this module's.
            module.parametrizations[attribute]._tied_weights_keys = {"": ""}  # type: ignore[index, union-attr]
