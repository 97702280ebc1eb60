"""Tables and curves of benchmarks/reference_model."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipsteer.demo.reference import PLACE, chart
from clipsteer.io.files import write_atomically, write_json
from clipsteer.report.intervals import mean_interval

METRICS = {
    "held-out style, seen concepts/image_to_text_mrr": "mean reciprocal rank, held-out style, seen concepts",
    "held-out style, seen concepts/image_to_text_r1": "R@1, held-out style, seen concepts",
    "trained styles, new concepts/image_to_text_r1": "R@1, trained styles, new concepts",
    "held-out style, new concepts/image_to_text_r1": "R@1, held-out style, new concepts",
    "30 classes, held-out style/zero_shot": "zero-shot, 30 classes, held-out style",
}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % t-interval."""
    found = mean_interval(values)
    return found["mean"], math.inf if found["high"] is None else found["high"] - found["mean"]


def curves(found: dict[str, Any]) -> dict[str, Any]:
    """Means over seeds by number of samples: what the charts are drawn from."""
    runs = {m: [run["rows"] for run in found["runs"] if run["method"] == m] for m in found["chosen"]}
    first = next(iter(runs.values()))[0]
    return {
        "samples": [row["samples"] for row in first], "seeds": found["seeds"], "date": found["machine"]["date"],
        "metrics": {
            title: {m: [statistics.fmean(rows[i][key] for rows in each) for i in range(len(first))]
                    for m, each in runs.items()}
            for key, title in METRICS.items()
        },
    }  # fmt: skip


def finals(found: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Metric -> method -> the figure at the end of each seed's run."""
    return {
        key: {m: [run["rows"][-1][key] for run in found["runs"] if run["method"] == m] for m in found["chosen"]}
        for key in METRICS
    }


def differences(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Every pair of methods, paired by seed (the same start and the same batches)."""
    rows = []
    for key, by_method in finals(found).items():
        for a, b in itertools.combinations(by_method, 2):
            mean, half = interval([y - x for x, y in zip(by_method[a], by_method[b])])
            rows.append({"metric": key, "from": a, "to": b, "mean": mean, "half_width": half,
                         "told_apart": abs(mean) > half})  # fmt: skip
    return rows


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def markdown(found: dict[str, Any]) -> str:
    last, apart = finals(found), differences(found)
    percent = lambda x: f"{100 * x:.1f}"
    methods, seeds = list(found["chosen"]), len(found["seeds"])
    on = "; ".join(sorted({f"{run['chip']}, {run['date']}" for run in found["runs"] + found["averaged"]}))
    parts = [
        "# Training with a reference model, on EmojiStyles\n",
        f"{found['model']}, {found['samples']['test']:,} samples in batches of {found['batch_size']}, "
        f"{found['pairs']['all']:,} pairs of drawings and noisy captions, {seeds} seeds, about "
        f"{found['processor_seconds']:.0f} s of processor time a run ({on}). "
        "Made by benchmarks/reference_model; curves in the SVG files beside this one, every figure in the JSON.\n",
        "Figures are %, mean over seeds ± the half-width of the 95 % t-interval. Retrieval is image→text, among the "
        "labels of the set: 632 seen or 225 new ones.\n",
        "γ = 1 throughout, as DRRho-CLIP's rule has it for at most seven epochs: the denominators of global and DRRho "
        "are those of the batch, and nothing is averaged over epochs (for γ < 1 see below). The intervals are about "
        "seeds alone, not about the images.\n",
        _table(
            ["", *METRICS.values()],
            [[m, *(f"{percent(interval(last[key][m])[0])} ± {percent(interval(last[key][m])[1])}" for key in METRICS)]
             for m in methods],
        ),
        "The references themselves, image→text R@1:\n",
        _table(
            ["", *next(iter(found["references"].values()))],
            [[name, *map(percent, row.values())] for name, row in found["references"].items()],
        ),
        "## Paired differences\n",
        "Points gained by going from the first to the second method, seed by seed; in bold where the 95 % t-interval "
        "leaves out 0. The others cannot be told apart with these seeds. The intervals are not corrected for the "
        "number of comparisons.\n",
    ]  # fmt: skip
    rows = []
    for a, b in itertools.combinations(methods, 2):
        cells = []
        for key in METRICS:
            row = next(r for r in apart if (r["metric"], r["from"], r["to"]) == (key, a, b))
            text = f"{100 * row['mean']:+.1f} ± {100 * row['half_width']:.1f}"
            cells.append(f"**{text}**" if row["told_apart"] else text)
        rows.append([f"{a} → {b}", *cells])
    parts += [
        _table(["", *METRICS.values()], rows),
        "## Choices\n",
        f"Learning rate and temperature by mean reciprocal rank, image→text, on {found['left_out_drawings']} left-out "
        f"drawings of seen concepts in trained styles; seed 0, {found['samples']['choose']:,} samples, "
        f"{len(found['tried']) // len({run['method'] for run in found['tried']})} trials a method. "
        "One seed's choice is a rough one: where the highest learning rate won, the choice among the others is tested "
        "too. Both references were fitted on the left-out drawings as well.\n",
    ]
    trials = sorted({(run["lr"], run["temperature"]) for run in found["tried"]})
    at = {(run["method"], (run["lr"], run["temperature"])): percent(run["mrr"]) for run in found["tried"]}
    tried = list(dict.fromkeys(run["method"] for run in found["tried"]))
    for m in tried:
        best = (m, tuple(found["chosen"][m][key] for key in ("lr", "temperature")))
        at[best] = f"**{at[best]}**"
    names = (f"lr {lr:g}, τ {tau:g}" for lr, tau in trials)
    parts.append(_table(["", *names], [[m, *(at[m, t] for t in trials)] for m in tried]))
    parts += whole_matrices(found) + averages(found)
    parts += [
        "## What the reference does\n",
        "Mean reciprocal rank on the left-out drawings when EmojiCLIP's similarities are multiplied by a factor in "
        "DRRho (0 is the global loss; learning rate and temperature of DRRho, EmojiCLIP), and the paired difference "
        "to 0:\n",
    ]
    scaled, rows = found["scaled_reference"], []
    for way, values in scaled.items():
        (mean, half), gain = interval(values), interval([a - b for a, b in zip(values, scaled["0"])])
        rows.append([way, f"{percent(mean)} ± {percent(half)}",
                     f"{100 * gain[0]:+.1f} ± {100 * gain[1]:.1f}" if way != "0" else ""])  # fmt: skip
    parts += [
        _table(["factor", "mean reciprocal rank", "difference"], rows),
        "Where DRRho's weights lie while the model knows nothing: the share of negatives that carry them (1/Σw²), and "
        "how much weight negatives of the same subcategory and of the same concept (false negatives) get, as a "
        "multiple of their share in the batch (1 in the global loss at its start):\n",
        _table(
            ["reference", "τ", "carried by", "same subcategory", "same concept", "mean margin r_ii - r_ij"],
            [[name, tau, f"{percent(w['effective'])} %", f"{w['near']:.2f}", f"{w['false']:.2f}",
              f"{w['mean_margin']:.2f}"]
             for name, by_tau in found["first_weights"].items() for tau, w in by_tau.items()],
        ),
    ]  # fmt: skip
    return "\n".join(parts)


def whole_matrices(found: dict[str, Any]) -> list[str]:
    """The runs that had whole matrices of logits too, seed by seed: one is the other but for rounding."""
    whole = found.get("whole", [])
    tiles = {(run["method"], run["seed"]): run for run in found["runs"]}
    rows = []
    for method in dict.fromkeys(run["method"] for run in whole):
        pairs = [(tiles[method, run["seed"]], run) for run in whole if run["method"] == method]
        cells = []
        for key in METRICS:
            mean, half = interval([a["rows"][-1][key] - b["rows"][-1][key] for a, b in pairs])
            cells.append(f"{100 * mean:+.2f} ± {100 * half:.2f}")
        seconds = [statistics.fmean(pair[side]["processor_seconds"] for pair in pairs) for side in (1, 0)]
        cells.append(f"{seconds[0]:.1f} → {seconds[1]:.1f} s")
        rows.append([method, *cells])
    if not rows:
        return []
    return [
        "## Tiles beside whole matrices\n",
        'The same runs with `loss_backend="plain"`, which multiplies whole matrices of logits: what tiles change, in '
        "points, and processor time of a run with its evaluations, of whole matrices → of tiles.\n",
        _table(["", *METRICS.values(), "a run"], rows),
    ]


def averages(found: dict[str, Any]) -> list[str]:
    """What averaged denominators do beside those of the batch, seed by seed."""
    runs = {(r["part"], r["method"], r.get("gamma_min", 1.0), r["seed"]): r for r in found["runs"] + found["averaged"]}
    least = min(run["gamma_min"] for run in found["averaged"])
    rows = []
    for part, method in dict.fromkeys((run["part"], run["method"]) for run in found["averaged"]):
        with_, without = (
            [runs[part, method, gamma, seed]["rows"][-1] for seed in found["seeds"]] for gamma in (least, 1.0)
        )
        cells = []
        for key in METRICS:
            mean, half = interval([row[key] for row in with_])
            gain, reach = interval([a[key] - b[key] for a, b in zip(with_, without)])
            text = f"{100 * gain:+.1f} ± {100 * reach:.1f}"
            cells.append(f"{100 * mean:.1f} ± {100 * half:.1f}; " + (f"**{text}**" if abs(gain) > reach else text))
        rows.append([f"{method}, {found['samples'][part]:,} samples", *cells])
    return [
        "## Averaged denominators\n",
        f"γ falls from 1 to {least:g} in half of the epochs by half a cosine, FastCLIP's schedule; learning rates "
        "and temperatures are those chosen for γ = 1. Means over seeds, and what is gained over γ = 1 with the same "
        "seeds and samples, in points.\n",
        _table(["", *METRICS.values()], rows),
    ]


def write(stem: Path, found: dict[str, Any]) -> list[Path]:
    """STEM.json, STEM.md, a chart for each metric, and the means that the demo draws."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    means = curves(found)
    write_json(stem.with_suffix(".json"), {**found, "differences": differences(found)})
    text = markdown(found)
    write_atomically(stem.with_suffix(".md"), lambda file: file.write(text.encode()))
    write_json(PLACE, means)
    written = [stem.with_suffix(".json"), stem.with_suffix(".md"), PLACE]
    for number, title in enumerate(means["metrics"], 1):
        written += chart(means, title).write(stem.with_name(f"{stem.name}_{number}.svg"))
    return written
