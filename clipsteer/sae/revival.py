"""AuxK with its gradients, for one process on a CPU: those of the rows of dead features alone.

The loss is quadratic and its residual a constant, so its gradient takes no more than the products
of the forward pass, of rows of the dead features alone. Only the first is of all of them: most of
few dead features are among the d_in / 2 that decode the residual, but not with an activation above
0.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.ops._dispatch import call
from clipsteer.sae.adam import Rows, in_order
from clipsteer.sae.losses import BatchStats, TrainingOutput
from clipsteer.sae.model import SAE


class Revival(NamedTuple):
    """AuxK of a batch and its gradients."""

    loss: Tensor  # ()
    dead: Tensor  # (m,) int64, ascending
    W_enc: Tensor  # (m, d_in)
    W_dec: Tensor  # (m, d_out)
    bias: Tensor  # (m,) of the encoder
    b_dec: Tensor | None  # (d_in,), where it is subtracted before encoding

    @torch.no_grad()
    def add_to(self, sae: SAE) -> dict[Tensor, Rows]:
        """Add them to the gradients of ``sae``, all of which are there; what is left are rows of
        the dictionaries that their row-sparse gradients lack, and zeros."""
        for bias, own in ((sae.encoder_bias.grad, self.bias), (sae.b_dec.grad, self.b_dec)):
            if bias is not None and own is not None:
                bias.add_(own) if own is self.b_dec else bias.index_add_(0, self.dead, own)
        left: dict[Tensor, Rows] = {}
        for weight, rows in ((sae.W_enc, self.W_enc), (sae.W_dec, self.W_dec)):
            grad = weight.grad
            assert grad is not None
            if not grad.is_sparse:
                grad.index_add_(0, self.dead, rows)
                continue
            weight.grad = grad = in_order(grad)
            there = grad._indices()[0]
            place = torch.searchsorted(there, self.dead)
            place.clamp_(max=max(len(there) - 1, 0))
            # dead at the last look, and active now: one row, as norms take each row for one
            both = there[place] == self.dead if len(there) else torch.zeros_like(place).bool()
            both = both.nonzero().flatten()
            if len(both):
                grad._values().index_add_(0, place[both], rows[both])
                rows.index_fill_(0, both, 0)
            left[weight] = Rows(self.dead, rows)
        return left


@torch.no_grad()
def revival(
    sae: SAE,
    x: Tensor,  # (B, d_in)
    out: TrainingOutput,
    stats: BatchStats,
    dead: Tensor,  # (m,) int64, ascending, not empty
    target: Tensor,  # (B, d_out) for a transcoder, else x
    weight: float,
) -> Revival:
    """``losses.auxk``, with its gradients times ``weight``."""
    half = max(sae.W_dec.shape[1] // 2, 1)
    centred = sae._centred(x)[0]
    encoder = sae.W_enc.index_select(0, dead)
    pre = F.linear(centred, encoder, sae.encoder_bias[dead])  # (B, m)
    acts, places, rows, offsets = _positive(pre, min(half, len(dead)))
    features = dead.index_select(0, places)
    guess = call("cpp", "ragged_decode", acts, features, offsets, sae.W_dec, None, None)
    if out.stats.scale is not None:
        guess = guess * out.stats.scale
    error = guess - (target - out.x_hat)
    share = min(len(dead) / half, 1.0) / stats.total_variance
    loss = error.square().sum() * share
    d_guess = error.mul_(2 * weight * share)
    if out.stats.scale is not None:
        d_guess = d_guess * out.stats.scale
    d_acts = call("cpp", "ragged_dot", d_guess, rows, features, sae.W_dec)
    d_dec, _ = call("cpp", "ragged_outer", acts, places, rows, d_guess, len(dead))
    d_enc, d_bias = call("cpp", "ragged_outer", d_acts, places, rows, centred, len(dead))
    # x - b_dec is encoded: all rows move alike
    d_b_dec = -(d_bias @ encoder) if sae.apply_b_dec_to_input else None
    return Revival(loss, dead, d_enc, d_dec, d_bias, d_b_dec)


def _positive(
    pre: Tensor,  # (B, m)
    k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The positive ones among the k largest of each row, and NaN: values, columns and rows (p,),
    and where rows begin (B + 1,). Of few features most rows have no more than k such, and none has
    to be selected."""
    B, m = pre.shape
    active = ~(pre <= 0)
    counts = active.sum(1)
    crowded = counts > k
    if bool(crowded.all()):
        acts, places = call("cpp", "topk", pre, k)
        rows = torch.arange(B).repeat_interleave(k)
        return acts.flatten(), places.flatten(), rows, torch.arange(0, B * k + 1, k)
    if bool(crowded.any()):
        some = pre[crowded]
        _, places = call("cpp", "topk", some, k)
        active[crowded] = some.isnan().scatter_(1, places, True)
        counts = active.sum(1)
    # six times as fast as torch's
    there = torch.from_numpy(np.flatnonzero(active.numpy()))
    rows = there // m
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return pre.flatten().index_select(0, there), there - rows * m, rows, offsets
