"""Conceptors: soft projections onto the directions that some activations use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipsteer import _lazy

if TYPE_CHECKING:
    from clipsteer.conceptors.conceptor import Conceptor as Conceptor
    from clipsteer.conceptors.conceptor import Truncated as Truncated
    from clipsteer.conceptors.conceptor import load as load
    from clipsteer.conceptors.conceptor import save as save
    from clipsteer.conceptors.fit import EPS as EPS
    from clipsteer.conceptors.fit import ApertureRow as ApertureRow
    from clipsteer.conceptors.fit import aperture_sweep as aperture_sweep
    from clipsteer.conceptors.fit import check_aperture as check_aperture
    from clipsteer.conceptors.fit import choose_aperture as choose_aperture
    from clipsteer.conceptors.fit import correlation as correlation
    from clipsteer.conceptors.fit import shares as shares
    from clipsteer.conceptors.fit import spectrum as spectrum

__getattr__, __dir__, __all__ = _lazy.attach(__name__, __file__)
