"""Settings of a class-incremental run, and of the alignment of its heads."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from clipsteer.training.settings import (
    COSMETIC,
    Count,
    NotNegative,
    Positive,
    SettingError,
    check_fields,
)

__all__ = ["AlignConfig", "CILConfig"]


@dataclass(frozen=True)
class AlignConfig:
    """Settings of classifier alignment; the published ones by default."""

    samples: Count = 256
    """Gaussian samples of each class in each epoch, and rows of a step"""
    epochs: Count = 5
    """of alignment after each task"""
    lr: Positive = 0.01
    """of alignment's SGD, at its start"""
    momentum: NotNegative = 0.9
    """of alignment's SGD"""
    weight_decay: NotNegative = 5e-4
    """of alignment's SGD"""
    ridge: NotNegative = 1e-3
    """added to the diagonal of each covariance"""
    temperature: Positive = 0.1
    """that logits of unit norm are divided by"""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class CILConfig:
    """Settings of a class-incremental run; ``strategy(name)`` gives the named ones.

    Raises:
        ValueError: a setting out of its range, or settings that do not go together.
    """

    name: str = "macil"
    """what the run is called in tables and folders"""
    train: Literal["lora", "full", "none"] = "lora"
    """what each task changes: LoRA pairs on keys and values, the whole tower, or nothing"""
    lora: Literal["task", "shared", "shared_a"] = "task"
    """a pair of matrices for each task, one pair for all, or a first matrix for all"""
    rank: Count = 32
    """rank of the LoRA pairs"""
    classifier: Literal["heads", "ncm", "zero_shot", "ridge"] = "heads"
    """heads for each task, nearest class mean, the zero-shot head, or ridge regression on a random
    projection (RanPAC)"""
    cosine: bool = True
    """heads compare by cosine (times 20); without, they are linear"""
    softmax: Literal["task", "seen"] = "task"
    """the loss is over the classes of the current task alone, or over all seen"""
    covariance: NotNegative = 0.0
    """weight of the Mahalanobis covariance loss"""
    consistent: bool = False
    """that loss under the covariance of normalised features, over the mean norm of old ones; the
    published form mixes the two"""
    distill: NotNegative = 0.0
    """weight of patch distillation"""
    compensation: Literal["none", "sdc", "mean_shift", "ldc"] = "none"
    """what moves the class means of earlier tasks: nothing, SDC on unit features, MACIL's mean
    shift, or LDC's map from old features to new ones"""
    sigma: Positive | Literal["median"] = "median"
    """width of the drift weights, or the median of the distances"""
    floor: NotNegative = 1e-5
    """added to every drift weight"""
    transport: bool = False
    """earlier covariances follow the linear map fitted from old features to new ones"""
    align: bool = False
    """align the classifier on Gaussian samples after each task"""
    plasticity: bool = False
    """a learning rate for each block, from the SAE features that the task shares with earlier
    ones"""
    cumulative: bool = False
    """learn every task anew with the data of all tasks so far (joint training, the upper bound)"""
    lr: Positive = 0.01
    """of SGD at the start of each task"""
    slow: Positive = 1.0
    """the tower's learning rate over that of the heads (SLCA's slow learner)"""
    freeze_patches: bool = False
    """of a tower that is trained whole, keep the projection of pixels to tokens as it is (Kumar et
    al. 2022)"""
    momentum: float = 0.9
    """of SGD"""
    weight_decay: NotNegative = 5e-4
    """of SGD"""
    batch_size: Count = 48
    """images a step"""
    schedule: Literal["step", "epoch"] = "step"
    """the half cosine of the learning rate falls every step, or once an epoch, as MACIL's authors
    have it"""
    first_epochs: Count = 20
    """passes over the images of the first task"""
    epochs: Count = 10
    """passes over the images of each later task"""
    projections: Count = 10_000
    """width of the random projection, for ranpac"""
    align_samples: Count = AlignConfig.samples
    """Gaussian samples a class and epoch, for alignment"""
    align_epochs: Count = AlignConfig.epochs
    """epochs of alignment after each task"""
    align_lr: Positive = AlignConfig.lr
    """learning rate of alignment"""
    bf16: bool = False
    """train under bfloat16 autocast"""
    seed: int = 1993
    """of the order of the classes and of training"""
    checkpoint_every: Count = 100
    """steps between two checkpoints"""
    log_every: Count = 10
    """steps between two lines of the log"""
    track: Literal["wandb", "tensorboard"] | None = None
    """where figures go beside the logs"""

    def __post_init__(self) -> None:
        check_fields(self)
        learns = self.compensation != "none" or self.plasticity or self.covariance or self.distill
        if self.train == "none" and (self.classifier == "heads" or learns):
            raise self._error("a frozen tower takes no heads, losses, compensation or plasticity")
        if self.freeze_patches and self.train != "full":
            raise self._error(f"freeze_patches needs train 'full', got {self.train!r}")
        if self.transport and not (self.compensation != "none" and self.align):
            raise self._error("transport needs compensation, and align, which uses what it moves")
        if self.align and self.classifier != "heads":
            raise self._error(f"align needs classifier 'heads', got {self.classifier!r}")
        if self.train != "none" and self.classifier in ("zero_shot", "ridge"):
            raise self._error(
                f"classifier {self.classifier!r} needs train 'none', got {self.train!r}"
            )

    def _error(self, text: str) -> SettingError:
        return SettingError(type(self).__name__, text)

    def outcome(self) -> dict[str, Any]:
        """The settings that change what a run ends in, as JSON gives them back."""
        found = asdict(self)
        for name in COSMETIC:
            del found[name]
        # runs of before a field had its default
        for name in ("schedule", "freeze_patches"):
            if found[name] == getattr(CILConfig, name):
                del found[name]
        return json.loads(json.dumps(found))

    @property
    def unit(self) -> bool:
        """Whether class means are of unit features."""
        return self.classifier == "ncm"

    @property
    def alignment(self) -> AlignConfig:
        """Settings of the heads' alignment, with what this run says of them."""
        return AlignConfig(samples=self.align_samples, epochs=self.align_epochs, lr=self.align_lr)
