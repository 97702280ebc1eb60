"""The cases of `clipsteer.testing.grid`: their sizes, how they are drawn, and whether ours is right
on them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from clipsteer.ops._spec import (
    Draw,
    Errors,
    Inputs,
    OpSpec,
    Shape,
    cotangents,
    judged,
    named_outputs,
    run,
)

# The product of rows and features, up to which a case has all 49,152 features of the main
# benchmark: a dense rival's operations grow with it. torch has no fast float16 product on most
# processors, so there it is a quarter.
_PRODUCT = 2**24
_PRODUCT_HALF = 2**22
# the same product, to which the check of values is cut where it has float64 matrices of that size
_CHECKED = 2**21
# sizes that the check of gradients is cut to
_GRADIENT_CHECK = {"B": 64, "N": 200, "n": 2048}
# numbers of one tensor from which on cases share what was drawn
_SHARED = 2**22
# of a shape, what is no size
_SWITCHES = ("plain", "percent", "even")


def shape_at(spec: OpSpec, rows: int, dtype: str) -> Shape:
    """The op's first benchmark shape with this many rows, and with fewer features where there are
    many rows."""
    shape = dict(next(iter(spec.bench_shapes.values())))
    shape["B" if "B" in shape else "N"] = rows
    if "n" in shape:
        limit = _PRODUCT_HALF if dtype == "float16" else _PRODUCT
        shape["n"] = min(shape["n"], limit // rows)
    return shape


def label_of(shape: Shape) -> str:
    """The sizes of a shape in words, without its switches."""
    return "-".join(f"{name}{size}" for name, size in shape.items() if name not in _SWITCHES)


_drawn: dict[tuple[Any, ...], Tensor] = {}


@dataclass(frozen=True)
class _SharedDraw(Draw):
    """Cases of one dtype share their dictionary, which takes longest to draw."""

    def tensor(self, *size: int, scale: float | None = None) -> Tensor:
        if torch.Size(size).numel() < _SHARED:
            return super().tensor(*size, scale=scale)
        key = (self.dtype, size, scale, self.scale)
        if key not in _drawn:
            if any(known[0] != self.dtype for known in _drawn):
                _drawn.clear()
            _drawn[key] = super().tensor(*size, scale=scale)
        return _drawn[key].detach()


def case_of(spec: OpSpec, shape: Shape, dtype: torch.dtype) -> Inputs:
    """A case, the same one for the same sizes."""
    return spec.draw(_SharedDraw(shape, dtype, torch.Generator().manual_seed(0), 1.0, False))


def forget() -> None:
    """Free what cases have shared."""
    _drawn.clear()


def what_is_wrong(spec: OpSpec, shape: Shape, inputs: Inputs) -> str | None:
    """None where our values and gradients keep their bounds, else what does not.

    Values are those of the case that is timed, of 8 of its rows where rows are independent; where
    they are not and the check would have large matrices, of a case with fewer rows. Gradients are
    those of a smaller case.
    """
    dtype = next(t.dtype for t in inputs.values() if _floating(t))
    try:
        values = _worst_values(spec, shape, inputs, dtype)
        if max(values.values()) > 1:
            return f"values are off by {_said(values)} of their bound"
        small = {name: min(size, _GRADIENT_CHECK.get(name, size)) for name, size in shape.items()}
        drawn = case_of(spec, small, dtype)
        given = partial(cotangents, dtype=dtype, generator=torch.Generator().manual_seed(1))
        errors = judged(spec, drawn, run(spec.function, drawn, spec.leaves(drawn), given))
        if max(errors.values()) > 1:
            return f"values or gradients are off by {_said(errors)} of their bound"
    except Exception as error:  # one op that fails must not end the grid
        return reason_of(error)
    return None


def _worst_values(spec: OpSpec, shape: Shape, inputs: Inputs, dtype: torch.dtype) -> Errors:
    if spec.rows:
        outputs = named_outputs(spec, spec.function(**inputs))
        few = {name: inputs[name][:8] for name in spec.rows if isinstance(inputs[name], Tensor)}
        return spec.check(inputs | few, {name: value[:8] for name, value in outputs.items()})
    limits = dict(spec.gate_sizes)
    if "n" in shape:
        limits["B"] = max(_CHECKED // shape["n"], 1)
    small = {name: min(size, limits.get(name, size)) for name, size in shape.items()}
    if small != shape:
        inputs = case_of(spec, small, dtype)
    few = {name: inputs[name][:8] for name in spec.gate}
    return spec.check(inputs | few, named_outputs(spec, spec.function(**inputs | few)))


def _said(errors: Errors) -> str:
    return ", ".join(f"{name} {error:.3g}" for name, error in errors.items() if error > 1)


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def reason_of(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"[:200]
