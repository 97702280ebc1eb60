"""Sparse autoencoders on CLIP's activations: model, files, training, evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipsteer import _lazy

if TYPE_CHECKING:
    from clipsteer.sae.activations import ActivationStore as ActivationStore
    from clipsteer.sae.activations import HarvestSource as HarvestSource
    from clipsteer.sae.activations import harvest_to_store as harvest_to_store
    from clipsteer.sae.architectures import ARCHITECTURES as ARCHITECTURES
    from clipsteer.sae.config import TRAINABLE as TRAINABLE
    from clipsteer.sae.config import TrainConfig as TrainConfig
    from clipsteer.sae.evaluate import evaluate_sae as evaluate_sae
    from clipsteer.sae.features import FeatureStatistics as FeatureStatistics
    from clipsteer.sae.features import Steerability as Steerability
    from clipsteer.sae.features import TopImages as TopImages
    from clipsteer.sae.features import feature_peaks as feature_peaks
    from clipsteer.sae.features import feature_statistics as feature_statistics
    from clipsteer.sae.features import name_features as name_features
    from clipsteer.sae.features import steerability as steerability
    from clipsteer.sae.features import top_images as top_images
    from clipsteer.sae.formats import detect as detect
    from clipsteer.sae.formats import export as export
    from clipsteer.sae.formats import parse_hub as parse_hub
    from clipsteer.sae.formats import read as read
    from clipsteer.sae.formats import save as save
    from clipsteer.sae.losses import BatchStats as BatchStats
    from clipsteer.sae.losses import auxk as auxk
    from clipsteer.sae.losses import batch_stats as batch_stats
    from clipsteer.sae.losses import fired as fired
    from clipsteer.sae.losses import forward as forward
    from clipsteer.sae.losses import fvu as fvu
    from clipsteer.sae.losses import l1 as l1
    from clipsteer.sae.losses import scaled_mse as scaled_mse
    from clipsteer.sae.model import SAE as SAE
    from clipsteer.sae.model import SAEOutput as SAEOutput
    from clipsteer.sae.normalization import NORMALIZATIONS as NORMALIZATIONS
    from clipsteer.sae.normalization import InputStats as InputStats
    from clipsteer.sae.pairs import PairSource as PairSource
    from clipsteer.sae.site import BLOCK as BLOCK
    from clipsteer.sae.site import LOGIT_SCALE as LOGIT_SCALE
    from clipsteer.sae.site import Site as Site
    from clipsteer.sae.site import chunks as chunks
    from clipsteer.sae.site import clean_pass as clean_pass
    from clipsteer.sae.site import clean_passes as clean_passes
    from clipsteer.sae.site import embed as embed
    from clipsteer.sae.site import find_site as find_site
    from clipsteer.sae.site import find_target as find_target
    from clipsteer.sae.site import from_site as from_site
    from clipsteer.sae.site import grid_side as grid_side
    from clipsteer.sae.site import set_features as set_features
    from clipsteer.sae.sources import START as START
    from clipsteer.sae.sources import ActivationSource as ActivationSource
    from clipsteer.sae.sources import Batch as Batch
    from clipsteer.sae.sources import IterableSource as IterableSource
    from clipsteer.sae.sources import Position as Position
    from clipsteer.sae.sources import TensorSource as TensorSource
    from clipsteer.sae.sources import as_source as as_source
    from clipsteer.sae.sources import generator as generator
    from clipsteer.sae.train import METRICS as METRICS
    from clipsteer.sae.train import Run as Run
    from clipsteer.sae.train import train_sae as train_sae
    from clipsteer.sae.trainer import SAETrainer as SAETrainer

__getattr__, __dir__, __all__ = _lazy.attach(__name__, __file__)
