"""What every op promises, as properties of one drawn case.

Errors are measured against the float64 reference, as a fraction of the a priori bound of the op's
``OpSpec``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clipsteer.ops._bounds import measured_on
from clipsteer.ops._spec import (
    Errors,
    Inputs,
    OpSpec,
    Shape,
    Tensors,
    in_float64,
    named_outputs,
    spec_errors,
)
from clipsteer.testing.torture.memory import fenced, poisoned, same_bits, strided, transposed

__all__ = ["PROPERTIES", "Case"]


@dataclass(frozen=True)
class Case:
    """One drawn situation: an op on a backend, dtype and device, a shape, and what the inputs are
    made of."""

    spec: OpSpec
    backend: str
    dtype: torch.dtype
    shape: Shape
    seed: int = 0
    scale: float = 1.0
    device: str = "cpu"

    def inputs(self, exact: bool = False) -> Inputs:
        """Keyword arguments, on the host; small integers if ``exact``."""
        generator = torch.Generator().manual_seed(self.seed)
        return self.spec.make(self.shape, self.dtype, generator, self.scale, exact)

    def run(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """The op's outputs, brought back to the host."""
        moved = dict(inputs)
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                moved[name] = value.to(self.device)
        result = self.spec.function(**moved, backend=self.backend)
        outputs = named_outputs(self.spec, result)
        return tuple(value.cpu() for value in outputs.values())

    def errors(self, **options: Any) -> Errors:
        """Of every output and gradient, as fractions of the bounds; options of ``spec_errors``."""
        return spec_errors(
            self.spec,
            self.shape,
            self.dtype,
            seed=self.seed,
            backend=self.backend,
            device=self.device,
            scale=self.scale,
            **options,
        )


def values_and_gradients(case: Case) -> Errors:
    """Every output and the gradient of every input is within its bound; no uninitialised element
    survives."""
    with poisoned():
        return case.errors()


def layouts(case: Case) -> Errors:
    """Fenced, strided and transposed inputs are read where they lie and nowhere else."""
    found = [case.errors(arrange=arrange) for arrange in (fenced, strided, transposed)]
    return {name: max(errors[name] for errors in found) for name in found[0]}


def integers_bitwise(case: Case) -> Errors:
    """On small integers, where ties abound, every backend equals the float64 reference bit for bit
    (but for the sign of a zero, which depends on what a sum starts from). An op that is not exact
    on them keeps its bound."""
    if not case.spec.exact:
        return case.errors(exact=True)
    inputs = case.inputs(exact=True)
    truth = named_outputs(case.spec, case.spec.reference(**in_float64(inputs)))
    worst = {}
    for (name, expected), out in zip(truth.items(), case.run(inputs)):
        if expected.is_floating_point():
            expected = expected.to(out.dtype)
        worst[name] = 0.0 if same_bits(out + 0, expected + 0) else math.inf
    return worst | case.errors(exact=True)


def _values_and_gradients_of(case: Case, drawn: Inputs) -> Tensors:
    """Outputs, and gradients as "d name" under one fixed cotangent, on the host."""
    spec = case.spec
    inputs = dict(drawn)
    for name, value in drawn.items():
        if isinstance(value, Tensor):
            inputs[name] = value.to(case.device, copy=True)
    leaves = spec.leaves(inputs)
    for name in leaves:
        inputs[name].requires_grad_()
    found = named_outputs(spec, spec.function(**inputs, backend=case.backend))
    if leaves:
        smooth = [t for t in found.values() if t.requires_grad]
        cotangents = []
        for t in smooth:
            ramp = torch.linspace(-1, 1, t.numel(), dtype=t.dtype, device=t.device)
            cotangents.append(ramp.view(t.shape))
        grads = torch.autograd.grad(smooth, [inputs[name] for name in leaves], cotangents)
        found |= {f"d {name}": grad for name, grad in zip(leaves, grads)}
    return {name: t.detach().cpu() for name, t in found.items()}


def repeats_bitwise(case: Case, repeats: int = 3) -> Errors:
    """Outputs and gradients repeat bit for bit, with any number of threads where the sums are our
    own."""
    drawn = case.inputs(exact=False)
    before = torch.get_num_threads()
    # torch's own products repeat on one thread; on several they may be split anew each time on a
    # busy machine
    torch.set_num_threads(1)
    try:
        first = _values_and_gradients_of(case, drawn)
        worst = dict.fromkeys(first, 0.0)
        for repeat in range(repeats):
            several = case.backend == "cpp" and repeat == 0
            torch.set_num_threads(2 if several else 1)
            for name, again in _values_and_gradients_of(case, drawn).items():
                if several and name in case.spec.torch_sums:
                    continue
                if not same_bits(first[name], again):
                    worst[name] = math.inf
    finally:
        torch.set_num_threads(before)
    return worst


def not_a_number(case: Case) -> Errors:
    """A NaN in any input, or an infinity in the first, comes out where the reference has it and
    spreads nowhere else.

    (With an infinite parameter it depends on the order of the products what is infinite and what is
    no number.)
    """
    generator = torch.Generator().manual_seed(case.seed + 1)
    inputs = case.inputs()
    names = case.spec.leaves(inputs)
    if not names:
        names = [name for name, value in inputs.items() if isinstance(value, Tensor)]
    worst: Errors = {}
    for special in (math.nan, math.inf, -math.inf):
        which = 0
        if math.isnan(special):
            which = int(torch.randint(len(names), (1,), generator=generator))
        target = inputs[names[which]].clone()
        if target.numel() == 0:
            continue
        at = int(torch.randint(target.numel(), (1,), generator=generator))
        target.view(-1)[at] = special
        spoiled = inputs | {names[which]: target}
        outputs = named_outputs(case.spec, case.run(spoiled))
        with measured_on(case.device):
            found = case.spec.check(spoiled, outputs)
        for name, error in found.items():
            worst[name] = max(worst.get(name, 0.0), error)
    return worst


PROPERTIES: dict[str, Callable[[Case], Errors]] = {
    "values_and_gradients": values_and_gradients,
    "layouts": layouts,
    "integers_bitwise": integers_bitwise,
    "repeats_bitwise": repeats_bitwise,
    "not_a_number": not_a_number,
}
