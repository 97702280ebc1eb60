"""Names of files that are not UTF-8, which Python holds with halves of pairs (surrogateescape):
kept in files that allow UTF-8 alone, and given to libraries that take nothing else."""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

# before a text of a header that is no UTF-8 and therefore written as JSON within JSON
_ESCAPED = "json:"
Name = TypeVar("Name", str, Path)


def is_utf8(text: str) -> bool:
    """Whether a text holds no halves of pairs."""
    return text.isascii() or text == text.encode("utf-8", "replace").decode()


def spoken(text: str) -> str:
    """The text as tokenizers take it, with U+FFFD for each half of a pair."""
    return text if is_utf8(text) else re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)


def escaped(text: str) -> str:
    """A text as it can stand in the header of a safetensors file, whose library refuses halves of
    pairs; `unescaped` gives it back."""
    if is_utf8(text) and not text.startswith(_ESCAPED):
        return text
    return _ESCAPED + json.dumps(text)


def unescaped(text: str) -> str:
    """What `escaped` was given; other texts are as they are."""
    if not text.startswith(_ESCAPED + '"'):
        return text
    try:
        found = json.loads(text.removeprefix(_ESCAPED))
    except (ValueError, RecursionError):
        return text
    return found if isinstance(found, str) else text


@contextlib.contextmanager
def utf8_path(path: Name) -> Iterator[Name]:
    """The path of a file, or where that is not UTF-8 one of a link to it with the same suffix.

    Libraries written in Rust, safetensors among them, open no other.
    """
    if is_utf8(str(path)):
        yield path
        return
    kind = type(path)
    with tempfile.TemporaryDirectory(prefix="clipsteer-") as folder:
        link = Path(folder) / f"file{Path(path).suffix}"
        link.symlink_to(Path(path).absolute())
        try:
            yield kind(link)
        except Exception as error:
            # the caller knows the file by its own name
            error.args = tuple(
                part.replace(str(link), str(path)) if isinstance(part, str) else part
                for part in error.args
            )
            raise
