"""Class-incremental learning of real pictures on a real ViT: every strategy of the package, several class orders.

    python -m benchmarks.real_vit.weights --out vit_s.safetensors
    python -m benchmarks.real_vit.pictures --out pictures
    python -m benchmarks.real_vit.incremental --weights vit_s.safetensors --pictures pictures --work work \\
        --out benchmarks/results/real_vit/incremental

Learning rates and epochs are chosen on validation pictures alone, in a class order of their own; then each strategy
learns from the training pictures in every order, and is measured on the test pictures. One JSON file a run lies in
--work: the command goes on where it was, several may run at once, and --report alone writes what there is so far.

An interval joins both things that vary: seeds (t over class orders) and pictures (binomial, of the mean accuracy). The
zero-shot strategy is left out: the tower has no text.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import logging
import math
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.real_vit.pictures import scenario
from benchmarks.real_vit.sharing import SharingLearner
from benchmarks.real_vit.tower import encoder_of, tail_of
from clipsteer.clip.pixels import pixel_batches
from clipsteer.continual.experiment import folder_name, run_tasks
from clipsteer.continual.metrics import METRICS, Run, by_strategy, paired
from clipsteer.continual.plasticity import Plasticity, fit_saes, load_saes, save_saes
from clipsteer.continual.report import curves
from clipsteer.continual.scenario import Scenario
from clipsteer.continual.strategies import ABLATION, STRATEGIES, CILConfig, strategy
from clipsteer.data.dataset import ImageDataset
from clipsteer.io.digests import digest_of
from clipsteer.io.files import read_json, read_safetensors, write_json, write_safetensors
from clipsteer.report.intervals import mean_interval

TASKS = 5
ORDER = 2000  # the class order that rates are chosen in
SEEDS = tuple(range(1993, 1998))
COMMON = {"batch_size": 16, "projections": 2000, "checkpoint_every": 10_000}
LRS = (0.003, 0.01, 0.03)
EPOCHS = (3, 8)  # passes that are tried
# SLCA as published, and without what makes it drift on pictures with one background
NAMES = [*(name for name in STRATEGIES if name != "zero_shot"), "slca:freeze_patches=1"]
SAE = {"d_sae": 1536, "k": 16, "steps": 600}


def _settings(epochs: int) -> dict[str, Any]:
    return {**COMMON, "first_epochs": epochs, "epochs": epochs}


def _chosen_as(spec: str) -> str:
    """The strategy whose rates a spec takes: its own, or for parts of MACIL those of MACIL."""
    return spec if spec in NAMES else spec.partition(":")[0]


def first_tasks(whole: Scenario, count: int, at_once: bool = False) -> Scenario:
    """The first tasks and their classes alone; ``at_once`` for joint training, which knows no tasks."""
    if count == len(whole.tasks) and not at_once:
        return whole
    kinds = whole.seen(count - 1)
    numbers = iter(range(len(kinds)))
    sizes = [len(kinds)] if at_once else [len(task) for task in whole.tasks[:count]]
    tasks = [[next(numbers) for _ in range(size)] for size in sizes]
    classes = [whole.classes[kind] for kind in kinds]

    def part(images: ImageDataset) -> ImageDataset:
        own = images.subset([row for row, target in enumerate(images.targets) if target in kinds])
        own.targets = [kinds.index(target) for target in own.targets]
        own.classes = classes
        return own

    return Scenario(part(whole.train), part(whole.validation), part(whole.test), tasks, classes)


class Bench:
    """What the runs share.

    Args:
        args: of the command.
        specs: what is to be run; for these all of --epochs are tried before a choice counts, for others what is there.
    """

    def __init__(self, args: argparse.Namespace, specs: Iterable[str] = ()) -> None:
        self.args = args
        self.work: Path = args.work
        self.to_choose = {_chosen_as(spec) for spec in specs}

    def encoder(self) -> Any:
        where = (self.args.weights, self.args.block, self.args.image_size)
        return tail_of(*where, self.args.last) if self.args.last else encoder_of(*where)

    def scenario(self, seed: int) -> Scenario:
        return first_tasks(scenario(self.args.pictures, TASKS, seed), self.args.tasks)

    def folder(self, phase: str, config: CILConfig) -> Path:
        return self.work / phase / f"{folder_name(config)}-lr{config.lr:g}-epochs{config.epochs}"

    def run(self, phase: str, images: Scenario, config: CILConfig, plasticity: Plasticity | None = None) -> Run | None:
        """The run, from its file where it is done; None where another process has it in hand."""
        out = self.folder(phase, config)
        self.check_tower(phase)
        if config.plasticity and plasticity is None:
            plasticity = self.plasticity()
        try:
            data = digest_of([images.train.sources, images.train.targets])
            kind = functools.partial(SharingLearner, store=self.work / "shared", data=data)
            run = run_tasks(images, self.encoder, config, out=out, plasticity=plasticity, learner=kind)
        except RuntimeError as error:
            if "another process" not in str(error):
                raise
            return None
        for folder in out.glob("checkpoints*"):
            shutil.rmtree(folder, ignore_errors=True)
        return run

    def check_tower(self, phase: str) -> None:
        """Refuse a folder of runs on the tower in another shape, which nothing in a run itself tells."""
        file = self.work / phase / "tower.json"
        here = {name: getattr(self.args, name) for name in ("block", "image_size", "last")}
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, here)
        if (there := read_json(file)) != here:
            raise SystemExit(f"{file.parent} holds runs of {there}, and asked for is {here}; use another --work")

    def stored(self, phase: str, config: CILConfig) -> Run | None:
        """The run where it is done."""
        file = self.folder(phase, config) / "run.json"
        if not file.exists():
            return None
        run = Run.from_json(read_json(file))
        return run if len(run.records) == len(run.tasks) else None

    def plasticity(self) -> Plasticity:
        """SAEs of every block, of the training pictures of all kinds."""
        folder = self.work / "saes"
        if not (folder / "background.safetensors").exists():
            tower, images = self.encoder(), self.scenario(ORDER).train
            saes = fit_saes(tower.module, tower.blocks, pixel_batches(tower, images), **SAE)
            folder.mkdir(parents=True, exist_ok=True)
            save_saes(folder, saes)
            usage = Plasticity(saes).usage(tower.module, pixel_batches(tower, images))
            write_safetensors(folder / "background.safetensors", usage)
        return Plasticity(load_saes(folder), background=read_safetensors(folder / "background.safetensors"))

    def choice_file(self, name: str) -> Path:
        return self.work / "choice" / f"{name.replace(':', ',')}.json"

    def choice(self, name: str) -> dict[str, Any]:
        """Learning rate and epochs of a strategy: the rate at few epochs, then the epochs at that rate; by the mean
        accuracy over tasks on validation pictures."""
        if self.args.lr is not None:
            return {"lr": self.args.lr, "epochs": self.args.epochs[0], "tried": []}
        file = self.choice_file(name)
        if file.exists():
            found = read_json(file)
            missing = {*self.args.epochs} - {row["epochs"] for row in found["tried"]}
            if name not in self.to_choose or not missing or strategy(name).train == "none":
                return found
        start = strategy(name)
        tried: list[dict[str, Any]] = []
        images = first_tasks(self.scenario(ORDER).on_validation(), self.args.choice_tasks, start.cumulative)

        def attempt(lr: float, epochs: int) -> None:
            config = strategy(name, lr=lr, seed=ORDER, **_settings(epochs))
            run = self.run("choice", images, config)
            if run is None:
                raise SystemExit(f"{name} is being chosen by another process")
            tried.append({"lr": lr, "epochs": epochs, "A_avg": run.A_avg, "A_last": run.A_last})

        def best() -> dict[str, Any]:
            return max(tried, key=lambda row: row["A_avg"])

        few, *more = self.args.epochs
        if start.train == "none":
            attempt(CILConfig.lr, few)
        else:
            for lr in LRS:
                attempt(lr, few)
            # the best at an end of the grid may lie beyond it
            while best()["lr"] in (min(r["lr"] for r in tried), max(r["lr"] for r in tried)) and len(tried) < 6:
                at_top = best()["lr"] == max(r["lr"] for r in tried)
                attempt(round(best()["lr"] * (10 / 3 if at_top else 0.3), 6), few)
            for epochs in more:
                attempt(best()["lr"], epochs)
        found = {"lr": best()["lr"], "epochs": best()["epochs"], "tried": tried}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, found)
        return found

    def config(self, spec: str, seed: int) -> CILConfig:
        chosen = self.choice(_chosen_as(spec))
        return strategy(spec, lr=chosen["lr"], seed=seed, **_settings(chosen["epochs"]))

    def finished(self, specs: Iterable[str]) -> list[Run]:
        """Runs that are done, of the settings chosen."""
        found = []
        for spec, seed in itertools.product(specs, SEEDS):
            if self.args.lr is None and not self.choice_file(_chosen_as(spec)).exists():
                continue
            if run := self.stored("runs", self.config(spec, seed)):
                found.append(run)
        return found


def interval(runs: Sequence[Run], metric: str = "A_last") -> dict[str, Any]:
    """Mean, and the half of an interval for it over seeds and pictures: √(t²s²/S + 1.96² p(1−p)/n)."""
    found = mean_interval([run.value(metric) for run in runs])
    n = sum(runs[0].records[len(runs[0].tasks) - 1].count)
    pictures = 1.96**2 * found["mean"] * (1 - found["mean"]) / n if metric != "forgetting" else 0.0
    seeds = None if found["low"] is None else (found["mean"] - found["low"]) ** 2
    return {
        "mean": found["mean"],
        "seeds": found["n"],
        "half_seeds": None if seeds is None else math.sqrt(seeds),
        "half": None if seeds is None else math.sqrt(seeds + pictures),
    }


def report(bench: Bench, out: Path) -> None:
    """Figures, curves and a table of what is done."""
    out.parent.mkdir(parents=True, exist_ok=True)
    runs = bench.finished(dict.fromkeys([*NAMES, *ABLATION[1:], *bench.args.strategies]))
    choices = {p.stem: read_json(p) for p in sorted((bench.work / "choice").glob("*.json"))}
    groups = by_strategy(runs)
    table = {name: {m: interval(own, m) for m in ("A_last", "A_avg", "forgetting")} for name, own in groups.items()}
    against = {}
    for name in groups:
        common = {run.seed for run in groups[name]} & {run.seed for run in groups.get("macil", [])}
        if name != "macil" and common:
            against[name] = paired(runs, name, "macil", "A_last")
    # networks are shared, so that times mean nothing
    kept = [metric for metric in METRICS if metric not in ("seconds", "peak_mb")]
    values = {n: {m: [r.value(m) for r in own] for m in kept} for n, own in groups.items()}
    images = bench.scenario(ORDER)
    notes = {
        "pictures": {part: len(getattr(images, part)) for part in ("train", "validation", "test")},
        "kinds": images.classes,
        "block": bench.args.block,
        "image_size": bench.args.image_size,
        "blocks_that_learn": bench.args.last or bench.args.block + 1,
        "tasks": bench.args.tasks,
        "choice_tasks": bench.args.choice_tasks,
        "settings": COMMON,
    }
    values = json.loads(json.dumps(values).replace("NaN", "null"))
    body = {"notes": notes, "choices": choices, "table": table, "minus_macil": against, "by_seed": values}
    write_json(out.with_suffix(".json"), body)
    named = [run for run in runs if run.strategy in NAMES]
    if named:
        lines_of = {name: [100 * run.seen for run in own] for name, own in by_strategy(named).items()}
        chart = curves(lines_of, title="Accuracy on all classes seen, %", y_label="accuracy, %")
        chart.write(out.with_suffix(".svg"))
    lines = ["| strategy | seeds | lr, epochs | A_last, % | A_avg, % | forgetting, points | minus MACIL, points |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, row in table.items():
        chosen = bench.choice(_chosen_as(name))
        gap = against.get(name)
        told = "" if gap is None else _pm(gap["mean"], None if gap["low"] is None else gap["mean"] - gap["low"])
        cells = [_pm(row[m]["mean"], row[m]["half"]) for m in ("A_last", "A_avg", "forgetting")]
        rate = "" if strategy(name).train == "none" else f"{chosen['lr']:g}, {chosen['epochs']}"
        lines.append(f"| {name} | {row['A_last']['seeds']} | {rate} | {' | '.join(cells)} | {told} |")
    sys.stdout.write("\n".join(lines) + "\n")


def _pm(value: float, half: float | None) -> str:
    return f"{100 * value:.1f}" + ("" if half is None else f" ± {100 * half:.1f}")


def arguments(parser: argparse.ArgumentParser) -> None:
    """What every experiment on the tower is given."""
    parser.add_argument("--weights", type=Path, required=True, help="of benchmarks.real_vit.weights")
    parser.add_argument("--pictures", type=Path, required=True, help="of benchmarks.real_vit.pictures")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="one file a run, and checkpoints")
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="PATH.json and PATH.svg")
    parser.add_argument("--image-size", type=int, default=98)
    parser.add_argument("--block", type=int, default=8)
    parser.add_argument("--last", type=int, default=0, metavar="N", help="train the last N blocks alone")
    parser.add_argument("--lr", type=float, help="of every strategy, at the first of --epochs: nothing is chosen")
    parser.add_argument("--epochs", type=int, nargs="+", default=EPOCHS, help="numbers of passes that are tried")
    parser.add_argument("--tasks", type=int, default=TASKS, help="the first so many of each order are learned")
    parser.add_argument("--choice-tasks", type=int, default=TASKS, help="as many rates are chosen on")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="class orders, or splits")
    parser.add_argument("--report", action="store_true", help="nothing is run; what is done is written")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(parser)
    parser.add_argument("--strategies", nargs="+", default=NAMES)
    parser.add_argument("--ablation", action="store_true", help="MACIL's parts, after the strategies")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    specs = [*args.strategies, *(ABLATION[1:] if args.ablation else ())]
    bench = Bench(args, () if args.report else specs)
    if not args.report:
        for name in args.strategies:
            bench.choice(_chosen_as(name))
        for seed, spec in itertools.product(SEEDS[: args.seeds], specs):
            bench.run("runs", bench.scenario(seed), bench.config(spec, seed))
    report(bench, args.out)


if __name__ == "__main__":
    main()
