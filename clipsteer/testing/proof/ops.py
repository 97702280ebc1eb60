"""The ops of this package as subjects: their backends against the bounds of their specs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from clipsteer.ops._spec import (
    Errors,
    Inputs,
    OpSpec,
    Ran,
    Shape,
    in_float64,
    judged,
    named_outputs,
)
from clipsteer.testing.proof import trial as proof
from clipsteer.testing.proof.trial import Arrange, Finding, Findings, Subject, Trial, spoil
from clipsteer.testing.torture.memory import same_bits


@dataclass(frozen=True)
class Backend(Subject):
    """An op on a backend and device, at one shape."""

    spec: OpSpec
    backend: str
    shape: Shape
    device: str = "cpu"

    specials = (math.nan, math.inf, -math.inf)
    spoiled_gradients = False

    @cached_property
    def fast(self) -> Callable[..., Any]:  # type: ignore[override]
        """The op on the backend."""
        return partial(self.spec.function, backend=self.backend)

    @property
    def torch_sums(self) -> Sequence[str]:  # type: ignore[override]
        """See ``Subject``."""
        return self.spec.torch_sums

    @property
    def again(self) -> Sequence[int | None]:  # type: ignore[override]
        """On several threads where the sums are our own. torch's own products repeat on one; on
        several they may be split anew each time on a busy machine. An interpreter runs one program
        after the other, and a second repeat of that shows nothing new."""
        if self.backend == "triton" and self.device == "cpu":
            return (1,)
        return (2 if self.backend == "cpp" else 1, 1, 1)

    def draw(self, trial: Trial) -> Inputs:
        """See ``Subject``. With an infinite parameter it depends on the order of the products what
        is infinite and what is no number: so infinities are put into the first input alone."""
        generator = torch.Generator().manual_seed(trial.seed)
        inputs = self.spec.make(self.shape, trial.dtype, generator, trial.scale, trial.exact)
        if trial.special is None:
            return inputs
        names = self.spec.leaves(inputs)
        if not names:
            tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
            names = [name for name, value in tensors.items() if value.is_floating_point()]
        if not math.isnan(trial.special):
            names = names[:1]
        return spoil(inputs, names, trial.special, torch.Generator().manual_seed(trial.seed + 1))

    def leaves(self, trial: Trial) -> list[str]:
        """See ``Subject``."""
        return self.spec.leaves(trial.drawn)

    def names(self, ran: Ran) -> list[str]:
        """See ``Subject``."""
        return list(self.spec.outputs)

    def judged(self, trial: Trial, ran: Ran) -> Findings:
        """By the spec's bounds. On small integers, where ties abound, an exact op equals the
        float64 reference bit for bit, but for the sign of a zero: that depends on what a sum starts
        from."""
        errors = judged(self.spec, trial.drawn, ran, self.device)
        if trial.exact and self.spec.exact:
            truth = self.spec.reference(**in_float64(trial.drawn))
            for (name, true), out in zip(named_outputs(self.spec, truth).items(), ran.outputs):
                true = true.to(out.dtype) if true.is_floating_point() else true
                if not same_bits(out + 0, true + 0):
                    errors[name] = math.inf
        return {name: Finding(error) for name, error in errors.items()}


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

    def trial(self, exact: bool = False) -> Trial:
        """The same for the properties that all proofs share."""
        subject = Backend(self.spec, self.backend, self.shape, self.device)
        return Trial(subject, self.dtype, self.seed, self.scale, exact=exact)

    def inputs(self, exact: bool = False) -> Inputs:
        """Keyword arguments, on the host; small integers if ``exact``."""
        return self.trial(exact).drawn

    def run(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """The op's outputs, brought back to the host."""
        moved = dict(inputs)
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                moved[name] = value.to(self.device)
        result = self.spec.function(**moved, backend=self.backend)
        return tuple(value.cpu() for value in named_outputs(self.spec, result).values())

    def errors(self, exact: bool = False, arrange: Arrange = Tensor.clone) -> Errors:
        """Of every output and gradient, as fractions of the bounds."""
        return _shares(self.trial(exact).findings(arrange))


def _shares(findings: Findings) -> Errors:
    return {name: finding.share for name, finding in findings.items()}


def values_and_gradients(case: Case) -> Errors:
    """Every output and the gradient of every input is within its bound; no uninitialised element
    survives."""
    return _shares(proof.values(case.trial()))


def layouts(case: Case) -> Errors:
    """Fenced, strided and transposed inputs are read where they lie and nowhere else."""
    return _shares(proof.layouts(case.trial()))


def integers_bitwise(case: Case) -> Errors:
    """On small integers every backend equals the float64 reference bit for bit. An op that is not
    exact on them keeps its bound."""
    return _shares(proof.values(case.trial(exact=True)))


def repeats_bitwise(case: Case) -> Errors:
    """Outputs and gradients repeat bit for bit, with any number of threads where the sums are our
    own."""
    return _shares(proof.repeats(case.trial()))


def not_a_number(case: Case) -> Errors:
    """A NaN in any input, or an infinity in the first, comes out where the reference has it and
    spreads nowhere else."""
    return _shares(proof.nan(case.trial()))


# the properties of ``prove`` by the names that they have for ops
NAMES = {
    "values_and_gradients": "values",
    "layouts": "layouts",
    "integers_bitwise": "integers",
    "repeats_bitwise": "repeats",
    "not_a_number": "nan",
}
PROPERTIES: dict[str, Callable[[Case], Errors]] = {
    "values_and_gradients": values_and_gradients,
    "layouts": layouts,
    "integers_bitwise": integers_bitwise,
    "repeats_bitwise": repeats_bitwise,
    "not_a_number": not_a_number,
}
