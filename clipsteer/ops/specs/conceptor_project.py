"""What ``conceptor_project`` may be off by: values and gradients in float64, and the roundings on
the way, counted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipsteer.ops._spec import UNIT, OpSpec, draw, fraction_of_bound, operand_error
from clipsteer.ops.conceptor_project import LowRank, conceptor_project, conceptor_project_reference


class Truth:
    """A drawn case in float64. Both forms are the matrices C with a magnitude: |C|, or
    |U||s||U|ᵀ."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        wide = {
            n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
            for n, v in inputs.items()
        }
        h, self.dtype = wide["h"], inputs["h"].dtype
        self.low_rank = "U" in inputs
        if self.low_rank:
            self.U = wide["U"]
            self.s = wide["s"]
            self.r = self.U.shape[2]
            self.C = self.U * self.s.unsqueeze(1) @ self.U.mT
            self.size = self.U.abs() * self.s.abs().unsqueeze(1) @ self.U.abs().mT
        else:
            self.C = wide["C"]
            self.size = wide["C"].abs()
        self.K, self.d = self.C.shape[:2]
        self.index = (
            torch.zeros(h.shape[0], dtype=torch.int64) if wide["index"] is None else wide["index"]
        )
        beta = wide["beta"]
        mean = wide["mean"]
        self.beta = (
            beta if isinstance(beta, Tensor) else torch.full((self.K,), beta, dtype=torch.float64)
        )
        self.mean = torch.zeros(self.K, self.d, dtype=torch.float64) if mean is None else mean
        self.x = h - self.mean[self.index]
        self.counts = torch.bincount(self.index, minlength=self.K).double()
        # What a stored or multiplied number may lose for good: products below the normal range, and
        # half of the spacing of float16's smallest numbers.
        info = torch.finfo(torch.float64 if self.dtype == torch.float64 else torch.float32)
        self.lost = info.smallest_normal * (self.d + 1) + (
            2.0**-25 if self.dtype == torch.float16 else 0.0
        )

    def apply(self, matrices: Tensor, rows: Tensor) -> Tensor:
        return (matrices[self.index] @ rows.unsqueeze(-1)).squeeze(-1)

    def inner(self, lost: float) -> Tensor:
        """What ``lost`` in each of the r numbers makes of a row."""
        return self.U.abs().sum(-1)[self.index] * lost if self.low_rank else torch.zeros(())

    def project(self, rows: Tensor) -> Tensor:
        """C rows, in the order of the definition: with an infinity among the rows it matters."""
        if not self.low_rank:
            return self.apply(self.C, rows)
        return self.apply(self.U, self.s[self.index] * self.apply(self.U.mT, rows))

    def total(self, rows: Tensor) -> Tensor:
        return torch.zeros(self.K, *rows.shape[1:], dtype=torch.float64).index_add(
            0,
            self.index,
            rows,
        )

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([a[self.index == k].T @ b[self.index == k] for k in range(self.K)])

    def error(
        self,
        value: Tensor,
        truth: Tensor,
        size: Any,
        roundings: Any,
        stored: int,
        products: int,
    ) -> float:
        """``size(lost)`` is the magnitude when every |vector| on the way is larger by ``lost``. Of
        the ``roundings``, ``stored`` are of vectors that a half stores between kernels;
        ``products`` of inner products may take TF32, or halves in two parts, for a vector that is
        computed inside."""
        unit = UNIT[self.dtype] if self.dtype in (torch.float16, torch.bfloat16) else 0.0
        extra = stored * unit + products * (operand_error(self.dtype) + unit**2)
        magnitude = size(0.0)
        return fraction_of_bound(
            value,
            truth,
            magnitude,
            roundings - 1,
            extra,
            size(self.lost) - magnitude,
        )


def check_values(inputs: dict[str, Any], outputs: dict[str, Tensor]) -> dict[str, float]:
    """Roundings: h − μ, d of a product's sum, β if it is a number, times β, and + μ; in low rank r
    of the second sum and one more, as it is times s and s is times β. The r-vector and h − μ are
    not rounded to halves (Triton's tensor cores take them as the sum of two)."""
    t = Truth(inputs)
    beta = t.beta[t.index, None]
    mu = t.mean[t.index]
    truth = beta * t.project(t.x) + mu
    roundings = t.d + t.r + 5 if t.low_rank else t.d + 4

    def size(lost: float) -> Tensor:
        return beta.abs() * (t.apply(t.size, t.x.abs() + lost) + t.inner(lost)) + mu.abs()

    return {"h_new": t.error(outputs["h_new"], truth, size, roundings, 0, 2 if t.low_rank else 1)}


def check_grads(
    inputs: dict[str, Any],
    outputs: dict[str, Tensor],
    grad_out: dict[str, Tensor],
    grads: dict[str, Tensor],
) -> dict[str, float]:
    """The stored vectors are h − μ, the product Cᵀg that β's and μ's gradients share, and in low
    rank Uᵀ(h − μ), Uᵀg and their products with s."""
    t = Truth(inputs)
    g = grad_out["h_new"].double()
    x = t.x
    beta = t.beta[t.index, None]
    back = t.C.mT
    back_size = t.size.mT
    d_x = beta * t.apply(back, g)
    rank = t.r + 2 if t.low_rank else 0
    counts = t.counts[:, None]

    def size_x(lost: float) -> Tensor:
        return beta.abs() * (t.apply(back_size, g.abs() + lost) + t.inner(lost)) + lost

    def size_dots(lost: float) -> Tensor:
        return t.total((t.apply(back_size, g.abs() + lost) + lost).mul(x.abs() + lost).sum(-1))

    found = {
        "h": t.error(grads["h"], d_x, size_x, t.d + rank + 1, 0 if t.low_rank else 1, 2),
    }
    if "mean" in grads:
        truth = t.total(g - d_x)
        roundings = t.d + rank + 2 + counts
        found["mean"] = t.error(
            grads["mean"],
            truth,
            lambda lost: t.total(g.abs() + size_x(lost)),
            roundings,
            2,
            2,
        )
    if not t.low_rank:
        outer_size = lambda lost: t.outer(beta.abs() * g.abs() + lost, x.abs() + lost)
        truth = t.outer(beta * g, x)
        found["C"] = t.error(grads["C"], truth, outer_size, counts[:, None] + 2, 2, 1)
        if "beta" in grads:
            truth = t.total((t.apply(back, g) * x).sum(-1))
            found["beta"] = t.error(grads["beta"], truth, size_dots, 2 * t.d + t.counts + 1, 2, 1)
        return found
    # sums over the rows of p ∘ q with p = Uᵀx, q = Uᵀg
    p, q = (t.apply(t.U.mT, v) for v in (x, g))
    into = lambda v, lost: t.apply(t.U.abs().mT, v.abs() + lost) + lost
    pq = t.total(p * q)
    pq_size = lambda lost: t.total(into(x, lost) * into(g, lost))
    strength = beta * t.s[t.index]

    def size_U(lost: float) -> Tensor:
        a, b = (strength.abs() * into(v, lost) + lost for v in (g, x))
        return t.outer(x.abs() + lost, a) + t.outer(g.abs() + lost, b)

    roundings = 2 * t.d + counts + 4
    found["s"] = t.error(
        grads["s"],
        t.beta[:, None] * pq,
        lambda lost: t.beta.abs()[:, None] * pq_size(lost),
        roundings,
        3,
        2,
    )
    truth = t.outer(x, strength * q) + t.outer(g, strength * p)
    found["U"] = t.error(grads["U"], truth, size_U, t.d + 2 * counts[:, None] + 4, 3, 2)
    if "beta" in grads:
        size = lambda lost: (t.s.abs() * pq_size(lost)).sum(-1)
        found["beta"] = t.error(
            grads["beta"],
            (t.s * pq).sum(-1),
            size,
            2 * t.d + t.counts + t.r + 4,
            3,
            2,
        )
    return found


def _low_rank(
    h: Tensor,
    U: Tensor,
    s: Tensor,
    index: Tensor | None,
    *,
    backend: str = "auto",
    **options: Any,
) -> Tensor:
    return conceptor_project(h, LowRank(U, s), index, backend=backend, **options)


def _low_rank_reference(
    h: Tensor,
    U: Tensor,
    s: Tensor,
    index: Tensor | None,
    **options: Any,
) -> Tensor:
    return conceptor_project_reference(h, LowRank(U, s), index, **options)


def _make(
    shape: dict[str, int],
    dtype: torch.dtype,
    generator: torch.Generator,
    scale: float,
    exact: bool,
) -> dict:
    """Keys B, K, d, and r in low rank; plain=1 leaves out β and μ, and K=1 the index."""
    B, K, d, r = (shape.get(s) for s in ("B", "K", "d", "r"))
    sizes = {"C": (K, d, d)} if r is None else {"U": (K, d, r), "s": (K, r)}
    inputs: dict[str, Any] = {"h": draw((B, d), dtype, generator, scale, exact)}
    inputs |= {name: draw(size, dtype, generator, 1.0, exact) for name, size in sizes.items()}
    inputs["index"] = None if K == 1 else torch.randint(0, K, (B,), generator=generator)
    if shape.get("plain"):
        return inputs | {"beta": 1.0, "mean": None}
    beta = draw((K,), dtype, generator, 1.0, exact)
    mean = draw((K, d), dtype, generator, scale, exact)
    return inputs | {"beta": beta, "mean": mean}


def _grouped_loop(
    h: Tensor,
    factors: Any,
    product: Any,
    index: Tensor | None,
    beta: Any,
    mean: Tensor | None,
) -> Tensor:
    out = torch.empty_like(h)
    # C[k] would make a gradient of C's full size for every k
    for k, part in enumerate(zip(*(f.unbind(0) for f in factors))):
        rows = slice(None) if index is None else (index == k).nonzero().squeeze(1)
        y = product(h[rows] if mean is None else h[rows] - mean[k], *part)
        y = y * beta[k] if isinstance(beta, Tensor) else y if beta == 1 else y * beta
        out[rows] = y if mean is None else y + mean[k]
    return out


def _loop(h: Tensor, C: Tensor, index: Tensor | None, **options: Any) -> Tensor:
    return _grouped_loop(h, (C,), lambda x, C: x @ C.T, index, **options)


def _low_rank_loop(h: Tensor, U: Tensor, s: Tensor, index: Tensor | None, **options: Any) -> Tensor:
    return _grouped_loop(h, (U, s), lambda x, U, s: (x @ U * s) @ U.T, index, **options)


def _one_product(
    h: Tensor,
    C: Tensor,
    index: Tensor | None,
    *,
    beta: Any,
    mean: Tensor | None,
) -> Tensor:
    """As many operations in one GEMM: the wrong answer unless K = 1, and the time to stay near."""
    return h @ C[0].T


def _low_rank_floor(s: dict[str, int]) -> tuple[float, float]:
    return 4.0 * s["B"] * s["d"] * s["r"], 4.0 * (
        2 * s["B"] * s["d"] + s["K"] * (s["d"] + 1) * s["r"]
    )


_EDGES = (
    {"B": 7, "K": 3, "d": 33, "r": 5},
    {"B": 33, "K": 5, "d": 31, "r": 8},
    {"B": 4, "K": 9, "d": 127, "r": 129},
    {"B": 1, "K": 1, "d": 1, "r": 1, "plain": 1},
    {"B": 0, "K": 2, "d": 8, "r": 4},
    {"B": 129, "K": 2, "d": 32, "r": 33, "plain": 1},
    {"B": 31, "K": 1, "d": 129, "r": 32},
    {"B": 32, "K": 3, "d": 128, "r": 64},
    {"B": 31, "K": 2, "d": 203, "r": 197},
)
# several blocks of rows a group and several tiles of columns, small ones with β and μ and large
# ones without; more than one launch's rank
_ON_DEVICE = (
    {"B": 300, "K": 4, "d": 384, "r": 64},
    {"B": 600, "K": 4, "d": 384, "r": 64, "plain": 1},
    {"B": 70, "K": 2, "d": 200, "r": 300},
)
_COMMON: dict[str, Any] = {
    "outputs": ("h_new",),
    "make": _make,
    "check": check_values,
    "check_grads": check_grads,
    "rows": ("h", "index"),
    "optional": ("mean",),
    "scalable": ("h", "mean"),
}


def _dense(shape: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in shape.items() if name != "r"}


SPEC = OpSpec(
    name="conceptor_project",
    function=conceptor_project,
    reference=conceptor_project_reference,
    differentiable=("h", "C", "beta", "mean"),
    shapes=tuple(map(_dense, _EDGES)),
    device_shapes=tuple(map(_dense, _ON_DEVICE)),
    small_shape={"B": 4, "K": 2, "d": 3},
    repeat_shape={"B": 300, "K": 5, "d": 40},
    bench_shapes={"B1024-K16": {"B": 1024, "K": 16, "d": 768, "plain": 1}},
    gpu_bench_shapes={"B4096-K16": {"B": 4096, "K": 16, "d": 768, "plain": 1}},
    # A gathered C for each row would take 2.4 GB here.
    baselines={"loop": _loop, "one GEMM": _one_product},
    floor=lambda s: (
        2.0 * s["B"] * s["d"] ** 2,
        4.0 * (2 * s["B"] * s["d"] + s["K"] * s["d"] ** 2),
    ),
    **_COMMON,
)
LOW_RANK_SPEC = OpSpec(
    name="conceptor_project_low_rank",
    function=_low_rank,
    reference=_low_rank_reference,
    differentiable=("h", "U", "s", "beta", "mean"),
    shapes=_EDGES,
    device_shapes=_ON_DEVICE,
    small_shape={"B": 4, "K": 2, "d": 3, "r": 2},
    repeat_shape={"B": 300, "K": 5, "d": 40, "r": 17},
    bench_shapes={
        "B1024-K16-r64": {"B": 1024, "K": 16, "d": 768, "r": 64, "plain": 1},
        "B1024-K16-r64-mean": {"B": 1024, "K": 16, "d": 768, "r": 64},
    },
    gpu_bench_shapes={"B4096-K16-r64": {"B": 4096, "K": 16, "d": 768, "r": 64, "plain": 1}},
    baselines={"loop": _low_rank_loop, "gather + bmm": _low_rank_reference},
    floor=_low_rank_floor,
    **_COMMON,
)

SPECS = (SPEC, LOW_RANK_SPEC)
