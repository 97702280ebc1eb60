"""Calls that look like an earlier one go straight to what that one ran.

What an op does around its kernel (checks, the choice of a backend, views) depends on its arguments'
kinds, shapes, layouts and dtypes, on numbers, and on a few settings of torch; it takes several
times as long as a small kernel. So the second call of a kind is recorded: what ran (``step``: the
low-level ops, autograd's functions, views) and which argument went where. Every later one runs the
same steps on its own tensors, and nothing else.

What depends on the values of tensors is a step, too, or is checked by the kernel; whatever a step
raises, the call is made in full, which says what is wrong. Under a compiler, torch.func, forward
mode, autocast or a tracer, and off the CPU, every call is made in full.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

Result = TypeVar("Result")
Op = TypeVar("Op", bound=Callable[..., Any])

# what an argument of a step may be besides a tensor that is known
_FIXED = (bool, int, float, str, torch.dtype, torch.device)
_PLAIN = frozenset((type(None), bool, int, float, str))
# kinds of calls that are kept of an op; shapes that never come again make room for others
_MOST = 512
# states of a kind that has no steps to run: seen once; made in full always
_SEEN = object()
_FULL = object()

_compiling = torch.compiler.is_compiling
# whether a torch.func transform (grad, vjp, jvp, vmap, …) is at work
transformed = torch._C._are_functorch_transforms_active
_casting = torch._C._is_any_autocast_enabled
_tracing = torch._C._get_tracing_state
_with_grad = torch.is_grad_enabled

# Where ``os.environ`` keeps what it holds: asked for a name that is not set it raises and catches
# two errors, 0.7 µs.
_ENVIRON: Any = getattr(os.environ, "_data", os.environ)
_ASKED = "CLIPSTEER_BACKEND"
_KEY = _ASKED if _ENVIRON is os.environ else getattr(os.environ, "encodekey", str)(_ASKED)

_PLANS: list[dict[Any, Any]] = []

# from the tensors of a call, its result
Plan = Callable[[list[Tensor]], Any]


def asked_backend() -> str | None:
    """``CLIPSTEER_BACKEND`` where it is set to something."""
    return os.environ.get(_ASKED) if _ENVIRON.get(_KEY) else None


# of a value of a call: whose list it is in, and where; "given" are the call's tensors, "fixed" what
# all calls of a kind share, "found" what the steps give
Place = tuple[str, int]


class _Step(NamedTuple):
    function: Callable[..., Any]
    arguments: list[Place]
    many: bool  # whether it gives a tuple


class _Recording:
    """What one call runs."""

    def __init__(self, given: list[Tensor]) -> None:
        self.thread = threading.get_ident()
        self.with_grad = _with_grad()
        self.whole = True  # all that matters was seen
        self.given = given
        self.fixed: list[Any] = []
        self.found: list[Any] = []
        self.steps: list[_Step] = []
        # by id: the lists keep the values, so that an id names one of them
        self.places: dict[int, Place] = {id(t): ("given", i) for i, t in enumerate(given)}

    def place(self, value: Any) -> Place:
        """Where a value is; one that is not known must be fixed."""
        if isinstance(value, Tensor):
            if (place := self.places.get(id(value))) is not None:
                return place
            self.whole = False
        elif not _is_fixed(value):
            self.whole = False
        self.fixed.append(value)
        return ("fixed", len(self.fixed) - 1)

    def run(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """A step, and what it gives."""
        global _recording
        places = [self.place(value) for value in arguments]
        _recording = None  # what a step runs is its own
        try:
            output = function(*arguments)
        finally:
            _recording = self
        many = isinstance(output, tuple)
        values = output if many else (output,)
        kind = "found"
        if all(of == "fixed" for of, _ in places) and all(map(_small, values)):
            kind = "fixed"
        else:
            # as it ran: without a gradient, say, where there could be one
            tracked = any(t.requires_grad for t in self.given)
            if tracked and _with_grad() != self.with_grad:
                function = (torch.no_grad if self.with_grad else torch.enable_grad)()(function)
            self.steps.append(_Step(function, places, many))
        for value in values:
            into = self.fixed if kind == "fixed" else self.found
            self.places[id(value)] = (kind, len(into))
            into.append(value)
        return output

    def plan(self, result: Any) -> Plan | None:
        """What makes of other tensors what ``result`` is of these; None where that is not known."""
        values = result if isinstance(result, tuple) else (result,)
        places = [self.place(value) for value in values]
        # what is fixed is not handed out, lest somebody writes into it
        if not (self.whole and self.steps) or any(kind == "fixed" for kind, _ in places):
            return None
        first = {"given": 0, "fixed": len(self.given), "found": len(self.given) + len(self.fixed)}

        def taker(places: list[Place]) -> Callable[[list[Any]], tuple[Any, ...]]:
            """A function that takes what is there, as a tuple."""
            numbers = [first[kind] + at for kind, at in places]
            if len(numbers) > 1:
                return itemgetter(*numbers)
            (number,) = numbers
            return lambda values: (values[number],)

        steps = [(step.function, taker(step.arguments), step.many) for step in self.steps]
        all_found = [("found", at) for at in range(len(self.found))]
        handed_on = places == all_found and self.steps[-1].many == isinstance(result, tuple)
        return _plan(self.fixed, steps, taker(places), type(result), handed_on)


def _plan(
    fixed: list[Any],
    steps: list[tuple[Callable[..., Any], Callable[[list[Any]], tuple[Any, ...]], bool]],
    results: Callable[[list[Any]], tuple[Any, ...]],
    kind: type,
    handed_on: bool,
) -> Plan:
    """``handed_on``: the last step's output is the result, but for the kind of the tuple."""
    make = getattr(kind, "_make", None)
    alone = not issubclass(kind, tuple)
    first, take, _ = steps[0]
    if len(steps) == 1 and handed_on:  # what most ops are when nothing has a gradient
        if make is None:
            return lambda given: first(*take(given + fixed))
        return lambda given: make(first(*take(given + fixed)))

    def plan(given: list[Tensor]) -> Any:
        values = given + fixed
        for function, arguments, many in steps:
            output = function(*arguments(values))
            if many:
                values += output
            else:
                values.append(output)
        if alone:
            return results(values)[0]
        return results(values) if make is None else make(results(values))

    return plan


def _small(value: Any) -> bool:
    """Whether it may be kept for good."""
    return not isinstance(value, Tensor) or value.numel() <= 1024


def _is_fixed(value: Any) -> bool:
    if type(value) in (tuple, list):
        return all(map(_is_fixed, value))
    return value is None or isinstance(value, _FIXED)


_recording: _Recording | None = None
_taken = threading.Lock()


def _recorded() -> _Recording | None:
    """The recording of this thread's call, if there is one."""
    if _recording is None or _recording.thread != threading.get_ident():
        return None
    return _recording


def step(function: Callable[..., Result], *arguments: Any) -> Result:
    """``function(*arguments)``, which calls of the same kind are to run on their own tensors.

    It depends on its arguments alone; what else these calls have in common it may know.
    """
    if _recording is None or _compiling() or (recording := _recorded()) is None:
        return function(*arguments)
    return cast(Result, recording.run(function, arguments))


def holds(condition: Callable[..., bool], *arguments: Any) -> bool:
    """``condition(*arguments)``, which says something of tensors' values. Where it is true, calls
    of the same kind ask it again, and are made in full where it is not."""
    if _compiling() or (recording := _recorded()) is None:
        return condition(*arguments)
    if not condition(*arguments):
        recording.whole = False
        return False

    def demanded(*values: Any) -> None:
        if not condition(*values):
            raise ValueError("made in full")

    recording.run(demanded, arguments)
    return True


def in_full() -> None:
    """This call depends on what does not show in its kind, and no step says it."""
    if not _compiling() and (recording := _recorded()) is not None:
        recording.whole = False


def remembered(op: Op) -> Op:
    """The op, whose calls are recorded by kind."""
    plans: dict[Any, Any] = {}
    _PLANS.append(plans)

    @functools.wraps(op)
    def called(*args: Any, **named: Any) -> Any:
        if (
            _compiling()
            or transformed()
            or forward_ad._current_level >= 0
            or _casting()
            or _tracing() is not None
            or _recording is not None
        ):
            return op(*args, **named)
        kind = [_ENVIRON.get(_KEY), _with_grad(), *named]
        given: list[Tensor] = []
        try:
            if not _read((*args, *named.values()) if named else args, kind, given):
                return op(*args, **named)
        except RuntimeError:  # a sparse or a nested one has no strides
            return op(*args, **named)
        key = tuple(kind)
        plan = plans.get(key)
        if plan is None or plan is _SEEN:
            return _first_calls(op, plans, key, given, args, named)
        if plan is not _FULL:
            try:
                return plan(given)
            except Exception:
                pass  # what is wrong the call in full says better
        return op(*args, **named)

    return cast(Op, called)


def _read(values: Sequence[Any], kind: list[Any], given: list[Tensor]) -> bool:
    """Adds what the arguments are, and the tensors among them; whether all of that is known."""
    for value in values:
        of = type(value)
        if of is Tensor or of is Parameter:
            if not value.is_cpu:
                return False
            given.append(value)
            layout = value.is_contiguous() or value.stride()
            kind += (value.shape, layout, value.dtype, value.requires_grad)
        elif of in _PLAIN:
            kind += (of, value)
        elif isinstance(value, (tuple, list)):
            kind += (of, len(value))
            if not _read(value, kind, given):
                return False
        else:
            return False
    return True


def _first_calls(
    op: Callable[..., Any],
    plans: dict[Any, Any],
    key: tuple[Any, ...],
    given: list[Tensor],
    args: tuple[Any, ...],
    named: dict[str, Any],
) -> Any:
    """A call of a kind that was seen once at most: the first is made in full, as many a shape never
    comes again; the second is recorded."""
    global _recording
    if len(plans) >= _MOST:
        plans.clear()
    if key not in plans:
        plans[key] = _SEEN
        return op(*args, **named)
    # one tensor in two places does not show what goes where
    distinct = len({id(t) for t in given}) == len(given)
    if not distinct or not _taken.acquire(blocking=False):
        return op(*args, **named)
    recording = _recording = _Recording(given)
    try:
        result = op(*args, **named)
    finally:
        _recording = None
        _taken.release()
    plans[key] = recording.plan(result) or _FULL
    return result


def forget() -> None:
    """Make every op's next call in full: parts of the ops have been exchanged."""
    for plans in _PLANS:
        plans.clear()
