"""Kernels' definitions, right twins of them, and twins with one bug each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.testing import Cases

Function = Callable[..., Any]


@dataclass(frozen=True)
class Kernel:
    """A definition, how cases are drawn for it, the sizes it is used at, a right twin and wrong ones."""

    name: str
    reference: Function
    cases: Cases
    usual: dict[str, int]
    right: dict[str, Function]
    wrong: dict[str, Function] = field(default_factory=dict)

    def typical(self) -> Cases:
        """One size, as users try."""
        return Cases(self.cases.shapes, [self.usual], self.cases.fixed)


def with_backward(forward: Function, backward: Function) -> Function:
    """A function whose gradients are what ``backward(grad, *inputs)`` says."""

    class Custom(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            ctx.save_for_backward(*inputs)
            return forward(*inputs)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return backward(grad, *ctx.saved_tensors)

    return lambda **named: Custom.apply(*named.values())


def tiled(x: Tensor, w: Tensor, tile: int = 32, drop: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    """x wᵀ as a sum over tiles of the inner dimension; ``drop`` leaves a partial last one out."""
    out = torch.zeros(x.shape[0], w.shape[0], dtype=dtype or x.dtype)
    for at in range(0, x.shape[1], tile):
        if not (drop and at and at + tile > x.shape[1]):
            out = out + (x[:, at : at + tile] @ w[:, at : at + tile].T).to(out.dtype)
    return out.to(x.dtype)


def matmul() -> Kernel:
    def reference(x: Tensor, w: Tensor) -> Tensor:
        return x @ w.T

    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x @ w.T

    def one_element(x: Tensor, w: Tensor) -> Tensor:
        out = x @ w.T
        if out.numel() == 0:
            return out
        mask = torch.zeros_like(out)
        mask[-1, -1] = 1e-3
        return out + mask * out.detach().abs()

    stale = torch.zeros(0)

    def kept(x: Tensor, w: Tensor) -> Tensor:
        nonlocal stale
        out = x @ w.T
        if stale.shape == out.shape and out.numel():
            out = torch.cat([out[:-1], stale[-1:].to(out.dtype)])
        stale = out.detach().clone()
        return out

    return Kernel(
        "matmul",
        reference,
        Cases({"x": "B d", "w": "n d"}),
        {"B": 256, "d": 768, "n": 256},
        {
            "tiled": tiled,
            "linear": lambda x, w: F.linear(x, w),
            "blocks of rows": lambda x, w: torch.cat([x[:7] @ w.T, x[7:] @ w.T]),
        },
        {
            "last partial tile dropped": lambda x, w: tiled(x, w, drop=True),
            "bfloat16 operands": lambda x, w: (x.bfloat16() @ w.bfloat16().T).to(x.dtype),
            "float16 accumulation": lambda x, w: tiled(x, w, dtype=torch.float16),
            "one element of the last tile off by 1e-3": one_element,
            "all zeros": lambda x, w: x @ w.T * 0,
            "gradient of w not transposed back": with_backward(
                forward, lambda g, x, w: (g @ w, (x.T @ g).T * (w.shape[1] != 33))
            ),
            "zero gradient for w": with_backward(forward, lambda g, x, w: (g @ w, torch.zeros_like(w))),
            "half the gradient of x": with_backward(forward, lambda g, x, w: (g @ w / 2, g.T @ x)),
            "stale last row": kept,
            "reads the transpose's memory": lambda x, w: torch.as_strided(x, x.shape, (max(x.shape[1], 1), 1)) @ w.T,
            "rounded to nearest away in the last place": lambda x, w: (lambda y: y + y.detach().abs() * 2**-20)(
                x @ w.T
            ),
            "NaN read as zero": lambda x, w: x.nan_to_num(0.0) @ w.T,
        },
    )


def softmax() -> Kernel:
    def reference(x: Tensor) -> Tensor:
        return x.softmax(-1)

    def twin(x: Tensor, top: Tensor | None = None, width: int | None = None) -> Tensor:
        if x.shape[-1] == 0:
            return x.clone()
        e = (x - (x.amax(-1, keepdim=True) if top is None else top)).exp()
        return e / e[..., :width].sum(-1, keepdim=True)

    def backward(grad: Tensor, x: Tensor, scale: float = 1.0, centred: bool = True) -> Tensor:
        y = x.softmax(-1)
        inner = (grad * y).sum(-1, keepdim=True) if centred else 0
        return y * (grad - inner) * scale

    return Kernel(
        "softmax",
        reference,
        Cases({"x": "B d"}),
        {"B": 256, "d": 768},
        {"by hand": twin, "of logs": lambda x: x.log_softmax(-1).exp()},
        {
            "no maximum taken off": lambda x: twin(x, torch.zeros(())),
            "maximum of the first half": lambda x: twin(
                x, x[..., : max(x.shape[-1] // 2, 1)].amax(-1, keepdim=True) if x.shape[-1] else x
            ),
            "sum over the first 128 columns": lambda x: twin(x, width=128),
            "sum in bfloat16": lambda x: (
                (lambda e: e / e.bfloat16().sum(-1, keepdim=True).to(x.dtype))(
                    (x - x.detach().amax(-1, keepdim=True)).exp()
                )
                if x.shape[-1]
                else x * 1
            ),
            "over the wrong dimension of a square": lambda x: (
                x.softmax(0) if x.shape[0] == x.shape[1] else x.softmax(-1)
            ),
            "backward without the inner product": with_backward(reference, lambda g, x: backward(g, x, centred=False)),
            "backward scaled by 1 + 1e-4": with_backward(reference, lambda g, x: backward(g, x, 1 + 1e-4)),
            "eps in the denominator": lambda x: (
                (lambda e: e / (e.sum(-1, keepdim=True) + 1e-5))((x - x.detach().amax(-1, keepdim=True)).exp())
                if x.shape[-1]
                else x * 1
            ),
        },
    )


def layer_norm() -> Kernel:
    def reference(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w, b, 1e-6)

    def twin(x: Tensor, w: Tensor, b: Tensor, eps: float = 1e-6, off: int = 0) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        spread = (x - mean).square().sum(-1, keepdim=True) / max(x.shape[-1] - off, 1)
        return (x - mean) / (spread + eps).sqrt() * w + b

    def one_pass(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        spread = x.square().mean(-1, keepdim=True) - mean.square()
        return (x - mean) / (spread.clamp_min(0) + 1e-6).sqrt() * w + b

    def shifted(generator: torch.Generator, scale: float, exact: bool) -> dict[str, Any]:
        drawn = sized(generator, scale, exact)
        return drawn | {"x": drawn["x"] + (3 if exact else 100 * scale)}

    sized = Cases({"x": "B d", "w": "d", "b": "d"}, [{"B": B, "d": d} for B in (1, 5, 33) for d in (2, 31, 128, 200)])
    return Kernel(
        "layer_norm",
        reference,
        sized,
        {"B": 256, "d": 768},
        {"two passes": twin},
        {
            "unbiased variance": lambda x, w, b: twin(x, w, b, off=1),
            "eps 1e-5": lambda x, w, b: twin(x, w, b, eps=1e-5),
            "mean of the first 128": lambda x, w, b: (
                twin(x - x[:, :128].mean(-1, keepdim=True) + x.mean(-1, keepdim=True).detach() * 0, w, b)
                + (x[:, :128].mean(-1, keepdim=True) - x.mean(-1, keepdim=True)) * 1e-3
            ),
            "no bias in odd columns": lambda x, w, b: twin(x, w, b * (torch.arange(b.numel()) % 2 == 0)),
            "weight of the next column": lambda x, w, b: twin(x, w.roll(-1), b),
            "gradient of b averaged": with_backward(
                reference,
                lambda g, x, w, b: (*torch.autograd.functional.vjp(reference, (x, w, b), g)[1][:2], g.mean(0)),
            ),
        },
    )


def cross_entropy() -> Kernel:
    def reference(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(x, y, reduction="none")

    def twin(x: Tensor, y: Tensor, add: float = 0.0, at: int = 0) -> Tensor:
        top = x.detach().amax(-1, keepdim=True)
        total = (x - top).exp().sum(-1) + add
        return total.log() + top[:, 0] - x.gather(1, ((y + at) % x.shape[1])[:, None])[:, 0]

    cases = Cases({"x": "B n", "y": "B < n"}, [{"B": B, "n": n} for B in (1, 5, 33, 128) for n in (1, 2, 65, 200)])
    return Kernel(
        "cross_entropy",
        reference,
        cases,
        {"B": 256, "n": 1000},
        {"by hand": twin},
        {
            "label of the next class in the last row": lambda x, y: torch.cat(
                [twin(x[:-1], y[:-1]), twin(x[-1:], y[-1:], at=1)]
            ),
            "1e-6 inside the logarithm": lambda x, y: twin(x, y, add=1e-6),
            "no maximum taken off": lambda x, y: x.exp().sum(-1).log() - x.gather(1, y[:, None])[:, 0],
            "gradient lacks the label's 1": with_backward(
                reference, lambda g, x, y: (g[:, None] * x.softmax(-1), None)
            ),
            "mean in place of none": lambda x, y: twin(x, y).mean().expand(len(x)),
        },
    )


def attention() -> Kernel:
    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v

    def online(q: Tensor, k: Tensor, v: Tensor, tile: int = 16, rescale: bool = True, drop: bool = False) -> Tensor:
        top = torch.full((*q.shape[:-1], 1), -torch.inf, dtype=q.dtype)
        total = torch.zeros_like(top)
        out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
        for at in range(0, k.shape[-2], tile):
            if drop and at and at + tile > k.shape[-2]:
                continue
            score = q @ k[:, at : at + tile].mT * q.shape[-1] ** -0.5
            new = torch.maximum(top, score.amax(-1, keepdim=True))
            keep = (top - new).exp() if rescale else torch.ones_like(top)
            e = (score - new).exp()
            out = out * keep + e @ v[:, at : at + tile]
            total = total * keep + e.sum(-1, keepdim=True)
            top = new
        return out / total

    sizes = [
        {"H": H, "n": n, "m": m, "d": d}
        for H, n, m, d in ((1, 5, 16, 8), (2, 17, 33, 16), (3, 1, 50, 4), (1, 33, 1, 8))
    ]
    cases = Cases({"q": "H n d", "k": "H m d", "v": "H m d"}, sizes)
    return Kernel(
        "attention",
        reference,
        cases,
        {"H": 4, "n": 64, "m": 64, "d": 32},
        {"online": online},
        {
            "sums not rescaled": lambda q, k, v: online(q, k, v, rescale=False),
            "last partial tile dropped": lambda q, k, v: online(q, k, v, drop=True),
            "scaled by d instead of its root": lambda q, k, v: (q @ k.mT / q.shape[-1]).softmax(-1) @ v,
            "keys and values swapped where of one shape": lambda q, k, v: reference(q, v, k),
            "probabilities in bfloat16": lambda q, k, v: (
                (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).bfloat16().to(v.dtype) @ v
            ),
            "gradient of q without its scale": with_backward(
                reference,
                lambda g, q, k, v: (lambda grads: (grads[0] * q.shape[-1] ** 0.5, *grads[1:]))(
                    torch.autograd.functional.vjp(reference, (q, k, v), g)[1]
                ),
            ),
        },
    )


def topk() -> Kernel:
    def reference(x: Tensor, w: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, indices = torch.sort(x @ w.T, dim=-1, descending=True, stable=True)
        return values[:, :k], indices[:, :k]

    def twin(x: Tensor, w: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return torch.topk(x @ w.T, k)

    def one_by_one(x: Tensor, w: Tensor, k: int) -> tuple[Tensor, Tensor]:
        pre = x @ w.T
        left, chosen = pre.detach().clone(), []
        for _ in range(k):
            # NaN sorts as the largest; of equals the first
            best = torch.where(left.isnan(), torch.inf, left).argmax(-1, keepdim=True)
            chosen.append(best)
            left = left.scatter(1, best, -torch.inf)
        indices = torch.cat(chosen, 1)
        return pre.gather(1, indices), indices

    def binned(x: Tensor, w: Tensor, k: int, room: int = 4) -> tuple[Tensor, Tensor]:
        """Of every bin of 16 columns the ``room`` largest alone come to the end."""
        pre = x @ w.T
        kept = torch.full_like(pre, -torch.inf)
        for at in range(0, pre.shape[1], 16):
            part = pre[:, at : at + 16]
            _, best = part.topk(min(room, part.shape[1]))
            kept[:, at : at + 16] = torch.full_like(part, -torch.inf).scatter(1, best, part.gather(1, best))
        _, indices = kept.topk(k)
        return pre.gather(1, indices), indices

    def one_wrong(x: Tensor, w: Tensor, k: int) -> tuple[Tensor, Tensor]:
        pre = x @ w.T
        values, indices = pre.topk(k)
        if len(x) and pre.shape[1] > k:
            wrong = indices.clone()
            wrong[-1, -1] = pre[-1].topk(k + 1).indices[-1]
            return pre.gather(1, wrong), wrong
        return values, indices

    sizes = [
        {"B": B, "d": d, "n": n, "k": k}
        for B, d, n, k in ((5, 33, 65, 4), (1, 8, 16, 16), (33, 16, 129, 8), (2, 4, 20, 1))
    ]
    cases = Cases({"x": "B d", "w": "n d", "k": "=k"}, sizes)
    return Kernel(
        "top-k of a product",
        reference,
        cases,
        {"B": 256, "d": 256, "n": 1024, "k": 16},
        {"largest first, one by one": one_by_one},
        {
            "bins overflow": binned,
            "one index of one row is the next best": one_wrong,
            "one index twice": lambda x, w, k: (
                lambda v, i: (v, torch.cat([i[:, :-1], i[:, : 1 if k > 1 else 0], i[:, k:] if k > 1 else i], 1))
            )(*twin(x, w, k)),
            "values of bfloat16 products": lambda x, w, k: torch.topk((x.bfloat16() @ w.bfloat16().T).to(x.dtype), k),
            "smallest where negative": lambda x, w, k: (
                lambda pre: (pre.gather(1, pre.abs().topk(k).indices), pre.abs().topk(k).indices)
            )(x @ w.T),
            "int8 indices": lambda x, w, k: (lambda v, i: (v, i.to(torch.int8).long()))(*twin(x, w, k)),
        },
    )


def decode() -> Kernel:
    def reference(acts: Tensor, index: Tensor, w: Tensor) -> Tensor:
        return (acts.unsqueeze(-1) * w[index]).sum(-2)

    def forward(acts: Tensor, index: Tensor, w: Tensor) -> Tensor:
        return torch.einsum("bk,bkd->bd", acts, w[index])

    def overwritten(grad: Tensor, acts: Tensor, index: Tensor, w: Tensor) -> Any:
        d_w = torch.zeros_like(w)
        d_w[index.flatten()] = (acts.unsqueeze(-1) * grad.unsqueeze(1)).flatten(0, 1)
        return (w[index] @ grad.unsqueeze(-1)).squeeze(-1), None, d_w

    cases = Cases(
        {"acts": "B k", "index": "B k < n", "w": "n d"},
        [
            {"B": B, "k": k, "n": n, "d": d}
            for B, k, n, d in ((5, 4, 65, 33), (33, 8, 16, 16), (1, 1, 1, 1), (0, 3, 4, 5))
        ],
    )
    return Kernel(
        "sparse decode",
        reference,
        cases,
        {"B": 256, "k": 32, "n": 4096, "d": 256},
        {"einsum": forward},
        {
            "duplicates overwrite in the gradient": with_backward(forward, overwritten),
            "one feature too far": lambda acts, index, w: forward(acts, (index + 1) % len(w), w),
            "last activation dropped": lambda acts, index, w: forward(acts[:, :-1], index[:, :-1], w),
            "bfloat16 sums": lambda acts, index, w: torch.einsum("bk,bkd->bd", acts.bfloat16(), w[index].bfloat16()).to(
                w.dtype
            ),
            "no gradient for acts": lambda acts, index, w: forward(acts.detach(), index, w),
            "negative activations as zero": lambda acts, index, w: forward(acts.relu(), index, w),
        },
    )


def segment_sum() -> Kernel:
    def reference(x: Tensor, index: Tensor) -> Tensor:
        return torch.zeros(8, x.shape[1], dtype=x.dtype).index_add(0, index, x)

    def forward(x: Tensor, index: Tensor) -> Tensor:
        return F.one_hot(index, 8).to(x.dtype).T @ x

    def racing(x: Tensor, index: Tensor) -> Tensor:
        """Additions in an order of chance, as atomics give."""
        order = torch.randperm(len(x))
        return torch.zeros(8, x.shape[1], dtype=x.dtype).index_add(0, index[order], x[order])

    cases = Cases({"x": "B d", "index": "B < 8"})
    return Kernel(
        "segment sum",
        reference,
        cases,
        {"B": 1024, "d": 64},
        {
            "scatter_add": lambda x, index: torch.zeros(8, x.shape[1], dtype=x.dtype).scatter_add(
                0, index[:, None].expand_as(x), x
            )
        },
        {
            "unordered atomics": racing,
            "last row lost": lambda x, index: forward(x[:-1], index[:-1]),
            "segment 7 never written": lambda x, index: torch.cat(
                [forward(x, index)[:7], torch.empty(1, x.shape[1], dtype=x.dtype).fill_(0)]
            ),
            "sums in float16": lambda x, index: (F.one_hot(index, 8).half().T @ x.half()).to(x.dtype),
        },
    )


def distance() -> Kernel:
    def reference(x: Tensor, y: Tensor) -> Tensor:
        return (x.unsqueeze(1) - y).square().sum(-1)

    def twin(x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([(row - y).square().sum(-1) for row in x]) if len(x) else x.new_zeros(0, len(y))

    cases = Cases(
        {"x": "B d", "y": "n d"},
        [{"B": B, "n": n, "d": d} for B, n, d in ((5, 7, 33), (1, 1, 1), (33, 16, 8), (2, 65, 128))],
    )
    return Kernel(
        "squared distance",
        reference,
        cases,
        {"B": 128, "n": 128, "d": 64},
        {"row by row": twin},
        {
            "the root of it": lambda x, y: twin(x, y).clamp_min(0).sqrt(),
            "cancelling expansion": lambda x, y: x.square().sum(-1, keepdim=True) + y.square().sum(-1) - 2 * (x @ y.T),
            "clamped at 1e-4": lambda x, y: twin(x, y).clamp_min(1e-4),
            "last dimension dropped": lambda x, y: twin(x[:, :-1], y[:, :-1]),
            "gradient without its 2": with_backward(
                reference,
                lambda g, x, y: (
                    (g.unsqueeze(-1) * (x.unsqueeze(1) - y)).sum(1),
                    -(g.unsqueeze(-1) * (x.unsqueeze(1) - y)).sum(0),
                ),
            ),
        },
    )


def scan() -> Kernel:
    def reference(x: Tensor) -> Tensor:
        return x.cumsum(-1)

    def blocks(x: Tensor, carry: bool = True, tile: int = 32) -> Tensor:
        parts, before = [], torch.zeros_like(x[:, :1])
        for at in range(0, x.shape[1], tile):
            part = x[:, at : at + tile].cumsum(-1) + before
            parts.append(part)
            before = part[:, -1:] if carry else before
        return torch.cat(parts, 1) if parts else x.clone()

    return Kernel(
        "cumulative sum",
        reference,
        Cases({"x": "B d"}),
        {"B": 256, "d": 768},
        {"blocks": blocks},
        {
            "no carry from block to block": lambda x: blocks(x, carry=False),
            "exclusive": lambda x: x.cumsum(-1) - x,
            "carry in bfloat16": lambda x: torch.cat(
                [x[:, :32].cumsum(-1), x[:, 32:].cumsum(-1) + x[:, :32].sum(-1, keepdim=True).bfloat16().to(x.dtype)], 1
            ),
        },
    )


def gelu() -> Kernel:
    def reference(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.erf(x * 0.5**0.5))

    return Kernel(
        "gelu",
        reference,
        Cases({"x": "B d"}),
        {"B": 256, "d": 768},
        {"torch": lambda x: F.gelu(x)},
        {
            "tanh form": lambda x: F.gelu(x, approximate="tanh"),
            "sigmoid form": lambda x: x * torch.sigmoid(1.702 * x),
            "zero below -3": lambda x: torch.where(x < -3, 0 * x, F.gelu(x)),
            "gradient of the tanh form": with_backward(
                lambda x: F.gelu(x),
                lambda g, x: torch.autograd.functional.vjp(lambda t: F.gelu(t, approximate="tanh"), x, g)[1],
            ),
            "denormal inputs flushed, and all below 1e-6": lambda x: F.gelu(torch.where(x.abs() < 1e-6, 0 * x, x)),
        },
    )


KERNELS = (matmul, softmax, layer_norm, cross_entropy, attention, topk, decode, segment_sum, distance, scan, gelu)
