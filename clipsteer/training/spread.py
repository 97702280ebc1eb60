"""Tensors whose rows lie over the processes: in files they are whole."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from clipsteer.io.files import safetensors_layout
from clipsteer.training.world import World

# what goes from process to process at a time
_PIECE_BYTES = 64 << 20


class Spread:
    """A tensor (P · n, ...) of which each process has ``part`` (n, ...), in rank order.

    It is written by ``write_safetensors`` in the first process while the others ``give_all``.
    """

    layout = torch.strided

    def __init__(self, part: Tensor, world: World) -> None:
        self.part = part.detach()
        self.world = world
        self.dtype = part.dtype
        self.shape = whole_shape(part, world)
        row = math.prod(part.shape[1:]) * part.element_size()
        self._rows = max(1, _PIECE_BYTES // max(1, row))

    def pieces(self) -> Iterator[Tensor]:
        """The rows in order, some at a time; in the first process."""
        yield from self.part.split(self._rows)
        for rank in range(1, self.world.size):
            for like in self.part.split(self._rows):
                yield self.world.receive_(torch.empty_like(like), rank)

    def give(self) -> None:
        """This process's rows to the first."""
        for piece in self.part.split(self._rows):
            self.world.send(piece, 0)


def whole_shape(part: Tensor, world: World) -> tuple[int, ...]:
    """Of what lies spread over the processes, each of which has such a part."""
    return (part.shape[0] * world.size, *part.shape[1:])


def give_all(tensors: Mapping[str, Tensor | Spread]) -> None:
    """What a process has of the tensors that the first one writes now."""
    _, order = safetensors_layout({name: (t.dtype, t.shape) for name, t in tensors.items()})
    for name in order:
        tensor = tensors[name]
        if isinstance(tensor, Spread):
            tensor.give()


def scatter(
    whole: Tensor | None,  # (P · n, ...) in the first process, None in the others
    part: Tensor,  # (n, ...)
    world: World,
) -> Tensor:
    """Overwrite each process's part with its rows."""
    if world.rank:
        return world.receive_(part, 0)
    assert whole is not None
    for rank, rows in enumerate(whole.split(part.shape[0])):
        if rank == 0:
            part.copy_(rows)
        else:
            world.send(rows.to(part.device), rank)
    return part
