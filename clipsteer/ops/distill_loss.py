"""``distill_loss``: CLIP's loss beside ½·mean_i [H(p_i·, q_i·) + H(p_·i, q_·i)], where p
are a teacher's softmaxes and q the model's.

Fused: one sweep over tiles of both models' similarities takes the log-sums of both and the model's
mean logits under the teacher's weights; a second one the gradient of both losses at once. No B×B
matrix. Source: Yang et al. 2024 (CLIP-KD, arXiv 2307.12732), contrastive relational distillation;
Hinton et al. 2015 (arXiv 1503.02531).
"""

from __future__ import annotations

import torch
from torch import Tensor

from clipsteer.ops._calls import remembered
from clipsteer.ops._contrastive import KINDS, Kind, contrast
from clipsteer.ops._dispatch import call, choose
from clipsteer.ops._pairs import checked_features, checked_scale, merged, own_entropy
from clipsteer.ops._steps import contiguous, detached
from clipsteer.ops._sweeps import Pairs, in_one_call, keeps, low_level

__all__ = ["distill_loss", "distill_loss_reference"]


def distill_loss_reference(
    image: Tensor,  # (B, d)
    text: Tensor,  # (B, d)
    teacher_image: Tensor,  # (B, e)
    teacher_text: Tensor,  # (B, e)
    *,
    logit_scale: float | Tensor,
    teacher_logit_scale: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """The definition in plain torch; twice differentiable. −Σ p·log q is log Σ exp t − Σ p·t."""
    wide = torch.promote_types(image.dtype, torch.float32)
    own = torch.eye(image.shape[0], dtype=torch.bool, device=image.device)
    relative = []
    for a, b, s in (
        (image, text, logit_scale),
        (teacher_image, teacher_text, teacher_logit_scale),
    ):
        S = a.to(wide) @ b.to(wide).T
        relative.append((torch.stack([S, S.T]) - S.diagonal().unsqueeze(1)) * s)
    u = own_entropy(relative[0], own)
    t, r = (x.masked_fill(own, 0.0) for x in relative)
    p = r.softmax(2).detach()
    # no part of the mean where p is 0, though t be infinite
    return u.mean(), (u - (p * t.masked_fill(p == 0, 0.0)).sum(2)).mean()


def _models(arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Images, texts and scale, of the student and of the teacher."""
    *features, scale, teacher_scale = arguments
    image, text, teacher_image, teacher_text = map(contiguous, features)
    return image, text, scale, teacher_image, teacher_text, teacher_scale


def evaluate(arguments, needs, backend, world):
    """Both losses (), and what their gradient takes: u of both models and the weight of the other
    pairs in their softmaxes (2, 2, M), both losses' derivatives in the scale (2,), similarities of
    own pairs, and of all where they are kept."""
    image, text, teacher_image, teacher_text, scale, teacher_scale = arguments
    width = (image.shape[1] + teacher_image.shape[1]) // 2
    if in_one_call(backend, world):
        keep = any(needs) and keeps(image, image.shape[0], width)
        return call(backend, "distill_loss", *_models(arguments), keep)
    student = Pairs(image, text, scale, backend, world)
    teacher = Pairs(teacher_image, teacher_text, teacher_scale, backend, world)
    keep = any(needs) and keeps(image, student.columns, width)
    given = (*student.features, *teacher.features, student.offset, keep)
    row_sums, col_sums, *kept = low_level(backend, "distill_sums", *given)
    sums = torch.stack([row_sums, merged(col_sums, world)[:, student.mine]])  # (2, 4, M)
    lse = sums[:, :2].double()  # of student and teacher; a difference of large ones
    u = torch.logaddexp(lse, torch.zeros_like(lse))
    others = (lse - u).exp()  # (2, 2, M): 1 − the own pair's part
    means = others * sums[:, 2:]  # Σ q·t and Σ p·t
    contrast_sum = u[:, 0].sum()
    distill_sum = contrast_sum - means[:, 1].sum()
    own_scale = means[:, 0].sum() / scale
    totals = torch.stack(
        [contrast_sum, distill_sum, own_scale, own_scale - means[:, 1].sum() / scale]
    )
    count = student.columns
    if world is not None and world.local:
        count = count / world.size
    elif world is not None:
        totals = world.sum_(totals)
    totals = (totals * (0.5 / count)).to(scale.dtype)
    losses = (totals[0].clone(), totals[1].clone())
    if not any(needs):
        return losses
    own_pairs = (student.diag, teacher.diag)
    return *losses, u.to(scale.dtype), others.to(scale.dtype), totals[2:].clone(), *own_pairs, *kept


def _gradient(cotangents, found, arguments, needs, backend, world):
    if in_one_call(backend, world):
        given = (*cotangents, *_models(arguments), *found)
        return call(backend, "distill_loss_grad", *given, needs[0], needs[1])
    u, others, d_scale, diag, teacher_diag, *kept = found
    image, text, teacher_image, teacher_text, scale, teacher_scale = arguments
    student = Pairs(image, text, scale, backend, world, diag)
    teacher = Pairs(teacher_image, teacher_text, teacher_scale, backend, world, teacher_diag)
    contrastive, distill = cotangents
    factors = torch.stack([contrastive + distill, distill])
    own = factors[1] * others[:, 1] - factors[0] * others[:, 0]  # (2, M)

    def sweep(u: Tensor, own: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor, Tensor]:
        row_u = u[0].contiguous()
        col_u = student.joined(u[1].T).T.contiguous()
        pairs = (*student.features, *teacher.features, student.offset)
        given = (*pairs, row_u, col_u, own.contiguous(), factors, *kept, needs[0], needs[1])
        d_rows, d_cols = low_level(backend, "distill_grad", *given)
        return d_rows, student.own_columns(d_cols, needs[1])

    if world is None or not world.local or world.with_grad:
        d_image, d_text = sweep(u, own.sum(0), needs)
    else:  # each side's weights with its own features alone
        never = torch.full_like(u[0], torch.inf)
        d_image = sweep(torch.stack([u[0], never]), own[0], (needs[0], False))[0]
        d_text = sweep(torch.stack([never, u[1]]), own[1], (False, needs[1]))[1]
    B = student.columns
    factor = scale * ((1.0 if world is None else world.factor) / (2 * B))
    d_image = (factor * d_image).to(image.dtype)
    d_text = (factor * d_text).to(text.dtype)
    return d_image, d_text, contrastive * d_scale[0] + distill * d_scale[1]


def _reference(
    image: Tensor,
    text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    scale: Tensor,
    teacher_scale: Tensor,
) -> tuple[Tensor, Tensor]:
    features = (image, text, teacher_image, teacher_text)
    scales = {"logit_scale": scale, "teacher_logit_scale": teacher_scale}
    return distill_loss_reference(*features, **scales)


KINDS["distill_loss"] = Kind(
    evaluate, _gradient, _reference, tensors=6, leaves=(0, 1, 4), losses=2, outputs=2
)


@remembered
def distill_loss(
    image: Tensor,  # (B, d)
    text: Tensor,  # (B, d)
    teacher_image: Tensor,  # (B, e)
    teacher_text: Tensor,  # (B, e)
    *,
    logit_scale: float | Tensor,
    teacher_logit_scale: float | Tensor,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """CLIP's loss of a batch of pairs, and its cross-entropy to a frozen teacher's softmaxes over
    the same batch.

    The batch is this process's own; over several processes `losses.DistillClipLoss` has the joint
    batch.

    Args:
        image, text: (B, d) features, as a rule of unit norm (the op does not normalise them);
            float32, bfloat16, float16 or (reference, cpp) float64.
        teacher_image, teacher_text: (B, e) the teacher's of the same pairs, of any width and
            without gradient.
        logit_scale: s > 0, a number or a tensor with one element, which then has its gradient.
        teacher_logit_scale: the teacher's, without gradient.
        backend: ``"auto" | "reference" | "cpp" | "triton"``; ``ops.explain`` says which can run.

    Returns:
        Two (), float32 (float64 for float64 features): CLIP's loss, and the mean of −Σ p·log q over
        images and over texts, as open_clip's DistillClipLoss. Deterministic. Extra memory is
        O(B·(d + e)), on a GPU also 2,600·B numbers and 512 MiB at most; the reference holds several
        B×B matrices. Second derivatives are the reference's.

    Raises:
        ValueError: shapes or devices that do not fit, an empty batch, a scale out of range (a
            tensor's value is looked at on the CPU only).
        TypeError: not tensors or numbers, dtypes that differ outside autocast.
        RuntimeError: the backend asked for cannot run here.

    Source: Yang et al. 2024 (arXiv 2307.12732), section 3.2.
    """
    op = "distill_loss"
    given = {"image": image, "text": text}
    given |= {"teacher_image": teacher_image, "teacher_text": teacher_text}
    named = checked_features(op, given)
    scale = checked_scale(op, "logit_scale", logit_scale, named)
    theirs = detached(checked_scale(op, "teacher_logit_scale", teacher_logit_scale, named))
    named["teacher_image"] = detached(named["teacher_image"])
    named["teacher_text"] = detached(named["teacher_text"])
    arguments = (*named.values(), scale, theirs)
    contrastive, distill = contrast(op, arguments, choose(op, backend, named["image"]))
    return contrastive, distill
