"""Accuracy along theta(alpha) on a reference set and on shifted ones, and effective robustness.

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

Row = dict[str, Any]
Rows = Sequence[Mapping[str, Any]]

ALPHAS = tuple(i / 20 for i in range(21))
DEFAULT_ALPHA = 0.5


class Baseline(NamedTuple):
    """The trend of models without robustness.

    Their shifted accuracy is beta(a) = sigmoid(slope * logit(a) + intercept).
    """

    slope: float
    intercept: float
    models: int

    def __call__(self, reference: float, n: int | None = None) -> float:
        """What a model with this accuracy, on n reference images, is expected to reach on the
        shifted sets."""
        return sigmoid(self.slope * logit(reference, n) + self.intercept)


def fit_baseline(points: Iterable[tuple[float, int, float, int]]) -> Baseline:
    """Least squares over models trained on the reference alone.

    Args:
        points: (reference accuracy, its n, shifted accuracy, its n) of each.

    Raises ValueError for fewer than two different reference accuracies.
    """
    pairs = [(logit(a, n), logit(b, m)) for a, n, b, m in points]
    if len({x for x, _ in pairs}) < 2:
        raise ValueError(
            f"fit_baseline: needs two models of different reference accuracy, got {len(pairs)} "
            f"point(s)"
        )
    mean_x, mean_y = (sum(values) / len(pairs) for values in zip(*pairs))
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in pairs)
    variance = sum((x - mean_x) ** 2 for x, _ in pairs)
    slope = covariance / variance
    return Baseline(slope, mean_y - slope * mean_x, len(pairs))


@dataclass(frozen=True)
class EvalSet:
    """Images to measure on.

    Attributes:
        name: what its rows are called.
        role: whether it is like the training images.
        batches: a call gives the preprocessed images in order, batch by batch, (B, 3, H, W).
        targets: (N,) rows of the classifier's head. Where only some classes occur, the prediction
            is made among these, as for ImageNet-R and -A.
    """

    name: str
    role: Literal["reference", "shifted"]
    batches: Callable[[], Iterable[Tensor]]
    targets: Tensor  # (N,)

    def score(
        self,
        logits: Tensor,  # (N, C)
    ) -> tuple[int, float]:
        """Correct predictions, and the mean over classes of the share that is right."""
        present, truth = self.targets.unique(return_inverse=True)
        right = logits[:, present].argmax(1) == truth
        recall = torch.stack([right[truth == c].double().mean() for c in range(len(present))])
        return int(right.sum()), float(recall.mean())


def _row(method: str, alpha: float, images: EvalSet, logits: Tensor) -> Row:
    """What is measured on a set, of logits (N, C)."""
    n = len(images.targets)
    correct, balanced = images.score(logits)
    low, high = clopper_pearson(correct, n)
    return {
        "method": method,
        "alpha": alpha,
        "set": images.name,
        "role": images.role,
        "correct": correct,
        "n": n,
        "accuracy": correct / n,
        "low": low,
        "high": high,
        "balanced": balanced,
    }


def curve(
    zeroshot: Mapping[str, Tensor],
    classifier: ImageClassifier,
    sets: Sequence[EvalSet],
    alphas: Sequence[float] = ALPHAS,
) -> list[Row]:
    """Accuracy along theta(alpha), in weight space and in output space.

    Args:
        zeroshot: weights of the classifier before fine-tuning; `classifier` holds the fine-tuned
            ones, which are back in it at the end.
        alphas: 0 and 1 are always measured.

    Returns:
        a row for each method ("weight", or "output": logits (1-alpha) f_zs + alpha f_ft), alpha and
        set: correct of n, accuracy with its 95 % interval (low, high), balanced accuracy.

    Raises ValueError: two sets of one name, or not both a reference and a shifted one.
    """
    names = {images.name for images in sets}
    roles = {images.role for images in sets}
    if len(names) != len(sets) or roles != {"reference", "shifted"}:
        raise ValueError("curve: needs reference and shifted sets, of different names")
    alphas = sorted({0.0, 1.0, *alphas})
    device = classifier.head.weight.device
    finetuned = {name: tensor.detach().clone() for name, tensor in classifier.state_dict().items()}
    ends: dict[float, list[Tensor]] = {}
    rows = []
    # the ends first: the output-space rows need their logits
    ends_first = sorted(alphas, key=lambda alpha: alpha not in (0, 1))
    try:
        for alpha in tqdm(ends_first, desc="curve", unit="alpha", disable=None):
            classifier.load_state_dict(wise_ft(zeroshot, finetuned, alpha))
            found = []
            for images in sets:
                batches = (x.to(device) for x in images.batches())
                found.append(predict(classifier, batches))
                rows.append(_row("weight", alpha, images, found[-1]))
            if alpha in (0, 1):
                ends[alpha] = found
    finally:
        classifier.load_state_dict(finetuned)
    for alpha in alphas:
        for images, first, last in zip(sets, ends[0.0], ends[1.0]):
            mixed = (1 - alpha) * first + alpha * last
            rows.append(_row("output", alpha, images, mixed))
    return sorted(rows, key=lambda row: (row["method"] != "weight", row["alpha"]))


def averages(rows: Rows, measure: str = "accuracy") -> list[Row]:
    """Mean of ``measure`` over the sets of a role: a row for each method and alpha, with the
    reference's and the shifted sets' n."""
    groups: dict[tuple[str, float], dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        roles = groups.setdefault((row["method"], row["alpha"]), {})
        roles.setdefault(row["role"], []).append(row)
    found = []
    for (method, alpha), roles in groups.items():
        line = {"method": method, "alpha": alpha}
        for role, members in roles.items():
            line[role] = sum(row[measure] for row in members) / len(members)
        for role, members in roles.items():
            line[f"{role}_n"] = sum(row["n"] for row in members)
        found.append(line)
    return found


def summary(
    rows: Rows, baseline: Baseline | None = None, measure: str = "accuracy"
) -> dict[str, Row]:
    """Mean accuracies, and with a baseline effective robustness, by method and by alpha's name:
    "zeroshot", "finetuned", "default" (0.5) and "oracle".

    `oracle` is the alpha that is best on the average of the shifted sets. It is chosen on what it
    is measured on, so it bounds what a choice of alpha could reach, and is no result.
    """
    found: dict[str, Row] = {}
    means = averages(rows, measure)
    for method in ("weight", "output"):
        line = {row["alpha"]: row for row in means if row["method"] == method}
        for row in line.values():
            if baseline is not None:
                expected = baseline(row["reference"], row["reference_n"])
                row["effective_robustness"] = row["shifted"] - expected
        best = max(line, key=lambda alpha: (line[alpha]["shifted"], -abs(alpha - DEFAULT_ALPHA)))
        chosen = {"zeroshot": 0.0, "finetuned": 1.0, "oracle": best}
        if DEFAULT_ALPHA in line:
            chosen["default"] = DEFAULT_ALPHA
        found[method] = {name: line[alpha] for name, alpha in chosen.items()}
    return found
