"""The version, and which build of it this is."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


@functools.cache
def build() -> dict[str, Any]:
    """What ``setup.py`` wrote down of the native libraries: ``built`` and ``left_out``, by file."""
    try:
        return json.loads(Path(__file__).with_name("_build.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"built": {}, "left_out": {}}


def installed() -> str:
    """From where this package is imported: a wheel by its tag, or a source folder."""
    from importlib.metadata import distributions

    folder = str(Path(__file__).resolve().parent.parent)
    for found in distributions(name="clipsteer", path=[folder]):
        lines = (found.read_text("WHEEL") or "").splitlines()
        tags = [line.removeprefix("Tag: ") for line in lines if line.startswith("Tag: ")]
        if tags:
            return f"wheel {' '.join(tags)}"
    return f"source in {folder}"


def natives() -> dict[str, str]:
    """The native libraries by file: what each was compiled by and for."""
    found = {}
    for name, facts in build()["built"].items():
        code = ", ".join(facts["code"])
        found[name] = f"{code}; {facts['compiler']}, headers of torch {facts['torch']}"
    return found


def left_out(name: str) -> str:
    """Why the build left a native library out; empty where that is not known."""
    return build()["left_out"].get(name, "")
