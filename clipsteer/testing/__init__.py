"""Numerical proof and timing of the ops on the machine at hand: ``validate`` and ``table``, and
``bench``."""

from __future__ import annotations

# the modules first, as importing one binds its name to it, and ``table`` and ``validate`` are
# functions here
from clipsteer.testing import bench as bench
from clipsteer.testing import table as _markdown  # noqa: F401
from clipsteer.testing.validate import (
    PROPERTIES,
    Case,
    Row,
    cases,
    fenced,
    poisoned,
    same_bits,
    strided,
    supported,
    table,
    validate,
)

__all__ = [
    "PROPERTIES",
    "Case",
    "Row",
    "bench",
    "cases",
    "fenced",
    "poisoned",
    "same_bits",
    "strided",
    "supported",
    "table",
    "validate",
]
