"""Absorption: classes that have no features of their own among their siblings.

Of every class in a group of siblings:
    gap      F1 of a probe for the class against its siblings on the 4 best features, less that on
             the best alone: above 0.1 no single feature stands for the class
    overlap  Jaccard index of the 10 features that are most active on the class and those on the
             group: above one half the class is represented as its siblings are
How active a feature is, is its mean over its largest value, whatever its scale; features that are
never active are among nobody's most active ones, and a class of which nothing is active is not
scored. Value: the share of classes where either holds. Features are ranked and probes fitted on
training images, F1 is scored on the others; the group's features are taken from images that the
class's are not. The two signals are ViSAEBench's (its metric M7), after SAEBench (Karvonen et al.
2025, arXiv 2503.09532). The interval is over the held-out images, for features and probes as they
were fitted; the share steps where F1 crosses 0.1, so it is a rough one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from clipsteer.sae.metrics.estimate import (
    BLOCKS,
    Estimate,
    blocks_of,
    held_out,
    interval,
    sizes_of,
    sums_by,
)
from clipsteer.sae.metrics.probe import Probe, f_scores, ranked
from clipsteer.sae.metrics.recorder import PooledCodes

_MOST_ACTIVE = 10
_NARROW = 1
_WIDE = 4
_GAP = 0.1
_OVERLAP = 0.5
# images of a class and of its siblings, to fit on and to score
_LEAST = 2


class _Pair(NamedTuple):
    """One class among its siblings."""

    group: str
    label: int
    overlap: float
    # counts by block of held-out images, (blocks, 3): hits, predicted, of the class
    narrow: Tensor
    wide: Tensor


def _most_active(codes: PooledCodes, peak: Tensor) -> set[int]:
    sums = sums_by(codes.features, codes.values, codes.d_sae)
    share = torch.where(peak > 0, sums / peak, 0)
    order = share.argsort(descending=True, stable=True)[:_MOST_ACTIVE]
    return set(order[share[order] > 0].tolist())


def _counts(predicted: Tensor, is_class: Tensor, block: Tensor) -> Tensor:
    parts = [predicted & is_class, predicted, is_class]
    return torch.stack([torch.bincount(block[p], minlength=BLOCKS) for p in parts], 1).double()


def _f1(counts: Tensor) -> float:
    hits, predicted, of_class = counts.tolist()
    return 2 * hits / (predicted + of_class) if predicted + of_class else 0.0


def _pair(
    codes: PooledCodes,
    labels: Tensor,
    test: Tensor,
    group: str,
    label: int,
    seed: int,
) -> _Pair | None:
    """One class against the others of ``codes``; None where there is nothing to score."""
    is_class = labels == label
    for part in (test, ~test):
        if int((is_class & part).sum()) < _LEAST or int((~is_class & part).sum()) < _LEAST:
            return None
    train = codes.of_images(~test)
    peak = train.peaks()
    own = _most_active(codes.of_images(is_class & ~test), peak)
    shared = _most_active(codes.of_images(test), peak)
    best = ranked(f_scores(train, is_class[~test].long()), _WIDE)
    if not own or not shared or not len(best):
        return None
    x = codes.columns(best)
    block = blocks_of(codes.images[test], seed)
    found = []
    for k in (_NARROW, _WIDE):
        probe = Probe(x[~test, :k], is_class[~test].long())
        found.append(_counts(probe.predict(x[test, :k]) == 1, is_class[test], block))
    return _Pair(group, label, len(own & shared) / len(own | shared), *found)


def absorption_rate(
    codes: PooledCodes,
    labels: Tensor,  # (N,) int64; -1: none
    groups: Mapping[str, Sequence[int]] | None = None,
    *,
    seed: int = 0,
) -> Estimate:
    """The share of absorbed classes; details: of every class its overlap and both F1.

    groups: labels of siblings by name; None: all labels are siblings.
    """
    known = labels >= 0
    codes, labels = codes.of_images(known), labels[known]
    if groups is None:
        groups = {"all": labels.unique().tolist()}
    pairs: list[_Pair] = []
    scored = torch.zeros(len(labels), dtype=torch.bool)
    test = held_out(codes.images, labels, seed, share=0.5)
    for name, members in groups.items():
        inside = torch.isin(labels, torch.tensor(list(members), dtype=torch.int64))
        siblings = codes.of_images(inside)
        for label in members:
            pair = _pair(siblings, labels[inside], test[inside], name, label, seed)
            if pair is not None:
                pairs.append(pair)
                scored |= inside & test

    def share(without: int | None = None) -> float:
        absorbed = 0
        for pair in pairs:
            f1 = []
            for counts in (pair.narrow, pair.wide):
                rest = counts.sum(0) if without is None else counts.sum(0) - counts[without]
                f1.append(_f1(rest))
            absorbed += f1[1] - f1[0] > _GAP or pair.overlap > _OVERLAP
        return absorbed / len(pairs) if pairs else math.nan

    value = share()
    sizes = sizes_of(blocks_of(codes.images[scored], seed))
    low, high = interval(value, [share(b) for b in range(BLOCKS)], sizes)
    rows = []
    for pair in pairs:
        row = {"group": pair.group, "label": pair.label, "overlap": pair.overlap}
        row["f1_narrow"] = _f1(pair.narrow.sum(0))
        row["f1_wide"] = _f1(pair.wide.sum(0))
        rows.append(row)
    return Estimate(value, low, high, len(pairs), "classes", {"classes": rows})
