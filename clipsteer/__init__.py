"""Fused, validated ops for CLIP, and the steering, interpretation and training built on them.

``clipsteer.clip``: models, hooks, tokens, zero-shot heads. ``clipsteer.sae``,
``clipsteer.conceptors``, ``clipsteer.splice``: sparse autoencoders, soft projections, directions by
name. ``clipsteer.steering``: what changes a model's activations. ``clipsteer.ensembles``: weight
averages. ``clipsteer.reference``: training with a reference model. ``clipsteer.losses``:
contrastive losses in place of open_clip's. ``clipsteer.continual``: classes task by task.
``clipsteer.browse``: a site to look into one's own SAE.
``clipsteer.ops``: the ops. Below all: ``clipsteer.data``, ``clipsteer.training``,
``clipsteer.report``, ``clipsteer.testing``, ``clipsteer.io``.

Not offered, of what the papers behind these modules have:

- Fisher-weighted merging (Matena & Raffel 2022); ``clipsteer.ensembles`` takes plain averages;
- a temperature of its own for every pair (iSogCLR; FastCLIP's and DRRho-CLIP's "individual"
  schemes); one is learnt for all;
- ghost gradients (Anthropic 2024) for features that never fire; ``clipsteer.sae`` has the
  auxiliary loss on the k strongest dead features (Gao et al. 2024);
- SpLiCE's interventions on single concepts, and its vocabularies (LAION, MSCOCO);
  ``clipsteer.splice`` takes any texts, and weights can be set to 0 before ``reconstruct``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipsteer import _lazy, _renamed
from clipsteer._version import __version__ as __version__

if TYPE_CHECKING:  # the public page
    from clipsteer import continual as continual
    from clipsteer import data as data
    from clipsteer import ops as ops
    from clipsteer import testing as testing
    from clipsteer.clip.model import load as load
    from clipsteer.conceptors.conceptor import Conceptor as Conceptor
    from clipsteer.ensembles.finetuning import finetune as finetune
    from clipsteer.ensembles.merging import wise_ft as wise_ft
    from clipsteer.reference.drrho import DRRhoLoss as DRRhoLoss
    from clipsteer.reference.train import train_contrastive as train_contrastive
    from clipsteer.sae.evaluate import evaluate_sae as evaluate_sae
    from clipsteer.sae.model import SAE as SAE
    from clipsteer.sae.steering import SAESteering as SAESteering
    from clipsteer.sae.train import train_sae as train_sae
    from clipsteer.splice.dictionary import ConceptDictionary as ConceptDictionary
    from clipsteer.steering import ConceptorSteering as ConceptorSteering
    from clipsteer.steering import VectorSteering as VectorSteering
    from clipsteer.steering import steer as steer

if TYPE_CHECKING:  # importable, and not on the page
    from clipsteer.ensembles.merging import RunningEnsemble as RunningEnsemble
    from clipsteer.io.files import FileFormatError as FileFormatError
    from clipsteer.reference.config import ContrastiveConfig as ContrastiveConfig
    from clipsteer.sae.config import TrainConfig as TrainConfig
    from clipsteer.sae.model import SAEOutput as SAEOutput
    from clipsteer.steering import AdditiveSteering as AdditiveSteering

__getattr__, __dir__, __all__ = _lazy.attach(__name__, __file__)
_renamed.install()
