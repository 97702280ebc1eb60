"""The training loop: steps, checkpoints, log, signals. Its subclasses say what is trained."""

from __future__ import annotations

import json
import logging
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipsteer.io import checkpoint
from clipsteer.io.checkpoint import Checkpoint
from clipsteer.io.files import FileFormatError
from clipsteer.io.layout import Layout, check_layout, layout_of
from clipsteer.training import resume as resuming
from clipsteer.training.collapse import LATEST, say_if_constant
from clipsteer.training.schedule import DATA_ORDER
from clipsteer.training.settings import COSMETIC, check_same_settings
from clipsteer.training.signals import StopSignal, leave
from clipsteer.training.spread import Spread, give_all
from clipsteer.training.tracking import TRACKERS, Reporter, trim_log
from clipsteer.training.world import World

logger = logging.getLogger(__name__)


class TrainingRun:
    """`total` steps of an optimizer, with their place on disk: `out` holds log.jsonl and
    checkpoints/.

    A kind of run says what is kept beside the optimizer's state (`tensors`, `load_tensors`), what
    it trains on (`batches`), what a step does (`train_step`) and what is measured on the way
    (`measure`). The first of several processes reads and writes.

    Args:
        config: has batch_size, log_every, checkpoint_every and track.
        parameters: what is trained, under the names that checkpoints have.
        optimizer: its state is kept; None where `tensors` has it.
        settings: what makes this run another one, for JSON. A run in `out` must have the same.
        out: None keeps nothing on disk, and leaves signals alone.
    """

    name = "train"
    # what a batch is made of
    unit = "images"
    # settings that do not change the weights, so that a resumed run may differ in them
    cosmetic: tuple[str, ...] = COSMETIC
    # figures of the log that the progress bar has too
    shown: tuple[str, ...] = ("loss",)
    # settings that say where the data lie, which may have moved
    places: tuple[str, ...] = ()
    # settings that came later, and what a run from before has of them
    since: Mapping[str, Any] = {}
    # figures of the last line
    quality: tuple[str, ...] = ("loss",)
    # what figures are when every input gets the same answer: a run that ends there says so
    constant: Mapping[str, float] = {}

    def __init__(
        self,
        config: Any,
        total: int,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer | None,
        settings: Mapping[str, Any],
        out: Path | None,
        world: World | None = None,
    ) -> None:
        if config.track not in (None, *TRACKERS):
            raise ValueError(
                f"{self.name}: track must be one of {TRACKERS} or None, got {config.track!r}"
            )
        self.config = config
        self.total = total
        self.parameters = dict(parameters)
        self.optimizer = optimizer
        self.settings = json.loads(json.dumps({**settings, "data order": DATA_ORDER}))
        self.out = out
        self.checkpoints = None if out is None else out / "checkpoints"
        self.log = None if out is None else out / "log.jsonl"
        self.world = world
        self.together = world is not None and world.size > 1
        self.lead = world is None or world.rank == 0
        # several processes ask each other for signals every so many steps
        self.agree_every = config.log_every
        self.identity: dict[str, Any] | None = None
        self.step = 0
        self.saved_at = -1
        # the signal that ended the loop, or came in its last step
        self.asked = 0
        self.records: deque[Mapping[str, Any]] = deque(maxlen=LATEST)

    def tensors(self) -> dict[str, Tensor]:
        """What changes from step to step, but for the optimizer's state; called in every
        process."""
        raise NotImplementedError

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Undo `tensors`; `self.step` is the checkpoint's."""
        raise NotImplementedError

    def layout(self) -> Layout:
        """What `tensors` must be in a checkpoint; called in every process."""
        return layout_of(self.tensors())

    def check(self, found: Checkpoint) -> None:
        """Raise FileFormatError for a checkpoint of the right layout that no such run can have
        written."""
        if found.step > self.total:
            raise FileFormatError(
                f"{found.meta_path}: a checkpoint of step {found.step} in a run of {self.total}"
            )

    def spread(self) -> Collection[str]:
        """The names of those of `tensors` whose rows lie over the processes."""
        return ()

    def data_identity(self) -> dict[str, Any] | None:
        """What the run's data are known by, for JSON; None where nothing is known. Asked for once,
        in the first process."""
        return None

    def batches(self) -> Iterable[Any]:
        """The steps that remain; what a step sees depends on the seed and its number alone."""
        raise NotImplementedError

    def train_step(self, batch: Any) -> Any:
        """One step of the optimizer; returns what `figures` reads."""
        raise NotImplementedError

    def figures(self, values: Any) -> dict[str, float]:
        """The step's figures, with "loss" among them; waits for the device and other processes."""
        read = {name: float(value) for name, value in values.items()}
        if self.together:
            assert self.world is not None
            loss = torch.tensor(read["loss"], device=self.world.device)
            read["loss"] = float(self.world.sum_(loss)) / self.world.size
        return read

    def is_quality(self, figure: str) -> bool:
        """Whether the figure belongs into the last line."""
        return figure in self.quality

    def measure(self) -> dict[str, Any]:
        """Figures that are due after `self.step` steps."""
        return {}

    def restore(self, device: torch.device, resume: bool = True) -> bool:
        """Go to the newest checkpoint; False when there is none.

        Raises:
            ValueError: `out` holds another run, or any with resume=False. FileFormatError: the
                checkpoint holds what no such run writes; then nothing was taken from it.
        """
        if self.out is None:
            return False
        layout = self.layout()
        if self.optimizer is not None:
            layout |= resuming.optimizer_layout(self.optimizer, self.parameters)
        found = None
        failure = None
        if self.lead:
            self.identity = self.data_identity()
            try:
                found = self._newest(device, resume, layout)
            except Exception as error:
                if not self.together:
                    raise
                failure = error
        if self.together:
            assert self.world is not None
            found = resuming.shared(self.world, found, failure, self.spread())
        if found is None:
            return False
        self.step = found.step
        self.saved_at = found.step
        self.load_tensors(found.tensors)
        if self.optimizer is not None:
            resuming.load_optimizer(self.optimizer, self.parameters, found.tensors)
        if self.lead:
            logger.info("%s: goes on at step %d of %d", self.name, self.step, self.total)
        return True

    def _newest(self, device: torch.device, resume: bool, layout: Layout) -> Checkpoint | None:
        """Read the newest checkpoint, once it is known to be of this run."""
        assert self.out is not None
        assert self.checkpoints is not None
        assert self.log is not None
        found = checkpoint.load_latest(self.checkpoints, device=str(device))
        if found is not None:
            if not resume:
                raise ValueError(
                    f"{self.name}: {self.out} holds a run; resume it or choose another folder"
                )
            there = self.as_now({**self.since, **resuming.entry(found, "settings", dict)})
            data = resuming.entry(found, "data", dict) if "data" in found.meta else None
            cosmetic = self.cosmetic
            if data is not None:
                cosmetic += self.places
            check_same_settings(self.name, self.out, there, self.settings, cosmetic)
            resuming.check_same_data(self.name, self.out, data, self.identity)
            check_layout(found.tensors_path, found.tensors, layout)
            if self.optimizer is not None:
                resuming.check_optimizer(found, layout, self.parameters)
            self.check(found)
        trim_log(self.log, 0 if found is None else found.step)
        return found

    def as_now(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Settings that an earlier version may have written, as this one writes them."""
        return settings

    def save(self) -> None:
        """Write a checkpoint of this step, unless it is there; called in every process.

        Raises RuntimeError when the weights are not finite, OSError when the disk is full.
        """
        if self.out is None or self.saved_at == self.step:
            return
        self._check_weights()
        here = self.tensors()
        tensors: dict[str, Tensor | Spread] = {**here}
        for name in self.spread():
            assert self.world is not None
            tensors[name] = Spread(here[name], self.world)
        if self.lead:
            meta: dict[str, Any] = {"settings": self.settings}
            if self.identity is not None:
                meta["data"] = self.identity
            if self.optimizer is not None:
                states, without = resuming.optimizer_tensors(self.optimizer, self.parameters)
                tensors |= states
                meta["without state"] = without
            assert self.checkpoints is not None
            checkpoint.save_state(self.checkpoints, self.step, tensors, meta)
        else:
            give_all(tensors)
        self.saved_at = self.step

    def _check_weights(self) -> None:
        # unlike isfinite this takes no memory
        ends = [torch.stack(p.detach().aminmax()) for p in self.parameters.values() if p.numel()]
        wrong = not all(bool(pair.isfinite().all()) for pair in ends)
        if self.world is not None:
            wrong = self.world.any(wrong)
        if wrong:
            raise RuntimeError(
                f"{self.name}: the weights are not finite at step {self.step}{self._kept()}"
            )

    def _kept(self) -> str:
        if self.saved_at <= 0:
            return ""
        return f"; the checkpoint of step {self.saved_at} is kept in {self.out}"

    def _read(self, values: Any) -> dict[str, float]:
        read = self.figures(values)
        if not math.isfinite(read["loss"]):
            raise RuntimeError(
                f"{self.name}: the loss is {read['loss']} at step {self.step}; lower lr, or look "
                f"for inputs that are not finite{self._kept()}"
            )
        return read

    def _signal(self, stop: StopSignal) -> int:
        """The signal that came to any process, which all of them learn of at the same step."""
        if not self.together:
            return stop.asked
        if self.step % self.agree_every and self.step != self.total:
            return 0
        assert self.world is not None
        asked = torch.tensor([stop.asked], device=self.world.device)
        return int(self.world.gather(asked).max())

    def loop(
        self,
        on_step: Callable[[], None] | None = None,
        on_log: Callable[[dict], None] | None = None,
    ) -> None:
        """Train to the end.

        With `out`, SIGTERM and the first Ctrl-C end the run after the step at hand, once it is
        saved: SystemExit(143) and KeyboardInterrupt. A second Ctrl-C interrupts at once. A signal
        that comes in the last step is left in `asked`.
        """
        if self.step >= self.total:
            return
        reporter = Reporter(
            self.name,
            self.total,
            self.step,
            shown=self.shown,
            lead=self.lead,
            log=self.log,
            track=self.config.track,
            config=self.config,
            folder=self.out,
        )
        with reporter, StopSignal(self.out is not None) as stop:
            self._steps(reporter, stop, on_step, on_log)
            latest = reporter.latest
            reporter.finish({name: latest[name] for name in latest if self.is_quality(name)})
        if self.lead:
            say_if_constant(self.name, self.records, self.constant)

    def _steps(
        self,
        reporter: Reporter,
        stop: StopSignal,
        on_step: Callable[[], None] | None,
        on_log: Callable[[dict], None] | None,
    ) -> None:
        config = self.config
        first = self.step
        began = time.monotonic()
        for batch in self.batches():
            values = self.train_step(batch)
            self.step += 1
            if on_step is not None:
                on_step()
            reporter.bar.update()
            last = self.step == self.total
            save = last or self.step % config.checkpoint_every == 0
            record: dict[str, Any] = {}
            if last or self.step % config.log_every == 0:
                record = self._read(values)
                seconds = max(time.monotonic() - began, 1e-9)
                speed = (self.step - first) * config.batch_size / seconds
                record[f"{self.unit}_per_second"] = round(speed, 1)
            elif save:
                self._read(values)  # raises where the loss is not finite
            record |= self.measure()
            if record and self.lead:
                record = {"step": self.step, **record}
                self.records.append(record)
                reporter.write(record)
                if on_log is not None:
                    on_log(record)
            self.asked = self._signal(stop)
            if self.asked and not save:
                self._read(values)
            if save or self.asked:
                self.save()
            if last and self.out is None:
                self._check_weights()
            if self.asked and not last:
                message = (
                    f"{signal.Signals(self.asked).name}: step {self.step} of {self.total} is saved "
                    f"in {self.out}; run the same again to go on"
                )
                logger.warning("%s: %s", self.name, message)
                leave(self.asked, message)
