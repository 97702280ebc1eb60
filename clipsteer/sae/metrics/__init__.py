"""What an SAE of images is worth: metrics on streamed sparse codes, each with an interval over
images.

    fvu             ‖x - x̂‖² over ‖x - mean x‖², tokens                    Gao et al. 2024
    localisation    Moran's I of features' maps over the patches           Moran 1950
    probing         accuracy of probes on the k best features, area over k Gurnee et al. 2023
    preservation    a probe's accuracy on reconstructions over that on activations
    monosemanticity similarity, by another tower, of a feature's images    Pach et al. 2025
    absorption      classes that share their features with their siblings  Karvonen et al. 2025
    coverage        F1 of each label's best feature                        Karvonen et al. 2024
    stability       matched decoder cosines of SAEs of other seeds         Paulo & Belrose 2025

One pass over the images (``Recorder``) keeps what all of them need: sums, and of every image the
features that were active in it; never images × features. What was scored is counted, and where
nothing was the value is NaN. Whatever is chosen with labels (features, thresholds, probes) is
chosen on a training part of the images and scored on the rest.

No number here says by itself that an SAE is useful. The authors of ViSAEBench, after 60 SAEs of
five backbones, found that the field's default metrics, FVU and monosemanticity, do not track
downstream performance, and that the backbone explains most of the variance of most metrics
("ViSAEBench: Cross-Backbone Evaluation of Vision Sparse Autoencoders Reveals Backbone-Dominated
Variance and Metric Dissociations", openreview.net/forum?id=jdIiJipMI4): compare SAEs of one tower,
by more than one metric, and by the task at hand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipsteer import _lazy

if TYPE_CHECKING:
    from clipsteer.sae.metrics.absorption import absorption_rate as absorption_rate
    from clipsteer.sae.metrics.coverage import label_coverage as label_coverage
    from clipsteer.sae.metrics.estimate import Estimate as Estimate
    from clipsteer.sae.metrics.evaluate import DEFINITIONS as DEFINITIONS
    from clipsteer.sae.metrics.evaluate import NAMES as NAMES
    from clipsteer.sae.metrics.evaluate import evaluate_metrics as evaluate_metrics
    from clipsteer.sae.metrics.evaluate import record as record
    from clipsteer.sae.metrics.monosemanticity import monosemanticity_score as monosemanticity_score
    from clipsteer.sae.metrics.probing import probe_preservation as probe_preservation
    from clipsteer.sae.metrics.probing import sparse_probing as sparse_probing
    from clipsteer.sae.metrics.recorder import Recorder as Recorder
    from clipsteer.sae.metrics.stability import seed_stability as seed_stability
    from clipsteer.sae.metrics.stream import Grid as Grid
    from clipsteer.sae.metrics.stream import ImageTokens as ImageTokens
    from clipsteer.sae.metrics.stream import from_tower as from_tower

__getattr__, __dir__, __all__ = _lazy.attach(__name__, __file__)
