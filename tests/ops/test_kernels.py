"""Interpreted Triton kernels on rows that are made to defeat the fast path of the selection; what launchers decide."""

from __future__ import annotations

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
