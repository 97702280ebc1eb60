"""Which pictures show a feature: the strongest, and some of every interval of activation."""

from __future__ import annotations

from typing import Any

import numpy as np

from clipsteer.browse.codes import Active
from clipsteer.browse.files import listed, number
from clipsteer.browse.survey import Facts

TOP = 9
INTERVALS = 5
SAMPLED = 4
BINS = 40

Picture = list[Any]  # [image, activation, heat]


def histogram(active: Active, peak: float) -> list[int]:
    """How many tokens have an activation in each of BINS equal parts of (0, peak]."""
    if not len(active.acts):
        return []
    place = np.ceil(active.acts.astype(np.float64) * (BINS / peak)) - 1
    counts: list[int] = np.bincount(
        place.clip(0, BINS - 1).astype(np.int64), minlength=BINS
    ).tolist()
    return counts


def strongest(active: Active) -> np.ndarray:
    """Places in ``active.images`` of at most TOP, the strongest first; of equal ones the earlier
    image."""
    return np.argsort(-active.peaks, kind="stable")[:TOP]


def sampled(active: Active, feature: int, peak: float, seed: int) -> list[dict[str, Any]]:
    """Pictures by their largest activation in equal parts of (0, peak], the highest first: how many
    there are, and the places of at most SAMPLED drawn ones."""
    part = np.ceil(active.peaks.astype(np.float64) * (INTERVALS / peak)) - 1
    part = part.clip(0, INTERVALS - 1).astype(np.int64)
    lot = _lots(active.images, feature, seed)
    found = []
    for interval in reversed(range(INTERVALS)):
        inside = np.flatnonzero(part == interval)
        drawn = inside[np.argsort(lot[inside], kind="stable")[:SAMPLED]]
        drawn = drawn[np.argsort(-active.peaks[drawn], kind="stable")]
        low, high = (peak * edge / INTERVALS for edge in (interval, interval + 1))
        found.append(
            {"low": number(low), "high": number(high), "count": len(inside), "pictures": drawn}
        )
    return found


def _lots(images: np.ndarray, feature: int, seed: int) -> np.ndarray:
    """A number for each image, as if drawn, that depends on nothing else: splitmix64."""
    with np.errstate(over="ignore"):
        z = images.astype(np.uint64) + np.uint64(
            (feature << 32) ^ (seed * 0x9E3779B97F4A7C15 % 2**64)
        )
        z = (z + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


class Shown:
    """Pictures of one feature with heat over the patches.

    Args:
        places: of pictures in ``active.images``, each once.
    """

    def __init__(self, active: Active, places: np.ndarray, peak: float, facts: Facts) -> None:
        self._at = {int(place): row for row, place in enumerate(places)}
        self._images = active.images
        self._peaks = listed(active.peaks[places])
        self.facts = facts
        ends = np.append(active.starts[1:], len(active.tokens))
        lengths = ends[places] - active.starts[places]
        row = np.repeat(np.arange(len(places)), lengths)
        within = np.arange(len(row)) - np.repeat(lengths.cumsum() - lengths, lengths)
        source = active.starts[places][row] + within
        self._acts = np.zeros((len(places), facts.tokens), np.float32)
        self._acts[row, active.tokens[source] % facts.tokens] = active.acts[source]
        heat = np.ceil(self._acts[:, facts.prefix :] * (255 / peak)).clip(0, 255)
        self._heat = heat.astype(np.uint8)

    def pictures(self, places: np.ndarray) -> list[Picture]:
        """[image, largest activation, heat in hexadecimal] of each, "" without a grid."""
        found = []
        for place in places.tolist():
            row = self._at[place]
            heat = self._heat[row].tobytes().hex() if self.facts.grid else ""
            found.append([int(self._images[place]), self._peaks[row], heat])
        return found

    def prefix(self, places: np.ndarray) -> list[list[float]] | None:
        """Activations on the tokens before the patches; None where there are none."""
        if not self.facts.prefix:
            return None
        rows = [self._at[place] for place in places.tolist()]
        return listed(self._acts[rows, : self.facts.prefix])
