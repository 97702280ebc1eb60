"""What stands about the project in more than one file says the same everywhere."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

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


def test_what_is_not_offered_is_listed_in_one_place_of_the_reference():
    """On the first page that pdoc shows; nothing in the list has come to be offered since."""
    listed = clipsteer.__doc__.partition("Not offered")[2]
    for what in ("Fisher", "temperature of its own", "ghost gradients", "interventions", "vocabularies"):
        assert what in listed
    source = "".join(path.read_text(encoding="utf-8").lower() for path in (ROOT / "clipsteer").rglob("*.py"))
    assert source.count("fisher") == source.count("ghost grad") == source.count("mscoco") == 1


def test_where_a_method_is_not_its_authors_code_is_said_where_it_stands():
    from clipsteer import ConceptorSteering
    from clipsteer.continual import strategies
    from clipsteer.reference.losses import select_learnable
    from clipsteer.splice.dictionary import ConceptDictionary

    said = {
        strategies: ("weight decay", "once an epoch", "σ", "1993, 1996, 1997", "alignment starts anew", "pairs",
                     "size of the latest task", "batch of 48", "RanPAC chooses its"),
        select_learnable: ("first chunk", "without the pair itself", "fixed 100"),
        ConceptorSteering: ("residual", "authors' repository"),
        ConceptDictionary.reconstruct: ("one\n        unit from μ", "-|μ|²/2"),
    }  # fmt: skip
    for where, parts in said.items():
        missing = [part for part in parts if part not in where.__doc__]
        assert not missing, (where, missing)


def test_every_name_in_a_docstring_or_a_guide_leads_somewhere():
    """What the API reference refuses, found before it is made."""
    pytest.importorskip("pdoc")
    reference = runpy.run_path(str(ROOT / ".ci/reference.py"))
    names = reference["modules"]()
    assert len(names) > 200
    assert reference["unresolved"]("``ops.topk_encode`` ``clipsteer.put``") == ["clipsteer.put"]
    assert reference["broken"](names) == []
