"""Accuracy on a reference set and on shifted sets along theta(alpha), with intervals and effective
robustness.

Sources: Wortsman et al. 2022 (arXiv 2109.01903); effective robustness: Taori et al. 2020 (arXiv
2007.00644); intervals: Clopper & Pearson 1934.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from clipsteer.clip.classifier import ImageClassifier, predict
from clipsteer.ensembles.merging import wise_ft
from clipsteer.report.axes import logit, sigmoid
from clipsteer.report.intervals import clopper_pearson

ALPHAS = tuple(i / 20 for i in range(21))
DEFAULT_ALPHA = 0.5


class Baseline(NamedTuple):
    """The trend of models without robustness: shifted accuracy beta(a) = sigmoid(slope * logit(a) +
    intercept)."""

    slope: float
    intercept: float
    models: int

    def __call__(self, reference: float, n: int | None = None) -> float:
        """What a model with this accuracy, on n reference images, is expected to reach on the
        shifted sets."""
        return sigmoid(self.slope * logit(reference, n) + self.intercept)


def fit_baseline(points: Iterable[tuple[float, int, float, int]]) -> Baseline:
    """Least squares over (reference accuracy, its n, shifted accuracy, its n) of models trained on
    the reference alone.

    Raises ValueError for fewer than two different reference accuracies.
    """
    pairs = [(logit(a, n), logit(b, m)) for a, n, b, m in points]
    if len({x for x, _ in pairs}) < 2:
        raise ValueError(
            f"fit_baseline: needs two models of different reference accuracy, got {len(pairs)} "
            f"point(s)"
        )
    mx, my = (sum(values) / len(pairs) for values in zip(*pairs))
    slope = sum((x - mx) * (y - my) for x, y in pairs) / sum((x - mx) ** 2 for x, _ in pairs)
    return Baseline(slope, my - slope * mx, len(pairs))


@dataclass(frozen=True)
class EvalSet:
    """Images to measure on.

    Attributes:
        batches: a call gives the preprocessed images in order, batch by batch, (B, 3, H, W).
        targets: (N,) rows of the classifier's head. Where only some classes occur, the prediction
            is made among these, as for ImageNet-R and -A.
    """

    name: str
    role: Literal["reference", "shifted"]
    batches: Callable[[], Iterable[Tensor]]
    targets: Tensor

    def score(self, logits: Tensor) -> tuple[int, float]:
        """Correct predictions, and the mean over classes of the share of their images that is
        right."""
        present, truth = self.targets.unique(return_inverse=True)
        right = logits[:, present].argmax(1) == truth
        recall = [right[truth == c].double().mean() for c in range(len(present))]
        return int(right.sum()), float(torch.stack(recall).mean())


def curve(
    zeroshot: Mapping[str, Tensor],
    classifier: ImageClassifier,
    sets: Sequence[EvalSet],
    alphas: Sequence[float] = ALPHAS,
) -> list[dict[str, Any]]:
    """Accuracy along theta(alpha), in weight space and in output space.

    Args:
        zeroshot: weights of the classifier before fine-tuning; `classifier` holds the fine-tuned
            ones, which are back in it at the end.
        alphas: 0 and 1 are always measured.

    Returns a row for each method ("weight", or "output": logits (1-alpha) f_zs + alpha f_ft), alpha
    and set: correct of n, accuracy with its 95 % interval (low, high), balanced accuracy.
    """
    if len({s.name for s in sets}) != len(sets) or {s.role for s in sets} != {
        "reference",
        "shifted",
    }:
        raise ValueError("curve: needs reference and shifted sets, of different names")
    alphas = sorted({0.0, 1.0, *alphas})
    device = classifier.head.weight.device
    finetuned = {name: tensor.detach().clone() for name, tensor in classifier.state_dict().items()}
    ends: dict[float, list[Tensor]] = {}
    rows = []

    def measure(method: str, alpha: float, logits: Sequence[Tensor]) -> None:
        for s, scores in zip(sets, logits):
            n = len(s.targets)
            correct, balanced = s.score(scores)
            low, high = clopper_pearson(correct, n)
            rows.append(
                {
                    "method": method,
                    "alpha": alpha,
                    "set": s.name,
                    "role": s.role,
                    "correct": correct,
                    "n": n,
                    "accuracy": correct / n,
                    "low": low,
                    "high": high,
                    "balanced": balanced,
                }
            )

    try:
        # the ends first: the output-space rows need their logits
        for alpha in tqdm(
            sorted(alphas, key=lambda a: a not in (0, 1)), desc="curve", unit="alpha", disable=None
        ):
            classifier.load_state_dict(wise_ft(zeroshot, finetuned, alpha))
            logits = [predict(classifier, (x.to(device) for x in s.batches())) for s in sets]
            measure("weight", alpha, logits)
            if alpha in (0, 1):
                ends[alpha] = logits
    finally:
        classifier.load_state_dict(finetuned)
    for alpha in alphas:
        measure(
            "output", alpha, [(1 - alpha) * a + alpha * b for a, b in zip(ends[0.0], ends[1.0])]
        )
    return sorted(rows, key=lambda row: (row["method"] != "weight", row["alpha"]))


def averages(rows: Sequence[Mapping[str, Any]], measure: str = "accuracy") -> list[dict[str, Any]]:
    """Mean over the sets of a role: a row for each method and alpha, with the reference's and the
    shifted sets' n."""
    groups: dict[tuple[str, float], dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["alpha"]), {}).setdefault(row["role"], []).append(row)
    return [
        {"method": method, "alpha": alpha}
        | {role: sum(r[measure] for r in members) / len(members) for role, members in roles.items()}
        | {f"{role}_n": sum(r["n"] for r in members) for role, members in roles.items()}
        for (method, alpha), roles in groups.items()
    ]


def summary(
    rows: Sequence[Mapping[str, Any]], baseline: Baseline | None = None, measure: str = "accuracy"
) -> dict[str, dict[str, Any]]:
    """Both ends, alpha = 0.5 and the best alpha, by method: mean accuracies and effective
    robustness.

    `oracle` is the alpha that is best on the average of the shifted sets. It is chosen on what it
    is measured on, so it bounds what a choice of alpha could reach, and is no result.
    """
    found: dict[str, dict[str, Any]] = {}
    for method in ("weight", "output"):
        line = {
            row["alpha"]: dict(row) for row in averages(rows, measure) if row["method"] == method
        }
        for row in line.values():
            if baseline is not None:
                row["effective_robustness"] = row["shifted"] - baseline(
                    row["reference"], row["reference_n"]
                )
        best = max(line, key=lambda a: (line[a]["shifted"], -abs(a - DEFAULT_ALPHA)))
        chosen = {"zeroshot": 0.0, "finetuned": 1.0, "oracle": best}
        if DEFAULT_ALPHA in line:
            chosen["default"] = DEFAULT_ALPHA
        found[method] = {name: line[alpha] for name, alpha in chosen.items()}
    return found
