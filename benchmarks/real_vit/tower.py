"""The real ViT as a tower that learns: weights of benchmarks.real_vit.weights, cut behind a block, at any size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms import v2

from benchmarks.real_vit.weights import NAME, model_of
from clipsteer.continual.backbone import Encoder

# ImageNet's, as the weights were trained with
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def prepare(image_size: int) -> v2.Compose:
    """PIL image -> (3, S, S): the shorter side scaled, the middle cut out."""
    return v2.Compose(
        [
            v2.ToImage(),
            v2.Resize(image_size, v2.InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(image_size),
            *_numbers(),
        ]
    )


def _numbers() -> list[Any]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(_MEAN, _STD)]


def _cropped(image_size: int) -> v2.Compose:
    """The same with crops of half the picture and more, for training. Not mirrored: signs and numbers are kinds."""
    crop = v2.RandomResizedCrop(image_size, scale=(0.5, 1.0), ratio=(0.9, 1.1), antialias=True)
    return v2.Compose([v2.ToImage(), crop, *_numbers()])


def trunk_of(weights: Path, block: int, image_size: int) -> nn.Module:
    """timm's model up to and with a block; final tokens are those of the block, normalised without weights, and the
    feature is the mean of the patches'."""
    model: Any = model_of(load_file(weights), image_size)
    model.global_pool = "avg"
    del model.blocks[block + 1 :]
    model.norm = nn.LayerNorm(model.embed_dim, elementwise_affine=False)
    return model


def encoder_of(weights: Path, block: int = 8, image_size: int = 98) -> Encoder:
    """A tower whose feature is the mean patch behind a block, by default 8: better here than the last one's."""
    name = f"{NAME}, block {block}, {image_size} px"
    return Encoder(trunk_of(weights, block, image_size), prepare(image_size), _cropped(image_size), name)


@torch.no_grad()
def features(encoder: Encoder, images: Any, batch: int = 16) -> Tensor:  # (N, d)
    """Features of a data set's images, in their order."""
    pieces = []
    for at in range(0, len(images), batch):
        rows = range(at, min(at + batch, len(images)))
        pieces.append(encoder(torch.stack([encoder.preprocess(images[row][0]) for row in rows])))
    return torch.cat(pieces)
