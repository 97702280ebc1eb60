"""Images on their way to a model: loaders of preprocessed pixels, and embeddings batch by batch."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from clipsteer.clip.hooks import evaluating
from clipsteer.clip.model import CLIP
from clipsteer.data.dataset import ImageDataset


def image_batches(
    clip: CLIP, dataset: Any, batch_size: int, what: str
) -> Iterator[tuple[Tensor, Tensor]]:
    if len(dataset) == 0:
        raise ValueError("dataset: it is empty")
    for pixels, labels in tqdm(
        image_loader(clip, dataset, batch_size), desc=what, unit="batch", disable=None
    ):
        yield pixels.to(clip.device, clip.dtype), labels.to(clip.device)


def image_embeddings(clip: CLIP, dataset: Any, batch_size: int, what: str) -> Iterator[Tensor]:
    """Unit embeddings (B, e), at least float32, of a data set, batch by batch."""
    for pixels, _ in image_batches(clip, dataset, batch_size, what):
        with evaluating(clip.model):
            yield clip.embed(pixels)


def image_loader(clip: Any, dataset: Any, batch_size: int, num_workers: int = 0) -> DataLoader:
    """Batches of preprocessed images (B, 3, H, W) and labels (B,), -1 where there is no integer
    label."""
    return DataLoader(
        _Images(dataset, clip.preprocess), batch_size=batch_size, num_workers=num_workers
    )


class _Images(torch.utils.data.Dataset):
    """A map-style data set whose items are images or (image, label) pairs."""

    def __init__(self, dataset: Any, preprocess: Any) -> None:
        self.dataset, self.preprocess = dataset, preprocess

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        item = self.dataset[index]
        image, *rest = item if isinstance(item, tuple | list) else (item,)
        try:
            label = operator.index(rest[0])
        except (IndexError, TypeError):
            label = -1
        return image if isinstance(image, Tensor) else self.preprocess(image), label


def train_transform(clip: CLIP, crop: float) -> Callable[[Any], Tensor]:
    if crop == 1:
        return clip.preprocess
    from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2

    cfg = PreprocessCfg(**clip.model.visual.preprocess_cfg)
    return image_transform_v2(cfg, is_train=True, aug_cfg=AugmentationCfg(scale=(crop, 1.0)))


class Samples(Dataset):
    """(row, seed) -> (pixels, class); the seed makes a crop the same whatever process takes it."""

    def __init__(self, dataset: ImageDataset, transform: Callable[[Any], Tensor]) -> None:
        self.dataset, self.transform = dataset, transform

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        row, seed = key
        image, target = self.dataset[row]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.transform(image), target


def loader(samples: Samples, keys: Iterable[Sequence[tuple[int, int]]], workers: int) -> DataLoader:
    """Batches of samples; keys gives the (row, seed) pairs of each."""
    # a generator of its own: a loader draws a number from it, even without processes
    return DataLoader(samples, batch_sampler=keys, num_workers=workers, generator=torch.Generator())


def pixel_batches(
    clip: CLIP, dataset: ImageDataset, batch_size: int = 128, workers: int = 0
) -> Iterator[Tensor]:
    """Preprocessed images in their order, (B, 3, H, W) a batch, on the model's device."""
    keys = [
        [(i, 0) for i in range(at, min(len(dataset), at + batch_size))]
        for at in range(0, len(dataset), batch_size)
    ]
    for pixels, _ in loader(Samples(dataset, clip.preprocess), keys, workers):
        yield pixels.to(clip.device, clip.dtype)
