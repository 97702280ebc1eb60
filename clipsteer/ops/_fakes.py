"""What the low-level ops give, without their values: for compilers and tensors without any."""

from __future__ import annotations

import torch
from torch import Tensor

# ---------------------------------------------------------------- topk_encode


def topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    screen: bool = True,
    scale: Tensor | None = None,
    columns: Tensor | None = None,
    relu: bool = True,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int64)


# ---------------------------------------------------------------- sparse_decode


def sparse_decode(acts: Tensor, indices: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    return W.new_empty(acts.shape[0], W.shape[1])


def gather_dot(rows: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    return rows.new_empty(indices.shape)


def _segment_sums(rows: Tensor, n: int, across: bool) -> tuple[Tensor, Tensor]:
    d = rows.shape[1]
    dW = rows.new_empty(d, n).t() if across else rows.new_empty(n, d)
    return dW, rows.new_empty(n)


def sparse_outer(
    coeff: Tensor, indices: Tensor, rows: Tensor, n: int, across: bool = False
) -> tuple[Tensor, Tensor]:
    return _segment_sums(rows, n, across)


def sparse_outer_out(coeff: Tensor, indices: Tensor, rows: Tensor, dW: Tensor, db: Tensor) -> None:
    return None


def _sums_of_used(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    used = torch.library.get_ctx().new_dynamic_size()
    features = rows.new_empty(1, used, dtype=torch.int64)
    return features, rows.new_empty(used, rows.shape[1]), rows.new_empty(used)


def sparse_outer_used(
    coeff: Tensor, indices: Tensor, rows: Tensor, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _sums_of_used(rows)


# ---------------------------------------------------------------- ragged codes


def _codes(x: Tensor, capacity: int | torch.SymInt) -> tuple[Tensor, Tensor, Tensor]:
    index = torch.int64
    values = x.new_empty(capacity)
    return values, x.new_empty(capacity, dtype=index), x.new_empty(x.shape[0] + 1, dtype=index)


def threshold_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    threshold: Tensor,
    capacity: int,
    scale: Tensor | None = None,
    columns: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _codes(x, torch.library.get_ctx().new_dynamic_size() if capacity < 0 else capacity)


def threshold_codes(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    threshold: Tensor,
    relu: bool,
    capacity: int,
    scale: Tensor | None,
    columns: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return threshold_encode(x, W_enc, b_enc, threshold, capacity)


def jumprelu_codes(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    threshold: Tensor,
    bandwidth: float,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values, indices, offsets = threshold_encode(x, W_enc, b_enc, threshold, capacity)
    return values, indices, offsets, torch.empty_like(values)


def batch_topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    count: int,
    scale: Tensor | None = None,
    columns: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _codes(x, torch.sym_max(count, x.shape[0]))


def ragged_decode(
    values: Tensor,
    indices: Tensor,
    offsets: Tensor,
    W: Tensor,
    b: Tensor | None,
    prefixes: list[int] | None,
) -> Tensor:
    size = (offsets.shape[0] - 1, W.shape[1])
    return values.new_empty(size if prefixes is None else (len(prefixes), *size))


def ragged_dot(rows: Tensor, row_of: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    return rows.new_empty(indices.shape)


def ragged_outer(
    coeff: Tensor, indices: Tensor, row_of: Tensor, rows: Tensor, n: int, across: bool = False
) -> tuple[Tensor, Tensor]:
    return _segment_sums(rows, n, across)


def ragged_outer_out(
    coeff: Tensor, indices: Tensor, row_of: Tensor, rows: Tensor, dW: Tensor, db: Tensor
) -> None:
    return None


def ragged_outer_used(
    coeff: Tensor, indices: Tensor, row_of: Tensor, rows: Tensor, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _sums_of_used(rows)


# ---------------------------------------------------------------- conceptor_project


def grouped_matmul(
    x: Tensor,
    W: Tensor,
    index: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    transpose: bool,
) -> Tensor:
    return x.new_empty(x.shape[0], W.shape[1] if transpose else W.shape[2])


def grouped_outer(a: Tensor, b: Tensor, index: Tensor | None, groups: int) -> Tensor:
    return a.new_empty(groups, a.shape[1], b.shape[1])


def low_rank_project(
    x: Tensor,
    U: Tensor,
    s: Tensor,
    index: Tensor | None,
    mean: Tensor | None,
) -> Tensor:
    return torch.empty_like(x)


# ---------------------------------------------------------------- mahalanobis_covariance_loss


def mahalanobis_covariance_loss(
    new: Tensor,
    old: Tensor,
    labels: Tensor,
    factor: Tensor,
    s: Tensor | None,
    diag: Tensor | None,
    normalize: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(new.dtype, torch.float32)
    rows = new.shape[0] if need_grad else 0
    return new.new_empty((), dtype=wide), new.new_empty(rows, new.shape[1], dtype=wide)


# ---------------------------------------------------------------- semantic_drift


def drift_sums(
    old: Tensor,
    new: Tensor,
    prototypes: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    C = prototypes.shape[0]
    wide = torch.promote_types(old.dtype, torch.float32)
    peak = prototypes.new_empty(C, dtype=wide)
    total = prototypes.new_empty(C, dtype=wide)
    return peak, total, prototypes.new_empty(prototypes.shape, dtype=wide)


def moved_prototypes(
    old: Tensor,
    new: Tensor,
    prototypes: Tensor,
    scale: Tensor,
) -> Tensor:
    return prototypes.new_empty(prototypes.shape)


# ---------------------------------------------------------------- pairwise_agreement


def agreement_sums(
    P: Tensor,
    P_indices: Tensor | None,
    P_offsets: Tensor | None,
    K: int,
    Q: Tensor,
    Q_indices: Tensor | None,
    Q_offsets: Tensor | None,
    L: int,
    images: Tensor | None,
    part: int,
    parts: int,
) -> tuple[Tensor, Tensor]:
    wide = torch.float64
    rows = 0 if images is None else images.shape[0]
    return P.new_empty((), dtype=wide), P.new_empty(2, rows, dtype=wide)


def agreement_counts(
    P: Tensor,
    P_indices: Tensor | None,
    P_offsets: Tensor | None,
    K: int,
    Q: Tensor,
    Q_indices: Tensor | None,
    Q_offsets: Tensor | None,
    L: int,
    part: int,
    parts: int,
    need_P: bool,
    need_Q: bool,
) -> tuple[Tensor, Tensor]:
    return _counts(P, need_P), _counts(Q, need_Q)


def _wide(scores: Tensor) -> torch.dtype:
    return torch.promote_types(scores.dtype, torch.float32)


def _counts(scores: Tensor, needed: bool) -> Tensor:
    rows = scores.shape[0] if needed else 0
    return scores.new_empty(rows, *scores.shape[1:], dtype=_wide(scores))


def rand_index(
    P: Tensor,
    P_indices: Tensor | None,
    P_offsets: Tensor | None,
    K: int,
    Q: Tensor,
    Q_indices: Tensor | None,
    Q_offsets: Tensor | None,
    L: int,
    need_P: bool,
    need_Q: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return P.new_empty((), dtype=_wide(P)), _counts(P, need_P), _counts(Q, need_Q)


def rand_index_grad(
    grad: Tensor,
    dP: Tensor,
    dQ: Tensor,
    values: Tensor,
    rows: int,
) -> tuple[Tensor, Tensor]:
    return values.new_empty(dP.shape), values.new_empty(dQ.shape)


def concept_distances(
    P: Tensor,
    P_indices: Tensor | None,
    P_offsets: Tensor | None,
    K: int,
    Q: Tensor,
    Q_indices: Tensor | None,
    Q_offsets: Tensor | None,
    L: int,
    images: Tensor | None,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(P.dtype, torch.float32)
    D = P.new_empty(K, L, dtype=wide)
    return D, P.new_empty(0 if images is None else K, L, dtype=wide)
