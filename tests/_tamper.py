"""Runs that were stopped after a checkpoint, and ways to change what it holds; for tests in several folders.

Whoever changes a checkpoint can sign it anew, so what is tried here has the right checksums.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from _tiny import CLASSES, TASKS, encoder, scenario
from _training import COLOURS, EVERY, SMALL, pictures
from clipsteer import TrainConfig, train_sae
from clipsteer import clip as clip_module
from clipsteer.continual.learner import ClassIncrementalLearner
from clipsteer.continual.plasticity import Plasticity, fit_saes
from clipsteer.continual.strategies import strategy
from clipsteer.ensembles.finetuning import FinetuneConfig, finetune
from clipsteer.reference.train import ContrastiveConfig, train_contrastive
from clipsteer.training.loop import TrainingRun

LEARNERS = ("macil", "slca:slow=0.3", "ranpac:projections=16", "finetune:plasticity=1")
KINDS = ("sae", "sae relu", "finetune", "contrastive", "contrastive clip", "task", *(f"learner {s}" for s in LEARNERS))
NARROW = {**SMALL, "text_cfg": {**SMALL["text_cfg"], "width": 8, "heads": 1}}


class Stopped(NamedTuple):
    """A run on disk: its checkpoints, and what goes on from them, again and again.

    Attributes:
        folder: of the checkpoints.
        resume: to the newest one; it raises, or gives what was found.
    """

    folder: Path
    resume: Callable[[], Any]


class Caught(Exception):
    pass


def _caught(train: Callable[[], object], out: Path, where: str) -> Stopped:
    """A run that is stopped at its fourth step, and stands before the next restore."""
    runs: list[tuple[TrainingRun, torch.device]] = []
    plain = TrainingRun.restore

    def restore(self, device, resume=True):
        if self.checkpoints.is_dir():
            runs.append((self, device))
            raise Caught
        return plain(self, device, resume)

    def save(self):
        plain_save(self)
        if self.step == 4 and self.checkpoints.parts[-len(Path(where).parts) :] == Path(where).parts:
            raise Caught

    plain_save = TrainingRun.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingRun, "save", save)
        with pytest.raises(Caught):
            train()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingRun, "restore", restore)
        with pytest.raises(Caught):
            train()
    run, device = runs[0]
    return Stopped(out / where, lambda: run.restore(device))


def small_clip(folder: Path) -> clip_module.CLIP:
    path = folder / "clipsteer-test-tamper.json"
    path.write_text(json.dumps(NARROW))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return replace(clip_module.load(str(path)), name="small")


def stopped(kind: str, out: Path) -> Stopped:
    """A run of one of KINDS."""
    name, _, spec = kind.partition(" ")
    out.mkdir(parents=True)
    if name == "sae":
        x = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
        config = {"d_sae": 10, "k": 3, "batch_size": 32, "steps": 8, "warmup_steps": 2, "dead_after": 60, **EVERY}
        config = TrainConfig(**config, architecture=spec or "topk", sync_every=4)
        return _caught(lambda: train_sae(x, config, out=out), out, "checkpoints")
    if name == "finetune":
        head = torch.eye(16)[: len(COLOURS)]
        config = FinetuneConfig(batch_size=6, epochs=4, lr=1e-3, **EVERY)
        return _caught(lambda: finetune(small_clip(out), pictures(), head, config, out=out), out, "checkpoints")
    if name == "contrastive":
        config = {"batch_size": 6, "epochs": 4, "lr": 1e-3, "temperature": 0.1, "gamma_min": 0.3, **EVERY}
        config = ContrastiveConfig(**config, loss=spec or "global", learnable_temperature=True)
        return _caught(lambda: train_contrastive(small_clip(out), pictures(), config, out=out), out, "checkpoints")
    settings = {"first_epochs": 1, "epochs": 1, "batch_size": 8, "rank": 2, "align_samples": 8, "lr": 0.003, **EVERY}
    config = strategy(spec or "macil", **settings)
    given = {}
    if config.plasticity:
        x = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(2))
        given["plasticity"] = Plasticity(fit_saes(encoder().module, encoder().blocks, [x], d_sae=8, k=4, steps=2))
    where = scenario()

    def learn(tasks: int) -> ClassIncrementalLearner:
        learner = ClassIncrementalLearner(encoder(), config, CLASSES, out=out, **given)
        learner.resume()
        for t in range(len(learner.tasks), tasks):
            learner.fit_task(where.train.subset(where.rows("train", t)), TASKS[t])
        return learner

    if name == "task":
        learn(1)
        return _caught(lambda: learn(2), out, "steps/task-1")
    learn(2)
    fresh = ClassIncrementalLearner(encoder(), config, CLASSES, out=out, **given)

    def resume() -> ClassIncrementalLearner:
        # towers with parametrised weights are copied as a whole
        again = copy.deepcopy(fresh)
        again.resume()
        return again

    return Stopped(out / "tasks", resume)


# ---------------------------------------------------------------- tensors

Tensors = dict[str, torch.Tensor]


def _longer(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.flatten()
    return torch.cat([flat, flat.new_zeros(1)])


def _other_type(tensor: torch.Tensor) -> torch.Tensor:
    others = {torch.float32: torch.float64, torch.float64: torch.float32, torch.int64: torch.int32}
    return tensor.to(others.get(tensor.dtype, torch.int64))


TENSORS: dict[str, Callable[[Tensors, str], Tensors]] = {
    "another shape": lambda tensors, name: {**tensors, name: _longer(tensors[name])},
    "another dimension": lambda tensors, name: {**tensors, name: tensors[name][None]},
    "empty": lambda tensors, name: {**tensors, name: tensors[name].new_zeros(0, 3)},
    "another type": lambda tensors, name: {**tensors, name: _other_type(tensors[name])},
    "missing": lambda tensors, name: {key: tensor for key, tensor in tensors.items() if key != name},
    "another name": lambda tensors, name: {(key + ".x" if key == name else key): t for key, t in tensors.items()},
    "one more": lambda tensors, name: {**tensors, name + "_": tensors[name]},
}
VALUES = {"NaN": float("nan"), "infinity": float("inf"), "minus infinity": float("-inf")}


def filled(tensors: Tensors, name: str, value: float) -> Tensors:
    """The last element of a tensor is another."""
    changed = tensors[name].clone()
    changed.view(-1)[-1] = value
    return {**tensors, name: changed}


# ---------------------------------------------------------------- JSON

OTHERS: tuple[Any, ...] = (None, True, -1, 0, 2**70, -1.5, 1e308, "x", "", [], [[]], {}, {"x": 1}, ["1", None])


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of every entry of a JSON value, objects and lists included."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from places(inner, (*path, number))


def changed(value: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    """A copy in which `change` was called with the holder of an entry and its key."""
    found = copy.deepcopy(value)
    holder = found
    for key in path[:-1]:
        holder = holder[key]
    change(holder, path[-1])
    return found


def put(value: Any) -> Callable[[Any, Any], None]:
    return lambda holder, key: holder.__setitem__(key, value)


def remove(holder: Any, key: Any) -> None:
    del holder[key]


# ---------------------------------------------------------------- drawn


def drawn_tensors(draw: random.Random, tensors: Tensors) -> Tensors:
    """One to three changes."""
    for _ in range(draw.randint(1, 3)):
        name = draw.choice(sorted(tensors))
        tensor = tensors[name]
        kind = draw.choice([*TENSORS, "value", "swap", "noise", "transposed"])
        if kind in TENSORS:
            tensors = TENSORS[kind](tensors, name)
        elif kind == "value" and tensor.is_floating_point() and tensor.numel():
            value = draw.choice([*VALUES.values(), -1.0, 0.0, 1e30, -1e30])
            tensors = filled(tensors, name, value)
        elif kind == "swap":
            tensors = {**tensors, name: tensors[draw.choice(sorted(tensors))]}
        elif kind == "noise" and tensor.numel():
            flat = tensor.contiguous().flatten().clone().view(torch.uint8)
            at = draw.randrange(flat.numel())
            flat[at] ^= draw.randint(1, 255)
            tensors = {**tensors, name: flat.view(tensor.dtype).reshape(tensor.shape)}
        elif kind == "transposed" and tensor.ndim > 1:
            tensors = {**tensors, name: tensor.transpose(0, 1).contiguous()}
    return tensors


def drawn_meta(draw: random.Random, meta: dict[str, Any]) -> dict[str, Any]:
    """One to three entries are others, or gone."""
    for _ in range(draw.randint(1, 3)):
        everywhere = list(places(meta))
        if not everywhere:
            break
        change = remove if draw.random() < 0.2 else put(copy.deepcopy(draw.choice(OTHERS)))
        meta = changed(meta, draw.choice(everywhere), change)
    return meta
