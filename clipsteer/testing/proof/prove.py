"""``prove``: a fast function against its plain definition, before anyone believes it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from clipsteer.testing.machine import machine
from clipsteer.testing.proof.arithmetic import Arithmetic
from clipsteer.testing.proof.cases import Draw
from clipsteer.testing.proof.interpreted import patched_once
from clipsteer.testing.proof.subject import Claim
from clipsteer.testing.proof.tally import Tally
from clipsteer.testing.proof.trial import PROPERTIES, Findings, Trial


@dataclass
class ProofRow:
    """A property in a dtype: how many cases, the worst error as a share of its bound, and where."""

    prop: str
    dtype: str
    cases: int = 0
    worst: float = 0.0
    output: str = ""
    where: str = ""
    sizes: str = ""
    seed: int | None = None  # of the smallest case that fails
    scale: float = 1.0
    unbounded: list[str] = field(default_factory=list)
    promised: bool | None = None  # None: asked of everybody
    refused: int = 0  # cases that the function declined
    again: str = ""  # how to see the failing case, where not by ``replay``

    @property
    def passed(self) -> bool:
        """Whether no case was beyond its bound, or nobody promised that."""
        return self.worst <= 1 or self.promised is False

    @property
    def verdict(self) -> str:
        """In a word or two."""
        if not self.cases:
            return "refused" if self.refused else "not run"
        if self.promised is None:
            return "pass" if self.passed else "FAIL"
        kept = "kept" if self.worst <= 1 else "NOT KEPT"
        return kept if self.promised else f"not promised, {kept.lower()}"


@dataclass
class Report:
    """What ``prove`` found. True where everything passed; its text is a table."""

    fast: str
    reference: str
    rows: list[ProofRow]
    machine: dict[str, Any]
    seed: int

    @property
    def passed(self) -> bool:
        """Whether every row did."""
        return all(row.passed for row in self.rows)

    def __bool__(self) -> bool:
        return self.passed

    def to_json(self) -> dict[str, Any]:
        """As plain data: rows, versions, seed and machine; what is infinite as a word."""
        data = asdict(self)
        for row, own in zip(data["rows"], self.rows):
            row |= {"passed": own.passed, "verdict": own.verdict}
            row["worst"] = row["worst"] if math.isfinite(row["worst"]) else "inf"
        return data | {"passed": self.passed}

    def __str__(self) -> str:
        width = max([10, *(len(row.prop) + 2 for row in self.rows)])
        head = f"{'property':<{width}}{'dtype':<10}{'cases':>6}  {'worst/bound':>11}  verdict"
        lines = [f"{self.fast} against {self.reference}", head, "-" * len(head)]
        for row in self.rows:
            what = f"{row.prop:<{width}}{row.dtype:<10}{row.cases:>6}"
            lines.append(f"{what}  {row.worst:>11.3g}  {row.verdict}")
            if not row.passed:
                call = f"seed={row.seed}, scale={row.scale:g}"
                lines += [
                    f"    {row.output}{row.where}",
                    f"    at {row.sizes}",
                    row.again
                    or f"    testing.replay(fast, reference, inputs, {row.prop!r}, "
                    f"torch.{row.dtype}, {call})",
                ]
        unbounded = sorted({reason for row in self.rows for reason in row.unbounded})
        lines += [f"not bounded: {reason}" for reason in unbounded]
        return "\n".join(lines)


def _scales(dtype: torch.dtype) -> tuple[float, ...]:
    return (1.0, 1e-2, 1e2) if dtype == torch.float16 else (1.0, 1e-4, 1e4)


def _trial(claim: Claim, prop: str, dtype: torch.dtype, seed: int, scale: float) -> Trial:
    special = math.nan if prop == "nan" else None
    return Trial(claim, dtype, seed, scale, exact=prop == "integers", special=special)


def _is_plain(trial: Trial) -> bool:
    return not trial.exact and trial.special is None


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", None) or repr(function)


def replay(
    fast: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Draw,
    property: str,
    dtype: torch.dtype,
    *,
    seed: int,
    scale: float = 1.0,
    device: str = "cpu",
    gradients: bool = True,
    arithmetic: Arithmetic | Callable[[torch.dtype], Arithmetic] | None = None,
) -> Findings:
    """One case of ``prove`` again: the worst of every output and gradient."""
    if property not in PROPERTIES:
        raise ValueError(f"replay: property must be one of {tuple(PROPERTIES)}, got {property!r}")
    claim = Claim(fast, reference, inputs, device, gradients, arithmetic)
    return PROPERTIES[property](_trial(claim, property, dtype, seed, scale))


def prove(
    fast: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Draw,
    *,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    properties: Sequence[str] = tuple(PROPERTIES),
    cases: int = 100,
    seed: int = 0,
    device: str = "cpu",
    gradients: bool = True,
    arithmetic: Arithmetic | Callable[[torch.dtype], Arithmetic] | None = None,
) -> Report:
    """Hold a fast function to a plain torch definition, by bounds that nobody has to derive.

        report = testing.prove(fast, reference, testing.Cases({"x": "B d", "w": "n d"}))
        assert report, report

    Args:
        fast: any callable; called with the drawn inputs as keywords, on ``device``.
        reference: plain torch, deterministic, of the same signature; it runs in float64 on the
            host.
        inputs: ``Cases``, or a function of (generator, scale, exact) that returns keyword
            arguments, floating tensors of small integers if ``exact``.
        dtypes: of the floating inputs.
        properties: of "values" (outputs and gradients within their bounds, poisoned memory),
            "integers" (small integers, whose results are exact where the reference's are),
            "layouts" (fenced, and not contiguous), "nan" (one NaN: it has to appear exactly where
            the definition has it), "repeats" (bit for bit).
        cases: for each property and dtype.
        gradients: compare those of all floating inputs as well.
        arithmetic: that is allowed between inputs and outputs, or what makes it of a dtype. The
            default, ``Arithmetic.of``, is that of one kernel: sums in float32, nothing rounded to a
            half before the end. A chain of operators, each of which writes its result in a half (as
            eager torch in bfloat16 does), is refuted by that; it is to be judged by
            ``functools.partial(Arithmetic.of, fused=False)``, which rounds after every operation of
            the reference. ``products="tf32"`` or ``"bfloat16"`` lets tensor cores round operands,
            ``inputs=torch.bfloat16`` a kernel its inputs, ``accumulate=`` sums be of another dtype.

    Returns:
        ``Report``; its text names, for each failure, output, element, sizes and the call that
        repeats the smallest such case found.

    Raises:
        ValueError: an unknown property.
    """
    for prop in properties:
        if prop not in PROPERTIES:
            raise ValueError(f"prove: property must be one of {tuple(PROPERTIES)}, got {prop!r}")
    claim = Claim(fast, reference, inputs, device, gradients, arithmetic)
    rows = []
    total = cases * len(dtypes) * len(properties)
    with patched_once(), tqdm(total=total, desc="prove", unit="case", disable=None) as progress:
        for dtype in dtypes:
            tallies = {prop: Tally() for prop in properties}
            for number in range(cases):
                scale = _scales(dtype)[number % 3]
                # what is drawn alike shares the values of its definition
                trials: dict[str, Trial] = {}
                for prop, tally in tallies.items():
                    trial = _trial(claim, prop, dtype, seed + number, scale)
                    trial = trials.setdefault("plain" if _is_plain(trial) else prop, trial)
                    if not tally.enough:
                        claim.leaves(trial)  # an error of the definition is nobody's finding
                        tally.add(prop, trial)
                    progress.update()
            for prop, tally in tallies.items():
                later = itertools.count(seed + cases)
                tally.shrink(_trial(claim, prop, dtype, at, 1.0) for at in later)
            name = str(dtype).removeprefix("torch.")
            rows += [_row(prop, name, tally) for prop, tally in tallies.items()]
    return Report(_name(fast), _name(reference), rows, machine(device), seed)


def _row(prop: str, dtype: str, tally: Tally) -> ProofRow:
    row = ProofRow(prop, dtype, tally.cases, tally.worst, unbounded=sorted(tally.unbounded))
    if not tally.passed and tally.told is not None:
        _, trial, row.output, finding = tally.told
        row.worst = finding.share
        row.where = finding.where
        row.sizes = trial.sizes
        row.seed = trial.seed
        row.scale = trial.scale
    return row
