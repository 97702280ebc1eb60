"""The files of an activation store: its description, shards, and an index file of each shard.

All JSON holds a checksum of itself, an index that of its shard. Stores of versions that kept none
are read as they are.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipsteer.io.checked import check_file, file_facts, read_checked, write_checked
from clipsteer.io.files import FileFormatError, read_safetensors, write_safetensors
from clipsteer.io.layout import Spec, check_layout
from clipsteer.training.settings import other_data

logger = logging.getLogger(__name__)

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
PROVENANCE = ("clip_model", "pretrained", "hook_point", "tokens")
SIZES = ("d_in", "tokens_per_image", "images", "images_per_shard", "shards")
DESCRIPTION = "store.json"
# what descriptions and indices of versions without checksums hold
_OLDER = (*PROVENANCE, "dtype", *SIZES)
_OLDER_INDEX = ("rows", "images", "bytes")
_NAME = re.compile(r"shard-(\d{6,12})\.json", re.ASCII)


def read_description(directory: Path) -> dict[str, Any]:
    """What a store says of itself. Raises FileFormatError, FileNotFoundError."""
    path = directory / DESCRIPTION
    found, _ = read_checked(path, _OLDER)
    wrong = [name for name in SIZES if type(found.get(name)) is not int or found[name] < 1]
    if found.get("dtype") not in DTYPES:
        wrong.append("dtype")
    if wrong:
        given = ", ".join(f"{name} is {found.get(name)!r:.40}" for name in wrong)
        raise FileFormatError(f"{path}: not the description of an activation store: {given}")
    return found


def begin(directory: Path, settings: dict[str, Any]) -> None:
    """Write the description of a store, or find it there; of two processes both may write it.

    Raises ValueError where the folder holds another harvest, FileFormatError.
    """
    path = directory / DESCRIPTION
    if not path.exists():
        write_checked(path, settings)
        return
    found = read_description(directory)
    seen = {name: value for name, value in settings.items() if name not in _OLDER}
    unknown = sorted(seen.keys() - found.keys())
    if "setup" in unknown:
        logger.warning("%s does not say how its images were preprocessed", path)
    if unknown:
        logger.warning(
            "%s: of a version that noted no %s; that they are the same is not checked",
            path,
            ", ".join(unknown),
        )
    compared = [*_OLDER, "setup"]
    if "setup" in unknown and "quick_gelu" not in settings["setup"]:
        compared.remove("setup")  # an older version built every model without
    differing = [
        f"{key}: {found.get(key)!r:.80} there, {settings.get(key)!r:.80} asked for"
        for key in compared
        if found.get(key) != settings.get(key)
    ]
    known = {name: found[name] for name in seen if name in found}
    other = other_data(known, {name: seen[name] for name in known})
    if other is not None:
        differing.append(other)
    if differing:
        raise ValueError(
            f"{directory} holds another harvest ({'; '.join(differing)}); choose another directory"
        )


def shard_path(directory: Path, index: int) -> Path:
    """Where a shard lies; its index has the suffix .json."""
    return directory / f"shard-{index:06d}.safetensors"


def shards_of(directory: Path, total: int) -> list[Path]:
    """The shards that are done, in their order: an index file is written last."""
    numbers = []
    for path in directory.iterdir():
        match = _NAME.fullmatch(path.name)
        if (
            match
            and int(match[1]) < total
            and shard_path(directory, int(match[1])).stem == path.stem
        ):
            numbers.append(int(match[1]))
    return [shard_path(directory, number) for number in sorted(numbers)]


def write_shard(path: Path, rows: Tensor, images: range) -> None:
    """A shard and then its index."""
    write_safetensors(path, {"activations": rows})
    index = {"rows": len(rows), "images": [images.start, images.stop], **file_facts(path)}
    write_checked(path.with_suffix(".json"), index)


def read_index(path: Path) -> dict[str, Any]:
    """The index of a shard, which is of the size that it tells. Raises FileFormatError,
    FileNotFoundError."""
    index = path.with_suffix(".json")
    found, is_checked = read_checked(index, _OLDER_INDEX)
    rows = found.get("rows")
    if type(rows) is not int or rows < 1 or type(found.get("bytes")) is not int:
        raise FileFormatError(f"{index}: not the index of a shard")
    if is_checked and not isinstance(found.get("sha256"), str):
        raise FileFormatError(f"{index}: lacks the checksum of the shard")
    size = path.stat().st_size if path.is_file() else None
    if size != found["bytes"]:
        is_there = "not there" if size is None else f"of {size} bytes"
        raise FileFormatError(f"{path}: {is_there}, its index tells of {found['bytes']}")
    return found


def is_done(path: Path) -> bool:
    """Whether a shard and its index are there, the shard of the size that the index tells."""
    try:
        read_index(path)
    except (OSError, FileFormatError):
        return False
    return True


def is_whole(directory: Path) -> bool:
    """Whether a harvest is there, and all of its shards."""
    if not (directory / DESCRIPTION).exists():
        return False
    total = read_description(directory)["shards"]
    return all(is_done(shard_path(directory, index)) for index in range(total))


def check_shard(path: Path, index: dict[str, Any]) -> None:
    """Raise FileFormatError where a shard is not the one that its index was written of."""
    try:
        check_file(path, index)
    except FileFormatError as error:
        remedy = f"remove it and {path.stem}.json, and harvest again"
        raise FileFormatError(f"{error}; {remedy}") from None


def read_rows(path: Path, dtype: str, rows: int, d_in: int) -> Tensor:
    """The rows (n, d) of a shard. Raises FileFormatError."""
    found = read_safetensors(path)
    check_layout(path, found, {"activations": Spec(DTYPES[dtype], (rows, d_in))})
    return found["activations"]
