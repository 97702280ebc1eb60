"""Contrastive training relative to a frozen reference: the loss, with its memory of every sample.

Over several processes the batch is the joint one: each has its rows against all columns, which it
holds once, and of the rows' memory its share by sample id.

Sources: Wei et al. 2025 (DRRho-CLIP, arXiv 2505.06699), Wei et al. 2024 (FastCLIP, arXiv
2407.01445).
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from clipsteer import ops
from clipsteer.ops import _check
from clipsteer.ops._dispatch import choose
from clipsteer.ops.drrho_loss import checked, run
from clipsteer.reference.temperature import balanced_rho, unbalanced
from clipsteer.training.world import JointBatch, World, training_world

# FastCLIP's rule for τ: from here down its learning rate is cut to a third.
SLOW_TEMPERATURE = 0.03


def gamma_schedule(epoch: int, epochs: int, gamma_min: float) -> float:
    """FastCLIP's share γ of the newest batch: half a cosine from 1 to ``gamma_min`` in ``epochs``.

    FastCLIP lets ``epochs`` be half of the training; DRRho-CLIP all of it, with
    γ_min = min(1, 4.177·E^−0.7265) for E epochs. Raises ValueError for values out of range.
    """
    if epochs < 1 or epoch < 0:
        raise ValueError(
            f"gamma_schedule: expected epoch >= 0 and epochs >= 1, got {epoch} and {epochs}"
        )
    if not 0 < gamma_min <= 1:
        raise ValueError(f"gamma_schedule: gamma_min must be in (0, 1], got {gamma_min}")
    progress = min(epoch / epochs, 1.0)
    falling = 0.5 * (1 + math.cos(math.pi * progress))
    return falling * (1 - gamma_min) + gamma_min


class DRRhoLoss(nn.Module):
    """``ops.drrho_loss`` that remembers u for each of ``num_samples`` training samples.

    Without reference features it is FastCLIP's global contrastive loss. Features are given
    normalised. It stands in for a loss of open_clip's, with the model's own ``logit_scale``: a call
    may give that, and then the loss owns no temperature.

    A learnable temperature follows FastCLIP-v3: the parameter ``logit_scale`` = log(1/τ), trained
    by AdamW in a group of its own without weight decay or warm-up, at a constant learning rate
    (2e-4 beside 1e-3 for the model, a quarter of it in DRRho-CLIP's runs), a third of that once τ ≤
    0.03; call ``settle_temperature_`` after every optimiser step. It starts at 0.07 there; a fixed
    one is 0.01. It settles where the rows' weights diverge from uniform ones by ρ, which takes
    log(B/(B - 1)) < ρ < log B (see ``ops.drrho_loss``). With another ρ it goes to a bound and the
    first step warns, no more than that, as the published 6.5 to 11 are such a ρ in most batches.
    They do not carry over: FastCLIP's code counts a term of τ's gradient twice.

    With a ``World`` of several processes (by default that of an initialised process group) the loss
    is that of the joint batch, of which each process gives its rows, as many as it has. Each
    returns the whole value; the gradient in its features is complete, and times the number of
    processes, as ``DistributedDataParallel`` averages over them. The gradient of ``logit_scale`` is
    the whole one everywhere.

    Args:
        num_samples: ids are in [0, num_samples); None where none will be given.
        temperature: τ, or where it starts.
        learnable_temperature: whether it is trained.
        rho: see ``ops.drrho_loss``; None is ½·log B of each batch where τ is learnable, else 0.
        eps: ε, in float32: 0 or one of its normal numbers. FastCLIP takes 1e-14 to 1e-6,
            DRRho-CLIP 1e-4.
        backend: see ``ops.drrho_loss``.
        temperature_min: the least that ``settle_temperature_`` leaves of a learnable one.
        world: the processes.

    Buffers:
        u: (2, num_samples) float32, image side and text side, NaN until a sample is visited. Of
            several processes each has the samples whose id leaves its rank when divided by their
            number, and none of it is in the ``state_dict``: ``gather_u`` and ``load_u`` serve
            checkpoints whatever that number.

    Raises ValueError for values out of range.
    """

    u: Tensor

    def __init__(
        self,
        num_samples: int | None = None,
        *,
        temperature: float = 0.01,
        learnable_temperature: bool = False,
        rho: float | None = None,
        eps: float = 1e-14,
        temperature_min: float = 0.01,
        backend: str = "auto",
        world: World | None = None,
    ) -> None:
        super().__init__()
        if num_samples is not None and num_samples < 1:
            raise ValueError(f"DRRhoLoss: num_samples must be at least 1, got {num_samples}")
        if not 0 < temperature < math.inf:
            raise ValueError(
                f"DRRhoLoss: temperature must be positive and finite, got {temperature}"
            )
        if learnable_temperature and not 0 < temperature_min <= temperature:
            expected = "0 < temperature_min <= temperature where it is learnable"
            raise ValueError(
                f"DRRhoLoss: expected {expected}, got {temperature_min} and {temperature}"
            )
        least = torch.finfo(torch.float32).tiny
        if eps != 0 and not least <= eps < math.inf:
            raise ValueError(
                f"DRRhoLoss: eps must be 0 or at least {least:.2g}, what float32 resolves, got "
                f"{eps}"
            )
        if rho is not None and not math.isfinite(rho):
            raise ValueError(f"DRRhoLoss: rho must be finite, got {rho}")
        self.num_samples = num_samples or 0
        self.rho = rho
        self.warned = False  # that ρ has no balance
        self.eps = eps
        self.backend = backend
        self.logit_scale = None
        if learnable_temperature:
            self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.fixed_temperature = temperature
        self.temperature_min = temperature_min
        self.world = training_world(world)
        own = range(self.num_samples)
        if self.world is not None:
            own = own[self.world.rank :: self.world.size]
        u = torch.full((2, len(own)), torch.nan)
        self.register_buffer("u", u, persistent=self.world is None)

    @property
    def temperature(self) -> Tensor | float:
        """τ: a number, or a tensor () with gradient when it is learnt."""
        return self.fixed_temperature if self.logit_scale is None else (-self.logit_scale).exp()

    @torch.no_grad()
    def settle_temperature_(
        self,
        before: Tensor | None = None,  # ()
    ) -> None:
        """After an optimiser step: keep a learnt τ in [temperature_min, 1]; does nothing to a fixed
        one.

        before: () a copy of ``logit_scale`` from before that step, of which a third is kept where τ
        was ≤ 0.03. AdamW's step being linear in its learning rate, that is FastCLIP's rate, and no
        GPU has to say first where τ is.
        """
        if self.logit_scale is None:
            return
        if before is not None:
            is_slow = before >= -math.log(SLOW_TEMPERATURE)
            third = before + (self.logit_scale - before) / 3
            self.logit_scale.copy_(torch.where(is_slow, third, self.logit_scale))
        lowest = min(0.0, -math.log(self.fixed_temperature))
        self.logit_scale.clamp_(lowest, -math.log(self.temperature_min))

    def forward(
        self,
        image_features: Tensor | None = None,  # (B, d)
        text_features: Tensor | None = None,  # (B, d)
        logit_scale: float | Tensor | None = None,
        ids: Tensor | None = None,  # (B,)
        output_dict: bool | Tensor | None = False,
        *,
        ref_image: Tensor | None = None,  # (B, d_ref)
        ref_text: Tensor | None = None,  # (B, d_ref)
        gamma: float = 1.0,
        image: Tensor | None = None,
        text: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch, called as open_clip's losses are; in training mode the samples' u
        move too.

        Args:
            image_features, text_features: (B, d) normalised features; `image` and `text` are the
                same.
            logit_scale: the model's 1/τ > 0, a number or a tensor with one element, which gets its
                gradient, in place of the loss's own temperature.
            ids: (B,) int64, which samples these are. Of a sample that comes twice the later pair is
                remembered. May be left out where gamma is 1: nothing is remembered then.
            output_dict: return {"contrastive_loss": loss}.
            ref_image, ref_text: (B, d_ref) the reference's, or None.
            gamma: share of this batch in u, see ``gamma_schedule``.

        ``loss(image, text, ids, ref_image, ref_text)`` is understood, too: ids are integers.

        Returns:
            () float32 (float64 for float64 features).

        Raises:
            ValueError, TypeError: as ``ops.drrho_loss``; ids not (B,) int64 in [0, num_samples), or
                none where gamma is less than 1; a logit_scale beside a learnable temperature.
        """
        if isinstance(logit_scale, Tensor) and not logit_scale.is_floating_point():
            if isinstance(ids, Tensor):
                ref_image = ids
            if isinstance(output_dict, Tensor):
                ref_text = output_dict
            logit_scale, ids, output_dict = None, logit_scale, False
        image = image_features if image is None else image
        text = text_features if text is None else text
        if image is None or text is None:
            raise TypeError("DRRhoLoss: expected image_features and text_features")
        temperature, learnt = self._temperature_for(logit_scale)
        if ids is None:
            if gamma != 1:
                raise ValueError(f"DRRhoLoss: gamma={gamma} < 1 needs ids, whose u it averages")
        else:
            self._check_ids(ids, image)
        features = (image, text, ref_image, ref_text)
        if self.world is not None:
            loss = self._joint(self.world, features, ids, gamma, temperature, learnt)
        else:
            loss, u = ops.drrho_loss(
                *features,
                temperature=temperature,
                gamma=gamma,
                u=None if ids is None else self.u[:, ids],
                eps=self.eps,
                rho=self._rho(len(image), learnt),
                backend=self.backend,
            )
            if self.training and ids is not None:
                self._remember(ids, u)
        return {"contrastive_loss": loss} if output_dict else loss

    def _temperature_for(self, logit_scale: float | Tensor | None) -> tuple[Tensor | float, bool]:
        """τ, and whether it is learnt."""
        if logit_scale is None:
            return self.temperature, self.logit_scale is not None
        if self.logit_scale is not None:
            raise ValueError(
                "DRRhoLoss: a logit_scale beside a temperature of the loss's own; leave one out "
                "(learnable_temperature=False)"
            )
        if isinstance(logit_scale, Tensor):
            return logit_scale.reciprocal(), logit_scale.requires_grad
        return (1 / logit_scale if logit_scale else math.inf), False

    def _joint(
        self,
        world: World,
        features: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
        ids: Tensor | None,  # (B,)
        gamma: float,
        temperature: Tensor | float,
        learnt: bool,
    ) -> Tensor:
        """The loss of all processes' batches, of which this one gives its rows."""
        image = features[0]
        batch = JointBatch(world, len(image))
        mine = slice(batch.offset, batch.offset + len(image))
        u = None
        if ids is not None:
            ids = batch.join(ids)
            u = self._recall(world, ids)[:, mine]
        rho = self._rho(batch.rows, learnt)
        given = checked(*features, temperature, gamma, u, self.eps, rho, rows=batch.rows)
        backend = choose("drrho_loss", self.backend, given.image)
        loss, u = run(given, backend, batch)
        if self.training and ids is not None:
            self._remember(ids, batch.join(u.T).T)
        return loss

    def _rho(self, pairs: int, learnt: bool) -> float:
        """ρ for a batch of so many pairs; the first that leaves a learnt τ without a balance
        warns."""
        if not learnt or pairs < 1:
            return self.rho or 0.0
        rho = balanced_rho(pairs) if self.rho is None else self.rho
        if self.training and not self.warned and not torch.compiler.is_compiling():
            text = unbalanced(rho, pairs)
            if text is not None:
                self.warned = True
                warnings.warn(f"DRRhoLoss: {text}", stacklevel=5)
        return rho

    def _check_ids(self, ids: Any, image: Tensor) -> None:
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
            got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise TypeError(f"DRRhoLoss: ids must be an int64 tensor, got {got}")
        if tuple(ids.shape) != tuple(image.shape[:1]):
            expected = f"(B,) = {tuple(image.shape[:1])}"
            raise ValueError(f"DRRhoLoss: ids must be of shape {expected}, got {tuple(ids.shape)}")
        _check.check_indices("DRRhoLoss", ids, self.num_samples, {"ids": ids}, "ids")

    @torch.no_grad()
    def gather_u(self) -> Tensor:
        """(2, num_samples), the memory of all samples; every process has to call it."""
        if self.world is None:
            return self.u.clone()
        size = self.world.size
        longest = self.u.new_zeros(2, -(-self.num_samples // size))
        longest[:, : self.u.shape[1]] = self.u
        parts = self.world.gather(longest.unsqueeze(0))  # (size, 2, longest)
        return parts.permute(1, 2, 0).flatten(1)[:, : self.num_samples].contiguous()

    @torch.no_grad()
    def load_u(
        self,
        u: Tensor,  # (2, num_samples)
    ) -> None:
        """Take what ``gather_u`` gave, of any number of processes. Raises ValueError for another
        shape."""
        if tuple(u.shape) != (2, self.num_samples):
            raise ValueError(
                f"DRRhoLoss: u must be of shape (2, {self.num_samples}), got {tuple(u.shape)}"
            )
        if self.world is not None:
            u = u[:, self.world.rank :: self.world.size]
        self.u.copy_(u)

    @torch.no_grad()
    def _recall(
        self,
        world: World,
        ids: Tensor,  # (B,), of the joint batch
    ) -> Tensor:
        """(2, B) of u, every process giving what it has of it."""
        here = ids % world.size == world.rank
        own = self.u.new_zeros(2, 1)
        if self.u.shape[1]:
            own = self.u[:, torch.where(here, ids // world.size, 0)]
        return world.sum_(torch.where(here, own, 0.0))

    @torch.no_grad()
    def _remember(
        self,
        ids: Tensor,  # (B,), of the joint batch
        u: Tensor,  # (2, B)
    ) -> None:
        places = ids
        order = torch.argsort(ids, stable=True)
        if self.world is not None:
            if not self.u.shape[1]:
                return
            # samples of other processes write what stands in the first place, before what comes to
            # it: so the shapes say nothing of the values, and a GPU need not be waited for
            here = ids % self.world.size == self.world.rank
            places = torch.where(here, ids // self.world.size, 0)
            u = torch.where(here, u.to(self.u.dtype), self.u[:, :1])
            order = torch.argsort(2 * places + here, stable=True)
        # equal places all write what the last of them has, so that no write depends on the order of
        # another
        ordered = places[order]
        last = torch.searchsorted(ordered, ordered, right=True) - 1
        self.u[:, ordered] = u[:, order[last]].to(self.u.dtype)
