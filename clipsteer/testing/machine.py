"""What figures belong to: the chip, the versions, and the memory that a call takes of it."""

from __future__ import annotations

import contextlib
import ctypes
import platform
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

        facts |= {
            "chip": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
            "driver": _driver(),
        }
    return facts | {"device": device, "date": time.strftime("%Y-%m-%d")}


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(query[0]) is None:
        return "unknown"
    found = subprocess.run(query, capture_output=True, text=True).stdout.split()
    return found[0] if found else "unknown"


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
        # what earlier calls left in glibc's heap would hide what this one needs
        ctypes.CDLL(None).malloc_trim(0)
    try:
        status.write_text("5")  # resets the high-water mark of resident memory
        before = resident("VmRSS")
    except OSError:
        before = _highest()
        call()
        return max(0, _highest() - before)
    call()
    return max(0, resident("VmHWM") - before)


def _highest() -> int:
    """Bytes of resident memory at its highest since the process began."""
    import resource  # which Windows does not have

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
