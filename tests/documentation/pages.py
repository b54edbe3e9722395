"""The Python in docs/: what is run of a page, and what it finds there."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

# A comment before a block, for the reader of the source: why it is not run.
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->\s*\Z")
# A comment at the top of a page: its blocks are one script, of which each continues the one before.
ONE_SCRIPT = "<!-- one script -->"


class Block(NamedTuple):
    """A block of Python of a page.

    Attributes:
        line: of the file, where it begins.
        source: what it says.
        reason: why it is not run; empty if it is.
    """

    line: int
    source: str
    reason: str


class Page(NamedTuple):
    """A page with Python in it."""

    name: str
    is_script: bool
    blocks: list[Block]

    def scripts(self) -> list[str]:
        """What is run, each with names of its own; line numbers are the file's."""
        run = [block for block in self.blocks if not block.reason]
        if not self.is_script:
            return ["\n" * (block.line - 1) + block.source for block in run]
        script = ""
        for block in run:
            script += "\n" * (block.line - 1 - script.count("\n")) + block.source
        return [script] if run else []


def pages() -> Iterator[Page]:
    """All pages that have Python, the README among them."""
    for path in sorted([ROOT / "README.md", *DOCS.rglob("*.md")]):
        text = path.read_text(encoding="utf-8")
        blocks = []
        for found in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            reason = NOT_RUN.search(text[: found.start()])
            line = text.count("\n", 0, found.start(1)) + 1
            blocks.append(Block(line, found[1], reason[1] if reason else ""))
        if blocks:
            name = path.relative_to(ROOT if path.name == "README.md" else DOCS).as_posix()
            yield Page(name, ONE_SCRIPT in text, blocks)
