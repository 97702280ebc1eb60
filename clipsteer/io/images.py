"""Images in: the only place that opens image files, and the form in which every model sees them.

Files are opened with the readers of the accepted suffixes alone (some of Pillow's start other
programs), and only where they are regular files. What a reader raises comes out as
``ImageFileError`` with the path.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from clipsteer.io.files import FileFormatError, open_regular

if TYPE_CHECKING:
    from PIL.Image import Image


# Pillow's own default, at which it begins to warn of decompression bombs
MAX_PIXELS = 89_478_485
_FORMATS: Mapping[str, str] = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".ppm": "PPM",
}
IMAGE_SUFFIXES = frozenset(_FORMATS)
_READERS = tuple(dict.fromkeys(_FORMATS.values()))

_WITH_ALPHA = frozenset({"RGBA", "LA", "PA", "RGBa", "La"})
_WITH_A_CLEAR_COLOUR = frozenset({"1", "L", "P", "RGB"})
# formats whose greys of more than 8 bits Pillow scales, or leaves, at 16 bits in mode I
_WIDE_IN_MODE_I = frozenset({"PNG", "PPM"})
_BITS_PER_SAMPLE = 258  # a tag of TIFF
_PHOTOMETRIC = 262  # a tag of TIFF; 0: the largest value is black


class ImageFileError(FileFormatError):
    """An image that cannot be read; who reads many may go on without it."""


@contextlib.contextmanager
def open_image(source: str | Path | bytes, name: str | None = None) -> Iterator[Image]:
    """An image file, or its bytes, as Pillow opens it: the size is known, the pixels are not read.

    Raises:
        ImageFileError: not a regular file, not an image of the accepted formats, of more than
            MAX_PIXELS pixels, or whatever is raised in the block, damage being found when pixels
            are read; the message names `name`, or the path. FileNotFoundError.
    """
    from PIL import Image, UnidentifiedImageError

    name = name or (f"{len(source)} bytes" if isinstance(source, bytes) else str(source))
    try:
        with contextlib.ExitStack() as stack:
            file: BinaryIO = io.BytesIO()
            if isinstance(source, bytes):
                file = io.BytesIO(source)
            else:
                file = stack.enter_context(open_regular(Path(source))[0])
            image = stack.enter_context(Image.open(file, formats=_READERS))
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width} × {height} pixels; at most {MAX_PIXELS:,} are read")
            yield image
    except FileNotFoundError:
        raise
    except FileFormatError as error:
        raise ImageFileError(error) from error
    except UnidentifiedImageError as error:
        expected = ", ".join(_READERS)
        raise ImageFileError(
            f"{name}: cannot be read as an image; expected one of {expected}"
        ) from error
    except Exception as error:  # struct.error, EOFError, zlib.error …: each reader has its own
        what = str(error) or type(error).__name__
        raise ImageFileError(f"{name}: cannot be read as an image: {what}") from error


def read_image(source: str | Path | bytes, name: str | None = None) -> Image:
    """An image file, or its bytes, as `as_rgb` makes it: RGB, upright, on white.

    Of a file with several images the first.

    Raises:
        ImageFileError: not a regular file, not an image, damaged, of a mode without a known range,
            or of more than MAX_PIXELS pixels; the message names `name`, or the path.
        FileNotFoundError.
    """
    with open_image(source, name) as image:
        return as_rgb(image)


def as_rgb(image: Image) -> Image:
    """A PIL image as every model here sees it: RGB of 8 bits, upright by its EXIF, on white.

    The same whether it comes from a file of any mode or from somebody's own code. Greys of 16 bits
    (modes I;16, I;16L, I;16B; I of a PNG or PPM) are scaled by 255/65535 and rounded, those of a
    12-bit TIFF by 255/4095. Colours of 16 bits are Pillow's, which keeps the upper 8. Of an
    animation the present frame is taken.

    Raises ValueError for modes I and F otherwise, whose range nothing tells.
    """
    from PIL import Image, ImageOps

    wide = _wide_grey(image)
    clear = _clear_colour(image)  # before the pixels are read
    upright: Image.Image = ImageOps.exif_transpose(image)
    if wide is not None:
        values = np.asarray(upright).astype(np.int64)
        grey = (values * 255 + wide.top // 2) // wide.top
        grey = 255 - grey if wide.inverted else grey
        if clear is not None:
            grey = np.where(values == clear, 255, grey)
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if clear is not None:
        upright.info["transparency"] = clear
    if upright.mode == "La":  # Pillow has no other way from here
        upright = upright.convert("LA")
    palette = upright.palette.mode if upright.mode == "P" and upright.palette else ""
    if upright.mode in _WITH_ALPHA or clear is not None or palette.endswith("A"):
        upright = upright.convert("RGBA")
        white = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(white, upright)
    return upright.convert("RGB")


class _Wide(NamedTuple):
    """Greys of more than 8 bits."""

    top: int  # the largest value
    inverted: bool  # whether that is black


def _wide_grey(image: Image) -> _Wide | None:
    """How far the values of a grey image of more than 8 bits go; None for other images."""
    if image.mode == "I" and image.format in _WIDE_IN_MODE_I:
        return _Wide(65535, False)
    if image.mode in ("I", "F"):
        raise ValueError(
            f"the values of mode {image.mode!r} have no known range; make it 8-bit grey first, "
            "such as Image.fromarray((255 * values / values.max()).astype('uint8'))"
        )
    if not image.mode.startswith("I;16"):
        return None
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, (16,))
    return _Wide(4095 if bits == (12,) else 65535, tags.get(_PHOTOMETRIC) == 0)


def _clear_colour(image: Image) -> Any:
    """The colour, palette entry or palette's opacities that stand for transparency; None without.

    PNG names a colour in the depth of its samples; Pillow leaves it so beside pixels of 8 bits.
    """
    clear = image.info.get("transparency")
    wide = image.mode == "I" or image.mode.startswith("I;16")
    if clear is None or not (wide or image.mode in _WITH_A_CLEAR_COLOUR):
        return None
    if image.mode == "RGB" and isinstance(clear, tuple) and max(clear) > 255:
        return tuple(value >> 8 for value in clear)
    if image.mode == "L" and isinstance(clear, int):
        packed = {args for *_, args in getattr(image, "tile", [])}  # until the pixels are read
        return clear * (85 if "L;2" in packed else 17 if "L;4" in packed else 1)
    return clear
