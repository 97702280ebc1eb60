"""Settings of contrastive training, and the loss that they name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import nn

from clipsteer.reference.drrho import DRRhoLoss
from clipsteer.reference.losses import ContrastiveLoss
from clipsteer.training.world import World

# the rule of CLIP and of FastCLIP for a learnt τ
LEAST_TEMPERATURE = 0.01
LOSSES = ("drrho", "global", "clip", "distill")


@dataclass(frozen=True)
class ContrastiveConfig:
    """Settings of a run.

    Attributes:
        batch_size: pairs a step, over all processes; the rest of an epoch that fills no batch is
            left out.
        micro_batch: pairs of a process that go through the model at a time; the step is that of the
            whole batch.
        samples: pairs to see in all, instead of `epochs`.
        warmup_steps: at most a tenth of the run is warm-up.
        grad_clip: largest norm of the gradient in the model's weights.
        temperature: τ, or where it starts; None is 0.01 for drrho and global, 0.07 for clip and
            distill. A learnt one is at least 0.01.
        learnable_temperature: None is no for drrho and global, yes for clip and distill, as
            published.
        rho: keeps a learnable τ up, in drrho and global; FastCLIP uses 6.5 to 11.
        gamma_min, gamma_epochs: the share γ that the newest batch has in the averaged denominators
            of drrho and global falls to gamma_min in gamma_epochs epochs; None: min(1,
            4.177·E^-0.7265) and E, the run's epochs, as DRRho-CLIP.
        distill: weight of the soft targets in "distill".
        select: share of a batch that is trained on, picked as learnable together (JEST) from the
            joint batch of all processes, of which each trains on those that it has; None trains on
            all.
        crop: smallest share of the largest square in an image that a random square crop keeps; 1
            turns crops off.
        bf16: compute under bfloat16 autocast.
        track: where figures go beside log.jsonl.
    """

    loss: Literal["drrho", "global", "clip", "distill"] = "drrho"
    lr: float = 5e-4
    weight_decay: float = 0.2
    batch_size: int = 256
    micro_batch: int | None = None
    epochs: int = 30
    samples: int | None = None
    warmup_steps: int = 500
    grad_clip: float = 1.0
    temperature: float | None = None
    learnable_temperature: bool | None = None
    rho: float = 0.0
    gamma_min: float | None = None
    gamma_epochs: int | None = None
    distill: float = 0.5
    select: float | None = None
    crop: float = 0.9
    bf16: bool = False
    seed: int = 0
    evaluate_every: int | None = None
    checkpoint_every: int = 500
    log_every: int = 10
    track: Literal["wandb", "tensorboard"] | None = None

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"ContrastiveConfig: loss must be one of {LOSSES}, got {self.loss!r}")
        optional = ("micro_batch", "samples", "gamma_epochs", "evaluate_every")
        for name in ("batch_size", "epochs", "checkpoint_every", "log_every", *optional):
            value = getattr(self, name)
            if not (value is None and name in optional) and value < 1:
                raise ValueError(f"ContrastiveConfig: {name} must be at least 1, got {value}")
        for name in ("crop", "select", "gamma_min"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) <= 1:
                raise ValueError(
                    f"ContrastiveConfig: {name} must be in (0, 1], got {getattr(self, name)}"
                )
        for name in ("lr", "grad_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"ContrastiveConfig: {name} must be positive and finite, got "
                    f"{getattr(self, name)}"
                )
        for name in ("weight_decay", "warmup_steps", "rho"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"ContrastiveConfig: {name} must be finite and at least 0, got "
                    f"{getattr(self, name)}"
                )
        if not 0 <= self.distill <= 1:
            raise ValueError(f"ContrastiveConfig: distill must be in [0, 1], got {self.distill}")
        tau, learnt = self._temperature()
        if not 0 < tau < math.inf or (learnt and tau < LEAST_TEMPERATURE):
            expected = (
                f"at least {LEAST_TEMPERATURE} where it is learnt"
                if learnt
                else "positive and finite"
            )
            raise ValueError(f"ContrastiveConfig: temperature must be {expected}, got {tau}")

    def check_batches(self, pairs: int, processes: int) -> None:
        """Raise ValueError unless so many pairs make a batch that so many processes can share."""
        if pairs < self.batch_size or self.batch_size % processes:
            raise ValueError(
                f"train: batch_size must be at most the {pairs} pairs there are and a multiple of "
                f"the "
                f"{processes} processes, got {self.batch_size}"
            )

    @property
    def remembers(self) -> bool:
        """Whether the loss averages its denominators over earlier batches."""
        return self.loss in ("drrho", "global")

    @property
    def wants_reference(self) -> bool:
        return self.loss in ("drrho", "distill") or self.select is not None

    def _temperature(self) -> tuple[float, bool]:
        """τ, or where it starts, and whether it is learnt."""
        tau = 0.01 if self.remembers else 0.07
        if self.temperature is not None:
            tau = self.temperature
        learnt = not self.remembers
        if self.learnable_temperature is not None:
            learnt = self.learnable_temperature
        return tau, learnt

    def make_loss(self, num_samples: int, world: World) -> nn.Module:
        tau, learnt = self._temperature()
        if self.remembers:
            return DRRhoLoss(
                num_samples,
                temperature=tau,
                learnable_temperature=learnt,
                temperature_min=LEAST_TEMPERATURE,
                rho=self.rho,
                world=world,
            )
        distill = self.distill if self.loss == "distill" else 0.0
        return ContrastiveLoss(
            temperature=tau, learnable_temperature=learnt, distill=distill, world=world
        )
