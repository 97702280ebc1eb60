"""``clip_loss``: ½·mean_i [CE(s·image_i·textᵀ, i) + CE(s·text_i·imageᵀ, i)], CLIP's loss.

Fused: both softmaxes take their sums, relative to each one's own pair and in log space, from one
sweep over tiles of similarities; a second one takes both gradients. No B×B matrix. Source: Radford
et al. 2021 (CLIP, arXiv 2103.00020), section 2.3; Szegedy et al. 2016 (arXiv 1512.00567), label
smoothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipsteer.ops import _check
from clipsteer.ops._calls import remembered, step
from clipsteer.ops._contrastive import KINDS, Kind, contrast
from clipsteer.ops._dispatch import call, choose
from clipsteer.ops._pairs import (
    checked_features,
    checked_scale,
    log_one_and,
    own_entropy,
    softmax_gradients,
)
from clipsteer.ops._steps import contiguous
from clipsteer.ops._sweeps import Pairs, in_one_call, keeps

__all__ = ["clip_loss", "clip_loss_reference"]


def clip_loss_reference(
    image: Tensor,  # (B, d)
    text: Tensor,  # (B, d)
    *,
    logit_scale: float | Tensor,
    labels: Tensor | None = None,  # (B,) int64
    label_smoothing: float = 0.0,
) -> Tensor:
    """The definition in plain torch; twice differentiable. Logits are relative to a row's own pair,
    so that large ones lose no digits."""
    wide = torch.promote_types(image.dtype, torch.float32)
    image = image.to(wide)
    text = text.to(wide)
    S = image @ text.T
    own = torch.eye(S.shape[0], dtype=torch.bool, device=S.device)
    t = (torch.stack([S, S.T]) - S.diagonal().unsqueeze(1)) * logit_scale  # (2, B, B)
    u = own_entropy(t, own)
    loss = u
    if labels is not None:
        away = torch.stack([S, S.T]) - S.diagonal().unsqueeze(1)
        place = labels.expand(2, -1).unsqueeze(2)
        loss = u - away.masked_fill(own, 0.0).gather(2, place).squeeze(2) * logit_scale
    if label_smoothing:
        means = torch.stack([image @ text.mean(0), text @ image.mean(0)])
        spread = u - (means - S.diagonal()) * logit_scale
        loss = (1 - label_smoothing) * loss + label_smoothing * spread
    return loss.mean()


def _labelled(
    x: Tensor,  # (B, d)
    labels: Tensor,  # (B,)
) -> Tensor:
    """Σ of the rows whose label is i, in one order on every device."""
    return torch.ops.aten.embedding_dense_backward(x, labels, x.shape[0], -1, False)


def evaluate(arguments, needs, backend, world):
    """The loss () and its gradients in image, text and scale, each if needed."""
    image, text, scale, labels, smoothing = arguments
    if in_one_call(backend, world) and labels is None and not smoothing:
        keep = any(needs) and keeps(image, image.shape[0], image.shape[1])
        given = (contiguous(image), contiguous(text), scale, keep, *needs)
        return call(backend, "clip_loss", *given)
    return step(_by_sweeps, needs, backend, world, *arguments)


def _by_sweeps(needs, backend, world, image, text, scale, labels, smoothing):
    pairs = Pairs(image, text, scale, backend, world)
    M = image.shape[0]
    local = world is not None and world.local
    lse, kept = pairs.log_sums(any(needs) and keeps(image, pairs.columns, image.shape[1]))
    u = log_one_and(lse)  # (2, M)
    each = u
    softer = smoothing if labels is None else 0.0  # of an own pair that is the label
    if labels is not None or smoothing:
        left = image.to(scale.dtype)
        right = text.to(scale.dtype)
        means = (left.mean(0), right.mean(0))
        # how far the labels' similarities, and the mean ones, are from the own pairs'
        moved = torch.zeros_like(u)
        if labels is not None:
            there = [(left * right[labels]).sum(1), (right * left[labels]).sum(1)]
            is_own = labels == torch.arange(M, device=labels.device)
            moved = torch.where(is_own, 0.0, torch.stack(there) - pairs.diag)
            moved = (1 - smoothing) * moved
        if smoothing:
            spread = torch.stack([left @ means[1], right @ means[0]]) - pairs.diag
            moved = moved + smoothing * spread
        each = u - moved * scale
    total = each.sum(dtype=torch.float64)
    count = pairs.columns
    if local:
        count = count / world.size
    elif world is not None:
        total = world.sum_(total)
    share = 0.5 / count
    loss = (total * share).to(scale.dtype)
    if not any(needs):
        return (loss,)
    own = softer - (lse - u).exp()  # (2, M)
    if labels is not None:
        own = (-u).exp()
    d_rows, d_cols, moment = softmax_gradients(pairs, u, own, kept, needs)
    d_scale = moment / scale
    if labels is not None:
        kept_share = 1 - smoothing
        if needs[0]:
            d_rows = d_rows - kept_share * (right[labels] + _labelled(right, labels))
        if needs[1]:
            d_cols = d_cols - kept_share * (left[labels] + _labelled(left, labels))
    if smoothing:
        d_rows = d_rows - 2 * smoothing * means[1] if needs[0] else d_rows
        d_cols = d_cols - 2 * smoothing * means[0] if needs[1] else d_cols
    if each is not u:
        d_scale = d_scale - moved.double().sum()
    return loss, d_rows, d_cols, (d_scale * share).to(scale.dtype)


def _gradient(cotangents, found, arguments, needs, backend, world):
    (grad,) = cotangents
    d_image, d_text, d_scale = found
    image, text, scale = arguments[:3]
    if in_one_call(backend, world):
        count = 2 * image.shape[0]
        return call(backend, "contrast_grad", grad, image, scale, count, *found, None)[:3]
    count = image.shape[0] if world is None else world.rows
    factor = grad * scale * ((1.0 if world is None else world.factor) / (2 * count))
    return (factor * d_image).to(image.dtype), (factor * d_text).to(text.dtype), grad * d_scale


def _reference(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    labels: Tensor | None,
    smoothing: float,
) -> tuple[Tensor]:
    options: dict[str, Any] = {"labels": labels, "label_smoothing": smoothing}
    return (clip_loss_reference(image, text, logit_scale=scale, **options),)


KINDS["clip_loss"] = Kind(evaluate, _gradient, _reference, tensors=4, leaves=(0, 1, 2))


@remembered
def clip_loss(
    image: Tensor,  # (B, d)
    text: Tensor,  # (B, d)
    *,
    logit_scale: float | Tensor,
    labels: Tensor | None = None,  # (B,) int64
    label_smoothing: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """CLIP's loss of a batch of pairs: the mean cross-entropy of images over texts and of texts
    over images.

    The batch is this process's own; over several processes `losses.ClipLoss` has the joint batch.

    Args:
        image, text: (B, d) features, as a rule of unit norm (the op does not normalise them);
            float32, bfloat16, float16 or (reference, cpp) float64.
        logit_scale: s > 0, a number or a tensor with one element, which then has its gradient.
        labels: (B,) int64 in [0, B), the text that image i belongs to and the image that text i
            belongs to, as open_clip hands them to both cross-entropies; None is i.
        label_smoothing: share in [0, 1] of a target that is spread evenly over all B.
        backend: ``"auto" | "reference" | "cpp" | "triton"``; ``ops.explain`` says which can run.

    Returns:
        () float32 (float64 for float64 features), without rounding in between: exact at any size of
        the logits. Deterministic. Extra memory is O(B·d), on a GPU also 1,300·B numbers and 256 MiB
        at most; the reference holds several B×B matrices. Second derivatives are the reference's.

    Raises:
        ValueError: shapes or devices that do not fit, an empty batch, logit_scale or labels out of
            range (their values are looked at on the CPU only), label_smoothing out of range.
        TypeError: not tensors or numbers, dtypes that differ outside autocast.
        RuntimeError: the backend asked for cannot run here.

    Source: Radford et al. 2021 (arXiv 2103.00020), figure 3.
    """
    op = "clip_loss"
    named = checked_features(op, {"image": image, "text": text})
    scale = checked_scale(op, "logit_scale", logit_scale, named)
    if labels is not None:
        B = named["image"].shape[0]
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
            got = _check.what_came(labels)
            raise TypeError(_check.mistake(op, "labels", "an int64 tensor", got, named))
        if tuple(labels.shape) != (B,) or labels.device != named["image"].device:
            expected = f"of shape (B,) = ({B},) on {named['image'].device}"
            got = f"{tuple(labels.shape)} on {labels.device}"
            raise ValueError(_check.mistake(op, "labels", expected, got, named))
        _check.check_indices(op, labels, B, named, "labels")
    if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, (int, float)):
        got = type(label_smoothing).__name__
        raise TypeError(_check.mistake(op, "label_smoothing", "a number", got, named))
    if not 0 <= label_smoothing <= 1:
        raise ValueError(_check.mistake(op, "label_smoothing", "in [0, 1]", label_smoothing, named))
    given = (*named.values(), scale, labels, label_smoothing)
    return contrast(op, given, choose(op, backend, named["image"]))[0]
