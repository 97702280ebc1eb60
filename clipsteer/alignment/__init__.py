"""Concept alignment: which concepts two layers or models share, and which only one has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipsteer import _lazy

if TYPE_CHECKING:
    from clipsteer.alignment.clusters import Clusters as Clusters
    from clipsteer.alignment.clusters import of_clusters as of_clusters
    from clipsteer.alignment.compare import Compared as Compared
    from clipsteer.alignment.compare import Layer as Layer
    from clipsteer.alignment.compare import align as align
    from clipsteer.alignment.config import AlignmentConfig as AlignmentConfig
    from clipsteer.alignment.measure import Match as Match
    from clipsteer.alignment.measure import Matching as Matching
    from clipsteer.alignment.measure import agreement as agreement
    from clipsteer.alignment.measure import chance as chance
    from clipsteer.alignment.measure import follow_concepts as follow_concepts
    from clipsteer.alignment.measure import match_concepts as match_concepts
    from clipsteer.alignment.measure import neighbours_agree_most as neighbours_agree_most
    from clipsteer.alignment.page import write_page as write_page
    from clipsteer.alignment.rows import Places as Places
    from clipsteer.alignment.rows import Rows as Rows
    from clipsteer.alignment.rows import harvest_rows as harvest_rows
    from clipsteer.alignment.scores import Proximity as Proximity
    from clipsteer.alignment.scores import of_classes as of_classes
    from clipsteer.alignment.scores import of_features as of_features
    from clipsteer.alignment.scores import of_words as of_words
    from clipsteer.alignment.scores import shares as shares

__getattr__, __dir__, __all__ = _lazy.attach(__name__, __file__)
