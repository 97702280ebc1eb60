"""The processes that train together. With one process every method does nothing, so callers need no
second path."""

from __future__ import annotations

import atexit
import json
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _join(backend: str) -> None:
    # Not at the top: absent from builds of torch without distributed. The functions of
    # torch.distributed.nn take the group there is when they are imported (an optimizer does that)
    # as their default, and would keep it, and with it threads that still let go of tensors while
    # the interpreter ends: that aborts the process.
    import torch.distributed.nn.functional  # noqa: F401
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://"))
    # torchrun keeps one store over restarts: without this, processes look for addresses of their
    # dead predecessors
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"clipsteer/{attempt}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _serves_hosts(group: Any) -> bool:
    """Whether a process group takes tensors of the CPU, as gloo's do and nccl's do not."""
    return any(device.type == "cpu" for device in group._device_types)


class World:
    """A view of torch.distributed: sums, gathers and broadcasts over all processes, in rank order.

    Under ``torchrun`` the process group is made here (nccl for CUDA devices, gloo otherwise) and
    closed when Python ends, since a process cannot join its job a second time; a group that the
    caller made is used and left alone.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        local = int(os.environ.get("LOCAL_RANK", 0))
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        wanted = int(os.environ.get("WORLD_SIZE", 1)) > 1
        if self.device.type == "cuda" and self.device.index is None and wanted:
            self.device = torch.device("cuda", local)
        if wanted and dist.is_available() and not dist.is_initialized():
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            _join("nccl" if self.device.type == "cuda" else "gloo")
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.size = dist.get_world_size() if together else 1
        self._host: Any = None

    def counts(self, number: int) -> list[int]:
        """Every process's number, in rank order. They go from host to host, so that no device is
        waited for and a CUDA graph can be captured (once the first call has made a group)."""
        if self.size == 1:
            return [number]
        if self._host is None:
            group = dist.distributed_c10d._get_default_group()
            self._host = group if _serves_hosts(group) else dist.new_group(backend="gloo")
        parts = [torch.zeros(1, dtype=torch.int64, device="cpu") for _ in range(self.size)]
        mine = torch.tensor([number], dtype=torch.int64, device="cpu")
        dist.all_gather(parts, mine, group=self._host)
        return [int(part) for part in parts]

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum in place over the processes."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def min_(self, tensor: Tensor) -> Tensor:
        """The smallest over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """The processes' tensors, of equal shape, joined along dimension 0."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Overwrite with the tensor of rank 0."""
        if self.size > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def broadcast_json(self, value: Any) -> Any:
        """The value of rank 0, of what JSON can say."""
        if self.size == 1:
            return value
        data = torch.tensor([*json.dumps(value).encode()], dtype=torch.uint8, device=self.device)
        size = self.broadcast_(torch.tensor([len(data)], device=self.device))
        if self.rank:
            data = data.new_empty(int(size))
        return json.loads(bytes(self.broadcast_(data).tolist()))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; waits for all of them."""
        if self.size == 1:
            return flag
        return bool(self.sum_(torch.tensor(float(flag), device=self.device)))


def training_world(world: World | None) -> World | None:
    """The processes of a loss, None for a single one; by default those of an initialised process
    group."""
    if world is None and torch.distributed.is_available() and torch.distributed.is_initialized():
        world = World("cpu")
    return world if world is not None and world.size > 1 else None


class JointBatch:
    """One batch's rows over the processes: ``rows`` in all, any number of them in each."""

    def __init__(self, world: World, rows: int) -> None:
        self.world = world
        self.size = world.size
        self.counts = world.counts(rows)
        self.rows = sum(self.counts)
        self.offset = sum(self.counts[: world.rank])

    def join(
        self,
        x: Tensor,  # (n, ...)
    ) -> Tensor:  # (rows, ...)
        """Every process's rows, in rank order."""
        padded = x.new_zeros(max(self.counts), *x.shape[1:])
        padded[: len(x)] = x
        parts = self.world.gather(padded).chunk(self.size)
        return torch.cat([part[:n] for part, n in zip(parts, self.counts)])

    def logsumexp(self, x: Tensor) -> Tensor:
        """Elementwise over the processes."""
        return self.world.gather(x.unsqueeze(0)).logsumexp(0)

    def sum_(self, x: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        return self.world.sum_(x)
