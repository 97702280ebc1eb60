"""What is special about mahalanobis_covariance_loss; what every op promises is in test_ops.py."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from clipsteer import ops, testing
from clipsteer.ops import REGISTRY, LowRankDiag, _dispatch

FAST = [b for b in ("reference", "cpp") if testing.supported(b)]
SPEC, LOW_RANK = REGISTRY["mahalanobis_covariance_loss"], REGISTRY["mahalanobis_covariance_loss_low_rank"]
loss_of = ops.mahalanobis_covariance_loss


def drawn(B: int = 30, C: int = 4, d: int = 11, r: int = 5, dtype=torch.float64, seed: int = 0, **more: int) -> dict:
    shape = {"B": B, "C": C, "d": d, "r": r, **more}
    return LOW_RANK.make(shape, dtype, torch.Generator().manual_seed(seed), 1.0, False)


def dense(seed: int = 0, C: int = 4, d: int = 11, dtype=torch.float64) -> Tensor:
    return torch.randn(C, d, d, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def gradient(call, new: Tensor) -> tuple[Tensor, Tensor]:
    leaf = new.clone().requires_grad_()
    loss = call(leaf)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def double_loop(new: Tensor, old: Tensor, labels: Tensor, P: Tensor, normalize: bool) -> Tensor:
    """The formula as it is printed, with the precision itself."""
    if normalize:
        new, old = (torch.nn.functional.normalize(x, dim=-1) for x in (new, old))
    total = new.new_zeros(())
    for i in range(len(labels)):
        for j in range(i + 1, len(labels)):
            if labels[i] == labels[j] and labels[i] >= 0:
                a, b = ((x[i] - x[j]) @ P[labels[i]] @ (x[i] - x[j]) for x in (old, new))
                total = total + ((a + 1e-8).sqrt() - (b + 1e-8).sqrt()).abs()
    return total / len(labels)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("low_rank", [False, True], ids=["dense", "low rank"])
def test_equals_the_double_loop(backend, normalize, low_rank):
    """Value and gradient to 1e-9 relative, in float64."""
    case = drawn()
    new, old, labels, U, s, diag = (case[n] for n in ("new", "old", "labels", "U", "s", "diag"))
    factor = LowRankDiag(U, s, diag) if low_rank else dense()
    P = torch.diag_embed(diag) + U * s.unsqueeze(1) @ U.mT if low_rank else factor @ factor.mT
    expected = gradient(lambda x: double_loop(x, old, labels, P, normalize), new)
    found = gradient(lambda x: loss_of(x, old, labels, factor, normalize, backend), new)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-9, atol=0)
    assert (found[1] - expected[1]).norm() <= 1e-9 * expected[1].norm()
    assert not found[1][labels == -1].any()


@pytest.mark.parametrize("backend", FAST)
def test_classes_without_a_pair_count_for_nothing(backend):
    """One row, none, or only ignored ones: loss 0, gradient 0; and they disturb no other class, not even as NaN."""
    new, old, factor = torch.randn(5, 11), torch.randn(5, 11), dense(dtype=torch.float32)
    for labels in ([0, 1, 2, 3, -1], [-1] * 5, [3, -1, -1, -1, -1]):
        loss, grad = gradient(lambda x, c=labels: loss_of(x, old, torch.tensor(c), factor, backend=backend), new)
        assert loss == 0
        assert not grad.any()
    loss, grad = gradient(lambda x: loss_of(x, old[:0], torch.zeros(0).long(), factor, backend=backend), new[:0])
    assert loss == 0
    assert grad.shape == (0, 11)
    labels = torch.tensor([1, 2, 1, -1, 0])
    clean = loss_of(new, old, labels, factor, backend=backend)
    new[3] = old[3] = new[1] = torch.nan
    assert torch.equal(loss_of(new, old, labels, factor, backend=backend), clean)
    assert clean > 0


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("B", "d"), [(90, 33), (31, 64)])
def test_nothing_moved_means_no_pull(backend, dtype, B, d):
    """At the start of a task new and old are equal: sign(0) is 0, and both sides take the same roundings."""
    new = torch.randn(B, d, dtype=dtype, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(B) % 3
    loss, grad = gradient(lambda x: loss_of(x, new, labels, dense(d=d, dtype=dtype), backend=backend), new)
    assert loss == 0
    assert not grad.any()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_near_pairs_keep_their_digits(backend, dtype):
    """Distances of 1e-3 of the norm, in float32: a Gram matrix would leave one digit, the bound allows far less."""
    generator = torch.Generator().manual_seed(0)
    middle = torch.randn(1, 64, generator=generator, dtype=torch.float64)
    new, old = (middle + 1e-3 * torch.randn(20, 64, generator=generator, dtype=torch.float64) for _ in range(2))
    factor, labels = dense(C=1, d=64) / 8, torch.zeros(20, dtype=torch.int64)
    inputs = {"new": new.to(dtype), "old": old.to(dtype), "labels": labels, "factor": factor.to(dtype)}
    inputs["normalize"] = False
    loss = loss_of(**inputs, backend=backend)
    assert SPEC.check(inputs, {"loss": loss})["loss"] <= 1
    wide = {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in inputs.items()}
    truth = loss_of(**wide, backend="reference")
    assert abs(loss - truth) <= (1e-4 if dtype == torch.float32 else 1e-12) * truth


@pytest.mark.parametrize("backend", FAST)
def test_equal_rows_are_at_the_least_distance(backend):
    """Twins of one image: D = 1e-4 on both sides, a finite gradient, and none from the pair of twins."""
    new = torch.randn(6, 11, generator=torch.Generator().manual_seed(0))
    new[3] = new[1]
    old, labels = new.clone(), torch.tensor([0, 0, 0, 0, 1, 1])
    assert loss_of(new, old, labels, dense(dtype=torch.float32), backend=backend) == 0
    old = torch.randn(6, 11, generator=torch.Generator().manual_seed(1))
    _, grad = gradient(lambda x: loss_of(x, old, labels, dense(dtype=torch.float32), backend=backend), new)
    assert grad.isfinite().all()
    assert grad.any()


@pytest.mark.parametrize("backend", FAST)
def test_singular_and_indefinite_precisions(backend):
    """A factor of zeros has every distance at 1e-4; a square below 0 counts as 0, without a gradient."""
    case = drawn(seed=3)
    args = case["new"], case["old"], case["labels"]
    loss, grad = gradient(lambda x: loss_of(x, *args[1:], torch.zeros(4, 11, 11).double(), backend=backend), args[0])
    assert loss == 0
    assert not grad.any()
    negative = LowRankDiag(case["U"], case["s"], -case["diag"])
    loss, grad = gradient(lambda x: loss_of(x, *args[1:], negative, backend=backend), args[0])
    assert loss == 0
    assert not grad.any()
    some = LowRankDiag(3 * case["U"], case["s"], case["diag"])  # of either sign
    found, expected = (
        gradient(lambda x, b=b: loss_of(x, *args[1:], some, backend=b), args[0]) for b in (backend, "reference")
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", FAST)
def test_rows_of_zeros_stay_zero(backend):
    new, old, labels = torch.randn(4, 11), torch.randn(4, 11), torch.zeros(4, dtype=torch.int64)
    new[2] = 0
    loss, grad = gradient(lambda x: loss_of(x, old, labels, dense(dtype=torch.float32), backend=backend), new)
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert not grad[2].any()


@pytest.mark.parametrize("backend", FAST)
def test_invariances(backend):
    """Shuffled rows, renamed classes, an invertible map of the space with its inverse in the factor, a rotation of the
    factor's columns, and a power of two in the rows, which normalisation takes out exactly."""
    case = drawn(B=40, seed=1)
    new, old, labels, factor = case["new"], case["old"], case["labels"], dense(2)
    first = gradient(lambda x: loss_of(x, old, labels, factor, False, backend), new)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    shuffled = gradient(lambda x: loss_of(x, old[order], labels[order], factor, False, backend), new[order])
    torch.testing.assert_close(shuffled[0], first[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(shuffled[1], first[1][order], rtol=1e-10, atol=1e-12)
    names = torch.tensor([2, 0, 3, 1])
    renamed = torch.where(labels >= 0, torch.argsort(names)[labels.clamp(min=0)], -1)
    assert torch.allclose(loss_of(new, old, renamed, factor[names], False, backend), first[0], rtol=1e-12, atol=0)
    A = torch.eye(11, dtype=torch.float64) + 0.3 * dense(5, C=1)[0] / 11**0.5
    moved = loss_of(new @ A, old @ A, labels, torch.linalg.solve(A.expand(4, 11, 11), factor), False, backend)
    torch.testing.assert_close(moved, first[0], rtol=1e-10, atol=0)
    turned = factor @ torch.linalg.qr(dense(6))[0]
    torch.testing.assert_close(loss_of(new, old, labels, turned, False, backend), first[0], rtol=1e-12, atol=0)
    unit = loss_of(new, old, labels, factor, backend=backend)
    assert torch.equal(loss_of(8 * new, old / 4, labels, factor, backend=backend), unit)


@pytest.mark.parametrize("backend", FAST)
def test_low_rank_is_the_dense_loss(backend):
    case = drawn()
    P = torch.diag_embed(case["diag"]) + case["U"] * case["s"].unsqueeze(1) @ case["U"].mT
    args = case["new"], case["old"], case["labels"]
    low_rank = loss_of(*args, LowRankDiag(case["U"], case["s"], case["diag"]), backend=backend)
    torch.testing.assert_close(low_rank, loss_of(*args, torch.linalg.cholesky(P), backend=backend), rtol=1e-10, atol=0)
    empty = LowRankDiag(case["U"][..., :0], case["s"][..., :0], case["diag"])
    plain = loss_of(*args, torch.diag_embed(case["diag"].sqrt()), backend=backend)
    torch.testing.assert_close(loss_of(*args, empty, backend=backend), plain, rtol=1e-10, atol=0)


@pytest.mark.parametrize("spec", [SPEC, LOW_RANK], ids=lambda s: s.name)
def test_bounds_catch_planted_bugs(spec):
    """A pair left out, a row of another class, another row, a row or column of the factor dropped, wrong gradients."""
    inputs = spec.make({"B": 33, "C": 5, "d": 64, "r": 8}, torch.float32, torch.Generator().manual_seed(10), 1.0, False)
    if spec is SPEC:
        inputs = SPEC.make({"B": 33, "C": 5, "d": 64}, torch.float32, torch.Generator().manual_seed(10), 1.0, False)
    labels, B = inputs["labels"], 33
    assert spec.check(inputs, {"loss": spec.function(**inputs)})["loss"] <= 1

    def caught(**changed) -> bool:
        return spec.check(inputs, {"loss": spec.function(**{**inputs, **changed})})["loss"] > 1

    row = int((labels >= 0).nonzero()[3])
    for other in (-1, (int(labels[row]) + 1) % 5):
        wrong = labels.clone()
        wrong[row] = other
        assert caught(labels=wrong)
    name = "factor" if spec is SPEC else "U"
    wrong = inputs[name].clone()
    wrong[labels[row], :, 3] = 0
    assert caught(**{name: wrong})
    assert caught(normalize=False)
    wrong = inputs[name].clone()
    wrong[:, 5] = 0
    assert caught(**{name: wrong})
    wrong = inputs["new"].clone()
    wrong[row] = wrong[row + 1]
    assert caught(new=wrong)
    loss = spec.function(**inputs)
    assert spec.check(inputs, {"loss": loss * (1 + 4e-3)})["loss"] > 1
    assert spec.check(inputs, {"loss": loss * B / (labels >= 0).sum()})["loss"] > 1

    leaf = {**inputs, "new": inputs["new"].clone().requires_grad_()}
    (grad,) = torch.autograd.grad(spec.function(**leaf), leaf["new"])
    cotangent = {"loss": torch.ones(())}
    check = lambda g: spec.check_grads(inputs, {}, cotangent, {"new": g})["new"]
    assert check(grad) <= 1
    for wrong in (-grad, 0 * grad, grad * 1.01, grad.roll(1, 0), grad + 1e-3 * inputs["new"]):
        assert check(wrong) > 1


@pytest.mark.skipif("cpp" not in FAST, reason="the C++ library is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_panels_and_tiles_of_every_size(dtype):
    """More rows of a class than a panel holds, more columns than a tile, one class or many."""
    for B, C, d, r in ((400, 1, 70, 3), (90, 2, 300, 130), (64, 30, 257, 20)):
        for spec, shape in ((LOW_RANK, {"B": B, "C": C, "d": d, "r": r}), (SPEC, {"B": B, "C": C, "d": d})):
            inputs = spec.make(shape, dtype, torch.Generator().manual_seed(B), 1.0, False)
            assert spec.check(inputs, {"loss": spec.function(**inputs, backend="cpp")})["loss"] <= 1
            wide = {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in inputs.items()}
            expected, found, rounded = (
                gradient(lambda x, c=case, b=b, f=spec.function: f(**{**c, "new": x}, backend=b), case["new"])[1]
                for case, b in ((wide, "reference"), (wide, "cpp"), (inputs, "cpp"))
            )
            assert (found - expected).norm() <= 1e-9 * expected.norm()
            assert (rounded.double() - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("backend", FAST)
def test_only_new_has_a_gradient(backend):
    case = drawn()
    new, old, factor = (t.clone().requires_grad_() for t in (case["new"], case["old"], dense()))
    loss_of(new, old, case["labels"], factor, backend=backend).backward()
    assert new.grad.any()
    assert old.grad is None
    assert factor.grad is None


@pytest.mark.parametrize("backend", FAST)
def test_the_authors_order_is_refused(backend):
    """(old, new) has the same value, and would train nothing."""
    case = drawn()
    new = case["new"].clone().requires_grad_()
    for factor in (dense(), LowRankDiag(case["U"], case["s"], case["diag"])):
        with pytest.raises(ValueError, match=r"old must be without a gradient .*: the order is \(new, old\)"):
            loss_of(case["old"], new, case["labels"], factor, backend=backend)
        with torch.no_grad():
            value = loss_of(case["old"], new, case["labels"], factor, backend=backend)
        assert torch.equal(value, loss_of(new, case["old"], case["labels"], factor, backend=backend))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("part", ["diag", "s"])
@pytest.mark.parametrize("share", ["one", "all"])
def test_a_weight_of_minus_infinity_has_one_answer(part, share, normalize):
    """Every square of its class is negative: it counts as 0, without a gradient, and spoils no other class."""
    case = drawn(B=20, C=2, dtype=torch.float32)
    weights = case[part].clone()
    weights[0, slice(None) if share == "all" else 1] = -math.inf
    factor = LowRankDiag(case["U"], *(weights if n == part else case[n] for n in ("s", "diag")))
    others = torch.where(case["labels"] == 0, -1, case["labels"])
    args = case["old"], case["labels"], factor, normalize
    expected = gradient(lambda x: loss_of(x, case["old"], others, factor, normalize, "reference"), case["new"])
    assert float(expected[0]) > 0
    for backend in FAST:
        found = gradient(lambda x, b=backend: loss_of(x, *args, b), case["new"])
        for value, right in zip(found, expected):
            torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif("cpp" not in FAST, reason="the C++ library is not built")
def test_third_derivatives_run_through_the_reference():
    case = drawn(B=6, C=2, d=3)

    def third(backend: str) -> Tensor:
        x = case["new"].clone().requires_grad_()
        value = loss_of(x, case["old"], case["labels"], dense(C=2, d=3), backend=backend)
        for _ in range(3):
            (g,) = torch.autograd.grad(value, x, create_graph=True)
            value = g.square().sum()
        return g

    torch.testing.assert_close(third("cpp"), third("reference"), rtol=1e-9, atol=1e-9)


MEMORY = """
import torch
from clipsteer import ops
from clipsteer.testing import bench
B, C, d = 256, 48, 768
new, old, factor = torch.randn(B, d, requires_grad=True), torch.randn(B, d), torch.randn(C, d, d)
labels = torch.arange(B) % C
call = lambda: ops.mahalanobis_covariance_loss(new, old, labels, factor, backend="cpp").backward()
call()
print(bench.extra_memory(call, "cpu"))
"""


@pytest.mark.skipif("cpp" not in FAST or not os.path.exists("/proc/self/clear_refs"), reason="needs C++ on Linux")
def test_memory_is_a_few_copies_of_the_rows():
    """0.8 MB of rows beside 113 MB of factors; a B × B × d tensor would take 201 MB."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 16 * 2**20


@pytest.mark.skipif("cpp" not in FAST, reason="the C++ library is not built")
def test_kernel_checks_its_arguments_itself():
    x, L, labels = torch.zeros(4, 6), torch.zeros(3, 6, 6), torch.zeros(4, dtype=torch.int64)
    op = "mahalanobis_covariance_loss"
    for bad in (3, -2, 2**40):
        with pytest.raises((RuntimeError, ValueError, IndexError), match=str(bad)):
            _dispatch.call("cpp", op, x, x, labels + bad, L, None, None, True, True)
    for args in (
        (x, x[:3], labels, L, None, None),
        (x, x, labels[:3], L, None, None),
        (x, x, labels, L[..., :2], None, None),
        (x, x, labels, L[..., :2].contiguous(), torch.zeros(3, 2), None),
        (x, x, labels, L[..., :2].contiguous(), torch.zeros(3, 2), torch.zeros(3, 5)),
        (x, x, labels, L.double(), None, None),
    ):
        with pytest.raises((RuntimeError, ValueError), match="expected"):
            _dispatch.call("cpp", op, *args, True, True)


def mistakes():
    x, L, labels = torch.zeros(4, 6), torch.zeros(3, 6, 6), torch.zeros(4, dtype=torch.int64)
    U, s, diag = torch.zeros(3, 6, 2), torch.zeros(3, 2), torch.zeros(3, 6)
    yield ValueError, r"new must be of shape \(B, d\)", lambda: loss_of(x[0], x[0], labels, L)
    yield ValueError, "old must be of shape new's", lambda: loss_of(x, x[:3], labels, L)
    yield ValueError, r"labels must be of shape \(B,\)", lambda: loss_of(x, x, labels[:3], L)
    yield ValueError, r"labels must be in \[-1, 3\)", lambda: loss_of(x, x, labels + 3, L)
    yield ValueError, r"labels must be in \[-1, 3\)", lambda: loss_of(x, x, labels - 2, L)
    yield TypeError, "labels must be int64", lambda: loss_of(x, x, labels.int(), L)
    yield ValueError, r"factor must be of shape \(C, d, d\)", lambda: loss_of(x, x, labels, L[0])
    yield ValueError, r"factor must be of shape \(C, d, d\)", lambda: loss_of(x, x, labels, L[..., :2])
    yield ValueError, "C > 0", lambda: loss_of(x, x, labels - 1, L[:0])
    yield (
        ValueError,
        r"U must be of shape \(C, d = 6, r\)",
        lambda: loss_of(x, x, labels, LowRankDiag(U[:, 1:], s, diag)),
    )
    yield ValueError, r"s must be of shape \(C, r\)", lambda: loss_of(x, x, labels, LowRankDiag(U, s[:2], diag))
    yield ValueError, r"diag must be of shape \(C, d\)", lambda: loss_of(x, x, labels, LowRankDiag(U, s, diag[:2]))
    yield TypeError, "dtype", lambda: loss_of(x, x, labels, L.double())
    yield TypeError, "factor must be a tensor", lambda: loss_of(x, x, labels, None)
    yield TypeError, "normalize must be a bool", lambda: loss_of(x, x, labels, L, 1)
    yield ValueError, "backend must be one of", lambda: loss_of(x, x, labels, L, backend="fast")
    yield RuntimeError, "no kernel for mahalanobis_covariance_loss", lambda: loss_of(x, x, labels, L, backend="cuda")


@pytest.mark.parametrize("number", range(len(list(mistakes()))))
def test_mistakes_are_named(number):
    error, message, call = list(mistakes())[number]
    with pytest.raises(error, match=message):
        call()


INTERPRETED = """
import torch
from clipsteer import ops
g = torch.Generator().manual_seed(0)
new, factor, labels = torch.randn(90, 33, generator=g), torch.randn(3, 33, 33, generator=g), torch.arange(90) % 3
old = torch.randn(90, 33, generator=g)
spec = ops.REGISTRY["mahalanobis_covariance_loss"]

def run(old, labels, new=new, factor=factor, **options):
    leaf = new.clone().requires_grad_()
    loss = ops.mahalanobis_covariance_loss(leaf, old, labels, factor, backend="triton", **options)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]

def holds(found, old, labels):
    # products are numpy's here, whose bits depend on a row's place in them: bounds of the op, not bits
    inputs = {"new": clean, "old": old, "labels": labels, "factor": factor, "normalize": True}
    assert spec.check(inputs, {"loss": found[0]})["loss"] <= 1
    assert spec.check_grads(inputs, {}, {"loss": torch.ones(())}, {"new": found[1]})["new"] <= 1

clean = new.clone()
holds(run(new, labels), new, labels)
# nothing moved: of small integers every product is exact, and both sides take the same roots
whole = torch.randint(-2, 3, (90, 33), generator=g).float()
loss, grad = run(whole, labels, whole, torch.randint(-2, 3, (3, 33, 33), generator=g).float(), normalize=False)
assert loss == 0 and not grad.any()
_dispatch.call("triton", "mahalanobis_covariance_loss", new, old, labels + 2**40, factor, None, None, True, True)
some = torch.where(labels == 1, -1, labels)
loss, grad = run(old, some)
holds((loss, grad), old, some)
assert not grad[labels == 1].any() and loss > 0
beyond = torch.where(labels == 1, 7, labels)  # on a GPU nobody looks at the labels: such rows are left out
args = (new, old, beyond, factor, None, None, True, True)
loss, grad = _dispatch.call("triton", "mahalanobis_covariance_loss", *args)
assert grad.untyped_storage().nbytes() == grad.nbytes  # compiled code takes an output for aligned
holds((loss, grad), old, some)
assert not grad[labels == 1].any()
new[1] = torch.nan  # of an ignored row
loss, grad = run(old, some)
holds((loss, grad), old, some)
assert not grad[labels == 1].any()
assert run(old, labels)[0].isnan()
# of a weight of -inf every square is negative, which counts as 0, without a gradient
U, s, diag = torch.randn(3, 33, 4, generator=g) / 6, -torch.rand(3, 4, generator=g), 1 + torch.rand(3, 33, generator=g)
diag[1, 5] = -torch.inf
for normalize in (True, False):
    found, expected = (run(old, c, clean, ops.LowRankDiag(U, s, diag), normalize=normalize) for c in (labels, some))
    assert expected[0] > 0
    for value, right in zip(found, expected):
        torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-7)
"""


@pytest.mark.slow
def test_triton_kernel_in_the_interpreter(interpret):
    interpret(INTERPRETED)
