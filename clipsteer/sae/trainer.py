"""The optimisation of one SAE, step by step."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from clipsteer.sae import losses as sae_loss
from clipsteer.sae.adam import UnitRowAdam, takes_row_sparse
from clipsteer.sae.model import SAE
from clipsteer.training.world import World

TRAINABLE = ("relu", "topk", "batch_topk")


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        d_sae, expansion: number of features; None means expansion · d_in.
        architecture, k, normalize, apply_b_dec_to_input, dtype: as in ``SAE``; k is not used by
            relu.
        loss: "auto" (relu: "scaled_mse", otherwise "fvu"), "scaled_mse" or "fvu"; relu adds the L1
            term to either.
        lr: peak learning rate; None means 4e-4 for relu, 2e-4 otherwise (the papers' settings).
        batch_size: tokens a step, over all processes.
        tokens, steps: how long to train; at most one of them, neither means one pass.
        warmup_steps: steps of linear warm-up. cosine: decay to 0 afterwards, or stay at the peak.
        l1_coefficient: λ₁ of relu. auxk_coefficient: weight of AuxK, 0 switches it off.
        dead_after: a feature that was not active for more tokens than this is dead.
        grad_clip: largest norm of the whole gradient, or None.
        seed: of the initial weights and of the shuffle.
        autocast: "auto" (bfloat16 on CUDA), "bfloat16" or "none".
        sync_every: steps between refreshes of the list of dead features; the host waits for the
            device only then.
        log_every, checkpoint_every: in steps.
        track: where figures go beside log.jsonl.
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
    track: Literal["wandb", "tensorboard"] | None = None

    def __post_init__(self) -> None:
        choices = {
            "architecture": TRAINABLE,
            "loss": ("auto", "scaled_mse", "fvu"),
            "autocast": ("auto", "bfloat16", "none"),
            "dtype": ("float32", "float64", "bfloat16", "float16"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"TrainConfig: {name} must be one of {allowed}, got {getattr(self, name)!r}"
                )
        counts = (
            "d_sae",
            "expansion",
            "batch_size",
            "tokens",
            "steps",
            "sync_every",
            "log_every",
            "checkpoint_every",
        )
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"TrainConfig: {name} must be at least 1, got {value}")
        for name in (
            "warmup_steps",
            "l1_coefficient",
            "auxk_coefficient",
            "dead_after",
            "lr",
            "grad_clip",
        ):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(
                    f"TrainConfig: {name} must be finite and not negative, got {value}"
                )
        if self.batch_size < 2:
            raise ValueError(
                "TrainConfig: batch_size must be at least 2, the loss divides by the batch's "
                "variance"
            )
        if self.tokens is not None and self.steps is not None:
            raise ValueError(
                f"TrainConfig: give tokens or steps, not both, got {self.tokens} and {self.steps}"
            )

    def total_steps(self, rows: int | None) -> int:
        """Steps of the run, given the rows of one pass (None: not known)."""
        if self.steps is not None:
            return self.steps
        wanted = self.tokens if self.tokens is not None else rows
        if wanted is None:
            raise ValueError(
                "TrainConfig: the length of the activations is not known; give tokens or steps"
            )
        if wanted < self.batch_size:
            raise ValueError(
                f"TrainConfig: {wanted} tokens do not fill one batch; batch_size is "
                f"{self.batch_size}"
            )
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

    def __init__(
        self, sae: SAE, config: TrainConfig, total_steps: int, world: World | None = None
    ) -> None:
        if sae.architecture not in TRAINABLE:
            raise ValueError(
                f"train_sae: architecture must be one of {TRAINABLE}, got {sae.architecture!r}"
            )
        self.sae = sae.train()
        self.config = config
        self.total_steps = total_steps
        self.device = sae.W_enc.device
        self.world = world if world is not None else World(self.device)
        self.step_count = 0
        self.optimizer = UnitRowAdam(sae, config.peak_lr)
        self.tokens_since_fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=self.device)
        self.dead = torch.zeros(0, dtype=torch.int64, device=self.device)
        by_default = "scaled_mse" if sae.architecture == "relu" else "fvu"
        self._loss = by_default if config.loss == "auto" else config.loss
        on_gpu = self.device.type == "cuda"
        bf16 = config.autocast == "bfloat16" or (config.autocast == "auto" and on_gpu)
        self._autocast = nullcontext
        if bf16:
            self._autocast = partial(torch.autocast, self.device.type, torch.bfloat16)
        # gradients are summed over processes, and cast under autocast, as dense tensors
        self._sparse = sae.architecture == "topk" and not bf16 and self.world.size == 1
        self._sparse = self._sparse and takes_row_sparse(sae.W_enc) and takes_row_sparse(sae.W_dec)

    def step(
        self,
        x: Tensor,  # (B, d_in)
    ) -> Tensor:  # (5,)
        """One optimisation step on this process's rows x (B, d_in).

        Returns (5,): loss, FVU, L0 and AuxK, this process's shares (which add up over the
        processes), and the dead share divided by the number of processes. They stay on the device.
        """
        sae = self.sae
        config = self.config
        world = self.world
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
            factor = (self.config.grad_clip / (torch.nn.utils.get_total_norm(grads) + 1e-6)).clamp(
                max=1.0
            )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step(factor=factor)
        self.optimizer.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that changes from step to step: weights, both moments, dead-feature counts,
        generator states."""
        tensors = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        for name, parameter in self.sae.named_parameters():
            state = self.optimizer.state.get(parameter, {})
            for moment in ("exp_avg", "exp_avg_sq"):
                value = state.get(moment)
                if value is None:
                    value = torch.zeros_like(parameter)
                tensors[f"{moment}.{name}"] = value
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
