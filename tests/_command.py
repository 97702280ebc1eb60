"""The command line, called in this process, and code that runs in several."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from clipsteer.cli import main as cli


def run(capsys, *args: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)."""
    try:
        code = cli.main([str(a) for a in args])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def in_processes(folder: Path, worker: str, *args: object, size: int = 2, timeout: float = 240) -> None:
    """Run the code ``worker`` under torchrun; it must end well."""
    script = folder / "worker.py"
    script.write_text(worker)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    command += map(str, (script, *args))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
