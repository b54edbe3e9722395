"""Hooks of the site's build: links that leave docs/ go to the files of the repository."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Take the link off what a page says about a file that is not part of the site; it must exist."""

    def unlinked(link: re.Match[str]) -> str:
        name = link[2].removeprefix("../")
        if not (ROOT / name).exists():
            raise FileNotFoundError(f"a page links to {link[2]}, which does not exist")
        return f"{link[1]} (`{name}`)" if link[1].strip("`") != name else f"`{name}`"

    return re.sub(r"\[([^\]]+)\]\(((?:\.\./)(?:[\w./-]+))\)", unlinked, markdown)
