"""Images with names: the bundled EmojiStyles set, image folders, caption tables and WebDataset shards.

Every data set is map-style and yields (PIL RGB image, target). Transparent images are laid on white.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch.utils.data import Dataset

from clipsteer._files import FileFormatError

if TYPE_CHECKING:
    from PIL.Image import Image

TRAINED_STYLES = ("noto", "fluent")
HELD_OUT_STYLE = "twemoji"
# Pillow's own default, at which it begins to warn of decompression bombs
MAX_PIXELS = 89_478_485
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"})
_EMOJI = Path(__file__).parent / "assets" / "emoji"
_IMAGE_KEYS = ("image", "filepath", "file_name", "filename", "path", "file", "image_path")
_CAPTION_KEYS = ("caption", "text", "title", "label")


@dataclass(frozen=True)
class Concept:
    """What one drawing shows.

    Attributes:
        id: its code points in hexadecimal, joined by hyphens, without variation selectors.
        label, tags: names and keywords in English.
        category, subcategory: Unicode's groups ("animals-nature", "animal-mammal").
        seen: whether EmojiCLIP was trained on it.
        classify30: its part in Classify-30 ("train" or "test"; every test concept is unseen), or None.
    """

    id: str
    label: str
    tags: tuple[str, ...]
    category: str
    subcategory: str
    seen: bool
    classify30: Literal["train", "test"] | None

    def captions(self) -> list[str]:
        """Texts that describe the concept: its label first, then the label with each tag."""
        return [self.label, *(f"{self.label}, {tag}" for tag in self.tags if tag != self.label)]


class ImageDataset(Dataset):
    """(image, target) pairs, the images read when they are asked for.

    Attributes:
        targets: one a sample: an index into `classes`, or a caption where `classes` is None.
        classes: class names or None.
    """

    def __init__(
        self, read: Callable[[int], Image], targets: Sequence[int] | Sequence[str], classes: Sequence[str] | None = None
    ) -> None:
        self._read, self.targets = read, list(targets)
        self.classes = list(classes) if classes is not None else None

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image, int | str]:
        return self._read(range(len(self))[index]), self.targets[index]

    @property
    def sources(self) -> list[Any]:
        """What each sample is read from, its row where that is not known: equal ones are the same image."""
        if not isinstance(self._read, _Reader):
            return list(range(len(self)))
        return [self._read.source(row) for row in range(len(self))]

    def subset(self, rows: Sequence[int]) -> ImageDataset:
        """These rows, in this order, with the same classes."""
        return ImageDataset(_Reader(self._read, [(i,) for i in rows]), [self.targets[i] for i in rows], self.classes)


class _Reader:
    """Reads sample i of a list; a class, not a closure, so that loader processes can be spawned with it."""

    def __init__(self, function: Callable[..., Image], arguments: list[tuple[Any, ...]]) -> None:
        self.function, self.arguments = function, arguments

    def __call__(self, index: int) -> Image:
        return self.function(*self.arguments[index])

    def source(self, index: int) -> tuple[Any, ...]:
        """The arguments of the function that reads the image, behind all subsets."""
        arguments = self.arguments[index]
        return self.function.source(*arguments) if isinstance(self.function, _Reader) else arguments


def read_image(source: str | Path | bytes, name: str | None = None) -> Image:
    """An image file, or its bytes, as RGB, upright, on white.

    Raises:
        FileFormatError: not an image, damaged, or of more than MAX_PIXELS pixels; the message names `name`.
    """
    from PIL import Image, ImageOps

    name = name or (f"{len(source)} bytes" if isinstance(source, bytes) else str(source))
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise FileFormatError(f"{name}: {width} × {height} pixels; at most {MAX_PIXELS:,} are read")
            image = ImageOps.exif_transpose(image)
            if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise FileFormatError(f"{name}: {error}") from error
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise FileFormatError(f"{name}: cannot be read as an image: {error}") from error


@cache
def _labels() -> dict[str, Any]:
    return json.loads((_EMOJI / "labels.json").read_text(encoding="utf-8"))


@cache
def _atlas(style: str) -> np.ndarray:
    head = _labels()
    size, columns, n = head["tile"], head["columns"], len(head["concepts"])
    sheet = np.asarray(read_image(_EMOJI / f"{style}.webp"))
    rows = sheet.shape[0] // size
    tiles = sheet.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)[:n]
    tiles.flags.writeable = False
    return tiles


def _concept(row: dict[str, Any]) -> Concept:
    return Concept(**{**row, "tags": tuple(row["tags"])})


def _emoji_tile(style: str, index: int) -> Image:
    from PIL import Image

    return Image.fromarray(_atlas(style)[index])


class EmojiStyles:
    """857 concrete concepts as 64 px drawings on white in three vendors' styles, with names, tags and one fixed split.

    EmojiCLIP was trained on TRAINED_STYLES (and OpenMoji) of the `seen` concepts; HELD_OUT_STYLE is new to it. The
    four cells trained/held-out style × seen/unseen concept measure the two shifts apart. Fluent lacks eight concepts.
    """

    styles = (*TRAINED_STYLES, HELD_OUT_STYLE)

    @cached_property
    def concepts(self) -> list[Concept]:
        """The 857 drawn concepts; their position is their index everywhere."""
        return [_concept(row) for row in _labels()["concepts"]]

    @cached_property
    def undrawn(self) -> list[Concept]:
        """The 1,049 other concepts of the split (people, symbols, flags …): names and tags without a drawing."""
        return [_concept(row) for row in _labels()["undrawn"]]

    def __len__(self) -> int:
        return len(self.concepts)

    def _style(self, style: str) -> str:
        if style not in self.styles:
            raise ValueError(f"EmojiStyles: style must be one of {self.styles}, got {style!r}")
        return style

    def array(self, style: str) -> np.ndarray:
        """(857, 64, 64, 3) uint8, read-only; a concept that the style lacks is white (see `drawn`)."""
        return _atlas(self._style(style))

    def drawn(self, style: str) -> np.ndarray:
        """(857,) bool: which concepts the style draws."""
        missing = set(_labels()["missing"][self._style(style)])
        return np.array([concept.id not in missing for concept in self.concepts])

    def image(self, style: str, index: int) -> Image:
        """One drawing, RGB, 64 × 64. Raises ValueError where the style lacks the concept."""
        if not self.drawn(style)[index]:
            raise ValueError(f"EmojiStyles: {style} has no drawing of {self.concepts[index].label!r} (index {index})")
        return _emoji_tile(style, index)

    def indices(
        self,
        style: str | None = None,
        *,
        seen: bool | None = None,
        classify30: Literal["train", "test"] | None = None,
        category: str | None = None,
    ) -> list[int]:
        """Concepts that meet every condition given; with `style`, only those it draws."""
        drawn = np.ones(len(self), bool) if style is None else self.drawn(style)
        return [
            i
            for i, concept in enumerate(self.concepts)
            if drawn[i]
            and (seen is None or concept.seen == seen)
            and (classify30 is None or concept.classify30 == classify30)
            and (category is None or concept.category == category)
        ]

    def cells(self) -> dict[tuple[str, bool], list[tuple[str, int]]]:
        """(“trained” or “held-out” style, seen concept?) -> its drawings as (style, index) pairs."""
        groups = {"trained": TRAINED_STYLES, "held-out": (HELD_OUT_STYLE,)}
        return {
            (name, seen): [(style, i) for style in styles for i in self.indices(style, seen=seen)]
            for name, styles in groups.items()
            for seen in (True, False)
        }

    def dataset(
        self, drawings: Iterable[tuple[str, int]], target: Literal["label", "category", "subcategory"] = "label"
    ) -> ImageDataset:
        """A data set of (style, index) pairs, as `cells` gives them; its classes are the distinct names of `target`."""
        pairs = [(self._style(style), range(len(self))[index]) for style, index in drawings]
        if target not in ("label", "category", "subcategory"):
            raise ValueError(f"EmojiStyles: target must be 'label', 'category' or 'subcategory', got {target!r}")
        for style in {style for style, _ in pairs}:
            drawn = self.drawn(style)
            if lacking := [i for s, i in pairs if s == style and not drawn[i]]:
                raise ValueError(f"EmojiStyles: {style} has no drawing of the concepts {lacking}")
        names = [getattr(self.concepts[i], target) for _, i in pairs]
        classes = sorted(set(names))
        rank = {name: i for i, name in enumerate(classes)}
        return ImageDataset(_Reader(_emoji_tile, pairs), [rank[name] for name in names], classes)

    def captioned(self, drawings: Iterable[tuple[str, int]], captions: Literal["label", "noisy"]) -> ImageDataset:
        """Image–caption pairs: each drawing with its label, or with all that is said of it.

        "noisy": the label, the label with each tag, and each tag alone, which may name many other things ("animal").
        """
        if captions not in ("label", "noisy"):
            raise ValueError(f"EmojiStyles: captions must be 'label' or 'noisy', got {captions!r}")
        pairs, texts = [], []
        for style, i in drawings:
            concept = self.concepts[i]
            said = [*concept.captions(), *(t for t in concept.tags if t != concept.label)]
            for text in said if captions == "noisy" else said[:1]:
                pairs.append((style, i))
                texts.append(text)
        return ImageDataset(self.dataset(pairs)._read, texts)


def image_folder(path: str | Path) -> ImageDataset:
    """A folder of class folders, as torchvision's ImageFolder; images straight in it form one class of its name.

    Raises:
        ValueError: not a folder, or no image in it.
    """
    root = Path(path)
    if not root.is_dir():
        raise ValueError(f"image_folder: path must be a folder, got {path}")
    folders = sorted(p for p in root.iterdir() if p.is_dir())
    groups = {p.name: sorted(f for f in p.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES) for p in folders}
    groups[root.resolve().name] = groups.get(root.resolve().name, []) + sorted(
        f for f in root.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file()
    )
    groups = {name: files for name, files in groups.items() if files}
    if not groups:
        raise ValueError(f"image_folder: no image ({', '.join(sorted(IMAGE_SUFFIXES))}) under {path}")
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
    """Images with captions from a table: .csv or .tsv with a header line, or .jsonl with an object a line.

    Args:
        image_root: folder that relative image paths start from; by default the table's.
        image_key, caption_key: columns; by default the first of image, filepath, file_name, … and caption, text, ….

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
            raise FileFormatError(f"{path}, line {line}: {image_key!r} and {caption_key!r} must be strings, got {row}")
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
                        raise FileFormatError(f"{path}, line {number}: expected an object, got {type(row).__name__}")
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
    raise FileFormatError(f"{path}: expected a column {wanted or ' or '.join(known)}, got {sorted(map(str, row))}")


def shards(pattern: str | Path) -> ImageDataset:
    """WebDataset shards: uncompressed .tar files whose members KEY.jpg and KEY.txt (or KEY.json) belong together.

    Args:
        pattern: one file, a glob, or a brace range ("data-{0000..0099}.tar").

    The headers are read once; samples are then read by their offset, in any order. A sample without a caption is
    left out.

    Raises:
        ValueError: no such file. FileFormatError: not an uncompressed tar, or no sample with a caption in it.
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
        raise FileFormatError(f"{pattern}: no image with a caption (KEY.jpg with KEY.txt or KEY.json)")
    return ImageDataset(_Reader(_read_member, places), texts)


def _braces(text: str) -> list[str]:
    found = re.search(r"\{(\d+)\.\.(\d+)\}", text)
    if not found:
        return [text]
    low, high = found.groups()
    numbers = (str(n).zfill(len(low)) for n in range(int(low), int(high) + 1))
    return [part for n in numbers for part in _braces(text[: found.start()] + n + text[found.end() :])]


def _members(file: Path) -> list[tuple[tuple[str, int, int], str]]:
    """((name, offset, size) of the image, caption) of every complete sample of a shard."""
    images, texts = {}, {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                stem, dot, suffix = member.name.rpartition("/")[2].partition(".")
                key, suffix = member.name[: len(member.name) - len(dot + suffix)], f".{suffix.lower()}"
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
    """A folder with `image_folder`, a .tar name or pattern with `shards`, anything else with `captions`."""
    if Path(path).is_dir():
        return image_folder(path)
    return shards(path) if str(path).endswith(".tar") else captions(path)
