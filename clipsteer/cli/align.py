"""``clipsteer align``: which concepts two models share, and which only one has."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from clipsteer.cli.arguments import (
    Options,
    add_data,
    add_device,
    add_setup,
    count,
    device_of,
    read_words,
    setup_options,
)
from clipsteer.cli.images import lists_unreadable, open_images


def add_parser(commands: Any, add: Any) -> None:
    """Add ``clipsteer align``."""
    add(
        commands,
        "align",
        _align,
        "compare the concepts of two models, or of the layers of one",
        """
examples:
  what fine-tuning changed, by the classes of the images, layer by layer:
    clipsteer align emojiclip runs/noto/finetuned --data emoji:noto --score conceptor --out align/
  the layers of one model, by clusters (needs clipsteer[align]):
    clipsteer align ViT-B-32 --pretrained openai --data photos/ --out align/
  two models at two layers each, by the features of SAEs:
    clipsteer align runs/a runs/b --data photos/ --score sae --sae saes/8 --sae saes/10 --out align/
  in words, of models with a text tower:
    clipsteer align emojiclip runs/noto/finetuned --data emoji:noto --score splice --tokens cls \\
        --out align/

A command that was stopped goes on where it was when it is given again.
""",
        _align_options,
    )


def _align_options(p: argparse.ArgumentParser) -> None:
    from clipsteer.alignment.config import AlignmentConfig

    p.add_argument("a", metavar="A", help="a model, as clipsteer sae train --model takes it")
    p.add_argument(
        "b", metavar="B", nargs="?", help="the other (default: the layers of A are compared)"
    )
    p.add_argument("--pretrained", metavar="TAG", help="open_clip tag or weights file of A")
    p.add_argument("--pretrained-b", metavar="TAG", help="of B")
    add_setup(p)
    add_device(p)
    add_data(p, "images to compare on (default: the bundled drawings)")
    p.add_argument(
        "--max-images", type=count, metavar="N", help="evenly spaced (default: all of them)"
    )
    p.add_argument(
        "--hook-points",
        nargs="+",
        metavar="NAME",
        help="modules of A, or patterns (default: every block; with --sae theirs; for splice the "
        "embedding)",
    )
    p.add_argument(
        "--hook-points-b", nargs="+", metavar="NAME", help="of B (default: the same names)"
    )
    p.add_argument(
        "--sae",
        action="append",
        default=[],
        metavar="SAE",
        help="for --score sae, of the layer that it was trained on; repeatable",
    )
    p.add_argument(
        "--sae-b", action="append", metavar="SAE", help="of B; repeatable (default: those of A)"
    )
    p.add_argument(
        "--words",
        type=Path,
        metavar="FILE",
        help="for --score splice, one a line (default: the bundled concepts)",
    )
    p.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="for index.html, alignment.json, layers.csv and concepts.csv; rows and scores are "
        "kept there",
    )
    Options(AlignmentConfig).add(p)


@lists_unreadable
def _align(args: argparse.Namespace) -> int:
    from clipsteer.alignment.compare import align
    from clipsteer.alignment.page import spread_of, write_page
    from clipsteer.clip.model import load
    from clipsteer.data.dataset import spread
    from clipsteer.sae.model import SAE
    from clipsteer.splice.dictionary import ConceptDictionary

    config = args.options.read(args)
    if args.sae and config.score != "sae":
        raise ValueError(f"--sae goes with --score sae, not with {config.score}")
    device = device_of(args)
    models = [load(args.a, args.pretrained, device=device, **setup_options(args))]
    if args.b is not None:
        models.append(load(args.b, args.pretrained_b, device=device, **setup_options(args)))
    dataset = open_images(args, args.data or "emoji", emoji="trained", targets="subcategory")
    if args.max_images is not None:
        dataset = dataset.subset(spread(range(len(dataset)), args.max_images))
    dictionaries: list[Any] = [None, None]
    if config.score == "splice":
        words = read_words(args.words)
        for i, clip in enumerate(models):
            dictionaries[i] = ConceptDictionary.from_clip(clip, words, image_mean=dataset)

    def opened(paths: list[str] | None) -> Any:
        if paths is None:
            return None
        return [SAE.from_pretrained(path, device=device) for path in paths]

    compared = align(
        models[0],
        models[1] if len(models) > 1 else None,
        dataset,
        out=args.out,
        config=config,
        hook_points=args.hook_points,
        hook_points_b=args.hook_points_b,
        saes=opened(args.sae),
        saes_b=opened(args.sae_b),
        dictionary=dictionaries[0],
        dictionary_b=dictionaries[1],
    )
    # two models of one architecture are told apart by what was asked for
    compared.models.update(zip("AB", filter(None, (args.a, args.b))))
    written = compared.write(args.out)
    page = write_page(args.out / "index.html", compared, dataset)
    for (a, b), found in compared.matchings.items():
        universal = len(found.universal(config.universal))
        sys.stdout.write(
            f"{a} – {b}: {spread_of(compared.agreement(a, b))}, {len(found.matches)} concepts "
            f"matched, {universal} universal, unique {len(found.unique_a(config.universal))} and "
            f"{len(found.unique_b(config.universal))}\n"
        )
    sys.stdout.write("".join(f"{path}\n" for path in (page, *written)))
    return 0
