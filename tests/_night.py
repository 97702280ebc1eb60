"""Tests that do more at night."""

from __future__ import annotations

from typing import Any

import pytest


def day_and_night(day: Any, night: Any) -> list[Any]:
    """Values of a parameter: for every day, and for -m nightly, which does all that the first would do, and more."""
    return [pytest.param(day, marks=pytest.mark.by_day), pytest.param(night, marks=pytest.mark.nightly)]
