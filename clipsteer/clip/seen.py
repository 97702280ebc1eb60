"""Which part of an image a model sees: where its patches lie on the picture that they came from."""

from __future__ import annotations

from typing import Any, NamedTuple

_RESIZES = frozenset({"Resize", "ResizeKeepRatio"})
_CROPS = frozenset({"CenterCrop", "CenterCropOrPad"})
# steps of open_clip's and timm's transforms that leave every pixel where it is
_IN_PLACE = frozenset(
    {
        "as_rgb",
        "_convert_to_rgb",
        "MaybeConvertMode",
        "ToTensor",
        "MaybeToTensor",
        "MaybePILToTensor",
        "PILToTensor",
        "Normalize",
    }
)


class Box(NamedTuple):
    """A part of a picture, in shares of its width and height: (0, 0, 1, 1) is all of it.

    Sides may lie outside: there the model sees what its preprocessing pads with.
    """

    left: float
    top: float
    right: float
    bottom: float


def seen_box(
    transform: Any,
    size: tuple[int, int],  # (width, height)
) -> Box | None:
    """Where the model's square lies on a picture of this size.

    Args:
        transform: a model's `preprocess`. Known are the evaluation transforms of open_clip (resized
            to the shortest side and cropped, to the longest and padded, squashed) and of timm.
        size: of the picture, upright, in pixels.

    Returns None for a transform with a step that may move pixels in another way.
    """
    # per axis, x before all steps is scale · x + start after them
    scale = [1.0, 1.0]
    start = [0.0, 0.0]
    now = size
    for step in getattr(transform, "transforms", [transform]):
        kind = getattr(step, "__name__", type(step).__name__)
        if kind in _RESIZES:
            resized = _resized(step, now)
            scale = [s * a / b for s, a, b in zip(scale, now, resized)]
            now = resized
        elif kind in _CROPS:
            height, width = step.size
            offsets = [_offset(a, b) for a, b in zip(now, (width, height))]
            start = [t + s * offset for t, s, offset in zip(start, scale, offsets)]
            now = (width, height)
        elif kind not in _IN_PLACE:
            return None
    end = [t + s * length for t, s, length in zip(start, scale, now)]
    width, height = size
    return Box(start[0] / width, start[1] / height, end[0] / width, end[1] / height)


def _resized(step: Any, size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) as the step itself makes it: each library rounds in its own way."""
    from PIL import Image

    return step(Image.new("L", size)).size


def _offset(length: int, wanted: int) -> int:
    """Where torchvision's centre crop begins; below 0 where it pads."""
    if wanted > length:
        return -((wanted - length) // 2)
    return round((length - wanted) / 2)
