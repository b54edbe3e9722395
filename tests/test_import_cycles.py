"""Imports point one way: no module can be reached from what it imports, inside of functions included."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "coreai_opt": ROOT / "coreai_opt",
    "coreai_kernels": ROOT / "kernels" / "coreai_kernels",
    "coreai_accelerate": ROOT / "kernels" / "coreai_accelerate",
}

pytestmark = pytest.mark.skipif(
    not all(folder.is_dir() for folder in PACKAGES.values()), reason="needs the source tree"
)


@functools.cache
def modules() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imported(name: str, source: str, is_package: bool, known: frozenset[str]) -> set[str]:
    """Modules among ``known`` that a module imports, anywhere in its text; for annotations, too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = name.split(".") if is_package else name.split(".")[:-1]
            above = parts[: len(parts) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in known else base)
    return (found & known) - {name}


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that all reach one another."""
    reach = {name: {name} for name in graph}
    changed = True
    while changed:
        changed = False
        for name, targets in graph.items():
            more = reach[name].union(*(reach[target] for target in targets))
            changed |= len(more) > len(reach[name])
            reach[name] = more
    groups = {frozenset(other for other in reach[name] if name in reach[other]) for name in graph}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def test_the_search_finds_lazy_and_relative_imports() -> None:
    sources = {
        "p": "",
        "p.a": "def f():\n    from . import b",
        "p.b": "import p.c",
        "p.c": "from p.a import f",
    }
    known = frozenset(sources)
    graph = {name: imported(name, text, name == "p", known) for name, text in sources.items()}
    assert graph == {"p": set(), "p.a": {"p.b"}, "p.b": {"p.c"}, "p.c": {"p.a"}}
    assert cycles(graph) == [["p.a", "p.b", "p.c"]]


def test_no_module_imports_itself_by_way_of_others() -> None:
    known = frozenset(modules())
    graph = {
        name: imported(name, path.read_text(), path.name == "__init__.py", known)
        for name, path in modules().items()
    }
    assert len(graph) > 200
    assert not cycles(graph)


def test_the_engine_knows_nothing_above_it() -> None:
    known = frozenset(modules())
    engine = {name: path for name, path in modules().items() if name.split(".")[0] == "coreai_kernels"}
    for name, path in engine.items():
        targets = imported(name, path.read_text(), path.name == "__init__.py", known)
        assert {target.split(".")[0] for target in targets} <= {"coreai_kernels"}, name
