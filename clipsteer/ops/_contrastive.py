"""What is differentiable of the contrastive losses: the value by sweeps over tiles of similarities,
its gradient by more of them, and the derivatives of that by the definition in plain torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipsteer.ops._autograd import Function, has_tangents, save, total, tracked
from clipsteer.ops._calls import transformed

Needs = tuple[bool, ...]


class Kind(NamedTuple):
    """A contrastive loss. ``arguments`` is all that it takes, the tensors (or None) first."""

    # (arguments, needs, backend, world) -> the losses, what else is an output, and what the
    # gradient takes
    evaluate: Callable[..., tuple[Tensor, ...]]
    # (a cotangent of each loss, what follows on the losses, arguments, needs, backend, world) ->
    # of each leaf, anything where it is not needed
    gradient: Callable[..., tuple[Tensor, ...]]
    # (*arguments) -> the outputs, in plain torch
    reference: Callable[..., tuple[Tensor, ...]]
    tensors: int  # how many of the arguments are
    leaves: tuple[int, ...]  # which of them have a gradient
    losses: int = 1
    outputs: int = 1


KINDS: dict[str, Kind] = {}


def _alone(kind: str, world: Any) -> None:
    if world is not None:
        what = "over several processes it has first derivatives by backward only"
        raise RuntimeError(f"{kind}: {what}; use a single one")


class Value(Function):
    """The losses of ``KINDS[kind]``."""

    @staticmethod
    def forward(kind, backend, world, needs, *arguments):
        return KINDS[kind].evaluate(arguments, needs, backend, world)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.kind, ctx.backend, ctx.world, ctx.needs, *arguments = inputs
        kind = KINDS[ctx.kind]
        rest = output[kind.losses :]
        ctx.rest = len(rest)
        save(ctx, *rest, *arguments[: kind.tensors])
        ctx.numbers = arguments[kind.tensors :]
        ctx.mark_non_differentiable(*rest)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads):
        kind = KINDS[ctx.kind]
        count = kind.tensors + len(ctx.numbers)
        cotangents = grads[: kind.losses]
        given = [g for g in cotangents if g is not None]
        if not given:
            return (None,) * (4 + count)
        if len(given) < kind.losses:
            cotangents = [torch.zeros_like(given[0]) if g is None else g for g in cotangents]
        settings = (ctx.kind, ctx.backend, ctx.world, ctx.needs, ctx.rest)
        saved = ctx.saved_tensors  # unpacked anew whenever they are asked for
        # a backward of its own takes as long as a small batch's sweeps
        gradient = Gradient.run if tracked(*cotangents, *saved) else Gradient.forward
        found = gradient(*settings, *cotangents, *saved, *ctx.numbers)
        by_argument = [None] * count
        for leaf, grad, needed in zip(kind.leaves, found, ctx.needs):
            by_argument[leaf] = grad if needed else None
        return None, None, None, None, *by_argument

    @staticmethod
    def jvp(ctx, kind, backend, world, needs, *tangents):
        _alone(ctx.kind, ctx.world)
        kind = KINDS[ctx.kind]
        one = ctx.saved_tensors[0].new_ones(())
        settings = (ctx.kind, ctx.backend, ctx.world, ctx.needs, ctx.rest)
        moved = []
        for number in range(kind.losses):
            cotangents = [one if i == number else torch.zeros_like(one) for i in range(kind.losses)]
            # through what knows that the gradients move, too
            grads = Gradient.run(*settings, *cotangents, *ctx.saved_tensors, *ctx.numbers)
            pairs = zip(grads, (tangents[leaf] for leaf in kind.leaves))
            along = [(g * t).sum(dtype=one.dtype) for g, t in pairs if t is not None]
            moved.append(total(*along))
        return *moved, *[None] * ctx.rest


class Gradient(Function):
    """The gradients of the leaves; the derivatives of that are the reference's."""

    @staticmethod
    def forward(kind, backend, world, needs, rest, *given):
        losses = KINDS[kind].losses
        after = losses + rest
        parts = (given[:losses], given[losses:after], given[after:])
        return KINDS[kind].gradient(*parts, needs, backend, world)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.kind, _, ctx.world, ctx.needs, ctx.rest, *given = inputs
        kind = KINDS[ctx.kind]
        first = kind.losses + ctx.rest
        tensors = given[first : first + kind.tensors]
        save(ctx, *given[: kind.losses], *tensors)
        ctx.numbers = given[first + kind.tensors :]

    @staticmethod
    def backward(ctx, *outer):
        _alone(ctx.kind, ctx.world)
        kind = KINDS[ctx.kind]
        first, given = _first(kind, ctx.saved_tensors, ctx.numbers)

        def along(*given: Tensor) -> Tensor:
            pairs = zip(first(*given), outer, ctx.needs)
            return sum((g * o).sum() for g, o, needed in pairs if needed)

        found = torch.func.grad(along, argnums=tuple(range(len(given))))(*given)
        by_argument = [None] * (kind.tensors + len(ctx.numbers))
        for leaf, grad in zip(kind.leaves, found[kind.losses :]):
            by_argument[leaf] = grad
        return *[None] * 5, *found[: kind.losses], *[None] * ctx.rest, *by_argument

    @staticmethod
    def jvp(ctx, *tangents):
        _alone(ctx.kind, ctx.world)
        kind = KINDS[ctx.kind]
        first, given = _first(kind, ctx.saved_tensors, ctx.numbers)
        offset = 5 + kind.losses + ctx.rest
        moves = [*tangents[5 : 5 + kind.losses], *(tangents[offset + i] for i in kind.leaves)]
        moves = [torch.zeros_like(x) if t is None else t for x, t in zip(given, moves)]
        return tuple(torch.func.jvp(first, given, tuple(moves))[1])


def _first(
    kind: Kind,
    saved: tuple[Tensor, ...],
    numbers: list[Any],
) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """The reference's gradients as a function of cotangents and leaves, and what these are; the
    rest stands."""
    cotangents = saved[: kind.losses]
    tensors = saved[kind.losses :]

    def first(*given: Tensor) -> tuple[Tensor, ...]:
        weights = given[: kind.losses]

        def loss(*leaves: Tensor) -> Tensor:
            moved = [*tensors, *numbers]
            for i, leaf in zip(kind.leaves, leaves):
                moved[i] = leaf
            outputs = kind.reference(*moved)
            terms = [w * x for w, x in zip(weights, outputs)]
            return sum(terms[1:], terms[0])

        leaves = given[kind.losses :]
        return torch.func.grad(loss, argnums=tuple(range(len(leaves))))(*leaves)

    return first, (*cotangents, *(tensors[i] for i in kind.leaves))


def contrast(kind: str, arguments: tuple[Any, ...], backend: str, world: Any = None) -> Any:
    """Checked arguments through the definition or the sweeps, differentiable if something asks for
    it: the outputs."""
    what = KINDS[kind]
    first = arguments[0]
    leaves = [arguments[i] for i in what.leaves]
    device = first.device.type
    # inside its region autocast would take the reference's float32 products to halves
    casting = device != "meta" and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if casting else contextlib.nullcontext():
        if backend == "reference" and world is None:
            return what.reference(*arguments)
        if tracked(*leaves):
            # inside a transform, and with a tangent, all of them
            every = transformed() or has_tangents()
            needs = tuple(every or t.requires_grad for t in leaves)
            found = Value.run(kind, backend, world, needs, *arguments)
        else:
            found = what.evaluate(arguments, (False,) * len(leaves), backend, world)
        return found[: what.outputs]
