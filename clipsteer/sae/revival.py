"""AuxK with its gradients, for one process on a CPU: those of the rows of dead features alone.

The loss is quadratic and its residual a constant, so its gradient takes no more than the products
of the forward pass, of rows of the dead features alone. Where these are few, as they are to be,
they are dense: most of them are among the d_in / 2 that decode the residual.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.ops._dispatch import call
from clipsteer.sae.adam import Rows, in_order
from clipsteer.sae.losses import BatchStats, TrainingOutput
from clipsteer.sae.model import SAE

# of so many times as many dead features as are active the products are sparse
_SPARSE_FROM = 6


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
        the dictionaries that their row-sparse gradients lack."""
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
            # dead at the last look, and active now
            both = there[place] == self.dead if len(there) else torch.zeros_like(place).bool()
            grad._values().index_add_(0, place[both], rows[both])
            left[weight] = Rows(self.dead[~both], rows[~both])
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
    k = min(half, len(dead))
    centred = sae._centred(x)[0]
    encoder = sae.W_enc[dead]
    decoder = sae.W_dec[dead]
    pre = F.linear(centred, encoder, sae.encoder_bias[dead])  # (B, m)
    acts, places = call("cpp", "topk", pre, k)  # (B, k)
    acts.clamp_(min=0)
    dense = len(dead) < _SPARSE_FROM * k
    if dense:
        acts = torch.zeros_like(pre).scatter_(1, places, acts)  # (B, m)
        guess = acts @ decoder
    else:
        guess = call("cpp", "sparse_decode", acts, places, decoder, None)
    if out.stats.scale is not None:
        guess = guess * out.stats.scale
    error = guess - (target - out.x_hat)
    share = min(len(dead) / half, 1.0) / stats.total_variance
    loss = error.square().sum() * share
    d_guess = error.mul_(2 * weight * share)
    if out.stats.scale is not None:
        d_guess = d_guess * out.stats.scale
    if dense:
        d_acts = (d_guess @ decoder.T).mul_(acts > 0)
        d_dec = acts.T @ d_guess
        d_enc = d_acts.T @ centred
        d_bias = d_acts.sum(0)
    else:
        d_acts = call("cpp", "gather_dot", d_guess, places, decoder).mul_(acts > 0)
        d_dec, _ = call("cpp", "sparse_outer", acts, places, d_guess, len(dead))
        d_enc, d_bias = call("cpp", "sparse_outer", d_acts, places, centred, len(dead))
    # x - b_dec is encoded: all rows move alike
    d_b_dec = -(d_bias @ encoder) if sae.apply_b_dec_to_input else None
    return Revival(loss, dead, d_enc, d_dec, d_bias, d_b_dec)
