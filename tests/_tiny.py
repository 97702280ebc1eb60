"""A tower and images small enough to learn tasks in a second; for tests in this process and in others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clipsteer.continual.backbone import Encoder
from clipsteer.continual.experiment import run_tasks
from clipsteer.continual.metrics import Run
from clipsteer.continual.scenario import Scenario
from clipsteer.continual.strategies import strategy
from clipsteer.data import open_dataset
from clipsteer.data.dataset import ImageDataset, spread

CLASSES, TASKS = 6, [[3, 0], [5, 1], [2, 4]]


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image.resize((32, 32)), dtype=np.float32).copy()).permute(2, 0, 1) / 128 - 1


def flipped(image: Image.Image) -> torch.Tensor:
    x = pixels(image)
    return x.flip(-1) if torch.rand(()) < 0.5 else x


def encoder(seed: int = 0) -> Encoder:
    from open_clip.transformer import VisionTransformer

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tower = VisionTransformer(image_size=32, patch_size=16, width=32, layers=2, heads=2, mlp_ratio=2, output_dim=16)
    # random weights say much the same of every image: take that away
    with torch.no_grad():
        seen = torch.stack([pixels(image) for image, _ in images(0, 4)])
        tokens = []
        handle = tower.ln_post.register_forward_hook(lambda _, args, out: tokens.append(out[:, 0].mean(0)))
        tower(seen)
        handle.remove()
        tower.ln_post.bias.sub_(tokens[0])
        tower.proj.mul_(8)
    return Encoder(tower.eval(), pixels, flipped, "tiny")


def images(seed: int, each: int) -> ImageDataset:
    """Noise around a colour of each class."""
    rng = np.random.RandomState(7)
    colours = rng.randint(40, 215, (CLASSES, 2, 2, 3))
    noise = np.random.RandomState(seed)
    drawn, targets = [], []
    for i in range(each * CLASSES):
        colour = np.kron(colours[i % CLASSES], np.ones((16, 16, 1)))
        drawn.append(np.clip(colour + noise.normal(0, 25, (32, 32, 3)), 0, 255).astype(np.uint8))
        targets.append(i % CLASSES)
    return ImageDataset(lambda row: Image.fromarray(drawn[row]), targets, [f"class {c}" for c in range(CLASSES)])


def scenario() -> Scenario:
    return Scenario(images(0, 16), images(1, 0), images(2, 8), TASKS, [f"class {c}" for c in range(CLASSES)])


def seeded_run(seed: int) -> Run:
    """A run that another process can be asked for: processes find this module by its name, and no test module."""
    return run_tasks(scenario(), encoder, strategy("ncm", seed=seed))


def drawings(folder: Path, count: int = 120) -> Path:
    """Some of the bundled drawings, in a folder a class."""
    data = open_dataset("emoji:noto:seen")
    assert data.classes is not None
    for row in spread(range(len(data)), count):
        place = folder / data.classes[data.targets[row]]
        place.mkdir(parents=True, exist_ok=True)
        data[row][0].save(place / f"{row}.png")
    return folder


def noise(root: Path, classes: int, train: int, test: int) -> Path:
    """Images of coloured noise, so many of each class, in PILOT's layout."""
    rng = np.random.RandomState(0)
    for part, count in (("train", train), ("test", test)):
        for c in range(classes):
            folder = root / part / f"class_{c}"
            folder.mkdir(parents=True)
            for i in range(count):
                colour = np.eye(classes)[c, :3] * 150 + 50 + rng.normal(0, 20, (40, 40, 3))
                Image.fromarray(colour.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return root
