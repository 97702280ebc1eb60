"""Options that several commands share, and what they stand for."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def _text(*lines: str) -> None:
    sys.stdout.write("\n".join(lines) + "\n")


def read_words(path: Path | None, classes: Sequence[str] | None = None) -> list[str]:
    """The lines of a file, or the bundled concepts after the classes."""
    from clipsteer.data.emoji import EmojiStyles

    if path is not None:
        words = [w.strip() for w in path.read_text(encoding="utf-8").splitlines()]
    else:
        words = [
            *(c.replace("_", " ") for c in classes or []),
            *(c.label for c in EmojiStyles().concepts),
        ]
    return list(dict.fromkeys(w for w in words if w))


def _count(text: str) -> int:
    value = float(text)
    if not math.isfinite(value) or value < 1 or value != int(value):
        raise argparse.ArgumentTypeError(
            f"expected a whole number such as 200 or 2e6, got {text!r}"
        )
    return int(value)


def add_model(
    p: argparse.ArgumentParser,
    default: str | None = "emojiclip",
    otherwise: str = "what the SAE was trained on",
) -> None:
    source = default or otherwise
    p.add_argument(
        "--model",
        default=default,
        metavar="NAME",
        help="open_clip name, hf-hub:org/repo, timm:NAME, the folder of a run, or emojiclip "
        f"(default: {source})",
    )
    p.add_argument("--pretrained", metavar="TAG", help="open_clip tag or a local weights file")
    add_device(p)


def add_device(p: argparse.ArgumentParser) -> None:
    p.add_argument("--device", help="cpu, cuda, … (default: cuda if there is one)")


def add_data(p: argparse.ArgumentParser, what: str) -> None:
    p.add_argument(
        "--data",
        metavar="PATH",
        help=f"emoji[:style[:part]], folder, captions .csv/.jsonl, or .tar shards: {what}",
    )


def device_of(args: argparse.Namespace) -> str:
    import torch

    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def add_shown(p: argparse.ArgumentParser) -> None:
    """The arguments that ``show_steering`` reads."""
    p.add_argument(
        "--words",
        type=Path,
        metavar="FILE",
        help="what to predict, one a line (default: the classes, or the bundled concepts)",
    )
    p.add_argument(
        "--top", type=int, default=3, metavar="N", help="predictions an image (default: 3)"
    )
    p.add_argument("--count", type=int, default=8, metavar="N", help="images (default: 8)")


def show_steering(
    args: argparse.Namespace, clip: Any, dataset: Any, hook_point: str, steering: Any
) -> int:
    """Write predictions on a few images before and after steering, and which moved most."""
    import torch

    from clipsteer.clip.model import EMOJICLIP
    from clipsteer.clip.zero_shot import zero_shot_head
    from clipsteer.data.dataset import sample_names, spread
    from clipsteer.data.emoji import EmojiStyles
    from clipsteer.steering import steer

    if args.top < 1 or args.count < 1:
        raise ValueError(f"--top and --count must be at least 1, got {args.top} and {args.count}")
    if args.words is not None:
        words = [
            w.strip() for w in args.words.read_text(encoding="utf-8").splitlines() if w.strip()
        ]
    else:
        words = dataset.classes or [c.label for c in EmojiStyles().concepts]
    head = zero_shot_head(clip, words, None if clip.name == EMOJICLIP else ("a photo of a {}.",))
    rows = spread(range(len(dataset)), args.count)
    images = [dataset[i][0] for i in rows]
    before = (100 * clip.encode_images(images) @ head.T).softmax(-1)
    with steer(clip, {hook_point: steering}):
        after = (100 * clip.encode_images(images) @ head.T).softmax(-1)

    def shown(p: torch.Tensor) -> str:
        best = p.topk(min(args.top, len(words)))
        return ", ".join(
            f"{words[i]} {v:.0%}" for v, i in zip(best.values.tolist(), best.indices.tolist())
        )

    names = sample_names(dataset)
    for i, p, q in zip(rows, before, after):
        sys.stdout.write(f"{names[i][:60]}\n  before  {shown(p)}\n  after   {shown(q)}\n")
    change = (after - before).mean(0)
    order = change.abs().argsort(descending=True)[: 2 * args.top].tolist()
    sys.stdout.write("mean change, in points\n")
    for i in sorted(order, key=lambda i: -float(change[i])):
        sys.stdout.write(f"  {100 * float(change[i]):+6.1f}  {words[i]}\n")
    return 0
