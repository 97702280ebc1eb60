"""Data of features: one record each, in shards, and a column of each fact for the overview."""

from __future__ import annotations

from typing import Any

import numpy as np
from tqdm import tqdm

from clipsteer.browse.effects import Effects
from clipsteer.browse.files import Folder, listed, number
from clipsteer.browse.pictures import Shown, histogram, sampled, strongest
from clipsteer.browse.relations import Coactivity, directions, similar
from clipsteer.browse.sides import Job, Side
from clipsteer.browse.words import NAMED_BY

FEATURE_SHARD = 64


class FeaturePages:
    """All that is written of features; effects: None where nothing is predicted."""

    def __init__(
        self, side: Side, job: Job, effects: Effects | None, coactivity: Coactivity
    ) -> None:
        self.codes = codes = side.codes
        self.coactivity = coactivity
        self.classes = job.classes
        self.words = side.words
        self.effects = effects
        self.probed = side.probed
        self.seed = job.seed
        self.unit = directions(side.explained.sae)
        d_sae = side.explained.sae.d_sae
        self.columns: dict[str, list[Any]] = {
            name: []
            for name in ("images", "selectivity", "top_class", "picture", "word", "concept")
        }
        count = codes.counts
        self.columns["density"] = listed(count / codes.rows)
        self.columns["peak"] = listed(codes.peaks)
        self.columns["mean"] = listed(codes.sums / np.maximum(count, 1))
        score = np.full(d_sae, np.nan) if effects is None else effects.score
        self.columns["steerability"] = listed(score)
        self.columns["effect"] = [-1] * d_sae if effects is None else effects.largest.tolist()

    def write(self, folder: Folder) -> None:
        """Every shard of features, and the overview."""
        d_sae = self.codes.survey.sae.d_sae
        with tqdm(total=d_sae, desc="write features", unit="feature", disable=None) as bar:
            for first in range(0, d_sae, FEATURE_SHARD):
                features = range(first, min(first + FEATURE_SHARD, d_sae))
                records = self._shard(features)
                folder.put(f"features/{first // FEATURE_SHARD}", {"features": records})
                bar.update(len(features))
        folder.put("overview", self.columns)

    def _shard(self, features: range) -> list[dict[str, Any]]:
        nearest = similar(self.unit, features)
        together = self.coactivity.of(features)
        records = [self._record(feature) for feature in features]
        named = [[] for _ in features] if self.words is None else self._concepts(records)
        words = [([], []) for _ in features] if self.words is None else self.words.nearest(features)
        for i, record in enumerate(records):
            record["similar"] = nearest[i]
            record["coactive"] = together[i]
            record["concepts"] = named[i]
            record["words"], record["opposite"] = words[i]
            self.columns["word"].append(words[i][0][0][0] if words[i][0] else "")
            self.columns["concept"].append(named[i][0][0] if named[i] else "")
        return records

    def _concepts(self, records: list[dict[str, Any]]) -> list[Any]:
        assert self.words is not None
        groups = [[image for image, *_ in record["top"][:NAMED_BY]] for record in records]
        return self.words.concepts(groups)

    def _record(self, feature: int) -> dict[str, Any]:
        codes = self.codes
        active = codes.of(feature)
        # that of a dead feature divides nothing
        peak = float(codes.peaks[feature]) or 1.0
        best = strongest(active)
        intervals = sampled(active, feature, peak, self.seed) if len(active.images) else []
        drawn = [interval["pictures"] for interval in intervals]
        places = np.unique(np.concatenate([best, *drawn]).astype(np.int64))
        shown = Shown(active, places, peak, codes.survey.facts)
        for interval in intervals:
            interval["pictures"] = shown.pictures(interval["pictures"])
        classes, selectivity = ([], None) if self.classes is None else self.classes.of(active)
        top = shown.pictures(best)
        self.columns["images"].append(number(len(active.images) / codes.survey.images))
        self.columns["selectivity"].append(selectivity)
        self.columns["top_class"].append(classes[0][0] if classes else -1)
        self.columns["picture"].append(top[0][0] if top else -1)
        table = None if self.effects is None else self.effects.table(feature, self.probed)
        return {
            "index": feature,
            "histogram": histogram(active, peak),
            "top": top,
            "prefix_acts": shown.prefix(best),
            "intervals": intervals,
            "classes": classes,
            "steering": table,
        }
