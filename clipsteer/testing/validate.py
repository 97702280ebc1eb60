"""Numerical proof of the ops on the machine at hand.

``validate`` runs the properties of ``prove`` on drawn cases of the ops and returns a table; the
test suite runs the same functions under hypothesis (``cases``, which needs the extra
``clipsteer[test]``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from clipsteer.ops import BACKENDS, REGISTRY, _dispatch
from clipsteer.ops._lowlevel import DTYPES
from clipsteer.ops._spec import OpSpec, Shape
from clipsteer.testing.proof.interpreted import patched_once
from clipsteer.testing.proof.ops import NAMES, Backend, Case
from clipsteer.testing.proof.tally import Tally

__all__ = ["Row", "cases", "supported", "table", "validate"]


def supported(backend: str, device: str = "cpu") -> tuple[torch.dtype, ...]:
    """The dtypes in which ``backend`` is held to the bounds on ``device``; empty when it cannot run
    there."""
    place = torch.device(device)
    return tuple(d for d in DTYPES[backend] if _dispatch.unusable(backend, place, d) is None)


def scales(dtype: torch.dtype) -> tuple[float, ...]:
    """What inputs are multiplied by: one, small, large."""
    return (1.0, 1e-2, 1e2) if dtype == torch.float16 else (1.0, 1e-30, 1e30)


def _shapes(spec: OpSpec, device: str) -> tuple[Shape, ...]:
    return spec.shapes if device == "cpu" else spec.shapes + spec.device_shapes


def cases(backend: str, dtype: torch.dtype, spec: OpSpec, device: str = "cpu") -> Any:
    """A hypothesis strategy of ``Case``: it draws shapes, seeds and scales, never tensors."""
    from hypothesis import strategies as st

    return st.builds(
        Case,
        spec=st.just(spec),
        backend=st.just(backend),
        dtype=st.just(dtype),
        shape=st.sampled_from(_shapes(spec, device)),
        seed=st.integers(0, 2**31 - 1),
        scale=st.sampled_from(scales(dtype)),
        device=st.just(device),
    )


@dataclass
class Row:
    """One line of ``validate``: ``worst`` is the largest error met, as a fraction of its bound."""

    op: str
    backend: str
    dtype: str
    cases: int = 0
    worst: float = 0.0
    where: str = ""
    verdict: str = "not run"


class _Plan(NamedTuple):
    """What one row will run."""

    spec: OpSpec
    backend: str
    dtype: torch.dtype
    device: str
    cases: int


def validate(
    ops: list[str] | None = None,
    backends: list[str] | None = None,
    dtypes: list[torch.dtype] | None = None,
    *,
    cases: int = 40,
    seed: int = 0,
    device: str | None = None,
) -> list[Row]:
    """Run every property of every op on this machine.

    Args:
        ops, backends, dtypes: what to run; all by default. A backend that cannot run gets a row
            that says why.
        cases: how many cases each op × backend × dtype (a property on a drawn shape, seed and scale
            is one). Triton's interpreter needs about a second for each, so it gets a tenth of them.
        device: ``"cpu"`` or ``"cuda"``; by default a GPU for Triton and CUDA when there is one.

    Returns:
        Rows with verdict ``"pass"``, ``"FAIL"`` or ``"skipped: ..."``.

    Raises:
        ValueError: an op or a backend that is not known.
    """
    rows: list[Row] = []
    plans: list[_Plan] = []
    for name in ops or list(REGISTRY):
        if name not in REGISTRY:
            raise ValueError(f"validate: op must be one of {sorted(REGISTRY)}, got {name!r}")
        for backend in backends or list(BACKENDS):
            if backend not in BACKENDS:
                raise ValueError(f"validate: backend must be one of {BACKENDS}, got {backend!r}")
            place = device or _usual_device(backend)
            reason = _dispatch.unusable(backend, torch.device(place), torch.float32, name)
            if reason is not None:
                rows.append(Row(name, backend, "-", verdict=f"skipped: {reason}"))
                continue
            count = cases
            if backend == "triton" and place == "cpu":
                count = max(len(NAMES), cases // 10)
            for dtype in supported(backend, place):
                if dtypes is None or dtype in dtypes:
                    plans.append(_Plan(REGISTRY[name], backend, dtype, place, count))
    total = sum(plan.cases for plan in plans)
    with patched_once(), tqdm(total=total, desc="validate", unit="case", disable=None) as progress:
        for plan in plans:
            rows.append(_run(plan, seed, progress))
    return rows


def _usual_device(backend: str) -> str:
    gpu = torch.cuda.is_available() and backend in ("triton", "cuda")
    return "cuda" if gpu else "cpu"


def _run(plan: _Plan, seed: int, progress: tqdm) -> Row:
    """Draw the row's cases, the properties in turn, and write down the worst."""
    generator = torch.Generator().manual_seed(seed)
    shapes = _shapes(plan.spec, plan.device)
    properties = list(NAMES.items())
    tally = Tally()
    row = Row(plan.spec.name, plan.backend, str(plan.dtype).removeprefix("torch."))
    for number in range(plan.cases):
        drawn = torch.randint(2**31 - 1, (3,), generator=generator).tolist()
        case = Case(
            plan.spec,
            plan.backend,
            plan.dtype,
            shape=shapes[drawn[0] % len(shapes)],
            seed=drawn[2],
            scale=scales(plan.dtype)[drawn[1] % 3],
            device=plan.device,
        )
        long, prop = properties[number % len(properties)]
        tally.add(prop, case.trial(exact=prop == "integers"))
        progress.update()
    row.cases = tally.cases
    row.worst = tally.worst
    row.verdict = "pass" if tally.passed else "FAIL"
    if tally.told is not None:
        prop, trial, output, finding = tally.told
        long = next(name for name, short in NAMES.items() if short == prop)
        assert isinstance(trial.subject, Backend)
        at = f"at {trial.subject.shape}, scale {trial.scale:g}, seed {trial.seed}"
        row.where = f"{long}: {output}{finding.where} {at}"
    return row


def table(rows: list[Row]) -> str:
    """``validate``'s rows as text."""
    width = max([14, *(len(r.op) for r in rows)]) + 2
    head = f"{'op':<{width}}{'backend':<11}{'dtype':<10}{'cases':>6}  {'worst/bound':>11}  verdict"
    lines = [head, "-" * len(head)]
    for r in rows:
        what = f"{r.op:<{width}}{r.backend:<11}{r.dtype:<10}"
        lines.append(f"{what}{r.cases:>6}  {r.worst:>11.3f}  {r.verdict}")
        if r.verdict == "FAIL":
            lines.append(f"    {r.where}")
    return "\n".join(lines)
