"""What ``mahalanobis_covariance_loss`` may be off by: every distance in float64 with the error of
its roundings.

A distance is the norm, with weights w, of the difference of two rows of y, where y = xL (w = 1) or
y = [x, xU] (w = [diag, s]) of rows x moved by an origin of their class. Let e_i bound |error of
y_i| elementwise, ‖·‖ be the norm with weights |w|, ρ_i = ‖e_i‖, N the norm of the true difference.
Its square q is then off by Δq ≤ 2N(ρ_i + ρ_j) + (ρ_i + ρ_j)² + (n + 4)u(N + ρ_i + ρ_j)², and D =
sqrt(q⁺ + 1e-8) by ΔD ≤ Δq / (D + the least D) + 2uD: linear in the roundings however near the two
rows are, which a Gram matrix's q = y_i² - 2 y_i·y_j + y_j² is not.

|D_old − D_new| has a kink. A pair whose difference is within the error of its two distances may
pull with any strength in [−1, 1]: the admissible gradients are an interval around the sum of the
other pairs. The same holds for a pair whose square is within Δq of 0 from above or below, where the
maximum with 0 has a kink.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipsteer.ops._spec import ACCUMULATE, UNIT, OpSpec, draw, fraction_of_bound, operand_error
from clipsteer.ops.mahalanobis_covariance_loss import (
    LowRankDiag,
    mahalanobis_covariance_loss,
    mahalanobis_covariance_loss_reference,
)

FLOOR = 1e-8


class Truth:
    """A drawn case in float64; ``classes`` lists the rows of every class that has a pair."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        self.dtype = inputs["new"].dtype
        wide = {
            n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
            for n, v in inputs.items()
        }
        self.labels = wide["labels"]
        self.normalize = wide["normalize"]
        self.B, self.d = wide["new"].shape
        self.low_rank = "U" in wide
        self.factor = wide["U"] if self.low_rank else wide["factor"]
        self.weights = torch.cat([wide["diag"], wide["s"]], -1) if self.low_rank else None
        self.u = ACCUMULATE[self.dtype]
        half = UNIT[self.dtype] if self.dtype in (torch.float16, torch.bfloat16) else 0.0
        # products on tensor cores: TF32, or a vector computed inside as the sum of two halves
        self.extra = operand_error(self.dtype) + half**2
        norms = [torch.linalg.vector_norm(wide[n], dim=-1, keepdim=True) for n in ("new", "old")]
        self.scale = [
            torch.where(n > 0, 1 / n, 0.0) if self.normalize else torch.ones_like(n) for n in norms
        ]
        self.sides = [wide[n] * k for n, k in zip(("new", "old"), self.scale)]
        rows = [(self.labels == c).nonzero().squeeze(1) for c in range(self.factor.shape[0])]
        self.classes = [(c, r) for c, r in enumerate(rows) if len(r) > 1]
        # of a norm: d squares under a root, and the root; a row's numbers share it
        self.of_norm = (self.d / 2 + 2) * self.u if self.normalize else 0.0

    def project(self, x: Tensor, W: Tensor) -> Tensor:
        return torch.cat([x, x @ W], -1) if self.low_rank else x @ W

    def rows(self, side: int, c: int, at: Tensor) -> tuple[Tensor, Tensor]:
        """y of a class's rows, and e."""
        x = self.sides[side][at]
        W = self.factor[c]
        centred = x - x[:1]
        u = self.u
        stored = 3 * u * (x.abs() + x[:1].abs())  # the quotient and the difference to the origin
        tiny = torch.finfo(
            torch.float64 if self.dtype == torch.float64 else torch.float32
        ).smallest_normal
        error = (
            stored + ((self.d + 2) * u + self.extra) * (centred.abs() + stored) + 2 * tiny
        ) @ W.abs()
        error = error + self.d * tiny
        y = self.project(x, W)
        error = torch.cat([stored + tiny, error], -1) if self.low_rank else error
        return y - y[:1], error + self.of_norm * (y.abs() + y[:1].abs())

    def distances(self, side: int, c: int, at: Tensor) -> dict[str, Tensor]:
        y, e = self.rows(side, c, at)
        w = torch.ones(y.shape[1], dtype=torch.float64) if self.weights is None else self.weights[c]
        difference = y.unsqueeze(1) - y  # (n, n, columns)
        N2 = (difference.square() * w.abs()).sum(-1)
        q = (difference.square() * w).sum(-1)
        rho = (e.square() * w.abs()).sum(-1).sqrt()
        both = rho.unsqueeze(1) + rho
        N = N2.sqrt()
        off = 2 * N * both + both.square() + (y.shape[1] + 4) * self.u * (N + both).square()
        D, least = ((v.clamp(min=0) + FLOOR).sqrt() for v in (q, q - off))
        error = off / (D + least) + 4 * self.u * D
        return {
            "D": D,
            "error": error,
            "q": q,
            "off": off,
            "difference": difference,
            "e": e,
            "w": w,
        }


def check_values(inputs: dict[str, Any], outputs: dict[str, Tensor]) -> dict[str, float]:
    """Every distance's error, the roundings of the terms and of their sum, and the result's own."""
    t = Truth(inputs)
    truth = 0.0
    bound = 0.0
    size = 0.0
    terms = 0
    for c, at in t.classes:
        new, old = (t.distances(side, c, at) for side in (0, 1))
        upper = torch.ones(len(at), len(at), dtype=torch.bool).triu(1)
        change = (old["D"] - new["D"]).abs()[upper]
        error = (old["error"] + new["error"])[upper]
        truth = truth + change.sum() / t.B
        bound = bound + error.sum() / t.B
        size = size + (change + error).sum() / t.B
        terms = terms + len(change)
    value = outputs["loss"].reshape(1)
    truth = torch.as_tensor(truth, dtype=torch.float64).reshape(1)
    if not truth.isfinite().all():
        # which of infinity and NaN depends on what is subtracted first
        return {"loss": 0.0 if not value.isfinite().any() else float("inf")}
    size = torch.as_tensor(size, dtype=torch.float64).reshape(1)
    return {"loss": fraction_of_bound(value, truth, size, terms + 2, 0.0, torch.as_tensor(bound))}


def check_grads(
    inputs: dict[str, Any],
    outputs: dict[str, Tensor],
    grad_out: dict[str, Tensor],
    grads: dict[str, Tensor],
) -> dict[str, float]:
    t = Truth(inputs)
    g = grad_out["loss"].double()
    truth, bound, size = (torch.zeros(t.B, t.d, dtype=torch.float64) for _ in range(3))
    for c, at in t.classes:
        truth[at], bound[at], size[at] = _class_gradient(t, c, at)
    x = t.sides[0]
    scale = t.scale[0]
    if t.normalize:
        back = lambda v, s: (v + s * x * (x * v).sum(-1, keepdim=True)) * scale
        around = lambda v: (v + x.abs() * (x.abs() * v).sum(-1, keepdim=True)) * scale
        # x's own roundings count twice, its product's d terms once
        truth = back(truth, -1)
        bound = around(bound) + (3 * t.of_norm + (t.d + 8) * t.u) * around(size)
        size = around(size)
    terms = torch.tensor(2.0)  # times the cotangent, and the store
    return {
        "new": fraction_of_bound(
            grads["new"],
            g * truth,
            g.abs() * size,
            terms,
            0.0,
            g.abs() * bound,
        )
    }


def _class_gradient(t: Truth, c: int, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(n, d) of d loss / d rows: the middle of what is admissible, half its width, and the size of
    what is summed."""
    new, old = (t.distances(side, c, at) for side in (0, 1))
    W = t.factor[c]
    n = len(at)
    u = t.u
    w = new["w"]
    back = (lambda v: v[..., : t.d] + v[..., t.d :] @ W.mT) if t.low_rank else (lambda v: v @ W.mT)
    back_size = (
        (lambda v: v[..., : t.d] + v[..., t.d :] @ W.mT.abs())
        if t.low_rank
        else (lambda v: v @ W.mT.abs())
    )
    change = new["D"] - old["D"]
    D = new["D"]
    # of 1 / D: what the error makes of it, D being at least sqrt(1e-8) on every backend
    least = (D - new["error"]).clamp(min=0.999 * FLOOR**0.5)
    relative = new["error"] / least + 4 * u
    free = change.abs() <= new["error"] + old["error"] + 4 * u * (D + old["D"])
    free |= new["q"].abs() <= new["off"]
    free.fill_diagonal_(False)
    pulls = (new["q"] > 0) & ~free
    strength = torch.where(pulls, change.sign(), 0.0) / (D * t.B)
    strength.fill_diagonal_(0)
    most = (pulls | free).double() * (1 + relative) / (D * t.B)
    most.fill_diagonal_(0)
    middle, width, size = (torch.zeros(n, t.d, dtype=torch.float64) for _ in range(3))
    for i in range(n):
        # (n, columns)
        difference = new["difference"][i]
        e = new["e"][i] + new["e"]
        summed = (most[i, :, None] * (difference.abs() + e)).sum(0) * w.abs()
        off = most[i, :, None] * (e + (relative[i, :, None] + (n + 4) * u) * (difference.abs() + e))
        middle[i] = back((strength[i, :, None] * difference).sum(0) * w)
        kinks = (most[i, free[i], None] * back(difference[free[i]] * w).abs()).sum(0)
        size[i] = back_size(summed)
        width[i] = (
            kinks + back_size(off.sum(0) * w.abs()) + ((W.shape[1] + 3) * u + t.extra) * size[i]
        )
    return middle, width, size


def _low_rank(
    new: Tensor,
    old: Tensor,
    labels: Tensor,
    U: Tensor,
    s: Tensor,
    diag: Tensor,
    *,
    backend: str = "auto",
    **kw: Any,
) -> Tensor:
    return mahalanobis_covariance_loss(
        new,
        old,
        labels,
        LowRankDiag(U, s, diag),
        backend=backend,
        **kw,
    )


def _low_rank_reference(
    new: Tensor,
    old: Tensor,
    labels: Tensor,
    U: Tensor,
    s: Tensor,
    diag: Tensor,
    **kw: Any,
) -> Tensor:
    return mahalanobis_covariance_loss_reference(new, old, labels, LowRankDiag(U, s, diag), **kw)


def _make(
    shape: dict[str, int],
    dtype: torch.dtype,
    generator: torch.Generator,
    scale: float,
    exact: bool,
) -> dict:
    """Keys B, C, d, and r in low rank; plain=1 does not normalise. About one row in eight is
    ignored."""
    B, C, d, r = (shape.get(s) for s in ("B", "C", "d", "r"))
    normalize = not shape.get("plain")
    size = scale if normalize else min(scale, 1.0)  # squares have to stay in range
    inputs: dict[str, Any] = {
        n: draw((B, d), dtype, generator, size, exact) for n in ("new", "old")
    }
    labels = torch.randint(0, C, (B,), generator=generator)
    inputs["labels"] = torch.where(torch.rand(B, generator=generator) < 0.125, -1, labels)
    if r is None:
        return inputs | {
            "factor": draw((C, d, d), dtype, generator, d**-0.5, exact),
            "normalize": normalize,
        }
    # I - U s Uᵀ with ‖U‖ near 1 and s in (0, 1/2): a precision in Woodbury's form
    inputs["U"] = draw((C, d, r), dtype, generator, (d**0.5 + r**0.5) ** -1, exact)
    inputs["s"] = -torch.rand(C, r, generator=generator).div(2).to(dtype)
    inputs["diag"] = (1 + torch.rand(C, d, generator=generator)).to(dtype)
    if exact:
        inputs["s"] = -torch.ones(C, r, dtype=dtype)
        inputs["diag"] = torch.full((C, d), 4.0, dtype=dtype)
    return inputs | {"normalize": normalize}


def _unit_rows(x: Tensor, normalize: bool) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1) if normalize else x


def _whitened(
    new: Tensor,
    old: Tensor,
    labels: Tensor,
    product: Any,
    C: int,
    normalize: bool,
) -> Tensor:
    """What one would write instead of the pair loop: each class's rows through its factor, then
    their distances."""
    new, old, total = _unit_rows(new, normalize), _unit_rows(old, normalize), new.new_zeros(())
    for c in range(C):
        rows = (labels == c).nonzero().squeeze(1)
        if len(rows) > 1:
            i, j = torch.triu_indices(len(rows), len(rows), 1)
            after, before = ((product(x[rows], i, j, c) + 1e-8).sqrt() for x in (new, old))
            total = total + (before - after).abs().sum()
    return total / len(new)


def _vectorised(
    new: Tensor,
    old: Tensor,
    labels: Tensor,
    factor: Tensor,
    normalize: bool,
) -> Tensor:
    def square(x: Tensor, i: Tensor, j: Tensor, c: int) -> Tensor:
        z = x @ factor[c]
        return (z[i] - z[j]).square().sum(-1)

    return _whitened(new, old, labels, square, factor.shape[0], normalize)


def _vectorised_low_rank(
    new: Tensor,
    old: Tensor,
    labels: Tensor,
    U: Tensor,
    s: Tensor,
    diag: Tensor,
    normalize: bool,
) -> Tensor:
    def square(x: Tensor, i: Tensor, j: Tensor, c: int) -> Tensor:
        p = x @ U[c]
        return (x[i] - x[j]).square() @ diag[c] + (p[i] - p[j]).square() @ s[c]

    return _whitened(new, old, labels, square, U.shape[0], normalize)


def _pair_loop(new: Tensor, old: Tensor, labels: Tensor, factor: Tensor, normalize: bool) -> Tensor:
    """The textbook's: class by class, pair by pair, a vector times a matrix for each distance."""
    new, old, total = _unit_rows(new, normalize), _unit_rows(old, normalize), new.new_zeros(())
    for c in labels[labels >= 0].unique().tolist():
        rows = (labels == c).nonzero().squeeze(1).tolist()
        for at, i in enumerate(rows):
            for j in rows[at + 1 :]:
                before, after = (
                    ((a @ factor[c]).square().sum() + 1e-8).sqrt()
                    for a in (old[i] - old[j], new[i] - new[j])
                )
                total = total + (before - after).abs()
    return total / len(new)


_EDGES = (
    {"B": 7, "C": 2, "d": 33, "r": 5},
    {"B": 33, "C": 5, "d": 31, "r": 8},
    {"B": 4, "C": 9, "d": 127, "r": 129},
    {"B": 1, "C": 1, "d": 1, "r": 1, "plain": 1},
    {"B": 0, "C": 2, "d": 8, "r": 4},
    {"B": 129, "C": 2, "d": 32, "r": 33, "plain": 1},
    {"B": 31, "C": 1, "d": 129, "r": 32},
    {"B": 32, "C": 3, "d": 128, "r": 64},
    {"B": 31, "C": 2, "d": 203, "r": 197},
)
_ON_DEVICE = (
    {"B": 150, "C": 6, "d": 320, "r": 40},
)  # several blocks of rows a class, several tiles of columns
_COMMON: dict[str, Any] = {
    "outputs": ("loss",),
    "differentiable": ("new",),
    "make": _make,
    "check": check_values,
    "check_grads": check_grads,
    "exact": False,
}


def _dense(shape: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in shape.items() if name != "r"}


SPEC = OpSpec(
    name="mahalanobis_covariance_loss",
    function=mahalanobis_covariance_loss,
    reference=mahalanobis_covariance_loss_reference,
    shapes=tuple(map(_dense, _EDGES)),
    device_shapes=tuple(map(_dense, _ON_DEVICE)),
    small_shape={"B": 6, "C": 2, "d": 3},
    repeat_shape={"B": 200, "C": 5, "d": 40},
    bench_shapes={
        "B48-C20": {"B": 48, "C": 20, "d": 768},
        "B256-C20": {"B": 256, "C": 20, "d": 768},
    },
    gpu_bench_shapes={
        "B48-C20": {"B": 48, "C": 20, "d": 768},
        "B256-C20": {"B": 256, "C": 20, "d": 768},
    },
    baselines={"vectorised": _vectorised, "pair loop": _pair_loop},
    floor=lambda s: (
        4.0 * s["B"] * s["d"] ** 2,
        4.0 * (2 * s["B"] * s["d"] + s["C"] * s["d"] ** 2),
    ),
    **_COMMON,
)
LOW_RANK_SPEC = OpSpec(
    name="mahalanobis_covariance_loss_low_rank",
    function=_low_rank,
    reference=_low_rank_reference,
    shapes=_EDGES,
    device_shapes=_ON_DEVICE,
    small_shape={"B": 6, "C": 2, "d": 3, "r": 2},
    repeat_shape={"B": 200, "C": 5, "d": 40, "r": 17},
    bench_shapes={"B256-C20-r64": {"B": 256, "C": 20, "d": 768, "r": 64}},
    gpu_bench_shapes={"B256-C20-r64": {"B": 256, "C": 20, "d": 768, "r": 64}},
    baselines={"vectorised": _vectorised_low_rank},
    floor=lambda s: (
        4.0 * s["B"] * s["d"] * s["r"],
        4.0 * (2 * s["B"] + s["C"] * (s["r"] + 1)) * s["d"],
    ),
    **_COMMON,
)

SPECS = (SPEC, LOW_RANK_SPEC)
