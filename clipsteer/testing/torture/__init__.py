"""A torture set: ``topk`` and ``sparse_decode`` for anybody's kernels, the properties of the ops
here, and memory that gives a kernel away which reads or writes where it should not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipsteer import _lazy

if TYPE_CHECKING:
    from clipsteer.testing.proof.ops import PROPERTIES as PROPERTIES
    from clipsteer.testing.proof.ops import Case as Case
    from clipsteer.testing.proof.ops import integers_bitwise as integers_bitwise
    from clipsteer.testing.proof.ops import layouts as layouts
    from clipsteer.testing.proof.ops import not_a_number as not_a_number
    from clipsteer.testing.proof.ops import repeats_bitwise as repeats_bitwise
    from clipsteer.testing.proof.ops import values_and_gradients as values_and_gradients
    from clipsteer.testing.torture.codes import sparse_decode as sparse_decode
    from clipsteer.testing.torture.hard import ROWS as ROWS
    from clipsteer.testing.torture.hard import rows as rows
    from clipsteer.testing.torture.memory import far_apart as far_apart
    from clipsteer.testing.torture.memory import fenced as fenced
    from clipsteer.testing.torture.memory import poisoned as poisoned
    from clipsteer.testing.torture.memory import same_bits as same_bits
    from clipsteer.testing.torture.memory import strided as strided
    from clipsteer.testing.torture.memory import transposed as transposed
    from clipsteer.testing.torture.promises import PROMISES as PROMISES
    from clipsteer.testing.torture.selection import LAYOUTS as LAYOUTS
    from clipsteer.testing.torture.selection import SIZES as SIZES
    from clipsteer.testing.torture.selection import topk as topk

__getattr__, __dir__, __all__ = _lazy.attach(__name__, __file__)
