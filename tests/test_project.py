"""What stands about the project in more than one file says the same everywhere."""

from __future__ import annotations

import re
from pathlib import Path

import clipsteer

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_citation_is_of_this_version():
    """Citation File Format 1.2.0: its four required keys, and ours that other files hold too."""
    lines = (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()
    citation = dict(line.split(": ", 1) for line in lines if re.match(r"[a-z-]+: ", line))
    assert citation["cff-version"] == "1.2.0"
    assert citation["message"]
    assert "authors:" in lines
    assert citation["title"] == re.search(r'^name = "(.*)"', PYPROJECT, re.MULTILINE)[1]
    assert citation["version"] == clipsteer.__version__
    assert citation["license"] == re.search(r'^license = "(.*)"', PYPROJECT, re.MULTILINE)[1]


def test_the_version_is_said_once():
    assert re.search(r'^dynamic = \["version"\]', PYPROJECT, re.MULTILINE)
    assert re.search(r'^version = \{ attr = "clipsteer._version.__version__" \}', PYPROJECT, re.MULTILINE)
    assert not re.search(r'^version = "', PYPROJECT, re.MULTILINE)


def test_every_package_is_installed():
    listed = re.search(r"^packages = \[(.*?)\]", PYPROJECT.partition("[tool.setuptools]")[2], re.MULTILINE | re.DOTALL)
    folders = {path.parent for path in (ROOT / "clipsteer").rglob("*.py")}
    names = {str(folder.relative_to(ROOT)).replace("/", ".") for folder in folders} | {"clipsteer.kernels"}
    assert sorted(re.findall(r'"(.+?)"', listed[1])) == sorted(names)
