"""What is special about the agreement of two sets of concepts; what every op promises is in test_ops.py."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from _command import in_processes
from clipsteer import ops, testing
from clipsteer.ops import REGISTRY, SparseScores, _dispatch
from clipsteer.ops._agreement import PLAIN, low_level, parts

BACKENDS = [b for b in ("reference", "cpp") if testing.supported(b)]
needs_cpp = pytest.mark.skipif("cpp" not in BACKENDS, reason="the C++ library is not built")


def drawn(N: int = 60, K: int = 5, L: int = 7, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple:
    g = torch.Generator().manual_seed(seed)
    return tuple((2 * torch.randn(N, n, generator=g, dtype=torch.float64)).softmax(1).to(dtype) for n in (K, L))


def sparse(N: int, K: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> SparseScores:
    g = torch.Generator().manual_seed(seed)
    acts = torch.rand(N, k, generator=g, dtype=torch.float64).to(dtype)
    return SparseScores.of((acts / k, torch.rand(N, K, generator=g).topk(k).indices), K)


def textbook(P: Tensor, Q: Tensor) -> tuple[float, Tensor]:
    """Both sums as the paper writes them, a pair of rows after the other."""
    N, apart, distances = len(P), 0.0, [[0.0] * Q.shape[1] for _ in range(P.shape[1])]
    for one, other in itertools.combinations(zip(P.tolist(), Q.tolist()), 2):
        p, q = ([abs(a - b) for a, b in zip(*rows)] for rows in zip(one, other))
        apart += abs((1 - 0.5 * sum(p)) - (1 - 0.5 * sum(q)))
        for a, b in itertools.product(range(len(p)), range(len(q))):
            distances[a][b] += abs(p[a] - q[b])
    return 1 - 2 / (N * (N - 1)) * apart, torch.tensor(distances, dtype=torch.float64) / (N * (N - 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_textbook_sums(backend):
    P, Q = drawn(N=25)
    index, distances = textbook(P, Q)
    assert float(ops.generalised_rand_index(P, Q, backend=backend)) == pytest.approx(index, abs=1e-13)
    torch.testing.assert_close(ops.concept_distances(P, Q, backend=backend), distances, rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_published_loops_over_rows_in_float32(backend):
    """The index's ½ stands inside; the concepts' sum is halved; both are divided by N(N − 1)/2."""
    P, Q = drawn(N=150, dtype=torch.float32)
    N, apart, distances = len(P), torch.zeros(()), torch.zeros(5, 7)
    for i in range(N):
        p, q = (P[i] - P[i + 1 :]).abs(), (Q[i] - Q[i + 1 :]).abs()
        apart += ((1 - p.sum(1) / 2) - (1 - q.sum(1) / 2)).abs().sum()
        distances += (p.unsqueeze(2) - q.unsqueeze(1)).abs().sum(0) / 2
    expected = 1 - apart / (N * (N - 1)) * 2
    torch.testing.assert_close(ops.generalised_rand_index(P, Q, backend=backend), expected, rtol=0, atol=1e-6)
    found = ops.concept_distances(P, Q, backend=backend)
    torch.testing.assert_close(found, distances / (N * (N - 1)) * 2, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_hard_clusters_it_is_the_rand_index(backend):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(n, (80,), generator=g) for n in (4, 6))
    same = [(x[:, None] == x)[torch.ones(80, 80).triu(1).bool()] for x in (a, b)]
    expected = (same[0] == same[1]).double().mean()
    one_hot = [torch.nn.functional.one_hot(x).double() for x in (a, b)]
    torch.testing.assert_close(ops.generalised_rand_index(*one_hot, backend=backend), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_pseudo_metric(backend, dtype):
    P, Q = drawn(dtype=dtype)
    R = drawn(dtype=dtype, seed=1)[0]

    def far(a: Tensor, b: Tensor) -> float:
        return 1 - float(ops.generalised_rand_index(a, b, backend=backend))

    assert far(P, P) == far(P, P[:, torch.tensor([3, 1, 4, 0, 2])]) == 0
    assert far(P, Q) == far(Q, P) > 0
    assert far(P, Q) <= far(P, R) + far(R, Q) + 1e-6
    D = ops.concept_distances(P, Q, backend=backend)
    assert torch.equal(D, ops.concept_distances(Q, P, backend=backend).T)
    assert not ops.concept_distances(P, P, backend=backend).diagonal().any()
    matched = drawn(L=5, dtype=dtype)[1]
    assert far(P, matched) <= float(ops.concept_distances(P, matched, backend=backend).trace()) + 1e-6


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_are_exact_in_any_order(dtype):
    """Rows and concepts in another order, and shares of several processes, change no bit."""
    P, Q = drawn(N=300, K=20, L=9, dtype=dtype)
    g = torch.Generator().manual_seed(0)
    order, names = torch.randperm(300, generator=g), torch.randperm(20, generator=g)
    whole = ops.generalised_rand_index(P, Q, backend="cpp")
    assert torch.equal(whole, ops.generalised_rand_index(P[order][:, names], Q[order], backend="cpp"))
    sides = (*parts(P), *parts(Q))
    total, _ = low_level("cpp", "agreement_sums", *sides, None, 0, 1)
    shares = [low_level("cpp", "agreement_sums", *sides, None, part, 3)[0] for part in range(3)]
    assert all(share > 0 for share in shares)
    torch.testing.assert_close(sum(shares), total, rtol=1e-15, atol=0)
    counts = [low_level("cpp", "agreement_counts", *sides, part, 3, True, True) for part in range(3)]
    expected = low_level("cpp", "agreement_counts", *sides, 0, 1, True, True)
    assert all(torch.equal(sum(side), full) for side, full in zip(zip(*counts), expected))


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("N", [1, 2, 3, 5, 17, 64, 65])
@pytest.mark.parametrize("K", [1, 15, 16, 100])
def test_few_rows_are_what_strips_of_them_are(dtype, N, K):
    """Bit for bit, though they meet each other without panels, and gradients without a row's gathering."""
    P, Q = drawn(N=N, K=K, L=37, dtype=dtype, seed=N + K)
    P[N // 2] = P[0]
    P[:, K // 2], Q[:, 5] = -0.0, 3.0 * (-1) ** torch.arange(N)
    sides = (*parts(P), *parts(Q))
    total, _ = low_level("cpp", "agreement_sums", *sides, None, 0, 1)
    expected = (1 - 2 * total / max(N * (N - 1), 1)).to(torch.promote_types(dtype, torch.float32))
    counts = low_level("cpp", "agreement_counts", *sides, 0, 1, True, True)
    for needs in itertools.product([False, True], repeat=2):
        index, *found = low_level("cpp", "rand_index", *sides, *needs)
        assert torch.equal(index, expected)
        for needed, count, one in zip(needs, counts, found):
            assert torch.equal(one, count if needed else count[:0])
    grad = torch.tensor(0.7, dtype=index.dtype)
    grads = low_level("cpp", "rand_index_grad", grad, *counts, P, N)
    assert all(torch.equal(g, (-grad / max(N * (N - 1), 1) * n).to(dtype)) for g, n in zip(grads, counts))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", ["P", "Q", "both"])
@pytest.mark.parametrize("sign", [False, True])
def test_sparse_scores_equal_their_matrix(backend, which, sign):
    P, Q = sparse(90, 30, 4), sparse(90, 12, 3, seed=1)
    if sign:
        P = P._replace(values=P.values * (-1.0) ** torch.arange(len(P.values)))
    given = (P if which != "Q" else P.dense(), Q if which != "P" else Q.dense())
    for op in (ops.generalised_rand_index, ops.concept_distances):
        expected = op(P.dense(), Q.dense(), backend="reference")
        torch.testing.assert_close(op(*given, backend=backend), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_zeros_and_empty_rows(backend):
    values = torch.tensor([0.5, 0.0, 0.25, 0.0, 7.0], dtype=torch.float64)
    indices, offsets = torch.tensor([1, 1, 0, 1, 0]), torch.tensor([0, 2, 2, 4])
    P = SparseScores(values, indices, offsets, 3)
    expected = torch.tensor([[0, 0.5, 0], [0, 0, 0], [0.25, 0, 0]], dtype=torch.float64)
    assert torch.equal(P.dense(), expected)
    Q = drawn(N=3)[1]
    found = ops.generalised_rand_index(P, Q, backend=backend)
    torch.testing.assert_close(found, ops.generalised_rand_index(expected, Q, backend="reference"))
    live = values.clone().requires_grad_()
    (grad,) = torch.autograd.grad(ops.generalised_rand_index(P._replace(values=live), Q, backend=backend), live)
    matrix = expected.clone().requires_grad_()
    (full,) = torch.autograd.grad(ops.generalised_rand_index(matrix, Q, backend="reference"), matrix)
    torch.testing.assert_close(grad[:4], full[[0, 0, 2, 2], [1, 1, 0, 1]])
    assert grad[4] == 0


@needs_cpp
def test_sparse_scores_are_not_made_a_matrix():
    """One of ten million concepts would take 40 GB."""
    P, Q = sparse(500, 30, 4, dtype=torch.float32), sparse(500, 30, 4, seed=1, dtype=torch.float32)
    wide = [s._replace(indices=s.indices * 333_333, concepts=10_000_000) for s in (P, Q)]
    assert torch.equal(ops.generalised_rand_index(*wide), ops.generalised_rand_index(P, Q))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_soft_assignments_train_on_it(backend, dtype):
    """Memberships come to agree with others by its gradient."""
    target = drawn(N=40, K=4, dtype=dtype)[0]
    logits = torch.randn(40, 4, generator=torch.Generator().manual_seed(3), dtype=dtype, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.2)
    found = []
    for _ in range(30):
        loss = 1 - ops.generalised_rand_index(logits.softmax(1), target, backend=backend)
        found.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert found[-1] < 0.5 * found[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_both_agree_the_subgradient_is_zero(backend):
    P = drawn()[0].requires_grad_()
    ops.generalised_rand_index(P, P.detach(), backend=backend).backward()
    assert not P.grad.any()
    # equal scores of two rows add nothing to each other
    same = torch.full((4, 3), 0.25, dtype=torch.float64, requires_grad=True)
    ops.generalised_rand_index(same, drawn(N=4)[0], backend=backend).backward()
    assert not same.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("what", ["nan", "inf", "two", "opposite", "both"])
def test_what_is_not_finite_shows(backend, side, what):
    given = [t.clone() for t in drawn(N=9)]
    inf = float("inf")
    given[side][2, 1] = float("nan") if what == "nan" else inf
    if what in ("two", "opposite"):
        given[side][5, 1] = inf if what == "two" else -inf
    if what == "both":
        given[1 - side][7, 0] = inf
    for op in (ops.generalised_rand_index, ops.concept_distances):
        expected, found = op(*given, backend="reference"), op(*given, backend=backend)
        torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-12, atol=1e-12)
    index = ops.generalised_rand_index(*given, backend=backend)
    assert bool(index == -inf if what in ("inf", "opposite") else index.isnan())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-37, 1e37])
def test_the_largest_and_smallest_scores(backend, scale):
    P, Q = drawn(dtype=torch.float32)
    for op, shift in ((ops.generalised_rand_index, 1), (ops.concept_distances, 0)):
        expected = shift + scale * (op(P, Q).double() - shift)
        found = op(P * scale, Q * scale, backend=backend)
        torch.testing.assert_close(found.double(), expected, rtol=3e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", [ops.generalised_rand_index, ops.concept_distances])
def test_without_pairs_nothing_disagrees(backend, op):
    for N in (0, 1):
        P, Q = drawn(N=N)
        found = op(P, Q, backend=backend)
        assert torch.equal(found, torch.ones_like(found) if op is ops.generalised_rand_index else torch.zeros(5, 7))
    none = op(torch.zeros(5, 0), torch.zeros(5, 3), backend=backend)
    assert none.shape == (() if op is ops.generalised_rand_index else (0, 3))


def left_out(op, P: Tensor, Q: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """The delete-m jackknife as its paper has it, by calls of the definition."""
    whole = op(P, Q, backend="reference")
    names = images.unique().tolist()
    without = torch.stack([op(P[images != n], Q[images != n], backend="reference") for n in names])
    sizes = torch.tensor([int((images == n).sum()) for n in names]).double().reshape(-1, *[1] * whole.dim())
    N, g = len(images), len(names)
    estimate = g * whole - ((1 - sizes / N) * without).sum(0)
    h = N / sizes
    pseudo = h * whole - (h - 1) * without
    return whole, (((pseudo - estimate) ** 2 / (h - 1)).sum(0) / g).sqrt()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_the_jackknife_leaves_out_images(backend, equal, kind):
    P, Q = (sparse(120, 6, 3), sparse(120, 5, 2, seed=1)) if kind == "sparse" else drawn(N=120, K=6)
    g = torch.Generator().manual_seed(2)
    images = torch.arange(120) % 12 if equal else torch.randint(9, (120,), generator=g)
    images = 1000 - 7 * images[torch.randperm(120, generator=g)]
    for op, with_error in (
        (ops.generalised_rand_index, ops.generalised_rand_index_jackknife),
        (ops.concept_distances, ops.concept_distances_jackknife),
    ):
        matrices = [s.dense() if kind == "sparse" else s for s in (P, Q)]
        value, error = left_out(op, *matrices, images)
        found = with_error(P, Q, images, backend=backend)
        torch.testing.assert_close(found.value, value, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(found.error, error, rtol=1e-9, atol=1e-12)
        if equal and op is ops.generalised_rand_index:
            without = [op(*(m[images != n] for m in matrices), backend="reference") for n in images.unique()]
            plain = torch.stack(without)
            variance = 11 / 12 * (plain - plain.mean()).square().sum()
            torch.testing.assert_close(found.error, variance.sqrt(), rtol=1e-9, atol=1e-12)


def test_an_interval_over_images_is_wider_than_one_over_their_rows():
    P, Q = (t.repeat_interleave(8, 0) for t in drawn(N=40))
    by_image = ops.generalised_rand_index_jackknife(P, Q, torch.arange(320) // 8)
    by_row = ops.generalised_rand_index_jackknife(P, Q, torch.arange(320))
    assert by_image.error > 2 * by_row.error > 0


WORKER = """
import os, sys, torch, torch.distributed as dist
from clipsteer import ops
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, out = dist.get_rank(), sys.argv[1]
P, Q = torch.load(out + "/scores.pt", weights_only=True)
images = torch.arange(len(P)) // 10
for backend in ("cpp", "reference"):
    if backend == "cpp" and not ops.explain("generalised_rand_index")[1].usable:
        continue
    p, q = P.clone().requires_grad_(), Q.clone().requires_grad_()
    options = {"group": dist.group.WORLD, "backend": backend}
    index = ops.generalised_rand_index(p, q, **options)
    found = [index.detach(), *torch.autograd.grad(index, (p, q))]
    found += ops.generalised_rand_index_jackknife(P, Q, images, **options)
    mine = slice(0, 3) if rank == 0 else slice(3, None)
    found.append(ops.concept_distances(P[:, mine], Q, backend=backend))
    torch.save(found, f"{out}/{backend}-{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.nightly
def test_two_processes_equal_one(tmp_path):
    P, Q = drawn(N=260, K=6)
    torch.save([P, Q], tmp_path / "scores.pt")
    in_processes(WORKER, tmp_path)
    for backend in BACKENDS:
        p, q = P.clone().requires_grad_(), Q.clone().requires_grad_()
        index = ops.generalised_rand_index(p, q, backend=backend)
        expected = [index.detach(), *torch.autograd.grad(index, (p, q))]
        expected += ops.generalised_rand_index_jackknife(P, Q, torch.arange(260) // 10, backend=backend)
        first, second = (torch.load(tmp_path / f"{backend}-{rank}.pt", weights_only=True) for rank in (0, 1))
        for a, b, c in zip(first, second, expected):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-14)
        whole = ops.concept_distances(P, Q, backend=backend)
        assert torch.equal(torch.cat([first[-1], second[-1]]), whole)


def mistakes():
    P, Q = torch.zeros(4, 3), torch.zeros(4, 2)
    codes = SparseScores(torch.ones(3), torch.tensor([0, 1, 0]), torch.tensor([0, 1, 2, 3, 3]), 2)
    index, distances = ops.generalised_rand_index, ops.concept_distances
    yield ValueError, "Q must be of P's N = 4 rows", lambda: index(P, Q[:3])
    yield ValueError, "P must be of shape", lambda: distances(P[0], Q)
    yield TypeError, "Q must be floating", lambda: index(P, Q.long())
    yield TypeError, "dtype", lambda: distances(P, Q.double())
    yield TypeError, "P must be a tensor", lambda: index([1.0], Q)
    yield ValueError, r"P.indices must be in \[0, 1\)", lambda: index(codes._replace(concepts=1), Q)
    yield (
        ValueError,
        "offsets must be ascending",
        lambda: index(codes._replace(offsets=torch.tensor([0, 2, 1, 3, 3])), Q),
    )
    yield ValueError, "indices must be of shape", lambda: index(codes._replace(indices=torch.zeros(2).long()), Q)
    yield TypeError, "offsets must be int64", lambda: index(codes._replace(offsets=torch.zeros(5)), Q)
    images = ops.generalised_rand_index_jackknife
    yield ValueError, "two images or more", lambda: images(P, Q, torch.zeros(4).long())
    yield ValueError, "images must be of shape", lambda: images(P, Q, torch.arange(3))
    yield TypeError, "images must be int64", lambda: images(P, Q, torch.arange(4.0))
    yield RuntimeError, "cannot run", lambda: index(codes, Q, backend="triton")


@pytest.mark.parametrize("number", range(len(list(mistakes()))))
def test_mistakes_are_named(number):
    error, message, call = list(mistakes())[number]
    with pytest.raises(error, match=message):
        call()


@needs_cpp
def test_kernels_check_sparse_scores_themselves():
    Q = (torch.zeros(4, 2), None, None, 2)
    good = (torch.ones(3), torch.tensor([0, 1, 0]), torch.tensor([0, 1, 2, 3, 3]), 2)
    wrong = {
        "out of range": (good[0], good[1] + 1, *good[2:]),
        "ascend": (*good[:2], torch.tensor([0, 2, 1, 3, 3]), 2),
        "at most m": (*good[:2], torch.tensor([0, 1, 2, 3, 9]), 2),
        "twice": (*good[:2], torch.tensor([0, 3, 3, 3, 3]), 2),
        "or neither": (good[0], good[1], None, 2),
        "as many rows": (*good[:2], torch.tensor([0, 1, 3]), 2),
    }
    for message, P in wrong.items():
        for op, rest in (("agreement_sums", (None, 0, 1)), ("concept_distances", (None,))):
            with pytest.raises((RuntimeError, ValueError, IndexError), match=message):
                _dispatch.call("cpp", op, *P, *Q, *rest)
    with pytest.raises((RuntimeError, ValueError), match="part"):
        _dispatch.call("cpp", "agreement_sums", *good, *Q, None, 2, 2)


@needs_cpp
@pytest.mark.parametrize("name", ["generalised_rand_index", "concept_distances"])
def test_bounds_catch_planted_bugs(name):
    """A row that is the neighbour's, concepts of two rows exchanged, a hundredth more of one concept."""
    spec = REGISTRY[name]
    inputs = spec.make({"N": 120, "K": 8, "L": 6}, torch.float32, torch.Generator().manual_seed(1), 1.0, False)

    def caught(**changed: Tensor) -> bool:
        found = spec.function(**{**inputs, **changed})
        return spec.check(inputs, {spec.outputs[0]: found})[spec.outputs[0]] > 1

    assert not caught()
    P, Q = inputs["P"].clone(), inputs["Q"].clone()
    P[3] = P[4]
    Q[:, 0] *= 1.01
    assert caught(P=P)
    assert caught(Q=Q)
    assert caught(Q=inputs["Q"].roll(1, 0))


INTERPRETED = """
import torch
from clipsteer.kernels import pairwise_agreement as kernels
from clipsteer.ops._agreement import PLAIN
g = torch.Generator().manual_seed(0)
P, Q = torch.rand(70, 3, generator=g), torch.rand(70, 2, generator=g)
sides, images = (P, None, None, 3, Q, None, None, 2), torch.randint(5, (70,), generator=g)
for rest in ((images, 0, 1), (None, 0, 1)):
    for a, b in zip(kernels.agreement_sums(*sides, *rest), PLAIN["agreement_sums"](*sides, *rest)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
shares = [kernels.agreement_sums(*sides, images, part, 2) for part in range(2)]
whole = kernels.agreement_sums(*sides, images, 0, 1)
for a, b, c in zip(*shares, whole):
    torch.testing.assert_close(a + b, c)
counts = [kernels.agreement_counts(*sides, part, 2, True, False)[0] for part in range(2)]
torch.testing.assert_close(sum(counts), kernels.agreement_counts(*sides, 0, 1, True, False)[0], rtol=0, atol=0)
"""


@pytest.mark.slow
def test_interpreted_images_and_shares(interpret):
    interpret(INTERPRETED)


def test_the_plain_ops_are_the_definitions():
    P, Q = drawn()
    sides = (*parts(P), *parts(Q))
    torch.testing.assert_close(PLAIN["concept_distances"](*sides, None)[0], ops.concept_distances_reference(P, Q))
    total, _ = PLAIN["agreement_sums"](*sides, None, 0, 1)
    torch.testing.assert_close(1 - 2 * total / (60 * 59), ops.generalised_rand_index_reference(P, Q))
