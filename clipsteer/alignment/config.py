"""Settings of a comparison, concept by concept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clipsteer.training.settings import Count, Positive, Share, check_fields


@dataclass(frozen=True)
class AlignmentConfig:
    """What counts as a concept, and which rows it is looked for in; concept discovery has the
    settings of Vielhaben et al. by default.

    Raises:
        ValueError: a setting out of its range.
    """

    score: Literal["clusters", "sae", "splice", "conceptor"] = "clusters"
    """what concepts are: clusters of the rows (UMAP and HDBSCAN), features of SAEs, words of
    SpLiCE (of image embeddings alone), or the images' classes by the energies of their
    conceptors"""
    tokens: Literal["patches", "cls", "mean"] = "patches"
    """the rows of an image: patches, its class token, or the mean of its patches"""
    rows_per_image: Count = 1
    """patches of an image, at the same places of the picture in every model"""
    components: Count = 50
    """dimensions that UMAP embeds into"""
    neighbors: Count = 30
    """of a row, in UMAP"""
    min_dist: Positive = 0.01
    """between embedded rows, in UMAP"""
    min_cluster_size: Count = 50
    """rows of the smallest cluster of HDBSCAN"""
    min_samples: Count = 20
    """rows in the neighbourhood of a core, in HDBSCAN"""
    l1: Positive = 0.25
    """of SpLiCE; the larger, the fewer words an image has"""
    matched: Count = 64
    """concepts of a layer that are matched one by one, those of the largest mean score"""
    universal: Share = 0.5
    """relative distance below which a matched concept is universal, and above which one without
    its like is unique"""
    pictures: Count = 6
    """shown of a concept"""
    batch_size: Count = 64
    """images a forward pass"""
    seed: int = 0
    """of places, UMAP and blocks of images"""

    def __post_init__(self) -> None:
        check_fields(self)
