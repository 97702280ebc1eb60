"""When a run has learned nothing, or has lost what it had: figures that one answer for every input
has too."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

logger = logging.getLogger(__name__)

# lines of the log that are looked at, and how many of them say something
LATEST, LEAST = 10, 3
# below this share of what the constant answer has, something has been learned
_SHARE = 0.99


def constant_loss(targets: Iterable[int], classes: int, smoothing: float = 0.0) -> float:
    """The least mean cross-entropy of one answer for every input: the entropy of the classes'
    shares, as label smoothing has them."""
    counts = Counter(targets)
    total = sum(counts.values())
    shares = [(1 - smoothing) * n / total for n in counts.values()]
    shares += [0.0] * (classes - len(counts))
    return -sum(p * math.log(p) for p in (share + smoothing / classes for share in shares) if p)


def say_if_constant(
    name: str, records: Sequence[Mapping[str, Any]], constant: Mapping[str, float]
) -> None:
    """Log a warning where figures of the latest lines are, on average, no better than constant.

    Args:
        name: of the run.
        records: the latest lines of its log, with their steps; those of the first half of the run
            are passed over, and of fewer than `LEAST` others nothing is said.
        constant: figure -> what the best answer that does not look at its input has of it, above 0.
    """
    half = records[-1]["step"] / 2 if records else 0
    for figure, value in constant.items():
        found = [record[figure] for record in records if figure in record and record["step"] > half]
        mean = sum(found) / max(len(found), 1)
        if len(found) >= LEAST and mean > _SHARE * value > 0:
            logger.warning(
                "%s: over the last %d lines of the log the %s is %.4g on average, and %.4g is that "
                "of one answer for every input: nothing was learned, or it was lost. Try a lower "
                "lr, or a longer run",
                name,
                len(found),
                figure,
                mean,
                value,
            )
