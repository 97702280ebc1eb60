"""Towers of transformers with their parts under clipsteer's names."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from clipsteer.clip.positions import resampled, square

# what parts of towers are called here; all others keep their names
_NAMES = {
    "pre_layrnorm": "norm_pre",
    "layernorm": "norm",
    "post_layernorm": "norm",
    "rope_embeddings": "rope",
    "final_layer_norm": "ln_final",
}


def _without_layers(tower: nn.Module, own: type, names: dict[str, str]) -> dict[str, nn.Module]:
    """The parts of a tower beside its layers, by the names that they have here."""
    found = {}
    for name, child in tower.named_children():
        if not any(isinstance(part, own) for part in child.modules()):
            found[names.get(name, name)] = child
    return found


def _layers(tower: Any) -> nn.ModuleList:
    count = tower.config.num_hidden_layers
    lists = [part for part in tower.modules() if isinstance(part, nn.ModuleList)]
    found = next((part for part in lists if len(part) == count), None)
    if found is None:
        raise ValueError(f"load: a {type(tower).__name__} has no list of {count} layers")
    return found


class _Parts(nn.Module):
    """A tower of transformers, whose parts are registered here under other names.

    The tower itself stands outside of the module tree: each of its parts would have two names, and
    each weight be written twice.
    """

    def __init__(self, tower: Any, names: dict[str, str]) -> None:
        super().__init__()
        self._tower = (tower,)  # in a tuple it is no submodule
        layers = _layers(tower)
        for name, part in _without_layers(tower, type(layers[0]), names).items():
            self.add_module(name, part)
        self._place(layers)
        lost = {id(p) for p in tower.parameters()} - {id(p) for p in self.parameters()}
        if lost:
            raise ValueError(
                f"load: a {type(tower).__name__} of this transformers has weights outside of its "
                "parts"
            )

    def _place(self, layers: nn.ModuleList) -> None:
        self.blocks = layers


class Trunk(_Parts):
    """An image tower: (B, 3, H, W) -> (B, e).

    Args:
        tower: what has the embeddings and layers.
        size: (height, width) of the images.
        projection: what follows the pooled output of a CLIP.
    """

    # tokens of every image lie on one grid
    is_padded = False

    def __init__(self, tower: Any, size: tuple[int, int], projection: nn.Module | None) -> None:
        kind = tower.config.model_type
        pooled_norm = {"post_layernorm": "fc_norm"} if kind.startswith(("clip", "metaclip")) else {}
        super().__init__(tower, {**_NAMES, **pooled_norm})
        self.config = copy.copy(tower.config)
        self.config.image_size = size
        self.embed_dim = tower.config.hidden_size
        self.num_features = self.embed_dim if projection is None else projection.out_features
        self.proj = projection
        wanted = inspect.signature(tower.embeddings.forward).parameters
        self._any_size = "interpolate_pos_encoding" in wanted
        self._patches = "spatial_shapes" in wanted

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> features (B, e)."""
        (tower,) = self._tower
        if self._patches:
            found = tower(*self._patched(pixels))
        elif self._any_size:
            found = tower(pixels, interpolate_pos_encoding=True)
        else:
            found = tower(pixels)
        pooled = found.pooler_output
        if pooled is None:  # no head: the class token, or all tokens
            tokens = found.last_hidden_state
            has_class = getattr(self.embeddings, "cls_token", None) is not None
            pooled = tokens[:, 0] if has_class else tokens.mean(1)
        return pooled if self.proj is None else self.proj(pooled)

    def _patched(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels of patches (B, h·w, p·p·3), which are no padding, and the grid: SigLIP 2's way."""
        p = self.config.patch_size
        h, w = pixels.shape[2] // p, pixels.shape[3] // p
        parts = pixels[:, :, : h * p, : w * p].unflatten(3, (w, p)).unflatten(2, (h, p))
        rows = parts.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (B, h·w, p·p·3)
        mask = torch.ones(rows.shape[:2], dtype=torch.long, device=pixels.device)
        shapes = torch.tensor([[h, w]], device=pixels.device).expand(len(pixels), 2)
        return rows, mask, shapes


class Rule:
    """Stands in for ``interpolate_pos_encoding`` of embeddings: the same with another rule."""

    def __init__(self, embeddings: Any, rule: str) -> None:
        self.embeddings = embeddings
        self.rule = rule

    def __call__(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """The table (1, prefix + h·w, d) for pixels (height, width)."""
        own = self.embeddings
        # a parameter, or the weight of an nn.Embedding
        named = getattr(own, "position_embeddings", None)
        table = own.position_embedding.weight if named is None else named[0]
        names = dict(own.named_parameters(recurse=False))
        prefix = int("cls_token" in names or "class_embedding" in names)
        p = own.patch_size
        high, wide = p if isinstance(p, list | tuple) else (p, p)
        grid = (height // high, width // wide)
        return resampled(table, square(len(table) - prefix), grid, prefix, self.rule)[None]


class Text(_Parts):
    """A text tower: (B, L) token ids -> (B, e)."""

    def __init__(self, tower: Any, projection: nn.Module | None) -> None:
        super().__init__(tower, _NAMES)
        self.proj = projection

    def _place(self, layers: nn.ModuleList) -> None:
        self.transformer = nn.Module()
        self.transformer.resblocks = layers

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L) token ids -> features (B, e)."""
        (tower,) = self._tower
        pooled = tower(input_ids=tokens).pooler_output
        return pooled if self.proj is None else self.proj(pooled)
