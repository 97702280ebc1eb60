"""``clipsteer guide``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from clipsteer.cli.arguments import _text


def add_parser(commands: Any, add: Any) -> None:
    """Add the command; ``add(parent, name, function, summary, examples, options)`` makes it."""
    add(
        commands,
        "guide",
        _guide,
        "list and print the guides, or write them as notebooks",
        """
examples:
  what there is, and one of them:
    clipsteer guide
    clipsteer guide sae
  all of them as notebooks:
    clipsteer guide --notebooks notebooks/
""",
        _guide_options,
    )


def _guide_options(p: argparse.ArgumentParser) -> None:
    from clipsteer.guide import NAMES

    p.add_argument("name", nargs="?", choices=NAMES, help="print this one (default: list them)")
    p.add_argument(
        "--notebooks", type=Path, metavar="DIR", help="write it, or all of them, as .ipynb"
    )


def _guide(args: argparse.Namespace) -> int:
    from clipsteer import guide

    names = guide.NAMES if args.name is None else (args.name,)
    if args.notebooks is not None:
        from clipsteer.report.page import write_whole

        for name in names:
            # nbformat is imported with the first
            notebook = guide.notebook(name)
            import nbformat

            text = nbformat.writes(notebook) + "\n"
            sys.stdout.write(f"{write_whole(args.notebooks / f'{name}.ipynb', text.encode())}\n")
    elif args.name is None:
        _text(*(f"{name:<10} {guide.title(name)}" for name in names))
    else:
        _text(guide.page(args.name).rstrip("\n"))
    return 0
