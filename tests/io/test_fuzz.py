"""Every reader of the package over thousands of damaged files: it reads or refuses, and takes memory in proportion.

A reader's files are made once, copied, damaged (``tests/_damage.py``) and read in a process of their own, so that a
crash is seen, too. Which damage a case has follows from its reader and number alone.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import traceback
from pathlib import Path

import pytest
import torch
from tests._damage import damage
from tests._readers import NEVER, READERS, Reader

from clipsteer import FileFormatError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="measures memory in /proc")

ROOM = 200 << 20  # bytes that a reader may take, and four times its files
SECONDS = 60  # that it may take, on a busy machine


def peak() -> int:
    """Bytes of resident memory at their highest since the last ``forget``."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0]) << 10


def forget() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def one(reader: Reader, valid: Path, folder: Path, seed: str) -> str:
    """What became of one case: "read", "refused", or what went wrong."""
    rng = random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(valid, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in rng.sample(files, 1 if rng.random() < 0.85 else min(2, len(files))):
        damage(rng, path)
    size = sum(path.stat().st_size for path in files)
    forget()
    before = peak()
    signal.alarm(SECONDS)
    try:
        reader.read(folder)
        end = "read"
    except (FileFormatError, *reader.documented) as error:
        end = "refused"
        if isinstance(error, FileFormatError) and not str(error).replace("\n", "").replace("\t", "").isprintable():
            end = f"{seed}: a terminal would act on {str(error)!r:.300}"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        end = f"{seed}: {type(error).__name__}: {error!s:.200} ({where.filename}:{where.lineno})"
    finally:
        signal.alarm(0)
    taken = peak() - before
    if taken > 4 * size + ROOM:
        end = f"{seed}: took {taken >> 20} MiB for {size} bytes"
    return end


def child(reader: Reader, name: str, valid: Path, folder: Path, numbers: range, report: int) -> None:
    """Cases in this process, which a damaged file may bring down."""
    limit = 4 << 30
    with open("/proc/self/statm") as file:
        limit += int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a reader that hangs is ended
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)
    for number in numbers:
        try:
            end = one(reader, valid, folder, f"{name} {number}")
        except Exception as error:
            end = f"{name} {number}: the test itself: {error!r}"
        os.write(report, (json.dumps([number, end]) + "\n").encode())


def run_cases(name: str, count: int, tmp_path: Path) -> dict[str, int]:
    """How many cases were read and how many refused. Fails with every other end."""
    reader = READERS[name]
    valid = tmp_path / "valid"
    valid.mkdir()
    torch.manual_seed(0)
    reader.make(valid)
    # imports what it needs, and the valid files are valid
    if name in NEVER:
        with pytest.raises(FileFormatError):
            reader.read(valid)
    else:
        reader.read(valid)
    (valid / "out.safetensors").unlink(missing_ok=True)
    ends: dict[str, int] = {"read": 0, "refused": 0}
    wrong: list[str] = []
    first = 0
    while first < count:
        source, report = os.pipe()
        process = os.fork()
        if process == 0:
            code = 1
            try:
                os.close(source)
                child(reader, name, valid, tmp_path / "case", range(first, count), report)
                code = 0
            finally:
                os._exit(code)
        os.close(report)
        with os.fdopen(source) as lines:
            for line in lines:
                number, end = json.loads(line)
                first = number + 1
                if end in ends:
                    ends[end] += 1
                else:
                    wrong.append(end)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if code != 0:
            wrong.append(f"{name} {first}: ended the process with {code}")
            first += 1
    assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(wrong[:40])
    return ends


QUICK = 12


@pytest.mark.by_day
@pytest.mark.parametrize("name", READERS)
def test_a_few_damaged_files(name, tmp_path):
    ends = run_cases(name, QUICK, tmp_path)
    assert ends["refused"] > 0
    assert sum(ends.values()) == QUICK


@pytest.mark.nightly
@pytest.mark.parametrize("name", READERS)
def test_every_reader_over_thousands_of_damaged_files(name, tmp_path, record_property):
    count = READERS[name].full
    ends = run_cases(name, count, tmp_path)
    record_property("ends", ends)
    sys.stdout.write(f"\n{name}: {ends}\n")
    assert sum(ends.values()) == count
    assert ends["refused"] > count // 10


def test_the_whole_run_is_of_twenty_thousand_files():
    assert sum(reader.full for reader in READERS.values()) >= 20_000
