"""WiSE-FT on the bundled drawings: tune EmojiCLIP on Classify-30 in one vendor's style, test on the others.

Zero-shot head, learning rate, epochs and an alpha are chosen on a part of the training concepts, drawn in the training
style. EmojiCLIP has seen all training concepts (not these drawings of Twemoji) and none of the test concepts.
"""

from __future__ import annotations

import itertools
import logging
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipsteer._files import write_json
from clipsteer.bench import machine
from clipsteer.classifier import ImageClassifier, pixel_batches, predict, renamed, zero_shot_classifier
from clipsteer.clip import CLIP, EMOJICLIP, load, zero_shot_head
from clipsteer.data import EmojiStyles, ImageDataset
from clipsteer.finetuning import FinetuneConfig, finetune
from clipsteer.merging import wise_ft
from clipsteer.report.intervals import mean_interval
from clipsteer.robustness import ALPHAS, DEFAULT_ALPHA, Baseline, EvalSet, averages, curve, fit_baseline, summary

logger = logging.getLogger(__name__)

LRS = (1e-4, 3e-4, 1e-3)
EPOCHS = (5, 15)
BATCH = 64
STYLES = EmojiStyles.styles


class Split(NamedTuple):
    """Concept indices: `fit` and `validation` make up Classify-30's training part."""

    fit: list[int]
    validation: list[int]
    test: list[int]


def stratified(labels: Sequence[Any], seed: int = 0, share: float = 0.2) -> tuple[list[int], list[int]]:
    """Positions (kept, held out): of each label about ``share``, at least one and never all; with share 0, none."""
    groups: dict[Any, list[int]] = {}
    for i, label in enumerate(labels):
        groups.setdefault(label, []).append(i)
    generator, kept, held_out = torch.Generator().manual_seed(seed), [], []
    for members in groups.values():
        order = torch.randperm(len(members), generator=generator).tolist()
        cut = min(max(share > 0, round(share * len(members))), len(members) - 1)
        held_out += [members[j] for j in order[:cut]]
        kept += [members[j] for j in order[cut:]]
    return sorted(kept), sorted(held_out)


def split(seed: int = 0, share: float = 0.2) -> Split:
    """A fifth of each subcategory's training concepts is for validation; the same in every style."""
    emoji = EmojiStyles()
    training = emoji.indices(classify30="train")
    parts = stratified([emoji.concepts[i].subcategory for i in training], seed, share)
    return Split(*([training[i] for i in part] for part in parts), emoji.indices(classify30="test"))


def classify30(styles: str | Sequence[str], concepts: Sequence[int]) -> ImageDataset:
    """Drawings of the concepts that the style, or each of the styles, has; classes: Classify-30's subcategories."""
    emoji = EmojiStyles()
    pairs = [(style, i) for style in ([styles] if isinstance(styles, str) else styles) for i in concepts]
    drawn = {style: emoji.drawn(style) for style, _ in pairs}
    classes = sorted({concept.subcategory for concept in emoji.concepts if concept.classify30})
    return renamed(emoji.dataset([(s, i) for s, i in pairs if drawn[s][i]], "subcategory"), classes)


def heads(clip: CLIP, concepts: Sequence[int]) -> dict[str, Tensor]:
    """Two zero-shot heads (30, e): from the subcategories' names, and the mean over the labels of their concepts."""
    emoji = EmojiStyles()
    owner = [emoji.concepts[i].subcategory for i in concepts]
    classes = sorted(set(owner))
    labels = zero_shot_head(clip, [emoji.concepts[i].label for i in concepts])
    rows = torch.tensor([classes.index(name) for name in owner], device=labels.device)
    sums = torch.zeros(len(classes), labels.shape[1], device=labels.device).index_add_(0, rows, labels)
    names = zero_shot_head(clip, [name.replace("-", " ") for name in classes])
    return {"names": names, "labels": F.normalize(sums, dim=-1)}


def _score(classifier: ImageClassifier, clip: CLIP, dataset: ImageDataset) -> tuple[float, float]:
    """Accuracy and cross-entropy."""
    logits, truth = predict(classifier, pixel_batches(clip, dataset)), torch.tensor(dataset.targets)
    return float((logits.argmax(1) == truth).float().mean()), float(F.cross_entropy(logits, truth))


def _tune(clip: CLIP, dataset: ImageDataset, head: Tensor, **settings: Any) -> ImageClassifier:
    # 17 tokens an image: on a CPU the plain attention is quicker than the flash kernel's backward
    with sdpa_kernel(SDPBackend.MATH) if clip.device.type == "cpu" else nullcontext():
        return finetune(clip, dataset, head, FinetuneConfig(**settings))


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
        tuned = _tune(clip, fit, candidates[head], **settings, lr=lr, epochs=n)
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


def evaluation_sets(style: str, concepts: Sequence[int], device: str = "cpu") -> list[EvalSet]:
    """Classify-30's drawings of the concepts: in `style` for reference, in each other style as a shift."""
    clip, sets = load(EMOJICLIP, device=device), []
    for other in (style, *(s for s in STYLES if s != style)):
        images = classify30(other, concepts)
        batches = list(pixel_batches(clip, images))
        role = "reference" if other == style else "shifted"
        sets.append(EvalSet(other, role, lambda b=batches: b, torch.tensor(images.targets)))
    return sets


def measure(
    style: str, parts: Split, head_name: str, settings: dict[str, Any], tests: Sequence[EvalSet], *, seed: int = 0,
    alphas: Sequence[float] = ALPHAS, device: str = "cpu",
) -> list[dict[str, Any]]:  # fmt: skip
    """Tune EmojiCLIP on the training concepts in one style, with one seed: the rows of `robustness.curve`."""
    training = sorted(parts.fit + parts.validation)
    clip = load(EMOJICLIP, device=device)
    head = heads(clip, training)[head_name]
    zeroshot = {k: v.detach().clone() for k, v in zero_shot_classifier(clip, head).state_dict().items()}
    tuned = _tune(clip, classify30(style, training), head, **settings, seed=seed)
    return curve(zeroshot, tuned, tests, alphas)


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
            measured = measure(style, parts, head_name, tuning, tests, seed=seed, alphas=alphas, device=device)
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
    from clipsteer import report
    from clipsteer import robustness_page as page

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / "wise_ft_emoji"
    write_json(stem.with_suffix(".json"), found)
    report.write_csv(stem.with_suffix(".csv"), rows)
    written = [stem.with_suffix(".json"), stem.with_suffix(".csv")]
    curves = {style: mean_rows([row for row in rows if row["style"] == style]) for style in found["styles"]}
    return written + page.write_experiment(stem, found, curves)
