"""``sparse_decode``: sums of few rows of a dictionary, where such kernels go wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from clipsteer.testing.machine import machine
from clipsteer.testing.proof.arithmetic import Arithmetic
from clipsteer.testing.proof.bound import bound
from clipsteer.testing.proof.prove import ProofRow, Report
from clipsteer.testing.proof.trial import Finding
from clipsteer.testing.torture.ledger import RIGHT, Ledger, Situation, refusal, wrong
from clipsteer.testing.torture.memory import (
    far_apart,
    fenced,
    poisoned,
    same_bits,
    strided,
    transposed,
)

__all__ = ["sparse_decode"]

# (B, k, n, d), smallest first
SIZES = ((2, 1, 3, 5), (3, 4, 9, 33), (5, 32, 257, 130), (3, 100, 4099, 65))

Code = tuple[Tensor, Tensor, Tensor]  # acts (B, k), indices (B, k), W_dec (n, d)
Maker = Callable[[torch.Generator, int, int, int, int], Code]


def _drawn(generator: torch.Generator, B: int, k: int, n: int, d: int) -> Code:
    """Small integers: exact in any order of additions."""
    acts = torch.randint(-2, 3, (B, k), generator=generator).double()
    indices = torch.randint(n, (B, k), generator=generator)
    return acts, indices, torch.randint(-2, 3, (n, d), generator=generator).double()


def _gaussian(generator: torch.Generator, B: int, k: int, n: int, d: int) -> Code:
    _, indices, _ = _drawn(generator, B, k, n, d)
    acts = torch.randn(B, k, generator=generator, dtype=torch.float64)
    return acts, indices, torch.randn(n, d, generator=generator, dtype=torch.float64)


def _cancelling(generator: torch.Generator, B: int, k: int, n: int, d: int) -> Code:
    """Each term again with the other sign, but for the last."""
    acts, indices, W = _gaussian(generator, B, k, n, d)
    half = k // 2
    acts[:, half : 2 * half] = -acts[:, :half]
    indices[:, half : 2 * half] = indices[:, :half]
    return acts, indices, W


def _one_feature(generator: torch.Generator, B: int, k: int, n: int, d: int) -> Code:
    acts, indices, W = _drawn(generator, B, k, n, d)
    return acts, torch.full_like(indices, n - 1), W


def _twice(generator: torch.Generator, B: int, k: int, n: int, d: int) -> Code:
    acts, indices, W = _drawn(generator, B, k, n, d)
    indices[:, k // 2 :] = indices[:, : k - k // 2]
    return acts, indices, W


def _ends(generator: torch.Generator, B: int, k: int, n: int, d: int) -> Code:
    acts, indices, W = _drawn(generator, B, k, n, d)
    return acts, torch.where(indices % 2 == 0, 0, n - 1), W


def _silent(generator: torch.Generator, B: int, k: int, n: int, d: int) -> Code:
    acts, indices, W = _drawn(generator, B, k, n, d)
    acts[::2] = 0
    return acts, indices, W


def _unread(generator: torch.Generator, B: int, k: int, n: int, d: int) -> Code:
    """Features that nobody names are NaN."""
    acts, indices, W = _drawn(generator, B, k, n, d)
    unnamed = torch.ones(n, dtype=torch.bool)
    unnamed[indices.flatten()] = False
    W[unnamed] = math.nan
    return acts, indices, W


def _nan_activation(generator: torch.Generator, B: int, k: int, n: int, d: int) -> Code:
    acts, indices, W = _drawn(generator, B, k, n, d)
    acts[B // 2, k // 2] = math.nan
    return acts, indices, W


def _counts(rows: int) -> Maker:
    def make(generator: torch.Generator, B: int, k: int, n: int, d: int) -> Code:
        return _drawn(generator, rows, min(k, 33), min(n, 129), min(d, 65))

    return make


CODES: dict[str, Maker] = {
    "integers": _drawn,
    "Gaussian": _gaussian,
    "sums that cancel": _cancelling,
    "one feature for everything": _one_feature,
    "duplicated indices": _twice,
    "first and last feature": _ends,
    "activations of zero": _silent,
    "NaN where nobody reads": _unread,
    "NaN in an activation": _nan_activation,
    "one row": _counts(1),
    "no row": _counts(0),
    "many rows": _counts(200),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "between NaN": fenced,
    "every other column": strided,
    "transposed in memory": transposed,
    "features beyond 2^31 elements": far_apart,
}
REPEATS = "repeats bit for bit"


def _definition(acts: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    return (acts.unsqueeze(-1) * W_dec[indices]).sum(-2)


def sparse_decode(
    fn: Callable[..., Any],
    *,
    promises: Sequence[str] = (),
    sizes: Sequence[tuple[int, int, int, int]] = SIZES,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    device: str = "cpu",
    refuses: tuple[type[Exception], ...] = (),
    arithmetic: Arithmetic | None = None,
    seed: int = 0,
) -> Report:
    """Hold a decoder of sparse codes to the codes that such kernels get wrong.

    A row of the report is a case or a layout of memory. The sums are held to ``testing.bound`` of
    the definition, which is exact for the integers that most cases are made of.

    Args:
        fn: ``fn(acts (B, k), indices (B, k), W_dec (n, d)) -> (B, d)``, Σ_j acts_j W_dec[indices_j]
            with duplicates added up.
        promises: "repeats bit for bit", where ``fn`` says so.
        sizes: (B, k, n, d), smallest first.
        refuses, arithmetic: as in ``topk``.

    Raises:
        ValueError: an unknown promise.
    """
    if set(promises) - {REPEATS}:
        raise ValueError(f"torture: promise must be {REPEATS!r}, got {list(promises)}")
    rows: list[ProofRow] = []
    for dtype in dtypes:
        ledger = Ledger(dtype)
        for name in (*CODES, *LAYOUTS):
            ledger.row(name)
        ledger.row(REPEATS, REPEATS in promises)
        for name, code, at in _codes(sizes, dtype, seed):
            truth = bound(
                _definition,
                dict(zip(("acts", "indices", "W_dec"), code)),
                dtype=dtype,
                arithmetic=arithmetic,
            ).outputs[0]
            layouts = LAYOUTS if name == "integers" else {}
            first = None
            for layout, arrange in [(name, None), *layouts.items()]:
                try:
                    out = _run(fn, code, arrange, device)
                    if out is None:
                        continue
                    if out.shape != truth.value.shape or out.dtype != dtype:
                        finding = wrong(f"of shape {tuple(out.shape)} in {out.dtype}")
                    else:
                        finding = _worst(truth.fraction(out), out, truth.value)
                except Exception as error:
                    finding = refusal(error, refuses, ledger.row(layout))
                    out = None
                if finding is not None:
                    ledger.note(layout, finding, at)
                first = out if arrange is None else first
            if first is not None and name in ("integers", "Gaussian"):
                again = _run(fn, code, None, device)
                assert again is not None
                same = same_bits(first, again)
                finding = RIGHT if same else wrong("two runs differ")
                ledger.note(REPEATS, finding, at, REPEATS in promises)
        rows += ledger.rows.values()
    name = getattr(fn, "__qualname__", None) or repr(fn)
    return Report(name, "Σ_j acts_j W_dec[indices_j]", rows, machine(device), seed)


def _codes(
    sizes: Sequence[tuple[int, int, int, int]], dtype: torch.dtype, seed: int
) -> Iterator[tuple[str, Code, Situation]]:
    for size in sizes:
        for name, make in CODES.items():
            acts, indices, W = make(torch.Generator().manual_seed(seed), *size)
            code = (acts.to(dtype), indices, W.to(dtype))
            shapes = f"acts {tuple(acts.shape)}, W_dec {tuple(W.shape)}"
            again = f"testing.torture.sparse_decode(fn, sizes=[{size}], seed={seed})"
            yield name, code, Situation(shapes, seed, again)


def _run(
    fn: Callable[..., Any],
    code: Code,
    arrange: Callable[[Tensor], Tensor | None] | None,
    device: str,
) -> Tensor | None:
    moved = []
    for t in code:
        there = t.to(device)
        # what is far apart is the dictionary, and codes between NaN could not be read as indices
        laid = there.clone() if arrange is None else arrange(there)
        if arrange is far_apart and t is not code[2]:
            laid = there.clone()
        if laid is None:
            return None
        moved.append(laid)
    with poisoned():
        out = fn(*moved).detach().cpu()
    for before, after in zip(code, moved):
        if not same_bits(before, after.cpu()):
            raise AssertionError("its input has changed")
    return out


def _worst(shares: Tensor, out: Tensor, truth: Tensor) -> Finding:
    if shares.numel() == 0:
        return RIGHT
    row, column = (int(i) for i in torch.unravel_index(shares.argmax(), shares.shape))
    value = f"{float(out[row, column]):.9g}, not {float(truth[row, column]):.9g}"
    return Finding(float(shares[row, column]), f"[{row}, {column}] is {value}")
