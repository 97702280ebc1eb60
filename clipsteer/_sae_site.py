"""An SAE at its place in a CLIP model: which module, which tokens, and passes that look at or replace what is there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from clipsteer.clip import CLIP, apply_at, class_tokens, hook_points
from clipsteer.sae import SAE

TOKENS = ("all", "cls", "patches")
LOGIT_SCALE = 100.0
# elements of a dense (rows, d_sae) block that are held at once: 128 MB in float32
_BLOCK = 1 << 25


class Site(NamedTuple):
    """Where an SAE sits: one module, and which of its tokens."""

    hook_point: str
    tokens: str
    prefix: int  # class and register tokens before the patches

    def select(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (B, T', d), a view of the tokens that the SAE is for."""
        if self.tokens == "all":
            return x
        return x[:, :1] if self.tokens == "cls" else x[:, self.prefix :]

    def put(self, x: Tensor, new: Tensor) -> Tensor:
        """x with the selected tokens replaced."""
        if self.tokens == "all":
            return new
        return torch.cat([new, x[:, 1:]] if self.tokens == "cls" else [x[:, : self.prefix], new], dim=1)


def find_site(sae: SAE, clip: CLIP, hook_point: str | None, tokens: str | None) -> Site:
    hook_point = hook_point if hook_point is not None else sae.metadata.get("hook_point")
    tokens = tokens if tokens is not None else sae.metadata.get("tokens") or "all"
    if hook_point is None:
        raise ValueError("hook_point: the SAE's metadata do not name one; pass it")
    if tokens not in TOKENS:
        raise ValueError(f"tokens: expected one of {TOKENS}, got {tokens!r}")
    names = hook_points(clip.model, hook_point)
    if len(names) != 1:
        raise ValueError(f"hook_point: {hook_point!r} must name one module of {clip.name}, it matches {len(names)}")
    prefix = class_tokens(clip.model, names[0])
    if tokens != "all" and prefix == 0:
        raise ValueError(f"tokens: there is no class token at {names[0]!r}; only 'all' works, got {tokens!r}")
    return Site(names[0], tokens, prefix)


class Pairs(torch.utils.data.Dataset):
    """(preprocessed image, integer label or -1) of a map-style data set."""

    def __init__(self, dataset: Any, preprocess: Callable[[Any], Tensor]) -> None:
        self.dataset, self.preprocess = dataset, preprocess

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        item = self.dataset[index]
        image, label = (item[0], item[1]) if isinstance(item, tuple | list) else (item, -1)
        label = -1 if isinstance(label, str) else int(label)
        return image if isinstance(image, Tensor) else self.preprocess(image), label


def image_batches(clip: CLIP, dataset: Any, batch_size: int, what: str) -> Iterator[tuple[Tensor, Tensor]]:
    if len(dataset) == 0:
        raise ValueError("dataset: it is empty")
    loader = DataLoader(Pairs(dataset, clip.preprocess), batch_size=batch_size)
    for pixels, labels in tqdm(loader, desc=what, unit="batch", disable=None):
        yield pixels.to(clip.device, clip.dtype), labels.to(clip.device)


def image_embeddings(clip: CLIP, dataset: Any, batch_size: int, what: str) -> Iterator[Tensor]:
    """Unit embeddings (B, e), at least float32, of a data set, batch by batch."""
    for pixels, _ in image_batches(clip, dataset, batch_size, what):
        with evaluating(clip.model):
            yield _unit(clip.model.encode_image(pixels))


@contextmanager
def evaluating(*modules: torch.nn.Module) -> Iterator[None]:
    """No gradients and evaluation mode; the modes come back afterwards, also on error."""
    modes = [(module, module.training) for root in modules for module in root.modules()]
    for root in modules:
        root.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def embed(clip: CLIP, pixels: Tensor, site: Site, edit: Callable[[Tensor], Tensor]) -> Tensor:
    """Unit image embeddings (B, e), at least float32, with the activations at the site replaced by edit(x)."""
    with apply_at(clip.model, {site.hook_point: edit}):
        return _unit(clip.model.encode_image(pixels))


def _unit(features: Any) -> Tensor:
    features = features[0] if isinstance(features, tuple | list) else features
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def clean_pass(clip: CLIP, pixels: Tensor, site: Site) -> tuple[Tensor, Tensor]:
    """Activations (B, T, d) at the site and unit embeddings, from one pass that is not edited."""
    kept: list[Tensor] = []

    def look(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    embedded = embed(clip, pixels, site, look)
    if not kept:
        raise ValueError(f"hook_point: the image tower never calls {site.hook_point!r} as a module")
    return kept[-1], embedded


def chunks(sae: SAE, rows: Tensor) -> Iterator[Tensor]:
    return iter(rows.split(max(1, _BLOCK // sae.d_sae)))


def grid_side(patches: int) -> int:
    """Side of the square patch grid, or 0 where the patches do not form one of at least 2 by 2."""
    side = math.isqrt(patches)
    return side if side > 1 and side * side == patches else 0
