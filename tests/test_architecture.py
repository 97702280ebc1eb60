"""The house rules, read from the source: who imports whom, what import costs, no unpickling."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    [*ROOT.glob("clipsteer/**/*.py"), *ROOT.glob("kernels/**/*.py"), *ROOT.glob("benchmarks/*.py"), ROOT / "setup.py"]
)
HEAVY = {
    "triton",
    "open_clip",
    "matplotlib",
    "PIL",
    "hypothesis",
    "huggingface_hub",
    "torchvision",
    "timm",
    "scipy",
    "sklearn",
}
EDGE = {"clip", "data", "sae_io", "activations", "report", "cli", "demo"}


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_nothing_unpickles(path):
    text = path.read_text()
    assert "weights_only=False" not in text
    assert not {i for i in imports(path) if i.split(".")[0] in {"pickle", "dill", "cloudpickle", "joblib", "shelve"}}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), ast.unparse(
                node
            )
        assert not (isinstance(node, ast.Call) and ast.unparse(node.func) in {"torch.save", "eval", "exec"})


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.parts[-2] in ("clipsteer", "continual", "ops", "specs", "testing")], ids=relative
)
def test_heavy_libraries_are_imported_lazily(path):
    assert not {i for i in imports(path, top_level_only=True) if i.split(".")[0] in HEAVY}


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_import_directions(path):
    ours = {i for i in imports(path) if i.split(".")[0] in {"clipsteer", "tests", "benchmarks"}}
    assert not {i for i in ours if i.split(".")[0] in {"tests", "benchmarks"}}
    if path.parent.name == "kernels":
        assert {i for i in ours if not i.startswith("clipsteer.kernels")} == set()
    if "ops" in path.relative_to(ROOT).parts:
        assert all(i == "clipsteer" or i.startswith(("clipsteer.ops", "clipsteer.kernels")) for i in ours), ours
    if path.parent.name in ("clipsteer", "continual") and path.stem not in EDGE and path.stem != "__main__":
        assert not {i for i in ours if i.split(".")[1:2] in (["cli"], ["demo"])}, ours


def test_public_names():
    import clipsteer

    assert clipsteer.ops.__all__ == sorted(clipsteer.ops.__all__, key=lambda n: (n != "BACKENDS", n != "REGISTRY", n))
    for name in clipsteer.__all__:
        assert getattr(clipsteer, name) is not None
    for name in ("topk_encode", "sparse_decode"):
        assert "Source:" in getattr(clipsteer.ops, name).__doc__
    with pytest.raises(AttributeError, match="no attribute"):
        clipsteer.nothing  # noqa: B018


def test_import_is_light():
    """Under 0.3 s of processor time beyond torch's own import, and nothing heavy comes along."""
    code = """
import sys, time, torch
begin = time.process_time()
import clipsteer
spent = time.process_time() - begin
heavy = {h for h in %r if h in sys.modules and h not in before}
print(spent, sorted(heavy))
""".replace("import sys, time, torch\n", "import sys, time, torch\nbefore = set(sys.modules)\n") % (HEAVY,)  # fmt: skip
    env = {**os.environ, "PYTHONSAFEPATH": "1"}
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout.split(
            " ", 1
        )
        for _ in range(3)
    ]
    assert min(float(r[0]) for r in runs) < 0.3
    assert all(r[1].strip() == "[]" for r in runs), runs


def test_no_file_is_too_long_or_says_too_much():
    for path in SOURCES:
        text = path.read_text()
        assert len(text.splitlines()) <= 600, relative(path)
        assert "print(" not in text or path.stem in {"cli", "setup", "__main__"} or "assets" in path.parts, relative(
            path
        )
