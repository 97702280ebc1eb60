"""What ``sparse_decode`` may be off by, how its cases are drawn, and what it is timed against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.ops._bounds import fraction_of_bound
from clipsteer.ops._spec import Draw, Errors, Inputs, OpSpec, Shape, Tensors, sizes, unpacked
from clipsteer.ops.sparse_decode import sparse_decode, sparse_decode_reference
from clipsteer.ops.specs._shared import dictionary_bench


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
    features = indices.flatten()
    c = coeff.double().flatten()
    r = rows.double().repeat_interleave(indices.shape[-1], 0)
    products = c[:, None] * r  # (B k, d)
    zeros = torch.zeros(n, rows.shape[-1], dtype=torch.float64)
    truth = zeros.index_add(0, features, products)
    magnitude = zeros.index_add(0, features, products.abs())
    return truth, magnitude, torch.bincount(features, minlength=n).double()


def _draw(case: Draw) -> Inputs:
    B, d, n, k = unpacked(case.shape, "B d n k")
    indices = torch.randint(0, n, (B, k), generator=case.generator)
    acts = case.tensor(B, k)
    W_dec = case.tensor(n, d, scale=1.0)
    b_dec = case.tensor(d)
    return {"acts": acts, "indices": indices, "W_dec": W_dec, "b_dec": b_dec}


def _check_values(inputs: Inputs, outputs: Tensors) -> Errors:
    acts = inputs["acts"]
    truth, magnitude = decode_truth(acts, inputs["indices"], inputs["W_dec"])
    b = inputs["b_dec"].double()
    error = fraction_of_bound(
        outputs["x_hat"],
        truth + b,
        magnitude + b.abs(),
        acts.shape[-1],
    )
    return {"x_hat": error}


def _check_grads(inputs: Inputs, outputs: Tensors, grad_out: Tensors, grads: Tensors) -> Errors:
    indices = inputs["indices"]  # (B, k)
    W = inputs["W_dec"].double()  # (n, d)
    g = grad_out["x_hat"].double()  # (B, d)
    n, d = W.shape
    d_W, size, terms = outer_truth(inputs["acts"], indices, g, n)
    dots = (g @ W.T).gather(-1, indices)
    dot_sizes = (g.abs() @ W.abs().T).gather(-1, indices)
    return {
        "acts": fraction_of_bound(grads["acts"], dots, dot_sizes, d),
        "W_dec": fraction_of_bound(grads["W_dec"], d_W, size, terms[:, None]),
        "b_dec": fraction_of_bound(grads["b_dec"], g.sum(0), g.abs().sum(0), g.shape[0]),
    }


def _dense_decode(
    acts: Tensor,  # (B, k)
    indices: Tensor,  # (B, k)
    W_dec: Tensor,  # (n, d)
    b_dec: Tensor,  # (d,)
) -> Tensor:
    code = acts.new_zeros(acts.shape[0], W_dec.shape[0])
    code = code.scatter_add(-1, indices, acts)
    return torch.addmm(b_dec, code, W_dec)


def _embedding_bag(
    acts: Tensor,  # (B, k)
    indices: Tensor,  # (B, k)
    W_dec: Tensor,  # (n, d)
    b_dec: Tensor,  # (d,)
) -> Tensor:
    return F.embedding_bag(indices, W_dec, per_sample_weights=acts, mode="sum") + b_dec


def _floor(shape: Shape) -> tuple[float, float]:
    B, d, k = unpacked(shape, "B d k")
    return 2.0 * B * k * d, 4.0 * B * (k * d + d + 3 * k)


SPEC = OpSpec(
    name="sparse_decode",
    function=sparse_decode,
    reference=sparse_decode_reference,
    outputs=("x_hat",),
    differentiable=("acts", "W_dec", "b_dec"),
    draw=_draw,
    check=_check_values,
    check_grads=_check_grads,
    shapes=sizes(
        "B d n k",
        (7, 33, 65, 5),
        (33, 31, 127, 8),
        (4, 128, 129, 129),
        (1, 1, 1, 1),
        (0, 8, 16, 4),
        (3, 129, 31, 32),
        (32, 127, 128, 1),
        (2, 32, 33, 31),
    ),
    small_shape={"B": 3, "d": 4, "n": 9, "k": 3},
    repeat_shape={"B": 70, "d": 40, "n": 300, "k": 9},
    rows=("acts", "indices"),
    optional=("b_dec",),
    scalable=("acts", "b_dec"),
    grad_buffer="W_dec",
    bench_shapes=dictionary_bench(256),
    gpu_bench_shapes=dictionary_bench(4096),
    baselines={"embedding_bag": _embedding_bag, "dense": _dense_decode},
    floor=_floor,
)

SPECS = (SPEC,)
