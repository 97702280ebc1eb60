"""What passes through the rest of a tower cost, and how many can be afforded.

Counted, not timed: a build that is started again must come to the same numbers.
"""

from __future__ import annotations

from typing import NamedTuple

from clipsteer.browse.explained import Explained


class Budget(NamedTuple):
    """So many multiply-adds."""

    products: float

    def passes(self, explained: Explained, tokens: int) -> int:
        """How many images can pass through what follows the hook point."""
        return int(self.products // max(1, pass_cost(explained, tokens)))


def pass_cost(explained: Explained, tokens: int) -> int:
    """Multiply-adds of one image behind the hook point: every weight that follows meets every
    token. Without a chain of blocks the whole tower counts."""
    module = explained.clip.model
    *path, last = explained.target.hook_point.split(".")
    blocks = module.get_submodule(".".join(path)) if path else module
    if last.isdecimal():
        names = [name for name, _ in blocks.named_children()]
        behind = names[names.index(last) + 1 :]
        chosen = [blocks.get_submodule(name) for name in behind]
    else:
        chosen = [getattr(module, "visual", module)]
    weights = sum(p.numel() for part in chosen for p in part.parameters())
    return weights * tokens
