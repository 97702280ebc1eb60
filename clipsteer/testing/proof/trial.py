"""One drawn case of somebody's kernel and its definition, and what is asked of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipsteer.testing.proof.arithmetic import Arithmetic
from clipsteer.testing.proof.bound import Bound, Bounded, bound
from clipsteer.testing.proof.cases import Draw
from clipsteer.testing.torture import fenced, poisoned, same_bits, strided

Arrange = Callable[[Tensor], Tensor]


class Finding(NamedTuple):
    """The worst of one output or gradient: its error as a share of its bound, and where."""

    share: float
    where: str


Findings = dict[str, Finding]


@dataclass(frozen=True)
class Subject:
    """What is proved: a fast function, its definition, and how inputs are drawn."""

    fast: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Draw
    device: str = "cpu"
    gradients: bool = True
    arithmetic: Arithmetic | None = None


@dataclass(frozen=True)
class Trial:
    """A drawn case. All that is random comes from ``seed``."""

    subject: Subject
    dtype: torch.dtype
    seed: int
    scale: float = 1.0
    exact: bool = False
    nan: bool = False

    @cached_property
    def drawn(self) -> dict[str, Any]:
        """Keyword arguments, floating tensors in ``dtype``."""
        generator = torch.Generator().manual_seed(self.seed)
        given = dict(self.subject.inputs(generator, self.scale, self.exact))
        for name, value in given.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                given[name] = value.detach().to(self.dtype, copy=True)
        if self.nan:
            floating = [v for v in given.values() if _floats(v) and v.numel()]
            if floating:
                one = floating[int(torch.randint(len(floating), (), generator=generator))]
                at = int(torch.randint(one.numel(), (), generator=generator))
                one.view(-1)[at] = math.nan
        return given

    @cached_property
    def truth(self) -> Bound:
        """Values, gradients and bounds of the definition."""
        return bound(
            self.subject.reference,
            self.drawn,
            dtype=self.dtype,
            arithmetic=self.subject.arithmetic,
            grad_outputs=self._grad_outputs if self.subject.gradients else None,
        )

    def _grad_outputs(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        generator = torch.Generator().manual_seed(self.seed + 1)
        found: list[Tensor | None] = []
        for output in outputs:
            grad = torch.randn(output.shape, generator=generator, dtype=torch.float64)
            grad = (2 * grad).round() if self.exact else grad
            found.append(grad.to(self.dtype) if output.is_floating_point() else None)
        return tuple(found)

    @property
    def sizes(self) -> str:
        """The shapes of the inputs, in words."""
        words = []
        for name, value in self.drawn.items():
            words.append(f"{name} {tuple(value.shape) if isinstance(value, Tensor) else value!r}")
        return ", ".join(words)

    @property
    def numel(self) -> int:
        """How large the case is."""
        return sum(value.numel() for value in self.drawn.values() if isinstance(value, Tensor))

    def run(self, arrange: Arrange | None = None) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Outputs and gradients of the fast function, on the host."""
        moved = dict(self.drawn)
        for name, value in moved.items():
            if isinstance(value, Tensor):
                value = value.to(self.subject.device)
                moved[name] = value.clone() if arrange is None else arrange(value)
        leaves = [name for name in self.truth.gradients if _floats(moved[name])]
        for name in leaves:
            moved[name].requires_grad_()
        result = self.subject.fast(**moved)
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        true = tuple(output.value for output in self.truth.outputs)
        pairs = zip(outputs, self._grad_outputs(true))
        smooth = [(t, g) for t, g in pairs if g is not None and t.requires_grad]
        grads: dict[str, Tensor] = {}
        if leaves and smooth:
            found = torch.autograd.grad(
                [t for t, _ in smooth],
                [moved[name] for name in leaves],
                [g.to(t.device, t.dtype) for t, g in smooth],
                allow_unused=True,
            )
            for name, grad in zip(leaves, found):
                if grad is not None:
                    grads[name] = grad.detach().cpu()
        return tuple(t.detach().cpu() for t in outputs), grads

    def findings(self, arrange: Arrange | None = None) -> Findings:
        """Every output and gradient beside its bound."""
        outputs, grads = self.run(arrange)
        truth = self.truth
        if len(outputs) != len(truth.outputs):
            return {"outputs": Finding(math.inf, f"{len(outputs)}, not {len(truth.outputs)}")}
        single = len(outputs) == 1
        found = {}
        for number, (got, expected) in enumerate(zip(outputs, truth.outputs)):
            found["output" if single else f"output {number}"] = _compared(got, expected)
        for name, expected in truth.gradients.items():
            none = torch.zeros(expected.value.shape, dtype=self.dtype)
            found[f"d {name}"] = _compared(grads.get(name, none), expected)
        return found


def _floats(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _compared(got: Tensor, expected: Bounded) -> Finding:
    if got.shape != expected.value.shape:
        return Finding(math.inf, f"of shape {tuple(got.shape)}, not {tuple(expected.value.shape)}")
    if got.is_floating_point() != expected.value.is_floating_point():
        return Finding(math.inf, f"{got.dtype}")
    if got.numel() == 0:
        return Finding(0.0, "")
    shares = expected.fraction(got)
    at = int(shares.argmax())
    place = torch.unravel_index(torch.tensor(at), shares.shape)
    index = ", ".join(str(int(i)) for i in place)
    value = got.flatten()[at].item()
    true = expected.value.flatten()[at].item()
    return Finding(float(shares.flatten()[at]), f"[{index}] is {value:.9g}, not {true:.9g}")


def values(trial: Trial) -> Findings:
    """Outputs and gradients within their bounds, no uninitialised element among them."""
    with poisoned():
        return trial.findings()


def layouts(trial: Trial) -> Findings:
    """Inputs that are not contiguous, and lie between NaN, are read where they lie alone."""
    first = trial.findings(fenced)
    second = trial.findings(strided)
    return {name: max(first[name], second[name]) for name in first}


def repeats(trial: Trial) -> Findings:
    """Three runs agree bit for bit."""
    outputs, grads = trial.run()
    differing = {}
    for _ in range(2):
        again, grads_again = trial.run()
        pairs = {f"output {i}": pair for i, pair in enumerate(zip(outputs, again))}
        pairs |= {f"d {name}": (grads[name], grads_again[name]) for name in grads}
        for name, (a, b) in pairs.items():
            if not same_bits(a, b):
                differing[name] = Finding(math.inf, "two runs differ")
    return differing or {"outputs": Finding(0.0, "")}


PROPERTIES: dict[str, Callable[[Trial], Findings]] = {
    "values": values,
    "integers": values,
    "layouts": layouts,
    "nan": values,
    "repeats": repeats,
}
