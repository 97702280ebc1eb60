"""One SAE over all images: what is made of its codes, and what that needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from clipsteer.browse.codes import FeatureCodes
from clipsteer.browse.cost import Budget
from clipsteer.browse.effects import Effects, how_many
from clipsteer.browse.explained import Explained, Labelled, find_predictions
from clipsteer.browse.files import Folder
from clipsteer.browse.probes import Probes
from clipsteer.browse.relations import Classes
from clipsteer.browse.survey import Survey
from clipsteer.browse.words import Words
from clipsteer.data.dataset import spread

# pictures on which features are steered
STEER_IMAGES = 4
# pictures through whose derivative directions are read
_READ_ON = 8


class Job(NamedTuple):
    """What is to be built."""

    dataset: Any
    folder: Folder
    words: list[str]  # none where there is no text
    known: Labelled | None
    budget: Budget
    seed: int

    @property
    def classes(self) -> Classes | None:
        """What features are compared with; None where there are none."""
        if self.known is None:
            return None
        return Classes(self.known.labels.numpy(), len(self.known.classes))


@dataclass(frozen=True)
class Side:
    """An SAE at its place, over the images.

    Attributes:
        explained: with what images are told apart by.
        moved: (d_sae, e), where a little of each feature takes the embedding.
        read_on: on how many pictures that was measured.
        words: None for a tower without text.
        probed: the images on which features are steered.
    """

    explained: Explained
    survey: Survey
    codes: FeatureCodes
    moved: Tensor  # (d_sae, e)
    read_on: int
    words: Words | None
    probed: list[int]

    @classmethod
    def look(cls, job: Job, explained: Explained, name: str, *, thumbs: bool) -> Side:
        """See every image that was not seen, and order what was found by feature; ``thumbs`` also
        makes the thumbnails and removes features from images."""
        budget = job.budget if thumbs else None
        survey = Survey(explained, job.dataset, job.folder, name, thumbs=thumbs, budget=budget)
        survey.run()
        embeddings = survey.column("embeddings")
        clip = explained.clip
        predictions = find_predictions(clip, job.dataset, job.words, embeddings)
        explained = replace(explained, predictions=predictions)
        passes = job.budget.passes(explained, survey.facts.tokens) // embeddings.shape[1]
        rows = spread(range(survey.images), min(_READ_ON, max(1, passes)))
        jacobian = Probes.of(explained, job.dataset, rows).jacobian()  # (e, d)
        directions = explained.sae.W_dec.detach().to(jacobian)
        moved = (directions @ jacobian.T).float().cpu()
        words = None
        if clip.has_text and job.words:
            words = Words(clip, job.words, embeddings, moved)
        probed = spread(range(survey.images), STEER_IMAGES)
        codes = FeatureCodes(survey)
        return cls(explained, survey, codes, moved, len(rows), words, probed)

    def order(self) -> list[int]:
        """Features that are not dead, those first that at their peak move the embedding furthest,
        to first order."""
        promise = self.moved.norm(dim=1).numpy() * self.codes.peaks
        order = np.argsort(-promise, kind="stable")
        found: list[int] = order[self.codes.peaks[order] > 0].tolist()
        return found

    def effects(self, job: Job, order: Sequence[int], steer: int | None) -> Effects | None:
        """What features do to predictions, the first of ``order`` first; None without any."""
        if self.explained.predictions is None:
            return None
        probes = Probes.of(self.explained, job.dataset, self.probed)
        tokens = self.survey.facts.tokens
        measured, tabled = how_many(job.budget, probes, tokens, steer, len(order))
        return Effects(
            probes,
            self.explained.predictions,
            job.folder,
            self.survey.name,
            order,
            self.codes.peaks,
            measured=measured,
            tabled=tabled,
        )
