"""``clipsteer train``: both towers of a CLIP on images with captions, alone or with a reference
model."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clipsteer.cli.arguments import Options, add_device, add_setup, add_workers, setup_options
from clipsteer.cli.images import add_skip_unreadable, lists_unreadable, open_images

DATA = (
    "a .csv, .tsv or .jsonl with columns image and caption, .tar shards (WebDataset), a folder of "
    "class folders"
)


def add_parser(commands: Any, add: Any) -> None:
    """Add the command; ``add(parent, name, function, summary, examples, options)`` makes it."""
    add(
        commands,
        "train",
        _train,
        "train a CLIP on images with captions, with or without a reference model",
        """
pairs.csv has a header line and a pair a line; image paths start from the folder that it is in:
  image,caption
  photos/0001.jpg,a cat asleep on a chair

losses:
  drrho    only what a frozen reference finds easy and the model does not is pushed (DRRho-CLIP);
           needs --reference
  global   the same without a reference: the global contrastive loss of FastCLIP
  clip     the softmax loss of CLIP
  siglip   the sigmoid loss of SigLIP, with a learnt bias
  distill  clip, and the reference's similarities as soft targets; needs --reference

examples:
  a tiny model on the bundled drawings, with the bundled EmojiCLIP as reference; some minutes:
    clipsteer train --reference emojiclip --batch-size 128 --epochs 3 --lr 1e-3 \\
        --temperature 0.1 --val emoji \\
        --out runs/tiny
  your own pairs, with a real CLIP as reference; its features are computed once and kept in
  runs/b32:
    clipsteer train --data pairs.csv --val held-out.csv --model ViT-B-32 --reference ViT-B-16 \\
        --reference-pretrained laion2b_s34b_b88k --batch-size 1024 --micro-batch 128 --bf16 \\
        --out runs/b32
  without a reference, a learnt temperature, shards, four GPUs; a stopped run goes on when it is
  started again:
    torchrun --nproc-per-node 4 -m clipsteer train --data 'pairs-{0000..0099}.tar' \\
        --model ViT-B-32 --loss clip \\
        --batch-size 4096 --bf16 --workers 8 --out runs/clip
  use what was trained, as the reference of the next run or anywhere else:
    clipsteer train --data pairs.csv --model ViT-B-32 --reference runs/b32 --out runs/next
    clipsteer finetune --model ViT-B-32 --pretrained runs/b32/model.safetensors \\
        --data photos/ --out runs/tuned
""",
        _train_options,
    )


def _train_options(p: argparse.ArgumentParser) -> None:
    from clipsteer.reference.config import ContrastiveConfig

    p.add_argument(
        "--data",
        default="emoji",
        metavar="PATH",
        help=f"{DATA}, or emoji, the bundled drawings (default)",
    )
    p.add_argument(
        "--val",
        action="append",
        default=[],
        metavar="PATH",
        help="measured every epoch, the same kinds; captions: recall at 1, classes: zero-shot "
        "accuracy; repeatable",
    )
    add_skip_unreadable(p)
    p.add_argument(
        "--template", action="append", metavar="TEXT", help="prompt with {} for classes; repeatable"
    )
    p.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="model.safetensors, config.json, log.jsonl, checkpoints/",
    )
    p.add_argument(
        "--model",
        default="emoji-tiny",
        metavar="NAME",
        help="open_clip name, an architecture.json, hf-hub:org/repo or emoji-tiny (default)",
    )
    p.add_argument(
        "--pretrained",
        metavar="TAG",
        help="open_clip tag or weights file to start from (default: random)",
    )
    add_setup(p)
    p.add_argument(
        "--reference",
        metavar="NAME|FILE|DIR",
        help="open_clip name, an architecture.json, features kept in a .safetensors, or the --out "
        "of another run",
    )
    p.add_argument(
        "--reference-pretrained",
        metavar="TAG",
        help="open_clip tag or a weights file of the reference",
    )
    add_setup(p, "reference-")
    p.add_argument(
        "--reference-live",
        action="store_true",
        help="the reference sees the crops that the model sees; slower, and nothing is kept",
    )
    add_device(p)
    p.add_argument(
        "--excess",
        type=Path,
        metavar="CSV",
        help="at the end, what each pair costs beside the reference",
    )
    add_workers(p)
    settings = Options(
        ContrastiveConfig,
        names={"learnable_temperature": "learn_temperature"},
        exclusive=(("epochs", "samples"),),
    )
    settings.add(p)


# what --val emoji measures on: every cell of the drawings but the one that is trained on
_CELLS = {
    "trained style, new concepts": "emoji:trained:unseen",
    "held-out style, seen concepts": "emoji:held-out:seen",
    "held-out style, new concepts": "emoji:held-out:unseen",
}


def _pairs(args: argparse.Namespace) -> Any:
    return open_images(args, args.data, emoji="trained:seen", targets="captions")


def _validation(args: argparse.Namespace) -> dict[str, Any]:
    from clipsteer.data.files import is_emoji

    named: dict[str, str] = {}
    for spec in args.val:
        if spec == "emoji":
            named |= _CELLS
            continue
        name = spec if is_emoji(spec) else Path(spec).stem
        named[name if name not in named else spec] = spec
    return {name: open_images(args, spec, targets="caption") for name, spec in named.items()}


def _reference(args: argparse.Namespace, dataset: Any, world: Any) -> tuple[Any, Any]:
    """What the trainer takes, and kept features where there are some."""
    from clipsteer.clip.model import EMOJICLIP, load
    from clipsteer.reference import features as reference_features

    name = args.reference
    if name is None:
        return None, None
    if Path(name).is_file() and not name.endswith(".json"):
        if args.reference_live:
            raise ValueError(f"--reference-live needs a model, not the features in {name}")
        kept = reference_features.read(name, dataset)
        return kept, kept
    options = setup_options(args, "reference-")
    model = load(name, args.reference_pretrained, device=world.device, **options)
    if model.pretrained is None and name != EMOJICLIP and ":" not in name:
        raise ValueError(
            f"--reference {name} needs --reference-pretrained, a tag of open_clip or a weights file"
        )
    model.need_text("--reference")
    if args.reference_live:
        return model, None
    path = args.out / "reference.safetensors"
    kept = reference_features.cached(path, model, dataset, workers=args.workers, world=world)
    return kept, kept


@lists_unreadable
def _train(args: argparse.Namespace) -> int:
    from clipsteer.training.claim import claimed
    from clipsteer.training.world import World

    # before anything is loaded: under torchrun each process has its own GPU
    world = World(args.device)
    with claimed(args.out, "train", world):
        return _train_in(args, world)


def _train_in(args: argparse.Namespace, world: Any) -> int:
    import statistics

    import torch

    from clipsteer.clip.model import load
    from clipsteer.data.dataset import LAYOUTS, captions_of, told_apart
    from clipsteer.reference import features as reference_features
    from clipsteer.reference.config import REFERRED
    from clipsteer.reference.evaluate import excess_losses, write_excess
    from clipsteer.reference.train import train_contrastive
    from clipsteer.report.runs import write_run_page

    config = args.options.read(args)
    if args.reference is None and (config.wants_reference or args.excess is not None):
        why = "" if config.loss in REFERRED else " with --select or --excess"
        raise ValueError(
            f"--loss {args.loss}{why} needs --reference; --loss clip, --loss siglip and --loss "
            "global train without one"
        )
    dataset = _pairs(args)
    validation = _validation(args)
    # now, not at the end of the first epoch
    captions_of(dataset, "--data")
    for name, images in validation.items():
        captions_of(images, f"--val {name}")
        if images.classes is not None and told_apart(images) is None:
            raise ValueError(
                f"--val {name}: one class alone, {images.classes[0]!r}; expected {LAYOUTS}"
            )
    config.check_batches(len(dataset), world.size)
    reference, kept = _reference(args, dataset, world)
    torch.manual_seed(config.seed)  # of random weights
    clip = load(args.model, args.pretrained, device=world.device, **setup_options(args))
    shares: list[float] = []

    def on_log(line: dict[str, Any]) -> None:
        if "loss_share" in line:
            shares.append(line["loss_share"])

    train_contrastive(
        clip,
        dataset,
        config,
        reference=reference,
        out=args.out,
        validation=validation,
        templates=tuple(args.template) if args.template else None,
        workers=args.workers,
        world=world,
        on_log=on_log,
    )
    excess = None
    if args.excess is not None:
        kept = kept or reference_features.compute(
            reference, dataset, workers=args.workers, world=world
        )
        excess = excess_losses(clip, dataset, kept, workers=args.workers, world=world)
    if world.rank:
        return 0
    if excess is not None:
        write_excess(args.excess, excess, reference_features.captions_of(dataset))
        sys.stdout.write(f"{args.excess}: what each pair costs, the most worth learning first\n")
    write_run_page(
        args.out,
        f"Training {args.model}, {config.loss}",
        f"{len(dataset)} pairs of {args.data}",
        settings=asdict(config),
    )
    weights = args.out / "model.safetensors"
    share = f", the loss {100 * statistics.median(shares):.2g} % of a step" if shares else ""
    log = args.out / "log.jsonl"
    sys.stdout.write(
        f"{weights}: {args.model} trained on {len(dataset)} pairs{share}; log in {log}\n"
    )
    return 0
