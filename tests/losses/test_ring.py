"""Processes that wait for each other, and blocks of texts without a partner; values are in test_losses.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from _command import in_processes
from clipsteer import ops
from clipsteer.ops._sweeps import low_level

LOST = """
import datetime, os, sys, time, torch, torch.distributed as dist
from pathlib import Path
from clipsteer import losses
x = torch.nn.functional.normalize(torch.randn(4, 6), dim=1).requires_grad_()
losses.SigLipLoss()(x, x, 10.0, -10.0).backward()  # loads what it needs
# a process that is gone is noticed at once, one that is late by the time-out alone
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=5 if sys.argv[2] == "late" else 300))
rank, size = dist.get_rank(), dist.get_world_size()
said = [Path(sys.argv[3]) / str(other) for other in (0, 1)]
clip = losses.ClipLoss(rank=rank, world_size=size, equal_rows=True), (x, x, 1.0)
gathered = losses.SigLipLoss(rank=rank, world_size=size), (x, x, 10.0, -10.0)
ring = losses.SigLipLoss(rank=rank, world_size=size, ring=True, equal_rows=True), (x, x, 10.0, -10.0)
loss, given = {"clip": clip, "gathered": gathered, "ring": ring}[sys.argv[1]]
loss(*given).backward()
if rank == 2:
    while sys.argv[2] == "late" and not all(file.exists() for file in said):
        time.sleep(0.05)
    os._exit(0)  # without a word
try:
    loss(*given).backward()
except RuntimeError as error:
    others = f"its neighbours {(rank - 1) % 3} and {(rank + 1) % 3}" if loss is ring[0] else "the others"
    expected = f"{type(loss).__name__}: process {rank} of 3 waited in vain for {others}; one has ended, or takes longer"
    assert expected in str(error), error
    assert error.__cause__ is not None
    said[rank].touch()
else:
    raise AssertionError("a process is gone, and nobody noticed")
os._exit(0)
"""


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("ring", "gone"),
        *(pytest.param(*case, marks=pytest.mark.nightly) for case in (("clip", "gone"), ("gathered", "late"))),
        pytest.param("ring", "late", marks=pytest.mark.nightly),
    ],
)
def test_a_process_that_is_gone_ends_the_others_with_an_error(kind: str, how: str, tmp_path: Path) -> None:
    in_processes(LOST, kind, how, tmp_path, size=3)


def test_a_block_of_others_has_no_partners() -> None:
    """At an offset of as many as there are columns, also of fewer columns than rows; further on is refused."""
    g = torch.Generator().manual_seed(0)
    ops.siglip_loss(*torch.ones(2, 3, 4), logit_scale=1.0, backend="cpp")  # loads the library
    for N in (3, 70, 200):
        rows, cols = (normalize(torch.randn(n, 12, generator=g, dtype=torch.float64), dim=1) for n in (90, N))
        scale, bias = torch.tensor([6.0, -2.0], dtype=torch.float64)
        S = rows @ cols.T
        w = torch.sigmoid(S * scale + bias)
        truth = [(S * scale + bias).exp().log1p().sum(), (w * S).sum(), w.sum(), w @ cols, w.T @ rows]
        for backend in ("cpp", "reference"):
            sums, d_rows, d_cols = low_level(backend, "siglip_sweep", rows, cols, scale, bias, N, True, True)
            for found, expected in zip((*sums, d_rows, d_cols), truth):
                torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
        with pytest.raises(ValueError, match="the rows' own columns among all"):
            low_level("cpp", "siglip_sweep", rows, cols, scale, bias, N + 1, True, True)


INTERPRETED = """
import torch
from clipsteer.kernels.siglip_loss import siglip_sweep
from clipsteer.ops._sweeps import PLAIN
g = torch.Generator().manual_seed(0)
rows, cols = torch.randn(40, 8, generator=g), torch.randn(24, 8, generator=g)
given = (rows, cols, torch.tensor(2.0), torch.tensor(-1.0), 24, True, True)
for found, expected in zip(siglip_sweep(*given), PLAIN["siglip_sweep"](*given)):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
"""


def test_triton_sweeps_a_block_of_others(interpret) -> None:
    interpret(INTERPRETED)


def test_a_process_sends_as_much_as_with_a_gather_and_a_sum(tmp_path: Path) -> None:
    in_processes(SENT, size=3)


SENT = """
import torch, torch.distributed as dist
from clipsteer.losses.ring import Ring
from clipsteer.training.world import World
dist.init_process_group("gloo")
world = World("cpu")
x = torch.full((6, 4), float(world.rank))
for both_ways, dtype in ((True, torch.float32), (False, torch.bfloat16)):
    ring = Ring(world, 6, True, True)
    ring.both_ways = both_ways
    before, met = world.sent, []

    def add(rows):
        met.append(rows.clone())
        return rows + 1.0

    total = ring.visit(x.to(dtype), add)
    assert total.shape == x.shape and torch.equal(total.float(), 2 * (x + 1))
    # of each other process every row once, never as many as all have
    assert max(len(rows) for rows in met) == (3 if both_ways else 6)
    others = [float(rank) for rank in range(3) if rank != world.rank for _ in range(6)]
    assert sorted(torch.cat(met)[:, 0].tolist()) == others
    assert world.sent - before == 4 * x.to(dtype).nbytes
    assert ring.visit(x.to(dtype), lambda rows: None) is None
dist.destroy_process_group()
"""
