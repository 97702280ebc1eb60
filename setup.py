"""Builds the optional native libraries: C++ for the CPU (clipsteer/_C.so) and CUDA C++
(clipsteer/_C_cuda.so).

Everything else is in pyproject.toml. Neither library uses Python's C API: they register operators
through LibTorch's stable ABI and are opened with torch.ops.load_library, so one binary serves every
Python and every torch >= 2.10. On Linux they call no function that is newer than the systems torch
itself supports, and the wheel's tag says which those are. A build that cannot be done is a warning,
never an error: clipsteer works without, on its other backends, and the package's _build.json, which
`clipsteer env` reads, says what was left out and why.

CLIPSTEER_BUILD_CPP=0 leaves the C++ out. CLIPSTEER_BUILD_CUDA=0 leaves CUDA out, =1 wants it though
torch has no CUDA. CXX and CXXFLAGS name another compiler and more flags.
"""

from __future__ import annotations

import json
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
SYSTEM = ROOT / "csrc/system.cpp"
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10
# What the libraries may ask of a Linux system: manylinux_2_28, as torch's own wheels.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}


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


def torch_version(torch: Path) -> str:
    header = (torch / "include/torch/headeronly/version.h").read_text()
    version = ".".join(
        re.search(rf"#define TORCH_VERSION_{part} (\d+)", header)[1]
        for part in ("MAJOR", "MINOR", "PATCH")
    )
    if numbers(version)[:2] < (2, 10):
        raise RuntimeError(f"torch {version} is older than 2.10")
    return version


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


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def tool(compiler: list[str], name: str) -> str:
    """The binutils that belong to a compiler, which may be one for another machine."""
    asked = [*compiler, f"-print-prog-name={name}"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


def versioned(library: str, readelf: str) -> list[tuple[bool, str, str]]:
    """A library's symbols that have a version: whether it is asked for, its name, the version."""
    listing = [readelf, "--dyn-syms", "--wide", library]
    text = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
    found = re.findall(r" (UND|ABS|\d+) ([^\s@]+)@+(GLIBC_[\d.]+)", text)
    return [(index == "UND", name, version) for index, name, version in found]


def older_names(library: Path, compiler: list[str]) -> dict[str, str]:
    """For functions newer than NEWEST: the older version that the C library still has."""
    readelf = tool(compiler, "readelf")
    newest = NEWEST["GLIBC"]

    def age(version: str) -> tuple[int, ...]:
        return numbers(version.removeprefix("GLIBC_"))

    newer = {
        name for asked, name, v in versioned(str(library), readelf) if asked and age(v) > newest
    }
    older: dict[str, str] = {}
    for part in ("libm.so.6", "libc.so.6") if newer else ():
        where = [*compiler, f"-print-file-name={part}"]
        path = subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip()
        for asked, name, version in versioned(path, readelf):
            if asked or name not in newer or age(version) > newest:
                continue
            if name not in older or age(version) > age(older[name]):
                older[name] = version
    return older


def link(
    command: list[str], compiler: list[str], objects: list[str], target: Path, flags: list[str]
) -> None:
    """Link, for old Linux systems too: where a function has an older version, that one is named."""
    run([*command, "-shared", *objects, "-o", str(target), *flags])
    if sys.platform != "linux":
        return
    try:
        older = older_names(target, compiler)
        renamed = [f"--redefine-sym={name}={name}@{version}" for name, version in older.items()]
        for file in objects if renamed else ():
            run([tool(compiler, "objcopy"), *renamed, file])
    except (OSError, subprocess.CalledProcessError, RuntimeError) as error:
        print(f"the library will want a system as new as this one ({error})", flush=True)
        return
    if renamed:
        run([*command, "-shared", *objects, "-o", str(target), *flags])


def torch_flags(compiler: list[str], names: list[str], folder: Path) -> list[str]:
    """Only the names of torch's libraries are recorded: the process that loads us has torch's own
    open already. So stand-ins of those names do, whichever torch, or machine, this is built for."""
    if sys.platform == "darwin":
        return ["-undefined", "dynamic_lookup"]
    (folder / "empty.cpp").write_text("")
    for name in names:
        stand_in = folder / f"lib{name}.so"
        soname = f"-Wl,-soname,{stand_in.name}"
        run([*compiler, "-shared", str(folder / "empty.cpp"), "-o", str(stand_in), soname])
    return [f"-L{folder}", "-Xlinker", "--no-as-needed", *(f"-l{name}" for name in names)]


def cpp_compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX", "")) or [
        shutil.which("c++") or shutil.which("g++") or ""
    ]
    if not command[0]:
        raise RuntimeError("no C++ compiler was found (install g++ or clang++, or set CXX)")
    return command


def first_line(command: list[str]) -> str:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    lines = done.stdout.strip().splitlines()
    # nvcc's version is in the line before its last
    return next((line for line in lines if line.startswith("Cuda compilation")), lines[0])


def instruction_sets(compiler: list[str], flags: list[str]) -> list[str]:
    """What isa.cpp compiles in, by its own macros."""
    source = str(ROOT / "csrc/cpu/isa/isa.cpp")
    listing = [*compiler, *flags, "-dM", "-E", source]
    macros = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
    names = {
        "CLIPSTEER_X86": ["AVX2", "AVX-512", "AVX-512 VNNI"],
        "CLIPSTEER_BF16": ["AVX-512 BF16"],
        "CLIPSTEER_AMX": ["AMX"],
    }
    found = [names[macro] for macro in names if f"#define {macro} " in macros]
    return ["portable", *(name for some in found for name in some)]


def build_cpp(torch: Path, sources: list[Path], target: Path, folder: Path) -> dict:
    compiler = cpp_compiler()
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
    own = shlex.split(os.environ.get("CXXFLAGS", ""))
    told = [*compiler[1:], *flags, *own]
    flags += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", "-isystem", str(torch / "include")]
    # Error messages name source files; they need not name this machine's folders.
    flags += [f"-ffile-prefix-map={ROOT}/=", f"-ffile-prefix-map={torch / 'include'}/="]
    flags += own
    objects = compile_all([*sources, SYSTEM], [*compiler, *flags], folder)
    link(compiler, compiler, objects, target, torch_flags(compiler, ["torch_cpu"], folder))
    return {
        "compiler": first_line(compiler),
        "flags": shlex.join(told),
        "code": instruction_sets(compiler, flags),
    }


def build_cuda(torch: Path, sources: list[Path], target: Path, folder: Path) -> dict:
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
    objects = compile_all([*sources, SYSTEM], [nvcc, *flags], folder)
    # The CUDA runtime is linked in and nothing else of CUDA; torch's libraries are open already, as
    # for C++.
    plan = subprocess.run([nvcc, "--dryrun", "-shared", "none.o"], capture_output=True, text=True)
    places = [Path(path) / "libcudart_static.a" for path in re.findall(r'-L([^\s"]+)', plan.stderr)]
    runtime = next((path for path in places if path.is_file()), None)
    if runtime is None:
        raise RuntimeError(f"libcudart_static.a is in none of nvcc's folders {places}")
    objects.append(shutil.copy(runtime, folder))
    compiler = cpp_compiler()
    torch_libraries = torch_flags(compiler, ["torch_cpu", "torch_cuda"], folder)
    torch_libraries += ["-lpthread", "-ldl", "-lrt"]
    link([nvcc, "-cudart=none"], compiler, objects, target, torch_libraries)
    return {
        "compiler": first_line([nvcc]),
        "code": [flag.rpartition("=")[2] for flag in flags if flag.startswith("-gencode")],
    }


LIBRARIES = {
    "clipsteer._C": ("cpu/**/*.cpp", build_cpp, "CPP"),
    "clipsteer._C_cuda": ("cuda/**/*.cu", build_cuda, "CUDA"),
}


class BuildNative(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extensions(self) -> None:
        self.facts: dict = {"built": {}, "left_out": {}}
        super().build_extensions()
        facts = Path(self.build_lib) / "clipsteer/_build.json"
        facts.parent.mkdir(parents=True, exist_ok=True)
        facts.write_text(json.dumps(self.facts, indent=2) + "\n")

    def build_extension(self, ext: Extension) -> None:
        pattern, build, switch = LIBRARIES[ext.name]
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            if os.environ.get(f"CLIPSTEER_BUILD_{switch}") == "0":
                raise RuntimeError(f"CLIPSTEER_BUILD_{switch}=0")
            torch = find_torch()
            version = torch_version(torch)
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory() as folder:
                built = Path(folder) / target.name
                sources = sorted((ROOT / "csrc").glob(pattern))
                facts = build(torch, sources, built, Path(folder))
                # Replaced in one step: the old library may be open in a running process.
                shutil.copy(built, target.with_suffix(".tmp"))
                target.with_suffix(".tmp").replace(target)
            self.facts["built"][target.name] = {**facts, "torch": version}
        except Exception as error:
            target.unlink(missing_ok=True)  # an old library would not match the new Python code
            self.facts["left_out"][target.name] = str(error)
            self.warn(f"{target.name} was not built: {error}. clipsteer is installed without it.")

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        shutil.copy(Path(self.build_lib) / "clipsteer/_build.json", ROOT / "clipsteer")
        for built, in_place in self.get_output_mapping().items():
            if not Path(built).exists():
                Path(in_place).unlink(missing_ok=True)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


class PlatformWheel(bdist_wheel):
    """py3-none-<platform>: native code, but none of Python's ABI; py3-none-any where there is no
    native code."""

    def run(self) -> None:
        # what could be built decides the tag
        if not self.skip_build:
            self.run_command("build")
            self.skip_build = True
        if not self.libraries():
            self.root_is_pure = True
            self.distribution.ext_modules = []
        super().run()

    def libraries(self) -> list[Path]:
        folder = Path(self.get_finalized_command("build_ext").build_lib) / "clipsteer"
        return sorted(folder.glob("*.so"))

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        if not self.plat_name_supplied and platform.startswith("linux_"):
            platform = oldest_linux(self.libraries()) + platform.removeprefix("linux")
        return "py3", "none", platform


def oldest_linux(libraries: list[Path]) -> str:
    """The oldest Linux systems that have all that the libraries call, as a wheel's tag names them:
    "linux" when that is not known."""
    needed: dict[str, list[tuple[int, ...]]] = {kind: [] for kind in NEWEST}
    for library in libraries:
        for kind, version in re.findall(
            rb"\0(GLIBC|GLIBCXX|CXXABI)_([\d.]+)", library.read_bytes()
        ):
            needed[kind.decode()].append(numbers(version.decode()))
    if not needed["GLIBC"] or any(max(v, default=()) > NEWEST[k] for k, v in needed.items()):
        return "linux"
    # 2.17 is the oldest that the names of wheels know
    major, minor = max((2, 17), *(version[:2] for version in needed["GLIBC"]))
    return f"manylinux_{major}_{minor}"


setup(
    ext_modules=[
        Extension(
            name,
            sources=[
                str(path.relative_to(ROOT))
                for path in [*sorted((ROOT / "csrc").glob(pattern)), SYSTEM]
            ],
            depends=[str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.*h"))],
            optional=True,
        )
        for name, (pattern, _, _) in LIBRARIES.items()
        if any((ROOT / "csrc").glob(pattern))
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
