"""What ``sparse_decode`` may be off by, how its cases are drawn, and what it is timed against."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.ops._spec import OpSpec, draw, fraction_of_bound
from clipsteer.ops.sparse_decode import sparse_decode, sparse_decode_reference


def decode_truth(acts: Tensor, indices: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """The sum and its magnitude in float64, term by term: what is in rows that are not named plays
    no part."""
    truth = torch.zeros(acts.shape[0], W.shape[1], dtype=torch.float64)
    size = torch.zeros_like(truth)
    for j in range(acts.shape[1]):
        term = acts[:, j, None].double() * W[indices[:, j]].double()
        truth = truth + term
        size = size + term.abs()
    return truth, size


def outer_truth(
    coeff: Tensor,
    indices: Tensor,
    rows: Tensor,
    n: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dW, its magnitude and the number of terms of each row, in float64."""
    flat = indices.flatten()
    c = coeff.double().flatten()
    r = rows.double().repeat_interleave(indices.shape[-1], 0)
    zeros = torch.zeros(n, rows.shape[-1], dtype=torch.float64)
    truth = zeros.index_add(0, flat, c[:, None] * r)
    magnitude = zeros.index_add(0, flat, (c[:, None] * r).abs())
    return truth, magnitude, torch.bincount(flat, minlength=n).double()


def _make(
    shape: dict[str, int],
    dtype: torch.dtype,
    generator: torch.Generator,
    scale: float,
    exact: bool,
) -> dict:
    B, d, n, k = (shape[s] for s in ("B", "d", "n", "k"))
    indices = torch.randint(0, n, (B, k), generator=generator)
    acts = draw((B, k), dtype, generator, scale, exact)
    W_dec = draw((n, d), dtype, generator, 1.0, exact)
    b_dec = draw((d,), dtype, generator, scale, exact)
    return {"acts": acts, "indices": indices, "W_dec": W_dec, "b_dec": b_dec}


def _check_values(inputs: dict[str, Any], outputs: dict[str, Tensor]) -> dict[str, float]:
    truth, magnitude = decode_truth(inputs["acts"], inputs["indices"], inputs["W_dec"])
    b = inputs["b_dec"].double()
    terms = inputs["acts"].shape[-1]
    return {"x_hat": fraction_of_bound(outputs["x_hat"], truth + b, magnitude + b.abs(), terms)}


def _check_grads(
    inputs: dict[str, Any],
    outputs: dict[str, Tensor],
    grad_out: dict[str, Tensor],
    grads: dict[str, Tensor],
) -> dict[str, float]:
    acts = inputs["acts"]
    indices = inputs["indices"]
    W = inputs["W_dec"]
    g = grad_out["x_hat"].double()
    d_W, size, terms = outer_truth(acts, indices, g, W.shape[0])
    dots = g @ W.double().T
    dot_sizes = g.abs() @ W.double().abs().T
    return {
        "acts": fraction_of_bound(
            grads["acts"],
            dots.gather(-1, indices),
            dot_sizes.gather(-1, indices),
            W.shape[1],
        ),
        "W_dec": fraction_of_bound(grads["W_dec"], d_W, size, terms[:, None]),
        "b_dec": fraction_of_bound(grads["b_dec"], g.sum(0), g.abs().sum(0), g.shape[0]),
    }


def _dense_decode(acts: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    code = torch.zeros(acts.shape[0], W_dec.shape[0], dtype=acts.dtype, device=acts.device)
    return torch.addmm(b_dec, code.scatter_add(-1, indices, acts), W_dec)


def _embedding_bag(acts: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    return F.embedding_bag(indices, W_dec, per_sample_weights=acts, mode="sum") + b_dec


SPEC = OpSpec(
    name="sparse_decode",
    function=sparse_decode,
    reference=sparse_decode_reference,
    outputs=("x_hat",),
    differentiable=("acts", "W_dec", "b_dec"),
    make=_make,
    check=_check_values,
    check_grads=_check_grads,
    shapes=tuple(
        {"B": B, "d": d, "n": n, "k": k}
        for B, d, n, k in (
            (7, 33, 65, 5),
            (33, 31, 127, 8),
            (4, 128, 129, 129),
            (1, 1, 1, 1),
            (0, 8, 16, 4),
            (3, 129, 31, 32),
            (32, 127, 128, 1),
            (2, 32, 33, 31),
        )
    ),
    small_shape={"B": 3, "d": 4, "n": 9, "k": 3},
    repeat_shape={"B": 70, "d": 40, "n": 300, "k": 9},
    rows=("acts", "indices"),
    optional=("b_dec",),
    scalable=("acts", "b_dec"),
    grad_buffer="W_dec",
    bench_shapes={
        "B256-k32": {"B": 256, "d": 768, "n": 49152, "k": 32},
        "B256-k64": {"B": 256, "d": 768, "n": 49152, "k": 64},
    },
    gpu_bench_shapes={
        "B4096-k32": {"B": 4096, "d": 768, "n": 49152, "k": 32},
        "B4096-k64": {"B": 4096, "d": 768, "n": 49152, "k": 64},
    },
    baselines={"embedding_bag": _embedding_bag, "dense": _dense_decode},
    floor=lambda s: (
        2.0 * s["B"] * s["k"] * s["d"],
        4.0 * s["B"] * (s["k"] * s["d"] + s["d"] + 3 * s["k"]),
    ),
)

SPECS = (SPEC,)
