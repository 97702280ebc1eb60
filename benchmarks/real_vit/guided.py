"""SAE-guided learning rates on a real ViT: which blocks do tasks live in, and does the idea pay?

    python -m benchmarks.real_vit.guided --weights vit_s.safetensors --pictures pictures --work work \\
        --out benchmarks/results/real_vit/guided

The seed idea (``continual.Plasticity``): a block learns a new task at the full rate where the task uses the block's SAE
features as an earlier task did, and slowly elsewhere. Three runs for each class order, of one strategy, alike in all
but the factors of the blocks: those factors; every block at their mean ("uniform", the same mean rate in each task);
and the same factors dealt to other blocks ("dealt", the same rates without the knowledge of where). Rates are the
strategy's own of benchmarks.real_vit.incremental, chosen on validation pictures; --work is shared with it.

The picture shows, for each block and task, the overlap of the task's features with the nearest earlier task's.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.real_vit.incremental import SEEDS, TASKS, Bench, arguments, interval
from clipsteer.clip.pixels import pixel_batches
from clipsteer.continual.config import CILConfig
from clipsteer.continual.metrics import Run, paired
from clipsteer.continual.plasticity import Plasticity, Usage
from clipsteer.io.files import read_json, write_json
from clipsteer.report.charts import Chart
from clipsteer.report.layers import Cells

WAYS = ("guided", "uniform", "dealt")


class _Uniform(Plasticity):
    """Every block at the mean of the factors."""

    def multipliers(self, usage: Usage, history: Sequence[Usage]) -> dict[str, float]:
        found = super().multipliers(usage, history)
        return dict.fromkeys(found, statistics.fmean(found.values()))


class _Dealt(Plasticity):
    """The factors in another order of the blocks, which the number of the task gives."""

    def multipliers(self, usage: Usage, history: Sequence[Usage]) -> dict[str, float]:
        found = super().multipliers(usage, history)
        order = np.random.RandomState(len(history)).permutation(len(found))
        values = list(found.values())
        return {block: values[i] for block, i in zip(found, order)}


def plasticity_of(way: str, own: Plasticity) -> Plasticity:
    """The factors of a way of dealing them."""
    kinds: dict[str, type[Plasticity]] = {"guided": Plasticity, "uniform": _Uniform, "dealt": _Dealt}
    return kinds[way](own.saes, own.floor, own.background)


class Guided(Bench):
    """Runs of one strategy in three ways."""

    def settings(self, way: str, seed: int) -> CILConfig:
        config = self.config(f"{self.args.strategy}:plasticity=1", seed)
        return replace(config, name=f"{self.args.strategy}, {way}")

    def go(self) -> None:
        saes = self.plasticity()
        for seed, way in itertools.product(SEEDS[: self.args.seeds], WAYS):
            config = self.settings(way, seed)
            self.run("guided", self.scenario(seed), config, plasticity_of(way, saes))

    def done(self) -> list[Run]:
        if not self.choice_file(self.args.strategy).exists():
            return []  # nothing can have been run
        return [run for way in WAYS for seed in SEEDS if (run := self.stored("guided", self.settings(way, seed)))]

    def overlaps(self, seed: int) -> list[list[float]]:
        """Blocks × tasks after the first: the largest cosine with an earlier task; read from the tower as it starts."""
        file = self.work / "overlaps" / f"seed{seed}.json"
        if not file.exists():
            saes, tower, images = self.plasticity(), self.encoder(), self.scenario(seed)
            history: list[Usage] = []
            columns = []
            for t in range(TASKS):
                part = images.train.subset(images.rows("train", t))
                usage = saes.usage(tower.module, pixel_batches(tower, part))
                if history:
                    columns.append(list(saes.overlaps(usage, history).values()))
                history.append(usage)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, [list(row) for row in zip(*columns)])
        return read_json(file)


def report(bench: Guided, out: Path, seeds: Sequence[int]) -> None:
    """Figures and the map."""
    out.parent.mkdir(parents=True, exist_ok=True)
    maps = [np.array(bench.overlaps(seed)) for seed in seeds]
    body: dict[str, Any] = {"overlaps": {}, "table": {}, "guided_minus": {}}
    if maps:
        mean = np.mean(maps, 0)  # (blocks, tasks - 1)
        body["overlaps"] = {"orders": len(maps), "mean": mean.tolist(), "sd": np.std(maps, 0).tolist()}
        rows = [f"block {b}" for b in range(len(mean))]
        columns = [f"task {t}" for t in range(2, TASKS + 1)]
        cells = Cells(mean.tolist(), rows=rows, columns=columns, peak=1.0)
        chart = Chart("Overlap of features with the nearest earlier task", cells, x="", y="")
        chart.write(out.with_suffix(".svg"))
    runs = bench.done()
    names = {way: f"{bench.args.strategy}, {way}" for way in WAYS}
    metrics = ("A_last", "A_avg", "forgetting")
    for way, name in names.items():
        own = [run for run in runs if run.strategy == name]
        if own:
            body["table"][way] = {m: interval(own, m) for m in metrics}
            body["table"][way]["by_seed"] = {run.seed: run.A_last for run in own}
    for way in WAYS[1:]:
        if {"guided", way} <= body["table"].keys():
            gap = {m: paired(runs, names["guided"], names[way], m) for m in metrics}
            body["guided_minus"][way] = gap
            sys.stdout.write(f"guided minus {way}: {gap['A_last']}\n")
    write_json(out.with_suffix(".json"), body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(parser)
    parser.add_argument("--strategy", default="macil")
    parser.add_argument("--map", action="store_true", help="the overlaps alone, without runs")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    bench = Guided(args)
    if not (args.report or args.map):
        bench.go()
    seeds = SEEDS[: args.seeds]
    known = [seed for seed in seeds if not args.report or (args.work / "overlaps" / f"seed{seed}.json").exists()]
    report(bench, args.out, known)


if __name__ == "__main__":
    main()
