"""Inputs to draw for a proof."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clipsteer.ops._spec import gaussian

# (generator, scale, exact) -> keyword arguments; floating tensors in float64
Draw = Callable[[torch.Generator, float, bool], Mapping[str, Any]]

# what sizes are drawn from where none are given: edges of tiles, and 0 and 1
EDGES = (0, 1, 2, 5, 31, 32, 33, 64, 65, 127, 128, 129)


@dataclass(frozen=True)
class Cases:
    """Inputs by the names of their sizes.

        Cases(x="B d", W="n d", index="B k < n", k="k", sizes=[{"B": 5, "d": 33, "n": 65, "k": 4}])

    Args:
        shapes: for each argument "B d": a Gaussian tensor (B, d), in exact cases small integers;
            "B k < n": int64 below n; "=k": the size itself, as a number.
        sizes: dictionaries to draw from; empty: each size alone out of ``EDGES``.
        fixed: arguments that are the same in all cases.
    """

    shapes: Mapping[str, str]
    sizes: Sequence[Mapping[str, int]] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, text in self.shapes.items():
            shape, below, bound = (part.strip() for part in text.partition("<"))
            if not text.strip() or (below and (len(bound.split()) != 1 or not shape)):
                raise ValueError(
                    f'Cases: {name} must be like "B d", "B k < n" or "=k", got {text!r}'
                )
            for given in self.sizes:
                missing = sorted(set(_sizes_in(text)) - given.keys())
                if missing:
                    raise ValueError(f"Cases: {name} needs {missing}, which {dict(given)} lacks")

    def __call__(self, generator: torch.Generator, scale: float, exact: bool) -> dict[str, Any]:
        def pick(count: int) -> int:
            return int(torch.randint(count, (), generator=generator))

        if self.sizes:
            size = dict(self.sizes[pick(len(self.sizes))])
        else:
            names = sorted({n for text in self.shapes.values() for n in _sizes_in(text)})
            size = {name: EDGES[pick(len(EDGES))] for name in names}
            # of what indices stay below, and of what is a number, there is at least one
            for text in self.shapes.values():
                for name in _sizes_in(text.partition("<")[2] or text.partition("=")[2]):
                    size[name] = max(size[name], 1)
        drawn = {
            name: _drawn(text, size, generator, scale, exact) for name, text in self.shapes.items()
        }
        return drawn | dict(self.fixed)


def _sizes_in(text: str) -> list[str]:
    words = text.replace("<", " ").replace("=", " ").split()
    return [word for word in words if not word.isdigit()]


def _drawn(
    text: str, size: Mapping[str, int], generator: torch.Generator, scale: float, exact: bool
) -> Tensor | int:
    def number(word: str) -> int:
        return int(word) if word.isdigit() else size[word]

    if text.startswith("="):
        return number(text[1:].strip())
    shape, below, limit = text.partition("<")
    extent = [number(word) for word in shape.split()]
    if below:
        return torch.randint(number(limit.strip()), extent, generator=generator)
    if exact:
        return torch.randint(-2, 3, extent, generator=generator).double()
    return gaussian(extent, generator) * scale
