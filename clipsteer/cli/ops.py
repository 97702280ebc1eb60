"""``clipsteer env``, ``validate`` and ``bench``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from clipsteer.cli.arguments import _text

DTYPES = ("float32", "float64", "bfloat16", "float16")


BACKENDS = ("reference", "cpp", "triton", "cuda")


def _dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)


def _version_of(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def environment() -> dict[str, Any]:
    """What ``clipsteer env`` shows, as plain data."""
    import platform

    import torch

    import clipsteer
    from clipsteer.ops import _dispatch
    from clipsteer.testing import bench

    code = "not built"
    if _dispatch.missing("cpp") is None:
        code = ("portable", "AVX2", "AVX-512", "AVX-512 and AMX")[
            torch.ops.clipsteer_cpp.isa_level()
        ]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    packages = ("triton", "open_clip_torch", "torchvision", "numpy", "safetensors")
    return {
        "clipsteer": clipsteer.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        **{name: _version_of(name) for name in packages},
        "cpu": f"{bench.chip()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "C++ code path": code,
        "gpu": ", ".join(gpus) or "none visible to torch",
        "backends": [
            {"backend": s.backend, "usable": s.usable, "reason": s.reason}
            for s in _dispatch.status()
        ],
    }


def _env(args: argparse.Namespace) -> int:
    facts = environment()
    if args.json:
        _text(json.dumps(facts, indent=2))
        return 0
    _text(
        *(f"{name:<16} {value}" for name, value in facts.items() if name != "backends"),
        "",
        "backends",
    )
    for row in facts["backends"]:
        _text(
            f"  {row['backend']:<12} {'usable' if row['usable'] else 'not usable':<12} {row['reason']}".rstrip()
        )
    return 0


def _interpreter(wanted: bool | None) -> None:
    """Turn Triton's interpreter on before triton is imported: by default wherever there is no
    GPU."""
    from importlib.util import find_spec

    import torch

    if wanted is None:
        wanted = not torch.cuda.is_available() and find_spec("triton") is not None
    if wanted:
        os.environ.setdefault("TRITON_INTERPRET", "1")


def _validate(args: argparse.Namespace) -> int:
    if args.backends is None or "triton" in args.backends:
        _interpreter(args.interpret)
    from clipsteer import testing

    dtypes = [_dtype(name) for name in args.dtypes] if args.dtypes else None
    rows = testing.validate(
        args.ops, args.backends, dtypes, cases=args.cases, seed=args.seed, device=args.device
    )
    _text(testing.table(rows))
    if not any(row.verdict == "pass" for row in rows):
        sys.stderr.write("clipsteer: nothing was validated\n")
        return 1
    return int(any(row.verdict != "pass" and not row.verdict.startswith("skipped") for row in rows))


def _bench(args: argparse.Namespace) -> int:
    if args.markdown:
        from clipsteer.testing.table import markdown, put

        table = markdown(args.markdown)
        put(args.into, table) if args.into is not None else _text(table)
        return 0
    import torch

    from clipsteer.testing import bench

    records = bench.run(
        args.ops,
        args.backends,
        shape=args.shape,
        dtype=_dtype(args.dtype),
        device=args.device,
        repeats=args.repeats,
        out=args.out,
    )
    _text(bench.table(records))
    if args.compare is None:
        return 0
    text, slower = bench.compare(
        args.compare, records, args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    )
    _text("", text)
    return int(slower)


def _shape(text: str) -> dict[str, int]:
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {name.strip(): int(value) for name, value in pairs}
    except ValueError:
        example = "B=256,d=768,n=49152,k=32"
        raise argparse.ArgumentTypeError(
            f"expected NAME=SIZE,… such as {example}, got {text!r}"
        ) from None
