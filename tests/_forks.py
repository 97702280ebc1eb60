"""Code that runs in processes of its own, without paying for their imports each time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

# Reads jobs, a line each, and runs each in `size` forks of itself, as torchrun would start them: an environment that
# names the rank, the first that fails ends the others. Answers with the exit codes and all that was written.
SOURCE = """
import atexit, json, os, signal, sys, tempfile, time, traceback

for name in sys.argv[1:]:
    __import__(name)


def child(job, rank, output):
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    os.environ.update(job["environment"], RANK=str(rank), LOCAL_RANK=str(rank))
    sys.argv = ["worker.py", *job["arguments"]]
    code = 1
    try:
        exec(compile(job["code"], "worker.py", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            print(code)
            code = 1
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def run(job, output):
    running = {}
    for rank in range(job["size"]):
        process = os.fork()
        if process == 0:
            child(job, rank, output)
        running[process] = rank
    codes = [None] * job["size"]
    late = time.monotonic() + job["timeout"]
    while running:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process:
            code = codes[running.pop(process)] = os.waitstatus_to_exitcode(status)
            if code:
                late = min(late, time.monotonic() + 10)
        elif time.monotonic() > late:
            for process in running:
                os.kill(process, signal.SIGKILL)
            late = float("inf")
        else:
            time.sleep(0.01)
    return codes


for line in sys.stdin:
    with tempfile.TemporaryFile("w+") as output:
        codes = run(json.loads(line), output)
        output.seek(0)
        print(json.dumps([codes, output.read()]), flush=True)
"""


class Forks:
    """A process that has imported some modules, and runs code in forks of itself."""

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str] = {}) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SOURCE, *modules],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        code: str,
        *arguments: object,
        size: int = 1,
        environment: Mapping[str, str] = {},
        timeout: float = 600,
    ) -> tuple[list[int], str]:
        """The exit codes of ``size`` forks, and what they wrote; what is late is killed."""
        job = {"code": code, "arguments": [str(a) for a in arguments], "size": size, "timeout": timeout}
        job["environment"] = {**environment, "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        codes, written = json.loads(self._process.stdout.readline())
        return codes, written

    def close(self) -> None:
        """It ends with its input."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
