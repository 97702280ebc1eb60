"""The optimizer of contrastive training, and what its loss follows over the epochs."""

from __future__ import annotations

import torch
from torch import nn

from clipsteer.reference.config import ContrastiveConfig
from clipsteer.reference.drrho import gamma_schedule


def make_optimizer(
    config: ContrastiveConfig, trained: list[nn.Parameter], temperature: list[nn.Parameter]
) -> torch.optim.AdamW:
    """AdamW on the model's parameters, and on the loss's own in a third group."""
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        {"params": temperature, "weight_decay": 0.0},
    ]
    if config.remembers:
        # FastCLIP's rule for τ: a quarter of the peak, constant; `settle_temperature_` has the
        # rest of it
        groups[2]["lr"] = config.lr / 4
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), eps=1e-6)


def gamma_of(config: ContrastiveConfig, epoch: int, epochs: int) -> float:
    """The share γ of the newest batch in one of so many epochs."""
    least = config.gamma_min
    if least is None:
        least = min(1.0, 4.177 * epochs**-0.7265)
    return gamma_schedule(epoch, config.gamma_epochs or epochs, least)
