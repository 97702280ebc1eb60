"""What an op promises, as plain data: tests, ``clipsteer validate`` and the benchmarks are
generated from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

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
        gaussian = torch.randn(size, generator=self.generator, dtype=torch.float64)
        return (gaussian * scale).to(self.dtype)


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
    arrange: Callable[[Tensor], Tensor] = lambda t: t,
) -> Errors:
    """Worst error of every output and gradient of one drawn case, as a fraction of its bound.

    ``arrange`` may lay an input out anew (strides, fences) but not change its values.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = spec.make(shape, dtype, generator, scale, exact)
    moved = dict(drawn)
    for name, value in drawn.items():
        if isinstance(value, Tensor):
            moved[name] = arrange(value.detach().to(device))
    leaves = spec.leaves(moved)
    for name in leaves:
        moved[name].requires_grad_()
    result = spec.function(**moved, backend=backend)
    outputs = named_outputs(spec, result)
    host = {name: value.detach().cpu() for name, value in outputs.items()}
    with measured_on(device):
        errors = spec.check(drawn, host)
    if not leaves:
        return errors
    smooth = [name for name, value in outputs.items() if value.requires_grad]
    grad_out = {}
    for name in smooth:
        gaussian = torch.randn(host[name].shape, generator=generator, dtype=torch.float64)
        grad_out[name] = gaussian.to(dtype)
        if exact:
            grad_out[name] = (2 * grad_out[name]).round()
    grads = torch.autograd.grad(
        [outputs[name] for name in smooth],
        [moved[name] for name in leaves],
        [grad_out[name].to(device) for name in smooth],
    )
    host_grads = {name: grad.detach().cpu() for name, grad in zip(leaves, grads)}
    with measured_on(device):
        found = spec.check_grads(drawn, host, grad_out, host_grads)
    return errors | {f"d {name}": error for name, error in found.items()}
