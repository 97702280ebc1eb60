"""The command line. Every subcommand imports what it needs when it runs, so that ``--help`` is quick.

Exit codes: 0 done, 1 the work failed or a validation is red, 2 a mistake in the call (also a path that is not there),
130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DTYPES = ("float32", "float64", "bfloat16", "float16")
BACKENDS = ("reference", "cpp", "triton", "cuda")


def _text(*lines: str) -> None:
    sys.stdout.write("\n".join(lines) + "\n")


def _dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)


# ---------------------------------------------------------------- commands


def _demo(args: argparse.Namespace) -> int:
    from clipsteer.cli_sae import device_of
    from clipsteer.demo import run

    result = run(
        args.out, seed=args.seed, model=args.model, pretrained=args.pretrained, data=args.data,
        hook_point=args.hook_point, minutes=args.minutes, max_images=args.max_images, device=device_of(args),
    )  # fmt: skip
    _text(*result.lines(), "", f"page     {result.page}", f"SAE      {result.sae}", f"figures  {result.metrics}")
    return 0


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
    from clipsteer.testing.machine import chip

    code = "not built"
    if _dispatch.missing("cpp") is None:
        code = ("portable", "AVX2", "AVX-512", "AVX-512 and AMX")[torch.ops.clipsteer_cpp.isa_level()]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    packages = ("triton", "open_clip_torch", "torchvision", "numpy", "safetensors")
    return {
        "clipsteer": clipsteer.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        **{name: _version_of(name) for name in packages},
        "cpu": f"{chip()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "C++ code path": code,
        "gpu": ", ".join(gpus) or "none visible to torch",
        "backends": [{"backend": s.backend, "usable": s.usable, "reason": s.reason} for s in _dispatch.status()],
    }


def _env(args: argparse.Namespace) -> int:
    facts = environment()
    if args.json:
        _text(json.dumps(facts, indent=2))
        return 0
    _text(*(f"{name:<16} {value}" for name, value in facts.items() if name != "backends"), "", "backends")
    for row in facts["backends"]:
        _text(f"  {row['backend']:<12} {'usable' if row['usable'] else 'not usable':<12} {row['reason']}".rstrip())
    return 0


def _interpreter(wanted: bool | None) -> None:
    """Turn Triton's interpreter on before triton is imported: by default wherever there is no GPU."""
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
    rows = testing.validate(args.ops, args.backends, dtypes, cases=args.cases, seed=args.seed, device=args.device)
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
        args.ops, args.backends, shape=args.shape, dtype=_dtype(args.dtype), device=args.device,
        repeats=args.repeats, out=args.out,
    )  # fmt: skip
    _text(bench.table(records))
    if args.compare is None:
        return 0
    text, slower = bench.compare(args.compare, records, args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    _text("", text)
    return int(slower)


# ---------------------------------------------------------------- the parser


def _shape(text: str) -> dict[str, int]:
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {name.strip(): int(value) for name, value in pairs}
    except ValueError:
        example = "B=256,d=768,n=49152,k=32"
        raise argparse.ArgumentTypeError(f"expected NAME=SIZE,… such as {example}, got {text!r}") from None


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import clipsteer

        _text(f"clipsteer {clipsteer.__version__}")
        parser.exit()


def _add(parent: Any, name: str, function: Any, summary: str, examples: str = "") -> argparse.ArgumentParser:
    parser = parent.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=examples.strip("\n"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
    if function is not None:
        parser.set_defaults(function=function)
    return parser


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clipsteer",
        description="Interpret and steer CLIP models: sparse autoencoders, their features, and fast, validated ops.",
        epilog="""start here:
  clipsteer demo                 train an SAE on a small CLIP model, steer its features, write a page
  clipsteer env                  what runs on this machine, and why something does not
  clipsteer validate             prove the ops on this machine
  clipsteer sae train --help     your own SAE on your own images""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", nargs=0, action=_Version, help="print the version")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    from clipsteer import cli_conceptor, cli_continual, cli_merge, cli_sae, cli_splice, cli_train

    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    p = _add(commands, "demo", _demo, "a CLIP model's features, conceptors and WiSE-FT curve, in one page", """
examples:
  the bundled model and drawings; a few minutes on two cores:
    clipsteer demo
  a real CLIP on your own images (a folder of class folders, captions.csv, or shards.tar); conceptors need 2 to 8
  classes, and the WiSE-FT curve is drawn for the bundled model and drawings alone:
    clipsteer demo --model ViT-B-32 --pretrained laion2b_s34b_b79k --data photos/ --out photos-demo
""")  # fmt: skip
    p.add_argument("--out", type=Path, default=Path("clipsteer-demo"), metavar="DIR", help="(default: clipsteer-demo)")
    p.add_argument("--seed", type=int, default=0, help="the same seed gives the same page (default: 0)")
    p.add_argument("--model", default="emojiclip", help="open_clip name, hf-hub:org/repo, or emojiclip (the default)")
    p.add_argument("--pretrained", metavar="TAG", help="open_clip tag or a local weights file")
    p.add_argument("--data", metavar="PATH", help="images: folder, captions .csv/.jsonl, .tar shards")
    p.add_argument("--hook-point", metavar="NAME", help="module to look at (default: the last but one block)")
    p.add_argument(
        "--minutes",
        type=float,
        default=1.0,
        help="of SAE training on two cores (default: 1; some two for a model as wide as ViT-B-32)",
    )
    p.add_argument("--max-images", type=int, metavar="N", help="(default: all bundled drawings, or 1000 images)")
    cli_sae.add_device(p)

    p = _add(commands, "env", _env, "show versions and which backends run here, and why others do not", """
examples:
  clipsteer env
  clipsteer env --json > env.json
""")  # fmt: skip
    p.add_argument("--json", action="store_true", help="as JSON")

    p = _add(commands, "validate", _validate, "prove the ops against their error bounds on this machine", """
examples:
  everything that can run here (Triton kernels in its interpreter where there is no GPU):
    clipsteer validate
  one backend, more cases:
    clipsteer validate --backends cpp --dtypes float32 bfloat16 --cases 500

exit code 1 when a row is red
""")  # fmt: skip
    p.add_argument("--ops", nargs="+", metavar="OP", help="(default: all)")
    p.add_argument("--backends", nargs="+", choices=BACKENDS, help="(default: all)")
    p.add_argument("--dtypes", nargs="+", choices=DTYPES, help="(default: all)")
    p.add_argument("--cases", type=int, default=40, metavar="N", help="per op, backend and dtype (default: 40)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", choices=("cpu", "cuda"), help="(default: a GPU for triton and cuda, if there is one)")
    p.add_argument("--interpret", action=argparse.BooleanOptionalAction,
                   help="run Triton kernels in its interpreter (default: where there is no GPU)")  # fmt: skip

    p = _add(commands, "bench", _bench, "time the ops against torch on this machine", """
examples:
  clipsteer bench --out bench.json
  clipsteer bench --ops topk_encode --shape B=256,d=768,n=49152,k=32
  clipsteer bench --ops semantic_drift --compare bench.json
  clipsteer bench --markdown bench.json sae_step.json
""")  # fmt: skip
    p.add_argument("--ops", nargs="+", metavar="OP", help="(default: all)")
    p.add_argument("--backends", nargs="+", choices=BACKENDS, help="(default: all that run)")
    p.add_argument("--shape", type=_shape, metavar="B=…,d=…", help="instead of the op's benchmark shapes")
    p.add_argument("--dtype", choices=DTYPES, default="float32")
    p.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda if there is one)")
    p.add_argument("--repeats", type=int, default=7, metavar="N", help="timings of each (default: 7)")
    p.add_argument("--out", type=Path, metavar="FILE", help="write .json or .csv as well")
    p.add_argument("--compare", type=Path, metavar="OLD.json", help="say what changed beyond noise; 1 if slower")
    p.add_argument(
        "--markdown", type=Path, nargs="+", metavar="FILE.json", help="print a table of earlier runs instead"
    )
    p.add_argument("--into", type=Path, metavar="FILE.md", help="with --markdown: put it between the marks in a file")

    for part in (cli_sae, cli_conceptor, cli_merge, cli_train, cli_continual, cli_splice):
        part.add_parser(commands, _add)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    if args.command == "demo":
        # Before torch is loaded: threads that spin while others use the cores make its many small products three times
        # slower; on idle cores not spinning costs a tenth.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(format="clipsteer: %(message)s", level=logging.WARNING)
    from clipsteer._files import FileFormatError

    try:
        return args.function(args)
    except KeyboardInterrupt:
        sys.stderr.write("clipsteer: interrupted\n")
        return 130
    except BrokenPipeError:
        # the reader of a pipe has left; what is still buffered has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError, RuntimeError, FileFormatError) as error:
        if args.debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        sys.stderr.write(f"clipsteer: error: {message} (--debug shows where)\n")
        return 2 if isinstance(error, (ValueError, TypeError, FileNotFoundError)) else 1
