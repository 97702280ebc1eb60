"""Conceptors: soft projections onto the directions that a set of activations uses.

    C = R (R + α⁻² I)⁻¹,  R = E[x xᵀ];   ¬C = I - C;   C ∧ B;   C ∨ B = ¬(¬C ∧ ¬B)

How they are kept and combined, and which laws hold, is in ``clipsteer.conceptors.algebra``.

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
from clipsteer.conceptors import algebra, files
from clipsteer.conceptors.algebra import Factors
from clipsteer.conceptors.fit import (
    EPS,
    check_aperture,
    choose_aperture,
    correlation,
    shares,
    spectrum,
)
from clipsteer.io.doors import door
from clipsteer.ops._check import what_came


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
        matrix: Tensor,  # ([K,] d, d)
        *,
        aperture: float | None = None,
        mean: Tensor | None = None,  # (d,)
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._set(algebra.factored(matrix), aperture, mean, metadata)

    @torch.inference_mode(False)  # what is kept here must serve backward passes too
    def _set(
        self,
        factors: Factors,
        aperture: float | None,
        mean: Tensor | None,
        metadata: Mapping[str, str] | None,
    ) -> None:
        self.factors = algebra.reduced(factors)
        self.aperture = None if aperture is None else check_aperture(aperture)
        if mean is not None:
            if not isinstance(mean, Tensor) or mean.shape != (factors.d,):
                raise ValueError(
                    f"Conceptor: mean must be a tensor of shape ({factors.d},), got "
                    f"{what_came(mean)}"
                )
            mean = (mean.clone() if mean.is_inference() else mean.detach()).to(self.factors.U)
        self.mean = mean
        self.metadata = dict(metadata or {})
        self._cache: dict[Any, Any] = {}

    @classmethod
    def _make(
        cls,
        factors: Factors,
        aperture: float | None = None,
        mean: Tensor | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Conceptor:
        new = cls.__new__(cls)
        new._set(factors, aperture, mean, metadata)
        return new

    def _like(self, factors: Factors, aperture: float | None) -> Conceptor:
        """With this one's mean and metadata."""
        return self._make(factors, aperture, self.mean, self.metadata)

    @classmethod
    def fit(
        cls,
        x: Tensor | Iterable[Any],  # (…, d)
        aperture: float | str = "gradient",
        *,
        mean: Tensor | None = None,  # (d,)
        labels: Tensor | None = None,  # (…)
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
        R: Tensor,  # ([K,] d, d)
        aperture: float | str = "gradient",
        *,
        mean: Tensor | None = None,  # (d,)
        metadata: Mapping[str, str] | None = None,
    ) -> Conceptor:
        """The conceptor of a correlation matrix (d, d) or (K, d, d), as ``correlation`` gives
        it."""
        values, U = spectrum(R)
        alpha = choose_aperture(R) if aperture == "gradient" else check_aperture(aperture)
        return cls._make(Factors(U, shares(values, alpha), 0), alpha, mean, metadata)

    @classmethod
    def from_factors(
        cls,
        U: Tensor,  # ([K,] d, r)
        s: Tensor,  # ([K,] r)
        *,
        rest: int = 0,
        **options: Any,
    ) -> Conceptor:
        """C = rest·I + U diag(s - rest) Uᵀ from orthonormal columns U (…, d, r) and eigenvalues s
        (…, r) in [0, 1].

        ``rest`` is 0 or 1. ``options`` are ``aperture``, ``mean`` and ``metadata``.
        Raises ValueError: shapes that do not fit, columns that are not orthonormal, eigenvalues out
            of range.
        """
        return cls._make(algebra.checked(Factors(U, s, rest)), **options)

    @classmethod
    def identity(cls, d: int) -> Conceptor:
        """I, which keeps everything; ``~Conceptor.identity(d)`` is 0. Both combine with conceptors
        of any mean."""
        U = torch.zeros(d, 0, dtype=torch.float64)
        s = torch.zeros(0, dtype=torch.float64)
        return cls._make(Factors(U, s, 1))

    @classmethod
    def stack(cls, conceptors: Sequence[Conceptor]) -> Conceptor:
        """A batch (K, …) of single conceptors of one width and mean."""
        if not conceptors or any(c.is_batch for c in conceptors):
            raise ValueError(
                "Conceptor.stack: expected at least one conceptor, none of them a batch"
            )
        aperture, mean, metadata = algebra.common(*conceptors)
        matrix = torch.stack([c.matrix for c in conceptors])
        return cls(matrix, aperture=aperture, mean=mean, metadata=metadata)

    @property
    def d(self) -> int:
        """Width."""
        return self.factors.d

    @property
    def is_batch(self) -> bool:
        """Whether there are K of them."""
        return self.factors.U.dim() == 3

    @property
    def rank(self) -> int:
        """Columns kept: directions whose eigenvalue differs from that of all others (of a batch,
        the most)."""
        return self.factors.rank

    def __len__(self) -> int:
        if not self.is_batch:
            raise TypeError("a single Conceptor has no length")
        return self.factors.U.shape[0]

    def __getitem__(self, k: int) -> Conceptor:
        if not self.is_batch:
            raise TypeError("a single Conceptor cannot be indexed")
        U, s, rest = self.factors
        return self._like(Factors(U[k], s[k], rest), self.aperture)

    def __repr__(self) -> str:
        batch = f"{len(self)} × " if self.is_batch else ""
        quota = ", ".join(f"{q:.4g}" for q in self.quota.flatten().tolist()[:8])
        form = f"rank={self.rank}, rest={self.factors.rest}"
        return f"Conceptor({batch}d={self.d}, {form}, quota={quota}, aperture={self.aperture})"

    @property
    def matrix(self) -> Tensor:
        """(d, d) or (K, d, d), dense, float64."""
        return self.factors.dense()

    @property
    def eigenvalues(self) -> Tensor:
        """(d,) or (K, d), descending."""
        return self.factors.eigenvalues()

    @property
    def quota(self) -> Tensor:
        """trace(C)/d in [0, 1]: the share of the space's dimensions that is kept; () or (K,)."""
        return self.factors.quota()

    def similarity(self, other: Conceptor) -> Tensor:
        """tr(CB)/(‖C‖‖B‖) in [0, 1], Jaeger's similarity; () or (K,). NaN where either is 0."""
        algebra.common(self, other)
        product = (self.matrix * other.matrix).sum((-2, -1))
        norms = [c.eigenvalues.square().sum(-1).sqrt() for c in (self, other)]
        return product / (norms[0] * norms[1])

    def __invert__(self) -> Conceptor:
        return self._like(algebra.complement(self.factors), self.aperture)

    def __and__(self, other: Conceptor) -> Conceptor:
        if not isinstance(other, Conceptor):
            return NotImplemented
        shared = algebra.common(self, other)
        return self._make(algebra.meet(self.factors, other.factors), *shared)

    def __or__(self, other: Conceptor) -> Conceptor:
        if not isinstance(other, Conceptor):
            return NotImplemented
        return ~(~self & ~other)

    def __le__(self, other: Conceptor) -> Tensor:
        if not isinstance(other, Conceptor):
            return NotImplemented
        algebra.common(self, other)
        return torch.linalg.eigvalsh(other.matrix - self.matrix).amin(-1) >= -20 * self.d * EPS

    def scale_aperture(self, gamma: float) -> Conceptor:
        """φ(C, γ) = C (C + γ⁻²(I - C))⁻¹: the aperture becomes α·γ.

        Args:
            gamma: in [0, ∞]. 0 keeps only eigenvalues that are 1, ∞ all that are not 0: both give
                projectors.
        """
        if isinstance(gamma, bool) or not isinstance(gamma, int | float) or not gamma >= 0:
            raise ValueError(f"scale_aperture: gamma must be a number in [0, inf], got {gamma!r}")
        aperture = self.aperture * gamma if self.aperture else 0
        known = 0 < aperture < math.inf
        return self._like(algebra.scaled_aperture(self.factors, gamma), aperture if known else None)

    def low_rank(self, tol: float) -> Truncated:
        """Keep the directions that matter: those whose eigenvalue is at least ``tol`` away from
        that of the rest.

        For a conceptor that is not a negation the rest is 0. The bound returned is attained, and at
        most ``tol``.
        """
        if isinstance(tol, bool) or not isinstance(tol, int | float) or not 0 <= tol <= 1:
            raise ValueError(f"low_rank: tol must be in [0, 1], got {tol!r}")
        factors, bound = algebra.truncated(self.factors, tol)
        return Truncated(self._like(factors, self.aperture), bound)

    def to(self, device: torch.device | str) -> Conceptor:
        """On another device; operands must share theirs."""
        mean = None if self.mean is None else self.mean.to(device)
        return self._make(self.factors.to(device), self.aperture, mean, self.metadata)

    def operator(
        self, dtype: torch.dtype = torch.float32, device: Any = None
    ) -> Tensor | ops.LowRank:
        """What ``ops.conceptor_project`` takes: ``ops.LowRank`` where that is cheaper, else the
        dense matrix."""
        U, s, rest = self.factors
        device = U.device if device is None else torch.device(device)
        key = (dtype, device)
        if key not in self._cache:
            # made under torch.inference_mode(), it could not be saved for a later backward pass
            with torch.inference_mode(False):
                low = rest == 0 and 0 < 2 * self.rank < self.d
                # eigenvectors lie by columns, which every projection would put right anew
                self._cache[key] = (
                    ops.LowRank(U.to(device, dtype).contiguous(), s.to(device, dtype))
                    if low
                    else self.matrix.to(device, dtype)
                )
        return self._cache[key]

    def project(
        self,
        h: Tensor,  # (…, d)
        index: Tensor | None = None,  # (…)
        *,
        beta: float | Tensor = 1.0,
        mean: Tensor | None = None,  # (d,)
    ) -> Tensor:
        """β·C(h - μ) + μ for rows h (…, d), in h's dtype (under autocast, in that one's).

        ``index`` (…) names each row's conceptor of a batch; ``mean`` None takes the conceptor's
        own. Gradients reach h and beta. Errors: see ``ops.conceptor_project``.
        """
        mean = self.mean if mean is None else mean
        if mean is not None:
            mean = beside(self._cache, h, lambda m: m, mean)
        operator = self.operator(h.dtype, h.device)
        return ops.conceptor_project(h, operator, index, beta=beta, mean=mean)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file: U, s, mean, and the metadata in its header."""
        return files.write(path, self.factors, self.aperture, self.mean, self.metadata)

    @classmethod
    @door
    def load(cls, path: str | Path) -> Conceptor:
        """Read what ``save`` wrote. Raises FileNotFoundError, or FileFormatError for anything else
        that is there."""
        return cls._make(*files.read(path))


save = Conceptor.save
load = Conceptor.load
