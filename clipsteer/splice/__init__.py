"""SpLiCE: embeddings as sparse non-negative sums of text concepts (Bhalla et al. 2024)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipsteer import _lazy

if TYPE_CHECKING:
    from clipsteer.splice.dictionary import ConceptDictionary as ConceptDictionary
    from clipsteer.splice.dictionary import mean_embedding as mean_embedding
    from clipsteer.splice.lasso import Decomposition as Decomposition
    from clipsteer.splice.lasso import nonnegative_lasso as nonnegative_lasso

__getattr__, __dir__, __all__ = _lazy.attach(__name__, __file__)
