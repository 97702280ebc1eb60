"""``clipsteer prove``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from clipsteer.cli.arguments import _text, whole
from clipsteer.cli.ops import DTYPES, _dtype


def add_parser(commands: Any, add: Any) -> None:
    """Add the command; ``add(parent, name, function, summary, examples, options)`` makes it."""
    add(
        commands,
        "prove",
        _prove,
        "hold a fast function to a plain torch definition, gradients included",
        """
examples:
  kernels.py has fast_softmax, softmax(x) in plain torch, and
  cases = clipsteer.testing.Cases({"x": "B d"}):
    clipsteer prove kernels:fast_softmax kernels:softmax --inputs kernels:cases
  on a GPU, in two dtypes, with a report as JSON:
    clipsteer prove kernels:fast kernels:plain --inputs kernels:cases --device cuda \\
        --dtypes float32 bfloat16 --json report.json

exit code 1 when a property is red
""",
        _options,
    )


def _options(p: argparse.ArgumentParser) -> None:
    p.add_argument("fast", metavar="MODULE:FAST", help="the function to be proved")
    p.add_argument("reference", metavar="MODULE:REFERENCE", help="its definition in plain torch")
    p.add_argument(
        "--inputs",
        required=True,
        metavar="MODULE:CASES",
        help="a testing.Cases, or a function of (generator, scale, exact)",
    )
    p.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=["float32"], help="(default: float32)"
    )
    p.add_argument(
        "--cases",
        type=whole,
        default=100,
        metavar="N",
        help="per property and dtype (default: 100)",
    )
    p.add_argument("--seed", type=whole, default=0, help="of the drawn cases (default: 0)")
    p.add_argument("--device", default="cpu", help="where FAST runs (default: cpu)")
    p.add_argument(
        "--gradients",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare gradients too (default)",
    )
    p.add_argument(
        "--fused",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="nothing between is rounded to a half (default); --no-fused: every operation is",
    )
    p.add_argument(
        "--products",
        choices=("exact", "tf32", "bfloat16"),
        default="exact",
        help="what operands of products may be rounded to (default: exact)",
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")


def _named(text: str) -> Any:
    """What ``module:name`` stands for; modules of the working directory are found too."""
    module, colon, name = text.partition(":")
    if not colon or not module or not name:
        raise ValueError(f"expected MODULE:NAME, got {text!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        raise ValueError(f"there is no module {module!r} here or installed") from None
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"module {module!r} has no {name!r}")
        found = getattr(found, part)
    return found


def _prove(args: argparse.Namespace) -> int:
    from clipsteer import testing
    from clipsteer.io.files import write_json

    report = testing.prove(
        _named(args.fast),
        _named(args.reference),
        _named(args.inputs),
        dtypes=[_dtype(name) for name in args.dtypes],
        cases=args.cases,
        seed=args.seed,
        device=args.device,
        gradients=args.gradients,
        arithmetic=partial(testing.Arithmetic.of, fused=args.fused, products=args.products),
    )
    _text(str(report))
    if args.json is not None:
        write_json(args.json, report.to_json())
    return 0 if report else 1
