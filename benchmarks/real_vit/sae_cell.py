"""One run of ``benchmarks.real_vit.sae``: a library, a learning rate, a seed."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.real_vit.sae_libraries import Job, started
from clipsteer.io.files import write_json
from clipsteer.sae.model import SAE
from clipsteer.training.schedule import Order

# of a run, in steps: where it is judged on the way
MARKS = (100, 200, 400, 700, 1000, 1400, 2000, 3000, 4000, 7000, 10_000, 14_000, 20_000)
PROBED = 32_768  # training rows among which a feature that is alive has to be active at least once


class Rows(NamedTuple):
    """Tokens (rows, d) to train on, to choose by, and to report."""

    train: Tensor
    validation: Tensor
    test: Tensor


def split(tokens: Tensor, group: int, most: int = 8192) -> Rows:
    """A tenth of the pictures to report, another to choose by, drawn at random; ``group`` is the number of a picture's
    rows, which stay together. Of a tenth ``most`` rows are looked at, evenly spaced."""
    pictures = tokens[: len(tokens) // group * group].reshape(-1, group, tokens.shape[1])
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))
    tenth = max(len(pictures) // 10, 1)
    train, *held_out = order.split([len(pictures) - 2 * tenth, tenth, tenth])
    parts = [pictures[part].flatten(0, 1) for part in held_out]
    parts = [part[torch.linspace(0, len(part) - 1, min(most, len(part))).long()] for part in parts]
    return Rows(pictures[train].flatten(0, 1), *parts)


@torch.no_grad()
def fvu(sae: SAE, rows: Tensor) -> float:
    """The squared error over the squared distance from the rows' mean."""
    left = sum(float((sae(x).x_hat - x).double().square().sum()) for x in rows.split(1024))
    return left / float((rows - rows.mean(0)).double().square().sum())


@torch.no_grad()
def dead(sae: SAE, rows: Tensor) -> tuple[float, float]:
    """The share of features that are active in none of the rows, and how many are active in a row."""
    alive = torch.zeros(sae.d_sae, dtype=torch.bool)
    active = 0
    for x in rows.split(1024):
        out = sae(x)
        on = out.acts > 0
        active += int(on.sum())
        if out.indices is None:
            alive |= on.any(0)
        else:
            alive[out.indices[on]] = True
    return 1 - float(alive.float().mean()), active / len(rows)


def batches_of(rows: Tensor, job: Job) -> Iterator[Tensor]:
    """The batches of a run, the same for every library: passes in orders by the seed."""
    order = Order(len(rows), job.batch, job.seed, drop_last=True)
    for step in range(job.steps):
        yield rows[torch.tensor(order.rows(step))]


def name_of(job: Job) -> str:
    """Of the file that a run is kept in."""
    lr = "auto" if job.lr is None else f"{job.lr:g}"
    extra = ""
    if job.settings:
        extra = "-" + hashlib.sha256(json.dumps(job.settings, sort_keys=True).encode()).hexdigest()[:8]
    return f"{job.library}-{lr}-{job.schedule}-{job.steps}-n{job.n}-k{job.k}-b{job.batch}-s{job.seed}{extra}.json"


def run(job: Job, rows: Rows, folder: Path) -> dict[str, Any]:
    """A run, judged at the marks and at its end; one that is in ``folder`` is read."""
    path = folder / name_of(job)
    if path.is_file():
        return json.loads(path.read_text())
    batches = batches_of(rows.train, job)
    first = next(batches)
    trained = started(job, first)
    seconds, taken, curve = 0.0, 0, []
    for mark in [*(m for m in MARKS if m < job.steps), job.steps]:
        part = [first] if taken == 0 else []
        part += [next(batches) for _ in range(mark - taken - len(part))]
        begin = time.process_time()
        trained.train(part)
        seconds += time.process_time() - begin
        taken = mark
        sae = trained.learned()
        found = {"validation": fvu(sae, rows.validation), "test": fvu(sae, rows.test)}
        curve.append({"steps": taken, "processor_seconds": round(seconds, 2)} | found)
    share, l0 = dead(sae, rows.train[:: max(1, len(rows.train) // PROBED)])
    record = {**job._asdict(), "curve": curve, **curve[-1], "dead": share, "l0": l0}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    return record
