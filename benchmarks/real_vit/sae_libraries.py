"""Top-k SAEs of several libraries, trained alike: each by its own trainer, from its own first weights, with its own
other settings, on the same batches; what it has learned comes back as an SAE of ours, so that all are judged alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipsteer.sae.config import TrainConfig
from clipsteer.sae.model import SAE
from clipsteer.sae.trainer import SAETrainer


class Job(NamedTuple):
    """A run: the learning rate at its peak, its course ("default": as the library would; "linear": down to 0 from the
    first step), how many steps, the seed of weights and order, and settings of ours that are not the default."""

    library: str
    lr: float | None
    schedule: str
    steps: int
    seed: int
    batch: int
    d: int
    n: int
    k: int
    settings: Mapping[str, Any] = {}


class Trained(NamedTuple):
    """A run that has not begun: what takes the next batches, and what has been learned so far."""

    train: Callable[[Sequence[Tensor]], None]
    learned: Callable[[], SAE]


def _sae(job: Job, tensors: Mapping[str, Tensor], **settings: Any) -> SAE:
    sae = SAE(job.d, job.n, settings.pop("architecture", "topk"), job.k, **settings)
    sae.load_state_dict({name: tensor.detach().clone() for name, tensor in tensors.items()})
    return sae.eval()


def clipsteer(job: Job, first: Tensor) -> Trained:
    settings = dict(job.settings)
    if job.lr is not None:
        settings["lr"] = job.lr
    if job.schedule == "linear":
        settings |= {"schedule": "linear", "warmup_steps": 0}
    config = TrainConfig(d_sae=job.n, k=job.k, steps=job.steps, batch_size=job.batch, **settings)
    sae = SAE(job.d, job.n, config.architecture, job.k)
    with torch.no_grad():
        sae.W_enc.mul_(config.fitted(job.steps, job.n).encoder_scale or 1.0)
    sae.init_b_dec_(first)
    sae.init_threshold_(first, job.k)
    trainer = SAETrainer(sae, config, job.steps)

    def train(batches: Sequence[Tensor]) -> None:
        for x in batches:
            trainer.step(x)

    return Trained(train, lambda: _sae(job, sae.state_dict(), architecture=config.architecture))


def saelens(job: Job, first: Tensor) -> Trained:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer as Trainer

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=job.d, d_sae=job.n, k=job.k))
    course = {"lr_decay_steps": job.steps - 1} if job.schedule == "linear" else {}
    config = SAETrainerConfig(job.steps * job.batch, job.batch, lr=job.lr or 3e-4, lr_end=job.lr or 3e-4, **course)
    trainer = Trainer(config, sae, iter(()))

    def train(batches: Sequence[Tensor]) -> None:
        for x in batches:
            trainer.step(x)
            trainer.n_training_steps += 1

    def learned() -> SAE:
        # it picks the largest of what is scaled by the norms of the decoder's rows
        norms = sae.W_dec.norm(dim=1, keepdim=True)
        tensors = {
            "W_enc": sae.W_enc.T * norms,
            "b_enc": sae.b_enc * norms[:, 0],
            "W_dec": sae.W_dec / norms,
            "b_dec": sae.b_dec,
        }
        return _sae(job, tensors, apply_b_dec_to_input=sae.cfg.apply_b_dec_to_input)

    return Trained(train, learned)


def dictionary_learning(job: Job, first: Tensor) -> Trained:
    from dictionary_learning.trainers.top_k import TopKTrainer

    # its warm-up of 1,000 steps is longer than some of the runs
    course = {"warmup_steps": 0, "decay_start": 1} if job.schedule == "linear" else {"warmup_steps": 0}
    trainer = TopKTrainer(
        job.steps, job.d, job.n, job.k, layer=0, lm_name="", lr=job.lr, device="cpu", seed=job.seed, **course
    )
    taken = 0

    def train(batches: Sequence[Tensor]) -> None:
        nonlocal taken
        for x in batches:
            trainer.update(taken, x)
            taken += 1

    def learned() -> SAE:
        ae = trainer.ae
        tensors = {
            "W_enc": ae.encoder.weight,
            "b_enc": ae.encoder.bias,
            "W_dec": ae.decoder.weight.T,
            "b_dec": ae.b_dec,
        }
        return _sae(job, tensors)

    return Trained(train, learned)


def overcomplete(job: Job, first: Tensor) -> Trained:
    import overcomplete.sae as library

    sae = library.TopKSAE(job.d, job.n, top_k=job.k)
    optimizer = torch.optim.Adam(sae.parameters(), lr=job.lr or 5e-4)  # as in its README, as is the criterion
    course = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1 - step / job.steps if job.schedule == "linear" else 1.0
    )

    def criterion(x: Tensor, x_hat: Tensor, pre_codes: Tensor, codes: Tensor, dictionary: Tensor) -> Tensor:
        return (x - x_hat).square().mean()

    def train(batches: Sequence[Tensor]) -> None:
        library.train_sae(sae, batches, criterion, optimizer, course, nb_epochs=1, monitoring=0)

    def learned() -> SAE:
        linear = sae.encoder.final_block[0]
        tensors = {
            "W_enc": linear.weight,
            "b_enc": linear.bias,
            "W_dec": sae.get_dictionary(),
            "b_dec": torch.zeros(job.d),
        }
        return _sae(job, tensors, apply_b_dec_to_input=False)

    return Trained(train, learned)


# what is imported, what is installed, and what trains
LIBRARIES: dict[str, tuple[str, str, Callable[[Job, Tensor], Trained]]] = {
    "clipsteer": ("clipsteer", "clipsteer", clipsteer),
    "SAELens": ("sae_lens", "sae-lens", saelens),
    "dictionary_learning": ("dictionary_learning", "dictionary_learning", dictionary_learning),
    "overcomplete": ("overcomplete", "overcomplete", overcomplete),
}


def started(job: Job, first: Tensor) -> Trained:
    """A run with first weights by the job's seed; ``first`` (batch, d) is the batch it will begin with."""
    os.environ.setdefault("WANDB_MODE", "disabled")
    torch.manual_seed(job.seed)
    return LIBRARIES[job.library][2](job, first)


def versions(names: Sequence[str]) -> dict[str, str]:
    """The versions of the libraries that are there."""
    return {name: version(LIBRARIES[name][1]) for name in names}
