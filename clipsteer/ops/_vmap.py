"""Rules of ``torch.vmap`` for the low-level ops, from what their records say of the arguments.

An op of independent rows takes the batch as more rows; sums over groups of rows take it as more
groups. What remains (weights of each instance its own, losses of a batch) runs one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clipsteer.ops._record import LowLevel

Rule = Callable[..., tuple[Any, Any]]


def rule(op: Callable[..., Any], low: LowLevel) -> Rule:
    """What ``torch.library.register_vmap`` takes for the low-level ``op``."""

    def batched(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        moved = list(args)
        # of an argument that is a list there is a list
        own = {i for i, dim in enumerate(in_dims) if isinstance(dim, int)}
        for i in own:
            moved[i] = args[i].movedim(in_dims[i], 0)
        if own <= set(low.rows):
            if low.groups is None:
                return _more_rows(op, low, size, own, moved)
            return _more_groups(op, low, size, own, moved)
        each = []
        for v in range(size):
            output = op(*(a[v].contiguous() if i in own else a for i, a in enumerate(moved)))
            each.append(output if isinstance(output, tuple) else (output,))
        stacked = tuple(torch.stack(parts) for parts in zip(*each))
        return _outputs(stacked)

    return batched


def _outputs(outputs: tuple[Tensor, ...]) -> tuple[Any, Any]:
    """As the op has them, with their first dimension named as the batch's."""
    return (outputs[0], 0) if len(outputs) == 1 else (outputs, (0,) * len(outputs))


def _folded(t: Tensor, size: int, batched: bool) -> Tensor:
    """(V, B, …), or (B, …) for each of V = ``size``: (V·B, …)."""
    if not batched:
        t = t.expand(size, *t.shape)
    return t.reshape(size * t.shape[1], *t.shape[2:]).contiguous()


def _more_rows(
    op: Callable[..., Any],
    low: LowLevel,
    size: int,
    own: set[int],
    args: list[Any],
) -> tuple[Any, Any]:
    for i in low.rows:
        if args[i] is not None:
            args[i] = _folded(args[i], size, i in own)
    outputs = op(*args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return _outputs(tuple(t.unflatten(0, (size, t.shape[0] // size)) for t in outputs))


def _more_groups(
    op: Callable[..., Any],
    low: LowLevel,
    size: int,
    own: set[int],
    args: list[Any],
) -> tuple[Any, Any]:
    assert low.groups is not None
    index, count = low.groups
    groups = args[count]
    rows = args[low.rows[0]].shape[1 if low.rows[0] in own else 0]
    if args[index] is None:  # one group
        args[index] = args[low.rows[0]].new_zeros(rows, dtype=torch.int64)
        own = own - {index}
    for i in low.rows:
        args[i] = _folded(args[i], size, i in own)
    first = torch.arange(size, device=args[index].device).repeat_interleave(rows) * groups
    args[index] = args[index] + first.reshape(-1, *[1] * (args[index].dim() - 1))
    args[count] = groups * size
    outputs = op(*args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return _outputs(tuple(t.unflatten(0, (size, groups)) for t in outputs))
