"""``generalised_rand_index`` and ``concept_distances``: do two sets of concepts agree on which rows
are alike?

P (N, K) and Q (N, L) hold, of the same N rows (images or tokens), how near each is to each concept:
numbers in [0, 1] whose sum over a row is at most 1. With d_P(i, j) = ½‖p_i − p_j‖₁, 1 − d_P is how
far P takes two rows for alike, and over all N(N − 1)/2 pairs

    GRI(P, Q) = 1 − 2/(N(N − 1)) · Σ_{i<j} |d_P(i, j) − d_Q(i, j)|
    D(P, Q)[a, b] = 1/(N(N − 1)) · Σ_{i<j} ||P_ia − P_ja| − |Q_ib − Q_jb||

The ½ of d is in D, too: D is half the mean over the pairs, and 1 − GRI is at most the sum of D
over concepts that are matched. The authors' functions divide alike: their sum over pairs is halved
for D and not for the index (whose ½ is inside), then both are divided by N(N − 1)/2.

Neither makes an N×N array. The index needs every pair: tiles of rows whose numbers are integers of
one unit, so that sums are exact in any order. D needs none: as ||s| − |t|| = |s − t| + |s + t| −
|s| − |t|, its sum over pairs is G(x − y) + G(x + y) − G(x) − G(y) of two concepts' numbers, and
G(z) = Σ_{i<j} |z_i − z_j| is that of sorted numbers times 2·rank − N + 1. Source: Vielhaben et al.
2025 (arXiv 2412.06639), equations 2–4; Hüllermeier et al. 2012, the index.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipsteer.ops import _agreement
from clipsteer.ops._agreement import (
    Jackknife,
    Scores,
    Share,
    SparseScores,
    blocks,
    checked_images,
    checked_scores,
    dense,
    differences,
    disagreement,
    low_level,
)
from clipsteer.ops._calls import remembered, step
from clipsteer.ops._contrastive import KINDS, Kind, contrast
from clipsteer.ops._dispatch import call, choose
from clipsteer.ops._sweeps import in_one_call

__all__ = [
    "Jackknife",
    "SparseScores",
    "concept_distances",
    "concept_distances_jackknife",
    "concept_distances_reference",
    "generalised_rand_index",
    "generalised_rand_index_jackknife",
    "generalised_rand_index_reference",
]


def generalised_rand_index_reference(
    P: Scores,  # (N, K)
    Q: Scores,  # (N, L)
) -> Tensor:
    """The definition in plain torch, over blocks of rows, in float64 until it is rounded once; its
    derivative of |x| at 0 is 0."""
    P = dense(P)
    Q = dense(Q)
    total = P.new_zeros((), dtype=torch.float64)
    for rows in blocks(P, Q):
        total = total + disagreement(P, Q, rows).abs().sum()
    return _index(total / 2, P.shape[0], P.dtype)


def concept_distances_reference(
    P: Scores,  # (N, K)
    Q: Scores,  # (N, L)
) -> Tensor:  # (K, L)
    """The definition in plain torch, over blocks of rows, in float64 until it is rounded once."""
    P = dense(P)
    Q = dense(Q)
    N = P.shape[0]
    total = P.new_zeros(P.shape[1], Q.shape[1], dtype=torch.float64)
    for rows in blocks(P, Q):
        u = differences(P, rows).abs().flatten(0, 1)  # (n N, K)
        v = differences(Q, rows).abs().flatten(0, 1)  # (n N, L)
        total = total + torch.cdist(u.T.contiguous(), v.T.contiguous(), p=1)
    value = total / (2 * _ordered_pairs(N))
    return value.to(torch.promote_types(P.dtype, torch.float32))


def _ordered_pairs(N: int | Tensor) -> Any:
    """N(N − 1), and 1 where there is none: then nothing disagrees."""
    pairs = N * (N - 1)
    return pairs.clamp(min=1) if isinstance(pairs, Tensor) else torch.sym_max(pairs, 1)


def _index(
    total: Tensor,  # Σ |d_P − d_Q| over the pairs, float64
    N: int | Tensor,
    dtype: torch.dtype,
) -> Tensor:
    return (1 - 2 * total / _ordered_pairs(N)).to(torch.promote_types(dtype, torch.float32))


def _sides(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """As the low-level ops take them; in ``arguments`` K and L come last."""
    *tensors, K, L = arguments
    return (*tensors[:3], K, *tensors[3:], L)


def _rows(arguments: tuple[Any, ...]) -> int:
    """N."""
    values, _, offsets = arguments[:3]
    return values.shape[0] if offsets is None else offsets.shape[0] - 1


def _evaluate(arguments, needs, backend, world):
    """The index (), and of each side's values Σ_j sgn(d_P − d_Q)·sgn(x_i − x_j), of Q negative."""
    sides = _sides(arguments)
    if in_one_call(backend, world):
        return call(backend, "rand_index", *sides, *needs)
    share = (0, 1) if world is None else (world.rank, world.size)
    total, _ = low_level(backend, "agreement_sums", *sides, None, *share)
    values = sides[0]
    found = (values.new_zeros(0), values.new_zeros(0))
    if any(needs):
        found = low_level(backend, "agreement_counts", *sides, *share, *needs)
    if world is not None:
        world.sum_(total, *found)
    return step(_index, total, _rows(arguments), values.dtype), *found


def _gradient(cotangents, found, arguments, needs, backend, world):
    (grad,) = cotangents
    rows = _rows(arguments)
    if in_one_call(backend, world):
        return call(backend, "rand_index_grad", grad, *found, arguments[0], rows)
    factor = -grad / _ordered_pairs(rows)
    values = (arguments[0], arguments[3])
    return tuple((factor * count).to(x.dtype) for count, x in zip(found, values))


def _reference(*arguments: Any) -> tuple[Tensor]:
    sides = _sides(arguments)
    P = _agreement.side(*sides[:4])
    return (generalised_rand_index_reference(P, _agreement.side(*sides[4:])),)


KINDS["generalised_rand_index"] = Kind(_evaluate, _gradient, _reference, tensors=6, leaves=(0, 3))


def _chosen(op: str, P: Scores, Q: Scores, backend: str) -> str:
    """The backend of an op, or of its variant for sparse scores."""
    sparse = isinstance(P, SparseScores) or isinstance(Q, SparseScores)
    first = P.values if isinstance(P, SparseScores) else P
    return choose(f"{op}_sparse" if sparse else op, backend, first)


@remembered
def generalised_rand_index(
    P: Scores,  # (N, K)
    Q: Scores,  # (N, L)
    *,
    group: Any = None,
    backend: str = "auto",
) -> Tensor:
    """How far two sets of concepts agree on which rows are alike: 1 − the mean over all pairs of
    rows of |d_P − d_Q|, d = ½‖·‖₁. 1 − GRI is a pseudo-metric: 0 for P itself and for its concepts
    in another order.

    Args:
        P: (N, K) scores of N rows, as a rule in [0, 1] with sums of at most 1; float32, bfloat16,
            float16 or (reference, cpp) float64. `SparseScores` (reference, cpp) are taken without
            making a matrix of them.
        Q: (N, L) scores of the SAME rows in the same order, of the same dtype; sparse or not,
            whatever P is.
        group: a process group (``torch.distributed.group.WORLD`` for all), every process of which
            has the same P and Q, takes its share of the pairs and gets the whole result, and whole
            gradients; None: this process alone.
        backend: ``"auto" | "reference" | "cpp" | "triton"``; ``ops.explain`` says which can run.

    Returns:
        () float32 (float64 for float64 scores), in [0, 1] for such scores, and 1 where there is no
        pair. Time grows with N²(K + L), for sparse scores with N² and with the concepts that pairs
        share. Deterministic; on a CPU exact but for the rounding of each number to 2⁻³⁰ (float64:
        2⁻⁶¹) of the largest row's sum, so the same to the bit with any number of threads. Extra
        memory is O(N(K + L)).

        Gradients are subgradients: of |x| at 0 it is 0, so that pairs on which both agree exactly
        add nothing, nor do equal scores. Second derivatives are 0. With `group` there are first
        derivatives by backward only.

    Raises:
        ValueError: shapes or devices that do not fit, indices or offsets out of range.
        TypeError: not tensors or `SparseScores`, not floating point, or dtypes that differ.
        RuntimeError: the backend asked for cannot run here.

    Source: Vielhaben et al. 2025 (arXiv 2412.06639), equations 2 and 3.
    """
    P, Q = checked_scores("generalised_rand_index", P, Q)
    backend = _chosen("generalised_rand_index", P, Q, backend)
    world = None if group is None else Share(group)
    *of_p, K = _agreement.parts(P)
    *of_q, L = _agreement.parts(Q)
    arguments = (*of_p, *of_q, K, L)
    return contrast("generalised_rand_index", arguments, backend, world)[0]


@remembered
@torch.no_grad()
def concept_distances(
    P: Scores,  # (N, K)
    Q: Scores,  # (N, L)
    *,
    backend: str = "auto",
) -> Tensor:  # (K, L)
    """How differently each concept of P and each of Q tell rows apart: half the mean over all pairs
    of rows of ||P_ia − P_ja| − |Q_ib − Q_jb||. Matched by ``scipy.optimize.linear_sum_assignment``
    it says which concepts two models share.

    Rows of the result are independent: several processes take ``P[:, some]`` each.

    Args:
        P: (N, K) scores of N rows, as a rule in [0, 1]; float32, bfloat16, float16 or (reference,
            cpp) float64, or `SparseScores` (reference, cpp).
        Q: (N, L) scores of the SAME rows in the same order, of the same dtype; sparse or not,
            whatever P is.
        backend: ``"auto" | "reference" | "cpp" | "triton"``; ``ops.explain`` says which can run.

    Returns:
        (K, L) float32 (float64 for float64 scores), without gradient, in [0, ½] for scores in
        [0, 1]; 0 where there is no pair, and exactly 0 of a concept and itself. On a CPU time
        grows with K·L·N log N, for sparse scores with what is not 0 of two concepts, and extra
        memory is O(N(K + L)).

    Raises:
        ValueError: shapes or devices that do not fit, indices or offsets out of range.
        TypeError: not tensors or `SparseScores`, not floating point, or dtypes that differ.
        RuntimeError: the backend asked for cannot run here.

    Source: Vielhaben et al. 2025 (arXiv 2412.06639), equation 4.
    """
    P, Q = checked_scores("concept_distances", P, Q)
    backend = _chosen("concept_distances", P, Q, backend)
    if backend == "reference":
        return concept_distances_reference(P, Q)
    sides = (*_agreement.parts(P), *_agreement.parts(Q))
    return low_level(backend, "concept_distances", *sides, None)[0]


@torch.no_grad()
def generalised_rand_index_jackknife(
    P: Scores,  # (N, K)
    Q: Scores,  # (N, L)
    images: Tensor,  # (N,) int64
    *,
    group: Any = None,
    backend: str = "auto",
) -> Jackknife:
    """``generalised_rand_index`` with its standard error over images, from one pass.

    An image's rows (its tokens) are left out together, image by image: rows of one image are not
    independent, and an interval that took them for that would be too narrow.

    Args:
        P, Q, group, backend: as of ``generalised_rand_index``.
        images: (N,) int64, which image each row belongs to; any numbers, in any order.

    Returns:
        `Jackknife`: the value () and its standard error (), the delete-one jackknife's, and that of
        Busing et al. where images differ in rows.

    Raises:
        ValueError: also where all rows are of one image.

    Source: Busing, Meijer & van der Leeden 1999, Statistics and Computing 9.
    """
    op = "generalised_rand_index"
    P, Q = checked_scores(op, P, Q)
    images = checked_images(op, images, P)
    backend = _chosen(op, P, Q, backend)
    world = None if group is None else Share(group)
    share = (0, 1) if world is None else (world.rank, world.size)
    sides = (*_agreement.parts(P), *_agreement.parts(Q))
    total, rows = low_level(backend, "agreement_sums", *sides, images, *share)
    if world is not None:
        world.sum_(total, rows)
    _, numbers, sizes = images.unique(return_inverse=True, return_counts=True)
    # a pair within an image is in the sums of two of its rows
    part = rows[0] - rows[1] / 2
    of_image = part.new_zeros(len(sizes)).index_add(0, numbers, part)
    N = len(images)
    without = _index(total - of_image, N - sizes, torch.float64)
    value = _index(total, N, torch.float64)
    dtype = torch.promote_types(sides[0].dtype, torch.float32)
    return Jackknife(value.to(dtype), _agreement.jackknife(value, without, sizes).to(dtype))


@torch.no_grad()
def concept_distances_jackknife(
    P: Scores,  # (N, K)
    Q: Scores,  # (N, L)
    images: Tensor,  # (N,) int64
    *,
    backend: str = "auto",
) -> Jackknife:
    """``concept_distances`` with their standard errors over images, from one pass (on a GPU by
    torch's sort).

    Args:
        P, Q: as of ``concept_distances``.
        images: as of ``generalised_rand_index_jackknife``.
        backend: ``"auto" | "reference" | "cpp"``.

    Returns:
        `Jackknife`: the values (K, L) and their standard errors (K, L).

    Raises:
        ValueError: also where all rows are of one image.

    Source: Busing, Meijer & van der Leeden 1999, Statistics and Computing 9.
    """
    op = "concept_distances"
    P, Q = checked_scores(op, P, Q)
    images = checked_images(op, images, P)
    sides = (*_agreement.parts(P), *_agreement.parts(Q))
    # no GPU kernel leaves images out, as none takes sparse scores
    backend = choose(f"{op}_sparse", backend, sides[0])
    return Jackknife(*low_level(backend, op, *sides, images))
