"""What fine-tuning and WiSE-FT change in EmojiCLIP, block by block and concept by concept.

    python -m benchmarks.alignment.finetuning --work work --out benchmarks/results/alignment/finetuning

EmojiCLIP is tuned on Classify-30's training concepts in Twemoji, the style that it was not trained on, as the demo does
(three seeds), and averaged with what it was at five alphas. Every tower is compared with the one before tuning on the
drawings of every third concept of Classify-30: features of SAEs of the tower before (a patch of each drawing) and the
30 kinds by the energies of their conceptors (mean of the patches; the tower's own).

Agreement: (GRI - chance) / (1 - chance). Of the 64 commonest features of the tower before: the share that is still the
same (relative distance below .5, interval and all), and that is gone (above).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.alignment.towers import block_saes, rows_of
from clipsteer.alignment.measure import agreement, follow_concepts
from clipsteer.alignment.scores import Proximity, of_classes, of_features
from clipsteer.clip.classifier import zero_shot_classifier
from clipsteer.clip.model import CLIP, EMOJICLIP, load
from clipsteer.data.emoji import HELD_OUT_STYLE, EmojiStyles, classify30, split
from clipsteer.demo.wise_ft import BATCH, EPOCHS, HEAD, LR, evaluation_sets, heads, tune
from clipsteer.ensembles.merging import wise_ft
from clipsteer.ensembles.robustness import averages, curve
from clipsteer.io.files import read_json, write_json
from clipsteer.report.charts import Chart
from clipsteer.report.intervals import mean_interval
from clipsteer.report.layers import Line

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
SCORES = ("sae", "conceptor")

Scores = dict[tuple[str, str], Proximity]  # (score, layer)


def proximities(clip: CLIP, images: Any, work: Path) -> Scores:
    saes, _ = block_saes(work)
    patches = rows_of(clip, images)
    found: Scores = {("sae", block): of_features(sae, patches[block]) for block, sae in saes.items()}
    labels = torch.tensor(images.targets)
    for layer, rows in rows_of(clip, images, "mean").items():
        found["conceptor", layer] = of_classes(rows, labels, images.classes)
    return found


def compared(before: Scores, after: Scores) -> list[dict[str, Any]]:
    rows = []
    for (score, layer), p in before.items():
        q = after[score, layer]
        images = torch.arange(len(p.scores))
        found = agreement(p.scores, q.scores, images)
        kept = follow_concepts(p, q, images, count=64)
        rows.append(
            {
                "score": score,
                "layer": layer,
                **found.to_json(),
                "distance": statistics.fmean(m.relative.value for m in kept),
                "same": sum(m.relative.high < 0.5 for m in kept) / len(kept),
                "gone": sum(m.relative.low > 0.5 for m in kept) / len(kept),
                "gone concepts": [p.names[m.a] for m in kept if m.relative.low > 0.5],
            }
        )
    return rows


def run(seed: int, work: Path) -> dict[str, Any]:
    """Accuracies and comparisons at every alpha; kept in ``work``."""
    kept = work / "finetuning" / f"seed-{seed}.json"
    if kept.exists():
        return read_json(kept)
    parts = split()
    training = sorted(parts.fit + parts.validation)
    images = classify30(EmojiStyles.styles, sorted(training + parts.test)[::3])
    clip = load(EMOJICLIP)
    head = heads(clip, training)[HEAD]
    start = {k: v.detach().clone() for k, v in zero_shot_classifier(clip, head).state_dict().items()}
    before = proximities(clip, images, work)
    settings = {"lr": LR, "epochs": EPOCHS, "batch_size": BATCH, "seed": seed}
    tuned = tune(clip, classify30(HELD_OUT_STYLE, training), head, **settings)
    tests = evaluation_sets(HELD_OUT_STYLE, parts.test)
    accuracy = [row for row in averages(curve(start, tuned, tests, ALPHAS)) if row["method"] == "weight"]
    weights = {k: v.detach().clone() for k, v in tuned.state_dict().items()}
    rows = []
    for alpha in ALPHAS[1:]:
        other = load(EMOJICLIP)
        zero_shot_classifier(other, head).load_state_dict(wise_ft(start, weights, alpha))
        rows += [{"alpha": alpha, **row} for row in compared(before, proximities(other, images, work))]
        sys.stdout.write(f"seed {seed}: alpha {alpha:g}\n")
        sys.stdout.flush()
    found = {"seed": seed, "accuracy": accuracy, "compared": rows}
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_json(kept, found)
    return found


def report(runs: list[dict[str, Any]], out: Path) -> None:
    def over_seeds(score: str, layer: str, alpha: float, what: str) -> Any:
        found = []
        for one in runs:
            for row in one["compared"]:
                if (row["score"], row["layer"], row["alpha"]) == (score, layer, alpha):
                    found.append(row["details"][what] if what == "above_chance" else row[what])
        return mean_interval(found)

    layers = list(dict.fromkeys((r["score"], r["layer"]) for r in runs[0]["compared"]))
    table = []
    for score, layer in layers:
        for alpha in ALPHAS[1:]:
            row = {what: over_seeds(score, layer, alpha, what) for what in ("above_chance", "same", "gone")}
            table.append({"score": score, "layer": layer, "alpha": alpha, **row})
    accuracy = []
    for alpha in ALPHAS:
        own = [row for one in runs for row in one["accuracy"] if row["alpha"] == alpha]
        accuracy.append({"alpha": alpha, **{m: mean_interval([r[m] for r in own]) for m in ("reference", "shifted")}})
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out.with_suffix(".json"), {"accuracy": accuracy, "table": table, "runs": runs})
    for score in SCORES:
        lines = []
        for kind, layer in layers:
            if kind == score:
                ys = [1.0] + [t["above_chance"]["mean"] for t in table if (t["score"], t["layer"]) == (kind, layer)]
                lines.append(Line(layer.removeprefix("transformer.resblocks."), list(ALPHAS), ys))
        title = f"Agreement with the tower before tuning, by block ({score})"
        chart = Chart(title, *lines, x="α", y="(GRI - chance) / (1 - chance)")
        chart.write(out.with_name(f"{out.name}_{score}.svg"))
    for row in accuracy:
        sys.stdout.write(f"{row}\n")
    for row in table:
        means = {k: v["mean"] if isinstance(v, dict) else v for k, v in row.items()}
        sys.stdout.write(f"{means}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="for SAEs and runs, made where missing")
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="PATH.json and PATH_SCORE.svg")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    report([run(seed, args.work) for seed in args.seeds], args.out)


if __name__ == "__main__":
    main()
