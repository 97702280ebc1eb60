"""Numerical proof of the ops on the machine at hand.

``PROPERTIES`` are what every op promises; ``validate`` runs them on drawn cases and returns a
table, and the test suite runs the same functions under hypothesis (``cases``, which needs the extra
``clipsteer[test]``). Errors are measured against the float64 reference, as a fraction of the a
priori bound of the op's ``OpSpec``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from clipsteer.ops import BACKENDS, REGISTRY, _dispatch
from clipsteer.ops._lowlevel import DTYPES
from clipsteer.ops._spec import OpSpec, measured_on, spec_errors

__all__ = [
    "PROPERTIES",
    "Case",
    "Row",
    "cases",
    "fenced",
    "poisoned",
    "strided",
    "supported",
    "table",
    "validate",
]


@dataclass(frozen=True)
class Case:
    """One drawn situation: an op on a backend, dtype and device, a shape, and what the inputs are
    made of."""

    spec: OpSpec
    backend: str
    dtype: torch.dtype
    shape: dict[str, int]
    seed: int = 0
    scale: float = 1.0
    device: str = "cpu"

    def inputs(self, exact: bool = False) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.seed)
        return self.spec.make(self.shape, self.dtype, generator, self.scale, exact)

    def run(self, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        moved = {n: v.to(self.device) if isinstance(v, Tensor) else v for n, v in inputs.items()}
        result = self.spec.function(**moved, backend=self.backend)
        return tuple(t.cpu() for t in (result if isinstance(result, tuple) else (result,)))

    def errors(self, **options: Any) -> dict[str, float]:
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


def fenced(t: Tensor) -> Tensor:
    """The same values in the middle of a larger buffer of NaN (floating) or of the largest integer:
    a kernel that reads outside its input is found out."""
    poison = float("nan") if t.is_floating_point() else torch.iinfo(t.dtype).max
    store = torch.full((t.numel() + 128,), poison, dtype=t.dtype, device=t.device)
    inner = store[64 : 64 + t.numel()].view(t.shape)
    return inner.copy_(t)


def strided(t: Tensor) -> Tensor:
    """The same values, not contiguous: every other column of a poisoned buffer, transposed in
    memory."""
    if t.dim() == 0:
        return fenced(t)
    poison = float("nan") if t.is_floating_point() else -1
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), poison, dtype=t.dtype, device=t.device)
    view = wide.transpose(0, -1).contiguous().transpose(0, -1)[..., ::2]
    return view.copy_(t)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory is filled with NaN: an output element that is never written is found out."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, except that any NaN equals any other."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    same = a.contiguous().view(integers) == b.contiguous().view(integers)
    return bool((same | (a.isnan() & b.isnan())).all())


def values_and_gradients(case: Case) -> dict[str, float]:
    """Every output and the gradient of every input is within its bound; no uninitialised element
    survives."""
    with poisoned():
        return case.errors()


def layouts(case: Case) -> dict[str, float]:
    """Fenced and strided inputs are read where they lie and nowhere else."""
    first = case.errors(arrange=fenced)
    second = case.errors(arrange=strided)
    return {name: max(first[name], second[name]) for name in first}


def integers_bitwise(case: Case) -> dict[str, float]:
    """On small integers, where ties abound, every backend equals the float64 reference bit for bit
    (but for the sign of a zero, which depends on what a sum starts from). An op that is not exact
    on them keeps its bound."""
    if not case.spec.exact:
        return case.errors(exact=True)
    inputs = case.inputs(exact=True)
    wide = {
        n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for n, v in inputs.items()
    }
    truth = case.spec.reference(**wide)
    truth = truth if isinstance(truth, tuple) else (truth,)
    outputs = case.run(inputs)
    worst = {}
    for name, out, expected in zip(case.spec.outputs, outputs, truth):
        expected = expected.to(out.dtype) if expected.is_floating_point() else expected
        worst[name] = 0.0 if same_bits(out + 0, expected + 0) else float("inf")
    return worst | case.errors(exact=True)


def repeats_bitwise(case: Case, repeats: int = 3) -> dict[str, float]:
    """Outputs and gradients repeat bit for bit, with any number of threads where the sums are our
    own."""
    spec = case.spec
    drawn = case.inputs(exact=False)

    def once() -> dict[str, Tensor]:
        inputs = {
            n: v.to(case.device, copy=True) if isinstance(v, Tensor) else v
            for n, v in drawn.items()
        }
        leaves = spec.leaves(inputs)
        for name in leaves:
            inputs[name].requires_grad_()
        result = spec.function(**inputs, backend=case.backend)
        found = dict(zip(spec.outputs, result if isinstance(result, tuple) else (result,)))
        smooth = [t for t in found.values() if t.requires_grad]
        fixed = [
            torch.linspace(-1, 1, t.numel(), dtype=t.dtype, device=t.device).view(t.shape)
            for t in smooth
        ]
        if leaves:
            grads = torch.autograd.grad(smooth, [inputs[n] for n in leaves], fixed)
            found |= {f"d {n}": g for n, g in zip(leaves, grads)}
        return {n: t.detach().cpu() for n, t in found.items()}

    before = torch.get_num_threads()
    # torch's own products repeat on one thread; on several they may be split anew each time on a
    # busy machine
    torch.set_num_threads(1)
    try:
        first = once()
        worst = dict.fromkeys(first, 0.0)
        for repeat in range(repeats):
            several = case.backend == "cpp" and repeat == 0
            torch.set_num_threads(2 if several else 1)
            for name, again in once().items():
                if not same_bits(first[name], again) and not (several and name in spec.torch_sums):
                    worst[name] = float("inf")
    finally:
        torch.set_num_threads(before)
    return worst


def not_a_number(case: Case) -> dict[str, float]:
    """A NaN in any input, or an infinity in the first, comes out where the reference has it and
    spreads nowhere else.

    (With an infinite parameter it depends on the order of the products what is infinite and what is
    no number.)
    """
    generator = torch.Generator().manual_seed(case.seed + 1)
    inputs = case.inputs()
    worst = {}
    for special in (float("nan"), float("inf"), -float("inf")):
        spoiled = {n: v.clone() if isinstance(v, Tensor) else v for n, v in inputs.items()}
        leaves = case.spec.leaves(spoiled) or [
            n for n, v in spoiled.items() if isinstance(v, Tensor)
        ]
        which = (
            int(torch.randint(len(leaves), (1,), generator=generator)) if special != special else 0
        )
        target = spoiled[leaves[which]]
        if target.numel() == 0:
            continue
        at = int(torch.randint(target.numel(), (1,), generator=generator))
        target.view(-1)[at] = special
        outputs = dict(zip(case.spec.outputs, case.run(spoiled)))
        with measured_on(case.device):
            found = case.spec.check(spoiled, outputs)
        for name, error in found.items():
            worst[name] = max(worst.get(name, 0.0), error)
    return worst


PROPERTIES: dict[str, Callable[[Case], dict[str, float]]] = {
    f.__name__: f
    for f in (values_and_gradients, layouts, integers_bitwise, repeats_bitwise, not_a_number)
}


def supported(backend: str, device: str = "cpu") -> tuple[torch.dtype, ...]:
    """The dtypes in which ``backend`` is held to the bounds on ``device``; empty when it cannot run
    there.

    Not among them: the reference in half precision (torch rounds its intermediates), and
    interpreted bf16 Triton arithmetic is exercised in float32 only where the interpreter itself is
    wrong.
    """
    found = [
        d for d in DTYPES[backend] if _dispatch.unusable(backend, torch.device(device), d) is None
    ]
    if backend == "reference":
        found = [d for d in found if d in (torch.float32, torch.float64)]
    return tuple(found)


def scales(dtype: torch.dtype) -> tuple[float, ...]:
    return (1.0, 1e-2, 1e2) if dtype == torch.float16 else (1.0, 1e-30, 1e30)


def cases(backend: str, dtype: torch.dtype, spec: OpSpec, device: str = "cpu") -> Any:
    """A hypothesis strategy of ``Case``: it draws shapes, seeds and scales, never tensors."""
    from hypothesis import strategies as st

    return st.builds(
        Case,
        spec=st.just(spec),
        backend=st.just(backend),
        dtype=st.just(dtype),
        shape=st.sampled_from(spec.shapes + spec.device_shapes * (device != "cpu")),
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
    """
    rows: list[Row] = []
    plan: list[tuple[OpSpec, str, torch.dtype, str, int]] = []
    gpu = torch.cuda.is_available()
    for name in ops or list(REGISTRY):
        if name not in REGISTRY:
            raise ValueError(f"validate: op must be one of {sorted(REGISTRY)}, got {name!r}")
        for backend in backends or list(BACKENDS):
            if backend not in BACKENDS:
                raise ValueError(f"validate: backend must be one of {BACKENDS}, got {backend!r}")
            place = device or ("cuda" if gpu and backend in ("triton", "cuda") else "cpu")
            reason = _dispatch.unusable(backend, torch.device(place), torch.float32, name)
            if reason is not None:
                rows.append(Row(name, backend, "-", verdict=f"skipped: {reason}"))
                continue
            count = (
                max(len(PROPERTIES), cases // 10)
                if backend == "triton" and place == "cpu"
                else cases
            )
            found = [d for d in supported(backend, place) if dtypes is None or d in dtypes]
            plan += [(REGISTRY[name], backend, dtype, place, count) for dtype in found]
    progress = tqdm(total=sum(p[-1] for p in plan), desc="validate", unit="case", disable=None)
    for spec, backend, dtype, place, count in plan:
        row = Row(spec.name, backend, str(dtype).removeprefix("torch."), verdict="pass")
        rows.append(row)
        generator = torch.Generator().manual_seed(seed)
        for number in range(count):
            drawn = torch.randint(2**31 - 1, (3,), generator=generator).tolist()
            size = scales(dtype)[drawn[1] % 3]
            shapes = spec.shapes + spec.device_shapes * (place != "cpu")
            case = Case(spec, backend, dtype, shapes[drawn[0] % len(shapes)], drawn[2], size, place)
            prop, check = list(PROPERTIES.items())[number % len(PROPERTIES)]
            try:
                errors = check(case)
            except Exception as error:  # a crash is a finding, and the other rows still matter
                row.verdict = "FAIL"
                row.where = f"{prop} at {case.shape} raised {type(error).__name__}: {error}"
                row.worst = float("inf")
            else:
                output = max(errors, key=lambda name: errors[name], default=None)
                if output is not None and errors[output] > row.worst:
                    row.worst = errors[output]
                    row.where = f"{prop}: {output} at {case.shape}, scale {size:g}"
                if row.worst > 1:
                    row.verdict = "FAIL"
            row.cases += 1
            progress.update()
    progress.close()
    return rows


def table(rows: list[Row]) -> str:
    """``validate``'s rows as text."""
    width = max([14, *(len(r.op) for r in rows)]) + 2
    head = f"{'op':<{width}}{'backend':<11}{'dtype':<10}{'cases':>6}  {'worst/bound':>11}  verdict"
    lines = [head, "-" * len(head)]
    for r in rows:
        lines.append(
            f"{r.op:<{width}}{r.backend:<11}{r.dtype:<10}{r.cases:>6}  {r.worst:>11.3f}  {r.verdict}"
        )
        if r.verdict == "FAIL":
            lines.append(f"    {r.where}")
    return "\n".join(lines)
