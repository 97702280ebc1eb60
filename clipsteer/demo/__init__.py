"""``clipsteer demo``: a CLIP model's features, conceptors and WiSE-FT curve, in one page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipsteer import _lazy

if TYPE_CHECKING:
    from clipsteer.demo.autoencoder import evaluate as evaluate
    from clipsteer.demo.autoencoder import steps_in as steps_in
    from clipsteer.demo.autoencoder import train as train
    from clipsteer.demo.findings import MULTIPLES as MULTIPLES
    from clipsteer.demo.findings import OTHER_PROBES as OTHER_PROBES
    from clipsteer.demo.findings import PROBE as PROBE
    from clipsteer.demo.findings import STEERABLE as STEERABLE
    from clipsteer.demo.findings import Demo as Demo
    from clipsteer.demo.findings import run as run
    from clipsteer.demo.findings import study as study

__getattr__, __dir__, __all__ = _lazy.attach(__name__, __file__)
