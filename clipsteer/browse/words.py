"""Words for features: those nearest to a decoder direction, and those that its pictures are made
of.

A decoder row lives at the hook point, words in the space of embeddings. The way from one to the
other is the model's own derivative (``Probes.jacobian``): the direction in which the embedding goes
when a little of the feature is added to every token. It is compared with each word's embedding less
the mean of all, as what texts have in common tells none of them apart. Names of pictures are
SpLiCE's (``clipsteer.splice``).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.browse.explained import templates_of
from clipsteer.browse.files import listed, number
from clipsteer.clip.model import CLIP
from clipsteer.splice.dictionary import ConceptDictionary

WORDS = 8
OPPOSITE = 4
CONCEPTS = 5
# pictures that name a feature
NAMED_BY = 6
# as ConceptDictionary.name_groups has it
_L1 = 0.3
# decomposed at a time
_ROWS = 1024
HOW = (
    "The decoder direction was taken through the rest of the model by its derivative on {images} "
    "pictures (the same vector added to every token), and compared with the embedding of each "
    "word, less the mean of all words."
)


class Words:
    """A list of words in a model's space.

    Args:
        words: M of them, at least two.
        embeddings: (N, e) unit rows, of all images.
        moved: (d_sae, e), where each decoder row takes the embedding.

    Raises ValueError for a model without text, fewer than two words, words that all embed alike.
    """

    def __init__(
        self,
        clip: CLIP,
        words: Sequence[str],
        embeddings: Tensor,  # (N, e)
        moved: Tensor,  # (d_sae, e)
    ) -> None:
        self.words = list(dict.fromkeys(words))
        mean = embeddings.double().mean(0).float()
        self.dictionary = ConceptDictionary.from_clip(
            clip, self.words, image_mean=mean, templates=templates_of(clip)
        ).to("cpu")
        self.embeddings = embeddings
        self._moved = F.normalize(moved.cpu(), dim=1)

    def nearest(self, features: range) -> list[tuple[list[list[Any]], list[list[Any]]]]:
        """[word, cosine] of the nearest words of each feature, and of the most opposite ones."""
        rows = self._moved[features.start : features.stop]
        cosines = rows @ self.dictionary.matrix.float().T  # (m, M)
        order = cosines.argsort(dim=1, descending=True, stable=True)
        found = []
        for row, best, is_there in zip(cosines, order, rows.any(1).tolist()):
            near = best[:WORDS] if is_there else best[:0]
            far = best.flip(0)[:OPPOSITE] if is_there else best[:0]
            found.append((self._named(row, near), self._named(row, far)))
        return found

    def _named(self, row: Tensor, places: Tensor) -> list[list[Any]]:
        values = listed(row[places].numpy())
        return [[self.words[i], value] for i, value in zip(places.tolist(), values)]

    def concepts(self, groups: Sequence[Sequence[int]]) -> list[list[list[Any]]]:
        """[word, weight] of what the pictures of each group have in common: their mean weights, as
        ``ConceptDictionary.name_groups`` has them."""
        weights = torch.zeros(len(groups), len(self.words))
        for row, group in zip(weights, groups):
            for image in group:
                places, values = self._weights[image]
                row[places] += values / len(group)
        named = self.dictionary.heaviest(weights, CONCEPTS)
        return [[[name, number(weight)] for name, weight in names] for names in named]

    @cached_property
    def _weights(self) -> list[tuple[Tensor, Tensor]]:
        """Of every image the words that it is made of, and their weights."""
        found = []
        for part in self.embeddings.split(_ROWS):
            decomposed = self.dictionary.decompose(part, _L1, relative=True)
            for row in decomposed.weights.float():
                places = row.nonzero()[:, 0]
                found.append((places, row[places]))
        return found
