"""An error bound beside every value: a dispatch mode over a float64 run of a reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from clipsteer.testing.proof.arithmetic import Arithmetic


class Ranked(NamedTuple):
    """What indices were chosen from."""

    value: Tensor
    error: Tensor
    dim: int
    shape: torch.Size  # of the indices


Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators of these names, whatever their overloads: a function of the
    mode, the operator and its arguments that returns values and errors alike."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


class ErrorBounds(TorchDispatchMode):
    """While active every float64 tensor has a bound of its error beside it (absent: it is exact),
    every boolean or integer one the mark of an element that rounding may change (infinite).

    The bounds of a tensor lie in a shadow of its storage, so views and writes in place need no
    rules. ``reasons`` says by name what could not be bounded.
    """

    def __init__(self, arithmetic: Arithmetic) -> None:
        super().__init__()
        self.arithmetic = arithmetic
        self.reasons: list[str] = []
        self.undecided = False  # whether Python read a number that has an error
        # of ranked indices what they rank: values, their errors and the dimension
        self._ranked: dict[int, Ranked] = {}
        # by address; the storage is kept, so that no other takes its place
        self._shadows: dict[int, Shadow] = {}

    def error(self, t: Any) -> Tensor:
        """The bounds of a tensor's elements, in its shape; of a number its own."""
        step = self.step(t)
        if step is None:
            step = torch.zeros((), dtype=torch.float64)
        return step.expand(t.shape) if isinstance(t, Tensor) else step

    def step(self, t: Any) -> Tensor | None:
        """The same; None where nobody has marked an error."""
        if not isinstance(t, Tensor):
            error = self.arithmetic.constant(t) if isinstance(t, float) else 0.0
            return torch.tensor(error, dtype=torch.float64) if error else None
        found = self._shadow(t)
        if found is None or found.error is None:
            return None
        return found.error.as_strided(t.shape, t.stride(), t.storage_offset())

    def _shadow(self, t: Tensor) -> Shadow | None:
        """What nobody has bounded is a constant of the definition: the arithmetic rounds it."""
        found = self._shadows.get(t.untyped_storage()._cdata)
        if found is None and t.is_floating_point():
            found = Shadow(t.untyped_storage(), self._rounding_of(_flat(t)), False)
            self._shadows[t.untyped_storage()._cdata] = found
        return found

    def _rounding_of(self, constants: Tensor) -> Tensor | None:
        arithmetic = self.arithmetic
        wide = constants.double()
        lost = wide.to(arithmetic.dtype).double() != wide
        lost &= wide.isfinite()
        if not bool(lost.any()):
            return None
        return (wide.abs() * arithmetic.stored + arithmetic.least) * lost

    def is_exact(self, t: Any) -> bool:
        """Whether no element of it has an error."""
        step = self.step(t)
        return step is None or not (self.is_inexact(t) or bool(step.any()))

    def is_inexact(self, t: Any) -> bool:
        """Whether every element of it is known to have an error."""
        found = self._shadow(t) if isinstance(t, Tensor) else None
        return found is not None and found.positive

    def exact(self, t: Tensor) -> Tensor:
        """Mark a tensor that nobody has bounded as one of exact numbers."""
        at = t.untyped_storage()._cdata
        self._shadows.setdefault(at, Shadow(t.untyped_storage(), None, False))
        return t

    def attach(self, t: Tensor, error: Tensor, positive: bool = False) -> Tensor:
        """Set the bounds of a tensor, in its shape or one that expands to it: ``positive`` says
        that all of them are above 0."""
        storage = t.untyped_storage()
        size = storage.nbytes() // max(t.element_size(), 1)
        if t.numel() == size and t.is_contiguous():
            # all of the storage; other tensors may have the same bounds, so they are not changed
            flat = error.expand(t.shape).contiguous().view(-1)
            self._shadows[storage._cdata] = Shadow(storage, flat, positive)
            return t
        found = self._shadows.get(storage._cdata)
        if found is None and t.numel() < size:
            found = self._shadow(t)
        flat = torch.zeros(size, dtype=torch.float64)
        if found is not None and found.error is not None:
            flat.copy_(found.error)
        flat.as_strided(t.shape, t.stride(), t.storage_offset()).copy_(error)
        self._shadows[storage._cdata] = Shadow(storage, flat, positive and t.numel() == size)
        return t

    def rounded(
        self,
        value: Tensor,
        error: Tensor | None,
        roundings: int = 1,
        least: float = 0.0,
        *,
        sure: bool = False,
    ) -> Pair:
        """An elementwise result with what its arithmetic makes of the operands' error; ``sure``
        says that no element of that is 0."""
        total, positive = self.arithmetic.rounded(value, error, roundings, least, sure=sure)
        return Pair(value, total, positive)

    def rank(self, indices: Tensor, ranked: Ranked) -> None:
        """Remember what indices were chosen from."""
        self._ranked[indices.untyped_storage()._cdata] = ranked

    def ranked(self, indices: Tensor) -> Ranked | None:
        """What these were chosen from, where nothing has been done to them since."""
        found = self._ranked.get(indices.untyped_storage()._cdata)
        return found if found is not None and found.shape == indices.shape else None

    def lose(self, reason: str) -> None:
        """Note why something has no bound."""
        if reason not in self.reasons:
            self.reasons.append(reason)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if _is_view(func) or name in _PLAIN:
            return func(*args, **kwargs)
        if name in _STEPPED:
            return self._stepped(func(*args, **kwargs))
        if name.endswith("_") and not name.endswith("__"):
            return self._in_place(func, args, kwargs)
        known = RULES.get(name)
        if known is not None:
            return self._attached(known(self, func, *args, **kwargs))
        found = _decomposition(func)
        if found is not None:
            with self:
                return found(*args, **kwargs)
        return self._unknown(name, func, args, kwargs)

    def _attached(self, result: Any) -> Any:
        """Of (value, error) the value, of lists and tuples of them the values."""
        if isinstance(result, Pair):
            if result.error is not None:
                return self.attach(result.value, result.error, result.positive)
            result = result.value
        if isinstance(result, (list, tuple)):
            return type(result)([self._attached(part) for part in result])
        if isinstance(result, Tensor) and result.is_floating_point():
            self.exact(result)
        return result

    def _stepped(self, result: Tensor) -> Tensor:
        """A constant made of a start and a step: the step is rounded, its multiple and the sum."""
        if not result.is_floating_point() or result.numel() == 0:
            return result
        lost = self._rounding_of(_flat(result))
        if lost is None:
            return self.exact(result)
        return self.attach(result, (3 * self.arithmetic.stored * result.double().abs().amax()))

    def _in_place(self, func: Any, args: Sequence[Any], kwargs: Any) -> Any:
        target = args[0]
        name = func.overloadpacket.__name__
        functional = getattr(getattr(torch.ops.aten, name[:-1]), func._overloadname, None)
        if functional is None:
            self.lose(f"aten.{name} has no form that is not in place")
            return self.attach(func(*args, **kwargs), torch.tensor(math.inf))
        result = self.__torch_dispatch__(functional, (), args, kwargs)
        error = self.error(result).clone()
        target.copy_(result)
        return self.attach(target, error)

    def _unknown(self, name: str, func: Any, args: Sequence[Any], kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        floating = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        if not floating or all(self.is_exact(t) and not t.is_floating_point() for t in floating):
            return result  # integers, of integers
        self.lose(f"aten.{name} has no rule")

        def lost(t: Any) -> Any:
            return self.attach(t, torch.tensor(math.inf)) if isinstance(t, Tensor) else t

        return tree_map(lost, result)


class Shadow(NamedTuple):
    """The bounds of all elements of a storage, in their order there: None where all are exact;
    ``positive`` where it is known that none is."""

    storage: Any
    error: Tensor | None
    positive: bool


class Pair:
    """A value and the bounds of its error; None for those of an exact one. ``positive`` where none
    of them is 0."""

    def __init__(self, value: Tensor, error: Tensor | None = None, positive: bool = False) -> None:
        self.value = value
        self.error = error
        self.positive = positive


# makers of constants, and what reads no values
_PLAIN = {
    "empty", "empty_like", "empty_strided", "eye", "full", "full_like",
    "new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros", "ones", "ones_like",
    "scalar_tensor", "zeros", "zeros_like", "lift_fresh", "is_same_size", "sym_size", "stride",
    "_unsafe_view", "_assert_async", "resize_",
}  # fmt: skip


_STEPPED = {"arange", "linspace", "logspace"}


def _flat(t: Tensor) -> Tensor:
    """All of a tensor's storage."""
    size = t.untyped_storage().nbytes() // max(t.element_size(), 1)
    return t.detach().as_strided((size,), (1,), 0)


def _is_view(func: Any) -> bool:
    returned = func._schema.returns
    return bool(returned) and all(
        r.alias_info is not None and not r.alias_info.is_write for r in returned
    )


def _decomposition(func: Any) -> Any:
    from torch._decomp import decomposition_table

    found = decomposition_table.get(func)
    if found is None and func._can_decompose():
        return func.decompose
    return found
