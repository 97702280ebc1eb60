"""Settings of contrastive training, and the loss that they name."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from clipsteer.reference.temperature import balanced_rho, unbalanced
from clipsteer.training.settings import (
    Count,
    CountOrZero,
    Finite,
    NotNegative,
    Positive,
    SettingError,
    Share,
    Weight,
    check_fields,
)

if TYPE_CHECKING:
    from torch import nn

    from clipsteer.training.world import World

# the rule of CLIP and of FastCLIP for a learnt τ
LEAST_TEMPERATURE = 0.01
# the least that float32 resolves in full
LEAST_EPS = 2.0**-126
# τ of the losses as published, where that is not the least
_STARTS = {"clip": 0.07, "distill": 0.07, "siglip": 0.1}
Loss = Literal["drrho", "global", "clip", "siglip", "distill"]
LOSSES = get_args(Loss)
# those that say nothing without a reference
REFERRED = ("drrho", "distill")


@dataclass(frozen=True)
class ContrastiveConfig:
    """Settings of a contrastive run.

    Raises:
        ValueError: a setting out of its range.
    """

    loss: Loss = "drrho"
    """what is minimised; drrho and distill need a reference"""
    lr: Positive = 5e-4
    """peak learning rate"""
    weight_decay: NotNegative = 0.2
    """of AdamW"""
    batch_size: Count = 256
    """pairs a step, over all processes; what fills no batch is left out of an epoch"""
    micro_batch: Count | None = None
    """pairs of a process in memory at a time; the step is that of the whole batch (default: all)"""
    epochs: Count = 30
    """passes over the pairs"""
    samples: Count | None = None
    """pairs to see in all, in place of epochs"""
    warmup_steps: CountOrZero = 500
    """steps of linear warm-up, but at most a tenth of the run"""
    grad_clip: Positive = 1.0
    """largest norm of the gradient in the model's weights; FastCLIP's and DRRho-CLIP's scripts do
    not clip, for which give a large number"""
    temperature: Positive | None = None
    """τ, or where a learnt one starts, which is at least 0.01 (default: 0.01; for clip and distill
    0.07, for siglip 0.1)"""
    learnable_temperature: bool | None = None
    """learn τ (default: for clip, siglip and distill, as published)"""
    logit_bias: Finite | None = None
    """where the bias of siglip's logits starts, which is learnt (default: -10, as published;
    batches of B pairs balance near -log B)"""
    rho: NotNegative | None = None
    """pushes a learnt τ down, for drrho and global, against the unevenness of the weights, which
    pushes it up; above 0 and below log B there is a balance. FastCLIP's 6.5 and 11 do not carry
    over, as its code counts a term of τ's gradient twice (default: half of log B where τ is
    learnt)"""
    eps: NotNegative = 1e-14
    """ε inside the logarithm, for drrho and global; FastCLIP takes 1e-14 to 1e-6, DRRho-CLIP 1e-4.
    Pairs whose average over the others is not far above it count less, which at a small τ without
    a reference can be most of them"""
    gamma_min: Share | None = None
    """what γ, the share of the newest batch in the averages of drrho and global, falls to
    (default: min(1, 4.177·E^-0.7265) for a run of E epochs, as DRRho-CLIP)"""
    gamma_epochs: Count | None = None
    """epochs in which γ falls (default: those of the run)"""
    distill: Weight = 0.5
    """weight of the soft targets, for distill"""
    loss_backend: Literal["auto", "reference", "cpp", "triton", "plain"] = "auto"
    """what computes the loss, see `ops.explain`; for clip, siglip and distill "plain" multiplies
    whole matrices of logits"""
    select: Share | None = None
    """train on this share of each batch of all processes, picked as learnable together (JEST);
    needs a reference (default: all)"""
    crop: Share = 0.9
    """smallest share of an image's largest square that a random square crop keeps; 1 turns crops
    off"""
    bf16: bool = False
    """compute under bfloat16 autocast"""
    seed: int = 0
    """of the first weights, the order of the pairs and the crops"""
    evaluate_every: Count | None = None
    """steps between two looks at the validation sets (default: an epoch)"""
    checkpoint_every: Count = 500
    """steps between two checkpoints"""
    log_every: Count = 10
    """steps between two lines of the log"""
    track: Literal["wandb", "tensorboard"] | None = None
    """where figures go beside log.jsonl"""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.remembers and self.loss_backend == "plain":
            raise self._error(
                "{loss_backend} must be a backend of ops.drrho_loss for drrho and global, got "
                "'plain'; 'reference' is torch's"
            )
        if self.logit_bias is not None and self.loss != "siglip":
            raise self._error(
                f"{{logit_bias}} must be left out for loss={self.loss!r}, as siglip alone learns "
                f"one; got {self.logit_bias}"
            )
        tau, learnt = self._temperature()
        if learnt and tau < LEAST_TEMPERATURE:
            raise self._error(
                f"{{temperature}} must be at least {LEAST_TEMPERATURE} where it is learnt, "
                f"got {tau}"
            )
        if 0 < self.eps < LEAST_EPS:
            raise self._error(
                f"{{eps}} must be 0 or at least {LEAST_EPS:.2g}, what float32 resolves, got "
                f"{self.eps}"
            )
        if self.learns_by_rho and (text := unbalanced(self.resolved_rho, self.loss_pairs)):
            warnings.warn(f"{type(self).__name__}: {text}", stacklevel=3)

    def _error(self, text: str) -> SettingError:
        return SettingError(type(self).__name__, text)

    def check_batches(self, pairs: int, processes: int) -> None:
        """Raise ValueError unless so many pairs make a batch that so many processes can share."""
        if pairs < self.batch_size or self.batch_size % processes:
            raise self._error(
                f"{{batch_size}} must be at most the {pairs} pairs there are and a multiple of the "
                f"{processes} processes, got {self.batch_size}"
            )

    @property
    def remembers(self) -> bool:
        """Whether the loss averages its denominators over earlier batches."""
        return self.loss in ("drrho", "global")

    @property
    def loss_pairs(self) -> int:
        """B, how many pairs of a batch reach the loss."""
        share = 1.0 if self.select is None else self.select
        return max(1, round(share * self.batch_size))

    @property
    def learns_by_rho(self) -> bool:
        """Whether τ is learnt under ρ."""
        return self.remembers and self._temperature()[1]

    @property
    def resolved_rho(self) -> float:
        """ρ, with its default."""
        if self.rho is not None:
            return self.rho
        return balanced_rho(self.loss_pairs) if self.learns_by_rho else 0.0

    @property
    def resolved_bias(self) -> float | None:
        """Where the bias starts, None for losses without one."""
        if self.loss != "siglip":
            return None
        return -10.0 if self.logit_bias is None else self.logit_bias

    @property
    def wants_reference(self) -> bool:
        """Whether the features of a reference model are needed."""
        return self.loss in REFERRED or self.select is not None

    def _temperature(self) -> tuple[float, bool]:
        """τ, or where it starts, and whether it is learnt."""
        tau = self.temperature
        if tau is None:
            tau = _STARTS.get(self.loss, 0.01)
        learnt = self.learnable_temperature
        if learnt is None:
            learnt = not self.remembers
        return tau, learnt

    def make_loss(self, num_samples: int, world: World) -> nn.Module:
        """The loss of these settings, for a set of ``num_samples`` pairs."""
        # torch comes in with them, which the command line's help does without
        from clipsteer.reference.drrho import DRRhoLoss
        from clipsteer.reference.losses import ContrastiveLoss, SigmoidLoss

        tau, learnt = self._temperature()
        if self.remembers:
            loss = DRRhoLoss(
                num_samples,
                temperature=tau,
                learnable_temperature=learnt,
                temperature_min=LEAST_TEMPERATURE,
                rho=self.resolved_rho,
                eps=self.eps,
                world=world,
                backend=self.loss_backend,
            )
            loss.warned = True  # these settings have
            return loss
        common: dict[str, Any] = {
            "temperature": tau,
            "learnable_temperature": learnt,
            "world": world,
            "backend": self.loss_backend,
        }
        if (bias := self.resolved_bias) is not None:
            return SigmoidLoss(**common, logit_bias=bias)
        return ContrastiveLoss(**common, distill=self.distill if self.loss == "distill" else 0.0)
