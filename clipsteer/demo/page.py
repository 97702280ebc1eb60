"""The demo's page: the findings of ``clipsteer.demo`` in words, tables, pictures and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from clipsteer.clip.model import EMOJICLIP
from clipsteer.clip.tokens import layout_at
from clipsteer.data.dataset import spread
from clipsteer.demo import continual as demo_continual
from clipsteer.demo import reference as demo_reference
from clipsteer.demo import sections as demo_sections
from clipsteer.demo.explore import Feature, Predictor, feature_heat
from clipsteer.demo.pictures import Pictures, pixels
from clipsteer.demo.sections import percent as _percent
from clipsteer.report.axes import Axis
from clipsteer.report.charts import Chart
from clipsteer.report.layers import Bars, Line
from clipsteer.report.page import (
    Html,
    Page,
    card,
    cards,
    code,
    figures,
    grid,
    heat_overlay,
    stats,
    table,
    text,
)

_SIZE = 128


def build(
    predictor: Predictor,
    pictures: Pictures,
    found: Mapping[str, Any],
    history: Sequence[Mapping[str, float]],
    tokens: Tensor,
    embeddings: Tensor,
    chosen: Sequence[Feature],
    saved: Path,
) -> Page:
    """The whole page; ``saved`` is the demo's folder. Nothing in it depends on when or how fast the
    demo ran."""
    clip, sae = predictor.clip, predictor.sae
    weights = f" ({clip.pretrained})" if clip.pretrained else ""
    page = Page(
        "What a CLIP model sees, and how to steer it",
        f"{clip.name}{weights}, sparse autoencoder at {predictor.hook_point}",
        footer=f"Made by clipsteer demo, seed {found['seed']}. The figures are in metrics.json, "
        "the SAE in sae/, the conceptors in conceptors.safetensors.",
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
    page.section("Features", *_features(predictor, pictures, tokens, chosen, found))
    page.section(
        "Steering one feature up and down",
        *_steering(predictor, pictures, embeddings, chosen, found),
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
        *_snippet(clip, predictor.hook_point, chosen[0], multiple, saved / "sae", found),
    )
    return page


def _title(feature: Feature) -> str:
    return f"Feature {feature.index}: {feature.looks_like[0][0]}"


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
        items.append((f"zero-shot, {ways} candidates", _percent(best["accuracy"]), row["group"]))
    items += [
        ("explained variance", f"{held_out['ev']:.3f}", group),
        ("active features a token", f"{held_out['l0']:.0f}", f"of {found['sae']['d_sae']}"),
        ("steerable features", f"{share['steerable']} of {share['probed']}", limit),
    ]
    return stats(items)


def _seeing(
    pictures: Pictures, found: Mapping[str, Any], embeddings: Tensor, predictor: Predictor
) -> list[Html]:
    parts = []
    if "zero_shot" in found:
        own = predictor.clip.name == EMOJICLIP and len(pictures.groups) == 4
        seen = " The first row is of images that the model was trained on." if own else ""
        rows = []
        for row in found["zero_shot"]:
            *few, (everything, best) = row["ways"].items()
            cells = {w: _plus_minus(v) for w, v in few}
            rows.append(
                [
                    row["group"],
                    row["images"],
                    cells.get(10, "–"),
                    cells.get(50, "–"),
                    _plus_minus(best),
                    everything,
                    _percent(best["chance"]),
                ]
            )
        parts += [
            text(
                "Zero-shot classification: the model picks the name that fits the image best, "
                "among N names of which one is right. 10 and 50 names: the mean over all draws of "
                "wrong names, so chance is 10 % and 2 %."
            ),
            table(
                ["images", "count", "10 names", "50 names", "all names", "names", "chance"],
                rows,
                caption="Accuracy ± standard error over the images." + seen,
            ),
        ]
    rows = spread(pictures.held_out, 12)
    best = predictor.of(embeddings[rows]).max(-1)
    items = []
    for i, p, index in zip(rows, best.values.tolist(), best.indices.tolist()):
        guess = pictures.vocabulary[index]
        items.append(
            (pictures.thumb(i), f"{guess}, {p:.0%}", f"{pictures.names[i]}, seen as {guess}")
        )
    size = len(pictures.vocabulary)
    parts.append(text(f"Some images, and what the model takes them for among {size} names:"))
    return [*parts, figures(items, size="4.6rem")]


def _heat(
    predictor: Predictor, pictures: Pictures, tokens: Tensor, feature: Feature, row: int
) -> Any:
    prefix = layout_at(predictor.clip, predictor.hook_point).before_patches(tokens.shape[1]) or 0
    grid = feature_heat(predictor.sae, tokens[row], feature.index, prefix)
    if grid is None or float(grid.max()) < 0.1 * feature.peak:
        return pictures.thumb(row)
    return heat_overlay(pictures.dataset[row][0], grid, size=_SIZE)


def _features(
    predictor: Predictor,
    pictures: Pictures,
    tokens: Tensor,
    chosen: Sequence[Feature],
    found: Mapping[str, Any],
) -> list[Html]:
    parts = []
    for feature in chosen:
        top = [
            (
                _heat(predictor, pictures, tokens, feature, i),
                pictures.names[i],
                f"{pictures.names[i]}, with heat",
            )
            for i in feature.top
        ]
        made_of = ", ".join(f"{name} {weight:.2f}" for name, weight in feature.looks_like)
        parts.append(
            card(
                _title(feature),
                text(
                    f"Active on {_percent(feature.density)} of the images. Those below are made "
                    f"of: {made_of}.",
                    css="note",
                ),
                figures(top, size="5.6rem"),
            )
        )
    share = found["steering"]
    return [
        text(
            f"Of {found['sae']['d_sae']} features the {share['probed']} strongest that are active "
            f"on {share['active_on'][0]} to {share['active_on'][1]} of the images were probed. "
            f"Shown are {len(chosen)}, picked by what they do: those that push the predictions "
            "towards what they look like, the most steerable first, then the most steerable of "
            "the others; no two towards the same name. Each comes with the images on which it is "
            "strongest, and a glow where it is active (none where only the class token has it). "
            "Its name is what those images are made of: each is decomposed into a sparse, "
            f"non-negative sum of the {found['vocabulary']} names (SpLiCE, Bhalla et al. 2024), "
            "and the weights are averaged."
        ),
        cards(*parts),
    ]


def _steering(
    predictor: Predictor,
    pictures: Pictures,
    embeddings: Tensor,
    chosen: Sequence[Feature],
    found: Mapping[str, Any],
) -> list[Html]:
    share = found["steering"]
    studies = share["features"]
    responses = {f"{s['index']} → {s['response']['target']}": s["response"] for s in studies[:4]}
    curve = Chart(
        "Probability of the target",
        *(Line(name, r["multiples"], r["probability"]) for name, r in responses.items()),
        x="strength, in multiples of the feature's peak",
        y=Axis(low=0),
    )
    ranks = list(range(1, len(share["scores"]) + 1))
    ranked = Chart(
        "Steerability of every feature probed",
        Line("S", ranks, share["scores"]),
        Line("threshold", [1, ranks[-1]], [share["threshold"]] * 2),
        x="features, the most steerable first",
        y=Axis(low=0),
    )
    by_multiple = ", ".join(f"{n} at {m} × peak" for m, n in share["steerable_by_multiple"].items())
    parts = []
    for feature in chosen:
        parts.append(
            card(
                _title(feature),
                text(
                    f"Up, on other images (S = {feature.steerability:.3f}); change in points:",
                    css="note",
                ),
                _changes(feature.effect, feature),
                text("Down to 0, on its own images:", css="note"),
                _changes(feature.removed, feature),
            )
        )
    return [
        text(
            f"Each feature is set to {share['multiple_of_peak']:g} times its peak on every token "
            f"of {share['probe_images']} held-out images, and to 0 on the images that show it. "
            "Nothing else in the model changes. The bars are the mean change in probability over "
            f"{found['vocabulary']} names; S is the sum of their squares (Joseph et al. 2025). "
            f"How many of the {share['probed']} pass S > {share['threshold']} depends on the "
            f"strength: {by_multiple}."
        ),
        _before_and_after(predictor, pictures, embeddings, chosen, share),
        grid(curve, ranked),
        cards(*parts),
    ]


def _changes(found: Sequence[tuple[str, float]], feature: Feature) -> Chart:
    """Changes in probability as bars, all of a feature in one scale."""
    limit = max(abs(d) for _, d in [*feature.effect, *feature.removed]) or 1.0
    return Chart("", Bars([(name, d, f"{100 * d:+.1f}") for name, d in found], limit))


def _before_and_after(
    predictor: Predictor,
    pictures: Pictures,
    embeddings: Tensor,
    chosen: Sequence[Feature],
    share: Mapping[str, Any],
) -> Html:
    """Single images: one feature up on some that lack it, and the one that is missed most off on
    some that have it."""
    vocabulary = pictures.vocabulary

    def best(p: Tensor) -> str:
        return f"{vocabulary[int(p.argmax())]}, {float(p.max()):.0%}"

    def rows(images: Sequence[int], feature: Feature, strength: float) -> list[list[Any]]:
        clean = predictor.of(embeddings[images])
        moved = predictor.steered(pixels(predictor.clip, pictures, images), feature.index, strength)
        return [
            [figures([(pictures.thumb(i), "", pictures.names[i])], size="3.2rem"), best(a), best(b)]
            for i, a, b in zip(images, clean, moved)
        ]

    first, missed = chosen[0], max(chosen, key=lambda f: sum(d * d for _, d in f.removed))
    others = [i for i in share["probe_rows"] if i not in first.top]
    up = rows(spread(others, 4), first, share["multiple_of_peak"] * first.peak)
    down = rows(missed.top[:4], missed, 0.0)
    return cards(
        card(
            f"{_title(first)}, up",
            table(["image", "seen as", "with the feature up"], up, words=True),
        ),
        card(
            f"{_title(missed)}, off",
            table(["image", "seen as", "without the feature"], down, words=True),
        ),
    )


def _snippet(
    clip: Any,
    hook_point: str,
    feature: Feature,
    multiple: float,
    saved: Path,
    found: Mapping[str, Any],
) -> list[Html]:
    name = repr(clip.name) + (f", {clip.pretrained!r}" if clip.pretrained else "")
    strength = multiple * feature.peak
    path = found["data"]["path"]
    if path == "EmojiStyles":
        source, maker = "EmojiStyles", "EmojiStyles()"
        images = '[dataset.image("twemoji", i) for i in dataset.indices("twemoji")[:8]]'
    else:
        source, maker = "open_dataset", f"open_dataset({path!r})"
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
