"""Training sparse autoencoders on CLIP activations.

One step: forward, backward, clip the gradient, remove its component parallel to each decoder row,
Adam with linear warm-up and decay, decoder rows to norm 1 (as they are before the first step).
relu: scaled MSE + λ₁·‖f‖₁ (Joseph et al. 2025, arXiv 2504.08729); topk and batch_topk: FVU +
AuxK / 32 (Gao et al. 2024, arXiv 2406.04093); jumprelu: FVU + λ₀·L0; gated: scaled MSE of the
reconstruction and of the gates', + λ₁·‖gates‖₁ (Rajamanoharan et al. 2024, arXiv 2407.14435 and
2404.16014). Features of topk and batch_topk that were long not active start anew along what is
left unexplained (``clipsteer.sae.resampling``).

Under ``torchrun`` the batch is split over the processes, or with ``shard_features`` the dictionary
(``clipsteer.sae.parallel``); the result is that of one process. Runs resume from checkpoints, with
any number of processes, on a CPU bit for bit where it is the same one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipsteer.io.checkpoint import Checkpoint, latest_meta
from clipsteer.io.files import FileFormatError
from clipsteer.io.layout import Layout, Spec
from clipsteer.sae.config import AUXK, TRAINABLE, TrainConfig, as_earlier, of_earlier
from clipsteer.sae.model import SAE
from clipsteer.sae.pairs import paired
from clipsteer.sae.shard import Shard, is_spread
from clipsteer.sae.sources import ActivationSource, Batch, Position
from clipsteer.sae.trainer import METRICS, SAETrainer
from clipsteer.training.claim import claimed
from clipsteer.training.loop import TrainingRun
from clipsteer.training.resume import check_generator
from clipsteer.training.schedule import seed_of
from clipsteer.training.world import World

logger = logging.getLogger(__name__)


def train_sae(
    activations: Tensor | ActivationSource | Iterable[Tensor] | Iterable[tuple[Tensor, Tensor]],
    sae_or_config: SAE | TrainConfig | None = None,
    *,
    target: Tensor | ActivationSource | Iterable[Tensor] | None = None,
    config: TrainConfig | None = None,
    out: str | Path | None = None,
    device: torch.device | str | None = None,
    resume: bool = True,
    metadata: dict[str, Any] | None = None,
    on_log: Callable[[dict[str, float]], None] | None = None,
    mesh: Any = None,
    **settings: Any,
) -> SAE:
    """Train a sparse autoencoder on activations.

        sae = train_sae(store, d_sae=4096, k=32, tokens=20_000_000, out="runs/layer9")

    Args:
        activations: rows (..., d_in): a tensor, an ``ActivationStore``, a ``HarvestSource`` (a CLIP
            model on the fly) or an iterable of tensors. Tensors and sources are shuffled, an
            iterable is taken as it comes. A harvest of two hook points, or an iterable of pairs
            (..., d_in) and (..., d_out), has the target of a transcoder in it.
        target: what a transcoder is to give for each row, (..., d_out): of the same kind as
            ``activations`` and with the same rows in the same order (two stores: of the same images
            and tokens, in shards of one size).
        sae_or_config: a ``TrainConfig``, or an SAE to go on training in place (then ``config`` says
            how).
        out: directory for checkpoints, ``log.jsonl`` and the finished SAE; None keeps nothing on
            disk.
        device: by default CUDA where there is one, or where the given SAE lives.
        resume: go on from the newest checkpoint in ``out``; a finished run returns at once.
        metadata: kept in the SAE's ``cfg.json``; what a store or harvest knows of its model is
            added.
        on_log: called with every logged record, in rank 0.
        mesh: the processes that train together, as a process group or a ``DeviceMesh`` of one
            dimension; None: all there are.
        settings: fields of ``TrainConfig`` to change.

    Returns:
        the SAE in evaluation mode, decoder rows of norm 1 (but those of a transcoder).

    Raises:
        ValueError: settings out of range; a target that does not go with the activations; a batch,
            or with ``shard_features`` a number of features, that cannot be dealt out evenly to the
            processes; another run in ``out``: other settings, metadata, length or rows (of an
            iterable that is no list these are not known).
        FileFormatError: a checkpoint in ``out`` that is not of such a run.
        RuntimeError: the loss is not finite (the last checkpoint is from before), or another
            process writes to ``out``.
        SystemExit: code 143, after SIGTERM, once a checkpoint is written (only with ``out``);
            KeyboardInterrupt after Ctrl-C.
    """
    sae, config = _sae_and_config(sae_or_config, config, settings)
    source = paired(activations, target)
    if sae is not None and sae.d_in != source.d_in:
        raise ValueError(
            f"train_sae: the SAE has d_in = {sae.d_in}, the activations have {source.d_in}"
        )
    if sae is not None and sae.d_out != source.d_out:
        raise ValueError(
            f"train_sae: the SAE has d_out = {sae.d_out}, the target has {source.d_out} (None: "
            f"there is none)"
        )
    if device is None and sae is not None:
        device = sae.W_enc.device
    world = World(device, mesh)
    if config.batch_size % world.size:
        raise ValueError(
            f"train_sae: batch_size must be a multiple of the {world.size} processes, got "
            f"{config.batch_size}"
        )
    total = config.total_steps(source.rows_per_epoch())
    if source.d_out is not None:
        config = config.for_transcoder()
    earlier = None if out is None else _settings_in(Path(out))
    if earlier is not None:
        config = as_earlier(config, earlier)
    features = config.features(source.d_in) if sae is None else sae.config["d_sae"]
    config = config.fitted(total, features)
    if world.rank == 0:
        _say(config, total)
    given = sae
    shard = config.shard_features and world.size > 1
    if given is None:
        sae = _new_sae(source.d_in, source.d_out, config, world if shard else None)
    else:
        sae = Shard.of(given, world) if shard else given
    sae.to(world.device)
    sae.metadata.update(getattr(source, "provenance", {}))
    sae.metadata.update({**(metadata or {}), "training": _kept(config)})
    trainer = SAETrainer(sae, config, total, world)
    run = Run(trainer, source, None if out is None else Path(out), fresh=given is None)
    with claimed(out, run.name, world):
        run.start(resume)
        run.loop(on_log=on_log)
        if sae.has_unit_rows:
            sae.renormalize_decoder_()
        sae.eval()
        if out is not None and (world.rank == 0 or shard):
            sae.save_pretrained(out)
        # no process goes on before the files are there
        world.any(False)
    if not isinstance(sae, Shard):
        return sae
    # the moments' memory goes before the whole is made
    del run, trainer
    return _whole(sae, given, out, world)


def _settings_in(out: Path) -> dict[str, Any] | None:
    """Those of the run that is there."""
    meta = latest_meta(out / "checkpoints")
    settings = None if meta is None else meta.get("settings")
    return settings if isinstance(settings, dict) else None


def _say(config: TrainConfig, total: int) -> None:
    """What was fitted to the length of the run, and a warning where that is too short."""
    warmup = config.warmup_steps or 0
    logger.info(
        "train_sae: peak learning rate %.2g, %s, %d of %d steps of warm-up",
        config.peak_lr,
        config.schedule,
        warmup,
        total,
    )
    if total <= warmup:
        logger.warning(
            "train_sae: %d steps end within the warm-up of %d, at %.2g of a peak learning rate of "
            "%.2g; train longer (tokens, steps) or set warmup_steps",
            total,
            warmup,
            config.lr_at(total - 1, total),
            config.peak_lr,
        )


def _whole(shard: Shard, given: SAE | None, out: str | Path | None, world: World) -> SAE:
    """The SAE of which every process has a part, in all of them."""
    if given is not None:
        given.metadata.update(shard.metadata)
        return shard.gather_into(given).eval()
    there = out is not None and (Path(out) / "cfg.json").is_file()
    if world.any(not there):
        return shard.whole().eval()
    assert out is not None
    # on a CPU the processes of a machine so share the file's pages
    sae = SAE.from_pretrained(out, device=world.device)
    sae.metadata = shard.metadata
    return sae


def _kept(config: TrainConfig) -> dict[str, Any]:
    """The settings that made an SAE what it is; how the work was shared is none."""
    return {name: value for name, value in asdict(config).items() if name != "shard_features"}


def _sae_and_config(
    given: SAE | TrainConfig | None, config: TrainConfig | None, settings: dict[str, Any]
) -> tuple[SAE | None, TrainConfig]:
    if isinstance(given, TrainConfig):
        if config is not None:
            raise TypeError("train_sae: a TrainConfig was given twice")
        config = given
        given = None
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
            if name not in ("d_in", "d_out") and value is not None
        }
        settings = {**settings, **own, "dtype": str(given.W_enc.dtype).removeprefix("torch.")}
    return given, replace(config or TrainConfig(), **settings)


def _new_sae(d_in: int, d_out: int | None, config: TrainConfig, world: World | None) -> SAE:
    """``world``: the processes over which its features lie."""
    arguments: dict[str, Any] = {
        "d_in": d_in,
        "d_sae": config.features(d_in),
        "architecture": config.architecture,
        "k": config.k,
        "matryoshka": config.matryoshka,
        "d_out": d_out,
        "skip": config.skip,
        "normalize": config.normalize,
        "apply_b_dec_to_input": config.apply_b_dec_to_input,
        "dtype": getattr(torch, config.dtype),
    }
    # the caller's generator is left as it was
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed, which would seed the GPUs' generators as well
        torch.default_generator.manual_seed(seed_of(config.seed, "weights"))
        sae = SAE(**arguments) if world is None else Shard(world, **arguments)
    if d_out is None:
        # a transcoder's decoder starts at 0
        with torch.no_grad():
            sae.W_enc.mul_(config.encoder_scale or 1.0)
    return sae


class Run(TrainingRun):
    """A training run of an SAE: its place in the stream of activations, and what makes it another
    run."""

    name = "train SAE"
    unit = "tokens"
    shown = METRICS[:4]
    quality = METRICS[1:4]
    constant: Mapping[str, float] = {"fvu": 1.0}  # that of the mean
    world: World

    def __init__(
        self, trainer: SAETrainer, source: ActivationSource, out: Path | None, fresh: bool
    ) -> None:
        self.trainer = trainer
        self.source = source
        self.fresh = fresh
        self.position = Position()
        # bytes, in the last step
        self.sent = 0
        known = {
            name: value
            for name, value in trainer.sae.metadata.items()
            if name not in ("training", "clipsteer_version")
        }
        config = trainer.config
        # a coefficient that was not given is written as it always was; the one in use beside it
        given = AUXK if config.auxk_coefficient is None else config.auxk_coefficient
        # earlier versions had no AuxK for relu, and nothing of jumprelu
        later = ("l0_coefficient", "l0_penalty", "bandwidth")
        self.since = {name: getattr(config, name) for name in later}
        self.since |= {"skip": False, "auxk": 0.0 if config.architecture == "relu" else config.auxk}
        settings = {
            **_kept(config),
            "auxk_coefficient": given,
            "auxk": config.auxk,
            "apply_b_dec_to_input": trainer.sae.apply_b_dec_to_input,
            "d_in": source.d_in,
            "d_out": source.d_out,
            "rows of a pass": source.rows_per_epoch(),
            "metadata": known,
            "total steps": trainer.total_steps,
        }
        parameters = dict(trainer.sae.named_parameters())
        world = trainer.world
        super().__init__(
            trainer.config, trainer.total_steps, parameters, None, settings, out, world
        )
        self.agree_every = self.config.sync_every
        if source.from_files:
            self.places = ("metadata.data",)

    def as_now(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Those of versions without a schedule."""
        return of_earlier(settings)

    def data_identity(self) -> dict[str, Any] | None:
        """That of the activations."""
        return self.source.identity()

    def start(self, resume: bool) -> None:
        """Go to the newest checkpoint; without one, every process to the weights of rank 0."""
        if not self.restore(self.trainer.device, resume) and self.together:
            for name, tensor in self.trainer.sae.state_dict().items():
                if not (isinstance(self.trainer.sae, Shard) and is_spread(name, tensor)):
                    self.world.broadcast_(tensor)

    def tensors(self) -> dict[str, Tensor]:
        """What changes while training."""
        return self.trainer.state_tensors() | {"position": torch.tensor(self.position)}

    def spread(self) -> set[str]:
        """Those of which this process has a part."""
        return self.trainer.spread()

    def layout(self) -> Layout:
        """What ``tensors`` must be in a checkpoint."""
        found = self.trainer.state_layout()
        return found | {"position": Spec(torch.int64, (2,), least=0)}

    def check(self, found: Checkpoint) -> None:
        """Raise FileFormatError for counts beyond the steps so far, and states that are none of a
        generator."""
        super().check(found)
        most = found.step * self.config.batch_size
        for name in ("tokens_since_fired", "position"):
            count = int(found.tensors[name].max())
            if count > most:
                raise FileFormatError(
                    f"{found.tensors_path}: {name!r} has {count} at step {found.step}, at most "
                    f"{most} rows were seen"
                )
        for name, device in self.trainer.generators().items():
            if name in found.tensors:
                check_generator(found.tensors_path, name, found.tensors[name], device)

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take in what ``tensors`` gave."""
        state = dict(tensors)
        self.position = Position(*state.pop("position").tolist())
        self.trainer.load_state_tensors(state, self.step)

    def batches(self) -> Iterator[Batch]:
        """The batches from where the run stands."""
        stream = self.source.batches(
            self.config.batch_size,
            seed=self.config.seed,
            start=self.position,
            rank=self.world.rank,
            world=self.world.size,
        )
        return islice(stream, self.total - self.step)

    def train_step(self, batch: Batch) -> Tensor:
        """One step; returns its metrics, of this process."""
        trainer = self.trainer
        rows = batch.rows.to(trainer.device, trainer.sae.W_enc.dtype, non_blocking=True)
        target = None
        if self.source.d_out is not None:
            rows, target = (part.contiguous() for part in rows.tensor_split([self.source.d_in], 1))
        if self.step == 0 and self.fresh:
            every = self.world.gather(rows)
            trainer.sae.init_b_dec_(every if target is None else self.world.gather(target))
            trainer.sae.init_threshold_(every, self.config.k)
        sent = self.world.sent
        metrics = trainer.step(rows, target)
        self.sent = self.world.sent - sent
        self.position = batch.next
        return metrics

    def figures(self, values: Tensor) -> dict[str, float]:
        """What is logged: the metrics summed over all processes, tokens and learning rate; of
        several processes also the bytes that each sent in the step."""
        found = dict(zip(self.trainer.metrics, self.world.sum_(values).tolist()))
        lr = self.config.lr_at(self.step - 1, self.total)
        figures = {"tokens": self.step * self.config.batch_size, **found, "lr": lr}
        return {**figures, "bytes_sent": self.sent} if self.together else figures
