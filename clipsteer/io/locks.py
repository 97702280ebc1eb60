"""Locks that end with their process: on files that are being written, and on folders of runs.

They are ``flock``'s, so a killed process leaves none behind. On NFS they hold between machines
where the server keeps locks (Linux since 2.6.12; not with ``nolock`` or ``local_lock``); where the
system has none (Windows, some network mounts) nothing is locked.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

logger = logging.getLogger(__name__)

NAME = ".clipsteer.lock"
# what others say while they hold a lock; anything else says that there are none here
_TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)

Owner = tuple[str, int]  # a folder and a thread
_held: dict[Owner, BinaryIO] = {}


def _forget() -> None:
    """A forked child keeps no lock of its parent alive."""
    for file in _held.values():
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _lock(file: BinaryIO | int, wait: bool = True) -> bool | None:
    """Take the lock of an open file, which ends with its process; False where another has it, None
    where there are no locks."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except ImportError:
        return None
    except OSError as error:
        return False if error.errno in _TAKEN else None
    return True


def open_temporary(path: Path) -> tuple[Path, BinaryIO]:
    """A new hidden file beside ``path``, open for writing and locked."""
    while True:
        temporary = _temporary(path)
        file = temporary.open("xb")
        # between the two lines another writer may have taken it for abandoned
        if not _lock(file) or os.fstat(file.fileno()).st_nlink:
            return temporary, file
        file.close()


@contextlib.contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """A new hidden folder beside ``folder``, which goes at the end unless it was renamed.

    What killed processes left of earlier ones goes first.
    """
    remove_abandoned(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        while True:
            temporary = _temporary(folder)
            temporary.mkdir()
            handle = _open_folder(temporary)
            if handle is not None:
                stack.callback(os.close, handle)
            if handle is None or not _lock(handle) or os.fstat(handle).st_nlink:
                break
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        yield temporary


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


def _open_folder(folder: Path) -> int | None:
    if os.name != "posix":
        return None
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def remove_abandoned(path: Path, name: str | None = None) -> None:
    """Remove temporary files and folders of ``path`` whose process is gone.

    name: a pattern of names instead of ``path``'s own.
    """
    name = re.escape(path.name) if name is None else name
    pattern = re.compile(rf"\.(?:{name})\.[0-9a-f]{{12}}\.tmp")
    with contextlib.suppress(OSError):  # a folder that may be written to but not listed
        for found in filter(pattern.fullmatch, os.listdir(path.parent)):
            with contextlib.suppress(OSError):
                _remove_unlocked(path.parent / found)


def _remove_unlocked(temporary: Path) -> None:
    if not temporary.is_dir():
        with temporary.open("r+b") as file:
            if _lock(file, wait=False):
                temporary.unlink()
        return
    handle = _open_folder(temporary)
    if handle is None:
        return
    try:
        if _lock(handle, wait=False):
            shutil.rmtree(temporary, ignore_errors=True)
    finally:
        os.close(handle)


@contextlib.contextmanager
def only_writer(folder: str | Path, what: str) -> Iterator[None]:
    """Be the only process, and the only thread, that writes to ``folder``, which is made.

    Where the thread is that already, nothing happens. The lock is a hidden file in the folder; it
    goes at the end, with the folder where nothing else came into it, and one that a killed process
    left is taken over.

    Args:
        what: writes; begins the message.

    Raises:
        RuntimeError: another process or thread is; the message says which, where and since when.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    owner = (os.path.realpath(folder), threading.get_ident())
    if owner in _held:
        yield
        return
    path = folder / NAME
    file = _claim(path, what)
    _held[owner] = file
    try:
        yield
    finally:
        # a forked child that comes here is not the owner
        if _held.pop(owner, None) is not None:
            path.unlink(missing_ok=True)
            file.close()
            if is_new:
                with contextlib.suppress(OSError):  # there is something in it, as there should be
                    folder.rmdir()


def _claim(path: Path, what: str) -> BinaryIO:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        # opened for appending: what the holder wrote stays
        file = path.open("a+b")
        locked = _lock(file, wait=False)
        if locked is False:
            with file:
                raise RuntimeError(
                    f"{what}: {path.parent} is being written by {_holder(file)}; wait for its end, "
                    f"or use another folder"
                )
        if locked is None:
            logger.warning("%s: %s cannot be locked; start no second run in it", what, path.parent)
        # the holder before may have removed it between the two
        if locked is None or _is_at(file, path):
            break
        file.close()
    file.truncate(0)
    file.write(json.dumps(_self(what)).encode())
    file.flush()
    return file


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _self(what: str) -> dict[str, str | int]:
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "what": what}


def _holder(file: BinaryIO) -> str:
    """Who holds the lock, as its file says; it may be anybody's."""
    file.seek(0)
    try:
        said = json.loads(file.read(1 << 12))
        pid, host, since = int(said["pid"]), str(said["host"]), str(said["since"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return "another process"
    if host == socket.gethostname() and pid == os.getpid():
        return f"another thread of this process ({pid}), since {since!r:.40}"
    return f"process {pid} on {host!r:.80}, since {since!r:.40}"
