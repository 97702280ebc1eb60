"""What the launchers share: which machine a kernel runs on, and how to get there."""

from __future__ import annotations

import functools
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from ._precision import tf32_allowed


def interpreted(kernel: object) -> bool:
    """Whether ``kernel`` was decorated under TRITON_INTERPRET=1 and so runs in NumPy on CPU tensors."""
    return not isinstance(kernel, JITFunction)


def on_device(t: torch.Tensor):
    """Context in which a launch goes to ``t``'s device; nothing to do on the CPU (interpreter)."""
    if t.device.type == "cpu":
        return nullcontext()
    devices = getattr(torch, t.device.type)
    return nullcontext() if devices.current_device() == t.get_device() else devices.device(t.device)


@functools.lru_cache(None)
def shared_memory_limit(device: torch.device) -> int:
    """Bytes of shared memory (LDS) that one block may use on ``device``."""
    if torch.version.hip is not None:
        return 64 * 1024
    if device.type != "cuda":
        return 48 * 1024
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)


@functools.lru_cache(None)
def has_bulk_copies(device: torch.device) -> bool:
    """Whether ``device`` copies whole tiles by itself, as NVIDIA's do from Hopper on."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.lru_cache(None)
def has_tf32(device: torch.device) -> bool:
    """Whether ``device`` has cores that take float32 numbers as TF32: NVIDIA's from Ampere on, of AMD's gfx942."""
    if device.type != "cuda":
        return False
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0] == "gfx942"
    return torch.cuda.get_device_capability(device) >= (8, 0)


@functools.lru_cache(None)
def two_programs(device: torch.device) -> dict[str, int]:
    """What lets two programs of 8 warps share a multiprocessor, so that one multiplies while the other does the rest;
    measured on Hopper, and elsewhere too few registers."""
    hopper = device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9
    return {"maxnreg": 128} if hopper else {}


def precision(x: torch.Tensor, depth: int) -> str:
    """How tensor cores take the numbers of sums of ``depth`` products: float32 as TF32 if torch's settings say so, else
    as two of them, which loses some 2^-20 of a product, where that is little beside what the sum's order may lose."""
    if x.dtype != torch.float32 or not has_tf32(x.device):
        return "ieee"
    if tf32_allowed():
        return "tf32"
    return "tf32x3" if depth >= 64 and torch.version.hip is None else "ieee"


def product_options(*matrices: torch.Tensor) -> dict[str, object]:
    """``PRECISION`` of the products of these matrices' rows, and ``TMA``: whether tiles of them get to tensor cores by
    bulk copies, which takes rows of whole 16 bytes from a 16-byte boundary."""
    first = matrices[0]
    how = precision(first, first.shape[1])
    tma = (
        has_bulk_copies(first.device)
        and (first.dtype != torch.float32 or how != "ieee")
        and all(t.numel() > 0 and t.data_ptr() % 16 == 0 and t.shape[1] * t.element_size() % 16 == 0 for t in matrices)
    )
    return {"PRECISION": how, "TMA": tma}


def tiles(matrix: torch.Tensor, rows: int, cols: int) -> TensorDescriptor:
    """A contiguous matrix as a descriptor of tiles (rows, cols)."""
    # a single row counts as contiguous whatever its stride is
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.shape[1], 1], [rows, cols])


def operands(a: torch.Tensor, b: torch.Tensor, tma: bool, rows: int, cols: int, depth: int) -> tuple[object, object]:
    """What a kernel gets for a (M, D) and b (N, D) whose tiles of ``rows`` by ``cols`` it multiplies."""
    return (tiles(a, rows, depth), tiles(b, cols, depth)) if tma else (a, b)


def similarities(rows: torch.Tensor, cols: torch.Tensor, on_cpu: bool) -> tuple[dict[str, object], dict[str, int]]:
    """How the product of these matrices' rows is taken, and its tile, which is made into something in registers."""
    options, hip, wide = product_options(rows, cols), torch.version.hip is not None, rows.dtype == torch.float32
    config = {
        "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_D": 32 if wide or hip else 64,
        "num_warps": 8, "num_stages": 2 if hip else 3,
    }  # fmt: skip
    if on_cpu:
        config = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_D": 128}
    elif wide and options["PRECISION"] == "ieee":
        config = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 2}
    elif options["PRECISION"] == "tf32x3":
        # both halves of a tile pass through the registers, and all of it without bulk copies
        config |= {} if options["TMA"] else {"BLOCK_N": 64}
    elif options["TMA"]:
        config |= two_programs(rows.device)
    return {**options, "EVEN_D": rows.shape[1] % config["BLOCK_D"] == 0}, config


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()  # triton's own takes 5 µs of the host


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@triton.jit
def _count_kernel(out_ptr, n):
    for i in range(0, n):
        tl.store(out_ptr + i, i)


def interpreter_failure() -> str | None:
    """Why no interpreted kernel runs here: some releases of triton's interpreter and of NumPy do not agree."""
    out = torch.zeros(3, dtype=torch.int32)
    try:
        _count_kernel[(1,)](out, 3)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None if out.tolist() == [0, 1, 2] else f"it counted to {out.tolist()}"
