"""What several processes keep of their candidates is what one process keeps that has them all, ties included."""

from __future__ import annotations

import threading

import pytest
import torch

from clipsteer import ops
from clipsteer.sae.selection import joint_largest, kept_of_batch, kept_of_rows, only, ragged
from clipsteer.training.world import World


class Thread(World):
    """Processes played by threads of this one."""

    def __init__(self, rank, shared):
        self.device = torch.device("cpu")
        self.rank, self.size, self.sent = rank, len(shared["parts"]), 0
        self.shared = shared

    def gather(self, tensor):
        self.shared["parts"][self.rank] = tensor
        self.shared["barrier"].wait(30)
        joined = torch.cat(self.shared["parts"])
        self.shared["barrier"].wait(30)
        return joined


def in_threads(size, function):
    shared = {"parts": [None] * size, "barrier": threading.Barrier(size)}
    found = [None] * size

    def play(rank):
        found[rank] = function(Thread(rank, shared))

    threads = [threading.Thread(target=play, args=(rank,)) for rank in range(size)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    return found


def problem(seed, rows, n):
    """Small whole numbers: most pre-activations are tied."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, (rows, 3), generator=generator).double()
    W = torch.randint(-1, 2, (n, 3), generator=generator).double()
    return x, W


def dense(codes, rows, n):
    row = ops.code_rows(codes)
    there = (row < rows) & (codes.values != 0)
    out = torch.zeros(rows, n, dtype=codes.values.dtype)
    out[row[there], codes.indices[there]] = codes.values[there]
    return out


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("size", [2, 3])
def test_top_k_over_shares_of_the_features(seed, size):
    k = 1 + seed % 5
    rows, n = 7, 4 * size
    x, W = problem(seed, rows, n)
    acts, indices = ops.topk_encode(x, W, k=k)
    wanted = torch.zeros(rows, n, dtype=x.dtype).scatter(1, indices, acts)

    def keep(world):
        share = W.chunk(size)[world.rank]
        mine = ops.topk_encode(x, share, k=min(k, len(share)))
        return ragged(*mine, kept_of_rows(mine[0], k, world))

    parts = in_threads(size, keep)
    assert torch.equal(torch.cat([dense(part, rows, n // size) for part in parts], 1), wanted)
    for part in parts:
        assert bool((part.values != 0).all())
        for a, b in zip(part.offsets, part.offsets[1:]):
            assert bool((part.indices[a:b].diff() > 0).all())


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("by_row", [True, False])
def test_the_largest_of_a_batch(seed, size, by_row):
    rows, n = 4 * size, 4 * size
    x, W = problem(seed, rows, n)
    # from fewer than are tied at the top to more than are positive
    count = (1, 5, 17, 40, 100, 144)[seed % 6]
    wanted = dense(ops.batch_topk_encode(x, W, count=count), rows, n)

    def keep(world):
        mine = (x, W.chunk(size)[world.rank]) if by_row else (x.chunk(size)[world.rank], W)
        codes = ops.batch_topk_encode(*mine, count=count)
        kept = only(codes, kept_of_batch(codes, count, world, by_row))
        assert int(kept.offsets[-1]) == len(kept.values)
        if not by_row:
            masked = codes._replace(values=joint_largest(codes, count, world))
            assert torch.equal(dense(masked, len(mine[0]), n), dense(kept, len(mine[0]), n))
        return dense(kept, len(mine[0]), len(mine[1]))

    found = torch.cat(in_threads(size, keep), int(by_row))
    assert torch.equal(found, wanted)
    assert int((found != 0).sum()) == min(count, int((x @ W.T > 0).sum()))


def test_a_value_that_is_no_number_is_kept():
    def keep(world):
        acts = torch.tensor([[float("nan")] * 2 if world.rank else [3.0, 2.0]])
        return kept_of_rows(acts, 2, world)

    assert in_threads(2, keep)[1].all()

    def largest(world):
        values = torch.tensor([float("nan") if world.rank else 3.0, 2.0])
        codes = ops.SparseCodes(values, torch.arange(2), torch.tensor([0, 2]))
        return kept_of_batch(codes, 2, world, by_row=False)

    assert in_threads(2, largest)[1][0]
