"""Guides that come with the package: pages of Markdown whose code runs as it stands.

``clipsteer guide`` lists and prints them, and writes them as notebooks.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent
# in the order in which they are read
NAMES = ("loop", "sae", "prove", "continual", "moving")


class Block(NamedTuple):
    """A part of a page: what the fence around code says, or "" for prose."""

    kind: str
    text: str


def page(name: str) -> str:
    """The Markdown of a guide. Raises ValueError for a name that there is not."""
    if name not in NAMES:
        raise ValueError(f"guide: expected one of {', '.join(NAMES)}, got {name!r}")
    return (FOLDER / f"{name}.md").read_text(encoding="utf-8")


def title(name: str) -> str:
    """The first line of a guide."""
    return page(name).partition("\n")[0].removeprefix("# ")


def blocks(name: str) -> list[Block]:
    """Prose and code of a guide, in order."""
    parts = re.split(r"^```(\w+)\n(.*?)^```\n", page(name), flags=re.MULTILINE | re.DOTALL)
    found = [Block("", parts[0])]
    for i in range(1, len(parts), 3):
        found += [Block(parts[i], parts[i + 1]), Block("", parts[i + 2])]
    return [block for block in found if block.text.strip()]


def notebook(name: str) -> Any:
    """A guide as a notebook, of nbformat's ``NotebookNode``; commands of the shell begin with !.

    Raises RuntimeError without nbformat.
    """
    try:
        from nbformat import v4
    except ImportError as error:
        raise RuntimeError(
            "guide: notebooks need nbformat: pip install 'clipsteer[docs]'"
        ) from error
    cells = []
    for i, (kind, text) in enumerate(blocks(name)):
        text = text.strip()
        if kind == "bash":
            text = "\n".join("!" + line for line in text.replace("\\\n", " ").splitlines())
        make = v4.new_code_cell if kind else v4.new_markdown_cell
        # the same page gives the same file
        cells.append(make(text, id=f"{name}-{i}"))
    return v4.new_notebook(cells=cells)
