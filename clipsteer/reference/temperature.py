"""Where ρ holds a learnt temperature; needs no torch.

Minimised over τ as well, the loss is the largest average of a row's differences over weights whose
divergence from uniform ones is at most ρ: its derivative dL/dτ is ρ less that divergence, KL(w ‖
uniform), which falls in τ from log B at 0 to log(B/(B - 1)) at infinity. So ρ pushes τ down, and
there is a balance for ρ between the two alone.

Source: Qiu et al. 2023 (arXiv 2305.11965), distributionally robust contrastive learning.
"""

from __future__ import annotations

import math


def balanced_rho(pairs: int) -> float:
    """½·log B for batches of B pairs: at the balance a row's weights are as uneven as uniform ones
    over √B pairs."""
    return math.log(pairs) / 2


def unbalanced(rho: float, pairs: int) -> str | None:
    """Where ρ drives a learnt τ that it does not hold, in words; None where there is a balance."""
    most = math.log(pairs)
    least = math.log(pairs / (pairs - 1)) if pairs > 1 else math.inf
    if least < rho < most:
        return None
    end = "falls to its least" if rho >= most else "rises to its most"
    where = "and no ρ has one there"
    if pairs > 2:
        where = f"which takes {least:.2g} < ρ < log B = {most:.3g}, such as {most / 2:.3g}"
    return f"τ {end}: ρ = {rho:g} has no balance in batches of {pairs}, {where}"
