"""A real browser for the tests of pages, watched: no error in its console, no request out of the site."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from _site import PATIENCE, write_site


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Debian's chromium, or what CLIPSTEER_CHROMIUM names, driven by playwright."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'clipsteer[browser]'")
    found = os.environ.get("CLIPSTEER_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no chromium here: apt-get install chromium, or name one in CLIPSTEER_CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=["--force-color-profile=srgb"])
        yield chromium
        chromium.close()


class Watch:
    """What a page did that it must not do."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.wrong: list[str] = []
        self.expected: tuple[str, ...] = ()

    def look(self, page: Any) -> None:
        page.on("console", lambda message: self._say(message.type in ("error", "warning"), message.text))
        page.on("pageerror", lambda error: self._say(True, str(error)))
        page.on("dialog", lambda dialog: self._say(True, f"dialog {dialog.message}"))
        page.on(
            "request",
            lambda request: self._say(
                not request.url.startswith((self.root, "data:", "blob:")), f"request {request.url}"
            ),
        )

    def _say(self, wrong: bool, text: str) -> None:
        if wrong and not any(part in text for part in self.expected):
            self.wrong.append(text)


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Any]]:
    """opened(root, hash, **context) -> a page whose ``watch`` must be empty at the end of the test, but for what is
    expected."""
    contexts = []
    watches = []

    def open_page(root: str, at: str = "#/", expected: tuple[str, ...] = (), **context: Any) -> Any:
        context.setdefault("viewport", {"width": 1280, "height": 900})
        contexts.append(browser.new_context(**context))
        page = contexts[-1].new_page()
        page.set_default_timeout(1000 * PATIENCE)
        page.watch = Watch(root.rpartition("/")[0] + "/")
        page.watch.expected = expected
        watches.append(page.watch)
        page.watch.look(page)
        page.goto(root + at)
        page.wait_for_selector("main[data-page]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [wrong for watch in watches for wrong in watch.wrong] == []


@pytest.fixture(scope="session")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site of 12,288 features, not served."""
    return write_site(tmp_path_factory.mktemp("pages") / "a site")


@pytest.fixture(scope="session")
def axe() -> str:
    """axe-core, that playwright's companion brings along."""
    package = pytest.importorskip("axe_playwright_python", reason="needs axe-core: pip install 'clipsteer[browser]'")
    return (Path(package.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
