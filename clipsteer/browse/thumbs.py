"""Thumbnails of what a model sees: the part of a picture that its preprocessing keeps."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clipsteer.clip.seen import Box, seen_box
from clipsteer.io.images import as_rgb, read_image

if TYPE_CHECKING:
    from PIL.Image import Image

SIZE = 128
_QUALITY = 80


def thumbnail(image: Any, transform: Any, pixels: Tensor) -> bytes:
    """A WebP of at most SIZE pixels a side, on which the patch grid lies from edge to edge.

    Args:
        image: a PIL image, a path, or a preprocessed tensor.
        transform: the model's ``preprocess``.
        pixels: (3, H, W), the image as the transform gives it; the thumbnail is made of it where
            nobody knows which part of the picture is seen.
    """
    buffer = io.BytesIO()
    _seen(image, transform, pixels).save(buffer, "WEBP", quality=_QUALITY, method=4)
    return buffer.getvalue()


def _seen(image: Any, transform: Any, pixels: Tensor) -> Image:
    if not isinstance(image, Tensor):
        picture = (
            read_image(os.fspath(image)) if isinstance(image, str | os.PathLike) else as_rgb(image)
        )
        box = seen_box(transform, picture.size)
        if box is not None:
            return _cropped(picture, box, tuple(pixels.shape[1:]))
    return _of_pixels(transform, pixels)


def _cropped(picture: Image, box: Box, shape: tuple[int, ...]) -> Image:
    """The box of the picture, in the shape (H, W) of what the model sees; no larger than it is."""
    from PIL import Image as PILImage

    width, height = picture.size
    edges = (box.left * width, box.top * height, box.right * width, box.bottom * height)
    left, top, right, bottom = map(round, edges)
    crop = picture.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
    # squashed as the model's preprocessing squashes
    scale = min(1.0, SIZE / max(shape), max(crop.size) / max(shape))
    size = (max(1, round(shape[1] * scale)), max(1, round(shape[0] * scale)))
    return crop.resize(size, PILImage.Resampling.LANCZOS)


def _of_pixels(transform: Any, pixels: Tensor) -> Image:
    """Pixels with the normalisation undone, or else between their extremes."""
    from PIL import Image as PILImage

    values = pixels.float()
    steps = getattr(transform, "transforms", [transform])
    normalise = [step for step in steps if type(step).__name__ == "Normalize"]
    if normalise:
        mean, std = (torch.as_tensor(v).float() for v in (normalise[-1].mean, normalise[-1].std))
        values = values * std[:, None, None] + mean[:, None, None]
    else:
        values = (values - values.min()) / (values.max() - values.min()).clamp_min(1e-12)
    whole = (values.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    picture = PILImage.fromarray(whole.cpu().numpy())
    picture.thumbnail((SIZE, SIZE), PILImage.Resampling.LANCZOS)
    return picture
