"""Conceptors: one suite of laws for every form, the algebra against its definitions, fitting, files.

Bounds. With n = d, rounding alone costs n·eps a step (20·n·eps with LAPACK's constant). Where a law compares two
results, each is held to 20·n·eps times the condition of the operations that made it: δ(C ∧ B) = (A C⁻¹) δC (C⁻¹ A) +
(A B⁻¹) δB (B⁻¹ A) gives κ(∧) = max(‖A C⁻¹‖, ‖A B⁻¹‖)² for A = C ∧ B, and φ(·, γ) has max(γ², γ⁻²).
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipsteer import Conceptor, FileFormatError, ops
from clipsteer.conceptors.fit import aperture_sweep, choose_aperture, correlation, spectrum

EPS = torch.finfo(torch.float64).eps


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rand(seed, *shape):
    return torch.randn(*shape, generator=gen(seed), dtype=torch.float64)


def norm(a):
    return torch.linalg.matrix_norm(a, 2)


def kappa(C: Conceptor, B: Conceptor):
    """Condition of C ∧ B. M = B + C - CB gives A C⁻¹ = B M⁻¹ and B⁻¹ A = M⁻¹ C, finite for singular C, B too."""
    c, b = C.matrix, B.matrix
    w, V = torch.linalg.eigh(c + b)
    M = b + c - c @ b + V * (w < 1e-12).unsqueeze(-2) @ V.mT
    sides = [norm(torch.linalg.solve(M, c)), norm(b @ torch.linalg.inv(M)), torch.ones(())]
    sides += [norm(torch.linalg.solve(M.mT, b)), norm(c @ torch.linalg.inv(M.mT))]
    return torch.stack(torch.broadcast_tensors(*sides)).amax(0).square()


def kappa_or(C, B):
    return kappa(~C, ~B)


def assert_same(got: Conceptor, wanted: Conceptor, condition=1.0):
    n = got.d
    error = norm(got.matrix - wanted.matrix)
    bound = 20 * n * EPS * torch.as_tensor(condition, dtype=torch.float64)
    assert bool((error <= bound).all()), f"{error / (n * EPS)} n·eps, condition {condition}"


def assert_conceptor(C: Conceptor):
    n, m = C.d, C.matrix
    values = torch.linalg.eigvalsh(m)
    assert values.min() >= -20 * n * EPS
    assert values.max() <= 1 + 20 * n * EPS
    assert bool((norm(m - m.mT) <= 20 * n * EPS).all())
    s = C.eigenvalues
    assert bool(((s == 0) | (s > n * EPS)).all())
    assert bool(((s == 1) | (s < 1 - n * EPS)).all())


seeds = st.integers(0, 2**32 - 1)
dims = st.sampled_from([1, 2, 3, 7, 12])
logs = st.floats(-1.0, 1.3)
gammas = st.floats(0.3, 3.0)


class ConceptorLaws:
    """What holds for every form. A subclass draws ``three`` conceptors of one aperture."""

    def three(self, seed: int, d: int, aperture: float) -> tuple[Conceptor, Conceptor, Conceptor]:
        raise NotImplementedError

    def constants(self, d):
        return ~Conceptor.identity(d), Conceptor.identity(d)

    @given(seeds, dims, logs)
    def test_and_or_give_conceptors_and_commute(self, seed, d, log_a):
        A, B, _ = self.three(seed, d, 10**log_a)
        for C in (A, B, ~A, A & B, A | B, ~(A & B), A.scale_aperture(2.0)):
            assert_conceptor(C)
        assert_same(A & B, B & A, kappa(A, B))
        assert_same(A | B, B | A, kappa_or(A, B))

    @given(seeds, dims, logs)
    def test_associativity(self, seed, d, log_a):
        A, B, C = self.three(seed, d, 10**log_a)
        first, last = A & B, B & C
        condition = kappa(first, C) * kappa(A, B) + kappa(A, last) * kappa(B, C)
        assert_same(first & C, A & last, condition)
        first, last = A | B, B | C
        condition = kappa_or(first, C) * kappa_or(A, B) + kappa_or(A, last) * kappa_or(B, C)
        assert_same(first | C, A | last, condition)

    @given(seeds, dims, logs)
    def test_negation_and_de_morgan(self, seed, d, log_a):
        A, B, _ = self.three(seed, d, 10**log_a)
        assert_same(~~A, A)
        assert_same(~(A | B), ~A & ~B, kappa_or(A, B))
        assert_same(~(A & B), ~A | ~B, kappa(A, B))
        torch.testing.assert_close((~A).matrix, torch.eye(d, dtype=torch.float64) - A.matrix, rtol=0, atol=20 * d * EPS)

    @given(seeds, dims, logs)
    def test_with_itself_the_aperture_changes_by_the_root_of_two(self, seed, d, log_a):
        A, _, _ = self.three(seed, d, 10**log_a)
        assert_same(A | A, A.scale_aperture(math.sqrt(2)), kappa_or(A, A) + 2)
        assert_same(A & A, A.scale_aperture(1 / math.sqrt(2)), kappa(A, A) + 2)

    @given(seeds, dims, logs, gammas, gammas)
    def test_apertures_add_up_and_multiply(self, seed, d, log_a, a, b):
        A, _, _ = self.three(seed, d, 10**log_a)
        steep = lambda g: max(g**2, g**-2)
        left, right = A.scale_aperture(a), A.scale_aperture(b)
        total = math.sqrt(a * a + b * b)
        assert_same(left | right, A.scale_aperture(total), kappa_or(left, right) * (steep(a) + steep(b)) + steep(total))
        assert_same(left.scale_aperture(b), A.scale_aperture(a * b), steep(a) * steep(b) + steep(a * b))
        assert_same(~left, (~A).scale_aperture(1 / a), steep(a))

    @given(seeds, dims, logs, gammas)
    def test_aperture_distributes_over_and_and_or(self, seed, d, log_a, g):
        A, B, _ = self.three(seed, d, 10**log_a)
        steep = max(g**2, g**-2)
        a, b = A.scale_aperture(g), B.scale_aperture(g)
        assert_same((A & B).scale_aperture(g), a & b, steep * (kappa(A, B) + kappa(a, b)))
        assert_same((A | B).scale_aperture(g), a | b, steep * (kappa_or(A, B) + kappa_or(a, b)))

    @given(seeds, dims, logs)
    def test_zero_and_identity(self, seed, d, log_a):
        A, _, _ = self.three(seed, d, 10**log_a)
        zero, one = self.constants(d)
        assert_same(A & one, A)
        assert_same(A | zero, A)
        assert_same(A & zero, zero)
        assert_same(A | one, one)

    @given(seeds, dims, logs)
    def test_order(self, seed, d, log_a):
        A, B, _ = self.three(seed, d, 10**log_a)
        zero, one = self.constants(d)
        slack = 20 * d * EPS
        assert bool((torch.linalg.eigvalsh(A.matrix - (A & B).matrix).amin(-1) >= -slack * kappa(A, B)).all())
        assert bool((torch.linalg.eigvalsh((A | B).matrix - A.matrix).amin(-1) >= -slack * kappa_or(A, B)).all())
        for low, high in ((A, A), (zero, A), (A, one), (A, A.scale_aperture(2.0))):
            assert (low <= high).all()
        assert not ((A.scale_aperture(2.0) <= A) & (A.scale_aperture(2.0).quota > A.quota + 1e-6)).any()

    @given(seeds, dims, logs)
    def test_limits_of_the_aperture_are_projectors(self, seed, d, log_a):
        A, _, _ = self.three(seed, d, 10**log_a)
        s = A.eigenvalues
        torch.testing.assert_close(A.scale_aperture(0).eigenvalues, (s == 1).double())
        torch.testing.assert_close(A.scale_aperture(math.inf).eigenvalues, (s > 0).double())
        for P in (A.scale_aperture(0), A.scale_aperture(math.inf)):
            assert_same(P.scale_aperture(3.0), P)
            assert_same(P & P, P)
            assert_same(P | P, P)
        assert_same(A.scale_aperture(1), A)

    @given(seeds, dims, logs)
    def test_quota_eigenvalues_similarity(self, seed, d, log_a):
        A, B, _ = self.three(seed, d, 10**log_a)
        for C in (A, ~A):
            self.assert_figures(C, B)

    def assert_figures(self, A, B):
        d, m, b = A.d, A.matrix, B.matrix
        trace = torch.diagonal(m, dim1=-2, dim2=-1).sum(-1)
        torch.testing.assert_close(A.quota, trace / d, rtol=0, atol=20 * d * EPS)
        torch.testing.assert_close(A.eigenvalues, torch.linalg.eigvalsh(m).flip(-1), rtol=0, atol=20 * d * EPS)
        fro = torch.linalg.matrix_norm
        expected = torch.diagonal(m @ b, dim1=-2, dim2=-1).sum(-1) / (fro(m) * fro(b))
        torch.testing.assert_close(A.similarity(B), expected, rtol=1e-9, atol=1e-12, equal_nan=True)

    @given(seeds, dims, logs, st.floats(0.0, 1.0))
    def test_low_rank_error_is_attained_and_within_the_tolerance(self, seed, d, log_a, tol):
        A, _, _ = self.three(seed, d, 10**log_a)
        for C in (A, ~A):
            low, bound = C.low_rank(tol)
            error = norm(C.matrix - low.matrix).amax()
            assert bound <= tol
            assert abs(float(error) - bound) <= 20 * d * EPS
            assert low.rank <= C.rank

    @given(seeds, dims, logs)
    def test_project_is_the_matrix_product(self, seed, d, log_a):
        A, _, _ = self.three(seed, d, 10**log_a)
        h, mean = rand(seed, 5, d), rand(seed + 1, d)
        index = torch.randint(0, len(A), (5,), generator=gen(seed)) if A.is_batch else None
        scale = float(norm(h - mean)) + float(mean.norm())
        for C in (A, ~A):
            rows = C.matrix[index] if C.is_batch else C.matrix
            expected = 0.5 * (rows @ (h - mean).unsqueeze(-1)).squeeze(-1) + mean
            got = C.project(h, index, beta=0.5, mean=mean)
            torch.testing.assert_close(got, expected, rtol=0, atol=20 * d * EPS * scale)

    def test_save_and_load_give_the_same_bits(self, tmp_path):
        A, _, _ = self.three(5, 7, 2.0)
        A = A._make(A.factors, A.aperture, rand(1, 7), {"clip_model": "emojiclip"})
        back = Conceptor.load(A.save(tmp_path / "sub" / "c.safetensors"))
        assert torch.equal(back.matrix, A.matrix)
        assert torch.equal(back.mean, A.mean)
        assert (back.aperture, back.metadata, back.rank) == (A.aperture, A.metadata, A.rank)


def shared_subspaces(seed, d, shared, own):
    """Three bases (r, d) that have ``shared`` directions in common and ``own`` of their own each."""
    common = rand(seed, shared, d)
    return [torch.cat([common, rand(seed + 1 + i, own, d)]) for i in range(3)]


def skewed(seed, n, d):
    """Rows whose directions differ in size by up to a hundred, in axes of their own."""
    sizes = torch.logspace(0, -2, d, dtype=torch.float64)
    return rand(seed, n, d) * sizes @ torch.linalg.qr(rand(seed + 1000, d, d)).Q


class TestDense(ConceptorLaws):
    def three(self, seed, d, aperture):
        return tuple(Conceptor.fit(skewed(seed + i, 4 * d, d) * (0.5 + i), aperture) for i in range(3))


class TestLowRank(ConceptorLaws):
    """N < d rows: singular, with ranges that meet in a subspace of their own."""

    def three(self, seed, d, aperture):
        shared, own = max(1, d // 6), d // 6
        bases = shared_subspaces(seed, d, shared, own)
        return tuple(
            Conceptor.fit(rand(seed + 9 + i, 2 * (shared + own), shared + own) @ basis / d**0.5, aperture)
            for i, basis in enumerate(bases)
        )

    def test_the_form_is_low_rank_and_stays_so(self):
        A, B, C = self.three(0, 12, 1.0)
        assert (A.rank, B.rank) == (4, 4)
        assert (A & B).rank == 2
        assert (A | B).rank == 6
        assert (~A).rank == 4
        assert (~A & ~B).rank == 6
        assert (A & ~B).rank <= 6
        assert isinstance(A.operator(), ops.LowRank)


class TestTruncated(ConceptorLaws):
    """The low-rank form of full-rank conceptors, and complements of it."""

    def three(self, seed, d, aperture):
        full = TestDense().three(seed, d, aperture)
        low = [c.low_rank(float(c.eigenvalues[d // 2])).conceptor for c in full]
        return low[0], ~low[1], low[2]


class TestBatched(ConceptorLaws):
    """K = 3 conceptors of different ranks side by side; the constants broadcast."""

    def three(self, seed, d, aperture):
        columns = [TestDense().three(seed, d, aperture), TestLowRank().three(seed + 50, d, aperture),
                   TestTruncated().three(seed + 99, d, aperture)]  # fmt: skip
        return tuple(Conceptor.stack([column[i] for column in columns]) for i in range(3))

    def test_equals_one_by_one(self):
        A, B, _ = self.three(3, 7, 2.0)
        for op in (lambda a, b: a & b, lambda a, b: a | b, lambda a, b: ~a & b.scale_aperture(2.0)):
            together = op(A, B)
            for k in range(3):
                assert_same(together[k], op(A[k], B[k]), kappa(A[k], B[k]) + kappa_or(A[k], B[k]) + kappa(~A[k], B[k]))
        single = A & B[0]
        assert_same(single[1], A[1] & B[0], kappa(A[1], B[0]))


# ---------------------------------------------------------------- against the definitions


@given(seeds, st.sampled_from([1, 2, 3, 5]), st.floats(-1.0, 2.0), st.floats(-1.0, 2.0))
def test_and_equals_its_definition_in_sixty_digits(seed, d, log_a, log_b):
    """Regular matrices of different apertures, so that the inverses exist."""
    import mpmath

    A = Conceptor.fit(rand(seed, 3 * d, d), 10**log_a)
    B = Conceptor.fit(rand(seed + 1, 3 * d, d) @ rand(seed + 2, d, d), 10**log_b)
    with mpmath.workdps(60):
        exact = lambda c: mpmath.matrix(c.matrix.tolist())
        wanted = (exact(A) ** -1 + exact(B) ** -1 - mpmath.eye(d)) ** -1
        wanted = torch.tensor([[float(wanted[i, j]) for j in range(d)] for i in range(d)], dtype=torch.float64)
    assert norm((A & B).matrix - wanted) <= 20 * d * EPS * kappa(A, B)


@given(seeds, st.integers(1, 3), st.integers(1, 3), st.floats(-0.5, 1.0))
def test_and_of_singular_matrices_equals_the_formula_on_the_common_range(seed, shared, own, log_a):
    """P (Pᵀ (C⁺ + B⁺ - I) P)⁻¹ Pᵀ with P an orthonormal basis of range(C) ∩ range(B), here known beforehand."""
    d = shared + 2 * own + 2
    bases = shared_subspaces(seed, d, shared, own)
    r = shared + own
    C, B = (Conceptor.fit(rand(seed + 9 + i, 3 * r, r) @ bases[i], 10**log_a) for i in range(2))
    P = torch.linalg.qr(bases[0][:shared].mT).Q
    inverse = lambda c: c.factors.U / c.factors.s @ c.factors.U.mT
    middle = P.mT @ (inverse(C) + inverse(B)) @ P - torch.eye(shared, dtype=torch.float64)
    wanted = P @ torch.linalg.inv(middle) @ P.mT
    # the formula itself loses as much as its inverses do
    condition = kappa(C, B) + 1 / (C.factors.s.min() * B.factors.s.min()) ** 2
    assert norm((C & B).matrix - wanted) <= 20 * d * EPS * condition
    assert (C & B).rank == shared


@given(seeds, st.floats(-11.0, -6.0))
def test_tiny_eigenvalues_do_not_spoil_large_ones(seed, log_least):
    """Inverting C and B first would lose eps/least: up to 1e-5 here."""
    d = 8
    s = torch.logspace(-0.01, log_least, d, dtype=torch.float64)
    C = Conceptor.from_factors(torch.linalg.qr(rand(seed, d, d)).Q, s)
    # the inputs' own rounding of the least eigenvalues leaves ∧ with itself well-conditioned
    assert_same(C & C, C.scale_aperture(math.sqrt(0.5)), 4)
    assert_same(~C | ~C, (~C).scale_aperture(math.sqrt(2)), 4)


@pytest.mark.parametrize("d", [3, 9])  # dense, and in the joint span
@pytest.mark.parametrize("angle", [1e-3, 1e-5, 1e-6, 1e-7])
def test_one_uncertain_direction_leaves_the_others_alone(d, angle):
    """Two directions all but in line, which do not meet, beside one in common: c ∧ c = c/(2 - c) there, exactly."""
    e = torch.eye(d, dtype=torch.float64)
    turned = math.cos(angle) * e[0] + math.sin(angle) * e[1]
    s = torch.tensor([1, 1e-3], dtype=torch.float64)
    C, B = (Conceptor.from_factors(torch.stack([u, e[2]], 1), s) for u in (e[0], turned))
    both = C & B
    assert both.rank == 1
    assert abs(float(both.eigenvalues[0]) - 1e-3 / (2 - 1e-3)) <= 20 * d * EPS
    assert abs(float(both.factors.U[2, 0].abs()) - 1) <= 20 * d * EPS


def test_ranges_that_do_not_meet_give_zero():
    C = Conceptor.fit(rand(0, 2, 9), 3.0)
    B = Conceptor.fit(rand(1, 3, 9), 3.0)
    assert norm((C & B).matrix) <= 20 * 9 * EPS * kappa(C, B)
    a, b = torch.eye(4, dtype=torch.float64)[:2], torch.eye(4, dtype=torch.float64)[2:]
    assert (Conceptor.fit(a, 1.0) & Conceptor.fit(b, 1.0)).rank == 0
    assert (C & B).rank == 0


@given(seeds, dims, st.floats(-1.0, 1.0), st.booleans())
def test_or_is_the_conceptor_of_the_summed_correlations(seed, d, log_a, wide):
    """Not de Morgan again: O (R₁ + R₂ + α⁻² I) = R₁ + R₂, by its backward residual."""
    alpha = 10**log_a
    rows = 3 * d if wide else max(1, d // 2)
    R1, R2 = correlation(rand(seed, rows, d)), correlation(rand(seed + 1, rows, d) * 0.7)
    C, B = Conceptor.from_correlation(R1, alpha), Conceptor.from_correlation(R2, alpha)
    O = (C | B).matrix
    A = R1 + R2 + alpha**-2 * torch.eye(d, dtype=torch.float64)
    assert norm(O @ A - R1 - R2) <= 20 * d * EPS * norm(A)


@given(seeds, dims, logs)
def test_fit_solves_its_equation(seed, d, log_a):
    alpha, x = 10**log_a, rand(seed, d + 3, d)
    R = x.mT @ x / len(x)
    C = Conceptor.fit(x, alpha)
    A = R + alpha**-2 * torch.eye(d, dtype=torch.float64)
    assert norm(C.matrix @ A - R) <= 20 * d * EPS * norm(A)
    # it minimises E‖x - Cx‖² + α⁻²‖C‖²: no small step is better
    loss = lambda m: (x - x @ m).square().sum(-1).mean() + alpha**-2 * m.square().sum()
    for i in range(3):
        step = 1e-3 * rand(seed + i, d, d)
        assert loss(C.matrix) < loss(C.matrix + step)


# ---------------------------------------------------------------- fitting


def test_streaming_centring_and_classes_agree_with_one_pass():
    x, mean = rand(0, 60, 6).float() + 2, rand(1, 6)
    labels = torch.randint(-1, 3, (60,), generator=gen(2))
    wide = x.double() - mean
    torch.testing.assert_close(correlation(x, mean=mean), wide.mT @ wide / 60)
    torch.testing.assert_close(correlation(iter(x.split(7)), mean=mean), correlation(x, mean=mean))
    torch.testing.assert_close(correlation(x.view(3, 20, 6)), correlation(x))
    by_class = correlation(x, mean=mean, labels=labels)
    streamed = correlation(zip(x.split(7), labels.split(7)), mean=mean, classes=3)
    for k in range(3):
        rows = wide[labels == k]
        torch.testing.assert_close(by_class[k], rows.mT @ rows / len(rows))
    torch.testing.assert_close(streamed, by_class)
    C = Conceptor.fit(x, 0.7, mean=mean, labels=labels)
    assert len(C) == 3
    one = Conceptor.fit(x[labels == 1], 0.7, mean=mean)
    assert_same(C[1], one)
    assert torch.equal(C[1].mean, mean)
    torch.testing.assert_close(
        C.project(x.double(), labels.clamp(min=0))[labels == 1], one.project(x[labels == 1].double())
    )


def test_fewer_rows_than_dimensions_leave_no_noise():
    C = Conceptor.fit(1e3 * rand(0, 4, 40), 1e4)
    assert C.rank == 4
    assert C.quota <= 0.1


def test_extreme_apertures_give_the_limits():
    x = rand(0, 4, 9)
    for alpha in (1e170, 1e300):
        C = Conceptor.fit(x, alpha)
        assert (C.rank, float(C.eigenvalues[3])) == (4, 1.0)
        assert abs(float(C.quota) - 4 / 9) <= 20 * 9 * EPS
        assert aperture_sweep(correlation(x), [alpha])[0].error == 0
    assert Conceptor.fit(x, 1e-170).rank == 0
    assert aperture_sweep(correlation(x), [1e-170])[0].quota == 0
    C = Conceptor.fit(x, 1.0)
    assert torch.equal(C.scale_aperture(1e200).eigenvalues, C.scale_aperture(math.inf).eigenvalues)
    assert torch.equal((~C).scale_aperture(1e-200).eigenvalues, (~C).scale_aperture(0).eigenvalues)


def test_gradient_criterion_peaks_and_quota_is_met():
    R = correlation(rand(0, 200, 8) * torch.tensor([9, 8, 7, 6, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64))
    best = choose_aperture(R)
    around = [r.gradient for r in aperture_sweep(R, [best / 1.2, best, best * 1.2])]
    assert around[1] > max(around[0], around[2])
    # d‖C‖²/d log α by differences
    size = lambda a: float(Conceptor.from_correlation(R, a).eigenvalues.square().sum())
    numeric = (size(best * math.exp(1e-4)) - size(best * math.exp(-1e-4))) / 2e-4
    assert abs(numeric - around[1]) < 1e-5 * around[1]
    assert Conceptor.fit(rand(0, 9, 3)).aperture == choose_aperture(correlation(rand(0, 9, 3)))
    for quota in (0.05, 0.5, 0.9):
        assert abs(float(Conceptor.from_correlation(R, choose_aperture(R, quota)).quota) - quota) < 1e-6


def test_sweep_is_monotone_and_its_error_is_the_data_s():
    x = rand(0, 50, 5) * torch.tensor([3.0, 2, 1, 0.5, 0.1], dtype=torch.float64)
    rows = aperture_sweep(correlation(x))
    assert len(rows) >= 4
    assert all(a.quota < b.quota and a.error > b.error for a, b in itertools.pairwise(rows))
    assert rows[0].quota < 0.1 < 0.9 < rows[-1].quota
    row = aperture_sweep(correlation(x), [0.5])[0]
    C = Conceptor.fit(x, 0.5)
    assert abs(row.error - float((x - C.project(x)).square().sum() / x.square().sum())) < 1e-12
    assert abs(row.quota - float(C.quota)) < 1e-12


WORKER = """
import sys, torch
import torch.distributed as dist
from clipsteer import Conceptor
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2] + "/meeting", rank=rank, world_size=2)
x = torch.load(sys.argv[2] + "/rows.pt", weights_only=True)
mine = x[rank::2] if rank == 0 else x[rank::2].split(4)
Conceptor.fit(mine, 0.8).save(f"{sys.argv[2]}/all-{rank}.safetensors")
labels = torch.arange(len(x)) % 3
pair = (x[rank::2], labels[rank::2])
Conceptor.fit([pair], 0.8, classes=3).save(f"{sys.argv[2]}/classes-{rank}.safetensors")
# sorted by class, so that each process has classes that the other has not; K is that of all
half = slice(0, 15) if rank == 0 else slice(15, None)
labels = torch.arange(len(x)) // 8
Conceptor.fit(x[half], 0.8, labels=labels[half]).save(f"{sys.argv[2]}/sorted-{rank}.safetensors")
dist.destroy_process_group()
"""


def test_two_processes_fit_what_one_does(tmp_path):
    x = rand(0, 31, 5)
    torch.save(x, tmp_path / "rows.pt")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(tmp_path)], env=environment) for rank in (0, 1)
    ]
    assert [w.wait(timeout=600) for w in workers] == [0, 0]
    for rank in (0, 1):
        assert_same(Conceptor.load(tmp_path / f"all-{rank}.safetensors"), Conceptor.fit(x, 0.8))
        classes = Conceptor.load(tmp_path / f"classes-{rank}.safetensors")
        assert_same(classes, Conceptor.fit(x, 0.8, labels=torch.arange(31) % 3))
        ordered = Conceptor.load(tmp_path / f"sorted-{rank}.safetensors")
        assert_same(ordered, Conceptor.fit(x, 0.8, labels=torch.arange(31) // 8))


# ---------------------------------------------------------------- mistakes and files


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Conceptor.fit(rand(0, 3, 2), 0.0), "aperture must be a finite number above 0"),
        (lambda: Conceptor.fit(rand(0, 3, 2), math.inf), "aperture must be"),
        (lambda: Conceptor.fit(rand(0, 3), 1.0), r"shape \(…, d\)"),
        (lambda: Conceptor.fit(torch.ones(3, 2, dtype=torch.int64), 1.0), "floating"),
        (lambda: Conceptor.fit([], 1.0), "no batch"),
        (lambda: Conceptor.fit(torch.zeros(0, 3), 1.0), "no row"),
        (lambda: Conceptor.fit(torch.full((2, 3), math.nan), 1.0), "not finite"),
        (lambda: Conceptor.fit(torch.zeros(4, 3)), "every row is zero"),
        (lambda: Conceptor.fit([rand(0, 3, 2), rand(0, 3, 4)], 1.0), r"shape \(…, 2\)"),
        (lambda: Conceptor.fit(rand(0, 3, 2), 1.0, mean=torch.zeros(3)), r"mean must be.*\(2,\)"),
        (lambda: Conceptor.fit(rand(0, 3, 2), 1.0, labels=torch.tensor([0, 2, 2])), r"no row of classes \[1\]"),
        (lambda: Conceptor.fit(rand(0, 3, 2), 1.0, labels=torch.tensor([0, 1, 5]), classes=2), r"\[-1, 2\)"),
        (lambda: Conceptor.fit([rand(0, 3, 2)], 1.0, classes=2), "pairs"),
        (lambda: Conceptor(2 * torch.eye(2)), "eigenvalues must be in"),
        (lambda: Conceptor(torch.tensor([[0.5, 0.2], [0.0, 0.5]])), "symmetric"),
        (lambda: Conceptor(torch.eye(2)[:1]), "square"),
        (lambda: Conceptor.from_factors(torch.ones(3, 2), torch.ones(2)), "orthonormal"),
        (lambda: Conceptor.from_factors(torch.eye(3)[:, :2], torch.tensor([0.5, 1.5])), r"\[0, 1\]"),
        (lambda: Conceptor.identity(2) & Conceptor.identity(3), "share d"),
        (lambda: Conceptor.fit(rand(0, 3, 2), 1.0) & Conceptor.fit(rand(0, 3, 2), 1.0, mean=torch.ones(2)), "centred"),
        (lambda: Conceptor.identity(2).scale_aperture(-1.0), "gamma"),
        (lambda: Conceptor.identity(2).low_rank(2.0), "tol"),
        (lambda: aperture_sweep(-torch.eye(3)), "positive semi-definite"),
        (lambda: choose_aperture(torch.eye(3), quota=1.0), "quota"),
        (lambda: spectrum(torch.ones(3)), "shape"),
        (lambda: Conceptor.stack([]), "at least one"),
    ],
)  # fmt: skip
def test_mistakes_are_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("rows", [3, 40])  # low rank and dense
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fitted_inside", [False, True])
def test_use_under_inference_mode_leaves_gradients_possible(rows, dtype, fitted_inside):
    with torch.inference_mode(fitted_inside):
        C = Conceptor.fit(rand(0, rows, 9), 0.7, mean=rand(1, 9))
    with torch.inference_mode():
        expected = C.project(rand(2, 4, 9).to(dtype))
    h = rand(2, 4, 9).to(dtype).requires_grad_()
    beta = torch.ones(1, dtype=dtype, requires_grad=True)
    got = C.project(h, beta=beta)
    got.sum().backward()
    assert torch.equal(got, expected)
    wanted = C.matrix.sum(0).expand(4, 9).to(dtype)
    torch.testing.assert_close(h.grad, wanted)
    assert beta.grad.abs() > 0


def test_projecting_compiles_whole():
    C, x = Conceptor.fit(rand(0, 30, 9), 0.7, mean=rand(1, 9)), rand(2, 4, 9)
    compiled = torch.compile(lambda h: C.project(h), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), C.project(x))


def test_the_constants_among_themselves():
    one, zero = Conceptor.identity(5), ~Conceptor.identity(5)
    assert [float(c.quota) for c in (one & zero, one | zero, zero & zero, zero | zero, one & one)] == [0, 1, 0, 0, 1]
    assert zero <= one
    assert not one <= zero
    assert torch.equal(zero.project(torch.ones(2, 5), mean=torch.full((5,), 3.0)), torch.full((2, 5), 3.0))
    moved = Conceptor.fit(rand(0, 3, 5), 1.0, mean=rand(1, 5)).to("cpu")
    assert torch.equal(moved.mean, rand(1, 5))


def test_other_mistakes():
    C = Conceptor.fit(rand(0, 3, 2), 1.0)
    for call in (lambda: C & 3, lambda: C | None, lambda: C <= 1, lambda: len(C), lambda: C[0]):
        with pytest.raises(TypeError):
            call()


def test_aperture_and_mean_travel_with_the_algebra():
    mean = rand(9, 4)
    C, B = (Conceptor.fit(rand(i, 9, 4), 0.5, mean=mean, metadata={"hook_point": "h", "i": str(i)}) for i in (0, 1))
    both = C & ~B
    assert both.aperture == 0.5
    assert torch.equal(both.mean, mean)
    assert both.metadata == {"hook_point": "h"}
    assert (C | B.scale_aperture(2.0)).aperture is None
    assert C.scale_aperture(2.0).aperture == 1.0
    assert torch.equal((Conceptor.identity(4) & C).mean, mean)
    assert "quota" in repr(C)


def test_files_that_are_not_conceptors_are_refused(tmp_path):
    from clipsteer.io.files import write_safetensors

    C = Conceptor.fit(rand(0, 9, 4), 0.5)
    good = C.save(tmp_path / "c.safetensors").read_bytes()
    size = int.from_bytes(good[:8], "little")
    head = json.loads(good[8 : 8 + size])["__metadata__"]
    bad = {
        "truncated": good[:-5],
        "empty": b"",
        "foreign": None,
        "range": {"U": torch.eye(4).double(), "s": torch.full((4,), 1.5).double()},
        "skew": {"U": torch.ones(4, 4).double(), "s": torch.ones(4).double()},
        "shape": {"U": torch.eye(4).double(), "s": torch.ones(3).double()},
        "nan": {"U": torch.full((4, 4), math.nan).double(), "s": torch.ones(4).double()},
        "infinite": {
            "U": torch.eye(4).double(),
            "s": torch.ones(4).double(),
            "mean": torch.full((4,), math.inf).double(),
        },
        "nothing": {"U": torch.zeros(0, 4, 2).double(), "s": torch.zeros(0, 2).double()},
        "single": {"U": torch.eye(4), "s": torch.ones(4)},
        "wide": {"U": torch.zeros(1, 300_000).double(), "s": torch.ones(300_000).double()},
        "extra": {"U": torch.eye(4).double(), "s": torch.ones(4).double(), "W": torch.ones(1).double()},
    }
    for name, content in bad.items():
        path = tmp_path / f"{name}.safetensors"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            write_safetensors(path, content or {"U": torch.eye(2).double()}, head if content else None)
        with pytest.raises(FileFormatError, match=name):
            Conceptor.load(path)
    for change in ({"rest": "2"}, {"aperture": "-1"}, {"format_version": "9"}):
        write_safetensors(tmp_path / "c.safetensors", {"U": torch.eye(4).double(), "s": torch.ones(4).double()},
                          {**head, **change})  # fmt: skip
        with pytest.raises(FileFormatError):
            Conceptor.load(tmp_path / "c.safetensors")
    with pytest.raises(FileNotFoundError):
        Conceptor.load(tmp_path / "none.safetensors")
