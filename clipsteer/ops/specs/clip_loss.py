"""How cases of ``clip_loss`` are drawn, what it may be off by, and what it is timed against."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.ops._bounds import fraction_of_bound
from clipsteer.ops._spec import Draw, Errors, Inputs, OpSpec, Shape, Tensors, in_float64, sizes
from clipsteer.ops.clip_loss import clip_loss, clip_loss_reference
from clipsteer.ops.specs._shared import drawn_number, drawn_pairs
from clipsteer.ops.specs._softmaxes import Softmaxes


def _draw(case: Draw) -> Inputs:
    """Keys B, d; percent: 1/s, 25 if not given; other=1: labels drawn evenly; smooth: label
    smoothing in eighths."""
    shape = case.shape
    B = shape["B"]
    image, text = drawn_pairs(case, shape["d"])
    labels = torch.randint(B, (B,), generator=case.generator)
    return {
        "image": image,
        "text": text,
        "logit_scale": drawn_number(case, 0.5 if case.exact else 100 / shape.get("percent", 25)),
        "labels": labels if shape.get("other") else None,
        "label_smoothing": shape.get("smooth", 0) / 8,
    }


class Truth(Softmaxes):
    """A drawn case in float64. ``hard`` (2, B): how far a side's label is from its own pair, and
    ``mean``: how far the mean logit is, both over s, with their errors."""

    def __init__(self, inputs: Inputs) -> None:
        wide = in_float64(inputs)
        self.image = wide["image"]
        self.text = wide["text"]
        super().__init__(self.image, self.text, wide["logit_scale"], inputs["image"].dtype)
        self.smooth = wide["label_smoothing"]
        self.labels = inputs["labels"]
        B = self.B
        u = self.unit
        S = torch.stack([self.S, self.S.T])
        diag = self.S.diagonal()
        self.target = self.own.double().expand(2, B, B)
        self.moved = torch.zeros(2, B, dtype=torch.float64)
        self.moved_off = torch.zeros(2, B, dtype=torch.float64)
        self.moved_size = torch.zeros(2, B, dtype=torch.float64)
        off = torch.stack([self.off, self.off.T])
        size = torch.stack([self.size, self.size.T])
        if self.labels is not None:
            place = self.labels.expand(2, -1).unsqueeze(2)
            self.target = F.one_hot(self.labels, B).double().expand(2, B, B)
            away = self.labels != torch.arange(B)
            share = 1 - self.smooth
            moved = S.gather(2, place).squeeze(2) - diag
            self.moved = share * torch.where(away, moved, 0.0)
            both = size.gather(2, place).squeeze(2) + self.size.diagonal()
            self.moved_size = share * torch.where(away, both, 0.0)
            both = off.gather(2, place).squeeze(2) + self.off.diagonal()
            self.moved_off = share * torch.where(away, both, 0.0) + 6 * u * self.moved_size
        if self.smooth:
            means = torch.stack([self.image @ self.text.mean(0), self.text @ self.image.mean(0)])
            largest = [a.abs() @ b.abs().mean(0) for a, b in self.both()]
            width = self.image.shape[1]
            more = torch.stack(largest) + self.size.diagonal()
            self.moved = self.moved + self.smooth * (means - diag)
            self.moved_size = self.moved_size + self.smooth * more
            mean_off = (B + width + 12) * u * more + self.off.diagonal()
            self.moved_off = self.moved_off + self.smooth * mean_off

    def both(self) -> list[tuple[Tensor, Tensor]]:
        """Own and other features of either side."""
        return [(self.image, self.text), (self.text, self.image)]

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of both sides (2, B, B): q − target, its error, and the sum of sizes."""
        even = self.smooth / self.B
        w = self.q - (1 - self.smooth) * self.target - even
        off = self.q_off.clone()
        size = self.q + (1 - self.smooth) * self.target + even
        if self.labels is None:
            # a pair's own weight is the smoothing less the sum of the others
            diag = torch.arange(self.B)
            w[:, diag, diag] = self.smooth - self.others - even
            off[:, diag, diag] = self.others_off + 4 * self.unit * (self.others + self.smooth)
            size[:, diag, diag] = self.others + self.smooth + even
        return w, off, size


def check_values(inputs: Inputs, outputs: Tensors) -> Errors:
    """The mean of u less s times how far the targets are from the own pairs."""
    x = Truth(inputs)
    s = x.scale
    moved = x.labels is not None or x.smooth
    loss = (x.u - x.moved * s if moved else x.u).mean()
    off = x.u_off + s * x.moved_off
    size = x.u + 4 * s * x.moved_size
    error = fraction_of_bound(
        outputs["loss"].reshape(1),
        loss.reshape(1),
        size.mean().reshape(1),
        4,
        0.0,
        off.mean().nan_to_num(nan=0.0, posinf=0.0),
    )
    return {"loss": error}


def check_grads(inputs: Inputs, outputs: Tensors, grad_out: Tensors, grads: Tensors) -> Errors:
    """Sums of weights times features, and of weights times how far similarities are from the own
    pair's."""
    x = Truth(inputs)
    g = grad_out["loss"].double() / (2 * x.B)
    found = {}
    w, off, size = x.weights()
    sides = {"image": (w[0] + w[1].T, off[0] + off[1].T, size[0] + size[1].T, x.text)}
    sides["text"] = (*(m.T for m in sides["image"][:3]), x.image)
    for name, (weight, weight_off, weight_size, features) in sides.items():
        if name in grads:
            factor = g * x.scale
            lost = x.lost(weight_size + weight_off, features)
            found[name] = fraction_of_bound(
                grads[name],
                factor * (weight @ features),
                factor.abs() * ((weight_size + weight_off) @ features.abs()),
                3 * x.B + 12,
                x.operand + x.split,
                factor.abs() * (weight_off @ features.abs() + lost),
            )
    if "logit_scale" in grads:
        t = x.t.masked_fill(x.own, 0.0)
        q = x.q.masked_fill(x.own, 0.0)
        q_off = x.q_off.masked_fill(x.own, 0.0)
        truth = (q * t).sum() / x.scale - x.moved.sum()
        moment_off = (q_off * (t.abs() + x.delta) + q * x.delta).sum() / x.scale
        magnitude = (q * t.abs()).sum() / x.scale + x.moved_size.sum()
        found["logit_scale"] = fraction_of_bound(
            grads["logit_scale"].reshape(1),
            (g * truth).reshape(1),
            (g.abs() * magnitude).reshape(1),
            2 * x.B + 16,
            0.0,
            g.abs() * (moment_off + x.moved_off.sum()),
        )
    return found


def plain(image: Tensor, text: Tensor, logit_scale: Tensor, **_: Any) -> Tensor:
    """Both matrices of logits, and torch's cross-entropies."""
    own = torch.arange(len(image), device=image.device)
    rows = logit_scale * image @ text.T
    columns = logit_scale * text @ image.T
    return (F.cross_entropy(rows, own) + F.cross_entropy(columns, own)) / 2


def _open_clip(image: Tensor, text: Tensor, logit_scale: Tensor, **_: Any) -> Tensor:
    from open_clip.loss import ClipLoss

    return ClipLoss()(image, text, logit_scale)


def _floor(shape: Shape) -> tuple[float, float]:
    B = shape["B"]
    return 2.0 * B**2 * shape["d"], 8.0 * B * shape["d"]


SPEC = OpSpec(
    name="clip_loss",
    function=clip_loss,
    reference=clip_loss_reference,
    outputs=("loss",),
    differentiable=("image", "text", "logit_scale"),
    draw=_draw,
    check=check_values,
    check_grads=check_grads,
    shapes=sizes(
        "B d percent other smooth",
        (37, 24, None, 1),
        (33, 31),
        (129, 32, 7, None, 1),
        (1, 5),
        (2, 1, None, 1, 2),
        (31, 129, 1),
        (128, 64, 4, 1, 1),
        (200, 127, 10),
    ),
    small_shape={"B": 5, "d": 3, "other": 1, "smooth": 2},
    repeat_shape={"B": 500, "d": 48, "other": 1, "smooth": 1},
    bench_shapes={"B2048-d512": {"B": 2048, "d": 512, "percent": 1}},
    gpu_bench_shapes={
        "B8192-d512": {"B": 8192, "d": 512, "percent": 1},
        "B32768-d512": {"B": 32768, "d": 512, "percent": 1},
    },
    wide=True,
    opaque=False,
    exact=False,
    # tiles that touch neither an end nor the diagonal
    device_shapes=sizes("B d", (300, 64)),
    # the check has B×B matrices in float64
    gate_sizes={"B": 2048},
    baselines={"B×B torch": plain, "open_clip ClipLoss": _open_clip},
    floor=_floor,
)

SPECS = (SPEC,)
