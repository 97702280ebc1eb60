"""Memory that is kept from step to step, and rows that are changed while they are in cache."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from clipsteer.ops import _dispatch

OPS = ("sparse_decode", "topk_encode", "topk_encode_options")  # what takes a buffer
ROWS = 256  # a block of them fits into a core's second cache

_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def gradient_buffer(
    W: Tensor,  # (n, d), a parameter or its transpose
) -> Tensor | None:
    """A ``grad_buffer`` for the gradient of ``W``, the same at every step: fresh memory of that
    size costs as much as what is written there. None where it is of no use."""
    parameter = W if W._base is None else W._base
    trained = torch.is_grad_enabled() and parameter.requires_grad and parameter.is_leaf
    if not trained or W.device.type != "cpu" or parameter.numel() != W.numel():
        return None
    if any(_dispatch.choose(op, "auto", W) == "reference" for op in OPS):
        return None
    found = _kept.get(parameter)
    if found is None or found.shape != W.shape or found.stride() != W.stride():
        found = _kept[parameter] = torch.empty_like(W, requires_grad=False)
    return found if found.dtype == W.dtype else None


@torch.no_grad()
def unit_rows_(
    W: Tensor,  # (n, d)
) -> None:
    """Divide every row by its norm and the smallest ε of the dtype."""
    eps = torch.finfo(W.dtype).eps
    for rows in W.split(ROWS):
        rows /= torch.linalg.vector_norm(rows, dim=1, keepdim=True) + eps


@torch.no_grad()
def remove_parallel_(
    grad: Tensor,  # (n, d)
    W: Tensor,  # (n, d)
) -> None:
    """Take from every row of ``grad`` its component along the row of ``W``, of norm 1."""
    for of_grad, of_W in zip(grad.split(ROWS), W.split(ROWS)):
        of_grad -= (of_grad * of_W).sum(1, keepdim=True) * of_W


@torch.no_grad()
def sign_step_(
    W: Tensor,
    grad: Tensor,  # like W
    lr: float,
) -> None:
    """Move every element by ``lr`` against the sign of its gradient."""
    if W.dim() != 2:
        W.add_(grad.sign(), alpha=-lr)
        return
    for of_W, of_grad in zip(W.split(ROWS), grad.split(ROWS)):
        of_W.add_(of_grad.sign(), alpha=-lr)
