"""The training of one task: what is kept of the network before it, and the loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer import ops
from clipsteer.clip.pixels import Samples, loader
from clipsteer.continual.backbone import Encoder, Tokens
from clipsteer.continual.config import CILConfig
from clipsteer.continual.covariance import by_class, places, precision_factor, shrink
from clipsteer.continual.heads import TaskHeads
from clipsteer.data.dataset import ImageDataset
from clipsteer.data.identity import identity_of
from clipsteer.training.loop import TrainingRun
from clipsteer.training.schedule import Keys, Order, cosine_lr, seed_of


def patch_distillation(
    cls: Tensor,  # (B, w) of the new network
    patches: Tensor,  # (B, P, w) of the new network
    old_patches: Tensor,  # (B, P, w) of the old one
) -> Tensor:  # ()
    """Mean over images and patches of (angle(cls, patch)/π) · ‖p̂_new − p̂_old‖, p̂ = p/‖p‖.

    The angle is a weight without gradient, as old patches are: patches that say little of the class
    may move least. Source: Wu et al. 2025 (arXiv 2502.07560).
    """
    new = F.normalize(patches, dim=-1)
    old = F.normalize(old_patches.detach(), dim=-1)
    with torch.no_grad():
        cosine = (F.normalize(cls, dim=-1).unsqueeze(1) * new).sum(-1)  # (B, P)
        weight = cosine.clamp(-1, 1).acos() / math.pi
    # away from 0, where the norm has no derivative: every patch is there when a task begins
    distance = ((new - old).square().sum(-1) + 1e-12).sqrt()
    return (weight * distance).mean()


@dataclass
class Before:
    """What a task keeps of the network as it finds it.

    Attributes:
        features: (N, d) of the task's images; None where nobody needs them.
        network: a frozen copy; None where the losses compare nothing.
        factor: (C, d, d) of the inverse covariances of the features, by class of the task.
        weight: of the covariance loss.
    """

    features: Tensor | None = None
    network: Encoder | None = None
    factor: Tensor | None = None
    weight: float = 0.0

    @classmethod
    def of(
        cls,
        encoder: Encoder,
        config: CILConfig,
        features: Tensor | None,  # (N, d)
        targets: Sequence[int],  # (N,)
        classes: list[int],  # (C,)
    ) -> Before:
        """What a task after the first keeps; ``features`` may be None without
        ``config.covariance``."""
        before = cls(features)
        if not (config.distill or config.covariance):
            return before
        before.network = copy.deepcopy(encoder).requires_grad_(False).eval()
        if config.covariance:
            assert features is not None
            rows = features
            scale = 1.0
            if config.consistent:
                rows = F.normalize(features, dim=-1)
                scale = float(features.norm(dim=1).mean())
            covariance = by_class(rows, targets, classes).covariance()
            before.factor = precision_factor(shrink(covariance)).L.float()
            before.weight = config.covariance / scale
        return before


class TaskRun(TrainingRun):
    """The training of one task.

    Args:
        encoder: changed in place.
        heads: one for each task so far, the last of them of this task.
        groups: what is trained, with the learning rate that each group starts from.
        before: the network that the task found.
        images: targets are among `classes`, in whose order the task's head has its logits.
        settings: what makes the run another one.
        out: folder of the learner's checkpoints; those of this task lie in steps/ and its log in
            logs/, by the task's number.
    """

    shown = ("loss",)

    def __init__(
        self,
        encoder: Encoder,
        heads: TaskHeads,
        groups: list[dict[str, Any]],
        before: Before,
        images: ImageDataset,
        classes: list[int],
        config: CILConfig,
        *,
        settings: Mapping[str, Any],
        out: Path | None = None,
        workers: int = 0,
    ) -> None:
        self.encoder = encoder
        self.heads = heads
        self.task = len(heads.sizes) - 1
        self.before = before
        self.images = images
        self.classes = classes
        self.workers = workers
        self.name = f"{config.name}, task {self.task + 1}"
        self.order = Order(len(images), config.batch_size, seed_of(config.seed, self.task))
        self.epochs = config.epochs if self.task else config.first_epochs
        self.sgd = torch.optim.SGD(
            groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        self.peaks = [group["lr"] for group in groups]
        trained = [p for group in groups for p in group["params"]]
        super().__init__(
            config,
            self.order.per_epoch * self.epochs,
            {str(number): parameter for number, parameter in enumerate(trained)},
            self.sgd,
            {**settings, "task": self.task, "classes": classes, "images": len(images)},
            out,
        )
        if out is not None:
            self.checkpoints = out / "steps" / f"task-{self.task}"
            self.log = out / "logs" / f"task-{self.task}.jsonl"

    def train(self) -> None:
        """Go on from the latest checkpoint of this task, if any, to its end or a signal."""
        self.restore(self.encoder.device)
        self.encoder.train()
        self.loop()
        self.encoder.eval()

    def tensors(self) -> dict[str, Tensor]:
        """What trains."""
        return {f"parameter.{name}": parameter for name, parameter in self.parameters.items()}

    def data_identity(self) -> dict[str, Any]:
        """That of the task's images."""
        return identity_of(self.images)

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy what `tensors` gave into the network and the heads."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"parameter.{name}"])

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels (B, 3, H, W) and classes (B,) of the steps that are left."""
        steps = range(self.step, self.total)
        samples = Samples(self.images, self.encoder.train_transform)
        keys = Keys(map(self.order.keys, steps), len(steps))
        for pixels, targets in loader(samples, keys, self.workers):
            yield pixels.to(self.encoder.device, self.encoder.dtype), targets

    def train_step(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor | float]:
        """One step of SGD; the loss, and the rate of the heads."""
        pixels, targets = batch  # (B, 3, H, W), (B,)
        for group, peak in zip(self.sgd.param_groups, self.peaks):
            group["lr"] = self.rate(self.step, peak)
        torch.manual_seed(seed_of(self.config.seed, self.task, "step", self.step))  # for dropout
        self.sgd.zero_grad(set_to_none=True)
        loss = self.loss(pixels, targets)
        loss.backward()
        self.sgd.step()
        return {"loss": loss.detach(), "lr": self.sgd.param_groups[-1]["lr"]}

    def rate(self, step: int, peak: float) -> float:
        """The learning rate of a step: peak · (1 + cos(π at/total))/2, at and total in steps, or in
        epochs where ``config.schedule`` says so."""
        if self.config.schedule == "epoch":
            return cosine_lr(step // self.order.per_epoch, self.epochs, peak, 0)
        return cosine_lr(step, self.total, peak, 0)

    def loss(
        self,
        pixels: Tensor,  # (B, 3, H, W)
        targets: Tensor,  # (B,)
    ) -> Tensor:  # ()
        """Cross-entropy, with what the strategy adds to hold on to the network before."""
        config = self.config
        before = self.before
        device = self.encoder.device
        local = places(targets.tolist(), self.classes, device)  # (B,)
        distils = before.network is not None and config.distill > 0
        old_features = None
        old_tokens = None
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
            features, tokens = _read(self.encoder, pixels, distils)
            if before.network is not None:
                with torch.no_grad():
                    old_features, old_tokens = _read(before.network, pixels, distils)
        features = features.float()  # (B, d)
        if config.softmax == "seen":
            logits = self.heads(features)
            target = local + sum(self.heads.sizes[: self.task])
        else:
            logits = self.heads(features, [self.task])
            target = local
        loss = F.cross_entropy(logits, target)
        if before.factor is not None and old_features is not None:
            spread = ops.mahalanobis_covariance_loss(
                features, old_features.float(), local, before.factor
            )
            loss = loss + before.weight * spread
        if tokens is not None and old_tokens is not None:
            moved = patch_distillation(
                tokens.cls.float(), tokens.patches.float(), old_tokens.patches.float()
            )
            loss = loss + config.distill * moved
        return loss


def _read(
    network: Encoder,
    pixels: Tensor,  # (B, 3, H, W)
    with_tokens: bool,
) -> tuple[Tensor, Tokens | None]:
    """Features (B, d), and the tokens that they were pooled from where these are asked for."""
    if not with_tokens:
        return network(pixels), None
    tokens = network.tokens(pixels)
    return tokens.features, tokens
