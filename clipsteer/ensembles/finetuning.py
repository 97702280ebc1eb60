"""Fine-tuning a CLIP image tower from its zero-shot head: end to end, or the head alone.

Defaults are the recipe of Wortsman et al. 2022 (arXiv 2109.01903, appendix): AdamW, weight decay
0.1, learning rate 3e-5, 10 epochs of batches of 512, cosine decay after a linear warm-up of 500
steps, gradient norm at most 1, crops of at least 0.9 of the image. The head starts as the zero-shot
head times the logit scale, with a bias of zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipsteer.clip.classifier import (
    ImageClassifier,
    predict,
    save_classifier,
    zero_shot_classifier,
)
from clipsteer.clip.model import CLIP
from clipsteer.clip.pixels import Samples, loader, pixel_batches, train_transform
from clipsteer.data.dataset import ImageDataset
from clipsteer.data.identity import identity_of
from clipsteer.ensembles.config import FinetuneConfig
from clipsteer.ensembles.merging import RunningEnsemble
from clipsteer.io.digests import digest_of, weights_digest
from clipsteer.io.files import FileFormatError, read_safetensors
from clipsteer.training.claim import claimed
from clipsteer.training.collapse import constant_loss
from clipsteer.training.loop import TrainingRun
from clipsteer.training.schedule import Keys, Order, seed_of

# of logits where a tower has no scale of its own: what CLIPs learn
_SCALE = 100.0


def finetune(
    clip: CLIP,
    dataset: ImageDataset,
    head: Tensor,
    config: FinetuneConfig | None = None,
    *,
    out: str | Path | None = None,
    validation: ImageDataset | None = None,
    on_step: Callable[[ImageClassifier, int], None] | None = None,
    workers: int = 0,
    resume: bool = True,
) -> ImageClassifier:
    """Train `clip`'s image tower, in place, and a head on labelled images.

    Args:
        dataset: images with classes; targets index the rows of `head`.
        head: (C, e) unit rows, the zero-shot head; the logit scale is applied here, 100 for a tower
            without text, whose head is `clipsteer.clip.prototype_head`.
        out: folder for zeroshot/ and finetuned/ (see `save_classifier`), log.jsonl and
            checkpoints/. A run that was stopped there, by Ctrl-C, SIGTERM or otherwise, goes on
            from its last checkpoint, on a CPU bit for bit; `clip` and `head` must then be what it
            started from.
        validation: measured after every epoch, with the current weights and with their running
            ensemble.
        on_step: called after each step with the classifier and the number of steps taken, for
            instance to update a `RunningEnsemble`.

    Returns the classifier, in eval mode; its tower is `clip`'s.

    Raises:
        ValueError: no classes, targets outside the head, nothing to train, or a run in `out` with
            other settings, images, classes or starting weights.
        FileFormatError: a checkpoint in `out` that is not of such a run.
        RuntimeError: the loss is not finite, or another process writes to `out`. SystemExit(143):
            SIGTERM came and the state is saved; KeyboardInterrupt: so did Ctrl-C.
    """
    folder = Path(out) if out is not None else None
    config = config or FinetuneConfig()
    run = _Run(clip, dataset, head, config, folder, validation, workers)
    with claimed(folder, run.name):
        return run.run(on_step, resume)


class _Run(TrainingRun):
    name = "finetune"
    cosmetic = (*TrainingRun.cosmetic, "alpha")
    quality = ("loss", "validation", "validation_ensemble")
    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        clip: CLIP,
        dataset: ImageDataset,
        head: Tensor,
        config: FinetuneConfig,
        out: Path | None,
        validation: ImageDataset | None,
        workers: int,
    ) -> None:
        if (
            dataset.classes is None
            or not len(dataset)
            or len(head) < 2
            or not 0 <= min(dataset.targets) <= max(dataset.targets) < len(head)
        ):
            raise ValueError(
                f"finetune: dataset must hold images of classes 0 … {len(head) - 1}, the rows of "
                f"head, of which there must be at least two"
            )
        self.clip = clip
        self.dataset = dataset
        self.validation = validation
        self.workers = workers
        self.classes = list(dataset.classes)
        scale = None if clip.has_text else _SCALE
        self.classifier = zero_shot_classifier(clip, head, scale)
        self.trained = self.classifier if config.mode == "e2e" else self.classifier.head
        self.order = Order(len(dataset), config.batch_size, config.seed)
        parameters = {name: p for name, p in self.trained.named_parameters() if p.requires_grad}
        if not parameters:
            raise ValueError(
                "finetune: no parameter of the image tower or head requires a gradient"
            )
        optimizer = torch.optim.AdamW(
            parameters.values(), lr=config.peak, weight_decay=config.weight_decay
        )
        settings = {**asdict(config), "model": clip.name, "images": len(dataset)}
        if out is not None:
            # what would mix two runs in one folder if it changed between them
            settings["data"] = digest_of([self.classes, list(dataset.targets)])
            settings["weights"] = weights_digest(clip.model)
            if (setup := clip.setup) is not None:
                settings["setup"] = setup.to_json()
            settings["frozen"] = [
                name for name, p in self.trained.named_parameters() if not p.requires_grad
            ]
        total = self.order.per_epoch * config.epochs
        super().__init__(config, total, parameters, optimizer, settings, out)
        smoothing = config.label_smoothing
        self.constant = {"loss": constant_loss(dataset.targets, len(head), smoothing)}

    def run(
        self, on_step: Callable[[ImageClassifier, int], None] | None, resume: bool
    ) -> ImageClassifier:
        self.ensemble = None
        if self.validation is not None:
            self.ensemble = RunningEnsemble(self.trained, self.config.alpha)
        if self.out is not None and not self.restore(self.clip.device, resume):
            save_classifier(self.out / "zeroshot", self.clip, self.classifier, self.classes)
        if self.config.mode == "lc":
            with torch.no_grad():
                self.clip.model.eval()
                pixels = pixel_batches(self.clip, self.dataset, workers=self.workers)
                self.features = torch.cat([self.classifier.features(x) for x in pixels])
        cuda = [self.clip.device] if self.clip.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            self.loop(None if on_step is None else lambda: on_step(self.classifier, self.step))
        self.classifier.eval()
        if self.out is not None:
            save_classifier(
                self.out / "finetuned",
                self.clip,
                self.classifier,
                self.classes,
                finetune=self.settings,
            )
        return self.classifier

    def data_identity(self) -> dict[str, Any]:
        return identity_of(self.dataset)

    def tensors(self) -> dict[str, Tensor]:
        return {f"model.{name}": tensor for name, tensor in self.trained.state_dict().items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self._check_head()
        self.trained.load_state_dict(
            {k[6:]: v for k, v in tensors.items() if k.startswith("model.")}
        )

    def _check_head(self) -> None:
        """Refuse a head other than the run's. The last bits may differ: it is computed anew, on
        whatever machine."""
        assert self.out is not None
        path = self.out / "zeroshot" / "head.safetensors"
        there = read_safetensors(path)
        here = self.classifier.head.state_dict()
        if there.keys() != here.keys() or any(
            there[name].shape != here[name].shape for name in here
        ):
            raise FileFormatError(f"{path}: not the head that this run started from")
        old = there["weight"].float()  # (C, e)
        new = here["weight"].float().cpu()
        if not bool(((new - old).norm(dim=1) <= 0.01 * old.norm(dim=1)).all()):
            raise ValueError(
                f"finetune: {self.out} holds a run from another head (class names or templates); "
                f"use another folder"
            )

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and classes."""
        steps = range(self.step, self.total)
        if self.config.mode == "lc":
            targets = torch.tensor(self.dataset.targets, device=self.clip.device)
            for step in steps:
                picked = torch.tensor(self.order.rows(step), device=self.clip.device)
                yield self.features[picked], targets[picked]
            return
        samples = Samples(self.dataset, train_transform(self.clip, self.config.crop))
        keys = Keys(map(self.order.keys, steps), len(steps))
        for pixels, targets in loader(samples, keys, self.workers):
            yield pixels.to(self.clip.device, self.clip.dtype), targets.to(self.clip.device)

    def train_step(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor | float]:
        config = self.config
        inputs, targets = batch  # (B, ...), (B,)
        self.trained.train()
        lr = config.lr_at(self.step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # for dropout and patch dropout
        torch.manual_seed(seed_of(config.seed, "step", self.step))
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.clip.device.type, torch.bfloat16, enabled=config.bf16):
            logits = self.trained(inputs)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=config.label_smoothing)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), config.grad_clip)
        self.optimizer.step()
        return {"loss": loss.detach(), "grad_norm": norm, "lr": lr}

    def measure(self) -> dict[str, float]:
        if self.ensemble is None or self.step % self.order.per_epoch:
            return {}
        assert self.validation is not None
        truth = torch.tensor(self.validation.targets)

        def accuracy() -> float:
            pixels = pixel_batches(self.clip, self.validation, workers=self.workers)
            logits = predict(self.classifier, pixels)
            return float((logits.argmax(1) == truth).float().mean())

        self.ensemble.update(self.trained)
        now = accuracy()
        with self.ensemble.applied(self.trained):
            return {
                "epoch": self.step // self.order.per_epoch,
                "validation": now,
                "validation_ensemble": accuracy(),
            }
