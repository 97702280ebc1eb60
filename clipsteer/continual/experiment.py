"""Runs of class-incremental learning: one strategy and seed over all tasks, and many of them side
by side."""

from __future__ import annotations

import functools
import json
import logging
import multiprocessing
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from clipsteer.continual.backbone import Encoder
from clipsteer.continual.config import CILConfig
from clipsteer.continual.learner import ClassIncrementalLearner
from clipsteer.continual.metrics import Run
from clipsteer.continual.plasticity import Plasticity
from clipsteer.continual.scenario import Scenario
from clipsteer.data.identity import Identity, identity_of
from clipsteer.io.checked import read_checked, write_checked
from clipsteer.io.digests import digest_of
from clipsteer.io.files import FileFormatError
from clipsteer.testing.machine import extra_memory
from clipsteer.training.claim import claimed
from clipsteer.training.resume import check_same_data
from clipsteer.training.schedule import DATA_ORDER
from clipsteer.training.settings import check_same_settings

__all__ = ["run_all", "run_tasks"]

logger = logging.getLogger(__name__)

_FILE = "run.json"


def run_tasks(
    scenario: Scenario,
    encoder: Callable[[], Encoder],
    config: CILConfig,
    *,
    zero_shot: Tensor | None = None,
    plasticity: Plasticity | None = None,
    out: str | Path | None = None,
    workers: int = 0,
    asked: Mapping[str, Any] | None = None,
    learner: Callable[..., ClassIncrementalLearner] = ClassIncrementalLearner,
) -> Run:
    """Learn the scenario's tasks with one strategy, measuring after each on the test images of all
    tasks so far.

    Args:
        encoder: gives the tower to start from, a fresh one at each call.
        zero_shot, plasticity, workers: see `ClassIncrementalLearner`.
        out: folder for checkpoints and run.json. A run that was stopped there goes on, and on a CPU
            with as many threads ends with the same matrix; seconds are then of the last process
            alone.
        asked: what `encoder` was asked for beside a name (the setup of `Encoder.open`), JSON-able:
            another model is another run.
        learner: makes what learns, from `ClassIncrementalLearner`'s arguments.

    Raises:
        ValueError: another run in ``out``: other settings, starting weights or images.
        FileFormatError: a damaged run, or checkpoints that are not of such a run.
        RuntimeError: another process writes to ``out``.
    """
    out = None if out is None else Path(out)
    settings = {**config.outcome(), "data order": DATA_ORDER, "data": _identity(scenario)}
    if asked:
        settings["asked"] = json.loads(json.dumps(dict(asked)))
    run = Run(config.name, config.seed, scenario.tasks, settings)
    made = functools.partial(learner, zero_shot=zero_shot, plasticity=plasticity, workers=workers)
    with claimed(out, "run_tasks"):
        return _run_tasks(run, scenario, encoder, config, out, made)


def _run_tasks(
    run: Run,
    scenario: Scenario,
    encoder: Callable[[], Encoder],
    config: CILConfig,
    out: Path | None,
    make: Callable[..., ClassIncrementalLearner],
) -> Run:
    data: Identity | None = None
    if out is not None:
        data = {"learned": identity_of(scenario.train), "measured": identity_of(scenario.test)}
        if (out / _FILE).exists():
            run = _found(run, data, out)
    if len(run.records) == len(scenario.tasks):
        return run

    def learner(folder: str) -> ClassIncrementalLearner:
        where = None if out is None else out / folder
        made = make(encoder(), config, len(scenario.classes), out=where)
        if where is not None:
            made.resume()
        return made

    sequential = None if config.cumulative else learner("checkpoints")
    if sequential is not None:
        learned = len(sequential.tasks)
        if sequential.tasks != scenario.tasks[:learned] or learned > len(run.records) + 1:
            raise ValueError(
                f"{out} holds checkpoints of tasks {sequential.tasks} and figures of "
                f"{len(run.records)}, which do not belong together; use another folder"
            )
        # a damaged checkpoint was passed over: what it held is learned and measured again
        run.records = {t: record for t, record in run.records.items() if t < learned}
    for t in range(len(scenario.tasks)):
        if t in run.records:
            continue
        if sequential is not None:
            _next_task(run, sequential, scenario, t, scenario.tasks[t])
        else:
            # all classes so far at once, from the start
            _next_task(run, learner(f"checkpoints-{t}"), scenario, t, scenario.seen(t))
        logger.info(
            "%s: task=%d of=%d accuracy=%.4g", config.name, t + 1, len(scenario.tasks), run.seen[t]
        )
        if out is not None:
            write_checked(out / _FILE, {**run.to_json(), "data": data})
    return run


def _found(run: Run, data: Identity | None, out: Path) -> Run:
    """The run in the folder; ValueError where it has other settings or data, FileFormatError for a
    damaged one."""
    path = out / _FILE
    values, _ = read_checked(path, run.to_json())
    try:
        found = Run.from_json(values)
    except FileFormatError as error:
        raise FileFormatError(f"{path}: {error}") from None
    check_same_settings("run_tasks", out, _settings(found), _settings(run))
    there = values.get("data")
    if not isinstance(there, (dict, type(None))):
        raise FileFormatError(f"{path}: 'data' must be a JSON object, got {there!r:.80}")
    check_same_data("run_tasks", out, there, data)
    return found


def _settings(run: Run) -> dict[str, Any]:
    return {"name": run.strategy, "seed": run.seed, "tasks": run.tasks, **run.settings}


def _next_task(
    run: Run,
    learner: ClassIncrementalLearner,
    scenario: Scenario,
    t: int,
    classes: list[int],
) -> None:
    """Learn classes, task t's or all so far, and record what is measured then."""
    wanted = set(classes)
    targets = enumerate(scenario.train.targets)
    images = scenario.train.subset([row for row, target in targets if target in wanted])
    began = time.monotonic()
    peak = None
    # a process that was stopped after learning and before measuring has learned already
    if len(learner.seen) < len(scenario.seen(t)):
        fit = functools.partial(learner.fit_task, images, classes)
        peak = extra_memory(fit, learner.device.type)
    seconds = time.monotonic() - began
    drift = None
    if t and not learner.config.cumulative:
        earlier = scenario.rows("train", *range(t))
        drift = learner.drift_errors(scenario.train.subset(earlier))
    tested = scenario.test.subset(scenario.rows("test", *range(t + 1)))
    run.add(
        t,
        learner.predict(tested),
        torch.tensor(tested.targets),
        seconds,
        None if peak is None else peak / 2**20,
        drift,
    )


def _identity(scenario: Scenario) -> str:
    parts = [scenario.classes, list(scenario.train.targets), list(scenario.test.targets)]
    return digest_of(parts)[:16]


def run_all(
    jobs: Sequence[tuple[Callable[..., Run], Mapping[str, Any]]],
    *,
    workers: int = 1,
    title: str = "runs",
) -> list[Run]:
    """Call function(**arguments) of each job, in ``workers`` processes with an equal share of the
    cores.

    With one worker they are called here. Functions and arguments must be picklable for more.
    """
    if workers == 1:
        bar = tqdm(jobs, desc=title, unit="run", disable=None)
        return [function(**arguments) for function, arguments in bar]
    threads = max(1, torch.get_num_threads() // workers)
    found: dict[int, Run] = {}
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(threads, os.getpid()),
    )
    with pool, tqdm(total=len(jobs), desc=title, unit="run", disable=None) as bar:
        waiting = {}
        for i, (function, arguments) in enumerate(jobs):
            waiting[pool.submit(function, **arguments)] = i
        try:
            for done in as_completed(waiting):
                found[waiting[done]] = done.result()
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [found[i] for i in range(len(jobs))]


def _start(threads: int, parent: int) -> None:
    """Set a worker up; it ends with its parent, even a killed one, before the next call resumes in
    the same folders."""
    torch.set_num_threads(threads)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def folder_name(config: CILConfig) -> str:
    """A folder for a run: strategy and seed, in characters that every file system takes."""
    name = re.sub(r"[^A-Za-z0-9.=-]+", "_", config.name)
    return f"{name}-seed{config.seed}"
