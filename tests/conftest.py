from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator

# Before torch is imported, here and in every process that a test starts. On one thread torch's own products repeat bit
# for bit; on several they are divided anew on a busy machine. Parallel workers share the cores without a fight.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
# Where a test takes two, one that waits for the other gives its core away.
os.environ["OMP_WAIT_POLICY"] = "passive"

import hypothesis
import pytest
import torch

from _forks import Forks

torch.set_num_threads(1)

QUICK = hypothesis.settings(
    derandomize=True, deadline=None, max_examples=10, database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)  # fmt: skip
PROFILES = {
    "quick": QUICK,
    "ci": hypothesis.settings(QUICK, max_examples=20),
    "nightly": hypothesis.settings(QUICK, derandomize=False, max_examples=500),
}
for name, profile in PROFILES.items():
    hypothesis.settings.register_profile(name, profile)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", type=int, metavar="SEED", help="modules, and tests in them, in a random order")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite takes a process a core, one that is named stays in this one; -n says otherwise."""
    option = config.option
    whole = config.args_source is not pytest.Config.ArgsSource.ARGS
    if (
        whole
        and not hasattr(config, "workerinput")
        and getattr(option, "numprocesses", 0) is None
        and not option.usepdb
    ):
        option.numprocesses, option.dist = min(cores(), 8), "worksteal"  # a gigabyte each
        option.benchmark_disable = True


def pytest_configure(config: pytest.Config) -> None:
    asked = "ci" if "nightly" in config.option.markexpr else "quick"
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", asked))


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """-m nightly takes what is marked so, and what draws its cases again, with more of them."""
    night = "nightly" in config.option.markexpr
    left = "by_day" if night else "nightly"
    config.hook.pytest_deselected(items=[item for item in items if left in item.keywords])
    items[:] = [item for item in items if left not in item.keywords]
    if night:
        for item in items:
            if "hypothesis" in item.keywords:
                item.add_marker("nightly")
        # files with long tests come first: processes that run out of tests take short ones from each other
        long = {item.path for item in items if "nightly" in item.keywords and "hypothesis" not in item.keywords}
        items.sort(key=lambda item: item.path not in long)
    if (seed := config.option.shuffle) is not None:
        draw = random.Random(seed)
        draw.shuffle(items)
        order = {path: draw.random() for path in sorted({item.path for item in items})}
        items.sort(key=lambda item: order[item.path])
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What a test draws, and what a run keeps of torch's generator, does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Our own loops are divided between two threads."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Forks]:
    """Has imported what interprets Triton, as the switch is read at import. Skips where that cannot run."""
    pytest.importorskip("triton")
    forks = Forks(["torch", "clipsteer.ops._dispatch", "clipsteer.testing"], {"TRITON_INTERPRET": "1"})
    codes, reason = forks.run("from clipsteer.ops import _dispatch\nraise SystemExit(_dispatch.missing('triton'))")
    if codes != [0]:
        assert "clipsteer.kernels" not in reason, reason  # what our own kernels lack is no reason to skip
        pytest.skip(reason)
    yield forks
    forks.close()


@pytest.fixture
def interpret(interpreter: Forks) -> Callable[[str], None]:
    """Runs code on interpreted Triton kernels, in a process of its own: it must exit with 0. Skips where triton or its
    interpreter cannot run."""

    def run(code: str) -> None:
        codes, output = interpreter.run("import sys\nfrom clipsteer.ops import _dispatch\n" + code)
        assert codes == [0], output[-4000:]

    return run
