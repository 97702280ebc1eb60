"""What this processor does with a product."""

import os
from pathlib import Path

import torch


def multiplies_pairs() -> bool:
    """Whether the library multiplies bfloat16 numbers by pairs here."""
    cpuinfo = Path("/proc/cpuinfo")
    found = cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text()
    left_out = os.environ.get("CLIPSTEER_CPU_ISA") == "avx512f"
    return found and not left_out and torch.ops.clipsteer_cpp.isa_level() >= 2
