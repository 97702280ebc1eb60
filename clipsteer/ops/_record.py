"""What a record of an op holds (``_lowlevel.RECORDS``): the low-level ops beneath it, who serves
them, and which backend a GPU tries first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

BACKENDS = ("reference", "cpp", "triton", "cuda")


class LowLevel(NamedTuple):
    """What torch has to know of a low-level op: its arguments, and its outputs without their
    values."""

    schema: str
    fake: Callable[..., Any]
    # the arguments that have a row each of the batch, by position: torch.vmap adds to the rows
    rows: tuple[int, ...] = ()
    # where the rows are summed by groups: which of them says a row's group, and the argument that
    # says how many there are
    groups: tuple[int, int] | None = None
    # C++ has it alone: one call of what elsewhere are several
    cpp_only: bool = False


def alone(schema: str, fake: Callable[..., Any]) -> LowLevel:
    """One that C++ has alone."""
    return LowLevel(schema, fake, cpp_only=True)


# backends by compute capability and dtype, the faster first
Order = Callable[[tuple[int, int], torch.dtype], tuple[str, ...]]


def triton_first(capability: tuple[int, int], dtype: torch.dtype) -> tuple[str, ...]:
    """The order of most ops, whichever the GPU."""
    return ("triton", "cuda")


@dataclass(frozen=True)
class Op:
    """An op: ``ops/<stem>.py``, ``ops/specs/<stem>.py`` and, for Triton, ``kernels/<stem>.py``."""

    stem: str
    low_level: dict[str, LowLevel]
    # the ops of the file, where they are several
    ops: tuple[str, ...] = ()
    # what dispatch and the registry tell apart besides the ops themselves
    variants: tuple[str, ...] = ()
    backends: tuple[str, ...] = BACKENDS
    # where not all of them serve the variants: those that do, and what the variants are called with
    variant_backends: tuple[str, ...] | None = None
    options: str = ""
    # what ``auto`` tries on a GPU
    gpu_order: Order = triton_first

    @property
    def names(self) -> tuple[str, ...]:
        """As dispatch and the registry know it."""
        return (*(self.ops or (self.stem,)), *self.variants)

    @property
    def kernels(self) -> dict[str, LowLevel]:
        """The low-level ops that ``kernels/<stem>.py`` has."""
        if "triton" not in self.backends:
            return {}
        return {name: low for name, low in self.low_level.items() if not low.cpp_only}

    def served_by(self, name: str) -> tuple[str, ...]:
        """The backends of the op or of a variant of it."""
        if name not in self.variants or self.variant_backends is None:
            return self.backends
        return self.variant_backends
