"""Tokens of a real ViT on real pictures, for ``python -m benchmarks.step --tokens``.

    apt-get download tuxpaint-stamps-default && dpkg-deb -x tuxpaint-stamps-default_*.deb stamps
    python -m benchmarks.real_vit.tokens --weights vit_s.safetensors --pictures stamps --out tokens.safetensors

Pictures stand on white, their shorter side scaled to 224 pixels and the middle cut out. Kept are all tokens after a
block (by default 8, whose are better features here than the last block's), in the order of the pictures' names.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from benchmarks.real_vit.tower import prepare
from benchmarks.real_vit.weights import IMAGE_SIZE, model_of
from clipsteer.io.images import read_image

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


def pictures_in(folder: Path) -> list[Path]:
    """Image files below a folder, by name."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)


def tokens_of(weights: Path, pictures: list[Path], block: int, batch: int = 16) -> Iterator[Tensor]:
    """(pictures of a batch · 257, 384) each."""
    model = model_of(load_file(weights))
    del model.blocks[block + 1 :]
    model.norm = torch.nn.Identity()
    transform = prepare(IMAGE_SIZE)
    for at in tqdm(range(0, len(pictures), batch), unit="batch", disable=None):
        x = torch.stack([transform(read_image(path)) for path in pictures[at : at + batch]])
        with torch.no_grad():
            yield model.forward_features(x).flatten(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="of benchmarks.real_vit.weights")
    parser.add_argument("--pictures", type=Path, required=True, metavar="DIR")
    parser.add_argument("--block", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .safetensors file")
    args = parser.parse_args()
    tokens = torch.cat(list(tokens_of(args.weights, pictures_in(args.pictures), args.block)))
    save_file({"tokens": tokens}, args.out)
    sys.stdout.write(f"{args.out}: {tokens.shape[0]:,} tokens of width {tokens.shape[1]}\n")


if __name__ == "__main__":
    main()
