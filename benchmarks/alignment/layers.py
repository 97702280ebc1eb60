"""The paper's sanity check: does a layer agree most with its neighbours? And what do layers share?

    python -m benchmarks.alignment.layers --work work --out benchmarks/results/alignment/layers_emojiclip
    python -m benchmarks.alignment.layers --weights vit_s.safetensors --pictures pictures --work work \\
        --out benchmarks/results/alignment/layers_real_vit

EmojiCLIP on its own drawings, or DINOv2's ViT-S (weights of benchmarks.real_vit.weights) on the pictures of
benchmarks.real_vit.pictures. Patches at the same places of each picture, in all blocks; concepts by each score that can
be had: clusters (umap-learn and hdbscan), features of top-k SAEs trained on the same rows' images, and kinds by their
conceptors. The check is the share of blocks whose most agreeing other block is next to it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.real_vit.weights import NAME
from clipsteer.alignment.compare import Compared, align
from clipsteer.alignment.config import AlignmentConfig
from clipsteer.alignment.measure import neighbours_agree_most
from clipsteer.alignment.page import heat_map
from clipsteer.clip.model import CLIP, EMOJICLIP, load
from clipsteer.clip.pixels import pixel_batches
from clipsteer.continual.backbone import Encoder
from clipsteer.continual.plasticity import fit_saes
from clipsteer.data.dataset import ImageDataset, _Reader, read_image, spread
from clipsteer.data.emoji import EmojiStyles
from clipsteer.io.files import read_json, write_json
from clipsteer.sae.model import SAE

SCORES = ("clusters", "sae", "conceptor")


def pictures_of(folder: Path, count: int) -> ImageDataset:
    """Evenly spaced pictures with their kinds."""
    listed = spread(read_json(folder / "index.json"), count)
    kinds = sorted({picture["kind"] for picture in listed})
    files = [(folder / picture["file"],) for picture in listed]
    return ImageDataset(_Reader(read_image, files), [kinds.index(p["kind"]) for p in listed], kinds)


def saes_of(clip: CLIP, images: ImageDataset) -> list[SAE]:
    """An SAE of every block, from all tokens of these images."""
    tower = Encoder.from_clip(clip)
    size = {"d_sae": 4 * tower.width, "k": 16, "steps": 500}
    found = fit_saes(tower.module, tower.blocks, pixel_batches(tower, images, 32), **size)
    for block, sae in found.items():
        sae.metadata.update(tower.origins[block])
    return list(found.values())


def figures(compared: Compared) -> dict[str, Any]:
    own = compared.matrix()
    matrix = [[found.value for found in row] for row in own]
    above = [[found.details["above_chance"] for found in row] for row in own]
    return {
        "neighbours agree most": neighbours_agree_most(matrix),
        "within two": neighbours_agree_most(matrix, 2),
        "neighbours agree most, above chance": neighbours_agree_most(above),
        "matrix": matrix,
        "above chance": above,
        "intervals": [[[found.low, found.high] for found in row] for row in own],
        "concepts": [len(compared.proximity[layer].names) for layer in compared.layers],
        "universal": [
            {
                "a": str(a),
                "b": str(b),
                "matched": len(found.matches),
                "universal": len(found.universal()),
                "unique_a": len(found.unique_a()),
                "unique_b": len(found.unique_b()),
            }
            for (a, b), found in compared.matchings.items()
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="of benchmarks.real_vit.weights (default: EmojiCLIP)")
    parser.add_argument("--pictures", type=Path, help="of benchmarks.real_vit.pictures")
    parser.add_argument("--work", type=Path, required=True, help="for rows and scores, which are kept")
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="PATH.json and PATH_SCORE.svg")
    parser.add_argument("--images", type=int, default=1600)
    parser.add_argument("--rows", type=int, default=2, help="patches of a picture (default: 2)")
    parser.add_argument("--matched", type=int, default=48, help="concepts of a layer (default: 48)")
    parser.add_argument("--image-size", type=int, default=98, help="of the real ViT (default: 98)")
    parser.add_argument("--scores", nargs="+", choices=SCORES, default=list(SCORES))
    args = parser.parse_args()
    if args.weights is None:
        clip = load(EMOJICLIP)
        emoji = EmojiStyles()
        images = emoji.dataset(spread(emoji.drawings("trained"), args.images), "category")
    else:
        clip = load(f"timm:{NAME}", args.weights, image_size=args.image_size)
        images = pictures_of(args.pictures, args.images)
    body: dict[str, Any] = {"images": len(images), "rows of an image": args.rows}
    file = args.out.with_suffix(".json")
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists():
        body |= {score: row for score, row in read_json(file).items() if score in SCORES}
    for score in args.scores:
        config = AlignmentConfig(score=score, rows_per_image=args.rows, matched=args.matched)
        saes = saes_of(clip, images) if score == "sae" else ()
        out = args.work / args.out.name / score
        compared = align(clip, None, images, out=out, config=config, saes=saes)
        body[score] = figures(compared)
        for above, end in ((False, ""), (True, "_above_chance")):
            chart = heat_map(compared, "A", "A", above_chance=above)
            chart.write(args.out.with_name(f"{args.out.name}_{score}{end}.svg"))
        write_json(file, body)
        sys.stdout.write(f"{score}: {body[score]['neighbours agree most']:.3f} of the blocks\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
