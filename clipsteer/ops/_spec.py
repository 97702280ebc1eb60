"""What an op promises, as plain data: tests, ``clipsteer validate`` and the benchmarks are
generated from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipsteer.ops._bounds import measured_on

Shape = dict[str, int]  # sizes by name, and switches (1) that a ``draw`` knows
Inputs = dict[str, Any]
Tensors = dict[str, Tensor]
Errors = dict[str, float]  # by output, as fractions of the bound


def in_float64(inputs: Inputs) -> Inputs:
    """The inputs, every floating tensor of them in float64 and without history."""
    wide = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            wide[name] = value.detach().double()
    return wide


def sizes(names: str, *rows: tuple[int | None, ...]) -> tuple[Shape, ...]:
    """Shapes from rows of numbers in the order of ``names``; None, or the row's end, leaves out."""
    found = []
    for row in rows:
        pairs = zip(names.split(), row)
        found.append({name: size for name, size in pairs if size is not None})
    return tuple(found)


def unpacked(shape: Shape, names: str) -> tuple[int, ...]:
    """The sizes of these names."""
    return tuple(shape[name] for name in names.split())


# fills the digits of a float64 that a float32 leaves empty
_DIGITS = 1 + 2.0**-20 / 3


def gaussian(size: Sequence[int], generator: torch.Generator) -> Tensor:
    """Normal numbers in float64. Drawn in float32, which takes a fifth of the time."""
    return torch.randn(size, generator=generator).double() * _DIGITS


@dataclass(frozen=True)
class Draw:
    """A case to be drawn: its sizes, and what its numbers are made of."""

    shape: Shape
    dtype: torch.dtype
    generator: torch.Generator
    scale: float
    exact: bool

    def tensor(self, *size: int, scale: float | None = None) -> Tensor:
        """Gaussian times ``scale`` (of the case if not given), or, when ``exact``, small integers
        with many ties."""
        if self.exact:
            return torch.randint(-2, 3, size, generator=self.generator).to(self.dtype)
        scale = self.scale if scale is None else scale
        return (gaussian(size, self.generator) * scale).to(self.dtype)


@dataclass(frozen=True)
class OpSpec:
    """One public op. Every callable takes and returns plain dictionaries keyed by argument or
    output name.

    ``draw`` makes the keyword arguments of a case. ``check`` and ``check_grads`` return, per
    output, the worst error as a fraction of the a priori bound (at most 1 passes, ``inf`` breaks a
    rule that allows no error).
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    outputs: tuple[str, ...]
    # in the order of the call; an input that is no tensor in a drawn case is left out; empty for a
    # statistic, which has no gradient and which autocast leaves alone
    differentiable: tuple[str, ...]
    draw: Callable[[Draw], Inputs]
    check: Callable[[Inputs, Tensors], Errors]
    check_grads: Callable[[Inputs, Tensors, Tensors, Tensors], Errors]
    shapes: tuple[Shape, ...]  # 8 edge shapes; the second has 33 rows
    small_shape: Shape  # small enough to differentiate numerically
    repeat_shape: Shape  # large enough that every thread has work
    bench_shapes: dict[str, Shape]  # on one CPU core
    gpu_bench_shapes: dict[str, Shape]
    # these take a GPU kernel through the branches of its main shapes
    device_shapes: tuple[Shape, ...] = ()
    # inputs (and so outputs) that lead with the batch, which may have any shape
    rows: tuple[str, ...] = ()
    # inputs that may be cut to a few before the benchmark's check, where ``rows`` may not
    gate: tuple[str, ...] = ()
    # what larger sizes are cut to for that check, in a case of its own
    gate_sizes: Shape = field(default_factory=dict)
    # inputs that may be None, which means zeros
    optional: tuple[str, ...] = ()
    # inputs that, multiplied by a power of two, multiply every output exactly
    scalable: tuple[str, ...] = ()
    # of the differentiable inputs those whose gradient is an estimate that no difference of outputs
    # shows
    estimated: tuple[str, ...] = ()
    # the input whose gradient ``grad_buffer=`` and ``sparse_grad=`` are about
    grad_buffer: str | None = None
    # outputs of half-precision inputs are float32
    wide: bool = False
    # outputs are the low-level op's own, so that a compiler cannot change a bit of them
    opaque: bool = True
    # on small integers every output is exact, so that backends agree bit for bit
    exact: bool = True
    # Outputs, and gradients as "d name", that hold torch's own GEMM: they repeat at a fixed thread
    # count only.
    torch_sums: tuple[str, ...] = ()
    baselines: dict[str, Callable[..., Any]] = field(default_factory=dict)
    # (floating-point operations, bytes moved in float32) that no implementation can avoid
    floor: Callable[[Shape], tuple[float, float]] = lambda shape: (0.0, 0.0)

    def make(
        self,
        shape: Shape,
        dtype: torch.dtype,
        generator: torch.Generator,
        scale: float = 1.0,
        exact: bool = False,
    ) -> Inputs:
        """Drawn keyword arguments: small integers if ``exact``, for which every backend must agree
        bit for bit unless the op itself takes roots or quotients."""
        return self.draw(Draw(shape, dtype, generator, scale, exact))

    def leaves(self, inputs: Inputs) -> list[str]:
        """The names of the inputs of this case that can have a gradient."""
        return [name for name in self.differentiable if isinstance(inputs[name], Tensor)]


def named_outputs(spec: OpSpec, result: Tensor | tuple[Tensor, ...]) -> Tensors:
    """What a call of the op returned, by the names of its outputs."""
    several = result if isinstance(result, tuple) else (result,)
    return dict(zip(spec.outputs, several))


class Ran(NamedTuple):
    """What one call gave, on the host: outputs, gradients by the names of the inputs (without those
    that nothing flows to), and the cotangents that they belong to (None: of no output)."""

    outputs: tuple[Tensor, ...]
    gradients: Tensors
    cotangents: tuple[Tensor | None, ...]


def run(
    function: Callable[..., Any],
    inputs: Inputs,
    leaves: Sequence[str],
    cotangents: Callable[[tuple[Tensor, ...]], Sequence[Tensor | None]],
    *,
    device: Any = "cpu",
    arrange: Callable[[Tensor], Tensor] = Tensor.clone,
) -> Ran:
    """Call a function on ``device`` and differentiate it.

    ``arrange`` may lay an input out anew (strides, fences) but not change its values;
    ``cotangents`` makes one of each output, or None.
    """
    moved = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            moved[name] = arrange(value.detach().to(device))
    for name in leaves:
        moved[name].requires_grad_()
    result = function(**moved)
    outputs = tuple(result) if isinstance(result, (tuple, list)) else (result,)
    host = tuple(t.detach().cpu() for t in outputs)
    if not leaves or not any(t.requires_grad for t in outputs):
        return Ran(host, {}, (None,) * len(host))
    given = [g if t.requires_grad else None for t, g in zip(outputs, cotangents(host))]
    smooth = [(t, g) for t, g in zip(outputs, given) if g is not None]
    found = torch.autograd.grad(
        [t for t, _ in smooth],
        [moved[name] for name in leaves],
        [g.to(t.device, t.dtype) for t, g in smooth],
        allow_unused=True,
    )
    there = {name: g.detach().cpu() for name, g in zip(leaves, found) if g is not None}
    return Ran(host, there, tuple(given))


def judged(spec: OpSpec, inputs: Inputs, ran: Ran, device: Any = "cpu") -> Errors:
    """Worst error of every output and gradient of one call, as a fraction of its bound."""
    outputs = dict(zip(spec.outputs, ran.outputs))
    grad_out = {n: g for n, g in zip(spec.outputs, ran.cotangents) if g is not None}
    with measured_on(device):
        errors = spec.check(inputs, outputs)
        if not grad_out:
            return errors
        # what nothing flows to has a gradient of zeros
        grads = {name: torch.zeros_like(inputs[name]) for name in spec.leaves(inputs)}
        found = spec.check_grads(inputs, outputs, grad_out, grads | ran.gradients)
    return errors | {f"d {name}": error for name, error in found.items()}


def cotangents(
    outputs: Sequence[Tensor], dtype: torch.dtype, generator: torch.Generator, exact: bool = False
) -> tuple[Tensor | None, ...]:
    """A Gaussian cotangent in ``dtype`` for each floating output, of halves' integers if
    ``exact``."""
    found: list[Tensor | None] = []
    for output in outputs:
        if not output.is_floating_point():
            found.append(None)
            continue
        drawn = gaussian(output.shape, generator)
        found.append(((2 * drawn).round() if exact else drawn).to(dtype))
    return tuple(found)


def spec_errors(
    spec: OpSpec,
    shape: Shape,
    dtype: torch.dtype,
    *,
    seed: int,
    backend: str,
    device: Any = "cpu",
    scale: float = 1.0,
    exact: bool = False,
) -> Errors:
    """Worst error of every output and gradient of one drawn case, as a fraction of its bound."""
    generator = torch.Generator().manual_seed(seed)
    drawn = spec.make(shape, dtype, generator, scale, exact)

    def given(outputs: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        return cotangents(outputs, dtype, generator, exact)

    function = partial(spec.function, backend=backend)
    ran = run(function, drawn, spec.leaves(drawn), given, device=device)
    return judged(spec, drawn, ran, device)
