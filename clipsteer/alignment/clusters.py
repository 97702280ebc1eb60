"""Concepts as the paper finds them: clusters of a layer's rows, and how near each row is to each.

UMAP embeds the rows (manifolds become dense regions), HDBSCAN finds the leaves of the tree of dense
regions, and its soft clustering says how near every row is to every leaf, noise included.

Source: Vielhaben, Bareeva, Berend, Samek & Strodthoff, NeurIPS 2025 (arXiv 2412.06639); UMAP:
McInnes et al. 2018 (arXiv 1802.03426); HDBSCAN and its soft clustering: McInnes & Healy 2017. The
authors score the rows as ones that the clustering has not seen (``membership_vector``); here it is
known that they are its own (``all_points_membership_vectors``).
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clipsteer.alignment.config import AlignmentConfig
from clipsteer.alignment.scores import Proximity

REMEDY = (
    "pip install 'clipsteer[align]', or choose another score: sae, splice or conceptor need neither"
)


class Clusters(NamedTuple):
    """Clusters of rows."""

    proximity: Proximity
    labels: Tensor  # (N,) int64, -1 for noise
    noise: float  # share of the rows that are in no cluster


def _libraries() -> tuple[Any, Any]:
    try:
        import hdbscan
        import umap
    except ImportError as error:
        raise RuntimeError(
            f"alignment: clusters need umap-learn and hdbscan ({error}): {REMEDY}"
        ) from error
    return umap, hdbscan


def check_libraries() -> None:
    """Raise RuntimeError where UMAP or HDBSCAN cannot be imported."""
    _libraries()


def of_clusters(
    x: Tensor,  # (N, d)
    config: AlignmentConfig | None = None,
) -> Clusters:
    """The concepts of a layer's rows, the same for the same seed.

    Raises:
        ValueError: fewer rows than UMAP's neighbours, or no cluster.
        RuntimeError: umap-learn or hdbscan is missing.
    """
    config = AlignmentConfig() if config is None else config
    umap, hdbscan = _libraries()
    n = len(x)
    least = max(config.neighbors, config.components, config.min_samples) + 2
    if n < least:
        raise ValueError(
            f"alignment: clusters need at least {least} rows, got {n}; take more images or more "
            "rows of each, or fewer neighbors and components"
        )
    with warnings.catch_warnings():
        # that a seed leaves one thread, and sklearn's renamed arguments
        warnings.simplefilter("ignore")
        embedded = umap.UMAP(
            n_components=config.components,
            n_neighbors=config.neighbors,
            min_dist=config.min_dist,
            random_state=config.seed,
        ).fit_transform(x.float().cpu().numpy())
        found = hdbscan.HDBSCAN(
            min_cluster_size=config.min_cluster_size,
            min_samples=config.min_samples,
            cluster_selection_method="leaf",
            prediction_data=True,
        ).fit(embedded.astype(np.float64))
        labels = torch.from_numpy(found.labels_.astype(np.int64))
        count = int(labels.max()) + 1
        if count < 2:
            raise ValueError(
                f"alignment: HDBSCAN finds {count} cluster(s) of at least "
                f"{config.min_cluster_size} rows among {n}, and nothing can be told apart by them; "
                "take more images or more rows of each, or a smaller min_cluster_size"
            )
        soft = hdbscan.all_points_membership_vectors(found)
    scores = torch.from_numpy(np.nan_to_num(soft)).float().clamp(0, 1)
    # of rounding, in float32
    scores = scores / scores.sum(1, keepdim=True).clamp_min(1)
    names = [f"cluster {k}" for k in range(count)]
    noise = float((labels < 0).double().mean())
    return Clusters(Proximity(scores, names), labels, noise)
