"""Contrastive training with a frozen reference model (DRRho-CLIP, Wei et al. 2025)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipsteer import _lazy

if TYPE_CHECKING:
    from clipsteer.reference.config import LEAST_TEMPERATURE as LEAST_TEMPERATURE
    from clipsteer.reference.config import LOSSES as LOSSES
    from clipsteer.reference.config import ContrastiveConfig as ContrastiveConfig
    from clipsteer.reference.drrho import SLOW_TEMPERATURE as SLOW_TEMPERATURE
    from clipsteer.reference.drrho import DRRhoLoss as DRRhoLoss
    from clipsteer.reference.drrho import gamma_schedule as gamma_schedule
    from clipsteer.reference.evaluate import excess_losses as excess_losses
    from clipsteer.reference.evaluate import write_excess as write_excess
    from clipsteer.reference.features import KIND as KIND
    from clipsteer.reference.features import ReferenceFeatures as ReferenceFeatures
    from clipsteer.reference.features import cached as cached
    from clipsteer.reference.features import compute as compute
    from clipsteer.reference.features import encode_dataset as encode_dataset
    from clipsteer.reference.features import encode_texts as encode_texts
    from clipsteer.reference.features import load_run as load_run
    from clipsteer.reference.features import model_digest as model_digest
    from clipsteer.reference.features import read as read
    from clipsteer.reference.losses import ContrastiveLoss as ContrastiveLoss
    from clipsteer.reference.losses import SigmoidLoss as SigmoidLoss
    from clipsteer.reference.losses import select_learnable as select_learnable
    from clipsteer.reference.pairs import Pairs as Pairs
    from clipsteer.reference.temperature import balanced_rho as balanced_rho
    from clipsteer.reference.train import train_contrastive as train_contrastive

__getattr__, __dir__, __all__ = _lazy.attach(__name__, __file__)
