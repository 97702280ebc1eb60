"""The wheel as its users have it: made from the sdist, audited, and run where no compiler is.

    pip install '.[release]'
    python .ci/wheels.py FOLDER [FETCHED]
    python .ci/wheels.py --fetch FETCHED

In FOLDER: the sdist and the wheel. The wheel has to be named after the oldest systems that have all
it calls, to link to no library but torch's, to hold the very library that the source tree's build
made, to pass ``clipsteer validate`` with the oldest torch it serves and with this one, and to give
the same bits with both. That torch is a gigabyte: --fetch puts it into FETCHED, before all that the
rest needs is installed, and beside that.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OLDEST = "2.10.0"
# What its import cannot do without; the rest of CUDA, three gigabytes, has stand-ins.
OLDEST_CUDA = ("nvidia-cuda-runtime-cu12==12.8.90", "nvidia-cuda-cupti-cu12==12.8.90")
# Of each op, backend and dtype, beside the edge cases. The wheel holds the library that the tests
# prove; here it is asked whether it is whole where it lies, under either torch.
CASES = 2
TORCH_LIBRARIES = {"libtorch_cpu.so", "libtorch_cuda.so"}

# what a user does first, away from the tree
FIRST_STEPS = """
import torch, clipsteer, clipsteer.kernels
from importlib.resources import files
from clipsteer import clip, ops, report
assert "away" in clipsteer.__file__ and "away" in clipsteer.kernels.__file__, clipsteer.__file__
assert files("clipsteer.browse").joinpath("site", "index.html").is_file()
acts, indices = ops.topk_encode(torch.randn(8, 16), torch.randn(64, 16), k=4)
print(clip.load("emojiclip").name)
report.Page("From the wheel").write("page.html")
"""


def output(command: Iterable[Any], **options: Any) -> str:
    """What a program printed; what it complained of goes on."""
    arguments = [str(part) for part in command]
    return subprocess.run(
        arguments, stdout=subprocess.PIPE, text=True, check=True, **options
    ).stdout


def torch_folder() -> Path:
    """This environment's torch, found without importing it."""
    found = importlib.util.find_spec("torch")
    assert found is not None, "torch is not installed here"
    assert found.origin is not None
    return Path(found.origin).parent


def tried_here() -> bool:
    """Whether the oldest torch is tried: it has builds for it, and there is a compiler."""
    here = (sys.platform, platform.machine()) == ("linux", "x86_64")
    return here and shutil.which("cc") is not None


def make(folder: Path) -> Path:
    """The sdist, and from it the wheel: their names say what they are for."""
    start = time.monotonic()
    log = output([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT])
    sdist, wheel = next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))
    for line in re.findall(r".*was not built.*", log):
        print(line)
    for file in (sdist, wheel):
        print(f"{file.name}: {file.stat().st_size / 2**20:.2f} MiB")
    print(f"made in {time.monotonic() - start:.0f} s")
    return wheel


def audit(wheel: Path) -> None:
    """The tag says what auditwheel finds, and only torch's libraries are looked for elsewhere."""
    system = wheel.stem.split("-")[-1]
    if not system.startswith("manylinux"):
        print(f"not audited: {system} promises no other system")
        return
    told = json.loads(output([sys.executable, "-m", "auditwheel", "show", "--json", wheel]))
    assert told["sym_tag"] == system, (told["sym_tag"], system, told["versioned_symbols"])
    assert set(told["external_libs"]) <= TORCH_LIBRARIES, told["external_libs"]
    print(f"auditwheel: {told['sym_tag']}, links to {sorted(told['external_libs'])}")


def same_library(wheel: Path) -> None:
    """The wheel's C++ library is the source build's, byte for byte, so it is as fast."""
    with zipfile.ZipFile(wheel) as archive:
        for name in (name for name in archive.namelist() if name.endswith(".so")):
            print(f"{name}: {archive.getinfo(name).file_size / 2**20:.2f} MiB")
        held = archive.read("clipsteer/_C.so")
    # nvcc writes names of its own temporary files into a library, so no two of its builds are alike
    assert held == (ROOT / "clipsteer/_C.so").read_bytes(), "not what the source build made"


def symbols(files: Iterable[Path], which: str) -> set[tuple[str, str]]:
    """The names that libraries have, or cannot do without, and their versions."""
    listed = (output(["nm", "-D", "--format=posix", which, file]).splitlines() for file in files)
    entries = (line.split()[:2] for lines in listed for line in lines)
    names = (name.partition("@") for name, kind in entries if kind != "w")
    return {(name, version.lstrip("@")) for name, _, version in names if name.isidentifier()}


def oldest_torch(folder: Path) -> Path:
    """The oldest torch that the wheel serves, without the libraries that only a GPU needs.

    Its builds are for CUDA, and four gigabytes. In place of what a CPU never calls are libraries of
    the same names, whose functions end the process.
    """
    start = time.monotonic()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-cache-dir"]
    # most of its modules are never imported here, so pip need not compile them
    output([*pip, "--no-compile", "--target", folder, f"torch=={OLDEST}", *OLDEST_CUDA])
    own = sorted((folder / "torch/lib").glob("lib*.so*"))
    there = [*own, *folder.glob("nvidia/*/lib/*.so*")]
    dynamic = "".join(output(["readelf", "--dynamic", "--version-info", file]) for file in own)
    needed = set(re.findall(r"NEEDED.*\[(lib(?:cu|nv|nccl)[^\]]*)\]", dynamic))
    of_file = re.findall(r"File: (\S+) .*\n((?:.*  Name: .*\n)+)", dynamic)
    asked = symbols(own, "--undefined-only") - symbols(there, "--defined-only")
    for library in sorted(needed - {file.name for file in there} - {"libcuda.so.1"}):
        names = " ".join(text for file, text in of_file if file == library)
        versions = set(re.findall(r"Name: (\S+)", names))
        mine = {(n, v) for n, v in asked if v in versions or (not v and re.match("cu|nv|nccl", n))}
        source, script = folder / "stand_in.c", folder / "stand_in.map"
        source.write_text("".join(f"void {n}(void) {{ __builtin_trap(); }}\n" for n, _ in mine))
        nodes = {v: "".join(f"{n};" for n, of in mine if of == v) for v in versions}
        script.write_text(
            "".join(f"{v} {{ global: {held or '_;'} }};\n" for v, held in nodes.items())
        )
        link = ["cc", "-w", "-shared", "-fPIC", source, "-o", folder / "torch/lib" / library]
        output(
            [*link, f"-Wl,-soname,{library}", *([f"-Wl,--version-script={script}"] * bool(nodes))]
        )
    print(f"torch {OLDEST} fetched in {time.monotonic() - start:.0f} s")
    return folder


class Away:
    """An environment that has the wheel, this torch or another, and no program on its PATH but its
    own."""

    def __init__(self, folder: Path, wheel: Path, *torch: Path) -> None:
        output([sys.executable, "-m", "venv", folder])
        output([folder / "bin/python", "-m", "pip", "install", "--quiet", "--no-deps", wheel])
        # the rest of what the wheel needs is this environment's; an editable clipsteer is not seen
        paths = [str(path) for path in (*torch, torch_folder().parent)]
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith("CLIPSTEER")
        }
        self.environment = {
            **kept,
            "PATH": str(folder / "bin"),
            "PYTHONPATH": os.pathsep.join(paths),
            # two of these run at once, and threads that wait for each other would keep cores busy
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
        }
        self.folder = folder

    def run(self, *command: Any) -> str:
        start = time.monotonic()
        text = output([self.folder / "bin/python", *command], cwd=self.folder, env=self.environment)
        words = " ".join(map(str, command[:3]))[:60]
        print(f"  {self.folder.name} {words!r}: {time.monotonic() - start:.1f} s", flush=True)
        return text

    def check(self) -> dict[str, str]:
        """What this torch makes of the wheel: everything is proven, and the bits are returned."""
        facts = json.loads(self.run("-m", "clipsteer", "env", "--json"))
        print(f"torch {facts['torch']}, {facts['installed']}, {facts['C++ code path']}")
        assert facts["installed"].startswith("wheel py3-none-"), facts["installed"]
        usable = {row["backend"]: row for row in facts["backends"]}
        assert usable["cpp"]["usable"], usable["cpp"]
        table = self.run("-m", "clipsteer", "validate", "--backends", "cpp", "--cases", CASES)
        assert "pass" in table, table
        return json.loads(self.run(__file__, "--bits"))


def digest(tensors: Iterable[Any]) -> str:
    """Of the bytes of tensors."""
    import torch

    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def bits(exact: bool) -> dict[str, str]:
    """Digests of every op's inputs, outputs and gradients, from the C++ library on edge cases.

    ``exact``: on small integers, and only of ops whose sums are then exact.
    """
    from functools import partial

    import torch

    from clipsteer.ops import REGISTRY
    from clipsteer.ops._spec import cotangents, run

    found = {}
    specs = [spec for spec in REGISTRY.values() if spec.exact or not exact]
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for spec, dtype in itertools.product(specs, dtypes):
        for number, shape in enumerate(spec.shapes[:4]):
            generator = torch.Generator().manual_seed(number)
            inputs = spec.make(shape, dtype, generator, exact=exact)
            given = partial(cotangents, dtype=dtype, generator=generator, exact=exact)
            ran = run(partial(spec.function, backend="cpp"), inputs, spec.leaves(inputs), given)
            tensors = {
                "inputs": [v for v in inputs.values() if isinstance(v, torch.Tensor)],
                **{f"d {key}": [value] for key, value in ran.gradients.items()},
                **{key: [value] for key, value in zip(spec.outputs, ran.outputs)},
            }
            where = f"{spec.name} {str(dtype).removeprefix('torch.')} case {number}"
            for key, value in tensors.items():
                if key not in spec.torch_sums:  # torch's own products may change with torch
                    found[f"{where}: {key}"] = digest(value)
    return found


def main(folder: Path, fetched: Path | None) -> None:
    """Make the wheel, and all that the head of this file promises of it."""
    with ThreadPoolExecutor() as pool:
        # waits for a network, and unpacks on one core
        fetch = None if fetched or not tried_here() else pool.submit(oldest_torch, folder / "torch")
        wheel = make(folder)
        newest = Away(folder / "away", wheel)
        print(newest.run("-c", FIRST_STEPS).strip())
        if wheel.stem.endswith("-any"):
            compiler = shutil.which("c++") or shutil.which("g++")
            assert compiler is None, f"{compiler} is here, and the library was not built"
            print("no compiler is here: nothing else to prove")
            return
        audit(wheel)
        same_library(wheel)
        told = pool.submit(newest.check)
        if not tried_here():
            told.result()
            print(f"torch {OLDEST} is not tried here")
            return
        oldest = Away(folder / "away-oldest", wheel, fetched or fetch.result())
        told_by_oldest, told = oldest.check(), told.result()
    assert told.keys() == told_by_oldest.keys()
    other = [name for name in told if told[name] != told_by_oldest[name]]
    assert not other, f"{len(other)} of {len(told)} differ: {other[:20]}"
    print(f"{len(told)} inputs, outputs and gradients: the same bits with both")


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    if command == "--bits":
        print(json.dumps(bits(exact="exact" in rest)))
    elif command == "--fetch":
        if tried_here():
            oldest_torch(Path(rest[0]).resolve())
    else:
        main(Path(command).resolve(), Path(rest[0]).resolve() if rest else None)
