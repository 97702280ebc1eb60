"""The Boolean algebra of conceptors, on eigenvectors and eigenvalues.

    ¬C = I - C;   C ∧ B = (C⁻¹ + B⁻¹ - I)⁻¹;   C ∨ B = ¬(¬C ∧ ¬B);   φ(C, γ) = C (C + γ⁻²(I - C))⁻¹

Every form is kept as C = c·I + U diag(s - c) Uᵀ with c 0 or 1: c is the eigenvalue of all
directions outside U. A full matrix has d columns, a low-rank one few, and the negation of a
low-rank one as few again, with c = 1. Operations work in the joint span of their operands, so low
rank stays cheap. All of it is in float64.

∧ is computed as B (B + C - CB)⁻¹ C, which equals (C⁻¹ + B⁻¹ - I)⁻¹ where that exists and its limit
where it does not (Jaeger 2014, def. 4): the middle matrix is singular on ker B ∩ ker C alone, so no
eigenvalue is ever inverted by itself and its error is what rounding C and B would cause.
Eigenvalues within d·eps of 0 or 1, or within that error after ∧ and ∨, are taken as 0 or 1, so that
ranges which do not meet give exactly 0.

Some laws of sets fail. In one dimension, with c = b = ½: c ∧ c = ⅓, so ∧ is not idempotent; c ∨ ¬c
= ⅔, so there is no excluded middle; c ∧ (c ∨ b) = ½ ∧ ⅔ = ⅖, not ½ (absorption); with a = ½, a ∧ (b
∨ c) = ⅖ but (a ∧ b) ∨ (a ∧ c) = ⅓ ∨ ⅓ = ½ (distributivity). C ∨ C is φ(C, √2), and equals C only
for projectors.

C ∨ B is the conceptor of the two data sets' R₁ + R₂ only where both have one aperture. The matrix
forms take any two, but a conceptor of a large aperture then outweighs the other grossly: use
``scale_aperture`` first.

Sources: Jaeger 2014 (arXiv 1403.3369); Postmus & Abreu 2024 (arXiv 2410.16314).
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from clipsteer.conceptors.fit import EPS
from clipsteer.ops._check import what_came


class Factors(NamedTuple):
    """C = rest·I + U diag(s - rest) Uᵀ, one or a batch of K; the columns of U are orthonormal."""

    U: Tensor  # ([K,] d, r)
    s: Tensor  # ([K,] r), in [0, 1]
    rest: int  # 0 or 1

    @property
    def d(self) -> int:
        """Width."""
        return self.U.shape[-2]

    @property
    def rank(self) -> int:
        """Columns kept."""
        return self.U.shape[-1]

    def dense(self) -> Tensor:
        """C, ([K,] d, d)."""
        return self._in(self.U)

    def within(
        self,
        Q: Tensor,  # ([K,] d, m)
    ) -> Tensor:
        """Qᵀ C Q, ([K,] m, m)."""
        return self._in(Q.mT @ self.U)

    def _in(self, W: Tensor) -> Tensor:
        """rest·I + W diag(s - rest) Wᵀ."""
        eye = torch.eye(W.shape[-2], dtype=torch.float64, device=W.device)
        beyond = (self.s - self.rest).unsqueeze(-2)
        return self.rest * eye + W * beyond @ W.mT

    def eigenvalues(self) -> Tensor:
        """All of them, ([K,] d), descending."""
        shape = (*self.s.shape[:-1], self.d - self.rank)
        others = torch.full(shape, float(self.rest)).to(self.s)
        return torch.cat([self.s, others], -1).sort(-1, descending=True).values

    def quota(self) -> Tensor:
        """trace(C)/d, () or (K,)."""
        trace = self.rest * (self.d - self.rank) + self.s.sum(-1)
        return trace / self.d

    def to(self, device: torch.device | str) -> Factors:
        """On another device."""
        return Factors(self.U.to(device), self.s.to(device), self.rest)


def _snap(s: Tensor, tolerance: Tensor | float) -> Tensor:
    s = torch.where(s <= tolerance, 0.0, s)
    return torch.where(s >= 1 - tolerance, 1.0, s)


def factored(
    matrix: Tensor,  # ([K,] d, d)
) -> Factors:
    """Factors of a matrix. Raises ValueError where it is no conceptor, to 20·d·eps of its dtype."""
    is_matrix = isinstance(matrix, Tensor) and matrix.dim() in (2, 3)
    if not is_matrix or not matrix.is_floating_point():
        raise ValueError(
            f"Conceptor: matrix must be floating, of shape (d, d) or (K, d, d), got "
            f"{what_came(matrix)}"
        )
    d = matrix.shape[-1]
    if matrix.shape[-2] != d or 0 in matrix.shape:
        raise ValueError(
            f"Conceptor: matrix must be square and not empty, got {tuple(matrix.shape)}"
        )
    slack = 20 * d * torch.finfo(matrix.dtype).eps
    wide = matrix.detach().double()
    skew = (wide - wide.mT).abs()
    if not bool(wide.isfinite().all()) or bool((skew > slack).any()):
        raise ValueError("Conceptor: matrix must be finite and symmetric")
    s, U = torch.linalg.eigh((wide + wide.mT) / 2)
    low = float(s.min())
    high = float(s.max())
    if low < -slack or high > 1 + slack:
        raise ValueError(f"Conceptor: eigenvalues must be in [0, 1], got {low:.6g} to {high:.6g}")
    return Factors(U, s, 0)


def checked(C: Factors) -> Factors:
    """Given factors in float64. Raises ValueError: shapes that do not fit, columns that are not
    orthonormal, eigenvalues out of range."""
    U, s, rest = C
    fits = (
        U.dim() in (2, 3)
        and 0 not in U.shape[:-1]
        and U.shape[-2] >= U.shape[-1]
        and s.shape == U.shape[:-2] + U.shape[-1:]
    )
    if not fits or rest not in (0, 1):
        got = f"{tuple(U.shape)}, {tuple(s.shape)}, {rest}"
        raise ValueError(
            f"Conceptor: expected U ([K,] d, r) with r ≤ d, s ([K,] r) and rest 0 or 1, got {got}"
        )
    eps = max(torch.finfo(U.dtype).eps, torch.finfo(s.dtype).eps)
    slack = 20 * U.shape[-2] * eps
    U = U.detach().double()
    s = s.detach().double()
    eye = torch.eye(U.shape[-1], dtype=U.dtype, device=U.device)
    skew = (U.mT @ U - eye).abs()
    # written so that NaN fails
    if not bool((skew <= slack).all()):
        raise ValueError(f"Conceptor: the columns of U must be orthonormal (to {slack:.1g})")
    if not bool(((s >= -slack) & (s <= 1 + slack)).all()):
        raise ValueError("Conceptor: eigenvalues s must be in [0, 1]")
    return Factors(U, s, rest)


def reduced(C: Factors) -> Factors:
    """Without the columns that say nothing, whose eigenvalue is that of the rest; sorted."""
    s = _snap(C.s, C.d * EPS)
    order = (s - C.rest).abs().argsort(dim=-1, descending=True, stable=True)
    s = s.gather(-1, order)
    used = (s != C.rest).sum(-1)
    rank = int(used.max()) if s.numel() else 0
    columns = order.unsqueeze(-2).expand(C.U.shape)
    U = C.U.gather(-1, columns)
    return Factors(U[..., :rank].contiguous(), s[..., :rank].contiguous(), C.rest)


class Operand(Protocol):
    """A conceptor, as far as what is made of it is concerned."""

    factors: Factors
    aperture: float | None
    mean: Tensor | None  # (d,)
    metadata: dict[str, str]


def common(*operands: Operand) -> tuple[float | None, Tensor | None, dict[str, str]]:
    """Aperture, mean and metadata of what is made of these.

    Raises ValueError where they do not belong together.
    """
    shapes = [tuple(each.factors.U.shape[:-1]) for each in operands]  # ([K,] d)
    widths = {shape[-1] for shape in shapes}
    batches = {shape for shape in shapes if len(shape) > 1}
    if len(widths) > 1 or len(batches) > 1:
        raise ValueError(f"Conceptor: the operands must share d and, if batches, K; got {shapes}")
    # 0 and I mean the same around every mean
    placed = [each for each in operands if each.factors.rank] or [operands[0]]
    mean = placed[0].mean
    for other in (each.mean for each in placed):
        same = other is mean or (
            other is not None and mean is not None and torch.equal(other, mean)
        )
        if not same:
            raise ValueError(
                "Conceptor: the operands are centred on different means (None: uncentred)"
            )
    apertures = {each.aperture for each in placed}
    aperture = apertures.pop() if len(apertures) == 1 else None
    metadata = {
        name: text
        for name, text in placed[0].metadata.items()
        if all(each.metadata.get(name) == text for each in placed)
    }
    return aperture, mean, metadata


def complement(C: Factors) -> Factors:
    """¬C."""
    return Factors(C.U, 1 - C.s, 1 - C.rest)


def meet(C: Factors, B: Factors) -> Factors:
    """C ∧ B; a batch and a single one broadcast."""
    rest = C.rest & B.rest
    if C.rank + B.rank >= C.d:
        s, U = _meet_dense(C.dense(), B.dense(), C.d)
        return Factors(U, s, rest)
    batch = torch.broadcast_shapes(C.U.shape[:-2], B.U.shape[:-2])
    columns = [each.U.expand(*batch, *each.U.shape[-2:]) for each in (C, B)]
    Q = torch.linalg.qr(torch.cat(columns, -1)).Q  # ([K,] d, m)
    s, V = _meet_dense(C.within(Q), B.within(Q), C.d)
    return Factors(Q @ V, s, rest)


def _meet_dense(
    C: Tensor,  # ([K,] m, m), eigenvalues in [0, 1]
    B: Tensor,  # the same
    d: int,
) -> tuple[Tensor, Tensor]:
    """Eigenvalues ([K,] m) and eigenvectors ([K,] m, m) of C ∧ B."""
    C, B = torch.broadcast_tensors(C, B)
    total = C + B
    values, vectors = torch.linalg.eigh(total)
    # the identity on ker C ∩ ker B makes the middle matrix regular and changes nothing: C and B
    # vanish there
    is_null = (values <= 2 * d * EPS).unsqueeze(-2)
    null = vectors * is_null @ vectors.mT
    middle = total - C @ B + null
    right = torch.linalg.solve(middle, C)
    left = torch.linalg.solve(middle, B, left=False)
    A = B @ right
    s, V = torch.linalg.eigh((A + A.mT) / 2)
    # δA = (A C⁻¹) δC (C⁻¹ A) + (A B⁻¹) δB (B⁻¹ A): rounding C and B by eps moves each eigenvalue by
    # this much, so that what is nearer to 0 or 1 cannot be told from it
    by_C = (left.mT @ V).norm(dim=-2)
    by_B = (right @ V).norm(dim=-2)
    spread = torch.maximum(by_C, by_B).square()
    unit = d * EPS
    return _snap(s, unit * spread.clamp(1, 0.1 / unit)), V


def scaled_aperture(C: Factors, gamma: float) -> Factors:
    """φ(C, γ) for γ in [0, ∞]."""
    s = C.s
    square = gamma * gamma  # gamma**2 raises OverflowError where this gives infinity
    if gamma == 0:
        scaled = (s == 1).to(s)
    elif math.isinf(gamma):
        scaled = (s > 0).to(s)
    elif gamma <= 1:
        scaled = s * square / (s * square + 1 - s)
    else:
        scaled = s / (s + (1 - s) / square)
    is_sharp = (s == 0) | (s == 1)
    return C._replace(s=torch.where(is_sharp, s, scaled))


def truncated(C: Factors, tol: float) -> tuple[Factors, float]:
    """Eigenvalues within ``tol`` of the rest's become the rest's; and the largest such step."""
    gap = (C.s - C.rest).abs()
    kept = torch.where(gap > tol, C.s, float(C.rest))
    dropped = torch.where(gap > tol, 0.0, gap)
    bound = float(dropped.max()) if gap.numel() else 0.0
    return C._replace(s=kept), bound
