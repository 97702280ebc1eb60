"""Settings of fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clipsteer.training.settings import (
    Count,
    CountOrZero,
    NotNegative,
    Positive,
    Share,
    Weight,
    check_fields,
)


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of a fine-tuning run; the recipe of Wortsman et al. 2022 by default.

    Raises:
        ValueError: a setting out of its range.
    """

    mode: Literal["e2e", "lc"] = "e2e"
    """end to end, or the linear classifier alone, on features computed once and without crops"""
    lr: Positive | None = None
    """peak learning rate (default: 3e-5, for lc 1e-3)"""
    weight_decay: NotNegative = 0.1
    """of AdamW"""
    batch_size: Count = 512
    """images a step"""
    epochs: Count = 10
    """passes over the images"""
    warmup_steps: CountOrZero = 500
    """steps of linear warm-up, but at most a tenth of the run, so that short runs reach their
    peak"""
    grad_clip: Positive = 1.0
    """largest norm of the whole gradient"""
    label_smoothing: Weight = 0.0
    """share of a target that is spread over all classes"""
    crop: Share = 0.9
    """smallest share of an image's area that a random crop keeps; 1 turns crops off"""
    alpha: Weight = 0.5
    """of the running ensemble, which is measured beside the model on validation images"""
    bf16: bool = False
    """compute under bfloat16 autocast"""
    seed: int = 0
    """of the order of the images and of the crops"""
    checkpoint_every: Count = 500
    """steps between two checkpoints"""
    log_every: Count = 10
    """steps between two lines of the log"""
    track: Literal["wandb", "tensorboard"] | None = None
    """where figures go beside log.jsonl"""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def peak(self) -> float:
        """The learning rate after the warm-up."""
        if self.lr is not None:
            return self.lr
        return 3e-5 if self.mode == "e2e" else 1e-3

    def lr_at(self, step: int, total: int) -> float:
        """Learning rate of step 0 … total-1."""
        # torch comes in with it, which the command line's help does without
        from clipsteer.training.schedule import cosine_lr

        return cosine_lr(step, total, self.peak, self.warmup_steps)
