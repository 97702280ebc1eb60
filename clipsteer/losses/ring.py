"""The sigmoid loss with texts that go round the processes: none holds those of all at once.

Each process has its images and one block of texts at a time, whose gradient goes on with it, one
place behind, and is complete when it is home. That is 2·(P − 1) blocks sent by each of P
processes, as many as a gather and a sum send, while it computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import clipsteer.ops.siglip_loss  # noqa: F401  # registers the kind that the ring's is like
from clipsteer.losses.exchange import Exchange, together
from clipsteer.ops._contrastive import KINDS
from clipsteer.ops._sweeps import low_level

KIND = "SigLipLoss"


class Ring(Exchange):
    """Rows that go round: of each process as one block, or as two halves in both directions, which
    uses every link twice at a time."""

    both_ways = True

    def split(self, x: Tensor) -> list[tuple[Tensor, int]]:
        """A process's rows, and how many places on each part of them goes at a time."""
        if not self.both_ways or len(x) < 2:
            return [(x, 1)]
        half = len(x) // 2
        return [(x[:half], 1), (x[half:], -1)]

    def _send(self, parts: list[tuple[Tensor, int]]) -> Callable[[], list[Tensor]]:
        world = self.world
        left, right = ((world.rank + step) % self.size for step in (-1, 1))
        others = f"its neighbours {left} and {right}"
        with together(self.name, world, others):
            wait = world.pass_on(parts)

        def arrived() -> list[Tensor]:
            with together(self.name, world, others):
                return wait()

        return arrived

    def visit(
        self,
        x: Tensor,  # (M, D), of this process
        add: Callable[[Tensor], Tensor | None],
    ) -> Tensor | None:  # (M, …), what all others add up to for x
        """Call ``add`` with the rows of every other process; if it returns anything for them, their
        owner gets the sum."""
        parts = self.split(x)
        steps = [step for _, step in parts]
        coming = self._send(parts)
        behind: Callable[[], list[Tensor]] | None = None
        for hop in range(1, self.size):
            here = coming()
            if hop + 1 < self.size:
                coming = self._send(list(zip(here, steps)))
            found = [part for part in map(add, here) if part is not None]
            if not found:
                continue
            if behind is not None:
                found = [a + b for a, b in zip(behind(), found)]
            behind = self._send(list(zip(found, steps)))
        return None if behind is None else torch.cat(behind())


def _evaluate(arguments: Any, needs: Any, backend: str, world: Ring) -> tuple[Tensor, ...]:
    """See `siglip_loss.evaluate`."""
    image, text, scale, bias = arguments
    image = image.contiguous()
    text = text.contiguous()

    def sweep(cols: Tensor, offset: int) -> tuple[Tensor, Tensor, Tensor]:
        given = (image, cols, scale, bias, offset, needs[0], needs[1])
        return low_level(backend, "siglip_sweep", *given)

    sums, d_rows, d_cols = sweep(text, 0)
    total = [sums.double(), d_rows]

    def add(cols: Tensor) -> Tensor | None:
        # as many as there are: no image has its partner among them
        sums, d_rows, d_cols = sweep(cols, len(cols))
        total[0] = total[0] + sums
        total[1] = total[1] + d_rows
        return d_cols if needs[1] else None

    theirs = world.visit(text, add)
    if theirs is not None:
        d_cols = d_cols + theirs
    loss, d_scale, d_bias = (total[0] / len(image)).to(sums.dtype).unbind()
    return loss.clone(), total[1], d_cols, d_scale.clone(), d_bias.clone()


KINDS[KIND] = KINDS["siglip_loss"]._replace(evaluate=_evaluate)
