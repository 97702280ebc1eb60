"""Class statistics against NumPy, shrinkage by hand, factors by their residual, compression by its error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from _command import in_processes
from clipsteer import FileFormatError, ops
from clipsteer.conceptors import Conceptor
from clipsteer.continual.covariance import ClassStatistics, compress, precision_factor, shrink

EPS = 2.0**-52


def rows(n: int, d: int, seed: int = 0, offset: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=g, dtype=torch.float64)
    return (torch.randn(n, d, generator=g, dtype=torch.float64) @ mixing + offset) * scale


def assert_equals_numpy(stats: ClassStatistics, x: torch.Tensor, labels: torch.Tensor) -> None:
    for c in range(len(stats.count)):
        mine = x[labels == c].double()
        n, d = mine.shape
        assert int(stats.count[c]) == n
        if n:
            # a sum of n terms, and as many merges
            size = mine.abs().amax(0)
            assert bool(((stats.mean[c] - mine.mean(0)).abs() <= 4 * n * EPS * size).all())
        if n < 2:
            assert not stats.covariance()[c].any()
            continue
        expected = torch.from_numpy(np.cov(mine.numpy(), rowvar=False).reshape(d, d))
        deviation = (mine - mine.mean(0)).abs().amax(0)
        # products of deviations, which know their mean to n·eps of the largest value
        reach = deviation + 4 * n * EPS * mine.abs().amax(0)
        bound = 8 * n * EPS * (torch.outer(reach, reach) + 2 * torch.outer(mine.abs().amax(0), reach))
        assert bool(((stats.covariance()[c] - expected).abs() <= bound + 1e-300).all())


@given(
    seed=st.integers(0, 2**31), n=st.integers(0, 60), d=st.integers(1, 7), C=st.integers(1, 5),
    offset=st.sampled_from([0.0, 1e6]), scale=st.sampled_from([1e-30, 1.0, 1e30]),
    cuts=st.lists(st.integers(0, 60), max_size=5), split=st.integers(0, 6),
)  # fmt: skip
def test_batches_and_merges_in_any_order_equal_numpy(seed, n, d, C, offset, scale, cuts, split):
    x = rows(n, d, seed, offset, scale)
    labels = torch.randint(-1, C, (n,), generator=torch.Generator().manual_seed(seed + 1))
    edges = [0, *sorted(min(c, n) for c in cuts), n]
    first, second = ClassStatistics(C, d), ClassStatistics(C, d)
    for number, (a, b) in enumerate(zip(edges[-2::-1], edges[:0:-1])):
        (first if number < split else second).update(x[a:b], labels[a:b])
    assert_equals_numpy(first.merge(second), x, labels)


def test_float32_features_are_summed_in_float64():
    x = rows(400, 5, offset=1e4).float()
    labels = torch.arange(400) % 3
    assert_equals_numpy(ClassStatistics(3, 5).update(x, labels), x, labels)


def test_save_and_load_keep_every_bit(tmp_path):
    stats = ClassStatistics(4, 5).update(rows(50, 5), torch.arange(50) % 3)
    again = ClassStatistics.load(stats.save(tmp_path / "deep" / "stats.safetensors"))
    for name in ("count", "mean", "scatter"):
        assert torch.equal(getattr(stats, name), getattr(again, name))
    assert int(again.update(rows(1, 5), torch.tensor([3])).count[3]) == 1


def test_foreign_and_damaged_files_are_refused(tmp_path):
    from clipsteer.io.files import write_safetensors

    path = ClassStatistics(2, 3).update(rows(9, 3), torch.arange(9) % 2).save(tmp_path / "stats.safetensors")
    whole = path.read_bytes()
    head = {"format": "clipsteer-class-statistics", "format_version": "1"}
    good = {"count": torch.tensor([1, 2]), "mean": torch.zeros(2, 3).double(), "scatter": torch.zeros(2, 3, 3).double()}
    for tensors, metadata in (
        (good, {}),
        (good, {**head, "format_version": "2"}),
        ({**good, "count": torch.tensor([1, -2])}, head),
        ({**good, "mean": good["mean"].float()}, head),
        ({**good, "mean": good["mean"] + float("nan")}, head),
        ({**good, "scatter": torch.zeros(2, 3, 4).double()}, head),
        ({"mean": good["mean"]}, head),
        ({"count": good["count"]}, head),
    ):
        write_safetensors(path, tensors, metadata)
        with pytest.raises(FileFormatError, match=r"stats\.safetensors"):
            ClassStatistics.load(path)
    path.write_bytes(whole[:-5])
    with pytest.raises(FileFormatError, match=r"stats\.safetensors"):
        ClassStatistics.load(path)
    with pytest.raises(FileNotFoundError):
        ClassStatistics.load(tmp_path / "nothing")


WORKER = """
import os, sys, torch
from clipsteer.continual.covariance import ClassStatistics
torch.set_num_threads(1)
rank, out = int(os.environ["RANK"]), sys.argv[1]
saved = torch.load(out + "/rows.pt", weights_only=True)
x, labels = saved["x"], saved["labels"]
mine = slice(0, 40) if rank == 0 else slice(40, 150)
part = ClassStatistics(5, 6).update(x[mine], labels[mine])
part.all_reduce().save(f"{out}/joint-{rank}.safetensors")
"""


@pytest.mark.slow
def test_two_processes_equal_numpy_on_all_rows(tmp_path):
    """Class 3 is seen by one process alone, class 4 by none."""
    x, labels = rows(150, 6, offset=100.0), torch.arange(150) % 3
    labels[100:110] = 3
    torch.save({"x": x, "labels": labels}, tmp_path / "rows.pt")
    in_processes(WORKER, tmp_path)
    for rank in (0, 1):
        assert_equals_numpy(ClassStatistics.load(tmp_path / f"joint-{rank}.safetensors"), x, labels)


@given(
    seed=st.integers(0, 2**31), d=st.integers(1, 8), n=st.integers(2, 30), g1=st.floats(0, 20), share=st.floats(0, 1)
)
def test_shrinkage_by_hand_and_always_positive_definite(seed, d, n, g1, share):
    S = torch.from_numpy(np.cov(rows(n, d, seed).numpy(), rowvar=False).reshape(1, d, d))
    g2 = g1 * share
    expected = S[0].clone()
    diagonal = sum(float(S[0, i, i]) for i in range(d)) / d
    off = sum(float(S[0, i, j]) for i in range(d) for j in range(d) if i != j) / max(d * (d - 1), 1)
    for i in range(d):
        for j in range(d):
            expected[i, j] += g1 * diagonal + 1e-3 if i == j else g2 * off
    out = shrink(S, g1, g2)
    torch.testing.assert_close(out[0], expected, rtol=1e-12, atol=1e-12 * diagonal)
    lowest = float(torch.linalg.eigvalsh(out[0])[0])
    assert lowest >= 1e-3 - 20 * d * EPS * float(out.abs().sum())


def factor_residual(S: torch.Tensor, L: torch.Tensor, ridge: float) -> float:
    """‖L Lᵀ S − (I + ridge S)‖ over what d·eps of its factors make of it, below 20."""
    d = S.shape[-1]
    eye = torch.eye(d, dtype=torch.float64)
    error = torch.linalg.matrix_norm(L @ L.mT @ S - eye - ridge * S)
    return float((error / (torch.linalg.matrix_norm(L) ** 2 * torch.linalg.matrix_norm(S) * d * EPS)).max())


@given(seed=st.integers(0, 2**31), d=st.integers(1, 24), C=st.integers(0, 3), n=st.integers(1, 40))
def test_factor_is_one_of_the_precision(seed, d, C, n):
    x = rows(max(C, 1) * n, d, seed)
    stats = ClassStatistics(C, d).update(x[: C * n], torch.arange(C * n) % max(C, 1))
    S = shrink(stats.covariance())
    L, jitter = precision_factor(S)
    assert L.shape == S.shape
    assert jitter.shape == (C,)
    assert not jitter.any()
    assert torch.equal(L, L.tril())
    if C:
        assert factor_residual(S, L, 1e-6) < 20
        assert precision_factor(S[0]).L.shape == (d, d)


@pytest.mark.parametrize("d", [3, 12, 64])
def test_a_singular_covariance_raises(d):
    x = rows(400, d, seed=3)
    twice, constant, few = x.clone(), x.clone(), x[: d - 1]
    twice[:, 1] = x[:, 0] - 2 * x[:, 2]
    constant[:, 1] = 7.0
    for data in (twice, constant, few, few[:2]):
        for dtype in (torch.float64, torch.float32):
            for shift in range(4):  # rounding falls another way each time
                S = torch.cov((data + shift).T.to(dtype))
                if dtype == torch.float32 and bool(torch.linalg.eigvalsh(S.double())[0] > 1e-12):
                    continue  # what rounding made of it is positive definite
                with pytest.raises(ValueError, match=r"matrices \[1\] are not, beyond rounding.*shrink"):
                    precision_factor(torch.stack([torch.eye(d, dtype=dtype), S]))
    indefinite = torch.diag(torch.tensor([1.0, 1.0, -0.01])).double()
    with pytest.raises(ValueError, match=r"positive definite, matrices \[1\] are not.*-0\.01 to 1.*shrink"):
        precision_factor(torch.stack([torch.eye(3).double(), indefinite]))
    with pytest.raises(ValueError, match="positive definite"):
        precision_factor(torch.zeros(1, d, d))
    with pytest.raises(ValueError, match="finite"):
        precision_factor(torch.full((d, d), float("nan")))


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_a_covariance_of_uneven_scales_is_not_singular(scale):
    """A feature in other units has a small variance and is as well determined as the others."""
    S = torch.cov(rows(50, 6, seed=1).T)
    units = scale * torch.logspace(-9, 9, 6, dtype=torch.float64)
    L, jitter = precision_factor(S * units * units[:, None], ridge=0.0)
    assert not jitter.any()
    torch.testing.assert_close(L @ L.mT * units * units[:, None], torch.linalg.inv(S), rtol=1e-9, atol=1e-9)
    # nearly singular, with digits left
    near = torch.eye(2).double() + (1 - 1e-9) * (1 - torch.eye(2).double())
    assert float(precision_factor(near).L[0, 0] ** 2) == pytest.approx(0.5e9, rel=1e-6)


def test_what_an_op_takes_at_every_step_is_contiguous():
    S = shrink(torch.cov(rows(50, 24, seed=1).T).expand(3, 24, 24))
    L = precision_factor(S).L.float()
    assert L.is_contiguous()
    assert all(part.is_contiguous() for part in compress(S, 3))
    fitted = Conceptor.fit(rows(6, 24, seed=1), 1.0)
    for operator in (fitted.operator(), fitted.operator(torch.float64), Conceptor.fit(rows(50, 24, seed=1)).operator()):
        parts = operator if isinstance(operator, tuple) else (operator,)
        assert all(part.is_contiguous() for part in parts)
    assert isinstance(fitted.operator(), ops.LowRank)


def dense(c) -> torch.Tensor:
    return torch.diag_embed(c.diag) + c.U * c.s.unsqueeze(1) @ c.U.mT


@given(seed=st.integers(0, 2**31), d=st.integers(1, 20), rank=st.integers(0, 20), n=st.integers(2, 40))
def test_compression_keeps_its_word(seed, d, rank, n):
    rank = min(rank, d)
    x = rows(2 * n, d, seed)
    S = shrink(ClassStatistics(2, d).update(x, torch.arange(2 * n) % 2).covariance(), 0.1, 0.1)
    L = precision_factor(S).L
    P = L @ L.mT
    found = compress(P, rank)
    assert [tuple(t.shape) for t in found] == [(2, d, rank), (2, rank), (2, d), (2,)]
    room = 20 * d * EPS
    norm = torch.linalg.matrix_norm(P, 2)
    measured = torch.linalg.matrix_norm(P - dense(found), 2) / norm
    assert bool(((measured - found.error).abs() <= room).all())
    assert bool((torch.linalg.eigvalsh(dense(found))[:, 0] >= -room * norm).all())
    points = rows(9, d, seed + 1)
    forms = [torch.einsum("nd,cde,ne->cn", points, matrix, points) for matrix in (P, dense(found))]
    bound = ((found.error + room) * norm)[:, None] * points.square().sum(1) * (1 + room)
    assert bool(((forms[0] - forms[1]).abs() <= bound).all())
    if rank == d:
        assert float(found.error.max()) <= room


def test_compression_finds_what_is_low_rank_and_diagonal():
    g = torch.Generator().manual_seed(0)
    U, s = torch.linalg.qr(torch.randn(3, 40, 4, generator=g).double()).Q, torch.tensor([9.0, 5.0, -0.8, 3.0]).double()
    P = 1.5 * torch.eye(40).double() + U * s @ U.mT
    found = compress(P, 4)
    assert float(found.error.max()) < 1e-12
    errors = [float(compress(P, r).error.max()) for r in range(5)]
    assert errors == sorted(errors, reverse=True)


def mistakes():
    stats, x, y = ClassStatistics(3, 4), torch.zeros(5, 4), torch.zeros(5, dtype=torch.int64)
    yield ValueError, r"features must be of shape \(B, d = 4\)", lambda: stats.update(x[:, :3], y)
    yield ValueError, "floating point", lambda: stats.update(x.long(), y)
    yield TypeError, "labels must be int64", lambda: stats.update(x, y.int())
    yield ValueError, r"labels must be of shape \(5,\)", lambda: stats.update(x, y[:4])
    yield ValueError, r"labels must be in \[0, 3\), or -1, got 3", lambda: stats.update(x, y + 3)
    yield ValueError, "got -2", lambda: stats.update(x, y - 2)
    yield ValueError, r"equal \(C, d\)", lambda: stats.merge(ClassStatistics(2, 4))
    yield ValueError, "num_classes >= 0", lambda: ClassStatistics(-1, 4)
    yield ValueError, r"covariance must be of shape \(\.\.\., d, d\)", lambda: shrink(x)
    yield TypeError, "covariance must be floating", lambda: shrink(torch.eye(3).long())
    yield ValueError, "covariance must be of shape", lambda: precision_factor(x)
    yield ValueError, "0 <= rank <= d", lambda: compress(torch.eye(3)[None], 4)
    yield ValueError, r"precision \(C, d, d\)", lambda: compress(torch.eye(3), 1)


@pytest.mark.parametrize("number", range(len(list(mistakes()))))
def test_mistakes_are_named(number):
    error, message, call = list(mistakes())[number]
    with pytest.raises(error, match=message):
        call()
