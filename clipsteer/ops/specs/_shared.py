"""What the specs of several ops have in common."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from clipsteer.ops._spec import Draw, Shape

# e^x in roundings: 1 for the reduced argument, 2 for the polynomial and its last step, 1 for the
# scaling. A logarithm is held to the same.
EXP = 4

# Edges of B rows in groups that each have a matrix (d, d), of rank r in low rank: B, groups, d, r
# and whether the call is plain.
GROUPED_EDGES = (
    (33, 5, 31, 8),
    (4, 9, 127, 129),
    (1, 1, 1, 1, 1),
    (0, 2, 8, 4),
    (129, 2, 32, 33, 1),
    (31, 1, 129, 32),
    (32, 3, 128, 64),
    (31, 2, 203, 197),
    (19, 2, 206, 6),
)


def dictionary_bench(B: int, **switches: int) -> dict[str, Shape]:
    """B rows of ViT-B's width and a dictionary 64 times as wide, with 32 and 64 features a row."""
    return {f"B{B}-k{k}": {"B": B, "d": 768, "n": 49152, "k": k, **switches} for k in (32, 64)}


def without_rank(shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    """The same shapes for the dense form."""
    dense = []
    for shape in shapes:
        dense.append({name: size for name, size in shape.items() if name != "r"})
    return tuple(dense)


def unit_rows(x: Tensor) -> Tensor:
    """Rows of norm 1."""
    return x / torch.linalg.vector_norm(x, dim=1, keepdim=True)


def drawn_pairs(case: Draw, d: int) -> tuple[Tensor, Tensor]:
    """Features (B, d) of images and of texts, which lean towards their images: of unit norm but for
    the case's scale, by which images are multiplied and texts divided."""
    in_double = replace(case, dtype=torch.float64, scale=1.0)
    B = case.shape["B"]
    a = in_double.tensor(B, d)
    b = in_double.tensor(B, d)
    if not case.exact:
        a = unit_rows(a)
        b = unit_rows(a + b / d**0.5) / case.scale
        a = a * case.scale
    return a.to(case.dtype), b.to(case.dtype)


def drawn_number(case: Draw, value: float) -> Tensor:
    """A tensor () of at least float32, exact in bfloat16."""
    wide = torch.promote_types(case.dtype, torch.float32)
    return torch.tensor(value).bfloat16().to(wide)
