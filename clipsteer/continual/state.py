"""What a class-incremental learner has learned, and where it lies on disk."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipsteer.clip.setup import has_quick_gelu
from clipsteer.continual.backbone import Encoder
from clipsteer.continual.config import CILConfig
from clipsteer.continual.heads import RandomProjection, TaskHeads
from clipsteer.continual.lora import LoRA
from clipsteer.continual.plasticity import Plasticity, pack_history, unpack_history
from clipsteer.io import checkpoint
from clipsteer.io.checkpoint import Checkpoint
from clipsteer.io.digests import described, parts_digest, weights_digest
from clipsteer.io.files import FileFormatError
from clipsteer.io.layout import Layout, Spec, check_layout, layout_of
from clipsteer.training.resume import entry
from clipsteer.training.schedule import DATA_ORDER
from clipsteer.training.settings import check_same_settings


def check_parts(
    config: CILConfig,
    encoder: Encoder,
    num_classes: int,
    zero_shot: Tensor | None,
    plasticity: Plasticity | None,
) -> None:
    """Raise ValueError where a part that the settings need is not given or does not fit."""
    wrong = None
    zero_shots = 0 if zero_shot is None else len(zero_shot)
    if config.classifier == "zero_shot" and zero_shots != num_classes:
        wrong = f"zero_shot must have {num_classes} rows for {config.name!r}, got {zero_shots}"
    elif config.plasticity and plasticity is None:
        wrong = f"{config.name!r} needs plasticity, with an SAE for each block"
    elif config.plasticity and plasticity and set(plasticity.saes) != set(encoder.blocks):
        wrong = f"plasticity needs SAEs of {encoder.blocks}, got {[*plasticity.saes]}"
    elif config.plasticity and plasticity and (other := _of_other_setup(encoder, plasticity)):
        wrong = (
            f"plasticity: the SAE of {other} was trained on {encoder.name} with another "
            "preprocessing, activation or image size"
        )
    elif config.distill and not encoder.prefix:
        wrong = f"distill needs a class token, and {encoder.name} has none"
    if wrong is not None:
        raise ValueError(f"ClassIncrementalLearner: {wrong}")


def _of_other_setup(encoder: Encoder, plasticity: Plasticity) -> str | None:
    """A block whose SAE says another setup than the encoder's, if there is one."""
    for block, sae in plasticity.saes.items():
        theirs = sae.metadata.get("setup")
        ours = encoder.origins.get(block, {}).get("setup")
        if theirs is not None and ours is not None and theirs != ours:
            return block
    return None


class LearnerState:
    """The parts of a learner and what they know after the tasks so far; see
    `ClassIncrementalLearner`."""

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
        check_parts(config, encoder, num_classes, zero_shot, plasticity)
        self.encoder = encoder
        self.device = encoder.device
        self.config = config
        self.num_classes = num_classes
        self.zero_shot = zero_shot
        self.plasticity = plasticity
        self.workers = workers
        self.out = None if out is None else Path(out)
        # what makes this run another one; of the encoder as it starts
        self.settings = {} if out is None else self._settings()
        # usage is comparable between tasks only when one network, the one of the SAEs, is read
        self.original = copy.deepcopy(encoder).eval() if config.plasticity else None
        self.lora = None
        if config.train == "lora":
            self.lora = LoRA(encoder.module, config.rank, config.lora)
        if config.train != "lora":
            encoder.requires_grad_(config.train == "full")
        if config.freeze_patches:
            encoder.freeze_patches()
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
        self.means = empty
        self.uncompensated = empty.clone()
        self.covariances = torch.zeros(0, width, width, device=self.device)
        self.history: list[dict[str, Tensor]] = []
        self.multipliers: list[dict[str, float]] = []
        # by how much each task after the first is estimated to have left earlier means behind
        self.off: list[float] = []

    def _blank(self) -> Tensor:
        from PIL import Image

        image = self.encoder.preprocess(Image.new("RGB", (64, 64)))
        return image[None].to(self.device, self.encoder.dtype)

    @property
    def _keeps_means(self) -> bool:
        # of what trains at least to measure how they age
        return self.config.classifier == "ncm" or self.config.train != "none"

    @property
    def _uses_means(self) -> bool:
        """Whether anything is read from the means of a tower that changes."""
        used = self.config.classifier == "ncm" or self.config.align
        return used and self.config.train != "none"

    @property
    def seen(self) -> list[int]:
        """Classes in the order of the tasks."""
        return [c for task in self.tasks for c in task]

    def _tensors(self) -> dict[str, Tensor]:
        parts: dict[str, Mapping[str, Tensor]] = {}
        if self.lora is not None:
            parts["lora"] = self.lora.state_dict()
        elif self.config.train == "full":
            parts["encoder"] = self.encoder.module.state_dict()
        modules = {"heads": self.heads, "aligned": self.aligned, "ridge": self.ridge}
        for part, module in modules.items():
            if module is not None:
                parts[part] = module.state_dict()
        parts["history"] = pack_history(self.history)
        found = {
            "means": self.means,
            "uncompensated": self.uncompensated,
            "covariances": self.covariances,
        }
        for part, tensors in parts.items():
            for name, tensor in tensors.items():
                found[f"{part}.{name}"] = tensor
        return found

    def _layout(self, tasks: list[list[int]]) -> Layout:
        """What `_tensors` are after these tasks."""
        C = sum(map(len, tasks))
        kept = C if self._keeps_means else 0
        width = self.means.shape[1]
        parts: dict[str, Layout] = {}
        if self.lora is not None:
            parts["lora"] = self.lora.layout(len(tasks))
        elif self.config.train == "full":
            parts["encoder"] = layout_of(self.encoder.module.state_dict())
        if self.heads is not None:
            parts["heads"] = layout_of(self._grown(tasks).state_dict())
            if self.config.align and len(tasks) > 1:
                parts["aligned"] = parts["heads"]
        if self.ridge is not None:
            parts["ridge"] = layout_of(self.ridge.state_dict())
        if self.config.plasticity and self.plasticity is not None:
            parts["history"] = {
                f"{task}/{block}": Spec(torch.float64, (sae.d_sae,), least=0)
                for task in range(len(tasks))
                for block, sae in self.plasticity.saes.items()
            }
        found = {
            "means": Spec(torch.float64, (kept, width)),
            "uncompensated": Spec(torch.float64, (kept, width)),
            "covariances": Spec(torch.float32, (C if self.config.align else 0, width, width)),
        }
        for part, layout in parts.items():
            found |= {f"{part}.{name}": spec for name, spec in layout.items()}
        return found

    def _grown(self, tasks: list[list[int]]) -> TaskHeads:
        """A copy of the heads, with one for each of these tasks; torch's generator stays."""
        heads = copy.deepcopy(self.heads)
        assert heads is not None
        with torch.random.fork_rng(devices=[]):
            for task in tasks:
                heads.add(len(task), device=self.device)
        return heads

    def _check(self, found: Checkpoint) -> None:
        """Raise FileFormatError for what no learner of these settings can have saved."""
        tasks = entry(found, "tasks", list)
        ids = [c for task in tasks if isinstance(task, list) for c in task]
        are_classes = all(type(c) is int and 0 <= c < self.num_classes for c in ids)
        are_tasks = all(isinstance(task, list) and task for task in tasks)
        if not are_tasks or not are_classes or len(set(ids)) < len(ids):
            raise FileFormatError(
                f"{found.meta_path}: 'tasks' must be lists of different classes below "
                f"{self.num_classes}, got {tasks!r:.80}"
            )
        if len(tasks) != found.step:
            raise FileFormatError(f"{found.meta_path}: {len(tasks)} tasks, named {found.step}")
        multipliers = entry(found, "multipliers", list)
        wanted = len(tasks) if self.config.plasticity else 0
        if len(multipliers) != wanted or not all(map(self._are_factors, multipliers)):
            raise FileFormatError(
                f"{found.meta_path}: 'multipliers' must be {wanted} objects of factors of the "
                f"blocks, got {multipliers!r:.80}"
            )
        off = self._off_in(found, len(tasks))
        wanted = len(self._off_in(None, len(tasks)))
        fitting = isinstance(off, list) and len(off) == wanted
        if not fitting or not all(type(o) in (int, float) and 0 <= o < math.inf for o in off):
            raise FileFormatError(
                f"{found.meta_path}: 'off' must be {wanted} finite numbers, of the tasks after the "
                f"first, got {off!r:.80}"
            )
        check_layout(found.tensors_path, found.tensors, self._layout(tasks))

    def _off_in(self, found: Checkpoint | None, tasks: int) -> Any:
        """What is noted of drift; 0 for tasks of versions that noted nothing."""
        unknown = [0.0] * (max(tasks - 1, 0) if self._uses_means else 0)
        return unknown if found is None else found.meta.get("off", unknown)

    def _are_factors(self, factors: Any) -> bool:
        """Whether these can be the learning-rate factors of a task."""
        assert self.plasticity is not None
        if not isinstance(factors, dict) or factors.keys() != self.plasticity.saes.keys():
            return False
        floor = self.plasticity.floor
        return all(type(f) in (int, float) and floor <= f <= 1 for f in factors.values())

    def _settings(self) -> dict[str, Any]:
        encoder = self.encoder
        found = {
            **self.config.outcome(),
            "data order": DATA_ORDER,
            "model": encoder.name,
            "weights": weights_digest(encoder),
            "num_classes": self.num_classes,
            "preprocess": described(encoder.preprocess),
            "train_transform": described(encoder.train_transform),
            "quick_gelu": has_quick_gelu(encoder) or None,
        }
        if self.zero_shot is not None:
            found["zero-shot head"] = parts_digest(self.zero_shot)
        given = self.plasticity
        if self.config.plasticity and given is not None:
            found["SAEs of the blocks"] = parts_digest([given.floor, given.background, given.saes])
        return found

    def save(self) -> Path:
        """Write what was learned to ``out``; after each task this is done anyway.

        Raises ValueError without ``out``.
        """
        if self.out is None:
            raise ValueError("ClassIncrementalLearner: save needs out, a folder")
        meta = {
            "settings": self.settings,
            "tasks": self.tasks,
            "multipliers": self.multipliers,
            "off": self.off,
        }
        return checkpoint.save_state(self.out / "tasks", len(self.tasks), self._tensors(), meta)

    def resume(self) -> int:
        """Go to where the run in ``out`` stood; returns the number of tasks learned, 0 where there
        is no run.

        A task that was cut short goes on from its last checkpoint when ``fit_task`` is called for
        it.

        Raises:
            ValueError: tasks were already learned here, or the run there has other settings or
                starting weights. FileFormatError: it holds what no such learner saves; then
                nothing was taken from it.
        """
        if self.out is None or self.tasks:
            raise ValueError(
                "ClassIncrementalLearner: resume needs out, and comes before the first task"
            )
        found = checkpoint.load_latest(self.out / "tasks", device=str(self.device))
        if found is None:
            return 0
        there = entry(found, "settings", dict)
        check_same_settings("ClassIncrementalLearner", self.out, there, self.settings)
        self._check(found)

        def part(prefix: str) -> dict[str, Tensor]:
            return {k[len(prefix) :]: v for k, v in found.tensors.items() if k.startswith(prefix)}

        self.tasks = [list(task) for task in found.meta["tasks"]]
        self.multipliers = found.meta["multipliers"]
        self.off = [float(off) for off in self._off_in(found, len(self.tasks))]
        self.means = found.tensors["means"]
        self.uncompensated = found.tensors["uncompensated"]
        self.covariances = found.tensors["covariances"]
        if self.lora is not None:
            self.lora.load_state_dict(part("lora."))
        elif self.config.train == "full":
            self.encoder.module.load_state_dict(part("encoder."))
        if self.heads is not None:
            self.heads = self._grown(self.tasks)
            self.heads.load_state_dict(part("heads."))
        aligned = part("aligned.")
        if aligned and self.heads is not None:
            self.aligned = copy.deepcopy(self.heads)
            self.aligned.load_state_dict(aligned)
        if self.ridge is not None:
            self.ridge.load_state_dict(part("ridge."))
        # usages are kept on the CPU, whatever the device
        usages = {name: usage.cpu() for name, usage in part("history.").items()}
        self.history = unpack_history(usages)
        return len(self.tasks)
