"""How cases of ``distill_loss`` are drawn, what it may be off by, and what it is timed against.

A mean Σ p·t is off by Σ p·δ for the error of t, and by a factor exp(δ_r + δu_r) of each weight,
which its own sums and their quotient round once more.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.ops._bounds import fraction_of_bound
from clipsteer.ops._spec import Draw, Errors, Inputs, OpSpec, Shape, Tensors, in_float64, sizes
from clipsteer.ops.distill_loss import distill_loss, distill_loss_reference
from clipsteer.ops.specs._shared import EXP, drawn_number, drawn_pairs
from clipsteer.ops.specs._softmaxes import Softmaxes, finite


def _draw(case: Draw) -> Inputs:
    """Keys B, d, e (the teacher's width); percent: 1/s, 25 if not given; teacher: its 1/s in
    percent, likewise."""
    shape = case.shape
    image, text = drawn_pairs(case, shape["d"])
    teacher_image, teacher_text = drawn_pairs(case, shape["e"])
    scales = []
    for name in ("percent", "teacher"):
        scales.append(drawn_number(case, 0.5 if case.exact else 100 / shape.get(name, 25)))
    return {
        "image": image,
        "text": text,
        "teacher_image": teacher_image,
        "teacher_text": teacher_text,
        "logit_scale": scales[0],
        "teacher_logit_scale": scales[1],
    }


class Truth:
    """A drawn case in float64: both models' softmaxes, and Σ q·t and Σ p·t of both sides (2, B)
    with their errors and sizes."""

    def __init__(self, inputs: Inputs) -> None:
        wide = in_float64(inputs)
        dtype = inputs["image"].dtype
        self.image = wide["image"]
        self.text = wide["text"]
        self.scale = wide["logit_scale"]
        self.student = Softmaxes(self.image, self.text, self.scale, dtype)
        theirs = (wide["teacher_image"], wide["teacher_text"], wide["teacher_logit_scale"])
        self.teacher = Softmaxes(*theirs, dtype)
        self.own_mean = self.mean(self.student)
        self.cross_mean = self.mean(self.teacher)

    def mean(self, under: Softmaxes) -> tuple[Tensor, Tensor, Tensor]:
        """Σ_{j≠i} w·t, its error and Σ w·|t| for the weights of ``under``."""
        x = self.student
        w = under.q.masked_fill(x.own, 0.0)
        t = torch.where(w == 0, 0.0, x.t.masked_fill(x.own, 0.0))
        far = finite(t).abs()
        # of a weight below its peak, of the sum of these, of what the sum is over 1 + itself
        each = under.delta + 2 * under.unit * under.far + under.u_off.unsqueeze(2)
        total = (w * torch.expm1(under.step)).sum(2) / w.sum(2).clamp_min(1e-300)
        grown = torch.expm1(each + under.steps + 2 * EXP * under.unit) + total.unsqueeze(2)
        rounds = under.unit * (under.B + 8) + under.steps
        logs = under.unit * 4 * (finite(under.lse).abs() + finite(under.u).abs() + 4).unsqueeze(2)
        off = (w * (x.delta + far * (2 * grown + 2 * rounds + logs + 4 * x.unit))).sum(2)
        return (w * t).sum(2), finite(off), (w * far).sum(2)


def check_values(inputs: Inputs, outputs: Tensors) -> Errors:
    """Means of u, and of u − Σ p·t."""
    x = Truth(inputs)
    u = x.student.u.mean()
    off = x.student.u_off.mean()
    cross, cross_off, cross_size = (part.mean() for part in x.cross_mean)
    found = {}
    for name, truth, size, absolute in (
        ("contrastive_loss", u, u, off),
        ("distill_loss", u - cross, u + cross_size, off + cross_off),
    ):
        absolute = absolute.nan_to_num(nan=0.0, posinf=0.0)
        found[name] = fraction_of_bound(
            outputs[name].reshape(1), truth.reshape(1), size.reshape(1), 6, 0.0, absolute
        )
    return found


def check_grads(inputs: Inputs, outputs: Tensors, grad_out: Tensors, grads: Tensors) -> Errors:
    """Sums of (g + h)·q − g·target − h·p times features."""
    x = Truth(inputs)
    student = x.student
    teacher = x.teacher
    B = student.B
    g = grad_out["contrastive_loss"].double() / (2 * B)
    h = grad_out["distill_loss"].double() / (2 * B)
    both = g + h
    # roundings of g + h, which may cancel
    sizes = g.abs() + h.abs()
    found = {}
    w = both * student.q - h * teacher.q
    off = sizes * student.q_off + h.abs() * teacher.q_off
    size = sizes * (student.q + student.q_off) + h.abs() * (teacher.q + teacher.q_off)
    own = torch.arange(B)
    w[:, own, own] = h * teacher.others - both * student.others
    own_off = sizes * student.others_off + h.abs() * teacher.others_off
    own_size = sizes * student.others + h.abs() * teacher.others
    off[:, own, own] = own_off
    size[:, own, own] = own_size + own_off
    sides = {"image": (w[0] + w[1].T, off[0] + off[1].T, size[0] + size[1].T, x.text)}
    sides["text"] = (*(m.T for m in sides["image"][:3]), x.image)
    for name, (weight, weight_off, weight_size, features) in sides.items():
        if name in grads:
            factor = x.scale
            lost = student.lost(weight_size, features, 0.5 / B)
            found[name] = fraction_of_bound(
                grads[name],
                factor * (weight @ features),
                factor * (weight_size @ features.abs()),
                2 * B + 16,
                student.operand + student.split,
                factor * (weight_off @ features.abs() + lost),
            )
    if "logit_scale" in grads:
        mean, mean_off, mean_size = (part.sum() / x.scale for part in x.own_mean)
        cross, cross_off, cross_size = (part.sum() / x.scale for part in x.cross_mean)
        found["logit_scale"] = fraction_of_bound(
            grads["logit_scale"].reshape(1),
            (both * mean - h * cross).reshape(1),
            (sizes * mean_size + h.abs() * cross_size).reshape(1),
            B + 16,
            0.0,
            sizes * mean_off + h.abs() * cross_off,
        )
    return found


def _plain(
    image: Tensor,
    text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    logit_scale: Tensor,
    teacher_logit_scale: Tensor,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Four matrices of logits, and torch's cross-entropies."""
    own = torch.arange(len(image), device=image.device)
    logits = logit_scale * image @ text.T
    theirs = teacher_logit_scale * teacher_image @ teacher_text.T
    hard = F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)
    soft = F.cross_entropy(logits, theirs.softmax(1))
    soft = soft + F.cross_entropy(logits.T, theirs.T.softmax(1))
    return hard / 2, soft / 2


def _open_clip(
    image: Tensor,
    text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    logit_scale: Tensor,
    teacher_logit_scale: Tensor,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    from open_clip.loss import DistillClipLoss

    student = (image, text, logit_scale)
    return DistillClipLoss()(*student, teacher_image, teacher_text, teacher_logit_scale)


def _floor(shape: Shape) -> tuple[float, float]:
    B = shape["B"]
    columns = shape["d"] + shape["e"]
    return 2.0 * B**2 * columns, 8.0 * B * columns


SPEC = OpSpec(
    name="distill_loss",
    function=distill_loss,
    reference=distill_loss_reference,
    outputs=("contrastive_loss", "distill_loss"),
    differentiable=("image", "text", "logit_scale"),
    draw=_draw,
    check=check_values,
    check_grads=check_grads,
    shapes=sizes(
        "B d e percent teacher",
        (37, 24, 16),
        (33, 31, 5, None, 10),
        (129, 32, 33, 7),
        (1, 5, 3),
        (2, 1, 1),
        (31, 129, 64, 1),
        (128, 64, 64, 4, 6),
        (200, 127, 40, 10),
    ),
    small_shape={"B": 5, "d": 3, "e": 2},
    repeat_shape={"B": 500, "d": 48, "e": 24},
    bench_shapes={"B2048-d512-e512": {"B": 2048, "d": 512, "e": 512, "percent": 1}},
    gpu_bench_shapes={
        "B8192-d512-e512": {"B": 8192, "d": 512, "e": 512, "percent": 1},
        "B32768-d512-e512": {"B": 32768, "d": 512, "e": 512, "percent": 1},
    },
    wide=True,
    opaque=False,
    exact=False,
    # tiles that touch neither an end nor the diagonal
    device_shapes=sizes("B d e", (300, 64, 64)),
    # the check has B×B matrices in float64
    gate_sizes={"B": 2048},
    baselines={"B×B torch": _plain, "open_clip DistillClipLoss": _open_clip},
    floor=_floor,
)

SPECS = (SPEC,)
