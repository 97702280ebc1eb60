"""What passes through the rest of a tower cost, and how many can be afforded.

Counted, not timed: a build that is started again must come to the same numbers.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from clipsteer.browse.explained import Explained


class Budget(NamedTuple):
    """So many multiply-adds."""

    products: float

    def passes(self, explained: Explained, tokens: int) -> int:
        """How many images can pass through what follows the hook point."""
        return int(self.products // max(1, pass_cost(explained, tokens)))


def pass_cost(explained: Explained, tokens: int) -> int:
    """Multiply-adds of one image behind the hook point: every weight that is used meets every
    token. Without a chain of blocks that is the whole tower."""
    module = explained.clip.model
    tower = getattr(module, "visual", module)
    weights = _size(tower)
    *path, last = explained.target.hook_point.split(".")
    if last.isdecimal():
        blocks = module.get_submodule(".".join(path))
        names = [name for name, _ in blocks.named_children()]
        # what comes before the blocks runs again, and is handed past them
        weights -= sum(_size(blocks.get_submodule(n)) for n in names[: names.index(last) + 1])
    return weights * tokens


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
