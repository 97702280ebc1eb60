"""The real ViT as a tower that learns: weights of benchmarks.real_vit.weights, cut behind a block, at any size; whole,
or its last blocks alone."""

from __future__ import annotations

import functools
import hashlib
from collections import OrderedDict
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


class Tail(nn.Module):
    """The last blocks of a trunk, on the tokens (B, T, w) that the blocks before them give; their names stay."""

    has_class_token = True

    def __init__(self, trunk: Any, last: int) -> None:
        super().__init__()
        self.embed_dim = trunk.embed_dim
        self.num_prefix_tokens = trunk.num_prefix_tokens
        first = len(trunk.blocks) - last
        self.blocks = nn.Sequential(OrderedDict((str(first + i), b) for i, b in enumerate(trunk.blocks[first:])))
        self.norm = trunk.norm

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T, w) -> (B, w)
        return self.norm(self.blocks(tokens))[:, self.num_prefix_tokens :].mean(1)


class Front:
    """PIL image -> the tokens (T, w) behind the first blocks, which stay as they are; those of pictures with a source
    are kept. With ``views``, of one of so many crops that are drawn once for each picture."""

    def __init__(self, trunk: Any, last: int, transform: Any, views: int = 0) -> None:
        self.trunk = trunk
        self.last = last
        self.transform = transform
        self.views = views
        self.kept: dict[tuple[str, int], Tensor] = {}

    def __repr__(self) -> str:
        return f"Front({self.transform!r}, last={self.last}, views={self.views})"

    def __deepcopy__(self, memo: Any) -> Front:
        return self

    @torch.no_grad()
    def __call__(self, image: Any) -> Tensor:
        source = image.info.get("source", "")
        view = int(torch.randint(self.views, ())) if self.views else 0
        if (source, view) not in self.kept:
            with torch.random.fork_rng(devices=[]):
                name = f"{Path(source).name} {view}"
                torch.manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big"))
                x = self.transform(image)[None]
            x = self.trunk.norm_pre(self.trunk._pos_embed(self.trunk.patch_embed(x)))
            tokens = self.trunk.blocks[: len(self.trunk.blocks) - self.last](x)[0]
            if not source:
                return tokens
            self.kept[source, view] = tokens
        return self.kept[source, view]


@functools.cache
def _fronts(weights: Path, block: int, image_size: int, last: int, views: int) -> tuple[Front, Front]:
    trunk = trunk_of(weights, block, image_size).eval().requires_grad_(False)
    return Front(trunk, last, prepare(image_size)), Front(trunk, last, _cropped(image_size), views)


def tail_of(weights: Path, block: int = 8, image_size: int = 98, last: int = 3, views: int = 4) -> Encoder:
    """The same tower, of which the last blocks alone can learn: its "pixels" are the tokens before them, computed once,
    of each picture as it is and in so many crops."""
    if not 1 <= last <= block + 1:
        raise ValueError(f"tail_of: last must be 1 to {block + 1}, the blocks up to block {block}, got {last}")
    name = f"{NAME}, block {block}, {image_size} px, last {last}"
    fronts = _fronts(weights, block, image_size, last, views)
    return Encoder(Tail(trunk_of(weights, block, image_size), last), *fronts, name)


@torch.no_grad()
def features(encoder: Encoder, images: Any, batch: int = 16) -> Tensor:  # (N, d)
    """Features of a data set's images, in their order."""
    pieces = []
    for at in range(0, len(images), batch):
        rows = range(at, min(at + batch, len(images)))
        pieces.append(encoder(torch.stack([encoder.preprocess(images[row][0]) for row in rows])))
    return torch.cat(pieces)
