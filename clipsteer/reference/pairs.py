"""Image–caption pairs as a contrastive trainer sees them: captions, square crops, tokens for one or
two models."""

from __future__ import annotations

import math
import random
from typing import Any

from torch.utils.data import Dataset

from clipsteer.clip.model import CLIP
from clipsteer.data.dataset import ImageDataset, captions_of


class Pairs(Dataset):
    """(row, seed) -> (row, pixels, tokens), and the same crop's pixels and tokens for a second
    model where one is."""

    def __init__(self, dataset: ImageDataset, crop: float, *models: CLIP) -> None:
        self.dataset, self.texts, self.crop = dataset, captions_of(dataset), crop
        # not the models: loader processes need none of their weights
        self.models = [(model.preprocess, model.tokenizer) for model in models]

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, ...]:
        row, seed = key
        image = self.dataset[row][0]
        if self.crop < 1:
            image = _square_crop(image, self.crop, seed)
        both = (
            (preprocess(image), tokenizer([self.texts[row]])[0])
            for preprocess, tokenizer in self.models
        )
        return (row, *(tensor for pair in both for tensor in pair))


def _square_crop(image: Any, least: float, seed: int) -> Any:
    """A square, so that every model's own preprocessing keeps all of it."""
    # not torch's generator: saving and setting that one takes longer than reading a small image
    draw = random.Random(seed)
    width, height = image.size
    side = max(1, round(min(width, height) * math.sqrt(draw.uniform(least, 1))))
    left, top = draw.randint(0, width - side), draw.randint(0, height - side)
    return image.crop((left, top, left + side, top + side))
