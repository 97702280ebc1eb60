"""Builds the optional native libraries: C++ for the CPU (clipsteer/_C.so) and CUDA C++
(clipsteer/_C_cuda.so).

Everything else is in pyproject.toml. Neither library uses Python's C API: they register operators
through LibTorch's stable ABI and are opened with torch.ops.load_library, so one binary serves every
Python and every torch >= 2.10. A build that cannot be done is a warning, never an error: clipsteer
works without, on its other backends.

CLIPSTEER_BUILD_CPP=0 leaves the C++ out. CLIPSTEER_BUILD_CUDA=0 leaves CUDA out, =1 wants it though
torch has no CUDA.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10


def find_torch() -> Path:
    """The folder of the installed torch, found without importing it."""
    # Build isolation hides the environment from sys.path, not from sysconfig: the interpreter is
    # the environment's.
    for folder in (*sys.path, sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]):
        torch = Path(folder or ".") / "torch"
        if (torch / "include/torch/csrc/stable/library.h").is_file():
            return torch.resolve()
    raise RuntimeError(
        "torch >= 2.10 is not installed here (install it first, then clipsteer again)"
    )


def check_torch(torch: Path) -> None:
    header = (torch / "include/torch/headeronly/version.h").read_text()
    major, minor = (
        int(re.search(rf"#define TORCH_VERSION_{part} (\d+)", header)[1])
        for part in ("MAJOR", "MINOR")
    )
    if (major, minor) < (2, 10):
        raise RuntimeError(f"torch {major}.{minor} is older than 2.10")


def torch_has_cuda(torch: Path) -> bool:
    return bool(re.search(r"^cuda\b.*=\s*['\"]", (torch / "version.py").read_text(), re.MULTILINE))


def run(command: list[str]) -> None:
    print(shlex.join(command), flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.stdout:
        print(done.stdout, flush=True)
    if done.returncode:
        first_error = next(
            (line for line in done.stdout.splitlines() if "error" in line), "no message"
        )
        raise RuntimeError(
            f"{command[0]} failed with status {done.returncode}: {first_error.strip()}"
        )


def compile_all(sources: list[Path], compiler: list[str], folder: Path) -> list[str]:
    objects = [str(folder / f"{number}-{source.name}.o") for number, source in enumerate(sources)]
    with ThreadPoolExecutor(max(1, min(len(sources), os.cpu_count() or 1))) as pool:
        for job in [
            pool.submit(run, [*compiler, "-c", str(s), "-o", o]) for s, o in zip(sources, objects)
        ]:
            job.result()
    return objects


def link_flags(torch: Path) -> list[str]:
    # The name of the library alone is recorded: the process that loads us has torch's own copy open
    # already.
    if sys.platform == "darwin":
        return ["-undefined", "dynamic_lookup"]
    return [f"-L{torch / 'lib'}", "-Wl,--as-needed", "-ltorch_cpu"]


def build_cpp(torch: Path, sources: list[Path], target: Path, folder: Path) -> None:
    command = shlex.split(os.environ.get("CXX", "")) or [
        shutil.which("c++") or shutil.which("g++") or ""
    ]
    if not command[0]:
        raise RuntimeError("no C++ compiler was found (install g++ or clang++, or set CXX)")
    # No -march=native: the code for AVX2 and AVX-512 is chosen when it runs.
    flags = [
        "-std=c++20",
        "-O3",
        "-fPIC",
        "-ffp-contract=fast",
        "-fno-math-errno",
        "-fvisibility=hidden",
        "-DNDEBUG",
    ]
    flags += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", "-isystem", str(torch / "include")]
    # Error messages name source files; they need not name this machine's folders.
    flags += [f"-ffile-prefix-map={ROOT}/=", f"-ffile-prefix-map={torch / 'include'}/="]
    flags += shlex.split(os.environ.get("CXXFLAGS", ""))
    objects = compile_all(sources, [*command, *flags], folder)
    run([*command, "-shared", *objects, "-o", str(target), *link_flags(torch)])


def build_cuda(torch: Path, sources: list[Path], target: Path, folder: Path) -> None:
    wanted = os.environ.get("CLIPSTEER_BUILD_CUDA", "auto") == "1"
    if not wanted and not torch_has_cuda(torch):
        raise RuntimeError("the installed torch has no CUDA")
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if not nvcc:
        raise RuntimeError("nvcc was not found (install the CUDA toolkit, or set CUDA_HOME)")
    names = f"-ffile-prefix-map={ROOT}/=,-ffile-prefix-map={torch / 'include'}/="
    host = f"-fPIC,-fvisibility=hidden,{names}"
    flags = ["-std=c++20", "-O3", "-Xcompiler", host, "-lineinfo", "-DUSE_CUDA", "--threads=0"]
    flags += ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a"]
    # Other devices compile this one when they first load it.
    flags += ["-gencode=arch=compute_80,code=compute_80"]
    flags += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", "-isystem", str(torch / "include")]
    objects = compile_all(sources, [nvcc, *flags], folder)
    # The CUDA runtime is linked in and nothing else of CUDA; torch's libraries are open already, as
    # for C++.
    torch_libraries = [
        f"-l{name}"
        for name in ("torch_cpu", "torch_cuda")
        if (torch / f"lib/lib{name}.so").exists()
    ]
    as_needed = ["-Xlinker", "--as-needed", f"-L{torch / 'lib'}", *torch_libraries]
    run([nvcc, "-shared", "-cudart=static", *objects, "-o", str(target), *as_needed])


LIBRARIES = {
    "clipsteer._C": ("cpu/**/*.cpp", build_cpp, "CPP"),
    "clipsteer._C_cuda": ("cuda/**/*.cu", build_cuda, "CUDA"),
}


class BuildNative(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        pattern, build, switch = LIBRARIES[ext.name]
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            if os.environ.get(f"CLIPSTEER_BUILD_{switch}") == "0":
                raise RuntimeError(f"CLIPSTEER_BUILD_{switch}=0")
            torch = find_torch()
            check_torch(torch)
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory() as folder:
                built = Path(folder) / target.name
                build(torch, sorted((ROOT / "csrc").glob(pattern)), built, Path(folder))
                # Replaced in one step: the old library may be open in a running process.
                shutil.copy(built, target.with_suffix(".tmp"))
                target.with_suffix(".tmp").replace(target)
        except Exception as error:
            target.unlink(missing_ok=True)  # an old library would not match the new Python code
            self.warn(f"{target.name} was not built: {error}. clipsteer is installed without it.")

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        for built, in_place in self.get_output_mapping().items():
            if not Path(built).exists():
                Path(in_place).unlink(missing_ok=True)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


class PlatformWheel(bdist_wheel):
    """py3-none-<platform>: native code, but none of Python's ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            name,
            sources=[str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").glob(pattern))],
            depends=[str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.*h"))],
            optional=True,
        )
        for name, (pattern, _, _) in LIBRARIES.items()
        if any((ROOT / "csrc").glob(pattern))
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
