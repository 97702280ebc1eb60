"""What the losses of image and text pairs share: their arguments, and gradients of either side."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.ops import _check
from clipsteer.ops._calls import holds, step
from clipsteer.ops._steps import cast_to, full
from clipsteer.ops._sweeps import Pairs, low_level


def own_entropy(
    t: Tensor,  # (2, B, B), logits less a side's own pair's
    own: Tensor,  # (B, B) bool
) -> Tensor:
    """log(1 + Σ exp t) over the other pairs, (2, B): small losses keep their digits."""
    lse = t.masked_fill(own, -torch.inf).logsumexp(2)
    return torch.logaddexp(lse, torch.zeros_like(lse))


def log_one_and(
    lse: Tensor,  # (2, M)
) -> Tensor:  # (2, M)
    """log(1 + exp lse), which from 40 on is lse to the last digit of a float64."""
    return F.softplus(lse, threshold=40.0)


def checked_features(op: str, named: dict[str, Any], rows: int | None = None) -> dict[str, Tensor]:
    """Features of the same B pairs, by twos of one shape (B, d) each, as autocast wants them.
    ``rows``: of all processes, one of which may have none."""
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(_check.mistake(op, name, "a tensor", type(value).__name__, named))
    named = dict(zip(named, _check.autocast(*named.values())))
    _check.check_tensors(op, named)
    names = list(named)
    for image, text in zip(names[::2], names[1::2]):
        shape = tuple(named[image].shape)
        if len(shape) != 2 or shape[1] == 0 or (shape[0] if rows is None else rows) == 0:
            expected = "of shape (B, d), neither of them 0"
            raise ValueError(_check.mistake(op, image, expected, shape, named))
        B = named[names[0]].shape[0]
        if shape[0] != B:
            raise ValueError(_check.mistake(op, image, f"of shape (B = {B}, d)", shape, named))
        _check.check_shape(op, named, text, shape, f"{image}'s (B, d)")
    return named


def checked_number(op: str, name: str, value: Any, named: dict[str, Any]) -> Tensor:
    """A number, or a tensor with one element, as () of at least float32."""
    first = next(iter(named.values()))
    wide = torch.promote_types(first.dtype, torch.float32)
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(_check.mistake(op, name, "floating point", value.dtype, named))
        if value.numel() != 1 or value.device != first.device:
            expected = f"one number on {first.device}"
            got = f"{tuple(value.shape)} on {value.device}"
            raise ValueError(_check.mistake(op, name, expected, got, named))
        # a view, and its node in the graph, only where there is one number in more dimensions
        return cast_to(value if value.dim() == 0 else step(torch.reshape, value, ()), wide)
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
        got = type(value).__name__
        raise TypeError(_check.mistake(op, name, "a number or a tensor", got, named))
    return full(value, wide, first.device)


def checked_scale(op: str, name: str, value: Any, named: dict[str, Any]) -> Tensor:
    """``checked_number`` that is positive; a tensor's value is looked at where that costs no
    synchronisation."""
    number = checked_number(op, name, value, named)
    if isinstance(value, Tensor):
        looked_at = value.device.type == "cpu" and _check.has_values(value)
        wrong = looked_at and not holds(_check.is_positive, value)
    else:
        wrong = not 0 < value < math.inf
    if wrong:
        raise ValueError(_check.mistake(op, name, "positive and finite", value, named))
    return number


def _own_moment(
    pairs: Pairs,
    u: Tensor,  # (2, M)
) -> Tensor:
    """Σ w·t () of this process's rows, and of its columns over the rows of all."""
    nothing_kept = (pairs.offset, False)
    sweep = (*pairs.features, *pairs.features, *nothing_kept)
    row_sums, col_sums = low_level(pairs.backend, "distill_sums", *sweep)[:2]
    sums = torch.stack([row_sums, merged(col_sums, pairs.world)[:, pairs.mine]])  # (2, 4, M)
    return ((sums[:, 0] - u).double().exp() * sums[:, 2]).sum()


def merged(
    sums: Tensor,  # (4, N), see `distill_sums`
    world: Any,
) -> Tensor:  # (4, N)
    """Log-sums of columns, and means under their weights, of the rows of all processes."""
    if world is None:
        return sums
    parts = world.gather(sums)  # (size, 4, N)
    lse = parts[:, :2].logsumexp(0)
    shares = (parts[:, :2] - lse).exp().nan_to_num(0.0)  # a NaN where there is no row at all
    return torch.cat([lse, (shares * parts[:, 2:]).sum(0)])


def softmax_gradients(
    pairs: Pairs,
    u: Tensor,  # (2, M)
    own: Tensor,  # (2, M)
    kept: Tensor,
    needs: tuple[bool, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """``Pairs.gradients`` of what a process's loss is to give gradients of: of both sides of all
    pairs; or, of several processes with a loss of their own each, Σ w·t of this one's, and without
    the others' part in the gradients (``with_grad``) each side's weights with its own features
    alone."""
    width = pairs.rows.shape[1]
    world = pairs.world
    if world is None or not world.local:
        return pairs.gradients(u, own.sum(0), kept, width, needs)
    if world.with_grad:
        d_rows, d_cols, moment = pairs.gradients(u, own.sum(0), kept, width, needs)
        return d_rows, d_cols, _own_moment(pairs, u) if needs[2] else moment
    never = torch.full_like(u[0], torch.inf)  # exp(t − ∞) is no weight
    needed = (needs[0] or needs[2], needs[1] or needs[2])
    images = torch.stack([u[0], never])
    texts = torch.stack([never, u[1]])
    d_rows = pairs.gradients(images, own[0], kept, width, (needed[0], False))[0]
    d_cols = pairs.gradients(texts, own[1], kept, width, (False, needed[1]))[1]
    moment = u.new_zeros((), dtype=torch.float64)
    if needs[2]:
        for grad, x in ((d_rows, pairs.rows), (d_cols, pairs.cols[pairs.mine])):
            moment = moment + (grad.double() * x).sum()
        moment = moment * pairs.scale
    return d_rows, d_cols, moment
