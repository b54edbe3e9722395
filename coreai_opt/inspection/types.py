"""The records of an inspection: operations, the edges between them, and the tree of modules."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coreai_opt.quantization.config import ExecutionMode

__all__ = [
    "BoundaryEdge",
    "InputEdge",
    "ModelSummary",
    "ModuleContext",
    "ModuleInfo",
    "OpInfo",
    "SourceFrame",
]


@dataclass(frozen=True)
class SourceFrame:
    """A line of a forward that led to an operation.

    Attributes:
        filename: the source file.
        lineno: the line, from 1.
        function_name: the function that the line belongs to.
        code_context: the line's text, stripped; empty where the source cannot be read.
    """

    filename: str
    lineno: int
    function_name: str
    code_context: str


@dataclass(frozen=True)
class ModuleContext:
    """A module around an operation: its name (``""`` for the root) and its class, ``module.qualname``."""

    module_name: str
    module_type: str


@dataclass(frozen=True)
class InputEdge:
    """A tensor that an operation receives.

    Attributes:
        op: what produces the tensor.
        output_idx: which of the producer's results it is; None where the producer has no numbered results:
            parameters, buffers, tensors of unknown origin, and in eager mode the model's inputs.
    """

    op: "OpInfo"
    output_idx: int | None

    @property
    def op_name(self) -> str:
        """The producer's name."""
        return self.op.op_name

    @property
    def op_type(self) -> str | None:
        """The producer's type."""
        return self.op.op_type

    @property
    def is_state(self) -> bool:
        """Whether the producer is a parameter or buffer."""
        return self.op.is_state

    @property
    def module_stack(self) -> tuple[ModuleContext, ...]:
        """The modules around the producer."""
        return self.op.module_stack

    @property
    def inputs(self) -> "tuple[InputEdge, ...]":
        """What the producer receives."""
        return self.op.inputs

    @property
    def outputs(self) -> "dict[int, tuple[OpInfo, ...]]":
        """What the producer's results go to."""
        return self.op.outputs


@dataclass(eq=False, repr=False)
class OpInfo:
    """An operation of the model, or a tensor that enters or leaves it. Equal and hashed by its name.

    Attributes:
        op_name: its name, unique in the model; cannot be changed (AttributeError).
        op_type: the kind of operation, as ``op_type_config`` names it; None where it has none.
        module_stack: the modules that run it, the root first.
        source_frames: the lines of the forwards that run it, the outermost first.
        inputs: the tensors that it receives; the position is the key of ``op_input_spec``.
        outputs: who reads each of its results.
        is_state: whether it is a parameter or buffer.
    """

    op_name: str
    op_type: str | None
    module_stack: tuple[ModuleContext, ...]
    source_frames: tuple[SourceFrame, ...]
    inputs: tuple[InputEdge, ...]
    outputs: "dict[int, tuple[OpInfo, ...]]"
    is_state: bool

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "op_name" and "op_name" in self.__dict__:
            raise AttributeError(
                f"op_name of {self.op_name!r} cannot be changed: equality and hash rest on it"
            )
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name == "op_name":
            raise AttributeError(
                f"op_name of {self.op_name!r} cannot be deleted: equality and hash rest on it"
            )
        super().__delattr__(name)

    def __eq__(self, other: object) -> bool:
        return self.op_name == other.op_name if isinstance(other, OpInfo) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.op_name)

    def __repr__(self) -> str:
        return f"OpInfo(op_name={self.op_name!r}, op_type={self.op_type!r})"


@dataclass(frozen=True)
class BoundaryEdge:
    """Where a tensor crosses a module's boundary.

    Attributes:
        op: the operation inside.
        index: the position among its inputs for a tensor that enters, among its results for one that leaves.
    """

    op: OpInfo
    index: int


@dataclass
class ModuleInfo:
    """A module that runs operations, itself or in its children.

    Attributes:
        module_name: its qualified name, ``""`` for the root.
        module_type: its class, ``module.qualname``.
        child_modules: the modules directly inside, by their qualified names.
        ops: the operations that it runs itself.
        input_ops: by the position of the tensor that enters, the operations inside that read it.
        output_ops: by the position of the tensor that leaves, the operation inside that makes it.
    """

    module_name: str
    module_type: str
    child_modules: "dict[str, ModuleInfo]" = field(default_factory=dict)
    ops: list[OpInfo] = field(default_factory=list)
    input_ops: dict[int, list[BoundaryEdge]] = field(default_factory=dict)
    output_ops: dict[int, BoundaryEdge] = field(default_factory=dict)

    def children(self) -> "Iterator[ModuleInfo]":
        """The modules directly inside."""
        yield from self.child_modules.values()

    def named_children(self) -> "Iterator[tuple[str, ModuleInfo]]":
        """The modules directly inside, with their qualified names."""
        yield from self.child_modules.items()

    def modules(self) -> "Iterator[ModuleInfo]":
        """This module and all inside, depth first."""
        # A stack of its own: modules may be nested deeper than Python's recursion goes.
        pending = [self]
        while pending:
            module = pending.pop()
            yield module
            pending.extend(reversed(module.child_modules.values()))

    def named_modules(self) -> "Iterator[tuple[str, ModuleInfo]]":
        """This module and all inside with their qualified names, depth first."""
        for module in self.modules():
            yield module.module_name, module

    def get_submodule(self, module_name: str) -> "ModuleInfo":
        """The module of that qualified name, this one included.

        Raises:
            KeyError: there is none here that runs operations.
        """
        for name, module in self.named_modules():
            if name == module_name:
                return module
        raise KeyError(
            f"no module {module_name!r} with operations in {self.module_name!r} ({self.module_type})"
        )

    def all_ops(self) -> list[OpInfo]:
        """This module's operations, then those of its children, depth first."""
        return [op for module in self.modules() for op in module.ops]


@dataclass(frozen=True)
class ModelSummary:
    """What an inspection found: the tree of modules, and the mode that it was seen in."""

    model: ModuleInfo
    mode: "ExecutionMode"
