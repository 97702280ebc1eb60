"""``torch.ops.clipsteer``: the low-level ops under one name for every device and backend.

``torch.export`` writes these names, so that a graph moves between a CPU and a GPU and between
installations: at every call the fastest trusted backend of where the tensors are runs, or plain
torch. They are differentiable, as far as their backends are, so that an exported module trains.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clipsteer.ops import _agreement, _grouped, _ragged, _sparse, _sweeps
from clipsteer.ops._autograd import Function
from clipsteer.ops._dispatch import call, describe, new_library, resolve
from clipsteer.ops._lowlevel import NAMESPACE, PORTABLE, RECORDS
from clipsteer.ops._ragged_encode import RaggedEncode
from clipsteer.ops._record import Op
from clipsteer.ops.batch_topk_encode import batch_topk_encode_reference
from clipsteer.ops.conceptor_project import LowRank, conceptor_project_reference
from clipsteer.ops.mahalanobis_covariance_loss import loss_of_new
from clipsteer.ops.ragged_decode import ragged_decode_reference
from clipsteer.ops.semantic_drift import reference_sums
from clipsteer.ops.sparse_decode import sparse_decode_reference
from clipsteer.ops.threshold_encode import threshold_encode_reference
from clipsteer.ops.topk_encode import TopkEncode, topk_encode_reference


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _topk_encode(x, W_enc, b_enc, k, screen=True, scale=None, columns=None, relu=True):
    options = {"relu": relu, "scale": scale, "columns": columns}
    acts, indices = topk_encode_reference(x, W_enc, b_enc, k=k, **options)
    return acts.contiguous(), indices.contiguous()


def _gather_dot(rows, indices, W):
    return (W[indices] @ rows.unsqueeze(-1)).squeeze(-1)


def _sparse_outer(coeff, indices, rows, n, across=False):
    pairs = _wide(coeff).unsqueeze(-1) * _wide(rows).unsqueeze(-2)  # (B, k, d)
    dW = pairs.new_zeros(n, rows.shape[1]).index_add(0, indices.flatten(), pairs.flatten(0, 1))
    db = pairs.new_zeros(n).index_add(0, indices.flatten(), _wide(coeff).flatten())
    return _lying(dW.to(rows.dtype), across), db.to(rows.dtype)


def _lying(dW, across):
    """Segment sums (n, d) as it is, or as (d, n)."""
    return dW.t().contiguous().t() if across else dW.contiguous()


def _threshold_encode(x, W_enc, b_enc, threshold, capacity, scale=None, columns=None):
    room = None if capacity < 0 else capacity
    if threshold.shape[0] == 1:
        threshold = threshold[0]
    options = {"relu": False, "capacity": room, "scale": scale, "columns": columns}
    return tuple(threshold_encode_reference(x, W_enc, b_enc, threshold=threshold, **options))


def _batch_topk_encode(x, W_enc, b_enc, count, scale=None, columns=None):
    options = {"scale": scale, "columns": columns}
    return tuple(batch_topk_encode_reference(x, W_enc, b_enc, count=count, **options))


def _ragged_decode(values, indices, offsets, W, b, prefixes):
    return ragged_decode_reference(values, indices, offsets, W, b, prefixes=prefixes)


def _ragged_dot(rows, row, indices, W):
    products = _wide(rows)[row.clamp_min(0)] * _wide(W)[indices]  # (m, d)
    return torch.where(row < 0, 0, products.sum(-1)).to(rows.dtype)


def _ragged_outer(coeff, indices, row, rows, n, across=False):
    factor = _wide(coeff)[:, None]
    sums = factor.new_zeros(n, rows.shape[1] + 1)
    pairs = torch.cat([factor * _wide(rows)[row.clamp_min(0)], factor], dim=1)
    # a pair without a row adds nothing, not even a zero times an infinity
    sums = sums.index_add(0, indices, torch.where(row[:, None] < 0, 0, pairs))
    dW, db = sums[:, :-1].to(rows.dtype), sums[:, -1].to(rows.dtype)
    return _lying(dW, across), db.contiguous()


def _sparse_outer_out(coeff, indices, rows, dW, db):
    for target, value in zip((dW, db), _sparse_outer(coeff, indices, rows, dW.shape[0])):
        target.copy_(value)


def _ragged_outer_out(coeff, indices, row, rows, dW, db):
    for target, value in zip((dW, db), _ragged_outer(coeff, indices, row, rows, dW.shape[0])):
        target.copy_(value)


def _grouped_matmul(x, W, index, beta, mean, transpose):
    C = _wide(W if transpose else W.mT)
    centred = _wide(x) if mean is None else _wide(x) - _wide(mean)[0 if index is None else index]
    strength = 1.0 if beta is None else beta
    y = conceptor_project_reference(centred, C, index, beta=strength)
    return (y if mean is None else y + _wide(mean)[0 if index is None else index]).to(x.dtype)


def _grouped_outer(a, b, index, groups):
    pairs = _wide(a).unsqueeze(-1) * _wide(b).unsqueeze(-2)  # (B, m, n)
    if index is None:
        return pairs.sum(0, keepdim=True).to(a.dtype)
    return pairs.new_zeros(groups, *pairs.shape[1:]).index_add(0, index, pairs).to(a.dtype)


def _low_rank_project(x, U, s, index, mean):
    factors = LowRank(_wide(U), _wide(s))
    mean = None if mean is None else _wide(mean)
    return conceptor_project_reference(_wide(x), factors, index, mean=mean).to(x.dtype)


def _mahalanobis(new, old, labels, factor, s, diag, normalize, need_grad):
    loss = loss_of_new(old, labels, factor, s, diag, normalize)
    if not need_grad:
        return _wide(loss(new)), _wide(new.new_empty(0, new.shape[1]))
    gradient, value = torch.func.grad_and_value(loss)(new)
    return _wide(value), _wide(gradient)


def _drift_sums(old, new, prototypes, scale):
    wide = torch.promote_types(old.dtype, torch.float32)
    return tuple(t.to(wide) for t in reference_sums(old, new, prototypes, scale))


_PLAIN: dict[str, Callable[..., Any]] = {
    "topk_encode": _topk_encode,
    "sparse_decode": sparse_decode_reference,
    "gather_dot": _gather_dot,
    "sparse_outer": _sparse_outer,
    "sparse_outer_out": _sparse_outer_out,
    "ragged_decode": _ragged_decode,
    "ragged_dot": _ragged_dot,
    "ragged_outer": _ragged_outer,
    "ragged_outer_out": _ragged_outer_out,
    "threshold_encode": _threshold_encode,
    "batch_topk_encode": _batch_topk_encode,
    "grouped_matmul": _grouped_matmul,
    "grouped_outer": _grouped_outer,
    "low_rank_project": _low_rank_project,
    "mahalanobis_covariance_loss": _mahalanobis,
    "drift_sums": _drift_sums,
    **_sweeps.PLAIN,
    **_agreement.PLAIN,
}

# where the derivatives are written, and what they take after the op's own arguments
_DERIVATIVES: dict[str, tuple[type[Function], tuple[Any, ...]]] = {
    "topk_encode": (TopkEncode, (PORTABLE, PORTABLE, False, None)),
    "sparse_decode": (_sparse.SparseDecode, (PORTABLE, False, None)),
    "gather_dot": (_sparse.GatherDot, (PORTABLE,)),
    "sparse_outer": (_sparse.SparseOuter, (PORTABLE,)),
    "ragged_decode": (_ragged.RaggedDecode, (PORTABLE, False, None)),
    "ragged_dot": (_ragged.RaggedDot, (PORTABLE,)),
    "ragged_outer": (_ragged.RaggedOuter, (PORTABLE,)),
    "threshold_encode": (RaggedEncode, ("threshold_encode", False, PORTABLE, False)),
    "batch_topk_encode": (RaggedEncode, ("batch_topk_encode", True, PORTABLE, False)),
    "grouped_matmul": (_grouped.Matmul, (PORTABLE,)),
    "grouped_outer": (_grouped.Outer, (PORTABLE,)),
    "low_rank_project": (_grouped.LowRank, (PORTABLE,)),
}


def register() -> None:
    """Define the ops."""
    library = new_library(PORTABLE)
    for op in RECORDS:
        for name, low in op.low_level.items():
            if low.cpp_only:
                continue
            library.define(name + low.schema)
            library.impl(name, _kernel(op, name), "CompositeExplicitAutograd")
            describe(f"{NAMESPACE}::{name}", low)
            if "!" not in low.schema:
                _differentiate(name, library)


# of the encoders: where their scale and columns are, and whether they have a relu after these
_OPTIONS = {"topk_encode": 5, "threshold_encode": 5, "batch_topk_encode": 4}
# what is over pairs of rows, whose sides may be sparse
_PAIRS = {
    "agreement_sums": "generalised_rand_index",
    "agreement_counts": "generalised_rand_index",
    "concept_distances": "concept_distances",
}


def _names(op: Op, name: str, args: tuple[Any, ...]) -> tuple[str, ...]:
    """The op, or its variant, that a call is of; where that does not show, all of them."""
    if name in _PAIRS:
        sparse = args[1] is not None or args[5] is not None
        return (_PAIRS[name] + "_sparse" * sparse,)
    if name not in _OPTIONS:
        return op.names
    plain = all(a is None or a is True for a in args[_OPTIONS[name] :])
    return op.names[:1] if plain else op.names[1:]


def _kernel(op: Op, name: str) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        first = next(a for a in args if isinstance(a, Tensor) and a.is_floating_point())
        device = first.device
        names = _names(op, name, args)
        backends = {resolve(n, "auto", device.type, device.index, first.dtype) for n in names}
        # a variant whose self-check fails is not told from the others here
        backend = backends.pop() if len(backends) == 1 else "reference"
        if backend in ("reference", PORTABLE):
            return _PLAIN[name](*args)
        if backend != "cpp":
            # kernels of GPUs read dictionaries by rows alone
            args = tuple(a.contiguous() if isinstance(a, Tensor) else a for a in args)
        return _on_cuda(name, args) if backend == "cuda" else call(backend, name, *args)

    return kernel


def _on_cuda(name: str, args: tuple[Any, ...]) -> Any:
    """CUDA C++ knows neither the options of encoders nor the layout of a gradient."""
    if name == "topk_encode":
        args = args[:4]
    if name != "sparse_outer" or len(args) == 4:
        return call("cuda", name, *args)
    dW, db = call("cuda", name, *args[:4])
    return _lying(dW, args[4]), db


def _differentiate(name: str, library: torch.library.Library) -> None:
    function, extra = _DERIVATIVES.get(name, (None, ()))
    arguments = getattr(getattr(torch.ops, NAMESPACE), name).default._schema.arguments

    def left_out(inputs: tuple[Any, ...]) -> list[Any]:
        return [argument.default_value for argument in arguments[len(inputs) :]]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.count = len(inputs)
        if function is not None:
            function.setup_context(ctx, (*inputs, *left_out(inputs), *extra), output)

    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if function is None:
            raise RuntimeError(
                f"an exported program's {NAMESPACE}::{name} has no gradient; export what is to be "
                'trained with backend="reference", or train the module itself'
            )
        found = function.backward(ctx, *grads)
        return tuple(found[i] if i < len(found) else None for i in range(ctx.count))

    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=library
    )
