"""WebDataset shards: tar files whose members are images and their captions."""

from __future__ import annotations

import glob
import math
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from clipsteer.data.dataset import ImageDataset, _Reader
from clipsteer.data.tables import CAPTION_KEYS, checked_caption, parsed_json
from clipsteer.io.files import MAX_JSON_BYTES, FileFormatError
from clipsteer.io.images import IMAGE_SUFFIXES, read_image

if TYPE_CHECKING:
    from PIL.Image import Image

# names that a brace range may stand for; the largest public sets have a tenth of it
MAX_SHARDS = 10_000_000
_RANGE = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}")


def is_hidden(name: str) -> bool:
    """Whether a file or a folder above it is hidden; name: relative, with slashes."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def shards(pattern: str | Path) -> ImageDataset:
    """WebDataset shards: uncompressed .tar files whose members KEY.jpg and KEY.txt (or KEY.json)
    belong together.

    Args:
        pattern: one file, a glob, or a brace range ("data-{0000..0099}.tar").

    The headers are read once; samples are then read by their offset, in any order. A sample without
    a caption is left out.

    Raises:
        ValueError: no such file; a brace range that is empty or of more than 10,000,000 names.
        FileFormatError: not an uncompressed tar, a damaged one, one with sparse members or with
            texts of more than 16 MiB, or no sample with a caption in it.
    """
    places: list[tuple[Path, str, int, int]] = []
    texts: list[str] = []
    for text in _names(str(pattern)):
        # a name that matches nothing is looked for as it stands, and missed by name
        for file in map(Path, sorted(glob.glob(text)) or [text]):
            if not _is_file(file):
                raise ValueError(f"shards: no such file: {file}")
            for image, caption in _members(file):
                places.append((file, *image))
                texts.append(caption)
    if not places:
        raise FileFormatError(
            f"{pattern}: no image with a caption (KEY.jpg with KEY.txt or KEY.json)"
        )
    return ImageDataset(_Reader(_read_member, places), texts)


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError:  # a name that is longer than any file's
        return False


def _names(pattern: str) -> Iterator[str]:
    """The names that brace ranges stand for, one by one."""
    sizes = [int(high) - int(low) + 1 for low, high in _RANGE.findall(pattern)]
    if sizes and min(sizes) < 1:
        raise ValueError(f"shards: an empty brace range in {pattern}; write {{LOW..HIGH}}")
    if math.prod(sizes) > MAX_SHARDS:
        raise ValueError(
            f"shards: {pattern} stands for {math.prod(sizes):,} names; at most {MAX_SHARDS:,} are "
            "looked for"
        )
    return _expanded(pattern)


def _expanded(text: str) -> Iterator[str]:
    found = _RANGE.search(text)
    if not found:
        yield text
        return
    low, high = found.groups()
    for number in range(int(low), int(high) + 1):
        digits = str(number).zfill(len(low))
        yield from _expanded(text[: found.start()] + digits + text[found.end() :])


Place = tuple[str, int, int]  # a member's name, offset and size


def _members(file: Path) -> list[tuple[Place, str]]:
    """(image, caption) of every complete sample of a shard."""
    images: dict[str, Place] = {}
    texts: dict[str, str] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in _sound(tar, file):
                if not member.isfile() or is_hidden(member.name):
                    continue
                # WebDataset's rule: the key ends at the first dot of the base name
                folder, slash, base = member.name.rpartition("/")
                stem, dot, suffix = base.partition(".")
                suffix = suffix.lower()
                key = folder + slash + stem
                if dot + suffix in IMAGE_SUFFIXES:
                    images[key] = (member.name, member.offset_data, member.size)
                elif suffix == "txt" or (suffix == "json" and key not in texts):
                    text = _caption(tar, member, suffix, f"{file}:{member.name}")
                    if text is not None:
                        texts[key] = text
    except FileFormatError:
        raise
    # tarfile lets ValueError, IndexError, RecursionError and others of damaged headers through
    except Exception as error:
        what = str(error) or type(error).__name__
        raise FileFormatError(f"{file}: cannot be read as a shard: {what}") from error
    return [(place, texts[key]) for key, place in images.items() if key in texts]


def _sound(tar: tarfile.TarFile, file: Path) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file, each of them whole and behind the last.

    tarfile itself goes back where a size is negative, for ever, expands sparse members to sizes
    that the file does not have, and takes a damaged header for the end.
    """
    size = file.stat().st_size
    behind = -1
    for member in tar:
        is_whole = 0 <= member.size <= size - member.offset_data or not member.isreg()
        if member.offset <= behind or member.size < 0 or member.issparse() or not is_whole:
            raise FileFormatError(
                f"{file}: the member {member.name!r} of {member.size} bytes is sparse, or does "
                f"not lie within the {size} bytes of the file"
            )
        behind = member.offset
        yield member
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if any(tar.fileobj.read(tarfile.BLOCKSIZE)):
        raise FileFormatError(f"{file}: a damaged header at byte {tar.offset}")


def _caption(tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, where: str) -> str | None:
    """The caption in a member KEY.txt or KEY.json, if there is one."""
    if member.size > MAX_JSON_BYTES:
        raise FileFormatError(f"{where}: {member.size:,} bytes of text; at most 16 MiB are read")
    file = tar.extractfile(member)
    assert file is not None  # it is a regular one
    content = file.read().decode("utf-8")
    if suffix == "txt":
        return checked_caption(content.strip(), where)
    row = parsed_json(content, where)
    found = None
    if isinstance(row, dict):
        found = next((row[key] for key in CAPTION_KEYS if key in row), None)
    return checked_caption(found.strip(), where) if isinstance(found, str) else None


def _read_member(file: Path, name: str, offset: int, size: int) -> Image:
    with file.open("rb") as handle:
        handle.seek(offset)
        return read_image(handle.read(size), f"{file}:{name}")
