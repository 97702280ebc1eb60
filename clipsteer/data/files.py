"""Data sets by name: the bundled drawings, folders of images, caption tables, tar shards.

``open_dataset`` takes any of them. Files and folders whose names begin with a dot
(``.ipynb_checkpoints``, ``._a.jpg``, ``.DS_Store``) are passed over.
"""

from __future__ import annotations

import csv
import difflib
import glob
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clipsteer.data.dataset import (
    LAYOUTS,
    ImageDataset,
    _Reader,
    labelled,
)
from clipsteer.data.emoji import EmojiStyles
from clipsteer.io.files import FileFormatError
from clipsteer.io.images import IMAGE_SUFFIXES, read_image

if TYPE_CHECKING:
    from PIL.Image import Image

Targets = Literal["label", "category", "subcategory", "caption", "captions"]

_IMAGE_KEYS = ("image", "filepath", "file_name", "filename", "path", "file", "image_path")
_CAPTION_KEYS = ("caption", "text", "title", "label")
_TABLES = frozenset({".csv", ".tsv", ".jsonl", ".ndjson"})
_EMOJI = "emoji"
# how `clipsteer finetune` and `wise-ft` once called the drawings of Classify-30
_CLASSIFY30 = "classify30"


def open_dataset(
    spec: str | Path, *, emoji: str = "all", targets: Targets | None = None
) -> ImageDataset:
    """Images by name: what every ``--data`` and every function that takes a data set goes through.

    Args:
        spec: one of
            "emoji", "emoji:STYLE", "emoji:STYLE:PART": the bundled drawings. STYLE is noto, fluent,
            twemoji, trained, held-out or all; PART is train or test (of Classify-30), seen or
            unseen (by EmojiCLIP);
            a folder of class folders, or a flat folder of images, which have no classes;
            a .csv, .tsv or .jsonl table of image paths and captions;
            .tar shards (WebDataset): a file, a glob, or a brace range ("data-{0000..0099}.tar").
        emoji: the STYLE or STYLE:PART that a bare "emoji" stands for.
        targets: of drawings alone: "label", "category" or "subcategory" are classes, "caption" is
            the label as a caption, "captions" all that is said of a drawing, a sample each. By
            default the subcategory for train and test (the 30 classes), and the label otherwise.

    Raises:
        ValueError: nothing is there, or it is none of these; an unknown style or part.
        FileFormatError: a damaged table or shard.
    """
    text = str(spec)
    if is_emoji(text):
        return _drawings(text, emoji, targets)
    path = Path(text)
    if path.is_dir():
        return image_folder(path)
    if text.endswith(".tar"):
        return shards(text)
    if path.suffix.lower() in _TABLES:
        return captions(path)
    state = "is none of them" if path.exists() else "is not there"
    raise ValueError(f"open_dataset: {text!r} {state}; expected {_kinds(path)}")


def is_emoji(spec: str | Path | None) -> bool:
    """Whether a name means the bundled drawings: "emoji", "emoji:STYLE" or "emoji:STYLE:PART"."""
    return str(spec).partition(":")[0] in (_EMOJI, _CLASSIFY30)


def emoji_parts(spec: str, default: str = "all") -> tuple[str, str | None]:
    """(style, part or None) of "emoji[:STYLE[:PART]]"; ``default`` is what a bare "emoji" means.

    Raises ValueError for a name of more parts.
    """
    kind, *rest = spec.split(":")
    if kind == _CLASSIFY30 and (len(rest) != 2 or rest[1] not in ("train", "test")):
        raise ValueError(f"expected classify30:STYLE:train or classify30:STYLE:test, got {spec!r}")
    rest = rest or default.split(":")
    if len(rest) > 2:
        raise ValueError(f"expected emoji, emoji:STYLE or emoji:STYLE:PART, got {spec!r}")
    return rest[0], rest[1] if len(rest) == 2 else None


def _drawings(spec: str, default: str, targets: Targets | None) -> ImageDataset:
    style, part = emoji_parts(spec, default)
    emoji = EmojiStyles()
    pairs = emoji.drawings(style, part)
    if targets == "caption":
        return emoji.captioned(pairs, "label")
    if targets == "captions":
        return emoji.captioned(pairs, "noisy")
    if targets is None:
        targets = "subcategory" if part in ("train", "test") else "label"
    return emoji.dataset(pairs, targets)


def _kinds(path: Path) -> str:
    """What data sets there are, and what is there under a similar name."""
    names = [_EMOJI]
    if path.parent.is_dir():
        names += [other.name for other in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, names, n=3)
    hint = f" (did you mean {', '.join(near)}?)" if near else ""
    return f"{LAYOUTS}, or a flat folder of images{hint}"


def image_folder(path: str | Path) -> ImageDataset:
    """A folder of class folders, as torchvision's ImageFolder, or a flat folder of images.

    Images of a flat folder have neither classes nor captions (``classes`` is None). Where there are
    class folders, images that lie beside them form one more class, of the folder's name. Hidden
    files and folders are passed over.

    Raises:
        ValueError: not a folder, or no image in it.
    """
    root = Path(path)
    if not root.is_dir():
        raise ValueError(f"image_folder: path must be a folder, got {path}")
    loose = _images(root.iterdir(), root)
    groups = {
        folder.name: _images(folder.rglob("*"), root)
        for folder in sorted(root.iterdir())
        if folder.is_dir() and not _hidden(folder.name)
    }
    groups = {name: files for name, files in groups.items() if files}
    if not groups and not loose:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise ValueError(f"image_folder: no image ({suffixes}) under {path}")
    if not groups:
        return ImageDataset(_Reader(read_image, [(file,) for file in loose]), [None] * len(loose))
    if loose:
        own = root.resolve().name
        groups[own] = groups.get(own, []) + loose
    classes = sorted(groups)
    files = [(file,) for name in classes for file in groups[name]]
    targets = [rank for rank, name in enumerate(classes) for _ in groups[name]]
    return ImageDataset(_Reader(read_image, files), targets, classes)


def class_folder(path: str | Path, what: str) -> ImageDataset:
    """`image_folder` of a folder that must have class folders; ``what`` begins the message."""
    return labelled(image_folder(path), f"{what}: {path}")


def _hidden(name: str) -> bool:
    """Whether a file or a folder above it is hidden; name: relative, with slashes."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def _images(paths: Iterable[Path], root: Path) -> list[Path]:
    """Image files among paths under root, sorted, without hidden ones."""
    return sorted(
        path
        for path in paths
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not _hidden(path.relative_to(root).as_posix())
        and path.is_file()
    )


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
    files: list[tuple[Path]] = []
    texts: list[str] = []
    for line, row in rows:
        image = row.get(image_key)
        text = row.get(caption_key)
        if not isinstance(image, str) or not isinstance(text, str):
            raise FileFormatError(
                f"{path}, line {line}: {image_key!r} and {caption_key!r} must be strings, got {row}"
            )
        files.append((root / image,))
        texts.append(text)
    return ImageDataset(_Reader(read_image, files), texts)


def _table(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) pairs of a caption table."""
    suffix = path.suffix.lower()
    if suffix not in _TABLES:
        raise ValueError(f"captions: expected a .csv, .tsv or .jsonl file, got {path}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if suffix in (".csv", ".tsv"):
                reader = csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ",")
                for row in reader:
                    yield reader.line_num, row
            else:
                yield from _objects(path, file)
    except (UnicodeDecodeError, csv.Error) as error:
        raise FileFormatError(f"{path}: {error}") from error


def _objects(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) pairs of a .jsonl file; empty lines are passed over."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise FileFormatError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise FileFormatError(f"{path}, line {number}: expected an object, got {kind}")
        yield number, row


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
    places: list[tuple[Path, str, int, int]] = []
    texts: list[str] = []
    for text in _braces(str(pattern)):
        # a name that matches nothing is looked for as it stands, and missed by name
        for file in map(Path, sorted(glob.glob(text)) or [text]):
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
    before = text[: found.start()]
    after = text[found.end() :]
    numbers = (str(n).zfill(len(low)) for n in range(int(low), int(high) + 1))
    return [part for number in numbers for part in _braces(before + number + after)]


Place = tuple[str, int, int]  # a member's name, offset and size


def _members(file: Path) -> list[tuple[Place, str]]:
    """(image, caption) of every complete sample of a shard."""
    images: dict[str, Place] = {}
    texts: dict[str, str] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                if not member.isfile() or _hidden(member.name):
                    continue
                # WebDataset's rule: the key ends at the first dot of the base name
                folder, slash, base = member.name.rpartition("/")
                stem, dot, suffix = base.partition(".")
                suffix = suffix.lower()
                key = folder + slash + stem
                if dot + suffix in IMAGE_SUFFIXES:
                    images[key] = (member.name, member.offset_data, member.size)
                elif suffix == "txt" or (suffix == "json" and key not in texts):
                    content = tar.extractfile(member)
                    assert content is not None  # it is a file
                    text = _caption(content.read().decode("utf-8"), suffix)
                    if text is not None:
                        texts[key] = text
    except (tarfile.TarError, UnicodeDecodeError, json.JSONDecodeError, TypeError) as error:
        raise FileFormatError(f"{file}: cannot be read as a shard: {error}") from error
    return [(place, texts[key]) for key, place in images.items() if key in texts]


def _caption(content: str, suffix: str) -> str | None:
    """The caption in a member KEY.txt or KEY.json, if there is one."""
    if suffix == "txt":
        return content.strip()
    row = json.loads(content)
    found = next((row[key] for key in _CAPTION_KEYS if key in row), None)
    return found.strip() if isinstance(found, str) else None


def _read_member(file: Path, name: str, offset: int, size: int) -> Image:
    with file.open("rb") as handle:
        handle.seek(offset)
        return read_image(handle.read(size), f"{file}:{name}")
