"""``clipsteer finetune``: an image tower and its zero-shot head on labelled images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clipsteer.cli.arguments import Options, add_model, add_workers, device_of, setup_options
from clipsteer.cli.images import add_skip_unreadable, lists_unreadable, open_images
from clipsteer.cli.wise_ft import DATA


def add_parser(commands: Any, add: Any) -> None:
    """Add the command; ``add(parent, name, function, summary, examples, options)`` makes it."""
    add(
        commands,
        "finetune",
        _finetune,
        "fine-tune a CLIP image tower from its zero-shot head",
        """
examples:
  the bundled model on the 30 bundled classes, drawn by one vendor; a minute:
    clipsteer finetune --data emoji:noto:train --batch-size 64 --lr 1e-4 --out runs/noto
  a real CLIP end to end on your own images, with the paper's recipe; a stopped run goes on where
  it was:
    clipsteer finetune --model ViT-B-32 --pretrained laion2b_s34b_b79k --data photos/train \\
        --val photos/val \\
        --out runs/b32
  the head alone:
    clipsteer finetune --model ViT-B-32 --pretrained laion2b_s34b_b79k --data photos/train \\
        --mode lc --out runs/b32-lc
""",
        _finetune_options,
    )


def _finetune_options(p: argparse.ArgumentParser) -> None:
    from clipsteer.ensembles.config import FinetuneConfig

    add_model(p)
    p.add_argument("--data", required=True, metavar="PATH", help=DATA)
    p.add_argument(
        "--val",
        metavar="PATH",
        help="measured after every epoch, with the running ensemble beside it",
    )
    p.add_argument(
        "--names", type=Path, metavar="FILE", help="JSON object: class -> name for the prompts"
    )
    p.add_argument("--template", action="append", metavar="TEXT", help="prompt with {}; repeatable")
    p.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="zeroshot/, finetuned/, log.jsonl, checkpoints/",
    )
    add_skip_unreadable(p)
    add_workers(p)
    Options(FinetuneConfig).add(p)


@lists_unreadable
def _finetune(args: argparse.Namespace) -> int:
    from clipsteer.clip.model import load
    from clipsteer.clip.zero_shot import prototype_head, zero_shot_head
    from clipsteer.data.dataset import LAYOUTS, labelled, renamed
    from clipsteer.ensembles.finetuning import finetune
    from clipsteer.io.files import read_json
    from clipsteer.report.runs import write_run_page

    config = args.options.read(args)
    images = labelled(open_images(args, args.data), "--data")
    classes = images.classes
    assert classes is not None
    if len(classes) < 2:
        raise ValueError(f"--data: one class alone, {classes[0]!r}; expected {LAYOUTS}")
    spoken = read_json(args.names) if args.names is not None else {}
    if not isinstance(spoken, Mapping) or not all(isinstance(v, str) for v in spoken.values()):
        raise ValueError(f"{args.names}: expected a JSON object from class to name")
    words = [spoken.get(name, name.replace("_", " ").replace("-", " ")) for name in classes]
    validation = None
    if args.val is not None:
        validation = renamed(labelled(open_images(args, args.val), "--val"), classes)
    clip = load(args.model, args.pretrained, device=device_of(args), **setup_options(args))
    if clip.has_text or args.names is not None or args.template is not None:
        head = zero_shot_head(clip, words, args.template)
    else:
        head = prototype_head(clip, images)
    finetune(clip, images, head, config, out=args.out, validation=validation, workers=args.workers)
    following = f"clipsteer wise-ft curve {args.out / 'zeroshot'} {args.out / 'finetuned'}"
    what = f"{len(images)} images of {len(classes)} classes in {args.data}"
    write_run_page(
        args.out,
        f"Fine-tuning {clip.name}",
        what,
        settings=asdict(config),
        following=f"{following} --reference …",
    )
    sys.stdout.write(
        f"{len(images)} images, {len(classes)} classes; next: {following} --reference …\n"
    )
    return 0
