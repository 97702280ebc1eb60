"""The ops as a kernel of Hugging Face's hub: made by .ci/hub.py, loaded by ``kernels`` beside this clipsteer."""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import clipsteer
from _forks import Forks
from clipsteer import ops
from clipsteer.ops import REGISTRY, _dispatch, _spec
from clipsteer.ops._lowlevel import LOW_LEVEL, NAMESPACES, RECORDS

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = Path(clipsteer.__file__).parent / "_C.so"
needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="the C++ library was not built")


@pytest.fixture(scope="module")
def hub() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / ".ci/hub.py"))


@pytest.fixture(scope="module")
def layout(hub: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not LIBRARY.exists():
        pytest.skip("the C++ library was not built")
    folder = tmp_path_factory.mktemp("hub") / "clipsteer"
    hub["write"](folder, cuda="13.0" if LIBRARY.with_name("_C_cuda.so").exists() else None)
    return folder


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    """Hugging Face's package; the folder of Triton sources that lies beside the tests has its name too."""
    path = sys.path[:]
    sys.path[:] = [entry for entry in path if Path(entry).resolve() != ROOT]
    sys.modules.pop("kernels", None)
    yield pytest.importorskip("kernels", minversion="0.17.2")
    sys.path[:] = path


@pytest.fixture(scope="module")
def loaded(kernels: ModuleType, layout: Path) -> ModuleType:
    return kernels.get_local_kernel(layout, backend="cpu")


def inside(module: ModuleType, name: str) -> Any:
    return importlib.import_module(f"{module.__name__}.{name}")


def python(code: str, *arguments: object, **environment: str) -> str:
    """What code that runs in a process of its own writes; it must exit with 0."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONSAFEPATH": "1", **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


# ---------------------------------------------------------------- the layout


def test_a_variant_is_the_ops_alone_and_imports_nothing_absolutely(layout: Path) -> None:
    variant = layout / "build/torch-universal"
    files = {path.relative_to(variant).as_posix(): path.read_text() for path in variant.rglob("*.py")}
    assert {path.split("/")[0] for path in files} <= {"__init__.py", "ops", "kernels", "_version.py"}
    for path, text in files.items():
        assert not re.search(r"^\s*(from|import) clipsteer\b", text, re.MULTILINE), path
    for op in RECORDS:
        assert {f"ops/{op.stem}.py", f"ops/specs/{op.stem}.py"} <= set(files)
        assert (f"kernels/{op.stem}.py" in files) == bool(op.kernels)


@pytest.mark.parametrize(
    "source",
    ["import clipsteer", "import clipsteer.io", "from clipsteer import io", "from clipsteer.io import files",
     "def f():\n    from clipsteer.io import files", "import numpy", "__import__('clipsteer.io')",
     "importlib.import_module(f'clipsteer.kernels.{stem}')", "torch.ops.clipsteer_cpp.topk",
     "getattr(torch.ops, f'clipsteer_{backend}')",
     "library = Library('clipsteer_triton::x')", "register(f'clipsteer::{name}')"],
)  # fmt: skip
def test_what_would_reach_beyond_a_variant_is_refused(hub: dict[str, Any], source: str) -> None:
    assert len(hub["complaints"]("ops/x.py", source)) == 1
    assert not hub["complaints"]("ops/x.py", "from ..kernels import a\nimport torch\nfrom torch.nn import b")


def test_imports_are_rewritten_from_every_depth(hub: dict[str, Any]) -> None:
    source = "from clipsteer.ops import (\n    a,\n)\nfrom clipsteer import kernels\nif x: from clipsteer.io import b"
    expected = "from ..ops import (\n    a,\n)\nfrom .. import kernels\nif x: from ..io import b"
    assert hub["relative"](source, 2) == expected
    assert hub["relative"]("from clipsteer.ops import a", 1) == "from .ops import a"


def test_kernels_reads_what_the_script_wrote(kernels: ModuleType, hub: dict[str, Any], layout: Path) -> None:
    from kernels._rust import Build, Digest, DigestAlgorithm
    from kernels.variants import get_variants_local

    folders = sorted((layout / "build").glob("*/"))
    assert len(folders) >= 3
    assert {v.variant_str for v in get_variants_local(layout / "build")} == {f.name for f in folders}
    identities = set()
    for folder in folders:
        about = kernels.Metadata.read_from_file(folder / "metadata.json")
        assert (str(about.name), about.version, about.license) == ("clipsteer", 0, "Apache-2.0")
        assert (about.python_depends, str(about.kernels_minver)) == ([], hub["MINVER"])
        about.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, folder))
        assert about.id.isidentifier()
        identities.add(about.id)
    assert len(identities) == len(folders)
    extra = f'hub = ["kernels>={hub["MINVER"]}"]'
    assert extra in (ROOT / "pyproject.toml").read_text()
    backends = Build.open(layout).general.backends
    assert {str(backend) for backend in backends} == {"cpu", "cuda"}
    card = (layout / "build/CARD.md").read_text()
    assert all(f"{name}{low.schema}" in card for name, low in LOW_LEVEL.items() if not low.cpp_only)
    assert "\ntopk_encode(x, W_enc, b_enc=None, *, k, " in card


def test_every_torch_finds_its_variant(kernels: ModuleType, hub: dict[str, Any]) -> None:
    from kernels.backends import parse_backend
    from kernels.variants import Version, _resolve_variant_for_system, parse_variant

    made = hub["variants"]({"_C.so", "_C_cuda.so"}, "13.0", "linux", "x86_64")
    with_library = {v.name: v.libraries for v in made}
    named = [parse_variant(name) for name in with_library]

    def chosen(torch_version: str, backend: str, machine: str = "x86_64", system: str = "linux") -> str:
        found, _ = _resolve_variant_for_system(
            named, parse_backend(backend), machine, system, Version(torch_version), True, None
        )
        return found[0].variant_str

    for version in ("2.10", "2.14"):
        assert with_library[chosen(version, "cpu")] == ("_C.so",)
        # a torch built with CUDA has the library for the CPU, whether there is a GPU or not
        assert with_library[chosen(version, "cu126")] == with_library[chosen(version, "cu128")] == ("_C.so",)
        assert with_library[chosen(version, "cu130")] == ("_C.so", "_C_cuda.so")
        assert chosen(version, "cu132") == "torch-stable-abi210-cu130-x86_64-linux"
    elsewhere = [("2.9", "cpu"), ("2.14", "rocm63"), ("2.14", "cpu", "aarch64"), ("2.14", "metal", "aarch64", "darwin")]
    assert {chosen(*where) for where in elsewhere} == {"torch-universal"}


def test_a_library_takes_one_name_that_fits(hub: dict[str, Any]) -> None:
    field = b"\x7fELF clipsteer's ops are named:clipsteer" + bytes(20) + b"rest"
    assert hub["stamped"](field, "a" * 28) == field.replace(b"clipsteer" + bytes(20), b"a" * 28 + b"\0")
    assert len(hub["stamped"](field, "short")) == len(field)
    for library, name in ((field, "a" * 29), (field + field, "a"), (b"no field", "a")):
        with pytest.raises(SystemExit, match="library"):
            hub["stamped"](library, name)


# ---------------------------------------------------------------- loaded


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_a_loaded_kernel_gives_the_same_bits(loaded: ModuleType, name: str) -> None:
    """Forward and backward of every op, beside the package's own."""
    ours, theirs = REGISTRY[name], inside(loaded, "ops.specs").REGISTRY[name]
    for dtype in (torch.float32, torch.bfloat16):
        ran = []
        for spec, module in ((ours, _spec), (theirs, inside(loaded, "ops._spec"))):
            generator = torch.Generator().manual_seed(7)
            inputs = spec.make(spec.shapes[1], dtype, generator)
            given = partial(module.cotangents, dtype=dtype, generator=generator)
            ran.append(module.run(partial(spec.function, backend="cpp"), inputs, spec.leaves(inputs), given))
        ours_ran, theirs_ran = ran
        assert len(ours_ran.outputs) == len(theirs_ran.outputs) > 0
        for a, b in zip(ours_ran.outputs, theirs_ran.outputs):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())
        assert ours_ran.gradients.keys() == theirs_ran.gradients.keys()
        assert bool(ours_ran.gradients) == bool(spec.differentiable)
        for leaf, gradient in ours_ran.gradients.items():
            assert torch.equal(gradient, theirs_ran.gradients[leaf]), leaf


def test_a_loaded_kernel_runs_its_own_ops(loaded: ModuleType) -> None:
    """In namespaces of its own, under the package's names and schemas; nothing of it is the package's."""
    space = loaded.NAMESPACE
    assert loaded.__name__ == space
    own = {name: module for name, module in sys.modules.items() if name.split(".")[0] == space}
    assert len(own) > 30
    assert all(Path(module.__file__).is_relative_to(Path(loaded.__file__).parent) for module in own.values())
    assert set(loaded.__all__) >= {"topk_encode", "sparse_decode", "conceptor_project", "clip_loss", "explain"}
    assert loaded.topk_encode is not ops.topk_encode
    assert loaded.__version__ == clipsteer.__version__
    _dispatch.register_portable()
    for name, low in LOW_LEVEL.items():
        if low.cpp_only:
            continue
        for theirs, owns in ((space, "clipsteer"), (f"{space}_cpp", "clipsteer_cpp")):
            schemas = [str(getattr(getattr(torch.ops, s), name).default._schema).split("::")[1] for s in (theirs, owns)]
            assert schemas[0] == schemas[1]
    x, W = torch.randn(4, 16), torch.randn(32, 16)
    with torch.profiler.profile() as profile:
        loaded.topk_encode(x, W, k=3)
    called = {event.key for event in profile.key_averages() if "clipsteer" in event.key}
    assert called == {f"{space}_cpp::topk_encode"}
    status = {s.backend: s.usable for s in loaded.load()}
    assert status["cpp"]


def test_a_loaded_kernel_compiles(loaded: ModuleType) -> None:
    """In one graph, forward and backward: its fakes and gradients are in its own namespace."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    called = set()

    def keep(graph: torch.fx.GraphModule, example: Any) -> Any:
        called.update(str(node.target).split(".")[0] for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    def step(module: Any, x: Tensor, W: Tensor, b: Tensor) -> Tensor:
        acts, indices = module.topk_encode(x, W, k=4)
        return module.clip_loss(module.sparse_decode(acts, indices, W, b), x, logit_scale=torch.tensor(10.0))

    compiled = torch.compile(
        partial(step, loaded), fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep)
    )
    drawn = [torch.randn(33, 16), torch.randn(64, 16), torch.randn(16)]
    found = []
    for function in (partial(step, ops), compiled):
        leaves = [t.clone().requires_grad_() for t in drawn]
        loss = function(*leaves)
        found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*found))
    assert {name for name in called if "clipsteer" in name} == {f"{loaded.NAMESPACE}_cpp"}


def test_two_variants_and_the_package_live_in_one_process(
    kernels: ModuleType, loaded: ModuleType, layout: Path
) -> None:
    """The variant for the CPU, the one that this torch prefers, and the installed clipsteer."""
    other = kernels.get_local_kernel(layout)
    if torch.version.cuda is not None:
        assert other is not loaded
    assert kernels.get_local_kernel(layout, backend="cpu") is loaded
    x, W = torch.randn(8, 16), torch.randn(64, 16)
    found = [module.topk_encode(x, W, k=4, backend="cpp") for module in (ops, loaded, other)]
    for acts, indices in found[1:]:
        assert torch.equal(acts, found[0][0])
        assert torch.equal(indices, found[0][1])


INTERPRETED = """
import importlib.util, sys, torch
from clipsteer import ops
name, file = sys.argv[1:]
spec = importlib.util.spec_from_file_location(name, file)
kernel = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)
x, W = torch.randn(5, 16), torch.randn(70, 16)
for backend in ("triton", "cpp"):
    acts, indices = ops.topk_encode(x, W, k=4, backend="triton")
    found = kernel.topk_encode(x, W, k=4, backend=backend)
    assert torch.equal(found[1], indices)
    assert backend == "cpp" or torch.equal(found[0], acts)
assert kernel.ops._dispatch.call.__module__ == f"{name}.ops._dispatch"
assert f"{name}_triton::topk_encode" in torch._C._dispatch_get_all_op_names()
"""


def test_triton_runs_from_a_variant(interpreter: Forks, layout: Path) -> None:
    folder = next((layout / "build").glob("*-cpu-*"))
    codes, written = interpreter.run(
        INTERPRETED, json.loads((folder / "metadata.json").read_text())["id"], folder / "__init__.py"
    )
    assert codes == [0], written


CACHED = """
import sys
sys.path.insert(0, sys.argv[1])  # the other clipsteer stands first
import torch
from kernels import get_kernel
module = get_kernel("someone/clipsteer", version=0, trust_remote_code=True, backend="cpu")
assert not [name for name in sys.modules if name.split(".")[0] == "clipsteer"]
assert {s.backend: s.usable for s in module.load()}["cpp"], module.explain("topk_encode")
acts, indices = module.topk_encode(torch.eye(4), torch.eye(4), k=1)
assert indices.flatten().tolist() == [0, 1, 2, 3]
print(module.NAMESPACE)
"""


@pytest.mark.nightly
def test_nothing_of_another_installed_clipsteer_is_imported(kernels: ModuleType, layout: Path, tmp_path: Path) -> None:
    """From the hub's cache, whose files are links into a store: what the loader does with a published kernel."""
    other = tmp_path / "site/clipsteer"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("raise ImportError('of another version')\n")
    repository = tmp_path / "cache/kernels--someone--clipsteer"
    commit = "0" * 40
    files = [path for path in layout.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    for number, path in enumerate(files):
        blob = repository / "blobs" / f"{number:040x}"
        link = repository / "snapshots" / commit / path.relative_to(layout)
        for folder in (blob.parent, link.parent):
            folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repository / "refs").mkdir()
    (repository / "refs/v0").write_text(commit)
    offline = {"KERNELS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    assert "clipsteer_cpu_" in python(CACHED, other.parent, **offline)


# ---------------------------------------------------------------- two copies of one name


SECOND = """
import ctypes, sys, torch
for path in sys.argv[1:]:
    torch.ops.load_library(path)
    refusal = ctypes.CDLL(path).clipsteer_refusal
    refusal.restype = ctypes.c_char_p
    print("refusal:", refusal())
print("level", torch.ops.clipsteer_cpp.isa_level() >= 0)
"""


@needs_library
def test_a_second_copy_of_the_library_is_refused_with_a_message(interpreter: Forks, tmp_path: Path) -> None:
    copy = shutil.copy(LIBRARY, tmp_path / "copy.so")
    codes, written = interpreter.run(SECOND, LIBRARY, copy)
    assert codes == [0], written
    assert "refusal: None" in written
    assert "refusal: b'another copy of this library defines torch.ops.clipsteer_cpp in this process" in written
    assert "clipsteer: another copy of this library defines torch.ops.clipsteer_cpp" in written  # to stderr
    assert "level True" in written


NAMES_TAKEN = """
import sys, torch
torch.ops.load_library(sys.argv[1])
others = [torch.library.Library(space, "DEF") for space in ("clipsteer_triton", "clipsteer")]
from clipsteer import ops
from clipsteer.ops import _dispatch
print(*(s.reason for s in _dispatch.status()), sep="\\n")
acts, indices = ops.topk_encode(torch.eye(4), torch.eye(4), k=1)
assert indices.flatten().tolist() == [0, 1, 2, 3]
try:
    ops.load()
except RuntimeError as error:
    print(error)
"""


@needs_library
def test_a_package_whose_names_are_taken_says_so_and_works(interpreter: Forks, tmp_path: Path) -> None:
    copy = shutil.copy(LIBRARY, tmp_path / "copy.so")
    codes, written = interpreter.run(NAMES_TAKEN, copy)
    assert codes == [0], written
    assert "_C.so: another copy of this library defines torch.ops.clipsteer_cpp" in written
    for space in ("clipsteer", "clipsteer_triton"):
        assert f"another copy of clipsteer defines torch.ops.{space} in this process" in written


def test_one_constant_names_every_namespace() -> None:
    assert set(NAMESPACES) == {*ops.BACKENDS, "portable"}
    assert {name for name in NAMESPACES.values() if not name.startswith("clipsteer")} == set()
