"""Makes the notebooks of three tutorials from their pages: ``python docs/site/notebooks.py``."""

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1]
TUTORIALS = ("qat-cnn", "qat-llm", "joint")


def notebook(name: str) -> str:
    """The page as a notebook without outputs: prose and code in turns."""
    text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    text = re.sub(r"<!--.*?-->\n", "", text)
    # Links to other pages lead to their sources.
    text = re.sub(r"\]\(([\w-]+\.md)", r"](../\1", text)
    cells: list[dict[str, Any]] = []
    for number, part in enumerate(re.split(r"^```python\n(.*?)^```\n", text, flags=re.MULTILINE | re.DOTALL)):
        source = part.strip("\n").splitlines(keepends=True)
        if not source:
            continue
        cell: dict[str, Any] = {"id": f"cell-{number}", "metadata": {}, "source": source}
        if number % 2:
            cell |= {"cell_type": "code", "execution_count": None, "outputs": []}
        else:
            cell |= {"cell_type": "markdown"}
        cells.append(dict(sorted(cell.items())))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    whole = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Write them."""
    folder = DOCS / "notebooks"
    folder.mkdir(exist_ok=True)
    for name in TUTORIALS:
        (folder / f"{name}.ipynb").write_text(notebook(name), encoding="utf-8")


if __name__ == "__main__":
    main()
