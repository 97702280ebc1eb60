"""What the experiments share: rows of EmojiCLIP's tower in one of its states, SAEs of its blocks, and tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from clipsteer.alignment.config import AlignmentConfig
from clipsteer.alignment.rows import EMBEDDING, Places, every_block, harvest_rows
from clipsteer.clip.model import CLIP, EMOJICLIP, load
from clipsteer.clip.pixels import pixel_batches
from clipsteer.continual.backbone import Encoder
from clipsteer.continual.plasticity import Plasticity, fit_saes, load_saes, save_saes
from clipsteer.data.files import open_dataset
from clipsteer.io.files import read_safetensors, write_safetensors
from clipsteer.sae.model import SAE

_STEPS = 1000


def block_saes(work: Path) -> tuple[dict[str, SAE], dict[str, Tensor]]:
    """An SAE of every block of EmojiCLIP as it comes, by the tower's names, and their usage by drawings of all kinds.

    They are what ``clipsteer cil --strategy macil:plasticity=1`` trains; made once, and kept in ``work``.
    """
    folder = work / "saes"
    usage = folder / "background.safetensors"
    if not usage.exists():
        tower = Encoder.from_clip(load(EMOJICLIP))
        images = open_dataset("emoji:trained:seen")
        size = {"d_sae": 4 * tower.width, "k": 16, "steps": _STEPS}
        saes = fit_saes(tower.module, tower.blocks, pixel_batches(tower, images), **size)
        folder.mkdir(parents=True, exist_ok=True)
        save_saes(folder, saes)
        found = Plasticity(saes).usage(tower.module, pixel_batches(tower, images))
        write_safetensors(usage, found)
    saes = load_saes(folder)
    return saes, {block: read_safetensors(usage)[block] for block in saes}


def rows_of(clip: CLIP, images: Any, tokens: str = "patches", each: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """Rows of every block, by the tower's names ("transformer.resblocks.0"), and the embeddings but for patches."""
    config = AlignmentConfig(tokens=tokens, rows_per_image=each, seed=seed)
    layers = every_block(clip) + ([EMBEDDING] if tokens != "patches" else [])
    places = Places((clip.preprocess,), each, seed)
    with TemporaryDirectory() as folder:
        found = harvest_rows(clip, images, layers, config, places, folder).layers
    return {name.removeprefix("visual."): rows for name, rows in found.items()}


def ranks(values: Sequence[float]) -> Tensor:
    """(n,) float64, about their mean; ties share the mean of their ranks."""
    v = torch.tensor(values, dtype=torch.float64)
    below = (v[:, None] > v).double().sum(1)
    equal = (v[:, None] == v).double().sum(1)
    return below + (equal - 1) / 2 - (len(v) - 1) / 2


def rank_correlation(runs: Sequence[tuple[Sequence[float], Sequence[float]]], draws: int = 2000) -> dict[str, float]:
    """Spearman's correlation of x and y, ranked within each run and pooled, with its 95 % percentile bootstrap over
    the members (classes, features) of every run."""
    x = torch.cat([ranks(x) / len(x) for x, _ in runs])
    y = torch.cat([ranks(y) / len(y) for _, y in runs])
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(x), (draws, len(x)), generator=generator)
    drawn = _pearson(x[rows], y[rows])
    low, high = drawn.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"value": float(_pearson(x, y)), "low": low, "high": high, "n": len(x)}


def _pearson(x: Tensor, y: Tensor) -> Tensor:
    """Along the last axis."""
    x, y = (v - v.mean(-1, keepdim=True) for v in (x, y))
    return (x * y).sum(-1) / (x.square().sum(-1) * y.square().sum(-1)).sqrt()
