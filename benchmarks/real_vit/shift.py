"""Photographs against drawings of the same kinds: do WiSE-FT and conceptors help under a real shift?

    python -m benchmarks.real_vit.shift --weights vit_s.safetensors --pictures pictures --work work \\
        --out benchmarks/results/real_vit/shift

Kinds with at least PHOTOGRAPHS photographs and DRAWINGS drawings. A head is fitted to photographs of the frozen tower
(ridge regression); from there tower and head are fine-tuned on the same photographs, learning rate by validation
photographs; WiSE-FT mixes the two, at 0.5 and where validation is best. Conceptors act on the frozen tower's tokens
(before they are pooled; the head is fitted behind them): of photographs, of drawings of OTHER kinds, their NOT and AND.
Every choice is made on photographs; what would have been best on the drawings is written beside it, as a bound. Each
seed is another split of the photographs; all drawings are tested on. Differences are paired, seed by seed.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.real_vit.incremental import arguments
from benchmarks.real_vit.pictures import Picture, dataset, index, split
from benchmarks.real_vit.tower import encoder_of
from clipsteer.conceptors.conceptor import Conceptor
from clipsteer.conceptors.fit import correlation
from clipsteer.continual.backbone import Encoder
from clipsteer.ensembles.merging import wise_ft
from clipsteer.io.files import read_json, write_json
from clipsteer.report.axes import Axis
from clipsteer.report.charts import Chart
from clipsteer.report.intervals import mean_interval
from clipsteer.report.layers import Line

PHOTOGRAPHS, DRAWINGS = 6, 4
SEEDS = range(5)
ALPHAS = tuple(i / 10 for i in range(11))
APERTURES = (0.1, 0.3, 1.0, 3.0, 10.0)  # over 1/√(trace(R)/d)
RIDGES = (1e-2, 1e-1, 1.0, 10.0)  # over the mean of the spectrum
LRS = (1e-5, 1e-4, 1e-3)
EPOCHS, BATCH = 4, 16

logger = logging.getLogger(__name__)


def kinds_of(pictures: Sequence[Picture]) -> list[str]:
    """Those that have enough of both."""
    found = []
    for kind in sorted({picture.kind for picture in pictures}):
        drawn = [picture.drawn for picture in pictures if picture.kind == kind]
        if drawn.count(False) >= PHOTOGRAPHS and drawn.count(True) >= DRAWINGS:
            found.append(kind)
    return found


class Data:
    """Pictures of both sorts, pixels and tokens of each once."""

    def __init__(self, args: argparse.Namespace) -> None:
        everything = index(args.pictures)
        self.classes = kinds_of(everything)
        own = [p for p in everything if p.kind in self.classes and p.drawn is not None]
        self.photographs = [p for p in own if not p.drawn]
        self.drawings = [p for p in own if p.drawn]
        # drawings of other kinds, without labels
        self.others = [p for p in everything if p.kind not in self.classes and p.drawn]
        self.encoder = encoder_of(args.weights, args.block, args.image_size).eval()
        self.pixels = {}
        self.tokens = {}
        self.targets = {}
        kinds = sorted({p.kind for p in everything})
        for name in ("photographs", "drawings", "others"):
            pictures = getattr(self, name)
            classes = kinds if name == "others" else self.classes
            images = dataset(args.pictures, pictures, classes)
            x = torch.stack([self.encoder.preprocess(images[row][0]) for row in range(len(images))])
            with torch.no_grad():
                patches = [self.encoder.tokens(part).patches for part in x.split(16)]
            self.pixels[name], self.tokens[name] = x, torch.cat(patches)  # (N, P, d)
            self.targets[name] = torch.tensor(images.targets)

    def rows(self, seed: int) -> tuple[list[int], list[int], list[int]]:
        """Photographs to fit on, for validation and to test on: whole groups."""
        kept, held = split(self.photographs, 0.3, seed)
        rest = [self.photographs[row] for row in kept]
        fit, validation = split(rest, 0.2, seed + 100)
        return [kept[r] for r in fit], [kept[r] for r in validation], held


def ridge_head(x: Tensor, y: Tensor, strength: float) -> tuple[Tensor, Tensor]:  # (C, d), (C,)
    """One-against-all ridge regression about the mean."""
    Y = F.one_hot(y).double()
    mean = x.double().mean(0)
    centred = x.double() - mean
    G = centred.T @ centred
    G.diagonal().add_(strength * float(G.diagonal().mean()))
    W = torch.linalg.solve(G, centred.T @ (Y - Y.mean(0))).T
    return W.float(), (Y.mean(0) - W @ mean).float()


def accuracy(x: Tensor, y: Tensor, head: tuple[Tensor, Tensor]) -> float:
    return float((F.linear(x, *head).argmax(1) == y).double().mean())


class Classifier(nn.Module):
    """The tower with a head."""

    def __init__(self, encoder: Encoder, head: tuple[Tensor, Tensor], scale: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(head[0].shape[1], head[0].shape[0])
        with torch.no_grad():
            self.head.weight.copy_(scale * head[0])
            self.head.bias.copy_(scale * head[1])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


@torch.no_grad()
def right(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    return float((torch.cat([model(part) for part in x.split(16)]).argmax(1) == y).double().mean())


def tuned(start: Classifier, x: Tensor, y: Tensor, lr: float, seed: int) -> Classifier:
    """AdamW at a cosine of this rate, on pictures shifted by some pixels."""
    model = copy.deepcopy(start).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    steps = EPOCHS * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x), generator=generator).split(BATCH):
            shift = torch.randint(-6, 7, (2,), generator=generator).tolist()
            pixels = torch.roll(x[rows], shift, (2, 3))
            loss = F.cross_entropy(model(pixels), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model


def frozen(data: Data, seed: int) -> dict[str, Any]:
    """The head on the frozen tower, and with each conceptor on the tokens, aperture and ridge by validation."""
    fit, validation, test = data.rows(seed)
    photo, drawn, others = (data.tokens[n] for n in ("photographs", "drawings", "others"))
    y, yd = data.targets["photographs"], data.targets["drawings"]
    background = torch.cat([photo[fit], others]).flatten(0, 1).mean(0)
    R = {"photo": photo[fit].flatten(0, 1), "drawn": others.flatten(0, 1)}
    R = {name: correlation(rows.double(), mean=background.double()) for name, rows in R.items()}
    unit = float(sum(r.diagonal().mean() for r in R.values()) / 2) ** -0.5

    def made(name: str, aperture: float) -> Conceptor:
        c = {n: Conceptor.from_correlation(r, aperture * unit, mean=background.double()) for n, r in R.items()}
        kinds = {"photo": c["photo"], "NOT drawn": ~c["drawn"], "photo AND NOT drawn": c["photo"] & ~c["drawn"]}
        return kinds[name]

    def measured(project: Any, **what: Any) -> list[dict[str, Any]]:
        x, xd = project(photo).mean(1), project(drawn).mean(1)
        found = []
        for strength in RIDGES:
            head = ridge_head(x[fit], y[fit], strength)
            parts = {"validation": validation, "photographs": test}
            row = {name: accuracy(x[rows], y[rows], head) for name, rows in parts.items()}
            found.append({**what, "ridge": strength, **row, "drawings": accuracy(xd, yd, head)})
        return found

    tried = {"frozen": measured(lambda h: h)}
    for name in ("photo", "NOT drawn", "photo AND NOT drawn"):
        rows = [measured(made(name, a).project, aperture=a) for a in APERTURES]
        tried[f"conceptor: {name}"] = list(itertools.chain(*rows))
    chosen = {name: max(rows, key=lambda row: row["validation"]) for name, rows in tried.items()}
    for name, rows in tried.items():
        chosen[name]["best_on_drawings"] = max(row["drawings"] for row in rows)
    return chosen


def mixed(data: Data, seed: int, ridge: float) -> dict[str, Any]:
    """The fine-tuned tower, and WiSE-FT at every α."""
    fit, validation, test = data.rows(seed)
    x, y = data.pixels["photographs"], data.targets["photographs"]
    with torch.no_grad():
        pooled = torch.cat([data.encoder(part) for part in x[fit].split(16)])
    head = ridge_head(pooled, y[fit], ridge)
    start = Classifier(copy.deepcopy(data.encoder).requires_grad_(), head, scale=10.0)
    tried = []
    for lr in LRS:
        model = tuned(start, x[fit], y[fit], lr, seed)
        tried.append((right(model, x[validation], y[validation]), -lr, model))
        logger.info("seed=%d lr=%g validation=%.3f", seed, lr, tried[-1][0])
    best, rate, model = max(tried, key=lambda row: row[:2])
    parts = {
        "validation": (x[validation], y[validation]),
        "photographs": (x[test], y[test]),
        "drawings": (data.pixels["drawings"], data.targets["drawings"]),
    }
    curve = []
    holder = copy.deepcopy(start)
    for alpha in ALPHAS:
        holder.load_state_dict(wise_ft(start.state_dict(), model.state_dict(), alpha))
        curve.append({"alpha": alpha, **{name: right(holder, *part) for name, part in parts.items()}})
    by_validation = max(curve, key=lambda row: (row["validation"], -abs(row["alpha"] - 0.5)))
    return {"lr": -rate, "validation": best, "curve": curve, "chosen": by_validation["alpha"]}


def report(found: dict[int, dict[str, Any]], classes: list[str], sizes: dict[str, int], out: Path) -> None:
    """Figures, and WiSE-FT's curves."""
    out.parent.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in sorted(found):
        for name, row in found[seed]["frozen"].items():
            rows.setdefault(name, []).append(row)
        if (run := found[seed].get("mixed")) is None:
            continue
        at = {row["alpha"]: row for row in run["curve"]}
        ways = {"probe, α = 0": 0.0, "fine-tuned, α = 1": 1.0, "WiSE-FT, α = 0.5": 0.5}
        for name, alpha in {**ways, "WiSE-FT, α by validation": run["chosen"]}.items():
            rows.setdefault(name, []).append(at[alpha])
    parts = ("photographs", "drawings")
    table = {n: {p: mean_interval([row[p] for row in own]) for p in parts} for n, own in rows.items()}
    gaps = {}
    for name, own in rows.items():
        base = "frozen" if name.startswith("conceptor") else "fine-tuned, α = 1"
        if name not in (base, "frozen"):
            pairs = list(zip(own, rows[base]))
            gaps[f"{name} minus {base}"] = {p: mean_interval([a[p] - b[p] for a, b in pairs]) for p in parts}
    bounds = {n: mean_interval([r["best_on_drawings"] for r in own]) for n, own in rows.items() if "aperture" in own[0]}
    body = {"kinds": classes, "sizes": sizes, "table": table, "differences": gaps, "best_on_drawings": bounds}
    write_json(out.with_suffix(".json"), {**body, "by_seed": {str(seed): run for seed, run in found.items()}})
    curves = [run["mixed"]["curve"] for run in found.values() if "mixed" in run]
    if curves:
        lines = []
        for part in parts:
            mean = [100 * sum(c[i][part] for c in curves) / len(curves) for i in range(len(ALPHAS))]
            lines.append(Line(part, ALPHAS, mean))
        Chart("WiSE-FT, accuracy %", *lines, x="α", y=Axis("accuracy, %")).write(out.with_suffix(".svg"))
    for name, row in table.items():
        cells = [f"{100 * row[p]['mean']:.1f} ± {_half(row[p])}" for p in parts]
        sys.stdout.write(f"| {name} | {row['drawings']['n']} | {' | '.join(cells)} |\n")
    for name, gap in gaps.items():
        cells = [f"{100 * gap[p]['mean']:+.1f} ± {_half(gap[p])}" for p in parts]
        sys.stdout.write(f"| {name} | {gap['drawings']['n']} | {' | '.join(cells)} |\n")


def _half(found: dict[str, Any]) -> str:
    return "–" if found["low"] is None else f"{100 * (found['mean'] - found['low']):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(parser)
    parser.add_argument("--only-frozen", action="store_true", help="without fine-tuning")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    folder = args.work / "shift"
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[int, dict[str, Any]] = {}
    data = None if args.report else Data(args)
    for seed in SEEDS[: args.seeds]:
        file = folder / f"seed{seed}.json"
        found[seed] = read_json(file) if file.exists() else {}
        if data is None:
            continue
        if "frozen" not in found[seed]:
            found[seed]["frozen"] = frozen(data, seed)
            write_json(file, found[seed])
        if "mixed" not in found[seed] and not args.only_frozen:
            found[seed]["mixed"] = mixed(data, seed, found[seed]["frozen"]["frozen"]["ridge"])
            write_json(file, found[seed])
    pictures = index(args.pictures)
    classes = kinds_of(pictures)
    own = [p.drawn for p in pictures if p.kind in classes]
    sizes = {"photographs": own.count(False), "drawings": own.count(True)}
    report({seed: run for seed, run in found.items() if run}, classes, sizes, args.out)


if __name__ == "__main__":
    main()
