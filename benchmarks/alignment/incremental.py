"""Which concepts of the first task are gone after the last, and do distances of concepts predict what is forgotten?

    python -m benchmarks.alignment.incremental --work work --out benchmarks/results/alignment/incremental

EmojiCLIP learns Classify-30 in five tasks, by sequential fine-tuning, by MACIL, and by fine-tuning at MACIL's rate, ten
times its own ("fast"), with the recipe of benchmarks/results/cil-emoji.md. After each task the rows of every block, of
all drawings, are kept in --work.

Gone: of the 64 features of a block's SAE that drawings of the first task use most, those whose relative distance from
themselves after the last task is above .5, with its whole interval. Predicted: per class, the accuracy it lost (best
after any task less that after the last) against the relative distance of its conceptor's energies between the tower
that had just learned it and the last one; beside it the plain rival, 1 - cosine of the class mean's features then and
now. Spearman's rank correlation over the 24 classes of tasks 1 to 4, ranked within each class order, with its bootstrap
interval; and ranked within each task, since what was learned long ago has moved farther and is forgotten anyway.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.alignment.towers import block_saes, rank_correlation, rows_of
from clipsteer.alignment.measure import follow_concepts
from clipsteer.alignment.scores import of_classes, of_features
from clipsteer.cli.cil_settings import EMOJI, EMOJI_RATES
from clipsteer.clip.model import EMOJICLIP, load
from clipsteer.continual.backbone import Encoder
from clipsteer.continual.learner import ClassIncrementalLearner
from clipsteer.continual.plasticity import Plasticity
from clipsteer.continual.scenario import Scenario, emoji_scenario
from clipsteer.continual.strategies import strategy
from clipsteer.data.dataset import ImageDataset, _Reader
from clipsteer.io.files import read_safetensors, write_json, write_safetensors
from clipsteer.report.charts import Chart
from clipsteer.report.intervals import mean_interval
from clipsteer.report.layers import Line

SEEDS = (1993, 1994, 1995, 1996, 1997)
# label -> strategy and what is changed in its recipe
STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "finetune": ("finetune", {}),
    "macil": ("macil", {}),
    "finetune-fast": ("finetune", {"lr": EMOJI_RATES["macil"]}),
}
TASKS = 5


def scenario_of(seed: int) -> Scenario:
    return emoji_scenario(TASKS, seed=seed)


def every_drawing(scenario: Scenario) -> ImageDataset:
    """Those to learn from, and behind them those to test on."""
    parts = [(scenario.train, row) for row in range(len(scenario.train))]
    parts += [(scenario.test, row) for row in range(len(scenario.test))]
    targets = [*scenario.train.targets, *scenario.test.targets]
    return ImageDataset(_Reader(_drawing, parts), targets, scenario.classes)


def _drawing(part: ImageDataset, row: int) -> Any:
    return part[row][0]


def states(
    name: str,
    seed: int,
    work: Path,
    *,
    plasticity: Plasticity | None = None,
    label: str | None = None,
    keep: bool = True,
    recipe: Mapping[str, Any] = EMOJI,
) -> list[dict[str, Tensor]]:
    """After each task: "predicted" (the class of every test drawing), factors of blocks, and the rows where they are
    kept."""
    scenario = scenario_of(seed)
    folder = work / "runs" / f"{label or name}-{seed}"
    files = [folder / f"after-{t}.safetensors" for t in range(TASKS)]
    if not all(file.exists() for file in files):
        clip = load(EMOJICLIP)
        settings = {"lr": EMOJI_RATES[name.partition(":")[0]], **recipe}
        config = replace(strategy(name), seed=seed, **settings)
        tower = Encoder.from_clip(clip)
        learner = ClassIncrementalLearner(
            tower, config, len(scenario.classes), out=folder / "checkpoints", plasticity=plasticity
        )
        if plasticity is not None:
            plasticity.current = tower.module  # type: ignore[attr-defined]
        learner.resume()
        for t, classes in enumerate(scenario.tasks):
            if len(learner.tasks) == t:
                learner.fit_task(scenario.train.subset(scenario.rows("train", t)), classes)
            if files[t].exists() or len(learner.tasks) != t + 1:
                continue
            found = {f"factor/{b}": torch.tensor(v) for b, v in (learner.multipliers or [{}])[-1].items()}
            found["predicted"] = learner.predict(scenario.test)
            if keep:
                images = every_drawing(scenario)
                for tokens in ("mean", "patches"):
                    rows = rows_of(clip, images, tokens)
                    found |= {f"{tokens}/{layer}": x.half() for layer, x in rows.items()}
            write_safetensors(files[t], found)
            sys.stdout.write(f"{label or name} {seed}: task {t + 1}\n")
            sys.stdout.flush()
    return [read_safetensors(file) for file in files]


def run_of(name: str, seed: int, work: Path) -> list[dict[str, Tensor]]:
    kind, changed = STRATEGIES[name]
    return states(kind, seed, work, label=name, recipe={**EMOJI, **changed})


def accuracies(scenario: Scenario, found: list[dict[str, Tensor]]) -> Tensor:
    """(tasks, classes): the share of a class's test drawings that was right; NaN before it came."""
    targets = torch.tensor(scenario.test.targets)
    table = torch.full((TASKS, len(scenario.classes)), torch.nan, dtype=torch.float64)
    for t in range(TASKS):
        right = (found[t]["predicted"] == targets).double()
        for c in scenario.seen(t):
            table[t, c] = right[targets == c].mean()
    return table


def gone(scenario: Scenario, found: list[dict[str, Tensor]], work: Path) -> dict[str, Any]:
    """Per block: of the commonest features of task 1's drawings those gone after the last task, and the mean
    distance."""
    saes, _ = block_saes(work)
    targets = torch.tensor(every_drawing(scenario).targets)
    first = torch.isin(targets, torch.tensor(scenario.tasks[0])).nonzero().flatten()
    result = {}
    for block, sae in saes.items():
        before, after = (of_features(sae, found[t][f"patches/{block}"][first].float()) for t in (0, TASKS - 1))
        matches = follow_concepts(before, after, first, count=64)
        values = [m.relative.value for m in matches]
        result[block] = {
            "features": len(matches),
            "gone": [before.names[m.a] for m in matches if m.relative.low > 0.5],
            "distance": statistics.fmean(values),
        }
    return result


def class_distances(scenario: Scenario, found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Per layer and for "mean …" of features: (classes,) how far each class has moved since it was learned."""
    targets = torch.tensor(every_drawing(scenario).targets)
    result: dict[str, Tensor] = {}
    layers = [name for name in found[0] if name.startswith("mean/")]
    for layer in layers:
        moved = torch.full((len(scenario.classes),), torch.nan, dtype=torch.float64)
        shifted = moved.clone()
        for t in range(TASKS - 1):
            seen = torch.isin(targets, torch.tensor(scenario.seen(t))).nonzero().flatten()
            labels = targets[seen]
            then, now = (found[i][layer][seen].float() for i in (t, TASKS - 1))
            a, b = (of_classes(x, labels, scenario.classes) for x in (then, now))
            for match in follow_concepts(a, b, seen):
                c = scenario.classes.index(a.names[match.a])
                if c in scenario.tasks[t]:
                    moved[c] = match.relative.value
            for c in scenario.tasks[t]:
                means = [x[labels == c].mean(0) for x in (then, now)]
                shifted[c] = 1 - F.cosine_similarity(*means, dim=0)
        result[layer.removeprefix("mean/")] = moved
        result[f"cosine of means, {layer.removeprefix('mean/')}"] = shifted
    return result


def measured(work: Path, seeds: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    for seed in seeds:
        for name in STRATEGIES:
            file = work / "runs" / f"{name}-{seed}" / f"after-{TASKS - 1}.safetensors"
            if not file.exists():
                continue
            scenario, found = scenario_of(seed), run_of(name, seed, work)
            table = accuracies(scenario, found)
            earlier = [c for t in range(TASKS - 1) for c in scenario.tasks[t]]
            best = table[:-1].nan_to_num(-1).amax(0)
            lost = (best - table[-1])[earlier].tolist()
            moved = class_distances(scenario, found)
            yield {
                "seed": seed,
                "strategy": name,
                "accuracy": float((found[-1]["predicted"] == torch.tensor(scenario.test.targets)).double().mean()),
                "forgetting": statistics.fmean(lost),
                "gone": gone(scenario, found, work),
                "lost": lost,
                "moved": {layer: v[earlier].tolist() for layer, v in moved.items()},
                "distance": {layer: float(v[earlier].mean()) for layer, v in moved.items()},
            }


def _by_task(runs: list[dict[str, Any]], layer: str) -> list[tuple[list[float], list[float]]]:
    """Classes that were learned in one task alone: what was learned long ago has moved and is forgotten anyway."""
    found = []
    for run in runs:
        size = len(run["lost"]) // (TASKS - 1)
        for at in range(0, len(run["lost"]), size):
            found.append((run["moved"][layer][at : at + size], run["lost"][at : at + size]))
    return found


def report(runs: list[dict[str, Any]], out: Path) -> None:
    """Means over seeds, and the picture: features gone, block by block."""
    table: dict[str, Any] = {}
    lines = []
    for name in STRATEGIES:
        own = [run for run in runs if run["strategy"] == name]
        if not own:
            continue
        blocks = list(own[0]["gone"])
        share = {b: [len(r["gone"][b]["gone"]) / r["gone"][b]["features"] for r in own] for b in blocks}
        table[name] = {
            "seeds": len(own),
            "accuracy": mean_interval([r["accuracy"] for r in own]),
            "forgetting": mean_interval([r["forgetting"] for r in own]),
            "gone": {b: mean_interval(v) for b, v in share.items()},
            "distance": {b: mean_interval([r["gone"][b]["distance"] for r in own]) for b in blocks},
            "correlation": {k: rank_correlation([(r["moved"][k], r["lost"]) for r in own]) for k in own[0]["moved"]},
            "within tasks": {k: rank_correlation(_by_task(own, k)) for k in own[0]["moved"]},
        }
        ys = [100 * statistics.fmean(v) for v in share.values()]
        lines.append(Line(name, list(range(len(ys))), ys))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out.with_suffix(".json"), {"table": table, "runs": runs})
    title = "Features of the first task that are gone after the fifth"
    Chart(title, *lines, x="block", y="% of 64").write(out.with_suffix(".svg"))
    for name, row in table.items():
        sys.stdout.write(f"{name}: {row}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="for runs, which go on where they were stopped")
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="PATH.json and PATH.svg")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--strategies", nargs="+", choices=list(STRATEGIES), default=list(STRATEGIES))
    parser.add_argument("--report", action="store_true", help="nothing is learned; what is done is measured")
    args = parser.parse_args()
    if not args.report:
        block_saes(args.work)
        for seed in args.seeds:
            for name in args.strategies:
                run_of(name, seed, args.work)
    report(list(measured(args.work, tuple(args.seeds))), args.out)


if __name__ == "__main__":
    main()
