"""The demo's sparse autoencoder: trained on the tokens of some pictures, and what it preserves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import clipsteer
from clipsteer.clip.model import CLIP, EMOJICLIP, provenance
from clipsteer.clip.zero_shot import EMOJI_TEMPLATES, SIMPLE_TEMPLATES
from clipsteer.data.dataset import ImageDataset, spread
from clipsteer.demo.pictures import Pictures, augmented, look
from clipsteer.sae.model import SAE

# multiply-adds of SAE training that two CPU cores do in a minute: what turns --minutes into a
# number of steps
_WORK_PER_MINUTE = 1e12
# wide models get more time than that: with fewer steps a minute there would be little to see
_LEAST_STEPS_PER_MINUTE = 800
_BATCH = 1024
_EXPANSION = 8
_K = 16
_TRAIN_TOKENS = 60_000
_EVALUATED = 192  # images a group


def steps_in(minutes: float, batch: int, d_in: int) -> int:
    """Steps of SAE training in nominal minutes of two CPU cores."""
    per_minute = _WORK_PER_MINUTE / (batch * d_in * d_in * _EXPANSION)
    return max(50, round(minutes * max(per_minute, _LEAST_STEPS_PER_MINUTE)))


def train(
    clip: CLIP,
    pictures: Pictures,
    tokens: Tensor,  # (N, T, d)
    hook_point: str,
    seed: int,
    minutes: float,
    out: Path,
) -> tuple[SAE, list[dict[str, float]]]:
    """Train a top-k SAE on the tokens of the training rows and save it; few pictures are seen in
    several variants."""
    activations = tokens[pictures.train].flatten(0, 1)  # (rows, d)
    views = min(3, _TRAIN_TOKENS // len(activations))
    generator = torch.Generator().manual_seed(seed)
    if views:
        moved = pictures.variant(pictures.train * views, lambda image: augmented(image, generator))
        more, _ = look(clip, moved, hook_point, label="augmented")
        activations = torch.cat([activations, more.flatten(0, 1)])
    d_in = activations.shape[1]
    batch = min(_BATCH, len(activations))
    steps = steps_in(minutes, batch, d_in)
    config = clipsteer.TrainConfig(
        expansion=_EXPANSION,
        k=min(_K, d_in),
        batch_size=batch,
        steps=steps,
        lr=1e-3,
        warmup_steps=steps // 20,
        seed=seed,
        dead_after=4 * len(activations),
        log_every=max(1, steps // 60),
        normalize="layer_norm",
    )
    metadata = provenance(clip, hook_point, "all")
    history: list[dict[str, float]] = []
    sae = clipsteer.train_sae(
        activations, config, metadata=metadata, on_log=history.append, device=clip.device
    )
    sae.save_pretrained(out / "sae")
    return sae, history


def evaluate(
    clip: CLIP, pictures: Pictures, sae: SAE, hook_point: str
) -> dict[str, dict[str, Any]]:
    """What the SAE preserves, on a part of every group; the classes are the group's own, with one
    prompt each."""
    templates = EMOJI_TEMPLATES[:1] if clip.name == EMOJICLIP else SIMPLE_TEMPLATES
    found = {}
    for group, members in pictures.groups.items():
        dataset = _labelled(pictures, spread(members, _EVALUATED))
        found[group] = clipsteer.evaluate_sae(
            sae, clip, dataset, hook_point=hook_point, templates=templates
        )
    return found


def _labelled(pictures: Pictures, rows: Sequence[int]) -> ImageDataset:
    """These images with the classes that occur among them, if there are classes."""

    def read(i: int) -> Any:
        return pictures.dataset[rows[i]][0]

    if pictures.truth is None or pictures.classes is None:
        return ImageDataset(read, [""] * len(rows))
    truth = [int(pictures.truth[row]) for row in rows]
    present = sorted(set(truth))
    names = [pictures.classes[c] for c in present]
    return ImageDataset(read, [present.index(c) for c in truth], names)
