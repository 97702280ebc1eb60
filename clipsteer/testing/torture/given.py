"""What a selection is given: rows as they are, or a product that makes the same rows exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.testing.proof.arithmetic import Arithmetic
from clipsteer.testing.proof.bound import bound
from clipsteer.testing.torture.hard import Draw, rows

__all__ = ["PRODUCTS", "Given", "selections"]

# how deep the products are
DEPTH = 33


@dataclass(frozen=True)
class Given:
    """The function's arguments but for k, what it selects from, and what a value may be off by."""

    arguments: tuple[Tensor, ...]
    pre: Tensor  # (B, n), float64
    allowed: Tensor  # (B, n), float64; 0: exact
    k: int

    @property
    def dtype(self) -> torch.dtype:
        """Of all that floats."""
        return self.arguments[0].dtype

    @property
    def sizes(self) -> str:
        """The shapes, in words."""
        names = ("x", "W_enc", "b_enc")
        words = [f"{name} {tuple(t.shape)}" for name, t in zip(names, self.arguments)]
        return ", ".join([*words, f"k {self.k}"])


def selections(
    name: str,
    B: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    seed: int,
    encoder: bool,
    arithmetic: Arithmetic | None,
) -> Iterator[Given]:
    """A case by its name, ready to be handed over."""
    if name in PRODUCTS:
        generator = torch.Generator().manual_seed(seed)
        x, W, b = PRODUCTS[name](Draw(B, n, k, dtype, generator))
        yield _product(x, W, b, k, arithmetic)
        return
    for x, count in rows(name, B, n, k, dtype, seed):
        if encoder:
            yield from _encoded(x, count)
        else:
            yield Given((x,), x.double(), torch.zeros(x.shape, dtype=torch.float64), count)


def _encoded(
    x: Tensor,  # (B, n)
    k: int,
) -> Iterator[Given]:
    """The rows as a product of the identity and a dictionary: exact in any order of additions. What
    is not finite comes from the bias, a row of it at a time."""
    finite = x.isfinite()
    info = torch.finfo(x.dtype)
    eye = torch.eye(len(x), max(len(x), 16)).to(x.dtype)
    W = torch.zeros(x.shape[1], eye.shape[1], dtype=x.dtype)
    W[:, : len(x)] = torch.where(finite, x, 0).T
    special = x[~finite.all(-1)] if not bool(finite.all()) else x.new_zeros(1, x.shape[1])
    for row in special:
        b = torch.where(row.isfinite(), 0, row)
        pre = W[:, : len(x)].T.double() + b.double()
        # a product may lose what is not normal
        tiny = (pre != 0) & (pre.abs() < info.smallest_normal)
        lost = 2 * info.smallest_normal if bool(tiny.any()) else 0.0
        yield Given((eye, W, b), pre, torch.full_like(pre, lost), k)


def _product(
    x: Tensor,  # (B, d)
    W: Tensor,  # (n, d)
    b: Tensor,  # (n,)
    k: int,
    arithmetic: Arithmetic | None,
) -> Given:
    inputs = {"input": x, "weight": W, "bias": b}
    found = bound(F.linear, inputs, dtype=x.dtype, arithmetic=arithmetic).outputs[0]
    allowed = found.allowed(x.dtype).nan_to_num(nan=0.0, posinf=torch.inf)
    return Given((x, W, b), found.value, allowed, k)


Product = Callable[[Draw], tuple[Tensor, Tensor, Tensor]]


def _drawn(d: Draw, depth: int = DEPTH, exact: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, depth), W (n, depth), b (n,): small integers, or Gaussian."""
    shapes = ((d.B, depth), (d.n, depth), (d.n,))
    drawn = [torch.randn(shape, generator=d.generator) for shape in shapes]
    x, W, b = ((t.round() if exact else t).to(d.dtype) for t in drawn)
    return x, W, b


def _integers(d: Draw) -> tuple[Tensor, Tensor, Tensor]:
    return _drawn(d)


def _shallow(d: Draw) -> tuple[Tensor, Tensor, Tensor]:
    return _drawn(d, depth=1)


def _gaussian(d: Draw) -> tuple[Tensor, Tensor, Tensor]:
    return _drawn(d, exact=False)


def _features_twice(d: Draw) -> tuple[Tensor, Tensor, Tensor]:
    x, W, b = _drawn(d)
    half = -(-d.n // 2)
    return x, W[:half].repeat(2, 1)[: d.n], b[:half].repeat(2)[: d.n]


def _nan_token(d: Draw) -> tuple[Tensor, Tensor, Tensor]:
    x, W, b = _drawn(d)
    x[d.B // 2, DEPTH // 2] = torch.nan
    return x, W, b


def _nan_feature(d: Draw) -> tuple[Tensor, Tensor, Tensor]:
    x, W, b = _drawn(d)
    W[-1, 0] = torch.nan
    return x, W, b


def _tokens_of_zeros(d: Draw) -> tuple[Tensor, Tensor, Tensor]:
    x, W, b = _drawn(d)
    return torch.zeros_like(x), W, b


def _inactive(d: Draw) -> tuple[Tensor, Tensor, Tensor]:
    x, W, b = _drawn(d)
    return x, W, b - 128


# cases that only an encoder has
PRODUCTS: dict[str, Product] = {
    "product of integers": _integers,
    "product of depth 1": _shallow,
    "Gaussian product": _gaussian,
    "features twice in the dictionary": _features_twice,
    "NaN in a token": _nan_token,
    "NaN in a feature": _nan_feature,
    "tokens of zeros": _tokens_of_zeros,
    "no active feature": _inactive,
}
