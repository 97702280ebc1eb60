"""Data sets on disk: folders of images, caption tables, tar shards."""

from __future__ import annotations

import csv
import glob
import json
import re
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipsteer.data.dataset import IMAGE_SUFFIXES, ImageDataset, _Reader, read_image
from clipsteer.io.files import FileFormatError

if TYPE_CHECKING:
    from PIL.Image import Image


_IMAGE_KEYS = ("image", "filepath", "file_name", "filename", "path", "file", "image_path")


_CAPTION_KEYS = ("caption", "text", "title", "label")


def image_folder(path: str | Path) -> ImageDataset:
    """A folder of class folders, as torchvision's ImageFolder; images straight in it form one class
    of its name.

    Raises:
        ValueError: not a folder, or no image in it.
    """
    root = Path(path)
    if not root.is_dir():
        raise ValueError(f"image_folder: path must be a folder, got {path}")
    folders = sorted(p for p in root.iterdir() if p.is_dir())
    groups = {
        p.name: sorted(f for f in p.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
        for p in folders
    }
    groups[root.resolve().name] = groups.get(root.resolve().name, []) + sorted(
        f for f in root.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file()
    )
    groups = {name: files for name, files in groups.items() if files}
    if not groups:
        raise ValueError(
            f"image_folder: no image ({', '.join(sorted(IMAGE_SUFFIXES))}) under {path}"
        )
    classes = sorted(groups)
    files = [(f,) for name in classes for f in groups[name]]
    targets = [i for i, name in enumerate(classes) for _ in groups[name]]
    return ImageDataset(_Reader(read_image, files), targets, classes)


def captions(
    path: str | Path,
    *,
    image_root: str | Path | None = None,
    image_key: str | None = None,
    caption_key: str | None = None,
) -> ImageDataset:
    """Images with captions from a table: .csv or .tsv with a header line, or .jsonl with an object
    a line.

    Args:
        image_root: folder that relative image paths start from; by default the table's.
        image_key, caption_key: columns; by default the first of image, filepath, file_name, … and
            caption, text, ….

    Raises:
        ValueError: no such file, or another suffix.
        FileFormatError: no such column, no row, or a line that is not what it should be.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"captions: no such file: {path}")
    rows = list(_table(path))
    if not rows:
        raise FileFormatError(f"{path}: no rows")
    image_key = _column(path, rows[0][1], image_key, _IMAGE_KEYS)
    caption_key = _column(path, rows[0][1], caption_key, _CAPTION_KEYS)
    root = Path(image_root) if image_root is not None else path.parent
    files, texts = [], []
    for line, row in rows:
        image, text = row.get(image_key), row.get(caption_key)
        if not isinstance(image, str) or not isinstance(text, str):
            raise FileFormatError(
                f"{path}, line {line}: {image_key!r} and {caption_key!r} must be strings, got {row}"
            )
        files.append((root / image,))
        texts.append(text)
    return ImageDataset(_Reader(read_image, files), texts)


def _table(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    """(line number, row) pairs of a caption table."""
    suffix = path.suffix.lower()
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if suffix in (".csv", ".tsv"):
                reader = csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ",")
                for row in reader:
                    yield reader.line_num, row
            elif suffix in (".jsonl", ".ndjson"):
                for number, line in enumerate(file, 1):
                    if not line.strip():
                        continue
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise FileFormatError(
                            f"{path}, line {number}: expected an object, got {type(row).__name__}"
                        )
                    yield number, row
            else:
                raise ValueError(f"captions: expected a .csv, .tsv or .jsonl file, got {path}")
    except json.JSONDecodeError as error:
        raise FileFormatError(f"{path}, line {number}: not JSON: {error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise FileFormatError(f"{path}: {error}") from error


def _column(path: Path, row: dict[str, Any], wanted: str | None, known: Sequence[str]) -> str:
    for key in [wanted] if wanted is not None else known:
        if key in row:
            return key
    raise FileFormatError(
        f"{path}: expected a column {wanted or ' or '.join(known)}, got {sorted(map(str, row))}"
    )


def shards(pattern: str | Path) -> ImageDataset:
    """WebDataset shards: uncompressed .tar files whose members KEY.jpg and KEY.txt (or KEY.json)
    belong together.

    Args:
        pattern: one file, a glob, or a brace range ("data-{0000..0099}.tar").

    The headers are read once; samples are then read by their offset, in any order. A sample without
    a caption is left out.

    Raises:
        ValueError: no such file. FileFormatError: not an uncompressed tar, or no sample with a
            caption in it.
    """
    files = [Path(f) for text in _braces(str(pattern)) for f in (sorted(glob.glob(text)) or [text])]
    places, texts = [], []
    for file in files:
        if not file.is_file():
            raise ValueError(f"shards: no such file: {file}")
        for image, caption in _members(file):
            places.append((file, *image))
            texts.append(caption)
    if not places:
        raise FileFormatError(
            f"{pattern}: no image with a caption (KEY.jpg with KEY.txt or KEY.json)"
        )
    return ImageDataset(_Reader(_read_member, places), texts)


def _braces(text: str) -> list[str]:
    found = re.search(r"\{(\d+)\.\.(\d+)\}", text)
    if not found:
        return [text]
    low, high = found.groups()
    numbers = (str(n).zfill(len(low)) for n in range(int(low), int(high) + 1))
    return [
        part for n in numbers for part in _braces(text[: found.start()] + n + text[found.end() :])
    ]


def _members(file: Path) -> list[tuple[tuple[str, int, int], str]]:
    """((name, offset, size) of the image, caption) of every complete sample of a shard."""
    images, texts = {}, {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                stem, dot, suffix = member.name.rpartition("/")[2].partition(".")
                key, suffix = (
                    member.name[: len(member.name) - len(dot + suffix)],
                    f".{suffix.lower()}",
                )
                if not member.isfile() or not stem:
                    continue
                if suffix in IMAGE_SUFFIXES:
                    images[key] = (member.name, member.offset_data, member.size)
                elif suffix in (".txt", ".json") and (suffix == ".txt" or key not in texts):
                    content = tar.extractfile(member).read().decode("utf-8")
                    if suffix == ".json":
                        row = json.loads(content)
                        content = next((row[k] for k in _CAPTION_KEYS if k in row), None)
                    if isinstance(content, str):
                        texts[key] = content.strip()
    except (tarfile.TarError, UnicodeDecodeError, json.JSONDecodeError, TypeError) as error:
        raise FileFormatError(f"{file}: cannot be read as a shard: {error}") from error
    return [(place, texts[key]) for key, place in images.items() if key in texts]


def _read_member(file: Path, name: str, offset: int, size: int) -> Image:
    with file.open("rb") as handle:
        handle.seek(offset)
        return read_image(handle.read(size), f"{file}:{name}")


def open_dataset(path: str | Path) -> ImageDataset:
    """A folder with `image_folder`, a .tar name or pattern with `shards`, anything else with
    `captions`."""
    if Path(path).is_dir():
        return image_folder(path)
    return shards(path) if str(path).endswith(".tar") else captions(path)
