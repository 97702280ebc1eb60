"""The parts of a CPU training step that have goals of their own, each in every way there is."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from clipsteer.ops import _dispatch
from clipsteer.ops._sparse import weight_gradient
from clipsteer.testing.timing import Calls


def topk_stage(pre: Tensor, k: int) -> Calls:
    """The selection alone, on given pre-activations."""
    calls: Calls = {"torch.topk": partial(torch.topk, pre, k)}
    if _dispatch.missing("cpp") is None:
        return {"cpp": partial(torch.ops.clipsteer_cpp.topk, pre, k), **calls}
    return calls


def dictionary_gradient(B: int, d: int, n: int, k: int) -> Calls:
    """dW of a decoder in every way there is: (B, k) codes and (B, d) gradients into (n, d)."""
    g = torch.Generator().manual_seed(0)
    acts = torch.rand(B, k, generator=g)
    rows = torch.randn(B, d, generator=g)
    indices = torch.randint(0, n, (B, k), generator=g)
    buffer = torch.empty(n, d)
    bias = torch.empty(n)
    code = torch.zeros(B, n).scatter_add_(1, indices, acts)
    products = (acts.unsqueeze(-1) * rows.unsqueeze(1)).flatten(0, 1)  # (B k, d)

    def dense() -> Tensor:
        return torch.zeros(n, d).index_add_(0, indices.flatten(), products)

    def dense_kept() -> Tensor:
        return buffer.zero_().index_add_(0, indices.flatten(), products)

    def dense_product() -> Tensor:
        return code.T @ rows

    calls: Calls = {
        "dense torch": dense,
        "dense torch, kept": dense_kept,
        "dense matmul": dense_product,
    }
    if _dispatch.missing("cpp") is not None:
        return calls
    cpp = torch.ops.clipsteer_cpp

    # as the backward pass of a decoder makes it
    row_sparse = partial(
        weight_gradient, acts, indices, rows, buffer, "cpp", sparse=True, buffer=None, bias=False
    )
    ours: Calls = {
        "kept buffer": partial(cpp.sparse_outer_out, acts, indices, rows, buffer, bias),
        "row-sparse": row_sparse,
        "fresh": partial(cpp.sparse_outer, acts, indices, rows, n),
    }
    return ours | calls
