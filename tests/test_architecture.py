"""The house rules, read from the source: who imports whom, what import costs, no unpickling."""

from __future__ import annotations

import ast
import copy
import functools
import os
import re
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    [*ROOT.glob("clipsteer/**/*.py"), *ROOT.glob("kernels/**/*.py"), *ROOT.glob("benchmarks/**/*.py"),
     ROOT / "setup.py"]
)  # fmt: skip
PACKAGE = [path for path in SOURCES if path.parts[len(ROOT.parts)] == "clipsteer"]
HEAVY = {
    "triton", "open_clip", "matplotlib", "PIL", "hypothesis", "huggingface_hub", "torchvision", "timm", "scipy",
    "sklearn", "jinja2", "wandb", "transformers", "umap", "hdbscan", "starlette", "uvicorn",
}  # fmt: skip
# from the top floor down: a file imports from lower floors, and from its own wing
FLOORS = (
    ("__main__",),
    ("cli",),
    ("demo", "browse"),
    ("clipsteer",),  # the public page
    ("steering", "continual", "integrations", "alignment"),
    ("sae",),
    ("conceptors", "ensembles", "splice", "reference"),
    ("clip", "losses"),
    ("testing", "report", "data", "training"),
    ("ops", "io"),
    ("kernels", "assets", "guide", "_lazy", "_renamed", "_version"),
)
FLOOR = {wing: number for number, wings in enumerate(FLOORS) for wing in wings}


class Arrow(NamedTuple):
    """One import: of which module, from where, and whether only when a function runs."""

    source: str
    target: str
    lazy: bool

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}{' (lazily)' if self.lazy else ''}"


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports(tree: ast.AST, inside: bool = False) -> list[tuple[str, str | None, bool]]:
    """(module, name taken from it or None, inside a function?) of every import."""
    found: list[tuple[str, str | None, bool]] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, None, inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [(node.module, alias.name, inside) for alias in node.names]
        else:
            function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            found += imports(node, inside or function)
    return found


class House:
    """The modules of a package folder and the arrows between them, types' sake included."""

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        self.trees = {}
        self.packages = set()
        self.files = {}
        for path in folder.rglob("*.py"):
            parts = [folder.name, *path.relative_to(folder).with_suffix("").parts]
            if parts[-1] == "__init__":
                parts.pop()
                self.packages.add(".".join(parts))
            self.files[".".join(parts)] = path
            self.trees[".".join(parts)] = ast.parse(path.read_text(encoding="utf-8"))
        # what a package hands on from its modules, at first use
        self.handed = {
            package: {name: module for module, name, _ in imports(self._lists(package)) if name is not None}
            for package in self.packages
        }
        self.arrows = [arrow for module in self.trees for arrow in self._arrows(module)]

    def _lists(self, package: str) -> ast.Module:
        blocks = [node for node in self.trees[package].body if is_type_checking(node)]
        attached = "_lazy.attach(" in ast.unparse(self.trees[package])
        return ast.Module([line for block in blocks for line in block.body] if attached else [], [])

    def _arrows(self, module: str) -> list[Arrow]:
        listed = {id(node) for node in self._lists(module).body} if module in self.packages else set()
        tree = self.trees[module]
        for node in ast.walk(tree):
            if is_type_checking(node):
                node.body = [line for line in node.body if id(line) not in listed] or [ast.Pass()]
        found = []
        for target, name, lazy in imports(tree):
            whole = f"{target}.{name}"
            place = whole if whole in self.trees else self.handed.get(target, {}).get(name, target)
            if place in self.trees and place != module:
                found.append(Arrow(module, place, lazy))
        return found

    def with_lines(self, module: str, lines: str) -> House:
        """The same house, with more lines in one module."""
        house = copy.copy(self)
        source = self.files[module].read_text(encoding="utf-8") + "\n\n" + lines + "\n"
        house.trees = {**self.trees, module: ast.parse(source)}
        house.arrows = [arrow for arrow in self.arrows if arrow.source != module] + house._arrows(module)
        return house

    def wing(self, module: str) -> str:
        parts = module.split(".")
        return parts[1] if len(parts) > 1 else parts[0]

    def upward(self) -> list[str]:
        """Imports that do not go down, between wings."""
        pairs = [(arrow, self.wing(arrow.source), self.wing(arrow.target)) for arrow in self.arrows]
        return sorted({str(arrow) for arrow, a, b in pairs if a != b and FLOOR[b] <= FLOOR[a]})

    def circles(self) -> list[str]:
        """Groups of modules that import each other, at the top or inside functions, and what ties them."""
        below: dict[str, set[str]] = {module: set() for module in self.trees}
        for arrow in self.arrows:
            below[arrow.source].add(arrow.target)
        reach = {}
        for module in below:
            seen: set[str] = set()
            stack = [module]
            while stack:
                for target in below[stack.pop()] - seen:
                    seen.add(target)
                    stack.append(target)
            reach[module] = seen
        inside = [a for a in self.arrows if a.source in reach[a.target]]
        return sorted({str(arrow) for arrow in inside})


@functools.cache
def the_house() -> House:
    return House(ROOT / "clipsteer")


def test_imports_go_down_and_never_in_circles():
    house = the_house()
    assert {house.wing(module) for module in house.trees} <= FLOOR.keys()
    assert house.upward() == []
    assert house.circles() == []


def test_no_file_hides_a_public_name():
    """Importing a file binds its name in the package, over what the package hands on at first use."""
    house = the_house()
    names = [(package, name, module) for package, handed in house.handed.items() for name, module in handed.items()]
    assert not [f"{package}.{name}" for package, name, module in names
                if f"{package}.{name}" in house.trees and module != package]  # fmt: skip


@pytest.mark.parametrize(
    ("file", "line", "kind"),
    [
        ("io/files.py", "from clipsteer.sae.model import SAE", "upward"),
        ("training/loop.py", "def late():\n    import clipsteer.clip.hooks", "upward"),
        ("data/files.py", "from clipsteer import load", "upward"),
        ("conceptors/fit.py", "from clipsteer.splice import ConceptDictionary", "upward"),
        ("clip/tokens.py", "def late():\n    from clipsteer.clip.hooks import capture", "circles"),
        ("ops/_check.py", "from clipsteer.ops import topk_encode", "circles"),
        ("sae/foreign.py", "if TYPE_CHECKING:\n    from clipsteer.sae import SAE", "circles"),
    ],
)
def test_a_forbidden_import_is_found(file, line, kind):
    before = getattr(the_house(), kind)()
    module = "clipsteer." + file.removesuffix(".py").replace("/", ".")
    planted = [arrow for arrow in getattr(the_house().with_lines(module, line), kind)() if arrow not in before]
    assert any(arrow.startswith(f"{module} -> ") for arrow in planted), planted
    assert any("lazily" in arrow for arrow in planted) or "def " not in line


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_nothing_unpickles(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert "weights_only=False" not in text
    unpicklers = {"pickle", "dill", "cloudpickle", "joblib", "shelve"}
    assert not {module for module, _, _ in imports(tree) if module.split(".")[0] in unpicklers}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called == "torch.load":
            safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            assert safe, ast.unparse(node)
        # one place writes state dicts for a library that reads nothing else
        assert called != "torch.save" or relative(path) == "clipsteer/io/torch_files.py"
        assert called not in {"eval", "exec"}


@pytest.mark.parametrize("path", PACKAGE, ids=relative)
def test_heavy_libraries_are_imported_lazily(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not is_type_checking(node)]
    assert not {module for module, _, lazy in imports(tree) if module.split(".")[0] in HEAVY and not lazy}


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_who_sees_whom_outside_the_package(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    seen = {module for module, _, _ in imports(tree)}
    top = relative(path).split("/")[0]
    if top != "benchmarks":
        assert not {module for module in seen if module.split(".")[0] in {"tests", "benchmarks"}}
    if top == "kernels":
        assert not {m for m in seen if m.split(".")[0] == "clipsteer" and not m.startswith("clipsteer.kernels")}


PAGE = {
    "load", "steer", "SAESteering", "VectorSteering", "ConceptorSteering", "SAE", "train_sae", "evaluate_sae",
    "Conceptor", "ConceptDictionary", "wise_ft", "finetune", "DRRhoLoss", "train_contrastive",
    "ops", "data", "continual", "testing",
}  # fmt: skip


def test_the_public_page():
    import clipsteer

    assert set(dir(clipsteer)) == set(clipsteer.__all__) == PAGE
    for name in PAGE:
        assert getattr(clipsteer, name) is not None
    for name in ("topk_encode", "sparse_decode"):
        assert "Source:" in getattr(clipsteer.ops, name).__doc__
    assert re.fullmatch(r"\d+\.\d+\.\d+", clipsteer.__version__)
    with pytest.raises(AttributeError, match="no attribute"):
        clipsteer.nothing  # noqa: B018


OLD_NAMES = dict(line.split(": ") for line in (ROOT / "tests/old_names.txt").read_text().splitlines() if line[0] != "#")


@pytest.mark.parametrize("module", OLD_NAMES)
def test_old_names_stay_importable(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = import_module(module)
        assert [name for name in OLD_NAMES[module].split() if not hasattr(found, name)] == []
        with pytest.raises(AttributeError, match="no attribute"):
            found.nothing  # noqa: B018


def test_renamed_modules_say_where_they_are():
    from clipsteer._renamed import RENAMED

    places = {place for new in RENAMED.values() for place in new}
    assert not [place for place in places if not (ROOT / "clipsteer" / f"{place.replace('.', '/')}.py").is_file()]
    sys.modules.pop("clipsteer.merging", None)
    with pytest.warns(DeprecationWarning, match=r"clipsteer\.ensembles\.merging"):
        import_module("clipsteer.merging")


def test_import_is_light():
    """Under 0.3 s of processor time beyond torch's own import, and nothing heavy comes along."""
    code = f"""
import sys, time, torch
before = set(sys.modules)
begin = time.process_time()
import clipsteer
spent = time.process_time() - begin
print(spent, sorted(h for h in {HEAVY!r} if h in sys.modules and h not in before))
"""
    env = {**os.environ, "PYTHONSAFEPATH": "1"}
    runs = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
        runs.append(done.stdout.split(" ", 1))
        if float(runs[-1][0]) < 0.3:
            break
    assert min(float(spent) for spent, _ in runs) < 0.3
    assert all(heavy.strip() == "[]" for _, heavy in runs), runs


def test_neither_the_package_nor_its_help_needs_torch():
    code = """
import sys
import clipsteer
from clipsteer.cli.main import build_parser
build_parser().format_help()
print([name for name in ("torch", "numpy", "tqdm", "jinja2") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_file_is_too_long_or_says_too_much(path):
    text = path.read_text(encoding="utf-8")
    top = relative(path).split("/")[0]
    assert len(text.splitlines()) <= (400 if top == "clipsteer" else 600)
    assert "print(" not in text or path.stem in {"main", "setup", "__main__"} or top == "benchmarks"
