"""What a wheel is made of and called, with a compiler and without, and how the package knows it again."""

from __future__ import annotations

import ctypes
import json
import math
import os
import platform
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import setuptools

from clipsteer import _version
from clipsteer.cli import ops as cli_ops
from clipsteer.ops import _dispatch

ROOT = Path(__file__).resolve().parent.parent
CXX = shutil.which("c++") or shutil.which("g++")
LINUX = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"

CALLS = r"""
#include <cmath>
#include <memory>
#include <sstream>
#include <vector>
extern "C" double numbers(double x) {
  auto held = std::make_shared<double>(x), again = held;
  return std::exp(*again) + std::pow(x, 3.5) + std::log(x) + std::log2(x);
}
extern "C" int words(int n) {
  std::ostringstream out;
  out << n << std::vector<int>(n).size();
  return int(out.str().size());
}
"""

# a compiler that only keeps count: what it links is the library that is there
COMPILER = """#!/bin/sh
case "$*" in
  *-print-prog-name=*) echo false; exit ;;
  *--version*) echo "counting c++ 1.0"; exit ;;
esac
for last; do
  case "$before" in -o) target=$last ;; -c) echo "$last" >> "$COMPILED" ;; esac
  before=$last
done
case "$target" in
  *_C.so) cp "$LIBRARY" "$target" ;;
  ?*) : > "$target" ;;
esac
"""


@pytest.fixture(scope="module")
def setup() -> dict[str, Any]:
    """What setup.py defines, without its last line's deed."""
    patch = pytest.MonkeyPatch()
    patch.setattr(setuptools, "setup", lambda **options: None)
    names = runpy.run_path(str(ROOT / "setup.py"))
    patch.undo()
    return names


@pytest.mark.skipif(not (LINUX and CXX and shutil.which("readelf")), reason="needs a compiler on glibc")
def test_a_library_calls_nothing_that_is_newer_than_its_tag_says(setup, tmp_path, capfd):
    (tmp_path / "calls.cpp").write_text(CALLS)
    flags = [CXX, "-std=c++20", "-O1", "-fPIC", "-fno-builtin"]
    objects = setup["compile_all"]([tmp_path / "calls.cpp"], flags, tmp_path)
    plain, library = tmp_path / "plain.so", tmp_path / "library.so"
    subprocess.run([CXX, "-shared", *objects, "-o", plain], check=True)
    newer = setup["older_names"](plain, [CXX])
    if tuple(map(int, platform.libc_ver()[1].split("."))) >= (2, 29):
        assert {"exp", "log", "log2", "pow"} <= newer.keys()
        assert setup["oldest_linux"]([plain]) == "linux"  # no promise: this machine's, and newer ones

    system = setup["compile_all"]([setup["SYSTEM"]], [*flags, "-fvisibility=hidden"], tmp_path)
    (tmp_path / "own").mkdir()
    own = [str(shutil.copy(file, tmp_path / f"own/{n}.o")) for n, file in enumerate([*objects, *system])]
    setup["link"]([CXX], [CXX], own, library, [])
    assert setup["older_names"](library, [CXX]) == {}
    assert setup["oldest_linux"]([library]).startswith("manylinux_2_")
    for file in (plain, library):
        opened = ctypes.CDLL(str(file))
        opened.numbers.restype, opened.numbers.argtypes = ctypes.c_double, [ctypes.c_double]
        assert opened.numbers(1.7) == math.exp(1.7) + 1.7**3.5 + math.log(1.7) + math.log2(1.7)
        assert opened.words(100) == 6


def wheel(folder: Path, **environment: str) -> Path:
    """Made from a copy of the tree, without its pictures."""
    tree = folder / "tree"
    for name in ("clipsteer", "kernels", "csrc"):
        left = shutil.ignore_patterns("*.so", "_build.json", "*.webp", "*.safetensors", "__pycache__")
        shutil.copytree(ROOT / name, tree / name, ignore=left)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CLIPSTEER")}
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(folder)],
        cwd=tree,
        env={**kept, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / done.stdout.splitlines()[-1]


def told_by(built: Path) -> dict[str, Any]:
    """What the package in a wheel knows of itself, away from the tree."""
    site = built.parent / "site"
    with zipfile.ZipFile(built) as archive:
        archive.extractall(site)
    code = "import json; from clipsteer import _version as v; print(json.dumps([v.installed(), v.build()]))"
    # whether the current directory is searched or not
    path = {**os.environ, "PYTHONPATH": str(site)}
    call = [sys.executable, "-S", "-c", code]
    done = subprocess.run(call, cwd=site, env=path, capture_output=True, text=True, check=True)
    installed, build = json.loads(done.stdout)
    return {"installed": installed, **build}


def test_without_a_compiler_the_wheel_is_for_any_machine(tmp_path):
    built = wheel(tmp_path, CLIPSTEER_BUILD_CPP="0", CLIPSTEER_BUILD_CUDA="0")
    assert built.name == f"clipsteer-{_version.__version__}-py3-none-any.whl"
    assert told_by(built) == {
        "installed": "wheel py3-none-any",
        "built": {},
        "left_out": {"_C.so": "CLIPSTEER_BUILD_CPP=0", "_C_cuda.so": "CLIPSTEER_BUILD_CUDA=0"},
    }
    with zipfile.ZipFile(built) as archive:
        names = archive.namelist()
        tags = next(archive.read(name) for name in names if name.endswith(".dist-info/WHEEL"))
    assert b"Root-Is-Purelib: true" in tags
    assert "clipsteer/kernels/__init__.py" in names
    assert not [name for name in names if name.endswith(".so")]


def test_a_native_wheel_is_compiled_once_and_named_after_its_system(setup, tmp_path):
    library = ROOT / "clipsteer/_C.so"
    if not (LINUX and library.exists()):
        pytest.skip("no library to put into the wheel")
    compiler = tmp_path / "c++"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    paths = {"COMPILED": str(tmp_path / "compiled"), "LIBRARY": str(library), "CXX": str(compiler)}
    built = wheel(tmp_path, CLIPSTEER_BUILD_CUDA="0", **paths)
    system = f"{setup['oldest_linux']([library])}_{platform.machine()}"
    assert built.name.endswith(f"-py3-none-{system}.whl")
    told = told_by(built)
    assert told["installed"] == f"wheel py3-none-{system}"
    assert told["built"]["_C.so"]["compiler"] == "counting c++ 1.0"
    assert told["left_out"] == {"_C_cuda.so": "CLIPSTEER_BUILD_CUDA=0"}
    assert (tmp_path / "site/clipsteer/_C.so").read_bytes() == library.read_bytes()
    compiled = [Path(line).name for line in (tmp_path / "compiled").read_text().split()]
    assert sorted(compiled) == sorted(p.name for p in [*ROOT.glob("csrc/cpu/**/*.cpp"), setup["SYSTEM"]])


def test_a_library_that_does_not_load_is_not_silently_done_without(monkeypatch, tmp_path):
    """As one that was built against another torch."""
    (tmp_path / "_C.so").write_bytes(b"not a library")
    monkeypatch.setattr(_dispatch, "__file__", str(tmp_path / "ops" / "_dispatch.py"))
    with pytest.warns(RuntimeWarning, match=r"_C\.so does not load with torch .*; do this"):
        reason = _dispatch._load_binary("cpp", "do this")
    assert reason.startswith("_C.so does not load with torch")


def test_env_and_dispatch_say_what_was_left_out(monkeypatch, capsys, tmp_path):
    facts = {"compiler": "g++ 12", "code": ["portable", "AVX2"], "torch": "2.10.0"}
    why = "nvcc was not found"
    build = {"built": {"_C.so": facts}, "left_out": {"_C_cuda.so": why}}
    monkeypatch.setattr(_version, "build", lambda: build)
    told = cli_ops.environment()
    assert told["installed"] == _version.installed()
    assert told["compiled"] == {"_C.so": "portable, AVX2; g++ 12, headers of torch 2.10.0"}
    assert told["left out"] == {"_C_cuda.so": why}
    monkeypatch.setattr(_dispatch, "LIBRARIES", {"cuda": "_C_none"})
    build["left_out"]["_C_none.so"] = why
    assert _dispatch._load_binary("cuda", "do this") == "_C_none.so was not built (nvcc was not found); do this"
    monkeypatch.setattr(cli_ops, "environment", lambda: {**told, "backends": []})
    cli_ops._env(type("Asked", (), {"json": False}))
    out = capsys.readouterr().out
    assert f"left out         _C_cuda.so: {why}" in out


@pytest.mark.skipif(not (ROOT / "clipsteer/_C.so").exists(), reason="the C++ library is not built")
def test_a_library_that_is_there_is_used():
    """What is built and does not load would let every test of it be skipped."""
    assert _dispatch.missing("cpp") is None
