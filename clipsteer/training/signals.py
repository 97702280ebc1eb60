"""Ctrl-C and SIGTERM as a wish to stop after the step at hand."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, NoReturn

EXIT_TERMINATED = 128 + signal.SIGTERM


class StopSignal:
    """Turns SIGTERM and the first Ctrl-C into a flag while active; a second Ctrl-C interrupts at
    once.

    Only the main thread may do that, elsewhere the flag stays down. A signal that is ignored stays
    ignored, and handlers are put back at the end.

    Attributes:
        asked: number of the signal that came, 0 before.
    """

    def __init__(self, wanted: bool) -> None:
        self.asked = 0
        self._wanted = wanted and threading.current_thread() is threading.main_thread()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if self._wanted:
            for number in (signal.SIGTERM, signal.SIGINT):
                before = signal.getsignal(number)
                # None: set by code that is not Python's, which cannot be put back
                if before is not None and before is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked:
            raise KeyboardInterrupt
        self.asked = number

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)


def leave(number: int, message: str) -> NoReturn:
    """End as `number` ends a program: KeyboardInterrupt for Ctrl-C (exit code 130), otherwise
    SystemExit(128 + number)."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt(message)
    raise SystemExit(128 + number)
