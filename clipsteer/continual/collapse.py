"""What a network says of its own training images when it has collapsed: one class of nearly all of
them, or features in which classes are not told apart."""

from __future__ import annotations

import math

from torch import Tensor

from clipsteer.continual.covariance import class_means, places

# of the images of other classes, the share that one class takes
_NEARLY_ALL = 0.9
# of fewer images nothing is said
_LEAST = 10
# features that differ by less of their size are one point, to the digits that float32 keeps
_ONE_POINT = 1e-3
# training raises the separation of the classes that it trains on; below this share it took it away
_KEPT = 0.5


def taken_by_one(
    predicted: Tensor,  # (N,)
    labels: Tensor,  # (N,)
) -> tuple[int, float] | None:
    """The class that takes nearly all images that are not of it, and their share; None where none
    does."""
    for c in predicted.unique().tolist():
        others = labels != c
        share = float((predicted[others] == c).double().mean())
        if int(others.sum()) >= _LEAST and share >= _NEARLY_ALL:
            return c, share
    return None


def separation(
    features: Tensor,  # (N, d)
    labels: Tensor,  # (N,)
) -> float:
    """The F ratio of the classes, of mean squares between their means and within them: 1 for labels
    dealt at random, whatever the features. NaN of one class, or where no class has two images."""
    classes = labels.unique().tolist()
    free = len(labels) - len(classes)
    if len(classes) < 2 or free < 1:
        return math.nan
    centred = features.double() - features.double().mean(0)
    means = class_means(centred, labels.tolist(), classes)  # (C, d)
    rows = places(labels.tolist(), classes, features.device)
    inside = float((centred - means[rows]).square().sum())
    between = float(means[rows].square().sum())
    if not inside:
        return math.inf if between else math.nan
    return between / (len(classes) - 1) / (inside / free)


def coincide(
    features: Tensor,  # (N, d)
    labels: Tensor,  # (N,)
    before: float = math.nan,
) -> str | None:
    """How the features of different classes coincide, in words; None where they do not, and of one
    class or few images.

    They are one point; or are no nearer to each other within a class than across classes; or were
    told apart twice as well by the network before, whose `separation` of them ``before`` is.
    """
    if len(labels) < _LEAST or len(labels.unique()) < 2:
        return None
    rows = features.double()
    size = float(rows.norm())
    spread = float((rows - rows.mean(0)).norm()) / size if size else 0.0
    if spread < _ONE_POINT:
        return f"features of all of them differ by {spread:.1g} of their size"
    found = separation(features, labels)
    if found <= 1:
        return (
            "features of a class are as far from each other as from those of other classes "
            f"(F = {found:.2g})"
        )
    if found < _KEPT * before:
        return (
            "features of different classes lie closer together than before they were learned "
            f"(F = {found:.3g} after {before:.3g})"
        )
    return None
