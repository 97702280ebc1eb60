"""int8 screening finds what a search through every float32 pre-activation finds, on whatever it is given."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from clipsteer import ops
from clipsteer.ops import REGISTRY, _dispatch


def screening_runs(pairs: bool = False) -> bool:
    if _dispatch.missing("cpp") is not None:
        return False
    try:
        torch.ops.clipsteer_cpp.topk_encode_screened(*torch.ones(2, 1, 1).bfloat16(), None, 1, pairs=pairs)
    except (RuntimeError, ValueError):
        return False
    return True


needs_vnni = pytest.mark.skipif(not screening_runs(), reason="no AVX512-VNNI here, or the C++ library is not built")

needs_pairs = pytest.mark.skipif(not screening_runs(True), reason="no AVX512-BF16 here, or no C++ library")

HALVES = (torch.bfloat16, torch.float16)


def sums_of(x: Tensor, W: Tensor) -> Tensor:  # (B, n) of (B, d) and (n, d)
    """Every product of rows, summed as the survivors of screening are: one row at a time goes past it."""
    out = x.new_empty(len(x), len(W))
    for row, into in zip(x.split(1), out.split(1)):
        acts, indices = torch.ops.clipsteer_cpp.topk_encode(row, W, None, len(W), False, None, None, False)
        into.scatter_(1, indices, acts)
    return out


def check_screened(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    k: int,
    scale: Tensor | None = None,
    columns: Tensor | None = None,
    pairs: bool = False,
) -> Tensor:
    """Holds the screened result to a full search, and returns how many columns of each row were computed in float32.
    So it is of a dictionary that lies across, to the bit, and without the relu."""
    screened = torch.ops.clipsteer_cpp.topk_encode_screened
    acts, indices, computed = screened(x, W, b, k, scale, columns, True, pairs)
    every = torch.arange(W.shape[0]) if columns is None else columns
    # 16-bit rows are summed in float32 and rounded once
    pre = sums_of(x.float(), W.float()[every])
    pre = pre if b is None else pre + b[every].float()
    pre = pre if scale is None else pre * scale[every].float()
    nan = pre.isnan().any(-1)
    values, order = torch.sort(pre[~nan] + 0.0, dim=-1, descending=True, stable=True)
    assert torch.equal(indices[~nan], every[order[:, :k]])
    assert torch.equal(acts[~nan], values[:, :k].relu().to(x.dtype))
    assert bool(acts[nan].isnan().all())
    assert torch.equal(indices[nan], every[:k].expand(int(nan.sum()), -1))
    signed = screened(x, W.t().contiguous().t(), b, k, scale, columns, False, pairs)
    assert torch.equal(signed[0][~nan], values[:, :k].to(x.dtype))
    assert torch.equal(signed[1], indices)
    if not bool(pre.isfinite().all()):  # sums that overflow say little about the true ones
        return computed
    inputs = {"x": x, "W_enc": W, "b_enc": x.new_zeros(W.shape[0]) if b is None else b, "k": k}
    inputs |= {"scale": scale, "columns": columns}
    errors = REGISTRY["topk_encode_options"].check(inputs, {"acts": acts, "indices": indices})
    assert max(errors.values()) <= 1, errors
    return computed


def draw(kind: str, B: int, d: int, n: int, k: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    x, W = torch.randn(B, d, generator=g), torch.randn(n, d, generator=g)
    some, one = torch.rand(d, generator=g) < 0.1, int(torch.randint(d, (), generator=g))
    if kind == "integers":
        return (2 * x).round(), (2 * W).round()
    if kind == "outliers":  # in the activations, as in CLIP, and sometimes in the weights
        x[:, some] *= 1000
        W[: n // 3, one] *= 100
    elif kind == "heavy tails":
        return x**5, W**5
    elif kind == "duplicates":
        W = W[torch.randint(max(1, n // 4), (n,), generator=g)]
    elif kind == "near ties":
        W = W[:1] + 1e-7 * W
    elif kind == "constant rows":
        x, W = x[:, :1].expand(B, d).contiguous(), W[:, :1].expand(n, d).contiguous()
    elif kind == "all equal":
        W = W[:1].expand(n, d).contiguous()
    elif kind == "zeros":
        x[::2], W[::3] = 0, 0
    elif kind == "denormals":
        return x * 1e-40, W * (1.0 if n % 2 else 1e-3)
    elif kind == "denormal weights":
        W[::2] *= 1e-41
    elif kind == "wild norms":
        return x * 10.0 ** torch.randint(-30, 16, (B, 1), generator=g), W * 10.0 ** torch.randint(
            -12, 10, (n, 1), generator=g
        )
    elif kind == "wild dimensions":
        power = 10.0 ** torch.randint(-6, 7, (d,), generator=g)
        return x * power, W / power
    elif kind == "overflow":
        return x * 1e25, W * 1e18
    elif kind == "common part":
        return x + 30 * torch.randn(d, generator=g), W + 3
    elif kind == "not finite":
        x[0, one] = float("nan")
        W[:: max(1, n // 3), one] = float("inf")
    return x, W


KINDS = (
    "gaussian", "integers", "outliers", "heavy tails", "duplicates", "near ties", "constant rows", "all equal", "zeros",
    "denormals", "denormal weights", "wild norms", "wild dimensions", "overflow", "common part", "not finite",
)  # fmt: skip


def bias_of(kind: int, n: int, g: torch.Generator) -> Tensor | None:
    b = torch.randn(n, generator=g)
    if kind == 0:
        return None
    if kind == 1:
        return (2 * b).round()
    if kind == 2:
        return b * 1e6
    if kind == 3:
        b[:: max(1, n // 5)] = -float("inf")
    return b


def scale_of(kind: int, n: int, g: torch.Generator) -> Tensor:
    scale = torch.randn(n, generator=g)
    if kind == 0:
        return (2 * scale).round()  # zeros among them
    if kind == 1:
        return scale * 10.0 ** torch.randint(-12, 13, (n,), generator=g)
    if kind == 2:
        return scale * 10.0 ** torch.randint(-44, 30, (n,), generator=g)
    return scale.abs()


def fuzz(
    seed: int, cases: int, options: bool = False, dtype: torch.dtype = torch.float32, pairs: bool = False
) -> tuple[int, int]:
    """How many pre-activations of all were computed; a mismatch raises. With a scale, and of some columns, if so."""
    g = torch.Generator().manual_seed(seed)
    done = total = 0
    for case in range(cases):
        kind = KINDS[case % len(KINDS)]
        B, d = int(torch.randint(1, 20, (), generator=g)), int(torch.randint(1, 130, (), generator=g))
        n = int(torch.randint(1, 2600 if case % 7 == 0 else 400, (), generator=g))
        k = n if case % 50 == 0 else int(torch.randint(1, min(n, 40) + 1, (), generator=g))
        x, W = draw(kind, B, d, n, k, g)
        b = bias_of(1 if kind == "integers" else int(torch.randint(5, (), generator=g)), n, g)
        scale = columns = None
        if options:
            scale = scale_of(int(torch.randint(4, (), generator=g)), n, g) if case % 5 else None
            if case % 3:
                columns = torch.randperm(n, generator=g)[: max(k, n - int(torch.randint(90, (), generator=g)))]
        x, W, b, scale = (None if t is None else t.to(dtype) for t in (x, W, b, scale))
        try:
            computed = check_screened(x, W, b, k, scale, columns, pairs)
            if kind == "integers" and not options:
                plain = ops.topk_encode(x, W, b, k=k, screen="off", backend="cpp")
                screened = torch.ops.clipsteer_cpp.topk_encode_screened(x, W, b, k, pairs=pairs)
                assert all(map(torch.equal, plain, screened[:2]))
        except AssertionError as error:
            raise AssertionError(f"case {case} of seed {seed}: {kind}, {(B, d, n, k)}: {error}") from error
        done, total = done + int(computed.sum()), total + B * n
    return done, total


@needs_vnni
def test_screening_equals_a_full_search():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # several threads begin without each other's thresholds and compute more
        done, total = fuzz(0, 160)
    finally:
        torch.set_num_threads(before)
    assert done < total / 2


@needs_vnni
def test_screening_with_a_scale_and_columns_equals_a_full_search():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        done, total = fuzz(3, 240, options=True)
    finally:
        torch.set_num_threads(before)
    assert done < total * 0.7


@needs_vnni
@pytest.mark.parametrize("dtype", HALVES)
def test_screening_of_half_precision_equals_a_full_search(dtype):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        done, total = fuzz(5, 64, dtype=dtype)
        scaled = fuzz(6, 64, options=True, dtype=dtype)
    finally:
        torch.set_num_threads(before)
    assert done < total * 0.6
    assert scaled[0] < scaled[1] * 0.8


@needs_pairs
def test_screening_by_pairs_equals_a_full_search():
    """What the instruction loses is bounded, and what is left is the same to the bit."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        done, total = fuzz(9, 64, dtype=torch.bfloat16, pairs=True)
        fuzz(10, 64, options=True, dtype=torch.bfloat16, pairs=True)
    finally:
        torch.set_num_threads(before)
    assert done < total * 0.6


@needs_pairs
@pytest.mark.parametrize("threads", [1, 3])
def test_pairs_compute_little_but_the_winners(threads):
    """Bounds are that narrow; bits depend neither on threads nor on the other rows, nor on how W lies."""
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(70, 190, generator=g).bfloat16(), torch.randn(8219, 190, generator=g).bfloat16()
    b = torch.randn(8219, generator=g).bfloat16()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        computed = check_screened(x, W, b, 16, pairs=True)
        assert 16 <= int(computed.min()) <= int(computed.max()) <= threads * 20
        part = torch.ops.clipsteer_cpp.topk_encode_screened(x[40:47], W, b, 16, pairs=True)
    finally:
        torch.set_num_threads(before)
    whole = torch.ops.clipsteer_cpp.topk_encode_screened(x, W, b, 16)  # by bytes
    assert all(torch.equal(all_of[40:47], some) for all_of, some in zip(whole[:2], part[:2]))


@needs_pairs
def test_the_bound_of_pairs_holds_where_sums_differ_by_their_order_alone():
    """Every column has the same products, in another order: none may be ruled out, and the order of float32 decides."""
    g = torch.Generator().manual_seed(0)
    x, W = torch.full((6, 126), 1.3671875).bfloat16(), torch.randn(126, generator=g).bfloat16()
    W = W[torch.rand(700, 126, generator=g).argsort(-1)]
    computed = check_screened(x, W, None, 40, pairs=True)
    assert int(computed.min()) == 700
    W[350] = float("nan")  # behind more winners than there is room for
    check_screened(x, W, None, 40, pairs=True)


def test_pairs_are_of_bf16_alone():
    with pytest.raises((RuntimeError, ValueError), match=r"bfloat16|VNNI"):
        torch.ops.clipsteer_cpp.topk_encode_screened(torch.ones(1, 1), torch.ones(1, 1), None, 1, pairs=True)


@needs_vnni
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [130, 515])
def test_threads_share_rows_without_more_work(rows, dtype):
    """Groups of rows, slots of columns or both, with a part of a tile at the end, find the same among many ties; two
    groups compute as little as one thread."""
    g = torch.Generator().manual_seed(0)
    x, W = (2 * torch.randn(rows, 128, generator=g)).round(), (2 * torch.randn(4200, 128, generator=g)).round()
    x[70, 3], x[rows - 1, 5] = float("nan"), float("inf")
    x, W = x.to(dtype), W.to(dtype)
    computed, first = {}, None
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 4, 6):
            torch.set_num_threads(threads)
            *found, computed[threads] = torch.ops.clipsteer_cpp.topk_encode_screened(x, W, None, 16)
            batch = ops.batch_topk_encode(x, W, count=16 * rows, backend="cpp")
            above = ops.threshold_encode(x, W, threshold=torch.tensor(90.0).to(dtype), backend="cpp")
            now = [*found, *batch, *above]
            first = first or now
            for one, other in zip(now, first):
                torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    finally:
        torch.set_num_threads(before)
    assert int(computed[2].sum()) <= 1.02 * int(computed[1].sum())


@needs_vnni
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_rules_most_columns_out(dtype):
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(70, 190, generator=g).to(dtype), torch.randn(8219, 190, generator=g).to(dtype)
    b = torch.randn(8219, generator=g).to(dtype)
    assert int(check_screened(x, W, b, 16).max()) < 8219 // 8


@needs_vnni
@pytest.mark.slow
def test_screening_equals_a_full_search_on_many_cases():
    fuzz(1, 2000)
    fuzz(4, 2000, options=True)
    for dtype in HALVES:
        fuzz(7, 100, dtype=dtype)
        fuzz(8, 100, options=True, dtype=dtype)


@needs_vnni
def test_a_scale_rules_out_as_many_columns():
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(70, 192, generator=g), torch.randn(6000, 192, generator=g)
    scale = 1 + torch.rand(6000, generator=g)
    scale[::2] *= -1  # the bound's other side
    columns = torch.randperm(6000, generator=g)[:5000]
    assert int(check_screened(x, W, None, 16, scale, columns).max()) < 5000 // 8
    scale[7] = 1e-40  # always computed, as sums of denormal numbers keep no bound
    scale[8] = 0.0
    computed = check_screened(x, W, torch.ones(6000), 16, scale)
    assert int(computed.max()) < 6000 // 8


@needs_vnni
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("size", [1.0, 2.0**-32, 2.0**32, 3.0e-7])
def test_a_scaled_bound_holds_where_it_is_attained(sign, size):
    """As below for the digits of W: 64 columns without an error, which beats the others by less than the bound."""
    x, W = torch.ones(6, 128), torch.ones(896, 128)
    x, x[:, 0] = 0.32 * x, 0
    W *= 40.499 / 127
    W[:64] *= 1 - 1e-4
    W[:64, 0], W[64:, 0] = 0, 1
    scale = torch.full((896,), sign * size)
    check_screened(x, sign * W, None, 3, scale)
    found = torch.ops.clipsteer_cpp.topk_encode_screened(x, sign * W, None, 3, scale)
    assert int(found[1].min()) >= 64


@needs_vnni
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_most_columns_are_ruled_out(threads, bias):
    """Over two blocks of rows, with a partial tile at every end; the bits do not depend on the thread count."""
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(515, 190, generator=g), torch.randn(8219, 190, generator=g)
    x[:, 7] += 50  # an outlier dimension must cost nothing
    W[:, 7] *= 0.1
    b = torch.randn(8219, generator=g) if bias else None
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        computed = check_screened(x, W, b, 16)
        assert int(computed.min()) >= 16
        assert int(computed.max()) < 8219 // 8
        by_default = ops.topk_encode(x, W, b, k=16, backend="cpp")
        torch.set_num_threads(1)
        for found, again in zip(by_default, torch.ops.clipsteer_cpp.topk_encode_screened(x, W, b, 16)):
            assert torch.equal(found, again)
    finally:
        torch.set_num_threads(before)


@needs_vnni
@pytest.mark.parametrize("part", ["x", "W", "sums", "bias"])
def test_the_bound_holds_where_it_is_attained(part):
    """64 columns without an error set the k-th value; the rest beats it by less than one part of the bound."""
    g = torch.Generator().manual_seed(0)
    x, W, b = torch.ones(6, 128), torch.ones(896, 128), None
    half = 40.499 / 127  # beside a largest element of 1, a digit that is rounded by half a step
    if part in ("x", "bias"):
        x[:, 1:], W[:, 0], W[:64] = half, 0, 0
        W[:64, 0] = 127 * half * (1 - 1e-4)
        if part == "bias":  # x . W is .503 (.496 by digits), or .45 in the first 64 columns, where numbers lie 1 apart
            W *= 0.503 / W[-1].dot(x[0])
            W[:64, 0], b = 0.45, torch.full((896,), 2.0**23)
    elif part == "W":
        x, x[:, 0] = 0.32 * x, 0
        W *= half
        W[:64] *= 1 - 1e-4
        W[:64, 0], W[64:, 0] = 0, 1
    else:  # digits are exact and all products equal, but for the order in which they are summed
        x *= 254 * 65521
        W = torch.arange(128.0)[torch.rand(896, 128, generator=g).argsort(-1)]
        W[:64] = W[sums_of(x, W)[0].argsort()[800]]
    check_screened(x, W, b, 3)
    assert int(torch.ops.clipsteer_cpp.topk_encode_screened(x, W, b, 3)[1].min()) >= 64


def spikes() -> tuple[Tensor, Tensor]:
    """Rows with spikes that the weights ignore, from none to one that leaves no digits for the rest of the row."""
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(70, 128, generator=g), torch.randn(6000, 128, generator=g)
    W[:, 0] *= 1e-8
    x[:, 0] = torch.linspace(0, 100, 70) ** 3
    return x, W


@needs_vnni
def test_rows_that_keep_too_many_candidates_are_computed_whole():
    computed = check_screened(*spikes(), None, 4)
    assert int(computed[0]) < 600
    assert int(computed[-1]) > 5000


@needs_vnni
def test_bits_depend_neither_on_threads_nor_on_other_rows():
    x, W = spikes()
    first = torch.ops.clipsteer_cpp.topk_encode_screened(x, W, None, 4)
    before = torch.get_num_threads()
    try:
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            other = torch.ops.clipsteer_cpp.topk_encode_screened(x, W, None, 4)
            assert all(map(torch.equal, first[:2], other[:2]))
    finally:
        torch.set_num_threads(before)
    alone = torch.ops.clipsteer_cpp.topk_encode_screened(x[40:47], W, None, 4)
    assert all(torch.equal(whole[40:47], part) for whole, part in zip(first[:2], alone[:2]))


@needs_vnni
def test_features_masked_by_the_bias_are_ruled_out():
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(70, 128, generator=g), torch.randn(6000, 128, generator=g)
    b = torch.zeros(6000).masked_fill(torch.rand(6000, generator=g) < 0.5, -float("inf"))
    assert int(check_screened(x, W, b, 4).max()) < 600


@needs_vnni
def test_a_nan_is_found_behind_infinite_winners():
    x, W, b = torch.ones(7, 65), torch.ones(300, 65), torch.zeros(300)
    b[:9], W[250, 3] = float("inf"), float("nan")
    check_screened(x, W, b, 8)


@needs_vnni
def test_weights_changed_behind_autograd_are_seen():
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(64, 128, generator=g), torch.nn.Parameter(torch.randn(4096, 128, generator=g))
    ops.topk_encode(x, W, k=8)
    W.data.neg_()
    check_screened(x, W.detach(), None, 8)
    for found, fresh in zip(ops.topk_encode(x, W, k=8), ops.topk_encode(x, W.detach().clone(), k=8)):
        assert torch.equal(found, fresh)


@needs_vnni
def test_gradients_and_compile_pass_through():
    g = torch.Generator().manual_seed(0)
    shapes = ((80, 128), (4096, 128), (4096,))
    # integers: a gradient is at most 80 · 2 · 8 · (128 · 8 · 8 + 8) < 2^24, so that every order of its sums is exact
    x, W, b = (torch.randint(-8, 9, shape, generator=g).float().requires_grad_() for shape in shapes)
    encode = torch.compile(lambda *t: ops.topk_encode(*t, k=8)[0], fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(encode(x, W, b).square().sum(), (x, W, b))
    plain = torch.autograd.grad(ops.topk_encode(x, W, b, k=8, screen="off")[0].square().sum(), (x, W, b))
    assert all(map(torch.equal, ours, plain))


def test_the_keyword_is_checked():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="screen must be"):
        ops.topk_encode(x, x, k=1, screen="on")


@needs_vnni
def test_without_amx_tiles():
    here = os.path.dirname(__file__)
    code = f"import sys; sys.path.insert(0, {here!r}); import test_screen; test_screen.fuzz(2, 160)"
    env = {**os.environ, "CLIPSTEER_CPU_ISA": "avx512", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(_dispatch.missing("cpp") is not None, reason="the C++ library is not built")
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_other_processors_stay_on_float32(isa):
    code = """
import torch
from clipsteer import ops
g = torch.Generator().manual_seed(0)
x, W = torch.randn(64, 128, generator=g), torch.randn(4096, 128, generator=g)
for a, b in zip(ops.topk_encode(x, W, k=8), ops.topk_encode(x, W, k=8, screen="off")):
    assert torch.equal(a, b)
try:
    torch.ops.clipsteer_cpp.topk_encode_screened(x, W, None, 8)
except (RuntimeError, ValueError) as error:
    assert "VNNI" in str(error), error
else:
    raise SystemExit("screened without VNNI")
"""
    env = {**os.environ, "CLIPSTEER_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
