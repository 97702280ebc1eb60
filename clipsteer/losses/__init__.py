"""Contrastive losses as modules, with the constructor arguments and call signatures of open_clip's:
what takes those takes these."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipsteer import _lazy

if TYPE_CHECKING:
    from clipsteer.losses.clip import ClipLoss as ClipLoss
    from clipsteer.losses.distill import DistillClipLoss as DistillClipLoss
    from clipsteer.losses.siglip import SigLipLoss as SigLipLoss

__getattr__, __dir__, __all__ = _lazy.attach(__name__, __file__)
