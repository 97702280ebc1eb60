"""Runs of class-incremental learning: one strategy and seed over all tasks, and many of them side
by side."""

from __future__ import annotations

import functools
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
from clipsteer.io.digests import digest_of
from clipsteer.io.files import read_json, write_json
from clipsteer.testing.machine import extra_memory
from clipsteer.training.loop import check_same_settings
from clipsteer.training.schedule import DATA_ORDER

__all__ = ["run_all", "run_tasks"]

logger = logging.getLogger(__name__)


def run_tasks(
    scenario: Scenario,
    encoder: Callable[[], Encoder],
    config: CILConfig,
    *,
    zero_shot: Tensor | None = None,
    plasticity: Plasticity | None = None,
    out: str | Path | None = None,
    workers: int = 0,
) -> Run:
    """Learn the scenario's tasks with one strategy, measuring after each on the test images of all
    tasks so far.

    Args:
        encoder: gives the tower to start from, a fresh one at each call.
        zero_shot, plasticity, workers: see `ClassIncrementalLearner`.
        out: folder for checkpoints and run.json. A run that was stopped there goes on, and on a CPU
            with as many threads ends with the same matrix; seconds are then of the last process
            alone.
    """
    out = None if out is None else Path(out)
    settings = {**config.outcome(), "data order": DATA_ORDER, "data": _identity(scenario)}
    run = Run(config.name, config.seed, scenario.tasks, settings)
    if out is not None and (out / "run.json").exists():
        found = Run.from_json(read_json(out / "run.json"))
        there, here = (
            {"name": r.strategy, "seed": r.seed, "tasks": r.tasks, **r.settings}
            for r in (found, run)
        )
        check_same_settings("run_tasks", out, there, here)
        run = found
    if len(run.records) == len(scenario.tasks):
        return run

    def learner(folder: str) -> ClassIncrementalLearner:
        where = out / folder if out is not None else None
        made = ClassIncrementalLearner(
            encoder(),
            config,
            len(scenario.classes),
            zero_shot=zero_shot,
            plasticity=plasticity,
            out=where,
            workers=workers,
        )
        if where is not None:
            made.resume()
        return made

    current = None if config.cumulative else learner("checkpoints")
    if current is not None:
        learned = len(current.tasks)
        if current.tasks != scenario.tasks[:learned] or learned > len(run.records) + 1:
            raise ValueError(
                f"{out} holds checkpoints of tasks {current.tasks} and figures of "
                f"{len(run.records)}, which do not "
                "belong together; use another folder"
            )
        # a damaged checkpoint was passed over: what it held is learned and measured again
        run.records = {t: record for t, record in run.records.items() if t < learned}
    for t, classes in enumerate(scenario.tasks):
        if t in run.records:
            continue
        if config.cumulative:
            current, classes, tasks = learner(f"checkpoints-{t}"), scenario.seen(t), range(t + 1)
        else:
            tasks = range(t, t + 1)
        images, began = scenario.train.subset(scenario.rows("train", *tasks)), time.monotonic()
        # a process that was stopped after learning and before measuring has learned already
        peak = None
        if len(current.seen) < len(scenario.seen(t)):
            fit = functools.partial(current.fit_task, images, classes)
            peak = extra_memory(fit, current.device.type)
        seconds = time.monotonic() - began
        tested = scenario.test.subset(scenario.rows("test", *range(t + 1)))
        drift = None
        if t and not config.cumulative:
            drift = current.drift_errors(scenario.train.subset(scenario.rows("train", *range(t))))
        predicted = current.predict(tested)
        run.add(
            t,
            predicted,
            torch.tensor(tested.targets),
            seconds,
            None if peak is None else peak / 2**20,
            drift,
        )
        logger.info(
            "%s: task=%d of=%d accuracy=%.4g", config.name, t + 1, len(scenario.tasks), run.seen[t]
        )
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / "run.json", run.to_json())
    return run


def _identity(scenario: Scenario) -> str:
    parts = [scenario.classes, *([list(getattr(scenario, p).targets) for p in ("train", "test")])]
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
        return [
            function(**arguments)
            for function, arguments in tqdm(jobs, desc=title, unit="run", disable=None)
        ]
    threads = max(1, torch.get_num_threads() // workers)
    found: dict[int, Run] = {}
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(threads, os.getpid()),
    )
    with pool, tqdm(total=len(jobs), desc=title, unit="run", disable=None) as bar:
        waiting = {
            pool.submit(function, **arguments): i for i, (function, arguments) in enumerate(jobs)
        }
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
    return f"{re.sub(r'[^A-Za-z0-9.=-]+', '_', config.name)}-seed{config.seed}"
