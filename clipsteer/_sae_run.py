"""A training run and its place on disk: data position, checkpoints, log, trackers, SIGTERM."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from clipsteer import checkpoint
from clipsteer._sources import ActivationSource, Position
from clipsteer._training import EXIT_TERMINATED, StopSignal, trim_log

if TYPE_CHECKING:
    from clipsteer.sae_train import SAETrainer, TrainConfig

logger = logging.getLogger(__name__)

METRICS = ("loss", "fvu", "l0", "dead", "auxk")
# settings that do not change the weights, so that a resumed run may differ in them
_COSMETIC = ("log_every", "checkpoint_every")


class Run:
    """A training run with its place on disk: data position, checkpoints, log, SIGTERM."""

    def __init__(self, trainer: SAETrainer, source: ActivationSource, out: Path | None, fresh: bool) -> None:
        self.trainer, self.source, self.out, self.fresh = trainer, source, out, fresh
        self.config, self.world = trainer.config, trainer.world
        self.position = Position()
        self.saved_at: int | None = None

    def start(self, resume: bool) -> None:
        """Load the newest checkpoint in rank 0, check that it belongs to this run, and hand it to every process."""
        trainer, world = self.trainer, self.world
        found = None
        if self.out is not None and world.rank == 0:
            found = checkpoint.load_latest(self.out / "checkpoints")
            if found is not None:
                self._check(found.meta, resume)
            trim_log(self.out / "log.jsonl", found.step if found is not None else 0)
        place = torch.tensor([-1, 0, 0], device=world.device)
        if found is not None:
            place = torch.tensor([found.step, *found.meta["position"]], device=world.device)
        step, *position = world.broadcast_(place).tolist()
        if step < 0 and world.size == 1:
            return
        tensors = trainer.state_tensors() if found is None else found.tensors
        if world.size > 1:
            own = trainer.state_tensors()
            # a checkpoint from a CPU lacks the GPU's generator
            tensors = {n: world.broadcast_(tensors.get(n, own[n]).to(world.device).clone()) for n in sorted(own)}
        if step < 0:
            trainer.sae.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("sae.")})
            return
        trainer.load_state_tensors(tensors, step)
        self.position, self.saved_at = Position(*position), step
        if world.rank == 0:
            logger.info("resumed %s at step %d of %d", self.out, step, trainer.total_steps)

    def _settings(self) -> dict[str, Any]:
        """What makes this run another one: settings, model and data as far as they are known, length."""
        config = {name: value for name, value in asdict(self.config).items() if name not in _COSMETIC}
        metadata = self.trainer.sae.metadata
        known = {name: metadata[name] for name in metadata if name not in ("training", "clipsteer_version")}
        about = {"d_in": self.source.d_in, "rows of a pass": self.source.rows_per_epoch(), "metadata": known}
        return json.loads(json.dumps({**config, **about, "total steps": self.trainer.total_steps}))

    def _check(self, meta: dict[str, Any], resume: bool) -> None:
        if not resume:
            raise ValueError(f"train_sae: {self.out} holds a run; resume it or choose another directory")
        wanted, there = _flat(self._settings()), _flat(meta.get("settings", {}))
        changed = [name for name in {**there, **wanted} if there.get(name) != wanted.get(name)]
        if changed:
            which = ", ".join(f"{k}: {there.get(k)!r} there, {wanted.get(k)!r} asked for" for k in changed)
            raise ValueError(f"train_sae: {self.out} holds a run with other settings ({which}); use another directory")

    def save(self) -> None:
        step = self.trainer.step_count
        if self.out is None or self.saved_at == step:
            return
        if self.world.rank == 0:
            tensors = self.trainer.state_tensors()
            if not all(bool(t.isfinite().all()) for name, t in tensors.items() if name.startswith("sae.")):
                raise RuntimeError(f"train_sae: the weights are not finite at step {step}{self._last_good()}")
            meta = {"settings": self._settings(), "position": list(self.position)}
            checkpoint.save_state(self.out / "checkpoints", step, tensors, meta)
        self.saved_at = step

    def _last_good(self) -> str:
        return "" if self.saved_at is None else f"; the checkpoint of step {self.saved_at} is kept in {self.out}"

    def loop(self, track: str | None, on_log: Callable[[dict[str, float]], None] | None) -> None:
        """Train to the end, or to SIGTERM: then SystemExit(143) once the state is saved."""
        trainer, config, world = self.trainer, self.config, self.world
        total, first, lead = trainer.total_steps, trainer.step_count, world.rank == 0
        if first >= total:
            return
        with ExitStack() as stack:
            reporter = stack.enter_context(_Reporter(self.out, track, config)) if lead else None
            stop = stack.enter_context(StopSignal(self.out is not None))
            bar = stack.enter_context(
                tqdm(total=total, initial=first, desc="train SAE", unit="step", disable=None if lead else True)
            )
            batches = self.source.batches(
                config.batch_size, seed=config.seed, start=self.position, rank=world.rank, world=world.size
            )
            began = time.monotonic()
            while trainer.step_count < total:
                batch = next(batches)
                rows = batch.rows.to(trainer.device, trainer.sae.W_enc.dtype, non_blocking=True)
                if trainer.step_count == 0 and self.fresh:
                    trainer.sae.init_b_dec_(world.gather(rows))
                metrics = trainer.step(rows)
                self.position = batch.next
                bar.update()
                step = trainer.step_count
                if step % config.log_every == 0 or step == total:
                    values = self._read(metrics)
                    if reporter is not None:
                        speed = (step - first) * config.batch_size / max(time.monotonic() - began, 1e-9)
                        record = {"step": step, "tokens": step * config.batch_size, **values}
                        record |= {"lr": config.lr_at(step - 1, total), "tokens_per_second": round(speed, 1)}
                        reporter.write(record)
                        bar.set_postfix({name: f"{values[name]:.4g}" for name in METRICS[:4]}, refresh=False)
                        if on_log is not None:
                            on_log(record)
                # the processes look at the flag at the same steps, so that they agree
                asked = (world.size == 1 or step % config.sync_every == 0) and world.any(stop.asked)
                if asked or step % config.checkpoint_every == 0 or step == total:
                    self.save()
                if asked and step < total:
                    logger.warning("SIGTERM: step %d of %d is saved in %s; run again to go on", step, total, self.out)
                    raise SystemExit(EXIT_TERMINATED)

    def _read(self, metrics: Tensor) -> dict[str, float]:
        values = dict(zip(METRICS, self.world.sum_(metrics).tolist()))
        if not math.isfinite(values["loss"]):
            raise RuntimeError(
                f"train_sae: the loss is {values['loss']} at step {self.trainer.step_count}: lower lr, or look for "
                f"activations that are not finite{self._last_good()}"
            )
        return values


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    inner = {f"metadata.{name}": value for name, value in settings.get("metadata", {}).items()}
    return {**{name: value for name, value in settings.items() if name != "metadata"}, **inner}


class _Reporter:
    """Writes records to ``log.jsonl`` and to a tracker."""

    def __init__(self, out: Path | None, track: str | None, config: TrainConfig) -> None:
        if track not in (None, "wandb", "tensorboard"):
            raise ValueError(f"train_sae: track must be 'wandb', 'tensorboard' or None, got {track!r}")
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

            run = wandb.init(project="clipsteer", config=asdict(config), dir=str(out) if out is not None else None)
            return lambda record: run.log(record, step=int(record["step"])), run.finish
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RuntimeError(f"track={track!r}: {error}; install it with: pip install 'clipsteer[track]'") from error
    writer = SummaryWriter(str(out) if out is not None else None)

    def send(record: dict[str, float]) -> None:
        for name, value in record.items():
            writer.add_scalar(f"sae/{name}", value, int(record["step"]))

    return send, writer.close
