"""What every contender has to compute: an architecture, its weights and batches, loss and gradients in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LR = 2e-4
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
BANDWIDTH, L0_WEIGHT = 0.05, 1e-3
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


class Task(NamedTuple):
    """The sizes of an SAE and how it is sparse."""

    architecture: str
    d: int
    n: int
    k: int  # features a row, on average for all but topk

    @property
    def prefixes(self) -> tuple[int, ...]:
        """The widths that a Matryoshka SAE is trained at; otherwise the whole alone."""
        return (self.n // 16, self.n // 4, self.n // 2, self.n) if self.architecture == "matryoshka" else (self.n,)

    @property
    def names(self) -> tuple[str, ...]:
        return (*NAMES, "threshold") if self.architecture == "jumprelu" else NAMES


def codes(pre: Tensor, task: Task, threshold: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Dense codes (B, n) of pre-activations, and the L0 of the batch as far as it has a gradient.

    jumprelu: the threshold's gradients by the rectangle estimator of Rajamanoharan et al. 2024 (arXiv 2407.14435), as
    terms of value 0.
    """
    if task.architecture == "topk":
        values, indices = torch.topk(pre, task.k)
        return torch.zeros_like(pre).scatter(-1, indices, torch.relu(values)), pre.new_zeros(())
    if threshold is None:
        values, indices = torch.topk(pre.flatten(), task.k * len(pre), sorted=False)
        return torch.zeros_like(pre).flatten().scatter(-1, indices, torch.relu(values)).view_as(pre), pre.new_zeros(())
    limit = threshold.detach()
    band = ((pre.detach() - limit).abs() < BANDWIDTH / 2).to(pre.dtype) / BANDWIDTH
    moved = band * (threshold - limit)
    active = (pre > limit).to(pre.dtype)
    return pre * active - limit * moved, (active - moved).sum() / len(pre)


def fvu(x: Tensor, x_hat: Tensor) -> Tensor:
    return (x_hat - x).square().sum() / (x - x.mean(0)).square().sum()


def dense_loss(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    threshold: Tensor | None = None,
    *,
    task: Task,
) -> Tensor:
    """The formula: FVU of the reconstruction, the mean of those of all prefixes; for jumprelu L0 is added."""
    code, l0 = codes(F.linear(x - b_dec, W_enc, b_enc), task, threshold)
    loss = torch.stack([fvu(x, code[:, :width] @ W_dec[:width] + b_dec) for width in task.prefixes]).mean()
    return loss if threshold is None else loss + L0_WEIGHT * l0


def truth_of(task: Task, weights: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients in float64."""
    leaves = {name: weights[name].double().requires_grad_() for name in task.names}
    loss = dense_loss(x.double(), *leaves.values(), task=task)
    loss.backward()
    return loss.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def problem(
    task: Task, rows: int, count: int, device: str = "cpu", tokens: Tensor | None = None, seed: int = 0
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Weights with unit decoder rows, and batches in which what is selected is told from the rest by more than
    rounding, so that every contender has to select the same. Batches are Gaussian, or drawn from ``tokens``."""
    generator = torch.Generator(device).manual_seed(seed)
    draw = partial(torch.randn, generator=generator, device=device)
    W_dec = F.normalize(draw(task.n, task.d), dim=1)
    W_enc = W_dec + 0.1 * task.d**-0.5 * draw(task.n, task.d)
    b_enc, b_dec = 0.05 * draw(task.n), 0.1 * draw(task.d)
    if tokens is not None:
        b_dec = tokens.mean(0).to(device)
    weights = dict(zip(NAMES, (W_enc, b_enc, W_dec, b_dec)))

    def rows_of(number: int) -> Tensor:
        if tokens is None:
            return draw(number, task.d)
        return tokens[torch.randint(len(tokens), (number,), generator=torch.Generator().manual_seed(seed))].to(device)

    batches: list[Tensor] = []
    for _ in range(20 * count):
        seed += 1
        x = rows_of(rows + rows // 4 + 8)
        pre = F.linear((x - b_dec).double(), W_enc.double(), b_enc.double())
        if task.architecture == "topk":
            top = pre.topk(task.k + 1).values
            apart = (top[:, -2] - top[:, -1] > 1e-4 * top[:, 0]).nonzero().flatten()
            usable = len(apart) >= rows
        else:
            apart = torch.arange(rows, device=device)
            edges = pre[:rows].flatten().topk(task.k * rows + 1).values[-2:]
            usable = bool(edges[0] - edges[1] > 1e-5)
            if task.architecture == "jumprelu":
                # one limit for all batches, set by the first
                limit = weights.setdefault("threshold", edges.mean().float().expand(task.n).contiguous())[0].double()
                off = [(pre[:rows] - limit - side).abs().min() for side in (0, -BANDWIDTH / 2, BANDWIDTH / 2)]
                usable = bool(min(off) > 2e-6)
        if usable:
            batches.append(x[apart[:rows]].contiguous())
        if len(batches) == count:
            return weights, batches
    raise RuntimeError(f"benchmarks.step: of {20 * count} batches {len(batches)} have a clear selection, not {count}")
