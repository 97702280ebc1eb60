"""Files whose damage is seen: JSON that holds its own checksum, and that of the file beside it.

A checksum finds damage, not intent: who changes a file can also write its checksum anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from clipsteer.io.files import FileFormatError, json_object, read_json, write_json

CHECKSUM = "checksum"


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; 1.3 GB a second on a CPU with SHA instructions."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        # Python 3.10 has no hashlib.file_digest
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def file_facts(path: Path) -> dict[str, Any]:
    """What `check_file` compares a file with: its size and its SHA-256."""
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def check_file(path: Path, facts: Mapping[str, Any]) -> None:
    """Raise FileFormatError where a file is not the one that `facts` were written of."""
    if path.stat().st_size != facts["bytes"] or file_digest(path) != facts["sha256"]:
        raise FileFormatError(f"{path}: truncated or damaged")


def checksum_of(values: Mapping[str, Any]) -> str:
    """SHA-256 of an object, however its JSON is laid out and its names are ordered."""
    # as it is read back: keys are text then
    read = json.loads(json.dumps(values, allow_nan=False))
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()


def write_checked(path: str | Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object with a checksum of all that is in it; raises as `write_json` does."""
    write_json(path, {**values, CHECKSUM: checksum_of(values)})


def read_checked(path: str | Path, older: Collection[str]) -> tuple[dict[str, Any], bool]:
    """What `write_checked` wrote, and whether it has a checksum.

    Args:
        older: the names in a file of a version that wrote no checksum, which is taken as it is.

    Raises FileFormatError: damaged, or neither of the two. FileNotFoundError.
    """
    path = Path(path)
    values = json_object(path, read_json(path))
    if CHECKSUM not in values:
        # a damaged name could hide the checksum
        if values.keys() != set(older):
            expected = ", ".join(older)
            raise FileFormatError(f"{path}: damaged: neither a checksum nor exactly {expected}")
        return values, False
    stated = values.pop(CHECKSUM)
    try:
        is_whole = stated == checksum_of(values)
    except (ValueError, RecursionError):
        is_whole = False  # NaN, which JSON has not
    if not is_whole:
        raise FileFormatError(f"{path}: damaged: its checksum is of other contents")
    return values, True
