"""``siglip_loss``: −(1/B)·Σ_ij log σ(l_ij·z_ij), z = s·⟨image_i, text_j⟩ + b, l = 1 of pairs, else
−1.

Fused: a tile's similarities become its losses and its weights in the same sweep, which multiply the
features at once: no pair has to wait for the sum of others, and there is no B×B matrix. Source:
Zhai et al. 2023 (SigLIP, arXiv 2303.15343).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.ops._calls import remembered
from clipsteer.ops._contrastive import KINDS, Kind, contrast
from clipsteer.ops._dispatch import call, choose
from clipsteer.ops._pairs import checked_features, checked_number
from clipsteer.ops._steps import contiguous
from clipsteer.ops._sweeps import in_one_call, low_level

__all__ = ["siglip_loss", "siglip_loss_reference"]


def siglip_loss_reference(
    image: Tensor,  # (B, d)
    text: Tensor,  # (B, d)
    *,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
) -> Tensor:
    """The definition in plain torch; twice differentiable."""
    wide = torch.promote_types(image.dtype, torch.float32)
    z = image.to(wide) @ text.to(wide).T * logit_scale
    if logit_bias is not None:
        z = z + logit_bias
    own = torch.eye(z.shape[0], dtype=torch.bool, device=z.device)
    return -F.logsigmoid(torch.where(own, z, -z)).sum() / z.shape[0]


def _share(image: Tensor, world: Any) -> float:
    """What the sum is divided by: B, or the mean number of pairs of a process."""
    return image.shape[0] if world is None else world.rows / world.size


def evaluate(arguments, needs, backend, world):
    """The loss () and its gradients in image, text, scale and bias. Of several processes each has
    its images against the texts of all, and texts get what all images make of them."""
    image, text, scale, bias = arguments
    if in_one_call(backend, world):
        given = (contiguous(image), contiguous(text), scale, bias, needs[0], needs[1])
        return call(backend, "siglip_loss", *given)
    M = image.shape[0]
    cols = text.contiguous()
    offset = 0
    if world is not None:
        offset = world.offset
        cols = world.join(cols)
    sweep = (image.contiguous(), cols, scale, bias, offset, needs[0], needs[1])
    sums, d_rows, d_cols = low_level(backend, "siglip_sweep", *sweep)
    if world is not None and needs[1]:
        d_cols = world.sum_(d_cols)[offset : offset + M]
    loss, d_scale, d_bias = (sums / _share(image, world)).unbind()
    return loss.clone(), d_rows, d_cols, d_scale.clone(), d_bias.clone()


def _gradient(cotangents, found, arguments, needs, backend, world):
    (grad,) = cotangents
    d_image, d_text, d_scale, d_bias = found
    image, text, scale = arguments[:3]
    if in_one_call(backend, world):
        return call(backend, "contrast_grad", grad, image, scale, image.shape[0], *found)
    factor = grad * scale / _share(image, world)
    d_image = (factor * d_image).to(image.dtype)
    return d_image, (factor * d_text).to(text.dtype), grad * d_scale, grad * d_bias


def _reference(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor]:
    return (siglip_loss_reference(image, text, logit_scale=scale, logit_bias=bias),)


KINDS["siglip_loss"] = Kind(evaluate, _gradient, _reference, tensors=4, leaves=(0, 1, 2, 3))


@remembered
def siglip_loss(
    image: Tensor,  # (B, d)
    text: Tensor,  # (B, d)
    *,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The sigmoid loss of a batch of pairs: every image and every text is asked whether they belong
    together.

    The batch is this process's own; over several processes `losses.SigLipLoss` has the joint batch.

    Args:
        image, text: (B, d) features, as a rule of unit norm (the op does not normalise them);
            float32, bfloat16, float16 or (reference, cpp) float64.
        logit_scale: s, a number or a tensor with one element, which then has its gradient.
        logit_bias: b, likewise; None is 0. SigLIP starts from s = 10 and b = −10.
        backend: ``"auto" | "reference" | "cpp" | "triton"``; ``ops.explain`` says which can run.

    Returns:
        () float32 (float64 for float64 features), the sum over all pairs over B, in log space
        throughout: exact at any size of the logits. Deterministic. Extra memory is O(B·d), on a GPU
        also 256 MiB at most; the reference holds several B×B matrices. Second derivatives are the
        reference's.

    Raises:
        ValueError: shapes or devices that do not fit, an empty batch.
        TypeError: not tensors or numbers, dtypes that differ outside autocast.
        RuntimeError: the backend asked for cannot run here.

    Source: Zhai et al. 2023 (arXiv 2303.15343), algorithm 1.
    """
    op = "siglip_loss"
    named = checked_features(op, {"image": image, "text": text})
    scale = checked_number(op, "logit_scale", logit_scale, named)
    bias = checked_number(op, "logit_bias", 0.0 if logit_bias is None else logit_bias, named)
    given = (*named.values(), scale, bias)
    return contrast(op, given, choose(op, backend, named["image"]))[0]
