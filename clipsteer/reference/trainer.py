"""The optimisation of both towers of a CLIP, step by step."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipsteer.clip.model import CLIP
from clipsteer.clip.pixels import loader
from clipsteer.clip.setup import header_of
from clipsteer.clip.towers import joint_module
from clipsteer.data.dataset import ImageDataset, data_digest
from clipsteer.data.identity import identity_of
from clipsteer.io.digests import weights_digest
from clipsteer.io.files import read_json, write_json, write_safetensors
from clipsteer.io.layout import Layout
from clipsteer.reference.config import REFERRED, ContrastiveConfig
from clipsteer.reference.constant import share_of_constant
from clipsteer.reference.evaluate import evaluate
from clipsteer.reference.features import ReferenceFeatures, model_digest, referred
from clipsteer.reference.losses import select_learnable
from clipsteer.reference.optimizer import gamma_of, make_optimizer
from clipsteer.reference.pairs import Pairs
from clipsteer.training.loop import TrainingRun
from clipsteer.training.schedule import Keys, Order, cosine_lr, seed_of
from clipsteer.training.world import JointBatch, World


class ContrastiveRun(TrainingRun):
    """A run of `train_contrastive`, which has its arguments."""

    name = "train"
    cosmetic = (*TrainingRun.cosmetic, "micro_batch", "evaluate_every", "loss_backend")
    since: Mapping[str, Any] = {"eps": 1e-14, "logit_bias": None}
    shown = ("loss", "loss_share")
    constant: Mapping[str, float] = {"loss_ratio": 1.0}
    optimizer: torch.optim.Optimizer
    world: World

    def __init__(
        self,
        clip: CLIP,
        dataset: ImageDataset,
        config: ContrastiveConfig,
        reference: ReferenceFeatures | CLIP | None,
        out: Path | None,
        validation: dict[str, ImageDataset],
        templates: tuple[str, ...] | None,
        workers: int,
        world: World,
    ) -> None:
        if reference is None and config.wants_reference:
            what = f"loss={config.loss!r}, select={config.select}"
            raise ValueError(f"train: {what} need a reference")
        if isinstance(reference, ReferenceFeatures):
            reference.check_data(dataset)
        config.check_batches(len(dataset), world.size)
        self.clip = clip
        self.dataset = dataset
        self.reference = reference if config.wants_reference else None
        self.validation = validation
        self.templates = templates
        self.workers = workers
        self.order = Order(len(dataset), config.batch_size, config.seed, drop_last=True)
        total = self.order.per_epoch * config.epochs
        if config.samples:
            total = math.ceil(config.samples / config.batch_size)
        # a DRRhoLoss, a ContrastiveLoss or a SigmoidLoss
        self.loss: Any = config.make_loss(len(dataset), world).to(clip.device)
        clip.need_text("train_contrastive")
        # τ is the loss's own, and so is a bias
        for parameter in (clip.model.logit_scale, getattr(clip.model, "logit_bias", None)):
            if parameter is not None:
                parameter.requires_grad_(False)
        parameters = {
            f"model.{name}": p for name, p in clip.model.named_parameters() if p.requires_grad
        }
        self.trained = list(parameters.values())
        self.learnt = {name: p for name, p in self.loss.named_parameters() if p.requires_grad}
        parameters |= {f"loss.{name}": p for name, p in self.learnt.items()}
        optimizer = make_optimizer(config, self.trained, list(self.learnt.values()))
        settings = {**asdict(config), "pairs": len(dataset)}
        settings |= {"rho": config.resolved_rho, "logit_bias": config.resolved_bias}
        if out is not None:
            # an architecture that a file describes is known by what stands there
            settings["model"] = read_json(clip.name) if clip.name.endswith(".json") else clip.name
            settings |= {"data": data_digest(dataset), "weights": weights_digest(clip.model)}
            if (setup := clip.setup) is not None:
                settings["setup"] = setup.to_json()
            parameters_of = clip.model.named_parameters()
            settings["frozen"] = [name for name, p in parameters_of if not p.requires_grad]
            if isinstance(self.reference, CLIP):
                settings["reference"] = model_digest(self.reference)
            elif self.reference is not None:
                settings["reference"] = self.reference.digest()
        super().__init__(config, total, parameters, optimizer, settings, out, world)

    def run(self, on_log: Callable[[dict[str, Any]], None] | None, resume: bool) -> CLIP:
        self.restore(self.clip.device, resume)
        self.model: Any = joint_module(self.clip.model)
        if self.world.size > 1:
            ids = [self.clip.device.index] if self.clip.device.type == "cuda" else None
            self.model = nn.parallel.DistributedDataParallel(self.model, device_ids=ids)
        cuda = [self.clip.device] if self.clip.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=cuda):
                self.loop(on_log=on_log)
        finally:
            if self.world.size > 1:
                # what a failed run's traceback and DDP's cycles keep would hold the process group
                # beyond its end
                self.model = self.clip.model
                gc.collect()
        self.clip.model.eval()
        with torch.no_grad():
            self.clip.model.logit_scale.fill_(-math.log(float(self._temperature())))
            bias = getattr(self.clip.model, "logit_bias", None)
            if bias is not None and "logit_bias" in self.learnt:
                bias.fill_(self.learnt["logit_bias"])
        if self.out is not None and self.lead:
            weights = self.clip.model.state_dict()
            header = header_of(self.clip.setup)
            write_safetensors(self.out / "model.safetensors", weights, header)
            name = self.settings["model"]
            if not isinstance(name, str):
                write_json(self.out / "architecture.json", name)
                name = "architecture.json"
            # a bias that the model has no place for is kept beside it
            bias = {name: float(p.detach()) for name, p in self._biases().items()}
            write_json(self.out / "config.json", {"model": name, "train": self.settings, **bias})
        self.world.any(False)  # what the first one writes is there when any returns
        return self.clip

    def is_quality(self, figure: str) -> bool:
        return figure == "loss" or "/" in figure  # NAME/MEASURE of the validation

    def _temperature(self) -> Tensor | float:
        tau = self.loss.temperature
        return tau.detach() if isinstance(tau, Tensor) else tau

    def _biases(self) -> dict[str, nn.Parameter]:
        """What the loss learns beside its temperature."""
        return {name: p for name, p in self.learnt.items() if name != "logit_scale"}

    def tensors(self) -> dict[str, Tensor]:
        found = {f"model.{name}": tensor for name, tensor in self.clip.model.state_dict().items()}
        found |= {f"loss.{name}": parameter for name, parameter in self.loss.named_parameters()}
        return found | ({"loss.u": self.loss.gather_u()} if self.config.remembers else {})

    def layout(self) -> Layout:
        found = super().layout()
        if "loss.u" in found:
            # NaN until a sample is seen
            found["loss.u"] = found["loss.u"]._replace(any_value=True)
        return found

    def data_identity(self) -> dict[str, Any]:
        return identity_of(self.dataset)

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.clip.model.load_state_dict(
            {k[6:]: v for k, v in tensors.items() if k.startswith("model.")}
        )
        with torch.no_grad():
            for name, parameter in self.loss.named_parameters():
                parameter.copy_(tensors[f"loss.{name}"])
        if self.config.remembers:
            self.loss.load_u(tensors["loss.u"])

    def batches(self) -> Iterator[list[Tensor]]:
        """This process's share of every batch."""
        live = [self.reference] if isinstance(self.reference, CLIP) else []
        pairs = Pairs(self.dataset, self.config.crop, self.clip, *live)
        share = self.config.batch_size // self.world.size
        mine = slice(self.world.rank * share, (self.world.rank + 1) * share)
        steps = range(self.step, self.total)
        keys = Keys((self.order.keys(step)[mine] for step in steps), len(steps))
        return iter(loader(pairs, keys, self.workers))

    def _features(self, pixels: Tensor, tokens: Tensor, part: int) -> tuple[Tensor, Tensor]:
        # (b, 3, H, W), (b, L) -> (b, e) twice; the same dropout when a part is computed again
        torch.manual_seed(seed_of(self.config.seed, "part", self.step, self.world.rank, part))
        with torch.autocast(self.clip.device.type, torch.bfloat16, enabled=self.config.bf16):
            found = self.model(pixels, tokens)
        if isinstance(found, dict):
            found = found["image_features"], found["text_features"]
        # unit rows in bfloat16 are off by its rounding
        image, text = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in found[:2])
        return F.normalize(image, dim=-1), F.normalize(text, dim=-1)

    def _referred(self, ids: Tensor, theirs: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        if self.reference is None:
            return None, None
        image, text = referred(self.reference, ids, theirs)
        wide = torch.promote_types(self.clip.dtype, torch.float32)  # that of `_features`
        return image.to(self.clip.device, wide), text.to(self.clip.device, wide)

    def _now(self) -> float:
        """Seconds, for the steps that are logged; a GPU waits for no other."""
        if self.timed and self.clip.device.type == "cuda":
            torch.cuda.synchronize(self.clip.device)
        return time.perf_counter()

    def train_step(self, batch: list[Tensor]) -> dict[str, Tensor | float]:
        config = self.config
        self.model.train()
        self.loss.train()
        self.timed = self.step + 1 == self.total or (self.step + 1) % config.log_every == 0
        began = self._now()
        lr = cosine_lr(self.step, self.total, config.lr, config.warmup_steps)
        for group in self.optimizer.param_groups[: 2 if config.remembers else 3]:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        ids, pixels, tokens, *theirs = batch
        refs = self._referred(ids, theirs)
        inputs = (pixels.to(self.clip.device, self.clip.dtype), tokens.to(self.clip.device))
        loss = self._backward(ids.to(self.clip.device), inputs, refs)
        for own in self.learnt.values() if self.world.size > 1 else ():
            assert own.grad is not None  # ()
            self.world.sum_(own.grad).div_(self.world.size)
        norm = nn.utils.clip_grad_norm_(self.trained, config.grad_clip)
        scale = self.learnt.get("logit_scale")
        before = None if scale is None else scale.detach().clone()
        self.optimizer.step()
        self.loss.settle_temperature_(before)
        values: dict[str, Tensor | float] = {"loss": loss, "grad_norm": norm, "lr": lr}
        values["temperature"] = self._temperature()
        values |= {name: bias.detach() for name, bias in self._biases().items()}
        if self.timed:
            values["loss_share"] = self.loss_seconds / (self._now() - began)
            rho = config.resolved_rho
            ratio = share_of_constant(self.loss, *self.seen, config.loss_pairs, rho, self.world)
            values |= {} if ratio is None else {"loss_ratio": ratio}
        return values

    def _backward(
        self, ids: Tensor, inputs: tuple[Tensor, Tensor], refs: tuple[Tensor | None, Tensor | None]
    ) -> Tensor:
        """Gradients of the whole batch's loss, the model seeing at most micro_batch pairs at a
        time.

        In parts: features of all pairs without a graph, the loss and its gradient in them, then
        each part again with a graph (Gao et al. 2021, GradCache, arXiv 2101.06983). For models
        without batch statistics that is the gradient of the whole.
        """
        config = self.config
        size = config.micro_batch or len(ids)
        longest = len(ids)
        if config.select is not None:
            ids, inputs, refs, longest = self._select(ids, inputs, refs, size)
        if config.loss not in REFERRED:
            refs = (None, None)
        # all processes go the same way, as both have collectives of their own
        whole = longest <= size
        both = self._features(*inputs, 0) if whole else self._seen(inputs, size)
        features = [x[: len(ids)] for x in both]  # (b, e) each
        image, text = (x.detach().requires_grad_() for x in features)
        began = self._now()
        gamma = self._gamma(self.step // self.order.per_epoch)
        theirs = {"ref_image": refs[0], "ref_text": refs[1]}
        loss = self.loss(image, text, ids=ids, **theirs, gamma=gamma)
        loss.backward()
        self.loss_seconds = self._now() - began
        self.seen = (loss.detach(), image.detach(), theirs)
        assert image.grad is not None
        assert text.grad is not None
        if whole:
            torch.autograd.backward(features, [image.grad, text.grad])
            return loss.detach()
        parts = list(zip(*(x.split(size) for x in (*inputs, image.grad, text.grad))))
        for number, (pixels, tokens, d_image, d_text) in enumerate(parts):
            last = self.world.size == 1 or number == len(parts) - 1
            with nullcontext() if last else self.model.no_sync():
                again = self._features(pixels, tokens, number)
                features = [x[: len(d_image)] for x in again]
                torch.autograd.backward(features, [d_image, d_text])
        return loss.detach()

    def _seen(self, inputs: tuple[Tensor, Tensor], size: int) -> tuple[Tensor, Tensor]:
        """Features without a graph."""
        pixels, tokens = (x.split(size) for x in inputs)
        parts = enumerate(zip(pixels, tokens))
        with torch.no_grad():
            found = [self._features(*part, number) for number, part in parts]
        images, texts = zip(*found)
        return torch.cat(images), torch.cat(texts)

    def _select(
        self,
        ids: Tensor,  # (b,)
        inputs: tuple[Tensor, Tensor],  # (b, 3, H, W), (b, L)
        refs: tuple[Tensor | None, Tensor | None],  # (b, e_ref) each
        size: int,
    ) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor], int]:
        """This process's pairs of those that are picked from the joint batch, and the most that a
        process has.

        Where it has none its inputs are one pair still, as models take no empty batch and DDP waits
        for every process.
        """
        ref_image, ref_text = refs
        assert ref_image is not None
        assert ref_text is not None
        assert self.config.select is not None
        batch = JointBatch(self.world, len(ids))
        ours = [batch.join(x) for x in self._seen(inputs, size)]
        theirs = [batch.join(ref_image), batch.join(ref_text)]
        draws = torch.Generator(ids.device)
        draws.manual_seed(seed_of(self.config.seed, "select", self.step))
        tau = self._temperature()
        keep = self.config.loss_pairs
        kept = select_learnable(
            ours[0], ours[1], theirs[0], theirs[1], keep, temperature=tau, generator=draws
        )
        self.world.broadcast_(kept)  # GPUs of two kinds may round differently
        owner = kept // len(ids)
        mine = kept[owner == self.world.rank] - batch.offset
        longest = int(owner.bincount().max())
        run = mine if len(mine) else mine.new_zeros(1)
        pixels, tokens = inputs
        chosen = (pixels[run], tokens[run])
        return ids[mine], chosen, (ref_image[mine], ref_text[mine]), longest

    def _gamma(self, epoch: int) -> float:
        return gamma_of(self.config, epoch, -(-self.total // self.order.per_epoch))

    def measure(self) -> dict[str, float]:
        every = self.config.evaluate_every or self.order.per_epoch
        if not self.validation or (self.step % every and self.step != self.total):
            return {}
        for buffer in self.clip.model.buffers():  # of batch norms each process has its own
            self.world.broadcast_(buffer)
        found = {"samples": self.step * self.config.batch_size}
        for name, dataset in self.validation.items():
            scores = evaluate(
                self.clip, dataset, templates=self.templates, workers=self.workers, world=self.world
            )
            found |= {f"{name}/{key}": value for key, value in scores.items()}
        return found
