"""README.md: short enough to read, and every block of code in it runs as it stands with the bundled model."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from _command import run

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
SET_UP, REST = BLOCKS[:2], BLOCKS[2:]
# as the README says of machines without a GPU
INTERPRETED = {"TRITON_INTERPRET": "1"}


def test_it_can_be_read():
    lines = README.splitlines()
    assert len(lines) <= 170
    assert [line for line in lines if len(line) > 120] == []
    prose = re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
    linked = re.findall(r"\]\((?!https?:)([^)#]+)\)", prose)
    assert linked
    assert [path for path in linked if not (ROOT / path).exists()] == []


def test_what_is_set_up_is_what_ci_sets_up():
    assert all(kind == "bash" and "-m venv .venv && .venv/bin/pip install torch" in code for kind, code in SET_UP)
    assert SET_UP[0][1].rstrip().endswith("clipsteer demo")
    assert SET_UP[1][1].rstrip().endswith("pip install -e '.[test]' && .venv/bin/python -m pytest")
    ci = (ROOT / ".ci/run").read_text()
    assert "install --quiet -e '.[test" in ci
    assert '/venv/bin/python" -m pytest' in ci


def name(block: tuple[str, str]) -> str:
    kind, code = block
    return f"{kind}: {code.splitlines()[0][:40]} …"


def timed(block: tuple[str, str]) -> object:
    """Commands that train take a minute each: the long rest runs them."""
    return pytest.param(block, id=name(block), marks=[pytest.mark.nightly] if block[0] == "bash" else [])


def test_the_wrong_kernel_fails_and_the_mended_one_passes(tmp_path):
    (code,) = [code for _, code in REST if "triton.jit" in code]
    (tmp_path / "block.py").write_text(code)  # triton reads a kernel's source from its file
    call = [sys.executable, "block.py"]
    done = subprocess.run(call, cwd=tmp_path, env=os.environ | INTERPRETED, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    wrong, mended = done.stdout.split("softmax against <lambda>")[1].split("<lambda> against <lambda>")
    assert "FAIL" in wrong
    (size,) = {*re.findall(r"    at (x .*)", wrong)}
    assert size in README
    assert "FAIL" not in mended
    (values,) = re.findall(r"^values +float32 +20 +([\d.]+) +pass", mended, re.MULTILINE)
    assert f"at {float(values):.2f} of its bounds" in README


@pytest.mark.slow
@pytest.mark.filterwarnings("error::DeprecationWarning:clipsteer$")
@pytest.mark.parametrize("block", [timed(block) for block in REST if "triton.jit" not in block[1]])
def test_a_block_runs_as_it_stands(block, tmp_path, monkeypatch, capsys):
    kind, code = block
    monkeypatch.chdir(tmp_path)
    if kind == "python":
        env = {**os.environ, "PYTHONWARNINGS": "error::DeprecationWarning:clipsteer"}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"
        return
    assert kind == "bash"
    for line in code.replace("\\\n", " ").splitlines():
        program, *words = shlex.split(line)
        assert program == "clipsteer"
        status, out, err = run(capsys, *words)
        assert status == 0, f"{line}\n{out}\n{err[-4000:]}"
