"""The codes of all images, ordered by feature: what is active where, a feature at a time.

They lie in two files of the work folder, which are mapped: no more than what is looked at has to be
in memory.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from clipsteer.browse.survey import Survey


class Active(NamedTuple):
    """Where one feature is active."""

    tokens: np.ndarray  # (m,) int64, image · T + token, ascending
    acts: np.ndarray  # (m,) float32
    images: np.ndarray  # (r,) those it is active on, ascending
    starts: np.ndarray  # (r,) where each image's part of tokens begins
    peaks: np.ndarray  # (r,) the largest activation on each


class FeatureCodes:
    """Codes by feature.

    Attributes:
        starts: (d_sae + 1,) int64, where each feature's codes begin.
        peaks: (d_sae,) largest activation, 0 of a dead feature.
        sums: (d_sae,) float64.
        rows: tokens that were encoded.
    """

    def __init__(self, survey: Survey) -> None:
        self.survey = survey
        d_sae = survey.sae.d_sae
        self.rows = survey.images * survey.facts.tokens
        counts = np.zeros(d_sae, np.int64)
        self.peaks = np.zeros(d_sae, np.float32)
        self.sums = np.zeros(d_sae, np.float64)
        for found in survey.each():
            features, acts = found["features"].numpy(), found["acts"].numpy()
            counts += np.bincount(features, minlength=d_sae)
            np.maximum.at(self.peaks, features, acts)
            self.sums += np.bincount(features, acts, d_sae)
        self.starts = np.concatenate([[0], counts.cumsum()])
        self._tokens = self._mapped("tokens", np.int64)
        self._acts = self._mapped("acts", np.float32)
        self._fill()

    def _mapped(self, name: str, dtype: type) -> np.ndarray:
        path = self.survey.folder.work / f"{self.survey.name}-{name}.bin"
        # a file of no bytes cannot be mapped
        return np.memmap(path, dtype, "w+", shape=(max(1, int(self.starts[-1])),))

    def _fill(self) -> None:
        free = self.starts[:-1].copy()
        first = 0
        for found in self.survey.each():
            counts = found["counts"].numpy()
            features = found["features"].numpy()
            tokens = first + np.repeat(np.arange(len(counts)), counts)
            first += len(counts)
            order = np.argsort(features, kind="stable")
            ordered = features[order]
            here = np.bincount(ordered, minlength=len(free))
            begin = np.concatenate([[0], here.cumsum()[:-1]])
            place = free[ordered] + np.arange(len(ordered)) - begin[ordered]
            self._tokens[place] = tokens[order]
            self._acts[place] = found["acts"].numpy()[order]
            free += here

    @property
    def counts(self) -> np.ndarray:
        """(d_sae,) tokens on which each feature is active."""
        return np.diff(self.starts)

    def of(self, feature: int) -> Active:
        """Where a feature is active."""
        part = slice(int(self.starts[feature]), int(self.starts[feature + 1]))
        tokens, acts = np.array(self._tokens[part]), np.array(self._acts[part])
        images = tokens // self.survey.facts.tokens
        starts = np.flatnonzero(np.diff(images, prepend=-1))
        peaks = np.maximum.reduceat(acts, starts) if len(starts) else acts
        return Active(tokens, acts, images[starts], starts, peaks)
