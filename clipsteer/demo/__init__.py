"""``clipsteer demo``: a CLIP model's features, conceptors and WiSE-FT curve, in one page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipsteer import _lazy

if TYPE_CHECKING:
    from clipsteer.demo.run import MULTIPLES as MULTIPLES
    from clipsteer.demo.run import OTHER_PROBES as OTHER_PROBES
    from clipsteer.demo.run import PROBE as PROBE
    from clipsteer.demo.run import STEERABLE as STEERABLE
    from clipsteer.demo.run import Demo as Demo
    from clipsteer.demo.run import evaluate as evaluate
    from clipsteer.demo.run import run as run
    from clipsteer.demo.run import steps_in as steps_in
    from clipsteer.demo.run import study as study
    from clipsteer.demo.run import train as train

__getattr__, __dir__, __all__ = _lazy.attach(__name__, __file__)
