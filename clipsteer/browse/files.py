"""The files of a site: its folder, which is nobody else's, and data as scripts.

A page that is opened from disk may load scripts and nothing else, so every piece of data is a
script of one call, ``put(KEY, VALUE)`` of the page's object ``clipsteer``. VALUE is an object, or
the base64 of its zlib-deflated JSON. A file is there as a whole or not at all.
"""

from __future__ import annotations

import base64
import json
import math
import os
import shutil
import zlib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from clipsteer.io.checked import read_checked, write_checked
from clipsteer.io.files import FileFormatError, json_object, read_json
from clipsteer.io.locks import NAME as LOCK

FORMAT = 1
DESCRIPTION = "site.json"
_KIND = "clipsteer-site"
_DIGITS = 4
_DECIMALS = 5


class Folder:
    """Where a site is built.

    Args:
        path: a new or empty folder, or one in which the same site was begun.
        settings: what the site is made of, JSON-able.

    Raises:
        ValueError: the folder holds something else, or another site; nothing in it is touched.
        FileFormatError: a damaged description of a site.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.work = path / ".work"
        self.thumbs = path / "thumbs"
        self.data = path / "data"
        known = {"kind": _KIND, "format": FORMAT, **settings}
        description = path / DESCRIPTION
        if description.exists():
            _check_same(description, known)
        else:
            _check_free(path)
            write_checked(description, known)
        if not self.is_complete:
            for folder in (self.work, self.thumbs, self.data):
                folder.mkdir(exist_ok=True)

    @property
    def is_complete(self) -> bool:
        """Whether the site was built to its end: its page is written last."""
        return is_complete(self.path)

    def finish(self) -> None:
        """Copy the pages, the first one last, and remove what the work has left."""
        shutil.rmtree(self.work, ignore_errors=True)
        pages = files("clipsteer.browse").joinpath("site").iterdir()
        for page in sorted(pages, key=lambda page: (page.name == "index.html", page.name)):
            self.write(self.path / page.name, page.read_bytes())

    def write(self, path: Path, content: bytes) -> None:
        """Replace a file of the site."""
        # one process writes here, and its successor writes what it did not finish
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_bytes(content)
        os.replace(temporary, path)

    def put(self, key: str, value: Any, *, plain: bool = False) -> None:
        """Write a piece of data; ``plain`` as an object that can be read in the file."""
        text = json.dumps(value, allow_nan=False, separators=(",", ":"))
        if not plain:
            packed = zlib.compress(text.encode(), 6)
            text = f'"{base64.b64encode(packed).decode("ascii")}"'
        path = self.data / f"{key}.js"
        path.parent.mkdir(exist_ok=True)
        self.write(path, f'clipsteer.put("{key}",{text});\n'.encode("ascii"))


def check_place(path: Path) -> None:
    """Raise ValueError for a file, where a folder is to be."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"browse: {path} is a file; choose a folder for the site")


def _check_free(path: Path) -> None:
    held = sorted(entry.name for entry in path.iterdir() if entry.name != LOCK)
    if held:
        raise ValueError(
            f"browse: {path} holds something else ({held[0]!r:.80}); choose a new folder for the "
            "site, nothing is removed there"
        )


def is_complete(path: Path) -> bool:
    """Whether a folder holds a site that was built to its end."""
    return (path / DESCRIPTION).is_file() and (path / "index.html").is_file()


def _check_same(description: Path, known: Mapping[str, Any]) -> None:
    try:
        found, _ = read_checked(description, ())
    except FileFormatError:
        # a file of somebody else's may have the name
        if json_object(description, read_json(description)).get("kind") != _KIND:
            raise ValueError(
                f"browse: {description.parent} holds something else ({DESCRIPTION!r}); choose a "
                "new folder for the site"
            ) from None
        raise
    here = json.loads(json.dumps(known))
    differing = sorted(key for key in {*found, *here} if found.get(key) != here.get(key))
    if differing:
        raise ValueError(
            f"browse: {description.parent} holds another site (of another "
            f"{', '.join(differing)}); choose a new folder, or remove it"
        )


def listed(values: Any) -> list[Any]:
    """An array of numbers as JSON takes it: four digits of each, None for what is not finite."""
    array = np.asarray(values)
    if array.dtype.kind in "iub":
        whole: list[Any] = array.tolist()
        return whole
    if array.ndim > 1:
        return [listed(row) for row in array]
    return [number(value) for value in array.tolist()]


def number(value: float) -> float | None:
    """One number as ``listed`` gives it."""
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None


def shares(values: Any) -> Any:
    """Probabilities and their changes, to the fifth decimal place."""
    return np.asarray(values).astype(np.float64).round(_DECIMALS).tolist()
