"""The whole training step of a top-k SAE against plain torch, SAELens, dictionary_learning and sparsify.

    pip install -e '.[bench-peers]'
    OMP_NUM_THREADS=1 python benchmarks/bench_step.py --out benchmarks/results/sae_step-cpu-1-thread.json
    python benchmarks/bench_step.py --device cuda --autocast --n 49152 --batch 4096 \\
        --out benchmarks/results/sae_step-gpu.json

Each library takes its own step on its own trainer (sparsify's sits inside a loop over a language model, so the methods
that it calls are called in its order). All have the same weights, batches and Adam: dense, betas 0.9 and 0.999, torch's
fused kernel, which SAELens and dictionary_learning do not switch on by themselves; sparsify's own choice is signum. No
feature is dead, so AuxK is 0 everywhere. Clipping, unit norm and the projection of the gradient are each library's own.

With ``--autocast`` weights stay in float32 and the forward runs in bfloat16 where autocast says so, by each library's
own switch or habit; lazy Adam is left out, its row-sparse gradients are not cast.

Before any time is taken, loss and gradients of every contender are held to those of the formula in float64.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipsteer import ops
from clipsteer.sae.model import SAE
from clipsteer.sae.trainer import SAETrainer, TrainConfig
from clipsteer.testing import bench

LR = 2e-4
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
# Of the loss and of a gradient's norm. In float32 contenders are at 1e-6 and less, and one other feature in a row would
# show as 1e-2. Under autocast rounding itself exchanges a feature or so in a row: contenders are at 2e-3 and 0.18 (with
# TF32's rounding, as simulated, at 4e-4 and 0.03), b_dec's gradient without the encoder's part at 0.5 and more, that of
# half or of other features at 0.7 and more.
TOLERANCE = {"float32": (1e-5, 1e-5), "tf32": (1e-3, 0.1), "bfloat16": (5e-3, 0.4)}
TOGETHER = 4  # steps that are timed as one on a GPU, where the next one begins while the last one runs
Batches = Callable[[], Tensor]


class Mode(NamedTuple):
    """Where steps run, and in what their products are computed: float32, tf32 or bfloat16 (under autocast)."""

    device: str
    precision: str

    @property
    def mixed(self) -> bool:
        return self.precision == "bfloat16"

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.mixed)


class Contender:
    """A step to be timed: what a call does, its parameters under our names, and whether theirs are transposed."""

    def __init__(self, step: Callable[[], Any], parameters: Mapping[str, nn.Parameter], transposed: str = "") -> None:
        self.step, self.parameters, self.transposed = step, dict(parameters), transposed

    def ours(self, name: str, value: Tensor) -> Tensor:
        return value.T if name in self.transposed.split() else value

    def load(self, weights: Mapping[str, Tensor]) -> Contender:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.ours(name, weights[name]))
        return self


def fuse(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group.update(lr=LR, fused=True, foreach=False)
        found = tuple(group["betas"]), group["eps"], group["weight_decay"], group["amsgrad"]
        assert found == ((0.9, 0.999), 1e-8, 0, False), found


def clipsteer_step(d: int, n: int, k: int, mode: Mode, batches: Batches) -> Contender:
    sae = SAE(d, n, k=k).to(mode.device)
    config = TrainConfig(lr=LR, warmup_steps=0, cosine=False, autocast="bfloat16" if mode.mixed else "none")
    trainer = SAETrainer(sae, config, 1000)
    return Contender(lambda: trainer.step(batches())[0], {name: getattr(sae, name) for name in NAMES})


def clipsteer_lazy(d: int, n: int, k: int, mode: Mode, batches: Batches) -> Contender:
    """Row-sparse gradients and SparseAdam: moments and weights of features that no row of the batch uses stay put."""
    if mode.mixed:
        raise NotImplementedError("row-sparse gradients are not cast under autocast")
    sae = SAE(d, n, k=k).to(mode.device)
    lazy = torch.optim.SparseAdam([sae.W_enc, sae.W_dec], lr=LR)
    dense = torch.optim.Adam([sae.b_enc, sae.b_dec], lr=LR, fused=True)

    def step() -> Tensor:
        x = batches()
        acts, indices = ops.topk_encode(x - sae.b_dec, sae.W_enc, sae.b_enc, k=k, sparse_grad=True)
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

    return Contender(step, {name: getattr(sae, name) for name in NAMES})


def fvu(x: Tensor, x_hat: Tensor) -> Tensor:
    return (x_hat - x).square().sum() / (x - x.mean(0)).square().sum()


def dense_loss(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, k: int) -> Tensor:
    """The formula: FVU of the reconstruction from the k largest pre-activations of each row."""
    pre = F.linear(x - b_dec, W_enc, b_enc)
    values, indices = torch.topk(pre, k)
    code = torch.zeros_like(pre).scatter(-1, indices, torch.relu(values))
    return fvu(x, code @ W_dec + b_dec)


def project(W: Tensor, grad: Tensor) -> None:
    grad.sub_((grad * W).sum(-1, keepdim=True) * W)


def unit_rows(W: Tensor) -> None:
    W.div_(torch.linalg.vector_norm(W, dim=-1, keepdim=True))


def torch_step(d: int, n: int, k: int, mode: Mode, batches: Batches, compiled: bool = False) -> Contender:
    """What clipsteer's step computes, in plain torch."""
    if compiled:
        torch.compiler.reset()  # after other sizes it would compile for varying ones
    made = torch.compile if compiled else lambda function: function
    loss_of, project_, unit_rows_ = made(dense_loss), made(project), made(unit_rows)
    shapes = zip(NAMES, ((n, d), (n,), (n, d), (d,)))
    parameters = {name: nn.Parameter(torch.empty(shape, device=mode.device)) for name, shape in shapes}
    optimizer = torch.optim.Adam(parameters.values(), lr=LR, fused=True)

    def step() -> Tensor:
        with mode.autocast():
            loss = loss_of(batches(), *parameters.values(), k)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        with torch.no_grad():
            project_(parameters["W_dec"], parameters["W_dec"].grad)
            optimizer.step()
            unit_rows_(parameters["W_dec"])
        optimizer.zero_grad()
        return loss

    return Contender(step, parameters)


def saelens_step(d: int, n: int, k: int, mode: Mode, batches: Batches, sparse: bool = False) -> Contender:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer as Trainer

    # by default pre-activations are scaled by the decoder's norms (1 here); a sparse code lacks that gradient on CPUs
    config = TopKTrainingSAEConfig(
        d_in=d, d_sae=n, k=k, apply_b_dec_to_input=True, use_sparse_activations=sparse,
        rescale_acts_by_decoder_norm=not sparse, device=mode.device,
    )  # fmt: skip
    sae = TopKTrainingSAE(config)
    rows = len(batches())
    settings = SAETrainerConfig(10_000_000, rows, lr=LR, lr_end=LR, device=mode.device, autocast=mode.mixed)
    trainer = Trainer(settings, sae, iter(()))
    fuse(trainer.optimizer)
    return Contender(
        lambda: trainer.step(batches()).loss, {name: getattr(sae, name) for name in NAMES}, transposed="W_enc"
    )


def dictionary_learning_step(d: int, n: int, k: int, mode: Mode, batches: Batches) -> Contender:
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=1_000_000, activation_dim=d, dict_size=n, k=k, layer=0, lm_name="", lr=LR, warmup_steps=0,
        device=mode.device,
    )  # fmt: skip
    fuse(trainer.optimizer)
    parameters = trainer.ae.encoder.weight, trainer.ae.encoder.bias, trainer.ae.decoder.weight, trainer.ae.b_dec

    def step() -> Tensor:
        # its loop has the whole update under autocast; its first step (0) sets b_dec
        with mode.autocast():
            return torch.tensor(trainer.update(1, batches()))

    return Contender(step, dict(zip(NAMES, parameters)), "W_dec")


def sparsify_step(d: int, n: int, k: int, mode: Mode, batches: Batches) -> Contender:
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(d, SparseCoderConfig(num_latents=n, k=k), mode.device)
    if not mode.mixed:
        # on a GPU its forward is in bfloat16 always
        sae.forward = SparseCoder.forward.__wrapped__.__get__(sae)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR)
    fuse(optimizer)
    since_fired, did_fire = (torch.zeros(n, dtype=dtype, device=mode.device) for dtype in (torch.long, torch.bool))

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
    "torch.compile": (None, lambda *a: torch_step(*a, compiled=True)),
    "clipsteer": (None, clipsteer_step),
    "clipsteer, lazy Adam": (None, clipsteer_lazy),
    "SAELens": ("sae_lens", saelens_step),
    "SAELens, sparse code": ("sae_lens", lambda *a: saelens_step(*a, sparse=True)),
    "dictionary_learning": ("dictionary_learning", dictionary_learning_step),
    "sparsify": ("sparsify", sparsify_step),
}


def problem(
    d: int, n: int, k: int, rows: int, count: int, device: str = "cpu", seed: int = 0
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Weights with unit decoder rows, and batches in whose rows the k-th feature is told from the next one by more
    than rounding, so that every contender has to select the same."""
    draw = partial(torch.randn, generator=torch.Generator(device).manual_seed(seed), device=device)
    W_dec = F.normalize(draw(n, d), dim=1)
    W_enc = W_dec + 0.1 * d**-0.5 * draw(n, d)
    b_enc, b_dec = 0.05 * draw(n), 0.1 * draw(d)
    weights = dict(zip(NAMES, (W_enc, b_enc, W_dec, b_dec)))
    batches = []
    for _ in range(count):
        x = draw(rows + rows // 4 + 8, d)
        top = F.linear((x - b_dec).double(), W_enc.double(), b_enc.double()).topk(k + 1).values
        apart = (top[:, -2] - top[:, -1] > 1e-4 * top[:, 0]).nonzero().flatten()
        if len(apart) < rows:
            raise RuntimeError(f"bench_step: only {len(apart)} rows have a clear k-th feature, {rows} are needed")
        batches.append(x[apart[:rows]].contiguous())
    return weights, batches


def gate(name: str, contender: Contender, x: Tensor, loss: Tensor, truth: Mapping[str, Tensor], mode: Mode) -> float:
    """Take a step, held to loss and gradients in float64; returns the worst relative error of a gradient (in norm).

    Libraries scale the squared error in two ways: the whole of it over the variance, or the mean over the rows.
    """
    found: dict[str, Tensor] = {}
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: found.__setitem__(name, _dense(p.grad)))
        for name, parameter in contender.parameters.items()
    ]
    before = {key: parameter.detach().clone() for key, parameter in contender.parameters.items()}
    taken = float(contender.step().detach())
    for hook in hooks:
        hook.remove()
    mean = loss * (x - x.double().mean(0)).square().sum() / len(x)
    scale = min((1.0, float(mean / loss)), key=lambda s: abs(taken - s * float(loss)))
    off, errors = abs(taken / (scale * float(loss)) - 1), {}
    for key in NAMES:
        gradient = contender.ours(key, found[key]).double() / scale
        errors[key] = float(torch.linalg.vector_norm(gradient - truth[key]) / torch.linalg.vector_norm(truth[key]))
    of_loss, of_gradient = TOLERANCE[mode.precision]
    if not (off <= of_loss and max(errors.values()) <= of_gradient):
        raise RuntimeError(f"bench_step: {name} computes something else, and is not timed: loss {off}, {errors}")
    # Adam's first step moves each weight that has a gradient by about the learning rate
    for key, parameter in contender.parameters.items():
        moved = float((parameter.detach() - before[key]).abs().max())
        if not 0.5 * LR <= moved <= 2 * LR:
            raise RuntimeError(f"bench_step: {name} moved {key} by {moved}, its learning rate is {LR}")
    return max(off, *errors.values())


def _dense(grad: Tensor) -> Tensor:
    return grad.to_dense() if grad.is_sparse else grad.clone()


def truth_of(weights: Mapping[str, Tensor], x: Tensor, k: int) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {name: weights[name].double().requires_grad_() for name in NAMES}
    loss = dense_loss(x.double(), *leaves.values(), k)
    loss.backward()
    return loss.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def run(
    d: int, n: int, k: int, rows: int, mode: Mode, names: list[str], repeats: int, rates: tuple[float, float]
) -> list[dict]:
    label = f"n{n}-B{rows}-k{k}"
    weights, batches = problem(d, n, k, rows, 6, mode.device)
    contenders, turns, calls, errors = {}, {name: [0] for name in names}, {}, {}

    def turn(name: str) -> Tensor:
        # the same batches in the same order for everyone
        turns[name][0] += 1
        return batches[(turns[name][0] - 1) % len(batches)]

    loss, truth = truth_of(weights, batches[0], k)
    for name in names:
        try:
            contender = MAKERS[name][1](d, n, k, mode, lambda name=name: turn(name)).load(weights)
            turns[name][0] = 0
            errors[name] = gate(name, contender, batches[0], loss, truth, mode)
        except (NotImplementedError, torch.OutOfMemoryError) as error:
            sys.stderr.write(f"{name} is left out: {str(error).splitlines()[0]}\n")
            continue
        contenders[name], calls[name] = contender, contender.step
    del truth
    base = next(iter(calls), "")
    memory = {name: bench.extra_memory(call, mode.device) for name, call in calls.items()}
    together = 1 if mode.device == "cpu" else TOGETHER
    several = {name: lambda step=step: [step() for _ in range(together)] for name, step in calls.items()}
    times = bench.measure(several, mode.device, repeats, label, base)
    # the encoder's product, then weights and both moments read and written once
    floor = 2 * rows * n * d / rates[0] + 24 * 2 * n * d / rates[1]
    records = []
    for name, found in times.items():
        found["seconds"] /= together
        record = {"op": "sae step", "shape": label, "B": rows, "d": d, "n": n, "k": k, "pass": "step"}
        record |= {"precision": mode.precision, "contender": name, "baseline": base}
        record |= {**found, "floor_share": floor / found["seconds"]}
        if "torch.compile" in times:
            record["speedup_compiled"] = times["torch.compile"]["seconds"] / found["seconds"]
        record |= {"extra_bytes": memory[name], "gradient_error": errors[name]}
        if package := MAKERS[name][0]:
            record["version"] = version({"sae_lens": "sae-lens", "sparsify": "eai-sparsify"}.get(package, package))
        records.append(record)
    return records


def usable(names: list[str], mode: Mode) -> list[str]:
    # sparsify's decoder then uses F.embedding_bag: the Triton one needs a GPU
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1" if mode.device == "cpu" else "0"
    found = []
    for name in names:
        if package := MAKERS[name][0]:
            try:
                importlib.import_module(package)
            except ImportError as error:
                sys.stderr.write(f"{name} is left out: {error}\n")
                continue
        found.append(name)
    if "nnsight" in sys.modules:
        # dictionary_learning brings it, and what it puts in place of parts of torch breaks torch.compile
        sys.modules["nnsight"].DEFAULT_PATCHER.__exit__(None, None, None)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", nargs="+", type=int, default=[12288, 49152])
    parser.add_argument("--batch", nargs="+", type=int, default=[256])
    parser.add_argument("--k", nargs="+", type=int, default=[32, 64])
    parser.add_argument("--d", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--autocast", action="store_true", help="forward in bfloat16, weights in float32")
    precision.add_argument("--tf32", action="store_true", help="TF32 in float32 products on a GPU")
    parser.add_argument("--contenders", nargs="+", choices=list(MAKERS), default=list(MAKERS))
    parser.add_argument("--out", type=Path, help="a .json or .csv file")
    args = parser.parse_args()
    if args.tf32 and args.device == "cpu":
        parser.error("--tf32 is for a GPU")
    mode = Mode(args.device, "bfloat16" if args.autocast else "tf32" if args.tf32 else "float32")
    if args.tf32:
        torch.set_float32_matmul_precision("high")
    dtype = torch.bfloat16 if args.autocast else torch.float32
    names, records, rates = usable(args.contenders, mode), [], bench.ceilings(args.device, dtype)
    for n in args.n:
        for rows in args.batch:
            for k in args.k:
                records += run(args.d, n, k, rows, mode, names, args.repeats, rates)
                if args.out is not None:
                    bench.write(args.out, records, args.device)
    sys.stdout.write(bench.table(records) + "\n")


if __name__ == "__main__":
    main()
