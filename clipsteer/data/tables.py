"""Caption tables: images and what is said of them in .csv, .tsv and .jsonl files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from clipsteer.data.dataset import ImageDataset, _Reader
from clipsteer.io.files import FileFormatError
from clipsteer.io.images import read_image

TABLES = frozenset({".csv", ".tsv", ".jsonl", ".ndjson"})
# characters; the csv module's own limit of a field
MAX_CAPTION = 131_072
# characters of a line of .jsonl, which may hold more than the caption
_MAX_LINE = 16 << 20

_IMAGE_KEYS = ("image", "filepath", "file_name", "filename", "path", "file", "image_path")
CAPTION_KEYS = ("caption", "text", "title", "label")


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
        FileFormatError: no such column, no row, a line that is not what it should be, or a caption
            of more than 131,072 characters.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"captions: no such file: {path}")
    root = Path(image_root) if image_root is not None else path.parent
    files: list[tuple[Path]] = []
    texts: list[str] = []
    for line, row in _table(path):
        if not files:
            image_key = _column(path, row, image_key, _IMAGE_KEYS)
            caption_key = _column(path, row, caption_key, CAPTION_KEYS)
        image = row.get(image_key)
        text = row.get(caption_key)
        if not isinstance(image, str) or not isinstance(text, str):
            got = f"{row}"
            got = got if len(got) <= 300 else f"{got[:300]}…"
            raise FileFormatError(
                f"{path}, line {line}: {image_key!r} and {caption_key!r} must be strings, got {got}"
            )
        files.append((root / image,))
        texts.append(checked_caption(text, f"{path}, line {line}"))
    if not files:
        raise FileFormatError(f"{path}: no rows")
    return ImageDataset(_Reader(read_image, files), texts)


def checked_caption(text: str, where: str) -> str:
    """The caption. Raises FileFormatError, with where it stands in front, for one that is too long
    or that no text file could hold."""
    if len(text) > MAX_CAPTION:
        raise FileFormatError(
            f"{where}: a caption of {len(text):,} characters; at most {MAX_CAPTION:,} are read"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a pair, which JSON can name
        raise FileFormatError(f"{where}: the caption is no Unicode text: {error}") from None
    return text


def _table(path: Path) -> Iterator[tuple[int, dict[Any, Any]]]:
    """(line number, row) pairs of a caption table."""
    suffix = path.suffix.lower()
    if suffix not in TABLES:
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


def _objects(path: Path, file: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) pairs of a .jsonl file; empty lines are passed over."""
    number = 0
    while line := file.readline(_MAX_LINE):
        number += 1
        if len(line) == _MAX_LINE:
            raise FileFormatError(
                f"{path}, line {number}: longer than {_MAX_LINE:,} characters, all that are read"
            )
        if not line.strip():
            continue
        row = parsed_json(line, f"{path}, line {number}")
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise FileFormatError(f"{path}, line {number}: expected an object, got {kind}")
        yield number, row


def parsed_json(text: str, where: str) -> Any:
    """The value of a JSON text. Raises FileFormatError, with where it stands in front."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{where}: not JSON: {error}") from error


def _column(path: Path, row: dict[Any, Any], wanted: str | None, known: Sequence[str]) -> str:
    for key in [wanted] if wanted is not None else known:
        if key in row:
            return key
    raise FileFormatError(
        f"{path}: expected a column {wanted or ' or '.join(known)}, got {sorted(map(str, row))}"
    )
