"""What lies in a site's data files, and small things to build sites of."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path

import torch
from PIL import Image

import clipsteer
from clipsteer import SAE
from clipsteer.data.dataset import ImageDataset

HOOK = "visual.transformer.resblocks.1"
WORDS = ["red", "blue", "green", "a circle", "a square", "a tree"]
TOWER = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
COLOURS = ((200, 30, 30), (30, 30, 200), (30, 160, 30))


def read(out: Path, key: str):
    """The value of data/KEY.js, read as a browser reads it."""
    text = (out / "data" / f"{key}.js").read_text(encoding="ascii")
    head, tail = f'clipsteer.put("{key}",', ");\n"
    assert text.startswith(head)
    assert text.endswith(tail)
    value = json.loads(text[len(head) : -len(tail)])
    return json.loads(zlib.decompress(base64.b64decode(value))) if isinstance(value, str) else value


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def tower(folder: Path):
    """A CLIP of three blocks, its weights drawn."""
    path = folder / "ViT-browse-test.json"
    path.write_text(json.dumps(TOWER))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return clipsteer.load(path)


def sae(seed: int = 0, d_sae: int = 96, architecture: str = "topk", **more) -> SAE:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SAE(32, d_sae, architecture, 4, metadata={"hook_point": HOOK, **more}).eval()


def drawing(row: int) -> Image.Image:
    """Wider than high, so that the model's crop cuts something off."""
    picture = Image.new("RGB", (64, 40), "white")
    at = 12 + 5 * (row % 5)
    picture.paste(COLOURS[row % 3], (at, 4 + row % 7, at + 16, 30))
    return picture


def pictures(count: int = 70, *, classes: bool = True) -> ImageDataset:
    if classes:
        return ImageDataset(drawing, [row % 3 for row in range(count)], ["red", "blue", "green"])
    return ImageDataset(drawing, [None] * count)
