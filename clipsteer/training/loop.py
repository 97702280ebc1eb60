"""What training runs share: schedule, order of the samples, checkpoints, log, progress bar,
SIGTERM."""

from __future__ import annotations

import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from clipsteer.io import checkpoint
from clipsteer.io.files import write_atomically
from clipsteer.training.world import World

logger = logging.getLogger(__name__)

EXIT_TERMINATED = 128 + signal.SIGTERM
_ADAM = ("step", "exp_avg", "exp_avg_sq")


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
        except (ValueError, KeyError, TypeError):
            continue
    write_atomically(path, lambda file: file.write(b"".join(kept)))


class StopSignal:
    """Turns SIGTERM into a flag while active; only the main thread may, elsewhere the flag stays
    down."""

    def __init__(self, wanted: bool) -> None:
        self.asked = False
        self._wanted = wanted and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> StopSignal:
        if self._wanted:
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def __exit__(self, *_: object) -> None:
        if self._wanted:
            signal.signal(signal.SIGTERM, self._before)


class TrainingRun:
    """`total` steps of AdamW on `parameters`, with their place on disk: `out` holds log.jsonl and
    checkpoints/.

    A kind of run says what is kept beside Adam's state (`tensors`, `load_tensors`), what it trains
    on (`batches`), what a step does (`train_step`) and what is measured on the way (`measure`).
    With several processes the first one writes, and all of them read: `out` must be a folder that
        all see.
    """

    name = "train"
    # settings that do not change the weights, so that a resumed run may differ in them
    cosmetic: tuple[str, ...] = ("checkpoint_every", "log_every")
    # figures of the log that the progress bar has too
    shown: tuple[str, ...] = ("loss",)

    def __init__(
        self,
        config: Any,
        total: int,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.AdamW,
        settings: dict[str, Any],
        out: Path | None,
        world: World | None = None,
    ) -> None:
        self.config, self.total, self.out, self.world = config, total, out, world
        self.parameters, self.optimizer = dict(parameters), optimizer
        self.settings = json.loads(json.dumps(settings))
        self.step, self.saved_at = 0, -1
        self.lead = world is None or world.rank == 0

    def tensors(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        raise NotImplementedError

    def batches(self) -> Iterable[Any]:
        """The steps that remain; what a step sees depends on the seed and its number alone."""
        raise NotImplementedError

    def train_step(self, batch: Any) -> dict[str, Tensor | float]:
        """One step of the optimizer; "loss" must be among the figures that it returns."""
        raise NotImplementedError

    def measure(self) -> dict[str, Any]:
        """Figures that are due after `self.step` steps."""
        return {}

    def restore(self, device: torch.device, resume: bool) -> bool:
        """Go to the last checkpoint; False when there is none."""
        found = checkpoint.load_latest(self.out / "checkpoints", device=str(device))
        step = -1 if found is None else found.step
        if self.world is not None and self.world.size > 1:
            steps = self.world.gather(torch.tensor([step], device=self.world.device)).tolist()
            if len(set(steps)) > 1:
                raise ValueError(
                    f"{self.name}: the processes see checkpoints of different steps {steps} in "
                    f"{self.out}"
                )
        if found is None:
            if self.lead:
                trim_log(self.out / "log.jsonl", 0)
            return False
        if not resume:
            raise ValueError(
                f"{self.name}: {self.out} holds a run; resume it or choose another folder"
            )
        there = found.meta.get("settings", {})
        if changed := [
            k for k in self.settings if k not in self.cosmetic and there.get(k) != self.settings[k]
        ]:
            which = ", ".join(
                f"{k}: {there.get(k)!r:.80} there, {self.settings[k]!r:.80} asked for"
                for k in changed
            )
            raise ValueError(
                f"{self.name}: {self.out} holds a run with other settings ({which}); use another "
                f"folder"
            )
        if self.lead:
            trim_log(self.out / "log.jsonl", step)
        self.load_tensors(found.tensors)
        for name, parameter in self.parameters.items():
            keys = [key for key in _ADAM if f"adam.{key}.{name}" in found.tensors]
            if keys:  # without a gradient so far there is no state
                self.optimizer.state[parameter] = {
                    key: found.tensors[f"adam.{key}.{name}"].clone() for key in keys
                }
                self.optimizer.state[parameter]["step"] = self.optimizer.state[parameter][
                    "step"
                ].cpu()
        self.step = self.saved_at = found.step
        return True

    def save(self) -> None:
        if self.out is None or self.saved_at == self.step:
            return
        tensors = self.tensors()  # every process gives its part
        if self.lead:
            for name, parameter in self.parameters.items():
                for key, value in self.optimizer.state.get(parameter, {}).items():
                    tensors[f"adam.{key}.{name}"] = value
            checkpoint.save_state(
                self.out / "checkpoints", self.step, tensors, {"settings": self.settings}
            )
        self.saved_at = self.step

    def _read(self, values: Mapping[str, Tensor | float]) -> dict[str, float]:
        read = {name: float(value) for name, value in values.items()}
        if self.world is not None and self.world.size > 1:
            read["loss"] = (
                float(self.world.sum_(torch.tensor(read["loss"], device=self.world.device)))
                / self.world.size
            )
        if not math.isfinite(read["loss"]):
            raise RuntimeError(
                f"{self.name}: the loss is {read['loss']} at step {self.step}; lower lr"
            )
        return read

    def loop(
        self,
        on_step: Callable[[], None] | None = None,
        on_log: Callable[[dict], None] | None = None,
    ) -> None:
        """Train to the end, or to SIGTERM: then SystemExit(143) once the state is saved."""
        config, began, first = self.config, time.monotonic(), self.step
        alone = self.world is None or self.world.size == 1
        bar = tqdm(
            total=self.total,
            initial=first,
            desc=self.name,
            unit="step",
            disable=None if self.lead else True,
        )
        with bar, StopSignal(self.out is not None) as stop:
            for batch in self.batches():
                values = self.train_step(batch)
                self.step += 1
                if on_step is not None:
                    on_step()
                bar.update()
                last, logged = self.step == self.total, self.step % config.log_every == 0
                # several processes look at the flag at the same steps, so that they agree
                asked = stop.asked if alone else logged and self.world.any(stop.asked)
                save = asked or last or self.step % config.checkpoint_every == 0
                record: dict[str, Any] = {}
                if save or logged:
                    record = self._read(values)
                    speed = (
                        (self.step - first)
                        * config.batch_size
                        / max(time.monotonic() - began, 1e-9)
                    )
                    record["images_per_second"] = round(speed, 1)
                    bar.set_postfix(
                        {k: f"{record[k]:.4g}" for k in self.shown if k in record}, refresh=False
                    )
                record |= self.measure()
                if record and self.lead:
                    record = {"step": self.step, **record}
                    if on_log is not None:
                        on_log(record)
                    if self.out is not None:
                        with (self.out / "log.jsonl").open("a") as log:
                            log.write(json.dumps(record) + "\n")
                if save:
                    self.save()
                if asked and not last:
                    logger.warning(
                        "SIGTERM: step %d of %d is saved in %s", self.step, self.total, self.out
                    )
                    raise SystemExit(EXIT_TERMINATED)
