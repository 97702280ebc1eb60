"""``mahalanobis_covariance_loss``: (1/B) Σ_c Σ_{i<j of class c} |D_c(old_i, old_j) − D_c(new_i,
new_j)|.

D_c(a, b) = sqrt((a − b) P_c (a − b)ᵀ + 1e-8) with P_c = L_c L_cᵀ, or diag + U diag(s) Uᵀ. Fused: a
class's rows are whitened by one product, distances are taken from the whitened rows, and the
gradient goes back in the same call: no loop over pairs, no B × B × d tensor. Source: Wu et al. 2025
(arXiv 2502.07560), covariance calibration.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clipsteer.ops import _check
from clipsteer.ops._autograd import Function, save, total, tracked
from clipsteer.ops._calls import remembered
from clipsteer.ops._dispatch import call, choose
from clipsteer.ops._reference import rounded_once, rows_of
from clipsteer.ops._steps import cast_to, contiguous_if, detached

__all__ = ["LowRankDiag", "mahalanobis_covariance_loss", "mahalanobis_covariance_loss_reference"]


class LowRankDiag(NamedTuple):
    """P = diag(diag) + U diag(s) Uᵀ for every class: ``U`` (C, d, r), ``s`` (C, r), ``diag`` (C,
    d); s may be negative, as it is when P is the inverse (Woodbury) of a covariance of that
    form."""

    U: Tensor  # (C, d, r)
    s: Tensor  # (C, r)
    diag: Tensor  # (C, d)


def _unit(x: Tensor) -> Tensor:
    """Rows over their norms, taken in float64 lest they overflow; a row of zeros stays, with
    gradient zero."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64)
    return (x / torch.where(norm > 0, norm, torch.inf)).to(x.dtype)


def _pairs(B: int, device: torch.device) -> Tensor:
    """Every i < j < B, in order: (2, B (B - 1) / 2)."""
    if torch.compiler.is_exporting():  # where triu_indices makes a number of a symbol
        return torch.ones(B, B, dtype=torch.bool, device=device).triu(1).nonzero().T
    return torch.triu_indices(B, B, 1, device=device)


@rounded_once
def mahalanobis_covariance_loss_reference(
    new: Tensor,  # (B, d)
    old: Tensor,  # (B, d)
    labels: Tensor,  # (B,)
    factor: Tensor | LowRankDiag,  # (C, d, d)
    normalize: bool = True,
) -> Tensor:
    """The definition in plain torch; twice differentiable. It gathers a factor for each row, and
    all B² / 2 pairs."""
    B = new.shape[0]
    if B == 0:
        return new.sum()
    i, j = _pairs(B, new.device)
    same = ((labels[i] == labels[j]) & (labels[i] >= 0)).unsqueeze(1)
    c = labels.clamp(min=0)
    first = (labels.unsqueeze(1) == labels).int().argmax(1)  # of the row's class

    def squares(z: Tensor) -> Tensor:
        return torch.where(same, rows_of(z, i) - rows_of(z, j), 0).square()

    def through(x: Tensor, W: Tensor) -> Tensor:
        return (x.unsqueeze(1) @ W[c].detach()).squeeze(1)

    def weighed(parts: tuple[tuple[Tensor, Tensor], ...], of: Tensor) -> Tensor:
        """Σ of squares times the class's weights; pairs that are not ``of`` them have none."""
        weights = [torch.where(of, w.detach()[c[i]], 0) for _, w in parts]
        return torch.stack([(squares(z) * w).sum(-1) for (z, _), w in zip(parts, weights)]).sum(0)

    def distances(x: Tensor) -> Tensor:
        x = torch.where(labels.unsqueeze(1) >= 0, x, 0)
        x = _unit(x) if normalize else x
        # moves a class, changes no difference, and near pairs keep their digits
        x = x - x[first].detach()
        if isinstance(factor, LowRankDiag):
            parts = ((x, factor.diag), (through(x, factor.U), factor.s))
            # no gradient where a square is negative, and 0 times an infinite weight is no number
            below = weighed(parts, same).detach() < 0
            square = weighed(parts, same & ~below.unsqueeze(1))
        else:
            square = squares(through(x, factor)).sum(-1)
        return (square + 1e-8).sqrt()

    return (distances(old.detach()) - distances(new)).abs().sum() / B


class _Loss(Function):
    """The kernel hands back the gradient with the value."""

    @staticmethod
    def forward(backend, normalize, new, *others):
        """``others``: old, labels, factor, s and diag, as ``_Gradient`` has them."""
        inputs = (new, *others)
        loss, d_new = call(backend, "mahalanobis_covariance_loss", *inputs, normalize, True)
        return loss.to(new.dtype), d_new

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.normalize, *tensors = inputs
        _, d_new = output
        save(ctx, d_new, *tensors)
        ctx.mark_non_differentiable(d_new)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 8
        d_new, *inputs = ctx.saved_tensors
        d_new = _Gradient.run(grad, d_new, *inputs, ctx.normalize)
        return None, None, d_new, *[None] * 5

    @staticmethod
    def jvp(ctx, backend, normalize, t_new, *others):
        if t_new is None:
            return None, None
        d_new, *inputs = ctx.saved_tensors
        one = t_new.new_ones(())
        # through what knows that the gradient moves, too
        d_new = _Gradient.run(one, d_new, *inputs, ctx.normalize)
        return (d_new * t_new).sum(), None


class _Gradient(Function):
    """grad · d_new; its own derivatives, which nobody trains with, are the reference's."""

    @staticmethod
    def forward(
        grad,  # ()
        d_new,  # (B, d), float32 or wider
        new,  # (B, d)
        old,  # (B, d)
        labels,  # (B,)
        factor,  # (C, d, d), or U (C, d, r)
        s,  # (C, r) or None
        diag,  # (C, d) or None
        normalize,
    ):
        # in float32 or wider, rounded once
        return (d_new * grad).to(new.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, d_new, *tensors, ctx.normalize = inputs
        save(ctx, grad, d_new, *tensors)

    @staticmethod
    def backward(ctx, outer):
        grad, _, new, *rest = ctx.saved_tensors
        first = torch.func.grad(loss_of_new(*rest, ctx.normalize))

        def along(x: Tensor) -> Tensor:
            return (first(x) * outer).sum()

        twice, once = torch.func.grad_and_value(along)(new)
        return once, None, twice * grad, *[None] * 6

    @staticmethod
    def jvp(ctx, t_grad, _, t_new, *others):
        grad, d_new, new, *rest = ctx.saved_tensors
        of_grad = of_new = None
        if t_grad is not None:
            of_grad = (d_new * t_grad).to(new.dtype)
        if t_new is not None:
            first = torch.func.grad(loss_of_new(*rest, ctx.normalize))
            of_new = torch.func.jvp(first, (new,), (t_new,))[1] * grad
        return total(of_grad, of_new)


def loss_of_new(old, labels, factor, s, diag, normalize):
    """The reference's loss as a function of ``new`` alone."""
    given = factor if s is None else LowRankDiag(factor, s, diag)
    return lambda new: mahalanobis_covariance_loss_reference(new, old, labels, given, normalize)


def _checked(
    new,  # (B, d)
    old,  # (B, d)
    labels,  # (B,)
    factor,  # (C, d, d) or LowRankDiag
    normalize,
):
    """All tensors in one dtype; the factor as (L, None, None) or (U, s, diag)."""
    op = "mahalanobis_covariance_loss"
    low_rank = isinstance(factor, LowRankDiag)
    named = {"new": new, "old": old, **(factor._asdict() if low_rank else {"factor": factor})}
    for name, t in (*named.items(), ("labels", labels)):
        if not isinstance(t, Tensor):
            expected = "a tensor or ops.LowRankDiag" if name == "factor" else "a tensor"
            raise TypeError(_check.mistake(op, name, expected, type(t).__name__, named))
    named = dict(zip(named, _check.autocast(*named.values())))
    named["labels"] = labels
    _check.check_tensors(op, named, integer=("labels",))
    if not isinstance(normalize, bool):
        raise TypeError(_check.mistake(op, "normalize", "a bool", type(normalize).__name__, named))
    if new.dim() != 2:
        raise ValueError(_check.mistake(op, "new", "of shape (B, d)", tuple(new.shape), named))
    (B, d) = new.shape
    first = named["U" if low_rank else "factor"]
    _check.check_shape(op, named, "old", (B, d), "new's")
    _check.check_shape(op, named, "labels", (B,), "(B,)")
    fits = first.dim() == 3 and first.shape[0] > 0 and first.shape[1] == d
    if not fits or not (low_rank or first.shape[2] == d):
        name = "U" if low_rank else "factor"
        shape = f"(C, d = {d}, r)" if low_rank else f"(C, d, d) with d = {d}"
        expected = f"of shape {shape} and C > 0"
        raise ValueError(_check.mistake(op, name, expected, tuple(first.shape), named))
    C, _, r = first.shape
    if low_rank:
        _check.check_shape(op, named, "s", (C, r), "(C, r)")
        _check.check_shape(op, named, "diag", (C, d), "(C, d)")
    _check.check_indices(op, labels, C, named, "labels", lowest=-1)
    if torch.is_grad_enabled() and old.requires_grad and not new.requires_grad:
        expected = "without a gradient where new has none: the order is (new, old)"
        raise ValueError(_check.mistake(op, "old", expected, "requires_grad", named))
    return (
        named["new"],
        named["old"],
        labels,
        detached(first),
        *(t if t is None else detached(t) for t in (named.get("s"), named.get("diag"))),
    )


@remembered
def mahalanobis_covariance_loss(
    new: Tensor,  # (B, d)
    old: Tensor,  # (B, d)
    labels: Tensor,  # (B,)
    factor: Tensor | LowRankDiag,  # (C, d, d)
    normalize: bool = True,
    backend: str = "auto",
) -> Tensor:
    """How far training has moved the Mahalanobis distances between rows of one class.

    Rows and pairs are those of this process: averaged over several, it is the loss of the pairs
    that share a process, not of all pairs of the joint batch.

    Args:
        new, old: (B, d) features of the same images under the network in training and under the
            frozen one before it; float32, bfloat16, float16 or (reference, cpp) float64.
        labels: (B,) int64 in [0, C), or -1 for rows to ignore.
        factor: (C, d, d) any L with L Lᵀ the class's precision, or ``LowRankDiag(U, s, diag)``. A P
            that is not positive semi-definite may make a square negative: it counts as 0, without a
            gradient.
        normalize: compare rows over their L2 norms (a row of zeros stays one). Without it, squared
            distances beyond the dtype's range overflow.
        backend: ``"auto" | "reference" | "cpp" | "triton"``; ``ops.explain`` says which can run.

    Returns:
        () of new's dtype: (1/B) Σ |D(old_i, old_j) − D(new_i, new_j)| over the pairs i < j of every
        class, with D(a, b) = sqrt((a − b) P (a − b)ᵀ + 1e-8); 0, with a gradient of zeros, when no
        class has two rows. The gradient reaches ``new`` alone (where the two distances are equal it
        is 0); derivatives of it run on the reference. Deterministic; extra memory is O(B · d), the
        reference takes O(B² · d + B · d²).

    Raises:
        ValueError: shapes or devices that do not fit; a label outside [-1, C) (on a GPU, where the
            check would synchronise, only under ``CLIPSTEER_CHECK_INDICES=1``; such rows are ignored
            there); ``old`` alone requires a gradient, as in the authors' order (old, new).
        TypeError: not tensors, dtypes that differ outside autocast, labels that are not int64.
        RuntimeError: the backend asked for cannot run here.

    Source: Wu et al. 2025 (arXiv 2502.07560), the covariance calibration loss of MACIL.
    """
    new, old, labels, first, s, diag = _checked(new, old, labels, factor, normalize)
    op = "mahalanobis_covariance_loss" + ("" if s is None else "_low_rank")
    backend = choose(op, backend, new)
    if backend == "reference":
        given = first if s is None else LowRankDiag(first, s, diag)
        return mahalanobis_covariance_loss_reference(new, old, labels, given, normalize)
    inputs = tuple(map(contiguous_if, (new, detached(old), labels, first, s, diag)))
    if tracked(new):
        return _Loss.run(backend, normalize, *inputs)[0]
    loss, _ = call(backend, "mahalanobis_covariance_loss", *inputs, normalize, False)
    return cast_to(loss, new.dtype)
