"""What each run of ``clipsteer cil`` is set to: the recipe, what was given beside it, seeds."""

from __future__ import annotations

import argparse
from typing import Any

# chosen on validation images: benchmarks/results/cil-emoji.md
EMOJI = {"first_epochs": 5, "epochs": 5, "batch_size": 48, "projections": 2000, "align_epochs": 20}
FOLDERS = ("first_epochs", "epochs", "batch_size", "rank")
EMOJI_RATES = {
    "macil": 0.03,
    "finetune": 0.003,
    "sdc": 0.03,
    "ldc": 0.03,
    "slca": 0.03,
    "joint": 0.01,
}
# what --strategy and --seeds set
BY_STRATEGY = (
    "name",
    "train",
    "lora",
    "classifier",
    "cosine",
    "softmax",
    "covariance",
    "consistent",
    "distill",
    "compensation",
    "sigma",
    "floor",
    "transport",
    "align",
    "plasticity",
    "cumulative",
    "slow",
    "freeze_patches",
    "seed",
)


def configs_of(args: argparse.Namespace, names: list[str]) -> tuple[list[Any], dict[str, Any]]:
    """Settings of each run, and what the notes say about them."""
    from clipsteer.continual.config import CILConfig
    from clipsteer.continual.strategies import PAPER, PAPER_SEEDS, strategy
    from clipsteer.data.files import is_emoji

    drawings = is_emoji(args.data)
    recipe: dict[str, Any] = EMOJI if drawings else {name: PAPER[name] for name in FOLDERS}
    seeds = [CILConfig.seed + i for i in range(args.seeds)]
    if args.recipe == "paper":
        recipe = {**PAPER}
        seeds = [*PAPER_SEEDS, *range(1998, 1998 + args.seeds)][: args.seeds]
    given = args.options.given(args)
    rates = EMOJI_RATES if drawings and args.recipe is None else {}
    if "lr" in given:
        rates = {}
    configs = []
    for name in names:
        rate = rates.get(name.partition(":")[0], CILConfig.lr)
        for seed in seeds:
            settings = {"lr": rate, **recipe, **given, "seed": seed}
            configs.append(strategy(name, **settings))
    changed = {field: value for field, value in given.items() if value != getattr(CILConfig, field)}
    overridden = {field: given[field] for field in recipe if field in given}
    notes = {"settings": {**recipe, **overridden, **changed}}
    if rates:
        notes["learning rates"] = rates
    return configs, notes
