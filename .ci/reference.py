"""The API reference, from the docstrings.

    pip install '.[docs]'
    python .ci/reference.py [FOLDER]

Writes HTML pages of the guides and of every public module (default: into site/, which git ignores).
Fails on what pdoc warns of, and on a name between double backquotes, or in a guide, that is said to
be clipsteer's and is not.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pdoc

import clipsteer
from clipsteer import guide
from clipsteer.report.page import Html, Page

# not for others to call: the command line, kernels behind the ops, what tests and validate read
LEFT_OUT = re.compile(r".*\._|clipsteer\.(cli|demo|kernels|assets|ops\.specs)(\.|$)")

# integrations of libraries that are not installed
ABSENT: set[str] = set()


def modules() -> list[str]:
    """The public modules."""
    walk = pkgutil.walk_packages(clipsteer.__path__, "clipsteer.")
    names = sorted(m.name for m in walk if not LEFT_OUT.match(m.name))
    return ["clipsteer", *(name for name in names if is_here(name))]


def is_here(name: str) -> bool:
    """Whether the library that an integration is for is installed."""
    if name.startswith("clipsteer.integrations."):
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(f"{name} is left out: {error}")
            ABSENT.add(name)
            return False
    return True


def load(name: str) -> None:
    """Import a module with all of its public names: pdoc sees those alone that are there."""
    module = importlib.import_module(name)
    public = getattr(module, "__all__", ())
    there = [each for each in public if f"{name}.{each}" not in ABSENT]
    if len(there) < len(public):
        module.__all__ = there
    for each in there:
        setattr(module, each, getattr(module, each))
    for value in vars(module).values():
        if isinstance(value, type) and hasattr(value, "_fields"):
            describe(value)


def describe(record: type[Any]) -> None:
    """Give a named tuple its types, and its fields the comments that stand beside them."""
    # it keeps the names of types, and not the module where those mean something
    record.__new__.__annotations__ = get_type_hints(record)
    record.__new__.__doc__ = None
    beside = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(record), re.MULTILINE))
    for field in record._fields:
        getattr(record, field).__doc__ = beside.get(field, "")


def docstrings(name: str) -> Iterator[tuple[str, str]]:
    """(where, text) of every docstring in a module."""
    tree = ast.parse(Path(importlib.import_module(name).__file__).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            yield f"{name}.{getattr(node, 'name', '')}".rstrip("."), ast.get_docstring(node) or ""


def unresolved(text: str) -> list[str]:
    """Names of clipsteer in ``double backquotes`` that lead nowhere."""
    broken = []
    for name in re.findall(r"``((?:clipsteer|ops)(?:\.\w+)+)(?:\(.*?\))?``", text):
        try:
            pkgutil.resolve_name(name if name.startswith("clipsteer") else f"clipsteer.{name}")
        except (ImportError, AttributeError):
            broken.append(name)
    return broken


def broken(names: list[str]) -> list[str]:
    """``where: what`` of every name, in these modules and the guides, that leads nowhere."""
    spoken = [each for name in names for each in docstrings(name)]
    for name in guide.NAMES:
        text = guide.page(name).replace("```", "").replace("`", "``")
        spoken.append((f"guide {name}", text))
    return [f"{where}: ``{name}``" for where, text in spoken for name in unresolved(text)]


def main() -> None:
    """Write the pages."""
    warnings.filterwarnings("error", module="pdoc")
    # packages bring some of their modules along
    warnings.filterwarnings("ignore", "The module specification", module="pdoc")
    names = modules()
    for name in names:
        load(name)
    if lost := broken(names):
        sys.exit("names that lead nowhere:\n" + "\n".join(lost))
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "site")
    pdoc.render.configure(docformat="google", footer_text=f"clipsteer {clipsteer.__version__}")
    pdoc.pdoc(*names, output_directory=folder)
    for name in guide.NAMES:
        # the page's own heading is its first line
        _, _, text = guide.page(name).partition("\n")
        made = Page(guide.title(name), footer=f"clipsteer {clipsteer.__version__}")
        words = pdoc.render_helpers.to_html(text)
        made.lead(Html(f'<div class="words">{words}</div>'))
        made.write(folder / "guide" / f"{name}.html")
    print(f"{len(names)} modules: {folder / 'clipsteer.html'}")
    print(f"{len(guide.NAMES)} guides: {folder / 'guide'}")


if __name__ == "__main__":
    main()
