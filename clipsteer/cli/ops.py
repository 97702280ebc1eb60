"""``clipsteer env`` and ``validate``."""

from __future__ import annotations

import argparse
import json
import os
import sys
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
