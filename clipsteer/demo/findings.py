"""The demo: what a CLIP model sees, a sparse autoencoder trained on its tokens, what steering a
feature does, conceptors, and a WiSE-FT curve.

``run`` leaves a page, the SAE and the figures in a folder. The same seed on the same machine gives
the same figures.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import clipsteer
from clipsteer.clip.model import CLIP, EMOJICLIP, default_hook_point, load
from clipsteer.clip.zero_shot import EMOJI_TEMPLATES, SIMPLE_TEMPLATES, zero_shot_head
from clipsteer.continual.metrics import Run
from clipsteer.data.dataset import ImageDataset, spread
from clipsteer.demo import conceptors as demo_conceptors
from clipsteer.demo import continual as demo_continual
from clipsteer.demo import page as demo_page
from clipsteer.demo import wise_ft as demo_wise_ft
from clipsteer.demo.explore import (
    Feature,
    Pictures,
    Predictor,
    augmented,
    choose,
    count_steerable,
    describe,
    emoji_pictures,
    few,
    folder_pictures,
    largest,
    look,
    pixels,
    probe,
    response,
    zero_shot,
)
from clipsteer.ensembles.robustness import averages
from clipsteer.io.files import write_json
from clipsteer.sae.features import feature_peaks
from clipsteer.sae.model import SAE

# multiply-adds of SAE training that two CPU cores do in a minute: what turns --minutes into a
# number of steps
_WORK_PER_MINUTE = 1e12
# wide models get more time than that: with fewer steps a minute there would be little to see
_LEAST_STEPS_PER_MINUTE = 800
_BATCH, _EXPANSION, _K = 1024, 8, 16
_TRAIN_TOKENS = 60_000
_EVALUATED = 192  # images a group
# strengths, as multiples of a feature's largest activation
MULTIPLES = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
PROBE = 5.0
OTHER_PROBES = (1.0, 2.0, 10.0)
STEERABLE = 0.10


@dataclass(frozen=True)
class Demo:
    """What a run left behind."""

    page: Path
    sae: Path
    metrics: Path
    figures: dict[str, Any]

    def lines(self) -> list[str]:
        """A summary in a few lines."""
        out = []
        for row in self.figures.get("zero_shot", []):
            shown = ", ".join(f"{w}-way {v['accuracy']:.1%}" for w, v in row["ways"].items())
            out.append(f"zero-shot, {row['group']} ({row['images']} images): {shown}")
        for group, row in self.figures["sae"]["evaluation"].items():
            out.append(f"SAE, {group}: explained variance {row['ev']:.3f}, L0 {row['l0']:.1f}")
        share = self.figures["steering"]
        if rows := self.figures["conceptors"].get("conceptors"):
            before, after = (
                sum(way["mass"][k] for k, way in enumerate(ways)) / len(rows)
                for ways in (
                    [self.figures["conceptors"]["probability"]["unsteered"]] * len(rows),
                    [row["effect"]["itself"] for row in rows],
                )
            )
            out.append(
                f"conceptors, probability of their own kind: {before:.1%} unsteered, {after:.1%} "
                f"steered"
            )
        if rows := self.figures["wise_ft"].get("rows"):
            line = {
                row["alpha"]: row["shifted"] for row in averages(rows) if row["method"] == "weight"
            }
            shown = ", ".join(f"{line[a]:.1%} at alpha {a:g}" for a in (0.0, 0.5, 1.0) if a in line)
            out.append(f"WiSE-FT, shifted styles: {shown}")
        for title, run in self.figures["continual"].get("runs", {}).items():
            out.append(
                f"class-incremental, {title}: {Run.from_json(run).A_last:.1%} on all classes at "
                f"the end"
            )
        out.append(
            f"steerable (S > {STEERABLE}): {share['steerable']} of {share['probed']} features "
            f"probed"
        )
        return out


def run(
    out: str | Path = "clipsteer-demo",
    *,
    seed: int = 0,
    model: str = EMOJICLIP,
    pretrained: str | None = None,
    data: str | Path | None = None,
    hook_point: str | None = None,
    minutes: float = 1.0,
    max_images: int | None = None,
    device: str = "cpu",
) -> Demo:
    """Run the demo into the folder ``out``: report.html, metrics.json, sae/ and, where the images
    have a few classes, conceptors.safetensors.

    Args:
        seed: of the SAE, its batches and what is drawn.
        model, pretrained: as in ``clipsteer.load``; data: as in ``clipsteer.data.open_dataset``, by
            default the bundled drawings in four cells.
        hook_point: a block's module name; by default the last but one of the image tower.
        minutes: SAE training, in nominal minutes of two CPU cores. It sets the number of steps, so
            that the result does not depend on how fast the machine is; wide models get at least 800
            a minute, which takes longer.
        max_images: at most so many; by default all bundled drawings for EmojiCLIP and 1000
            otherwise.
    """
    if not 0 < minutes < math.inf:
        raise ValueError(f"demo: minutes must be positive, got {minutes}")
    if max_images is not None and max_images < 16:
        raise ValueError(f"demo: max_images must be at least 16, got {max_images}")
    out = Path(out)
    clip = load(model, pretrained, device=device)
    clip.need_text("demo")
    if data is not None and str(data) == "emoji":
        data = None
    limit = max_images if model == EMOJICLIP and data is None else max_images or 1000
    pictures = (
        emoji_pictures(limit, model == EMOJICLIP)
        if data is None
        else folder_pictures(data, seed, limit or 1000)
    )
    hook_point = hook_point or default_hook_point(clip)
    tokens, embeddings = look(clip, pictures, hook_point)
    # the prompts of a large vocabulary cost a real text tower minutes, so one template does for it
    head = zero_shot_head(
        clip, pictures.vocabulary, EMOJI_TEMPLATES if model == EMOJICLIP else SIMPLE_TEMPLATES
    ).cpu()
    figures: dict[str, Any] = {
        "model": {"name": model, "pretrained": pretrained, "hook_point": hook_point},
        "data": {"path": str(data) if data else "EmojiStyles", "images": len(pictures.dataset)},
        "seed": seed,
        "vocabulary": len(pictures.vocabulary),
    }
    if pictures.truth is not None:
        figures["zero_shot"] = zero_shot(pictures, embeddings, head[: len(pictures.classes)])
    sae, history = train(clip, pictures, tokens, hook_point, seed, minutes, out)
    figures["sae"] = {**sae.config, "evaluation": evaluate(clip, pictures, sae)}
    peaks = feature_peaks(sae, tokens)
    predictor = Predictor(clip, sae, hook_point, head)
    # a pass over the probe images for every feature: fewer of both where a pass is dear
    limit, probes = (256, 24) if tokens.shape[-1] <= 256 else (32, 8)
    probe_rows = spread(pictures.held_out, probes)
    probed = pixels(clip, pictures, probe_rows)
    dictionary = clipsteer.ConceptDictionary(pictures.vocabulary, head, embeddings.mean(0))
    features = describe(peaks, embeddings, dictionary, limit)
    if not features:
        least, most = few(len(tokens))
        raise RuntimeError(
            f"demo: no SAE feature is active on {least} to {most} of the {len(tokens)} images; "
            f"take more images "
            "(--max-images, --data), or train longer (--minutes)"
        )
    probe(predictor, pictures, probe_rows, features, PROBE)
    chosen = choose(features, 6)
    shown = [study(predictor, pictures, embeddings, feature, probed) for feature in chosen]
    steerable = {PROBE: sum(f.steerability > STEERABLE for f in features)}
    for multiple in OTHER_PROBES:
        steerable[multiple] = count_steerable(
            predictor, pictures, probe_rows, features, multiple, STEERABLE
        )
    figures["steering"] = {
        "probed": len(features),
        "probe_images": len(probed),
        "probe_rows": probe_rows,
        "multiple_of_peak": PROBE,
        "threshold": STEERABLE,
        "active_on": few(len(tokens)),
        "steerable": steerable[PROBE],
        "steerable_by_multiple": {f"{m:g}": steerable[m] for m in sorted(steerable)},
        "scores": sorted((f.steerability for f in features), reverse=True),
        "features": [{**asdict(f), "response": s} for f, s in zip(chosen, shown)],
    }
    figures["conceptors"] = demo_conceptors.measure(
        predictor, pictures, tokens, embeddings, data is None, out / "conceptors.safetensors"
    )
    if model == EMOJICLIP and data is None:
        figures["wise_ft"] = demo_wise_ft.measure(seed, device)
        figures["continual"] = demo_continual.measure(seed, device)
    else:
        figures["wise_ft"] = {"skipped": demo_wise_ft.ELSEWHERE}
        figures["continual"] = {"skipped": demo_continual.ELSEWHERE}
    write_json(out / "metrics.json", figures)
    page = demo_page.build(predictor, pictures, figures, history, tokens, embeddings, chosen, out)
    return Demo(page.write(out / "report.html"), out / "sae", out / "metrics.json", figures)


def steps_in(minutes: float, batch: int, d_in: int) -> int:
    """Steps of SAE training in nominal minutes of two CPU cores."""
    per_minute = _WORK_PER_MINUTE / (batch * d_in * d_in * _EXPANSION)
    return max(50, round(minutes * max(per_minute, _LEAST_STEPS_PER_MINUTE)))


def train(
    clip: CLIP,
    pictures: Pictures,
    tokens: Tensor,
    hook_point: str,
    seed: int,
    minutes: float,
    out: Path,
) -> tuple[SAE, list[dict[str, float]]]:
    """Train a top-k SAE on the tokens of the training rows and save it; few pictures are seen in
    several variants."""
    rows = tokens[pictures.train]
    parts = [rows.flatten(0, 1)]
    views = min(3, _TRAIN_TOKENS // len(parts[0]))
    generator = torch.Generator().manual_seed(seed)
    if views:
        moved = pictures.variant(pictures.train * views, lambda image: augmented(image, generator))
        parts.append(look(clip, moved, hook_point, label="augmented")[0].flatten(0, 1))
    activations = torch.cat(parts)
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
    metadata = {
        "clip_model": clip.name,
        "pretrained": clip.pretrained,
        "hook_point": hook_point,
        "tokens": "all",
    }
    history: list[dict[str, float]] = []
    sae = clipsteer.train_sae(
        activations, config, metadata=metadata, on_log=history.append, device=clip.device
    )
    sae.save_pretrained(out / "sae")
    return sae, history


def study(
    predictor: Predictor, pictures: Pictures, embeddings: Tensor, feature: Feature, probed: Tensor
) -> dict[str, Any]:
    """What one feature does: its target's mean probability by strength, and its top images without
    it."""
    target = pictures.vocabulary.index(feature.effect[0][0])
    curve = response(predictor, feature, probed, target, MULTIPLES)
    own = pixels(predictor.clip, pictures, feature.top)
    clean = predictor.of(embeddings[feature.top])
    feature.removed = largest(
        (predictor.steered(own, feature.index, 0.0) - clean).mean(0), pictures.vocabulary, 6
    )
    return {"target": feature.effect[0][0], "multiples": list(MULTIPLES), "probability": curve}


def evaluate(clip: CLIP, pictures: Pictures, sae: SAE) -> dict[str, dict[str, Any]]:
    """What the SAE preserves, on a part of every group; the classes are the group's own, with one
    prompt each."""
    found = {}
    for group, members in pictures.groups.items():
        rows = spread(members, _EVALUATED)
        truth = [int(pictures.truth[i]) for i in rows] if pictures.truth is not None else []
        present = sorted(set(truth))
        labels = [present.index(t) for t in truth] or ["" for _ in rows]
        names = [pictures.classes[c] for c in present] if truth else None
        dataset = ImageDataset(lambda i, rows=rows: pictures.dataset[rows[i]][0], labels, names)
        template = EMOJI_TEMPLATES[:1] if clip.name == EMOJICLIP else SIMPLE_TEMPLATES
        found[group] = clipsteer.evaluate_sae(sae, clip, dataset, templates=template)
    return found
