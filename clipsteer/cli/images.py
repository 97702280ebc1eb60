"""Images of a command: sets by name, and what was left out of them listed at the end."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_SHOWN = 100
_OPTION = "--skip-unreadable"


def add_skip_unreadable(p: argparse.ArgumentParser) -> None:
    """The option of every command that reads sets of images."""
    p.add_argument(
        _OPTION,
        action="store_true",
        help="leave out images that cannot be read, and list them at the end; reads every image "
        "once more",
    )


def open_images(args: argparse.Namespace, spec: Any, **options: Any) -> Any:
    """``clipsteer.data.open_dataset`` as the command was asked: with all images, or the readable
    ones."""
    from clipsteer.data.files import open_dataset

    found = open_dataset(spec, skip_unreadable=args.skip_unreadable, **options)
    left_out(args).update(dict.fromkeys(found.unreadable))
    return found


def remedy(error: Exception, args: argparse.Namespace) -> str:
    """What a message of this error ends with, in a command that could leave the image out."""
    from clipsteer.io.images import IMAGE_SUFFIXES, ImageFileError

    if getattr(args, "skip_unreadable", True):
        return ""
    missing = str(getattr(error, "filename", None)) if isinstance(error, FileNotFoundError) else ""
    if not isinstance(error, ImageFileError) and Path(missing).suffix.lower() not in IMAGE_SUFFIXES:
        return ""
    return f"; {_OPTION} leaves out images that cannot be read"


def unreadable_files(args: argparse.Namespace, folders: Sequence[Path]) -> frozenset[Path]:
    """With --skip-unreadable, the files in class folders that cannot be read.

    Looked for once: several runs, in whatever processes, then leave out the same.
    """
    from clipsteer.data.files import image_folder
    from clipsteer.data.readable import unreadable

    files: set[Path] = set()
    for folder in folders if args.skip_unreadable else ():
        images = image_folder(folder)
        found = unreadable(images)
        files.update(images.sources[row][0] for row in found)
        left_out(args).update(dict.fromkeys(found.values()))
    return frozenset(files)


def left_out(args: argparse.Namespace) -> dict[str, None]:
    """Why images were left out so far, each once."""
    found: dict[str, None] = vars(args).setdefault("left_out", {})
    return found


def lists_unreadable(
    command: Callable[[argparse.Namespace], int],
) -> Callable[[argparse.Namespace], int]:
    """The command, at whose end the images that were left out are counted and listed."""

    @functools.wraps(command)
    def run(args: argparse.Namespace) -> int:
        try:
            return command(args)
        finally:
            _list(list(left_out(args)))

    return run


def _list(whys: list[str]) -> None:
    if not whys or os.environ.get("RANK", "0") != "0":
        return
    lines = [f"clipsteer: {len(whys)} unreadable image(s) were left out:"]
    # names and messages are other people's: one line each, and no escapes to a terminal
    lines += [f"  {''.join(c if c.isprintable() else '�' for c in why)}" for why in whys[:_SHOWN]]
    if len(whys) > _SHOWN:
        lines.append(f"  … and {len(whys) - _SHOWN} more")
    sys.stderr.write("\n".join(lines) + "\n")


def check_class_means(clip: Any, dataset: Any) -> None:
    """Raise ValueError where a tower without text is shown images that nothing tells apart."""
    from clipsteer.data.dataset import told_apart

    if not clip.has_text and told_apart(dataset) is None:
        raise ValueError(
            f"{clip.name} has no text tower, so that images are told apart by the means of their "
            "classes; pass --data with two classes at least, such as a folder of class folders"
        )


def class_means(clip: Any, dataset: Any) -> Any:  # (C, e)
    """What stands for the classes where there is no text tower, and a line that says so."""
    from clipsteer.clip.zero_shot import prototype_head
    from clipsteer.io.messages import printable

    check_class_means(clip, dataset)
    name = printable(clip.name)
    sys.stdout.write(f"{name} has no text tower: classes stand for the mean of their images\n")
    return prototype_head(clip, dataset)
