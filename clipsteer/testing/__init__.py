"""Numerical proof and timing on the machine at hand: ``prove`` and ``torture`` for anybody's
functions, ``validate`` and its ``table`` for the ops, and ``bench``."""

from __future__ import annotations

# the modules first: importing one binds its name, and ``table`` and ``validate`` are functions
from clipsteer.testing import bench as bench
from clipsteer.testing import table as _table_of_speeds  # noqa: F401
from clipsteer.testing import torture as torture
from clipsteer.testing.proof.arithmetic import Arithmetic
from clipsteer.testing.proof.bound import Bound, Bounded, bound
from clipsteer.testing.proof.cases import Cases
from clipsteer.testing.proof.decorator import property_tests
from clipsteer.testing.proof.ops import (
    PROPERTIES,
    Case,
    integers_bitwise,
    layouts,
    not_a_number,
    repeats_bitwise,
    values_and_gradients,
)
from clipsteer.testing.proof.prove import Report, prove, replay
from clipsteer.testing.torture.memory import fenced, poisoned, same_bits, strided, transposed
from clipsteer.testing.validate import Row, cases, scales, supported, table, validate

__all__ = [
    "PROPERTIES",
    "Arithmetic",
    "Bound",
    "Bounded",
    "Case",
    "Cases",
    "Report",
    "Row",
    "bench",
    "bound",
    "cases",
    "fenced",
    "integers_bitwise",
    "layouts",
    "not_a_number",
    "poisoned",
    "property_tests",
    "prove",
    "repeats_bitwise",
    "replay",
    "same_bits",
    "scales",
    "strided",
    "supported",
    "table",
    "torture",
    "transposed",
    "validate",
    "values_and_gradients",
]
