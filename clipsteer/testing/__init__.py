"""Numerical proof and timing of the ops on the machine at hand: ``validate``, its ``table``, and
``bench``."""

from __future__ import annotations

# the modules first: importing one binds its name, and ``table`` and ``validate`` are functions
from clipsteer.testing import bench as bench
from clipsteer.testing import table as _table_of_speeds  # noqa: F401
from clipsteer.testing.torture import (
    PROPERTIES,
    Case,
    fenced,
    integers_bitwise,
    layouts,
    not_a_number,
    poisoned,
    repeats_bitwise,
    same_bits,
    strided,
    transposed,
    values_and_gradients,
)
from clipsteer.testing.validate import Row, cases, scales, supported, table, validate

__all__ = [
    "PROPERTIES",
    "Case",
    "Row",
    "bench",
    "cases",
    "fenced",
    "integers_bitwise",
    "layouts",
    "not_a_number",
    "poisoned",
    "repeats_bitwise",
    "same_bits",
    "scales",
    "strided",
    "supported",
    "table",
    "transposed",
    "validate",
    "values_and_gradients",
]
