"""``clipsteer sae eval --metrics``: options, what they name, and the table."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipsteer.cli.arguments import _text, device_of


def add_metrics(p: argparse.ArgumentParser) -> None:
    """The options."""
    p.add_argument(
        "--metrics",
        nargs="?",
        const="all",
        metavar="NAMES",
        help="also measure what its features are worth, with intervals over the images: fvu, "
        "localisation, probing, preservation, monosemanticity, absorption, coverage, stability, "
        "separated by commas, or all for which there is what they need (the default)",
    )
    p.add_argument(
        "--metrics-model",
        metavar="NAME",
        help="another tower, as --model has them, for monosemanticity",
    )
    p.add_argument("--metrics-pretrained", metavar="TAG", help="its weights")
    p.add_argument(
        "--metrics-sae",
        action="append",
        default=[],
        metavar="SAE",
        help="an SAE of another seed, for stability; repeatable",
    )
    p.add_argument(
        "--metrics-groups",
        type=Path,
        metavar="FILE",
        help='JSON, {"group": ["class", ...]}: siblings for absorption (default: all classes)',
    )
    p.add_argument(
        "--metrics-definition",
        default="clipsteer",
        metavar="NAME",
        help="clipsteer, or visaebench-0.1.0 for that benchmark's own numbers (default: clipsteer)",
    )


def check_metrics(args: argparse.Namespace) -> None:
    """Raise ValueError, before anything is loaded, for names that there are not and for metrics
    that lack what they need."""
    given = {
        "--metrics-model": args.metrics_model,
        "--metrics-pretrained": args.metrics_pretrained,
        "--metrics-sae": args.metrics_sae,
        "--metrics-groups": args.metrics_groups,
    }
    if args.metrics is None:
        for option, value in given.items():
            if value:
                raise ValueError(f"{option} goes with --metrics")
        return
    from clipsteer.sae.metrics.evaluate import chosen

    names, every = chosen(args.metrics, args.metrics_definition)
    if every:
        return
    if "monosemanticity" in names and args.metrics_model is None:
        raise ValueError("--metrics monosemanticity needs another tower; pass --metrics-model")
    if "stability" in names and not args.metrics_sae:
        raise ValueError("--metrics stability needs an SAE of another seed; pass --metrics-sae")


def measured(
    args: argparse.Namespace, sae: Any, clip: Any, dataset: Any, where: Mapping[str, Any]
) -> dict[str, Any]:
    """The metrics asked for, as plain data."""
    from clipsteer.sae.metrics.evaluate import evaluate_metrics
    from clipsteer.sae.metrics.stream import from_tower
    from clipsteer.sae.model import SAE

    found = evaluate_metrics(
        sae,
        from_tower(sae, clip, dataset, **where),
        metrics=args.metrics,
        embeddings=_embeddings(args, dataset),
        others=[SAE.from_pretrained(path) for path in args.metrics_sae],
        groups=_groups(args.metrics_groups, dataset),
        definition=args.metrics_definition,
    )
    return {
        "definition": args.metrics_definition,
        **{name: estimate.to_json() for name, estimate in found.items()},
    }


def show_metrics(figures: Mapping[str, Any]) -> None:
    """Write the table, a line a metric."""
    _text(
        "", f"{'metric':<16} {'value':>9}  {'95 % interval':<19} scored ({figures['definition']})"
    )
    for name, found in figures.items():
        if name == "definition":
            continue
        reach = f"{_number(found['low'])} … {_number(found['high'])}"
        line = f"{name:<16} {_number(found['value']):>9}  {reach:<19} "
        line += f"{found['scored']} {found['unit']}"
        why = found["details"].get("why")
        _text(line + (f" ({why})" if why else ""))


def _number(value: float | None) -> str:
    return "—" if value is None or not math.isfinite(value) else f"{value:.4f}"


def _embeddings(args: argparse.Namespace, dataset: Any) -> Any:
    """(N, e) of the images by the other tower; None where none is named."""
    if args.metrics_model is None:
        return None
    import torch

    from clipsteer.clip.model import load, needs_weights
    from clipsteer.clip.pixels import image_embeddings

    name, weights = args.metrics_model, args.metrics_pretrained
    if weights is None and needs_weights(name):
        raise ValueError(
            f"--metrics-model {name}: no weights are named, and random ones say nothing; pass "
            f"--metrics-pretrained"
        )
    other = load(name, weights, device=device_of(args))
    parts = image_embeddings(other, dataset, 16, "embed images")
    return torch.cat([part.cpu() for part in parts])


def _groups(path: Path | None, dataset: Any) -> dict[str, list[int]] | None:
    """Labels of siblings; None where no file is named."""
    if path is None:
        return None
    classes = list(getattr(dataset, "classes", None) or ())
    try:
        named = json.loads(path.read_text(encoding="utf-8"))
        groups = {group: [classes.index(name) for name in names] for group, names in named.items()}
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError) as error:
        raise ValueError(
            f'--metrics-groups: {path} must be JSON, {{"group": ["class", ...]}}: {error}'
        ) from error
    except ValueError as error:
        raise ValueError(
            f"--metrics-groups: {path} names a class that the images have not: {error}; theirs "
            f"are {', '.join(map(str, classes[:20]))}"
        ) from error
    return groups
