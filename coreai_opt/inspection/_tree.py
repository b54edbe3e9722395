"""Puts operations into the tree of the modules that run them."""

from collections.abc import Iterable

from coreai_opt.inspection.types import ModuleContext, ModuleInfo, OpInfo

__all__ = ["build_tree", "qualified_type"]


def qualified_type(cls: type) -> str:
    """``module.qualname`` of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def build_tree(root: ModuleContext, ops: Iterable[OpInfo]) -> dict[str, ModuleInfo]:
    """The modules that run ``ops``, by name, each in the child list of the one around it.

    Args:
        root: the outermost module, which is there even without operations.
        ops: in the order of execution; those without a module stack stay outside.

    Returns:
        The root first, then the others in the order of their first operation.
    """
    modules = {root.module_name: ModuleInfo(root.module_name, root.module_type)}
    for op in ops:
        parent: ModuleInfo | None = None
        for context in op.module_stack:
            name = context.module_name
            if name not in modules:
                modules[name] = ModuleInfo(name, context.module_type)
                if parent is not None:
                    parent.child_modules[name] = modules[name]
            parent = modules[name]
        if parent is not None:
            parent.ops.append(op)
    return modules
