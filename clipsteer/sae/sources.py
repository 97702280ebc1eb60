"""Rows in shuffled batches, from a tensor or an iterable; the base of the sources in
``clipsteer.sae.activations``.

Every source is a list of groups of rows, each small enough for memory. An epoch visits the groups
in a permuted order and the rows of a group in a permuted order; both permutations are functions of
(seed, epoch, group) alone, so the pair (epoch, row) is the complete state of the shuffle and any
position can be reached without replaying.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipsteer.data.identity import Identity, identity_of, tensor_digest
from clipsteer.training.schedule import seed_of


class Position(NamedTuple):
    """A place in the shuffled stream: the epoch, and the rows of it already served."""

    epoch: int = 0
    row: int = 0


START = Position()


class Batch(NamedTuple):
    """What a source yields."""

    rows: Tensor  # (batch_size / world, d_in), of pairs (batch_size / world, d_in + d_out)
    next: Position  # where the batch after this one starts


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator of its own for every key, such as (seed, epoch, group)."""
    return torch.Generator().manual_seed(seed_of(*key))


class ActivationSource:
    """Rows (N, d) served in shuffled batches. Subclasses say how rows fall into groups and how a
    group is read."""

    d_in: int
    # where rows are pairs [x, y] of d_in + d_out numbers, the width of y
    d_out: int | None = None
    provenance: dict[
        str, Any
    ] = {}  # what is known of the model, under the names of ``SAE.metadata``
    from_files = False  # whether the rows come of files, whose place is not what they are

    def group_sizes(self, seed: int, epoch: int) -> list[int]:
        """Rows of each group in the order in which this epoch visits them."""
        raise NotImplementedError

    def load_group(self, seed: int, epoch: int, group: int) -> Tensor:
        """The rows (n, d) of the group visited as number `group`, in any fixed order."""
        raise NotImplementedError

    def identity(self) -> Identity | None:
        """What the rows are known by, for JSON: a run is not resumed on others. None where nothing
        is known."""
        return None

    def arrangement(self) -> dict[str, Any]:
        """What says which row comes when, besides seed and epoch; two sources of one class that
        agree in it serve the rows of the same tokens."""
        return {"rows": self.rows_per_epoch(), "groups": self.group_sizes(0, 0)}

    def rows_per_epoch(self) -> int | None:
        """Rows of one pass, or None where only reading would tell."""
        return sum(self.group_sizes(0, 0))

    def batches(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        start: Position = START,
        rank: int = 0,
        world: int = 1,
    ) -> Iterator[Batch]:
        """Endless shuffled batches from `start` on; with `world` processes each yields its equal
        slice of the batch.

        The rows left over at the end of an epoch that do not fill a batch are dropped.
        """
        if batch_size < 1 or batch_size % world:
            raise ValueError(
                f"batch_size must be a positive multiple of the {world} processes, got {batch_size}"
            )
        share = batch_size // world
        mine = slice(rank * share, (rank + 1) * share)
        for rows, following in self._batches(batch_size, seed, start):
            yield Batch(rows[mine], following)

    def _batches(
        self, batch_size: int, seed: int, start: Position
    ) -> Iterator[tuple[Tensor, Position]]:
        """Whole batches, each with the position after it."""
        epoch, row = start
        while True:
            total = sum(self.group_sizes(seed, epoch))
            if total < batch_size:
                raise ValueError(
                    f"batch_size is {batch_size}, but an epoch has only {total} rows; take a "
                    f"batch_size (--batch-size) of at most {total}, or more images"
                )
            for rows in self._epoch(batch_size, seed, epoch, row):
                row += batch_size
                is_last = row + batch_size > total
                yield rows, Position(epoch + 1, 0) if is_last else Position(epoch, row)
            epoch += 1
            row = 0

    def _epoch(self, batch_size: int, seed: int, epoch: int, row: int) -> Iterator[Tensor]:
        """The batches of one epoch from its row `row` on; a batch may straddle groups."""
        pieces: list[Tensor] = []
        need = batch_size
        first = 0  # the epoch's row at which the group begins
        for group, size in enumerate(self.group_sizes(seed, epoch)):
            at = max(row - first, 0)
            first += size
            if at >= size:
                continue
            rows = self.load_group(seed, epoch, group)
            if len(rows) != size:
                raise RuntimeError(
                    f"group {group} of epoch {epoch} has {len(rows)} rows, {size} were promised"
                )
            order = torch.randperm(size, generator=generator(seed, epoch, group))
            while at < size:
                chosen = order[at : at + need].to(rows.device)
                pieces.append(rows[chosen])
                at += len(chosen)
                need -= len(chosen)
                if need == 0:
                    yield torch.cat(pieces) if len(pieces) > 1 else pieces[0]
                    pieces, need = [], batch_size
            del rows  # before the next group comes


class TensorSource(ActivationSource):
    """A tensor (N, d) in memory: one group, so the permutation is a full one."""

    def __init__(self, rows: Tensor) -> None:
        if rows.ndim < 2 or not rows.is_floating_point():
            raise ValueError(
                f"activations: expected a floating-point tensor (..., d_in), got {rows.dtype} "
                f"{tuple(rows.shape)}"
            )
        self.rows = rows.detach().reshape(-1, rows.shape[-1])
        self.d_in = self.rows.shape[1]

    def identity(self) -> Identity | None:
        """A digest of all elements."""
        return identity_of(self.rows)

    def group_sizes(self, seed: int, epoch: int) -> list[int]:
        """All rows in one group."""
        return [len(self.rows)]

    def load_group(self, seed: int, epoch: int, group: int) -> Tensor:
        """All rows, (N, d)."""
        return self.rows


def side_by_side(
    x: Tensor,  # (n, d_in)
    y: Tensor,  # (n, d_out)
) -> Tensor:
    """Pairs (n, d_in + d_out) in the wider of the two dtypes, on x's device."""
    return torch.cat([x, y.to(x.device)], dim=1)


class IterableSource(ActivationSource):
    """Any iterable of tensors (..., d), or of pairs (..., d_in) and (..., d_out): rows in the order
    in which they come, no shuffling.

    A position is reached by reading up to it, so resuming needs an iterable that repeats itself. Of
    a list of tensors that is checked; of any other iterable nothing is known before it is read.
    """

    def __init__(self, parts: Iterable[Tensor] | Iterable[tuple[Tensor, Tensor]]) -> None:
        self._iterator: Iterator[Any] = iter(parts)
        self._again = parts if self._iterator is not parts else None
        first = next(self._iterator, None)
        if first is None:
            raise ValueError("activations: the iterable is empty")
        widths = [tensor.shape[-1] for tensor in _tensors(first)]
        self.d_in = widths[0]
        self.d_out = widths[1] if len(widths) > 1 else None
        self._first: Any = first

    def identity(self) -> Identity | None:
        """Of a list of tensors, a digest of all elements."""
        parts = self._again
        if not isinstance(parts, (list, tuple)):
            return None
        tensors = (tensor for part in parts for tensor in _tensors(part))
        return {"kind": "tensors", "parts": len(parts), "contents": tensor_digest(tensors)}

    def rows_per_epoch(self) -> int | None:
        """None: only reading would tell."""
        return None

    def _rows(self, part: Any) -> Tensor:
        """The rows (n, d_in) of a part, or (n, d_in + d_out) of a pair."""
        tensors = _tensors(part)
        widths = [self.d_in] if self.d_out is None else [self.d_in, self.d_out]
        if [tensor.shape[-1] for tensor in tensors] != widths:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
            raise ValueError(
                f"activations: the first part had width {widths}, a later one {shapes}"
            )
        rows = [tensor.detach().reshape(-1, tensor.shape[-1]) for tensor in tensors]
        return rows[0] if self.d_out is None else side_by_side(*rows)

    def _parts(self) -> Iterator[Any]:
        while True:
            if self._first is not None:
                first, self._first = self._first, None
                yield first
            yield from self._iterator
            if self._again is None:
                raise ValueError(
                    "activations: the iterator ended before training did; pass more rows or fewer "
                    "steps"
                )
            self._iterator = iter(self._again)

    def _batches(
        self, batch_size: int, seed: int, start: Position
    ) -> Iterator[tuple[Tensor, Position]]:
        held: list[Tensor] = []
        count = 0
        row = start.row
        skip = start.row
        for part in self._parts():
            part = self._rows(part)
            dropped = min(skip, len(part))
            skip -= dropped
            held.append(part[dropped:])
            count += len(held[-1])
            if count < batch_size:
                continue
            rows = torch.cat(held)
            used = 0
            while used + batch_size <= count:
                row += batch_size
                yield rows[used : used + batch_size], Position(0, row)
                used += batch_size
            held = [rows[used:]]
            count -= used


def _tensors(part: Any) -> tuple[Tensor, ...]:
    """A part of an iterable: a tensor, or an input and a target of the same rows."""
    is_pair = isinstance(part, tuple | list) and len(part) == 2
    tensors = tuple(part) if is_pair else (part,)
    if not all(isinstance(t, Tensor) and t.dim() and t.is_floating_point() for t in tensors):
        raise TypeError(
            f"activations: expected an iterable of floating-point tensors (..., d_in), or of pairs "
            f"of an input and a target, got one of {type(part).__name__}"
        )
    if is_pair and tensors[0].shape[:-1] != tensors[1].shape[:-1]:
        shapes = [tuple(tensor.shape) for tensor in tensors]
        raise ValueError(
            f"activations: the input and the target of a pair must be of the same rows, got "
            f"{shapes[0]} and {shapes[1]}"
        )
    return tensors


def as_source(
    activations: Tensor | ActivationSource | Iterable[Tensor] | Iterable[tuple[Tensor, Tensor]],
) -> ActivationSource:
    """A tensor, a source or any iterable of tensors, or of pairs of them, as an
    `ActivationSource`."""
    if isinstance(activations, ActivationSource):
        return activations
    if isinstance(activations, Tensor):
        return TensorSource(activations)
    if isinstance(activations, Iterable) and not isinstance(activations, str | bytes | dict):
        return IterableSource(activations)
    raise TypeError(
        f"activations: expected a tensor, an ActivationStore or an iterable of tensors, got "
        f"{type(activations)}"
    )
