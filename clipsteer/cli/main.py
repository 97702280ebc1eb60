"""The command line. Every subcommand imports what it needs when it runs, so that ``--help`` is
quick.

Exit codes: 0 done, 1 the work failed or a validation is red, 2 a mistake in the call (also a path
that is not there), 130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipsteer.cli.arguments import _text, add_device
from clipsteer.cli.ops import BACKENDS, DTYPES, _bench, _env, _shape, _validate

# ---------------------------------------------------------------- commands


def _demo(args: argparse.Namespace) -> int:
    from clipsteer.cli.arguments import device_of
    from clipsteer.demo.run import run

    result = run(
        args.out,
        seed=args.seed,
        model=args.model,
        pretrained=args.pretrained,
        data=args.data,
        hook_point=args.hook_point,
        minutes=args.minutes,
        max_images=args.max_images,
        device=device_of(args),
    )
    _text(
        *result.lines(),
        "",
        f"page     {result.page}",
        f"SAE      {result.sae}",
        f"figures  {result.metrics}",
    )
    return 0


# ---------------------------------------------------------------- the parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import clipsteer

        _text(f"clipsteer {clipsteer.__version__}")
        parser.exit()


def _add(
    parent: Any, name: str, function: Any, summary: str, examples: str = ""
) -> argparse.ArgumentParser:
    parser = parent.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=examples.strip("\n"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks"
    )
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
    from clipsteer.cli import cil as cli_continual
    from clipsteer.cli import conceptor as cli_conceptor
    from clipsteer.cli import sae as cli_sae
    from clipsteer.cli import splice as cli_splice
    from clipsteer.cli import train as cli_train
    from clipsteer.cli import wise_ft as cli_merge

    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    p = _add(
        commands,
        "demo",
        _demo,
        "a CLIP model's features, conceptors and WiSE-FT curve, in one page",
        """
examples:
  the bundled model and drawings; a few minutes on two cores:
    clipsteer demo
  a real CLIP on your own images (a folder of class folders, captions.csv, or shards.tar); conceptors need 2 to 8
  classes, and the WiSE-FT curve is drawn for the bundled model and drawings alone:
    clipsteer demo --model ViT-B-32 --pretrained laion2b_s34b_b79k --data photos/ --out photos-demo
""",
    )
    p.add_argument(
        "--out",
        type=Path,
        default=Path("clipsteer-demo"),
        metavar="DIR",
        help="(default: clipsteer-demo)",
    )
    p.add_argument(
        "--seed", type=int, default=0, help="the same seed gives the same page (default: 0)"
    )
    p.add_argument(
        "--model",
        default="emojiclip",
        help="open_clip name, hf-hub:org/repo, or emojiclip (the default)",
    )
    p.add_argument("--pretrained", metavar="TAG", help="open_clip tag or a local weights file")
    p.add_argument(
        "--data", metavar="PATH", help="images: folder, captions .csv/.jsonl, .tar shards"
    )
    p.add_argument(
        "--hook-point", metavar="NAME", help="module to look at (default: the last but one block)"
    )
    p.add_argument(
        "--minutes",
        type=float,
        default=1.0,
        help="of SAE training on two cores (default: 1; some two for a model as wide as ViT-B-32)",
    )
    p.add_argument(
        "--max-images",
        type=int,
        metavar="N",
        help="(default: all bundled drawings, or 1000 images)",
    )
    add_device(p)

    p = _add(
        commands,
        "env",
        _env,
        "show versions and which backends run here, and why others do not",
        """
examples:
  clipsteer env
  clipsteer env --json > env.json
""",
    )
    p.add_argument("--json", action="store_true", help="as JSON")

    p = _add(
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
    )
    p.add_argument("--ops", nargs="+", metavar="OP", help="(default: all)")
    p.add_argument("--backends", nargs="+", choices=BACKENDS, help="(default: all)")
    p.add_argument("--dtypes", nargs="+", choices=DTYPES, help="(default: all)")
    p.add_argument(
        "--cases", type=int, default=40, metavar="N", help="per op, backend and dtype (default: 40)"
    )
    p.add_argument("--seed", type=int, default=0)
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

    p = _add(
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
    )
    p.add_argument("--ops", nargs="+", metavar="OP", help="(default: all)")
    p.add_argument("--backends", nargs="+", choices=BACKENDS, help="(default: all that run)")
    p.add_argument(
        "--shape", type=_shape, metavar="B=…,d=…", help="instead of the op's benchmark shapes"
    )
    p.add_argument("--dtype", choices=DTYPES, default="float32")
    p.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda if there is one)")
    p.add_argument(
        "--repeats", type=int, default=7, metavar="N", help="timings of each (default: 7)"
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

    for part in (cli_sae, cli_conceptor, cli_merge, cli_train, cli_continual, cli_splice):
        part.add_parser(commands, _add)
    return parser


# experiments of this repository, which were commands once
_MOVED = {
    ("conceptor", "eval"): "benchmarks.conceptors.run",
    ("wise-ft", "emoji"): "benchmarks.wise_ft",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = tuple((sys.argv[1:] if argv is None else argv)[:2])
    if words in _MOVED:
        where = f"python -m {_MOVED[words]} in a checkout of its repository"
        sys.stderr.write(f"clipsteer: error: {' '.join(words)} is now {where}\n")
        return 2
    args = build_parser().parse_args(argv)
    if args.command == "demo":
        # Before torch is loaded: threads that spin while others use the cores make its many small
        # products three times slower; on idle cores not spinning costs a tenth.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(format="clipsteer: %(message)s", level=logging.WARNING)
    # figures of training runs; what a library says is left out
    logging.getLogger("clipsteer").setLevel(logging.INFO)
    from clipsteer.io.files import FileFormatError

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
