"""What ``ragged_decode`` may be off by, how its cases are drawn, and what it is timed against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.ops._bounds import fraction_of_bound
from clipsteer.ops._ragged import SparseCodes, row_or_none
from clipsteer.ops._spec import Draw, Errors, Inputs, OpSpec, Shape, Tensors, sizes, unpacked
from clipsteer.ops.ragged_decode import ragged_decode, ragged_decode_reference
from clipsteer.ops.sparse_decode import sparse_decode, sparse_decode_reference


def draw_codes(case: Draw, B: int, n: int, k: int) -> Inputs:
    """Rows of none, k and 2 k of n features in turn, and k places of padding at the end."""
    counts = [min(n, r % 3 * k) for r in range(B)]
    order = torch.rand(B, n, generator=case.generator).argsort(-1)
    chosen = [order[r, :count].sort().values for r, count in enumerate(counts)]
    indices = torch.cat([*chosen, torch.zeros(k, dtype=torch.int64)])
    values = case.tensor(len(indices))
    values[sum(counts) :] = 0
    offsets = torch.tensor([0, *counts]).cumsum(0)
    return {"values": values, "indices": indices, "offsets": offsets}


def _draw(case: Draw) -> Inputs:
    B, d, n, k = unpacked(case.shape, "B d n k")
    codes = draw_codes(case, B, n, k)
    groups = case.shape.get("G")
    prefixes = None if groups is None else [n * (g + 1) // groups for g in range(groups)]
    W_dec = case.tensor(n, d, scale=1.0)
    return {**codes, "W_dec": W_dec, "b_dec": case.tensor(d), "prefixes": prefixes}


def _pairs(inputs: Inputs) -> tuple[Tensor, Tensor, list[int]]:
    """Of each code its row, -1 for padding, and the number of its prefix; the prefixes."""
    codes = SparseCodes(inputs["values"], inputs["indices"], inputs["offsets"])
    row = row_or_none(codes)
    limits = inputs["prefixes"] or [inputs["W_dec"].shape[0]]
    group = torch.searchsorted(torch.tensor(limits), inputs["indices"], right=True)
    return row, group, limits


def ragged_truth(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The sums (G, B, d) and their magnitudes in float64, and how many terms each has (G, B, 1)."""
    row, group, limits = _pairs(inputs)
    W = inputs["W_dec"].double()
    shape = (len(limits), len(inputs["offsets"]) - 1)
    there = row >= 0
    place = (group[there], row[there])
    term = inputs["values"].double()[there, None] * W[inputs["indices"][there]]

    def summed(parts: Tensor) -> Tensor:
        """Of each row the parts in each prefix, which holds all shorter ones."""
        zeros = torch.zeros(*shape, parts.shape[1], dtype=torch.float64)
        return zeros.index_put(place, parts, accumulate=True).cumsum(0)

    truth, size, terms = summed(term), summed(term.abs()), summed(torch.ones_like(term[:, :1]))
    return truth, size, terms


def _check_values(inputs: Inputs, outputs: Tensors) -> Errors:
    truth, size, terms = ragged_truth(inputs)
    b = inputs["b_dec"].double()
    x_hat = outputs["x_hat"]
    if inputs["prefixes"] is None:
        x_hat = x_hat[None]
    return {"x_hat": fraction_of_bound(x_hat, truth + b, size + b.abs(), terms)}


def _check_grads(inputs: Inputs, outputs: Tensors, grad_out: Tensors, grads: Tensors) -> Errors:
    row, group, limits = _pairs(inputs)
    W = inputs["W_dec"].double()
    n, d = W.shape
    g = grad_out["x_hat"].double()
    g = g if inputs["prefixes"] is not None else g[None]  # (G, B, d)
    groups, B, _ = g.shape
    tails = g.flip(0).cumsum(0).flip(0)
    # the tails themselves are sums that are rounded, to the values' dtype
    tail_sizes = g.abs().flip(0).cumsum(0).flip(0)
    values = inputs["values"].double()
    there = row >= 0
    index = inputs["indices"][there]
    tail = tails[group[there], row[there]]
    tail_size = tail_sizes[group[there], row[there]]
    dots = torch.zeros_like(values)
    dot_sizes = torch.zeros_like(values)
    dots[there] = (tail * W[index]).sum(-1)
    dot_sizes[there] = (tail_size * W[index].abs()).sum(-1)
    zeros = torch.zeros(n, d, dtype=torch.float64)
    d_W = zeros.index_add(0, index, values[there, None] * tail)
    size = zeros.index_add(0, index, values[there, None].abs() * tail_size)
    terms = torch.bincount(index, minlength=n).double().unsqueeze(-1)
    # a sum of G terms, each rounded to the dtype of the gradient
    extra = 0.0 if groups == 1 else (groups - 1) * torch.finfo(inputs["values"].dtype).eps / 2
    return {
        "values": fraction_of_bound(grads["values"], dots, dot_sizes, d, extra),
        "W_dec": fraction_of_bound(grads["W_dec"], d_W, size, terms, extra),
        "b_dec": fraction_of_bound(grads["b_dec"], g.sum((0, 1)), g.abs().sum((0, 1)), groups * B),
    }


def _embedding_bag(
    values: Tensor, indices: Tensor, offsets: Tensor, W_dec: Tensor, b_dec: Tensor, prefixes: None
) -> Tensor:
    bag = F.embedding_bag(
        indices,
        W_dec,
        offsets,
        per_sample_weights=values,
        mode="sum",
        include_last_offset=True,
    )
    return bag + b_dec


def _floor(shape: Shape) -> tuple[float, float]:
    B, d, k = unpacked(shape, "B d k")
    groups = shape.get("G", 1)
    return 2.0 * B * k * d, 4.0 * B * (k * d + groups * d + 3 * k)


def _bench(B: int, groups: int | None = None) -> dict[str, Shape]:
    found = {}
    for k in (32, 64):
        shape = {"B": B, "d": 768, "n": 49152, "k": k}
        if groups is not None:
            shape["G"] = groups
        found[f"B{B}-k{k}" + (f"-G{groups}" if groups else "")] = shape
    return found


SPEC = OpSpec(
    name="ragged_decode",
    function=ragged_decode,
    reference=ragged_decode_reference,
    outputs=("x_hat",),
    differentiable=("values", "W_dec", "b_dec"),
    draw=_draw,
    check=_check_values,
    check_grads=_check_grads,
    shapes=sizes(
        "B d n k G",
        (7, 33, 65, 5),
        (33, 31, 127, 8, 3),
        (4, 128, 129, 128),
        (2, 1, 1, 1),
        (0, 8, 16, 4, 2),
        (3, 129, 31, 20, 4),
        (32, 127, 128, 1),
        (2, 32, 33, 31, 1),
    ),
    small_shape={"B": 3, "d": 4, "n": 9, "k": 3, "G": 2},
    repeat_shape={"B": 70, "d": 40, "n": 300, "k": 9, "G": 3},
    optional=("b_dec",),
    scalable=("values", "b_dec"),
    grad_buffer="W_dec",
    bench_shapes=_bench(256) | _bench(256, 4),
    gpu_bench_shapes=_bench(4096) | _bench(4096, 4),
    baselines={"embedding_bag": _embedding_bag},
    floor=_floor,
)


def _draw_prefixes(case: Draw) -> Inputs:
    """k features a row, in any order and some of them twice."""
    B, d, n, k, groups = unpacked(case.shape, "B d n k G")
    indices = torch.randint(0, n, (B, k), generator=case.generator)
    prefixes = [n * (g + 1) // groups for g in range(groups)]
    W_dec = case.tensor(n, d, scale=1.0)
    given = {"acts": case.tensor(B, k), "indices": indices, "W_dec": W_dec}
    return {**given, "b_dec": case.tensor(d), "prefixes": prefixes}


def _as_ragged(inputs: Inputs) -> Inputs:
    """The same codes as ragged ones."""
    acts = inputs["acts"]
    B, k = acts.shape
    codes = {"values": acts.flatten(), "indices": inputs["indices"].flatten()}
    return {**inputs, **codes, "offsets": torch.arange(B + 1) * k}


def _check_prefixes(inputs: Inputs, outputs: Tensors) -> Errors:
    return _check_values(_as_ragged(inputs), outputs)


def _check_prefix_grads(
    inputs: Inputs, outputs: Tensors, grad_out: Tensors, grads: Tensors
) -> Errors:
    flat = {**grads, "values": grads["acts"].flatten()}
    found = _check_grads(_as_ragged(inputs), outputs, grad_out, flat)
    return {"acts": found.pop("values"), **found}


def _dense_prefixes(
    acts: Tensor,  # (B, k)
    indices: Tensor,  # (B, k)
    W_dec: Tensor,  # (n, d)
    b_dec: Tensor,  # (d,)
    prefixes: list[int],
) -> Tensor:
    """A product a prefix, as Matryoshka SAEs are trained elsewhere."""
    code = acts.new_zeros(acts.shape[0], W_dec.shape[0])
    code = code.scatter_add(-1, indices, acts)
    return torch.stack([torch.addmm(b_dec, code[:, :n], W_dec[:n]) for n in prefixes])


PREFIXES = OpSpec(
    name="sparse_decode_prefixes",
    function=sparse_decode,
    reference=sparse_decode_reference,
    outputs=("x_hat",),
    differentiable=("acts", "W_dec", "b_dec"),
    draw=_draw_prefixes,
    check=_check_prefixes,
    check_grads=_check_prefix_grads,
    shapes=sizes(
        "B d n k G",
        (7, 33, 65, 5, 2),
        (33, 31, 127, 8, 3),
        (4, 128, 129, 129, 4),
        (1, 1, 1, 1, 1),
        (0, 8, 16, 4, 2),
        (3, 129, 31, 32, 5),
        (32, 127, 128, 1, 2),
        (2, 32, 33, 31, 33),
    ),
    small_shape={"B": 3, "d": 4, "n": 9, "k": 3, "G": 2},
    repeat_shape={"B": 70, "d": 40, "n": 300, "k": 9, "G": 3},
    optional=("b_dec",),
    scalable=("acts", "b_dec"),
    grad_buffer="W_dec",
    bench_shapes=_bench(256, 4),
    gpu_bench_shapes=_bench(4096, 4),
    baselines={"dense": _dense_prefixes},
    floor=_floor,
)

SPECS = (SPEC, PREFIXES)
