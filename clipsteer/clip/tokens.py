"""Which tokens of a hook point are meant: all of them, the class token, or the patches."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from clipsteer.clip.module import module_of

TOKENS = ("all", "cls", "patches")
# what torch.compile and DistributedDataParallel call the module that they wrap
_WRAPPED = ("_orig_mod", "module")


class Layout(NamedTuple):
    """The tokens that an image tower works on, and the hook point that one looks at."""

    hook_point: str
    prefix: int  # class and register tokens before the patches
    patches: int | None  # of the whole grid; None where images may have any size

    def before_patches(self, count: int) -> int | None:
        """How many of the `count` tokens that the module gives precede the patches.

        None where they are neither the tower's tokens nor the patches alone: pooled outputs,
        attention pooling.
        """
        if self.patches is None:
            return self.prefix if count > self.prefix else None
        return {self.patches + self.prefix: self.prefix, self.patches: 0}.get(count)

    def where(self, what: str, tokens: str, count: int) -> slice:
        """The part of `count` tokens that is meant. Raises ValueError, with `what` in front, where
        there is none."""
        if tokens == "all":
            return slice(None)
        prefix = self.before_patches(count)
        if prefix is None or (tokens == "cls" and prefix == 0):
            missing = "no class token" if tokens == "cls" else "no patch tokens"
            raise ValueError(
                f"{what}: {self.hook_point!r} has {missing} among its {count}; tokens must be "
                f"'all', got {tokens!r}"
            )
        return slice(0, 1) if tokens == "cls" else slice(prefix, None)

    def check(self, what: str, wanted: Iterable[str]) -> None:
        """Raise ValueError for unknown tokens, and for a tower that has no class token at all."""
        for tokens in wanted:
            if tokens not in TOKENS:
                raise ValueError(f"{what}: tokens must be one of {TOKENS}, got {tokens!r}")
            if tokens != "all" and self.prefix == 0:
                raise ValueError(
                    f"{what}: there is no class token at {self.hook_point!r}; tokens must be "
                    f"'all', got {tokens!r}"
                )


def layout_at(model: Any, hook_point: str) -> Layout:
    """The layout of the image tower that a module belongs to; text towers and ResNets have no class
    token.

    The tower is the module called "visual", wherever a wrapper has moved it to.
    """
    parts = hook_point.split(".")
    if "visual" not in parts:
        return Layout(hook_point, 0, None)
    visual: Any = module_of(model).get_submodule(".".join(parts[: parts.index("visual") + 1]))
    while wrapped := [name for name in _WRAPPED if name in visual._modules]:
        visual = visual._modules[wrapped[0]]
    if hasattr(visual, "trunk"):
        return _timm_layout(visual.trunk, hook_point)
    grid = getattr(visual, "grid_size", None)
    prefix = int(hasattr(visual, "class_embedding"))
    return Layout(hook_point, prefix, math.prod(grid) if grid else None)


def _timm_layout(trunk: Any, hook_point: str) -> Layout:
    prefix = int(getattr(trunk, "num_prefix_tokens", 0))
    embedding = getattr(trunk, "patch_embed", None)
    if not getattr(trunk, "dynamic_img_size", False):
        return Layout(hook_point, prefix, getattr(embedding, "num_patches", None))
    # the patch embedding itself comes before the class token, and how many patches there are is
    # only seen in its output
    return Layout(hook_point, 0 if "patch_embed" in hook_point.split(".") else prefix, None)


def class_tokens(model: Any, hook_point: str) -> int:
    """How many class and register tokens precede the patches in a hook point's tower; 0 in text
    towers and ResNets. model: what ``clipsteer.load`` returns, or a module."""
    return layout_at(model, hook_point).prefix
