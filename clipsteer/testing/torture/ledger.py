"""The rows of a torture report, as cases come in."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from clipsteer.testing.proof.prove import ProofRow
from clipsteer.testing.proof.trial import Finding

__all__ = ["Ledger", "Situation"]

RIGHT = Finding(0.0, "")


def wrong(where: str) -> Finding:
    """Broken, where there is no tolerance."""
    return Finding(math.inf, where)


@dataclass(frozen=True)
class Situation:
    """Where a case comes from: what it is made of, in words, and how to make it again."""

    sizes: str
    seed: int
    again: str


@dataclass
class Ledger:
    """Rows by name, of one dtype; of the cases that fail the first stays, which is the smallest."""

    dtype: torch.dtype
    rows: dict[str, ProofRow] = field(default_factory=dict)

    def row(self, name: str, promised: bool | None = None) -> ProofRow:
        """The row of that name, new where there was none."""
        kind = str(self.dtype).removeprefix("torch.")
        return self.rows.setdefault(name, ProofRow(name, kind, promised=promised))

    def note(
        self, name: str, finding: Finding, at: Situation, promised: bool | None = None
    ) -> None:
        """One more case."""
        row = self.row(name, promised)
        row.cases += 1
        if row.seed is not None:
            return
        row.worst = max(row.worst, finding.share)
        if finding.share > 1:
            row.where, row.sizes, row.seed, row.again = (
                finding.where,
                at.sizes,
                at.seed,
                f"    {at.again}",
            )


def refusal(error: Exception, refuses: tuple[type[Exception], ...], row: ProofRow) -> Any:
    """A finding, or None where the function may decline."""
    if isinstance(error, refuses):
        row.refused += 1
        row.where = row.where or f"declined: {error}"
        return None
    return wrong(f"raised {type(error).__name__}: {error}")
