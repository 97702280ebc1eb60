"""The fused ops inside the training loops of other libraries: SAELens, dictionary_learning and
sparsify, whose own trainers run unchanged.

``saelens`` and ``dictionary_learning`` have classes that take the place of the library's own, with
the same constructor, state dict, hooks and outputs; ``with sparsify():`` puts the ops in the place
of sparsify's. What a trainer seldom looks at, dense codes and pre-activations, is built when it
does. The libraries are imported when their integration is, and no sooner.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipsteer import _lazy

if TYPE_CHECKING:
    from clipsteer.integrations import dictionary_learning as dictionary_learning
    from clipsteer.integrations import saelens as saelens
    from clipsteer.integrations._sparsify import sparsify as sparsify
    from clipsteer.integrations.optimizers import fuse as fuse

__getattr__, __dir__, __all__ = _lazy.attach(__name__, __file__)
