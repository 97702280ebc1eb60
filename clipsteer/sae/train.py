"""Training sparse autoencoders on CLIP activations.

One step: forward, backward, clip the gradient, remove its component parallel to each decoder row,
Adam with linear warm-up and cosine decay, decoder rows to norm 1 (as they are before the first
step). relu: scaled MSE + λ₁·‖f‖₁ (Joseph et al. 2025, arXiv 2504.08729); topk and batch_topk: FVU +
AuxK / 32 (Gao et al. 2024, arXiv 2406.04093). Under ``torchrun`` the batch is split over the
processes and the result is that of one process. Runs resume from checkpoints, on a CPU bit for bit.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from clipsteer.io import checkpoint
from clipsteer.sae.config import TRAINABLE, TrainConfig
from clipsteer.sae.model import SAE
from clipsteer.sae.sources import ActivationSource, Position, as_source
from clipsteer.sae.trainer import SAETrainer
from clipsteer.training.loop import EXIT_TERMINATED, StopSignal, trim_log
from clipsteer.training.tracking import _Reporter
from clipsteer.training.world import World

logger = logging.getLogger(__name__)


def train_sae(
    activations: Tensor | ActivationSource | Iterable[Tensor],
    sae_or_config: SAE | TrainConfig | None = None,
    *,
    config: TrainConfig | None = None,
    out: str | Path | None = None,
    device: torch.device | str | None = None,
    resume: bool = True,
    track: str | None = None,
    metadata: dict[str, Any] | None = None,
    on_log: Callable[[dict[str, float]], None] | None = None,
    **settings: Any,
) -> SAE:
    """Train a sparse autoencoder on activations.

        sae = train_sae(store, d_sae=4096, k=32, tokens=20_000_000, out="runs/layer9")

    Args:
        activations: rows (..., d_in): a tensor, an ``ActivationStore``, a ``HarvestSource`` (a CLIP
            model on the fly) or an iterable of tensors. Tensors and sources are shuffled, an
            iterable is taken as it comes.
        sae_or_config: a ``TrainConfig``, or an SAE to go on training in place (then ``config`` says
            how).
        out: directory for checkpoints, ``log.jsonl`` and the finished SAE; None keeps nothing on
            disk.
        device: by default CUDA where there is one, or where the given SAE lives.
        resume: go on from the newest checkpoint in ``out``; a finished run returns at once.
        track: "wandb" or "tensorboard", beside the log.
        metadata: kept in the SAE's ``cfg.json``; what a store or harvest knows of its model is
            added.
        on_log: called with every logged record, in rank 0.
        settings: fields of ``TrainConfig`` to change.

    Returns:
        the SAE in evaluation mode, decoder rows of norm 1.

    Raises:
        ValueError: settings out of range, or another run in ``out``: other settings, metadata,
            length or number of rows. The rows themselves are not compared.
        RuntimeError: the loss is not finite (the last checkpoint is from before).
        SystemExit: code 143, after SIGTERM, once a checkpoint is written (only with ``out``).
    """
    sae, config = _sae_and_config(sae_or_config, config, settings)
    source = as_source(activations)
    if sae is not None and sae.d_in != source.d_in:
        raise ValueError(
            f"train_sae: the SAE has d_in = {sae.d_in}, the activations have {source.d_in}"
        )
    if device is None and sae is not None:
        device = sae.W_enc.device
    world = World(device)
    total = config.total_steps(source.rows_per_epoch())
    if total <= config.warmup_steps and world.rank == 0:
        logger.warning(
            "train_sae: %d steps end within the warm-up of %d, at %.2g of a peak learning rate of "
            "%.2g; train longer "
            "(tokens, steps) or set warmup_steps",
            total,
            config.warmup_steps,
            config.lr_at(total - 1, total),
            config.peak_lr,
        )
    fresh = sae is None
    if sae is None:
        sae = _new_sae(source.d_in, config)
    sae.to(world.device)
    sae.metadata.update(
        {**getattr(source, "provenance", {}), **(metadata or {}), "training": asdict(config)}
    )
    run = Run(
        SAETrainer(sae, config, total, world), source, Path(out) if out is not None else None, fresh
    )
    run.start(resume)
    run.loop(track, on_log)
    sae.renormalize_decoder_()
    sae.eval()
    if out is not None and world.rank == 0:
        sae.save_pretrained(out)
    # no process goes on before the files are there
    world.any(False)
    return sae


def _sae_and_config(
    given: SAE | TrainConfig | None, config: TrainConfig | None, settings: dict[str, Any]
) -> tuple[SAE | None, TrainConfig]:
    if isinstance(given, TrainConfig):
        if config is not None:
            raise TypeError("train_sae: a TrainConfig was given twice")
        given, config = None, given
    if given is not None and not isinstance(given, SAE):
        raise TypeError(f"train_sae: expected an SAE or a TrainConfig, got {type(given).__name__}")
    if given is not None:
        if given.architecture not in TRAINABLE:
            raise ValueError(
                f"train_sae: architecture must be one of {TRAINABLE}, got {given.architecture!r}"
            )
        own = {
            name: value
            for name, value in given.config.items()
            if name != "d_in" and value is not None
        }
        settings = {**settings, **own, "dtype": str(given.W_enc.dtype).removeprefix("torch.")}
    return given, replace(config or TrainConfig(), **settings)


def _new_sae(d_in: int, config: TrainConfig) -> SAE:
    # the caller's generator is left as it was
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed, which would seed the GPUs' generators as well
        torch.default_generator.manual_seed(config.seed)
        return SAE(
            d_in,
            config.d_sae if config.d_sae is not None else config.expansion * d_in,
            config.architecture,
            config.k,
            normalize=config.normalize,
            apply_b_dec_to_input=config.apply_b_dec_to_input,
            dtype=getattr(torch, config.dtype),
        )


logger = logging.getLogger(__name__)


METRICS = ("loss", "fvu", "l0", "dead", "auxk")


# settings that do not change the weights, so that a resumed run may differ in them
_COSMETIC = ("log_every", "checkpoint_every")


class Run:
    """A training run with its place on disk: data position, checkpoints, log, SIGTERM."""

    def __init__(
        self, trainer: SAETrainer, source: ActivationSource, out: Path | None, fresh: bool
    ) -> None:
        self.trainer, self.source, self.out, self.fresh = trainer, source, out, fresh
        self.config, self.world = trainer.config, trainer.world
        self.position = Position()
        self.saved_at: int | None = None

    def start(self, resume: bool) -> None:
        """Load the newest checkpoint in rank 0, check that it belongs to this run, and hand it to
        every process."""
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
            tensors = {
                n: world.broadcast_(tensors.get(n, own[n]).to(world.device).clone())
                for n in sorted(own)
            }
        if step < 0:
            trainer.sae.load_state_dict(
                {k[4:]: v for k, v in tensors.items() if k.startswith("sae.")}
            )
            return
        trainer.load_state_tensors(tensors, step)
        self.position, self.saved_at = Position(*position), step
        if world.rank == 0:
            logger.info("resumed %s at step %d of %d", self.out, step, trainer.total_steps)

    def _settings(self) -> dict[str, Any]:
        """What makes this run another one: settings, model and data as far as they are known,
        length."""
        config = {
            name: value for name, value in asdict(self.config).items() if name not in _COSMETIC
        }
        metadata = self.trainer.sae.metadata
        known = {
            name: metadata[name]
            for name in metadata
            if name not in ("training", "clipsteer_version")
        }
        about = {
            "d_in": self.source.d_in,
            "rows of a pass": self.source.rows_per_epoch(),
            "metadata": known,
        }
        return json.loads(json.dumps({**config, **about, "total steps": self.trainer.total_steps}))

    def _check(self, meta: dict[str, Any], resume: bool) -> None:
        if not resume:
            raise ValueError(
                f"train_sae: {self.out} holds a run; resume it or choose another directory"
            )
        wanted, there = _flat(self._settings()), _flat(meta.get("settings", {}))
        changed = [name for name in {**there, **wanted} if there.get(name) != wanted.get(name)]
        if changed:
            which = ", ".join(
                f"{k}: {there.get(k)!r} there, {wanted.get(k)!r} asked for" for k in changed
            )
            raise ValueError(
                f"train_sae: {self.out} holds a run with other settings ({which}); use another "
                f"directory"
            )

    def save(self) -> None:
        step = self.trainer.step_count
        if self.out is None or self.saved_at == step:
            return
        if self.world.rank == 0:
            tensors = self.trainer.state_tensors()
            if not all(
                bool(t.isfinite().all()) for name, t in tensors.items() if name.startswith("sae.")
            ):
                raise RuntimeError(
                    f"train_sae: the weights are not finite at step {step}{self._last_good()}"
                )
            meta = {"settings": self._settings(), "position": list(self.position)}
            checkpoint.save_state(self.out / "checkpoints", step, tensors, meta)
        self.saved_at = step

    def _last_good(self) -> str:
        return (
            ""
            if self.saved_at is None
            else f"; the checkpoint of step {self.saved_at} is kept in {self.out}"
        )

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
                tqdm(
                    total=total,
                    initial=first,
                    desc="train SAE",
                    unit="step",
                    disable=None if lead else True,
                )
            )
            batches = self.source.batches(
                config.batch_size,
                seed=config.seed,
                start=self.position,
                rank=world.rank,
                world=world.size,
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
                        speed = (
                            (step - first) * config.batch_size / max(time.monotonic() - began, 1e-9)
                        )
                        record = {"step": step, "tokens": step * config.batch_size, **values}
                        record |= {
                            "lr": config.lr_at(step - 1, total),
                            "tokens_per_second": round(speed, 1),
                        }
                        reporter.write(record)
                        bar.set_postfix(
                            {name: f"{values[name]:.4g}" for name in METRICS[:4]}, refresh=False
                        )
                        if on_log is not None:
                            on_log(record)
                # the processes look at the flag at the same steps, so that they agree
                asked = (world.size == 1 or step % config.sync_every == 0) and world.any(stop.asked)
                if asked or step % config.checkpoint_every == 0 or step == total:
                    self.save()
                if asked and step < total:
                    logger.warning(
                        "SIGTERM: step %d of %d is saved in %s; run again to go on",
                        step,
                        total,
                        self.out,
                    )
                    raise SystemExit(EXIT_TERMINATED)

    def _read(self, metrics: Tensor) -> dict[str, float]:
        values = dict(zip(METRICS, self.world.sum_(metrics).tolist()))
        if not math.isfinite(values["loss"]):
            raise RuntimeError(
                f"train_sae: the loss is {values['loss']} at step {self.trainer.step_count}: lower "
                f"lr, or look for "
                f"activations that are not finite{self._last_good()}"
            )
        return values


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    inner = {f"metadata.{name}": value for name, value in settings.get("metadata", {}).items()}
    return {**{name: value for name, value in settings.items() if name != "metadata"}, **inner}
