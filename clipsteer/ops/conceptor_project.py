"""``conceptor_project``: h' = β·C(h − μ) + μ, each row through the conceptor its index names.

Fused: rows are grouped by conceptor, so that each one is read once and applied as a matrix product,
without a copy of it per row; in low rank C = U diag(s) Uᵀ the r numbers between the two products
never leave the cache. Source: Jaeger 2014 (arXiv 1403.3369); Postmus & Abreu 2024 (arXiv
2410.16314), steering and mean-centring.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clipsteer.ops import _check, _grouped
from clipsteer.ops._calls import remembered, step
from clipsteer.ops._dispatch import choose
from clipsteer.ops._reference import rounded_once, rows_of
from clipsteer.ops._steps import as_given, as_rows, cast_to, full

__all__ = ["LowRank", "conceptor_project", "conceptor_project_reference"]


class LowRank(NamedTuple):
    """C = U diag(s) Uᵀ: ``U`` (K, d, r) with ``s`` (K, r), or (d, r) with (r,) for a single
    conceptor."""

    U: Tensor  # (K, d, r)
    s: Tensor  # (K, r)


@rounded_once
def conceptor_project_reference(
    h: Tensor,  # (..., d)
    C: Tensor | LowRank,  # (K, d, d) or (d, d)
    index: Tensor | None = None,  # (...)
    *,
    beta: float | Tensor = 1.0,
    mean: Tensor | None = None,  # (K, d) or (d,)
) -> Tensor:
    """The definition in plain torch, row by row; twice differentiable. With an index it gathers a C
    for each row."""
    factors: tuple[Tensor, ...] = C if isinstance(C, LowRank) else (C,)
    if factors[0].dim() == 2:  # a single conceptor
        factors = tuple(t.unsqueeze(0) for t in factors)

    def pick(t: Tensor, dims: int) -> Tensor:
        """Each row's part of what there is for K conceptors, of so many dimensions."""
        return t[(0,) * (t.dim() - dims)] if index is None else rows_of(t, index)

    mu = 0.0 if mean is None else pick(mean, 1) if mean.dim() == 2 else mean
    x = (h - mu).unsqueeze(-1)  # (..., d, 1)
    if isinstance(C, LowRank):
        U = pick(factors[0], 2)
        s = pick(factors[1], 1).unsqueeze(-1)
        y = U @ (s * (U.mT @ x))
    else:
        y = pick(factors[0], 2) @ x
    if isinstance(beta, Tensor):
        beta = (pick(beta, 0) if beta.dim() else beta).unsqueeze(-1)
    return beta * y.squeeze(-1) + mu


def _checked(
    h,  # (..., d)
    C,  # (K, d, d), (d, d) or LowRank
    index,  # (...) or None
    beta,  # a number, () or (K,)
    mean,  # (K, d), (d,) or None
):
    """Every argument in its full form: factors (K, …), index or None, β a number or (K,), μ (K, d)
    or None."""
    op = "conceptor_project"
    low_rank = isinstance(C, LowRank)
    names = ("U", "s") if low_rank else ("C",)
    factors = dict(zip(names, C if low_rank else (C,)))
    named = {"h": h, **factors, "beta": beta, "mean": mean}
    learnt = isinstance(beta, Tensor)
    if not learnt:
        if isinstance(beta, bool) or not isinstance(beta, (int, float, torch.SymFloat)):
            expected = "a number or a (K,) tensor"
            raise TypeError(_check.mistake(op, "beta", expected, type(beta).__name__, named))
        named["beta"] = None
    if all(isinstance(t, Tensor) for t in named.values() if t is not None):
        named = dict(zip(named, _check.autocast(*named.values())))
    named["index"] = index
    _check.check_tensors(op, named, integer=("index",))
    first = named[names[0]]
    if first.dim() == 2:  # a single conceptor
        named.update({n: step(torch.unsqueeze, named[n], 0) for n in names})
        first = named[names[0]]
    if first.dim() != 3 or not (low_rank or first.shape[1] == first.shape[2]):
        expected = "of shape (K, d, r) or (d, r)" if low_rank else "of shape (K, d, d) or (d, d)"
        raise ValueError(_check.mistake(op, names[0], expected, tuple(first.shape), named))
    K, d = first.shape[:2]
    if low_rank:
        _check.check_shape(op, named, "s", (K, first.shape[2]), "(K, r)")
    if h.dim() == 0 or h.shape[-1] != d:
        expected = f"of shape (..., d = {d})"
        raise ValueError(_check.mistake(op, "h", expected, tuple(h.shape), named))
    if index is None:
        if K != 1:
            expected = f"given, as there are K = {K} conceptors"
            raise ValueError(_check.mistake(op, "index", expected, None, named))
    else:
        _check.check_shape(op, named, "index", tuple(h.shape[:-1]), "h's leading shape")
        _check.check_indices(op, index, K, named, "index")
    if learnt:
        if named["beta"].dim() == 0:
            named["beta"] = step(torch.broadcast_to, named["beta"], (K,))
        _check.check_shape(op, named, "beta", (K,), "(K,)")
    if mean is not None:
        if mean.dim() == 1 and mean.shape[0] == d:
            named["mean"] = step(torch.broadcast_to, named["mean"], (K, d))
        _check.check_shape(op, named, "mean", (K, d), "(K, d) or (d,)")
    full = LowRank(named["U"], named["s"]) if low_rank else named["C"]
    strength = named["beta"] if learnt else beta
    return named["h"], full, index, strength, named["mean"]


@remembered
def conceptor_project(
    h: Tensor,  # (..., d)
    C: Tensor | LowRank,  # (K, d, d) or (d, d)
    index: Tensor | None = None,  # (...)
    *,
    beta: float | Tensor = 1.0,
    mean: Tensor | None = None,  # (K, d) or (d,)
    backend: str = "auto",
) -> Tensor:
    """Steer rows through conceptors: ``β·C h``, or ``β·C(h − μ) + μ`` around a given mean.

    Args:
        h: (..., d) activations, float32, bfloat16, float16 or (reference, cpp) float64.
        C: (K, d, d) conceptors, or (d, d) for one; they need not be symmetric. In low rank
            ``LowRank(U, s)`` with U (K, d, r) and s (K, r), or (d, r) and (r,), which stands for U
            diag(s) Uᵀ.
        index: (...) int64, h's leading shape: which conceptor each row takes, in [0, K). None when
            there is only one.
        beta: strength, a number or a tensor (K,) or ().
        mean: (K, d) or (d,) background mean μ, or None for 0.
        backend: ``"auto" | "reference" | "cpp" | "triton"``; ``ops.explain`` says which can run.

    Returns:
        (..., d), of h's dtype. Gradients reach h, C (or U and s), beta and mean, to any order.
        Extra memory is O(rows · d); the reference alone gathers a conceptor for each row.

    Raises:
        ValueError: shapes or devices that do not fit; an index outside [0, K) (on a GPU, where the
            check would synchronise, only under ``CLIPSTEER_CHECK_INDICES=1``; such rows are
            undefined there).
        TypeError: not tensors, dtypes that differ outside autocast, an index that is not int64.
        RuntimeError: the backend asked for cannot run here.

    Source: Jaeger 2014 (arXiv 1403.3369); Postmus & Abreu 2024 (arXiv 2410.16314).
    """
    h, C, index, beta, mean = _checked(h, C, index, beta, mean)
    op = "conceptor_project_low_rank" if isinstance(C, LowRank) else "conceptor_project"
    backend = choose(op, backend, h)
    if backend == "reference":
        return conceptor_project_reference(h, C, index, beta=beta, mean=mean)
    flat = h.dim() == 2
    wide = _grouped.compute_dtype(h.dtype)
    rows = as_rows(h)
    index = index if flat or index is None else step(torch.reshape, index, (-1,))
    strength = None if not isinstance(beta, Tensor) and beta == 1 else beta
    if isinstance(strength, Tensor):
        strength = cast_to(strength, wide)
    if isinstance(C, LowRank):
        s = C.s
        if backend != "triton" or strength is not None:  # Triton's kernel widens s itself
            s = cast_to(s, wide)
        if strength is not None:
            s = step(_strengthened, s, strength)
        y = _grouped.low_rank(rows, C.U, s, index, mean, backend)
    else:
        if strength is not None and not isinstance(strength, Tensor):
            strength = full(strength, wide, h.device, (C.shape[0],))
        y = _grouped.matmul(rows, C, index, strength, mean, True, backend)
    return as_given(y, h.shape[:-1])


def _strengthened(
    s: Tensor,  # (K, r)
    strength: float | Tensor,  # a number or (K,)
) -> Tensor:
    return s * (strength.unsqueeze(-1) if isinstance(strength, Tensor) else strength)
