"""Fine-tuning a CLIP image tower from its zero-shot head: end to end, or the head alone.

Defaults are the recipe of Wortsman et al. 2022 (arXiv 2109.01903, appendix): AdamW, weight decay 0.1, learning rate
3e-5, 10 epochs of batches of 512, cosine decay after a linear warm-up of 500 steps, gradient norm at most 1, crops of
at least 0.9 of the image. The head starts as the zero-shot head times the logit scale, with a bias of zero.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from clipsteer import checkpoint
from clipsteer._files import FileFormatError, read_safetensors
from clipsteer._sae_run import EXIT_TERMINATED, StopSignal, trim_log
from clipsteer.classifier import (
    ImageClassifier,
    Samples,
    loader,
    pixel_batches,
    predict,
    save_classifier,
    zero_shot_classifier,
)
from clipsteer.clip import CLIP
from clipsteer.data import ImageDataset
from clipsteer.merging import RunningEnsemble

logger = logging.getLogger(__name__)

# settings that do not change the weights, so that a resumed run may differ in them
_COSMETIC = ("checkpoint_every", "log_every", "alpha")
_ADAM = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of a run.

    Attributes:
        mode: "e2e" trains image tower and head, "lc" the head alone, on features computed once and without crops.
        lr: peak learning rate; None is 3e-5 for e2e and 1e-3 for lc.
        warmup_steps: at most a tenth of the run is warm-up, so that short runs reach their peak.
        crop: smallest share of the image's area that a random crop keeps; 1 turns cropping off.
        alpha: of the running ensemble that is measured, beside the model, on validation images.
        bf16: compute under bfloat16 autocast.
    """

    mode: Literal["e2e", "lc"] = "e2e"
    lr: float | None = None
    weight_decay: float = 0.1
    batch_size: int = 512
    epochs: int = 10
    warmup_steps: int = 500
    grad_clip: float = 1.0
    label_smoothing: float = 0.0
    crop: float = 0.9
    alpha: float = 0.5
    bf16: bool = False
    seed: int = 0
    checkpoint_every: int = 500
    log_every: int = 10

    def __post_init__(self) -> None:
        if self.mode not in ("e2e", "lc"):
            raise ValueError(f"FinetuneConfig: mode must be 'e2e' or 'lc', got {self.mode!r}")
        for name in ("batch_size", "epochs", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"FinetuneConfig: {name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.peak < math.inf or not 0 < self.crop <= 1:
            raise ValueError(f"FinetuneConfig: lr must be positive and crop in (0, 1], got {self.peak} and {self.crop}")

    @property
    def peak(self) -> float:
        return (3e-5 if self.mode == "e2e" else 1e-3) if self.lr is None else self.lr

    def lr_at(self, step: int, total: int) -> float:
        """Learning rate of step 0 … total-1."""
        warmup = min(self.warmup_steps, total // 10)
        if step < warmup:
            return self.peak * (step + 1) / warmup
        return self.peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def _seed(number: int) -> int:
    return number % 2**63  # torch takes no more


def train_transform(clip: CLIP, crop: float) -> Callable[[Any], Tensor]:
    if crop == 1:
        return clip.preprocess
    from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2

    cfg = PreprocessCfg(**clip.model.visual.preprocess_cfg)
    return image_transform_v2(cfg, is_train=True, aug_cfg=AugmentationCfg(scale=(crop, 1.0)))


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
        head: (C, e) unit rows, the zero-shot head; the logit scale is applied here.
        out: folder for zeroshot/ and finetuned/ (see `save_classifier`), log.jsonl and checkpoints/. A run that was
            stopped there, by SIGTERM or otherwise, goes on from its last checkpoint, on a CPU bit for bit; `clip` and
            `head` must then be what it started from.
        validation: measured after every epoch, with the current weights and with their running ensemble.
        on_step: called after each step with the classifier and the number of steps taken, for instance to update a
            `RunningEnsemble`.

    Returns the classifier, in eval mode; its tower is `clip`'s.

    Raises:
        ValueError: no classes, targets outside the head, nothing to train, or a run in `out` with other settings,
            classes or starting weights.
        RuntimeError: the loss is not finite. SystemExit(143): SIGTERM came and the state is saved.
    """
    config = config or FinetuneConfig()
    return _Run(clip, dataset, head, config, Path(out) if out is not None else None, validation, workers).run(
        on_step, resume
    )


class _Run:
    def __init__(
        self, clip: CLIP, dataset: ImageDataset, head: Tensor, config: FinetuneConfig, out: Path | None,
        validation: ImageDataset | None, workers: int,
    ) -> None:  # fmt: skip
        if (
            dataset.classes is None
            or not len(dataset)
            or not 0 <= min(dataset.targets) <= max(dataset.targets) < len(head)
        ):
            raise ValueError(f"finetune: dataset must hold images of classes 0 … {len(head) - 1}, the rows of head")
        self.clip, self.dataset, self.config, self.out = clip, dataset, config, out
        self.validation, self.workers = validation, workers
        self.classes = list(dataset.classes)
        self.classifier = zero_shot_classifier(clip, head)
        self.trained = self.classifier if config.mode == "e2e" else self.classifier.head
        self.per_epoch = math.ceil(len(dataset) / config.batch_size)
        self.total, self.step, self.saved_at = self.per_epoch * config.epochs, 0, -1
        self.parameters = {name: p for name, p in self.trained.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("finetune: no parameter of the image tower or head requires a gradient")
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=config.peak, weight_decay=config.weight_decay)
        self.settings = json.loads(json.dumps({**asdict(config), "model": clip.name, "images": len(dataset)}))
        if out is not None:
            # what would mix two runs in one folder if it changed between them
            self.settings["data"] = hashlib.sha256(
                json.dumps([self.classes, list(dataset.targets)]).encode()
            ).hexdigest()
            self.settings["weights"] = checkpoint.digest(clip.model)
            self.settings["frozen"] = [name for name, p in self.trained.named_parameters() if not p.requires_grad]

    def run(self, on_step: Callable[[ImageClassifier, int], None] | None, resume: bool) -> ImageClassifier:
        ensemble = RunningEnsemble(self.trained, self.config.alpha) if self.validation is not None else None
        if self.out is not None:
            if not self._restore(resume):
                save_classifier(self.out / "zeroshot", self.clip, self.classifier, self.classes)
            trim_log(self.out / "log.jsonl", self.step)
        if self.config.mode == "lc":
            with torch.no_grad():
                self.clip.model.eval()
                pixels = pixel_batches(self.clip, self.dataset, workers=self.workers)
                self.features = torch.cat([self.classifier.features(x) for x in pixels])
        cuda = [self.clip.device] if self.clip.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            self._loop(ensemble, on_step)
        self.classifier.eval()
        if self.out is not None:
            save_classifier(self.out / "finetuned", self.clip, self.classifier, self.classes, finetune=self.settings)
        return self.classifier

    def _restore(self, resume: bool) -> bool:
        """Go to the last checkpoint; False when there is none."""
        found = checkpoint.load_latest(self.out / "checkpoints", device=str(self.clip.device))
        if found is None:
            return False
        if not resume:
            raise ValueError(f"finetune: {self.out} holds a run; resume it or choose another folder")
        there = found.meta.get("settings", {})
        if changed := [k for k in self.settings if k not in _COSMETIC and there.get(k) != self.settings[k]]:
            which = ", ".join(f"{k}: {there.get(k)!r:.80} there, {self.settings[k]!r:.80} asked for" for k in changed)
            raise ValueError(f"finetune: {self.out} holds a run with other settings ({which}); use another folder")
        self._check_head()
        self.trained.load_state_dict({k[6:]: v for k, v in found.tensors.items() if k.startswith("model.")})
        for name, parameter in self.parameters.items():
            keys = [key for key in _ADAM if f"adam.{key}.{name}" in found.tensors]
            if keys:  # without a gradient so far there is no state
                self.optimizer.state[parameter] = {key: found.tensors[f"adam.{key}.{name}"].clone() for key in keys}
                self.optimizer.state[parameter]["step"] = self.optimizer.state[parameter]["step"].cpu()
        self.step = self.saved_at = found.step
        return True

    def _check_head(self) -> None:
        """Refuse a head other than the run's. The last bits may differ: it is computed anew, on whatever machine."""
        path = self.out / "zeroshot" / "head.safetensors"
        there, here = read_safetensors(path), self.classifier.head.state_dict()
        if there.keys() != here.keys() or any(there[name].shape != here[name].shape for name in here):
            raise FileFormatError(f"{path}: not the head that this run started from")
        old, new = there["weight"].float(), here["weight"].float().cpu()
        if not bool(((new - old).norm(dim=1) <= 0.01 * old.norm(dim=1)).all()):
            raise ValueError(
                f"finetune: {self.out} holds a run from another head (class names or templates); use another folder"
            )

    def _save(self) -> None:
        if self.out is None or self.saved_at == self.step:
            return
        tensors = {f"model.{name}": tensor for name, tensor in self.trained.state_dict().items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"adam.{key}.{name}"] = value
        checkpoint.save_state(self.out / "checkpoints", self.step, tensors, {"settings": self.settings})
        self.saved_at = self.step

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and classes of the steps that remain; what a step sees depends on the seed and its number alone."""
        config, n = self.config, len(self.dataset)

        def rows(step: int) -> list[int]:
            epoch, at = divmod(step, self.per_epoch)
            order = torch.randperm(n, generator=torch.Generator().manual_seed(_seed(config.seed * 1_000_003 + epoch)))
            return order[at * config.batch_size : (at + 1) * config.batch_size].tolist()

        steps = range(self.step, self.total)
        if config.mode == "lc":
            targets = torch.tensor(self.dataset.targets, device=self.clip.device)
            for step in steps:
                picked = torch.tensor(rows(step), device=self.clip.device)
                yield self.features[picked], targets[picked]
            return
        keys = ([(row, _seed((config.seed * 1_000_003 + step) * n + row)) for row in rows(step)] for step in steps)
        samples = Samples(self.dataset, train_transform(self.clip, config.crop))
        for pixels, targets in loader(samples, _Keys(keys, len(steps)), self.workers):
            yield pixels.to(self.clip.device, self.clip.dtype), targets.to(self.clip.device)

    def _train_step(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        lr = config.lr_at(self.step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(_seed(config.seed * 1_000_003 + self.step))  # for dropout and patch dropout
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.clip.device.type, torch.bfloat16, enabled=config.bf16):
            logits = self.trained(inputs)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=config.label_smoothing)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), config.grad_clip)
        self.optimizer.step()
        self.step += 1
        return loss.detach(), norm

    def _loop(self, ensemble: RunningEnsemble | None, on_step: Callable[[ImageClassifier, int], None] | None) -> None:
        config, began, first = self.config, time.monotonic(), self.step
        bar = tqdm(total=self.total, initial=first, desc="fine-tune", unit="step", disable=None)
        with bar, StopSignal(self.out is not None) as stop:
            for inputs, targets in self._batches():
                self.trained.train()
                loss, norm = self._train_step(inputs, targets)
                if on_step is not None:
                    on_step(self.classifier, self.step)
                bar.update()
                last = self.step == self.total
                save = stop.asked or last or self.step % config.checkpoint_every == 0
                record: dict[str, Any] = {}
                if save or self.step % config.log_every == 0:
                    value = float(loss)
                    if not math.isfinite(value):
                        raise RuntimeError(f"finetune: the loss is {value} at step {self.step}; lower lr")
                    speed = (self.step - first) * config.batch_size / max(time.monotonic() - began, 1e-9)
                    record = {"loss": value, "grad_norm": float(norm), "lr": config.lr_at(self.step - 1, self.total)}
                    record["images_per_second"] = round(speed, 1)
                    bar.set_postfix(loss=f"{value:.4g}", refresh=False)
                if ensemble is not None and self.step % self.per_epoch == 0:
                    record |= self._validate(ensemble)
                if record and self.out is not None:
                    with (self.out / "log.jsonl").open("a") as log:
                        log.write(json.dumps({"step": self.step, **record}) + "\n")
                if save:
                    self._save()
                if stop.asked and not last:
                    logger.warning("SIGTERM: step %d of %d is saved in %s", self.step, self.total, self.out)
                    raise SystemExit(EXIT_TERMINATED)

    def _validate(self, ensemble: RunningEnsemble) -> dict[str, float]:
        truth = torch.tensor(self.validation.targets)

        def accuracy() -> float:
            logits = predict(self.classifier, pixel_batches(self.clip, self.validation, workers=self.workers))
            return float((logits.argmax(1) == truth).float().mean())

        ensemble.update(self.trained)
        now = accuracy()
        with ensemble.applied(self.trained):
            return {"epoch": self.step // self.per_epoch, "validation": now, "validation_ensemble": accuracy()}


class _Keys:
    """A batch sampler that is an iterator of known length, not a list of all batches of a run."""

    def __init__(self, batches: Iterator[list[tuple[int, int]]], length: int) -> None:
        self.batches, self.length = batches, length

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.batches

    def __len__(self) -> int:
        return self.length
