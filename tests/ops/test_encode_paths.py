"""Which way a product is taken on a CPU, seen from outside: without torch's GEMM, in one order of its sums."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from clipsteer import ops, testing
from clipsteer.ops import REGISTRY

if not testing.supported("cpp"):
    pytest.skip("the C++ library is not built", allow_module_level=True)

LEVEL = torch.ops.clipsteer_cpp.isa_level()
FEW = 12 if LEVEL >= 2 else 4  # rows
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def screening_runs(pairs: bool = False) -> bool:
    try:
        torch.ops.clipsteer_cpp.topk_encode_screened(*torch.ones(2, 1, 1).bfloat16(), None, 1, pairs=pairs)
    except (RuntimeError, ValueError):
        return False
    return True


needs_vectors = pytest.mark.skipif(LEVEL == 0, reason="no AVX2 here")
needs_vnni = pytest.mark.skipif(not screening_runs(), reason="no AVX512-VNNI here")
needs_pairs = pytest.mark.skipif(not screening_runs(True), reason="no AVX512-BF16 here")

ENCODERS = {
    "topk_encode": {"k": 7},
    "threshold_encode": {"threshold": 0.5},
    "jumprelu_encode": {"threshold": 0.5, "bandwidth": 1.0},
    "batch_topk_encode": {"count": 40},
}


def cancelling(B: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Products of which the 1st and the 65th cancel: a number between them is lost unless lanes are summed apart."""
    large = 2.0 ** (30 if dtype == torch.float64 else 12)
    x, W = torch.zeros(B, 130), torch.zeros(n, 130)
    x[:, 0], x[:, 64], x[:, 129] = large, large, 1
    W[:, 0], W[:, 64] = large, -large
    W[:, 129] = torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(0)) / 256
    W[:, 3] = W[:, 129]
    x[:, 3] = 1
    return x.to(dtype), W.to(dtype)


def products_of_torch(name: str, x: Tensor, W: Tensor, **more: object) -> int:
    """How many of torch's matrix products an encoder makes."""
    limits = {key: torch.tensor(v, dtype=x.dtype) if key == "threshold" else v for key, v in ENCODERS[name].items()}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        getattr(ops, name)(x, W, **limits, **more, backend="cpp")
    return sum(event.count for event in seen.key_averages() if event.key == "aten::mm")


def check_paths() -> None:
    """Few rows on any instruction set with vectors; called in a process of another, too."""
    for dtype in DTYPES:
        for B in (1, 3, FEW):
            x, W = cancelling(B, 600, dtype)
            acts, indices = ops.topk_encode(x, W, k=9, backend="cpp")
            values, order = torch.sort(2 * W[:, 129], descending=True, stable=True)
            assert torch.equal(acts, values[:9].expand(B, -1)), (dtype, B)
            assert torch.equal(indices, order[:9].expand(B, -1)), (dtype, B)
            for name in ENCODERS:
                assert products_of_torch(name, x, W) == 0, (name, dtype, B)
                assert products_of_torch(name, x, W.t().contiguous().t()) == 0, (name, dtype, B)
                # where torch's GEMM is meant
                more = torch.zeros(FEW + 1, 130, dtype=dtype)
                assert products_of_torch(name, more, W) > 0, (name, dtype)


@needs_vectors
def test_few_rows_are_multiplied_where_the_dictionary_lies():
    check_paths()


@needs_vectors
def test_so_they_are_with_avx2():
    here = os.path.dirname(__file__)
    code = f"import sys; sys.path.insert(0, {here!r}); import test_encode_paths as t; t.check_paths(); t.check_bounds()"
    env = {**os.environ, "CLIPSTEER_CPU_ISA": "avx2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def check_bounds() -> None:
    """Few rows hold their bounds, of dictionaries either way, with a part of a panel and of a vector at the end."""
    g = torch.Generator().manual_seed(0)
    spec = REGISTRY["topk_encode_options"]
    for dtype in DTYPES:
        for shape in ("B d n k", "B d n k across", "B d n k m across"):
            sizes = {"B": FEW, "d": 131, "n": 1101, "k": 9, "across": 1, "m": 700}
            for scale in (1.0, 1e-30, 1e15):
                inputs = spec.make({key: sizes[key] for key in shape.split()}, dtype, g, scale, False)
                outputs = dict(zip(spec.outputs, spec.function(**inputs, backend="cpp")))
                errors = spec.check(inputs, outputs)
                assert max(errors.values()) <= 1, (dtype, shape, scale, errors)


def test_few_rows_hold_their_bounds():
    check_bounds()


@needs_vnni
@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("name", ENCODERS)
def test_large_products_are_screened(name, dtype):
    """Of few rows on, in half precision as in float32, of dictionaries either way."""
    for B in (13, 64):
        x, W = torch.ones(B, 128, dtype=dtype), torch.zeros(4096, 128, dtype=dtype)
        W[:40] = 1
        for lying in (W, W.t().contiguous().t()):
            assert products_of_torch(name, x, lying) == 0


@needs_pairs
@pytest.mark.parametrize("across", [False, True])
def test_many_winners_of_bf16_rows_are_screened_by_pairs(across):
    """As many as a 32nd of the features, of any number of rows, where bytes rule too little out: as of a row alone."""
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(70, 130, generator=g).bfloat16(), torch.randn(4096, 130, generator=g).bfloat16()
    W = W.t().contiguous().t() if across else W
    whole = ops.topk_encode(x, W, k=128, backend="cpp")
    assert all(map(torch.equal, whole, ops.topk_encode(x, W.contiguous(), k=128, backend="cpp")))
    for rows in (13, 30, 70):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            some = ops.topk_encode(x[:rows], W, k=128, backend="cpp")
        assert "aten::mm" not in {event.key for event in seen.key_averages()}
        assert all(torch.equal(part, all_of[:rows]) for part, all_of in zip(some, whole))
    alone = [ops.topk_encode(row, W.contiguous(), k=128, backend="cpp") for row in x[:5, None]]
    for parts, all_of in zip(zip(*alone), whole):
        assert torch.equal(torch.cat(parts), all_of[:5])


@needs_pairs
@pytest.mark.parametrize("name", ["threshold_encode", "jumprelu_encode"])
@pytest.mark.parametrize("single", [False, True])
def test_thresholds_of_bf16_rows_are_screened_by_pairs(name, single):
    """Of few features, too, with some of their numbers and rows out of the range that a bound is derived for."""
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(20, 131, generator=g).bfloat16(), torch.randn(1030, 131, generator=g).bfloat16()
    x[3], x[4, 7], W[5], W[6], W[7] = 0, float("inf"), 0, W[6] * 1e-30, W[7] * 1e30
    threshold = 10 + torch.rand(() if single else (1030,), generator=g).bfloat16()
    options = {"threshold": threshold, **({} if name == "threshold_encode" else {"bandwidth": 0.5}), "backend": "cpp"}
    assert products_of_torch(name, x, W) == 0
    found = getattr(ops, name)(x, W, **options)
    assert len(found.values) > 1000
    alone = [getattr(ops, name)(row, W, **options) for row in x[:, None]]
    assert torch.equal(found.offsets.diff(), torch.stack([one.offsets[1] for one in alone]))
    assert torch.equal(found.indices, torch.cat([one.indices for one in alone]))
    values = torch.cat([one.values for one in alone])
    torch.testing.assert_close(found.values, values, rtol=0, atol=0, equal_nan=True)


@needs_vnni
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_a_row_alone_has_the_bits_that_it_has_among_others(dtype):
    """Few rows, few more, and many: the same order of sums, screened or not."""
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(50, 190, generator=g).to(dtype), torch.randn(4200, 190, generator=g).to(dtype)
    whole = ops.topk_encode(x, W, k=30, backend="cpp")
    for rows in (1, 2, 5, 8, 12, 13, 31):
        few = ops.topk_encode(x[:rows], W, k=30, backend="cpp")
        assert all(torch.equal(part, all_of[:rows]) for part, all_of in zip(few, whole))
    across = ops.topk_encode(x, W.t().contiguous().t(), k=30, backend="cpp")
    assert all(map(torch.equal, across, whole))


@needs_vectors
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_few_rows_do_not_depend_on_threads(dtype):
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(3, 131, generator=g).to(dtype), torch.randn(2500, 131, generator=g).to(dtype)
    before = torch.get_num_threads()
    try:
        for lying in (W, W.t().contiguous().t()):
            torch.set_num_threads(1)
            first = ops.topk_encode(x, lying, k=9, backend="cpp")
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                assert all(map(torch.equal, ops.topk_encode(x, lying, k=9, backend="cpp"), first))
    finally:
        torch.set_num_threads(before)


@needs_vectors
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_small_or_not_finite_in_half_precision(dtype):
    """Denormal numbers count, and a NaN or an infinity is found, by few rows and by many."""
    tiny = torch.finfo(dtype).smallest_normal / 4
    for B in (2, 13, 70):
        x, W = torch.zeros(B, 130, dtype=dtype), torch.zeros(4200, 130, dtype=dtype)
        x[:, 5], W[77, 5], W[4100, 5] = tiny, 8, 16
        acts, indices = ops.topk_encode(x, W, k=2, backend="cpp")
        assert indices.tolist() == [[4100, 77]] * B
        assert torch.equal(acts, torch.tensor([16 * tiny, 8 * tiny], dtype=dtype).expand(B, -1))
        W[9, 5] = torch.inf
        assert ops.topk_encode(x, W, k=1, backend="cpp")[1].unique().tolist() == [9]
        W[4000, 5] = torch.nan
        assert bool(ops.topk_encode(x, W, k=1, backend="cpp")[0].isnan().all())
