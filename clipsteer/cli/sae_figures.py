"""The figures of ``clipsteer sae eval``."""

from __future__ import annotations

import argparse
from typing import Any

from clipsteer.cli.arguments import _text
from clipsteer.cli.images import check_class_means, class_means


def check_asked(args: argparse.Namespace, clip: Any, dataset: Any) -> None:
    """Raise ValueError where the tower cannot give a figure that is asked for, before any is
    measured."""
    if args.name_features is not None:
        clip.need_text("--name-features")
    if args.steer is not None:
        check_class_means(clip, dataset)


def show(figures: dict[str, Any]) -> None:
    """Write figures, a line each."""
    for name, value in figures.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            _text(f"{name:<16} {value:.6g}")
        elif isinstance(value, str):
            _text(f"{name:<16} {value}")
    if "steerability" in figures:
        found = figures["steerability"]
        of_features = f"{found['share']:.1%} of {found['features']} features"
        _text(f"{'steerable':<16} {of_features} at {found['strength']:g}")
        for row in found["best"]:
            measured = f"S {row['score']:.3f}  power {row['power']:.3f}"
            _text(f"  feature {row['feature']:<7} {measured}  {row['concept']}")
    for row in figures.get("names", []):
        named = ", ".join(f"{concept} {weight:.2f}" for concept, weight in row["names"])
        _text(f"  feature {row['feature']:<7} peak {row['peak']:<8.4g} {named}")


def write(args: argparse.Namespace, model: str, figures: dict[str, Any]) -> None:
    """Write figures to ``--out``, and their page beside it."""
    from clipsteer.io.files import write_json
    from clipsteer.sae.page import evaluation_page

    write_json(args.out, figures)
    images = args.data or "the bundled held-out style"
    page = evaluation_page(f"What the SAE {args.sae} preserves", f"{model} on {images}", figures)
    page.write(args.out.with_suffix(".html"))


def of_steering(
    args: argparse.Namespace, sae: Any, clip: Any, dataset: Any, where: dict[str, Any]
) -> dict[str, Any]:
    """How many of the first features steer 32 images to a concept, and the ten best."""
    from torch.utils.data import Subset

    from clipsteer.data.dataset import spread, told_apart
    from clipsteer.data.emoji import EmojiStyles
    from clipsteer.sae.evaluate import steerability

    words = told_apart(dataset) or [c.label for c in EmojiStyles().concepts]
    features = list(range(min(args.features, sae.d_sae)))
    few = Subset(dataset, spread(range(len(dataset)), 32))
    concepts = words if clip.has_text else class_means(clip, dataset)
    found = steerability(sae, clip, few, concepts, strength=args.steer, features=features, **where)
    best = []
    for i in found.score.argsort(descending=True)[:10].tolist():
        row = {
            "feature": int(found.features[i]),
            "score": float(found.score[i]),
            "power": float(found.power[i]),
            "concept": words[int(found.concept[i])],
        }
        best.append(row)
    return {
        "strength": args.steer,
        "features": len(features),
        "share": found.share,
        "best": best,
    }


def name_strongest(
    args: argparse.Namespace, sae: Any, clip: Any, dataset: Any, where: dict[str, Any]
) -> list[dict[str, Any]]:
    """Names of the features with the highest peaks among those active on at most 15 % of the
    tokens."""
    from clipsteer.cli.arguments import read_words
    from clipsteer.sae.evaluate import feature_statistics, name_features
    from clipsteer.splice.dictionary import ConceptDictionary

    found = feature_statistics(sae, clip, dataset, **where)
    usable = (found.frequency > 0) & (found.frequency <= 0.15)
    order = found.maximum.where(usable, -1).argsort(descending=True, stable=True)
    chosen = order[: min(args.name_features, int(usable.sum()))]
    if not len(chosen):
        return []
    words = read_words(args.words, dataset.classes)
    dictionary = ConceptDictionary.from_clip(clip, words, image_mean=dataset)
    named = name_features(sae, clip, dataset, dictionary, chosen, **where)
    return [
        {
            "feature": int(i),
            "peak": float(found.maximum[i]),
            "frequency": float(found.frequency[i]),
            "names": names,
        }
        for i, names in zip(chosen.tolist(), named)
    ]
