"""What is special about conceptor_project; what every op promises is in test_ops.py."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from _processor import multiplies_pairs
from clipsteer import ops, testing
from clipsteer.ops import REGISTRY, LowRank, _dispatch, _grouped

FAST = [b for b in ("reference", "cpp") if testing.supported(b)]
SPEC, LOW_RANK = REGISTRY["conceptor_project"], REGISTRY["conceptor_project_low_rank"]


def drawn(B: int = 50, K: int = 4, d: int = 23, r: int = 6, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict:
    return LOW_RANK.make({"B": B, "K": K, "d": d, "r": r}, dtype, torch.Generator().manual_seed(seed), 1.0, False)


def dense_of(U: Tensor, s: Tensor) -> Tensor:
    return U @ torch.diag_embed(s) @ U.mT


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("low_rank", [False, True], ids=["dense", "low rank"])
def test_equals_the_formula_row_by_row(backend, low_rank):
    h, U, s, index, beta, mean = drawn().values()
    C = torch.randn(4, 23, 23, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if low_rank:
        C = dense_of(U, s)
    rows = [beta[k] * (C[k] @ (x - mean[k])) + mean[k] for x, k in zip(h, index.tolist())]
    given = LowRank(U, s) if low_rank else C
    out = ops.conceptor_project(h, given, index, beta=beta, mean=mean, backend=backend)
    torch.testing.assert_close(out, torch.stack(rows), rtol=1e-12, atol=1e-12)
    plain = ops.conceptor_project(h, given, index, backend=backend)
    torch.testing.assert_close(
        plain, torch.stack([C[k] @ x for x, k in zip(h, index.tolist())]), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("backend", FAST)
def test_short_forms_are_the_long_ones(backend):
    """(d, d) and (d, r) for one conceptor, a number or () for beta, (d,) for the mean."""
    h, U, s, _, _, mean = drawn(K=1).values()
    C = dense_of(U, s)
    zeros = torch.zeros(len(h), dtype=torch.int64)
    for long, short in ((C, C[0]), (LowRank(U, s), LowRank(U[0], s[0]))):
        full = ops.conceptor_project(h, long, zeros, beta=torch.tensor([0.7]).double(), mean=mean, backend=backend)
        for beta in (0.7, torch.tensor(0.7).double()):
            tolerance = {"rtol": 1e-6, "atol": 1e-6}  # 0.7 is another number in float32
            some = ops.conceptor_project(h, short, beta=beta, mean=mean[0], backend=backend)
            torch.testing.assert_close(full, some, **tolerance)
    h, U, s, index, _, mean = drawn().values()
    full = ops.conceptor_project(h, LowRank(U, s), index, mean=mean[:1].expand(4, -1), backend=backend)
    assert torch.equal(full, ops.conceptor_project(h, LowRank(U, s), index, mean=mean[0], backend=backend))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("beta", [0.1, 3, 0.0])
def test_a_number_is_not_rounded_to_a_half(backend, beta):
    """beta = 0.1 in bfloat16 would be off by 4e-4: as a number it is exact."""
    inputs = drawn(dtype=torch.bfloat16)
    h, U, s, index, _, mean = inputs.values()
    for spec, given in ((LOW_RANK, {"U": U, "s": s}), (SPEC, {"C": dense_of(U, s)})):
        case = {"h": h, **given, "index": index, "beta": beta, "mean": mean}
        if backend == "reference":  # torch rounds its intermediates there
            case = {n: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in case.items()}
        assert spec.check(case, {"h_new": spec.function(**case, backend=backend)})["h_new"] <= 1


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("rank", [0, 6])
def test_low_rank_is_the_dense_product_within_both_bounds(backend, rank):
    inputs = drawn(r=rank, dtype=torch.float32)
    h, U, s, index, beta, mean = inputs.values()
    y = ops.conceptor_project(h, LowRank(U, s), index, beta=beta, mean=mean, backend=backend)
    assert LOW_RANK.check(inputs, {"h_new": y})["h_new"] <= 1
    wide = {n: v.double() if v.is_floating_point() else v for n, v in inputs.items()}
    C = dense_of(wide.pop("U"), wide.pop("s"))
    z = ops.conceptor_project(**wide, C=C, backend=backend)
    assert LOW_RANK.check(inputs, {"h_new": z.float()})["h_new"] <= 1


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", [SPEC.name, LOW_RANK.name])
def test_renaming_conceptors_and_shuffling_rows_change_nothing(backend, name):
    spec = REGISTRY[name]
    shape = {"B": 50, "K": 4, "d": 23, "r": 6} if name == LOW_RANK.name else {"B": 50, "K": 4, "d": 23}
    inputs = spec.make(shape, torch.float64, torch.Generator().manual_seed(5), 1.0, False)
    first = spec.function(**inputs, backend=backend)
    names, rows = torch.tensor([2, 0, 3, 1]), torch.randperm(50, generator=torch.Generator().manual_seed(0))
    inverse = torch.argsort(names)
    renamed = {n: v if n in spec.rows else v[names] for n, v in inputs.items()} | {"index": inverse[inputs["index"]]}
    shuffled = {n: v[rows] if n in spec.rows else v for n, v in inputs.items()}
    torch.testing.assert_close(spec.function(**renamed, backend=backend), first, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(spec.function(**shuffled, backend=backend), first[rows], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", FAST)
def test_conceptors_without_rows_get_zero_gradients(backend):
    h, U, s, _, beta, mean = drawn(B=6).values()
    index = torch.tensor([3, 1, 1, 3, 3, 1])
    for C in (LowRank(U, s), (dense_of(U, s),)):
        leaves = [t.clone().requires_grad_() for t in (*C, beta, mean)]
        given = LowRank(*leaves[:2]) if isinstance(C, LowRank) else leaves[0]
        ops.conceptor_project(
            h, given, index, beta=leaves[-2], mean=leaves[-1], backend=backend
        ).square().sum().backward()
        for leaf in leaves:
            assert not leaf.grad[[0, 2]].any()
            assert leaf.grad[[1, 3]].any()


@pytest.mark.parametrize("spec", [SPEC, LOW_RANK], ids=lambda s: s.name)
def test_bounds_catch_planted_bugs(spec):
    """What goes wrong in such kernels: a term is dropped, a neighbour's conceptor, a transposed matrix, μ left out."""
    generator = torch.Generator().manual_seed(3)
    inputs = spec.make({**spec.shapes[1], "d": 64}, torch.float32, generator, 1.0, False)
    right = spec.function(**inputs)
    assert spec.check(inputs, {"h_new": right})["h_new"] <= 1

    def caught(**changed) -> bool:
        return spec.check(inputs, {"h_new": spec.function(**{**inputs, **changed})})["h_new"] > 1

    h, mean, index = (inputs[n].clone() for n in ("h", "mean", "index"))
    h[4, 7] = mean[index[4], 7]
    assert caught(h=h)
    index[9] = (index[9] + 1) % 5
    assert caught(index=index)
    mean[0] = 0
    assert caught(mean=mean)
    beta = inputs["beta"].clone()
    beta[1] *= 1 + 2.0**-12
    assert caught(beta=beta)
    if spec is SPEC:
        assert caught(C=inputs["C"].mT)
    else:
        s = inputs["s"].clone()
        s[2, 3] = 0
        assert caught(s=s)
    # and of the gradients, each input's in turn
    live = {n: v.requires_grad_() if n in spec.differentiable else v for n, v in inputs.items()}
    grad = torch.randn(right.shape, generator=generator)
    grads = dict(
        zip(
            spec.differentiable,
            torch.autograd.grad(spec.function(**live), [live[n] for n in spec.differentiable], grad),
        )
    )
    detached = {n: v.detach() for n, v in inputs.items()}
    assert max(spec.check_grads(detached, {}, {"h_new": grad}, grads).values()) <= 1
    for name, g in grads.items():
        wrong = g.clone()
        at = wrong.abs().argmax()
        wrong.view(-1)[at] *= 1 + 1e-2
        assert spec.check_grads(detached, {}, {"h_new": grad}, {**grads, name: wrong})[name] > 1


@pytest.mark.skipif("cpp" not in FAST, reason="the C++ library is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_panels_and_tiles_of_every_size(dtype):
    """More rows than a panel holds, more columns than a tile, one conceptor or many."""
    for B, K, d, r in ((600, 1, 300, 7), (600, 3, 40, 300), (2, 1, 520, 3), (900, 2, 257, 20)):
        inputs = LOW_RANK.make({"B": B, "K": K, "d": d, "r": r}, dtype, torch.Generator().manual_seed(B), 1.0, False)
        assert LOW_RANK.check(inputs, {"h_new": LOW_RANK.function(**inputs, backend="cpp")})["h_new"] <= 1
        factors = {"C": dense_of(inputs.pop("U").float(), inputs.pop("s").float()).to(dtype)}
        inputs |= factors
        assert SPEC.check(inputs, {"h_new": SPEC.function(**inputs, backend="cpp")})["h_new"] <= 1


@pytest.mark.skipif("cpp" not in FAST, reason="the C++ library is not built")
@pytest.mark.parametrize("rows", [2, 130])
@pytest.mark.parametrize("d", [40, 257, 520])
def test_bfloat16_is_multiplied_by_pairs(rows, d):
    """Few rows and many, either way through a matrix, and sums over rows: a processor that multiplies pairs takes
    numbers below the smallest normal one for 0, and the bound knows."""
    g = torch.Generator().manual_seed(d)
    inputs = SPEC.make({"B": rows, "K": 1, "d": d, "plain": 1}, torch.bfloat16, g, 1.0, False)
    h, C = inputs["h"], inputs["C"]
    h[1] = 0
    h[1, 3] = 2.0**60
    C[0, :, 3] = C[0, 3] = 2.0**-130
    grad = torch.randn(rows, d, generator=g).bfloat16()
    grad[0] = 0
    grad[0, 3] = 2.0**60
    live = {n: v.requires_grad_() if n in ("h", "C") else v for n, v in inputs.items()}
    out = SPEC.function(**live, backend="cpp")
    d_h, d_C = torch.autograd.grad(out, (h, C), grad)
    inputs = {n: v.detach() if isinstance(v, Tensor) else v for n, v in inputs.items()}
    assert SPEC.check(inputs, {"h_new": out.detach()})["h_new"] <= 1
    found = SPEC.check_grads(inputs, {}, {"h_new": grad}, {"h": d_h, "C": d_C})
    assert max(found.values()) <= 1
    pairs = multiplies_pairs() and d % 2 == 0
    assert bool((out[1] == 0).all()) == pairs
    assert bool((d_h[0] == 0).all()) == pairs
    # rows are always paired with rows
    tiny = torch.full((rows, d), 2.0**-130).bfloat16()
    huge = torch.full((rows, d), 2.0**60).bfloat16()
    of_rows = _grouped.outer(tiny, huge, None, 1, "cpp")
    assert bool((of_rows == 0).all()) == multiplies_pairs()


@pytest.mark.skipif("cpp" not in FAST, reason="the C++ library is not built")
def test_halves_on_a_processor_without_pairs():
    code = """
import torch
from clipsteer.ops import REGISTRY
spec = REGISTRY["conceptor_project"]
for dtype in (torch.bfloat16, torch.float16):
    for B, d in ((19, 206), (129, 32), (60, 204)):
        inputs = spec.make({"B": B, "K": 1, "d": d}, dtype, torch.Generator().manual_seed(B), 1.0, False)
        live = {n: v.requires_grad_() if n in spec.differentiable else v for n, v in inputs.items()}
        out = spec.function(**live, backend="cpp")
        grad = torch.ones_like(out)
        grads = dict(zip(spec.differentiable, torch.autograd.grad(out, [live[n] for n in spec.differentiable], grad)))
        inputs = {n: v if v is None else v.detach() for n, v in inputs.items()}
        assert spec.check(inputs, {"h_new": out.detach()})["h_new"] <= 1
        assert max(spec.check_grads(inputs, {}, {"h_new": grad}, grads).values()) <= 1
h = torch.full((1, 2), 2.0**60).bfloat16()
assert spec.function(h=h, C=torch.full((2, 2), 2.0**-130).bfloat16(), backend="cpp").all()
"""
    env = {**os.environ, "CLIPSTEER_CPU_ISA": "avx512f", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif("cpp" not in FAST, reason="the C++ library is not built")
def test_kernels_check_their_arguments_themselves():
    x, W, index = torch.zeros(4, 6), torch.zeros(3, 6, 2), torch.zeros(4, dtype=torch.int64)
    for bad in (3, -1, 2**40):
        wrong = torch.full((4,), bad)
        for op, args in (
            ("grouped_matmul", (x, W, wrong, None, None, False)),
            ("grouped_outer", (x, x, wrong, 3)),
            ("low_rank_project", (x, W, torch.zeros(3, 2), wrong, None)),
        ):
            with pytest.raises((RuntimeError, ValueError, IndexError), match=str(bad)):
                _dispatch.call("cpp", op, *args)
    for op, args in (
        ("grouped_matmul", (x, W, None, None, None, False)),
        ("grouped_matmul", (x, W, index, None, None, True)),
        ("grouped_matmul", (x, W, index, None, torch.zeros(3, 6), False)),
        ("grouped_matmul", (x, W, index, torch.zeros(2), None, False)),
        ("grouped_outer", (x, x[:3], index, 3)),
        ("low_rank_project", (x, W, torch.zeros(3, 3), index, None)),
        ("low_rank_project", (x, W.double(), torch.zeros(3, 2), index, None)),
    ):
        with pytest.raises((RuntimeError, ValueError), match="expected"):
            _dispatch.call("cpp", op, *args)


@pytest.mark.skipif("cpp" not in FAST, reason="the C++ library is not built")
def test_compiles_with_the_factors_as_an_argument():
    """LowRank passes through torch.compile as what it is, and a number for beta does too."""
    torch._dynamo.reset()
    compiled = torch.compile(ops.conceptor_project, fullgraph=True, dynamic=True, backend="aot_eager")
    for B, K in ((9, 3), (17, 4)):
        h, U, s, index, _, _ = drawn(B=B, K=K, dtype=torch.float32).values()
        assert torch.equal(
            compiled(h, LowRank(U, s), index, beta=0.5), ops.conceptor_project(h, LowRank(U, s), index, beta=0.5)
        )
    one = compiled(h, LowRank(U[0], s[0]), beta=0.5)
    assert torch.equal(one, ops.conceptor_project(h, LowRank(U[0], s[0]), beta=0.5))


MEMORY = """
import sys, torch
from clipsteer import ops
from clipsteer.testing import bench
B, K, d = 256, 48, 768
h, C = torch.randn(B, d), torch.randn(K, d, d)  # 0.8 MB beside 113 MB
index = torch.arange(B) % K
mean, beta = torch.randn(K, d), torch.rand(K)
call = lambda: ops.conceptor_project(h, C, index, beta=beta, mean=mean, backend="cpp")
call()
print(bench.extra_memory(call, "cpu"))
"""


@pytest.mark.skipif("cpp" not in FAST or not os.path.exists("/proc/self/clear_refs"), reason="needs C++ on Linux")
def test_no_matrix_is_copied():
    """Extra memory is a few (rows, d) and a tile: a gathered or permuted C would take 113 MB or more."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 8 * 2**20


def flags_of(t: Tensor) -> list[str]:
    """What Linux was told of the memory that a tensor's middle lies in."""
    here, inside = t.data_ptr() + t.nbytes // 2, False
    with open("/proc/self/smaps") as file:
        for line in file:
            first = line.split(maxsplit=1)[0]
            if not first.endswith(":"):
                start, _, end = first.partition("-")
                inside = int(start, 16) <= here < int(end, 16)
            elif inside and first == "VmFlags:":
                return line.split()[1:]
    return []


@pytest.mark.skipif("cpp" not in FAST, reason="the C++ library is not built")
@pytest.mark.skipif(not os.path.exists("/sys/kernel/mm/transparent_hugepage"), reason="needs Linux with huge pages")
def test_gradients_of_all_conceptors_ask_for_huge_pages():
    """A fresh 37.7 MB in pages of 4 KiB takes three times as long as what is written into it."""
    C = torch.ones(16, 768, 768, requires_grad=True)
    y = ops.conceptor_project(torch.ones(2, 768), C, torch.tensor([0, 3]), backend="cpp")
    (grad,) = torch.autograd.grad(y.sum(), [C])
    assert "hg" in flags_of(grad)


def test_low_rank_is_a_pytree():
    pair = LowRank(torch.ones(2, 3, 1), torch.ones(2, 1))
    doubled = torch.utils._pytree.tree_map(lambda t: t * 2, pair)
    assert isinstance(doubled, LowRank)
    assert torch.equal(doubled.s, pair.s * 2)


@pytest.mark.skipif("cpp" not in FAST, reason="the C++ library is not built")
@pytest.mark.parametrize("spec", [SPEC, LOW_RANK], ids=lambda s: s.name)
def test_derivatives_without_an_index(spec):
    inputs = spec.make({**spec.small_shape, "K": 1}, torch.float64, torch.Generator().manual_seed(1), 1.0, False)
    assert inputs["index"] is None
    free = [inputs[n].requires_grad_() for n in spec.differentiable]
    smooth = lambda *tensors: spec.function(**{**inputs, **dict(zip(spec.differentiable, tensors))}, backend="cpp")
    assert torch.autograd.gradcheck(smooth, free)
    assert torch.autograd.gradgradcheck(smooth, free)


def test_derivatives_of_third_order_run_on_the_kernels():
    if "cpp" not in FAST:
        pytest.skip("the C++ library is not built")
    inputs = LOW_RANK.make(LOW_RANK.small_shape, torch.float64, torch.Generator().manual_seed(2), 1.0, False)

    def third(backend: str) -> list[Tensor]:
        live = {n: v.clone().requires_grad_() if n in LOW_RANK.differentiable else v for n, v in inputs.items()}
        leaves = [live[n] for n in LOW_RANK.differentiable]
        value = LOW_RANK.function(**live, backend=backend).pow(3).sum()
        for _ in range(3):
            grads = torch.autograd.grad(value, leaves, create_graph=True)
            value = sum(g.square().sum() for g in grads)
        return grads

    for a, b in zip(third("reference"), third("cpp")):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_closed_products_agree_with_torch():
    if "cpp" not in FAST:
        pytest.skip("the C++ library is not built")
    g = torch.Generator().manual_seed(0)
    a, b, index = (
        torch.randn(9, 4, generator=g),
        torch.randn(9, 5, generator=g),
        torch.tensor([2, 0, 2, 2, 0, 0, 2, 0, 2]),
    )
    expected = torch.stack([a[index == k].T @ b[index == k] for k in range(3)])
    torch.testing.assert_close(_grouped.outer(a, b, index, 3, "cpp"), expected)
    torch.testing.assert_close(_grouped.outer(a, b, None, 1, "cpp"), a.T @ b[None])
    torch.testing.assert_close(_grouped.group_sum(a, index, 3, "cpp"), torch.zeros(3, 4).index_add(0, index, a))
    by_hand = torch.stack([x @ expected[k] for x, k in zip(a, index)])
    torch.testing.assert_close(_grouped.matmul(a, expected, index, None, None, False, "cpp"), by_hand)


def mistakes():
    h, C, index = torch.zeros(4, 6), torch.zeros(3, 6, 6), torch.zeros(4, dtype=torch.int64)
    U, s = torch.zeros(3, 6, 2), torch.zeros(3, 2)
    call = ops.conceptor_project
    yield ValueError, r"h must be of shape \(..., d = 6\)", lambda: call(h[:, :5], C, index)
    yield ValueError, "C must be of shape", lambda: call(h, C[..., :4], index)
    yield ValueError, "U must be of shape", lambda: call(h, LowRank(U[0, 0], s), index)
    yield ValueError, "s must be of shape", lambda: call(h, LowRank(U, s[:2]), index)
    yield ValueError, "index must be given, as there are K = 3", lambda: call(h, C)
    yield ValueError, "index must be of shape h's leading shape", lambda: call(h, C, index[:2])
    yield ValueError, r"index must be in \[0, 3\)", lambda: call(h, C, index + 3)
    yield ValueError, r"index must be in \[0, 3\)", lambda: call(h, C, index - 1)
    yield TypeError, "index must be int64", lambda: call(h, C, index.int())
    yield ValueError, "beta must be of shape", lambda: call(h, C, index, beta=torch.zeros(2))
    yield TypeError, "beta must be a number", lambda: call(h, C, index, beta="1")
    yield ValueError, "mean must be of shape", lambda: call(h, C, index, mean=torch.zeros(4))
    yield TypeError, "dtype", lambda: call(h, C.double(), index)
    yield TypeError, "C must be a tensor", lambda: call(h, [1.0], index)
    yield ValueError, "device", lambda: call(h, C.to("meta"), index)
    yield ValueError, "backend must be one of", lambda: call(h, C, index, backend="fast")
    yield (
        RuntimeError,
        "no kernel for conceptor_project, which reference, cpp, triton",
        lambda: call(h, C, index, backend="cuda"),
    )
    yield (
        RuntimeError,
        "no kernel for conceptor_project_low_rank",
        lambda: call(h, LowRank(U, s), index, backend="cuda"),
    )


@pytest.mark.parametrize("number", range(len(list(mistakes()))))
def test_mistakes_are_named(number):
    error, message, call = list(mistakes())[number]
    with pytest.raises(error, match=message):
        call()


def test_explain_says_that_cuda_has_no_kernel():
    told = {s.backend: s for s in ops.explain("conceptor_project", torch.zeros(2, 3))}
    assert not told["cuda"].usable
    assert "no kernel" in told["cuda"].reason
    assert "no kernel" not in told["triton"].reason


INTERPRETED = """
import torch
from clipsteer.kernels import conceptor_project as kernels
from clipsteer.ops import REGISTRY, _dispatch
from clipsteer.ops._spec import spec_errors
shape = {"B": 70, "K": 3, "d": 40, "r": 17}
many = kernels._many
# group numbers in one piece, in several for the sorting kernel, and sorted by torch
for kernels.STEP, kernels._many in ((4096, many), (16, many), (4096, lambda rows, groups: True)):
    for name in ("conceptor_project", "conceptor_project_low_rank"):
        case = {n: v for n, v in shape.items() if n != "r" or "low_rank" in name}
        errors = spec_errors(REGISTRY[name], case, torch.float32, seed=0, backend="triton", device="cpu")
        assert max(errors.values()) <= 1
    # small integers, whose products are exact wherever a row lies in them
    h, C = torch.randint(-2, 3, (70, 40)).float(), torch.randint(-2, 3, (3, 40, 40)).float()
    index = torch.arange(70) % 3
    known = _dispatch.call("triton", "grouped_matmul", h, C, index, None, None, True)
    beyond = torch.where(index == 1, torch.tensor([7, -1, 2**40])[torch.arange(70) % 3], index)
    some = _dispatch.call("triton", "grouped_matmul", h, C, beyond, None, None, True)  # on a GPU nobody looks at them
    assert torch.equal(some[index != 1], known[index != 1])
    some = _dispatch.call("triton", "grouped_outer", h, h, beyond, 3)
    assert not some[1].any() and some[0].any() and some[2].any()
# a rank is padded to a tile, whose zeros an infinity must not turn into NaN
h, U, s = torch.tensor([[float("inf"), 1.0, 1.0]]), torch.ones(1, 3, 5), torch.ones(1, 5)
for dtype in (torch.float32, torch.float16):
    y = _dispatch.call("triton", "low_rank_project", *(t.to(dtype) for t in (h, U, s)), None, None)
    assert (y == float("inf")).all()
"""


@pytest.mark.slow
def test_triton_finds_the_rows_of_a_group_in_every_way_and_keeps_infinities(interpret):
    interpret(INTERPRETED)
