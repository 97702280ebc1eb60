"""Interpreted Triton kernels on rows that are made to defeat the fast path of the selection; what launchers decide."""

from __future__ import annotations

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


# what a device says of itself, what compilers call it, and how float32 products of 64 and 32 terms are taken under
# "highest" and "high"
CHIPS = {
    "gfx942:sramecc+:xnack-": ("gfx942", ["ieee", "ieee", "tf32", "tf32"]),
    "gfx90a:sramecc+:xnack-": ("gfx90a", ["ieee"] * 4),
    "gfx950": ("gfx950", ["ieee"] * 4),
    "gfx1100": ("gfx1100", ["ieee"] * 4),
    "gfx1201": ("gfx1201", ["ieee"] * 4),
    (12, 0): ("sm_120", ["tf32x3", "ieee", "tf32", "tf32"]),
    (10, 0): ("sm_100", ["tf32x3", "ieee", "tf32", "tf32"]),
    (9, 0): ("sm_90", ["tf32x3", "ieee", "tf32", "tf32"]),
    (8, 0): ("sm_80", ["tf32x3", "ieee", "tf32", "tf32"]),
    (7, 5): ("sm_75", ["ieee"] * 4),
}


@pytest.mark.parametrize("says", CHIPS, ids=str)
def test_tf32_is_taken_where_the_chip_has_it(says, monkeypatch) -> None:
    launch = pytest.importorskip("clipsteer.kernels._launch")
    name, expected = CHIPS[says]
    hip = name.startswith("gfx")
    monkeypatch.setattr(torch.version, "hip", "7.0" if hip else None)
    # ROCm's builds of torch say a capability too, of 9.x
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4) if hip else says)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=says))
    launch.chip.cache_clear()
    on_chip = lambda dtype: SimpleNamespace(dtype=dtype, device=torch.device("cuda", 0))
    before, found = torch.get_float32_matmul_precision(), []
    try:
        assert launch.chip(torch.device("cuda", 0)) == launch.chip_named(name)
        for setting in ("highest", "high"):
            torch.set_float32_matmul_precision(setting)
            found += [launch.precision(on_chip(torch.float32), depth) for depth in (64, 32)]
            assert launch.precision(on_chip(torch.bfloat16), 64) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)
        launch.chip.cache_clear()
    assert found == expected


# KiB of shared memory of a block by NVIDIA's and AMD's manuals, and whether matrix units read operands from there; also
# of chips that nothing is compiled for in these tests
GENERATIONS = {
    "sm_75": (64, False), "sm_80": (163, False), "sm_86": (99, False), "sm_87": (163, False), "sm_89": (99, False),
    "sm_90": (227, True), "sm_100": (227, True), "sm_103": (227, True), "sm_110": (227, True), "sm_120": (99, False),
    "sm_121": (99, False), "gfx90a": (64, False), "gfx942": (64, False), "gfx950": (160, False),
    "gfx1100": (64, False), "gfx1201": (64, False),
}  # fmt: skip


@pytest.mark.parametrize("name", GENERATIONS)
def test_tiles_fit_a_chip_by_what_it_has(name) -> None:
    """Wide tiles of float32, whose halves pass through registers, need operands that do not, not a late capability."""
    launch = pytest.importorskip("clipsteer.kernels._launch")
    kernels = pytest.importorskip("clipsteer.kernels.topk_encode")
    chip, (kib, apart) = launch.chip_named(name), GENERATIONS[name]
    assert chip.shared_memory == kib * 1024
    ways = [(torch.bfloat16, "ieee"), (torch.float16, "ieee"), (torch.float32, "ieee")]
    ways += [(torch.float32, "tf32"), (torch.float32, "tf32x3")] if chip.tf32 else []
    for dtype, how in ways:
        for tma in {False, chip.bulk_copies}:
            tile = kernels.tile_config(dtype, how, chip, tma=tma)
            buffers = tile["num_stages"] - chip.amd
            size = (tile["BLOCK_B"] + tile["BLOCK_N"]) * tile["BLOCK_D"] * dtype.itemsize
            assert buffers * size <= kib * 1024
            assert how != "tf32x3" or tile["BLOCK_N"] == (128 if tma and apart else 64)
