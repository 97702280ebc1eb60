"""The portable C++ on machines that are not here: compiled with clang, and run as aarch64 code.

    apt-get install clang g++-aarch64-linux-gnu qemu-user
    python .ci/elsewhere.py FOLDER

What lacks its tools is skipped with a word. For aarch64: the wheel is cross-compiled, Debian's
Python and torch's aarch64 build are fetched into FOLDER (200 MB; nothing is installed), and under
qemu ``clipsteer validate`` holds the C++ library to its bounds. On small integers, where sums are
exact, it must also give the bits of this machine's portable code.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from wheels import CASES, OLDEST, ROOT, output, torch_folder

SYSTEM = """
    libbz2-1.0 libc6 libcrypt1 libexpat1 libffi8 libgcc-s1 libgomp1 liblzma5 libpython3.11-minimal
    libpython3.11-stdlib libsqlite3-0 libssl3 libstdc++6 libuuid1 python3.11-minimal zlib1g
"""
PACKAGES = f"""
    torch=={OLDEST} numpy safetensors tqdm jinja2 markupsafe filelock typing_extensions sympy mpmath
    networkx fsspec
"""
CROSS = "aarch64-linux-gnu-g++"


def absent(*tools: str) -> bool:
    """Whether a tool is not here, which is said."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        print(f"skipped: no {', '.join(missing)} here")
    return bool(missing)


def clang() -> None:
    """macOS's compiler takes every source: the portable code, and this machine's."""
    flags = ["-std=c++20", "-fsyntax-only", "-isystem", torch_folder() / "include"]
    flags.append("-DTORCH_TARGET_VERSION=0x020a000000000000")
    sources = [*sorted((ROOT / "csrc/cpu").rglob("*.cpp")), ROOT / "csrc/system.cpp"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for portable in ("-DCLIPSTEER_PORTABLE", "-UCLIPSTEER_PORTABLE"):
            jobs = [["clang++", *flags, portable, source] for source in sources]
            list(pool.map(output, jobs))
    print(f"{output(['clang++', '--version']).splitlines()[0]}: {len(sources)} sources")


def system(folder: Path) -> Path:
    """Debian's Python for aarch64, unpacked, from where this machine's apt fetches."""
    root = folder / "system"
    for name in ("apt/lists/partial", "apt/cache/archives/partial", "debs", "system"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "apt/status").touch()
    options = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "Dir::State": folder / "apt",
        "Dir::State::lists": folder / "apt/lists",
        "Dir::State::status": folder / "apt/status",
        "Dir::Cache": folder / "apt/cache",
    }
    apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items())]
    output([*apt, "update"])
    output([*apt, "download", *SYSTEM.split()], cwd=folder / "debs")
    for package in (folder / "debs").glob("*.deb"):
        output(["dpkg-deb", "-x", package, root])
    return root


def wheel(folder: Path) -> Path:
    """For aarch64 Linux, compiled here."""
    building = {**os.environ, "CXX": CROSS, "CLIPSTEER_BUILD_CUDA": "0"}
    building["_PYTHON_HOST_PLATFORM"] = "linux-aarch64"
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT]
    output(build, env=building)
    (made,) = folder.glob("*aarch64.whl")
    print(made.name, flush=True)
    return made


def packages(folder: Path, made: Path) -> Path:
    """What a wheel needs there, and what it holds."""
    target = folder / "packages"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target]
    pip += ["--only-binary=:all:", "--python-version=3.11"]
    pip += [f"--platform=manylinux_2_{glibc}_aarch64" for glibc in (28, 27, 17)]
    output([*pip, "--platform=manylinux2014_aarch64", *PACKAGES.split()])
    with zipfile.ZipFile(made) as archive:
        archive.extractall(target)
    return target


def prove(folder: Path, root: Path, installed: Path) -> None:
    """All ops of the wheel, under qemu."""
    there = {**os.environ, "PYTHONPATH": str(installed)}
    python = ["qemu-aarch64", "-L", root, root / "usr/bin/python3.11"]

    def told(*command: Any) -> str:
        # away from the tree, whose own package is not to be found
        return output([*python, *command], env=there, cwd=folder)

    print(told("-m", "clipsteer", "env"), flush=True)
    table = told("-m", "clipsteer", "validate", "--backends", "cpp", "--cases", CASES)
    print(table, flush=True)
    bits = [ROOT / ".ci/wheels.py", "--bits", "exact"]
    theirs = json.loads(told(*bits))
    portable = {**os.environ, "CLIPSTEER_CPU_ISA": "portable"}
    ours = json.loads(output([sys.executable, *bits], env=portable))
    assert ours.keys() == theirs.keys()
    other = [name for name in ours if ours[name] != theirs[name]]
    assert not other, f"{len(other)} of {len(ours)} differ: {other[:20]}"
    print(f"{len(ours)} inputs, outputs and gradients: the same bits on both processors")


if __name__ == "__main__":
    place = Path(sys.argv[1]).resolve()
    place.mkdir(parents=True, exist_ok=True)
    if not absent("clang++"):
        clang()
    if not absent(CROSS, "qemu-aarch64", "apt-get"):
        made = wheel(place)
        prove(place, system(place), packages(place, made))
