"""What the specs of several ops have in common."""

from __future__ import annotations

from clipsteer.ops._spec import Shape

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
)


def dictionary_bench(B: int) -> dict[str, Shape]:
    """B rows of ViT-B's width and a dictionary 64 times as wide, with 32 and 64 features a row."""
    return {f"B{B}-k{k}": {"B": B, "d": 768, "n": 49152, "k": k} for k in (32, 64)}


def without_rank(shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    """The same shapes for the dense form."""
    dense = []
    for shape in shapes:
        dense.append({name: size for name, size in shape.items() if name != "r"})
    return tuple(dense)
