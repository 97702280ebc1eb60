"""The four users of the training loop, each a run of eight steps; for tests in this process and in others."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from _tiny import encoder, scenario
from clipsteer import TrainConfig, train_sae
from clipsteer import clip as clip_module
from clipsteer.continual.experiment import run_tasks
from clipsteer.continual.plasticity import Plasticity, fit_saes
from clipsteer.continual.scenario import Scenario
from clipsteer.continual.strategies import strategy
from clipsteer.data.dataset import ImageDataset
from clipsteer.data.files import image_folder
from clipsteer.ensembles.finetuning import FinetuneConfig, finetune
from clipsteer.io.checkpoint import load_latest
from clipsteer.reference.features import ReferenceFeatures
from clipsteer.reference.train import ContrastiveConfig, train_contrastive
from clipsteer.sae.activations import HarvestSource

STEPS = 8
EVERY = {"checkpoint_every": 2, "log_every": 1}
COLOURS = {"red": (210, 30, 20), "blue": (20, 40, 200), "green": (30, 180, 40), "grey": (128, 128, 128)}
SMALL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}

Weights = dict[str, torch.Tensor]


class User(NamedTuple):
    """A kind of run.

    Attributes:
        train: (out, **settings) -> what it ends in.
        quality: figures of its last line.
        log: of the run, or of its last part, in `out`.
        checkpoints: likewise.
        name: of the last part, in the lines of its log.
    """

    train: Callable[..., Weights]
    quality: set[str]
    log: str = "log.jsonl"
    checkpoints: str = "checkpoints"
    name: str = ""


@lru_cache
def pictures() -> ImageDataset:
    """Three of each colour."""
    random, drawn, targets = np.random.default_rng(0), [], []
    for target, colour in enumerate(COLOURS.values()):
        for i in range(3):
            noise = 40 * random.standard_normal((40, 48, 1))
            drawn.append(np.clip(np.array(colour) + 9 * i + noise, 0, 255).astype(np.uint8))
            targets.append(target)
    return ImageDataset(lambda row: Image.fromarray(drawn[row]), targets, [*COLOURS])


def sae(architecture: str) -> Callable[..., Weights]:
    def train(out: Path | None, **settings: Any) -> Weights:
        x = torch.randn(100, 12, generator=torch.Generator().manual_seed(0))
        config = {"d_sae": 40, "k": 5, "batch_size": 32, "steps": STEPS, "warmup_steps": 2, "dead_after": 60, **EVERY}
        resume = settings.pop("resume", True)
        config = TrainConfig(**{**config, "architecture": architecture, "sync_every": 4, **settings})
        return train_sae(x, config, out=out, resume=resume).state_dict()

    return train


def picture_files(root: Path) -> Path:
    """The pictures in class folders, each four times, uncompressed."""
    for row in range(4 * len(pictures())):
        image, target = pictures()[row % len(pictures())]
        folder = root / [*COLOURS][target]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{row:02}.bmp")
    return root


def sae_of_files(out: Path, folder: Path) -> None:
    clip = clip_module.load()
    source = HarvestSource(clip, image_folder(folder), "visual.transformer.resblocks.0")
    config = TrainConfig(d_sae=8, k=4, batch_size=32, steps=STEPS, warmup_steps=2, **EVERY)
    train_sae(source, config, out=out, metadata={"data": str(folder)})


def tuned_on_files(out: Path, folder: Path) -> None:
    clip = clip_module.load()
    head = clip_module.zero_shot_head(clip, sorted(COLOURS))
    finetune(clip, image_folder(folder), head, FinetuneConfig(mode="lc", batch_size=6, epochs=1, **EVERY), out=out)


def contrastive_on_files(out: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as described, torch.random.fork_rng():
        path = Path(described) / "clipsteer-test-loop.json"
        path.write_text(json.dumps(SMALL))
        torch.manual_seed(0)
        clip = replace(clip_module.load(str(path)), name="small")
    config = ContrastiveConfig(loss="clip", batch_size=6, epochs=1, **EVERY)
    train_contrastive(clip, image_folder(folder), config, out=out)


def tasks_of_files(out: Path, folder: Path) -> None:
    images = image_folder(folder)
    found = Scenario(images, images.subset([]), images, [[0, 1], [2, 3]], sorted(COLOURS))
    config = strategy("finetune", first_epochs=2, epochs=2, batch_size=6, rank=2, **EVERY)
    run_tasks(found, encoder, config, out=out)


def tuned(mode: str) -> Callable[..., Weights]:
    def train(out: Path | None, **settings: Any) -> Weights:
        with torch.random.fork_rng():
            clip = clip_module.load()
        head = clip_module.zero_shot_head(clip, [*COLOURS])
        resume = settings.pop("resume", True)
        config = FinetuneConfig(**{"mode": mode, "batch_size": 6, "epochs": 4, "lr": 1e-3, **EVERY, **settings})
        return finetune(clip, pictures(), head, config, out=out, validation=pictures(), resume=resume).state_dict()

    return train


def contrastive(loss: str) -> Callable[..., Weights]:
    def train(out: Path | None, **settings: Any) -> Weights:
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
            path = Path(folder) / "clipsteer-test-loop.json"
            path.write_text(json.dumps(SMALL))
            torch.manual_seed(0)
            # a run reads the file that a model of this name is from
            clip = replace(clip_module.load(str(path)), name="small")
        resume = settings.pop("resume", True)
        config = {"batch_size": 6, "epochs": 4, "lr": 1e-3, "temperature": 0.1, "gamma_min": 0.3, **EVERY}
        config |= {"learnable_temperature": True, "select": 0.5, "micro_batch": 4}
        reference = ReferenceFeatures(torch.eye(12), torch.eye(12), "knows every pair", "", "")
        config = ContrastiveConfig(**{**config, "loss": loss, **settings})
        given = {"reference": reference, "validation": {"all": pictures()}}
        train_contrastive(clip, pictures(), config, out=out, resume=resume, **given)
        return clip.model.state_dict()

    return train


def tasks(spec: str) -> Callable[..., Weights]:
    def train(out: Path | None, **settings: Any) -> Weights:
        config = {"first_epochs": 2, "epochs": 2, "batch_size": 8, "rank": 4, "align_samples": 16, "lr": 0.003, **EVERY}
        given = {}
        if "plasticity" in spec:
            x = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(2))
            saes = fit_saes(encoder().module, encoder().blocks, [x], d_sae=32, k=4, steps=20)
            given["plasticity"] = Plasticity(saes)
        run = run_tasks(scenario(), encoder, strategy(spec, **{**config, **settings}), out=out, **given)
        found = {} if out is None else load_latest(max(out.glob("checkpoints*/tasks"))).tensors
        return {**found, "accuracy": run.matrix.nan_to_num()}

    return train


TASK = {"log": "checkpoints/logs/task-2.jsonl", "checkpoints": "checkpoints/steps/task-2", "name": "task 3"}
USERS = {
    "sae": User(sae("topk"), {"fvu", "l0", "dead"}),
    "finetune": User(tuned("e2e"), {"loss", "validation", "validation_ensemble"}),
    "contrastive": User(contrastive("drrho"), {"loss", "all/zero_shot"}),
    "tasks": User(tasks("macil"), {"loss"}, **TASK),
}
# (out, folder of pictures); stopped at a step of the first part
ON_FILES = {
    "sae": User(sae_of_files, set()),
    "finetune": User(tuned_on_files, set()),
    "contrastive": User(contrastive_on_files, set()),
    "tasks": User(tasks_of_files, set(), checkpoints="checkpoints/steps/task-0", name="task 1"),
}
VARIANTS = {
    **USERS,
    "sae relu": User(sae("relu"), {"fvu", "l0", "dead"}),
    "sae batch_topk": User(sae("batch_topk"), {"fvu", "l0", "dead"}),
    "sae jumprelu": User(sae("jumprelu"), {"fvu", "l0", "dead"}),
    "sae gated": User(sae("gated"), {"fvu", "l0", "dead"}),
    "finetune head": User(tuned("lc"), {"loss", "validation", "validation_ensemble"}),
    "contrastive clip": User(contrastive("clip"), {"loss", "all/zero_shot"}),
    "contrastive siglip": User(contrastive("siglip"), {"loss", "all/zero_shot"}),
    "tasks slca": User(tasks("slca:slow=0.3"), {"loss"}, **TASK),
    "tasks plasticity": User(tasks("macil:lora=shared_a,plasticity=1"), {"loss"}, **TASK),
}
