"""``clipsteer demo``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from clipsteer.cli.arguments import (
    _text,
    add_data,
    add_model,
    device_of,
    load_known,
    read_words,
    setup_options,
    whole,
)
from clipsteer.cli.images import lists_unreadable, open_images


def add_parser(commands: Any, add: Any) -> None:
    """Add the command; ``add(parent, name, function, summary, examples, options)`` makes it."""
    add(
        commands,
        "demo",
        _demo,
        "a CLIP model's features, conceptors and WiSE-FT curve, in one page",
        """
examples:
  the bundled model and drawings; a few minutes on two cores:
    clipsteer demo
  an SAE of your own, from any library whose files clipsteer reads, and your own words:
    clipsteer demo --sae runs/b32-9 --data photos/ --words words.txt --out photos-demo
  a real CLIP on your own images (a folder of class folders, captions.csv, or shards.tar);
  conceptors need 2 to 8
  classes, and the WiSE-FT curve is drawn for the bundled model and drawings alone:
    clipsteer demo --model ViT-B-32 --pretrained laion2b_s34b_b79k --data photos/ --out photos-demo
""",
        _demo_options,
    )


def _demo_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--out",
        type=Path,
        default=Path("clipsteer-demo"),
        metavar="DIR",
        help="(default: clipsteer-demo)",
    )
    p.add_argument(
        "--seed", type=whole, default=0, help="the same seed gives the same page (default: 0)"
    )
    add_model(p, None, "what --sae was trained on, or emojiclip")
    p.add_argument(
        "--sae",
        metavar="SAE",
        help="one that is trained already: a folder, a Prisma .pt, or hf-hub:org/repo/subfolder",
    )
    p.add_argument(
        "--words",
        type=Path,
        metavar="FILE",
        help="words to name features in, one a line (default: the classes and bundled concepts)",
    )
    add_data(p, "images (default: the bundled drawings)")
    p.add_argument(
        "--hook-point",
        metavar="NAME",
        help="module to look at (default: that of --sae, or the last but one block)",
    )
    p.add_argument(
        "--minutes",
        type=float,
        default=1.0,
        help="of SAE training on two cores (default: 1; some two for a model as wide as ViT-B-32)",
    )
    p.add_argument(
        "--max-images",
        type=whole,
        metavar="N",
        help="(default: all bundled drawings, or 1000 images)",
    )


@lists_unreadable
def _demo(args: argparse.Namespace) -> int:
    from clipsteer.clip.model import EMOJICLIP
    from clipsteer.demo.findings import run

    def open_model(metadata: Mapping[str, Any]) -> Any:
        return load_known(args, metadata, args.sae)

    result = run(
        args.out,
        seed=args.seed,
        sae=args.sae,
        words=None if args.words is None else read_words(args.words),
        model=args.model or EMOJICLIP,
        pretrained=args.pretrained,
        open_model=open_model,
        data=args.data,
        hook_point=args.hook_point,
        minutes=args.minutes,
        max_images=args.max_images,
        open_images=partial(open_images, args),
        device=device_of(args),
        **setup_options(args),
    )
    _text(
        *result.lines(),
        "",
        f"page     {result.page}",
        f"SAE      {result.sae}",
        f"figures  {result.metrics}",
    )
    return 0
