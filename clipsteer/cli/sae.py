"""``clipsteer sae``: train, eval and convert; steer and browse are beside."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from clipsteer.cli import browse, sae_steer
from clipsteer.cli.arguments import (
    Options,
    add_data,
    add_model,
    add_site,
    add_workers,
    count,
    setup_options,
    whole,
)
from clipsteer.cli.images import lists_unreadable, open_images
from clipsteer.cli.sae_given import add_sae, open_sae
from clipsteer.cli.sae_metrics import add_metrics, check_metrics, measured, show_metrics

# of training, where nothing else is asked for: a pass over few images is over before the warm-up is
_LEAST_TOKENS = 2_000_000


def add_parser(commands: Any, add: Any) -> None:
    """Add ``sae`` and its subcommands; ``add(parent, name, function, summary, examples, options)``
    makes one."""
    sae = add(
        commands,
        "sae",
        None,
        "train, evaluate, convert, steer with and look into sparse autoencoders",
        """
examples:
  train one on the bundled drawings, measure it, and see what feature 12 does:
    clipsteer sae train --out runs/small --expansion 8 --k 32 --batch-size 1024 --lr 1e-3
    clipsteer sae eval runs/small
    clipsteer sae steer runs/small --feature 12=5x
  look at all of its features, in a browser:
    clipsteer sae browse runs/small --out small-site

each ACTION has --help with more
""",
    )
    actions = sae.add_subparsers(dest="action", metavar="ACTION", required=True)
    add(
        actions,
        "train",
        _train,
        "train a sparse autoencoder on a CLIP model's tokens",
        """
examples:
  a small one on the bundled drawings, some minutes:
    clipsteer sae train --out runs/small --expansion 8 --k 32 --train-tokens 2e6 \\
        --batch-size 1024 --lr 1e-3
  on your own images, at block 9 of a real CLIP; the activations are kept, and the run resumes if
  it is stopped:
    clipsteer sae train --model ViT-B-32 --pretrained laion2b_s34b_b79k --data photos/ \\
        --hook-point visual.transformer.resblocks.9 --tokens patches --store acts/ --out runs/b32-9
  prefixes of 768, 3072 and 12288 features, each of which reconstructs by itself:
    clipsteer sae train --out runs/nested --matryoshka 768,3072,12288 --architecture batch_topk ...
  a transcoder of one MLP, from its input to its output:
    clipsteer sae train --out runs/mlp9 --hook-point visual.transformer.resblocks.9.ln_2 \\
        --target-hook-point visual.transformer.resblocks.9.mlp --skip ...
  on four GPUs:
    torchrun --nproc-per-node 4 -m clipsteer sae train --device cuda --store acts/ \\
        --out runs/big ...
""",
        _train_options,
    )
    add(
        actions,
        "eval",
        _eval,
        "measure what an SAE preserves and, with --steer, what its features steer",
        """
examples:
  on the bundled held-out style:
    clipsteer sae eval runs/small
  a published SAE (of clipsteer, SAELens, sparsify, dictionary_learning, ViSAEBench, saev,
  overcomplete or Prisma: what is in the files decides) on your own images:
    clipsteer sae eval hf-hub:org/repo/subfolder --model ViT-B-32 --pretrained openai \\
        --hook-point visual.transformer.resblocks.11 --data photos/ --out metrics.json
  how many of the first 200 features are steerable at strength 150:
    clipsteer sae eval runs/small --steer 150 --features 200
  names for the 20 strongest features, out of your own words:
    clipsteer sae eval runs/small --name-features 20 --words words.txt
  what its features are worth, with intervals (localisation, probing, stability, ...):
    clipsteer sae eval runs/small --metrics all --metrics-sae runs/seed1 --out metrics.json
""",
        _eval_options,
    )
    add(
        actions,
        "convert",
        _convert,
        "write an SAE for another library",
        """
examples:
  what kind of SAE is this, and make it clipsteer's:
    clipsteer sae convert path/to/saelens-folder mine/
  for SAELens, sparsify or dictionary_learning:
    clipsteer sae convert runs/small for-saelens/ --format saelens
  what a file leaves open, here the class and k of an SAE of overcomplete, in a JSON file:
    clipsteer sae convert sae.pt mine/ --config topk.json
""",
        _convert_options,
    )
    sae_steer.add_action(actions, add)
    browse.add_action(actions, add)


def _train_options(p: argparse.ArgumentParser) -> None:
    from clipsteer.sae.config import TrainConfig

    add_model(p, None, "that of a complete --store, else emojiclip")
    add_data(
        p,
        "images to train on (default: those of a complete --store, else the bundled drawings that "
        "EmojiCLIP was trained on)",
    )
    add_site(p, "encoded")
    p.set_defaults(tokens=None)
    p.add_argument(
        "--target-hook-point",
        help="module whose output a transcoder is to give, where one is to be trained",
    )
    p.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="for checkpoints, log.jsonl and the SAE",
    )
    p.add_argument(
        "--store",
        type=Path,
        metavar="DIR",
        help="keep the activations here and read them from here, a target's in DIR/target; once "
        "all are there, neither model nor images need to be named, and neither is opened",
    )
    add_workers(p)
    settings = Options(
        TrainConfig,
        # --tokens says which tokens
        names={
            "tokens": "train_tokens",
            "l1_coefficient": "l1",
            "l0_coefficient": "l0",
        },
        exclusive=(("d_sae", "expansion"), ("tokens", "steps")),
        unset={"tokens": f"one pass, but at least {_LEAST_TOKENS:g}"},
    )
    settings.add(p)


def _eval_options(p: argparse.ArgumentParser) -> None:
    add_sae(p)
    p.add_argument("--target-hook-point", help="of a transcoder (default: what it was trained on)")
    p.add_argument(
        "--name-features",
        type=count,
        metavar="N",
        help="also name the N strongest features in words",
    )
    p.add_argument(
        "--words",
        type=Path,
        metavar="FILE",
        help="words for names, one a line (default: the bundled concepts, and the classes)",
    )
    p.add_argument(
        "--steer", type=float, metavar="STRENGTH", help="also measure steerability at this strength"
    )
    p.add_argument(
        "--features",
        type=whole,
        default=256,
        metavar="N",
        help="the first N features (default: 256)",
    )
    add_metrics(p)
    p.add_argument(
        "--out", type=Path, metavar="FILE", help="write the figures as JSON, and their page"
    )


def _convert_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("source", metavar="SAE", help="a folder, a file, or hf-hub:org/repo/subfolder")
    p.add_argument("target", type=Path, metavar="DIR", help="folder to write")
    p.add_argument(
        "--format",
        choices=("clipsteer", "saelens", "sparsify", "dictionary_learning"),
        default="clipsteer",
        help="whose files to write (default: clipsteer)",
    )
    p.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="JSON with what the file of SAE leaves open (default: a config.json beside it)",
    )


@lists_unreadable
def _train(args: argparse.Namespace) -> int:
    import clipsteer
    from clipsteer.report.runs import write_run_page
    from clipsteer.training.world import World

    config = args.options.read(args)
    # before anything is loaded: under torchrun each process has its own GPU
    world = World(args.device)
    source = _stored(args)
    data = args.data
    if source is None:
        source = _harvested(args, world)
        data = data or "EmojiStyles"
    if config.tokens is None and config.steps is None:
        config = replace(config, tokens=max(source.rows_per_epoch(), _LEAST_TOKENS))
    metadata = {} if data is None else {"data": data}
    sae = clipsteer.train_sae(source, config, out=args.out, device=world.device, metadata=metadata)
    if world.rank == 0:
        where = source.provenance["hook_point"]
        title = f"{sae.d_sae} features of {source.provenance.get('clip_model', 'activations')}"
        following = f"clipsteer sae eval {args.out}"
        made = asdict(config)
        write_run_page(args.out, title, f"at {where}", settings=made, following=following)
        sys.stdout.write(f"{args.out}: {sae.d_sae} features at {where}; next: {following}\n")
    return 0


def _stored(args: argparse.Namespace) -> Any:
    """The rows of a complete store where nothing else is asked for; else None."""
    from clipsteer.sae.activations import ActivationStore
    from clipsteer.sae.pairs import PairSource
    from clipsteer.sae.shards import is_whole

    if args.store is None or args.model or args.pretrained or args.data or setup_options(args):
        return None
    folders = [args.store]
    asked = [args.hook_point]
    if args.target_hook_point is not None:
        folders.append(args.store / "target")
        asked.append(args.target_hook_point)
    if not all(map(is_whole, folders)):
        return None
    stores = [ActivationStore(folder) for folder in folders]
    for store, hook_point in zip(stores, asked):
        for name, value in (("hook_point", hook_point), ("tokens", args.tokens)):
            there = store.metadata[name]
            if value not in (None, there):
                raise ValueError(
                    f"{store.directory} holds another harvest ({name}: {there!r} there, {value!r} "
                    f"asked for); choose another directory"
                )
    return stores[0] if len(stores) == 1 else PairSource(*stores)


def _harvested(args: argparse.Namespace, world: Any) -> Any:
    """The rows that the model gives, kept in a store where one is named."""
    from clipsteer.clip.model import EMOJICLIP, default_hook_point, load
    from clipsteer.sae.activations import HarvestSource, harvest_to_store
    from clipsteer.sae.pairs import PairSource
    from clipsteer.sae.shards import is_whole

    model = args.model or EMOJICLIP
    clip = load(model, args.pretrained, device=world.device, **setup_options(args))
    dataset = open_images(args, args.data or "emoji", emoji="trained:seen")
    hook_point = args.hook_point or default_hook_point(clip)
    target_hook_point = args.target_hook_point
    common = {"tokens": args.tokens or "all", "num_workers": args.workers}
    if args.store is None:
        return HarvestSource(
            clip, dataset, hook_point, target_hook_point=target_hook_point, **common
        )
    try:
        source = harvest_to_store(clip, dataset, hook_point, args.store, **common)
    except ValueError as error:
        if args.data or not is_whole(args.store):
            raise
        raise ValueError(
            f"{error}. No --data was given, so the bundled drawings are meant: for the rows that "
            f"are there leave out --model and what belongs to it, or give the --data of the store"
        ) from None
    if target_hook_point is None:
        return source
    where = args.store / "target"
    return PairSource(source, harvest_to_store(clip, dataset, target_hook_point, where, **common))


@lists_unreadable
def _eval(args: argparse.Namespace) -> int:
    from clipsteer.cli.sae_figures import check_asked, name_strongest, of_steering, show, write
    from clipsteer.sae.evaluate import evaluate_sae

    check_metrics(args)
    sae, clip, dataset = open_sae(args)
    check_asked(args, clip, dataset)
    where = {"hook_point": args.hook_point, "tokens": args.tokens}
    target = {"target_hook_point": args.target_hook_point}
    figures = evaluate_sae(sae, clip, dataset, **where, **target)
    if args.steer is not None:
        figures["steerability"] = of_steering(args, sae, clip, dataset, where | target)
    if args.name_features is not None:
        figures["names"] = name_strongest(args, sae, clip, dataset, where)
    show(figures)
    if args.metrics is not None:
        figures["metrics"] = measured(args, sae, clip, dataset, where | target)
        show_metrics(figures["metrics"])
    if args.out is not None:
        write(args, clip.name, figures)
    return 0


def _convert(args: argparse.Namespace) -> int:
    from clipsteer.sae import formats as sae_io
    from clipsteer.sae.model import SAE

    sae = SAE.from_pretrained(args.source, config=args.config)
    if args.format == "clipsteer":
        sae.save_pretrained(args.target)
    else:
        sae_io.export(sae, args.target, args.format)
    sys.stdout.write(
        f"{args.target}: {args.format}, {sae.extra_repr()}\n{json.dumps(sae.metadata)}\n"
    )
    return 0
