"""How the processes that train one SAE share the work of a step.

Sums      every process trains on its rows, and the gradients are summed: dictionaries are exchanged
Codes     every process encodes its rows, and codes are exchanged; what follows from them is cheap,
          and is done for the rows of all by every process, which so has the gradient of all
Features  every process holds and trains its share of the features, for the rows of all
          (``clipsteer.sae.shard``): candidates, parts of what is decoded and rows are exchanged

With Codes and Features the losses see the joint batch, as one process sees it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from clipsteer import ops
from clipsteer.ops import SparseCodes
from clipsteer.ops._check import autocast
from clipsteer.ops._chosen import chosen
from clipsteer.ops.jumprelu_encode import JumpReLUCodes, jumped
from clipsteer.sae.model import SAE
from clipsteer.sae.selection import kept_of_batch, kept_of_rows, only, ragged
from clipsteer.training.world import JointBatch, World


class Sums:
    """One process, or several that sum what they have.

    ``view`` is the world as the losses see it.
    """

    def __init__(self, sae: SAE, world: World) -> None:
        self.sae = sae
        self.world = world
        self.view = world
        # of a figure that every process has
        self.share = 1.0

    def rows(
        self,
        x: Tensor,  # (B, d_in) of this process
        target: Tensor,  # (B, d_out), or x itself
    ) -> tuple[Tensor, Tensor]:
        """Those that the losses see."""
        return x, target

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """While the SAE encodes and decodes."""
        yield

    def total(self, figure: Tensor) -> Tensor:
        """The sum over all features, given that over this process's; differentiable."""
        return figure

    def place(self, features: Tensor) -> tuple[int, int]:
        """Of a list of features in all processes' shares: how many there are before those of this
        process, and how many in all."""
        return 0, len(features)

    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """What a process has, to what all have; in place."""
        for gradient in gradients:
            self.world.sum_(gradient)

    def norm(self, gradients: Sequence[Tensor], spread: Sequence[bool]) -> Tensor:
        """That of all elements; ``spread`` are those of which each process has a part."""
        return torch.nn.utils.get_total_norm(list(gradients))


class _Here(World):
    """The processes as the losses see them where each has the rows of all."""

    def __init__(self, world: World) -> None:
        self.device = world.device
        self.rank = 0
        self.size = 1


class _Joint(Sums):
    def __init__(self, sae: SAE, world: World) -> None:
        super().__init__(sae, world)
        self.view = _Here(world)
        self.share = 1 / world.size
        self.batch = JointBatch.of([1] * world.size, world)

    def rows(
        self,
        x: Tensor,  # (B, d_in) of this process
        target: Tensor,  # (B, d_out), or x itself
    ) -> tuple[Tensor, Tensor]:
        """Those of all processes, in rank order."""
        self.batch = JointBatch(self.world, len(x))
        if target is x:
            x = self.batch.join(x)
            return x, x
        x, target = self.batch.join_all(x, target)
        return x, target

    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Nothing: they are those of all rows."""


class Codes(_Joint):
    """See the module."""

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """With encoders that look at this process's rows alone."""
        self.sae._ops = RowOps(self.batch)
        try:
            yield
        finally:
            del self.sae._ops


class Features(_Joint):
    """See the module."""

    def total(self, figure: Tensor) -> Tensor:
        """Over the processes."""
        return cast(Tensor, _Sum.apply(figure, self.world))

    def place(self, features: Tensor) -> tuple[int, int]:
        """Over the processes, in rank order."""
        counts = self.world.counts(len(features))
        return sum(counts[: self.world.rank]), sum(counts)

    def norm(self, gradients: Sequence[Tensor], spread: Sequence[bool]) -> Tensor:
        """What lies spread is summed over the processes."""
        squares = [torch.linalg.vector_norm(grad).square() for grad in gradients]
        zero = squares[0].new_zeros(())
        here = sum((s for s, parts in zip(squares, spread) if parts), zero)
        everywhere = sum((s for s, parts in zip(squares, spread) if not parts), zero)
        return (self.world.sum_(here.clone()) + everywhere).sqrt()


class RowOps:
    """The ops of an SAE on the rows of all processes, of which each encodes its own.

    The codes are selected by the process whose rows they are of, and exchanged; their values, and
    all that is made of them, have the gradient of all rows in every process.
    """

    def __init__(self, batch: JointBatch) -> None:
        self.batch = batch
        self.sparse_decode = ops.sparse_decode
        self.ragged_decode = ops.ragged_decode

    def topk_encode(
        self,
        x: Tensor,  # (B, d_in) of all processes
        W_enc: Tensor,
        b_enc: Tensor | None = None,
        *,
        sparse_grad: bool = False,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """``ops.topk_encode``."""
        with torch.no_grad():
            acts, indices = ops.topk_encode(self.batch.own(x), W_enc, b_enc, **options)
            acts, narrow = self.batch.join_all(acts, indices.int())
        codes = (acts, narrow.long())
        return chosen(x, W_enc, b_enc, codes, sparse_grad=sparse_grad)

    def threshold_encode(
        self,
        x: Tensor,  # (B, d_in) of all processes
        W_enc: Tensor,
        b_enc: Tensor | None = None,
        *,
        relu: bool = True,
        sparse_grad: bool = False,
        **options: Any,
    ) -> SparseCodes:
        """``ops.threshold_encode``."""
        with torch.no_grad():
            codes = ops.threshold_encode(self.batch.own(x), W_enc, b_enc, relu=False, **options)
            codes = self._joined(codes)
        codes = chosen(x, W_enc, b_enc, codes, sparse_grad=sparse_grad)
        return codes._replace(values=torch.relu(codes.values)) if relu else codes

    def jumprelu_encode(
        self,
        x: Tensor,  # (B, d_in) of all processes
        W_enc: Tensor,
        b_enc: Tensor | None = None,
        *,
        threshold: Tensor,  # () or (d_sae,)
        bandwidth: float,
        **options: Any,
    ) -> JumpReLUCodes:
        """``ops.jumprelu_encode``."""
        level = threshold.detach() - bandwidth / 2
        codes = self.threshold_encode(x, W_enc, b_enc, threshold=level, relu=False, **options)
        return jumped(codes, threshold, bandwidth)

    def batch_topk_encode(
        self,
        x: Tensor,  # (B, d_in) of all processes
        W_enc: Tensor,
        b_enc: Tensor | None = None,
        *,
        count: int,
        sparse_grad: bool = False,
        **options: Any,
    ) -> SparseCodes:
        """``ops.batch_topk_encode``, the largest of all processes' rows."""
        with torch.no_grad():
            own = self.batch.own(x)
            most = min(count, len(own) * W_enc.shape[0])
            codes = ops.batch_topk_encode(own, W_enc, b_enc, count=most, **options)
            codes = only(codes, kept_of_batch(codes, count, self.batch.world, by_row=False))
            codes = self._joined(codes)
        return chosen(x, W_enc, b_enc, codes, sparse_grad=sparse_grad)

    def _joined(self, codes: SparseCodes) -> SparseCodes:
        """Codes of this process's rows to those of all."""
        (lengths,) = self.batch.join_all(codes.offsets.diff())
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        ends = offsets[torch.tensor(self.batch.counts).cumsum(0)].tolist()
        numbers = [end - start for start, end in zip([0, *ends], ends)]
        mine = numbers[self.batch.world.rank]
        joint = JointBatch.of(numbers, self.batch.world)
        narrow = codes.indices[:mine].int()
        values, narrow = joint.join_all(codes.values[:mine], narrow)
        return codes._replace(values=values, indices=narrow.long(), offsets=offsets)


class FeatureOps:
    """The ops of an SAE whose features lie over the processes, on rows that all of them have.

    What an encoder gives are the codes of this process's features; what a decoder gives is the sum
    over all of them.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.threshold_encode = ops.threshold_encode
        self.jumprelu_encode = ops.jumprelu_encode

    def topk_encode(
        self,
        x: Tensor,  # (B, d_in)
        W_enc: Tensor,  # (n, d_in) of this process
        b_enc: Tensor | None = None,
        *,
        k: int,
        columns: Tensor | None = None,  # (m,) of this process's features
        sparse_grad: bool = False,
        **options: Any,
    ) -> SparseCodes:
        """The codes that are among the k largest of their row in all processes; those that are 0
        are left out."""
        with torch.no_grad():
            here = min(k, W_enc.shape[0] if columns is None else len(columns))
            options["columns"] = columns
            # of one dtype in all processes
            acts = autocast(x)[0].new_zeros(len(x), 0)
            indices = torch.zeros(len(x), 0, dtype=torch.int64, device=x.device)
            if here:
                acts, indices = ops.topk_encode(x, W_enc, b_enc, k=here, **options)
            codes = ragged(acts, indices, kept_of_rows(acts, k, self.world))
        return chosen(x, W_enc, b_enc, codes, sparse_grad=sparse_grad)

    def batch_topk_encode(
        self,
        x: Tensor,  # (B, d_in)
        W_enc: Tensor,  # (n, d_in) of this process
        b_enc: Tensor | None = None,
        *,
        count: int,
        sparse_grad: bool = False,
        **options: Any,
    ) -> SparseCodes:
        """The codes that are among the ``count`` largest of all processes."""
        with torch.no_grad():
            most = min(count, len(x) * W_enc.shape[0])
            codes = ops.batch_topk_encode(x, W_enc, b_enc, count=most, **options)
            codes = only(codes, kept_of_batch(codes, count, self.world, by_row=True))
        return chosen(x, W_enc, b_enc, codes, sparse_grad=sparse_grad)

    def sparse_decode(
        self,
        acts: Tensor,
        indices: Tensor,
        W_dec: Tensor,
        b_dec: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """``ops.sparse_decode``."""
        return self.summed(ops.sparse_decode(acts, indices, W_dec, **options), b_dec)

    def ragged_decode(
        self,
        values: Tensor,
        indices: Tensor,
        offsets: Tensor,
        W_dec: Tensor,
        b_dec: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """``ops.ragged_decode``."""
        part = ops.ragged_decode(values, indices, offsets, W_dec, **options)
        return self.summed(part, b_dec)

    def summed(
        self,
        part: Tensor,  # (..., d)
        b_dec: Tensor | None = None,  # (d,)
    ) -> Tensor:
        """What all processes decode; it has its whole gradient in each of them."""
        whole = cast(Tensor, _Sum.apply(part, self.world))
        return whole if b_dec is None else whole + b_dec


class _Sum(torch.autograd.Function):
    """The sum over the processes, of whose terms each has the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, world: World) -> Tensor:
        return world.sum_(part.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class SumGradient(torch.autograd.Function):
    """A tensor that all processes have and use each in its own way: its gradient is the sum of
    theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, world: World) -> Tensor:
        ctx.world = world
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.world.sum_(grad.clone(memory_format=torch.contiguous_format)), None
