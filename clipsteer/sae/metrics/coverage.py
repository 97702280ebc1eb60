"""Coverage of labels: how well the best single feature detects each of them.

    coverage = mean over labels of F1(activation > t), for the feature and the threshold t that are
    best on the training images, scored on the others

Thresholds are 0, 0.1 … 0.9 of a feature's largest activation over the training images. Source:
Karvonen et al. 2024 (arXiv 2408.00113), who choose and score on the same data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clipsteer.sae.metrics.estimate import (
    BLOCKS,
    Estimate,
    blocks_of,
    held_out,
    interval,
    nothing,
    sizes_of,
)
from clipsteer.sae.metrics.probe import consecutive
from clipsteer.sae.metrics.recorder import PooledCodes

_STEPS = 10


def _chosen(
    codes: PooledCodes,
    labels: Tensor,  # (N,)
    classes: int,
) -> tuple[Tensor, Tensor]:
    """Of every class the feature with the best F1, and its threshold."""
    peak = codes.peaks()
    positives = torch.bincount(labels, minlength=classes).double()
    best = torch.full((classes,), -1.0, dtype=torch.float64)
    feature = torch.zeros(classes, dtype=torch.int64)
    threshold = torch.zeros(classes)
    cell = labels[codes.rows] * codes.d_sae + codes.features
    for step in range(_STEPS):
        level = peak * (step / _STEPS)
        above = codes.values > level[codes.features]
        hits = torch.bincount(cell[above], minlength=classes * codes.d_sae)
        hits = hits.reshape(classes, codes.d_sae).double()
        f1 = 2 * hits / (hits.sum(0) + positives[:, None])
        value, at = f1.max(1)
        better = value > best
        best = torch.where(better, value, best)
        feature = torch.where(better, at, feature)
        threshold = torch.where(better, level[at], threshold)
    return feature, threshold


def label_coverage(
    codes: PooledCodes,
    labels: Tensor,  # (N,) int64; -1: none
    *,
    seed: int = 0,
) -> Estimate:
    """Coverage of the labels that have a held-out image; details: F1 and feature by label."""
    known = labels >= 0
    codes, (labels, names) = codes.of_images(known), consecutive(labels[known])
    if not len(codes.values):
        return nothing("labels", "no feature is active")
    test = held_out(codes.images, labels, seed)
    train = codes.of_images(~test)
    scored = torch.bincount(labels[test], minlength=len(names)) > 0
    if not bool(scored.any()) or not len(train.values):
        return nothing("labels", "no label has an image to choose on and one to score")
    feature, threshold = _chosen(train, labels[~test], len(names))
    fires = codes.of_images(test).columns(feature.unique())
    place = torch.searchsorted(feature.unique(), feature)
    fires = fires[:, place] > threshold  # (test, classes)
    is_class = labels[test][:, None] == torch.arange(len(names))
    block = blocks_of(codes.images[test], seed)
    of_block = torch.zeros(BLOCKS, len(block), dtype=torch.float64)
    of_block[block, torch.arange(len(block))] = 1
    hits = of_block @ (fires & is_class).double()  # (blocks, classes)
    both = of_block @ (fires.double() + is_class.double())

    def mean_f1(without: int | None = None) -> tuple[float, Tensor]:
        h, b = hits.sum(0), both.sum(0)
        if without is not None:
            h, b = h - hits[without], b - both[without]
        f1 = torch.where(b > 0, 2 * h / b, 0)
        return float(f1[scored].mean()), f1

    value, f1 = mean_f1()
    low, high = interval(value, [mean_f1(b)[0] for b in range(BLOCKS)], sizes_of(block))
    details = {
        "labels": names[scored].tolist(),
        "f1": f1[scored].tolist(),
        "features": feature[scored].tolist(),
        "images": len(block),
    }
    return Estimate(value, low, high, int(scored.sum()), "labels", details)
