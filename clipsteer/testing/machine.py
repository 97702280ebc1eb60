"""What figures belong to: the chip, the versions, and the memory that a call takes of it."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import resource
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def chip() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the figures belong to: chip, driver, versions, threads, date."""
    facts = {
        "chip": chip(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device == "cuda":
        import triton

        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = (
            subprocess.run(query, capture_output=True, text=True).stdout.split()
            if shutil.which(query[0])
            else []
        )
        facts |= {
            "chip": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
        }
        facts["driver"] = driver[0] if driver else "unknown"
    return facts | {"device": device, "date": time.strftime("%Y-%m-%d")}


def resident(field: str) -> int:
    """Bytes of resident memory: VmRSS now, VmHWM at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def extra_memory(call: Callable[[], Any], device: str) -> int:
    """Peak bytes that a call needs beyond what was there: allocator statistics on a GPU, resident
    pages on the CPU."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    status = Path("/proc/self/clear_refs")
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(
            0
        )  # what earlier calls left in glibc's heap would hide what this one needs
    try:
        status.write_text("5")  # resets the high-water mark of resident memory
        before = resident("VmRSS")
    except OSError:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        call()
        return 1024 * max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    call()
    return max(0, resident("VmHWM") - before)
