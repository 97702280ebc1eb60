"""How a batch's loss compares with that of the best answer that is the same for every input."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from clipsteer.reference.drrho import DRRhoLoss
from clipsteer.reference.losses import SigmoidLoss
from clipsteer.training.world import World


@torch.no_grad()
def share_of_constant(
    criterion: Any,
    loss: Tensor,  # ()
    image: Tensor,  # (b, e)
    theirs: dict[str, Tensor | None],  # (b, e_ref) each
    pairs: int,
    rho: float,
    world: World,
) -> float | None:
    """The joint batch's loss over that of constant features: 1 where nothing is told apart, 0 where
    the other pairs weigh as much as the own one (of siglip: where all are right).

    Args:
        criterion: what gave the loss.
        image: this process's rows.
        theirs: the reference's, by the criterion's names.
        pairs: of the joint batch.
        rho: of a `DRRhoLoss`.

    Returns None where constant features have no more than that themselves.
    """
    least = 0.0
    if isinstance(criterion, SigmoidLoss):
        # the best logit for all is log(1/(B - 1)), which takes a bias of its own
        none = math.log(pairs) + (pairs - 1) * math.log(pairs / max(pairs - 1, 1))
        constant = torch.full_like(loss, none)
    else:
        same = torch.zeros_like(image)
        same[:, :1] = 1
        criterion.eval()  # what is remembered of the samples stays
        constant = criterion(image=same, text=same, **theirs)
        criterion.train()
    both = world.sum_(torch.stack([loss.detach(), constant])) / world.size
    if isinstance(criterion, DRRhoLoss):
        least = float(criterion.temperature) * (rho - math.log(pairs))
    mean, none = (float(value) - least for value in both)
    return mean / none if none > 0 else None
