"""One drawn case of a fast function, and what is asked of it: the properties that ``prove``,
``validate`` and the tests of the ops share."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipsteer.ops._spec import Ran, cotangents, run
from clipsteer.testing.torture.memory import fenced, poisoned, same_bits, strided, transposed

Arrange = Callable[[Tensor], Tensor]


class Finding(NamedTuple):
    """The worst of one output or gradient: its error as a share of its bound, and where."""

    share: float
    where: str = ""


Findings = dict[str, Finding]


class Subject:
    """What is proved: how a case is drawn, what runs, and what judges it."""

    fast: Callable[..., Any]
    device: str = "cpu"
    # how often a case is run again, and on how many threads (None: as many as there are)
    again: Sequence[int | None] = (None, None)
    # outputs and gradients that repeat at a fixed number of threads only
    torch_sums: Sequence[str] = ()
    # what one element of an input is replaced by, and whether gradients are looked at then
    specials: Sequence[float] = (math.nan,)
    spoiled_gradients = True

    def draw(self, trial: Trial) -> dict[str, Any]:
        """Keyword arguments, floating tensors in the trial's dtype."""
        raise NotImplementedError

    def leaves(self, trial: Trial) -> list[str]:
        """Names of the inputs whose gradients are compared."""
        raise NotImplementedError

    def names(self, ran: Ran) -> list[str]:
        """Of the outputs."""
        single = len(ran.outputs) == 1
        return ["output" if single else f"output {at}" for at in range(len(ran.outputs))]

    def judged(self, trial: Trial, ran: Ran) -> Findings:
        """Every output and gradient beside its bound."""
        raise NotImplementedError


@dataclass(frozen=True)
class Trial:
    """A drawn case. All that is random comes from ``seed``."""

    subject: Subject
    dtype: torch.dtype
    seed: int
    scale: float = 1.0
    exact: bool = False
    special: float | None = None
    unbounded: list[str] = field(default_factory=list)  # what has no bound, by name

    @cached_property
    def drawn(self) -> dict[str, Any]:
        """Keyword arguments, floating tensors in ``dtype``."""
        return self.subject.draw(self)

    @cached_property
    def _given(self) -> dict[Any, tuple[Tensor | None, ...]]:
        return {}

    def cotangents(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        """One for each floating output."""
        key = tuple((t.shape, t.is_floating_point()) for t in outputs)
        if key not in self._given:
            generator = torch.Generator().manual_seed(self.seed + 1)
            self._given[key] = cotangents(outputs, self.dtype, generator, self.exact)
        return self._given[key]

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

    def run(self, arrange: Arrange = Tensor.clone, gradients: bool = True) -> Ran:
        """Outputs and gradients of the fast function, on the host."""
        leaves = self.subject.leaves(self) if gradients else []
        device = self.subject.device
        given = self.cotangents
        return run(self.subject.fast, self.drawn, leaves, given, device=device, arrange=arrange)

    @cached_property
    def ran(self) -> Ran:
        """The first run, of inputs as they were drawn."""
        return self.run()

    @cached_property
    def _judged(self) -> list[tuple[Ran, Findings]]:
        return []

    def findings(self, arrange: Arrange = Tensor.clone, gradients: bool = True) -> Findings:
        """Every output and gradient beside its bound. What was judged before is not again."""
        as_drawn = arrange is Tensor.clone and gradients
        ran = self.ran if as_drawn else self.run(arrange, gradients)
        for earlier, findings in self._judged:
            if _equal(earlier, ran):
                return findings
        findings = self.subject.judged(self, ran)
        self._judged.append((ran, findings))
        return findings


def _equal(a: Ran, b: Ran) -> bool:
    if len(a.outputs) != len(b.outputs) or a.gradients.keys() != b.gradients.keys():
        return False
    pairs = [*zip(a.outputs, b.outputs), *((a.gradients[n], b.gradients[n]) for n in a.gradients)]
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def worst(several: Sequence[Findings]) -> Findings:
    """Of each output and gradient the worst finding."""
    found: Findings = {}
    for findings in several:
        for name, finding in findings.items():
            if name not in found or finding.share > found[name].share:
                found[name] = finding
    return found


def values(trial: Trial) -> Findings:
    """Outputs and gradients within their bounds, no uninitialised element among them."""
    with poisoned():
        return trial.findings()


def layouts(trial: Trial) -> Findings:
    """Inputs that lie between NaN, are not contiguous or transposed are read where they lie
    alone."""
    return worst([trial.findings(arrange) for arrange in (fenced, strided, transposed)])


def nan(trial: Trial) -> Findings:
    """A NaN (for the ops an infinity, too) in one input comes out where the definition has it and
    spreads nowhere else."""
    spoiled = [trial]
    if trial.special is None:
        spoiled = [replace(trial, special=special) for special in trial.subject.specials]
    with poisoned():
        return worst([one.findings(gradients=trial.subject.spoiled_gradients) for one in spoiled])


def repeats(trial: Trial) -> Findings:
    """Runs agree bit for bit."""
    subject = trial.subject
    with _threads(None if None in subject.again else 1):
        first = trial.ran if None in subject.again else trial.run()
        names = subject.names(first)
        found = {name: Finding(0.0) for name in (*names, *(f"d {n}" for n in first.gradients))}
        for count in subject.again:
            with _threads(count):
                again = trial.run()
            pairs = dict(zip(names, zip(first.outputs, again.outputs)))
            for name, gradient in first.gradients.items():
                pairs[f"d {name}"] = (gradient, again.gradients[name])
            for name, (a, b) in pairs.items():
                split_anew = count is not None and count > 1 and name in subject.torch_sums
                if not split_anew and not same_bits(a, b):
                    found[name] = Finding(math.inf, " differs between two runs")
    return found


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count not in (None, before):
        torch.set_num_threads(count)  # type: ignore[arg-type]
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


PROPERTIES: dict[str, Callable[[Trial], Findings]] = {
    "values": values,
    "integers": values,
    "layouts": layouts,
    "nan": nan,
    "repeats": repeats,
}


def check(prop: str, trial: Trial) -> tuple[str, Finding]:
    """The worst of a case of a property; an exception of the fast function is one."""
    try:
        found = PROPERTIES[prop](trial)
    except Exception as error:
        return "", Finding(math.inf, f"raised {type(error).__name__}: {error}")
    return max(found.items(), key=lambda item: item[1].share, default=("", Finding(0.0)))


def spoil(
    inputs: dict[str, Any], names: Sequence[str], special: float, generator: torch.Generator
) -> dict[str, Any]:
    """One element of one of these inputs replaced."""
    there = [name for name in names if inputs[name].numel()]
    if not there:
        return inputs
    name = there[int(torch.randint(len(there), (), generator=generator))]
    target = inputs[name].clone()
    target.view(-1)[int(torch.randint(target.numel(), (), generator=generator))] = special
    return inputs | {name: target}
