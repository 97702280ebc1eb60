"""CUDA C++ without a GPU: the selection and segment code runs on the CPU, and everything compiles and links.

What the fused encode makes of hard rows is planned here and, where there is a GPU, run.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from clipsteer import ops
from clipsteer.ops import _dispatch

pytestmark = pytest.mark.slow

CSRC = Path(__file__).resolve().parents[2] / "csrc"
NVCC = shutil.which("nvcc")
CXX = shutil.which("g++") or shutil.which("c++")

# A block of CUDA threads, played by CPU threads.
HOST = r"""
#include <barrier>
#include <thread>
#include <vector>
#include "cuda/segment.cuh"
#include "cuda/sm90/plan.h"

using namespace clipsteer;

struct Team {
  uint32_t id, count;
  std::barrier<>* barrier;
  uint32_t rank() const { return id; }
  uint32_t size() const { return count; }
  void sync() const { barrier->arrive_and_wait(); }
  uint32_t add(uint32_t& counter, uint32_t amount) const {
    return __atomic_fetch_add(&counter, amount, __ATOMIC_RELAXED);
  }
};

extern "C" void select_rows(const float* values, int64_t rows, int64_t n, int64_t k, int64_t threads, float* acts,
                            int64_t* indices) {
  std::vector<SelectScratch> scratch(1);
  SelectScratch& s = scratch[0];
  for (int64_t r = 0; r < rows; ++r) {
    memset(&s, 0xa5, sizeof(s));
    std::barrier<> barrier(threads);
    std::vector<std::thread> team;
    const float* row = values + r * n;
    for (int64_t t = 0; t < threads; ++t) {
      team.emplace_back([&, t] {
        select_row(Team{uint32_t(t), uint32_t(threads), &barrier}, [row](uint32_t i) { return row[i]; }, uint32_t(n),
                   uint32_t(k), s);
      });
    }
    for (auto& thread : team) thread.join();
    for (int64_t j = 0; j < k; ++j) {
      acts[r * k + j] = relu_of(order_of(s.keys[0]) == kNaN ? kNaN : order_of(s.keys[j]));
      indices[r * k + j] = column_of(s.keys[j]);
    }
  }
}

extern "C" void plan(int64_t batch, int64_t n, int64_t d, int64_t k, int64_t* out) {
  const EncodePlan p = encode_plan(batch, n, d, k, 132);
  const int64_t values[] = {p.rows,         p.stride, p.rank,  p.maxima,     p.sample_segments, p.sample_tiles,
                            p.segments,     p.tiles,  p.pitch, p.max_listed, p.redo_segments,   p.redo_buffer,
                            p.rows ? p.bytes() : 0};
  std::copy(std::begin(values), std::end(values), out);
}

extern "C" void sort_keys(const float* values, int64_t count, int64_t k, int64_t threads, int64_t* indices) {
  std::vector<uint64_t> keys(count), kept(2 * count + 2);
  uint32_t low = UINT32_MAX, high = 0;
  for (int64_t i = 0; i < count; ++i) {
    keys[i] = key_of(values[i], uint32_t(i));
    low = std::min(low, order_of(keys[i]));
    high = std::max(high, order_of(keys[i]));
  }
  DigitScratch s;
  memset(&s, 0xa5, sizeof(s));
  std::barrier<> barrier(threads);
  std::vector<std::thread> team;
  for (int64_t t = 0; t < threads; ++t) {
    team.emplace_back([&, t] {
      sort_largest(Team{uint32_t(t), uint32_t(threads), &barrier}, keys.data(), uint32_t(count), uint32_t(k), low, high,
                   kept.data(), s);
    });
  }
  for (auto& thread : team) thread.join();
  for (int64_t j = 0; j < k; ++j) indices[j] = column_of(kept[j]);
}

extern "C" void outer(const float* coeff, const int32_t* sorted, const int64_t* pairs, int64_t count, const float* rows,
                      int64_t k, int64_t d, int64_t n, float* dw, float* db) {
  for (int64_t feature = 0; feature < n; ++feature) {
    const int64_t first = segment_start(sorted, count, feature), last = segment_start(sorted, count, feature + 1);
    for (int64_t c = 0; c < d; ++c) {
      float sum[1] = {};
      db[feature] = add_segment<1>(
          pairs, first, last, k, [=](int64_t pair) { return coeff[pair]; },
          [=](int64_t row, float(&x)[1]) { x[0] = rows[row * d + c]; }, sum);
      dw[feature * d + c] = sum[0];
    }
  }
}
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if CXX is None:
        pytest.skip("no C++ compiler on the PATH")
    folder = tmp_path_factory.mktemp("host")
    (folder / "host.cpp").write_text(HOST)
    # -ffp-contract=off: the sums are compared with torch's bit for bit.
    command = [CXX, "-std=c++20", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    command += [
        "-fPIC",
        "-shared",
        "-pthread",
        "-I",
        str(CSRC),
        str(folder / "host.cpp"),
        "-o",
        str(folder / "host.so"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "host.so"))


def pointer(t: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


def select(host: ctypes.CDLL, values: torch.Tensor, k: int, threads: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows, n = values.shape
    acts = torch.full((rows, k), -1.0)
    indices = torch.full((rows, k), -1)
    sizes = [ctypes.c_int64(v) for v in (rows, n, k, threads)]
    host.select_rows(pointer(values), *sizes, pointer(acts), pointer(indices))
    return acts, indices


def rows_of_every_kind(n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    noise = torch.randn(n, generator=generator)
    crowded = noise.clone()
    crowded[::2048] += 100.0  # all in one group of columns
    holes = torch.full((n,), -torch.inf)
    holes[n // 2] = 1.0
    infinite = noise.clone()
    infinite[n // 3] = torch.inf
    signs = torch.zeros(n)
    signs[::2] = -0.0
    rows = [noise, noise.round(), crowded, holes, infinite, signs, torch.ones(n), -torch.arange(n).float()]
    rows += [torch.arange(n).float(), -noise.abs(), noise * 1e-42, noise * 1e38]
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("n", "k", "threads"),
    [(1, 1, 1), (31, 31, 3), (129, 7, 4), (4096, 64, 1), (4097, 1, 3), (9000, 64, 4), (9000, 2048, 2), (49152, 32, 1)],
)
def test_selection_is_exact(host: ctypes.CDLL, n: int, k: int, threads: int) -> None:
    values = rows_of_every_kind(n)
    acts, indices = select(host, values, k, threads)
    expected = torch.sort(values + 0.0, dim=1, descending=True, stable=True)
    assert torch.equal(indices, expected.indices[:, :k])
    assert torch.equal(acts, expected.values[:, :k].relu())
    assert not acts.signbit().any()


@pytest.mark.parametrize(("count", "k", "threads"), [(1, 1, 1), (33, 33, 3), (261, 64, 4), (1000, 7, 2)])
def test_the_listed_are_sorted_as_far_as_wanted(host: ctypes.CDLL, count: int, k: int, threads: int) -> None:
    for row in rows_of_every_kind(count):
        indices = torch.full((k,), -1)
        sizes = [ctypes.c_int64(v) for v in (count, k, threads)]
        host.sort_keys(pointer(row), *sizes, pointer(indices))
        assert torch.equal(indices, torch.sort(row + 0.0, descending=True, stable=True).indices[:k])


def test_a_row_with_nan_is_all_nan_and_its_indices_are_valid(host: ctypes.CDLL) -> None:
    values = rows_of_every_kind(5000)
    values[:, 4321] = torch.nan
    acts, indices = select(host, values, 40, 2)
    assert acts.isnan().all()
    assert indices.ge(0).all()
    assert indices.lt(5000).all()
    assert all(len(set(row)) == 40 for row in indices.tolist())


PLAN = (
    "rows stride rank maxima sample_segments sample_tiles segments tiles pitch max_listed "
    "redo_segments redo_buffer bytes"
)


def plan(host: ctypes.CDLL, batch: int, n: int, d: int, k: int) -> dict[str, int]:
    out = torch.zeros(len(PLAN.split()), dtype=torch.int64)
    host.plan(*(ctypes.c_int64(v) for v in (batch, n, d, k)), pointer(out))
    return dict(zip(PLAN.split(), out.tolist()))


@pytest.mark.parametrize("batch", [1, 33, 128, 130, 4096, 5000, 100_000])
@pytest.mark.parametrize("n", [6000, 6001, 49152, 1_000_000])
@pytest.mark.parametrize("k", [1, 32, 64, 512])
def test_plan_of_the_fused_encode_covers_every_column_within_its_limits(
    host: ctypes.CDLL, batch: int, n: int, k: int
) -> None:
    p = plan(host, batch, n, 768, k)
    if n != 49152 and k == 512:
        assert p["rows"] == 0  # too few columns to sample, or more than a row's sample can tell apart
        return
    tiles, sampled = -(-n // 192), -(-n // p["stride"])
    assert p["rows"] == batch or (0 < p["rows"] < batch and p["rows"] % 128 == 0)
    assert (p["segments"] - 1) * p["tiles"] < tiles <= p["segments"] * p["tiles"]
    sample_tiles = -(-sampled // 192)
    assert (p["sample_segments"] - 1) * p["sample_tiles"] < sample_tiles <= p["sample_segments"] * p["sample_tiles"]
    assert p["maxima"] == 24 * sample_tiles <= 1024
    assert p["rank"] <= sampled / 8
    assert k <= p["max_listed"] <= 4096
    assert p["rank"] * p["stride"] <= 4 * p["segments"] * (p["pitch"] - 1)
    # What a row that is computed again leaves fits where its lists were, and into one selection.
    assert 1 <= p["redo_segments"] <= 4 * p["segments"]
    assert p["redo_segments"] * k <= min(4 * p["segments"] * p["pitch"], 4096)
    assert p["redo_buffer"] >= k + 256
    assert p["bytes"] <= 29 << 20 or p["rows"] <= 128


@pytest.mark.parametrize(("d", "k"), [(12, 8), (768, 513), (0, 1)])
def test_no_plan_where_the_fused_encode_cannot_run(host: ctypes.CDLL, d: int, k: int) -> None:
    assert plan(host, 64, 49152, d, k)["rows"] == 0


def listed(p: dict[str, int], values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a fused encode by plan ``p`` lists: of each row in all, and in its longest list."""
    rows, n = values.shape
    sample = values[:, :: p["stride"]].nan_to_num(-torch.inf, torch.inf, -torch.inf)
    place, column = torch.arange(sample.shape[1]), torch.arange(n)
    # A thread's accumulators: 8 j + 2 lane + c, 4 neighbours j a group.
    group = place // 192 * 24 + place % 8 // 2 * 6 + place % 192 // 32
    maxima = torch.full((rows, p["maxima"]), -torch.inf).scatter_reduce_(1, group.expand_as(sample), sample, "amax")
    threshold = maxima.sort(1, descending=True).values[:, p["rank"] - 1 : p["rank"]]
    reach = ~(values < threshold)
    lists = column // 192 // p["tiles"] * 4 + column % 8 // 2
    counts = torch.zeros(rows, 4 * p["segments"]).scatter_add_(1, lists.expand_as(reach), reach.float())
    return reach.sum(1), counts.amax(1)


@pytest.mark.parametrize(("k", "n"), [(1, 6000), (32, 6000), (32, 49152), (64, 49152)])
def test_the_threshold_lists_enough_and_not_too_many(host: ctypes.CDLL, k: int, n: int) -> None:
    """On columns in no special order; a row where this fails is computed again."""
    p = plan(host, 4096, n, 768, k)
    total, longest = listed(p, torch.randn(300, n, generator=torch.Generator().manual_seed(n + k)))
    assert total.min() >= k
    assert total.max() <= p["max_listed"]
    assert longest.max() < p["pitch"] - 1


# Blocks of three tiles and of two, both ends of x and W within a tile; several goes, the last one smaller.
FUSED = {(1499, 6001, 72, 32): 4, (5000, 49152, 520, 64): 16}  # (B, n, d, k): every which column is sampled


def whole_numbers(shape: tuple[int, int, int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, W, b whose products are exact in any order. Of 16 rows of x one is 0, so that all its values tie, and one has
    its largest values where columns are sampled; row 2 has a NaN and row 3 an infinity."""
    (B, n, d, _), generator = shape, torch.Generator().manual_seed(sum(shape))
    x = torch.randint(-8, 9, (B, d), generator=generator).float()
    W = torch.randint(-8, 9, (n, d), generator=generator).float()
    W[:, 1], W[:: FUSED[shape], 1] = 0, 128
    W[:, 2] = 1 - 2 * (torch.arange(n) % 2)
    x[:, 1:3] = 0
    x[0::16], x[1::16, 1] = 0, 64
    x[2, 3], x[3, 2] = torch.nan, torch.inf
    return x, W, torch.randint(-1, 2, (n,), generator=generator).float()


@pytest.mark.parametrize("shape", FUSED)
def test_rows_of_the_gpu_test_take_every_way(host: ctypes.CDLL, shape: tuple[int, int, int, int]) -> None:
    B, n, d, k = shape
    p = plan(host, B, n, d, k)
    assert p["stride"] == FUSED[shape]
    tiles = -(-n // 192)
    several, last = p["tiles"], tiles - (p["segments"] - 1) * p["tiles"]
    assert {several % 2, last % 2} == {0, 1} or p["rows"] < B
    assert min(several, last) >= 2
    x, W, b = whole_numbers(shape)
    total, longest = listed(p, x[:64] @ W.T + b)
    kind = torch.arange(64) % 16
    kind[2:4] = 0
    overflows, few = longest >= p["pitch"] - 1, total < k
    assert torch.equal(overflows, kind == 0)
    assert torch.equal(few, kind == 1)
    assert total[kind > 1].max() <= p["max_listed"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", FUSED)
def test_the_fused_encode_is_exact_on_every_way(
    shape: tuple[int, int, int, int], biased: bool, dtype: torch.dtype
) -> None:
    """Bit for bit and index for index; and once more from a CUDA graph, whose input has changed since."""
    if (reason := _dispatch.missing("cuda")) is not None:
        pytest.skip(reason)
    k = shape[3]
    x, W, b = (t.cuda() for t in whole_numbers(shape))
    rows = [ops.topk_encode_reference(part, W, b if biased else None, k=k) for part in x.split(1000)]
    acts, indices = (torch.cat(parts) for parts in zip(*rows))
    acts = acts.to(dtype)
    inputs = [x.to(dtype), W.to(dtype), b.to(dtype) if biased else None]
    found = ops.topk_encode(*inputs, k=k, backend="cuda")
    torch.testing.assert_close(found[0], acts, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found[1], indices)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ops.topk_encode(*inputs, k=k, backend="cuda")
    inputs[0].copy_(x.flip(0))
    graph.replay()
    torch.testing.assert_close(found[0], acts.flip(0), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found[1], indices.flip(0))


@pytest.mark.parametrize(("rows", "k", "n", "d"), [(0, 3, 4, 2), (1, 1, 1, 1), (33, 5, 129, 3), (64, 31, 7, 5)])
def test_segments_add_up_in_ascending_order(host: ctypes.CDLL, rows: int, k: int, n: int, d: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    coeff = torch.randn(rows, k, generator=generator)
    x = torch.randn(rows, d, generator=generator)
    indices = torch.randint(n, (rows, k), generator=generator)
    ordered, pairs = torch.sort(indices.flatten().int(), stable=True)
    dw, db = torch.full((n, d), torch.nan), torch.full((n,), torch.nan)
    shape = [ctypes.c_int64(v) for v in (k, d, n)]
    host.outer(
        pointer(coeff), pointer(ordered), pointer(pairs), ctypes.c_int64(rows * k), pointer(x), *shape, pointer(dw),
        pointer(db),
    )  # fmt: skip
    expected_dw, expected_db = torch.zeros(n, d), torch.zeros(n)
    for pair, feature in enumerate(indices.flatten().tolist()):
        expected_dw[feature] += coeff.flatten()[pair] * x[pair // k]
        expected_db[feature] += coeff.flatten()[pair]
    assert torch.equal(dw, expected_dw)
    assert torch.equal(db, expected_db)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], str]:
    include = Path(torch.__file__).parent / "include"
    if NVCC is None:
        pytest.skip("nvcc is not on the PATH")
    if not (include / "torch/csrc/stable/library.h").exists():
        pytest.skip("this torch has no stable-ABI headers")
    folder = tmp_path_factory.mktemp("cuda")
    command = [NVCC, "-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v", "-DUSE_CUDA"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(include), "-Werror", "all-warnings"]
    command += ["-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_90a,code=sm_90a", "-c"]

    def build(source: Path) -> tuple[Path, str]:
        target = folder / f"{source.stem}.o"
        done = subprocess.run([*command, str(source), "-o", str(target)], capture_output=True, text=True)
        assert done.returncode == 0, f"{source.name}: {done.stderr[-4000:]}"
        return target, done.stderr

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(build, sorted(CSRC.rglob("*.cu"))))
    return [target for target, _ in results], "".join(log for _, log in results)


def test_cuda_compiles_for_both_targets_without_spills(compiled: tuple[list[Path], str]) -> None:
    objects, log = compiled
    assert len(objects) == len(list(CSRC.rglob("*.cu"))) > 0
    for kernel in ("select_kernel", "product_kernel", "redo_kernel", "decode_kernel", "dot_kernel", "outer_kernel"):
        for target in ("sm_80", "sm_90a"):
            assert re.search(rf"entry function '\w*{kernel}\w*' for '{target}'", log)
    assert set(re.findall(r"(\d+) bytes spill", log)) == {"0"}
    assert "C75" not in log  # the compiler's notes that wgmma was serialised or setmaxnreg ignored


def test_cuda_library_loads_and_defines_every_op(compiled: tuple[list[Path], str], tmp_path: Path) -> None:
    lib = Path(torch.__file__).parent / "lib"
    if not (lib / "libtorch_cuda.so").exists():
        pytest.skip("this torch has no CUDA library to link with")
    target = tmp_path / "_C_cuda.so"
    command = [NVCC, "-shared", "-cudart=static", *map(str, compiled[0]), "-o", str(target), f"-L{lib}", "-ltorch_cpu"]
    subprocess.run([*command, "-ltorch_cuda"], check=True, capture_output=True)
    # The process may have clipsteer's own copy open already.
    code = (
        "import sys, torch; torch.ops.load_library(sys.argv[1])\n"
        "for name in ('topk_encode', 'sparse_decode', 'gather_dot', 'sparse_outer', 'sparse_outer_out'):\n"
        "    assert torch._C._dispatch_has_kernel_for_dispatch_key(f'clipsteer_cuda::{name}', 'CUDA'), name\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


STUB = """#!/bin/sh
# stands for python3, pip and every other program of the script: makes what an install would make, and does nothing
case "$0 $*" in *"${FAILS:-no such program}"*) echo "as it was told"; exit 3 ;; esac
case "$*" in
  *"-m venv"*) for last; do :; done
    mkdir -p "$last/bin"
    for name in pip python clipsteer ruff mypy; do cp "$0" "$last/bin/$name"; done ;;
  *"install --quiet -e"*) if [ "$CLIPSTEER_BUILD_CUDA" = 1 ]; then : > clipsteer/_C_cuda.so; fi ;;
esac
"""


@pytest.fixture
def ci(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs what CI runs, without its programs."""
    (tmp_path / ".ci").mkdir()
    (tmp_path / "clipsteer").mkdir()
    (tmp_path / "bin").mkdir()
    script = tmp_path / ".ci/run"
    shutil.copy(CSRC.parent / ".ci/run", script)
    # of the machine's programs only those of the base system: its nvcc, if it has one, is not to be seen
    names = ("bash", "sh", "mktemp", "rm", "mkdir", "cp", "cat", "dirname", "sed")
    for name in names:
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))

    def run(*programs: str, **more: str) -> subprocess.CompletedProcess:
        for name in ("python3", *programs):
            (tmp_path / "bin" / name).write_text(STUB)
            (tmp_path / "bin" / name).chmod(0o755)
        environment = {"PATH": str(tmp_path / "bin"), "TMPDIR": str(tmp_path), **more}
        call = [tmp_path / "bin/bash", script]
        return subprocess.run(call, env=environment, capture_output=True, text=True)

    return run


@pytest.mark.parametrize("builds", [True, False])
def test_ci_asks_for_cuda_where_nvcc_is(tmp_path: Path, ci, builds: bool) -> None:
    """A torch without CUDA makes setup.py leave the CUDA sources out, unless it is told to compile them."""
    done = ci(*["nvcc"] * builds)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "done" in done.stdout
    assert (tmp_path / "clipsteer/_C_cuda.so").exists() == builds


@pytest.mark.parametrize("program", ["wheels.py --fetch", "mypy", "reference.py", "wheels.py", "hub.py", "-m pytest"])
def test_ci_fails_with_each_of_its_steps(tmp_path: Path, ci, program: str) -> None:
    """Also with those that run beside others; and nothing is left behind."""
    done = ci(FAILS=program)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "as it was told" in done.stdout
    assert "done" not in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == [".ci", "bin", "clipsteer"]
