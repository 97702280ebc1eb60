"""``property_tests``: a proof as a test, a case for each property and dtype."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from clipsteer.testing.proof.cases import Draw
from clipsteer.testing.proof.prove import Report, prove
from clipsteer.testing.proof.trial import PROPERTIES

Test = Callable[[Report], None]


def property_tests(
    fast: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Draw,
    *,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    properties: Sequence[str] = tuple(PROPERTIES),
    **options: Any,
) -> Callable[[Test], Callable[..., None]]:
    """A decorator that makes a test of ``prove``, parametrised by property and dtype; the function
    gets the report once it has passed.

        @testing.property_tests(fast_softmax, torch.softmax, inputs, dtypes=[torch.float32])
        def test_softmax(report): ...

    ``options`` are those of ``prove``. Needs pytest.
    """
    import pytest

    def decorate(function: Test) -> Callable[..., None]:
        @pytest.mark.parametrize("dtype", dtypes, ids=str)
        @pytest.mark.parametrize("prop", properties)
        def test(prop: str, dtype: torch.dtype) -> None:
            report = prove(fast, reference, inputs, dtypes=[dtype], properties=[prop], **options)
            if not report:
                pytest.fail(str(report), pytrace=False)
            function(report)

        functools.update_wrapper(test, function)
        # pytest would take its arguments
        del test.__dict__["__wrapped__"]
        return test

    return decorate
