"""The ways of learning classes task by task, as settings of one learner.

Where MACIL here is not what its authors' code does. `PAPER` and `PAPER_SEEDS`, which
``clipsteer cil --recipe paper`` takes, undo the first four:

- weight decay of SGD: theirs 0, here 5e-4;
- the cosine of the learning rate falls every step, theirs once an epoch;
- the width σ of the drift weights: theirs 1, here the median of the distances;
- seeds of the class order: theirs 1993, 1996, 1997, here 1993, 1994, …;
- alignment starts anew from the trained heads after each task; theirs goes on from heads that
  earlier alignments have changed;
- drift is measured on pairs: the old and the new features of one image, seen alike. Theirs reads
  the images twice in two random orders, with two random crops, so that the difference of row i is
  that of two images. Ours is what the paper says;
- means that alignment samples about are drawn to the origin by the task that a class came with.
  Theirs divides the number of the class by the size of the latest task, which gives another task
  where sizes differ.

SLCA runs in MACIL's batch of 48, schedule and epochs; its authors have 128, steps at epochs, as
many epochs in each task, and 1e-4 where the covariances' ridge is 1e-3 here. It trains the whole
tower at one slow rate, the projection of pixels to tokens among it, as their code does (all of
``convnet.parameters()`` at 1e-4): on pictures with one background that layer alone makes the
features drift, and ``slca:freeze_patches=1`` keeps it.

LDC's map is solved for, with a ridge that rows left out choose; its authors train a linear layer by
gradient descent. RanPAC chooses its ridge on a fifth of the latest task's rows with the sums of all
tasks so far; its authors' code solves for it with the latest task's rows alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from clipsteer.continual.config import CILConfig
from clipsteer.training.settings import read_value, settings_of

__all__ = ["ABLATION", "PAPER", "PAPER_SEEDS", "STRATEGIES", "CILConfig", "strategy"]


# MACIL's published settings (Wu et al. 2025, section "implementation details", and its code), those
# that the fields' defaults are not; backbone and pixels belong to ``clipsteer cil --recipe paper``
PAPER: Mapping[str, Any] = {
    "first_epochs": 20,
    "epochs": 10,
    "batch_size": 48,
    "rank": 32,
    "weight_decay": 0.0,
    "schedule": "epoch",
    "sigma": 1.0,
}
PAPER_SEEDS = (1993, 1996, 1997)

_MACIL = {"covariance": 1.0, "distill": 0.4, "compensation": "mean_shift", "align": True}
STRATEGIES: Mapping[str, Mapping[str, Any]] = {
    # sequential fine-tuning, and what MACIL adds to it
    "finetune": {},
    "macil": _MACIL,
    # slow learner on the whole tower, fast heads, alignment (Zhang et al. 2023)
    "slca": {"train": "full", "cosine": False, "align": True, "slow": 0.01},
    # SDC's compensation and nearest means (Yu et al. 2020) on an embedding that is trained through
    # cosine heads, where the paper has metric learning, and compared by angle
    "sdc": {"classifier": "ncm", "compensation": "sdc", "sigma": 0.3, "floor": 0.0},
    # the same network, whose means follow a learned map (Gomez-Villa et al. 2024)
    "ldc": {"classifier": "ncm", "compensation": "ldc"},
    "ncm": {"train": "none", "classifier": "ncm"},
    "zero_shot": {"train": "none", "classifier": "zero_shot"},
    # RanPAC without its first-session adaptation (McDonnell et al. 2023)
    "ranpac": {"train": "none", "classifier": "ridge"},
    "joint": {"cumulative": True},
}
# MACIL built up part by part, each part taken away, and what may stand in its place
ABLATION = (
    "macil",
    "macil:covariance=0,distill=0,compensation=none,align=0",
    "macil:covariance=0,distill=0,compensation=none",
    "macil:covariance=0,distill=0",
    "macil:distill=0",
    "macil:covariance=0",
    "macil:compensation=none",
    "macil:transport=1",
    "macil:consistent=1",
    "macil:lora=shared",
    "macil:lora=shared_a",
    "macil:plasticity=1",
    "macil:slow=0.01",
)


def strategy(spec: str, **settings: Any) -> CILConfig:
    """Settings from "NAME" or "NAME:field=value,…"; what the spec says goes before ``settings``.

    Raises ValueError for an unknown name, field or value.
    """
    name, _, changes = spec.partition(":")
    if name not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {name!r}")
    known = settings_of(CILConfig)
    own = dict(STRATEGIES[name])
    for change in filter(None, changes.split(",")):
        field, sign, text = change.partition("=")
        if field not in known or field == "name" or not sign:
            raise ValueError(
                f"strategy: {change!r} in {spec!r} is not field=value with a field of CILConfig"
            )
        try:
            own[field] = read_value(known[field].kind, text)
        except ValueError as error:
            raise ValueError(f"strategy: {field} in {spec!r}: {error}") from None
    return replace(CILConfig(), **{**settings, **own, "name": spec})
