"""The ways of learning classes task by task, as settings of one learner."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from clipsteer.continual.heads import AlignConfig

__all__ = ["ABLATION", "STRATEGIES", "CILConfig", "strategy"]


@dataclass(frozen=True)
class CILConfig:
    """Settings of a class-incremental run; ``strategy(name)`` gives the named ones.

    Attributes:
        train: what each task changes: LoRA pairs on keys and values, the full tower, or nothing.
        lora, rank: the variant ("task", "shared", "shared_a") and the rank of
            ``continual.lora.LoRA``.
        classifier: task heads; nearest class mean; the zero-shot head; ridge on a random projection
            (RanPAC).
        cosine: cosine heads (scale 20), or linear ones.
        softmax: over the current task's classes alone, or over all seen.
        covariance: weight of the Mahalanobis covariance loss; consistent: under the covariance of
            normalised features, over the mean norm of old ones (the published form mixes the two).
        distill: weight of patch distillation.
        compensation: moves the class means of earlier tasks: "none", "sdc" (unit features),
            "mean_shift" (MACIL).
        sigma, floor: of the drift weights.
        transport: earlier covariances follow the linear map fitted from old features to new ones.
        align: classifier alignment on Gaussian samples.
        plasticity: learning rates per block from SAE features that task and earlier tasks share.
        cumulative: every task is learned anew with the data of all tasks so far (joint training,
            the upper bound).
        lr: of SGD at the start of each task. slow: the tower's rate over that of the heads (SLCA's
            slow learner).
        first_epochs, epochs: of the first task, and of each later one.
        track: where figures go beside the logs.
    """

    name: str = "macil"
    train: Literal["lora", "full", "none"] = "lora"
    lora: Literal["task", "shared", "shared_a"] = "task"
    rank: int = 32
    classifier: Literal["heads", "ncm", "zero_shot", "ridge"] = "heads"
    cosine: bool = True
    softmax: Literal["task", "seen"] = "task"
    covariance: float = 0.0
    consistent: bool = False
    distill: float = 0.0
    compensation: Literal["none", "sdc", "mean_shift"] = "none"
    sigma: float | Literal["median"] = "median"
    floor: float = 1e-5
    transport: bool = False
    align: bool = False
    plasticity: bool = False
    cumulative: bool = False
    lr: float = 0.01
    slow: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 48
    first_epochs: int = 20
    epochs: int = 10
    projections: int = 10_000
    align_samples: int = 256
    align_epochs: int = 5
    align_lr: float = 0.01
    bf16: bool = False
    seed: int = 1993
    checkpoint_every: int = 100
    log_every: int = 10
    track: Literal["wandb", "tensorboard"] | None = None

    def __post_init__(self) -> None:
        choices = {
            "train": ("lora", "full", "none"),
            "lora": ("task", "shared", "shared_a"),
            "softmax": ("task", "seen"),
            "classifier": ("heads", "ncm", "zero_shot", "ridge"),
            "compensation": ("none", "sdc", "mean_shift"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"CILConfig: {field} must be one of {allowed}, got {getattr(self, field)!r}"
                )
        for field in (
            "rank",
            "batch_size",
            "first_epochs",
            "epochs",
            "projections",
            "align_samples",
            "align_epochs",
            "checkpoint_every",
            "log_every",
        ):
            if getattr(self, field) < 1:
                raise ValueError(
                    f"CILConfig: {field} must be at least 1, got {getattr(self, field)}"
                )
        for field in ("lr", "slow", "align_lr"):
            if not 0 < getattr(self, field) < float("inf"):
                raise ValueError(f"CILConfig: {field} must be positive, got {getattr(self, field)}")
        for field in ("covariance", "distill", "floor", "weight_decay"):
            if not 0 <= getattr(self, field) < float("inf"):
                raise ValueError(
                    f"CILConfig: {field} must be at least 0, got {getattr(self, field)}"
                )
        if self.sigma != "median" and not (
            isinstance(self.sigma, float | int) and 0 < self.sigma < float("inf")
        ):
            raise ValueError(f"CILConfig: sigma must be positive, or 'median', got {self.sigma!r}")
        if self.train == "none" and (
            self.classifier == "heads"
            or self.compensation != "none"
            or self.plasticity
            or self.covariance
            or self.distill
        ):
            raise ValueError(
                "CILConfig: a frozen tower takes no heads, losses, compensation or plasticity"
            )
        if self.transport and not (self.compensation != "none" and self.align):
            raise ValueError(
                "CILConfig: transport needs compensation, and align, which uses what it moves"
            )
        if self.align and self.classifier != "heads":
            raise ValueError(f"CILConfig: align needs classifier 'heads', got {self.classifier!r}")
        if self.train != "none" and self.classifier in ("zero_shot", "ridge"):
            raise ValueError(
                f"CILConfig: classifier {self.classifier!r} needs train 'none', got {self.train!r}"
            )

    def outcome(self) -> dict[str, Any]:
        """The settings that change what a run ends in, as JSON gives them back."""
        found = asdict(self)
        for name in ("checkpoint_every", "log_every", "track"):
            del found[name]
        return json.loads(json.dumps(found))

    @property
    def unit(self) -> bool:
        """Whether class means are of unit features."""
        return self.classifier == "ncm"

    @property
    def alignment(self) -> AlignConfig:
        return AlignConfig(samples=self.align_samples, epochs=self.align_epochs, lr=self.align_lr)


_MACIL = {"covariance": 1.0, "distill": 0.4, "compensation": "mean_shift", "align": True}
STRATEGIES: Mapping[str, Mapping[str, Any]] = {
    # sequential fine-tuning, and what MACIL adds to it
    "finetune": {},
    "macil": _MACIL,
    # slow learner on the whole tower, fast heads, alignment (Zhang et al. 2023); schedule and
    # epochs are MACIL's here, and the ridge of the covariances 1e-3, where SLCA's authors have
    # steps, as many epochs in each task and 1e-4
    "slca": {"train": "full", "cosine": False, "align": True, "slow": 0.01},
    # SDC's compensation and nearest means (Yu et al. 2020) on an embedding that is trained through
    # cosine heads, where the paper has metric learning, and compared by angle
    "sdc": {"classifier": "ncm", "compensation": "sdc", "sigma": 0.3, "floor": 0.0},
    "ncm": {"train": "none", "classifier": "ncm"},
    "zero_shot": {"train": "none", "classifier": "zero_shot"},
    # RanPAC without its first-session adaptation (McDonnell et al. 2023)
    "ranpac": {"train": "none", "classifier": "ridge"},
    "joint": {"cumulative": True},
}
# MACIL built up part by part, each part taken away, and what may stand in its place
ABLATION = (
    "macil",
    "macil:covariance=0,distill=0,compensation=none,align=0",
    "macil:covariance=0,distill=0,compensation=none",
    "macil:covariance=0,distill=0",
    "macil:distill=0",
    "macil:covariance=0",
    "macil:compensation=none",
    "macil:transport=1",
    "macil:consistent=1",
    "macil:lora=shared",
    "macil:lora=shared_a",
    "macil:plasticity=1",
    "macil:slow=0.01",
)


def strategy(spec: str, **settings: Any) -> CILConfig:
    """Settings from "NAME" or "NAME:field=value,…"; what the spec says goes before ``settings``.

    Raises ValueError for an unknown name, field or value.
    """
    name, _, changes = spec.partition(":")
    if name not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {name!r}")
    known = {field.name: field.default for field in fields(CILConfig)}
    own = dict(STRATEGIES[name])
    for change in filter(None, changes.split(",")):
        field, sign, text = change.partition("=")
        if field not in known or field == "name" or not sign:
            raise ValueError(
                f"strategy: {change!r} in {spec!r} is not field=value with a field of CILConfig"
            )
        own[field] = _value(spec, field, text, known[field])
    return replace(CILConfig(), **{**settings, **own, "name": spec})


def _value(spec: str, field: str, text: str, default: Any) -> Any:
    try:
        if isinstance(default, bool):
            return {"1": True, "0": False, "on": True, "off": False}[text]
        if field == "sigma":
            return text if text == "median" else float(text)
        return type(default)(text)
    except (KeyError, ValueError):
        raise ValueError(f"strategy: {text!r} is no value of {field} in {spec!r}") from None
