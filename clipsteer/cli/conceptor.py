"""``clipsteer conceptor``: fit and steer."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from clipsteer.cli.arguments import (
    add_data,
    add_known_site,
    add_model,
    add_shown,
    add_site,
    device_of,
    load_known,
    setup_options,
    show_steering,
    whole,
)
from clipsteer.cli.images import lists_unreadable, open_images

_ORIGIN = ("clip_model", "pretrained", "hook_point", "tokens", "setup")


def add_parser(commands: Any, add: Any) -> None:
    """Add ``conceptor`` and its subcommands; ``add(parent, name, function, summary, examples)``
    makes one."""
    conceptor = add(
        commands,
        "conceptor",
        None,
        "fit, compose and steer with conceptors",
        """
examples:
  what food looks like, whoever drew it, and what is left of images when all else is taken away:
    clipsteer conceptor fit --category food-drink --centre --out food.safetensors
    clipsteer conceptor steer food.safetensors --beta 2

each ACTION has --help with more
""",
    )
    actions = conceptor.add_subparsers(dest="action", metavar="ACTION", required=True)
    add(
        actions,
        "fit",
        _fit,
        "fit a conceptor to a CLIP model's activations; shows aperture against quota",
        """
examples:
  what the bundled Noto drawings use, at the last but one block:
    clipsteer conceptor fit --style noto --out noto.safetensors
  one category in every style, centred on the mean over all drawings, keeping a quarter of the
  dimensions:
    clipsteer conceptor fit --category food-drink --centre --quota 0.25 --out food.safetensors
  your own images, at block 9 of a real CLIP; one conceptor a class folder:
    clipsteer conceptor fit --model ViT-B-32 --pretrained laion2b_s34b_b79k --data photos/ \\
        --per-class \\
        --hook-point visual.transformer.resblocks.9 --aperture 0.5 --out classes.safetensors
  from activations that clipsteer sae train --store wrote:
    clipsteer conceptor fit --store acts/ --aperture gradient --low-rank 0.01 --out acts.safetensors
""",
        _fit_options,
    )
    add(
        actions,
        "steer",
        _steer,
        "show predictions before and after steering with a conceptor expression",
        """
examples:
  drawings of the held-out style, reduced to what Noto drawings use:
    clipsteer conceptor steer noto.safetensors
  food, and not what is particular to Noto, twice as strong; terms apply from left to right:
    clipsteer conceptor steer food.safetensors --and-not noto.safetensors --beta 2
  the complement, on the patches of your own images, among your own words:
    clipsteer conceptor steer acts.safetensors --not --tokens patches --data photos/ \\
        --words words.txt
""",
        _steer_options,
    )


def _fit_options(p: argparse.ArgumentParser) -> None:
    add_model(p)
    add_data(p, "images to fit to (default: the bundled drawings)")
    p.add_argument(
        "--style", help="of the bundled drawings, this style alone: noto, fluent or twemoji"
    )
    p.add_argument(
        "--category", help="of the bundled drawings, this category alone, such as food-drink"
    )
    p.add_argument(
        "--store",
        type=Path,
        metavar="DIR",
        help="activations on disk in place of a model and images",
    )
    add_site(p, "taken")
    size = p.add_mutually_exclusive_group()
    size.add_argument(
        "--aperture",
        type=_aperture,
        default="gradient",
        metavar="A",
        help="a number, or 'gradient': where the conceptor changes most with it (default)",
    )
    size.add_argument(
        "--quota",
        type=float,
        metavar="Q",
        help="the aperture that keeps this share of the dimensions",
    )
    p.add_argument(
        "--centre",
        nargs="?",
        const="",
        metavar="PATH",
        help="fit about the mean activation of these images (default: all bundled drawings)",
    )
    p.add_argument(
        "--per-class", action="store_true", help="one conceptor for each class of the images"
    )
    p.add_argument(
        "--low-rank",
        type=float,
        metavar="TOL",
        help="drop eigenvalues up to TOL; the error is shown",
    )
    p.add_argument(
        "--batch-size",
        type=whole,
        default=64,
        metavar="N",
        help="images a forward pass (default: 64)",
    )
    p.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="safetensors file to write"
    )


def _steer_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "conceptor", type=Path, metavar="FILE", help="written by clipsteer conceptor fit"
    )
    p.add_argument("--not", dest="negate", action="store_true", help="start from its complement")
    for flag, what in (("and", "AND"), ("or", "OR"), ("and-not", "AND NOT")):
        p.add_argument(
            f"--{flag}",
            dest="terms",
            action="append",
            type=partial(_term, flag),
            metavar="FILE",
            help=f"{what} this one; repeatable",
        )
    p.add_argument(
        "--class", dest="chosen", metavar="NAME", help="of a --per-class file, this class"
    )
    p.add_argument(
        "--scale-aperture", type=float, metavar="G", help="multiply the aperture of the result by G"
    )
    p.add_argument("--beta", type=float, default=1.0, help="strength (default: 1)")
    p.add_argument(
        "--form",
        choices=("project", "residual"),
        default="project",
        help="h becomes β·C·h (default; the paper's), or β·C·h + h (its authors' code)",
    )
    add_model(p, None, "what the conceptor was fitted on")
    add_data(p, "images to look at (default: the bundled held-out style)")
    add_known_site(p, "what the conceptor was fitted on")
    add_shown(p)


def _term(op: str, text: str) -> tuple[str, str]:
    return op, text


def _aperture(text: str) -> float | str:
    if text == "gradient":
        return text
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0 or 'gradient', got {text!r}")
    return value


def _drawings(style: str | None, category: str | None) -> Any:
    from clipsteer.data.emoji import EmojiStyles

    emoji = EmojiStyles()
    known = sorted({c.category for c in emoji.concepts})
    if category is not None and category not in known:
        raise ValueError(f"--category must be one of {', '.join(known)}; got {category!r}")
    drawings = [
        (s, i)
        for s, i in emoji.drawings(style or "all")
        if category in (None, emoji.concepts[i].category)
    ]
    return emoji.dataset(drawings, "category")


def _activations(
    clip: Any, dataset: Any, hook_point: str, args: argparse.Namespace, title: str
) -> Iterator[Any]:
    """(rows, image of each row) of a data set, batch by batch, in its order."""
    import torch
    from tqdm import tqdm

    from clipsteer.clip.hooks import harvest
    from clipsteer.clip.pixels import image_loader

    loader = tqdm(
        image_loader(clip, dataset, args.batch_size), desc=title, unit="batch", disable=None
    )
    at = 0
    for rows in harvest(clip, loader, hook_point, tokens=args.tokens):
        images = min(args.batch_size, len(dataset) - at)
        yield (
            rows,
            torch.arange(at, at + images, device=rows.device).repeat_interleave(
                len(rows) // images
            ),
        )
        at += images


@lists_unreadable
def _fit(args: argparse.Namespace) -> int:
    import torch

    from clipsteer.clip.model import as_texts, default_hook_point, load, provenance
    from clipsteer.conceptors.conceptor import Conceptor
    from clipsteer.conceptors.fit import aperture_sweep, choose_aperture, correlation
    from clipsteer.sae.activations import ActivationStore
    from clipsteer.steering import AdditiveSteering

    if (args.data or args.store) and (args.style or args.category):
        raise ValueError(
            "--style and --category choose among the bundled drawings; leave out --data and --store"
        )
    if args.store is not None and (args.per_class or args.centre is not None or args.data):
        raise ValueError(
            "--store holds rows without classes; leave out --data, --per-class and --centre"
        )
    mean = None
    names = None
    classes = None
    if args.store is not None:
        store = ActivationStore(args.store)
        origin = store.provenance
        batches: Any = (store.read_shard(i) for i in range(len(store.shards)))
    else:
        clip = load(args.model, args.pretrained, device=device_of(args), **setup_options(args))
        dataset = (
            open_images(args, args.data) if args.data else _drawings(args.style, args.category)
        )
        hook_point = args.hook_point or default_hook_point(clip)
        origin = provenance(clip, hook_point, args.tokens)
        if args.centre is not None:
            background = open_images(args, args.centre or "emoji")
            rows = (r for r, _ in _activations(clip, background, hook_point, args, "background"))
            mean = AdditiveSteering.fit(rows).mean
        pairs = _activations(clip, dataset, hook_point, args, "activations")
        if args.per_class:
            if dataset.classes is None:
                raise ValueError(
                    "--per-class needs images with classes, such as a folder of class folders"
                )
            names = dataset.classes
            targets = torch.tensor(dataset.targets)
            classes = len(names)
            batches = ((rows, targets.to(rows.device)[image]) for rows, image in pairs)
        else:
            batches = (rows for rows, _ in pairs)
    R = correlation(batches, mean=mean, classes=classes)
    aperture = args.aperture if args.quota is None else choose_aperture(R, args.quota)
    metadata = as_texts(origin)
    if names is not None:
        metadata["classes"] = json.dumps(names)
    C = Conceptor.from_correlation(R, aperture, mean=mean, metadata=metadata)
    assert C.aperture is not None
    sweep = sorted([*aperture_sweep(R), aperture_sweep(R, [C.aperture])[0]])
    sys.stdout.write(f"{'aperture':>10} {'quota':>8} {'error':>8} {'gradient':>9}\n")
    for row in sweep:
        mark = "  <- this one" if row.aperture == C.aperture else ""
        sys.stdout.write(
            f"{row.aperture:10.4g} {row.quota:8.4f} {row.error:8.4f} {row.gradient:9.3f}{mark}\n"
        )
    if args.low_rank is not None:
        C, bound = C.low_rank(args.low_rank)
        sys.stdout.write(f"rank {C.rank} of {C.d}: off by at most {bound:.3g} of a row's norm\n")
    C.save(args.out)
    what = f"{len(names)} classes" if names is not None else f"quota {float(C.quota):.4f}"
    sys.stdout.write(f"{args.out}: {what}, d = {C.d}; next: clipsteer conceptor steer {args.out}\n")
    return 0


def _pick(path: Path | str, name: str | None) -> Any:
    from clipsteer.conceptors.conceptor import Conceptor
    from clipsteer.io.files import FileFormatError

    C = Conceptor.load(path)
    if not C.is_batch:
        return C
    try:
        names = [str(name) for name in json.loads(C.metadata.get("classes", "[]"))]
    except (ValueError, TypeError, RecursionError):
        raise FileFormatError(f"{path}: classes must be a list of names") from None
    if name not in names:
        raise ValueError(
            f"{path} holds several conceptors; pass --class, one of: {', '.join(names)}"
        )
    return C[names.index(name)]


@lists_unreadable
def _steer(args: argparse.Namespace) -> int:
    from clipsteer.steering import ConceptorSteering

    C = _pick(args.conceptor, args.chosen)
    provenance = C.metadata
    C = ~C if args.negate else C
    for op, path in args.terms or []:
        other = _pick(path, args.chosen)
        for key in _ORIGIN:
            ours, theirs = provenance.get(key), other.metadata.get(key)
            # a file saved without any of this says nothing that could differ, and old ones say
            # nothing of the setup
            silent = key == "setup" and None in (ours, theirs)
            if (
                ours != theirs
                and not silent
                and provenance.keys() & set(_ORIGIN)
                and other.metadata.keys() & set(_ORIGIN)
            ):
                raise ValueError(
                    f"conceptors of one {key} combine; {args.conceptor} has {ours}, {path} has "
                    f"{theirs}"
                )
        C = C | other if op == "or" else C & (other if op == "and" else ~other)
    if args.scale_aperture is not None:
        C = C.scale_aperture(args.scale_aperture)
    hook_point = args.hook_point or provenance.get("hook_point")
    if hook_point is None:
        raise ValueError(f"{args.conceptor} does not name its hook point; pass --hook-point")
    clip = load_known(args, provenance, args.conceptor)
    tokens: Any = args.tokens or provenance.get("tokens") or "all"
    steering = ConceptorSteering(C, args.beta, tokens=tokens, form=args.form)
    sys.stdout.write(f"{C}\n")
    dataset = open_images(args, args.data or "emoji", emoji="held-out:seen")
    return show_steering(args, clip, dataset, hook_point, steering)
