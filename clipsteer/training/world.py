"""The processes that train together. With one process every method does nothing, so callers need no
second path."""

from __future__ import annotations

import atexit
import json
import os
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# groups that take tensors of the CPU, made here for groups that do not
_host_groups: dict[Any, Any] = {}


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
    _host_groups.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def _serves_hosts(group: Any) -> bool:
    """Whether a process group takes tensors of the CPU, as gloo's do and nccl's do not."""
    return any(device.type == "cpu" for device in group._device_types)


def _group_of(mesh: Any) -> Any:
    """The process group of a ``DeviceMesh`` of one dimension; a group is its own."""
    if not hasattr(mesh, "get_group"):
        return mesh
    if mesh.ndim != 1:
        raise ValueError(
            f"mesh must have one dimension, got {mesh.ndim}: {tuple(mesh.shape)}; take one of it, "
            "as in mesh['data']"
        )
    return mesh.get_group()


class World:
    """A view of torch.distributed: sums, gathers and broadcasts over all processes, in rank order.

    Under ``torchrun`` the process group is made here (nccl for CUDA devices, gloo otherwise) and
    closed when Python ends, since a process cannot join its job a second time; a group that the
    caller made is used and left alone.

    Args:
        device: of the tensors; by default CUDA where there is one.
        mesh: a process group, or a ``DeviceMesh`` of one dimension, that this process is part of;
            None: all processes.

    ``sent`` counts the bytes that this process has sent, as the usual algorithms do it: of a sum
    2 (P - 1) / P of the tensor (a ring), of a gather the tensor to P - 1 others.
    """

    def __init__(self, device: torch.device | str | None = None, mesh: Any = None) -> None:
        local = int(os.environ.get("LOCAL_RANK", 0))
        if device is None and mesh is not None and hasattr(mesh, "device_type"):
            device = mesh.device_type
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
        self.group = _group_of(mesh)
        self.rank = dist.get_rank(self.group) if together else 0
        self.size = dist.get_world_size(self.group) if together else 1
        if self.rank < 0:
            raise ValueError("mesh must be of processes among which this one is")
        self.sent = 0

    def _global(self, rank: int) -> int:
        """A rank of the group among all processes."""
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    def _host_group(self) -> Any:
        """One of the same processes that takes tensors of the CPU. It is not kept here: a group
        that outlives the one it belongs to aborts the process at its end."""
        group = self.group or dist.distributed_c10d._get_default_group()
        if _serves_hosts(group):
            return group
        if group not in _host_groups:
            ranks = dist.get_process_group_ranks(group)
            made = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
            _host_groups[group] = made
        return _host_groups[group]

    def _summed(self, tensor: Tensor, op: Any) -> Tensor:
        if self.size > 1:
            dist.all_reduce(tensor, op=op, group=self.group)
            self.sent += 2 * (self.size - 1) * tensor.nbytes // self.size
        return tensor

    def counts(self, number: int) -> list[int]:
        """Every process's number, in rank order. They go from host to host, so that no device is
        waited for and a CUDA graph can be captured (once the first call has made a group)."""
        if self.size == 1:
            return [number]
        parts = [torch.zeros(1, dtype=torch.int64, device="cpu") for _ in range(self.size)]
        mine = torch.tensor([number], dtype=torch.int64, device="cpu")
        dist.all_gather(parts, mine, group=self._host_group())
        self.sent += (self.size - 1) * mine.nbytes
        return [int(part) for part in parts]

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum in place over the processes."""
        return self._summed(tensor, dist.ReduceOp.SUM) if self.size > 1 else tensor

    def min_(self, tensor: Tensor) -> Tensor:
        """The smallest over all processes, in place."""
        return self._summed(tensor, dist.ReduceOp.MIN) if self.size > 1 else tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """The processes' tensors, of equal shape, joined along dimension 0."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        self.sent += (self.size - 1) * tensor.nbytes
        return torch.cat(parts)

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Overwrite with the tensor of rank 0."""
        if self.size > 1:
            dist.broadcast(tensor, self._global(0), group=self.group)
        return tensor

    def send(self, tensor: Tensor, rank: int) -> None:
        """To one process, which has to ``receive_`` it."""
        dist.send(tensor.contiguous(), self._global(rank), group=self.group)

    def receive_(self, tensor: Tensor, rank: int) -> Tensor:
        """Overwrite a contiguous tensor with what a process sends."""
        dist.recv(tensor, self._global(rank), group=self.group)
        return tensor

    def pass_on(self, parts: Sequence[tuple[Tensor, int]]) -> Callable[[], list[Tensor]]:
        """Send each tensor to the process so many places on, round the ring, and begin to receive
        those of the one as many places back, of the same shapes: what is returned waits for them.
        All processes have to call this alike."""
        sent = [x.contiguous() for x, _ in parts]
        received = [torch.empty_like(x) for x in sent]
        moves = []
        for move, tensors, sign in ((dist.isend, sent, 1), (dist.irecv, received, -1)):
            for x, (_, step) in zip(tensors, parts):
                peer = self._global((self.rank + sign * step) % self.size)
                # of any dtype
                raw = x.view(-1).view(torch.uint8)
                moves.append(dist.P2POp(move, raw, peer, group=self.group))
        self.sent += sum(x.nbytes for x in sent)
        works = dist.batch_isend_irecv(moves)

        def wait() -> list[Tensor]:
            for work in works:
                work.wait()
            sent.clear()
            return received

        return wait

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
        self._is(world, world.counts(rows))

    @classmethod
    def of(cls, counts: list[int], world: World) -> JointBatch:
        """A batch of whose rows every process knows how many each has."""
        batch = cls.__new__(cls)
        batch._is(world, counts)
        return batch

    def _is(self, world: World, counts: list[int]) -> None:
        self.world = world
        self.size = world.size
        self.counts = counts
        self.rows = sum(counts)
        self.offset = sum(counts[: world.rank])

    def own(
        self,
        x: Tensor,  # (rows, ...)
    ) -> Tensor:  # (n, ...)
        """This process's part of what all have."""
        return x[self.offset : self.offset + self.counts[self.world.rank]]

    def join(
        self,
        x: Tensor,  # (n, ...)
    ) -> Tensor:  # (rows, ...)
        """Every process's rows, in rank order."""
        return self.join_all(x)[0]

    def join_all(
        self,
        *tensors: Tensor,  # (n, ...) each
    ) -> list[Tensor]:  # (rows, ...) each
        """The same of several tensors, of any dtype, in one message."""
        if self.size == 1:
            return list(tensors)
        most = max(self.counts)
        packed = []
        for x in tensors:
            padded = x.detach()
            if len(x) < most:
                padded = x.new_zeros(most, *x.shape[1:])
                padded[: len(x)] = x.detach()
            packed.append(padded.contiguous().view(-1).view(torch.uint8))
        ends = list(accumulate(len(part) for part in packed))
        every = self.world.gather(torch.cat(packed)[None])  # (P, bytes)
        joined = []
        for x, start, end in zip(tensors, [0, *ends], ends):
            # a view of its dtype needs an even start
            rows = (
                every[:, start:end].contiguous().view(x.dtype).view(self.size, most, *x.shape[1:])
            )
            joined.append(torch.cat([own[:n] for own, n in zip(rows, self.counts)]))
        return joined

    def logsumexp(self, x: Tensor) -> Tensor:
        """Elementwise over the processes."""
        return self.world.gather(x.unsqueeze(0)).logsumexp(0)

    def sum_(self, x: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        return self.world.sum_(x)
