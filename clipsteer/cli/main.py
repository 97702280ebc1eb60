"""The command line. Every subcommand imports what it needs when it runs, so that ``--help`` is
quick.

Exit codes: 0 done, 1 the work failed or a validation is red, 2 a mistake in the call (also a path
that is not there), 130 interrupted, 143 terminated, both once a run is saved.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NoReturn

from clipsteer.cli.arguments import _text
from clipsteer.cli.images import remedy
from clipsteer.training.settings import SettingError


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import clipsteer

        _text(f"clipsteer {clipsteer.__version__}")
        parser.exit()


class Command(argparse.ArgumentParser):
    """A parser whose options are made when it is called: no help waits for other commands."""

    make_options: Callable[[argparse.ArgumentParser], None] | None = None

    def complete(self) -> None:
        """Make the options, unless they are there."""
        make = self.make_options
        self.make_options = None
        if make is not None:
            make(self)

    def error(self, message: str) -> NoReturn:
        """Exit with 2 and a message that holds nothing that a terminal would act on."""
        from clipsteer.io.messages import printable

        super().error(printable(message))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, once the options of the command are there."""
        self.complete()
        return super().parse_known_args(args, namespace)


def _add(
    parent: Any,
    name: str,
    function: Callable[[argparse.Namespace], int] | None,
    summary: str,
    examples: str,
    options: Callable[[argparse.ArgumentParser], None] | None = None,
) -> Command:
    """A command, or with neither function nor options a group of commands."""
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
    parser.make_options = options
    if function is not None:
        parser.set_defaults(function=function)
    return parser


# in the order of the help
PARTS = (
    "demo",
    "guide",
    "ops",
    "bench",
    "prove",
    "sae",
    "conceptor",
    "finetune",
    "wise_ft",
    "train",
    "cil",
    "splice",
    "align",
)


def build_parser() -> Command:
    """The parser of every command; needs no torch."""
    parser = Command(
        prog="clipsteer",
        description="Interpret and steer CLIP models: sparse autoencoders, their features, and "
        "fast, validated ops.",
        epilog="""start here:
  clipsteer demo                 train an SAE on a small CLIP, steer its features, write a page
  clipsteer guide                pages to learn from, whose code runs as it stands
  clipsteer env                  what runs on this machine, and why something does not
  clipsteer validate             prove the ops on this machine
  clipsteer sae train --help     your own SAE on your own images""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", nargs=0, action=_Version, help="print the version")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    for part in PARTS:
        import_module(f"clipsteer.cli.{part}").add_parser(commands, _add)
    return parser


# commands that processes of torchrun share; others, that write, would each do the whole
SHARED = {("sae", "train"), ("train", None)}


def _refuse_processes(args: argparse.Namespace) -> None:
    """ValueError where torchrun started several processes of a command that writes for one."""
    command = (args.command, getattr(args, "action", None))
    if int(os.environ.get("WORLD_SIZE") or 1) == 1 or command in SHARED:
        return
    if getattr(args, "out", None) is not None:
        name = " ".join(word for word in command if word)
        jobs = "; --jobs N learns several strategies and seeds at a time" * hasattr(args, "jobs")
        raise ValueError(f"{name} runs in one process: start it without torchrun{jobs}")


# experiments of this repository, which were commands once
_MOVED = {
    ("conceptor", "eval"): "benchmarks.conceptors.run",
    ("wise-ft", "emoji"): "benchmarks.wise_ft",
}


def _spelled(error: Exception, args: argparse.Namespace) -> str:
    """What went wrong; settings under the names of the options that they were given by."""
    options = getattr(args, "options", None)
    if not isinstance(error, SettingError) or options is None:
        return str(error)
    own = error.config == options.config.__name__
    return error.spelled(options.spelling) if own else str(error)


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
    from clipsteer.io.files import FileFormatError
    from clipsteer.io.messages import PrintableFormatter, printable

    lines = logging.StreamHandler()
    lines.setFormatter(PrintableFormatter("clipsteer: %(message)s"))
    logging.basicConfig(handlers=[lines], level=logging.WARNING)
    # figures of training runs; what a library says is left out
    logging.getLogger("clipsteer").setLevel(logging.INFO)

    # names of files need not be UTF-8: as stderr writes them
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _refuse_processes(args)
        return args.function(args)
    except KeyboardInterrupt:
        sys.stderr.write("clipsteer: interrupted\n")
        return 130
    except BrokenPipeError:
        # the reader of a pipe has left; what is still buffered has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.debug:
            raise
        message = " ".join(_spelled(error, args).split()) + remedy(error, args)
        said = (ValueError, TypeError, OSError, RuntimeError, FileFormatError)
        if not message or not isinstance(error, said):
            # not raised with a sentence: of a KeyError this is the key alone
            message = f"{type(error).__name__}: {message}".removesuffix(": ")
        message = printable(message)
        sys.stderr.write(f"clipsteer: error: {message} (--debug shows where)\n")
        return 2 if isinstance(error, (ValueError, TypeError, FileNotFoundError)) else 1
