"""The demo's page: the findings of ``clipsteer.demo`` in words, tables, pictures and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from clipsteer.clip.model import EMOJICLIP
from clipsteer.data.dataset import spread
from clipsteer.demo import continual as demo_continual
from clipsteer.demo import features as demo_features
from clipsteer.demo import reference as demo_reference
from clipsteer.demo import sections as demo_sections
from clipsteer.demo.explore import Feature, Predictor
from clipsteer.demo.pictures import Pictures
from clipsteer.demo.sections import percent
from clipsteer.report.page import (
    Html,
    Page,
    code,
    figures,
    stats,
    table,
    text,
)


def build(
    predictor: Predictor,
    pictures: Pictures,
    found: Mapping[str, Any],
    history: Sequence[Mapping[str, float]],
    tokens: Tensor,  # (N, T, d)
    embeddings: Tensor,  # (N, e)
    chosen: Sequence[Feature],
    saved: Path,
    sae_folder: Path,
) -> Page:
    """The whole page; ``saved`` is the demo's folder. Nothing in it depends on when or how fast the
    demo ran."""
    clip = predictor.clip
    sae = predictor.sae
    weights = f" ({clip.pretrained})" if clip.pretrained else ""
    data = found["data"]
    images = "the bundled drawings" if data["path"] == "EmojiStyles" else data["path"]
    page = Page(
        f"{clip.name} on {images}: what it sees, and how to steer it",
        f"{clip.name}{weights}, {data['images']} images, sparse autoencoder at "
        f"{predictor.hook_point}",
        footer=f"Made by clipsteer demo, seed {found['seed']}. The figures are in metrics.json, "
        f"the SAE in {sae_folder}, the conceptors in conceptors.safetensors.",
    )
    page.lead(_headline(found))
    if clip.name == EMOJICLIP:
        page.lead(
            text(
                "EmojiCLIP is a small model that comes with clipsteer, trained from scratch on "
                "drawings of emoji. It is not OpenAI's CLIP; run the demo with --model, "
                "--pretrained and --data for a real one.",
                css="note",
            )
        )
    page.section("What the model sees", *_seeing(pictures, found, embeddings, predictor))
    page.section("The sparse autoencoder", *demo_sections.training(sae, found, history))
    page.section("Features", *demo_features.features(predictor, pictures, tokens, chosen, found))
    page.section(
        "Steering one feature up and down",
        *demo_features.steering(predictor, pictures, embeddings, chosen, found),
    )
    conceptors = saved / "conceptors.safetensors"
    page.section(
        "Conceptors",
        *demo_sections.conceptors(pictures, found["conceptors"], predictor.hook_point, conceptors),
    )
    page.section("Averaging before and after fine-tuning", *demo_sections.wise_ft(found["wise_ft"]))
    page.section("Learning classes task by task", *demo_continual.of_measured(found["continual"]))
    if clip.name == EMOJICLIP:
        page.section("Training with a reference model", *demo_reference.section())
    multiple = found["steering"]["multiple_of_peak"]
    page.section(
        "Do it yourself",
        *_snippet(clip, predictor.hook_point, chosen[0], multiple, sae_folder, found),
    )
    return page


def _plus_minus(found: Mapping[str, float]) -> str:
    return f"{100 * found['accuracy']:.1f}\u00a0±\u00a0{100 * found['sem']:.1f}\u00a0%"


def _held_out(rows: Sequence[Any]) -> int:
    """Of the groups, the one to show: known classes, new pictures."""
    return 2 if len(rows) == 4 else len(rows) - 1


def _headline(found: Mapping[str, Any]) -> Html:
    evaluation = found["sae"]["evaluation"]
    group, held_out = list(evaluation.items())[_held_out(evaluation)]
    share = found["steering"]
    limit = f"S > {share['threshold']} at {share['multiple_of_peak']:g} × peak"
    items: list[tuple[Any, ...]] = []
    if "zero_shot" in found:
        row = found["zero_shot"][_held_out(found["zero_shot"])]
        ways, best = max(row["ways"].items())
        how = "zero-shot" if found["named_by"] == "text" else "nearest class mean"
        items.append((f"{how}, {ways} candidates", percent(best["accuracy"]), row["group"]))
    items += [
        ("explained variance", f"{held_out['ev']:.3f}", group),
        ("active features a token", f"{held_out['l0']:.0f}", f"of {found['sae']['d_sae']}"),
        ("steerable features", f"{share['steerable']} of {share['probed']}", limit),
    ]
    return stats(items)


def _seeing(
    pictures: Pictures,
    found: Mapping[str, Any],
    embeddings: Tensor,  # (N, e)
    predictor: Predictor,
) -> list[Html]:
    parts = []
    if "zero_shot" in found:
        own = predictor.clip.name == EMOJICLIP and len(pictures.groups) == 4
        parts += _zero_shot(found["zero_shot"], own, found["named_by"])
    shown = spread(pictures.held_out, 12)
    best = predictor.of(embeddings[shown]).max(-1)
    items = []
    for row, p, index in zip(shown, best.values.tolist(), best.indices.tolist()):
        guess = pictures.vocabulary[index]
        name = pictures.names[row]
        caption = f"{name}: seen as {guess}, {p:.0%}"
        if pictures.truth is not None:
            # the vocabulary begins with the classes
            right = int(pictures.truth[row]) == index
            caption = f"✓ {name}, {p:.0%}" if right else f"✗ {caption}"
        items.append((pictures.thumb(row), caption, f"{name}, seen as {guess}"))
    size = len(pictures.vocabulary)
    parts.append(text(f"Some images, and what the model takes them for among {size} names:"))
    return [*parts, figures(items, size="6.4rem")]


_WAYS = {
    "text": "Zero-shot classification: the model picks the name that fits the image best",
    "class means": "The model has no text tower. It picks the class whose mean, over the images "
    "of the first group, is the nearest",
}


def _zero_shot(found: Sequence[Mapping[str, Any]], own: bool, named_by: str) -> list[Html]:
    rows = []
    for row in found:
        *few, (everything, best) = row["ways"].items()
        cells = {ways: _plus_minus(accuracy) for ways, accuracy in few}
        rows.append(
            [
                row["group"],
                row["images"],
                cells.get(10, "–"),
                cells.get(50, "–"),
                _plus_minus(best),
                everything,
                percent(best["chance"]),
            ]
        )
    seen = " The first row is of images that the model was trained on." if own else ""
    return [
        text(
            f"{_WAYS[named_by]}, among N "
            "names of which one is right. 10 and 50 names: the mean over all draws of wrong names, "
            "so chance is 10 % and 2 %."
        ),
        table(
            ["images", "count", "10 names", "50 names", "all names", "names", "chance"],
            rows,
            caption="Accuracy ± standard error over the images." + seen,
        ),
    ]


def _snippet(
    clip: Any,
    hook_point: str,
    feature: Feature,
    multiple: float,
    saved: Path,
    found: Mapping[str, Any],
) -> list[Html]:
    name = repr(clip.name) + (f", {clip.pretrained!r}" if clip.pretrained else "")
    asked = found["model"].get("setup", {})
    name += "".join(f", {key}={value!r}" for key, value in asked.items())
    strength = multiple * feature.peak
    path = found["data"]["path"]
    if path == "EmojiStyles":
        source = "EmojiStyles"
        maker = "EmojiStyles()"
        images = '[dataset.image("twemoji", i) for i in dataset.indices("twemoji")[:8]]'
    else:
        source = "open_dataset"
        maker = f"open_dataset({path!r})"
        images = "[dataset[i][0] for i in range(8)]"
    return [
        text(
            "The model, the autoencoder and the feature of this page in Python, run from the "
            "folder where the demo ran:"
        ),
        code(
            "import clipsteer\nfrom clipsteer.clip import load\n"
            f"from clipsteer.data import {source}\n\n"
            f"clip = load({name})\n"
            f"sae = clipsteer.SAE.from_pretrained({str(saved)!r})\n"
            f"dataset = {maker}\n"
            f"images = {images}\n"
            f"steering = clipsteer.SAESteering(sae, {{{feature.index}: {strength:.1f}}})\n"
            f"with clipsteer.steer(clip, {{{hook_point!r}: steering}}):\n"
            "    embeddings = clip.encode_images(images)"
        ),
    ]
