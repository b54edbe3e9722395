"""Python in README and docs/ runs, or says why it does not; what is made from other files is up to date."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks import claims

from . import names
from .pages import DOCS, Page, pages

PAGES = list(pages())
# What only some pages use.
NEEDS = {"qat-cnn.md": "sklearn", "qat-llm.md": "transformers", "export.md": "coremltools"}


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / "site" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NOTEBOOKS = _script("notebooks")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.name in NEEDS:
        pytest.importorskip(NEEDS[page.name])
    monkeypatch.chdir(tmp_path)
    for number, script in enumerate(page.scripts()):
        torch.manual_seed(0)
        # A module, so that classes of the page know where they are from.
        module = ModuleType(f"page_{number}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        if not page.is_script:
            vars(module).update(names.of(page.name))
        exec(compile(script, f"docs/{page.name}", "exec"), vars(module))


def test_most_blocks_run() -> None:
    """What is not run needs another machine or package; a page of excerpts alone would be a page untried."""
    blocks = [block for page in PAGES for block in page.blocks]
    assert sum(not block.reason for block in blocks) > 0.6 * len(blocks)


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS.TUTORIALS)
def test_notebooks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.reads(NOTEBOOKS.notebook(name), as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()


@pytest.mark.parametrize("name", NOTEBOOKS.TUTORIALS)
def test_notebooks_are_their_pages(name: str) -> None:
    committed = (DOCS / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
    assert committed == NOTEBOOKS.notebook(name), "run python docs/site/notebooks.py"


@pytest.mark.parametrize("name", claims.CLAIMS)
def test_claims_are_the_results(name: str) -> None:
    committed = (claims.PAGES / f"{name}.md").read_text(encoding="utf-8")
    assert committed == claims.page(name), "run python -m benchmarks.claims"
