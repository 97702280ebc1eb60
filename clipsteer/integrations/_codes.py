"""Codes and pre-activations as the trainers of other libraries handle them; see ``_on_demand``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.integrations._memory import gradient_buffer
from clipsteer.integrations._on_demand import OnDemand, takes, waits
from clipsteer.ops._ragged import SparseCodes, code_rows
from clipsteer.ops.sparse_decode import sparse_decode
from clipsteer.ops.topk_encode import topk_encode


class Codes(OnDemand):
    """A code (…, n) that is 0 but at a few features of each row.

    ``offsets`` is None where each row has k of them, ``values`` and ``indices`` (…, k); else the
    three are ragged codes of (B, n). ``for_decoder`` are the values that a decoder multiplies,
    where they differ from those that are seen.
    """

    values: Tensor  # type: ignore[assignment]
    indices: Tensor  # type: ignore[assignment]
    offsets: Tensor | None
    for_decoder: Tensor | None
    levels: Tensor | None  # what a Matryoshka SAE has decoded of them

    @classmethod
    def of(
        cls,
        values: Tensor,  # (…, k), or (m,)
        indices: Tensor,  # like values
        offsets: Tensor | None,  # (B + 1,)
        n: int,
        for_decoder: Tensor | None = None,  # like values
    ) -> Codes:
        """The code that has these values at these features."""
        rows = values.shape[:-1] if offsets is None else (offsets.shape[0] - 1,)

        def make(values: Tensor) -> Tensor:
            if offsets is None:
                return values.new_zeros(*rows, n).scatter(-1, indices, values)
            row = code_rows(SparseCodes(values, indices, offsets))
            # padding goes to a row of its own
            zeros = values.new_zeros(rows[0] + 1, n)
            return zeros.index_put((row, indices), values)[:-1]

        codes: Codes = cls.promise((*rows, n), values.dtype, make, values)
        codes.values = values
        codes.indices = indices
        codes.offsets = offsets
        codes.for_decoder = for_decoder
        codes.levels = None
        return codes

    def like(self, values: Tensor) -> Codes:
        """Other values at the same features."""
        return Codes.of(values, self.indices, self.offsets, self.shape[-1])

    def decode(
        self,
        W: Tensor,  # (n, d)
        values: Tensor | None = None,  # like self.values
        prefixes: Sequence[int] | None = None,
    ) -> Tensor:
        """The values that are seen, or others in their place, times the dictionary."""
        return sparse_decode(
            self.values if values is None else values,
            self.indices,
            W,
            offsets=self.offsets,
            prefixes=prefixes,
            grad_buffer=gradient_buffer(W),
        )

    def between(self, start: int, stop: int) -> Codes:
        """Columns start to stop, of two dimensions."""
        rows = self.shape[0]
        there = (self.indices >= start) & (self.indices < stop)
        if self.offsets is None:
            order = torch.argsort(self.indices, dim=-1)
            there = there.gather(-1, order)
            counts = there.sum(-1)
            values = self.values.gather(-1, order)[there]
            indices = self.indices.gather(-1, order)[there]
        else:
            row = code_rows(SparseCodes(self.values, self.indices, self.offsets))
            there = there & (row < rows)
            counts = torch.bincount(row[there], minlength=rows)
            values = self.values[there]
            indices = self.indices[there]
        offsets = F.pad(counts.cumsum(0), (1, 0))
        return Codes.of(values, indices - start, offsets, stop - start)


class Preactivations(OnDemand):
    """(x Wᵀ + b)·scale, or its ReLU, (…, n); -inf where a mask is not set."""

    x: Tensor
    W: Tensor
    b: Tensor | None
    scale: Tensor | None
    relu: bool  # type: ignore[assignment]
    mask: Tensor | None
    near: SparseCodes | None  # those about a threshold

    @classmethod
    def of(
        cls,
        x: Tensor,  # (…, d)
        W: Tensor,  # (n, d)
        b: Tensor | None,  # (n,)
        dtype: torch.dtype,
        *,
        scale: Tensor | None = None,  # (n,)
        relu: bool = False,
        mask: Tensor | None = None,  # (n,) bool
    ) -> Preactivations:
        """All pre-activations, of ``dtype``."""

        def make(x: Tensor, W: Tensor, b: Tensor | None, scale: Tensor | None) -> Tensor:
            pre = F.linear(x, W, b)
            pre = pre if scale is None else pre * scale
            pre = torch.relu(pre) if relu else pre
            return pre if mask is None else torch.where(mask, pre, -torch.inf)

        found: Preactivations = cls.promise(
            (*x.shape[:-1], W.shape[0]), dtype, make, x, W, b, scale
        )
        found.x = x
        found.W = W
        found.b = b
        found.scale = scale
        found.relu = relu
        found.mask = mask
        found.near = None
        return found

    def between(self, start: int, stop: int) -> Preactivations:
        """Columns start to stop."""
        b, scale, mask = (
            None if t is None else t[start:stop] for t in (self.b, self.scale, self.mask)
        )
        W = self.W[start:stop]
        return Preactivations.of(self.x, W, b, self.dtype, scale=scale, relu=self.relu, mask=mask)

    def largest(self, k: int) -> tuple[Tensor, Tensor]:
        """The k largest of each row among those that the mask sets, and where they are."""
        columns = None if self.mask is None else self.mask.nonzero().flatten()
        values, indices = topk_encode(
            self.x,
            self.W,
            self.b,
            k=k,
            relu=self.relu,
            scale=self.scale,
            columns=columns,
            grad_buffer=gradient_buffer(self.W),
        )
        return values.to(self.dtype), indices


def _is_zero(other: Any) -> bool:
    return isinstance(other, (int, float)) and other == 0


@takes(Tensor.bool)
def _bool(codes: Any) -> Any:
    return codes.like(codes.values.bool()) if waits(codes, Codes) else NotImplemented


@takes(Tensor.float)
def _float(codes: Any) -> Any:
    return codes.like(codes.values.float()) if waits(codes, Codes) else NotImplemented


@takes(Tensor.gt, Tensor.__gt__, torch.gt)
def _gt(codes: Any, other: Any) -> Any:
    fits = waits(codes, Codes) and _is_zero(other)
    return codes.like(codes.values > 0) if fits else NotImplemented


@takes(Tensor.ne, Tensor.__ne__, torch.ne)
def _ne(codes: Any, other: Any) -> Any:
    fits = waits(codes, Codes) and _is_zero(other)
    return codes.like(codes.values != 0) if fits else NotImplemented


@takes(Tensor.any, torch.any)
def _any(codes: Any, *options: Any) -> Any:
    return codes.values.any() if waits(codes, Codes) and not options else NotImplemented


@takes(Tensor.sum, torch.sum)
def _sum(codes: Any, dim: Any = None, **options: Any) -> Any:
    if options or not waits(codes, Codes) or codes.dim() != 2 or dim not in (0, 1, -1, -2):
        return NotImplemented
    values = codes.values
    if not values.dtype.is_floating_point:
        values = values.long()
    rows, n = codes.shape
    if dim in (0, -2):
        return values.new_zeros(n).index_add(0, codes.indices.flatten(), values.flatten())
    if codes.offsets is None:
        return values.sum(-1)
    row = code_rows(SparseCodes(values, codes.indices, codes.offsets))
    return values.new_zeros(rows + 1).index_add(0, row, values)[:-1]


@takes(Tensor.matmul, Tensor.__matmul__, torch.matmul)
def _matmul(codes: Any, W: Any) -> Any:
    fits = waits(codes, Codes) and not isinstance(W, OnDemand) and W.dim() == 2
    return codes.decode(W) if fits else NotImplemented


@takes(F.linear)
def _linear(codes: Any, weight: Any, bias: Any = None) -> Any:
    fits = waits(codes, Codes) and not isinstance(weight, OnDemand)
    if not fits:
        return NotImplemented
    found = codes.decode(weight.t())
    return found if bias is None else found + bias


@takes(Tensor.__getitem__)
def _getitem(t: Any, at: Any) -> Any:
    if not (waits(t, Codes) or waits(t, Preactivations)) or t.dim() != 2:
        return NotImplemented
    if waits(at, Codes) and waits(t, Codes) and at.indices is t.indices and t.offsets is not None:
        # features ascend in a row: the order of the dense tensor
        return t.values[at.values]
    if isinstance(at, tuple) and len(at) == 2 and all(isinstance(part, slice) for part in at):
        rows, columns = at
        if rows == slice(None) and columns.step in (None, 1):
            start, stop, _ = columns.indices(t.shape[1])
            return t.between(start, max(start, stop))
    return NotImplemented


@takes(torch.split, Tensor.split)
def _split(codes: Any, sizes: Any, dim: int = 0) -> Any:
    fits = waits(codes, Codes) and isinstance(sizes, Sequence) and dim in (1, -1)
    if not fits or codes.dim() != 2 or sum(sizes) != codes.shape[1]:
        return NotImplemented
    starts = [sum(sizes[:group]) for group in range(len(sizes))]
    return tuple(codes.between(start, start + size) for start, size in zip(starts, sizes))


@takes(torch.where)
def _where(mask: Any, pre: Any = None, other: Any = None) -> Any:
    if not waits(pre, Preactivations) or pre.mask is not None or isinstance(mask, OnDemand):
        return NotImplemented
    if not isinstance(other, float) or other != -math.inf:
        return NotImplemented
    if mask.dtype != torch.bool or mask.numel() != pre.shape[-1] or mask.shape[-1] != mask.numel():
        return NotImplemented
    return Preactivations.of(
        pre.x,
        pre.W,
        pre.b,
        pre.dtype,
        scale=pre.scale,
        relu=pre.relu,
        mask=mask.flatten(),
    )


@takes(Tensor.topk, torch.topk)
def _topk(pre: Any, k: Any, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    if not waits(pre, Preactivations) or dim not in (-1, pre.dim() - 1) or not largest:
        return NotImplemented
    k = int(k)
    there = pre.shape[-1] if pre.mask is None else int(pre.mask.sum())
    if not 1 <= k <= there:
        return NotImplemented
    values, indices = pre.largest(k)
    indices.no_feature_twice = True  # type: ignore[attr-defined]
    return torch.return_types.topk((values, indices))


@takes(torch.zeros_like)
def _zeros_like(pre: Any, **options: Any) -> Any:
    if options or not waits(pre, Preactivations):
        return NotImplemented
    none = torch.empty(*pre.shape[:-1], 0, dtype=pre.dtype, device=pre.device)
    return Codes.of(none, none.long(), None, pre.shape[-1])


@takes(Tensor.scatter_)
def _scatter_(zeros: Any, dim: int, index: Any, src: Any, **options: Any) -> Any:
    if options or not waits(zeros, Codes) or dim not in (-1, zeros.dim() - 1):
        return NotImplemented
    fits = zeros.values.shape[-1] == 0 and zeros.offsets is None and isinstance(src, Tensor)
    if not fits or isinstance(src, OnDemand) or index.shape != src.shape:
        return NotImplemented
    if not getattr(index, "no_feature_twice", False):
        return NotImplemented  # of two values at one feature scatter_ keeps one, a code both
    if index.shape[:-1] != zeros.shape[:-1] or src.dtype != zeros.dtype:
        return NotImplemented
    # what was zeros is the codes from now on
    zeros.moved = Codes.of(src, index, None, zeros.shape[-1])
    return zeros.moved
