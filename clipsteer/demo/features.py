"""Sections of the demo's page about features of the SAE: what they look like, and what steering
them does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from clipsteer.clip.seen import seen_box
from clipsteer.clip.tokens import layout_at
from clipsteer.data.dataset import spread
from clipsteer.demo.explore import Feature, Predictor, feature_heat
from clipsteer.demo.pictures import Pictures, pixels
from clipsteer.demo.sections import percent
from clipsteer.report.axes import Axis
from clipsteer.report.charts import Chart
from clipsteer.report.layers import Bars, Line
from clipsteer.report.page import Html, card, cards, figures, grid, heat_overlay, table, text

_SIZE = 128


def _title(feature: Feature) -> str:
    return f"Feature {feature.index}: {feature.looks_like[0][0]}"


def _heat(
    predictor: Predictor,
    pictures: Pictures,
    tokens: Tensor,  # (N, T, d)
    feature: Feature,
    row: int,
) -> Any:
    """The image with a glow where the feature is active, grey where the model does not look.

    Plain where the feature hardly is active, and where nobody knows which part the model sees.
    """
    layout = layout_at(predictor.clip, predictor.hook_point)
    prefix = layout.before_patches(tokens.shape[1]) or 0
    grid = feature_heat(predictor.sae, tokens[row], feature.index, prefix)
    image = pictures.dataset[row][0]
    seen = seen_box(predictor.clip.preprocess, image.size)
    if grid is None or seen is None or float(grid.max()) < 0.1 * feature.peak:
        return pictures.thumb(row)
    return heat_overlay(image, grid, size=_SIZE, seen=seen)


def features(
    predictor: Predictor,
    pictures: Pictures,
    tokens: Tensor,  # (N, T, d)
    chosen: Sequence[Feature],
    found: Mapping[str, Any],
) -> list[Html]:
    """The chosen features: their names, and the images on which they are strongest, with heat."""
    parts = []
    for feature in chosen:
        top = []
        for row in feature.top:
            name = pictures.names[row]
            heat = _heat(predictor, pictures, tokens, feature, row)
            top.append((heat, name, f"{name}, with heat"))
        made_of = ", ".join(f"{name} {weight:.2f}" for name, weight in feature.looks_like)
        parts.append(
            card(
                _title(feature),
                text(
                    f"Active on {percent(feature.density)} of the images. Those below are made "
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
            "strongest, and a glow where it is active (none where only the class token has it); "
            "what the model's preprocessing cuts off is grey. "
            "Its name is what those images are made of: each is decomposed into a sparse, "
            f"non-negative sum of {found['words']} names (SpLiCE, Bhalla et al. 2024), "
            "and the weights are averaged."
        ),
        cards(*parts),
    ]


def steering(
    predictor: Predictor,
    pictures: Pictures,
    embeddings: Tensor,  # (N, e)
    chosen: Sequence[Feature],
    found: Mapping[str, Any],
) -> list[Html]:
    """What the chosen features do, as ``found``, all figures of the demo, says."""
    share = found["steering"]
    lines = []
    for studied in share["features"][:4]:
        curve = studied["response"]
        name = f"{studied['index']} → {curve['target']}"
        lines.append(Line(name, curve["multiples"], curve["probability"]))
    responses = Chart(
        "What a feature pushes towards, by its strength",
        *lines,
        x="strength, in multiples of the feature's peak",
        y=Axis("mean probability of the target", low=0),
    )
    ranks = list(range(1, len(share["scores"]) + 1))
    ranked = Chart(
        "Steerability of every feature probed",
        Line("S", ranks, share["scores"]),
        Line("threshold", [1, ranks[-1]], [share["threshold"]] * 2),
        x="features, the most steerable first",
        y=Axis("S", low=0),
    )
    by_multiple = ", ".join(f"{n} at {m} × peak" for m, n in share["steerable_by_multiple"].items())
    every = [change for one in chosen for _, change in (*one.effect, *one.removed)]
    limit = max(map(abs, every), default=0.0) or 1.0
    parts = []
    for feature in chosen:
        parts.append(
            card(
                _title(feature),
                text(
                    f"Up, on other images (S = {feature.steerability:.3f}); change in points:",
                    css="note",
                ),
                _changes(feature.effect, limit),
                text("Down to 0, on its own images:", css="note"),
                _changes(feature.removed, limit),
            )
        )
    return [
        text(
            f"Each feature is set to {share['multiple_of_peak']:g} times its peak on every token "
            f"of {share['probe_images']} held-out images, and to 0 on the images that show it. "
            "Nothing else in the model changes. The bars are the mean change in probability over "
            f"{found['vocabulary']} names, all in one scale; what a single image loses of its own "
            "name is not listed. S is the sum of all squares (Joseph et al. 2025). "
            f"How many of the {share['probed']} pass S > {share['threshold']} depends on the "
            f"strength: {by_multiple}."
        ),
        _before_and_after(share, chosen, predictor, pictures, embeddings),
        grid(responses, ranked),
        cards(*parts),
    ]


def _changes(found: Sequence[tuple[str, float]], limit: float) -> Chart:
    """Changes in probability as bars."""
    bars = [(name, change, f"{100 * change:+.1f}") for name, change in found]
    return Chart("", Bars(bars, limit))


def _before_and_after(
    share: Mapping[str, Any],
    chosen: Sequence[Feature],
    predictor: Predictor,
    pictures: Pictures,
    embeddings: Tensor,  # (N, e)
) -> Html:
    """Single images: one feature up on some that lack it, and the one that is missed most off on
    some that have it."""
    vocabulary = pictures.vocabulary

    def best(p: Tensor) -> str:
        return f"{vocabulary[int(p.argmax())]}, {float(p.max()):.0%}"

    def rows(shown: Sequence[int], feature: Feature, strength: float) -> list[list[Any]]:
        clean = predictor.of(embeddings[shown])
        images = pixels(predictor.clip, pictures, shown)
        moved = predictor.steered(images, feature.index, strength)
        body = []
        for row, before, after in zip(shown, clean, moved):
            image = figures([(pictures.thumb(row), "", pictures.names[row])], size="3.2rem")
            body.append([image, pictures.names[row], best(before), best(after)])
        return body

    first = chosen[0]
    missed = max(chosen, key=lambda feature: sum(change * change for _, change in feature.removed))
    others = [i for i in share["probe_rows"] if i not in first.top]
    up = rows(spread(others, 4), first, share["multiple_of_peak"] * first.peak)
    down = rows(missed.top[:4], missed, 0.0)
    return cards(
        card(
            f"{_title(first)}, up",
            table(["image", "it is", "seen as", "with the feature up"], up, words=True),
        ),
        card(
            f"{_title(missed)}, off",
            table(["image", "it is", "seen as", "without the feature"], down, words=True),
        ),
    )
