"""How features relate: to each other by direction and by where they are active, and to classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.browse.codes import Active
from clipsteer.browse.files import listed, number
from clipsteer.browse.survey import Survey
from clipsteer.sae.model import SAE

NEAREST = 8
CLASSES = 5
# pairs of features active on one token that are counted
_PAIRS = 200_000_000


def directions(sae: SAE) -> Tensor:  # (d_sae, d), unit rows
    """Decoder rows of unit length, on the CPU."""
    return F.normalize(sae.W_dec.detach().float().cpu(), dim=1)


def similar(
    unit: Tensor,  # (d_sae, d)
    features: range,
) -> list[list[list[Any]]]:
    """[feature, cosine] of the nearest other decoder rows of each feature, the nearest first."""
    rows = torch.arange(features.start, features.stop)
    cosines = unit[rows] @ unit.T  # (m, d_sae)
    cosines[torch.arange(len(rows)), rows] = -torch.inf
    found = cosines.topk(min(NEAREST, len(unit) - 1), dim=1)
    return [
        [list(pair) for pair in zip(indices.tolist(), listed(values.numpy()))]
        for values, indices in zip(found.values, found.indices)
    ]


class Coactivity:
    """Which features are active on the same tokens, as the correlation φ of being active.

    Where tokens have so many active features that their pairs cannot all be counted, every so
    many-th image is looked at alone.
    """

    def __init__(self, survey: Survey) -> None:
        pairs = sum(float(found["counts"].double().square().sum()) for found in survey.each())
        step = int(-(-pairs // _PAIRS)) or 1
        counts = []
        features = []
        for shard in range(survey.shards):
            found = survey.seen(shard)
            per_token = found["counts"].numpy()
            image = np.repeat(np.array(survey.span(shard)), survey.facts.tokens)
            kept = image % step == 0
            counts.append(per_token[kept])
            features.append(found["features"].numpy()[np.repeat(kept, per_token)])
        self._features = np.concatenate(features).astype(np.int64)
        lengths = np.concatenate(counts).astype(np.int64)
        self._ends = lengths.cumsum()
        self._lengths = lengths
        self.tokens = len(lengths)
        self._d_sae = survey.sae.d_sae
        self._order = np.argsort(self._features, kind="stable")
        self._active = np.bincount(self._features, minlength=self._d_sae)
        self._row = np.repeat(np.arange(self.tokens), lengths)

    def of(self, features: range) -> list[list[list[Any]]]:
        """[feature, φ, share of its tokens] of those most often active together with each."""
        begin = int(self._active[: features.start].sum())
        stop = begin + int(self._active[features.start : features.stop].sum())
        mine = self._order[begin:stop]
        row = self._row[mine]
        lengths = self._lengths[row]
        each = np.repeat(np.arange(len(row)), lengths)
        within = np.arange(len(each)) - np.repeat(lengths.cumsum() - lengths, lengths)
        other = self._features[(self._ends - self._lengths)[row][each] + within]
        key = (self._features[mine] - features.start)[each] * self._d_sae + other
        both = np.bincount(key, minlength=len(features) * self._d_sae)
        both = both.reshape(len(features), self._d_sae)
        return [self._nearest(feature, both[i]) for i, feature in enumerate(features)]

    def _nearest(
        self,
        feature: int,
        both: np.ndarray,  # (d_sae,)
    ) -> list[list[Any]]:
        others = np.flatnonzero(both)
        others = others[others != feature]
        own = float(self._active[feature])
        theirs = self._active[others].astype(np.float64)
        n = float(self.tokens)
        spread = np.sqrt(own * (n - own) * theirs * (n - theirs))
        # a feature that is always active tells nothing about another
        phi = (n * both[others] - own * theirs) / np.where(spread > 0, spread, np.inf)
        order = np.argsort(-phi, kind="stable")[:NEAREST]
        order = order[phi[order] > 0]
        shares = listed(both[others[order]] / max(own, 1.0))
        return [list(row) for row in zip(others[order].tolist(), listed(phi[order]), shares)]


class Classes:
    """How features go with classes.

    Args:
        labels: (N,) class of each image, -1 where there is none.
        count: of classes.
    """

    def __init__(self, labels: np.ndarray, count: int) -> None:
        self.labels = labels
        self.count = count
        self.sizes = np.bincount(labels[labels >= 0], minlength=count)

    def of(self, active: Active) -> tuple[list[list[Any]], float | None]:
        """[class, share of its pictures that have the feature, mean of their largest activations]
        of the classes with the highest means, and the selectivity: (μ_max - μ_rest) / (μ_max +
        μ_rest), μ_rest the mean over the other classes (Morcos et al. 2018, arXiv 1803.06959); None
        of a dead feature."""
        labels = self.labels[active.images]
        known = labels >= 0
        there = self.sizes > 0
        total = np.bincount(labels[known], active.peaks[known], self.count)
        if there.sum() < 2 or not total.any():
            return [], None
        sizes = np.maximum(self.sizes, 1)
        means = total / sizes
        order = np.argsort(-means, kind="stable")[:CLASSES]
        order = order[means[order] > 0]
        shares = np.bincount(labels[known], minlength=self.count) / sizes
        top = float(means[order[0]])
        rest = (float(means.sum()) - top) / (int(there.sum()) - 1)
        rows = zip(order.tolist(), listed(shares[order]), listed(means[order]))
        return [list(row) for row in rows], number((top - rest) / (top + rest))
