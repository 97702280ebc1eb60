"""A site to look into one's own SAE: every feature, every picture, and what steering does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipsteer import _lazy

if TYPE_CHECKING:
    from clipsteer.browse.build import build_site as build_site
    from clipsteer.browse.explained import Explained as Explained
    from clipsteer.browse.explained import Predictions as Predictions
    from clipsteer.browse.server import serve as serve
    from clipsteer.browse.towards import features_towards as features_towards

__getattr__, __dir__, __all__ = _lazy.attach(__name__, __file__)
