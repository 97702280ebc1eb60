"""``bound``: what a correct evaluation of a plain torch function may be off by, elementwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipsteer.ops._bounds import UNIT
from clipsteer.testing.proof import curves as curves  # registers its rules
from clipsteer.testing.proof import elementwise as elementwise
from clipsteer.testing.proof import moves as moves
from clipsteer.testing.proof import reductions as reductions
from clipsteer.testing.proof.arithmetic import Arithmetic
from clipsteer.testing.proof.mode import ErrorBounds, Ranked

Outputs = tuple[Tensor, ...]
Cotangents = tuple[Tensor | None, ...]


@dataclass
class Bounded:
    """A tensor's exact value and what it may be off by, in float64 both.

    ``error`` is without the last rounding; ``allowed`` has it. An integer's is 0, or infinite where
    rounding may change it; ``ranked`` is then what an index was chosen from.
    """

    value: Tensor
    error: Tensor
    ranked: Ranked | None = None

    def allowed(self, dtype: torch.dtype) -> Tensor:
        """The bound of a result stored as ``dtype``."""
        if not dtype.is_floating_point:
            return self.error
        info = torch.finfo(dtype)
        unit = UNIT[dtype]
        last = self.value.abs().add_(self.error).mul_(unit).add_(info.smallest_normal * info.eps)
        # far below the largest number, where nothing is beyond it
        near = last.numel() == 0 or bool(last.amax() <= unit * info.max / 4)
        if last.numel() and not bool(self.error.amin() > 0):
            held = (self.error == 0) & (self.value.to(dtype).double() == self.value)
            last.masked_fill_(held, 0.0)
        last += self.error
        if near:
            return last
        reach = (self.value.abs() + self.error) * (1 + unit)
        return torch.where(reach <= info.max, last, _beyond(self.value))

    def fraction(self, result: Tensor, limit: Tensor | None = None) -> Tensor:
        """|result - value| over the bound, elementwise; infinite where a rule without tolerance is
        broken, 0 where nothing is known. ``limit`` is what ``allowed`` says of its dtype."""
        if result.shape != self.value.shape:
            raise ValueError(f"expected shape {tuple(self.value.shape)}, got {tuple(result.shape)}")
        limit = self.allowed(result.dtype) if limit is None else limit
        if self.ranked is not None and bool(limit.isinf().any()):
            return self._near_ties(result.detach().cpu())
        got = result.detach().cpu().double()
        off = (got - self.value).abs_().div_(limit)
        if off.numel() and bool(off.amax().isfinite()) and bool(limit.amax().isfinite()):
            return off
        same = (got == self.value) | (got.isnan() & self.value.isnan()) | limit.isinf()
        return torch.where(same, 0.0, off.nan_to_num(nan=math.inf, posinf=math.inf))

    def _near_ties(self, got: Tensor) -> Tensor:
        """Chosen in place of another, an element must be as large within both errors, and it may
        be chosen once."""
        assert self.ranked is not None
        value, error, dim, _ = self.ranked
        inside = (got >= 0) & (got < value.shape[dim])
        safe = torch.where(inside, got, 0)
        off = (value.gather(dim, safe) - value.gather(dim, self.value)).abs()
        slack = error.gather(dim, safe) + error.gather(dim, self.value)
        apart = torch.sort(safe, dim).values.diff(dim=dim)
        once = (apart != 0).all(dim, keepdim=True)
        right = (got == self.value) | (inside & (off <= slack) & (slack > 0))
        return torch.where(right & once, 0.0, math.inf)


def _beyond(value: Tensor) -> Tensor:
    """Past the largest number an infinity is right, and anything is let pass; NaN stays NaN."""
    return torch.where(value.isnan(), 0.0, math.inf)


@dataclass
class Bound:
    """Outputs and gradients with their bounds; ``reasons`` names what has none."""

    outputs: tuple[Bounded, ...]
    gradients: dict[str, Bounded] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)


def bound(
    reference: Callable[..., Any],
    inputs: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
    arithmetic: Arithmetic | None = None,
    grad_outputs: Cotangents | Callable[[Outputs], Cotangents] | None = None,
) -> Bound:
    """Run ``reference`` in float64 with an a priori error bound beside every value.

    Args:
        reference: plain torch, deterministic; called with ``inputs`` as keywords. It returns a
            tensor or a tuple of them. One that asks for its inputs' dtype (as ``F.rms_norm`` does
            for its default eps) hears float64.
        inputs: tensors and whatever else it takes. Their values count as exact; floating ones are
            taken to float64.
        dtype: of the results to be judged; by default the first floating input's.
        arithmetic: of what lies between (``Arithmetic.of``): by default float32 for halves and
            float32, with exact inputs and exact operands of products.
        grad_outputs: one for each output (None: none), exact too, or what makes them of the
            outputs. With them the gradients of all floating inputs that the reference can give are
            bounded as well.

    Returns:
        ``Bound``. Sums and products are allowed any order; elementwise functions the error of a
        library's (4 roundings); decisions (max, top-k, masks) are followed as far as no error can
        turn them.

    Raises:
        ValueError: no floating input and no ``dtype``.

    Source: Higham 2002, "Accuracy and Stability of Numerical Algorithms", chapters 2 and 3.
    """
    floating = {n: t for n, t in inputs.items() if isinstance(t, Tensor) and t.is_floating_point()}
    if dtype is None:
        if not floating:
            raise ValueError("bound: no input is a floating tensor; pass dtype")
        dtype = next(iter(floating.values())).dtype
    mode = ErrorBounds(arithmetic or Arithmetic.of(dtype))
    given, wide = _in_float64(inputs, grad_outputs is not None)
    for t in wide.values():
        if mode.arithmetic.given:
            mode.attach(t, t.detach().abs() * mode.arithmetic.given)
        else:
            mode.exact(t)
    with mode, sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(grad_outputs is not None):
        several = _several(reference(**given))
        found = tuple(_bounded(mode, t) for t in several)
    gradients = {}
    if grad_outputs is not None:
        if callable(grad_outputs):
            grad_outputs = grad_outputs(tuple(output.value for output in found))
        with mode:
            grads = _gradients(several, wide, grad_outputs, mode.exact)
            gradients = {name: _bounded(mode, grad) for name, grad in grads.items()}
    if mode.undecided:
        for part in (*found, *gradients.values()):
            part.error.fill_(math.inf)
    return Bound(found, gradients, mode.reasons)


def exact_values(
    reference: Callable[..., Any],
    inputs: Mapping[str, Any],
    grad_outputs: Callable[[Outputs], Cotangents] | None = None,
) -> tuple[Outputs, dict[str, Tensor]]:
    """The values of ``bound`` alone: outputs and, with ``grad_outputs``, gradients in float64."""
    given, wide = _in_float64(inputs, grad_outputs is not None)
    with torch.set_grad_enabled(grad_outputs is not None):
        several = _several(reference(**given))
    values = tuple(t.detach() for t in several)
    if grad_outputs is None:
        return values, {}
    return values, _gradients(several, wide, grad_outputs(values))


def _in_float64(
    inputs: Mapping[str, Any], differentiated: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments on the host, and the floating ones of them, which are then in float64."""
    wide = {}
    for name, t in inputs.items():
        if isinstance(t, Tensor) and t.is_floating_point():
            wide[name] = t.detach().cpu().double().requires_grad_(differentiated)
    given = {n: t.cpu() if isinstance(t, Tensor) else t for n, t in inputs.items()}
    return given | wide, wide


def _several(result: Any) -> Outputs:
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def _bounded(mode: ErrorBounds, t: Tensor) -> Bounded:
    value = t.detach()
    if value.is_floating_point():
        value = value.double()
    ranked = None if value.is_floating_point() else mode.ranked(t)
    return Bounded(value.clone(), mode.error(t.detach()).clone(), ranked)


def _gradients(
    outputs: Outputs,
    inputs: dict[str, Tensor],
    grad_outputs: Cotangents,
    mark: Callable[[Tensor], Tensor] = lambda t: t,
) -> dict[str, Tensor]:
    """Of all inputs that have one; ``mark`` is told of the cotangents."""
    taken = [(t, g) for t, g in zip(outputs, grad_outputs) if g is not None and t.requires_grad]
    if not taken:
        return {}
    grads = torch.autograd.grad(
        [t for t, _ in taken],
        list(inputs.values()),
        [mark(g.cpu().double()) for _, g in taken],
        allow_unused=True,
    )
    return {name: grad for name, grad in zip(inputs, grads) if grad is not None}
