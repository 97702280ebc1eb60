"""How a tower's table of position embeddings is resampled for images of another size.

The rule is part of a model: features move by some per cent with it, most where the grid shrinks.
It follows the code that the weights were trained and published with.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

ANTIALIAS = "antialias"
BICUBIC = "bicubic"
# bicubic, with the antialiasing filter of PIL and without it
RULES = (ANTIALIAS, BICUBIC)


def resampled(
    table: Tensor,  # (prefix + h·w, d)
    old: tuple[int, int],  # (h, w)
    new: tuple[int, int],
    prefix: int,
    rule: str,
) -> Tensor:
    """A position table for another grid: (prefix + h'·w', d). Rows of class and register tokens
    stay as they are."""
    import torch  # not above: lists of options are read without torch

    if tuple(old) == tuple(new):
        return table
    grid = table[prefix:].float().unflatten(0, tuple(old)).permute(2, 0, 1)[None]  # (1, d, h, w)
    grid = torch.nn.functional.interpolate(
        grid, tuple(new), mode="bicubic", antialias=rule == ANTIALIAS, align_corners=False
    )
    rows = grid[0].flatten(1).T.to(table.dtype)  # (h'·w', d)
    return torch.cat([table[:prefix], rows])


def square(count: int) -> tuple[int, int]:
    """The grid of `count` patches of a square image. Raises ValueError where there is none."""
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(f"{count} positions are no square grid")
    return side, side


def origin_of(name: str) -> str:
    """The rule of the code that the weights of a timm model come from.

    DINO's and DINOv2's own code and transformers' have no antialiasing; DINOv2 with registers has,
    as timm does for whatever it resamples itself.
    """
    known, _, tag = name.partition(".")
    if tag == "dino" or ("dinov2" in known and "_reg" not in known):
        return BICUBIC
    return ANTIALIAS


def set_timm_size(trunk: Any, size: tuple[int, int], rule: str) -> None:
    """Set a model of timm to another image size, its position table resampled by a rule.

    One without the method, such as a convolutional one, sees images of any size. Raises ValueError
    for a rule other than timm's where there is no such table.
    """
    if not hasattr(trunk, "set_input_size"):
        return
    if rule == ANTIALIAS:
        trunk.set_input_size(size)
        return
    table: Any = getattr(trunk, "pos_embed", None)
    old = getattr(getattr(trunk, "patch_embed", None), "grid_size", None)
    if getattr(table, "ndim", 0) != 3 or old is None:
        raise ValueError(
            f"position_interpolation={rule!r} is for towers with one table of positions; "
            f"{type(trunk).__name__} resamples what it has in its own way, {ANTIALIAS!r}"
        )
    kept = table.detach()
    trunk.set_input_size(size)
    prefix = 0 if trunk.no_embed_class else trunk.num_prefix_tokens
    rows = resampled(kept[0], old, trunk.patch_embed.grid_size, prefix, rule)
    trunk.pos_embed.data = rows[None]
