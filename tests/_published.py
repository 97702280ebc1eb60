"""Small architectures with published weights, as open_clip knows its own: tags, preprocessing, activation."""

from __future__ import annotations

import open_clip
import torch
from open_clip.pretrained import _PRETRAINED, _mccfg, _pcfg, _pecfg

from clipsteer.io.files import write_json, write_safetensors

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
TOWER = {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear"}
CONV = {**TOWER, "timm_model_name": "test_convnext", "timm_pool": "avg"}
# tag -> what is published with it
PUBLISHED = {
    "plain": _pcfg(url="x"),
    "quick": _pcfg(url="x", quick_gelu=True),
    "bilinear": _mccfg(url="x"),
    "squash": _pecfg(url="x", quick_gelu=False),
}


def publisher(folder, monkeypatch):
    """make(vision, tags) -> the name of a small architecture with weights under these tags, and their file."""
    published = {}

    def make(vision=VIT, tags=tuple(PUBLISHED)):
        name = f"published-{len(published)}"
        path = folder / f"{name}.json"
        write_json(path, {"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT})
        open_clip.add_model_config(path)
        monkeypatch.setitem(_PRETRAINED, name, {tag: PUBLISHED[tag] for tag in tags})
        torch.manual_seed(len(published))
        weights = folder / f"{name}.safetensors"
        write_safetensors(weights, open_clip.create_model(name).state_dict(), {"format": "pt"})
        published[name] = weights
        monkeypatch.setattr("open_clip.factory.download_pretrained", lambda cfg, **_: str(weights))
        return name, weights

    return make
