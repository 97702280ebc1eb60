"""Where a run's figures go: progress bar or log lines, log.jsonl, wandb or tensorboard."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clipsteer.io.files import write_atomically
from clipsteer.io.messages import naming

logger = logging.getLogger(__name__)

TRACKERS = ("wandb", "tensorboard")
Send = Callable[[Mapping[str, Any]], None]


def trim_log(path: Path, step: int) -> None:
    """Drop the log's lines from after `step`, which a resumed run writes again, and a torn last
    line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    write_atomically(path, lambda file: file.write(b"".join(kept)))


def line_of(figures: Mapping[str, Any]) -> str:
    """Figures as ``key=value``, to four digits."""
    words = []
    for name, value in figures.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        words.append(f"{name.replace(' ', '_')}={text}")
    return " ".join(words)


class Reporter:
    """The figures of one run while it is entered; does nothing in processes but the first.

    On a terminal there is a bar; elsewhere each record is a line of this module's logger, at INFO.

    Args:
        name: of the run, before its figures.
        total, first: steps of the run, and those that are done.
        shown: figures that the bar has, too.
        log: file of one JSON object a record, or None.
        track: "wandb", "tensorboard" or None; config (a dataclass) goes with it, and `folder` takes
            its files.
    """

    def __init__(
        self,
        name: str,
        total: int,
        first: int,
        *,
        shown: tuple[str, ...],
        lead: bool,
        log: Path | None,
        track: str | None,
        config: Any,
        folder: Path | None,
    ) -> None:
        self.name = name
        self.total = total
        self.first = first
        self.shown = shown
        self.lead = lead
        self.log = log if lead else None
        self.track = track if lead else None
        self.config = config
        self.folder = folder
        self.latest: dict[str, Any] = {}

    def __enter__(self) -> Reporter:
        with ExitStack() as stack:
            self._send = None
            if self.track is not None:
                self._send, close = _tracker(self.track, self.name, self.folder, self.config)
                stack.callback(close)
            self._file = None
            if self.log is not None:
                self.log.parent.mkdir(parents=True, exist_ok=True)
                self._file = stack.enter_context(self.log.open("a"))
            self.bar = stack.enter_context(
                tqdm(
                    total=self.total,
                    initial=self.first,
                    desc=self.name,
                    unit="step",
                    disable=None if self.lead else True,  # None: where stderr is no terminal
                )
            )
            self._stack = stack.pop_all()
        return self

    def write(self, record: dict[str, Any]) -> None:
        """Take a record; "step" is among its figures."""
        if not self.lead:
            return
        self.latest |= record
        if self._file is not None and self.log is not None:
            with naming(self.log):
                self._file.write(json.dumps(record) + "\n")
                self._file.flush()
        if self._send is not None:
            self._send(record)
        if self.bar.disable:
            logger.info("%s: %s", self.name, line_of(record))
        else:
            shown = {name: f"{record[name]:.4g}" for name in self.shown if name in record}
            self.bar.set_postfix(shown, refresh=False)

    def finish(self, quality: Mapping[str, Any]) -> None:
        """The last line of a run that came to its end."""
        if self.lead:
            self.bar.close()
            logger.info("%s: done, %s", self.name, line_of({"steps": self.total, **quality}))

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


def _tracker(
    track: str, name: str, folder: Path | None, config: Any
) -> tuple[Send, Callable[[], None]]:
    directory = None if folder is None else str(folder)
    try:
        if track == "wandb":
            import wandb

            run = wandb.init(
                project="clipsteer", job_type=name, config=asdict(config), dir=directory
            )

            def log(record: Mapping[str, Any]) -> None:
                run.log(record, step=int(record["step"]))

            return log, run.finish
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RuntimeError(
            f"track={track!r}: {error}; install it with: pip install 'clipsteer[track]'"
        ) from error
    writer = SummaryWriter(directory)

    def add(record: Mapping[str, Any]) -> None:
        for figure, value in record.items():
            writer.add_scalar(f"{name}/{figure}", value, int(record["step"]))

    return add, writer.close
