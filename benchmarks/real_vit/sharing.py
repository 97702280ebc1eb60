"""What strategies have in common is computed once: networks that are trained alike, and features of a network.

Fine-tuning, SDC and LDC train the same network and read it in three ways; MACIL's first task is theirs too, and taking
away a part that comes after training leaves its network as it is. A learner of this kind looks in a folder whether the
network of its task has been trained, and which pictures have been seen by it. Times of such runs mean nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipsteer.continual.learner import ClassIncrementalLearner
from clipsteer.continual.task import Before
from clipsteer.data.dataset import ImageDataset
from clipsteer.io.digests import described, digest_of, weights_digest
from clipsteer.io.files import read_safetensors, write_safetensors

# settings that the first task's network depends on, and what the later ones' depend on too
_FIRST = ("lora", "rank", "cosine", "softmax", "lr", "slow", "momentum", "weight_decay", "batch_size", "schedule")
_FIRST += ("first_epochs", "bf16", "seed")
_LATER = ("epochs", "covariance", "consistent", "distill", "plasticity")


class SharingLearner(ClassIncrementalLearner):
    """A learner whose networks of LoRA pairs, and features, lie in ``store``.

    Args:
        store: folder, which several learners and processes may have.
        data: what the training pictures and their labels are known by.
    """

    def __init__(self, *args: Any, store: Path, data: str, **named: Any) -> None:
        encoder = args[0]
        transforms = [described(encoder.preprocess), described(encoder.train_transform)]
        self.start = digest_of([weights_digest(encoder), transforms])
        self.data = data
        self.store = store
        self.known: tuple[str, dict[str, Tensor]] = ("", {})  # of one network: picture -> feature
        super().__init__(*args, **named)

    @property
    def shares(self) -> bool:
        """Whether the network is one that lies in the store; whole towers are too large to keep."""
        return self.config.train != "full"

    def _key(self) -> str:
        """What the network after the tasks so far is known by."""
        if self.config.train == "none" or not self.tasks:
            return self.start[:24]
        names = _FIRST if len(self.tasks) == 1 else _FIRST + _LATER
        settings = {name: getattr(self.config, name) for name in names}
        factors = self.multipliers if self.config.plasticity and len(self.tasks) > 1 else []
        return digest_of([self.start, self.data, settings, self.tasks, factors])[:24]

    def _train(self, images: ImageDataset, classes: list[int], before: Before) -> int:
        if not self.shares:
            return super()._train(images, classes, before)
        assert self.heads is not None
        assert self.lora is not None
        file = self.store / "networks" / f"{self._key()}.safetensors"
        if not file.exists():
            asked = super()._train(images, classes, before)
            trained = [*self.lora.parameters(), *self.heads.parameters()]
            if not asked:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_safetensors(file, {str(i): p.detach() for i, p in enumerate(trained)})
            return asked
        self.heads.add(len(classes), device=self.device)
        self.lora.begin_task()
        found = read_safetensors(file)
        with torch.no_grad():
            for i, parameter in enumerate([*self.lora.parameters(), *self.heads.parameters()]):
                parameter.copy_(found[str(i)])
        return 0

    def features(self, images: ImageDataset) -> Tensor:
        """(N, d), of pictures that this network has not seen before read anew."""
        if not self.shares:
            return super().features(images)
        key = self._key()
        file = self.store / "features" / f"{key}.safetensors"
        if self.known[0] != key:
            self.known = (key, read_safetensors(file) if file.exists() else {})
        rows = self.known[1]
        names = [json.dumps(source) for source in images.sources]
        new = [row for row, name in enumerate(names) if name not in rows]
        if new:
            for row, feature in zip(new, super().features(images.subset(new))):
                rows[names[row]] = feature.clone()
            file.parent.mkdir(parents=True, exist_ok=True)
            write_safetensors(file, rows)
        return torch.stack([rows[name] for name in names])
