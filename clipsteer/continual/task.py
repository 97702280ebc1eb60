"""The training of one task: what is kept of the network before it, the loss, the loop and its
checkpoints."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from clipsteer import ops
from clipsteer.clip.pixels import Samples, loader
from clipsteer.continual.backbone import Encoder
from clipsteer.continual.covariance import _places, by_class, precision_factor, shrink
from clipsteer.data.dataset import ImageDataset
from clipsteer.io import checkpoint
from clipsteer.training.loop import EXIT_TERMINATED, StopSignal
from clipsteer.training.schedule import Keys, cosine_lr, mix

if TYPE_CHECKING:
    from clipsteer.continual.learner import ClassIncrementalLearner

logger = logging.getLogger(__name__)


def patch_distillation(cls: Tensor, patches: Tensor, old_patches: Tensor) -> Tensor:
    """Mean over images and patches of (angle(cls, patch)/π) · ‖p̂_new − p̂_old‖, p̂ = p/‖p‖.

    Args:
        cls: (B, w) and patches: (B, P, w) of the new network; old_patches: (B, P, w) of the old
            one, without gradient.

    The angle is a weight without gradient: patches that say little of the class may move least.
        Source: Wu et al. 2025.
    """
    new, old = F.normalize(patches, dim=-1), F.normalize(old_patches.detach(), dim=-1)
    with torch.no_grad():
        cosine = (F.normalize(cls, dim=-1).unsqueeze(1) * new).sum(-1)
        weight = cosine.clamp(-1, 1).acos() / math.pi
    # away from 0, where the norm has no derivative: every patch is there when a task begins
    return (weight * ((new - old).square().sum(-1) + 1e-12).sqrt()).mean()


class TaskRun:
    """One task of a learner: make it while the learner is as the task finds it, ``train`` once its
    parts are there.

    Attributes:
        features: (N, d) of the task's images under the network before it; None where nobody needs
            them.
    """

    def __init__(
        self, learner: ClassIncrementalLearner, images: ImageDataset, classes: list[int]
    ) -> None:
        self.learner, self.images, self.classes = learner, images, classes
        self.config, self.task, self.device = learner.config, len(learner.tasks), learner.device
        self.per_epoch = math.ceil(len(images) / self.config.batch_size)
        self.total = self.per_epoch * (
            self.config.epochs if self.task else self.config.first_epochs
        )
        self.compares = self.task > 0 and (self.config.distill > 0 or self.config.covariance > 0)
        measured = self.task > 0 and (self.config.covariance > 0 or learner.compensates)
        self.features = learner.features(images) if measured else None
        self.stopped = False
        if self.compares:
            self.old = copy.deepcopy(learner.encoder).requires_grad_(False).eval()
        if self.compares and self.config.covariance:
            consistent = self.config.consistent
            rows = F.normalize(self.features, dim=-1) if consistent else self.features
            covariance = by_class(rows, images.targets, classes).covariance()
            self.factor = precision_factor(shrink(covariance)).L.float()
            self.weight = self.config.covariance / (
                float(self.features.norm(dim=1).mean()) if consistent else 1.0
            )

    def _groups(self) -> list[dict[str, Any]]:
        """Parameters with their learning rates, a block a group where blocks differ."""
        config, learner = self.config, self.learner
        # what is in no block is no part that a task is known to live in
        factors, rest = {}, 1.0
        if config.plasticity:
            factors, rest = (
                learner.multipliers[self.task],
                learner.plasticity.floor if self.task else 1.0,
            )
        blocks = learner.lora.groups() if learner.lora is not None else _by_block(learner.encoder)
        groups = [
            {"params": list(parameters), "lr": config.lr * config.slow * factors.get(block, rest)}
            for block, parameters in blocks.items()
        ]
        head = (
            learner.heads.of_task(self.task)
            if config.softmax == "task"
            else list(learner.heads.parameters())
        )
        groups.append({"params": head, "lr": config.lr})
        return [group for group in groups if group["params"]]

    def train(self) -> None:
        config, learner = self.config, self.learner
        groups = self._groups()
        peaks = [group["lr"] for group in groups]
        optimizer = torch.optim.SGD(
            groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        begun = self._restore(optimizer)
        name = f"{config.name}, task {self.task + 1}"
        bar = tqdm(total=self.total, initial=begun, desc=name, unit="step", disable=None)
        learner.encoder.train()
        with bar, StopSignal(learner.out is not None) as stop:
            for step, pixels, targets in self._batches(begun):
                for group, peak in zip(optimizer.param_groups, peaks):
                    group["lr"] = cosine_lr(step, self.total, peak, 0)
                torch.manual_seed(mix(config.seed, self.task, step))  # for dropout
                optimizer.zero_grad(set_to_none=True)
                loss = self._loss(pixels, targets)
                loss.backward()
                optimizer.step()
                bar.update()
                done, last = step + 1, step + 1 == self.total
                if (
                    last or done % config.checkpoint_every == 0 or stop.asked
                ) and not math.isfinite(loss.item()):
                    raise RuntimeError(
                        f"{name}: the loss is {loss.item()} at step {done}; lower lr"
                    )
                if (
                    learner.out is not None
                    and not last
                    and (done % config.checkpoint_every == 0 or stop.asked)
                ):
                    self._save(done, optimizer)
                if stop.asked and not last:
                    logger.warning(
                        "SIGTERM: %s, step %d of %d is saved in %s",
                        name,
                        done,
                        self.total,
                        learner.out,
                    )
                    raise SystemExit(EXIT_TERMINATED)
            self.stopped = stop.asked
        learner.encoder.eval()

    def _loss(self, pixels: Tensor, targets: Tensor) -> Tensor:
        config, learner = self.config, self.learner
        local = _places(targets.tolist(), self.classes, self.device)
        distils = self.compares and config.distill > 0
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.bf16):
            new = learner.encoder.tokens(pixels) if distils else learner.encoder(pixels)
            with torch.no_grad():
                old = (
                    self.old.tokens(pixels)
                    if distils
                    else self.old(pixels)
                    if self.compares
                    else None
                )
        features = (new.features if distils else new).float()
        if config.softmax == "seen":
            logits, target = learner.heads(features), local + len(learner.seen) - len(self.classes)
        else:
            logits, target = learner.heads(features, [self.task]), local
        loss = F.cross_entropy(logits, target)
        if self.compares and config.covariance:
            before = (old.features if distils else old).float()
            loss = loss + self.weight * ops.mahalanobis_covariance_loss(
                features, before, local, self.factor
            )
        if distils:
            moved = patch_distillation(new.cls.float(), new.patches.float(), old.patches.float())
            loss = loss + config.distill * moved
        return loss

    def _batches(self, begun: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(step, pixels, targets); what a step sees depends on the seed, the task and its number
        alone."""
        config, n, encoder = self.config, len(self.images), self.learner.encoder

        @lru_cache(maxsize=1)
        def order(epoch: int) -> Tensor:
            return torch.randperm(
                n, generator=torch.Generator().manual_seed(mix(config.seed, self.task, epoch))
            )

        def keys(step: int) -> list[tuple[int, int]]:
            epoch, at = divmod(step, self.per_epoch)
            rows = order(epoch)[at * config.batch_size : (at + 1) * config.batch_size].tolist()
            return [(row, mix(config.seed, self.task, step, row)) for row in rows]

        steps = range(begun, self.total)
        samples = Samples(self.images, encoder.train_transform)
        batches = loader(samples, Keys(map(keys, steps), len(steps)), self.learner.workers)
        for step, (pixels, targets) in zip(steps, batches):
            yield step, pixels.to(self.device, encoder.dtype), targets

    def _save(self, step: int, optimizer: torch.optim.SGD) -> None:
        tensors = {f"parameter.{i}": p for i, p in enumerate(self.parameters)}
        for i, p in enumerate(self.parameters):
            if (buffer := optimizer.state[p].get("momentum_buffer")) is not None:
                tensors[f"momentum.{i}"] = buffer
        meta = {
            **self.learner.meta(),
            "task": self.task,
            "classes": self.classes,
            "images": len(self.images),
        }
        checkpoint.save_state(self._folder, step, tensors, meta)

    @property
    def _folder(self) -> Path:
        return self.learner.out / "steps" / f"task-{self.task}"

    def _restore(self, optimizer: torch.optim.SGD) -> int:
        """Go to the last checkpoint within this task; returns the steps done."""
        found = None
        if self.learner.out is not None:
            found = checkpoint.load_latest(self._folder, device=str(self.device))
        if found is None:
            return 0
        self.learner.check(found.meta)
        here = (self.classes, len(self.images))
        if (there := (found.meta["classes"], found.meta["images"])) != here:
            raise ValueError(
                f"{self._folder} is of a task with other classes and images: {there}, not {here}"
            )
        with torch.no_grad():
            for i, p in enumerate(self.parameters):
                p.copy_(found.tensors[f"parameter.{i}"])
                if f"momentum.{i}" in found.tensors:
                    optimizer.state[p]["momentum_buffer"] = found.tensors[f"momentum.{i}"].clone()
        return found.step


def _by_block(encoder: Encoder) -> dict[str, list[nn.Parameter]]:
    """The tower's parameters by block; what is in no block under the empty name."""
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in encoder.module.named_parameters():
        if parameter.requires_grad:
            block = next((b for b in encoder.blocks if name.startswith(f"{b}.")), "")
            found.setdefault(block, []).append(parameter)
    return found
