"""A site of many features in seconds: what the pages read, drawn at random, no model behind it. Names are hostile."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import time
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PAGES = Path(__file__).resolve().parents[1] / "clipsteer" / "browse" / "site"
HOSTILE = '<img src=x onerror="document.title=1">'
FORMULA = "=1+1"
WORDS = [
    "dog",
    "cat",
    "red car",
    "wheel",
    "night sky",
    "snow",
    "face",
    "hand",
    "flag",
    "fruit",
    "tree",
    "sea",
    "letter",
    "sketch",
    "stripes",
    "circle",
    "clock",
    "shoe",
    HOSTILE,
    "water",
    "fire",
    "green",
    "smile",
    "roof",
    "bird",
]
CLASSES = [
    "alarm_clock",
    "apple",
    "bicycle",
    "black cat",
    "blue heart",
    "cactus",
    "church",
    "dog face",
    FORMULA,
    HOSTILE,
]
STRENGTHS = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 8]
GRID = (7, 7)
SHARD = 64


PATIENCE = 120  # seconds that only what never comes takes, on a machine that has other things to do, too


def until(page: Any, expression: str) -> None:
    """Wait until JavaScript says so, looking from outside: playwright's own wait is against the pages' policy."""
    end = time.monotonic() + PATIENCE
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        time.sleep(0.02)


def visit(page: Any, place: str) -> None:
    """Go to another place of the site; it is shown, and laid out, when this returns."""
    if page.evaluate("location.hash") == place:
        return
    page.evaluate("place => { document.querySelector('main').firstChild.old = true; location.hash = place; }", place)
    until(page, "!document.querySelector('main').firstChild.old")
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done())))")


@contextlib.contextmanager
def processor_time(page: Any) -> Iterator[list[float]]:
    """Seconds that the page's own thread computes meanwhile, which other processes do not change; appended at the
    end."""
    session, spent = page.context.new_cdp_session(page), []
    session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def so_far() -> float:
        metrics = session.send("Performance.getMetrics")["metrics"]
        return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")

    before = so_far()
    yield spent
    spent.append(so_far() - before)
    session.detach()


def put(folder: Path, key: str, value: Any, *, plain: bool = False) -> None:
    text = json.dumps(value, allow_nan=False)
    if not plain:
        text = f'"{base64.b64encode(zlib.compress(text.encode())).decode()}"'
    path = folder / "data" / f"{key}.js"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'clipsteer.put("{key}",{text});\n')


def picture(draw: np.random.Generator) -> Image.Image:
    """Soft blobs, each picture its own."""
    y, x = np.mgrid[:96, :96] / 96
    ground = draw.uniform(60, 250, 3)[None, None] * np.ones((96, 96, 1))
    for _ in range(4):
        (u, v), size, ink = draw.uniform(0, 1, 2), draw.uniform(0.08, 0.3), draw.uniform(0, 255, 3)
        inside = np.clip((size - np.hypot(x - u, y - v)) / 0.02, 0, 1)[..., None]
        ground = ground * (1 - inside) + ink * inside
    return Image.fromarray(ground.astype(np.uint8))


def four(values: Any) -> Any:
    return [None if not np.isfinite(v) else float(f"{v:.4g}") for v in np.ravel(values)]


def write_site(folder: Path, *, features: int = 12_288, images: int = 300, shards: tuple[int, ...] = (0, 1)) -> Path:
    """Overviews of all features, and the pieces of a few shards of features and of all pictures."""
    draw = np.random.default_rng(0)
    h, w = GRID
    patches = h * w
    folder.mkdir(parents=True, exist_ok=True)
    for page in PAGES.iterdir():
        shutil.copy(page, folder / page.name)
    (folder / "thumbs").mkdir(exist_ok=True)
    for row in range(images):
        picture(draw).save(folder / "thumbs" / f"{row:012x}.webp", quality=70)
    truth = draw.integers(0, len(CLASSES), images)
    first = np.where(draw.random(images) < 0.7, truth, draw.integers(0, len(CLASSES), images))
    dead = draw.random(features) < 0.15
    dead[[0, 12]] = False
    density = np.where(dead, 0, 10 ** draw.uniform(-5, -0.7, features))
    peak = np.where(dead, 0, 10 ** draw.uniform(-0.5, 1.6, features))
    score = np.where(dead | (draw.random(features) < 0.3), np.nan, 10 ** draw.normal(-3 + np.log10(peak + 0.1), 1))
    top_class = np.where(dead, -1, draw.integers(0, len(CLASSES), features))
    name = [[WORDS[i] for i in draw.integers(0, len(WORDS), 2)] for _ in range(features)]
    about = {
        "format": 1,
        "version": "0",
        "title": "A site of random numbers",
        "model": {
            "name": "no model",
            "pretrained": None,
            "hook_point": "blocks.4",
            "target_hook_point": None,
            "tokens": "all",
        },
        "sae": {"name": "random", "architecture": "topk", "k": 32, "d_in": 192, "d_sae": features},
        "data": {"name": "blobs", "images": images, "tokens": patches + 1, "classes": CLASSES},
        "grid": [h, w],
        "prefix": 1,
        "predictions": {"names": CLASSES, "how": "text"},
        "words": {"count": len(WORDS), "how": "Drawn at random."},
        "strengths": STRENGTHS,
        "steered": SHARD * len(shards),
        "steer_images": 4,
        "bins": 40,
        "feature_shard": SHARD,
        "image_shard": SHARD,
        "coactive_tokens": 1000,
        "per_patch": 8,
        "live": False,
        "compare": {
            "kind": "sae",
            "name": "another",
            "model": "no model",
            "hook_point": "blocks.4",
            "d_sae": 2 * features,
            "how": "",
        },
    }
    put(folder, "site", about, plain=True)
    put(
        folder,
        "pictures",
        {
            "thumb": [f"{row:012x}" for row in range(images)],
            "name": [CLASSES[c] for c in truth],
            "file": [f"{'<b>' if row == 3 else ''}blob {row}.png" for row in range(images)],
            "truth": truth.tolist(),
            "first": first.tolist(),
            "p": four(draw.uniform(0.2, 1, images)),
        },
    )
    put(
        folder,
        "overview",
        {
            "density": four(density),
            "images": four(np.minimum(density * 8, 1)),
            "peak": four(peak),
            "mean": four(peak / 3),
            "steerability": four(score),
            "effect": top_class.tolist(),
            "selectivity": four(np.where(dead, np.nan, draw.random(features))),
            "top_class": top_class.tolist(),
            "picture": np.where(dead, -1, draw.integers(0, images, features)).tolist(),
            "word": [pair[0] for pair in name],
            "concept": [pair[1] for pair in name],
        },
    )

    def shown(count: int, most: float) -> list[Any]:
        rows = draw.choice(images, count, replace=False).tolist()
        acts = sorted(four(draw.uniform(0.5, 1, count) * most), reverse=True)
        maps = [np.clip(draw.normal(-60, 110, patches), 0, 255).astype(np.uint8).tobytes().hex() for _ in rows]
        return [list(one) for one in zip(rows, acts, maps)]

    def feature(index: int) -> dict[str, Any]:
        most = float(peak[index])
        if dead[index]:
            return {
                "index": index,
                "histogram": [],
                "top": [],
                "prefix_acts": None,
                "intervals": [],
                "words": [],
                "opposite": [],
                "concepts": [],
                "classes": [],
                "similar": [[index + 1, 0.5]],
                "coactive": [],
                "steering": None,
            }
        clean = draw.dirichlet(np.ones(len(CLASSES)), 4)
        target = np.eye(len(CLASSES))[top_class[index]]
        mix = [min(1.0, s / 6) for s in STRENGTHS]
        steered = np.stack([(1 - m) * clean + m * target for m in mix])
        kept = [int(top_class[index]), *[c for c in range(len(CLASSES)) if c != top_class[index]][:5]]
        return {
            "index": index,
            "histogram": (10 ** draw.uniform(0, 1, 40) * np.geomspace(300, 0.2, 40)).astype(int).tolist(),
            "top": shown(9, most),
            "prefix_acts": [[0.0]] * 9,
            "intervals": [
                {"low": most * i / 5, "high": most * (i + 1) / 5, "count": 9, "pictures": shown(4, most * (i + 1) / 5)}
                for i in reversed(range(5))
            ],
            "words": [[word, 0.3 - i / 40] for i, word in enumerate(WORDS[:6])],
            "opposite": [["snow", -0.2]],
            "concepts": [[name[index][1], 0.3], ["face", 0.1]],
            "classes": [[c, 0.9 - i / 5, most / 2] for i, c in enumerate(kept[:4])],
            "similar": [[(index + i) % features, 0.9 - i / 10] for i in (1, 2, 3)],
            "coactive": [[(index + 7) % features, 0.4, 0.5]],
            "steering": {
                "images": draw.choice(images, 4, replace=False).tolist(),
                "classes": kept,
                "clean": [four(row[kept]) for row in clean],
                "probability": [[four(row[kept]) for row in rows] for rows in steered],
                "first": steered.argmax(-1).tolist(),
                "effect": [[c, float(d)] for c, d in zip(kept, four((steered[2] - clean).mean(0)[kept]))],
                "score": 0.1,
            },
        }

    for shard in shards:
        rows = range(shard * SHARD, min((shard + 1) * SHARD, features))
        put(folder, f"features/{shard}", {"features": [feature(i) for i in rows]})
        matches = [{"index": i, "match": 2 * i, "top": shown(6, 1.0), "classes": [], "words": []} for i in rows]
        put(folder, f"compare/{shard}", {"features": matches})

    def image(row: int) -> dict[str, Any]:
        active = draw.integers(1, 9, patches + 1)
        found = [draw.choice(np.flatnonzero(~dead)[:120], n, replace=False).tolist() for n in active]
        acts = [sorted(four(draw.uniform(0.1, 1, n) * 0.3), reverse=True) for n in active]
        removed = [
            [f, float(d), int(draw.integers(0, len(CLASSES)))] for f, d in zip(found[0], four(draw.normal(0, 0.1, 8)))
        ]
        return {
            "predicted": [[int(first[row]), 0.6], *[[c, 0.1] for c in range(len(CLASSES)) if c != first[row]][:4]],
            "active": active.tolist(),
            "strongest": [],
            "patches": {
                "offsets": [0, *np.cumsum(active).tolist()],
                "features": list(chain(*found)),
                "acts": list(chain(*acts)),
            },
            "removed": removed,
        }

    for shard in range(-(-images // SHARD)):
        rows = range(shard * SHARD, min((shard + 1) * SHARD, images))
        put(folder, f"images/{shard}", {"images": [image(row) for row in rows]})
    put(
        folder,
        "compare",
        {
            "match": [2 * i for i in range(features)],
            "cosine": four(draw.beta(6, 2, features)),
            "correlation": four(draw.beta(5, 2, features)),
            "density": four(density * 10 ** draw.normal(0, 0.3, features)),
            "images": four(density),
            "peak": four(peak),
            "steerability": four(score * 10 ** draw.normal(0, 0.4, features)),
            "moved": four(draw.beta(2, 5, features)),
        },
    )
    return folder


if __name__ == "__main__":
    import sys

    write_site(Path(sys.argv[1]))
