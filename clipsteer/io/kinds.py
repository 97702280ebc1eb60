"""Formats of this package: files that say what they are, and readers that hold them to it.

A kind is one safetensors file, whose header has format, version and further values as text; or a
folder with a file of tensors and a file of JSON, which then has format, version and values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from clipsteer.io.doors import door
from clipsteer.io.files import (
    FileFormatError,
    InPieces,
    json_object,
    read_json,
    read_safetensors,
    read_safetensors_header,
    refuse_nan,
    write_json,
    write_safetensors,
)


class Kind(NamedTuple):
    """A format: what its files are called inside, and what they are called to a reader."""

    format: str  # "clipsteer-conceptor"
    version: int
    what: str  # "a conceptor"
    tensors: str = ""  # names of the two files, where it is a folder
    values: str = ""

    @property
    def head(self) -> dict[str, Any]:
        """What every file of this kind begins with."""
        return {"format": self.format, "format_version": self.version}

    def check(self, path: Path, found: Mapping[str, Any]) -> None:
        """Raise FileFormatError where ``found``, read from ``path``, is of another kind."""
        expected = self.head if self.values else _as_text(self.head)
        if all(found.get(name) == value for name, value in expected.items()):
            return
        raise FileFormatError(
            f"{path}: not {self.what} of format {self.format!r}, but {found.get('format')!r:.40}, "
            f"format_version {found.get('format_version')!r:.40}, this reads {self.version}"
        )


class Found(NamedTuple):
    """What a file of a kind holds; of one file the values are text, of a folder JSON."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


def _as_text(values: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: value if isinstance(value, str) else json.dumps(value, allow_nan=False)
        for name, value in values.items()
    }


def write_kind(
    path: str | Path,
    kind: Kind,
    tensors: Mapping[str, Tensor | InPieces],
    values: Mapping[str, Any] | None = None,
    *,
    texts: Mapping[str, str] | None = None,
) -> Path:
    """Write a file, or a folder, of a kind; each file in one atomic step. Returns its path.

    Args:
        path: the file or the folder; folders that are missing are made.
        tensors: dense, of any device and layout.
        values: JSON-able facts beside format and version.
        texts: what else goes into the header of the tensors' file.

    Raises:
        ValueError, TypeError: values that are not JSON, before a file is touched. OSError.
    """
    path = Path(path)
    values = {**kind.head, **(values or {})}
    texts = dict(texts or {})
    written = _as_text(values)
    if not kind.values:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(path, tensors, {**texts, **written})
        return path
    path.mkdir(parents=True, exist_ok=True)
    write_safetensors(path / kind.tensors, tensors, texts)
    write_json(path / kind.values, values)
    return path


@door
def read_kind(path: str | Path, kind: Kind, *, allow_nan: bool = True) -> Found:
    """Read what ``write_kind`` wrote.

    Raises:
        FileNotFoundError. FileFormatError: a damaged file, another format or version, or NaN or an
            infinity where ``allow_nan`` is False.
    """
    path = Path(path)
    if kind.values:
        values = json_object(path / kind.values, read_json(path / kind.values))
        kind.check(path / kind.values, values)
        path /= kind.tensors
    else:
        values = dict(read_safetensors_header(path).metadata)
        kind.check(path, values)
    tensors = read_safetensors(path)
    if not allow_nan:
        refuse_nan(path, tensors, infinity=True)
    return Found(tensors, values)
