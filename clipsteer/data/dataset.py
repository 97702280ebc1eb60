"""Images with names: the bundled EmojiStyles set, image folders, caption tables and WebDataset
shards.

Every data set is map-style and yields (PIL RGB image, target). Transparent images are laid on
white.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset

from clipsteer.io.digests import digest_of
from clipsteer.io.files import FileFormatError

if TYPE_CHECKING:
    from PIL.Image import Image


# Pillow's own default, at which it begins to warn of decompression bombs
MAX_PIXELS = 89_478_485
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
)


class ImageDataset(Dataset):
    """(image, target) pairs, the images read when they are asked for.

    Attributes:
        targets: one a sample: an index into `classes`, or a caption where `classes` is None.
        classes: class names or None.
    """

    def __init__(
        self,
        read: Callable[[int], Image],
        targets: Sequence[int] | Sequence[str],
        classes: Sequence[str] | None = None,
    ) -> None:
        self._read, self.targets = read, list(targets)
        self.classes = list(classes) if classes is not None else None

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image, int | str]:
        return self._read(range(len(self))[index]), self.targets[index]

    @property
    def sources(self) -> list[Any]:
        """What each sample is read from, its row where that is not known: equal ones are the same
        image."""
        if not isinstance(self._read, _Reader):
            return list(range(len(self)))
        return [self._read.source(row) for row in range(len(self))]

    def subset(self, rows: Sequence[int]) -> ImageDataset:
        """These rows, in this order, with the same classes."""
        return ImageDataset(
            _Reader(self._read, [(i,) for i in rows]), [self.targets[i] for i in rows], self.classes
        )


class _Reader:
    """Reads sample i of a list; a class, not a closure, so that loader processes can be spawned
    with it."""

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
        FileFormatError: not an image, damaged, or of more than MAX_PIXELS pixels; the message names
            `name`.
    """
    from PIL import Image, ImageOps

    name = name or (f"{len(source)} bytes" if isinstance(source, bytes) else str(source))
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise FileFormatError(
                    f"{name}: {width} × {height} pixels; at most {MAX_PIXELS:,} are read"
                )
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


def captions_of(dataset: ImageDataset) -> list[str]:
    """One text a sample: its caption, or the name of its class."""
    if dataset.classes is None:
        return [str(target) for target in dataset.targets]
    return [dataset.classes[target].replace("_", " ") for target in dataset.targets]


def data_digest(dataset: ImageDataset) -> str:
    """Of the number of samples, all captions and the pixels of 16 images: the same wherever the
    files lie."""
    digest = hashlib.sha256(digest_of(captions_of(dataset)).encode())
    for row in np.linspace(0, len(dataset) - 1, min(16, len(dataset))).round().astype(int).tolist():
        digest.update(np.asarray(dataset[row][0]).tobytes())
    return digest.hexdigest()


def spread(items: Sequence[Any], count: int | None) -> list[Any]:
    """``count`` items, evenly spaced; all when there are no more."""
    if count is None or count >= len(items):
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def renamed(dataset: ImageDataset, classes: Sequence[str]) -> ImageDataset:
    """The data set with targets that index `classes`; captions count as class names.

    Raises ValueError for an image of a class that is not among them.
    """
    rank = {name: i for i, name in enumerate(classes)}
    names = (
        dataset.targets
        if dataset.classes is None
        else [dataset.classes[t] for t in dataset.targets]
    )
    if unknown := sorted(set(map(str, names)) - rank.keys()):
        some = ", ".join(unknown[:5]) + (" …" if len(unknown) > 5 else "")
        raise ValueError(
            f"the images have {len(unknown)} class(es) that the classifier lacks: {some}"
        )
    return ImageDataset(dataset._read, [rank[str(name)] for name in names], classes)
