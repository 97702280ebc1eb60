"""Which codes are kept where several processes have candidates: the same set that one process keeps
that has them all.

Only values are exchanged. A process knows how many of the others' are as large as the last one
kept, and the order of their rows and features; so every process finds out by itself which of its
own are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clipsteer.ops import SparseCodes, code_rows
from clipsteer.training.world import World


def kept_of_rows(
    acts: Tensor,  # (B, c) of a process's own features, in descending order, not negative
    k: int,
    world: World,
) -> Tensor:  # (B, c) bool
    """Which of a process's candidates are among the k largest of their row over all processes,
    and not 0. Ties go to the lower rank, then to the earlier candidate.

    All processes have the same rows; c may differ, but is at least what a process can keep of k.
    """
    padded = acts.new_zeros(acts.shape[0], k)
    padded[:, : acts.shape[1]] = acts
    every = world.gather(padded[None])  # (P, B, k)
    largest = every.transpose(0, 1).flatten(1)
    last = torch.topk(largest, k, sorted=False).values.amin(1)  # (B,)
    # so that NaN is kept
    above = ~(every <= last[:, None]) & (every != 0)
    room = k - above.sum((0, 2))  # (B,)
    ties = (every == last[:, None]).sum(2)  # (P, B)
    room = room - (ties.cumsum(0) - ties)[world.rank]
    tied = acts == last[:, None]
    mine = ~(acts <= last[:, None]) | (tied & (tied.cumsum(1) <= room[:, None]))
    return mine & (acts != 0)


def kept_of_batch(
    codes: SparseCodes,  # the ``count`` largest of a process's own, not negative
    count: int,
    world: World,
    by_row: bool,
) -> Tensor:  # (m,) bool
    """Which of a process's codes are among the ``count`` largest over all processes, and not 0.

    ``by_row``: the processes have the same rows and each its own features, and ties go to the
    earlier row, then to the lower rank; else each has its own rows, and ties go to the lower rank.
    Within a process they go to the earlier code.
    """
    values = codes.values
    most = values.new_zeros(count)
    some = torch.topk(values, min(count, len(values)), sorted=False).values
    most[: len(some)] = some
    every = world.gather(most)  # (P · count,)
    last = torch.topk(every, count, sorted=False).values.amin() if count else every.new_zeros(())
    room = count - (~(every <= last) & (every != 0)).sum()
    tied = (values == last) & (values != 0)
    slots = codes.offsets.shape[0] - 1 if by_row else 1
    slot = code_rows(codes) if by_row else torch.zeros_like(codes.indices)
    ties = torch.zeros(slots + 1, dtype=torch.int64, device=values.device)
    # padding, which is never tied, goes to a spare slot
    ties = ties.scatter_add_(0, slot, tied.to(torch.int64))[:-1]
    table = world.gather(ties[None])  # (P, slots)
    order = table.T if by_row else table
    # ties of earlier rows and processes
    before = order.flatten().cumsum(0).view_as(order) - order
    before = before[:, world.rank] if by_row else before[world.rank]  # (slots,)
    # of the ties in a slot, how many are kept
    allowed = torch.cat([(room - before).clamp_min(0), room.new_zeros(1)])
    earlier = torch.cat([ties.cumsum(0) - ties, ties.new_zeros(1)])
    place = tied.cumsum(0) - earlier[slot]  # from 1
    return (~(values <= last) | (tied & (place <= allowed[slot]))) & (values != 0)


def only(codes: SparseCodes, keep: Tensor) -> SparseCodes:
    """The codes of a mask (m,), without padding."""
    rows = codes.offsets.shape[0] - 1
    row = code_rows(codes)
    keep = keep & (row < rows)
    number = torch.zeros(rows + 1, dtype=torch.int64, device=row.device)
    number.scatter_add_(0, row, keep.to(torch.int64))
    offsets = torch.cat([number.new_zeros(1), number[:-1].cumsum(0)])
    return codes._replace(values=codes.values[keep], indices=codes.indices[keep], offsets=offsets)


def ragged(
    acts: Tensor,  # (B, c)
    indices: Tensor,  # (B, c), each feature once in a row
    keep: Tensor,  # (B, c) bool
) -> SparseCodes:
    """The kept of top-k codes as ragged ones, features in ascending order."""
    none = torch.iinfo(torch.int64).max
    indices, order = indices.masked_fill(~keep, none).sort(1)
    there = indices != none
    offsets = torch.cat([indices.new_zeros(1), there.sum(1).cumsum(0)])
    return SparseCodes(acts.gather(1, order)[there], indices[there], offsets)


def joint_largest(
    codes: SparseCodes,  # the ``count`` largest of this process's rows
    count: int,
    world: World,
) -> Tensor:
    """The values of which those that are not among the ``count`` largest of all processes' rows
    are 0."""
    with torch.no_grad():
        keep = kept_of_batch(codes, count, world, by_row=False)
    return torch.where(keep, codes.values, 0)
