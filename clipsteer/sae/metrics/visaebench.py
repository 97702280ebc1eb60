"""The metrics as visaebench 0.1.0 computes them, to be published beside their definitions here.

Its numbers agree with that package's own functions to 1e-5 on the same codes; what is other than
here, found by running it on valid input:

    fvu             subtracts (Σ x / tokens)², with the sum over all dimensions too: d times the
                    squared mean that belongs there, so that it can leave [0, 1] or divide by 0; of
                    one tensor (images, patches, d) it takes images for tokens, of files it does
                    not (this is the latter)
    localisation    neighbours at corners too (a checkerboard is -0.03, not -1); maps whose squares
                    sum to 1e-10 or less do not count, so it depends on the activations' scale; 0
                    where nothing is scored
    probing         ranks features on the held-out images too: of noise it finds the features that
                    fit them; probes on columns as they are, so it depends on their scale
    preservation    clamped to [0, 2], 0 where the probe is never right
    monosemanticity of the 16 most active images alone; 0 where nothing is scored
    absorption      fits and scores on the same images; an SAE that never fires scores 1, for the
                    most active of none are the same ten features everywhere; 0 where nothing is
                    scored

Fits and splits are scikit-learn's, as there (extra ``metrics``). Groups of absorption are the
caller's; that package's come from ImageNet's classes in WordNet. No interval is given: there is
none in it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from clipsteer.sae.metrics.estimate import Estimate
from clipsteer.sae.metrics.localisation import Localisation, Maps, morans_i
from clipsteer.sae.metrics.probing import KS, areas
from clipsteer.sae.metrics.recorder import PooledCodes

DEFINITION = "visaebench-0.1.0"
SEED = 42
# images whose maps it looks at together; of each feature it stops after the batch in which the
# limit is reached
_IMAGES = 64
_IMAGES_PER_FEATURE = 200
_LEAST_IMAGES = 50
_FEATURES = {"localisation": 500, "monosemanticity": 1000}
# elements of a dense block of columns
_BLOCK = 1 << 25
_LEAST_COLUMNS = 512


def _estimate(value: float, scored: int, unit: str, **details: Any) -> Estimate:
    return Estimate(float(value), math.nan, math.nan, scored, unit, details)


def _sklearn() -> Any:
    try:
        import sklearn.exceptions
        import sklearn.feature_selection
        import sklearn.linear_model
        import sklearn.metrics
        import sklearn.model_selection
    except ImportError as error:
        raise RuntimeError(
            f"{DEFINITION} fits with scikit-learn (pip install 'clipsteer[metrics]'); "
            f"definition='clipsteer' does not need it"
        ) from error
    return sklearn


def _drawn(kind: str, candidates: np.ndarray, seed: int) -> np.ndarray:
    """At most so many of the candidates as are scored of a kind."""
    most = _FEATURES[kind]
    if len(candidates) <= most:
        return candidates
    chosen = np.random.RandomState(seed).choice(candidates, size=most, replace=False)
    chosen.sort()
    return chosen


class VisaebenchLocalisation(Localisation):
    """Moran's I with corners, in its order of images and with its limits."""

    def __init__(self, d_sae: int, seed: int = SEED) -> None:
        super().__init__(d_sae, seed, neighbours=8, images=_LEAST_IMAGES)
        self.sum = torch.zeros(d_sae, dtype=torch.float64)
        self.count = torch.zeros(d_sae, dtype=torch.int64)
        self._group = 0
        self._open = torch.ones(d_sae, dtype=torch.bool)

    def add(self, maps: Maps) -> None:
        """Take in a batch; batches must come by the images' numbers."""
        self.grid = maps.grid
        most = int(self.share * maps.grid.height * maps.grid.width)
        scored = morans_i(maps, self.neighbours, self.least, most)
        group = torch.div(maps.images, _IMAGES, rounding_mode="floor")
        if bool((group.diff() < 0).any()) or int(group[0]) < self._group:
            raise ValueError(f"localisation of {DEFINITION} takes images in their order")
        counts = scored.spread.float() > 1e-10
        for number in group.unique().tolist():
            if number != self._group:
                self._group = number
                self._open = self.count < _IMAGES_PER_FEATURE
            here = counts & (group[scored.rows] == number) & self._open[scored.features]
            self.sum.index_put_((scored.features[here],), scored.value[here], accumulate=True)
            self.count += torch.bincount(scored.features[here], minlength=len(self.count))

    def merge(self, other: Localisation) -> None:
        """Raises ValueError: which images count depends on their order."""
        raise ValueError(f"localisation of {DEFINITION} cannot be merged; pass the images in order")

    def estimate(self) -> Estimate:
        """0 where nothing is scored."""
        fits = np.flatnonzero((self.count >= self.images).numpy())
        chosen = _drawn("localisation", fits, self.seed)
        means = (self.sum[chosen] / self.count[chosen]).numpy()
        value = float(means.mean()) if len(chosen) else 0.0
        return _estimate(value, len(chosen), "features", candidates=len(fits))


def _fvu(given: Any) -> Estimate:
    parts = [part for part in given.recorder.reconstruction.parts if part is not None]
    n = sum(part.spread.rows for part in parts)
    if not n:
        return _estimate(math.inf, 0, "tokens")
    total = squares = 0.0
    for rows, mean, about_it in (part.spread for part in parts):
        total += rows * float(mean.sum())
        squares += about_it + rows * float(mean.square().sum())
    residual = sum(part.residual for part in parts)
    var_x = squares / n - (total / n) ** 2
    var_res = sum(part.error for part in parts) / n - (residual / n) ** 2
    value = var_res / var_x if var_x > 0 else math.inf
    return _estimate(value, n, "tokens", explained=1 - value)


def _localisation(given: Any) -> Estimate:
    found: Estimate = given.recorder.maps["localisation"].estimate()
    return found


def _labelled(given: Any) -> tuple[PooledCodes, np.ndarray]:
    known = given.labels >= 0
    return given.recorder.pooled().of_images(known), given.labels[known].numpy()


def _blocks(codes: PooledCodes) -> Iterator[np.ndarray]:
    """All columns (N, d_sae), some at a time."""
    width = max(_LEAST_COLUMNS, _BLOCK // max(1, len(codes.images)))
    for at in range(0, codes.d_sae, width):
        yield codes.columns(torch.arange(at, min(at + width, codes.d_sae))).numpy()


def _ranked(codes: PooledCodes, labels: np.ndarray) -> np.ndarray:
    f_classif = _sklearn().feature_selection.f_classif
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        scores = np.concatenate([f_classif(block, labels)[0] for block in _blocks(codes)])
    return np.argsort(np.nan_to_num(scores, nan=-np.inf))[::-1]


def _split(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit on and rows to score."""
    stratify = labels if np.min(np.bincount(labels)) >= 2 else None
    train, test, _, _ = _sklearn().model_selection.train_test_split(
        np.arange(len(labels)), labels, test_size=0.2, stratify=stratify, random_state=seed
    )
    return train, test


def _fitted(x: np.ndarray, labels: np.ndarray, iterations: int, seed: int) -> Any:
    sklearn = _sklearn()
    probe = sklearn.linear_model.LogisticRegression(
        solver="lbfgs", max_iter=iterations, C=1.0, random_state=seed
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sklearn.exceptions.ConvergenceWarning)
        return probe.fit(x, labels)


def _probing(given: Any) -> Estimate:
    codes, labels = _labelled(given)
    ranked = _ranked(codes, labels)
    train, test = _split(labels, given.seed)
    accuracy: dict[int, float] = {}
    used = [k for k in KS if k <= codes.d_sae]
    best = ranked[: max(used)].copy()
    x = codes.columns(torch.from_numpy(best)).numpy()
    for k in used:
        probe = _fitted(x[train, :k], labels[train], 500, given.seed)
        accuracy[k] = float(probe.score(x[test, :k], labels[test]))
    values = list(accuracy.values())
    area = float(torch.tensor(values, dtype=torch.float64) @ areas(used))
    return _estimate(area, len(test), "images", accuracy=accuracy)


def _preservation(given: Any) -> Estimate:
    known = (given.labels >= 0).numpy()
    own, made = (part.numpy()[known] for part in given.means())
    labels = given.labels.numpy()[known]
    train, test = _split(labels, given.seed)
    probe = _fitted(own[train], labels[train], 1000, given.seed)
    of_own = float(probe.score(own[test], labels[test]))
    of_made = float(probe.score(made[test], labels[test]))
    value = min(2.0, of_made / of_own) if of_own > 0 else 0.0
    details = {"activations": of_own, "reconstructions": of_made}
    return _estimate(value, len(test), "images", **details)


def _monosemanticity(given: Any) -> Estimate:
    codes = given.recorder.pooled()
    embeddings = F.normalize(F.normalize(given.embeddings.float(), dim=1), dim=1)
    order = torch.argsort(codes.values, descending=True, stable=True)
    order = order[torch.argsort(codes.features[order], stable=True)]
    counts = torch.bincount(codes.features, minlength=codes.d_sae)
    starts = counts.cumsum(0) - counts
    scores = []
    alive = counts.nonzero()[:, 0].numpy()
    for feature in _drawn("monosemanticity", alive, given.seed):
        start, n = int(starts[feature]), int(counts[feature])
        values = codes.values[order[start : start + n]]
        lowest = values[-1] if n == len(codes.images) else values.new_zeros(())
        width = values[0] - lowest
        weights = (values[:16] - lowest) / (width if float(width) > 0 else 1)
        e = embeddings[codes.rows[order[start : start + len(weights)]]]
        upper = torch.ones(len(e), len(e), dtype=torch.bool).triu(1)
        pairs = (weights[:, None] * weights)[upper]
        if float(pairs.sum()) > 0:
            scores.append(float(((e @ e.T)[upper] * pairs).sum()) / float(pairs.sum()))
    value = float(np.mean(scores)) if scores else 0.0
    return _estimate(value, len(scores), "features")


def _absorption(given: Any) -> Estimate:
    codes, labels = _labelled(given)
    groups = given.groups or {"all": sorted(set(labels.tolist()))}
    absorbed = scored = 0
    for members in groups.values():
        inside = np.isin(labels, members)
        if len(members) < 3 or inside.sum() < 10:
            continue
        siblings = codes.of_images(torch.from_numpy(inside))
        of_group = labels[inside]
        shared = _most_active(siblings)
        for label in members:
            is_class = of_group == label
            if is_class.sum() < 3 or (~is_class).sum() < 3:
                continue
            own = _most_active(siblings.of_images(torch.from_numpy(is_class)))
            binary = is_class.astype(np.int64)
            best = torch.from_numpy(_ranked(siblings, binary)[:4].copy())
            x = siblings.columns(best).numpy()
            f1 = []
            for k in (1, 4):
                predicted = _fitted(x[:, :k], binary, 500, given.seed).predict(x[:, :k])
                score = _sklearn().metrics.f1_score(binary, predicted, zero_division=0.0)
                f1.append(float(score))
            scored += 1
            absorbed += f1[1] - f1[0] > 0.1 or len(own & shared) / len(own | shared) > 0.5
    return _estimate(absorbed / scored if scored else 0.0, scored, "classes")


def _most_active(codes: PooledCodes) -> set[int]:
    means = np.concatenate([block.mean(axis=0) for block in _blocks(codes)])
    return set(np.argsort(means)[-10:].tolist())


METRICS: dict[str, Callable[[Any], Estimate]] = {
    "fvu": _fvu,
    "localisation": _localisation,
    "probing": _probing,
    "preservation": _preservation,
    "monosemanticity": _monosemanticity,
    "absorption": _absorption,
}
NAMES = tuple(METRICS)
# by that package's names
THEIRS = {
    "fvu": "fvu",
    "localization": "localisation",
    "sparse_probing": "probing",
    "downstream_preservation": "preservation",
    "monosemanticity": "monosemanticity",
    "absorption": "absorption",
}
