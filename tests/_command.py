"""The command line, called in this process, and code that runs in several."""

from __future__ import annotations

import atexit
import functools

from torch.distributed import TCPStore

from _forks import Forks
from clipsteer.cli import main as cli


def run(capsys, *args: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)."""
    try:
        code = cli.main([str(a) for a in args])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


@functools.cache
def _workers() -> Forks:
    forks = Forks(["torch.distributed", "open_clip", "pytest", "clipsteer.clip.model", "clipsteer.sae.train"],
                  {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"})  # fmt: skip
    atexit.register(forks.close)
    return forks


def in_processes(worker: str, *args: object, size: int = 2) -> None:
    """Run the code ``worker`` in processes that find each other as under torchrun; all must end well."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    codes, written = _workers().run(worker, *args, size=size, environment=meeting)
    assert codes == [0] * size, f"{codes}\n{written[-3000:]}"
