"""The joint batch of the processes that share a loss, by open_clip's switches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist
from torch import Tensor, nn

from clipsteer.training.world import JointBatch, World


@contextlib.contextmanager
def together(name: str, world: World, others: str = "the others") -> Iterator[None]:
    """What has to be waited for: whoever waits in vain says so."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"{name}: process {world.rank} of {world.size} waited in vain for {others}; one has "
            f"ended, or takes longer than the process group's time-out: {error}"
        ) from error


class Exchange(JointBatch):
    """Rows of each process against the columns of all.

    local: each process's loss is that of its own images and texts among all, times its number of
    them over the mean one; else every process's is that of the joint batch. with_grad: features
    have the gradients of what all processes return, which data-parallel training averages; else
    those of their own process alone, with the features of the others as constants. equal: every
    process is known to have as many rows, so that none has to ask; name: for errors.
    """

    def __init__(
        self,
        world: World,
        rows: int,
        local: bool,
        with_grad: bool,
        equal: bool = False,
        name: str = "loss",
    ) -> None:
        self.name = name
        if equal:
            counts = [rows] * world.size
        else:
            with together(name, world):
                counts = world.counts(rows)
        self._is(world, counts)
        self.local = local
        self.with_grad = with_grad
        # of a joint loss's gradient
        self.factor = float(self.size) if local or with_grad else 1.0

    def gather(self, x: Tensor) -> Tensor:
        """Of all processes, of equal shape, along a new first dimension."""
        with together(self.name, self.world):
            return self.world.gather(x.unsqueeze(0))

    def join_all(self, *tensors: Tensor) -> list[Tensor]:
        with together(self.name, self.world):
            return super().join_all(*tensors)

    def logsumexp(self, x: Tensor) -> Tensor:
        return self.gather(x).logsumexp(0)

    def sum_(self, x: Tensor) -> Tensor:
        with together(self.name, self.world):
            return super().sum_(x)


class JointLoss(nn.Module):
    """A loss of the pairs of `world_size` processes, this one of `rank`.

    equal_rows: every process has as many pairs in every batch. They are counted at the first one
    alone; else at each, from host to host, as unlike ones are refused.
    """

    def __init__(self, rank: int, world_size: int, equal_rows: bool, backend: str) -> None:
        super().__init__()
        self.rank = rank
        self.world_size = world_size
        self.equal_rows = equal_rows
        self.backend = backend
        self._counted: int | None = None

    def joint(
        self,
        rows: int,
        local: bool = False,
        with_grad: bool = True,
        of: type[Exchange] = Exchange,
    ) -> Exchange | None:
        """The batch of all processes, None for a single one.

        Raises RuntimeError where there is no process group, ValueError where it is another one, for
        unlike numbers of rows, or for another one than before where they are to be equal.
        """
        name = type(self).__name__
        size = self.world_size
        if size == 1:
            return None
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                f"{name}: world_size={size} needs a process group; call "
                "torch.distributed.init_process_group first, or leave world_size at 1"
            )
        world = World("cpu")
        if (self.rank, size) != (world.rank, world.size):
            raise ValueError(
                f"{name}: expected rank and world_size of the process group, {world.rank} and "
                f"{world.size}, got {self.rank} and {size}"
            )
        known = self.equal_rows and self._counted is not None
        if known and rows != self._counted:
            raise ValueError(
                f"{name}: equal_rows=True, and the first batch had {self._counted} pairs of this "
                f"process, got {rows}; drop what fills no batch, or leave equal_rows out"
            )
        joint = of(world, rows, local, with_grad, known, name)
        if len(set(joint.counts)) > 1:
            raise ValueError(
                f"{name}: the processes must have as many pairs each, got {joint.counts} of them"
            )
        self._counted = rows
        return joint


def refuse_horovod(name: str, use_horovod: bool) -> None:
    """Raise RuntimeError where Horovod is asked for."""
    if use_horovod:
        raise RuntimeError(
            f"{name}: use_horovod is not served; run under torchrun, with torch.distributed"
        )
