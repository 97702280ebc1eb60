"""Two SAEs, or one on two models, over the same pictures: which features correspond, what moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from clipsteer.browse.codes import FeatureCodes
from clipsteer.browse.effects import Effects
from clipsteer.browse.explained import Explained
from clipsteer.browse.features import FEATURE_SHARD
from clipsteer.browse.files import Folder, listed
from clipsteer.browse.pictures import Shown, strongest
from clipsteer.browse.relations import directions
from clipsteer.browse.sides import Job, Side

# elements of pictures × features of the other SAE that are held at once
_HELD = 1 << 26
_BY_DIRECTION = "the feature whose decoder row is nearest, by cosine"
_BY_PICTURES = (
    "the feature whose largest activations on the pictures correlate most, as the decoders are of "
    "different places"
)
_SAME = "the same feature on the other model"


def is_same_sae(a: Explained, b: Explained) -> bool:
    """Whether two are one SAE, on two models."""
    return a.sae is b.sae


def _is_same_place(a: Explained, b: Explained) -> bool:
    """Whether two decoders write to one place of one model, so that directions can be compared."""
    there = a.target.hook_point == b.target.hook_point
    return there and a.clip.name == b.clip.name and a.sae.W_dec.shape[1] == b.sae.W_dec.shape[1]


class Match(NamedTuple):
    """The other's feature for each of ours."""

    features: np.ndarray  # (d_sae,) int64, -1 for none
    cosine: np.ndarray  # (d_sae,) of the decoder rows, NaN where they are of different places
    how: str


def match(mine: FeatureCodes, theirs: FeatureCodes) -> Match:
    """By identity for one SAE on two models, by direction where these can be compared, else by what
    the features are active on."""
    a, b = mine.survey.explained, theirs.survey.explained
    count = a.sae.d_sae
    if is_same_sae(a, b):
        return Match(np.arange(count), np.ones(count), _SAME)
    if _is_same_place(a, b):
        best = [part @ directions(b.sae).T for part in directions(a.sae).split(FEATURE_SHARD)]
        found = [part.max(1) for part in best]
        cosine = torch.cat([part.values for part in found]).numpy()
        return Match(torch.cat([part.indices for part in found]).numpy(), cosine, _BY_DIRECTION)
    features = _by_pictures(mine, theirs)
    return Match(features, np.full(count, np.nan), _BY_PICTURES)


def _by_pictures(mine: FeatureCodes, theirs: FeatureCodes) -> np.ndarray:
    images = mine.survey.images
    d_theirs = theirs.survey.sae.d_sae
    step = -(-images * d_theirs // _HELD)
    kept = -(-images // step)
    there = _rows(theirs, range(d_theirs), images, step, kept)
    found = []
    d_mine = mine.survey.sae.d_sae
    for first in range(0, d_mine, FEATURE_SHARD):
        features = range(first, min(first + FEATURE_SHARD, d_mine))
        best = (_rows(mine, features, images, step, kept) @ there.T).max(1)
        found.append(torch.where(best.values > 0, best.indices, -1))
    return torch.cat(found).numpy()


def _rows(codes: FeatureCodes, features: range, images: int, step: int, kept: int) -> Tensor:
    """(m, kept) largest activations of features on every step-th picture, as ``_standard`` has
    them."""
    rows = torch.zeros(len(features), kept)
    for row, feature in zip(rows, features):
        row.copy_(_standard(_peaks(codes, feature, images)[::step]))
    return rows


def _peaks(codes: FeatureCodes, feature: int, images: int) -> np.ndarray:  # (N,) float64
    active = codes.of(feature)
    peaks = np.zeros(images)
    peaks[active.images] = active.peaks
    return peaks


def _standard(values: np.ndarray) -> Tensor:
    """Centred and of unit length; 0 where nothing varies."""
    centred = values - values.mean()
    length = np.linalg.norm(centred)
    return torch.from_numpy(centred / length if length > 0 else centred * 0).float()


class Comparison:
    """What is written about features and their matches.

    effects: of the other side, for its steerability; None where nothing is predicted.
    """

    def __init__(
        self, mine: Side, theirs: Side, job: Job, found: Match, effects: Effects | None
    ) -> None:
        self.mine = mine.codes
        self.theirs = theirs.codes
        self.found = found
        self.score = np.full(len(theirs.codes.peaks), np.nan) if effects is None else effects.score
        self.classes = job.classes
        self.words = theirs.words
        self.columns: dict[str, list[Any]] = {"correlation": [], "moved": [], "images": []}

    def write(self, folder: Folder) -> None:
        """Every shard, and the columns of all."""
        d_sae = self.mine.survey.sae.d_sae
        with tqdm(total=d_sae, desc="write comparison", unit="feature", disable=None) as bar:
            for first in range(0, d_sae, FEATURE_SHARD):
                features = range(first, min(first + FEATURE_SHARD, d_sae))
                records = [self._record(feature) for feature in features]
                folder.put(f"compare/{first // FEATURE_SHARD}", {"features": records})
                bar.update(len(features))
        matches = self.found.features
        none = matches < 0
        theirs = self.theirs
        density = np.where(none, np.nan, (theirs.counts / theirs.rows)[matches])
        columns = {
            "match": matches.tolist(),
            "cosine": listed(self.found.cosine),
            "density": listed(density),
            "peak": listed(np.where(none, np.nan, theirs.peaks[matches])),
            "steerability": listed(np.where(none, np.nan, self.score[matches])),
        }
        columns |= {name: listed(values) for name, values in self.columns.items()}
        folder.put("compare", columns)

    def _record(self, feature: int) -> dict[str, Any]:
        match = int(self.found.features[feature])
        images = self.mine.survey.images
        record: dict[str, Any] = {"index": feature, "match": match, "top": []}
        record |= {"classes": [], "words": []}
        if match < 0:
            for column in self.columns.values():
                column.append(np.nan)
            return record
        ours, theirs = _peaks(self.mine, feature, images), _peaks(self.theirs, match, images)
        both = float(_standard(ours) @ _standard(theirs))
        varies = bool(np.ptp(ours) > 0 and np.ptp(theirs) > 0)
        self.columns["correlation"].append(both if varies else np.nan)
        self.columns["moved"].append(_moved(ours, theirs))
        self.columns["images"].append(np.count_nonzero(theirs) / images)
        active = self.theirs.of(match)
        best = strongest(active)
        peak = float(self.theirs.peaks[match]) or 1.0
        shown = Shown(active, best, peak, self.theirs.survey.facts)
        record["top"] = shown.pictures(best)
        if self.classes is not None:
            record["classes"] = self.classes.of(active)[0]
        if self.words is not None:
            record["words"] = self.words.nearest(range(match, match + 1))[0][0]
        return record


def _moved(ours: np.ndarray, theirs: np.ndarray) -> float:
    """1 - Σ min / Σ max of the pictures' largest activations, each in shares of its peak: 0 where
    they are the same, 1 where no picture has both."""
    a, b = (values / (values.max() or 1.0) for values in (ours, theirs))
    whole = float(np.maximum(a, b).sum())
    return 1 - float(np.minimum(a, b).sum()) / whole if whole > 0 else np.nan


def order_of_matches(order: Sequence[int], found: Match) -> list[int]:
    """The other's features, in the order of ours that they match."""
    return list(dict.fromkeys(int(found.features[f]) for f in order if found.features[f] >= 0))
