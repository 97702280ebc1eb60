"""What the cases of one row of a table have shown."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from clipsteer.testing.proof.trial import Finding, Trial, check

# failing cases after which no more are run
_ENOUGH = 40
# smaller cases that are tried for one that fails alike, and how many are drawn for them
_TRIED = 25
_DRAWN = 200


class Told(NamedTuple):
    """A case: of which property, its worst output or gradient, and how wrong that is."""

    prop: str
    trial: Trial
    output: str
    finding: Finding


@dataclass
class Tally:
    """How many cases there were, the worst error as a share of its bound, what had no bound, and
    the case to tell of: the smallest that fails, or the worst."""

    cases: int = 0
    worst: float = 0.0
    fails: int = 0
    told: Told | None = None
    unbounded: set[str] = field(default_factory=set)

    @property
    def passed(self) -> bool:
        """Whether no case was beyond its bound."""
        return self.fails == 0

    @property
    def enough(self) -> bool:
        """Whether so many cases failed that more would show nothing new."""
        return self.fails >= _ENOUGH

    def add(self, prop: str, trial: Trial) -> None:
        """One more case of a property."""
        output, finding = check(prop, trial)
        self.cases += 1
        self.unbounded.update(trial.unbounded)
        fails = not finding.share <= 1
        self.fails += fails
        if fails and self.fails > 1:
            telling = self.told is None or trial.numel < self.told.trial.numel
        else:
            telling = fails or (self.passed and finding.share > self.worst)
        if telling:
            self.told = Told(prop, trial, output, finding)
        self.worst = max(self.worst, finding.share)

    def shrink(self, trials: Iterable[Trial]) -> None:
        """Look for a smaller case that fails in the same property; those tried are not counted."""
        tried = 0
        for trial in itertools.islice(trials, _DRAWN):
            if self.told is None or self.passed or tried == _TRIED:
                return
            if 0 < trial.numel < self.told.trial.numel:
                tried += 1
                output, finding = check(self.told.prop, trial)
                if not finding.share <= 1:
                    self.told = Told(self.told.prop, trial, output, finding)
