"""The K2 largest of each row of a tile of distinct int64 keys, by a bitonic network.

triton.language.topk does the same with an xor reduction, which the interpreter runs element by element in Python; a sum
(wrapping, so exact) finds the partner as well, costs the same on a GPU, and is one NumPy call there.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def _log2(n):
    return n.bit_length() - 1


@triton.constexpr_function
def _bit_shape(rank, bit):
    return [1] * (rank - bit - 1) + [2] + [1] * bit


@triton.constexpr_function
def _cube_shape(numel):
    return [2] * (numel.bit_length() - 1)


@triton.jit
def _bit(RANK: tl.constexpr, BIT: tl.constexpr):
    """Bit number BIT of a position in the hypercube (0: the innermost axis), broadcastable over it."""
    return tl.reshape(tl.arange(0, 2), _bit_shape(RANK, BIT))


@triton.jit
def _bitonic_merge(cube, STEPS: tl.constexpr, flip):
    """Sorts each bitonic run of 2**STEPS values, descending, or ascending where ``flip`` is 1."""
    RANK: tl.constexpr = len(cube.shape)
    for i in tl.static_range(STEPS):
        partner = tl.sum(cube, axis=RANK - STEPS + i, keep_dims=True) - cube
        wants_small = (_bit(RANK, STEPS - 1 - i) ^ flip).to(tl.int1)
        cube = tl.where((cube < partner) != wants_small, partner, cube)
    return cube


@triton.jit
def sorted_top(keys, K2: tl.constexpr, FLIP: tl.constexpr):
    """keys (R, C) -> (R, K2), the largest of each row, descending (FLIP 0) or ascending (FLIP 1); 2 <= K2 <= C."""
    R: tl.constexpr = keys.shape[0]
    LOG_K: tl.constexpr = _log2(K2)
    LOG_C: tl.constexpr = _log2(keys.shape[1])
    cube = tl.reshape(keys, _cube_shape(keys.numel))
    # Runs of 1, 2, 4 ... K2, neighbours in opposite directions so that a pair of them is bitonic.
    for i in tl.static_range(1, LOG_K + 1):
        if i < LOG_C:
            cube = _bitonic_merge(cube, i, _bit(len(cube.shape), i))
        else:
            cube = _bitonic_merge(cube, i, FLIP)
    # The larger of each couple in two opposite runs: their K2 largest, again a bitonic run.
    for i in tl.static_range(LOG_K + 1, LOG_C + 1):
        cube = tl.max(cube, axis=len(cube.shape) - 1 - LOG_K)
        if i < LOG_C:
            cube = _bitonic_merge(cube, LOG_K, _bit(len(cube.shape), LOG_K))
        else:
            cube = _bitonic_merge(cube, LOG_K, FLIP)
    return tl.reshape(cube, (R, K2))


@triton.jit
def merged_top(descending, ascending):
    """Two sorted (R, K2) tiles -> the K2 largest of both, descending."""
    K2: tl.constexpr = descending.shape[1]
    best = tl.maximum(descending, ascending)
    cube = _bitonic_merge(tl.reshape(best, _cube_shape(best.numel)), _log2(K2), 0)
    return tl.reshape(cube, best.shape)
