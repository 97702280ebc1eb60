"""What errors and log lines say: which file it was, and nothing that a terminal would act on."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path

# what a terminal acts on or hides: control characters but for line feed and tab, marks that turn
# the direction of writing or take no place, half characters of names that are not UTF-8
_ACTED_ON = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    r"\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def printable(text: object) -> str:
    r"""``str(text)`` with every character that a terminal would act on written out: \x1b."""
    return _ACTED_ON.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


class PrintableFormatter(logging.Formatter):
    """Log lines without what a terminal would act on, wherever their words come from."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return printable(super().format(record))


class FileFormatError(Exception):
    """A file is not what it should be: damaged, truncated, or of another format. The message names
    the path, and holds nothing that a terminal would act on."""

    def __init__(self, message: object) -> None:
        super().__init__(printable(message))


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Errors of the system that come out of the block name the path: a full disk does not say
    which file it was."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise
