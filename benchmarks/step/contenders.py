"""The steps to be timed. Each library takes its own step on its own trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.step.problem import BANDWIDTH, L0_WEIGHT, LR, NAMES, Batches, Mode, Task, dense_loss, fvu
from clipsteer import ops
from clipsteer.sae.config import TrainConfig
from clipsteer.sae.model import SAE
from clipsteer.sae.trainer import SAETrainer


class Contender:
    """A step to be timed: what a call does, its parameters under our names, which of theirs are transposed, and how
    many learning rates the threshold moves by."""

    def __init__(
        self,
        step: Callable[[], Any],
        parameters: Mapping[str, nn.Parameter],
        transposed: str = "",
        threshold_rate: float = 1.0,
    ) -> None:
        self.step, self.parameters, self.transposed = step, dict(parameters), transposed
        self.threshold_rate = threshold_rate

    def ours(self, name: str, value: Tensor) -> Tensor:
        return value.T if name in self.transposed.split() else value

    def load(self, weights: Mapping[str, Tensor]) -> Contender:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.ours(name, weights[name]))
        return self


def named(module: nn.Module, task: Task) -> dict[str, nn.Parameter]:
    return {name: getattr(module, name) for name in task.names}


def spread_of(x: Tensor) -> float:
    """The mean squared distance of rows (B, d) from their mean."""
    return float((x - x.mean(0)).square().sum() / len(x))


def fuse(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group.update(lr=LR, fused=True, foreach=False)
        found = tuple(group["betas"]), group["eps"], group["weight_decay"], group["amsgrad"]
        assert found == ((0.9, 0.999), 1e-8, 0, False), found


def clipsteer_step(task: Task, mode: Mode, batches: Batches) -> Contender:
    nested = task.architecture == "matryoshka"
    more = {"matryoshka": task.prefixes} if nested else {}
    architecture = "batch_topk" if nested else task.architecture
    sae = SAE(task.d, task.n, architecture, task.k, **more).to(mode.device)
    # what its window and the steps of its thresholds are multiples of
    scale = spread_of(batches()) ** 0.5
    config = TrainConfig(
        lr=LR,
        warmup_steps=0,
        cosine=False,
        bandwidth=BANDWIDTH / scale,
        l0_coefficient=L0_WEIGHT,
        autocast="bfloat16" if mode.mixed else "none",
    )
    trainer = SAETrainer(sae, config, 1000)
    return Contender(lambda: trainer.step(batches())[0], named(sae, task), threshold_rate=scale)


def clipsteer_lazy(task: Task, mode: Mode, batches: Batches) -> Contender:
    """Row-sparse gradients and SparseAdam: moments and weights of features that no row of the batch uses stay put."""
    if mode.mixed or task.architecture != "topk":
        raise NotImplementedError("written for topk in one precision")
    sae = SAE(task.d, task.n, k=task.k).to(mode.device)
    lazy = torch.optim.SparseAdam([sae.W_enc, sae.W_dec], lr=LR)
    dense = torch.optim.Adam([sae.b_enc, sae.b_dec], lr=LR, fused=True)

    def step() -> Tensor:
        x = batches()
        acts, indices = ops.topk_encode(x - sae.b_dec, sae.W_enc, sae.b_enc, k=task.k, sparse_grad=True)
        loss = fvu(x, ops.sparse_decode(acts, indices, sae.W_dec, sae.b_dec, sparse_grad=True))
        loss.backward()
        with torch.no_grad():
            grads = [p.grad._values() if p.grad.is_sparse else p.grad for p in sae.parameters()]
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))
            for grad in grads:
                grad.mul_((1 / (norm + 1e-6)).clamp(max=1))
            used, rows = sae.W_dec.grad._indices()[0], sae.W_dec.grad._values()
            unit = sae.W_dec[used]
            rows.sub_((rows * unit).sum(-1, keepdim=True) * unit)
            for optimizer in (lazy, dense):
                optimizer.step()
                optimizer.zero_grad()
            rows = sae.W_dec[used]
            sae.W_dec[used] = rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        return loss

    return Contender(step, named(sae, task))


def project(W: Tensor, grad: Tensor) -> None:
    grad.sub_((grad * W).sum(-1, keepdim=True) * W)


def unit_rows(W: Tensor) -> None:
    W.div_(torch.linalg.vector_norm(W, dim=-1, keepdim=True))


def torch_step(task: Task, mode: Mode, batches: Batches, compiled: bool = False) -> Contender:
    """What clipsteer's step computes, in plain torch."""
    if compiled:
        torch.compiler.reset()  # after other sizes it would compile for varying ones
    made = torch.compile if compiled else lambda function: function
    loss_of, project_, unit_rows_ = made(partial(dense_loss, task=task)), made(project), made(unit_rows)
    shapes = {"W_enc": (task.n, task.d), "W_dec": (task.n, task.d), "b_dec": (task.d,)}
    parameters = {
        name: nn.Parameter(torch.empty(shapes.get(name, (task.n,)), device=mode.device)) for name in task.names
    }
    optimizer = torch.optim.Adam(parameters.values(), lr=LR, fused=True)

    def step() -> Tensor:
        with mode.autocast():
            loss = loss_of(batches(), *parameters.values())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        with torch.no_grad():
            project_(parameters["W_dec"], parameters["W_dec"].grad)
            optimizer.step()
            unit_rows_(parameters["W_dec"])
        optimizer.zero_grad()
        return loss

    return Contender(step, parameters)


def saelens_step(task: Task, mode: Mode, batches: Batches, sparse: bool = False) -> Contender:
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer as Trainer

    names = {
        "topk": "TopKTrainingSAE",
        "batch_topk": "BatchTopKTrainingSAE",
        "matryoshka": "MatryoshkaBatchTopKTrainingSAE",
        "jumprelu": "JumpReLUTrainingSAE",
    }
    settings: dict[str, Any] = {"d_in": task.d, "d_sae": task.n, "apply_b_dec_to_input": True, "device": mode.device}
    x = batches()
    if task.architecture == "jumprelu":
        if sparse:
            raise NotImplementedError("its jumprelu has no sparse code")
        # its reconstruction loss is the squared error of a row, ours that over the variance
        settings |= {"jumprelu_bandwidth": BANDWIDTH, "l0_coefficient": L0_WEIGHT * spread_of(x)}
    else:
        # by default pre-activations are scaled by the decoder's norms (1 here); a sparse code lacks that gradient
        settings |= {"k": task.k, "use_sparse_activations": sparse, "rescale_acts_by_decoder_norm": not sparse}
    if task.architecture == "matryoshka":
        settings["matryoshka_widths"] = list(task.prefixes)
    made = getattr(sae_lens, names[task.architecture])
    sae = made(getattr(sae_lens, names[task.architecture] + "Config")(**settings))
    trainer = Trainer(
        SAETrainerConfig(10_000_000, len(x), lr=LR, lr_end=LR, device=mode.device, autocast=mode.mixed), sae, iter(())
    )
    fuse(trainer.optimizer)
    return Contender(lambda: trainer.step(batches()).loss, named(sae, task), transposed="W_enc")


def dictionary_learning_step(task: Task, mode: Mode, batches: Batches) -> Contender:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    if task.architecture == "jumprelu":
        raise NotImplementedError("its jumprelu is trained on another loss")
    settings: dict[str, Any] = {"activation_dim": task.d, "dict_size": task.n, "k": task.k, "device": mode.device}
    trainers = {"topk": TopKTrainer, "batch_topk": BatchTopKTrainer, "matryoshka": MatryoshkaBatchTopKTrainer}
    if task.architecture == "matryoshka":
        starts = (0, *task.prefixes)
        settings["group_fractions"] = [(b - a) / task.n for a, b in zip(starts, task.prefixes)]
    trainer = trainers[task.architecture](steps=1_000_000, layer=0, lm_name="", lr=LR, warmup_steps=0, **settings)
    fuse(trainer.optimizer)
    ae = trainer.ae

    def step() -> Tensor:
        # its loop has the whole update under autocast; its first step (0) sets b_dec
        with mode.autocast():
            return torch.tensor(trainer.update(1, batches()))

    if task.architecture == "matryoshka":
        return Contender(step, named(ae, task), "W_enc")
    return Contender(step, dict(zip(NAMES, (ae.encoder.weight, ae.encoder.bias, ae.decoder.weight, ae.b_dec))), "W_dec")


def sparsify_step(task: Task, mode: Mode, batches: Batches) -> Contender:
    from sparsify import SparseCoder, SparseCoderConfig

    if task.architecture != "topk":
        raise NotImplementedError("it has top-k alone")
    sae = SparseCoder(task.d, SparseCoderConfig(num_latents=task.n, k=task.k), mode.device)
    if not mode.mixed:
        # on a GPU its forward is in bfloat16 always
        sae.forward = SparseCoder.forward.__wrapped__.__get__(sae)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR)
    fuse(optimizer)
    since_fired = torch.zeros(task.n, dtype=torch.long, device=mode.device)
    did_fire = torch.zeros(task.n, dtype=torch.bool, device=mode.device)

    def step() -> Tensor:
        x = batches()
        sae.set_decoder_norm_to_unit_norm()
        with mode.autocast():
            out = sae(x, total_variance=(x - x.mean(0)).pow(2).sum())
        did_fire[out.latent_indices.flatten()] = True
        out.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        since_fired.add_(len(x))
        since_fired[did_fire] = 0
        did_fire.zero_()
        return out.fvu

    return Contender(step, dict(zip(NAMES, (sae.encoder.weight, sae.encoder.bias, sae.W_dec, sae.b_dec))))


MAKERS: dict[str, tuple[str | None, Callable[..., Contender]]] = {
    "torch": (None, torch_step),
    "torch.compile": (None, partial(torch_step, compiled=True)),
    "clipsteer": (None, clipsteer_step),
    "clipsteer, lazy Adam": (None, clipsteer_lazy),
    "SAELens": ("sae_lens", saelens_step),
    "SAELens, sparse code": ("sae_lens", partial(saelens_step, sparse=True)),
    "dictionary_learning": ("dictionary_learning", dictionary_learning_step),
    "sparsify": ("sparsify", sparsify_step),
}
