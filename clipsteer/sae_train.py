"""Training sparse autoencoders on CLIP activations.

One step: forward, backward, clip the gradient, remove its component parallel to each decoder row, Adam with linear
warm-up and cosine decay, decoder rows to norm 1 (as they are before the first step). relu: scaled MSE + λ₁·‖f‖₁ (Joseph
et al. 2025, arXiv 2504.08729); topk and batch_topk: FVU + AuxK / 32 (Gao et al. 2024, arXiv 2406.04093). Under
``torchrun`` the batch is split over the processes and the result is that of one process. Runs resume from checkpoints,
on a CPU bit for bit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipsteer import sae_loss
from clipsteer._distributed import World
from clipsteer._sae_adam import UnitRowAdam, takes_row_sparse
from clipsteer._sae_run import Run
from clipsteer._sources import ActivationSource, as_source
from clipsteer.sae import SAE

logger = logging.getLogger(__name__)

TRAINABLE = ("relu", "topk", "batch_topk")


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        d_sae, expansion: number of features; None means expansion · d_in.
        architecture, k, normalize, apply_b_dec_to_input, dtype: as in ``SAE``; k is not used by relu.
        loss: "auto" (relu: "scaled_mse", otherwise "fvu"), "scaled_mse" or "fvu"; relu adds the L1 term to either.
        lr: peak learning rate; None means 4e-4 for relu, 2e-4 otherwise (the papers' settings).
        batch_size: tokens a step, over all processes.
        tokens, steps: how long to train; at most one of them, neither means one pass.
        warmup_steps: steps of linear warm-up. cosine: decay to 0 afterwards, or stay at the peak.
        l1_coefficient: λ₁ of relu. auxk_coefficient: weight of AuxK, 0 switches it off.
        dead_after: a feature that was not active for more tokens than this is dead.
        grad_clip: largest norm of the whole gradient, or None.
        seed: of the initial weights and of the shuffle.
        autocast: "auto" (bfloat16 on CUDA), "bfloat16" or "none".
        sync_every: steps between refreshes of the list of dead features; the host waits for the device only then.
        log_every, checkpoint_every: in steps.
    """

    d_sae: int | None = None
    expansion: int = 64
    architecture: str = "topk"
    k: int = 64
    normalize: str = "none"
    apply_b_dec_to_input: bool = True
    dtype: str = "float32"
    loss: str = "auto"
    lr: float | None = None
    batch_size: int = 4096
    tokens: int | None = None
    steps: int | None = None
    warmup_steps: int = 200
    cosine: bool = True
    l1_coefficient: float = 1e-4
    auxk_coefficient: float = 1 / 32
    dead_after: int = 10_000_000
    grad_clip: float | None = 1.0
    seed: int = 0
    autocast: str = "auto"
    sync_every: int = 10
    log_every: int = 50
    checkpoint_every: int = 1000

    def __post_init__(self) -> None:
        choices = {
            "architecture": TRAINABLE,
            "loss": ("auto", "scaled_mse", "fvu"),
            "autocast": ("auto", "bfloat16", "none"),
            "dtype": ("float32", "float64", "bfloat16", "float16"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"TrainConfig: {name} must be one of {allowed}, got {getattr(self, name)!r}")
        counts = ("d_sae", "expansion", "batch_size", "tokens", "steps", "sync_every", "log_every", "checkpoint_every")
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"TrainConfig: {name} must be at least 1, got {value}")
        for name in ("warmup_steps", "l1_coefficient", "auxk_coefficient", "dead_after", "lr", "grad_clip"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"TrainConfig: {name} must be finite and not negative, got {value}")
        if self.batch_size < 2:
            raise ValueError("TrainConfig: batch_size must be at least 2, the loss divides by the batch's variance")
        if self.tokens is not None and self.steps is not None:
            raise ValueError(f"TrainConfig: give tokens or steps, not both, got {self.tokens} and {self.steps}")

    def total_steps(self, rows: int | None) -> int:
        """Steps of the run, given the rows of one pass (None: not known)."""
        if self.steps is not None:
            return self.steps
        wanted = self.tokens if self.tokens is not None else rows
        if wanted is None:
            raise ValueError("TrainConfig: the length of the activations is not known; give tokens or steps")
        if wanted < self.batch_size:
            raise ValueError(f"TrainConfig: {wanted} tokens do not fill one batch; batch_size is {self.batch_size}")
        return wanted // self.batch_size

    @property
    def peak_lr(self) -> float:
        if self.lr is not None:
            return self.lr
        return 4e-4 if self.architecture == "relu" else 2e-4

    def lr_at(self, step: int, total: int) -> float:
        """Learning rate of step 0 … total - 1."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        if not self.cosine:
            return self.peak_lr
        done = (step - self.warmup_steps) / max(total - self.warmup_steps, 1)
        return self.peak_lr * 0.5 * (1 + math.cos(math.pi * done))


class SAETrainer:
    """The optimisation of one SAE, step by step; ``train_sae`` adds data, checkpoints and logging.

    Args:
        sae: trained in place, on its device.
        config: its SAE settings (d_sae, k, …) are not looked at.
        total_steps: for the learning rate.
    """

    def __init__(self, sae: SAE, config: TrainConfig, total_steps: int, world: World | None = None) -> None:
        if sae.architecture not in TRAINABLE:
            raise ValueError(f"train_sae: architecture must be one of {TRAINABLE}, got {sae.architecture!r}")
        self.sae, self.config, self.total_steps = sae.train(), config, total_steps
        self.device = sae.W_enc.device
        self.world = world if world is not None else World(self.device)
        self.step_count = 0
        self.optimizer = UnitRowAdam(sae, config.peak_lr)
        self.tokens_since_fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=self.device)
        self.dead = torch.zeros(0, dtype=torch.int64, device=self.device)
        self._loss = "fvu" if config.loss == "fvu" or (config.loss == "auto" and sae.architecture != "relu") else "mse"
        bf16 = config.autocast == "bfloat16" or (config.autocast == "auto" and self.device.type == "cuda")
        self._autocast = (lambda: torch.autocast(self.device.type, torch.bfloat16)) if bf16 else nullcontext
        # gradients are summed over processes, and cast under autocast, as dense tensors
        self._sparse = sae.architecture == "topk" and not bf16 and self.world.size == 1
        self._sparse = self._sparse and takes_row_sparse(sae.W_enc) and takes_row_sparse(sae.W_dec)

    def step(self, x: Tensor) -> Tensor:
        """One optimisation step on this process's rows x (B, d_in).

        Returns (5,): loss, FVU, L0 and AuxK, this process's shares (which add up over the processes), and the dead
        share divided by the number of processes. They stay on the device.
        """
        sae, config, world = self.sae, self.config, self.world
        if self.step_count % config.sync_every == 0:
            self.dead = (self.tokens_since_fired > config.dead_after).nonzero().flatten()
        x = x.to(self.device, sae.W_enc.dtype, non_blocking=True)
        if self.step_count == 0:
            sae.renormalize_decoder_()
        stats = sae_loss.batch_stats(x, world)
        aux = x.new_zeros(())
        with self._autocast():
            out = sae_loss.forward(sae, x, world, self._sparse)
            if sae.architecture != "relu" and config.auxk_coefficient and len(self.dead):
                aux = sae_loss.auxk(sae, x, out, stats, self.dead, self._sparse)
        fvu = sae_loss.fvu(x, out.x_hat, stats)
        loss = fvu if self._loss == "fvu" else sae_loss.scaled_mse(x, out.x_hat, stats)
        if sae.architecture == "relu":
            loss = loss + config.l1_coefficient * sae_loss.l1(out.acts, stats)
        loss = loss + config.auxk_coefficient * aux
        loss.backward()
        self._update(config.lr_at(self.step_count, self.total_steps))
        fired = sae_loss.fired(sae, out, world)
        self.tokens_since_fired.add_(stats.count).masked_fill_(fired, 0)
        self.step_count += 1
        with torch.no_grad():
            l0 = (out.acts > 0).sum() / stats.count
            dead = (self.tokens_since_fired > config.dead_after).sum() / (sae.d_sae * world.size)
            return torch.stack([value.detach().float() for value in (loss, fvu, l0, dead, aux)])

    def _update(self, lr: float) -> None:
        parameters = list(self.sae.parameters())
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif parameter.grad.is_sparse and self.config.auxk_coefficient and len(self.dead):
                # the rows of the batch and those of the dead features
                parameter.grad = parameter.grad.coalesce()
            self.world.sum_(parameter.grad)
        factor = None
        if self.config.grad_clip is not None:
            grads = [p.grad._values() if p.grad.is_sparse else p.grad for p in parameters]
            factor = (self.config.grad_clip / (torch.nn.utils.get_total_norm(grads) + 1e-6)).clamp(max=1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step(factor=factor)
        self.optimizer.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that changes from step to step: weights, both moments, dead-feature counts, generator states."""
        tensors = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        for name, parameter in self.sae.named_parameters():
            state = self.optimizer.state.get(parameter, {})
            for moment in ("exp_avg", "exp_avg_sq"):
                value = state.get(moment)
                tensors[f"{moment}.{name}"] = torch.zeros_like(parameter) if value is None else value
        mask = torch.zeros(self.sae.d_sae, dtype=torch.uint8, device=self.device)
        tensors["tokens_since_fired"] = self.tokens_since_fired
        tensors["dead"] = mask.index_fill(0, self.dead, 1)
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor], step: int) -> None:
        """Undo ``state_tensors``; torch's generators are set too."""
        self.sae.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("sae.")})
        device = self.device if self.device.type == "cuda" else "cpu"
        for name, parameter in self.sae.named_parameters():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(step, dtype=torch.float32, device=device),
                "exp_avg": tensors[f"exp_avg.{name}"].to(parameter).clone(),
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(parameter).clone(),
            }
        self.tokens_since_fired = tensors["tokens_since_fired"].to(self.device)
        self.dead = tensors["dead"].to(self.device).nonzero().flatten()
        self.step_count = step
        torch.set_rng_state(tensors["rng.cpu"].cpu())
        if self.device.type == "cuda" and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"].cpu(), self.device)


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
        activations: rows (..., d_in): a tensor, an ``ActivationStore``, a ``HarvestSource`` (a CLIP model on the fly)
            or an iterable of tensors. Tensors and sources are shuffled, an iterable is taken as it comes.
        sae_or_config: a ``TrainConfig``, or an SAE to go on training in place (then ``config`` says how).
        out: directory for checkpoints, ``log.jsonl`` and the finished SAE; None keeps nothing on disk.
        device: by default CUDA where there is one, or where the given SAE lives.
        resume: go on from the newest checkpoint in ``out``; a finished run returns at once.
        track: "wandb" or "tensorboard", beside the log.
        metadata: kept in the SAE's ``cfg.json``; what a store or harvest knows of its model is added.
        on_log: called with every logged record, in rank 0.
        settings: fields of ``TrainConfig`` to change.

    Returns:
        the SAE in evaluation mode, decoder rows of norm 1.

    Raises:
        ValueError: settings out of range, or another run in ``out``: other settings, metadata, length or number of
            rows. The rows themselves are not compared.
        RuntimeError: the loss is not finite (the last checkpoint is from before).
        SystemExit: code 143, after SIGTERM, once a checkpoint is written (only with ``out``).
    """
    sae, config = _sae_and_config(sae_or_config, config, settings)
    source = as_source(activations)
    if sae is not None and sae.d_in != source.d_in:
        raise ValueError(f"train_sae: the SAE has d_in = {sae.d_in}, the activations have {source.d_in}")
    if device is None and sae is not None:
        device = sae.W_enc.device
    world = World(device)
    total = config.total_steps(source.rows_per_epoch())
    if total <= config.warmup_steps and world.rank == 0:
        logger.warning(
            "train_sae: %d steps end within the warm-up of %d, at %.2g of a peak learning rate of %.2g; train longer "
            "(tokens, steps) or set warmup_steps", total, config.warmup_steps, config.lr_at(total - 1, total),
            config.peak_lr,
        )  # fmt: skip
    fresh = sae is None
    if sae is None:
        sae = _new_sae(source.d_in, config)
    sae.to(world.device)
    sae.metadata.update({**getattr(source, "provenance", {}), **(metadata or {}), "training": asdict(config)})
    run = Run(SAETrainer(sae, config, total, world), source, Path(out) if out is not None else None, fresh)
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
            raise ValueError(f"train_sae: architecture must be one of {TRAINABLE}, got {given.architecture!r}")
        own = {name: value for name, value in given.config.items() if name != "d_in" and value is not None}
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
