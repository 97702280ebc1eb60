"""``clipsteer splice``: what an image is made of, in a model's own words."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from clipsteer.cli.arguments import (
    add_data,
    add_model,
    device_of,
    read_words,
    setup_options,
    whole,
)


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


def _splice(args: argparse.Namespace) -> int:
    import torch.nn.functional as F

    from clipsteer.clip.model import load
    from clipsteer.data.dataset import read_image
    from clipsteer.data.files import open_dataset
    from clipsteer.io.files import write_json
    from clipsteer.splice.dictionary import ConceptDictionary

    images = [read_image(path) for path in args.images]
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
        mean_of = open_dataset(args.data or "emoji", emoji="trained:seen")
        dictionary = ConceptDictionary.from_clip(clip, read_words(args.words), image_mean=mean_of)
        if args.dictionary is not None:
            dictionary.save(args.dictionary)
    embeddings = clip.encode_images(images)
    found = dictionary.decompose(embeddings, args.l1)
    cosine = F.cosine_similarity(
        dictionary.reconstruct(found.weights), embeddings.to(dictionary.matrix)
    )
    rows = []
    for path, weights, l0, near in zip(
        args.images, found.weights, found.l0.tolist(), cosine.tolist()
    ):
        values, places = weights.sort(descending=True, stable=True)
        concepts = [
            [dictionary.concepts[i], v] for v, i in zip(values[:l0].tolist(), places[:l0].tolist())
        ]
        rows.append({"image": str(path), "l0": l0, "cosine": near, "concepts": concepts})
        sys.stdout.write(f"{path}: {l0} concepts, cosine of the reconstruction {near:.3f}\n")
        sys.stdout.writelines(
            f"  {value:.3f}  {concept}\n" for concept, value in concepts[: args.top]
        )
    if not bool(found.converged.all()):
        worst = float(found.violation.max())
        sys.stderr.write(
            f"clipsteer: {int((~found.converged).sum())} not solved to 1e-6 (worst {worst:.1e})\n"
        )
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(
            args.out,
            {"model": clip.name, "pretrained": clip.pretrained, "l1": args.l1, "images": rows},
        )
    return 0
