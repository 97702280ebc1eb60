"""Contrastive training relative to a frozen reference model: the loss with its memory of every sample.

Sources: Wei et al. 2025 (DRRho-CLIP, arXiv 2505.06699), Wei et al. 2024 (FastCLIP, arXiv 2407.01445).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from clipsteer import ops
from clipsteer.ops import _check

# FastCLIP's rule for τ: below this its learning rate is cut to a third.
SLOW_TEMPERATURE = 0.03


def gamma_schedule(epoch: int, epochs: int, gamma_min: float) -> float:
    """FastCLIP's share γ of the newest batch: from 1 in epoch 0 by half a cosine to ``gamma_min`` in ``epochs``.

    FastCLIP lets ``epochs`` be half of the training; DRRho-CLIP all of it, with
    γ_min = min(1, 4.177·E^−0.7265) for E epochs.
    """
    if epochs < 1 or epoch < 0:
        raise ValueError(f"gamma_schedule: expected epoch >= 0 and epochs >= 1, got {epoch} and {epochs}")
    if not 0 < gamma_min <= 1:
        raise ValueError(f"gamma_schedule: gamma_min must be in (0, 1], got {gamma_min}")
    progress = min(epoch / epochs, 1.0)
    return 0.5 * (1 + math.cos(math.pi * progress)) * (1 - gamma_min) + gamma_min


class DRRhoLoss(nn.Module):
    """``ops.drrho_loss`` that remembers u for each of ``num_samples`` training samples.

    Without reference features it is FastCLIP's global contrastive loss. Features are given normalised.

    A learnable temperature follows FastCLIP-v3: the parameter ``logit_scale`` = log(1/τ), trained by AdamW in a group
    of its own without weight decay or warm-up, at a constant learning rate (2e-4 beside 1e-3 for the model, a quarter
    of it in DRRho-CLIP's runs) which ``temperature_lr`` cuts to a third once τ ≤ 0.03; call ``clamp_temperature_``
    after every optimiser step. It starts at 0.07 there, with ρ of 6.5 to 11; a fixed one is 0.01.

    Args:
        num_samples: ids are in [0, num_samples).
        temperature: τ, or where it starts; temperature_min: the least that ``clamp_temperature_`` leaves.
        rho, eps: see ``ops.drrho_loss``.
        backend: see ``ops.drrho_loss``.

    Buffers:
        u: (2, num_samples) float32, image side and text side, NaN until a sample is visited.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        temperature: float = 0.01,
        learnable_temperature: bool = False,
        rho: float = 0.0,
        eps: float = 1e-14,
        temperature_min: float = 0.01,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if num_samples < 1:
            raise ValueError(f"DRRhoLoss: num_samples must be at least 1, got {num_samples}")
        if not 0 < temperature_min <= temperature:
            expected = "0 < temperature_min <= temperature"
            raise ValueError(f"DRRhoLoss: expected {expected}, got {temperature_min} and {temperature}")
        self.num_samples, self.rho, self.eps, self.backend = num_samples, rho, eps, backend
        self.temperature_min, self.fixed_temperature = temperature_min, temperature
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature))) if learnable_temperature else None
        self.register_buffer("u", torch.full((2, num_samples), torch.nan))

    @property
    def temperature(self) -> Tensor | float:
        """τ: a number, or a tensor () with gradient when it is learnt."""
        return self.fixed_temperature if self.logit_scale is None else (-self.logit_scale).exp()

    @torch.no_grad()
    def clamp_temperature_(self) -> None:
        """Keep a learnt τ in [temperature_min, 1]; does nothing to a fixed one."""
        if self.logit_scale is not None:
            self.logit_scale.clamp_(min(0.0, -math.log(self.fixed_temperature)), -math.log(self.temperature_min))

    def temperature_lr(self, lr: float) -> float:
        """The learning rate of ``logit_scale`` for this step: a third of ``lr`` once τ ≤ 0.03."""
        tau = self.fixed_temperature if self.logit_scale is None else math.exp(-self.logit_scale.item())
        return lr / 3 if tau <= SLOW_TEMPERATURE else lr

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        ids: Tensor,
        ref_image: Tensor | None = None,
        ref_text: Tensor | None = None,
        *,
        gamma: float = 1.0,
    ) -> Tensor:
        """The loss of a batch; in training mode the samples' u move too.

        Args:
            image, text: (B, d) normalised features. ref_image, ref_text: (B, d_ref) the reference's, or None.
            ids: (B,) int64, which samples these are. Of a sample that comes twice the later pair is remembered.
            gamma: share of this batch in u, see ``gamma_schedule``.

        Returns:
            () float32.

        Raises:
            ValueError, TypeError: as ``ops.drrho_loss``; ids not (B,) int64 in [0, num_samples).
        """
        self._check_ids(ids, image)
        loss, u = ops.drrho_loss(
            image, text, ref_image, ref_text, temperature=self.temperature, gamma=gamma, u=self.u[:, ids], eps=self.eps,
            rho=self.rho, backend=self.backend,
        )  # fmt: skip
        if self.training:
            self._remember(ids, u)
        return loss

    def _check_ids(self, ids: Tensor, image: Tensor) -> None:
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
            got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise TypeError(f"DRRhoLoss: ids must be an int64 tensor, got {got}")
        if tuple(ids.shape) != tuple(image.shape[:1]):
            raise ValueError(f"DRRhoLoss: ids must be of shape (B,) = {tuple(image.shape[:1])}, got {tuple(ids.shape)}")
        _check.check_indices("DRRhoLoss", ids, self.num_samples, {"ids": ids}, "ids")

    @torch.no_grad()
    def _remember(self, ids: Tensor, u: Tensor) -> None:
        # equal ids all write what the last of them has, so that no write depends on the order of another
        ordered, order = ids.sort(stable=True)
        last = torch.searchsorted(ordered, ordered, right=True) - 1
        self.u[:, ordered] = u[:, order[last]].to(self.u.dtype)
