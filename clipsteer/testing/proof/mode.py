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
        self._shadows: dict[int, tuple[Any, Tensor]] = {}

    def error(self, t: Any) -> Tensor:
        """The bounds of a tensor's elements, in its shape."""
        if not isinstance(t, Tensor):
            return torch.zeros((), dtype=torch.float64)
        found = self._shadows.get(t.untyped_storage()._cdata)
        if found is None:
            return torch.zeros((), dtype=torch.float64).expand(t.shape)
        return found[1].as_strided(t.shape, t.stride(), t.storage_offset())

    def is_exact(self, t: Any) -> bool:
        """Whether no element of it has an error."""
        if not isinstance(t, Tensor) or t.untyped_storage()._cdata not in self._shadows:
            return True
        return not bool(self.error(t).any())

    def attach(self, t: Tensor, error: Tensor) -> Tensor:
        """Set the bounds of a tensor, in its shape or one that expands to it."""
        storage = t.untyped_storage()
        found = self._shadows.get(storage._cdata)
        if found is None:
            size = storage.nbytes() // max(t.element_size(), 1)
            found = (storage, torch.zeros(size, dtype=torch.float64))
            self._shadows[storage._cdata] = found
        found[1].as_strided(t.shape, t.stride(), t.storage_offset()).copy_(error)
        return t

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
            return (
                self.attach(result.value, result.error)
                if result.error is not None
                else (result.value)
            )
        if isinstance(result, (list, tuple)):
            return type(result)([self._attached(part) for part in result])
        return result

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


class Pair:
    """A value and the bounds of its error; None for those of an exact one."""

    def __init__(self, value: Tensor, error: Tensor | None = None) -> None:
        self.value = value
        self.error = error


# makers of constants, and what reads no values
_PLAIN = {
    "arange", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace",
    "new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros", "ones", "ones_like",
    "scalar_tensor", "zeros", "zeros_like", "lift_fresh", "is_same_size", "sym_size", "stride",
    "_unsafe_view", "_assert_async", "resize_",
}  # fmt: skip


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
