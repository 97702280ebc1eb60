"""The patches that a tower divides images into; pixels outside of whole ones are seen by none."""

from __future__ import annotations

from typing import Any

from torch import nn

Size = tuple[int, int]  # (height, width)


def patch_of(tower: nn.Module) -> Size | None:
    """The size of a tower's patches; None for one that takes, or pads, images of any size."""
    parts: list[Any] = list(tower.modules())
    if any(getattr(part, "dynamic_img_pad", False) for part in parts):
        return None
    for part in parts:
        # the first layer of most towers; what overlaps or pads loses no pixels
        if isinstance(part, nn.Conv2d) and part.in_channels == 3:
            high, wide = part.kernel_size
            is_cut = part.stride == part.kernel_size and part.padding in ("valid", (0, 0))
            return (high, wide) if is_cut else None
        # SigLIP 2's multiplies the pixels of a patch, in transformers and in timm
        size = getattr(getattr(part, "config", part), "patch_size", None)
        high, wide = size if isinstance(size, list | tuple) else (size, size)
        if isinstance(high, int) and _first_width(part) == 3 * high * wide:
            return high, wide
    return None


def _first_width(part: nn.Module) -> int | None:
    linear = next((layer for layer in part.modules() if isinstance(layer, nn.Linear)), None)
    return None if linear is None else linear.in_features


def check_whole(name: str, tower: nn.Module, size: Size, *own: Any) -> None:
    """Raise ValueError for an image size that is not whole patches, naming the nearest two that
    are; `own` are sizes that the model was published or written with, which it keeps."""
    patch = patch_of(tower)
    if patch is None or tuple(size) in own:
        return
    smaller = [side // of * of for side, of in zip(size, patch)]
    larger = [-(-side // of) * of for side, of in zip(size, patch)]
    if smaller == larger:
        return
    near = " or ".join(_shown(sides) for sides in (smaller, larger) if min(sides) > 0)
    raise ValueError(
        f"load: {name} divides images into patches of {_shown(patch)} pixels, and image size "
        f"{_shown(size)} is not whole patches; take {near}"
    )


def _shown(size: Any) -> str:
    """As options write it: N, or HxW."""
    height, width = size
    return f"{height}" if height == width else f"{height}x{width}"
