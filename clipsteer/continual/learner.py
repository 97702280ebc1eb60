"""Class-incremental learning on one image tower: tasks come in turn, and no image of an earlier one
comes back.

Sources: Wu et al. 2025 (MACIL, arXiv 2502.07560); Zhang et al. 2023 (SLCA, arXiv 2303.05118); Yu et
al. 2020 (SDC, arXiv 2004.00440); Gomez-Villa et al. 2024 (LDC, arXiv 2407.08536); McDonnell et al.
2023 (RanPAC, arXiv 2307.02251). What a strategy is made of: `strategies.py`.
"""

from __future__ import annotations

import copy
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer import ops
from clipsteer.clip.hooks import evaluating
from clipsteer.clip.pixels import pixel_batches
from clipsteer.continual.collapse import coincide, separation, taken_by_one
from clipsteer.continual.covariance import by_class, class_means
from clipsteer.continual.drift import follow_errors, learned_drift, transport
from clipsteer.continual.heads import align, nearest_mean
from clipsteer.continual.state import LearnerState
from clipsteer.continual.task import Before, TaskRun
from clipsteer.data.dataset import ImageDataset
from clipsteer.training.claim import claimed
from clipsteer.training.schedule import seed_of
from clipsteer.training.signals import leave

__all__ = ["ClassIncrementalLearner"]

logger = logging.getLogger(__name__)


class ClassIncrementalLearner(LearnerState):
    """Learns tasks of classes with one strategy.

    Args:
        encoder: changed in place.
        config: the strategy's settings.
        num_classes: of all tasks together; labels are in [0, num_classes).
        zero_shot: (num_classes, d) unit rows, for the zero-shot classifier.
        plasticity: SAEs of the blocks, where ``config.plasticity`` is set.
        workers: processes that read images.
        out: folder for checkpoints; a run that was stopped there, even by SIGKILL in the middle of
            a task, goes on with ``resume`` and, on a CPU with as many threads, ends in the same
            numbers.

    Attributes:
        tasks: the classes of each task learned, in their order.
        heads, aligned: as trained, and as aligned after the latest task, which starts from the
            trained ones.
        means (C, d), covariances (C, d, d): of seen classes, in order of `seen`; means follow the
            drift where the strategy says so, ``uncompensated`` do not.

    Raises:
        ValueError: settings that need what is not given.
    """

    @property
    def compensates(self) -> bool:
        """Whether means follow the drift of features."""
        return self.config.compensation != "none"

    def _pixels(self, images: ImageDataset) -> Iterator[Tensor]:
        return pixel_batches(self.encoder, images, workers=self.workers)

    def features(self, images: ImageDataset) -> Tensor:
        """(N, d) features without crops, float32, in the images' order.

        Raises RuntimeError where they are not finite.
        """
        with evaluating(self.encoder):
            found = torch.cat([self.encoder(x).float() for x in self._pixels(images)])
        wrong = int((~found.isfinite()).any(1).sum())
        if wrong:
            raise RuntimeError(
                f"{self.config.name}: the features of {wrong} of {len(found)} images are not "
                f"finite after {len(self.tasks)} tasks; lower lr, or look for weights that are not"
            )
        return found

    def _for_means(
        self,
        features: Tensor,  # (N, d)
    ) -> Tensor:  # (N, d)
        return F.normalize(features, dim=-1) if self.config.unit else features

    @torch.no_grad()
    def scores(
        self,
        features: Tensor,  # (N, d)
    ) -> Tensor:  # (N, C)
        """Scores of the classes of `seen`, in that order."""
        if self.config.classifier == "heads":
            heads = self.aligned or self.heads
            assert heads is not None
            return heads(features)
        if self.config.classifier == "ncm":
            return nearest_mean(features, self.means)
        if self.config.classifier == "ridge":
            assert self.ridge is not None
            return self.ridge(features)[:, self.seen]
        assert self.zero_shot is not None
        return nearest_mean(features, self.zero_shot[self.seen].to(features))

    def predict(self, images: ImageDataset) -> Tensor:
        """(N,) the class of each image among all seen so far, whatever task it is from; on the
        CPU."""
        if not self.tasks:
            raise ValueError("ClassIncrementalLearner: no task has been learned")
        best = self.scores(self.features(images)).argmax(1).cpu()
        return torch.tensor(self.seen)[best]

    def evaluate(self, images: ImageDataset) -> float:
        """The share of images whose class is predicted, among all classes seen."""
        right = self.predict(images) == torch.tensor(images.targets)
        return float(right.double().mean())

    def drift_errors(self, images: ImageDataset) -> dict[str, Tensor] | None:
        """How far the kept means are from the true ones, which needs images of earlier classes: a
        measurement only.

        Returns (C,) tensors over the classes of ``images``, in order of `seen`: ``compensated`` and
        ``uncompensated``, ‖μ̂ − μ‖/‖μ‖, and the same with ``cosine_`` in front, 1 − cos. None for a
        strategy that keeps no means, or whose network stays as it is.
        """
        if not len(self.means) or self.config.train == "none":
            return None
        shown = set(images.targets)
        classes = [c for c in self.seen if c in shown]
        truth = class_means(self._for_means(self.features(images)), images.targets, classes)
        rows = [self.seen.index(c) for c in classes]
        kept = {"compensated": self.means[rows], "uncompensated": self.uncompensated[rows]}
        found = {}
        for name, means in kept.items():
            found[name] = ((means - truth).norm(dim=1) / truth.norm(dim=1)).cpu()
            found[f"cosine_{name}"] = (1 - F.cosine_similarity(means, truth)).cpu()
        return found

    def fit_task(self, images: ImageDataset, classes: Sequence[int]) -> None:
        """Learn one more task.

        Args:
            images: targets in ``classes``, which no earlier task had.

        Raises:
            ValueError: classes that were seen, or without images, or targets outside of them.
            RuntimeError: the loss is not finite (this learner is then spent, what ``out`` holds is
            not), or another process writes to ``out``. FileFormatError: a checkpoint of the task
            that is not of such a run. SystemExit(143): SIGTERM came and the state is saved;
            KeyboardInterrupt: so did Ctrl-C.
        """
        classes = list(classes)
        if not classes or len({*classes, *self.seen}) < len(classes) + len(self.seen):
            raise ValueError(
                f"fit_task: classes must be new and different, got {classes}; seen: {self.seen}"
            )
        inside = 0 <= min(classes) <= max(classes) < self.num_classes
        if set(images.targets) != set(classes) or not inside:
            raise ValueError(
                f"fit_task: images must show each of the classes {classes} and no other"
            )
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(seed_of(self.config.seed, len(self.tasks)))
            with claimed(self.out, self.config.name):
                asked = self._fit(images, classes)
                if self.out is not None:
                    self.save()
                    shutil.rmtree(self.out / "steps", ignore_errors=True)
        if asked:
            message = f"task {len(self.tasks)} is saved in {self.out}; run the same again to go on"
            logger.warning("%s: %s", self.config.name, message)
            leave(asked, message)

    def _groups(self) -> list[dict[str, Any]]:
        """What the newest task trains with its learning rates, a block a group where blocks
        differ."""
        assert self.heads is not None
        config = self.config
        task = len(self.tasks) - 1
        factors: dict[str, float] = {}
        rest = 1.0
        if config.plasticity:
            assert self.plasticity is not None
            factors = self.multipliers[task]
            # what is in no block is no part that a task is known to live in
            rest = self.plasticity.floor if task else 1.0
        blocks = self.encoder.by_block() if self.lora is None else self.lora.groups()
        groups = []
        for block, parameters in blocks.items():
            lr = config.lr * config.slow * factors.get(block, rest)
            groups.append({"params": list(parameters), "lr": lr})
        head = list(self.heads.parameters())
        if config.softmax == "task":
            head = self.heads.of_task(task)
        groups.append({"params": head, "lr": config.lr})
        return [group for group in groups if group["params"]]

    def _before(
        self,
        features: Tensor,  # (N, d)
        targets: Sequence[int],
        classes: list[int],
    ) -> Before:
        """What a new task keeps of the network as it is; ``features`` of its images by it."""
        if not self.tasks:
            return Before()
        measured = self.config.covariance > 0 or self._uses_means
        kept = features if measured else None
        return Before.of(self.encoder, self.config, kept, targets, classes)

    def _train(self, images: ImageDataset, classes: list[int], before: Before) -> int:
        """Train on the newest task; returns the signal that came in its last step, or 0."""
        assert self.heads is not None
        self.heads.add(len(classes), device=self.device)
        if self.lora is not None:
            self.lora.begin_task()
        run = TaskRun(
            self.encoder,
            self.heads,
            self._groups(),
            before,
            images,
            classes,
            self.config,
            settings=self.settings,
            out=self.out,
            workers=self.workers,
        )
        run.train()
        return run.asked

    def _fit(self, images: ImageDataset, classes: list[int]) -> int:
        """Returns the signal that came in the last step, or 0."""
        config = self.config
        task = len(self.tasks)
        if config.plasticity:
            assert self.plasticity is not None
            assert self.original is not None
            usage = self.plasticity.usage(self.original.module, self._pixels(images))
            self.multipliers.append(self.plasticity.multipliers(usage, self.history))
            self.history.append(usage)
        trains = config.train != "none"
        before = Before()
        apart = math.nan
        if trains:
            features = self.features(images)
            apart = separation(features, torch.tensor(images.targets, device=features.device))
            before = self._before(features, images.targets, classes)
        self.tasks.append(classes)
        asked = self._train(images, classes, before) if trains else 0
        features = self.features(images)
        if before.features is not None and self._uses_means:
            self._compensate(before.features, features, images.targets)
        if self._keeps_means:
            means = class_means(self._for_means(features), images.targets, classes)
            self.means = torch.cat([self.means, means])
            self.uncompensated = torch.cat([self.uncompensated, means])
        if task and len(self.off) == task:
            self._warn_of_drift()
        if config.align:
            found = by_class(features, images.targets, classes).covariance().float()
            self.covariances = torch.cat([self.covariances, found])
        generator = torch.Generator().manual_seed(seed_of(config.seed, task, "after"))
        if config.align and task:
            assert self.heads is not None
            self.aligned = copy.deepcopy(self.heads)
            numbers = [t for t, classes in enumerate(self.tasks) for _ in classes]
            task_of = torch.tensor(numbers, device=self.device)
            align(self.aligned, self.means, self.covariances, task_of, config.alignment, generator)
        if self.ridge is not None:
            targets = torch.tensor(images.targets, device=self.device)
            self.ridge.update(features, targets, generator)
        self._warn_of_collapse(features, images.targets, apart)
        return asked

    def _compensate(
        self,
        old: Tensor,  # (N, d)
        new: Tensor,  # (N, d)
        targets: Sequence[int],
    ) -> None:
        """Move what is kept of earlier classes, and note by how much it is estimated to be off."""
        old = self._for_means(old)
        new = self._for_means(new)
        off = follow_errors(old, new, torch.tensor(targets, device=old.device), self._followed)
        self.off.append(float(off.median()))
        self.means = self._followed(old.double(), new.double(), self.means)
        if self.config.transport and len(self.covariances):
            self.covariances = transport(self.covariances, old, new)

    def _followed(
        self,
        old: Tensor,  # (N, d)
        new: Tensor,  # (N, d)
        means: Tensor,  # (C, d)
    ) -> Tensor:  # (C, d)
        """Class means as the strategy moves them."""
        config = self.config
        if config.compensation == "none":
            return means
        if config.compensation == "ldc":
            return learned_drift(old, new, means)
        return ops.semantic_drift(old, new, means, config.sigma, config.floor)

    def _warn_of_collapse(
        self,
        features: Tensor,  # (N, d)
        targets: Sequence[int],
        before: float,
    ) -> None:
        """Say so where the task's own images are nearly all taken for one class, or features of
        its classes coincide; ``before`` is their separation as the task began."""
        labels = torch.tensor(targets, device=features.device)
        seen = torch.tensor(self.seen, device=features.device)
        told = []
        if (taken := taken_by_one(seen[self.scores(features).argmax(1)], labels)) is not None:
            told.append(f"class {taken[0]} takes {taken[1]:.0%} of those of others")
        if (how := coincide(features, labels, before)) is not None:
            told.append(how)
        if told:
            logger.warning(
                "%s: task=%d: the network has collapsed: of the %d images it learned from, %s. Try "
                "a lower lr, or another tower",
                self.config.name,
                len(self.tasks),
                len(labels),
                ", and ".join(told),
            )

    def _warn_of_drift(self) -> None:
        """Say so where half of the earlier classes' means are off by more than their distance to
        the nearest other mean, as far as the tasks since can tell."""
        sizes = [len(classes) for classes in self.tasks]
        # errors of several tasks in no common direction
        squares = [sum(off**2 for off in self.off[t:]) for t in range(len(sizes) - 1)]
        off = torch.tensor(
            [squares[t] ** 0.5 for t in range(len(squares)) for _ in range(sizes[t])]
        )
        distances = torch.cdist(self.means, self.means)
        distances.fill_diagonal_(float("inf"))
        nearest = distances.amin(1)[: len(off)].cpu()
        ratio = float((off / nearest).median())
        if ratio > 1:
            logger.warning(
                "%s: task=%d: the prototypes of the %d earlier classes are off by about %.3g "
                "(median, estimated from this task's classes), %.2g times their distance to the "
                "nearest other prototype, %.3g: what is read from them cannot be trusted. A lower "
                "lr or slow, or compensation (now %r), keeps them nearer",
                self.config.name,
                len(self.tasks),
                len(off),
                float(off.median()),
                ratio,
                float(nearest.median()),
                self.config.compensation,
            )
