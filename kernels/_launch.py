"""What the launchers share: which machine a kernel runs on, and how to get there."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import NamedTuple

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


class Chip(NamedTuple):
    """What the launchers choose by: all that kernels know of a generation of GPUs."""

    amd: bool = False
    lanes: int = 32  # of a warp
    shared_memory: int = 48 << 10  # bytes (of LDS) that one program may use
    bulk_copies: bool = False  # copies whole tiles by itself
    operands_apart: bool = False  # matrix units read shared memory (wgmma, tcgen05): registers need not hold operands
    sums_apart: bool = False  # nor sums, which come into the registers all at once (tcgen05)
    few_registers: bool = False  # AMD's without registers for sums beside those of a lane (RDNA)
    halves: bool = False  # matrix units take bfloat16 and float16, in triton, which has none of Turing's
    tf32: bool = False  # and float32 as TF32

    def multiplies(self, dtype: torch.dtype) -> bool:
        """Whether matrix units take ``dtype`` as it is, and fast."""
        return self.halves and dtype != torch.float32

    def plain_depth(self, dtype: torch.dtype) -> int:
        """Of tiles that plain FMAs get through, which hold both factors in registers, and halves once more as they
        are."""
        return 16 if self.few_registers or dtype != torch.float32 else 32


# KiB of shared memory of a program, by compute capability; the next ones have it from the one before
SHARED_KIB = {75: 64, 80: 163, 86: 99, 87: 163, 88: 99, 90: 227, 120: 99}


def chip_named(name: str) -> Chip:
    """``name`` as compilers say it: sm_90, gfx942."""
    if name.startswith("gfx"):
        cdna = name.startswith("gfx9")
        return Chip(
            amd=True,
            lanes=64 if cdna else 32,
            shared_memory=(160 if name == "gfx950" else 64) << 10,
            few_registers=not cdna,
            halves=True,
            tf32=name == "gfx942",
        )
    capability = int(name.removeprefix("sm_"))
    since = max((c for c in SHARED_KIB if c <= capability), default=min(SHARED_KIB))
    return Chip(
        shared_memory=SHARED_KIB[since] << 10,
        bulk_copies=capability >= 90,
        operands_apart=90 <= capability < 120,
        sums_apart=100 <= capability < 120,
        halves=capability >= 80,
        tf32=capability >= 80,
    )


def chip_name(device: torch.device) -> str | None:
    """None where no GPU is: on CPU tensors kernels are interpreted."""
    if device.type != "cuda":
        return None
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@functools.lru_cache(None)
def chip(device: torch.device) -> Chip:
    name = chip_name(device)
    return Chip(halves=True) if name is None else chip_named(name)


def precision(x: torch.Tensor, depth: int) -> str:
    """How tensor cores take the numbers of sums of ``depth`` products: float32 as TF32 if torch's settings say so, else
    as two of them, which loses some 2^-20 of a product, where that is little beside what the sum's order may lose."""
    gpu = chip(x.device)
    if x.dtype != torch.float32 or not gpu.tf32:
        return "ieee"
    if tf32_allowed():
        return "tf32"
    return "tf32x3" if depth >= 64 and not gpu.amd else "ieee"


def by_matrix_units(dtype: torch.dtype, how: str, gpu: Chip) -> bool:
    """Whether products of ``dtype`` pay for tiles that only matrix units get through."""
    return gpu.multiplies(dtype) or (dtype == torch.float32 and how != "ieee")


def product_options(*matrices: torch.Tensor) -> dict[str, object]:
    """``PRECISION`` of the products of these matrices' rows, and ``TMA``: whether tiles of them get to tensor cores by
    bulk copies, which takes rows of whole 16 bytes from a 16-byte boundary."""
    first = matrices[0]
    how = precision(first, first.shape[1])
    tma = (
        chip(first.device).bulk_copies
        and by_matrix_units(first.dtype, how, chip(first.device))
        and all(t.numel() > 0 and t.data_ptr() % 16 == 0 and t.shape[1] * t.element_size() % 16 == 0 for t in matrices)
    )
    return {"PRECISION": how, "TMA": tma}


def one_by_one(options: dict[str, object], rows: torch.Tensor) -> bool:
    """Whether numbers go through registers one at a time, as rows begin at odd places; triton looks for 16."""
    return not options["TMA"] and rows.shape[1] % 16 != 0


def tiles(matrix: torch.Tensor, rows: int, cols: int) -> TensorDescriptor:
    """A contiguous matrix as a descriptor of tiles (rows, cols)."""
    # a single row counts as contiguous whatever its stride is
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.shape[1], 1], [rows, cols])


def operands(a: torch.Tensor, b: torch.Tensor, tma: bool, rows: int, cols: int, depth: int) -> tuple[object, object]:
    """What a kernel gets for a (M, D) and b (N, D) whose tiles of ``rows`` by ``cols`` it multiplies."""
    return (tiles(a, rows, depth), tiles(b, cols, depth)) if tma else (a, b)


def fitted(config: dict[str, int], rows: int, cols: int, item: int, gpu: Chip) -> dict[str, int]:
    """Tiles of ``rows`` and ``cols`` by BLOCK_D numbers of ``item`` bytes, shallow enough for shared memory."""
    buffers = config["num_stages"] - gpu.amd  # on AMD one of the stages is in registers
    depth = config["BLOCK_D"]
    while buffers * (rows + cols) * depth * item > gpu.shared_memory:
        depth //= 2
    return {**config, "BLOCK_D": depth}


def similarities(rows: torch.Tensor, cols: torch.Tensor, on_cpu: bool) -> tuple[dict[str, object], dict[str, int]]:
    """How the product of these matrices' rows is taken, and its tile, which is made into something in registers."""
    options, gpu, wide = product_options(rows, cols), chip(rows.device), rows.dtype == torch.float32
    config = {
        "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_D": 32 if wide or gpu.amd else 64,
        "num_warps": 8, "num_stages": 2 if gpu.amd else 3,
    }  # fmt: skip
    if on_cpu:
        config = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_D": 128}
    elif not by_matrix_units(rows.dtype, options["PRECISION"], gpu):
        config = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": gpu.plain_depth(rows.dtype), "num_warps": 4, "num_stages": 2}
    else:
        if gpu.few_registers:
            config["BLOCK_N"] = 64
        elif options["PRECISION"] == "tf32x3":
            # both halves of a tile pass through the registers, and all of it where these hold the operands
            config |= {} if options["TMA"] and gpu.operands_apart else {"BLOCK_N": 64}
        elif options["TMA"]:
            config |= two_programs(gpu)
        if one_by_one(options, rows):
            config["BLOCK_D"] = 16
        config = fitted(config, config["BLOCK_M"], config["BLOCK_N"], rows.element_size(), gpu)
    return {**options, "EVEN_D": rows.shape[1] % config["BLOCK_D"] == 0}, config


def two_programs(gpu: Chip) -> dict[str, int]:
    """What lets two programs of 8 warps share a multiprocessor, so that one multiplies while the other does the rest;
    measured on Hopper, and elsewhere too few registers."""
    return {"maxnreg": 128} if gpu.operands_apart and not gpu.sums_apart else {}


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
