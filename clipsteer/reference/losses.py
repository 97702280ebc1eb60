"""CLIP's loss over all processes' pairs, with a reference's similarities as soft targets; learnable
sub-batches."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipsteer.training.world import JointBatch, World, training_world


class _Joined(torch.autograd.Function):
    """Every process's rows; the gradient comes back summed over the processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: JointBatch) -> Tensor:
        ctx.batch, ctx.mine = batch, slice(batch.offset, batch.offset + len(x))
        return batch.join(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.batch.sum_(grad.clone(memory_format=torch.contiguous_format))[ctx.mine], None


class ContrastiveLoss(nn.Module):
    """The symmetric cross-entropy of CLIP, mixed with distillation of a reference's similarities.

    With logits s/τ over all pairs of the batch, and r/τ the reference's:
    L = (1-w)·½·mean_i[CE(s_i·/τ, i) + CE(s_·i/τ, i)] + w·½·mean_i[KL(softmax(r_i·/τ) ‖
    softmax(s_i·/τ)) + columns]. Of several processes each computes its rows and columns, as many as
    it has, against everybody's. It returns their part of the mean over the joint batch, times the
    number of processes, so that averaging over the processes, as DDP does with gradients, gives
    that of the joint batch.

    Source: Radford et al. 2021 (arXiv 2103.00020), section 2.3; Yang et al. 2024, CLIP-KD (arXiv
    2307.12732), contrastive relational distillation.

    Args:
        temperature: τ; with learnable_temperature its logarithm is trained.
        distill: w in [0, 1]; 0 is CLIP's loss.
        world: the processes; by default those of an initialised process group.
    """

    def __init__(
        self,
        *,
        temperature: float = 0.07,
        learnable_temperature: bool = True,
        distill: float = 0.0,
        world: World | None = None,
    ) -> None:
        super().__init__()
        if not 0 < temperature < math.inf or not 0 <= distill <= 1:
            raise ValueError(
                f"ContrastiveLoss: temperature must be positive and distill in [0, 1], got "
                f"{temperature} and {distill}"
            )
        self.distill, self.world = distill, training_world(world)
        self.logit_scale = nn.Parameter(
            torch.tensor(-math.log(temperature)), requires_grad=learnable_temperature
        )

    @property
    def temperature(self) -> Tensor:
        return (-self.logit_scale).exp()

    @torch.no_grad()
    def settle_temperature_(self, before: Tensor | None = None) -> None:
        """CLIP's rule: logits are never scaled by more than 100; before is that of `DRRhoLoss`, and
        means nothing."""
        if self.logit_scale.requires_grad:
            self.logit_scale.clamp_(max=math.log(100))

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        ids: Tensor | None = None,
        ref_image: Tensor | None = None,
        ref_text: Tensor | None = None,
        *,
        gamma: float = 1.0,
    ) -> Tensor:
        """The loss of a batch, (); ids and gamma are those of `DRRhoLoss`, and mean nothing here.

        image, text: (B, e) unit rows, this process's pairs; ref_image, ref_text: (B, e_ref), the
        reference's. Raises ValueError when distillation is asked for without a reference.
        """
        if self.distill and (ref_image is None or ref_text is None):
            raise ValueError("ContrastiveLoss: distill > 0 needs ref_image and ref_text")
        batch = None if self.world is None else JointBatch(self.world, len(image), image.device)
        rows = self._logits(image, text, batch)
        own = torch.arange(len(image), device=image.device) + (0 if batch is None else batch.offset)
        share = 1 / len(image) if batch is None else batch.size / batch.rows
        loss = sum(F.cross_entropy(logits, own, reduction="sum") for logits in rows) * share / 2
        if not self.distill:
            return loss
        with torch.no_grad():
            targets = [logits.log_softmax(1) for logits in self._logits(ref_image, ref_text, batch)]
        soft = sum(
            F.kl_div(
                logits.log_softmax(1), target.to(logits.dtype), log_target=True, reduction="sum"
            )
            for logits, target in zip(rows, targets)
        )
        return (1 - self.distill) * loss + self.distill * soft * share / 2

    def _logits(
        self, image: Tensor, text: Tensor, batch: JointBatch | None
    ) -> tuple[Tensor, Tensor]:
        """(B, B_all) of this process's images against all texts, and of its texts against all
        images."""
        images, texts = (x if batch is None else _Joined.apply(x, batch) for x in (image, text))
        return image @ texts.T / self.temperature, text @ images.T / self.temperature


@torch.no_grad()
def select_learnable(
    image: Tensor,
    text: Tensor,
    ref_image: Tensor,
    ref_text: Tensor,
    keep: int,
    *,
    temperature: float | Tensor,
    chunks: int = 16,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Indices (keep,) of pairs that are learnable together: hard for the learner, easy for the
    reference.

    The first chunk is drawn evenly. A later one is drawn without replacement with probability ∝
    exp(learner's loss - reference's loss), where a pair's loss is CLIP's against the pairs drawn so
    far and itself.

    Source: Evans et al. 2024, JEST (arXiv 2406.17711), algorithm 1, with the softmax loss.

    Args:
        image, text: (N, e) unit rows of the learner; ref_image, ref_text: (N, e_ref) of the
            reference.
        keep: at most N. temperature: a number or a tensor (). generator: on the features' device;
            None: torch's own.
    """
    n = len(image)
    if not 1 <= keep <= n or chunks < 1:
        raise ValueError(
            f"select_learnable: keep must be in [1, {n}] and chunks at least 1, got {keep} and "
            f"{chunks}"
        )
    # log-ratios to the pair itself, over texts and over images
    sides = [
        [(x - x.diagonal()[:, None]) / temperature for x in (s, s.T)]
        for s in (image @ text.T, ref_image @ ref_text.T)
    ]
    free = torch.ones(n, dtype=torch.bool, device=image.device)
    drawn: list[Tensor] = []
    ends = [round(keep * (c + 1) / chunks) for c in range(chunks)]
    for begin, end in zip([0, *ends], ends):
        score = torch.zeros(n, device=image.device)
        if drawn:
            taken = torch.cat(drawn)
            # the pair itself adds exp(0)
            learner, reference = (
                sum(F.pad(x[:, taken], (0, 1)).logsumexp(1) for x in two) / 2 for two in sides
            )
            score = (learner - reference).float()
        # Gumbel's trick: the largest of score + noise are draws without replacement
        even = torch.rand(n, device=image.device, generator=generator)
        noise = -torch.log(-torch.log(even.clamp_(1e-20, 1 - 1e-7)))
        picked = (score + noise).masked_fill(~free, -math.inf).topk(end - begin).indices
        free[picked] = False
        drawn.append(picked)
    return torch.cat(drawn)
