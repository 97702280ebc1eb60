"""What is special about semantic_drift and its accumulator; what every op promises is in test_ops.py."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from _command import in_processes
from clipsteer import ops, testing
from clipsteer.continual.drift import DriftAccumulator, median_sigma
from clipsteer.ops import REGISTRY, _dispatch
from clipsteer.ops.semantic_drift import drift_sums, moved_by

FAST = [b for b in ("reference", "cpp") if testing.supported(b)]
SPEC = REGISTRY["semantic_drift"]


def drawn(N: int = 60, C: int = 5, d: int = 12, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple:
    inputs = SPEC.make({"N": N, "C": C, "d": d}, dtype, torch.Generator().manual_seed(seed), 1.0, False)
    return inputs["old"], inputs["new"], inputs["prototypes"]


def textbook(old: Tensor, new: Tensor, prototypes: Tensor, sigma: float, floor: float) -> Tensor:
    """The sums as the papers write them, one prototype and one row at a time."""
    out = []
    for mu in prototypes.tolist():
        weights = [
            math.exp(-sum((a - b) ** 2 for a, b in zip(row, mu)) / (2 * sigma**2)) + floor for row in old.tolist()
        ]
        steps = (new - old).tolist()
        out.append([m + sum(w * s[j] for w, s in zip(weights, steps)) / sum(weights) for j, m in enumerate(mu)])
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("sigma", "floor"), [(1.0, 0.0), (2.5, 0.0), (1.0, 1e-5), (4.0, 3.0)])
def test_equals_the_textbook_sums(backend, sigma, floor):
    old, new, mu = drawn()
    out = ops.semantic_drift(old, new, mu, sigma, floor, backend=backend)
    torch.testing.assert_close(out, textbook(old, new, mu, sigma, floor), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", FAST)
def test_floor_zero_is_a_softmax_over_rows(backend):
    """Also where every weight itself would underflow: distances of 10⁴ σ."""
    old, new, mu = drawn()
    sigma = 1e-3
    log_w = -(mu[:, None] - old[None]).square().sum(-1) / (2 * sigma**2)
    expected = mu + log_w.softmax(1) @ (new - old)
    assert not log_w.exp().any()
    torch.testing.assert_close(ops.semantic_drift(old, new, mu, sigma, backend=backend), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("backend", FAST)
def test_a_common_movement_moves_every_prototype_by_it(backend):
    old, _, mu = drawn()
    step = torch.linspace(-1, 2, old.shape[1], dtype=old.dtype)
    for floor in (0.0, 1e-5):
        moved = ops.semantic_drift(old, old + step, mu, 0.7, floor, backend=backend)
        torch.testing.assert_close(moved, mu + step, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", FAST)
def test_shuffled_rows_and_renamed_classes_change_nothing(backend):
    old, new, mu = drawn(N=700)
    order, names = torch.randperm(700, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 1, 0, 4, 2])
    first = ops.semantic_drift(old, new, mu, 1.5, backend=backend)
    again = ops.semantic_drift(old[order], new[order], mu[names], 1.5, backend=backend)
    torch.testing.assert_close(again, first[names], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", FAST)
@given(
    seed=st.integers(0, 2**31), exponent=st.integers(-37, 37), sigma=st.integers(-150, 150),
    floor=st.sampled_from([0.0, 1e-300, 1e-5, 1e30]), far=st.booleans(),
)  # fmt: skip
def test_never_nan_whatever_the_distances(backend, seed, exponent, sigma, floor, far):
    """And always an average of the rows' movements."""
    g = torch.Generator().manual_seed(seed)
    old, new, mu = (torch.randn(n, 6, generator=g) * 10.0**exponent for n in (40, 40, 4))
    if far:
        old[0], mu[0] = 1e38, -1e38
    out = ops.semantic_drift(old, new, mu, 10.0**sigma, floor, backend=backend)
    steps = new.double() - old.double()
    room = 1e-5 * (steps.abs().amax(0) + mu.abs()) + 1e-37
    assert bool(out.isfinite().all())
    assert bool((out >= mu + steps.amin(0) - room).all())
    assert bool((out <= mu + steps.amax(0) + room).all())


@pytest.mark.parametrize("backend", FAST)
def test_median_takes_the_first_rows(backend):
    old, new, mu = drawn(N=5000, C=3)
    distances = (mu[:, None] - old[None, :4096]).square().sum(-1).flatten().numpy()
    sigma = float(median_sigma(old, mu))
    assert sigma**2 == pytest.approx(0.5 * float(np.sort(distances)[(distances.size - 1) // 2]), rel=1e-9)
    one = ops.semantic_drift(old, new, mu, "median", backend=backend)
    torch.testing.assert_close(one, ops.semantic_drift(old, new, mu, sigma, backend=backend), rtol=1e-12, atol=1e-12)
    on_it = ops.semantic_drift(mu[:1].expand(4, -1), mu[:1].expand(4, -1) + 1, mu[:1], "median", backend=backend)
    torch.testing.assert_close(on_it, mu[:1] + 1, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_median_scales_with_the_features(backend, scale):
    old, new, mu = (t.float() for t in drawn())
    scaled = ops.semantic_drift(old * scale, new * scale, mu * scale, "median", backend=backend)
    torch.testing.assert_close(scaled / scale, ops.semantic_drift(old, new, mu, "median"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", FAST)
def test_no_rows_no_classes_no_gradient(backend):
    old, new, mu = drawn()
    assert torch.equal(ops.semantic_drift(old[:0], new[:0], mu, "median", backend=backend), mu)
    assert ops.semantic_drift(old, new, mu[:0], "median", backend=backend).shape == (0, 12)
    live = [t.clone().requires_grad_() for t in (old, new, mu)]
    assert not ops.semantic_drift(*live, backend=backend).requires_grad


def test_bounds_catch_planted_bugs():
    """A dropped row, the neighbour's movement, σ or the floor off by a little, a weight that is not shared."""
    inputs = SPEC.make(
        {"N": 200, "C": 6, "d": 32, "floor": 1}, torch.float32, torch.Generator().manual_seed(1), 1.0, False
    )
    assert SPEC.check(inputs, {"prototypes": SPEC.function(**inputs)})["prototypes"] <= 1

    def caught(**changed) -> bool:
        return SPEC.check(inputs, {"prototypes": SPEC.function(**{**inputs, **changed})})["prototypes"] > 1

    assert caught(old=inputs["old"][1:], new=inputs["new"][1:])
    assert caught(new=inputs["new"].roll(1, 0))
    assert caught(sigma=inputs["sigma"] * (1 + 1e-2))
    assert caught(floor=2 * inputs["floor"])
    assert caught(floor=0.0)
    old = inputs["old"].clone()
    old[3] += 0.1
    assert caught(old=old, new=inputs["new"] + (old - inputs["old"]))


@pytest.mark.skipif("cpp" not in FAST, reason="the C++ library is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_tiles_blocks_and_parts_of_every_size(dtype):
    """More rows than a tile and a part have, prototypes than a block and a task, terms than a sum in registers."""
    for N, C, d in ((2100, 3, 70), (130, 700, 33), (1100, 200, 65), (300, 7, 600), (5000, 1, 1)):
        inputs = SPEC.make({"N": N, "C": C, "d": d}, dtype, torch.Generator().manual_seed(N), 1.0, False)
        assert SPEC.check(inputs, {"prototypes": SPEC.function(**inputs, backend="cpp")})["prototypes"] <= 1


@pytest.mark.skipif("cpp" not in FAST, reason="the C++ library is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("N", [1, 20, 300], ids=["one row", "few", "tiles"])
def test_a_power_of_two_in_all_lengths_changes_no_bit(dtype, N):
    """Rows of usual lengths are multiplied where they are, others in units of σ: the same bits, also where one row of
    a tile, or one prototype, is such that units are needed."""
    for d in (32, 65):
        old, new, mu = (t.to(dtype) for t in drawn(N=N, C=14, d=d))
        plain = ops.semantic_drift(old, new, mu, 2.0, backend="cpp")
        powers = (3, -2) if dtype == torch.float16 else (35, -35)
        for power in powers:  # squares past 2^60, and below its inverse
            scale = 2.0**power if dtype != torch.float64 else 2.0 ** (power * 8)
            moved = ops.semantic_drift(old * scale, new * scale, mu * scale, 2.0 * scale, backend="cpp")
            assert torch.equal(moved / scale, plain)
        if dtype in (torch.float16, torch.float64) or N == 1:
            continue
        # so far away that it counts for nobody
        old[N // 2] = new[N // 2] = 2.0**40
        far = ops.semantic_drift(old, new, mu, 2.0, backend="cpp")
        keep = torch.arange(N) != N // 2
        inputs = {"old": old[keep], "new": new[keep], "prototypes": mu, "sigma": 2.0, "floor": 0.0}
        assert SPEC.check(inputs, {"prototypes": far})["prototypes"] <= 1


@pytest.mark.skipif("cpp" not in FAST, reason="the C++ library is not built")
def test_movements_that_overflow_are_infinite_and_the_others_are_not():
    old = torch.zeros(4, 40)
    new = torch.ones(4, 40)
    new[:, 7], new[:, 20] = 3e38, -3e38
    mu = torch.zeros(3, 40)
    out = ops.semantic_drift(old, new, mu, backend="cpp")
    assert bool((out[:, 7] == math.inf).all())
    assert bool((out[:, 20] == -math.inf).all())
    keep = [i for i in range(40) if i not in (7, 20)]
    assert torch.equal(out[:, keep], torch.ones(3, 38))


@pytest.mark.skipif("cpp" not in FAST, reason="the C++ library is not built")
def test_exponential_is_within_its_roundings():
    """A row on the prototype and one at distance r, which alone moves, by r: what moves is r·exp(−r²)."""
    scale = torch.tensor([1.0, 1.0, -math.inf], dtype=torch.float64)
    for r in torch.rand(500, generator=torch.Generator().manual_seed(0)).mul(87**0.5).unsqueeze(1):
        rows = torch.stack([torch.zeros(1), r])
        peak, _, moved = _dispatch.call("cpp", "drift_sums", rows, 2 * rows, torch.zeros(1, 1), scale)
        expected = float(r) * math.exp(-float(r * r))
        assert float(peak) == 0
        # the exponential's 4 and the product's
        assert abs(float(moved) - expected) <= 5 * 2.0**-24 * expected


@pytest.mark.skipif("cpp" not in FAST, reason="the C++ library is not built")
def test_kernels_check_their_arguments_themselves():
    x, scale = torch.zeros(4, 6), torch.zeros(3, dtype=torch.float64)
    for args in (
        (x, x[:3], x, scale),
        (x, x, x[:, :5].contiguous(), scale),
        (x, x.double(), x, scale),
        (x, x, x, scale.float()),
        (x, x, x, scale[:2]),
        (x[:, :0], x[:, :0], x[:, :0], scale),
    ):
        with pytest.raises((RuntimeError, ValueError), match="expected"):
            _dispatch.call("cpp", "drift_sums", *args)


MEMORY = """
import torch
from clipsteer import ops
from clipsteer.testing import bench
N, C, d = 20_000, 600, 96
old, mu = torch.randn(N, d), torch.randn(C, d)
new = old + 1
call = lambda: ops.semantic_drift(old, new, mu, 7.0, backend="cpp")
call()
print(bench.extra_memory(call, "cpu"))
"""


@pytest.mark.skipif("cpp" not in FAST or not os.path.exists("/proc/self/clear_refs"), reason="needs C++ on Linux")
def test_no_matrix_of_rows_and_classes():
    """Tiles and a few (C, d): the (N, C) weights would take 48 MB, new − old 8 MB."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 6 * 2**20


INTERPRETED = """
import torch
from clipsteer import testing
from clipsteer.ops import REGISTRY
from clipsteer.kernels import semantic_drift
for C, d in ((1, 768), (1000, 768), (2000, 4)):
    rows, sums, step = semantic_drift.chunks(50_000, C, d, 512)
    assert 4 * rows * max(C, d) <= semantic_drift.BUFFER_BYTES and rows <= sums * step < rows + 128 * sums
# ten sums, two at a time, and three chunks, in few programs
semantic_drift.BUFFER_BYTES, semantic_drift.SUM_ROWS, semantic_drift.SUMS = 4 * 300 * 128, 128, 2
spec = REGISTRY["semantic_drift"]
for shape in ({"N": 1200, "C": 5, "d": 20, "floor": 1}, {"N": 300, "C": 140, "d": 300}):
    inputs = spec.make(shape, torch.float32, torch.Generator().manual_seed(0), 1.0, False)
    for autocast in (False, True):  # in half precision it would be far off
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            error = spec.check(inputs, {"prototypes": spec.function(**inputs, backend="triton")})
        assert max(error.values()) <= 1, (shape, error)
for sigma in (1e-30, 1e30):
    inputs |= {"sigma": sigma, "floor": 0.0}
    inputs["old"][0], inputs["prototypes"][0] = 1e38, -1e38
    assert spec.function(**inputs, backend="triton").isfinite().all()
"""


@pytest.mark.slow
def test_interpreted_chunks_and_parts(interpret):
    interpret(INTERPRETED)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("N", [3, 4, 15, 16, 33, 300])
@pytest.mark.parametrize("step", [1.0, 1e38, math.inf, math.nan])
def test_movements_of_any_size_in_bfloat16(backend, N, step):
    """Products of two halves each take what a half can hold, the others the rest."""
    shape = {"N": N, "C": 35, "d": 70, "floor": 1}
    inputs = SPEC.make(shape, torch.bfloat16, torch.Generator().manual_seed(2), 1.0, False)
    inputs["new"][N - 1, 3] = step
    moved = SPEC.function(**inputs, backend=backend)
    assert SPEC.check(inputs, {"prototypes": moved})["prototypes"] <= 1


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("floor", [0.0, 1e-5])
@given(cuts=st.lists(st.integers(0, 60), max_size=5), split=st.integers(0, 6), sigma=st.sampled_from([1e-3, 0.5, 3.0]))
def test_batches_and_merges_in_any_order_equal_one_call(backend, floor, cuts, split, sigma):
    old, new, mu = drawn()
    edges = [0, *sorted(cuts), 60]
    batches = [(old[a:b], new[a:b]) for a, b in itertools.pairwise(edges)]
    first, second = (DriftAccumulator(mu, sigma, floor, backend=backend) for _ in range(2))
    for number, batch in enumerate(reversed(batches)):
        (first if number < split else second).update(*batch)
    out = first.merge(second).result()
    expected = ops.semantic_drift(old, new, mu, sigma, floor, backend=backend)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    assert first.rows == 60


def test_an_accumulator_in_float32_holds_the_bound_of_one_call():
    inputs = SPEC.make(
        {"N": 999, "C": 6, "d": 32, "floor": 1}, torch.float32, torch.Generator().manual_seed(1), 1.0, False
    )
    whole = DriftAccumulator(inputs["prototypes"], inputs["sigma"], inputs["floor"])
    for start in range(0, 999, 100):
        whole.update(inputs["old"][start : start + 100], inputs["new"][start : start + 100])
    assert SPEC.check(inputs, {"prototypes": whole.result()})["prototypes"] <= 1


def test_an_accumulator_without_rows_returns_the_prototypes():
    mu = drawn()[2]
    empty = DriftAccumulator(mu)
    assert torch.equal(empty.result(), mu)
    assert torch.equal(empty.merge(DriftAccumulator(mu)).update(mu[:0], mu[:0]).result(), mu)
    assert torch.equal(empty.all_reduce().result(), mu)


WORKER = """
import os, sys, torch
from clipsteer.continual.drift import DriftAccumulator
torch.set_num_threads(1)
rank, out = int(os.environ["RANK"]), sys.argv[1]
x = torch.load(out + "/rows.pt", weights_only=True)
old, new, mu = x[:400], x[:400].roll(3, 1) * 0.9, x[400:410]
for name, sigma, floor in (("near", 0.4, 0.0), ("wide", 3.0, 1e-5)):
    part = DriftAccumulator(mu, sigma, floor)
    # a third of the rows here, two thirds there
    mine = slice(0, 133) if rank == 0 else slice(133, 400)
    for a, b in zip(old[mine].split(50), new[mine].split(50)):
        part.update(a, b)
    joint = part.all_reduce()
    assert joint.rows == 400
    torch.save({"moved": joint.result()}, f"{out}/{name}-{rank}.pt")
lonely = DriftAccumulator(mu)
if rank == 1:
    lonely.update(old, new)
torch.save({"moved": lonely.all_reduce().result()}, f"{out}/lonely-{rank}.pt")
"""


@pytest.mark.slow
def test_two_processes_equal_one_call(tmp_path):
    x = torch.randn(410, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.save(x, tmp_path / "rows.pt")
    in_processes(WORKER, tmp_path)
    old, new, mu = x[:400], x[:400].roll(3, 1) * 0.9, x[400:410]
    for name, sigma, floor in (("near", 0.4, 0.0), ("wide", 3.0, 1e-5), ("lonely", 1.0, 0.0)):
        expected = ops.semantic_drift(old, new, mu, sigma, floor)
        a, b = (torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)["moved"] for rank in (0, 1))
        assert torch.equal(a, b)
        torch.testing.assert_close(a, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif("cpp" not in FAST, reason="the C++ library is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [1, 32, 33, 256, 257, 2500])
def test_one_call_moves_prototypes_as_sums_do(rows, dtype):
    """In one tile of rows, in several, and in parts of them; with and without packing."""
    g = torch.Generator().manual_seed(rows)
    old, new = (torch.randn(rows, 70, generator=g).to(dtype) for _ in range(2))
    mu = torch.randn(101, 70, generator=g).to(dtype)
    sums = drift_sums(old, new, mu, 4.0, 1e-5, "cpp")
    found = ops.semantic_drift(old, new, mu, 4.0, 1e-5, backend="cpp")
    # either rounds a quotient its own way, then the result
    few = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, moved_by(mu, *sums), rtol=few, atol=few)


def mistakes():
    x, mu = torch.zeros(4, 6), torch.zeros(3, 6)
    call = ops.semantic_drift
    yield ValueError, r"old must be of shape \(N, d\)", lambda: call(x[0], x[0], mu)
    yield ValueError, "new must be of shape old's", lambda: call(x, x[:3], mu)
    yield ValueError, r"prototypes must be of shape \(C, d = 6\)", lambda: call(x, x, mu[:, :5])
    yield ValueError, "sigma must be positive", lambda: call(x, x, mu, 0)
    yield ValueError, "sigma must be positive", lambda: call(x, x, mu, float("nan"))
    yield ValueError, 'sigma must be a number or "median"', lambda: call(x, x, mu, "mean")
    yield TypeError, "sigma must be a number", lambda: call(x, x, mu, None)
    yield ValueError, "floor must be a finite number of at least 0", lambda: call(x, x, mu, 1.0, -1e-5)
    yield ValueError, "floor must be a finite number of at least 0", lambda: call(x, x, mu, 1.0, "median")
    yield TypeError, "dtype", lambda: call(x, x, mu.double())
    yield TypeError, "prototypes must be a tensor", lambda: call(x, x, [1.0])
    yield ValueError, "device", lambda: call(x, x, mu.to("meta"))
    yield ValueError, "backend must be one of", lambda: call(x, x, mu, backend="fast")
    yield (
        RuntimeError,
        "no kernel for semantic_drift, which reference, cpp, triton",
        lambda: call(x, x, mu, backend="cuda"),
    )
    yield ValueError, "sigma must be a number, got", lambda: DriftAccumulator(mu, "median")
    yield TypeError, "tensor", lambda: DriftAccumulator([1.0])
    yield ValueError, "the same prototypes", lambda: DriftAccumulator(mu).merge(DriftAccumulator(mu, 2.0))


@pytest.mark.parametrize("number", range(len(list(mistakes()))))
def test_mistakes_are_named(number):
    error, message, call = list(mistakes())[number]
    with pytest.raises(error, match=message):
        call()
