"""Rows of an input and of a target side by side, for transcoders.

A pair is one row [x, y] of d_in + d_out numbers, so that shuffling, slices of processes and
positions are those of any other rows. Two sources go together where both serve the same rows in
the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import zip_longest
from typing import Any

from torch import Tensor

from clipsteer.data.identity import Identity
from clipsteer.sae.sources import (
    ActivationSource,
    IterableSource,
    Position,
    as_source,
    side_by_side,
)
from clipsteer.training.settings import other_data


class PairSource(ActivationSource):
    """Two sources of one kind: input rows (N, d_in) and target rows (N, d_out), in one order.

    Raises ValueError where their rows are not known to be the same ones.
    """

    def __init__(self, source: ActivationSource, target: ActivationSource) -> None:
        for one in (source, target):
            if one.d_out is not None:
                raise ValueError("train_sae: the activations give (input, target) pairs already")
        kinds = [type(one).__name__ for one in (source, target)]
        if type(source) is not type(target):
            reason: str | None = f"{kinds[0]} and {kinds[1]} have each an order of their own"
        else:
            ours, theirs = ({**one.arrangement()} for one in (source, target))
            # an older store does not say of which images it is
            data = [one.pop("data", None) for one in (ours, theirs)]
            reason = other_data(ours, theirs)
            if reason is None and None not in data:
                other = other_data(*data)
                reason = None if other is None else f"images of the target are others ({other})"
        if reason is not None:
            raise ValueError(
                f"train_sae: activations and target must be the same rows in the same order: "
                f"{reason}"
            )
        self.source = source
        self.target = target
        self.d_in = source.d_in
        self.d_out = target.d_in
        self.provenance = dict(source.provenance)
        if "hook_point" in target.provenance:
            self.provenance["target_hook_point"] = target.provenance["hook_point"]
        self.from_files = source.from_files or target.from_files

    def identity(self) -> Identity | None:
        """Those of both."""
        found = {"input": self.source.identity(), "target": self.target.identity()}
        return {"kind": "pair", **found} if any(found.values()) else None

    def group_sizes(self, seed: int, epoch: int) -> list[int]:
        """Those of either."""
        return self.source.group_sizes(seed, epoch)

    def load_group(self, seed: int, epoch: int, group: int) -> Tensor:
        """The rows (n, d_in + d_out) of a group."""
        parts = [one.load_group(seed, epoch, group) for one in (self.source, self.target)]
        return side_by_side(parts[0], parts[1])

    def _batches(
        self, batch_size: int, seed: int, start: Position
    ) -> Iterator[tuple[Tensor, Position]]:
        # batch by batch: a whole group of pairs would be held twice
        both = (one._batches(batch_size, seed, start) for one in (self.source, self.target))
        for (x, following), (y, there) in zip(*both):
            if following != there:
                raise RuntimeError(f"the target is at {there}, the activations at {following}")
            yield side_by_side(x, y), following


class _Pairs:
    """Two iterables as one of pairs, which is read again as often as they can be."""

    def __init__(self, parts: Iterable[Tensor], targets: Iterable[Tensor]) -> None:
        self.both = (parts, targets)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for part, target in zip_longest(*self.both):
            if part is None or target is None:
                which = "activations" if part is None else "target"
                raise ValueError(f"train_sae: {which} ends before the other does")
            yield part, target


def paired(activations: Any, target: Any) -> ActivationSource:
    """What ``train_sae`` is given, as one source; ``target`` None where there is none, or where
    the activations are pairs.

    Raises ValueError, TypeError where the two do not go together.
    """
    if target is None:
        return as_source(activations)
    both = (activations, target)
    if not all(isinstance(given, Iterable) for given in both) or any(
        isinstance(given, Tensor | ActivationSource) for given in both
    ):
        return PairSource(as_source(activations), as_source(target))
    pairs = _Pairs(activations, target)
    if all(isinstance(given, list | tuple) for given in both):
        return IterableSource([*pairs])
    if any(iter(given) is given for given in both):
        return IterableSource(iter(pairs))
    return IterableSource(pairs)
