"""All metrics of one SAE from one pass over the images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from clipsteer.clip.hooks import evaluating
from clipsteer.sae.encoding import Codes
from clipsteer.sae.metrics import visaebench
from clipsteer.sae.metrics.absorption import absorption_rate
from clipsteer.sae.metrics.coverage import label_coverage
from clipsteer.sae.metrics.estimate import Estimate
from clipsteer.sae.metrics.localisation import Localisation
from clipsteer.sae.metrics.monosemanticity import monosemanticity_score
from clipsteer.sae.metrics.probing import probe_preservation, sparse_probing
from clipsteer.sae.metrics.recorder import Recorder
from clipsteer.sae.metrics.stability import seed_stability
from clipsteer.sae.metrics.stream import ImageTokens, streamed
from clipsteer.sae.model import SAE

logger = logging.getLogger(__name__)

OURS = "clipsteer"
DEFINITIONS = (OURS, visaebench.DEFINITION)


@dataclass
class _Given:
    """What there is to measure with."""

    sae: SAE
    recorder: Recorder
    labels: Tensor  # (N,)
    embeddings: Tensor | None
    others: Sequence[SAE]
    groups: Mapping[str, Sequence[int]] | None
    seed: int

    def means(self) -> tuple[Tensor, Tensor]:
        found = self.recorder.reconstruction.means
        order = sorted(found)
        return tuple(torch.stack([found[i][j] for i in order]) for j in (0, 1))  # type: ignore[return-value]


def _monosemanticity(given: _Given) -> Estimate:
    assert given.embeddings is not None
    return monosemanticity_score(given.recorder.pooled(), given.embeddings, seed=given.seed)


def _preservation(given: _Given) -> Estimate:
    images = torch.tensor(sorted(given.recorder.labels))
    return probe_preservation(*given.means(), images, given.labels, seed=given.seed)


_METRICS: dict[str, Callable[[_Given], Estimate]] = {
    "fvu": lambda g: g.recorder.reconstruction.fvu(),
    "localisation": lambda g: g.recorder.maps["localisation"].estimate(),
    "probing": lambda g: sparse_probing(g.recorder.pooled(), g.labels, seed=g.seed),
    "preservation": _preservation,
    "monosemanticity": _monosemanticity,
    "absorption": lambda g: absorption_rate(g.recorder.pooled(), g.labels, g.groups, seed=g.seed),
    "coverage": lambda g: label_coverage(g.recorder.pooled(), g.labels, seed=g.seed),
    "stability": lambda g: seed_stability(g.sae, g.others, seed=g.seed),
}
NAMES = tuple(_METRICS)
_LABELLED = ("probing", "preservation", "absorption", "coverage")


def chosen(metrics: str | Sequence[str], definition: str = OURS) -> tuple[list[str], bool]:
    """The names asked for, and whether those were "all". Raises ValueError for others."""
    if definition not in DEFINITIONS:
        raise ValueError(f"definition: expected one of {DEFINITIONS}, got {definition!r}")
    known = list(NAMES if definition == OURS else visaebench.NAMES)
    names = metrics.split(",") if isinstance(metrics, str) else list(metrics)
    names = [name.strip() for name in names]
    if names == ["all"]:
        return known, True
    for name in names:
        if name not in known:
            near = get_close_matches(name, [*known, "all"], 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"metrics: {name!r} is none of {', '.join(known)} or all, as {definition} defines "
                f"them{hint}"
            )
    return list(dict.fromkeys(names)), False


def record(
    sae: SAE, source: Any, recorder: Recorder | None = None, *, prefix: int = 0, seed: int = 0
) -> Recorder:
    """Pass the images of ``source`` (as ``evaluate_metrics`` takes it) through an SAE, once."""
    found = Recorder(sae.d_sae, seed=seed) if recorder is None else recorder
    device = sae.W_enc.device
    with evaluating(sae), torch.no_grad():
        for part in streamed(source, prefix):
            codes, y, y_hat = _passed(sae, part, device)
            found.add(codes, part.images, grid=part.grid, labels=part.labels, y=y, y_hat=y_hat)
    return found


def _passed(sae: SAE, part: ImageTokens, device: torch.device) -> tuple[Codes, Tensor, Tensor]:
    """Codes of the tokens of some images, what was to be given and what is."""
    x = part.x.to(device)
    rows = x.flatten(0, 1)
    centred, stats = sae._centred(rows)
    codes = sae.codes(centred)
    x_hat = sae.with_skip(sae.decode(codes, stats), rows)
    y = x if part.y is None else part.y.to(device)
    if sae.d_out is not None and part.y is None:
        raise ValueError("source: a transcoder needs y, what it is to give, in its ImageTokens")
    return codes, y, x_hat.reshape(y.shape)


def evaluate_metrics(
    sae: SAE,
    source: Any,
    *,
    metrics: str | Sequence[str] = "all",
    labels: Sequence[int] | Tensor | None = None,
    embeddings: Tensor | None = None,
    others: Sequence[SAE] = (),
    groups: Mapping[str, Sequence[int]] | None = None,
    prefix: int = 0,
    definition: str = OURS,
    seed: int | None = None,
) -> dict[str, Estimate]:
    """Metrics of an SAE over images, each with a 95 % interval over them.

    Args:
        source: tokens (N, T, d_in) of N images, an ``ActivationStore``, or an iterable of
            ``ImageTokens`` such as ``from_tower`` gives.
        metrics: names out of ``NAMES``, or "all": those for which there is what they need; what is
            left out is logged.
        labels: (N,) of the images by number, -1 where there is none; by default those of source.
        embeddings: (N, e) of the same images by another tower.
        others: SAEs of the same place in the same tower, trained with other seeds.
        groups: labels of siblings by name, for absorption; None: all are siblings.
        prefix: class and register tokens before the patches, of a tensor or a store.
        definition: "clipsteer", or "visaebench-0.1.0": that benchmark's own numbers, which have no
            interval (``clipsteer.sae.metrics.visaebench``).
        seed: of held-out images and blocks; None: 0, of visaebench its 42.

    Raises:
        ValueError: a metric that was named lacks what it needs; shapes that do not fit.
        RuntimeError: a metric that was named needs a library that is not installed.
    """
    names, every = chosen(metrics, definition)
    before = {"monosemanticity": embeddings is None, "stability": not others}
    for name, lacks in before.items():
        if name in names and lacks and not every:
            raise ValueError(_needs(name))
    theirs = definition != OURS
    if seed is None:
        seed = visaebench.SEED if theirs else 0
    maps: dict[str, Localisation] | None = None
    if theirs:
        maps = {"localisation": visaebench.VisaebenchLocalisation(sae.d_sae, seed)}
    recorder = record(sae, source, Recorder(sae.d_sae, maps=maps, seed=seed), prefix=prefix)
    given = _Given(sae, recorder, torch.empty(0), embeddings, others, groups, seed)
    given.labels = _labels(recorder, labels)
    found = {}
    for name in names:
        why = _lacking(name, given)
        if why is None:
            table = visaebench.METRICS if theirs else _METRICS
            try:
                found[name] = table[name](given)  # type: ignore[operator]
                continue
            except RuntimeError as error:
                if not every or not isinstance(error.__cause__, ImportError):
                    raise
                why = str(error)
        if not every:
            raise ValueError(why)
        logger.warning("metrics: %s is left out (%s)", name, why)
    return found


def _labels(recorder: Recorder, labels: Sequence[int] | Tensor | None) -> Tensor:
    images = sorted(recorder.labels)
    if labels is None:
        return torch.tensor([recorder.labels[i] for i in images])
    given = torch.as_tensor(labels, dtype=torch.int64).cpu()
    if given.ndim != 1 or len(given) != len(images):
        raise ValueError(
            f"labels: expected ({len(images)},), one an image, got {tuple(given.shape)}"
        )
    return given


def _needs(name: str) -> str:
    if name == "monosemanticity":
        return "monosemanticity needs embeddings of the images by another tower"
    if name == "stability":
        return "stability needs another SAE, of the same place and another seed (others)"
    if name == "localisation":
        return (
            "localisation needs the patch grid: images' tokens must be a square of patches behind "
            "prefix tokens"
        )
    return f"{name} needs labels of at least two classes"


def _lacking(name: str, given: _Given) -> str | None:
    if name in _LABELLED and len(given.labels[given.labels >= 0].unique()) < 2:
        return _needs(name)
    maps = given.recorder.maps.get("localisation")
    lacks = {
        "monosemanticity": given.embeddings is None,
        "stability": not given.others,
        "localisation": isinstance(maps, Localisation) and maps.grid is None,
    }
    return _needs(name) if lacks.get(name) else None
