"""The demo's section on class-incremental learning: two runs that differ in the mean-shift
compensation alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from clipsteer.continual.backbone import Encoder
from clipsteer.continual.experiment import run_tasks
from clipsteer.continual.metrics import Run
from clipsteer.continual.report import curves, drift_curves, matrix_maps
from clipsteer.continual.scenario import Scenario, emoji_scenario
from clipsteer.continual.strategies import strategy
from clipsteer.data.emoji import HELD_OUT_STYLE
from clipsteer.demo.sections import percent
from clipsteer.report.intervals import clopper_pearson
from clipsteer.report.page import Html, grid, stats, table, text
from clipsteer.report.page import percent as tenths

ELSEWHERE = (
    "The demo does this for EmojiCLIP and the bundled drawings alone. For your own model and "
    "images: clipsteer cil, which has examples under --help."
)


# a rate at which features drift enough to be seen; figures with settings chosen on validation
# images are in the results
SETTINGS = {"lr": 0.1, "first_epochs": 3, "epochs": 3, "align_epochs": 20}
STRATEGIES = {"without compensation": "macil:compensation=none", "with compensation": "macil"}


def measure(seed: int, device: str = "cpu", scenario: Scenario | None = None) -> dict[str, Any]:
    """Two runs of MACIL, as plain data; by default over Classify-30 in the style that EmojiCLIP
    does not know."""
    scenario = scenario or emoji_scenario(5, seed, (HELD_OUT_STYLE,), validation=0)

    def tower() -> Encoder:
        return Encoder.open("emojiclip", device=device)[0]

    runs = {}
    for title, spec in STRATEGIES.items():
        run = run_tasks(scenario, tower, strategy(spec, **SETTINGS, seed=seed))
        runs[title] = run.untimed().to_json()
    return {
        "runs": runs,
        "classes": scenario.classes,
        "images": len(scenario.train),
        "tested": len(scenario.test),
    }


def of_measured(found: Mapping[str, Any]) -> list[Html]:
    """The section of what ``measure`` gives, or of why there is none."""
    if "skipped" in found:
        return [text(found["skipped"])]
    runs = {title: Run.from_json(run) for title, run in found["runs"].items()}
    about = (
        f"Here EmojiCLIP learns the {len(found['classes'])} kinds of Classify-30 in "
        f"{HELD_OUT_STYLE} drawings, {found['images']} to learn from and {found['tested']} others "
        "to be tested on, with MACIL (Wu et al. 2025): LoRA pairs on keys and values, "
        f"{SETTINGS['epochs']} epochs a task, and at its end heads that are aligned on Gaussian "
        "samples around the prototypes of all classes seen. The learning rate is one at which "
        "features drift visibly, not the best one."
    )
    return section(runs, found["classes"], about)


def section(runs: Mapping[str, Run], classes: Sequence[str], about: str) -> list[Html]:
    """Curves, matrices and prototype errors of two finished runs.

    Args:
        runs: "without compensation" -> run, "with compensation" -> run, or the like; of the same
            tasks.
        classes: names by class id.
        about: what is learnt and how, in a sentence or two.

    Nothing in it depends on time or memory. Raises ValueError unless there are two runs, finished
    and of the same tasks.
    """
    if len(runs) != 2 or len({str(run.tasks) for run in runs.values()}) != 1:
        raise ValueError(
            f"demo_continual.section: expected two runs of the same tasks, got {list(runs)}"
        )
    if any(len(run.records) < len(run.tasks) for run in runs.values()):
        raise ValueError(
            "demo_continual.section: expected finished runs, with a record for every task"
        )
    plain, compensated = runs.values()
    accuracies = []
    falls = []
    for title, run in runs.items():
        accuracies.append((f"all classes at the end, {title}", percent(run.A_last)))
        falls.append((f"forgetting, {title}", f"{100 * run.forgetting:.1f} points"))
    seen = {title: [100 * run.seen] for title, run in runs.items()}
    tasks = []
    for t, task in enumerate(plain.tasks, 1):
        tasks.append([str(t), ", ".join(classes[c] for c in task)])
    return [
        text(
            "In class-incremental learning the classes come in tasks, one after the other; when a "
            "task is learnt, the images of the earlier ones are gone, and still the model has to "
            "tell all classes apart. What is kept of an old class is its prototype, the mean of "
            "its features. As the network learns on, features drift and prototypes grow stale. "
            "Mean-shift compensation (SDC, Yu et al. 2020) watches how the features of the new "
            "task's images move, and moves the prototypes along."
        ),
        text(about),
        table(["task", "classes"], tasks, words=True),
        stats(accuracies + falls),
        grid(
            curves(seen, title="Accuracy on all classes seen so far, %", y_label="accuracy, %"),
            *drift_curves(
                {"How far old prototypes are off, relative to their length": [compensated]}
            ),
        ),
        _after_each_task(runs),
        text(
            "Each row of a matrix is one more task learnt, each column a task to be tested on: "
            "down a column is how it is forgotten."
        ),
        matrix_maps({title: [run] for title, run in runs.items()}),
        text(_verdict(*runs.items())),
    ]


def _after_each_task(runs: Mapping[str, Run]) -> Html:
    def cell(run: Run, t: int) -> str:
        right = sum(run.records[t].correct)
        n = sum(run.records[t].count)
        low, high = clopper_pearson(right, n)
        return f"{tenths(right / n)}\u00a0({tenths(low)}–{tenths(high)})"

    first = next(iter(runs.values()))
    body = []
    for t in range(len(first.tasks)):
        cells = [cell(run, t) for run in runs.values()]
        body.append([f"{t + 1}", sum(first.records[t].count), *cells])
    return table(
        ["after task", "test images", *runs],
        body,
        "Accuracy in % on all classes seen so far, with 95 % Clopper–Pearson intervals: one run "
        "each. More seeds, more strategies and paired differences: benchmarks/results in the "
        "repository, made by clipsteer cil.",
    )


def _verdict(plain: tuple[str, Run], compensated: tuple[str, Run]) -> str:
    """What this one run shows, and no more."""
    without, before = plain
    with_, after = compensated
    gap = 100 * (after.A_last - before.A_last)
    n = sum(before.records[len(before.tasks) - 1].count)
    way = f"{abs(gap):.1f} points {'higher' if gap > 0 else 'lower'} {with_} than {without}"
    parts = [
        f"In this run the accuracy on all classes at the end is {way if gap else 'the same'}, on "
        f"{n} images."
    ]
    kept = after.value("drift_compensated")
    stale = after.value("drift_uncompensated")
    if not math.isnan(kept + stale):
        parts.append(
            f"Its prototypes are off by {kept:.3f} of their length {with_}, on average; left where "
            f"they were they would be off by {stale:.3f}."
        )
    return " ".join([*parts, "One run does not tell chance from effect."])
