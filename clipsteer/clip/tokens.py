"""Which tokens of a hook point are meant: all of them, the class token, or the patches.

The layout is read from the tower: open_clip's ``class_embedding``, timm's ``num_prefix_tokens``,
the embeddings of transformers' models (class and register tokens).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from clipsteer.clip.module import WRAPPED, module_of

TOKENS = ("all", "cls", "patches")
_POOLED = "it comes after the pooling of the tokens"
_HEADS = "its rows are heads of tokens"
_PADDED = "images are padded to one number of patches, and which are padding is not said"
# norms of queries and keys (B, heads, T, d), by timm's and open_clip's names
OF_HEADS = ("q_norm", "k_norm", "ln_q", "ln_k")
# of timm's and of transformers' towers
_AFTER_POOLING = ("attn_pool", "fc_norm", "head", "head_drop", "pooler", "classifier")
# in the embeddings of transformers' towers, in the order in which they stand before the patches
_PREFIX = ("cls_token", "class_embedding", "distillation_token", "register_tokens")


class Layout(NamedTuple):
    """The tokens that an image tower works on, and the hook point that one looks at."""

    hook_point: str
    prefix: int  # class and register tokens before the patches
    patches: int | None  # of the whole grid; None where images may have any size
    has_class: bool = True  # whether the first of the prefix is a class token
    unknown: str = ""  # why it cannot be said which tokens are which

    def before_patches(self, count: int) -> int | None:
        """How many of the `count` tokens that the module gives precede the patches.

        None where they are neither the tower's tokens nor the patches alone: pooled outputs,
        attention pooling.
        """
        if self.unknown:
            return None
        if self.patches is None:
            return self.prefix if count > self.prefix else None
        return {self.patches + self.prefix: self.prefix, self.patches: 0}.get(count)

    def where(self, what: str, tokens: str, count: int) -> slice:
        """The part of `count` tokens that is meant. Raises ValueError, with `what` in front, where
        there is none."""
        if tokens == "all":
            return slice(None)
        prefix = self.before_patches(count)
        if prefix is None or (tokens == "cls" and not (prefix and self.has_class)):
            missing = "no class token" if tokens == "cls" else "no patch tokens"
            raise ValueError(
                f"{what}: {self.hook_point!r} has {missing} among its {count}{self._why}; tokens "
                f"must be 'all', got {tokens!r}"
            )
        return slice(0, 1) if tokens == "cls" else slice(prefix, None)

    def check(self, what: str, wanted: Iterable[str]) -> None:
        """Raise ValueError for unknown tokens, and for a tower that has no such tokens at all."""
        for tokens in wanted:
            if tokens not in TOKENS:
                raise ValueError(f"{what}: tokens must be one of {TOKENS}, got {tokens!r}")
            if tokens == "all" or (tokens == "patches" and self.patches):
                continue
            if not self.prefix or (tokens == "cls" and not self.has_class):
                missing = "there is no class token"
                if self.unknown:
                    missing = "it is not known which tokens are which"
                raise ValueError(
                    f"{what}: {missing} at {self.hook_point!r}{self._why}; tokens must be 'all', "
                    f"got {tokens!r}"
                )

    @property
    def _why(self) -> str:
        return f" ({self.unknown})" if self.unknown else ""


def layout_at(model: Any, hook_point: str) -> Layout:
    """The layout of the image tower that a module belongs to; text towers and ResNets have no class
    token.

    The tower is the innermost module around the hook point that says what its tokens are; a model
    may be one itself.
    """
    tower: Any = module_of(model)
    names = hook_point.split(".")
    layout = Layout(hook_point, 0, None)
    for at in range(len(names) + 1):
        if at:
            tower = tower.get_submodule(names[at - 1])
        inside = [name for name in names[at:] if name not in WRAPPED]
        layout = _layout_in(_unwrapped(tower), layout, inside) or layout
    if names[-1] in OF_HEADS and not layout.unknown:
        return layout._replace(unknown=_HEADS)
    return layout


def _unwrapped(module: Any) -> Any:
    while wrapped := [name for name in WRAPPED if name in module._modules]:
        module = module._modules[wrapped[0]]
    return module


def _layout_in(tower: Any, layout: Layout, inside: list[str]) -> Layout | None:
    """A hook point's layout in a tower, by the names that lead from one to the other; None where
    this module is no tower that says it."""
    if hasattr(tower, "class_embedding") and hasattr(tower, "transformer"):
        return _open_clip(tower, layout, inside)
    if hasattr(tower, "num_prefix_tokens") or hasattr(tower, "forward_features"):
        return _timm(tower, layout, inside)
    if hasattr(tower, "embeddings") and hasattr(getattr(tower, "config", None), "patch_size"):
        return _transformers(tower, layout, inside)
    own = [name for name, _ in tower.named_parameters(recurse=False)]
    strange = [name for name in own if name.startswith(("cls_", "class_"))]
    if strange and not (layout.prefix or layout.patches):
        unknown = f"{type(tower).__name__} does not say where its {strange[0]} stands"
        return layout._replace(unknown=unknown)
    return None


def _open_clip(visual: Any, layout: Layout, inside: list[str]) -> Layout:
    grid = getattr(visual, "grid_size", None)
    layout = layout._replace(prefix=1, patches=math.prod(grid) if grid else None)
    if inside and getattr(visual, "attn_pool", None) is not None:
        # with one pooler the norm comes after it, with two before both
        two = getattr(visual, "attn_pool_contrastive", None) is not None
        if inside[0].startswith("attn_pool") or (inside[0] == "ln_post" and not two):
            return layout._replace(unknown=_POOLED)
    return layout


def _timm(trunk: Any, layout: Layout, inside: list[str]) -> Layout:
    embedding = getattr(trunk, "patch_embed", None)
    prefix = getattr(trunk, "num_prefix_tokens", None)
    patches = getattr(embedding, "num_patches", None)
    own = [name for name, _ in trunk.named_parameters(recurse=False)]
    has_class = any(name.startswith("cls_token") for name in own)
    has_class |= bool(getattr(trunk, "has_class_token", False))
    layout = layout._replace(has_class=has_class)
    if prefix is None and has_class:
        unknown = f"{type(trunk).__name__} does not say where its class token stands"
        return layout._replace(unknown=unknown)
    if inside and inside[0] in _AFTER_POOLING:
        layout = layout._replace(unknown=_POOLED)
    if len(inside) > 1 and inside[0] == "embeds":  # of a NaFlexVit
        layout = layout._replace(unknown=f"it is part of {type(trunk).__name__}'s embedding")
    if prefix is None:
        return layout  # of many scales, none of which are "the" patches
    if getattr(trunk, "dynamic_img_size", False):
        # the patch embedding itself comes before the class token, and how many patches there are
        # is only seen in its output
        return layout._replace(prefix=0 if "patch_embed" in inside else int(prefix))
    return layout._replace(
        prefix=int(prefix), patches=patches if isinstance(patches, int) else None
    )


def _transformers(tower: Any, layout: Layout, inside: list[str]) -> Layout:
    embeddings = tower.embeddings
    counts = {}
    for name, parameter in embeddings.named_parameters(recurse=False):
        # neither positions nor what stands in for a hidden patch are tokens
        if "pos" not in name and "mask" not in name:
            counts[name] = math.prod(parameter.shape[:-1])
    strange = [name for name in counts if name not in _PREFIX]
    if strange:
        unknown = f"{type(embeddings).__name__} does not say where its {strange[0]} stand"
        return layout._replace(unknown=unknown)
    layout = layout._replace(has_class=bool(counts.keys() & set(_PREFIX[:2])))
    if inside and inside[0] in _AFTER_POOLING:
        layout = layout._replace(unknown=_POOLED)
    padded = hasattr(getattr(embeddings, "patch_embedding", None), "in_features")
    if padded and getattr(tower, "is_padded", True):
        return layout._replace(unknown=_PADDED)
    is_patches = len(inside) > 1 and inside[1].startswith("patch_embed")
    prefix = 0 if is_patches else sum(counts.values())
    # positions are resized to images of any size; without a prefix a count tells what tokens are
    patches = None if prefix else _grid(tower.config)
    return layout._replace(prefix=prefix, patches=patches)


def _grid(config: Any) -> int | None:
    """Patches of an image of the size that a configuration of transformers names."""
    size = getattr(config, "image_size", None)
    if size is None:
        return None
    sides = []
    for value in (size, config.patch_size):
        sides.append(list(value) if isinstance(value, list | tuple) else [value, value])
    return (sides[0][0] // sides[1][0]) * (sides[0][1] // sides[1][1])


def class_tokens(model: Any, hook_point: str) -> int:
    """How many class and register tokens precede the patches in a hook point's tower; 0 in text
    towers and ResNets. model: what ``clipsteer.load`` returns, or a module."""
    return layout_at(model, hook_point).prefix
