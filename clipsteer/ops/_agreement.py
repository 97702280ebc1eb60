"""What the ops over pairs of rows' scores share: sparse scores, checked arguments, the low-level
ops in plain torch, several processes, and the jackknife."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipsteer.ops import _check
from clipsteer.ops._dispatch import call
from clipsteer.ops._ragged import SparseCodes, code_rows
from clipsteer.ops._steps import contiguous

# numbers of a block of rows' differences
BLOCK = 1 << 22


class SparseScores(NamedTuple):
    """Scores (N, K) of which few are not 0, such as an SAE's codes: row i has
    ``values[offsets[i] : offsets[i + 1]]`` at ``indices[offsets[i] : offsets[i + 1]]``. No row
    names a concept twice, but with a value of 0; what follows ``offsets[N]`` is padding."""

    values: Tensor  # (m,)
    indices: Tensor  # (m,) int64, in [0, concepts)
    offsets: Tensor  # (N + 1,) int64, from 0
    concepts: int  # K

    @classmethod
    def of(cls, codes: SparseCodes | tuple[Tensor, Tensor], concepts: int) -> SparseScores:
        """Of an encoder's codes: ragged ones, or activations and indices (N, k) of top-k."""
        if isinstance(codes, SparseCodes):
            return cls(codes.values, codes.indices, codes.offsets, concepts)
        acts, indices = codes
        N, k = acts.shape
        offsets = torch.arange(N + 1, device=acts.device) * k
        return cls(acts.flatten(), indices.flatten(), offsets, concepts)

    @property
    def rows(self) -> int:
        """N."""
        return self.offsets.shape[0] - 1

    def dense(self) -> Tensor:  # (N, K)
        """The matrix; differentiable."""
        codes = SparseCodes(self.values, self.indices, self.offsets)
        matrix = self.values.new_zeros(self.rows + 1, self.concepts)
        at = (code_rows(codes), self.indices)
        return matrix.index_put(at, self.values, accumulate=True)[: self.rows]


Scores = Tensor | SparseScores
# values, indices, offsets and K of one side after the other, as the low-level ops take them
Sides = tuple[Any, ...]


class Jackknife(NamedTuple):
    """A value and its standard error over images; value ± 1.96 errors is an interval of about
    95 %."""

    value: Tensor
    error: Tensor


def dense(scores: Scores) -> Tensor:
    """As a matrix (N, K)."""
    return scores.dense() if isinstance(scores, SparseScores) else scores


def parts(scores: Scores) -> Sides:
    """As a low-level op takes one side."""
    if isinstance(scores, SparseScores):
        tensors = (contiguous(t) for t in scores[:3])
        return (*tensors, scores.concepts)
    return (contiguous(scores), None, None, scores.shape[1])


def side(values: Tensor, indices: Tensor | None, offsets: Tensor | None, concepts: int) -> Scores:
    """What ``parts`` were of."""
    if indices is None or offsets is None:
        return values
    return SparseScores(values, indices, offsets, concepts)


def rows_of(scores: Scores) -> int:
    """N."""
    return scores.rows if isinstance(scores, SparseScores) else scores.shape[0]


def checked_scores(op: str, P: Any, Q: Any) -> tuple[Scores, Scores]:
    """Both sides, as autocast wants them, or ValueError or TypeError."""
    named: dict[str, Any] = {}
    for name, scores in (("P", P), ("Q", Q)):
        if isinstance(scores, SparseScores):
            named |= {f"{name}.{field}": scores[i] for i, field in enumerate(scores._fields[:3])}
        else:
            named[name] = scores
    integer = tuple(f"{name}.{field}" for name in "PQ" for field in ("indices", "offsets"))
    _check.check_tensors(op, named, integer)
    for name, scores in (("P", P), ("Q", Q)):
        if not isinstance(scores, SparseScores):
            if scores.dim() != 2:
                expected = "of shape (N, K), or SparseScores"
                raise ValueError(_check.mistake(op, name, expected, tuple(scores.shape), named))
            continue
        if scores.values.dim() != 1:
            got = tuple(scores.values.shape)
            raise ValueError(_check.mistake(op, f"{name}.values", "of shape (m,)", got, named))
        shape = tuple(scores.values.shape)
        _check.check_shape(op, named, f"{name}.indices", shape, "values' (m,)")
        _check.check_offsets(op, scores.offsets, named)
        _check.check_indices(op, scores.indices, scores.concepts, named, f"{name}.indices")
    if rows_of(P) != rows_of(Q):
        expected = f"of P's N = {rows_of(P)} rows"
        raise ValueError(_check.mistake(op, "Q", expected, rows_of(Q), named))
    values = _check.autocast(*(s.values if isinstance(s, SparseScores) else s for s in (P, Q)))
    pairs = zip((P, Q), values)
    found = [s._replace(values=v) if isinstance(s, SparseScores) else v for s, v in pairs]
    return found[0], found[1]


def checked_images(op: str, images: Any, P: Scores) -> Tensor:  # (N,)
    """Which image each row belongs to, or ValueError or TypeError."""
    named = {"images": images}
    _check.check_tensors(op, named, integer=("images",))
    _check.check_shape(op, named, "images", (rows_of(P),), "P's (N,)")
    if len(images.unique()) < 2:
        raise ValueError(_check.mistake(op, "images", "of two images or more", "one", named))
    return images.contiguous()


class Share:
    """This process's share of the pairs; all processes of ``group`` have the same scores."""

    def __init__(self, group: Any) -> None:
        import torch.distributed as dist

        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("group must be of processes among which this one is")

    def sum_(self, *tensors: Tensor) -> None:
        """Add up what the processes have, in place."""
        import torch.distributed as dist

        for t in tensors:
            if self.size > 1 and t.numel():
                dist.all_reduce(t, group=self.group)


def low_level(backend: str, op: str, *args: Any) -> Any:
    """An op of a backend."""
    return PLAIN[op](*args) if backend == "reference" else call(backend, op, *args)


# ---------------------------------------------------------------- in plain torch


def differences(
    X: Tensor,  # (N, K)
    rows: slice,
) -> Tensor:  # (n, N, K)
    """X_i − X_j of these rows i and all j, in float64; 0 of a row and itself, infinite or not."""
    at = torch.arange(X.shape[0], device=X.device)
    itself = (at[rows, None] == at).unsqueeze(2)
    return (X[rows, None].double() - X.double()).masked_fill(itself, 0)


def blocks(
    P: Tensor,  # (N, K)
    Q: Tensor,  # (N, L)
    first: int = 0,
    last: int | None = None,
) -> Iterator[slice]:
    """Rows in blocks, whose differences from all rows fill no more than BLOCK numbers."""
    N = P.shape[0]
    last = N if last is None else last
    if torch.compiler.is_compiling():  # a graph of any N has no loop over its blocks
        yield slice(first, last)
        return
    step = max(1, BLOCK // max(1, N * max(P.shape[1], Q.shape[1])))
    for at in range(first, last, step):
        yield slice(at, min(at + step, last))


def disagreement(
    P: Tensor,  # (N, K)
    Q: Tensor,  # (N, L)
    rows: slice,
) -> Tensor:  # (n, N)
    """d_P − d_Q of these rows and all."""
    apart = differences(P, rows).abs().sum(2) - differences(Q, rows).abs().sum(2)
    return apart / 2


def _own_rows(N: int, part: int, parts: int) -> tuple[int, int]:
    return N * part // parts, N * (part + 1) // parts


def _plain_sums(P, Pi, Po, K, Q, Qi, Qo, L, images, part, parts):
    P = dense(side(P, Pi, Po, K))
    Q = dense(side(Q, Qi, Qo, L))
    N = P.shape[0]
    total = P.new_zeros((), dtype=torch.float64)
    rows = P.new_zeros(2, 0 if images is None else N, dtype=torch.float64)
    for some in blocks(P, Q, *_own_rows(N, part, parts)):
        size = disagreement(P, Q, some).abs()
        total = total + size.sum() / 2
        if images is not None:
            rows[0, some] = size.sum(1)
            same = images[some, None] == images
            rows[1, some] = size.masked_fill(~same, 0).sum(1)
    return total, rows


def _plain_counts(P, Pi, Po, K, Q, Qi, Qo, L, part, parts, need_P, need_Q):
    first = side(P, Pi, Po, K)
    second = side(Q, Qi, Qo, L)
    P = dense(first)
    Q = dense(second)
    counts = [torch.zeros_like(x, dtype=torch.float64) for x in (P, Q)]
    for some in blocks(P, Q, *_own_rows(P.shape[0], part, parts)):
        sign = disagreement(P, Q, some).sgn().unsqueeze(2)
        counts[0][some] = (sign * differences(P, some).sgn()).sum(1)
        counts[1][some] = -(sign * differences(Q, some).sgn()).sum(1)
    found = []
    for scores, count, needed in ((first, counts[0], need_P), (second, counts[1], need_Q)):
        if isinstance(scores, SparseScores):
            row = code_rows(SparseCodes(*scores[:3]))
            count = torch.cat([count, torch.zeros_like(count[:1])])[row, scores.indices]
        count = count.to(torch.promote_types(scores[0].dtype, torch.float32))
        found.append(count if needed else count[:0].clone())
    return tuple(found)


def _sorted_sums(
    z: Tensor,  # (m, N) float64
    numbers: Tensor,  # (N,), of each row's image
    sizes: Tensor,  # (g,)
) -> tuple[Tensor, Tensor]:
    """Σ |z_i − z_j| over pairs (m,), and what each image has part in (m, g)."""
    N = z.shape[1]
    z, order = z.sort(dim=1)
    rank = torch.arange(N, device=z.device, dtype=z.dtype)
    total = ((2 * rank - N + 1) * z).sum(1)
    below = z.cumsum(1) - z
    mine = (2 * rank - N) * z + z.sum(1, keepdim=True) - 2 * below
    image = numbers[order]
    # by image, and within one by size still
    by_image = image.argsort(dim=1, stable=True)
    start = sizes.cumsum(0) - sizes
    image, z, mine = (t.gather(1, by_image) for t in (image, z, mine))
    within = rank - start[image]
    own = (2 * within - sizes[image] + 1) * z
    share = z.new_zeros(len(z), len(sizes)).scatter_add(1, image, mine - own)
    return total, share


def _plain_distances(P, Pi, Po, K, Q, Qi, Qo, L, images):
    """By the sorted numbers of ||s| − |t|| = |s − t| + |s + t| − |s| − |t|."""
    wide = torch.promote_types(P.dtype, torch.float32)
    P = dense(side(P, Pi, Po, K)).double().T  # (K, N)
    Q = dense(side(Q, Qi, Qo, L)).double().T  # (L, N)
    N = P.shape[1]
    numbers = P.new_zeros(N, dtype=torch.int64)
    if images is not None:
        numbers = images.unique(return_inverse=True)[1]
    sizes = numbers.bincount() if images is not None else numbers.new_full((1,), N)
    of_q, share_q = _sorted_sums(Q, numbers, sizes)
    D = P.new_zeros(K, L)
    error = P.new_zeros(K if images is not None else 0, L)
    pairs = max(N * (N - 1), 1)
    for a in range(K):
        of_a, share_a = _sorted_sums(P[a : a + 1], numbers, sizes)
        apart, share_apart = _sorted_sums(P[a] - Q, numbers, sizes)
        along, share_along = _sorted_sums(P[a] + Q, numbers, sizes)
        total = apart + along - of_a - of_q  # (L,)
        D[a] = (total / pairs).clamp(min=0)
        if images is not None:
            share = share_apart + share_along - share_a - share_q  # (L, g)
            rest = N - sizes
            without = (total.unsqueeze(1) - share) / (rest * (rest - 1)).clamp(min=1)
            error[a] = jackknife(total / pairs, without, sizes)
    return D.to(wide), error.to(wide)


PLAIN: dict[str, Callable[..., Any]] = {
    "agreement_sums": _plain_sums,
    "agreement_counts": _plain_counts,
    "concept_distances": _plain_distances,
}


def jackknife(
    value: Tensor,  # (...)
    without: Tensor,  # (..., g), leaving out each image
    sizes: Tensor,  # (g,), rows of each image
) -> Tensor:  # (...)
    """The standard error of a value from those without each image (Busing et al. 1999, where
    images differ in rows; else the delete-one jackknife)."""
    share = sizes.double() / sizes.sum()
    h = 1 / share
    value = value.double().unsqueeze(-1)
    mean = len(sizes) * value - ((1 - share) * without).sum(-1, keepdim=True)
    pseudo = h * value - (h - 1) * without
    return ((pseudo - mean).square() / (h - 1)).mean(-1).sqrt()
