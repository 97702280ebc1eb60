"""``clipsteer env``, ``validate`` and ``bench``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from clipsteer.cli.arguments import _text, whole

DTYPES = ("float32", "float64", "bfloat16", "float16")
BACKENDS = ("reference", "cpp", "triton", "cuda")


def add_parser(commands: Any, add: Any) -> None:
    """Add the commands; ``add(parent, name, function, summary, examples, options)`` makes one."""
    add(
        commands,
        "env",
        _env,
        "show versions and which backends run here, and why others do not",
        """
examples:
  clipsteer env
  clipsteer env --json > env.json
""",
        _env_options,
    )
    add(
        commands,
        "validate",
        _validate,
        "prove the ops against their error bounds on this machine",
        """
examples:
  everything that can run here (Triton kernels in its interpreter where there is no GPU):
    clipsteer validate
  one backend, more cases:
    clipsteer validate --backends cpp --dtypes float32 bfloat16 --cases 500

exit code 1 when a row is red
""",
        _validate_options,
    )
    add(
        commands,
        "bench",
        _bench,
        "time the ops against torch on this machine",
        """
examples:
  clipsteer bench --out bench.json
  clipsteer bench --ops topk_encode --shape B=256,d=768,n=49152,k=32
  clipsteer bench --ops semantic_drift --compare bench.json
  clipsteer bench --markdown bench.json sae_step.json
""",
        _bench_options,
    )


def _env_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--json", action="store_true", help="as JSON")


def _validate_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--ops", nargs="+", metavar="OP", help="(default: all)")
    p.add_argument("--backends", nargs="+", choices=BACKENDS, help="(default: all)")
    p.add_argument("--dtypes", nargs="+", choices=DTYPES, help="(default: all)")
    p.add_argument(
        "--cases",
        type=whole,
        default=40,
        metavar="N",
        help="per op, backend and dtype (default: 40)",
    )
    p.add_argument("--seed", type=whole, default=0, help="of the drawn cases (default: 0)")
    p.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="(default: a GPU for triton and cuda, if there is one)",
    )
    p.add_argument(
        "--interpret",
        action=argparse.BooleanOptionalAction,
        help="run Triton kernels in its interpreter (default: where there is no GPU)",
    )


def _bench_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--ops", nargs="+", metavar="OP", help="(default: all)")
    p.add_argument("--backends", nargs="+", choices=BACKENDS, help="(default: all that run)")
    p.add_argument(
        "--shape", type=_shape, metavar="B=…,d=…", help="instead of the op's benchmark shapes"
    )
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="(default: float32)")
    p.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda if there is one)")
    p.add_argument(
        "--repeats", type=whole, default=7, metavar="N", help="timings of each (default: 7)"
    )
    p.add_argument("--out", type=Path, metavar="FILE", help="write .json or .csv as well")
    p.add_argument(
        "--compare",
        type=Path,
        metavar="OLD.json",
        help="say what changed beyond noise; 1 if slower",
    )
    p.add_argument(
        "--markdown",
        type=Path,
        nargs="+",
        metavar="FILE.json",
        help="print a table of earlier runs instead",
    )
    p.add_argument(
        "--into",
        type=Path,
        metavar="FILE.md",
        help="with --markdown: put it between the marks in a file",
    )


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
    from clipsteer import _version
    from clipsteer.ops import _dispatch
    from clipsteer.testing import bench

    threads = torch.get_num_threads()
    code = "not built"
    if _dispatch.missing("cpp") is None:
        code = ("portable", "AVX2", "AVX-512", "AVX-512 and AMX")[
            torch.ops.clipsteer_cpp.isa_level()
        ]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    packages = ("triton", "open_clip_torch", "torchvision", "numpy", "safetensors")
    return {
        "clipsteer": clipsteer.__version__,
        "installed": _version.installed(),
        "compiled": _version.natives(),
        "left out": _version.build()["left_out"],
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        **{name: _version_of(name) for name in packages},
        "cpu": f"{bench.chip()}, {torch.backends.cpu.get_cpu_capability()}, {threads} threads",
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
    for name, value in facts.items():
        if name == "backends":
            continue
        if isinstance(value, dict):
            value = [f"{key}: {what}" for key, what in value.items()] or ["nothing"]
        for line in value if isinstance(value, list) else [value]:
            _text(f"{name:<16} {line}")
    _text("", "backends")
    for row in facts["backends"]:
        usable = "usable" if row["usable"] else "not usable"
        _text(f"  {row['backend']:<12} {usable:<12} {row['reason']}".rstrip())
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
        return {name.strip(): whole(value) for name, value in pairs}
    except (ValueError, argparse.ArgumentTypeError):
        example = "B=256,d=768,n=49152,k=32"
        raise argparse.ArgumentTypeError(
            f"expected NAME=SIZE,… such as {example}, got {text!r}"
        ) from None
