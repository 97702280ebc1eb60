"""The guides can be read, and every block of code in them runs as it stands."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from _command import run
from clipsteer import guide

# commands that train take a while: the long rest runs them
QUICK = ("loop", "prove", "moving")


def timed(name: str) -> object:
    return pytest.param(name, marks=[] if name in QUICK else [pytest.mark.nightly])


@pytest.mark.parametrize("name", guide.NAMES)
def test_it_can_be_read(name):
    text = guide.page(name)
    lines = text.splitlines()
    assert lines[0] == f"# {guide.title(name)}"
    assert len(lines) <= 120
    assert [line for line in lines if len(line) > 120] == []
    kinds = {block.kind for block in guide.blocks(name)}
    assert kinds - {""} <= {"python", "bash"}
    assert "python" in kinds
    # nothing is lost between the fences
    again = "".join(text if not kind else f"```{kind}\n{text}```\n" for kind, text in guide.blocks(name))
    assert re.sub(r"\s", "", again) == re.sub(r"\s", "", text)
    assert text.count("```") % 2 == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [timed(name) for name in guide.NAMES])
def test_its_code_runs_as_it_stands(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for kind, text in guide.blocks(name):
        if kind == "python":
            exec(compile(text, f"{name}.md", "exec"), namespace)
        elif kind == "bash":
            for line in text.replace("\\\n", " ").splitlines():
                program, *words = shlex.split(line, comments=True)
                assert program == "clipsteer"
                code, _, err = run(capsys, *words)
                assert code == 0, f"{line}\n{err}"


def test_the_proof_fails_where_the_guide_says_so(capsys):
    blocks = [text for kind, text in guide.blocks("prove") if kind == "python"]
    namespace = {"__name__": "__main__"}
    exec(blocks[0], namespace)
    assert not namespace["report"]
    exec(blocks[1], namespace)
    assert namespace["report"]


def test_the_command_lists_prints_and_refuses(capsys):
    code, out, _ = run(capsys, "guide")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(guide.NAMES)
    code, out, _ = run(capsys, "guide", "sae")
    assert (code, out) == (0, guide.page("sae"))
    assert run(capsys, "guide", "none")[0] == 2
    with pytest.raises(ValueError, match="expected one of loop, sae"):
        guide.page("none")


def test_notebooks_hold_the_same_blocks(capsys, tmp_path):
    nbformat = pytest.importorskip("nbformat")
    code, out, err = run(capsys, "guide", "--notebooks", tmp_path)
    assert code == 0, err
    assert out.split() == [str(tmp_path / f"{name}.ipynb") for name in guide.NAMES]
    for name in guide.NAMES:
        found = nbformat.read(tmp_path / f"{name}.ipynb", 4)
        nbformat.validate(found)
        kinds = ["code" if kind else "markdown" for kind, _ in guide.blocks(name)]
        assert [cell.cell_type for cell in found.cells] == kinds
        commands = [line for cell in found.cells for line in cell.source.splitlines() if line.startswith("!")]
        assert all(line.startswith("!clipsteer ") for line in commands)
    before = (tmp_path / "loop.ipynb").read_bytes()
    assert run(capsys, "guide", "loop", "--notebooks", tmp_path)[0] == 0
    assert (tmp_path / "loop.ipynb").read_bytes() == before


def test_without_nbformat_the_way_to_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nbformat", None)
    with pytest.raises(RuntimeError, match=r"clipsteer\[docs\]"):
        guide.notebook("loop")


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["loop", "moving"])
def test_a_notebook_runs(name, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = guide.notebook(name)
    # as in an environment that is activated
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
