"""What probes find: in the k features that tell classes apart best, and in reconstructions.

k-sparse probing (Gurnee et al. 2023, arXiv 2305.01610): features are ranked by their F statistic
over the classes of the *training* images, a logistic probe is fitted on the k best, and scored on
images that had no part in either. An image's features are their largest activations over its
tokens. Value: area under accuracy over k, divided by the width of k.

Preservation: accuracy of a logistic probe on images' mean tokens when the reconstructions' means
take their place, over its accuracy on the activations' own.

Intervals are over the held-out images, for the probes as they were fitted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clipsteer.sae.metrics.estimate import (
    Estimate,
    blocks_of,
    held_out,
    nothing,
    of_sums,
    sizes_of,
    sums_by,
)
from clipsteer.sae.metrics.probe import Probe, consecutive, f_scores, ranked
from clipsteer.sae.metrics.recorder import PooledCodes

KS = (1, 5, 10, 20, 50, 100)


def areas(ks: Sequence[int]) -> Tensor:
    """(len(ks),) weights of the trapezoidal rule over k, of sum 1."""
    if len(ks) == 1:
        return torch.ones(1, dtype=torch.float64)
    k = torch.tensor(ks, dtype=torch.float64)
    weights = torch.zeros_like(k)
    weights[:-1] += k.diff() / 2
    weights[1:] += k.diff() / 2
    return weights / (k[-1] - k[0])


def sparse_probing(
    codes: PooledCodes,
    labels: Tensor,  # (N,) int64; -1: none
    *,
    seed: int = 0,
    ks: Sequence[int] = KS,
) -> Estimate:
    """k-sparse probing; details: accuracy by k, chance (the largest class's share).

    Of ks those that there are features for that vary over the training images; where there are
    fewer than the smallest, nothing is scored.
    """
    known = labels >= 0
    codes, (labels, _) = codes.of_images(known), consecutive(labels[known])
    if len(labels.unique()) < 2:
        return nothing("images", "fewer than two classes")
    test = held_out(codes.images, labels, seed)
    if not bool(test.any()):
        return nothing("images", "no class has two images")
    train = codes.of_images(~test)
    fitted = labels[~test]
    best = ranked(f_scores(train, fitted), max(ks))
    used = sorted({k for k in ks if k <= len(best)})
    if not used:
        return nothing("images", "no feature varies over the training images")
    x = codes.columns(best)
    hits = [Probe(x[~test, :k], fitted).predict(x[test, :k]) == labels[test] for k in used]
    right = torch.stack(hits, 1).double()  # (test, ks)
    each = right @ areas(used)
    block = blocks_of(codes.images[test], seed)
    sizes = sizes_of(block)
    above = sums_by(block, each, len(sizes))
    value, low, high = of_sums(above, torch.tensor(sizes), sizes)
    details = {
        "accuracy": {str(k): float(a) for k, a in zip(used, right.mean(0))},
        "chance": float(torch.bincount(labels[test]).max()) / int(test.sum()),
        "classes": len(labels.unique()),
        "features": best.tolist(),
    }
    return Estimate(value, low, high, int(test.sum()), "images", details)


def probe_preservation(
    given: Tensor,  # (N, d) mean tokens
    made: Tensor,  # (N, d) mean tokens of the reconstructions
    images: Tensor,  # (N,) int64
    labels: Tensor,  # (N,) int64; -1: none
    *,
    seed: int = 0,
) -> Estimate:
    """A probe's accuracy on reconstructions over that on activations; details: both, chance."""
    known = labels >= 0
    given, made, images = given[known], made[known], images[known]
    labels, names = consecutive(labels[known])
    if len(names) < 2:
        return nothing("images", "fewer than two classes")
    test = held_out(images, labels, seed)
    if not bool(test.any()):
        return nothing("images", "no class has two images")
    probe = Probe(given[~test], labels[~test])
    own = (probe.predict(given[test]) == labels[test]).double()
    kept = (probe.predict(made[test]) == labels[test]).double()
    block = blocks_of(images[test], seed)
    sizes = sizes_of(block)
    above, below = (sums_by(block, part, len(sizes)) for part in (kept, own))
    value, low, high = of_sums(above, below, sizes)
    details = {
        "activations": float(own.mean()),
        "reconstructions": float(kept.mean()),
        "chance": float(torch.bincount(labels[test]).max()) / int(test.sum()),
        "classes": len(names),
    }
    return Estimate(value, low, high, int(test.sum()), "images", details)
