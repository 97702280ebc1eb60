"""A run's folder is one run's: the first of its processes holds it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from clipsteer.io.locks import only_writer
from clipsteer.training.world import World


@contextmanager
def claimed(folder: str | Path | None, what: str, world: World | None = None) -> Iterator[None]:
    """Hold a folder against other runs, as `clipsteer.io.only_writer` does; None holds nothing.

    Of several processes that train together rank 0 holds it, and all raise where it cannot.

    Raises RuntimeError: another run writes there.
    """
    with ExitStack() as stack:
        refusal = None
        if folder is not None and (world is None or world.rank == 0):
            try:
                stack.enter_context(only_writer(folder, what))
            except (RuntimeError, OSError) as error:
                if world is None or world.size == 1:
                    raise
                refusal = error
        if folder is not None and world is not None and world.size > 1:
            text = world.broadcast_json(None if refusal is None else str(refusal))
            if refusal is not None:
                raise refusal
            if text is not None:
                raise RuntimeError(text)
        yield
