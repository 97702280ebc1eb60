"""``topk``: what every selection of the k largest owes, and what some promise beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipsteer.testing.machine import machine
from clipsteer.testing.proof.arithmetic import Arithmetic
from clipsteer.testing.proof.prove import Report
from clipsteer.testing.proof.trial import Finding
from clipsteer.testing.torture.given import PRODUCTS, Given, selections
from clipsteer.testing.torture.hard import ROWS
from clipsteer.testing.torture.ledger import RIGHT, Ledger, Situation, refusal, wrong
from clipsteer.testing.torture.memory import (
    far_apart,
    fenced,
    poisoned,
    same_bits,
    strided,
    transposed,
)
from clipsteer.testing.torture.promises import PROMISES, contract

__all__ = ["PROMISES", "topk"]

# (B, n, k) of the cases that do not choose their own, smallest first
SIZES = ((2, 9, 3), (3, 65, 7), (3, 257, 32), (3, 1031, 64), (3, 4099, 100), (2, 20011, 64))

Arrange = Callable[[Tensor], Tensor | None]
LAYOUTS: dict[str, Arrange] = {
    "between NaN": fenced,
    "between infinities": lambda t: fenced(t, torch.inf),
    "every other column": strided,
    "transposed in memory": transposed,
    "one row, repeated": lambda t: t[:1].expand(t.shape),
    "rows 2^30 elements apart": far_apart,
}
META = "shapes beyond 2^31 elements on meta"
# what runs beside each other are seen on
REPEATED = ("small integers", "random", "more equal values than any capacity")


class _Outputs(NamedTuple):
    values: Tensor  # (B, k)
    indices: Tensor  # (B, k)


@dataclass(frozen=True)
class _Subject:
    """The function, and what was said about it."""

    fn: Callable[..., Any]
    encoder: bool
    relu: bool
    promises: frozenset[str]
    device: str
    refuses: tuple[type[Exception], ...]
    arithmetic: Arithmetic | None

    def run(self, given: Given, arrange: Arrange | None = None) -> _Outputs | None:
        """On the host; None where ``arrange`` has no room.

        Raises:
            AssertionError: it changed its inputs, or returned something else than a pair.
        """
        moved = []
        for t in given.arguments:
            there = t.to(self.device)
            laid = there.clone() if arrange is None or t.dim() < 2 else arrange(there)
            if laid is None:
                return None
            moved.append(laid)
        with poisoned():
            result = self.fn(*moved, given.k)
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            raise AssertionError(f"expected (values, indices), got {type(result).__name__}")
        for before, after in zip(given.arguments, moved):
            if arrange is not LAYOUTS["one row, repeated"] and not same_bits(before, after.cpu()):
                raise AssertionError("its input has changed")
        return _Outputs(*(t.detach().cpu() for t in result))


def topk(
    fn: Callable[..., Any],
    *,
    encoder: bool = False,
    relu: bool = False,
    promises: Sequence[str] = (),
    sizes: Sequence[tuple[int, int, int]] = SIZES,
    cases: Sequence[str] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    device: str = "cpu",
    refuses: tuple[type[Exception], ...] = (),
    arithmetic: Arithmetic | None = None,
    seed: int = 0,
) -> Report:
    """Hold a selection of the k largest to the rows that such kernels get wrong.

    A row of the report is a case, a layout of memory or a promise. Everybody owes: ``values (B,
    k)`` in the input's dtype are those at ``indices``, which lie in the row and occur once; nothing
    left out is larger than what was taken; the input stays as it was. In a row with a NaN no more
    is asked than that each value is the one at its index, or NaN. What is beyond that is a promise.

    Args:
        fn: ``fn(x (B, n), k) -> (values, indices)``; with ``encoder``, ``fn(x (B, d), W_enc (n, d),
            b_enc (n,), k) -> (acts, indices)`` of the pre-activations x W_encᵀ + b_enc.
        relu: the values are relu's of what was selected (any of those at or below 0 will do).
        promises: of ``PROMISES``, what ``fn`` says that it keeps; the others are looked at too, and
            reported as not promised.
        sizes: (B, n, k) to draw from, smallest first; the cases' borders and capacities are as far
            as n goes.
        cases: names of ``ROWS``, of encoders' cases, of layouts or of promises; all by default.
        refuses: exceptions by which ``fn`` declines a case.
        arithmetic: of an encoder's product, by default that of the dtype.

    Returns:
        A report as ``prove`` gives. True when the contract and the promises were kept.

    Raises:
        ValueError: an unknown promise or case.
    """
    named = {*ROWS, *PRODUCTS, *LAYOUTS, *PROMISES}
    for what, given, known in (("promise", promises, PROMISES), ("case", cases or (), named)):
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ValueError(f"torture: {what} must be one of {sorted(known)}, got {unknown}")
    subject = _Subject(fn, encoder, relu, frozenset(promises), device, refuses, arithmetic)
    contents = [*ROWS, *(PRODUCTS if encoder else ())]
    chosen = set(cases or named)
    # promises but the last are seen in the cases of all contents
    everything = bool(chosen & (PROMISES.keys() - {META}))
    run = [name for name in contents if name in chosen or everything]
    rows = []
    for dtype in dtypes:
        ledger = Ledger(dtype)
        for name in [*contents, *LAYOUTS]:
            ledger.row(name)
        for name in PROMISES:
            ledger.row(name, name in promises)
        for name in run:
            _case(subject, name, ledger, sizes, seed)
        for name in LAYOUTS.keys() & chosen:
            _layout(subject, name, ledger, sizes, seed)
        if META in chosen:
            _meta(subject, ledger)
        rows += [row for name, row in ledger.rows.items() if name in chosen]
    name = getattr(fn, "__qualname__", None) or repr(fn)
    definition = "the k largest of x W_encᵀ + b_enc" if encoder else "the k largest"
    return Report(name, definition, rows, machine(device), seed)


def _drawn(
    subject: _Subject,
    name: str,
    ledger: Ledger,
    sizes: Sequence[tuple[int, int, int]],
    seed: int,
) -> Iterator[tuple[Given, Situation]]:
    for B, n, k in sizes:
        made = selections(name, B, n, k, ledger.dtype, seed, subject.encoder, subject.arithmetic)
        for number, given in enumerate(made):
            call = f"torture.rows({name!r}, {B}, {n}, {k}, {ledger.dtype}, {seed})"
            again = f"x, k = testing.{call}[{number}]"
            if subject.encoder:
                again = f"testing.torture.topk(fn, encoder=True, cases=[{name!r}], seed={seed})"
            yield given, Situation(given.sizes, seed, again)


def _case(
    subject: _Subject,
    name: str,
    ledger: Ledger,
    sizes: Sequence[tuple[int, int, int]],
    seed: int,
) -> None:
    row = ledger.row(name)
    for given, at in _drawn(subject, name, ledger, sizes, seed):
        try:
            outputs = subject.run(given)
            assert outputs is not None
            finding = contract(given, *outputs, subject.relu)
        except Exception as error:
            finding = refusal(error, subject.refuses, row)
            if finding is None:
                continue
            outputs = None
        ledger.note(name, finding, at)
        if finding.share > 1:
            return
        assert outputs is not None
        for promise, kept in PROMISES.items():
            found = kept(given, *outputs, subject.relu) if kept is not None else None
            if found is not None:
                ledger.note(promise, found, at, promise in subject.promises)
        if name in REPEATED:
            for promise, found in _runs(subject, given, outputs).items():
                ledger.note(promise, found, at, promise in subject.promises)


def _runs(subject: _Subject, given: Given, outputs: _Outputs) -> dict[str, Finding]:
    """Promises about runs beside each other."""
    found = {"repeats bit for bit": RIGHT, "a row alone gives the same": RIGHT}
    for _ in range(2):
        again = subject.run(given)
        assert again is not None
        if not all(same_bits(a, b) for a, b in zip(outputs, again)):
            found["repeats bit for bit"] = wrong("two runs differ")
    for row in range(len(given.pre)):
        arguments = (given.arguments[0][row : row + 1], *given.arguments[1:])
        alone = subject.run(replace(given, arguments=arguments))
        assert alone is not None
        if not all(same_bits(a[row : row + 1], b) for a, b in zip(outputs, alone)):
            found["a row alone gives the same"] = wrong(f"row {row} differs")
            break
    return found


def _layout(
    subject: _Subject,
    layout: str,
    ledger: Ledger,
    sizes: Sequence[tuple[int, int, int]],
    seed: int,
) -> None:
    """Inputs that lie otherwise in memory."""
    for name in ["product of integers"] if subject.encoder else ["small integers", "random"]:
        for given, at in _drawn(subject, name, ledger, sizes, seed):
            if layout == "one row, repeated":
                given = _first_repeated(given)
            try:
                outputs = subject.run(given, LAYOUTS[layout])
                if outputs is None:
                    continue
                finding = contract(given, *outputs, subject.relu)
            except Exception as error:
                finding = refusal(error, subject.refuses, ledger.row(layout))
            if finding is not None:
                ledger.note(layout, finding, at)


def _first_repeated(given: Given) -> Given:
    """The first row of each argument, and what comes of it."""
    arguments = tuple(t[:1].expand(t.shape) if t.dim() > 1 else t for t in given.arguments)
    if len(arguments) == 1:
        return replace(given, arguments=arguments, pre=given.pre[:1].expand(given.pre.shape))
    x, W, b = (t.double() for t in arguments)
    return replace(given, arguments=arguments, pre=x @ W.T + b)


def _meta(subject: _Subject, ledger: Ledger) -> None:
    """More than 2^31 elements, where shapes alone are computed."""
    B, n, k = 2**16 + 1, 2**15 + 3, 5
    shapes = ((B, 8), (n, 8), (n,)) if subject.encoder else ((B, n),)
    arguments = [torch.empty(shape, dtype=ledger.dtype, device="meta") for shape in shapes]
    try:
        values, indices = subject.fn(*arguments, k)
        right = values.shape == indices.shape == (B, k) and values.dtype == ledger.dtype
        finding = RIGHT if right else wrong(f"{tuple(values.shape)}, {tuple(indices.shape)}")
    except Exception as error:
        finding = wrong(f"raised {type(error).__name__}: {error}")
    at = Situation(f"{shapes}, k {k}", 0, "on the device 'meta'")
    ledger.note(META, finding, at, META in subject.promises)
