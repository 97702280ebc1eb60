"""The base of the ops' ``autograd.Function``s: ``torch.func`` takes them, and a plain call does not
pay for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from clipsteer.ops._calls import step, transformed


def has_tangents() -> bool:
    """Whether tensors may carry tangents of forward-mode differentiation."""
    return forward_ad._current_level >= 0


def tracked(*tensors: Tensor | None) -> bool:
    """Whether autograd, or a transform, has to know what is computed from these.

    Inside a transform a tensor tells of the innermost one alone, and a tangent shows in no flag, so
    there the answer is yes.
    """
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return transformed() or has_tangents()


class Function:
    """An ``autograd.Function`` to be written as ``torch.func`` wants it: ``forward`` without a
    context, ``setup_context``, ``backward`` and, where the formula has it, ``jvp``. ``run`` applies
    it.

    The low-level ops have rules for vmap, so whatever is made of them has one, too.
    """

    _transformable: type[torch.autograd.Function]
    _eager: type[torch.autograd.Function]
    _traced: type[torch.autograd.Function]

    def __init_subclass__(cls) -> None:
        forward = cls.forward
        setup_context = cls.setup_context

        def combined(ctx: Any, *inputs: Any) -> Any:
            output = forward(*inputs)
            setup_context(ctx, inputs, output)
            return output

        parts = {name: vars(cls)[name] for name in ("forward", "setup_context", "backward")}
        jvp = {"jvp": staticmethod(cls.jvp)}
        # torch reads the signature of a forward without a context at every call, which takes as
        # long as a small op, 25 µs
        plain = {"forward": staticmethod(combined), "backward": parts["backward"]}

        def function(attributes: dict[str, Any]) -> type[torch.autograd.Function]:
            return type(cls.__name__, (torch.autograd.Function,), attributes)

        cls._transformable = function({**parts, **jvp, "generate_vmap_rule": True})
        cls._eager = function({**plain, **jvp})
        cls._traced = function(plain)

    @classmethod
    def run(cls, *inputs: Any) -> Any:
        """``forward``'s output, differentiable."""
        if torch.compiler.is_compiling():
            if not (transformed() or has_tangents()):
                return cls._traced.apply(*inputs)
            # dynamo takes no jvp, and where it sees none it makes tangents of zeros
            torch._dynamo.graph_break(msg='torch.func needs eager mode, or backend="reference"')
        if transformed():
            return cls._transformable.apply(*inputs)
        return step(cls._eager.apply, *inputs)

    @staticmethod
    def forward(*inputs: Any) -> Any:
        """The output."""
        raise NotImplementedError

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep for the derivatives what they take."""
        raise NotImplementedError

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """The gradients of all inputs."""
        raise NotImplementedError

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        """The tangents of all outputs."""
        raise RuntimeError(
            'this derivative has no forward mode on a compiled backend; backend="reference" has it'
        )


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """Keep tensors for ``backward`` and for ``jvp``; vmap wants them to be the same."""
    ctx.save_for_backward(*tensors)
    if has_tangents():
        ctx.save_for_forward(*tensors)


def total(*terms: Tensor | None) -> Tensor | None:
    """The sum of the terms that are there."""
    found = [t for t in terms if t is not None]
    return sum(found[1:], found[0]) if found else None
