"""Takes out the casts that a program does not need, and closes a changed program."""

from collections.abc import Iterator

import torch
from torch import fx
from torch.export import ExportedProgram

from coreai_opt.casting._nodes import cast_target, dtype_of, insert_cast, retarget

__all__ = ["finish", "simplify"]

_FLOATS = (
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float16,
    torch.float32,
    torch.float64,
)
_CATEGORIES = (
    frozenset(_FLOATS),
    frozenset({torch.int8, torch.int16, torch.int32, torch.int64}),
    frozenset({torch.uint8}),
    frozenset({torch.bool}),
)


def simplify(graph: fx.Graph, inserted: set[fx.Node]) -> None:
    """Remove what is undone or done twice, until nothing changes; then merge equal casts of one tensor.

    Casts of the original program go only where they lose nothing: those that widen.

    Args:
        graph: is changed in place.
        inserted: the casts that were added; they may go wherever they are not needed.
    """
    while _collapse_chains(graph, inserted) | _drop_idle(graph, inserted) | _skip_shared(graph, inserted):
        pass
    _merge(graph, inserted)


def finish(program: ExportedProgram) -> ExportedProgram:
    """Drop dead code, and let the program's signature name its present outputs."""
    graph = program.graph
    graph.eliminate_dead_code()
    for spec, result in zip(program.graph_signature.output_specs, graph.output_node().args[0], strict=True):  # type: ignore[arg-type]
        if isinstance(result, fx.Node):
            spec.arg.name = result.name
    graph.lint()
    program.graph_module.recompile()
    return program


def _casts(graph: fx.Graph) -> Iterator[fx.Node]:
    """The casts that are there, while some of them go."""
    for node in list(graph.nodes):
        if not node._erased and cast_target(node) is not None:
            yield node


def _source(cast: fx.Node) -> fx.Node:
    return cast.args[0]  # type: ignore[return-value]


def _is_includable(node: fx.Node, inserted: set[fx.Node]) -> bool:
    """Whether a cast may go: it stays within floats, or within integers, and was added, or loses nothing."""
    target = cast_target(node)
    if target is None:
        return False
    given = dtype_of(_source(node))
    if given is None or not any(given in each and target in each for each in _CATEGORIES):
        return False
    return node in inserted or (not node.kwargs.get("copy") and _widens(given, target))


def _widens(given: torch.dtype, target: torch.dtype) -> bool:
    """Whether each value of ``given`` is one of ``target``."""
    if given.is_floating_point:
        old, new = torch.finfo(given), torch.finfo(target)
        return new.eps <= old.eps and new.max >= old.max and new.tiny <= old.tiny
    return given == torch.bool or torch.iinfo(target).bits >= torch.iinfo(given).bits


def _replace(node: fx.Node, by: fx.Node, inserted: set[fx.Node]) -> None:
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)
    inserted.discard(node)


def _collapse_chains(graph: fx.Graph, inserted: set[fx.Node]) -> bool:
    """Make one cast, or none, of casts of casts that nothing else reads."""
    changed = False
    for last in _casts(graph):
        chain = [last]
        while _is_includable(chain[0], inserted):
            before = _source(chain[0])
            if not (_is_includable(before, inserted) and len(before.users) == 1):
                break
            chain.insert(0, before)
        if len(chain) == 1 or not _is_includable(last, inserted) or _continues(last, inserted):
            continue
        changed = True
        target = cast_target(last)
        assert target is not None
        source = _source(chain[0])
        if dtype_of(source) == target:
            last.replace_all_uses_with(source)
        else:
            retarget(chain[0], target)
            last.replace_all_uses_with(chain[0])
            chain = chain[1:]
        for node in reversed(chain):
            graph.erase_node(node)
            inserted.discard(node)
    return changed


def _continues(cast: fx.Node, inserted: set[fx.Node]) -> bool:
    """Whether a later cast of the chain will take this one with it."""
    return len(cast.users) == 1 and _is_includable(next(iter(cast.users)), inserted)


def _drop_idle(graph: fx.Graph, inserted: set[fx.Node]) -> bool:
    """Drop casts to the dtype that is there already."""
    changed = False
    for node in _casts(graph):
        if dtype_of(_source(node)) == cast_target(node) and not node.kwargs.get("copy"):
            _replace(node, _source(node), inserted)
            changed = True
    return changed


def _skip_shared(graph: fx.Graph, inserted: set[fx.Node]) -> bool:
    """Let a cast read what the cast before it reads, where that one has other readers."""
    changed = False
    for node in _casts(graph):
        before = _source(node)
        if not (
            _is_includable(node, inserted) and _is_includable(before, inserted) and len(before.users) > 1
        ):
            continue
        target = cast_target(node)
        assert target is not None
        if dtype_of(_source(before)) == target:
            _replace(node, _source(before), inserted)
        else:
            direct = insert_cast(_source(before), target, node)
            inserted.add(direct)
            _replace(node, direct, inserted)
        changed = True
    return changed


def _merge(graph: fx.Graph, inserted: set[fx.Node]) -> None:
    """Keep one of the equal casts of a tensor, the first."""
    first: dict[tuple[fx.Node, torch.dtype | None], fx.Node] = {}
    for node in _casts(graph):
        if _is_includable(node, inserted):
            key = (_source(node), cast_target(node))
            if key in first:
                _replace(node, first[key], inserted)
            else:
                first[key] = node
