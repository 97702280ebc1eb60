"""What a selection of the k largest owes, and what it may promise, of one case's outputs."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from clipsteer.testing.proof.trial import Finding
from clipsteer.testing.torture.given import Given
from clipsteer.testing.torture.ledger import RIGHT, wrong

__all__ = ["PROMISES", "contract"]

# given, values, indices, relu -> a finding, or None where the case says nothing
Promise = Callable[[Given, Tensor, Tensor, bool], Finding | None]


def _nan_rows(given: Given) -> Tensor:
    return given.pre.isnan().any(-1)


def _selected_from(given: Given, relu: bool) -> Tensor:
    """What values are taken of, (B, n)."""
    return given.pre.relu() if relu else given.pre


def _first(where: Tensor) -> tuple[int, ...]:
    """Of the true elements the first."""
    return tuple(int(i) for i in where.nonzero()[0])


def contract(
    given: Given,
    values: Tensor,  # (B, k)
    indices: Tensor,  # (B, k)
    relu: bool,
) -> Finding:
    """The worst value as a share of what it may be off by; infinite where a rule is broken."""
    B, n = given.pre.shape
    k = given.k
    if values.shape != (B, k) or indices.shape != (B, k):
        shapes = f"{tuple(values.shape)} and {tuple(indices.shape)}"
        return wrong(f"values and indices of shape {shapes}, not {(B, k)}")
    if values.dtype != given.dtype or indices.is_floating_point():
        return wrong(f"values in {values.dtype}, indices in {indices.dtype}")
    if B == 0:
        return RIGHT
    at = indices.long()
    outside = (at < 0) | (at >= n)
    if bool(outside.any()):
        row, place = _first(outside)
        return wrong(f"row {row}: index {int(at[row, place])} of {n} columns")
    ordered = at.sort(-1).values
    twice = ordered[:, 1:] == ordered[:, :-1]
    if bool(twice.any()):
        row, place = _first(twice)
        return wrong(f"row {row}: index {int(ordered[row, place])} twice")
    nan = _nan_rows(given)
    post = _selected_from(given, relu)
    taken = post.gather(-1, at)
    got = values.double()
    same = (got == taken) | (got.isnan() & nan[:, None])
    shares = (got - taken).abs() / given.allowed.gather(-1, at)
    shares = torch.where(same, 0.0, shares.nan_to_num(nan=math.inf, posinf=math.inf))
    row, place = (int(i) for i in torch.unravel_index(shares.argmax(), shares.shape))
    worst = float(shares[row, place])
    if worst > 1:
        has = f"where column {int(at[row, place])} has {float(taken[row, place]):.9g}"
        return Finding(worst, f"row {row}: value {float(got[row, place]):.9g} {has}")
    left = (post - given.allowed).scatter(-1, at, -math.inf)
    lowest, last = (post + given.allowed).gather(-1, at).min(-1)
    most, best = left.max(-1)
    missed = (most > lowest) & ~nan
    if bool(missed.any()):
        (row,) = _first(missed)
        out = f"column {int(best[row])} ({float(most[row]):.9g}) was left out"
        for_ = f"column {int(at[row, last[row]])} ({float(lowest[row]):.9g}) taken"
        return wrong(f"row {row}: {out}, {for_}")
    return Finding(worst, "")


def _descends(given: Given, values: Tensor, indices: Tensor, relu: bool) -> Finding | None:
    rows = values[~_nan_rows(given)]
    if rows.numel() == 0:
        return None
    rises = rows[:, :-1] < rows[:, 1:]
    return wrong(f"row {_first(rises)[0]} rises") if bool(rises.any()) else RIGHT


def _lower_index(given: Given, values: Tensor, indices: Tensor, relu: bool) -> Finding | None:
    """The set is the one with the lowest indices; where a row descends, equals stand by index. With
    a relu that goes for what is active."""
    if bool(given.allowed.any()) or given.pre.numel() == 0:
        return None
    usual = ~_nan_rows(given)
    pre = given.pre[usual] + 0.0
    if pre.numel() == 0:
        return None
    got = indices[usual].long()
    order = torch.sort(pre, dim=-1, descending=True, stable=True).indices[:, : given.k]
    active = (pre > 0) | (not relu)
    wanted = torch.zeros_like(active).scatter(-1, order, True) & active
    chosen = torch.zeros_like(active).scatter(-1, got, True) & active
    if bool((wanted != chosen).any()):
        row, _ = _first((wanted != chosen).any(-1, keepdim=True))
        lost = int((wanted & ~chosen)[row].nonzero()[0])
        return wrong(f"a row without column {lost}, which comes before its equals")
    descends = (values[usual].diff(dim=-1) <= 0).all(-1, keepdim=True)
    swapped = (got != order) & active.gather(-1, order) & descends
    # infinities have no difference
    swapped &= values[usual].isfinite().all(-1, keepdim=True)
    return wrong("equals are not in the order of their indices") if bool(swapped.any()) else RIGHT


def _nan_as(place: str) -> Promise:
    """NaN as the largest of all ("first"), as the smallest ("last"), or one in a row as all its
    values ("row")."""

    def kept(given: Given, values: Tensor, indices: Tensor, relu: bool) -> Finding | None:
        nan = _nan_rows(given)
        if not bool(nan.any()):
            return None
        pre = _selected_from(given, relu)[nan]
        got = values[nan].double()
        isnan = pre.isnan()
        if place == "row":
            return RIGHT if bool(got.isnan().all()) else wrong("a row with a NaN has other values")
        count = isnan.sum(-1)
        room = given.k - count if place == "first" else (~isnan).sum(-1)
        for row in range(len(pre)):
            others = pre[row][~isnan[row]].sort(descending=True).values
            expected = others[: max(min(given.k, int(room[row])), 0)]
            slack = float(given.allowed.max())
            found = got[row][~got[row].isnan()].sort(descending=True).values
            if len(found) != len(expected) or bool(((found - expected).abs() > slack).any()):
                return wrong(f"{given.k - len(found)} NaN come out of {int(count[row])} in a row")
        return RIGHT

    return kept


def _long(given: Given, values: Tensor, indices: Tensor, relu: bool) -> Finding | None:
    return RIGHT if indices.dtype == torch.int64 else wrong(f"indices are {indices.dtype}")


# what may be promised; None: seen in runs of its own
PROMISES: dict[str, Promise | None] = {
    "values descend": _descends,
    "ties to the lower index": _lower_index,
    "NaN is the largest": _nan_as("first"),
    "NaN is the smallest": _nan_as("last"),
    "a NaN makes its row NaN": _nan_as("row"),
    "indices in int64": _long,
    "repeats bit for bit": None,
    "a row alone gives the same": None,
    "shapes beyond 2^31 elements on meta": None,
}
