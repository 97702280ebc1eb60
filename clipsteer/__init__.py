"""clipsteer: fused, validated ops for CLIP, and steering, interpretation and training methods built on them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> module that holds it; loaded at first use so that `import clipsteer` stays light
_LAZY = {
    "SAE": "sae",
    "SAEOutput": "sae",
    "Conceptor": "conceptor",
    "FileFormatError": "_files",
    "SAESteering": "steering",
    "VectorSteering": "steering",
    "ConceptorSteering": "steering",
    "AdditiveSteering": "steering",
    "steer": "steering",
    "TrainConfig": "sae_train",
    "train_sae": "sae_train",
    "evaluate_sae": "sae_eval",
    "ConceptDictionary": "splice",
    "DRRhoLoss": "reference_model",
    "RunningEnsemble": "merging",
    "wise_ft": "merging",
    "ContrastiveConfig": "contrastive_config",
    "train_contrastive": "contrastive_train",
}

__all__ = ["__version__", "ops", *_LAZY]

if TYPE_CHECKING:
    from clipsteer import ops as ops
    from clipsteer._files import FileFormatError as FileFormatError
    from clipsteer.conceptor import Conceptor as Conceptor
    from clipsteer.contrastive_config import ContrastiveConfig as ContrastiveConfig
    from clipsteer.contrastive_train import train_contrastive as train_contrastive
    from clipsteer.merging import RunningEnsemble as RunningEnsemble
    from clipsteer.merging import wise_ft as wise_ft
    from clipsteer.reference_model import DRRhoLoss as DRRhoLoss
    from clipsteer.sae import SAE as SAE
    from clipsteer.sae import SAEOutput as SAEOutput
    from clipsteer.sae_eval import evaluate_sae as evaluate_sae
    from clipsteer.sae_train import TrainConfig as TrainConfig
    from clipsteer.sae_train import train_sae as train_sae
    from clipsteer.splice import ConceptDictionary as ConceptDictionary
    from clipsteer.steering import AdditiveSteering as AdditiveSteering
    from clipsteer.steering import ConceptorSteering as ConceptorSteering
    from clipsteer.steering import SAESteering as SAESteering
    from clipsteer.steering import VectorSteering as VectorSteering
    from clipsteer.steering import steer as steer


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("clipsteer.ops")
    if name in _LAZY:
        return getattr(importlib.import_module(f"clipsteer.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'clipsteer' has no attribute {name!r}")
