"""How cases of ``generalised_rand_index`` and ``concept_distances`` are drawn, what they may be off
by, and what they are timed against.

The index: a number is rounded to half a unit, of which the largest row's sum has 2²⁹ or more
(float64: 2⁶⁰), or sums of rows are rounded as float32's are; |d_P − d_Q| moves by what its parts
do, and the mean over pairs by the mean of that. A pair whose |d_P − d_Q| is below its error may
have any sign, so that the gradient of a number may be off by 2 of what N(N − 1) divides, for each
such pair in which it differs.

D: sorted numbers are differences and sums of two that are rounded once, G(z) moves by N − 1 times
what they do, Σ|δz_i| ≤ u·Σ(|x_i| + |y_i|), and its own sum is in float64. Tiles have three
roundings and a sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipsteer.ops._agreement import SparseScores, blocks, differences, disagreement
from clipsteer.ops._bounds import ACCUMULATE, fraction_of_bound
from clipsteer.ops._spec import Draw, Errors, Inputs, OpSpec, Shape, Tensors, sizes, unpacked
from clipsteer.ops.pairwise_agreement import (
    concept_distances,
    concept_distances_reference,
    generalised_rand_index,
    generalised_rand_index_reference,
)
from clipsteer.ops.specs.ragged_decode import draw_codes

# a tile's sums in float32, and those of several tiles
DEPTH = 64


def _scores(case: Draw, N: int, K: int) -> Tensor:
    """Memberships of a clustering, whose sums are the case's scale; signed=1: of any sign."""
    if case.exact or case.shape.get("signed"):
        return case.tensor(N, K)
    drawn = torch.randn(N, K, generator=case.generator).double()
    return ((2 * drawn).softmax(1) * case.scale).to(case.dtype)


def _draw(case: Draw) -> Inputs:
    N, K, L = unpacked(case.shape, "N K L")
    P = _scores(case, N, K)
    Q = _scores(case, N, L)
    if K == L and not case.exact:
        # models that agree in part
        Q = ((P.double() + 2 * Q.double()) / 3).to(case.dtype)
    return {"P": P, "Q": Q}


def _draw_sparse(case: Draw) -> Inputs:
    N, K, L, k = unpacked(case.shape, "N K L k")
    found: Inputs = {}
    for name, n in (("P", K), ("Q", L)):
        codes = draw_codes(case, N, n, k)
        if not case.shape.get("signed"):
            codes["values"] = codes["values"].abs()
        found |= {f"{name}_{part}": value for part, value in codes.items()}
    return found | {"K": K, "L": L}


def _pair_of(inputs: Inputs) -> tuple[SparseScores, SparseScores]:
    sides = []
    for name, concepts in (("P", "K"), ("Q", "L")):
        parts = [inputs[f"{name}_{part}"] for part in ("values", "indices", "offsets")]
        values, indices, offsets = parts
        sides.append(SparseScores(values, indices, offsets, inputs[concepts]))
    return sides[0], sides[1]


def _sparse(function: Any) -> Any:
    """The op of ``_draw_sparse``'s arguments."""

    def of_parts(
        P_values: Tensor,
        P_indices: Tensor,
        P_offsets: Tensor,
        K: int,
        Q_values: Tensor,
        Q_indices: Tensor,
        Q_offsets: Tensor,
        L: int,
        **options: Any,
    ) -> Tensor:
        P = SparseScores(P_values, P_indices, P_offsets, K)
        return function(P, SparseScores(Q_values, Q_indices, Q_offsets, L), **options)

    return of_parts


def _dense(inputs: Inputs) -> tuple[Tensor, Tensor, int]:
    """P and Q as they are, and how many terms the sums of two rows have."""
    if "P" in inputs:
        P, Q = inputs["P"], inputs["Q"]
    else:
        P, Q = (side.dense() for side in _pair_of(inputs))
    return P, Q, P.shape[1] + Q.shape[1]


def _error(P: Tensor, Q: Tensor, terms: int) -> tuple[Tensor, Tensor]:
    """Of |d_P − d_Q|: what a row adds to its error (N,), and what the unit does ()."""
    u = ACCUMULATE[P.dtype]
    length = [x.double().abs().sum(1) for x in (P, Q)]
    most = torch.cat([*length, length[0].new_zeros(1)]).max()
    unit = 2.0**-60 if P.dtype == torch.float64 else 2.0**-29
    return (terms + 8) * u * (length[0] + length[1]) / 2, terms * unit * most


def check_index(inputs: Inputs, outputs: Tensors) -> Errors:
    """One less the mean, which is off by what a pair is on average."""
    P, Q, terms = _dense(inputs)
    N = P.shape[0]
    total = torch.zeros((), dtype=torch.float64)
    for rows in blocks(P, Q):
        total = total + disagreement(P, Q, rows).abs().sum()
    mean = total / max(N * (N - 1), 1)
    off, unit = _error(P, Q, terms)
    # both rows of a pair, on average
    error = 2 * off.sum() / max(N, 1) + unit
    found = fraction_of_bound(
        outputs["index"].reshape(1),
        (1 - mean).reshape(1),
        (1 + mean).reshape(1),
        DEPTH + 4,
        0.0,
        torch.where(error.isfinite(), error, 0.0).reshape(1),
    )
    return {"index": found}


class _Counts:
    """Of both sides: Σ_j sgn(d_P − d_Q)·sgn(x_i − x_j), of how many terms, and twice the pairs
    without a sure sign in which a number differs."""

    def __init__(self, P: Tensor, Q: Tensor, terms: int) -> None:
        off, unit = _error(P, Q, terms)
        sides = (P, Q)
        self.truth = [torch.zeros(x.shape, dtype=torch.float64) for x in sides]
        self.size = [torch.zeros_like(t) for t in self.truth]
        self.doubt = [torch.zeros_like(t) for t in self.truth]
        for rows in blocks(P, Q):
            apart = disagreement(P, Q, rows)
            unsure = (apart.abs() <= off[rows, None] + off + unit).unsqueeze(2)
            sign = apart.sgn().unsqueeze(2)
            for n, x in enumerate(sides):
                order = differences(x, rows).sgn()
                self.truth[n][rows] = (1 - 2 * n) * (sign * order).sum(1)
                self.size[n][rows] = (sign * order).abs().sum(1)
                self.doubt[n][rows] = 2 * (unsure * order.abs()).sum(1)

    def of(self, n: int, inputs: Inputs) -> list[Tensor]:
        """All three of a side, as its values lie."""
        found = [part[n] for part in (self.truth, self.size, self.doubt)]
        if "P" in inputs:
            return found
        side = _pair_of(inputs)[n]
        at = torch.arange(len(side.values))
        row = torch.searchsorted(side.offsets[1:].contiguous(), at, right=True)
        padded = [torch.cat([x, x.new_zeros(1, x.shape[1])]) for x in found]
        return [x[row, side.indices] for x in padded]


def check_index_grads(
    inputs: Inputs, outputs: Tensors, grad_out: Tensors, grads: Tensors
) -> Errors:
    """Sums of signs over N(N − 1)."""
    P, Q, terms = _dense(inputs)
    N = P.shape[0]
    factor = grad_out["index"].double() / max(N * (N - 1), 1)
    counts = _Counts(P, Q, terms)
    found = {}
    for n, side in enumerate(("P", "Q")):
        name = side if side in inputs else f"{side}_values"
        if name in grads:
            truth, size, doubt = counts.of(n, inputs)
            error = factor.abs() * doubt
            found[name] = fraction_of_bound(
                grads[name], -factor * truth, factor.abs() * size, N + 4, 0.0, error
            )
    return found


def check_distances(inputs: Inputs, outputs: Tensors) -> Errors:
    """Half the mean over pairs, beside the mean size of both concepts' numbers."""
    P, Q, _ = _dense(inputs)
    N = P.shape[0]
    total = torch.zeros(P.shape[1], Q.shape[1], dtype=torch.float64)
    for rows in blocks(P, Q):
        u = differences(P, rows).abs()
        v = differences(Q, rows).abs()
        for a in range(P.shape[1]):
            total[a] += (u[..., a, None] - v).abs().sum((0, 1))
    truth = total / (2 * max(N * (N - 1), 1))
    size = [x.double().abs().sum(0) / max(N, 1) for x in (P, Q)]
    wide = P.dtype == torch.float64
    # the float64 sums behind float32's, in units of those
    terms = 3 + DEPTH + 3 * (N + 8) * (1.0 if wide else 2.0**-29)
    magnitude = size[0].unsqueeze(1) + size[1]
    return {"distances": fraction_of_bound(outputs["distances"], truth, magnitude, terms)}


def _no_gradients(*_: Tensors) -> Errors:
    return {}


def _widened(x: Tensor) -> Tensor:
    """torch has no distances of halves."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _pdist(P: Tensor, Q: Tensor) -> Tensor:
    """All pairs' distances at once."""
    N = P.shape[0]
    P = _widened(P)
    Q = _widened(Q)
    apart = torch.nn.functional.pdist(P, 1) - torch.nn.functional.pdist(Q, 1)
    return 1 - apart.abs().sum() / (N * (N - 1))


def _sort(P: Tensor, Q: Tensor) -> Tensor:
    """The sorted sums in plain torch, of all concepts at once."""
    N = P.shape[0]
    P = _widened(P)
    Q = _widened(Q)
    rank = 2 * torch.arange(N, dtype=P.dtype) - N + 1
    x = P.T.unsqueeze(1)  # (K, 1, N)
    y = Q.T  # (L, N)
    spread = [z.sort(-1).values @ rank for z in (x - y, x + y, x, y)]
    return (spread[0] + spread[1] - spread[2] - spread[3]) / (N * (N - 1))


def _of_matrices(baseline: Any) -> Any:
    """A baseline of what sparse scores are without being sparse."""
    return _sparse(lambda P, Q: baseline(P.dense(), Q.dense()))


def _index_floor(shape: Shape) -> tuple[float, float]:
    N, K, L = unpacked(shape, "N K L")
    return float(N) * (N - 1) * (K + L), 4.0 * N * (K + L)


def _distances_floor(shape: Shape) -> tuple[float, float]:
    N, K, L = unpacked(shape, "N K L")
    # a sum, a difference, and each of them sorted and summed
    return 2.0 * N * K * L * (1 + max(N, 2).bit_length()), 4.0 * (N * (K + L) + K * L)


_EDGES = sizes(
    "N K L signed k",
    (37, 7, 5, None, 3),
    (33, 2, 2, None, 1),
    (65, 3, 9, 1, 3),
    (2, 1, 1, None, 1),
    (0, 4, 3, None, 2),
    (129, 8, 8, 1, 2),
    (1, 33, 2, None, 1),
    (70, 1, 129, None, 1),
)
_COMMON: dict[str, Any] = {"gate_sizes": {"N": 300, "K": 64, "L": 64}, "wide": True}
_SPARSE: dict[str, Any] = _COMMON | {
    "shapes": _EDGES,
    "small_shape": {"N": 6, "K": 3, "L": 4, "k": 2},
    "repeat_shape": {"N": 300, "K": 20, "L": 17, "k": 5},
}
_MATRICES: dict[str, Any] = _COMMON | {
    "shapes": tuple({name: n for name, n in shape.items() if name != "k"} for shape in _EDGES),
    "small_shape": {"N": 6, "K": 3, "L": 4},
    "repeat_shape": {"N": 300, "K": 20, "L": 17},
}
_BENCH = {"N4000-K100-L100": {"N": 4000, "K": 100, "L": 100}}
_FEW = {"N1000-K64-L64": {"N": 1000, "K": 64, "L": 64}}
_BENCH_SPARSE = {"N1000-K256-k16": {"N": 1000, "K": 256, "L": 256, "k": 16}}
_FEW_SPARSE = {"N1000-K64-k8": {"N": 1000, "K": 64, "L": 64, "k": 8}}

INDEX = OpSpec(
    name="generalised_rand_index",
    function=generalised_rand_index,
    reference=generalised_rand_index_reference,
    outputs=("index",),
    differentiable=("P", "Q"),
    draw=_draw,
    check=check_index,
    check_grads=check_index_grads,
    bench_shapes=_BENCH,
    gpu_bench_shapes={"N50k-K200-L200": {"N": 50_000, "K": 200, "L": 200}},
    device_shapes=sizes("N K L", (140, 33, 40)),
    opaque=False,
    baselines={"pdist": _pdist},
    floor=_index_floor,
    **_MATRICES,
)
DISTANCES = OpSpec(
    name="concept_distances",
    function=concept_distances,
    reference=concept_distances_reference,
    outputs=("distances",),
    differentiable=(),
    draw=_draw,
    check=check_distances,
    check_grads=_no_gradients,
    bench_shapes=_FEW,
    gpu_bench_shapes=_FEW,
    device_shapes=sizes("N K L", (100, 40, 33)),
    exact=False,
    baselines={"sorted torch": _sort},
    floor=_distances_floor,
    **_MATRICES,
)
INDEX_SPARSE = OpSpec(
    name="generalised_rand_index_sparse",
    function=_sparse(generalised_rand_index),
    reference=_sparse(generalised_rand_index_reference),
    outputs=("index",),
    differentiable=("P_values", "Q_values"),
    draw=_draw_sparse,
    check=check_index,
    check_grads=check_index_grads,
    bench_shapes=_BENCH_SPARSE,
    gpu_bench_shapes={},
    opaque=False,
    baselines={"pdist of matrices": _of_matrices(_pdist)},
    floor=_index_floor,
    **_SPARSE,
)
DISTANCES_SPARSE = OpSpec(
    name="concept_distances_sparse",
    function=_sparse(concept_distances),
    reference=_sparse(concept_distances_reference),
    outputs=("distances",),
    differentiable=(),
    draw=_draw_sparse,
    check=check_distances,
    check_grads=_no_gradients,
    bench_shapes=_FEW_SPARSE,
    gpu_bench_shapes={},
    exact=False,
    baselines={"sorted torch of matrices": _of_matrices(_sort)},
    floor=_distances_floor,
    **_SPARSE,
)

SPECS = (INDEX, DISTANCES, INDEX_SPARSE, DISTANCES_SPARSE)
