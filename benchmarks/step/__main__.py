"""The whole training step of an SAE against plain torch, SAELens, dictionary_learning and sparsify.

    pip install -e '.[bench-peers]'
    OMP_NUM_THREADS=1 python -m benchmarks.step --out benchmarks/results/sae_step-cpu-1-thread.json
    OMP_NUM_THREADS=1 python -m benchmarks.step --architecture batch_topk matryoshka jumprelu --out codes.json
    python -m benchmarks.step --device cuda --autocast --n 49152 --batch 4096 \\
        --out benchmarks/results/sae_step-gpu.json

Each library takes its own step on its own trainer (sparsify's sits inside a loop over a language model, so the methods
that it calls are called in its order). All have the same weights, batches and Adam: dense, betas 0.9 and 0.999, torch's
fused kernel, which SAELens and dictionary_learning do not switch on by themselves; sparsify's own choice is signum. No
feature is dead, so AuxK is 0 everywhere. Clipping, unit norm and the projection of the gradient are each library's own.

matryoshka is batch_topk trained at four widths, n/16, n/4, n/2 and n; jumprelu has k active features a row on average.

With ``--autocast`` weights stay in float32 and the forward runs in bfloat16 where autocast says so, by each library's
own switch or habit.

Before any time is taken, loss and gradients of every contender are held to those of the formula in float64.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Mapping
from importlib.metadata import version
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.step.contenders import MAKERS, Contender
from benchmarks.step.problem import LR, Mode, Task, problem, truth_of
from clipsteer.io.files import read_safetensors
from clipsteer.testing import bench

ARCHITECTURES = ("topk", "batch_topk", "matryoshka", "jumprelu")
# Of the loss and of a gradient's norm. In float32 contenders are at 1e-6 and less, and one other feature in a row would
# show as 1e-2. Under autocast rounding itself exchanges a feature or so in a row: contenders are at 2e-3 and 0.18 (with
# TF32's rounding, as simulated, at 4e-4 and 0.03), b_dec's gradient without the encoder's part at 0.5 and more, that of
# half or of other features at 0.7 and more.
TOLERANCE = {"float32": (1e-5, 1e-5), "tf32": (1e-3, 0.1), "bfloat16": (5e-3, 0.4)}
TOGETHER = 4  # steps that are timed as one on a GPU, where the next one begins while the last one runs


def gate(
    name: str,
    contender: Contender,
    task: Task,
    x: Tensor,
    loss: Tensor,
    truth: Mapping[str, Tensor],
    mode: Mode,
) -> float:
    """Take a step, held to loss and gradients in float64; returns the worst relative error of a gradient (in norm).

    Libraries scale the squared error in two ways: the whole of it over the variance, or the mean over the rows; and
    they take the mean or the sum over the widths of a Matryoshka SAE, or the mean of what is weighted so already.
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
    variance = float((x - x.double().mean(0)).square().sum() / len(x))
    widths = len(task.prefixes)
    scales = [s * of_widths for s in (1.0, variance) for of_widths in (1.0, widths, 1 / widths)]
    scale = min(scales, key=lambda s: abs(taken - s * float(loss)))
    off, errors = abs(taken / (scale * float(loss)) - 1), {}
    for key, true in truth.items():
        gradient = contender.ours(key, found[key]).double() / scale
        errors[key] = float(torch.linalg.vector_norm(gradient - true) / torch.linalg.vector_norm(true))
    of_loss, of_gradient = TOLERANCE[mode.precision]
    if not (off <= of_loss and max(errors.values()) <= of_gradient):
        raise RuntimeError(f"benchmarks.step: {name} computes something else, and is not timed: loss {off}, {errors}")
    # Adam's first step moves each weight that has a gradient by about the learning rate
    for key, parameter in contender.parameters.items():
        moved = float((parameter.detach() - before[key]).abs().max())
        rate = LR * contender.threshold_rate if key == "threshold" else LR
        if not 0.5 * rate <= moved <= 2 * rate:
            raise RuntimeError(f"benchmarks.step: {name} moved {key} by {moved}, its learning rate is {rate}")
    return max(off, *errors.values())


def _dense(grad: Tensor) -> Tensor:
    return grad.to_dense() if grad.is_sparse else grad.clone()


def run(
    task: Task,
    rows: int,
    mode: Mode,
    names: list[str],
    repeats: int,
    rates: tuple[float, float],
    tokens: Tensor | None = None,
) -> list[dict]:
    label = f"n{task.n}-B{rows}-k{task.k}"
    op = "sae step" if task.architecture == "topk" else f"{task.architecture} step"
    if tokens is not None:
        op = f"{op}, real tokens"
    weights, batches = problem(task, rows, 6, mode.device, tokens)
    contenders, turns, calls, errors = {}, {name: [0] for name in names}, {}, {}

    def turn(name: str) -> Tensor:
        # the same batches in the same order for everyone
        turns[name][0] += 1
        return batches[(turns[name][0] - 1) % len(batches)]

    loss, truth = truth_of(task, weights, batches[0])
    for name in names:
        try:
            contender = MAKERS[name][1](task, mode, lambda name=name: turn(name)).load(weights)
            turns[name][0] = 0
            errors[name] = gate(name, contender, task, batches[0], loss, truth, mode)
        except (NotImplementedError, torch.OutOfMemoryError) as error:
            sys.stderr.write(f"{name} is left out of {op}: {str(error).splitlines()[0]}\n")
            continue
        contenders[name], calls[name] = contender, contender.step
    del truth
    base = next(iter(calls), "")
    memory = {name: bench.extra_memory(call, mode.device) for name, call in calls.items()}
    together = 1 if mode.device == "cpu" else TOGETHER
    several = {name: lambda step=step: [step() for _ in range(together)] for name, step in calls.items()}
    times = bench.measure(several, mode.device, repeats, label, base)
    # the encoder's product, then weights and both moments read and written once
    size = task.n * task.d
    floor = 2 * rows * size / rates[0] + 24 * 2 * size / rates[1]
    records = []
    for name, found in times.items():
        found["seconds"] /= together
        record = {"op": op, "shape": label, "B": rows, "d": task.d, "n": task.n, "k": task.k, "pass": "step"}
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
    parser.add_argument("--architecture", nargs="+", choices=ARCHITECTURES, default=["topk"])
    parser.add_argument("--tokens", type=Path, metavar="FILE", help="of benchmarks.real_vit.tokens, in place of noise")
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
    tokens = None
    if args.tokens is not None:
        tokens = read_safetensors(args.tokens)["tokens"].float()
    d = args.d if tokens is None else tokens.shape[1]
    for architecture, n, rows, k in product(args.architecture, args.n, args.batch, args.k):
        records += run(Task(architecture, d, n, k), rows, mode, names, args.repeats, rates, tokens)
        if args.out is not None:
            bench.write(args.out, records, args.device)
    sys.stdout.write(bench.table(records) + "\n")


if __name__ == "__main__":
    main()
