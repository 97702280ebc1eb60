"""Conceptors: soft projections onto the directions that a set of activations uses, and their
Boolean algebra.

    C = R (R + α⁻² I)⁻¹,  R = E[x xᵀ];   ¬C = I - C;   C ∧ B = (C⁻¹ + B⁻¹ - I)⁻¹;   C ∨ B = ¬(¬C ∧
    ¬B)

Every form is kept as eigenvectors and eigenvalues, C = c·I + U diag(s - c) Uᵀ with c 0 or 1: c is
the eigenvalue of all directions outside U. A full matrix has d columns, a low-rank one few, and the
negation of a low-rank one as few again, with c = 1. Operations work in the joint span of their
operands, so low rank stays cheap. All of it is in float64.

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
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipsteer import ops
from clipsteer.clip.hooks import beside
from clipsteer.conceptors.fit import (
    EPS,
    check_aperture,
    choose_aperture,
    correlation,
    shares,
    spectrum,
)
from clipsteer.io.files import FileFormatError
from clipsteer.io.kinds import Kind, read_kind, write_kind


def _snap(s: Tensor, tol: Tensor | float) -> Tensor:
    s = torch.where(s <= tol, 0.0, s)
    return torch.where(s >= 1 - tol, 1.0, s)


def _meet(C: Tensor, B: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of C ∧ B for dense matrices (…, m, m) with eigenvalues in [0,
    1]."""
    C, B = torch.broadcast_tensors(C, B)
    total = C + B
    values, vectors = torch.linalg.eigh(total)
    # the identity on ker C ∩ ker B makes the middle matrix regular and changes nothing: C and B
    # vanish there
    null = vectors * (values <= 2 * d * EPS).unsqueeze(-2) @ vectors.mT
    middle = total - C @ B + null
    right = torch.linalg.solve(middle, C)
    left = torch.linalg.solve(middle, B, left=False)
    A = B @ right
    s, V = torch.linalg.eigh((A + A.mT) / 2)
    # δA = (A C⁻¹) δC (C⁻¹ A) + (A B⁻¹) δB (B⁻¹ A): rounding C and B by eps moves each eigenvalue by
    # this much, so that what is nearer to 0 or 1 cannot be told from it
    spread = torch.maximum((left.mT @ V).norm(dim=-2), (right @ V).norm(dim=-2)).square()
    return _snap(s, d * EPS * spread.clamp(1, 0.1 / (d * EPS))), V


class Truncated(NamedTuple):
    """``Conceptor.low_rank``'s answer: ``bound`` is the largest eigenvalue dropped, so ‖C h - C' h‖
    ≤ bound·‖h‖."""

    conceptor: Conceptor
    bound: float


class Conceptor:
    """A conceptor, or a batch of K of them that share their width d.

    Args:
        matrix: (d, d) or (K, d, d), symmetric, eigenvalues in [0, 1] (to 20·d·eps of its dtype).
        aperture: what it was fitted with, if that is known.
        mean: (d,) background mean that it is centred on, or None for an uncentred one.
        metadata: text that is saved along, such as "clip_model" and "hook_point".

    ``~C``, ``C & D``, ``C | D`` are NOT, AND, OR; ``C <= D`` the order of positive semi-definite
    matrices (a boolean tensor, () or (K,)). A batch and a single conceptor combine by broadcasting.
    ``C[k]`` takes one out of a batch.

    Raises:
        ValueError: a matrix that is no conceptor; operands of other widths, or centred on other
            means.
    """

    def __init__(
        self,
        matrix: Tensor,
        *,
        aperture: float | None = None,
        mean: Tensor | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        if (
            not isinstance(matrix, Tensor)
            or not matrix.is_floating_point()
            or matrix.dim() not in (2, 3)
        ):
            got = (
                f"{matrix.dtype} {tuple(matrix.shape)}"
                if isinstance(matrix, Tensor)
                else type(matrix).__name__
            )
            raise ValueError(
                f"Conceptor: matrix must be floating, of shape (d, d) or (K, d, d), got {got}"
            )
        d = matrix.shape[-1]
        if matrix.shape[-2] != d or 0 in matrix.shape:
            raise ValueError(
                f"Conceptor: matrix must be square and not empty, got {tuple(matrix.shape)}"
            )
        slack = 20 * d * torch.finfo(matrix.dtype).eps
        wide = matrix.detach().double()
        if not bool(wide.isfinite().all()) or bool(((wide - wide.mT).abs() > slack).any()):
            raise ValueError("Conceptor: matrix must be finite and symmetric")
        s, U = torch.linalg.eigh((wide + wide.mT) / 2)
        if bool((s < -slack).any() or (s > 1 + slack).any()):
            raise ValueError(
                f"Conceptor: eigenvalues must be in [0, 1], got {float(s.min()):.6g} to "
                f"{float(s.max()):.6g}"
            )
        self._set(U, s, 0, aperture, mean, metadata)

    @torch.inference_mode(False)  # what is kept here must serve backward passes too
    def _set(
        self, U: Tensor, s: Tensor, rest: int, aperture: Any, mean: Any, metadata: Any
    ) -> None:
        d = U.shape[-2]
        s = _snap(s, d * EPS)
        # columns whose eigenvalue is that of the rest say nothing
        order = (s - rest).abs().argsort(dim=-1, descending=True, stable=True)
        s = s.gather(-1, order)
        r = int((s != rest).sum(-1).max()) if s.numel() else 0
        self._U = U.gather(-1, order.unsqueeze(-2).expand(U.shape))[
            ..., :r
        ].contiguous()  # (…, d, r)
        self._s, self._rest = s[..., :r].contiguous(), rest  # (…, r)
        self.aperture = None if aperture is None else check_aperture(aperture)
        if mean is not None and (not isinstance(mean, Tensor) or mean.shape != (d,)):
            got = tuple(mean.shape) if isinstance(mean, Tensor) else type(mean).__name__
            raise ValueError(f"Conceptor: mean must be a tensor of shape ({d},), got {got}")
        if mean is not None:
            mean = (mean.clone() if mean.is_inference() else mean.detach()).to(self._U)
        self.mean = mean
        self.metadata = dict(metadata or {})
        self._cache: dict[Any, Any] = {}

    @classmethod
    def _make(
        cls,
        U: Tensor,
        s: Tensor,
        rest: int,
        aperture: Any = None,
        mean: Any = None,
        metadata: Any = None,
    ) -> Conceptor:
        new = cls.__new__(cls)
        new._set(U, s, rest, aperture, mean, metadata)
        return new

    def _like(self, s: Tensor, rest: int, aperture: float | None) -> Conceptor:
        return self._make(self._U, s, rest, aperture, self.mean, self.metadata)

    # ------------------------------------------------------------ making one

    @classmethod
    def fit(
        cls,
        x: Tensor | Iterable[Any],
        aperture: float | str = "gradient",
        *,
        mean: Tensor | None = None,
        labels: Tensor | None = None,
        classes: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Conceptor:
        """Fit to activations; with labels, one conceptor a class.

        Args:
            x: (…, d) activations, or an iterable of such batches (with ``classes``: of (x, labels)
                pairs), read once. N < d rows are enough: directions without data get 0.
            aperture: α > 0, in units of one over the activations'; or "gradient",
                ``choose_aperture``'s heuristic (one α for all classes, as the algebra wants).
            mean: (d,) background mean to centre on: that of a generic corpus, not of x. None: no
                centring.
            labels, classes: see ``correlation``.

        Under ``torchrun`` the sums go over all processes, each of which must call this.

        Raises:
            ValueError: no rows, shapes that do not fit, values that are not finite, a bad aperture.
        """
        if aperture != "gradient":
            check_aperture(aperture)
        R = correlation(x, mean=mean, labels=labels, classes=classes)
        return cls.from_correlation(R, aperture, mean=mean, metadata=metadata)

    @classmethod
    def from_correlation(
        cls,
        R: Tensor,
        aperture: float | str = "gradient",
        *,
        mean: Tensor | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Conceptor:
        """The conceptor of a correlation matrix (d, d) or (K, d, d), as ``correlation`` gives
        it."""
        values, U = spectrum(R)
        alpha = choose_aperture(R) if aperture == "gradient" else check_aperture(aperture)
        return cls._make(U, shares(values, alpha), 0, alpha, mean, metadata)

    @classmethod
    def from_factors(cls, U: Tensor, s: Tensor, *, rest: int = 0, **options: Any) -> Conceptor:
        """C = rest·I + U diag(s - rest) Uᵀ from orthonormal columns U (…, d, r) and eigenvalues s
        (…, r) in [0, 1].

        ``rest`` is 0 or 1. ``options`` are ``aperture``, ``mean`` and ``metadata``.
        Raises ValueError: shapes that do not fit, columns that are not orthonormal, eigenvalues out
            of range.
        """
        fits = (
            U.dim() in (2, 3)
            and s.shape == U.shape[:-2] + U.shape[-1:]
            and U.shape[-2] >= U.shape[-1]
        )
        fits = fits and 0 not in U.shape[:-1]
        if not fits or rest not in (0, 1):
            got = f"{tuple(U.shape)}, {tuple(s.shape)}, {rest}"
            raise ValueError(
                f"Conceptor: expected U ([K,] d, r) with r ≤ d, s ([K,] r) and rest 0 or 1, got "
                f"{got}"
            )
        slack = 20 * U.shape[-2] * max(torch.finfo(U.dtype).eps, torch.finfo(s.dtype).eps)
        U, s = U.detach().double(), s.detach().double()
        eye = torch.eye(U.shape[-1], dtype=U.dtype, device=U.device)
        # written so that NaN fails
        if not bool(((U.mT @ U - eye).abs() <= slack).all()):
            raise ValueError(f"Conceptor: the columns of U must be orthonormal (to {slack:.1g})")
        if not bool(((s >= -slack) & (s <= 1 + slack)).all()):
            raise ValueError("Conceptor: eigenvalues s must be in [0, 1]")
        return cls._make(U, s, rest, **options)

    @classmethod
    def identity(cls, d: int) -> Conceptor:
        """I, which keeps everything; ``~Conceptor.identity(d)`` is 0. Both combine with conceptors
        of any mean."""
        return cls._make(
            torch.zeros(d, 0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64), 1
        )

    @classmethod
    def stack(cls, conceptors: Sequence[Conceptor]) -> Conceptor:
        """A batch (K, …) of single conceptors of one width and mean."""
        if not conceptors or any(c.is_batch for c in conceptors):
            raise ValueError(
                "Conceptor.stack: expected at least one conceptor, none of them a batch"
            )
        aperture, mean, metadata = conceptors[0]._shared(*conceptors[1:])
        return cls(
            torch.stack([c.matrix for c in conceptors]),
            aperture=aperture,
            mean=mean,
            metadata=metadata,
        )

    # ------------------------------------------------------------ what it is

    @property
    def d(self) -> int:
        return self._U.shape[-2]

    @property
    def is_batch(self) -> bool:
        return self._U.dim() == 3

    @property
    def rank(self) -> int:
        """Columns kept: directions whose eigenvalue differs from that of all others (of a batch,
        the most)."""
        return self._U.shape[-1]

    def __len__(self) -> int:
        if not self.is_batch:
            raise TypeError("a single Conceptor has no length")
        return self._U.shape[0]

    def __getitem__(self, k: int) -> Conceptor:
        if not self.is_batch:
            raise TypeError("a single Conceptor cannot be indexed")
        return self._make(
            self._U[k], self._s[k], self._rest, self.aperture, self.mean, self.metadata
        )

    def __repr__(self) -> str:
        batch = f"{len(self)} × " if self.is_batch else ""
        quota = ", ".join(f"{q:.4g}" for q in self.quota.flatten().tolist()[:8])
        form = f"rank={self.rank}, rest={self._rest}, quota={quota}, aperture={self.aperture}"
        return f"Conceptor({batch}d={self.d}, {form})"

    @property
    def matrix(self) -> Tensor:
        """(d, d) or (K, d, d), dense, float64."""
        eye = torch.eye(self.d, dtype=torch.float64, device=self._U.device)
        return self._rest * eye + self._U * (self._s - self._rest).unsqueeze(-2) @ self._U.mT

    @property
    def eigenvalues(self) -> Tensor:
        """(d,) or (K, d), descending."""
        others = torch.full((*self._s.shape[:-1], self.d - self.rank), float(self._rest)).to(
            self._s
        )
        return torch.cat([self._s, others], -1).sort(-1, descending=True).values

    @property
    def quota(self) -> Tensor:
        """trace(C)/d in [0, 1]: the share of the space's dimensions that is kept; () or (K,)."""
        return (self._rest * (self.d - self.rank) + self._s.sum(-1)) / self.d

    def similarity(self, other: Conceptor) -> Tensor:
        """tr(CB)/(‖C‖‖B‖) in [0, 1], Jaeger's similarity; () or (K,). NaN where either is 0."""
        self._shared(other)
        product = (self.matrix * other.matrix).sum((-2, -1))
        norm = lambda c: c.eigenvalues.square().sum(-1).sqrt()
        return product / (norm(self) * norm(other))

    # ------------------------------------------------------------ algebra

    def _shared(self, *others: Conceptor) -> tuple[float | None, Tensor | None, dict[str, str]]:
        """Aperture, mean and metadata of what is made of these; raises where they do not belong
        together."""
        everyone = (self, *others)
        if len({c.d for c in everyone}) > 1 or len({len(c) for c in everyone if c.is_batch}) > 1:
            shapes = [tuple(c._U.shape[:-1]) for c in everyone]
            raise ValueError(
                f"Conceptor: the operands must share d and, if batches, K; got {shapes}"
            )
        # 0 and I mean the same around every mean
        placed = [c for c in everyone if c.rank] or [self]
        means = [c.mean for c in placed]
        if any(
            (m is None) != (means[0] is None) or (m is not None and not torch.equal(m, means[0]))
            for m in means
        ):
            raise ValueError(
                "Conceptor: the operands are centred on different means (None: uncentred)"
            )
        apertures = {c.aperture for c in placed}
        common = {
            k: v
            for k, v in placed[0].metadata.items()
            if all(c.metadata.get(k) == v for c in placed)
        }
        return (apertures.pop() if len(apertures) == 1 else None), means[0], common

    def __invert__(self) -> Conceptor:
        return self._like(1 - self._s, 1 - self._rest, self.aperture)

    def __and__(self, other: Conceptor) -> Conceptor:
        if not isinstance(other, Conceptor):
            return NotImplemented
        shared, rest = self._shared(other), self._rest & other._rest
        if self.rank + other.rank >= self.d:
            s, U = _meet(self.matrix, other.matrix, self.d)
            return self._make(U, s, rest, *shared)
        batch = torch.broadcast_shapes(self._U.shape[:-2], other._U.shape[:-2])
        columns = torch.cat([c._U.expand(*batch, *c._U.shape[-2:]) for c in (self, other)], -1)
        Q = torch.linalg.qr(columns).Q  # (…, d, m)
        s, V = _meet(self._within(Q), other._within(Q), self.d)
        return self._make(Q @ V, s, rest, *shared)

    def _within(self, Q: Tensor) -> Tensor:
        """Qᵀ C Q."""
        W = Q.mT @ self._U
        eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
        return self._rest * eye + W * (self._s - self._rest).unsqueeze(-2) @ W.mT

    def __or__(self, other: Conceptor) -> Conceptor:
        if not isinstance(other, Conceptor):
            return NotImplemented
        return ~(~self & ~other)

    def __le__(self, other: Conceptor) -> Tensor:
        if not isinstance(other, Conceptor):
            return NotImplemented
        self._shared(other)
        return torch.linalg.eigvalsh(other.matrix - self.matrix).amin(-1) >= -20 * self.d * EPS

    def scale_aperture(self, gamma: float) -> Conceptor:
        """φ(C, γ) = C (C + γ⁻²(I - C))⁻¹: the aperture becomes α·γ.

        Args:
            gamma: in [0, ∞]. 0 keeps only eigenvalues that are 1, ∞ all that are not 0: both give
                projectors.
        """
        if isinstance(gamma, bool) or not isinstance(gamma, int | float) or not gamma >= 0:
            raise ValueError(f"scale_aperture: gamma must be a number in [0, inf], got {gamma!r}")
        s, square = (
            self._s,
            gamma * gamma,
        )  # gamma**2 raises OverflowError where this gives infinity
        if gamma == 0:
            scaled = (s == 1).to(s)
        elif math.isinf(gamma):
            scaled = (s > 0).to(s)
        elif gamma <= 1:
            scaled = s * square / (s * square + 1 - s)
        else:
            scaled = s / (s + (1 - s) / square)
        scaled = torch.where((s == 0) | (s == 1), s, scaled)
        changed = self.aperture * gamma if self.aperture else None
        return self._like(
            scaled, self._rest, changed if changed and 0 < changed < math.inf else None
        )

    def low_rank(self, tol: float) -> Truncated:
        """Keep the directions that matter: those whose eigenvalue is at least ``tol`` away from
        that of the rest.

        For a conceptor that is not a negation the rest is 0. The bound returned is attained, and at
        most ``tol``.
        """
        if isinstance(tol, bool) or not isinstance(tol, int | float) or not 0 <= tol <= 1:
            raise ValueError(f"low_rank: tol must be in [0, 1], got {tol!r}")
        gap = (self._s - self._rest).abs()
        kept = torch.where(gap > tol, self._s, float(self._rest))
        bound = float(torch.where(gap > tol, 0.0, gap).max()) if gap.numel() else 0.0
        return Truncated(self._like(kept, self._rest, self.aperture), bound)

    # ------------------------------------------------------------ use

    def to(self, device: torch.device | str) -> Conceptor:
        """On another device; operands must share theirs."""
        mean = None if self.mean is None else self.mean.to(device)
        return self._make(
            self._U.to(device), self._s.to(device), self._rest, self.aperture, mean, self.metadata
        )

    def operator(
        self, dtype: torch.dtype = torch.float32, device: Any = None
    ) -> Tensor | ops.LowRank:
        """What ``ops.conceptor_project`` takes: ``ops.LowRank`` where that is cheaper, else the
        dense matrix."""
        device = self._U.device if device is None else torch.device(device)
        key = (dtype, device)
        if key not in self._cache:
            # made under torch.inference_mode(), it could not be saved for a later backward pass
            with torch.inference_mode(False):
                if self._rest == 0 and 0 < 2 * self.rank < self.d:
                    self._cache[key] = ops.LowRank(
                        self._U.to(device, dtype), self._s.to(device, dtype)
                    )
                else:
                    self._cache[key] = self.matrix.to(device, dtype)
        return self._cache[key]

    def project(
        self,
        h: Tensor,
        index: Tensor | None = None,
        *,
        beta: float | Tensor = 1.0,
        mean: Tensor | None = None,
    ) -> Tensor:
        """β·C(h - μ) + μ for rows h (…, d), in h's dtype (under autocast, in that one's).

        ``index`` (…) names each row's conceptor of a batch; ``mean`` None takes the conceptor's
        own. Gradients reach h and beta. Errors: see ``ops.conceptor_project``.
        """
        mean = self.mean if mean is None else mean
        mean = None if mean is None else beside(self._cache, h, lambda m: m, mean)
        return ops.conceptor_project(
            h, self.operator(h.dtype, h.device), index, beta=beta, mean=mean
        )

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file: U, s, mean, and the metadata in its header."""

        return save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Conceptor:
        """Read what ``save`` wrote. Raises FileNotFoundError, or FileFormatError for anything else
        that is there."""

        return load(path)


_KIND = Kind("clipsteer-conceptor", 1, "a conceptor")


def save(conceptor: Conceptor, path: str | Path) -> Path:
    """See ``Conceptor.save``."""
    values: dict[str, float] = {"rest": conceptor._rest}
    if conceptor.aperture is not None:
        values["aperture"] = conceptor.aperture
    tensors = {"U": conceptor._U, "s": conceptor._s}
    if conceptor.mean is not None:
        tensors["mean"] = conceptor.mean
    texts = {f"meta.{name}": text for name, text in conceptor.metadata.items()}
    return write_kind(path, _KIND, tensors, values, texts=texts)


def load(path: str | Path) -> Conceptor:
    """See ``Conceptor.load``."""
    tensors, head = read_kind(path, _KIND)
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise FileFormatError(f"{path}: {name!r} holds values that are not finite")
    named = {"U", "s"} <= tensors.keys() <= {"U", "s", "mean"}
    if not named or any(t.dtype != torch.float64 for t in tensors.values()):
        raise FileFormatError(
            f"{path}: expected U, s and maybe mean, all float64; got {sorted(tensors)}"
        )
    try:
        aperture = float(head["aperture"]) if "aperture" in head else None
        metadata = {k[5:]: v for k, v in head.items() if k.startswith("meta.")}
        rest = {"0": 0, "1": 1}.get(head.get("rest", ""), -1)
        return Conceptor.from_factors(
            tensors["U"],
            tensors["s"],
            rest=rest,
            aperture=aperture,
            mean=tensors.get("mean"),
            metadata=metadata,
        )
    except ValueError as error:
        raise FileFormatError(f"{path}: {error}") from None
