"""The joint batch of the processes that share a loss, by open_clip's switches."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from clipsteer.training.world import JointBatch, World


class Exchange(JointBatch):
    """Rows of each process against the columns of all.

    local: each process's loss is that of its own images and texts among all, times its number of
    them over the mean one; else every process's is that of the joint batch. with_grad: features
    have the gradients of what all processes return, which data-parallel training averages; else
    those of their own process alone, with the features of the others as constants.
    """

    def __init__(self, world: World, rows: int, local: bool, with_grad: bool) -> None:
        super().__init__(world, rows)
        self.local = local
        self.with_grad = with_grad
        # of a joint loss's gradient
        self.factor = float(self.size) if local or with_grad else 1.0

    def gather(self, x: Tensor) -> Tensor:
        """Of all processes, of equal shape, along a new first dimension."""
        return self.world.gather(x.unsqueeze(0))


def exchange(
    name: str,
    rank: int,
    world_size: int,
    rows: int,
    local: bool = False,
    with_grad: bool = True,
) -> Exchange | None:
    """None for one process.

    Raises RuntimeError where there is no process group, ValueError where it is another one.
    """
    if world_size == 1:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"{name}: world_size={world_size} needs a process group; call "
            "torch.distributed.init_process_group first, or leave world_size at 1"
        )
    world = World("cpu")
    if (rank, world_size) != (world.rank, world.size):
        raise ValueError(
            f"{name}: expected rank and world_size of the process group, {world.rank} and "
            f"{world.size}, got {rank} and {world_size}"
        )
    joint = Exchange(world, rows, local, with_grad)
    if len(set(joint.counts)) > 1:
        raise ValueError(
            f"{name}: the processes must have as many pairs each, got {joint.counts} of them"
        )
    return joint


def refuse_horovod(name: str, use_horovod: bool) -> None:
    """Raise RuntimeError where Horovod is asked for."""
    if use_horovod:
        raise RuntimeError(
            f"{name}: use_horovod is not served; run under torchrun, with torch.distributed"
        )
