"""``clipsteer splice``: what an image is made of, in a model's own words."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from clipsteer.cli.arguments import (
    _text,
    add_data,
    add_model,
    device_of,
    read_words,
    setup_options,
    whole,
)
from clipsteer.cli.images import left_out, lists_unreadable, open_images


def add_parser(commands: Any, add: Any) -> None:
    """Add ``clipsteer splice``."""
    add(
        commands,
        "splice",
        _splice,
        "decompose images into a few text concepts, as the model sees them",
        """
examples:
  with the bundled model and its concepts:
    clipsteer splice cat.png dog.png
  with a real CLIP and your own words, centred on photos of yours; the dictionary is kept for the
  next time:
    clipsteer splice photos/*.jpg --model ViT-B-32 --pretrained laion2b_s34b_b79k --data photos/ \\
        --words words.txt --dictionary words-b32/
""",
        _splice_options,
    )


def _splice_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    add_model(p)
    add_data(p, "images whose mean is the centre (default: the bundled drawings)")
    p.add_argument(
        "--words",
        type=Path,
        metavar="FILE",
        help="concepts, one a line (default: the bundled ones)",
    )
    p.add_argument(
        "--dictionary",
        type=Path,
        metavar="DIR",
        help="read the concepts from here; made if missing",
    )
    p.add_argument(
        "--l1", type=float, default=0.25, help="the larger, the fewer concepts (default: 0.25)"
    )
    p.add_argument(
        "--top", type=whole, default=8, metavar="N", help="concepts shown an image (default: 8)"
    )
    p.add_argument("--out", type=Path, metavar="FILE", help="write the decompositions as JSON")


def _readable(args: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """The paths of the images, and the images; with --skip-unreadable those that can be read."""
    from clipsteer.io.files import FileFormatError
    from clipsteer.io.images import read_image

    paths = []
    images = []
    for path in args.images:
        try:
            images.append(read_image(path))
        except (FileFormatError, OSError) as error:
            if not args.skip_unreadable:
                raise
            left_out(args)[str(error)] = None
        else:
            paths.append(path)
    if not images:
        first = next(iter(left_out(args)))
        raise ValueError(f"none of {len(args.images)} images can be read; the first: {first}")
    return paths, images


@lists_unreadable
def _splice(args: argparse.Namespace) -> int:
    import torch.nn.functional as F

    from clipsteer.clip.model import load
    from clipsteer.io.files import write_json
    from clipsteer.splice.dictionary import ConceptDictionary

    paths, images = _readable(args)
    clip = load(args.model, args.pretrained, device=device_of(args), **setup_options(args))
    if args.dictionary is not None and args.dictionary.exists():
        dictionary = ConceptDictionary.load(args.dictionary, device=device_of(args))
        model = (dictionary.metadata.get("clip_model"), dictionary.metadata.get("pretrained"))
        if model != (clip.name, clip.pretrained):
            raise ValueError(
                f"--dictionary {args.dictionary} belongs to {model}, not to "
                f"{(clip.name, clip.pretrained)}"
            )
        known = dictionary.metadata.get("setup")
        setup = None if clip.setup is None else clip.setup.to_json()
        if None not in (known, setup) and known != setup:
            raise ValueError(
                f"--dictionary {args.dictionary} belongs to {clip.name} set up as {known}, not as "
                f"{setup}"
            )
        if args.words is not None and dictionary.concepts != read_words(args.words):
            raise ValueError(
                f"--dictionary {args.dictionary} holds other concepts than --words {args.words}"
            )
    else:
        mean_of = open_images(args, args.data or "emoji", emoji="trained:seen")
        dictionary = ConceptDictionary.from_clip(clip, read_words(args.words), image_mean=mean_of)
        if args.dictionary is not None:
            dictionary.save(args.dictionary)
    embeddings = clip.encode_images(images)
    found = dictionary.decompose(embeddings, args.l1)
    cosine = F.cosine_similarity(
        dictionary.reconstruct(found.weights), embeddings.to(dictionary.matrix)
    )
    rows = []
    for path, weights, l0, near in zip(paths, found.weights, found.l0.tolist(), cosine.tolist()):
        values, places = weights.sort(descending=True, stable=True)
        concepts = [
            [dictionary.concepts[i], v] for v, i in zip(values[:l0].tolist(), places[:l0].tolist())
        ]
        rows.append({"image": str(path), "l0": l0, "cosine": near, "concepts": concepts})
        _text(f"{path}: {l0} concepts, cosine of the reconstruction {near:.3f}")
        for concept, value in concepts[: args.top]:
            _text(f"  {value:.3f}  {concept}")
    if not bool(found.converged.all()):
        worst = float(found.violation.max())
        sys.stderr.write(
            f"clipsteer: {int((~found.converged).sum())} not solved to 1e-6 (worst {worst:.1e})\n"
        )
    if args.out is not None:
        write_json(
            args.out,
            {"model": clip.name, "pretrained": clip.pretrained, "l1": args.l1, "images": rows},
        )
    return 0
