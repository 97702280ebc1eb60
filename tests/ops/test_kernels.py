"""Interpreted Triton kernels on rows that are made to defeat the fast path of the selection; what launchers decide."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

CROWDED = """
import torch
from clipsteer.kernels.topk_encode import candidates_per_bucket, topk_encode

n, k, width = 640, 20, 64  # the interpreter's buckets are 64 columns wide
assert candidates_per_bucket(n // width, k) < k  # or no bucket could hide a winner
generator = torch.Generator().manual_seed(0)
noise = torch.randint(-9, 9, (n,), generator=generator).float()
rows = {"noise": noise, "constant": torch.ones(n), "up": torch.arange(n).float(), "down": -torch.arange(n).float()}
for name, first in {"first": 0, "middle": 3 * width, "last": n - width}.items():
    rows[f"all winners in the {name} bucket"] = noise.clone()
    rows[f"all winners in the {name} bucket"][first : first + width] += 100
rows["two crowded buckets"] = noise.clone()
rows["two crowded buckets"][2 * width : 4 * width] += 100
rows["infinities"] = torch.full((n,), -torch.inf)
rows["infinities"][77] = torch.inf
rows["signed zeros"] = torch.zeros(n)
rows["signed zeros"][::2] = -0.0
# One-hot rows of x pick a row of the table: its pre-activations are those values, exactly.
table = torch.stack(list(rows.values())).nan_to_num(posinf=1e30, neginf=-1e30)
acts, indices = topk_encode(torch.eye(len(rows)), table.T.contiguous(), None, k)
expected = torch.sort(table + 0.0, dim=1, descending=True, stable=True)
for i, name in enumerate(rows):
    assert torch.equal(indices[i], expected.indices[i, :k]), name
    assert torch.equal(acts[i], expected.values[i, :k].relu()), name

bias = noise.clone()
bias[[5, 6, 300]] = torch.tensor([torch.inf, -torch.inf, torch.nan])
acts, indices = topk_encode(torch.zeros(3, 4), torch.zeros(n, 4), bias, k)
assert acts.isnan().all()
assert all(len(set(row)) == k and 0 <= min(row) and max(row) < n for row in indices.tolist())
"""


def test_crowded_buckets_are_redone(interpret) -> None:
    interpret(CROWDED)


def test_a_single_row_of_any_stride_is_a_matrix_of_tiles() -> None:
    launch = pytest.importorskip("clipsteer.kernels._launch")
    row = torch.randn(9, 100).bfloat16()[4:5, :64]
    assert row.is_contiguous()
    assert row.stride(0) * row.element_size() % 16
    assert launch.tiles(row, 128, 64).strides == [64, 1]


@pytest.mark.parametrize("groups", [1, 31, 32, 2047, 2048, 2**17])
def test_groups_are_counted_on_chip_while_their_bins_fit(groups: int) -> None:
    kernels = pytest.importorskip("clipsteer.kernels.conceptor_project")
    index = torch.zeros(1, dtype=torch.int64)
    how = kernels._grouping(torch.empty(1, 4), index, groups)[1]
    assert how["BINS"] <= 2048
    assert how["GROUPING"] == ("index" if groups < 2048 else "order")


# what a device says of itself, and how float32 products of 64 and 32 terms are taken under "highest" and "high"
CHIPS = {
    "gfx942:sramecc+:xnack-": (True, ["ieee", "ieee", "tf32", "tf32"]),
    "gfx90a:sramecc+:xnack-": (True, ["ieee"] * 4),
    "gfx950": (True, ["ieee"] * 4),
    "gfx1100": (True, ["ieee"] * 4),
    "gfx1201": (True, ["ieee"] * 4),
    (9, 0): (False, ["tf32x3", "ieee", "tf32", "tf32"]),
    (8, 0): (False, ["tf32x3", "ieee", "tf32", "tf32"]),
    (7, 5): (False, ["ieee"] * 4),
}


@pytest.mark.parametrize("chip", CHIPS, ids=str)
def test_tf32_is_taken_where_the_chip_has_it(chip, monkeypatch) -> None:
    launch = pytest.importorskip("clipsteer.kernels._launch")
    hip, expected = CHIPS[chip]
    monkeypatch.setattr(torch.version, "hip", "7.0" if hip else None)
    # ROCm's builds of torch say a capability too, of 9.x
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4) if hip else chip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=chip))
    launch.has_tf32.cache_clear()
    on_chip = lambda dtype: SimpleNamespace(dtype=dtype, device=torch.device("cuda", 0))
    before, found = torch.get_float32_matmul_precision(), []
    try:
        for setting in ("highest", "high"):
            torch.set_float32_matmul_precision(setting)
            found += [launch.precision(on_chip(torch.float32), depth) for depth in (64, 32)]
            assert launch.precision(on_chip(torch.bfloat16), 64) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)
        launch.has_tf32.cache_clear()
    assert found == expected


AMD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("aot", sys.argv[1])
aot = importlib.util.module_from_spec(spec)
spec.loader.exec_module(aot)
from clipsteer.kernels import _launch
aot.SHARED_MEMORY[sys.argv[2]] = 64 * 1024
found = aot.compile_all(sys.argv[2], ["encode by rows tf32", "drrho of few columns tf32"])
assert all(found.values()), found
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", ["gfx90a", "gfx950", "gfx1100", "gfx1201"])
def test_float32_products_compile_for_chips_without_tf32(target) -> None:
    """With TF32 allowed, as triton refuses it there."""
    pytest.importorskip("triton")
    file = Path(__file__).with_name("test_aot.py")
    done = subprocess.run([sys.executable, "-c", AMD, file, target], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
