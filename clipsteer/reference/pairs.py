"""Image–caption pairs as a contrastive trainer sees them: square crops, tokens for each model."""

from __future__ import annotations

import math
import random
from typing import Any

from torch.utils.data import Dataset

from clipsteer.clip.model import CLIP
from clipsteer.data.dataset import ImageDataset, captions_of
from clipsteer.io.images import as_rgb
from clipsteer.io.names import spoken


class Pairs(Dataset):
    """(row, seed) -> (row, pixels, tokens), with the same crop's pixels and tokens for each further
    model.

    Args:
        dataset: images with captions.
        crop: the least share of an image's inner square that a crop has; 1 for whole images.
        models: whose preprocessing and tokens these are.
    """

    def __init__(self, dataset: ImageDataset, crop: float, *models: CLIP) -> None:
        self.dataset = dataset
        self.texts = [spoken(text) for text in captions_of(dataset)]
        self.crop = crop
        # not the models: loader processes need none of their weights
        self.models = [(model.preprocess, model.tokenizer) for model in models]

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, ...]:
        row, seed = key
        image = as_rgb(self.dataset[row][0])
        if self.crop < 1:
            image = _square_crop(image, self.crop, seed)
        tensors = []
        for preprocess, tokenizer in self.models:
            tensors.append(preprocess(image))
            tensors.append(tokenizer([self.texts[row]])[0])
        return (row, *tensors)


def _square_crop(image: Any, least: float, seed: int) -> Any:
    """A square, so that every model's own preprocessing keeps all of it."""
    # not torch's generator: saving and setting that one takes longer than reading a small image
    draw = random.Random(seed)
    width, height = image.size
    area = draw.uniform(least, 1)
    side = max(1, round(min(width, height) * math.sqrt(area)))
    left = draw.randint(0, width - side)
    top = draw.randint(0, height - side)
    return image.crop((left, top, left + side, top + side))
