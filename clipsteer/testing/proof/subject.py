"""A fast function beside its definition in plain torch, judged by automatic bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipsteer.ops._spec import Ran
from clipsteer.testing.proof.arithmetic import Arithmetic
from clipsteer.testing.proof.bound import Bound, Bounded, bound, exact_values
from clipsteer.testing.proof.cases import Draw
from clipsteer.testing.proof.trial import Finding, Findings, Subject, Trial, spoil

# of each shape class as many cases are bounded in full before the others are screened
_IN_FULL = 2


class Least(NamedTuple):
    """How small the bounds of an output have been in a shape class: beside the value, and in
    itself."""

    share: float
    size: float

    def covers(self, got: Tensor, value: Tensor) -> bool:
        """Whether every element is off by no more than half of that."""
        if got.shape != value.shape or got.is_floating_point() != value.is_floating_point():
            return False
        if not got.is_floating_point():
            return torch.equal(got, value)
        off = got.double().sub_(value).abs_()
        allowed = value.abs().mul_(self.share / 2).clamp_min_(self.size / 2)
        near = off <= allowed
        if bool(near.all()):
            return True
        rest = ~near
        return bool(((got == value) | (got.isnan() & value.isnan()))[rest].all())


@dataclass
class ShapeClass:
    """What is known of cases of one shape, dtype, scale and kind: how many were bounded in full,
    the inputs that have gradients, and the least bounds."""

    cases: int = 0
    leaves: list[str] = field(default_factory=list)
    least: dict[str, Least] = field(default_factory=dict)
    # of small integers: outputs and gradients that are exact as a whole, and whether all are
    exact: set[str] | None = None
    all_exact: bool = False

    def learn(self, name: str, value: Tensor, limit: Tensor) -> None:
        """One more bound of an output or gradient."""
        before = self.least.get(name, Least(math.inf, math.inf))
        if value.is_floating_point() and value.numel():
            far = value.abs()
            if not float(far.amax()) + float(limit.amax()) < math.inf:
                known = far.isfinite() & limit.isfinite()
                far, limit = far[known], limit[known]
            # nothing but what has to be the same, or something that has
            size = float(limit.amin()) if limit.numel() else 0.0
            share = float((limit / far).amin()) if size > 0 else 0.0
            before = Least(min(before.share, share), min(before.size, size))
        self.least[name] = before


@dataclass(frozen=True)
class Claim(Subject):
    """That a fast function is its definition, and how inputs are drawn.

    The bound of a case costs many times what the definition does. So in a shape class (one shape,
    dtype and scale) only the first cases take theirs; of another one the definition is run alone,
    and where every error is below half of the least bound that its class has had, that is all.
    Whatever is not gets its own bound: a screened case is never refuted, a refuted one never only
    screened.
    """

    fast: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Draw
    device: str = "cpu"
    gradients: bool = True
    arithmetic: Arithmetic | Callable[[torch.dtype], Arithmetic] | None = None
    known: dict[Any, ShapeClass] = field(default_factory=dict, compare=False, repr=False)
    # the bounds of the last case without a special number
    latest: dict[Any, Bound] = field(default_factory=dict, compare=False, repr=False)

    def draw(self, trial: Trial) -> dict[str, Any]:
        """See ``Subject``."""
        generator = torch.Generator().manual_seed(trial.seed)
        given = dict(self.inputs(generator, trial.scale, trial.exact))
        for name, value in given.items():
            if _floats(value):
                given[name] = value.detach().to(trial.dtype, copy=True)
        if trial.special is None:
            return given
        floating = [name for name, value in given.items() if _floats(value)]
        return spoil(given, floating, trial.special, generator)

    def shape_class(self, trial: Trial) -> ShapeClass:
        """That of a trial."""
        key: list[Any] = [trial.dtype, trial.scale, trial.exact]
        for name, value in trial.drawn.items():
            described = (value.shape, value.dtype) if isinstance(value, Tensor) else repr(value)
            key.append((name, described))
        return self.known.setdefault(tuple(key), ShapeClass())

    def leaves(self, trial: Trial) -> list[str]:
        """See ``Subject``: those that the definition has a gradient of."""
        known = self.shape_class(trial)
        if known.cases == 0:
            self.truth(trial)
        return known.leaves

    def truth(self, trial: Trial) -> Bound:
        """Values, gradients and bounds of the definition; its class learns from them."""
        cache = trial.__dict__
        if "truth" not in cache:
            key = (trial.dtype, trial.seed, trial.scale)
            plain = self.latest.get(key) if trial.special is not None else None
            found = None if plain is None else self._spoilt(trial, plain)
            if found is None:
                found = self._bounded(trial, self._arithmetic(trial))
                if trial.special is None and not trial.exact:
                    self.latest.clear()
                    self.latest[key] = found
            cache["truth"] = found
            known = self.shape_class(trial)
            known.cases += 1
            known.leaves = list(cache["truth"].gradients)
            trial.unbounded.extend(cache["truth"].reasons)
        return cache["truth"]

    def _bound(self, trial: Trial, arithmetic: Arithmetic) -> Bound:
        given = trial.cotangents if self.gradients else None
        return bound(
            self.reference,
            trial.drawn,
            dtype=trial.dtype,
            arithmetic=arithmetic,
            grad_outputs=given,
        )

    def _exact_values(self, trial: Trial) -> dict[str, Tensor]:
        """By name, without bounds."""
        if "plain" not in trial.__dict__:
            given = trial.cotangents if self.shape_class(trial).leaves else None
            trial.__dict__["plain"] = _named(*exact_values(self.reference, trial.drawn, given))
        return trial.__dict__["plain"]

    def _spoilt(self, trial: Trial, plain: Bound) -> Bound | None:
        """Bounds where one NaN spoils a case whose own are known: what it does not change keeps
        them; None if it changes anything to another number."""
        values = self._exact_values(trial)
        before = _named(plain.outputs, plain.gradients)
        if values.keys() != before.keys():
            return None
        found = {}
        for name, known in before.items():
            value = values[name]
            spoilt = value.isnan()
            # two runs in float64, whose roundings are nothing beside a bound
            same = (value - known.value).abs() <= known.error * 2.0**-10
            if known.ranked is not None or not bool((spoilt | same).all()):
                return None
            found[name] = Bounded(value, known.error.masked_fill(spoilt, 0.0))
        gradients = {name: found[f"d {name}"] for name in plain.gradients}
        return Bound(tuple(found.values())[: len(plain.outputs)], gradients, plain.reasons)

    def _bounded(self, trial: Trial, arithmetic: Arithmetic) -> Bound:
        """On small integers an output is exact as a whole; or what is exact on the way to it is so
        by luck of the definition's grouping (sums that are rounded later), and its bounds are those
        of an arithmetic without luck."""
        known = self.shape_class(trial)
        if not trial.exact or known.all_exact:
            return self._bound(trial, arithmetic)
        if known.exact is None:
            strict = self._strict(trial, arithmetic)
            parts = _named(strict.outputs, strict.gradients)
            known.exact = {name for name, one in parts.items() if not bool((one.error > 0).any())}
            known.all_exact = len(known.exact) == len(parts)
            if known.all_exact:
                return strict
        return self._bound(trial, arithmetic._replace(exact=False))

    def _strict(self, trial: Trial, arithmetic: Arithmetic) -> Bound:
        """With what is exact by luck."""
        if "strict" not in trial.__dict__:
            trial.__dict__["strict"] = self._bound(trial, arithmetic)
        return trial.__dict__["strict"]

    def _judged_exactly(self, trial: Trial, name: str, got: Tensor, expected: Bounded) -> Bounded:
        """What an output that is exact as a whole is held to, if it is not equal."""
        if torch.equal(got.double(), expected.value.double()):
            return replace(expected, error=torch.zeros_like(expected.error))
        strict = self._strict(trial, self._arithmetic(trial))
        return _named(strict.outputs, strict.gradients)[name]

    def _arithmetic(self, trial: Trial) -> Arithmetic:
        given = self.arithmetic or Arithmetic.of
        return given if isinstance(given, Arithmetic) else given(trial.dtype)

    def _screened(self, trial: Trial, got: dict[str, Tensor]) -> bool:
        """Whether all errors are so small that the case needs no bound of its own."""
        known = self.shape_class(trial)
        if "truth" in trial.__dict__ or trial.dtype == torch.float64 or known.cases < _IN_FULL:
            return False
        true = self._exact_values(trial)
        if true.keys() != known.least.keys():
            return False
        return all(
            name in got and known.least[name].covers(got[name], value)
            for name, value in true.items()
        )

    def judged(self, trial: Trial, ran: Ran) -> Findings:
        """See ``Subject``."""
        got = _named(ran.outputs, ran.gradients)
        if self._screened(trial, got):
            return dict.fromkeys(got, Finding(0.0))
        truth = self.truth(trial)
        if len(ran.outputs) != len(truth.outputs):
            return {"outputs": Finding(math.inf, f" {len(ran.outputs)}, not {len(truth.outputs)}")}
        known = self.shape_class(trial)
        found = {}
        for name, expected in _named(truth.outputs, truth.gradients).items():
            if name not in got:
                got[name] = torch.zeros(expected.value.shape, dtype=trial.dtype)
            if known.exact is not None and name in known.exact and not known.all_exact:
                expected = self._judged_exactly(trial, name, got[name], expected)
            found[name], limit = compared(got[name], expected)
            if limit is not None:
                known.learn(name, expected.value, limit)
        return found


def _floats(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _named(outputs: Any, gradients: dict[str, Any]) -> dict[str, Any]:
    single = len(outputs) == 1
    found = {"output" if single else f"output {at}": value for at, value in enumerate(outputs)}
    return found | {f"d {name}": value for name, value in gradients.items()}


def compared(got: Tensor, expected: Bounded) -> tuple[Finding, Tensor | None]:
    """The worst element of a result, and the bounds of all."""
    if got.shape != expected.value.shape:
        shapes = f"{tuple(got.shape)}, not {tuple(expected.value.shape)}"
        return Finding(math.inf, f" of shape {shapes}"), None
    if got.is_floating_point() != expected.value.is_floating_point():
        return Finding(math.inf, f" {got.dtype}"), None
    limit = expected.allowed(got.dtype)
    if got.numel() == 0:
        return Finding(0.0), limit
    shares = expected.fraction(got, limit)
    at = int(shares.argmax())
    place = torch.unravel_index(torch.tensor(at), shares.shape)
    index = ", ".join(str(int(i)) for i in place)
    value = got.flatten()[at].item()
    true = expected.value.flatten()[at].item()
    share = float(shares.flatten()[at])
    return Finding(share, f"[{index}] is {value:.9g}, not {true:.9g}"), limit
