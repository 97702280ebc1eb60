"""open_clip models: loading, hook points, captured and edited activations, zero-shot heads,
classifiers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipsteer import _lazy

if TYPE_CHECKING:
    from clipsteer.clip.classifier import ImageClassifier as ImageClassifier
    from clipsteer.clip.classifier import load_classifier as load_classifier
    from clipsteer.clip.classifier import predict as predict
    from clipsteer.clip.classifier import save_classifier as save_classifier
    from clipsteer.clip.classifier import zero_shot_classifier as zero_shot_classifier
    from clipsteer.clip.hooks import apply_at as apply_at
    from clipsteer.clip.hooks import beside as beside
    from clipsteer.clip.hooks import capture as capture
    from clipsteer.clip.hooks import evaluating as evaluating
    from clipsteer.clip.hooks import harvest as harvest
    from clipsteer.clip.hooks import hook_points as hook_points
    from clipsteer.clip.model import CLIP as CLIP
    from clipsteer.clip.model import EMOJI_TINY as EMOJI_TINY
    from clipsteer.clip.model import EMOJICLIP as EMOJICLIP
    from clipsteer.clip.model import default_hook_point as default_hook_point
    from clipsteer.clip.model import load as load
    from clipsteer.clip.model import load_origin as load_origin
    from clipsteer.clip.module import module_of as module_of
    from clipsteer.clip.pixels import Samples as Samples
    from clipsteer.clip.pixels import image_batches as image_batches
    from clipsteer.clip.pixels import image_embeddings as image_embeddings
    from clipsteer.clip.pixels import image_loader as image_loader
    from clipsteer.clip.pixels import loader as loader
    from clipsteer.clip.pixels import pixel_batches as pixel_batches
    from clipsteer.clip.pixels import train_transform as train_transform
    from clipsteer.clip.seen import Box as Box
    from clipsteer.clip.seen import seen_box as seen_box
    from clipsteer.clip.setup import Setup as Setup
    from clipsteer.clip.tokens import TOKENS as TOKENS
    from clipsteer.clip.tokens import Layout as Layout
    from clipsteer.clip.tokens import class_tokens as class_tokens
    from clipsteer.clip.tokens import layout_at as layout_at
    from clipsteer.clip.zero_shot import CLIP_TEMPLATES as CLIP_TEMPLATES
    from clipsteer.clip.zero_shot import EMOJI_TEMPLATES as EMOJI_TEMPLATES
    from clipsteer.clip.zero_shot import SIMPLE_TEMPLATES as SIMPLE_TEMPLATES
    from clipsteer.clip.zero_shot import prototype_head as prototype_head
    from clipsteer.clip.zero_shot import zero_shot_head as zero_shot_head

__getattr__, __dir__, __all__ = _lazy.attach(__name__, __file__)
