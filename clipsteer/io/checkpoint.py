"""Atomic, resumable training state: one safetensors file and one JSON file a step, the two newest
kept.

The JSON is written last and holds the size and SHA-256 of the tensors, so a checkpoint either is
whole or is passed over: a crash, a full disk or a damaged file costs at most the steps since the
    checkpoint before.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from clipsteer.io.files import (
    FileFormatError,
    read_json,
    read_safetensors,
    write_json,
    write_safetensors,
)

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{10})\.(json|safetensors)")


class Checkpoint(NamedTuple):
    step: int
    tensors: dict[str, Tensor]
    meta: dict[str, Any]


def _paths(directory: Path, step: int) -> tuple[Path, Path]:
    stem = directory / f"step-{step:010d}"
    return stem.with_suffix(".safetensors"), stem.with_suffix(".json")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _sha256(file)
        )


def _sha256(file: Any) -> str:
    # Python 3.10 has no file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _steps(directory: Path) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    if directory.is_dir():
        for path in directory.iterdir():
            if match := _NAME.fullmatch(path.name):
                found.setdefault(int(match[1]), set()).add(match[2])
    return found


def save_state(
    directory: str | Path,
    step: int,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    *,
    keep: int = 2,
) -> Path:
    """Save `tensors` and JSON-able `meta` as the checkpoint of `step`; then all but the `keep`
    newest up to it go.

    Nothing old is touched before the new checkpoint is on disk. Raises OSError when it cannot be
    written.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    if not 0 <= step < 10**10:
        raise ValueError(f"step must be in [0, 10**10), got {step}")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    data, index = _paths(directory, step)
    write_safetensors(
        data, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    )
    write_json(
        index,
        {"step": step, "bytes": data.stat().st_size, "sha256": _digest(data), "meta": dict(meta)},
    )
    found = _steps(directory)
    older = sorted((s for s, kinds in found.items() if s < step and "json" in kinds), reverse=True)
    # later steps belong to a branch that this save has left
    for gone in found.keys() - {step, *older[: keep - 1]}:
        for path in reversed(_paths(directory, gone)):
            path.unlink(missing_ok=True)
    return index


def load_latest(directory: str | Path, *, device: str = "cpu") -> Checkpoint | None:
    """The newest whole checkpoint of `directory`, or None; damaged ones are logged and passed
    over."""
    directory = Path(directory)
    for step, kinds in sorted(_steps(directory).items(), reverse=True):
        if kinds != {"json", "safetensors"}:
            continue
        try:
            return _load(directory, step, device)
        except (FileFormatError, OSError) as error:
            logger.warning("checkpoint of step %d in %s is passed over: %s", step, directory, error)
    return None


def _load(directory: Path, step: int, device: str) -> Checkpoint:
    data, index = _paths(directory, step)
    head = read_json(index)
    if (
        not isinstance(head, dict)
        or not {"step", "bytes", "sha256", "meta"} <= head.keys()
        or head["step"] != step
    ):
        raise FileFormatError(f"{index}: not a checkpoint index")
    if data.stat().st_size != head["bytes"] or _digest(data) != head["sha256"]:
        raise FileFormatError(f"{data}: truncated or damaged")
    return Checkpoint(
        step, {k: v.to(device) for k, v in read_safetensors(data).items()}, head["meta"]
    )
