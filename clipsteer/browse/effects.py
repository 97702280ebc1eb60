"""What features do to predictions when they are set to strengths, for as many as can be afforded.

Steerability is measured first, at the feature's peak, of those whose direction moves the embedding
most; the most steerable of these are then looked at over all strengths. S = Σ_c Δ_c², Δ_c the mean
change of p_c over the pictures (Joseph et al. 2025, arXiv 2504.08729).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from clipsteer.browse.cost import Budget
from clipsteer.browse.explained import Predictions
from clipsteer.browse.files import Folder, number, shares
from clipsteer.browse.probes import Probes
from clipsteer.io.files import read_safetensors, write_safetensors

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
# features that are set in one go, and kept in one file
_GROUP = 64
# of them, whose answers at all strengths are held at once
_AT_ONCE = 16
_CLASSES = 8
_EFFECTS = 6


class Effects:
    """Steerability and tables of features.

    Args:
        order: features, the most promising first.
        peaks: (d_sae,)
        measured: of how many of ``order`` steerability is measured.
        tabled: how many of these have a table.
    """

    def __init__(
        self,
        probes: Probes,
        predictions: Predictions,
        folder: Folder,
        name: str,
        order: Sequence[int],
        peaks: np.ndarray,
        *,
        measured: int,
        tabled: int,
    ) -> None:
        self.probes = probes
        self.predictions = predictions
        self.folder = folder
        self.name = name
        self.peaks = torch.from_numpy(peaks)
        self.clean = predictions.of(probes.embeddings).cpu()  # (P, C)
        self.score = np.full(len(peaks), np.nan)
        self.largest = np.full(len(peaks), -1)
        first = list(order[: max(measured, tabled)])
        for part, found in self._groups("steerability", first):
            self.score[part] = found["score"].numpy()
            self.largest[part] = found["largest"].numpy()
        ranked = sorted(first, key=lambda feature: -self.score[feature])[:tabled]
        self._place = {feature: at for at, feature in enumerate(ranked)}
        kept: dict[str, list[Tensor]] = {}
        for _, found in self._groups("strengths", ranked):
            for key, value in found.items():
                kept.setdefault(key, []).append(value)
        self._tables = {key: torch.cat(value) for key, value in kept.items()}

    def __len__(self) -> int:
        """Features that have a table."""
        return len(self._place)

    def _groups(self, kind: str, features: list[int]) -> Any:
        """Groups of features with what was found out about them, measured unless it is there."""
        measure = {"steerability": self._scores, "strengths": self._strengths}[kind]
        with tqdm(total=len(features), desc=kind, unit="feature", disable=None) as bar:
            for at in range(0, len(features), _GROUP):
                part = features[at : at + _GROUP]
                path = self._path(kind, at // _GROUP)
                if not path.exists():
                    write_safetensors(path, measure(part))
                yield part, read_safetensors(path)
                bar.update(len(part))

    def _path(self, kind: str, group: int) -> Path:
        return self.folder.work / f"{self.name}-{kind}-{group:06d}.safetensors"

    def _probabilities(self, features: list[int], strengths: Sequence[float]) -> Tensor:
        """(m, s, P, C), with the features at multiples of their peaks."""
        wanted = self.peaks[features][:, None] * torch.tensor(strengths)
        return self.predictions.of(self.probes.set(features, wanted)).cpu()

    def _scores(self, features: list[int]) -> dict[str, Tensor]:
        p = self._probabilities(features, (1.0,))[:, 0]
        change = (p.double() - self.clean.double()).mean(1)  # (m, C)
        return {"score": change.square().sum(1), "largest": change.abs().argmax(1)}

    def _strengths(self, features: list[int]) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {}
        for at in range(0, len(features), _AT_ONCE):
            for p in self._probabilities(features[at : at + _AT_ONCE], STRENGTHS):
                for key, value in self._row(p).items():
                    found.setdefault(key, []).append(value)
        return {key: torch.stack(value) for key, value in found.items()}

    def _row(
        self,
        p: Tensor,  # (s, P, C)
    ) -> dict[str, Tensor]:
        change = (p[STRENGTHS.index(1.0)].double() - self.clean.double()).mean(0)
        moved = (p - self.clean).abs().amax((0, 1))
        classes = moved.argsort(descending=True, stable=True)[:_CLASSES]
        effects = change.abs().argsort(descending=True, stable=True)[:_EFFECTS]
        effects = effects[change[effects].argsort(descending=True, stable=True)]
        return {
            "first": p.argmax(-1),
            "classes": classes,
            "probability": p[..., classes],
            "clean": self.clean[:, classes],
            "effects": effects,
            "change": change[effects],
        }

    def table(self, feature: int, images: Sequence[int]) -> dict[str, Any] | None:
        """A feature over all strengths, as it is written; None where it was left out."""
        at = self._place.get(feature)
        if at is None:
            return None
        found = {key: value[at] for key, value in self._tables.items()}
        effects = zip(found["effects"].tolist(), shares(found["change"]))
        return {
            "images": list(images),
            "classes": found["classes"].tolist(),
            "clean": shares(found["clean"]),
            "probability": shares(found["probability"]),
            "first": found["first"].tolist(),
            "effect": [list(pair) for pair in effects],
            "score": number(self.score[feature]),
        }


def how_many(
    budget: Budget,
    probes: Probes,
    tokens: int,
    asked: int | None,
    features: int,
) -> tuple[int, int]:
    """Of how many features steerability is measured, and of how many there is a table: half of the
    budget each. ``asked``: so many tables, whatever they cost."""
    passes = budget.passes(probes.explained, tokens) // 2
    measured = min(features, passes // len(probes))
    tabled = min(features, passes // (len(probes) * len(STRENGTHS)))
    if asked is not None:
        tabled = min(features, asked)
    return max(measured, tabled), tabled
