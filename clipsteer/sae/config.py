"""Settings of SAE training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, get_args

from clipsteer.training.settings import (
    Count,
    CountOrZero,
    NotNegative,
    Positive,
    SettingError,
    check_fields,
)

Trainable = Literal["topk", "batch_topk", "jumprelu", "relu", "gated"]
TRAINABLE = get_args(Trainable)
Births = Literal["at once", "asleep", "wake"]
# Of runs so long the papers' learning rates are right, that of shorter ones is larger.
_LONG = 40_000
# of those whose features a learned threshold or gate lets through a larger one is the death
_WITHOUT_THRESHOLD = ("topk", "batch_topk", "relu")
# whose features start anew where they are dead
_RESAMPLED = ("topk", "batch_topk")
# what is fitted to the length of a run
_FITTED = ("lr", "warmup_steps", "schedule", "encoder_scale", "dead_after", "resample_after")
# tokens, as in Gao et al. 2024; all runs of earlier versions had it
_DEAD_AFTER = 10_000_000
# of a longer run it has not been measured whether that helps
_SHORT = 4_000
# so often a feature would have been active, on average, before it counts as dead
_OFTEN = 10
# of a run, after which no feature starts anew
_SETTLING = 0.8
# the weight of AuxK in Gao et al. 2024 (arXiv 2406.04093)
AUXK = 1 / 32


@dataclass(frozen=True)
class TrainConfig:
    """How to train an SAE.

    Learning rate, warm-up, schedule and when a feature is dead are fitted to the length of the run
    where they are left None (``fitted``).

    Raises:
        ValueError: a setting out of its range, or tokens and steps both given.
    """

    d_sae: Count | None = None
    """number of features (default: the last of matryoshka, else expansion times the width of the
    tokens)"""
    expansion: Count = 64
    """features a dimension of the tokens, where their number is not given"""
    architecture: Trainable = "topk"
    """which features of a token are active: its k largest, on average k over a batch, those above
    a learned threshold, those above 0, or those that a gate lets through"""
    k: int = 64
    """active features a token, for topk and batch_topk; jumprelu and gated start with so many"""
    matryoshka: tuple[Count, ...] | None = None
    """sizes of prefixes of the dictionary, the last one all of it, each of which is trained to
    reconstruct by itself"""
    skip: bool = False
    """a linear path beside the features, for a transcoder"""
    normalize: Literal["none", "layer_norm", "constant_norm"] = "none"
    """what is done to a token before it is encoded, and undone after it is decoded"""
    apply_b_dec_to_input: bool | None = None
    """subtract the decoder's bias before encoding (default: yes, but for a transcoder)"""
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    """of the parameters"""
    loss: Literal["auto", "scaled_mse", "fvu"] = "auto"
    """of the reconstruction; auto is scaled_mse for relu and gated, which add an L1 term to either,
    and fvu otherwise"""
    lr: NotNegative | None = None
    """peak learning rate (default: 4e-4 for relu and 2e-4 otherwise, as in the papers; for topk,
    batch_topk and relu in runs of fewer than 40,000 steps √(40,000 / steps) times that, up to 10
    times)"""
    batch_size: Count = 4096
    """tokens a step, over all processes; at least 2"""
    tokens: Count | None = None
    """how long, in tokens; not together with steps (default: one pass)"""
    steps: Count | None = None
    """how long, in steps"""
    warmup_steps: CountOrZero | None = None
    """steps of linear warm-up (default: a twentieth of the run, at most 200)"""
    schedule: Literal["linear", "cosine", "constant"] | None = None
    """how the learning rate falls to 0 after the warm-up, or that it does not (default: linear, but
    cosine for jumprelu and gated)"""
    cosine: bool | None = None
    """another name: of the schedule cosine, or without of constant"""
    encoder_scale: Positive | None = None
    """length of the encoder's rows before the first step, beside 1 of the decoder's; shorter ones
    reconstruct better, of a smaller part of the features unless the others start anew (default:
    0.25 for topk and batch_topk where they do, 1 otherwise)"""
    l1_coefficient: NotNegative = 1e-4
    """weight of the L1 term, for relu and (of its gates) gated"""
    l0_coefficient: NotNegative = 1e-3
    """weight of the penalty on active features, for jumprelu"""
    l0_penalty: Literal["step", "tanh"] = "step"
    """what is penalised for jumprelu: the number of active features, or the sum of tanh(4 f)"""
    bandwidth: Positive = 0.03
    """width of the window around jumprelu's thresholds in which they learn; 1 is how far a token is
    from the mean, as a root of the mean square"""
    auxk_coefficient: NotNegative | None = None
    """weight of AuxK, the loss that brings dead features back; 0 turns it off (default: 1/32 for
    topk and batch_topk, 0 otherwise)"""
    dead_after: CountOrZero | None = None
    """a feature that was not active for more tokens than this is dead (default: 10,000,000; where
    none starts anew a tenth of the run, at least sync_every steps and ten times d_sae / k, if that
    is less)"""
    resample_after: CountOrZero | None = None
    """a feature that was not active for more tokens than this starts anew, along what is left
    unexplained of a row, in the first four fifths of a run, and the last ones all at once; 0: none
    does (default for topk and batch_topk in runs of fewer than 4,000 steps: a twentieth of the run,
    at least sync_every steps and ten times d_sae / k, at most dead_after; otherwise 0, as with
    matryoshka; not for a transcoder)"""
    grad_clip: NotNegative | Literal["auto"] | None = "auto"
    """largest norm of the whole gradient; auto is 0.003 where features start anew by default, so
    that all gradients are about as long, and 1 otherwise"""
    seed: int = 0
    """of the first weights and of the order of the tokens"""
    autocast: Literal["auto", "bfloat16", "none"] = "auto"
    """precision of the products; auto is bfloat16 on a GPU and none on a CPU"""
    shard_features: bool = False
    """under torchrun, let each process hold and train its share of the features"""
    sync_every: Count = 10
    """steps between two looks at which features are dead; a GPU is waited for only then"""
    log_every: Count = 50
    """steps between two lines of the log"""
    checkpoint_every: Count = 1000
    """steps between two checkpoints"""
    track: Literal["wandb", "tensorboard"] | None = None
    """where figures go beside log.jsonl"""

    def __post_init__(self) -> None:
        if isinstance(self.matryoshka, list):
            object.__setattr__(self, "matryoshka", tuple(self.matryoshka))
        check_fields(self)
        sizes = self.matryoshka
        if sizes is not None:
            if not sizes or any(a >= b for a, b in pairwise(sizes)):
                raise self._error(f"{{matryoshka}} must ascend, got {sizes}")
            if self.d_sae not in (None, sizes[-1]):
                raise self._error(
                    f"{{matryoshka}} must end in {{d_sae}} = {self.d_sae}, got {sizes}"
                )
        if self.batch_size < 2:
            raise self._error(
                "{batch_size} must be at least 2, as the loss divides by the variance of a batch"
            )
        if self.tokens is not None and self.steps is not None:
            raise self._error(
                f"give {{tokens}} or {{steps}}, not both, got {self.tokens} and {self.steps}"
            )

        if self.cosine is not None and self.schedule is not None:
            raise self._error(
                f"give {{schedule}} or {{cosine}}, not both, got {self.schedule} and {self.cosine}"
            )

    def _error(self, text: str) -> SettingError:
        return SettingError(type(self).__name__, text)

    def features(self, d_in: int) -> int:
        """Number of features, given the width of the tokens."""
        if self.d_sae is not None:
            return self.d_sae
        return self.matryoshka[-1] if self.matryoshka else self.expansion * d_in

    def total_steps(self, rows: int | None) -> int:
        """Steps of the run, given the rows of one pass (None: not known)."""
        if self.steps is not None:
            return self.steps
        wanted = self.tokens if self.tokens is not None else rows
        if wanted is None:
            raise self._error(
                "the length of the activations is not known; give {tokens} or {steps}"
            )
        if wanted < self.batch_size:
            raise self._error(
                f"{wanted} tokens do not fill one batch; {{batch_size}} is {self.batch_size}"
            )
        return wanted // self.batch_size

    def fitted(self, total: int, features: int | None = None) -> TrainConfig:
        """With everything set that is left to the length of the run, which has ``total`` steps, and
        to the number of features."""
        left = [getattr(self, name) is None for name in _FITTED]
        if self.cosine is None and not any(left) and self.grad_clip != "auto":
            return self
        free = self.architecture in _WITHOUT_THRESHOLD
        schedule = self.schedule or ("linear" if free else "cosine")
        if self.cosine is not None:
            schedule = "cosine" if self.cosine else "constant"
        lr = self.lr
        if lr is None:
            longer = max(_LONG / total, 1.0) if free else 1.0
            lr = _paper_lr(self.architecture) * min(longer**0.5, 10.0)
        warmup = min(total // 20, 200) if self.warmup_steps is None else self.warmup_steps
        often = int(_OFTEN * (features or self.d_sae or 0) / self.k)

        def part(of: int) -> int:
            return max(max(total // of, self.sync_every) * self.batch_size, often)

        dead = _DEAD_AFTER if self.dead_after is None else self.dead_after
        after = self.resample_after
        if after is None:
            resamples = self.architecture in _RESAMPLED and self.matryoshka is None
            resamples = resamples and total < _SHORT
            after = min(part(20), dead) if resamples else 0
        anew = after > 0 and self.architecture in _RESAMPLED
        if self.dead_after is None and not anew:
            # AuxK at a twentieth silences features that are rare
            dead = min(part(10), dead)
        clip = self.grad_clip
        if clip == "auto":
            clip = 0.003 if anew else 1.0
        return replace(
            self,
            schedule=schedule,
            cosine=None,
            lr=lr,
            warmup_steps=warmup,
            encoder_scale=self.encoder_scale or (0.25 if anew else 1.0),
            grad_clip=clip,
            dead_after=dead,
            resample_after=after,
        )

    def births_at(self, step: int, total: int, wait: int) -> Births | None:
        """What happens to dead features once so many steps are done.

        Where features are looked at anyway they start anew "at once". In the last ``wait`` steps (a
        tenth of the run at most) before the last fifth of the run, they are made "asleep", so that
        none of them takes another's place while there are more than rows; then all "wake".
        """
        if not self.fitted(total).resample_after:
            return None
        end = math.ceil(_SETTLING * total)
        start = end - min(wait, total // 10)
        if start <= step <= end and start < end:
            return "wake" if step == end else "asleep"
        looked = step % self.sync_every == 0 and 0 < step < end
        return "at once" if looked else None

    def for_transcoder(self) -> TrainConfig:
        """Without what a transcoder cannot have.

        Raises ValueError where that was asked for."""
        if self.resample_after:
            raise self._error(
                "{resample_after} is not for a transcoder, whose rows to encode are not those that "
                f"it leaves unexplained; leave it out, got {self.resample_after}"
            )
        return replace(self, resample_after=0)

    @property
    def auxk(self) -> float:
        """The weight of AuxK."""
        if self.auxk_coefficient is not None:
            return self.auxk_coefficient
        return AUXK if "topk" in self.architecture else 0.0

    @property
    def peak_lr(self) -> float:
        """The learning rate after the warm-up; where it is left to the length of the run, and that
        is not known, of a long one."""
        return self.fitted(self.steps or _LONG).lr or 0.0

    def lr_at(self, step: int, total: int) -> float:
        """Learning rate of step 0 … total - 1."""
        fitted = self.fitted(total)
        peak = fitted.lr or 0.0
        warmup = fitted.warmup_steps or 0
        if step < warmup:
            return peak * (step + 1) / warmup
        if fitted.schedule == "constant":
            return peak
        done = (step - warmup) / max(total - warmup, 1)
        left = 1 - done if fitted.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return peak * left


def _paper_lr(architecture: str) -> float:
    return 4e-4 if architecture == "relu" else 2e-4


def as_earlier(config: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    """What the version that wrote these settings into a run took where nothing else is asked
    for."""
    if "resample_after" not in settings:
        config = replace(
            config,
            resample_after=config.resample_after or 0,
            encoder_scale=config.encoder_scale or 1.0,
            grad_clip=1.0 if config.grad_clip == "auto" else config.grad_clip,
        )
    if config.dead_after is None and settings.get("dead_after") == _DEAD_AFTER:
        config = replace(config, dead_after=_DEAD_AFTER)
    if "schedule" in settings:
        return config
    cosine = config.cosine is not False if config.schedule is None else None
    lr = _paper_lr(config.architecture) if config.lr is None else config.lr
    warmup = 200 if config.warmup_steps is None else config.warmup_steps
    return replace(config, cosine=cosine, lr=lr, warmup_steps=warmup)


def of_earlier(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that an earlier version wrote into a run, as this one does."""
    found = {"resample_after": 0, "encoder_scale": 1.0, **settings}
    if "schedule" not in found:
        if found.get("lr") is None:
            found["lr"] = _paper_lr(found.get("architecture", ""))
        found["schedule"] = "cosine" if found.get("cosine", True) else "constant"
        found["cosine"] = None
    return found
