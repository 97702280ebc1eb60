"""Where a reader's tensors lie: on the CPU, whatever the caller's default device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Given = ParamSpec("Given")
Found = TypeVar("Found")


def on_cpu(reader: Callable[Given, Found]) -> Callable[Given, Found]:
    """A reader that the caller's default device does not reach.

    Under ``torch.set_default_device("meta")`` or ``with torch.device("cuda")`` whatever torch makes
    without a device would lie there: tensors without values, or on another device than asked for.
    """

    @functools.wraps(reader)
    def read(*args: Given.args, **kwargs: Given.kwargs) -> Found:
        with torch.device("cpu"):
            return reader(*args, **kwargs)

    return read
