"""The image tower that learns tasks one after another: an open_clip tower, or a ViT of timm.

Features are what the tower gives: an open_clip tower's projected embedding, a timm model's pooled
output; never normalised here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from clipsteer.clip.hooks import capture
from clipsteer.clip.model import CLIP, load, provenance
from clipsteer.clip.pixels import train_transform
from clipsteer.clip.timm_models import TIMM, UNIT_RANGE, transforms_of
from clipsteer.clip.tokens import layout_at

__all__ = ["Encoder", "Tokens"]

_BLOCK = re.compile(r"(?:.+\.)?(?:resblocks|blocks)\.\d+")


class Tokens(NamedTuple):
    """``features`` (B, d), and the last layer's normalised ``cls`` (B, w) and ``patches`` (B, P,
    w)."""

    features: Tensor
    cls: Tensor
    patches: Tensor


class Encoder(nn.Module):
    """An image tower with its preprocessing.

    Args:
        module: the tower, (B, 3, H, W) -> (B, d).
        preprocess: PIL image -> (3, H, W), for evaluation; train_transform: the same with random
            crops.
        name: what to call it in files.

    Attributes:
        blocks: names of the transformer blocks in ``module``, first to last.
        width: of the tokens in them.
        origins: of each block, where it is in what ``clipsteer.load`` gives, for the metadata of
            what is fitted on it; empty for a tower that is none of its.

    Raises:
        ValueError: no transformer block is found.
    """

    def __init__(
        self,
        module: nn.Module,
        preprocess: Callable[[Any], Tensor],
        train_transform: Callable[[Any], Tensor] | None = None,
        name: str = "",
    ) -> None:
        super().__init__()
        self.module = module
        self.name = name
        self.preprocess = preprocess
        self.train_transform = train_transform or preprocess
        self.blocks = [n for n, _ in module.named_modules() if _BLOCK.fullmatch(n)]
        if not self.blocks:
            raise ValueError(
                "Encoder: the tower has no transformer blocks called resblocks.N or blocks.N"
            )
        trunk = getattr(module, "trunk", module)
        first: Any = None if hasattr(trunk, "embed_dim") else module.conv1
        self.origins: dict[str, dict[str, Any]] = {}
        self.width = trunk.embed_dim if first is None else first.out_channels
        layout = layout_at(module, self.blocks[0])
        # registers alone are no class token
        self.prefix = layout.prefix if layout.has_class else 0
        self._last = self._normalised_tokens()

    def _normalised_tokens(self) -> str:
        """The module after which tokens are normalised; the last block where pooling comes before
        the norm."""
        module = self.module
        if (
            hasattr(module, "ln_post")
            and module.attn_pool is None
            and not module.final_ln_after_pool
        ):
            return "ln_post"
        for name in ("norm", "trunk.norm"):
            owner = (
                module.trunk if name.startswith("trunk") and hasattr(module, "trunk") else module
            )
            if isinstance(getattr(owner, "norm", None), nn.LayerNorm) and name in dict(
                module.named_modules()
            ):
                return name
        return self.blocks[-1]

    @classmethod
    def from_clip(cls, clip: CLIP, *, crop: float = 0.9) -> Encoder:
        """The image tower of what ``clipsteer.load`` returns, shared with it.

        crop: the least share of an image that crops keep. Of a timm model the module is timm's own.
        """
        return cls._of(clip, train_transform(clip, crop))

    @classmethod
    def _of(cls, clip: CLIP, train: Callable[[Any], Tensor]) -> Encoder:
        prefix = "visual." if clip.has_text else "visual.trunk."
        module = clip.model.get_submodule(prefix[:-1])
        made = cls(module, clip.preprocess, train, clip.name)
        for block in made.blocks:
            made.origins[block] = provenance(clip, prefix + block, "all")
        return made

    @classmethod
    def from_timm(
        cls,
        name: str,
        weights: str | Path | None = None,
        *,
        unit_range: bool = False,
        crop: float = 0.05,
        device: str | torch.device = "cpu",
        **setup: Any,
    ) -> Encoder:
        """A ViT of timm without its classifier.

        Args:
            name: timm's, such as "vit_base_patch16_224.augreg_in21k".
            weights: a safetensors file of timm's keys; None downloads timm's own, "random" leaves
                random ones.
            unit_range: pixels in [0, 1] without mean and deviation, 256 px cut to 224: the
                published recipe of MACIL (SLCA's authors take ImageNet's mean and deviation).
                False is what timm says of the model.
            crop: the least share of an image that a random crop keeps.
            setup: preprocess and force_image_size of ``clipsteer.load``.

        Raises ValueError for unit_range beside another preprocess, and else as
        ``clipsteer.load("timm:NAME")``, which opens it.
        """
        if unit_range and setup.get("preprocess") is not None:
            raise ValueError(
                "Encoder.from_timm: unit_range is a preprocessing, and another one was asked for; "
                "leave one of them out"
            )
        if unit_range:
            setup = {**setup, "preprocess": UNIT_RANGE}
        clip = load(TIMM + name, weights, device=device, **setup)
        return cls._of(clip, transforms_of(clip.model, crop).train)

    @classmethod
    def open(
        cls,
        model: str,
        weights: str | Path | None = None,
        *,
        unit_range: bool = False,
        device: str | torch.device = "cpu",
        **setup: Any,
    ) -> tuple[Encoder, CLIP | None]:
        """An encoder of whatever ``clipsteer.load`` takes, with the CLIP where it has a text tower.

        unit_range: pixels in [0, 1], as in `from_timm`. Raises ValueError for it with other models.
        setup: preprocess, force_quick_gelu and force_image_size of ``clipsteer.load``.
        """
        if model.startswith(TIMM):
            name = model.removeprefix(TIMM)
            timm = cls.from_timm(name, weights, unit_range=unit_range, device=device, **setup)
            return timm, None
        if unit_range:
            raise ValueError(f"Encoder.open: pixels in [0, 1] are for timm models, got {model!r}")
        clip = load(model, weights, device=device, **setup)
        return cls.from_clip(clip), clip if clip.has_text else None

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; pixels are to have it."""
        return next(self.module.parameters()).dtype

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, d), at least float32."""
        # attention reads a parametrised weight several times a pass
        with parametrize.cached():
            out = self.module(pixels)
        out = out[0] if isinstance(out, tuple | list) else out
        return out.to(torch.promote_types(out.dtype, torch.float32))

    def tokens(self, pixels: Tensor) -> Tokens:
        """Features with the tokens that they were pooled from. Raises ValueError for a tower
        without a class token."""
        if not self.prefix:
            raise ValueError(f"Encoder: {self.name or 'the tower'} has no class token")
        with capture(self.module, self._last) as found:
            features = self(pixels)
        tokens = found[self._last].to(features.dtype)
        return Tokens(features, tokens[:, 0], tokens[:, self.prefix :])

    def freeze_patches(self) -> None:
        """Stop training of the projection of pixels to tokens: the convolutions outside of blocks.

        Its gradient is many times that of any other layer where pictures share a background (one
        SGD step of 1e-3 on a DINOv2-small and pictures on white moves features by their own length,
        on all blocks together by a twentieth). Source: Kumar et al. 2022 (arXiv 2211.09359).
        """
        for name, child in self.module.named_modules():
            if isinstance(child, nn.Conv2d) and not any(name.startswith(b) for b in self.blocks):
                child.requires_grad_(False)

    def by_block(self) -> dict[str, list[nn.Parameter]]:
        """The tower's parameters that train, by block; what is in no block under the empty name."""
        found: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                block = next((b for b in self.blocks if name.startswith(f"{b}.")), "")
                found.setdefault(block, []).append(parameter)
        return found
