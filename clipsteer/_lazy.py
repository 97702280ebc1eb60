"""Packages that list their public names once and load each at first use."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

Names = dict[str, tuple[str, str | None]]  # name -> its module, and what it is called there


def _imported(package: str, block: ast.If) -> Names:
    found: Names = {}
    for line in block.body:
        assert isinstance(line, ast.ImportFrom)
        assert line.module is not None
        for alias in line.names:
            is_module = line.module == package
            name = alias.asname or alias.name
            found[name] = (
                (f"{package}.{alias.name}", None) if is_module else (line.module, alias.name)
            )
    return found


def attach(
    package: str, file: str
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a package.

    The names are those that the ``if TYPE_CHECKING:`` blocks of its ``__init__.py`` import, so
    that type checkers, editors and Python read one list; the source has to be there for that.
    ``__all__`` is the first block; names of further blocks can be imported, and are listed nowhere.
    """
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    blocks = [
        _imported(package, node)
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    found = {name: place for block in blocks for name, place in block.items()}

    def get(name: str) -> Any:
        if name not in found:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, attribute = found[name]
        loaded = importlib.import_module(module)
        return loaded if attribute is None else getattr(loaded, attribute)

    public = sorted(blocks[0])
    return get, lambda: public, public
