"""Class-incremental learning on one image tower: tasks come in turn, and no image of an earlier one
comes back.

Sources: Wu et al. 2025 (MACIL, arXiv 2502.07560); Zhang et al. 2023 (SLCA, arXiv 2303.05118); Yu et
al. 2020 (SDC, arXiv 2004.00440); McDonnell et al. 2023 (RanPAC, arXiv 2307.02251). What a strategy
is made of: `strategies.py`.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipsteer import ops
from clipsteer.clip.hooks import evaluating
from clipsteer.clip.pixels import pixel_batches
from clipsteer.continual.backbone import Encoder
from clipsteer.continual.config import CILConfig
from clipsteer.continual.covariance import by_class, class_means
from clipsteer.continual.heads import RandomProjection, TaskHeads, align, nearest_mean
from clipsteer.continual.lora import LoRA
from clipsteer.continual.plasticity import Plasticity, pack_history, unpack_history
from clipsteer.continual.task import TaskRun
from clipsteer.data.dataset import ImageDataset
from clipsteer.io import checkpoint
from clipsteer.io.digests import described, digest_of, weights_digest
from clipsteer.training.loop import EXIT_TERMINATED
from clipsteer.training.schedule import mix

__all__ = ["ClassIncrementalLearner"]


class ClassIncrementalLearner:
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

    def __init__(
        self,
        encoder: Encoder,
        config: CILConfig,
        num_classes: int,
        *,
        zero_shot: Tensor | None = None,
        plasticity: Plasticity | None = None,
        out: str | Path | None = None,
        workers: int = 0,
    ) -> None:
        if config.classifier == "zero_shot" and (
            zero_shot is None or len(zero_shot) != num_classes
        ):
            raise ValueError(
                f"ClassIncrementalLearner: zero_shot must have {num_classes} rows for "
                f"{config.name!r}"
            )
        if config.plasticity and plasticity is None:
            raise ValueError(
                f"ClassIncrementalLearner: {config.name!r} needs plasticity, with an SAE for each "
                f"block"
            )
        if config.plasticity and set(plasticity.saes) != set(encoder.blocks):
            raise ValueError(
                f"ClassIncrementalLearner: plasticity needs SAEs of {encoder.blocks}, got "
                f"{[*plasticity.saes]}"
            )
        if config.distill and not encoder.prefix:
            raise ValueError(
                f"ClassIncrementalLearner: distill needs a class token, and {encoder.name} has none"
            )
        self.encoder, self.config, self.num_classes = encoder, config, num_classes
        self.zero_shot, self.plasticity, self.workers = zero_shot, plasticity, workers
        self.out = Path(out) if out is not None else None
        self.device = encoder.device
        self.digest = weights_digest(encoder) if out is not None else ""
        # usage is comparable between tasks only when one network, the one of the SAEs, is read
        self.original = copy.deepcopy(encoder).eval() if config.plasticity else None
        self.lora = (
            LoRA(encoder.module, config.rank, config.lora) if config.train == "lora" else None
        )
        if config.train != "lora":
            encoder.requires_grad_(config.train == "full")
        with torch.no_grad():
            width = encoder(self._blank()).shape[1]
        # a tower that is read through class means is trained through heads, too
        self.heads = TaskHeads(width, cosine=config.cosine) if config.train != "none" else None
        self.aligned: TaskHeads | None = None
        self.ridge = None
        if config.classifier == "ridge":
            projection = RandomProjection(
                width, num_classes, projections=config.projections, seed=config.seed
            )
            self.ridge = projection.to(self.device)
        self.tasks: list[list[int]] = []
        empty = torch.zeros(0, width, dtype=torch.float64, device=self.device)
        self.means, self.uncompensated = empty, empty.clone()
        self.covariances = torch.zeros(0, width, width, device=self.device)
        self.history: list[dict[str, Tensor]] = []
        self.multipliers: list[dict[str, float]] = []

    def _blank(self) -> Tensor:
        from PIL import Image

        image = self.encoder.preprocess(Image.new("RGB", (64, 64)))
        return image[None].to(self.device, self.encoder.dtype)

    @property
    def seen(self) -> list[int]:
        """Classes in the order of the tasks."""
        return [c for task in self.tasks for c in task]

    @property
    def compensates(self) -> bool:
        return self.config.compensation != "none"

    @property
    def _keeps_means(self) -> bool:
        return (
            self.config.classifier == "ncm" or self.config.train != "none"
        )  # at least to measure how they age

    def _pixels(self, images: ImageDataset) -> Iterator[Tensor]:
        return pixel_batches(self.encoder, images, workers=self.workers)

    def features(self, images: ImageDataset) -> Tensor:
        """(N, d) features without crops, float32, in the images' order."""
        with evaluating(self.encoder):
            return torch.cat([self.encoder(x).float() for x in self._pixels(images)])

    def _for_means(self, features: Tensor) -> Tensor:
        return F.normalize(features, dim=-1) if self.config.unit else features

    def scores(self, features: Tensor) -> Tensor:
        """(N, d) -> (N, C) of the classes of `seen`, in that order."""
        with torch.no_grad():
            if self.config.classifier == "heads":
                return (self.aligned or self.heads)(features)
            if self.config.classifier == "ncm":
                return nearest_mean(features, self.means)
            if self.config.classifier == "ridge":
                return self.ridge(features)[:, self.seen]
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
        return float((self.predict(images) == torch.tensor(images.targets)).double().mean())

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
        found = {}
        for name, means in (
            ("compensated", self.means[rows]),
            ("uncompensated", self.uncompensated[rows]),
        ):
            found[name] = ((means - truth).norm(dim=1) / truth.norm(dim=1)).cpu()
            found[f"cosine_{name}"] = (1 - F.cosine_similarity(means, truth)).cpu()
        return found

    def fit_task(self, images: ImageDataset, classes: Sequence[int]) -> None:
        """Learn one more task.

        Args:
            images: targets in ``classes``, which no earlier task had.

        Raises:
            ValueError: classes that were seen, or without images, or targets outside of them.
            RuntimeError: the loss is not finite; this learner is then spent, what ``out`` holds is
            not. SystemExit(143): SIGTERM came and the state is saved.
        """
        classes = list(classes)
        if not classes or len({*classes, *self.seen}) < len(classes) + len(self.seen):
            raise ValueError(
                f"fit_task: classes must be new and different, got {classes}; seen: {self.seen}"
            )
        if (
            set(images.targets) != set(classes)
            or not 0 <= min(classes) <= max(classes) < self.num_classes
        ):
            raise ValueError(
                f"fit_task: images must show each of the classes {classes} and no other"
            )
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(mix(self.config.seed, len(self.tasks)))
            stopped = self._fit(images, classes)
        if self.out is not None:
            self.save()
            shutil.rmtree(self.out / "steps", ignore_errors=True)
        if stopped:
            raise SystemExit(EXIT_TERMINATED)

    def _fit(self, images: ImageDataset, classes: list[int]) -> bool:
        """Returns whether SIGTERM came in the last step."""
        config, task = self.config, len(self.tasks)
        if config.plasticity:
            usage = self.plasticity.usage(self.original.module, self._pixels(images))
            self.multipliers.append(self.plasticity.multipliers(usage, self.history))
            self.history.append(usage)
        run = TaskRun(self, images, classes) if config.train != "none" else None
        self.tasks.append(classes)
        if run is not None:
            self.heads.add(len(classes), device=self.device)
            if self.lora is not None:
                self.lora.begin_task()
            run.train()
        features = self.features(images)
        if run is not None and len(self.means):
            self._compensate(run.features, features)
        if self._keeps_means:
            means = class_means(self._for_means(features), images.targets, classes)
            self.means = torch.cat([self.means, means])
            self.uncompensated = torch.cat([self.uncompensated, means])
        if config.align:
            found = by_class(features, images.targets, classes).covariance().float()
            self.covariances = torch.cat([self.covariances, found])
        generator = torch.Generator().manual_seed(mix(config.seed, task, "after"))
        if config.align and task:
            self.aligned = copy.deepcopy(self.heads)
            of = torch.tensor(
                [t for t, task in enumerate(self.tasks) for _ in task], device=self.device
            )
            align(self.aligned, self.means, self.covariances, of, config.alignment, generator)
        if self.ridge is not None:
            self.ridge.update(features, torch.tensor(images.targets, device=self.device), generator)
        return run is not None and run.stopped

    def _compensate(self, old: Tensor, new: Tensor) -> None:
        config = self.config
        if not self.compensates:
            return
        old, new = (self._for_means(x) for x in (old, new))
        moved = ops.semantic_drift(
            old.double(), new.double(), self.means, config.sigma, config.floor
        )
        self.means = moved
        if config.transport and len(self.covariances):
            self.covariances = _transport(self.covariances, old, new)

    def _tensors(self) -> dict[str, Tensor]:
        found = {
            "means": self.means,
            "uncompensated": self.uncompensated,
            "covariances": self.covariances,
        }
        if self.lora is not None:
            found |= {f"lora.{name}": t for name, t in self.lora.state_dict().items()}
        elif self.config.train == "full":
            found |= {f"encoder.{name}": t for name, t in self.encoder.module.state_dict().items()}
        for part in ("heads", "aligned", "ridge"):
            if getattr(self, part) is not None:
                found |= {
                    f"{part}.{name}": t for name, t in getattr(self, part).state_dict().items()
                }
        return found | {f"history.{name}": t for name, t in pack_history(self.history).items()}

    def meta(self) -> dict[str, Any]:
        parts = {"zero_shot": self.zero_shot}
        if self.config.plasticity:
            parts["plasticity"] = [
                self.plasticity.floor,
                self.plasticity.background,
                self.plasticity.saes,
            ]
        return {
            "settings": self.config.outcome(),
            "model": self.encoder.name,
            "weights": self.digest,
            "num_classes": self.num_classes,
            **{name: _digest(part) for name, part in parts.items() if part is not None},
            **{
                name: described(getattr(self.encoder, name))
                for name in ("preprocess", "train_transform")
            },
        }

    def save(self) -> Path:
        """Write what was learned to ``out``; after each task this is done anyway. Raises ValueError
        without ``out``."""
        if self.out is None:
            raise ValueError("ClassIncrementalLearner: save needs out, a folder")
        meta = {**self.meta(), "tasks": self.tasks, "multipliers": self.multipliers}
        return checkpoint.save_state(self.out / "tasks", len(self.tasks), self._tensors(), meta)

    def resume(self) -> int:
        """Go to where the run in ``out`` stood; returns the number of tasks learned, 0 where there
        is no run.

        A task that was cut short goes on from its last checkpoint when ``fit_task`` is called for
        it.

        Raises:
            ValueError: tasks were already learned here, or the run there has other settings or
                starting weights.
        """
        if self.out is None or self.tasks:
            raise ValueError(
                "ClassIncrementalLearner: resume needs out, and comes before the first task"
            )
        found = checkpoint.load_latest(self.out / "tasks", device=str(self.device))
        if found is None:
            return 0
        self.check(found.meta)

        def part(prefix: str) -> dict[str, Tensor]:
            return {k[len(prefix) :]: v for k, v in found.tensors.items() if k.startswith(prefix)}

        self.tasks = [list(task) for task in found.meta["tasks"]]
        self.multipliers = found.meta["multipliers"]
        self.means, self.uncompensated = found.tensors["means"], found.tensors["uncompensated"]
        self.covariances = found.tensors["covariances"]
        if self.lora is not None:
            self.lora.load_state_dict(part("lora."))
        elif self.config.train == "full":
            self.encoder.module.load_state_dict(part("encoder."))
        if self.heads is not None:
            with torch.random.fork_rng(devices=[]):
                for task in self.tasks:
                    self.heads.add(len(task), device=self.device)
            self.heads.load_state_dict(part("heads."))
        if aligned := part("aligned."):
            self.aligned = copy.deepcopy(self.heads)
            self.aligned.load_state_dict(aligned)
        if self.ridge is not None:
            self.ridge.load_state_dict(part("ridge."))
        # usages are kept on the CPU, whatever the device
        self.history = unpack_history(
            {name: usage.cpu() for name, usage in part("history.").items()}
        )
        return len(self.tasks)

    def check(self, there: dict[str, Any]) -> None:
        here = self.meta()
        pairs = {
            **{k: (there.get(k), v) for k, v in here.items() if k != "settings"},
            **{k: (there.get("settings", {}).get(k), v) for k, v in here["settings"].items()},
        }
        if changed := [
            f"{k}: {a!r:.80} there, {b!r:.80} here" for k, (a, b) in pairs.items() if a != b
        ]:
            raise ValueError(
                f"{self.out} holds a run with other settings ({'; '.join(changed)}); use another "
                f"folder"
            )


def _digest(part: Any) -> str:
    """SHA-256 of tensors, modules and numbers in lists and dictionaries."""
    if isinstance(part, Tensor):
        part = part.detach().cpu().tolist()
    elif isinstance(part, nn.Module):
        part = weights_digest(part)
    elif isinstance(part, dict):
        part = {name: _digest(value) for name, value in part.items()}
    elif isinstance(part, list):
        part = [_digest(value) for value in part]
    return digest_of(part)


def _transport(covariances: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """A Σ Aᵀ, with A the linear map that takes centred old features nearest to centred new ones.

    A = I + Δ, Δ by ridge regression of new − old on old, λ a thousandth of the mean old variance:
    where a task has seen nothing, nothing is changed. The map is ours; the papers keep Σ.
    """
    old, new = old.double(), new.double()
    centred, moved = old - old.mean(0), (new - old) - (new - old).mean(0)
    G = centred.T @ centred
    d = len(G)
    eye = torch.eye(d, dtype=G.dtype, device=G.device)
    A = eye + torch.linalg.solve(G + 1e-3 * G.diagonal().mean() * eye, centred.T @ moved).T
    return (A @ covariances.double() @ A.T).to(covariances)
