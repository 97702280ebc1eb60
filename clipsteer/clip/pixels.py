"""Images on their way to a model: one image, loaders of preprocessed pixels, and embeddings.

An image is a PIL image, the path of one, or a preprocessed tensor (3, H, W).
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Iterator, Sized
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from clipsteer.clip.build import evaluation_transform
from clipsteer.clip.hooks import evaluating
from clipsteer.clip.timm_models import ImageModel, transforms_of
from clipsteer.io.images import as_rgb, read_image

Transform = Callable[[Any], Tensor]
Key = int | tuple[int, int]  # a row of a data set, or (row, seed)


class Sees(Protocol):
    """A CLIP, or an image tower with its preprocessing."""

    @property
    def preprocess(self) -> Transform:
        """PIL image -> (3, H, W)."""

    @property
    def device(self) -> torch.device:
        """Of the weights."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""


class Embeds(Sees, Protocol):
    """A CLIP: what also gives embeddings."""

    @property
    def model(self) -> torch.nn.Module:
        """The towers."""

    def embed(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) -> unit embeddings (B, e)."""


def as_pixels(image: Any, transform: Transform) -> Tensor:
    """One image, preprocessed: (3, H, W).

    Args:
        image: a PIL image or a path, which `transform` is applied to once `as_rgb` has made it
            RGB, upright and laid on white, or a preprocessed tensor (3, H, W), which is taken as it
            is.

    Raises:
        TypeError: anything else. ValueError: a tensor of another shape, or of whole numbers; a PIL
            image of mode I or F, whose range nothing tells.
        FileFormatError: a file that is no image. FileNotFoundError.
    """
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
            raise ValueError(
                "images: expected preprocessed tensors (3, H, W) of floating numbers, got "
                f"{image.dtype} {tuple(image.shape)}"
            )
        return image
    if isinstance(image, str | os.PathLike):
        return transform(read_image(os.fspath(image)))
    from PIL import Image

    if isinstance(image, Image.Image):
        return transform(as_rgb(image))
    raise TypeError(
        "images: expected PIL images, paths, or preprocessed tensors (3, H, W), got "
        f"{type(image).__name__}"
    )


def from_any_mode(transform: Any) -> Transform:
    """A transform of torchvision's with `as_rgb` before it: images given to it by hand are seen as
    files are."""
    from torchvision.transforms import Compose

    return Compose([as_rgb, *transform.transforms])


def stacks(images: Any, transform: Transform, batch_size: int) -> Iterator[Tensor]:
    """Preprocessed images (B, 3, H, W) of whatever `CLIP.encode_images` takes, batch by batch."""
    rows = (as_pixels(image, transform) for image in _each(images))
    while batch := list(islice(rows, batch_size)):
        if len(shapes := {tuple(pixels.shape) for pixels in batch}) > 1:
            raise ValueError(f"images: all must have one size, got {sorted(shapes)}")
        yield torch.stack(batch)


def image_of(item: Any) -> Any:
    """The image of a data set's item, which may have a target beside it."""
    return item[0] if isinstance(item, tuple | list) and item else item


def _each(images: Any) -> Iterator[Any]:
    """The images of a list, a batch, a loader or a data set, one by one and without targets."""
    for item in _items(images):
        image = image_of(item)
        if isinstance(image, Tensor) and image.ndim == 4:  # a batch
            yield from image
        else:
            yield image


def _items(images: Any) -> Iterable[Any]:
    if isinstance(images, Tensor):
        if images.ndim == 4:
            return images
        raise ValueError(
            f"images: expected a batch (B, 3, H, W), got {tuple(images.shape)}; put a single image "
            "into a list"
        )
    if isinstance(images, str | os.PathLike):
        raise TypeError(
            f"images: expected several, got the path {os.fspath(images)!r}; write [path] for one "
            "image, clipsteer.data.open_dataset(path) for a folder"
        )
    if isinstance(images, Dataset) and isinstance(images, Sized):
        # not every data set ends its iteration with an IndexError
        return map(images.__getitem__, range(len(images)))
    if hasattr(images, "__iter__") or hasattr(images, "__getitem__"):
        return images
    raise TypeError(
        "images: expected a list of images, a batch (B, 3, H, W) or a data set, got "
        f"{type(images).__name__}"
    )


class Samples(Dataset):
    """The items of a data set with their images preprocessed: key -> (pixels, label).

    Args:
        dataset: map-style, of images or (image, target) pairs.
        transform: PIL image -> (3, H, W).

    A key is a row, or a (row, seed) pair: the seed makes a random crop the same whatever process
    takes it. A label is an integer target, -1 where there is none.
    """

    def __init__(self, dataset: Any, transform: Transform) -> None:
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        if not isinstance(key, tuple):
            return self._sample(key)
        row, seed = key
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._sample(row)

    def _sample(self, row: int) -> tuple[Tensor, int]:
        item = self.dataset[row]
        image, *rest = item if isinstance(item, tuple | list) else (item,)
        try:
            label = operator.index(rest[0])
        except (IndexError, TypeError):
            label = -1
        return as_pixels(image, self.transform), label


def loader(
    samples: Dataset,
    keys: Iterable[Any],
    workers: int = 0,
    generator: torch.Generator | None = None,
) -> DataLoader:
    """Batches of samples.

    Args:
        keys: what each batch takes from `samples`.
        workers: processes that read.
        generator: what the loader draws a number from, even without processes; by default one of
            its own, so that the caller's is left alone.
    """
    generator = torch.Generator() if generator is None else generator
    return DataLoader(samples, batch_sampler=keys, num_workers=workers, generator=generator)


def image_loader(
    model: Sees, dataset: Any, batch_size: int, num_workers: int = 0, seed: int | None = None
) -> DataLoader:
    """Batches of preprocessed images (B, 3, H, W) and labels (B,), in order; see `Samples`.

    seed: of every image's random transform; None draws from torch's own generator.
    """
    rows = range(len(dataset))
    batches = [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]
    samples = Samples(dataset, model.preprocess)
    if seed is None:
        return loader(samples, batches, num_workers, torch.default_generator)
    return loader(samples, [[(row, seed) for row in batch] for batch in batches], num_workers)


def image_batches(
    clip: Sees, dataset: Any, batch_size: int, what: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Preprocessed images (B, 3, H, W) and labels (B,) on the model's device, with a progress bar.

    Raises ValueError for an empty data set.
    """
    if len(dataset) == 0:
        raise ValueError("dataset: it is empty")
    batches = image_loader(clip, dataset, batch_size)
    for pixels, labels in tqdm(batches, desc=what, unit="batch", disable=None):
        yield pixels.to(clip.device, clip.dtype), labels.to(clip.device)


def image_embeddings(clip: Embeds, dataset: Any, batch_size: int, what: str) -> Iterator[Tensor]:
    """Unit embeddings (B, e), at least float32, of a data set, batch by batch."""
    for pixels, _ in image_batches(clip, dataset, batch_size, what):
        with evaluating(clip):
            yield clip.embed(pixels)


def pixel_batches(
    clip: Sees, dataset: Any, batch_size: int = 128, workers: int = 0
) -> Iterator[Tensor]:
    """Preprocessed images in their order, (B, 3, H, W) a batch, on the model's device.

    Nothing is drawn from torch's generator.
    """
    for pixels, _ in image_loader(clip, dataset, batch_size, workers, seed=0):
        yield pixels.to(clip.device, clip.dtype)


def evaluation_transform_of(model: Any) -> Transform:
    """PIL image -> (3, H, W), as the setup of a loaded module says."""
    if isinstance(model, ImageModel):
        return transforms_of(model).evaluate
    return evaluation_transform(model)


def train_transform(clip: Any, crop: float) -> Transform:
    """PIL image -> (3, H, W), with random crops of at least `crop` of the image's area; 1: none."""
    if crop == 1:
        return clip.preprocess
    if isinstance(clip.model, ImageModel):
        return transforms_of(clip.model, crop).train
    from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2

    cfg = PreprocessCfg(**clip.model.visual.preprocess_cfg)
    return image_transform_v2(cfg, is_train=True, aug_cfg=AugmentationCfg(scale=(crop, 1.0)))
