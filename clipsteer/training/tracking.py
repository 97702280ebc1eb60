"""Where a run's figures go: log, progress bar, wandb or tensorboard."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clipsteer.sae.config import TrainConfig


class _Reporter:
    """Writes records to ``log.jsonl`` and to a tracker."""

    def __init__(self, out: Path | None, track: str | None, config: TrainConfig) -> None:
        if track not in (None, "wandb", "tensorboard"):
            raise ValueError(
                f"train_sae: track must be 'wandb', 'tensorboard' or None, got {track!r}"
            )
        self.out, self.track, self.config = out, track, config

    def __enter__(self) -> _Reporter:
        self._send, self._close = _tracker(self.track, self.out, self.config)
        self._file = None
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            self._file = (self.out / "log.jsonl").open("a")
        return self

    def write(self, record: dict[str, float]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        self._send(record)

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        self._close()


def _tracker(
    track: str | None, out: Path | None, config: TrainConfig
) -> tuple[Callable[[dict[str, float]], None], Callable[[], None]]:
    if track is None:
        return lambda record: None, lambda: None
    try:
        if track == "wandb":
            import wandb

            run = wandb.init(
                project="clipsteer",
                config=asdict(config),
                dir=str(out) if out is not None else None,
            )
            return lambda record: run.log(record, step=int(record["step"])), run.finish
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RuntimeError(
            f"track={track!r}: {error}; install it with: pip install 'clipsteer[track]'"
        ) from error
    writer = SummaryWriter(str(out) if out is not None else None)

    def send(record: dict[str, float]) -> None:
        for name, value in record.items():
            writer.add_scalar(f"sae/{name}", value, int(record["step"]))

    return send, writer.close
