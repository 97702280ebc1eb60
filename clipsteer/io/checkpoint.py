"""Training state that survives crashes: a safetensors and a JSON file a step, the two newest kept.

The JSON is written last and holds the size and SHA-256 of the tensors and a checksum of itself, so
a checkpoint either is whole or is passed over: a crash, a full disk or a damaged file costs at most
the steps since the checkpoint before.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from clipsteer.io.checked import check_file, file_facts, read_checked, write_checked
from clipsteer.io.files import FileFormatError, InPieces, read_safetensors, write_safetensors
from clipsteer.io.locks import remove_abandoned

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{10})\.(json|safetensors)", re.ASCII)
_HEAD = ("step", "bytes", "sha256", "meta")


class Checkpoint(NamedTuple):
    """What ``save_state`` was given, and the files that it is from."""

    step: int
    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    tensors_path: Path = Path()
    meta_path: Path = Path()


def _paths(directory: Path, step: int) -> tuple[Path, Path]:
    stem = directory / f"step-{step:010d}"
    return stem.with_suffix(".safetensors"), stem.with_suffix(".json")


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
    tensors: Mapping[str, Tensor | InPieces],
    meta: Mapping[str, Any],
    *,
    keep: int = 2,
) -> Path:
    """Save `tensors` and JSON-able `meta` as the checkpoint of `step`, and return its JSON file.

    Then all but the `keep` newest up to it go: nothing old is touched before the new checkpoint is
    on disk.

    Raises:
        OSError: it cannot be written. ValueError: keep below 1, a step of more than ten digits.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    if not 0 <= step < 10**10:
        raise ValueError(f"step must be in [0, 10**10), got {step}")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # of any step: a run that was killed while it wrote may never come to that step again
    remove_abandoned(directory / "*", _NAME.pattern)
    data, index = _paths(directory, step)
    write_safetensors(data, tensors)
    write_checked(index, {"step": step, **file_facts(data), "meta": dict(meta)})
    found = _steps(directory)
    older = sorted((s for s, kinds in found.items() if s < step and "json" in kinds), reverse=True)
    # later steps belong to a branch that this save has left
    for gone in found.keys() - {step, *older[: keep - 1]}:
        for path in reversed(_paths(directory, gone)):
            path.unlink(missing_ok=True)
    return index


def load_latest(directory: str | Path, *, device: str = "cpu") -> Checkpoint | None:
    """The newest whole checkpoint of `directory`, its tensors on `device`, or None.

    Damaged ones are logged and passed over.
    """
    directory = Path(directory)
    for step, kinds in sorted(_steps(directory).items(), reverse=True):
        if kinds != {"json", "safetensors"}:
            continue
        try:
            return _load(directory, step, device)
        except (FileFormatError, OSError) as error:
            logger.warning("checkpoint of step %d in %s is passed over: %s", step, directory, error)
    return None


def latest_meta(directory: str | Path) -> dict[str, Any] | None:
    """The ``meta`` of the newest checkpoint of `directory` whose index can be read, or None; its
    tensors are not looked at."""
    directory = Path(directory)
    for step, kinds in sorted(_steps(directory).items(), reverse=True):
        if kinds != {"json", "safetensors"}:
            continue
        try:
            return _head(directory, step)[0]["meta"]
        except (FileFormatError, OSError):
            # load_latest says so
            continue
    return None


def _head(directory: Path, step: int) -> tuple[dict[str, Any], bool]:
    """An index, and whether it had a checksum of itself."""
    index = _paths(directory, step)[1]
    head, is_checked = read_checked(index, _HEAD)
    if head.keys() != set(_HEAD) or head["step"] != step or not isinstance(head["meta"], dict):
        raise FileFormatError(f"{index}: not a checkpoint index")
    return head, is_checked


def _load(directory: Path, step: int, device: str) -> Checkpoint:
    data, index = _paths(directory, step)
    head, is_checked = _head(directory, step)
    check_file(data, head)
    tensors = {name: tensor.to(device) for name, tensor in read_safetensors(data).items()}
    if not is_checked:
        logger.warning("%s: of a version that kept no checksum of it; taken as it is", index)
    return Checkpoint(step, tensors, head["meta"], data, index)
