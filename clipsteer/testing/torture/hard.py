"""Rows that are hard to select from: what a top-k kernel gets wrong in few rows of many."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ROWS", "Draw", "rows"]

# where kernels cut a row
BORDERS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
LANES = (4, 32, 64, 128, 256, 1024)

Selection = tuple[Tensor, int]  # x (B, n) and k


@dataclass(frozen=True)
class Draw:
    """Sizes of one selection, k ≤ n, and where its random numbers come from."""

    B: int
    n: int
    k: int
    dtype: torch.dtype
    generator: torch.Generator

    def normal(self, B: int | None = None) -> Tensor:
        """(B, n), Gaussian."""
        shape = (self.B if B is None else B, self.n)
        wide = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return wide.to(self.dtype)

    def integers(self, low: int, high: int) -> Tensor:
        """(B, n), from low to high: ties abound."""
        drawn = torch.randint(low, high + 1, (self.B, self.n), generator=self.generator)
        return drawn.to(self.dtype)

    def order(self) -> Tensor:
        """The columns in an order of chance, (n,)."""
        return torch.randperm(self.n, generator=self.generator)

    def neighbours(self, shift: int = 0) -> Tensor:
        """(B, n): numbers that differ in the last digits but ``shift`` of their bits alone."""
        info = torch.finfo(self.dtype)
        integers = {16: torch.int16, 32: torch.int32, 64: torch.int64}[info.bits]
        digits = round(-math.log2(info.eps)) - shift
        one = torch.ones((), dtype=self.dtype).view(integers)
        values = [(self.order() % (1 << digits)) << shift for _ in range(self.B)]
        return (one + torch.stack(values).to(integers)).view(self.dtype)


Maker = Callable[[Draw], Iterator[Selection]]
ROWS: dict[str, Maker] = {}


def _hard(name: str) -> Callable[[Maker], Maker]:
    def register(make: Maker) -> Maker:
        ROWS[name] = make
        return make

    return register


def rows(
    name: str, B: int, n: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Selection]:
    """The selections (x, k) of the case ``name``, on the host. A case may take other sizes than the
    given ones, where its name says so.

    Raises:
        ValueError: a name that is not in ``ROWS``, or k > n.
    """
    if name not in ROWS:
        raise ValueError(f"torture: case must be one of {list(ROWS)}, got {name!r}")
    if not 1 <= k <= n or B < 1:
        raise ValueError(f"torture: expected B >= 1 and 1 <= k <= n, got B {B}, n {n}, k {k}")
    generator = torch.Generator().manual_seed(seed)
    return list(ROWS[name](Draw(B, n, k, dtype, generator)))


@_hard("random")
def _random(d: Draw) -> Iterator[Selection]:
    yield d.normal(), d.k


@_hard("small integers")
def _integers(d: Draw) -> Iterator[Selection]:
    yield d.integers(-2, 2), d.k


@_hard("ties across tile borders")
def _borders(d: Draw) -> Iterator[Selection]:
    """The k-th and the next are equal, and a border lies between them."""
    borders = [b for b in BORDERS if b < d.n]
    x = d.normal(len(borders)).clamp(-2, 2)
    for row, border in zip(x, borders):
        order = d.order()
        row[order[(order != border - 1) & (order != border)][: d.k - 1]] = 4
        row[border - 1 : border + 1] = 3
    yield x, min(d.k, d.n - 1)


@_hard("more equal values than any capacity")
def _capacity(d: Draw) -> Iterator[Selection]:
    x = d.normal().clamp(-1, 1)
    for row in x:
        row[d.order()[: d.n - d.n // 4]] = 2
    yield x, d.k


@_hard("the k-th value fills the row")
def _filled(d: Draw) -> Iterator[Selection]:
    """Fewer than k are larger, and they come last."""
    x = torch.ones(d.B, d.n, dtype=d.dtype)
    larger = d.k // 2
    x[:, d.n - larger :] = torch.arange(2, 2 + larger).to(d.dtype)
    yield x, d.k


@_hard("one value everywhere")
def _constant(d: Draw) -> Iterator[Selection]:
    values = torch.tensor([1.0, -1.0, 0.375, 3e4])
    yield values.to(d.dtype)[:, None].repeat(1, d.n), d.k


@_hard("one bin holds everything")
def _one_bin(d: Draw) -> Iterator[Selection]:
    """Last digits alone differ: in the last bits of all, and eight bits higher."""
    for shift in (0, 2, 8):
        if shift < -math.log2(torch.finfo(d.dtype).eps):
            x = d.neighbours(shift)
            x[1::2] *= -1
            yield x, d.k


@_hard("larger in the last bit, behind a border")
def _last_bit(d: Draw) -> Iterator[Selection]:
    borders = [b for b in BORDERS if b < d.n]
    x = torch.ones(len(borders), d.n, dtype=d.dtype)
    for row, border in zip(x, borders):
        row[border] = 1 + torch.finfo(d.dtype).eps
    yield x, 1
    yield -x, d.n - 1


@_hard("sorted")
def _sorted(d: Draw) -> Iterator[Selection]:
    yield d.normal().sort(-1, descending=True).values, d.k


@_hard("reversed")
def _reversed(d: Draw) -> Iterator[Selection]:
    yield d.normal().sort(-1).values, d.k


@_hard("largest in the last tile")
def _last(d: Draw) -> Iterator[Selection]:
    rest = d.order()
    rest = rest[rest < d.n - d.k]
    yield d.normal().sort(-1).values[:, torch.cat([rest, torch.arange(d.n - d.k, d.n)])], d.k


@_hard("largest in the first tile")
def _first(d: Draw) -> Iterator[Selection]:
    rest = d.order()
    rest = rest[rest >= d.k]
    x = d.normal().sort(-1, descending=True).values
    yield x[:, torch.cat([torch.arange(d.k), rest])], d.k


@_hard("largest in one lane")
def _lane(d: Draw) -> Iterator[Selection]:
    """Every so many columns one of the largest: a thread that strides over the row has them all."""
    lanes = [lane for lane in LANES if lane < d.n]
    x = d.normal(len(lanes)).clamp(-2, 2)
    for row, lane in zip(x, lanes):
        own = row[int(torch.randint(lane, (), generator=d.generator)) :: lane]
        own[:] = torch.arange(3, 3 + len(own)).to(d.dtype)
    yield x, d.k


@_hard("teeth of a saw")
def _saw(d: Draw) -> Iterator[Selection]:
    tooth = torch.arange(d.n) % 61
    yield torch.stack([tooth, 60 - tooth]).to(d.dtype), d.k


@_hard("duplicated features")
def _duplicates(d: Draw) -> Iterator[Selection]:
    """Each value twice side by side, and four times a quarter of the row apart."""
    x = d.normal()
    yield x.repeat_interleave(2, 1)[:, : d.n], d.k
    yield x[:, : -(-d.n // 4)].repeat(1, 4)[:, : d.n], d.k


@_hard("rows of zeros")
def _zeros(d: Draw) -> Iterator[Selection]:
    x = torch.zeros(3, d.n, dtype=d.dtype)
    x[1, d.n // 2] = 1
    x[2, d.n // 2] = -1
    yield x, d.k


@_hard("negative rows")
def _negative(d: Draw) -> Iterator[Selection]:
    x = -d.normal().abs() - 0.5
    x[1::2, d.n // 2] = 0
    yield x, d.k


@_hard("zeros of both signs")
def _signs(d: Draw) -> Iterator[Selection]:
    x = d.integers(-1, 0)
    x[d.normal() > 0] = -0.0
    x[:, 0] = -0.0
    x[:, -1] = 1
    yield x, d.k


@_hard("NaN")
def _nan(d: Draw) -> Iterator[Selection]:
    """One in the middle, one at the end, of negative sign, more than k of them, nothing else; the
    rows beside them have none."""
    x = d.normal(10)
    x[0, d.n // 2] = math.nan
    x[2, -1] = math.nan
    x[4, 0] = -torch.tensor(math.nan)
    x[6, d.order()[: min(d.k + 1, d.n)]] = math.nan
    x[8] = math.nan
    yield x, d.k


@_hard("infinities")
def _infinities(d: Draw) -> Iterator[Selection]:
    """Some; fewer than k others than the negative one; all."""
    x = d.normal(5)
    x[0, d.order()[: d.k // 2 + 1]] = math.inf
    x[1, d.order()[: d.n - d.k // 2]] = -math.inf
    x[2] = math.inf
    x[3] = -math.inf
    x[4] = torch.where(x[4] > 0, math.inf, -math.inf)
    yield x, d.k


@_hard("lowest and largest finite numbers")
def _extremes(d: Draw) -> Iterator[Selection]:
    x = d.normal(4)
    largest = torch.tensor(torch.finfo(d.dtype).max, dtype=d.dtype)
    x[0] = -largest
    x[1, d.order()[: d.n - d.k // 2]] = -largest
    x[2, d.order()[: d.k // 2 + 1]] = largest
    x[3] = torch.where(x[3] > 0, largest, -largest)
    yield x, d.k


@_hard("denormals")
def _denormals(d: Draw) -> Iterator[Selection]:
    info = torch.finfo(d.dtype)
    smallest = info.smallest_normal * info.eps
    steps = d.order() % round(1 / info.eps)
    x = torch.stack([steps, -steps, steps - steps.max() // 2]).double() * smallest
    yield x.to(d.dtype), d.k


@_hard("every magnitude")
def _magnitudes(d: Draw) -> Iterator[Selection]:
    info = torch.finfo(d.dtype)
    reach = math.log2(info.max) - 2
    exponents = torch.rand(d.B, d.n, generator=d.generator, dtype=torch.float64) * 2 - 1
    x = torch.exp2(exponents * min(reach, -math.log2(info.smallest_normal)))
    yield (x * d.normal().double().sign()).to(d.dtype), d.k


@_hard("rows of unlike size")
def _unlike(d: Draw) -> Iterator[Selection]:
    """What one row leaves behind is of no use to the next."""
    scale = torch.tensor([1.0, 1e4, 1e-4, -1e4, 1e-2, 1e2], dtype=torch.float64)
    yield (d.normal(6).double().abs() * scale[:, None]).to(d.dtype), d.k


@_hard("a needle in every column")
def _needles(d: Draw) -> Iterator[Selection]:
    n = min(d.n, 129)
    x = torch.eye(n).to(d.dtype)
    yield x, 1
    if n > 1:
        yield -x, n - 1


@_hard("k = 1")
def _k_one(d: Draw) -> Iterator[Selection]:
    yield d.integers(-2, 2), 1
    yield d.normal(), 1


@_hard("k = n")
def _k_all(d: Draw) -> Iterator[Selection]:
    yield d.integers(-2, 2), d.n
    yield d.normal(), d.n


@_hard("k = n - 1")
def _k_most(d: Draw) -> Iterator[Selection]:
    yield d.normal(), max(d.n - 1, 1)


@_hard("n a multiple of nothing")
def _sizes(d: Draw) -> Iterator[Selection]:
    """Every n beside a power of two, the largest values at its end."""
    for border in (2, *BORDERS):
        for n in (border - 1, border + 1):
            if n <= d.n:
                x = d.normal()[:, :n].sort(-1).values
                yield x, min(d.k, n)


@_hard("one row, no row, many rows")
def _counts(d: Draw) -> Iterator[Selection]:
    yield d.normal(1), d.k
    yield d.normal(0), d.k
    n = min(d.n, 33)
    yield d.normal(130)[:, :n], min(d.k, n)
