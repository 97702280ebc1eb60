"""CLIP's and SigLIP's losses over all processes' pairs, a reference's similarities as soft targets;
JEST's sub-batches."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipsteer.losses.exchange import Exchange
from clipsteer.ops._contrastive import contrast
from clipsteer.ops._dispatch import choose
from clipsteer.training.world import JointBatch, World, training_world


class _Joined(torch.autograd.Function):
    """Every process's rows; the gradient comes back summed over the processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: JointBatch) -> Tensor:
        ctx.batch = batch
        ctx.mine = slice(batch.offset, batch.offset + len(x))
        return batch.join(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        summed = ctx.batch.sum_(grad.clone(memory_format=torch.contiguous_format))
        return summed[ctx.mine], None


class _Scaled(nn.Module):
    """A loss of logits s/τ, with log(1/τ) as its parameter ``logit_scale``."""

    def __init__(self, temperature: float, learnable: bool, world: World | None, backend: str):
        super().__init__()
        if not 0 < temperature < math.inf:
            name = type(self).__name__
            raise ValueError(f"{name}: temperature must be positive and finite, got {temperature}")
        self.backend = backend
        self.world = training_world(world)
        start = torch.tensor(-math.log(temperature))
        self.logit_scale = nn.Parameter(start, requires_grad=learnable)

    @property
    def temperature(self) -> Tensor:
        """τ, ()."""
        return (-self.logit_scale).exp()

    @torch.no_grad()
    def settle_temperature_(self, before: Tensor | None = None) -> None:
        """CLIP's rule: logits are never scaled by more than 100; before is that of `DRRhoLoss`, and
        means nothing."""
        if self.logit_scale.requires_grad:
            self.logit_scale.clamp_(max=math.log(100))


class ContrastiveLoss(_Scaled):
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
        temperature: τ.
        learnable_temperature: whether its logarithm is trained.
        distill: w in [0, 1]; 0 is CLIP's loss.
        world: the processes; by default those of an initialised process group.
        backend: see `ops.clip_loss`; "plain" multiplies whole matrices of logits, in torch.

    Raises ValueError for values out of range.
    """

    def __init__(
        self,
        *,
        temperature: float = 0.07,
        learnable_temperature: bool = True,
        distill: float = 0.0,
        world: World | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(temperature, learnable_temperature, world, backend)
        if not 0 <= distill <= 1:
            raise ValueError(f"ContrastiveLoss: expected distill in [0, 1], got {distill}")
        self.distill = distill

    def forward(
        self,
        image: Tensor,  # (B, e)
        text: Tensor,  # (B, e)
        ids: Tensor | None = None,  # (B,)
        ref_image: Tensor | None = None,  # (B, e_ref)
        ref_text: Tensor | None = None,  # (B, e_ref)
        *,
        gamma: float = 1.0,
    ) -> Tensor:
        """The loss of a batch, ().

        Args:
            image, text: unit rows, this process's pairs.
            ref_image, ref_text: the reference's.
            ids, gamma: those of `DRRhoLoss`, and mean nothing here.

        Raises ValueError when distillation is asked for without a reference.
        """
        if self.distill and (ref_image is None or ref_text is None):
            raise ValueError("ContrastiveLoss: distill > 0 needs ref_image and ref_text")
        if self.backend != "plain":
            return self._fused(image, text, ref_image, ref_text)
        batch = None if self.world is None else JointBatch(self.world, len(image))
        rows = self._logits(image, text, batch)
        own = torch.arange(len(image), device=image.device)
        share = 1 / len(image) if batch is None else batch.size / batch.rows
        if batch is not None:
            own = own + batch.offset
        sums = [F.cross_entropy(logits, own, reduction="sum") for logits in rows]
        loss = (sums[0] + sums[1]) * share / 2
        if not self.distill or ref_image is None or ref_text is None:
            return loss
        with torch.no_grad():
            targets = [logits.log_softmax(1) for logits in self._logits(ref_image, ref_text, batch)]
        sums = []
        for logits, target in zip(rows, targets):
            target = target.to(logits.dtype)
            sums.append(F.kl_div(logits.log_softmax(1), target, log_target=True, reduction="sum"))
        soft = sums[0] + sums[1]
        return (1 - self.distill) * loss + self.distill * soft * share / 2

    def _fused(
        self,
        image: Tensor,  # (B, e)
        text: Tensor,  # (B, e)
        ref_image: Tensor | None,  # (B, e_ref)
        ref_text: Tensor | None,  # (B, e_ref)
    ) -> Tensor:
        """The same by sweeps over tiles of similarities."""
        joint = None
        if self.world is not None:
            joint = Exchange(self.world, len(image), local=True, with_grad=True)
        dtype = torch.promote_types(image.dtype, torch.float32)
        scale = self.logit_scale.exp().to(dtype)
        if not self.distill or ref_image is None or ref_text is None:
            backend = choose("clip_loss", self.backend, image)
            return contrast("clip_loss", (image, text, scale, None, 0.0), backend, joint)[0]
        backend = choose("distill_loss", self.backend, image)
        theirs = (ref_image.detach().to(image.dtype), ref_text.detach().to(image.dtype))
        still = scale.detach()
        pairs = (image, text, *theirs, scale, still)
        hard, soft = contrast("distill_loss", pairs, backend, joint)
        # cross-entropy less the reference's own entropy is the divergence
        soft = soft - self._entropy(*theirs, still, joint)
        return (1 - self.distill) * hard + self.distill * soft

    @torch.no_grad()
    def _entropy(
        self,
        image: Tensor,  # (B, e)
        text: Tensor,  # (B, e)
        scale: Tensor,  # ()
        joint: Exchange | None,
    ) -> Tensor:
        """The mean entropy of a batch's softmaxes, ()."""
        if joint is not None:
            # of several processes each would sweep once more for its own share of what follows
            backend = choose("distill_loss", self.backend, image)
            own = (image, text, image, text, scale, scale)
            return contrast("distill_loss", own, backend, joint)[1]
        backend = choose("clip_loss", self.backend, image)
        # −Σ p·log p is the loss, less what it moves along the scale: half of distillation's sweeps
        with torch.enable_grad():
            scale = scale.detach().requires_grad_()
            loss = contrast("clip_loss", (image, text, scale, None, 0.0), backend)[0]
            (slope,) = torch.autograd.grad(loss, scale)
        return loss.detach() - scale.detach() * slope

    def _logits(
        self,
        image: Tensor,  # (B, e)
        text: Tensor,  # (B, e)
        batch: JointBatch | None,
    ) -> tuple[Tensor, Tensor]:
        """(B, B_all) of this process's images against all texts, and of its texts against all
        images."""
        images = image
        texts = text
        if batch is not None:
            images = _Joined.apply(image, batch)
            texts = _Joined.apply(text, batch)
        return image @ texts.T / self.temperature, text @ images.T / self.temperature


class SigmoidLoss(_Scaled):
    """The sigmoid loss of SigLIP, every image and every text asked whether they belong together.

    With z = s/τ + b over all pairs of the batch, and l = 1 of pairs, else −1: L = −(1/B)·Σ_ij log
    σ(l_ij·z_ij). Of several processes each has its images, as many as it has, against everybody's
    texts. It returns their part of the joint loss, times the number of processes, so that averaging
    over the processes, as DDP does with gradients, gives that of the joint batch.

    Source: Zhai et al. 2023 (arXiv 2303.15343); τ and b start where open_clip's SigLIP models do.

    Args:
        temperature: τ.
        learnable_temperature: whether its logarithm is trained.
        logit_bias: where b starts, which is trained.
        world: the processes; by default those of an initialised process group.
        backend: see `ops.siglip_loss`; "plain" multiplies whole matrices of logits, in torch.

    Raises ValueError for values out of range.
    """

    def __init__(
        self,
        *,
        temperature: float = 0.1,
        learnable_temperature: bool = True,
        logit_bias: float = -10.0,
        world: World | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(temperature, learnable_temperature, world, backend)
        if not math.isfinite(logit_bias):
            raise ValueError(f"SigmoidLoss: logit_bias must be finite, got {logit_bias}")
        self.logit_bias = nn.Parameter(torch.tensor(float(logit_bias)))

    def forward(
        self,
        image: Tensor,  # (B, e)
        text: Tensor,  # (B, e)
        ids: Tensor | None = None,
        ref_image: Tensor | None = None,
        ref_text: Tensor | None = None,
        *,
        gamma: float = 1.0,
    ) -> Tensor:
        """The loss of a batch, ().

        Args:
            image, text: unit rows, this process's pairs.
            ids, ref_image, ref_text, gamma: those of `DRRhoLoss`, and mean nothing here.
        """
        batch = None
        if self.world is not None:
            batch = Exchange(self.world, len(image), local=True, with_grad=True)
        dtype = torch.promote_types(image.dtype, torch.float32)
        scale = self.logit_scale.exp().to(dtype)
        bias = self.logit_bias.to(dtype)
        if self.backend != "plain":
            backend = choose("siglip_loss", self.backend, image)
            return contrast("siglip_loss", (image, text, scale, bias), backend, batch)[0]
        texts = text if batch is None else _Joined.apply(text, batch)
        z = image.to(dtype) @ texts.to(dtype).T * scale + bias
        own = torch.zeros_like(z, dtype=torch.bool)
        own.diagonal(0 if batch is None else batch.offset).fill_(True)
        share = len(image) if batch is None else batch.rows / batch.size
        return -F.logsigmoid(torch.where(own, z, -z)).sum() / share


def _log_ratios(
    similarities: Tensor,  # (N, N)
    temperature: float | Tensor,
) -> list[Tensor]:
    """Every pair's logits less that of the pair itself, over texts and over images: (N, N) each."""
    sides = (similarities, similarities.T)
    return [(side - side.diagonal()[:, None]) / temperature for side in sides]


def _losses(
    sides: list[Tensor],  # (N, N) each
    taken: Tensor,  # (n,)
) -> Tensor:
    """(N,) CLIP's loss of every pair against those taken and itself."""
    # the pair itself adds exp(0)
    over_texts, over_images = (F.pad(side[:, taken], (0, 1)).logsumexp(1) for side in sides)
    return (over_texts + over_images) / 2


@torch.no_grad()
def select_learnable(
    image: Tensor,  # (N, e)
    text: Tensor,  # (N, e)
    ref_image: Tensor,  # (N, e_ref)
    ref_text: Tensor,  # (N, e_ref)
    keep: int,
    *,
    temperature: float | Tensor,
    chunks: int = 16,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Indices (keep,) of pairs that are learnable together.

    They are hard for the learner and easy for the reference.
    The first chunk is drawn evenly. A later one is drawn without replacement with probability ∝
    exp(learner's loss - reference's loss), where a pair's loss is CLIP's against the pairs drawn so
    far and itself.

    Source: Evans et al. 2024, JEST (arXiv 2406.17711), algorithm 1, with the softmax loss.
    DRRho-CLIP's code (Wei et al. 2025) departs from this in three ways: its first chunk is drawn
    with probability ∝ a pair's own difference of logits less the smallest one, not evenly; a later
    chunk compares a pair with those drawn so far alone, without the pair itself in the denominator;
    and the reference's logits are scaled by a fixed 100, not by the learner's temperature. (There
    each process draws its share from its own pairs, with the negatives of all.)

    Args:
        image, text: (N, e) unit rows of the learner.
        ref_image, ref_text: (N, e_ref) of the reference.
        keep: at most N.
        temperature: a number or a tensor ().
        chunks: how many draws.
        generator: on the features' device; None: torch's own.

    Raises ValueError for keep or chunks out of range.
    """
    n = len(image)
    if not 1 <= keep <= n or chunks < 1:
        raise ValueError(
            f"select_learnable: keep must be in [1, {n}] and chunks at least 1, got {keep} and "
            f"{chunks}"
        )
    ours = _log_ratios(image @ text.T, temperature)
    theirs = _log_ratios(ref_image @ ref_text.T, temperature)
    free = torch.ones(n, dtype=torch.bool, device=image.device)
    drawn: list[Tensor] = []
    ends = [round(keep * (c + 1) / chunks) for c in range(chunks)]
    for begin, end in zip([0, *ends], ends):
        score = torch.zeros(n, device=image.device)
        if drawn:
            taken = torch.cat(drawn)
            score = (_losses(ours, taken) - _losses(theirs, taken)).float()
        # Gumbel's trick: the largest of score + noise are draws without replacement
        even = torch.rand(n, device=image.device, generator=generator)
        noise = -torch.log(-torch.log(even.clamp_(1e-20, 1 - 1e-7)))
        picked = (score + noise).masked_fill(~free, -math.inf).topk(end - begin).indices
        free[picked] = False
        drawn.append(picked)
    return torch.cat(drawn)
