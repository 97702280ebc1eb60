"""Forward passes that end where nobody looks any further."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


class _Over(Exception):
    """Leaves a forward pass; ``Shortcut.taken`` catches it."""


class Shortcut:
    """Ends passes of a model at the last call of the modules that are looked at, always the same.

    Which call is the last is learnt from one pass that runs whole, for each shape of an input: a
    module may be called more than once, and its latest output counts. Where other hooks stand on
    the model every pass runs whole, since they are to see it.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self._shape: tuple[int, ...] = ()
        self._calls = 0
        # calls in a whole pass, by the shape of its inputs
        self._whole: dict[tuple[int, ...], int] = {}
        self._last: int | None = None

    def next(self, x: Tensor) -> None:
        """What the next pass is given, a batch."""
        self._shape = tuple(x.shape[1:])

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Around a pass, before hooks of one's own stand on the model."""
        alone = not any(m._forward_hooks or m._forward_pre_hooks for m in self.root.modules())
        self._last = self._whole.get(self._shape) if alone else None
        self._calls = 0
        try:
            yield
        except _Over:
            return
        self._whole[self._shape] = self._calls

    def called(self) -> None:
        """To be told of every call of a module that is looked at, once its output is kept."""
        self._calls += 1
        if self._calls == self._last:
            raise _Over
