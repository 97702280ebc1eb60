"""What every function that reads files has in common."""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from clipsteer.io.messages import FileFormatError

Given = ParamSpec("Given")
Found = TypeVar("Found")


def door(reader: Callable[Given, Found]) -> Callable[Given, Found]:
    """A reader that the caller's default device does not reach, and that refuses names no file can
    have, wherever they come from.

    Under ``torch.set_default_device("meta")`` or ``with torch.device("cuda")`` whatever torch makes
    without a device would lie there: tensors without values, or on another device than asked for.
    """

    @functools.wraps(reader)
    def read(*args: Given.args, **kwargs: Given.kwargs) -> Found:
        try:
            with torch.device("cpu"):
                return reader(*args, **kwargs)
        except (OSError, ValueError) as error:
            if not _is_of_a_name(error):
                raise
            where = str(getattr(error, "filename", None) or "a name with a null character")
            raise FileFormatError(f"{where:.200}: no file can have this name") from None

    return read


def _is_of_a_name(error: OSError | ValueError) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENAMETOOLONG
    return str(error).startswith("embedded null")
