"""SAE-guided plasticity: overlap by aligned concepts beside overlap by usage. Does it choose better rates?

    python -m benchmarks.alignment.plasticity --work work --out benchmarks/results/alignment/plasticity

``continual.Plasticity`` lets a block learn a new task at the full rate where the block's features are used as by an
earlier task (cosine of usage). But a feature that training has moved is not shared any more. Here

    overlap_b = max over earlier tasks s of Σ_k min(u_t(k), u_s(k)) · (1 - r_k)

u the shares of usage above the background, r_k the relative distance of feature k from itself between the tower that
the SAEs were trained on and the one that has learned so far, on the new task's drawings. MACIL at its rate of
benchmarks/results/cil-emoji.md, with fewer epochs (3 for the first task, 2 for others, 10 of alignment), five class
orders, four ways of dealing rates: by usage, by aligned concepts, every block at the mean of the factors of usage
("uniform"), and none (all at the full rate).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.alignment.incremental import SEEDS, TASKS, accuracies, scenario_of, states
from benchmarks.alignment.towers import block_saes
from clipsteer.alignment.measure import same_distances
from clipsteer.alignment.scores import shares
from clipsteer.cli.cil_settings import EMOJI
from clipsteer.clip.hooks import captured, evaluating
from clipsteer.continual.plasticity import Plasticity, Usage
from clipsteer.io.files import write_json
from clipsteer.report.charts import Chart
from clipsteer.report.intervals import mean_interval
from clipsteer.report.layers import Line

WAYS = ("usage", "aligned", "uniform", "none")
ROWS = 600  # of a task, at which features are compared
RECIPE = {**EMOJI, "first_epochs": 3, "epochs": 2, "align_epochs": 10}


class _Uniform(Plasticity):
    """Every block at the mean of the factors."""

    def multipliers(self, usage: Usage, history: Sequence[Usage]) -> dict[str, float]:
        found = super().multipliers(usage, history)
        return dict.fromkeys(found, statistics.fmean(found.values()))


class Aligned(Plasticity):
    """Overlap by what two tasks use of features that are still what they were."""

    current: nn.Module  # the tower that learns

    def usage(self, module: Any, pixel_batches: Iterable[Any]) -> Usage:
        batches = list(pixel_batches)
        self.distances = self._distances(module, batches)
        return super().usage(module, batches)

    @torch.no_grad()
    def _distances(self, module: nn.Module, batches: Sequence[Tensor]) -> Usage:
        rows: list[dict[str, list[Tensor]]] = []
        for tower in (module, self.current):
            found: dict[str, list[Tensor]] = {block: [] for block in self.saes}
            for pixels in batches:
                with evaluating(tower), captured("aligned", tower, list(self.saes)) as outputs:
                    tower(pixels)
                for block, x in outputs.items():
                    # a patch of each drawing, the same in both towers, another in each batch
                    found[block].append(x[:, 1 + len(found[block]) % (x.shape[1] - 1)])
            rows.append(found)
        distances = {}
        for block, sae in self.saes.items():
            with evaluating(sae):
                p, q = (shares(sae.encode(torch.cat(found[block])[:ROWS]).float()) for found in rows)
            nothing = same_distances(p, torch.zeros_like(p)) + same_distances(q, torch.zeros_like(q))
            apart = same_distances(p, q)
            distances[block] = torch.where(nothing > 0, apart / nothing.clamp_min(1e-300), 1.0)
        return distances

    def overlaps(self, usage: Usage, history: Sequence[Usage]) -> dict[str, float]:
        if not history:
            return dict.fromkeys(self.saes, 1.0)
        found = {}
        for block in self.saes:
            own, *others = (self._share(block, u) for u in (usage, *history))
            kept = 1 - self.distances[block]
            found[block] = max(float((torch.minimum(own, other) * kept).sum()) for other in others)
        return found

    def _share(self, block: str, usage: Usage) -> Tensor:
        above = (usage[block].double() - self.background[block].double()).clamp_min(0)
        return above / above.sum().clamp_min(1e-300)


KINDS: dict[str, type[Plasticity]] = {"usage": Plasticity, "aligned": Aligned, "uniform": _Uniform}


def runs_of(way: str, seed: int, work: Path) -> list[dict[str, Tensor]]:
    common: dict[str, Any] = {"label": f"plasticity-{way}", "keep": False, "recipe": RECIPE}
    if way == "none":
        return states("macil", seed, work, **common)
    saes, background = block_saes(work)
    plasticity = KINDS[way](saes, background=background)
    return states("macil:plasticity=1", seed, work, plasticity=plasticity, **common)


def measured(way: str, seed: int, work: Path) -> dict[str, Any]:
    scenario, found = scenario_of(seed), runs_of(way, seed, work)
    targets = torch.tensor(scenario.test.targets)
    seen = []
    for t in range(TASKS):
        there = torch.isin(targets, torch.tensor(scenario.seen(t)))
        seen.append(float((found[t]["predicted"] == targets)[there].double().mean()))
    table = accuracies(scenario, found)
    earlier = [c for t in range(TASKS - 1) for c in scenario.tasks[t]]
    lost = (table[:-1].nan_to_num(-1).amax(0) - table[-1])[earlier]
    factors = [{k.removeprefix("factor/"): float(v) for k, v in f.items() if k.startswith("factor/")} for f in found]
    return {
        "A_last": seen[-1],
        "A_avg": statistics.fmean(seen),
        "forgetting": float(lost.mean()),
        "factors": factors[1:],
    }


def report(found: dict[tuple[str, int], dict[str, Any]], out: Path) -> None:
    """Means over seeds, and paired differences from the way by aligned concepts."""
    metrics = ("A_last", "A_avg", "forgetting")
    body: dict[str, Any] = {"table": {}, "aligned_minus": {}, "runs": []}
    for way in WAYS:
        own = {seed: row for (w, seed), row in found.items() if w == way}
        body["runs"] += [{"way": way, "seed": seed, **row} for seed, row in own.items()]
        if own:
            body["table"][way] = {m: mean_interval([row[m] for row in own.values()]) for m in metrics}
        both = [seed for seed in own if ("aligned", seed) in found]
        if way != "aligned" and both:
            body["aligned_minus"][way] = {
                m: mean_interval([found["aligned", s][m] - own[s][m] for s in both]) for m in metrics
            }
    lines = []
    for way in ("usage", "aligned"):
        rows = [task for (w, _), row in found.items() if w == way for task in row["factors"]]
        if rows:
            ys = [statistics.fmean(task[block] for task in rows) for block in rows[0]]
            lines.append(Line(way, list(range(len(ys))), ys))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out.with_suffix(".json"), body)
    title = "Factors of the blocks' learning rates, mean over tasks and class orders"
    Chart(title, *lines, x="block", y="factor").write(out.with_suffix(".svg"))
    for name in ("table", "aligned_minus"):
        for way, row in body[name].items():
            sys.stdout.write(f"{name} {way}: {row}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="for runs, which go on where they were stopped")
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="PATH.json and PATH.svg")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--report", action="store_true", help="nothing is learned; what is done is reported")
    args = parser.parse_args()
    found = {}
    for seed in args.seeds:
        for way in args.ways:
            done = args.work / "runs" / f"plasticity-{way}-{seed}" / f"after-{TASKS - 1}.safetensors"
            if done.exists() or not args.report:
                found[way, seed] = measured(way, seed, args.work)
    report(found, args.out)


if __name__ == "__main__":
    main()
