"""Images with names: the bundled EmojiStyles set, image folders, caption tables and WebDataset
shards.

Every data set is map-style and yields (PIL RGB image, target). Transparent images are laid on
white.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset

from clipsteer.io.digests import digest_of
from clipsteer.io.images import IMAGE_SUFFIXES as IMAGE_SUFFIXES
from clipsteer.io.images import MAX_PIXELS as MAX_PIXELS
from clipsteer.io.images import read_image as read_image

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageDataset(Dataset):
    """(image, target) pairs, the images read when they are asked for.

    Attributes:
        targets: one a sample: an index into `classes`; where `classes` is None a caption, or None
            in a set of images alone.
        classes: class names or None.
        unreadable: why images were left out, of a set opened with ``skip_unreadable``.
    """

    def __init__(
        self,
        read: Callable[[int], Image],
        targets: Sequence[Any],
        classes: Sequence[str] | None = None,
    ) -> None:
        self._read = read
        self.targets: list[Any] = list(targets)
        self.classes = list(classes) if classes is not None else None
        self.unreadable: list[str] = []

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image, Any]:
        row = range(len(self))[index]  # raises IndexError, as a loop over the set needs it
        return self._read(row), self.targets[row]

    @property
    def images_alone(self) -> bool:
        """Whether the images have neither classes nor captions, as those of a flat folder."""
        return self.classes is None and self.targets[:1] == [None]

    @property
    def sources(self) -> list[Any]:
        """What each sample is read from, its row where that is not known: equal ones are the same
        image."""
        if not isinstance(self._read, _Reader):
            return list(range(len(self)))
        return [self._read.source(row) for row in range(len(self))]

    def subset(self, rows: Sequence[int]) -> ImageDataset:
        """These rows, in this order, with the same classes."""
        reader = _Reader(self._read, [(row,) for row in rows])
        targets = [self.targets[row] for row in rows]
        return ImageDataset(reader, targets, self.classes)


class _Reader:
    """Reads sample i of a list; a class, not a closure, so that loader processes can be spawned
    with it."""

    def __init__(self, function: Callable[..., Image], arguments: list[tuple[Any, ...]]) -> None:
        self.function = function
        self.arguments = arguments

    def __call__(self, index: int) -> Image:
        return self.function(*self.arguments[index])

    def source(self, index: int) -> tuple[Any, ...]:
        """The arguments of the function that reads the image, behind all subsets."""
        arguments = self.arguments[index]
        if isinstance(self.function, _Reader):
            return self.function.source(*arguments)
        return arguments


LAYOUTS = (
    "a folder of class folders (FOLDER/CLASS/image.jpg), a .csv, .tsv or .jsonl table with "
    "captions, .tar shards with captions, or emoji"
)


def captions_of(dataset: ImageDataset, what: str = "captions_of") -> list[str]:
    """One text a sample: its caption, or the name of its class.

    Raises ValueError, with `what` in front, for images that have neither.
    """
    if dataset.images_alone:
        raise ValueError(
            f"{what}: these images have neither captions nor classes; expected {LAYOUTS}"
        )
    if dataset.classes is None:
        return [str(target) for target in dataset.targets]
    return [dataset.classes[target].replace("_", " ") for target in dataset.targets]


def labelled(dataset: ImageDataset, what: str) -> ImageDataset:
    """The data set with classes; of one with captions each distinct caption is a class.

    Args:
        what: asks for them; begins the message.

    Raises ValueError for images that have neither, such as those of a flat folder.
    """
    if dataset.classes is not None:
        return dataset
    if dataset.images_alone:
        raise ValueError(f"{what}: these images have no classes; expected {LAYOUTS}")
    return renamed(dataset, sorted(set(map(str, dataset.targets))))


def told_apart(dataset: Any) -> list[str] | None:
    """The classes, where there are at least two: among one alone every prediction is right."""
    classes = getattr(dataset, "classes", None)
    return classes if classes is not None and len(classes) > 1 else None


def sample_names(dataset: ImageDataset) -> list[str]:
    """What to call each sample: its class, its caption, or the name of its file."""
    if dataset.classes is not None:
        return [dataset.classes[target] for target in dataset.targets]
    if not dataset.images_alone:
        return [str(target) for target in dataset.targets]
    return file_names(dataset)


def file_names(dataset: ImageDataset) -> list[str]:
    """The name of each sample's file, or its number where it has none."""
    return [file_of(source) or f"image {row}" for row, source in enumerate(dataset.sources)]


def file_of(source: Any) -> str:
    """The name of the file that a sample comes from, "" where it comes from none."""
    first = source[0] if isinstance(source, tuple) else source
    return first.name if isinstance(first, Path) else ""


def data_digest(dataset: ImageDataset) -> str:
    """Of the number of samples, all captions and the pixels of 16 images: the same wherever the
    files lie."""
    digest = hashlib.sha256(digest_of(captions_of(dataset)).encode())
    last = len(dataset) - 1
    looked_at = np.linspace(0, last, min(16, len(dataset)))
    for row in looked_at.round().astype(int).tolist():
        digest.update(np.asarray(dataset[row][0]).tobytes())
    return digest.hexdigest()


def spread(items: Sequence[Any], count: int | None) -> list[Any]:
    """``count`` items, evenly spaced; all when there are no more."""
    n = len(items)
    if count is None or count >= n:
        return list(items)
    return [items[i * n // count] for i in range(count)]


def renamed(dataset: ImageDataset, classes: Sequence[str]) -> ImageDataset:
    """The data set with targets that index `classes`; captions count as class names.

    Raises ValueError for an image of a class that is not among them.
    """
    rank = {name: i for i, name in enumerate(classes)}
    if dataset.images_alone:
        raise ValueError(f"these images have no classes; expected {LAYOUTS}")
    names = [str(target) for target in dataset.targets]
    if dataset.classes is not None:
        names = [dataset.classes[target] for target in dataset.targets]
    if unknown := sorted(set(names) - rank.keys()):
        shown = ", ".join(unknown[:5])
        more = " …" if len(unknown) > 5 else ""
        raise ValueError(
            f"the images have {len(unknown)} class(es) that the classifier lacks: {shown}{more}"
        )
    return ImageDataset(dataset._read, [rank[name] for name in names], classes)
