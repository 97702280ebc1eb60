"""Dense tensors that are built when somebody looks at them.

A trainer of another library hands dense codes (B, n) and pre-activations (B, n) about and looks at
little of them. ``Codes`` and ``Preactivations`` stand for such tensors: a few functions of torch,
those in ``FAST``, take the sparse form; every other one gets the dense tensor. Both ways have the
same values and gradients. Once the dense tensor is built it is what counts, so that nothing which
changes it in place is lost; and where what it is made of has changed before, it cannot be
built any more and says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

# what takes the sparse form, of a function of torch; NotImplemented leaves it to the dense tensor
FAST: dict[Any, Callable[..., Any]] = {}

# what reads memory, of which a tensor that is not built has none
OF_MEMORY = {
    Tensor.__array__,
    Tensor.data_ptr,
    Tensor.numpy,
    Tensor.tolist,
    Tensor.untyped_storage,
}


class OnDemand(Tensor):
    """A dense tensor, made of ``sources`` by ``_make`` at first use."""

    sources: tuple[Tensor | None, ...]
    versions: list[int | None]  # of the sources, when it was promised
    make: Callable[..., Tensor]
    built: Tensor | None
    moved: OnDemand | None  # what stands in its place after scatter_

    @classmethod
    def promise(
        cls,
        shape: torch.Size | tuple[int, ...],
        dtype: torch.dtype,
        make: Callable[..., Tensor],
        *sources: Tensor | None,
    ) -> Any:
        """The tensor ``make(*sources)`` of this shape and dtype, not made yet."""
        first = next(source for source in sources if source is not None)
        kind = first.device.type
        autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

        def made(*given: Tensor | None) -> Tensor:
            with torch.autocast(kind, enabled=autocast[0], dtype=autocast[1]):
                return make(*given).to(dtype)

        promised = _Promise.apply(cls, shape, dtype, first.device, made, *sources)
        promised.sources = sources
        promised.versions = _versions(sources)
        promised.make = made
        promised.built = promised.moved = None
        return promised

    def dense(self) -> Tensor:
        """The values, without a gradient."""
        if self.moved is not None:
            raise RuntimeError(
                "scatter_ returned a new tensor for this one, whose place it takes; use that"
            )
        if self.built is None:
            if _versions(self.sources) != self.versions:
                raise RuntimeError(
                    f"{type(self).__name__}: what it is made of has changed since, by a step of an "
                    "optimizer for one; look at it before, or keep what you need of it"
                )
            with torch.no_grad():
                self.built = self.make(*(s if s is None else s.detach() for s in self.sources))
        return self.built

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        args, kwargs = tree_map_only(OnDemand, _current, (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            if func in FAST:
                result = FAST[func](*args, **kwargs)
                if result is not NotImplemented:
                    return result
            if func in OF_MEMORY:
                args = tree_map_only(OnDemand, _plain, args)
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        dense_args, dense_kwargs = tree_map_only(OnDemand, _dense, (args, kwargs or {}))
        result = func(*dense_args, **dense_kwargs)
        # what changes its first argument returns it
        if args and isinstance(args[0], OnDemand) and result is dense_args[0]:
            return args[0]
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _current(self).dense().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return _current(self).dense().clone()


def _versions(sources: tuple[Tensor | None, ...]) -> list[int | None]:
    """How often each has been changed in place, where torch counts it."""
    return [None if t is None or t.is_inference() else t._version for t in sources]


def _current(t: OnDemand) -> OnDemand:
    while t.moved is not None:
        t = t.moved
    return t


def _dense(t: OnDemand) -> Tensor:
    return t.dense()


def _plain(t: OnDemand) -> Tensor:
    """The same, of a tensor of torch's own, which knows of the gradient."""
    return t.dense().detach().requires_grad_(t.requires_grad)


class _Promise(torch.autograd.Function):
    """The step from the sources to the dense tensor, for what takes that."""

    @staticmethod
    def forward(ctx, cls, shape, dtype, device, make, *sources):
        ctx.save_for_backward(*sources)
        ctx.make = make
        wrapped = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        if not (dtype.is_floating_point or dtype.is_complex):
            ctx.mark_non_differentiable(wrapped)
        return wrapped

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        needs = ctx.needs_input_grad[5:]
        with torch.enable_grad():
            leaves = [
                None if source is None else source.detach().requires_grad_(need)
                for source, need in zip(ctx.saved_tensors, needs)
            ]
            dense = ctx.make(*leaves)
        wanted = [leaf for leaf, need in zip(leaves, needs) if need]
        found = iter(torch.autograd.grad(dense, wanted, grad, allow_unused=True))
        return (None,) * 5 + tuple(next(found) if need else None for need in needs)


Kind = TypeVar("Kind", bound=OnDemand)


def waits(t: Any, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether ``t`` is of this kind and still in its sparse form."""
    return isinstance(t, kind) and t.moved is None and t.built is None


def takes(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the sparse way of functions of torch."""

    def register(way: Callable[..., Any]) -> Callable[..., Any]:
        FAST.update(dict.fromkeys(functions, way))
        return way

    return register
