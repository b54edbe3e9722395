"""What a compressor has compressed in a prepared model, and what in its configuration had no effect."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils import parametrize

from coreai_opt._utils.config_utils import did_you_mean, is_type_named, original_type
from coreai_opt.config.compression_config import CompressionConfig
from coreai_opt.config.spec import CompressionSimulatorBase, CompressionTargetTensor
from coreai_opt.config.spec.storage import dense_bits, simulated_bits

__all__ = [
    "SWITCHED_OFF",
    "UNSPECIFIED",
    "CompressionSummary",
    "TensorSummary",
    "parameters_of",
    "summary_of",
    "warn_of_unmatched",
]

logger = logging.getLogger(__name__)

# Why a parameter is not compressed.
UNSPECIFIED = "without a specification"
SWITCHED_OFF = "by the configuration"


@dataclass(frozen=True)
class TensorSummary:
    """A parameter of a prepared model.

    Attributes:
        name: its qualified name, as before ``prepare``; the first of a shared one.
        shape: its shape.
        simulator: what compresses it; None where nothing does.
        bits: what it takes as it would be stored, with scales and palettes; None where a simulator does not
            say.
        why: why nothing compresses it; None where something does.
    """

    name: str
    shape: tuple[int, ...]
    simulator: CompressionSimulatorBase | None
    bits: int | None = None
    why: str | None = None

    @property
    def elements(self) -> int:
        """Its number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, repr=False)
class CompressionSummary:
    """What a compressor has compressed. Its text is a table.

    Attributes:
        compressor: the name of the compressor's class.
        tensors: the model's parameters.
        activations: simulators of activations.
    """

    compressor: str
    tensors: tuple[TensorSummary, ...]
    activations: int

    @cached_property
    def compressed(self) -> tuple[TensorSummary, ...]:
        """The parameters with a simulator."""
        return tuple(each for each in self.tensors if each.simulator is not None)

    @property
    def coverage(self) -> float:
        """The compressed parameters' share of all elements; 0.0 for a model without parameters."""
        total = sum(each.elements for each in self.tensors)
        return sum(each.elements for each in self.compressed) / total if total else 0.0

    @property
    def bits_per_weight(self) -> float | None:
        """Bits of an element, of all parameters; None if there is none, or a simulator does not say."""
        bits = [each.bits for each in self.tensors if each.bits is not None]
        total = sum(each.elements for each in self.tensors)
        return sum(bits) / total if total and len(bits) == len(self.tensors) else None

    @property
    def left_out(self) -> dict[str, int]:
        """How many parameters are not compressed, by the reason."""
        return dict(Counter(each.why for each in self.tensors if each.why is not None))

    @property
    def is_empty(self) -> bool:
        """Whether nothing is compressed."""
        return not self.compressed and not self.activations

    @property
    def line(self) -> str:
        """All of it in one line."""
        bits = "" if self.bits_per_weight is None else f", {self.bits_per_weight:.2f} bits per weight"
        activations = f", and {self.activations} activations" if self.activations else ""
        reasons = ", ".join(f"{count} {why}" for why, count in self.left_out.items())
        return (
            f"{self.compressor}: {len(self.compressed)} of {len(self.tensors)} tensors compressed, "
            f"{self.coverage:.1%} of the parameters{bits}{activations}"
            + (f"; left out: {reasons}" if reasons else "")
        )

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(title=self.line, title_justify="left")
        for title in ("parameter", "shape", "elements", "bits", "compressed"):
            table.add_column(title, justify="right" if title in ("elements", "bits") else "left")
        for each in self.tensors:
            shape = " × ".join(map(str, each.shape))
            how = each.why or type(each.simulator).__name__.lstrip("_")
            bits = "?" if each.bits is None else f"{each.bits / max(each.elements, 1):.2f}"
            table.add_row(each.name, shape, f"{each.elements:,}", bits, how)
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=110, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    __repr__ = __str__


def summary_of(
    model: nn.Module,
    kind: type[CompressionSimulatorBase],
    compressor: str,
    why: Callable[[str], str],
) -> CompressionSummary:
    """What the simulators of class ``kind`` in ``model`` compress.

    Args:
        model: prepared, in eager or in graph mode.
        kind: the class of the compressor's simulators.
        compressor: the name of the compressor's class.
        why: says of a parameter without a simulator why it has none.
    """
    tensors: dict[int, TensorSummary] = {}
    in_graph = _simulators_in_graph(model, kind) if isinstance(model, GraphModule) else {}
    of_parameters = set(in_graph.values())
    for name, tensor, chain in parameters_of(model):
        simulator = next((each for each in chain if isinstance(each, kind)), in_graph.get(id(tensor)))
        if simulator is not None:
            of_parameters.add(simulator)
        if id(tensor) not in tensors:
            if simulator is not None and simulator not in chain:
                chain = (*chain, simulator)
            reason = why(name) if simulator is None else None
            tensors[id(tensor)] = TensorSummary(
                name, tuple(tensor.shape), simulator, _bits(tensor, chain), reason
            )
    simulators = {each for each in model.modules() if isinstance(each, kind)}
    return CompressionSummary(compressor, tuple(tensors.values()), len(simulators - of_parameters))


def _bits(tensor: Tensor, chain: Sequence[nn.Module]) -> int | None:
    simulators = [each for each in chain if isinstance(each, CompressionSimulatorBase)]
    if tensor.is_meta:  # what is stored may depend on the values
        return None
    try:
        return simulated_bits(tensor, simulators) if simulators else dense_bits(tensor)
    except NotImplementedError:  # of a class from elsewhere
        return None


def parameters_of(model: nn.Module) -> Iterator[tuple[str, Tensor, tuple[nn.Module, ...]]]:
    """The parameters of the model itself, with their parametrizations."""
    own: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in own:
            continue
        if isinstance(module, CompressionSimulatorBase):
            own.update(module.modules())
            continue
        if parametrize.is_parametrized(module):
            lists: Any = module.parametrizations
            own.update(lists.modules())
            for attribute, chain in lists.items():
                # Other parametrizations than compression's may keep several tensors for one.
                if isinstance(getattr(chain, "original", None), nn.Parameter):
                    yield f"{name}.{attribute}".lstrip("."), chain.original, tuple(chain)
        for attribute, parameter in module.named_parameters(recurse=False):
            yield f"{name}.{attribute}".lstrip("."), parameter, ()


def _simulators_in_graph(
    model: GraphModule, kind: type[CompressionSimulatorBase]
) -> dict[int, CompressionSimulatorBase]:
    """Simulators that read a parameter, by the parameter's identity."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[int, CompressionSimulatorBase] = {}
    for node in model.graph.nodes:
        simulator = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(simulator, kind) or not _is_of_weight(simulator):
            continue
        # The weight of a convolution reaches it by way of the batch norm behind it, which has one axis.
        pending, seen = list(node.all_input_nodes), set()
        while pending:
            source = pending.pop()
            if source in seen:
                continue
            seen.add(source)
            pending.extend(source.all_input_nodes)
            parameter = parameters.get(str(source.target)) if source.op == "get_attr" else None
            if parameter is not None and (parameter.dim() > 1 or source in node.all_input_nodes):
                found[id(parameter)] = simulator
    return found


def _is_of_weight(simulator: nn.Module) -> bool:
    return getattr(simulator, "quantization_target", None) is CompressionTargetTensor.WEIGHT


def warn_of_unmatched(
    model: nn.Module, config: CompressionConfig[Any], op_types: Iterable[str] | None
) -> None:
    """Name, in the log, the types and the states of a configuration that the model does not have.

    Args:
        model: has its simulators or not.
        config: is for this model.
        op_types: the types of operations that the compressor knows; None if it checks them itself.
    """
    modules = list(model.modules())
    types = {original_type(module) for module in modules}
    known_types = [f"{each.__module__}.{each.__qualname__}" for each in types]
    for key in config.module_type_configs:
        if not any(is_type_named(each, str(key)) for each in types):
            _warn("module_type_configs", str(key), "the model has no module of this type", known_types)
    states = {name for module in modules for name in (*module._parameters, *module._buffers)}
    for module in modules:
        if parametrize.is_parametrized(module):
            states.update(module.parametrizations)  # type: ignore[arg-type]
    op_config = config._get_module_config_class()._get_op_config_class()
    usual = set() if op_config is None else set(op_config.get_default_state_spec())
    entries = [
        config.global_config,
        *config.module_type_configs.values(),
        *config.module_name_configs.values(),
    ]
    reported: set[tuple[str, str]] = set()
    for entry in entries:
        if entry is None:
            continue
        operations = {**(entry.op_type_config or {}), **(entry.op_name_config or {})}
        for each in (entry, *operations.values()):
            for field in ("op_state_spec", "module_state_spec"):
                for state in getattr(each, field, None) or {}:
                    if state != "*" and state not in states | usual and (field, state) not in reported:
                        reported.add((field, state))
                        _warn(field, state, "no module has such a parameter or buffer", states)
        for op_type in entry.op_type_config or {}:
            if op_types is not None and op_type not in op_types and ("op", op_type) not in reported:
                reported.add(("op", op_type))
                _warn("op_type_config", op_type, "no operation of this type is compressed", op_types)


def _warn(field: str, key: str, why: str, known: Iterable[str]) -> None:
    logger.warning(
        f"{field}: {key!r} matches nothing, {why}, so that it has no effect.{did_you_mean(key, known)}"
    )
