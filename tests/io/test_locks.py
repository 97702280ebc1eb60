"""One writer a folder; what killed processes left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from clipsteer.io import locks
from clipsteer.io.checkpoint import save_state
from clipsteer.io.files import write_json
from clipsteer.io.locks import NAME, only_writer, remove_abandoned, temporary_folder

pytestmark = pytest.mark.skipif(os.name != "posix", reason="locks are POSIX")

HOLDER = """
import os, sys, time
from pathlib import Path
from clipsteer.io import locks
what, folder = sys.argv[1], Path(sys.argv[2])
if what == "folder":
    held = locks.only_writer(folder, "holder")
    held.__enter__()
    if os.fork() == 0:  # as a process that loads data, which outlives its parent
        os.write(1, f"child {os.getpid()}\\n".encode())
        time.sleep(600)
        os._exit(0)
elif what == "temporary":
    held = locks.temporary_folder(folder)
    (held.__enter__() / "half").write_text("x")
else:
    temporary, file = locks.open_temporary(folder)
os.write(1, f"held {os.getpid()}\\n".encode())
time.sleep(600)
"""


@pytest.fixture
def holder():
    started = []

    def start(what: str, folder: Path) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen([sys.executable, "-c", HOLDER, what, str(folder)], **pipes)
        started.append(process)
        process.child = None
        while (said := process.stdout.readline().split())[0] != "held":
            process.child = int(said[1])
        if what == "folder" and process.child is None:
            process.child = int(process.stdout.readline().split()[1])
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_the_second_is_told_who_writes_and_a_killed_one_holds_nothing(tmp_path, holder):
    folder = tmp_path / "run"
    process = holder("folder", folder)
    says = rf"second: {folder} is being written by process {process.pid} on '{socket.gethostname()}', since '20"
    with pytest.raises(RuntimeError, match=says), only_writer(folder, "second"):
        pytest.fail("two writers")
    process.kill()
    process.wait()
    try:
        # its child is alive and holds nothing
        os.kill(process.child, 0)
        with only_writer(folder, "third"):
            said = json.loads((folder / NAME).read_text())
            assert (said["pid"], said["what"]) == (os.getpid(), "third")
    finally:
        os.kill(process.child, signal.SIGKILL)
    assert not (folder / NAME).exists()


def test_a_thread_may_take_it_twice_and_another_thread_may_not(tmp_path):
    refused = []

    def other():
        try:
            with only_writer(tmp_path, "other"):
                pass
        except RuntimeError as error:
            refused.append(str(error))

    def run():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    with only_writer(tmp_path, "outer"):
        with only_writer(tmp_path / ".", "inner"):
            run()
        run()
    assert len(refused) == 2
    assert f"another thread of this process ({os.getpid()})" in refused[1]
    run()
    assert len(refused) == 2
    assert not list(tmp_path.iterdir())


def test_a_run_that_fails_lets_go_and_leaves_no_empty_folder(tmp_path):
    def fail(name):
        with only_writer(tmp_path / name, "run"):
            if name == "full":
                (tmp_path / name / "log").write_text("x")
            raise KeyError

    for name in ("new", "full"):
        with pytest.raises(KeyError):
            fail(name)
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "log"]


@pytest.mark.parametrize("said", ["", "{", "[]", '{"pid": "x"}', '{"pid": 1e999, "host": 1, "since": 2}', "\x1b[2J"])
def test_whatever_the_lock_says_it_is_held(tmp_path, said):
    with only_writer(tmp_path, "run"):
        (tmp_path / NAME).write_text(said)
        thread = []

        def other():
            try:
                with only_writer(tmp_path, "other"):
                    pass
            except RuntimeError as error:
                thread.append(str(error))

        second = threading.Thread(target=other)
        second.start()
        second.join()
    assert "is being written by" in thread[0]
    assert "\x1b" not in thread[0]


def test_where_there_are_no_locks_a_run_goes_on_with_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(locks, "_lock", lambda *_, **__: None)
    with only_writer(tmp_path, "run"):
        write_json(tmp_path / "a.json", 1)
    assert "cannot be locked" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("what", ["temporary", "file"])
def test_leftovers_go_when_their_process_is_gone_and_not_before(tmp_path, holder, what):
    process = holder(what, tmp_path / "merged")
    (left,) = tmp_path.iterdir()
    for _ in range(2):
        with temporary_folder(tmp_path / "merged") as mine:
            assert {path.name for path in tmp_path.iterdir()} == {left.name, mine.name}
    remove_abandoned(tmp_path / "merged")
    assert left.exists()
    process.kill()
    process.wait()
    remove_abandoned(tmp_path / "other")
    assert left.exists()
    with temporary_folder(tmp_path / "merged") as mine:
        assert [path.name for path in tmp_path.iterdir()] == [mine.name]
        mine.rename(tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_what_a_killed_save_of_another_step_left_goes_with_the_next(tmp_path):

    left = [
        tmp_path / f".step-{step:010d}.{kind}.0123456789ab.tmp" for step in (7, 13) for kind in ("json", "safetensors")
    ]
    for path in [*left, tmp_path / ".notes.0123456789ab.tmp"]:
        path.write_text("half")
    save_state(tmp_path, 20, {"x": torch.ones(1)}, {})
    assert not any(path.exists() for path in left)
    assert (tmp_path / ".notes.0123456789ab.tmp").exists()
