"""Data sets by name: the bundled drawings, folders of images, caption tables, tar shards.

``open_dataset`` takes any of them. Files and folders whose names begin with a dot
(``.ipynb_checkpoints``, ``._a.jpg``, ``.DS_Store``) are passed over.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Literal

from clipsteer.data.dataset import (
    LAYOUTS,
    ImageDataset,
    _Reader,
    labelled,
)
from clipsteer.data.emoji import EmojiStyles
from clipsteer.data.readable import without_unreadable
from clipsteer.data.tables import TABLES, captions
from clipsteer.data.webdataset import is_hidden, shards
from clipsteer.io.images import IMAGE_SUFFIXES, read_image

Targets = Literal["label", "category", "subcategory", "caption", "captions"]

_EMOJI = "emoji"
# how `clipsteer finetune` and `wise-ft` once called the drawings of Classify-30
_CLASSIFY30 = "classify30"


def open_dataset(
    spec: str | Path,
    *,
    emoji: str = "all",
    targets: Targets | None = None,
    skip_unreadable: bool = False,
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
        skip_unreadable: read every image once, and leave out those that cannot be read; the set's
            `unreadable` says why. Else the first of them ends what reads it.

    Raises:
        ValueError: nothing is there, or it is none of these; an unknown style or part; no image
            can be read.
        FileFormatError: a damaged table or shard.
    """
    if is_emoji(spec):
        return _drawings(str(spec), emoji, targets)
    found = _opened(str(spec))
    return without_unreadable(found) if skip_unreadable else found


def _opened(text: str) -> ImageDataset:
    path = Path(text)
    if path.is_dir():
        return image_folder(path)
    if text.endswith(".tar"):
        return shards(text)
    if path.suffix.lower() in TABLES:
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


def image_folder(path: str | Path, *, leave_out: Collection[Path] = ()) -> ImageDataset:
    """A folder of class folders, as torchvision's ImageFolder, or a flat folder of images.

    Images of a flat folder have neither classes nor captions (``classes`` is None). Where there are
    class folders, images that lie beside them form one more class, of the folder's name. Hidden
    files and folders are passed over, and what is in no regular file.

    leave_out: files under `path` that are passed over too.

    Raises:
        ValueError: not a folder, or no image in it.
    """
    root = Path(path)
    if not root.is_dir():
        raise ValueError(f"image_folder: path must be a folder, got {path}")
    skipped = frozenset(leave_out)
    loose = _images(root.iterdir(), root, skipped)
    groups = {
        folder.name: _images(folder.rglob("*"), root, skipped)
        for folder in sorted(root.iterdir())
        if folder.is_dir() and not is_hidden(folder.name)
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


def class_folder(path: str | Path, what: str, *, leave_out: Collection[Path] = ()) -> ImageDataset:
    """`image_folder` of a folder that must have class folders; ``what`` begins the message."""
    return labelled(image_folder(path, leave_out=leave_out), f"{what}: {path}")


def _images(paths: Iterable[Path], root: Path, skipped: Collection[Path]) -> list[Path]:
    """Image files among paths under root, sorted, without hidden and skipped ones."""
    return sorted(
        path
        for path in paths
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not is_hidden(path.relative_to(root).as_posix())
        and path not in skipped
        and path.is_file()
    )
