from __future__ import annotations

from collections.abc import Iterator

import pytest

from clipsteer.ops import _calls


@pytest.fixture(autouse=True)
def parts_of_ops_may_be_exchanged(request: pytest.FixtureRequest) -> Iterator[None]:
    """A remembered call goes past what a test puts in a part's place; and what ran then is not to be remembered."""
    exchanged = "monkeypatch" in request.fixturenames
    if exchanged:
        _calls.forget()
    yield
    if exchanged:
        _calls.forget()
