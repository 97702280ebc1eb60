from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

# Before torch is imported, here and in every process that a test starts. On one thread torch's own products repeat bit
# for bit; on several they are divided anew on a busy machine.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import hypothesis
import pytest
import torch

torch.set_num_threads(1)

hypothesis.settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=25, database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)  # fmt: skip
hypothesis.settings.register_profile(
    "nightly", parent=hypothesis.settings.get_profile("ci"), derandomize=False, max_examples=500
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Our own loops are divided between two threads."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


CAN_INTERPRET = """
import sys
from clipsteer.ops import _dispatch
if (reason := _dispatch.missing("triton")) is not None:
    sys.exit(print(reason) or 77)
"""


@pytest.fixture
def interpret() -> Callable[[str], None]:
    """Runs code on interpreted Triton kernels, in a process of its own, as the switch is read at import: it must exit
    with 0. Skips where triton or its interpreter cannot run."""

    def run(code: str) -> None:
        pytest.importorskip("triton")
        command = [sys.executable, "-c", CAN_INTERPRET + code]
        done = subprocess.run(
            command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=900
        )
        if done.returncode == 77:
            pytest.skip(done.stdout)
        assert done.returncode == 0, done.stdout + done.stderr[-4000:]

    return run
