"""What conceptors do to a CLIP on EmojiStyles: styles and categories, the held-out style, and composed concepts.

Concepts (not drawings) are split into fit, validation and test; every choice of block, aperture and β is made on the
validation concepts and reported on the test concepts. Activations of every block are computed once; an evaluation
steers them and runs the blocks above. Apertures are relative: α = a / sqrt(trace(R)/d), R of all fit drawings.

The background mean is that of the fit concepts' drawings in all three styles, without their labels; so are the
conceptor and mean of Twemoji. Methods that use neither have seen nothing of the held-out style.
Postmus & Abreu 2024 (arXiv 2410.16314) is the source of the four ways to steer that are compared, and of the
composition experiment.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from benchmarks.conceptors.drawings import STYLES, Drawings, Fitted, finish, fit_block, harvest_drawings, splits
from clipsteer.clip.model import CLIP
from clipsteer.conceptors.conceptor import Conceptor
from clipsteer.data.emoji import HELD_OUT_STYLE, TRAINED_STYLES

APERTURES = (0.1, 0.3, 1.0, 3.0, 10.0)
BETAS = (0.5, 0.75, 1.5, 2.0)  # beside 1
ADDED = (-1.0, -0.5, 0.5, 1.0, 2.0)
# towards something that the drawings are not, other strengths count
TOWARDS_APERTURES = (0.03, 0.1, 0.3, 1.0, 3.0)
TOWARDS_BETAS = (0.5, 2.0, 4.0, 8.0, 16.0, 32.0)
TOWARDS_ADDED = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)

_SHARES = ("target", "category", "style", "variance")

# what is kept of a drawing; "style" is what differs between the trained styles' drawings of one concept
EXPRESSIONS: dict[str, Callable[[dict[str, Conceptor]], Conceptor]] = {
    "noto OR fluent": lambda c: c["noto"] | c["fluent"],
    "NOT noto AND NOT fluent": lambda c: ~c["noto"] & ~c["fluent"],
    "NOT twemoji": lambda c: ~c["twemoji"],
    "(noto OR fluent) AND NOT twemoji": lambda c: (c["noto"] | c["fluent"]) & ~c["twemoji"],
    "NOT style": lambda c: ~c["style"],
}
# of each drawing's own category, which is given
WITHIN: dict[str, Callable[[dict[str, Conceptor], str], Conceptor]] = {
    "category": lambda c, own: c[own],
    "category AND NOT twemoji": lambda c, own: c[own] & ~c["twemoji"],
}
COMPOSED: dict[str, Callable[[dict[str, Conceptor], str, str], Conceptor]] = {
    "category AND style": lambda c, category, style: c[category] & c[style],
    "category OR style": lambda c, category, style: c[category] | c[style],
    "fitted to both": lambda c, category, style: c[f"{category} in {style}"],
}


@dataclass(frozen=True)
class Setting:
    """A method and its numbers; aperture is None for additions."""

    name: str
    centred: bool
    block: int
    beta: float
    aperture: float | None = None

    @property
    def method(self) -> str:
        kind = "addition" if self.aperture is None else "conceptor"
        return f"{'mean-centred ' if self.centred else ''}{kind}: {self.name}"


class _Maker:
    """Settings -> functions of activations (n, T, d). A point's conceptors are made once, and kept for the next one."""

    def __init__(self, fits: dict[int, Fitted], data: Drawings) -> None:
        self.fits, self.data = fits, data
        self._made: tuple[Any, Any] = (None, None)

    def parts(self, setting: Setting) -> dict[str, Conceptor]:
        key = (setting.block, setting.aperture, setting.centred)
        if self._made[0] != key:
            self._made = (key, {"parts": self.fits[setting.block].conceptors(setting.aperture, setting.centred)})
        return self._made[1]["parts"]

    def cached(self, setting: Setting, name: Any, build: Callable[[dict[str, Conceptor]], Conceptor]) -> Conceptor:
        parts = self.parts(setting)
        if name not in self._made[1]:
            self._made[1][name] = build(parts)
        return self._made[1][name]

    def vector(self, setting: Setting, *names: str) -> Tensor:
        """The mean of the named means, about the background where centred."""
        fitted = self.fits[setting.block]
        vector = torch.stack([fitted.means[n] for n in names]).mean(0)
        return (vector - fitted.mean if setting.centred else vector).float()

    def everywhere(self, setting: Setting, rows: Tensor) -> Callable[[Tensor], Tensor]:
        if setting.aperture is None:
            shift = setting.beta * self.vector(setting, setting.name)
            return lambda x: x + shift
        C = self.cached(setting, setting.name, EXPRESSIONS.get(setting.name))
        return lambda x: C.project(x, beta=setting.beta)

    def within(self, setting: Setting, rows: Tensor) -> Callable[[Tensor], Tensor]:
        index, names = self.data.category[rows], self.data.categories
        if setting.aperture is None:
            shift = setting.beta * torch.stack([self.vector(setting, n) for n in names])
            return lambda x: x + shift[index][:, None]
        build = lambda parts: Conceptor.stack([WITHIN[setting.name](parts, n) for n in names])
        C = self.cached(setting, setting.name, build)
        return lambda x: C.project(x, index[:, None].expand(x.shape[:2]).contiguous(), beta=setting.beta)


def _grid(names: list[str], added: list[str], blocks: Any, apertures: Any, betas: Any) -> list[Setting]:
    """Blocks × apertures at β = 1, and for additions blocks × β."""
    grid = []
    for block, centred in itertools.product(blocks, (False, True)):
        grid += [Setting(n, centred, block, beta) for n in added for beta in betas]
        grid += [Setting(n, centred, block, 1.0, a) for a in apertures for n in names]
    return grid


def _search(
    grid: list[Setting], score: Callable[[Setting], float], betas: tuple[float, ...], title: str
) -> tuple[dict[str, tuple[float, Setting]], list[tuple[Setting, float]]]:
    """The best setting of every method on the grid, then of β there; ties go to the earlier."""
    best: dict[str, tuple[float, Setting]] = {}
    seen = []

    def visit(settings: list[Setting], what: str) -> None:
        for setting in tqdm(settings, desc=f"{title}, {what}", unit="setting", disable=None, leave=False):
            value = score(setting)
            seen.append((setting, value))
            if setting.method not in best or value > best[setting.method][0]:
                best[setting.method] = (value, setting)

    visit(grid, "grid")
    visit([replace(s, beta=b) for _, s in list(best.values()) if s.aperture is not None for b in betas], "β")
    return best, seen


def held_out_style(clip: CLIP, data: Drawings, seed: int, *, within: bool = False) -> dict[str, Any]:
    """Accuracy of naming Twemoji drawings, unsteered and steered by each method as validation chose it.

    Args:
        within: the category is given: candidates are its labels, and each drawing is steered by its own category.
            Otherwise the candidates are all labels, and all drawings are steered alike.
    """
    part = splits(data, seed)
    blocks = range(len(data.blocks))
    maker = _Maker({b: fit_block(data, b, part["fit"]) for b in blocks}, data)
    make = maker.within if within else maker.everywhere
    rows = {name: data.rows(concepts, HELD_OUT_STYLE) for name, concepts in part.items() if name != "fit"}
    rows["unseen"] = data.rows((~data.seen).nonzero()[:, 0], HELD_OUT_STYLE)

    def hits(name: str, setting: Setting | None) -> Tensor:
        block = blocks[-1] if setting is None else setting.block
        x = data.blocks[block][rows[name]]
        scores = finish(clip, x if setting is None else make(setting, rows[name])(x), block) @ data.head.T
        if within:
            scores = scores.masked_fill(data.of_concept != data.category[rows[name]][:, None], -9.0)
        return scores.argmax(1) == data.concept[rows[name]]

    names, added = (list(WITHIN), ["category"]) if within else (list(EXPRESSIONS), ["trained", HELD_OUT_STYLE])
    score = lambda setting: float(hits("validation", setting).double().mean())
    best, seen = _search(_grid(names, added, blocks, APERTURES, ADDED), score, BETAS, f"held-out style, seed {seed}")
    clean = {name: hits(name, None) for name in rows}
    methods = {}
    for method, (value, setting) in best.items():
        got = {name: hits(name, setting) for name in ("test", "unseen")}
        methods[method] = {
            **asdict(setting), "validation": value, **{n: float(h.double().mean()) for n, h in got.items()},
            "gained": int((got["test"] & ~clean["test"]).sum()), "lost": int((clean["test"] & ~got["test"]).sum()),
        }  # fmt: skip
    return {
        "seed": seed, "images": {n: len(r) for n, r in rows.items()},
        "unsteered": {n: float(h.double().mean()) for n, h in clean.items()}, "methods": methods,
        "grid": [(s.method, s.block, s.beta if s.aperture is None else s.aperture, v) for s, v in seen
                 if s.aperture is None or s.beta == 1.0],
    }  # fmt: skip


def evidence(data: Drawings, seed: int) -> list[dict[str, Any]]:
    """At each block: which style and which category has the most evidence Σ_t xᵀC_k x / trace(C_k) on test drawings?

    Style over all three styles' drawings, category over Twemoji's. The aperture and centring are chosen by validation.
    Beside it, the nearest class mean of the token average.
    """
    part, table = splits(data, seed), []
    for block, x in enumerate(data.blocks):
        fitted = fit_block(data, block, part["fit"])
        row: dict[str, Any] = {"block": block}
        for what, names, styles in (("style", STYLES, STYLES), ("category", data.categories, (HELD_OUT_STYLE,))):
            truth = data.style if what == "style" else data.category
            found = []
            for centred, a in itertools.product((False, True), APERTURES):
                parts = fitted.conceptors(a, centred)
                C = torch.stack([parts[n].matrix.float() / float(parts[n].quota) for n in names])
                accuracy = {}
                for name in ("validation", "test"):
                    rows = data.rows(part[name], *styles)
                    h = x[rows] - fitted.mean.float() if centred else x[rows]
                    score = torch.stack([((h @ c) * h).sum((1, 2)) for c in C], 1)
                    accuracy[name] = float((score.argmax(1) == truth[rows]).double().mean())
                quotas = {n: float(parts[n].quota) for n in names}
                found.append((accuracy["validation"], accuracy["test"], a, centred, quotas))
            value = max(found, key=lambda f: f[0])
            rows = data.rows(part["test"], *styles)
            distance = torch.cdist(x[rows].mean(1).double(), torch.stack([fitted.means[n] for n in names]))
            row[what] = {
                "accuracy": value[1], "aperture": value[2], "centred": value[3], "quota": value[4],
                "nearest_mean": float((distance.argmin(1) == truth[rows]).double().mean()),
            }  # fmt: skip
        table.append(row)
    return table


def composition(clip: CLIP, data: Drawings, seed: int, block: int | None = None, images: int = 40) -> dict[str, Any]:
    """Steer Twemoji drawings of other categories towards "category c in style s", c and s together in one conceptor.

    A steered image succeeds when, of the 15 mean embeddings of (category, style) over unsteered fit drawings, that of
    the target is nearest. One setting serves all ten targets (five categories in each trained style). Compared: AND and
    OR of the two conceptors, a conceptor fitted to their common drawings, and the same with vectors.

    An image that is overwritten succeeds too. "variance", 1 - ‖mean of the unit embeddings‖², shows how much of the
    difference between images is left; "gentle" chooses among the settings that leave at least half of it.
    """
    part = splits(data, seed)
    block = len(data.blocks) // 2 if block is None else block
    targets = list(itertools.product(data.categories, TRAINED_STYLES))
    sets = {f"{c} in {s}": data.rows(part["fit"], s, category=data.categories.index(c))
            for c, s in itertools.product(data.categories, STYLES)}  # fmt: skip
    maker = _Maker({block: fit_block(data, block, part["fit"], sets)}, data)
    last = len(data.blocks) - 1
    centroids = F.normalize(
        torch.stack([finish(clip, data.blocks[last][r], last).mean(0) for r in sets.values()]), dim=1
    )
    places = list(sets)

    def outcome(name: str, setting: Setting | None, limit: int | None) -> tuple[float, ...]:
        """Shares of images that land on the target, its category, its style; and the variance. Means over targets."""
        totals = []
        for category, style in targets:
            rows = data.rows(part[name], HELD_OUT_STYLE)
            rows = rows[data.category[rows] != data.categories.index(category)]
            # spread evenly: the drawings are in the order of their categories
            n = len(rows) if limit is None else min(limit, len(rows))
            rows = rows[torch.arange(n) * len(rows) // n]
            x = data.blocks[block][rows]
            if setting is not None and setting.aperture is None:
                both = (category, style) if setting.name == "mean of vectors" else (f"{category} in {style}",)
                x = x + setting.beta * maker.vector(setting, *both)
            elif setting is not None:
                build = partial(COMPOSED[setting.name], category=category, style=style)
                x = maker.cached(setting, (setting.name, category, style), build).project(x, beta=setting.beta)
            embedded = finish(clip, x, block)
            pairs = [tuple(places[i].split(" in ")) for i in (embedded @ centroids.T).argmax(1).tolist()]
            totals.append([mean(p == (category, style) for p in pairs), mean(p[0] == category for p in pairs),
                           mean(p[1] == style for p in pairs), 1 - float(embedded.mean(0).square().sum())])  # fmt: skip
        return tuple(mean(column) for column in zip(*totals))

    vectors = ["mean of vectors", "fitted to both"]
    grid = _grid(list(COMPOSED), vectors, [block], TOWARDS_APERTURES, TOWARDS_ADDED)
    left: dict[Setting, float] = {}

    def score(setting: Setting) -> float:
        target, _, _, left[setting] = outcome("validation", setting, images)
        return target

    best, seen = _search(grid, score, TOWARDS_BETAS, f"composition, seed {seed}")
    half = outcome("validation", None, images)[3] / 2
    kept = [(v, s) for s, v in seen if left[s] >= half]
    gentle = {m: max((i for i in kept if i[1].method == m), key=lambda i: i[0], default=None) for m in best}
    shares = lambda setting: dict(zip(_SHARES, outcome("test", setting, None)))
    closeness = []
    for a in TOWARDS_APERTURES:
        setting = Setting("", True, block, 1.0, a)
        parts = maker.parts(setting)
        triples = [tuple(f(parts, c, s) for f in COMPOSED.values()) for c, s in targets]
        apart = lambda C, D: float((C.matrix - D.matrix).norm() / D.matrix.norm())
        closeness.append({
            "aperture": a,
            "AND_similarity": mean(float(both.similarity(own)) for both, _, own in triples),
            "OR_similarity": mean(float(either.similarity(own)) for _, either, own in triples),
            "AND_distance": mean(apart(both, own) for both, _, own in triples),
            "OR_distance": mean(apart(either, own) for _, either, own in triples),
        })  # fmt: skip
    return {
        "seed": seed, "block": block, "targets": len(targets), "unsteered": shares(None),
        "methods": {m: {**asdict(s), "validation": v, **shares(s)} for m, (v, s) in best.items()},
        "gentle": {m: {**asdict(f[1]), "validation": f[0], **shares(f[1])} for m, f in gentle.items() if f is not None},
        "closeness": closeness,
    }  # fmt: skip


def _summary(values: list[float]) -> dict[str, float]:
    """Mean and, over at least two seeds, standard deviation."""
    return {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else 0.0}


def summarise_composition(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and deviations over ``composition`` of several seeds."""
    rows = [r["closeness"] for r in runs]
    mean_of = lambda found: {n: _summary([f[n] for f in found]) for n in _SHARES}
    over = lambda kind: {
        m: {**mean_of([r[kind][m] for r in runs]), "chosen": [r[kind][m] for r in runs]}
        for m in runs[0][kind] if all(m in r[kind] for r in runs)
    }  # fmt: skip
    return {
        "block": runs[0]["block"], "unsteered": mean_of([r["unsteered"] for r in runs]),
        "methods": over("methods"), "gentle": over("gentle"),
        "closeness": [{k: mean(row[k] for row in same) for k in same[0]} for same in zip(*rows)],
    }  # fmt: skip


def evaluate(clip: CLIP, seeds: int = 3, data: Drawings | None = None) -> dict[str, Any]:
    """All of it over seeds 0 … seeds-1, which draw the splits; summaries are means over them, with deviations.

    ``data`` is by default what ``harvest_drawings`` gives for this model.
    Returns plain data: "held_out", "within_category", "evidence", "composition".
    """
    if seeds < 1:
        raise ValueError(f"evaluate: seeds must be at least 1, got {seeds}")
    data = harvest_drawings(clip) if data is None else data
    result: dict[str, Any] = {"seeds": seeds, "apertures": APERTURES, "betas": sorted((1.0, *BETAS)), "added": ADDED,
                              "towards": {"apertures": TOWARDS_APERTURES, "betas": sorted((1.0, *TOWARDS_BETAS)),
                                          "added": TOWARDS_ADDED}}  # fmt: skip
    for name, within in (("held_out", False), ("within_category", True)):
        runs = [held_out_style(clip, data, s, within=within) for s in range(seeds)]
        points: dict[Any, list[float]] = {}
        for method, block, x, value in itertools.chain.from_iterable(r.pop("grid") for r in runs):
            points.setdefault((method, block, x), []).append(value)
        result[name] = {
            "images": [r["images"] for r in runs],
            "unsteered": {n: _summary([r["unsteered"][n] for r in runs]) for n in ("validation", "test", "unseen")},
            "methods": {
                m: {
                    "gain": _summary([r["methods"][m]["test"] - r["unsteered"]["test"] for r in runs]),
                    **{n: _summary([r["methods"][m][n] for r in runs]) for n in ("validation", "test", "unseen")},
                    "chosen": [r["methods"][m] for r in runs],
                }
                for m in runs[0]["methods"]
            },
            "validation_grid": [[m, b, x, round(mean(v), 4)] for (m, b, x), v in points.items()],
        }  # fmt: skip
    result["evidence"] = [evidence(data, s) for s in range(seeds)]
    result["composition"] = summarise_composition([composition(clip, data, s) for s in range(seeds)])
    return result
