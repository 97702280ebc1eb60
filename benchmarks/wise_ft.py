"""WiSE-FT on the bundled drawings: tune EmojiCLIP on Classify-30 in one vendor's style, test on the others.

Zero-shot head, learning rate, epochs and an alpha are chosen on a part of the training concepts, drawn in the training
style. EmojiCLIP has seen all training concepts (not these drawings of Twemoji) and none of the test concepts.

    python -m benchmarks.wise_ft --out wise-ft-emoji
    python -m benchmarks.wise_ft --styles noto --seeds 0 1 --mode lc --lrs 1e-3 1e-2 --out wise-ft-lc
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.clip.classifier import ImageClassifier, predict, zero_shot_classifier
from clipsteer.clip.model import CLIP, EMOJICLIP, load
from clipsteer.clip.pixels import pixel_batches
from clipsteer.data.dataset import ImageDataset
from clipsteer.data.emoji import Split, classify30, split
from clipsteer.demo.wise_ft import BATCH, STYLES, evaluation_sets, heads, tune, tuned_curve
from clipsteer.ensembles.merging import wise_ft
from clipsteer.ensembles.page import curve_charts, summary_table
from clipsteer.ensembles.robustness import (
    ALPHAS,
    DEFAULT_ALPHA,
    Baseline,
    EvalSet,
    averages,
    fit_baseline,
    summary,
)
from clipsteer.io.files import write_atomically, write_json
from clipsteer.report.intervals import mean_interval
from clipsteer.report.page import Page, grid, markdown_table, percent, table, write_csv
from clipsteer.testing.machine import machine

logger = logging.getLogger(__name__)

LRS = (1e-4, 3e-4, 1e-3)
EPOCHS = (5, 15)


def _score(classifier: ImageClassifier, clip: CLIP, dataset: ImageDataset) -> tuple[float, float]:
    """Accuracy and cross-entropy."""
    logits, truth = predict(classifier, pixel_batches(clip, dataset)), torch.tensor(dataset.targets)
    return float((logits.argmax(1) == truth).float().mean()), float(F.cross_entropy(logits, truth))


def choose(
    style: str, parts: Split, settings: dict[str, Any], lrs: Sequence[float], epochs: Sequence[int],
    alphas: Sequence[float], device: str,
) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:  # fmt: skip
    """The zero-shot head, then lr and epochs, then alpha, best on validation; ties go to the smaller cross-entropy.

    Validation is in the training style: no drawing of another style takes part in any choice.
    """
    fit, validation = classify30(style, parts.fit), classify30(style, parts.validation)
    clip = load(EMOJICLIP, device=device)
    tried: list[dict[str, Any]] = []

    def measure(classifier: ImageClassifier, owner: CLIP, **what: Any) -> None:
        accuracy, loss = _score(classifier, owner, validation)
        tried.append({**what, "accuracy": accuracy, "cross_entropy": loss})

    def best(kind: str) -> dict[str, Any]:
        return max((t for t in tried if t["kind"] == kind), key=lambda t: (t["accuracy"], -t["cross_entropy"]))

    candidates = heads(clip, parts.fit)
    for name, head in candidates.items():
        measure(zero_shot_classifier(clip, head), clip, kind="head", head=name, lr=0.0, epochs=0, alpha=0.0)
    head = best("head")["head"]
    weights = {}
    for lr, n in itertools.product(lrs, epochs):
        clip = load(EMOJICLIP, device=device)
        tuned = tune(clip, fit, candidates[head], **settings, lr=lr, epochs=n)
        weights[lr, n] = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
        measure(tuned, clip, kind="tuning", head=head, lr=lr, epochs=n, alpha=1.0)
    lr, n = best("tuning")["lr"], best("tuning")["epochs"]
    clip = load(EMOJICLIP, device=device)
    mixed = zero_shot_classifier(clip, candidates[head])
    start = {name: tensor.clone() for name, tensor in mixed.state_dict().items()}
    for alpha in sorted({0.0, 1.0, *alphas}):
        mixed.load_state_dict(wise_ft(start, weights[lr, n], alpha))
        measure(mixed, clip, kind="alpha", head=head, lr=lr, epochs=n, alpha=alpha)
    return head, {"lr": lr, "epochs": n, "alpha": best("alpha")["alpha"]}, tried


def _shrunk(pixels: Tensor, side: int) -> Tensor:
    """(N, 3, H, W) -> (N, 3·side² + 1): a smaller picture and a constant, in float64."""
    x = F.adaptive_avg_pool2d(pixels, side).flatten(1).double()
    return F.pad(x, (0, 1), value=1.0)


def _ridge(x: Tensor, targets: Tensor, strength: float) -> Tensor:
    """Weights (d, C) of a one-against-all ridge classifier on x (N, d), by the dual form."""
    kernel = x @ x.T
    kernel.diagonal().add_(strength * float(kernel.diagonal().mean()))
    return x.T @ torch.linalg.solve(kernel, F.one_hot(targets).to(x.dtype) * 2 - 1)


def reference_models(
    style: str, parts: Split, tests: Sequence[EvalSet], clip: CLIP
) -> list[tuple[float, int, float, int]]:
    """Points for the trend: ridge classifiers on the pixels of the training style, which saw nothing else."""
    train = classify30(style, sorted(parts.fit + parts.validation))
    pixels, targets = torch.cat(list(pixel_batches(clip, train))).cpu(), torch.tensor(train.targets)
    generator, points = torch.Generator().manual_seed(0), []
    one_each = torch.stack([(targets == c).nonzero()[0, 0] for c in range(int(targets.max()) + 1)])
    for side, share, strength in itertools.product((4, 8, 16, 32), (0.25, 0.5, 1.0), (1e-3, 1e-1)):
        order = torch.randperm(len(targets), generator=generator)
        kept = torch.cat([order[: int(share * len(order))], one_each]).unique()
        weights = _ridge(_shrunk(pixels[kept], side), targets[kept], strength)
        scores: dict[str, list[tuple[float, int]]] = {}
        for s in tests:
            correct, _ = s.score(torch.cat([_shrunk(batch.cpu(), side) for batch in s.batches()]) @ weights)
            scores.setdefault(s.role, []).append((correct / len(s.targets), len(s.targets)))
        means = {role: (statistics.fmean(a for a, _ in part), sum(n for _, n in part)) for role, part in scores.items()}
        points.append((*means["reference"], *means["shifted"]))
    return points


def run(
    *, styles: Sequence[str] = STYLES, seeds: Sequence[int] = (0, 1, 2), lrs: Sequence[float] = LRS,
    epochs: Sequence[int] = EPOCHS, alphas: Sequence[float] = ALPHAS, mode: str = "e2e", device: str = "cpu",
) -> tuple[dict[str, Any], list[dict[str, Any]]]:  # fmt: skip
    """The whole experiment: what was chosen and found, JSON-able, and every measured row (see `robustness.curve`)."""
    settings = {"mode": mode, "batch_size": BATCH}
    alphas = sorted({*alphas, DEFAULT_ALPHA})
    parts = split()
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {
        "model": EMOJICLIP, "mode": mode, "batch_size": BATCH, "seeds": list(seeds), "machine": machine(),
        "lrs": list(lrs), "epochs": list(epochs), "alphas": alphas,
        "concepts": {"fit": len(parts.fit), "validation": len(parts.validation), "test": len(parts.test)},
        "styles": {},
    }  # fmt: skip
    for style in styles:
        head_name, chosen, tried = choose(style, parts, settings, lrs, epochs, alphas, device)
        logger.info("%s: head from %s, %s", style, head_name, chosen)
        tests = evaluation_sets(style, parts.test, device)
        models = reference_models(style, parts, tests, load(EMOJICLIP, device=device))
        baseline = fit_baseline(models)
        for seed in seeds:
            tuning = {**settings, "lr": chosen["lr"], "epochs": chosen["epochs"]}
            measured = tuned_curve(style, parts, head_name, tuning, tests, seed=seed, alphas=alphas, device=device)
            rows += [{"style": style, "seed": seed, **row} for row in measured]
        own = [row for row in rows if row["style"] == style]
        found["styles"][style] = {
            "head": head_name, "chosen": chosen, "tried": tried, "baseline": baseline._asdict(), "models": models,
            **findings(own, baseline, chosen["alpha"]),
        }  # fmt: skip
    return found, rows


def mean_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The mean over seeds: rows as `curve` gives them, with accuracies averaged."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["alpha"], row["set"]), []).append(row)
    means = ("correct", "accuracy", "low", "high", "balanced")
    return [g[0] | {key: statistics.fmean(row[key] for row in g) for key in means} for g in groups.values()]


def findings(rows: Sequence[dict[str, Any]], baseline: Baseline, alpha: float) -> dict[str, Any]:
    """Means over seeds, and by how much an ensemble beats the better end on the average of the shifted sets.

    Gains are of alpha = 0.5 ("default"), of the alpha chosen on validation, and of the best alpha inside (0, 1) of each
    seed ("oracle"), which is chosen on what it is measured on and so comes out too high.
    """
    seeds = sorted({row["seed"] for row in rows})
    out: dict[str, Any] = {}
    for measure in ("accuracy", "balanced"):
        # the trend was fitted to plain accuracies
        out[measure] = summary(mean_rows(rows), baseline if measure == "accuracy" else None, measure)
        means = [
            row for row in averages(mean_rows(rows), measure) if (row["method"], row["alpha"]) == ("weight", alpha)
        ]
        out[measure]["weight"]["validation"] = means[0]
        gains: dict[str, list[float]] = {}
        inner: list[float] = []
        for seed in seeds:
            line = {
                row["alpha"]: row
                for row in averages([r for r in rows if r["seed"] == seed], measure)
                if row["method"] == "weight"
            }
            ends = max(line[0.0]["shifted"], line[1.0]["shifted"])
            gains.setdefault("default", []).append(line[DEFAULT_ALPHA]["shifted"] - ends)
            gains.setdefault("validation", []).append(line[alpha]["shifted"] - ends)
            best = max((row for a, row in line.items() if 0 < a < 1), key=lambda row: row["shifted"])
            gains.setdefault("oracle", []).append(best["shifted"] - ends)
            inner.append(best["alpha"])
        out[f"{measure}_gain_over_both_ends"] = {
            name: {"by_seed": values, **mean_interval(values), "seeds_above_both": sum(v > 0 for v in values)}
            for name, values in gains.items()
        } | {"oracle_alphas": inner}
    return out


def write(folder: str | Path, found: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[Path]:
    """wise_ft_emoji.json, .csv, .md, .html and, for each style, a .svg (and .png, see `Chart.write`), in `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / "wise_ft_emoji"
    write_json(stem.with_suffix(".json"), found)
    write_csv(stem.with_suffix(".csv"), rows)
    written = [stem.with_suffix(".json"), stem.with_suffix(".csv")]
    curves = {style: mean_rows([row for row in rows if row["style"] == style]) for style in found["styles"]}
    return written + write_experiment(stem, found, curves)


def _gain(found: Mapping[str, Any], measure: str, name: str) -> str:
    gain = found[f"{measure}_gain_over_both_ends"][name]
    spread = "" if gain["sd"] is None else f" ± {100 * gain['sd']:.1f}"
    return f"{100 * gain['mean']:+.1f}{spread} ({gain['seeds_above_both']} of {len(gain['by_seed'])})"


_ACCURACY = ["tuned on", "zero-shot", "α = 0.5", "α from validation", "oracle α", "fine-tuned", "output space, α = 0.5"]


_GAINS = ["tuned on", "α = 0.5", "α from validation", "oracle α", "ρ zero-shot", "ρ α = 0.5", "ρ fine-tuned"]


def _experiment_tables(found: Mapping[str, Any], measure: str) -> tuple[list[list[str]], list[list[str]]]:
    pair = lambda row: f"{percent(row['reference'])} / {percent(row['shifted'])}"
    accuracy, gains = [], []
    for style, result in found["styles"].items():
        weight, output = result[measure]["weight"], result[measure]["output"]
        named = (f"{weight[name]['alpha']:g}: {pair(weight[name])}" for name in ("validation", "oracle"))
        ends = (pair(weight[name]) for name in ("zeroshot", "default"))
        accuracy.append([style, *ends, *named, pair(weight["finetuned"]), pair(output["default"])])
        robust = (f"{100 * weight[end]['effective_robustness']:+.1f}" for end in ("zeroshot", "default", "finetuned"))
        beaten = [_gain(result, measure, name) for name in ("default", "validation", "oracle")]
        gains.append([style, *beaten, *(robust if measure == "accuracy" else ())])
    return accuracy, gains


def write_experiment(
    stem: Path, found: Mapping[str, Any], curves: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[Path]:
    """The page, the Markdown summary and a chart for each style: what `run` found, and its mean curves."""
    m, settings = found["machine"], found["concepts"]
    where = f"{m['chip']}, {m['threads']} thread(s), torch {m['torch']}, Python {m['python']}, {m['date']}"
    what = (
        f"EmojiCLIP tuned ({found['mode']}) on Classify-30 in one style, {settings['fit'] + settings['validation']} "
        "concepts; "
        f"test: {settings['test']} other concepts, in that style (reference) and in the two others (shifted). "
        f"Means over seeds {', '.join(map(str, found['seeds']))}. Cells: reference / mean of the shifted sets, %."
    )
    page = Page("WiSE-FT across drawing styles", what, footer=where)
    written = []
    accuracy, gains = _experiment_tables(found, "accuracy")
    balanced, balanced_gains = _experiment_tables(found, "balanced")
    explained = (
        "Gains on the mean of the shifted sets over the better of the two ends, in points: mean ± sd over seeds (seeds "
        "above both ends). The oracle α is chosen on the test sets, for each seed, and its gain comes out too high. "
        "ρ: effective robustness in points, against pixel classifiers trained on the reference style alone."
    )
    parts = [("Accuracy", _ACCURACY, accuracy, ""), ("Gains", _GAINS, gains, explained),
             ("Balanced accuracy", _ACCURACY, balanced, ""),
             ("Gains in balanced accuracy", _GAINS[:4], balanced_gains, "")]  # fmt: skip
    for heading, headers, cells, caption in parts:
        page.section(heading, table(headers, cells, caption))
    for style, result in found["styles"].items():
        own, baseline = curves[style], Baseline(**result["baseline"])
        drawn = curve_charts(own, baseline, result["models"], label=f", tuned on {style}")
        tried = [
            [f"{t['head']}, lr {t['lr']:g}, {t['epochs']} epochs, α = {t['alpha']:g}", percent(t["accuracy"]),
             f"{t['cross_entropy']:.3f}"]
            for t in result["tried"]
        ]  # fmt: skip
        chosen = result["chosen"]
        picks = (
            f"Chosen: head from {result['head']}, lr {chosen['lr']:g}, {chosen['epochs']} epochs, "
            f"α = {chosen['alpha']:g}."
        )
        page.section(
            f"Tuned on {style}", grid(*drawn), summary_table(own, baseline),
            table(["on validation concepts", "accuracy, %", "cross-entropy"], tried, picks),
        )  # fmt: skip
        path = stem.with_name(f"{stem.name}_{style}.svg")
        written += drawn[0].write(path)
    written.append(page.write(stem.with_suffix(".html")))
    lines = ["# WiSE-FT across drawing styles", "", what]
    for heading, headers, cells, caption in parts:
        lines += ["", f"## {heading}", "", *([caption, ""] if caption else []), *markdown_table(headers, cells)]
    given = {"styles": found["styles"], **{name: found[name] for name in ("seeds", "lrs", "epochs")}}
    if found["alphas"] != list(ALPHAS):
        given["alphas"] = found["alphas"]
    options = " ".join(f"--{name} {' '.join(map(str, values))}" for name, values in given.items())
    lines += [
        "",
        f"Repeat: `python -m benchmarks.wise_ft --mode {found['mode']} {options} --out DIR`.",
        "",
        f"{where}.",
        "",
    ]
    path = stem.with_suffix(".md")
    write_atomically(path, lambda file: file.write("\n".join(lines).encode()))
    return [*written, path]


def main(argv: Sequence[str] | None = None) -> int:
    from clipsteer.cli.arguments import add_device, device_of
    from clipsteer.cli.wise_ft import show

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="for JSON, CSV, Markdown, HTML, SVG and PNG")
    p.add_argument("--styles", nargs="+", choices=STYLES, help="to tune on (default: each)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    p.add_argument("--lrs", type=float, nargs="+", metavar="LR", help="to choose from on validation concepts")
    p.add_argument("--epochs", type=int, nargs="+", metavar="N", help="to choose from on validation concepts")
    p.add_argument("--alphas", type=float, nargs="+", metavar="A", help="(default: 0, 0.05 … 1)")
    p.add_argument("--mode", choices=("e2e", "lc"), default="e2e", help="end to end, or the classifier alone")
    add_device(p)
    args = p.parse_args(argv)
    given = {name: getattr(args, name) for name in ("styles", "lrs", "epochs", "alphas") if getattr(args, name)}
    found, rows = run(seeds=args.seeds, mode=args.mode, device=device_of(args), **given)
    written = write(args.out, found, rows)
    for style, result in found["styles"].items():
        sys.stdout.write(f"tuned on {style}: {result['chosen']}, head from {result['head']}\n")
        show(result["accuracy"])
    sys.stdout.writelines(f"{path}\n" for path in written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
