"""The ops as a kernel of Hugging Face's hub, from the clipsteer that this Python imports.

    pip install clipsteer-*.whl                  # or a build in place
    python .ci/hub.py FOLDER [--repo OWNER/NAME] [--cuda VERSION]

Writes FOLDER/build/<variant>/, which ``kernels.get_local_kernel(FOLDER)`` loads, with the card and
``build.toml`` that publishing wants, then imports every variant in a process of its own. Names,
versions, schemas and modules are the package's. A variant is ``clipsteer.ops`` and what that
imports: imports are made relative, and the ops get a namespace that no other copy has, in
``ops/_lowlevel.py`` and in the libraries. ``kernels`` counts a torch that was built with CUDA as
CUDA, GPU or not, so that the variants for CUDA have the library for the CPU as well.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import importlib.metadata
import inspect
import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import Any, NamedTuple

import clipsteer
from clipsteer import ops
from clipsteer.ops._lowlevel import LIBRARIES, NAMESPACE, RECORDS

ROOT = Path(__file__).resolve().parent.parent
SETUP = (ROOT / "setup.py").read_text(encoding="utf-8")
NAME = clipsteer.__name__
VERSION = clipsteer.__version__
MAJOR = int(VERSION.split(".")[0])
# the oldest ``kernels`` that this has been tried with, and Python packages beyond torch: none
MINVER = "0.17.2"
DEPENDS: list[str] = []
# the oldest CUDA of each major version that torch with the stable ABI is built with; a variant
# serves that and every later one of the same major version
CUDA = ("12.6", "13.0")
# of the package, all that is published
PARTS = ("ops", "kernels", "_version")
PUBLIC = [name for name in ops.__all__ if name != "REGISTRY"]
# all that may be imported from outside where a module is imported
OUTSIDE = {*sys.stdlib_module_names, "torch", "triton"}
# csrc/registration.h: the field that the library's name stands in
FIELD = re.compile(rb"clipsteer's ops are named:([a-z0-9_]+)(\0+)")

Files = dict[str, bytes]


class Variant(NamedTuple):
    """A folder under ``build``: which torch takes it, and the libraries it has."""

    name: str
    backend: str  # of metadata.json
    tag: str  # what tells its namespace from the other variants'
    libraries: tuple[str, ...]


# ---------------------------------------------------------------- Python


def modules() -> dict[str, Path]:
    """Every module that the ops are made of, by its name, and its file."""
    by_name = [f"{NAME}.ops.{op.stem}" for op in RECORDS]
    by_name += [f"{NAME}.ops.specs.{op.stem}" for op in RECORDS]
    by_name += [f"{NAME}.kernels.{op.stem}" for op in RECORDS if op.kernels]
    waiting = [f"{NAME}.ops", f"{NAME}.ops.specs", f"{NAME}.kernels", *by_name]
    found: dict[str, Path] = {}
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        if module.split(".")[1] not in PARTS:
            raise SystemExit(f"the ops import {module}, and are published without it")
        spec = find_spec(module)
        assert spec is not None
        found[module] = Path(str(spec.origin))
        waiting += imported(module, found[module])
    return found


def imported(module: str, path: Path) -> Iterator[str]:
    """The modules of clipsteer that a module imports."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_bytes())):
        if not isinstance(node, ast.ImportFrom):
            continue
        source = resolve_name("." * node.level + (node.module or ""), package)
        if source.split(".")[0] != NAME:
            continue
        if source != NAME:
            yield source
        spec = find_spec(source)
        if spec is not None and spec.submodule_search_locations is not None:
            inner = (f"{source}.{alias.name}" for alias in node.names)
            yield from (each for each in inner if find_spec(each) is not None)


def relative(source: str, depth: int) -> str:
    """The text with its imports of clipsteer made relative; ``depth``: its package's, from 1."""
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == NAME:
            old = f"from {node.module} import"
            new = f"from {'.' * depth}{str(node.module)[len(NAME) + 1 :]} import"
            line = lines[node.lineno - 1]
            assert line.count(old) == 1, line
            lines[node.lineno - 1] = line.replace(old, new)
    return "".join(lines)


def complaints(path: str, source: str) -> list[str]:
    """What would reach beyond the variant: an installed clipsteer, another package, another
    copy's ops."""
    tree = ast.parse(source)
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    texts = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}  # docstrings
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        for name in names:
            top = name.split(".")[0]
            if top == NAME or (id(node) not in inside and top not in OUTSIDE):
                found.append(f"{path}:{node.lineno} imports {name}")
        text = ""
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            text = node.value
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.ops":
            text = f"{node.attr}::"
        if re.match(rf"{NAME}(\.|_|::)", text):
            found.append(f"{path}:{node.lineno} names {text}")
    return found


def package() -> Files:
    """The Python files of a variant, by their paths in it, under the package's own namespace."""
    files: Files = {}
    for module, path in modules().items():
        parts = module.split(".")[1:]
        is_package = path.name == "__init__.py"
        name = "/".join(parts) + ("/__init__.py" if is_package else ".py")
        depth = len(parts) + is_package
        files[name] = relative(path.read_text(encoding="utf-8"), depth).encode()
    about = importlib.metadata.metadata(NAME)["Summary"]
    listed = "".join(f"    {name},\n" for name in PUBLIC)
    named = "".join(f'    "{name}",\n' for name in PUBLIC)
    files["__init__.py"] = (
        f'"""clipsteer {VERSION}, its ops. {about}.\n\nMade by .ci/hub.py."""\n\n'
        f"from .ops import (\n{listed})\n"
        "from .ops._dispatch import register_portable\n"
        "from .ops._lowlevel import NAMESPACE\n\n"
        f'__version__ = "{VERSION}"\n__all__ = [\n    "NAMESPACE",\n{named}]\n\n'
        "# torch.ops.<NAMESPACE>\nregister_portable()\n"
    ).encode()
    wrong = [what for path, text in files.items() for what in complaints(path, text.decode())]
    if wrong:
        raise SystemExit("\n".join(["what is published stands alone; this does not:", *wrong]))
    return files


# ---------------------------------------------------------------- names


def named(files: Files, name: str) -> Files:
    """The files with their ops under the namespace ``name``."""
    renamed = dict(files)
    for path, content in files.items():
        if path.endswith(".so"):
            renamed[path] = stamped(content, name)
    line = f'NAMESPACE = "{NAMESPACE}"\n'.encode()
    assert files["ops/_lowlevel.py"].count(line) == 1
    new = f'NAMESPACE = "{name}"\n'.encode()
    renamed["ops/_lowlevel.py"] = files["ops/_lowlevel.py"].replace(line, new)
    return renamed


def stamped(library: bytes, name: str) -> bytes:
    """The library with its ops under the namespace ``name``."""
    fields = list(FIELD.finditer(library))
    if len(fields) != 1:
        raise SystemExit(f"the library has {len(fields)} fields for its name; build it anew")
    start, end = fields[0].span(1)[0], fields[0].span(2)[1]
    text = name.encode()
    if len(text) >= end - start:
        raise SystemExit(f"{name!r} is too long for the library, which takes {end - start - 1}")
    return library[:start] + text.ljust(end - start, b"\0") + library[end:]


def unique(variant: Variant, files: Files) -> str:
    """A name that this content alone has: a module's name, and the ops' namespace."""
    digest = hashlib.sha256(variant.name.encode())
    for path in sorted(files):
        digest.update(path.encode() + b"\0" + hashlib.sha256(files[path]).digest())
    return f"{NAME}_{variant.tag}_{digest.hexdigest()[:12]}"


# ---------------------------------------------------------------- metadata


def torch_abi() -> str:
    """The torch whose stable ABI the libraries are built for, ``2.10``."""
    found = re.search(r'TORCH_TARGET_VERSION = "0x(\w\w)(\w\w)', SETUP)
    assert found is not None
    return ".".join(str(int(part, 16)) for part in found.groups())


def cuda_archs() -> list[str]:
    """What ``_C_cuda.so`` is compiled for, as ``kernels`` writes it."""
    found = re.findall(r"arch=compute_(\d+)(\d)([af]?),code=(sm|compute)_", SETUP)
    assert found
    return [f"{a}.{b}{suffix}{'+PTX' * (code == 'compute')}" for a, b, suffix, code in found]


def license_name() -> str:
    """As the package's metadata has it."""
    return importlib.metadata.metadata(NAME)["License-Expression"]


def metadata(variant: Variant, name: str, files: Files) -> dict[str, Any]:
    """What ``metadata.json`` says of a variant."""
    backend: dict[str, Any] = {"type": variant.backend}
    if "_C_cuda.so" in files:
        backend["archs"] = cuda_archs()
    digests = {path: hashlib.sha256(files[path]).digest() for path in sorted(files)}
    return {
        "id": name,
        "name": NAME,
        "version": MAJOR,
        "license": license_name(),
        "python-depends": DEPENDS,
        "kernels-minver": MINVER,
        "backend": backend,
        "digest": {
            "algorithm": "sha256",
            "files": {path: base64.b64encode(raw).decode() for path, raw in digests.items()},
        },
    }


def build_toml(repo: str | None) -> str:
    """What ``kernel-builder`` reads of a kernel that is built already."""
    hub = f'[general.hub]\nrepo-id = "{repo}"\n\n' if repo else ""
    return (
        "# made by .ci/hub.py, which built what lies in build/\n"
        f'[general]\nname = "{NAME}"\nversion = {MAJOR}\nedition = 5\n'
        f'license = "{license_name()}"\nbackends = ["cpu", "cuda"]\n'
        f"python-depends = {json.dumps(DEPENDS)}\n\n{hub}"
        f'[torch]\nsrc = []\nstable-abi = "{torch_abi()}"\n'
    )


def arguments(function: Any) -> inspect.Signature:
    """A call's names and defaults."""
    found = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    return found.replace(parameters=bare, return_annotation=inspect.Signature.empty)


def card(repo: str | None) -> str:
    """The page of the repository: how to load it, the ops and their schemas."""
    calls = [
        f"{n}{arguments(getattr(ops, n))}" for n in PUBLIC if inspect.isfunction(getattr(ops, n))
    ]
    schemas = [
        f"{name}{low.schema}"
        for op in RECORDS
        for name, low in op.low_level.items()
        if not low.cpp_only
    ]
    return "\n".join(
        [
            f"---\nlicense: {license_name().lower()}\nlibrary_name: kernels\ntags: [kernel]\n---",
            f"# clipsteer {VERSION}: its ops\n",
            f"{importlib.metadata.metadata(NAME)['Summary']}.\n",
            "```python\nimport torch\nfrom kernels import get_kernel\n",
            f'ops = get_kernel("{repo or "OWNER/" + NAME}", version={MAJOR}, '
            "trust_remote_code=True)",
            "acts, indices = ops.topk_encode(torch.randn(8, 64), torch.randn(512, 64), k=4)",
            'print(ops.explain("topk_encode"))\n```\n',
            "## Ops\n\n```python",
            *calls,
            "```\n\n## In `torch.ops`\n",
            "`getattr(torch.ops, ops.NAMESPACE)` has, for every device:\n\n```",
            *schemas,
            "```\n",
        ]
    )


# ---------------------------------------------------------------- the layout


def variants(have: set[str], cuda: str | None, system: str, machine: str) -> list[Variant]:
    """The variants that can be made of the libraries there are."""
    found = [Variant("torch-universal", "cuda", "universal", ())]
    if "_C.so" not in have or system != "linux":
        return found
    abi = f"torch-stable-abi{torch_abi().replace('.', '')}"

    def native(tag: str, backend: str, *libraries: str) -> Variant:
        return Variant(f"{abi}-{tag}-{machine}-{system}", backend, tag, libraries)

    found.append(native("cpu", "cpu", "_C.so"))
    for version in sorted({*CUDA, *filter(None, [cuda])}):
        extra = ("_C_cuda.so",) if version == cuda else ()
        found.append(native(f"cu{version.replace('.', '')}", "cuda", "_C.so", *extra))
    return found


def write(folder: Path, repo: str | None = None, cuda: str | None = None) -> dict[str, str]:
    """Write the layout into a new folder. Returns every variant's namespace."""
    own = Path(clipsteer.__file__).parent
    have = {f"{stem}.so" for stem in LIBRARIES.values() if (own / f"{stem}.so").exists()}
    if cuda and "_C_cuda.so" not in have:
        raise SystemExit("--cuda is for _C_cuda.so, which this clipsteer has not")
    if not cuda and "_C_cuda.so" in have:
        raise SystemExit("--cuda: with which CUDA was _C_cuda.so compiled? nvcc --version says it")
    (folder / "build").mkdir(parents=True)
    python = package()
    names = {}
    for variant in variants(have, cuda, platform.system().lower(), platform.machine()):
        plain = {**python, **{name: (own / name).read_bytes() for name in variant.libraries}}
        name = unique(variant, plain)
        files = named(plain, name)
        about = json.dumps(metadata(variant, name, files), indent=2) + "\n"
        for path, content in (*files.items(), ("metadata.json", about.encode())):
            target = folder / "build" / variant.name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        names[variant.name] = name
    (folder / "build/CARD.md").write_text(card(repo), encoding="utf-8")
    (folder / "build.toml").write_text(build_toml(repo), encoding="utf-8")
    shutil.copy(ROOT / "LICENSE", folder)
    return names


ALONE = """
import importlib.util, os, sys
sys.modules["clipsteer"] = None  # an import of it fails
name, file = sys.argv[1:]
spec = importlib.util.spec_from_file_location(name, file)
module = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
status = {s.backend: s for s in module.load()}
for s in status.values():
    print(f"{s.backend:<10} {'usable' if s.usable else s.reason}")
has = os.path.exists(os.path.join(os.path.dirname(file), "_C.so"))
raise SystemExit(0 if status["cpp"].usable == has else "the library is not used")
"""


def main() -> None:
    """What the module's text says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="new")
    parser.add_argument("--repo", metavar="OWNER/NAME", help="on the hub, for the card")
    parser.add_argument("--cuda", metavar="VERSION", help="that compiled _C_cuda.so, as 13.0")
    given = parser.parse_args()
    if given.folder.exists():
        raise SystemExit(f"{given.folder} exists")
    for variant, name in write(given.folder, given.repo, given.cuda).items():
        print(f"== {variant} torch.ops.{name}", flush=True)
        file = given.folder / "build" / variant / "__init__.py"
        subprocess.run([sys.executable, "-c", ALONE, name, file], check=True)


if __name__ == "__main__":
    main()
