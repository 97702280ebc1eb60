"""Class-incremental scenarios: the classes of a data set, cut into tasks that are learnt one after
the other.

Class order and task sizes are those of PyCIL and PILOT (arXiv 2309.07117):
``RandomState(seed).permutation(C)``, first ``init_cls`` classes, then ``increment`` at a time, and
what remains in the last task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from clipsteer.data.dataset import ImageDataset
from clipsteer.data.emoji import HELD_OUT_STYLE, TRAINED_STYLES, EmojiStyles, classify30, stratified
from clipsteer.data.emoji import split as concepts
from clipsteer.data.files import class_folder

SEED = 1993
Part = Literal["train", "validation", "test"]


@dataclass(frozen=True, eq=False)
class Scenario:
    """Images and the order in which their classes come.

    Attributes:
        train, validation, test: targets are class ids 0 … C-1; validation may be empty.
        tasks: the class ids of each task; each id is in exactly one.
        classes: C names.
        class_order: all class ids in the order in which they come; follows from the tasks.

    Raises ValueError where tasks and classes do not fit together, or a class without training image
    or a task without test image.
    """

    train: ImageDataset
    validation: ImageDataset
    test: ImageDataset
    tasks: list[list[int]]
    classes: list[str]
    class_order: list[int] | None = None

    def __post_init__(self) -> None:
        order = [c for task in self.tasks for c in task]
        if sorted(order) != list(range(len(self.classes))) or not all(self.tasks):
            raise ValueError(
                f"Scenario: tasks must hold each class id below {len(self.classes)} once, and none "
                f"be empty, got "
                f"{self.tasks}"
            )
        if self.class_order not in (None, order):
            raise ValueError(
                f"Scenario: class_order must be that of the tasks, {order}, got {self.class_order}"
            )
        object.__setattr__(self, "class_order", order)
        for part in ("train", "validation", "test"):
            if strange := {
                t for t in getattr(self, part).targets if t not in range(len(self.classes))
            }:
                some = sorted(map(str, strange))[:5]
                raise ValueError(
                    f"Scenario: targets of {part} must be class ids below {len(order)}, got {some}"
                )
        if lacking := sorted(set(order) - set(self.train.targets)):
            raise ValueError(f"Scenario: no training image of {[self.classes[c] for c in lacking]}")
        if lacking := [t for t in range(len(self.tasks)) if not self.rows("test", t)]:
            raise ValueError(f"Scenario: no test image of the classes of task(s) {lacking}")

    def rows(self, part: Part, *tasks: int) -> list[int]:
        """Rows of the part's data set that show a class of these tasks, in the data set's order."""
        wanted = {c for t in tasks for c in self.tasks[range(len(self.tasks))[t]]}
        return [row for row, target in enumerate(getattr(self, part).targets) if target in wanted]

    def seen(self, task: int) -> list[int]:
        """Class ids of the tasks up to this one, in class order."""
        return [c for classes in self.tasks[: range(len(self.tasks))[task] + 1] for c in classes]

    def on_validation(self) -> Scenario:
        """The same tasks, measured on the validation images: for choosing settings without a look
        at the test."""
        if not len(self.validation):
            raise ValueError(
                "Scenario.on_validation: there is no validation image; hold some out "
                "(validation=0.2)"
            )
        return replace(self, test=self.validation)


def task_sizes(
    classes: int,
    tasks: int | None = None,
    init_cls: int | None = None,
    increment: int | None = None,
) -> list[int]:
    """How many classes each task has: ``tasks`` nearly equal parts, or PILOT's ``init_cls`` and
    ``increment``.

    ``init_cls`` is by default ``increment``. Parts that cannot be equal differ by one, the larger
    first. Raises ValueError unless exactly one of the two is given, or where it does not fit the
    classes.
    """
    if (tasks is None) == (increment is None) or (init_cls is not None and increment is None):
        raise ValueError(
            f"task_sizes: expected tasks, or increment with or without init_cls, got "
            f"tasks={tasks}, "
            f"init_cls={init_cls}, increment={increment}"
        )
    if tasks is not None:
        if not 1 <= tasks <= classes:
            raise ValueError(
                f"task_sizes: tasks must be between 1 and {classes}, the number of classes, got "
                f"{tasks}"
            )
        return [classes // tasks + (t < classes % tasks) for t in range(tasks)]
    first = increment if init_cls is None else init_cls
    if increment < 1 or not 1 <= first <= classes:
        raise ValueError(
            f"task_sizes: init_cls must be between 1 and {classes}, the number of classes, and "
            f"increment at least 1, "
            f"got {first} and {increment}"
        )
    later, rest = divmod(classes - first, increment)
    return [first, *[increment] * later, *([rest] if rest else [])]


def _cut(order: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    ends = np.cumsum(sizes).tolist()
    return [list(order[end - size : end]) for end, size in zip(ends, sizes)]


def _order(n: int, seed: int) -> list[int]:
    return np.random.RandomState(seed).permutation(n).tolist()


def emoji_scenario(
    tasks: int | Literal["categories"] = 5,
    seed: int = SEED,
    styles: Sequence[str] = EmojiStyles.styles,
    validation: float = 0.2,
    split: Literal["concepts", "styles"] = "concepts",
) -> Scenario:
    """Classify-30: 30 kinds of things, 507 concepts to learn from and 218 others to test on, each
    drawn in every style.

    Args:
        tasks: into how many tasks the shuffled classes are cut; "categories" makes each of the five
            categories (of 3 to 9 classes) a task, in shuffled order.
        seed: of that order alone.
        styles: drawings to learn from and to test on.
        validation: the share of each class's training concepts that is held out, 0 for none; the
            same for every seed.
        split: "styles" tests on a new style instead of new concepts: all 725 concepts are learned
            from the drawings of ``TRAINED_STYLES`` and tested in ``HELD_OUT_STYLE``, but for a
            fifth of the 507 there, which are for validation. ``styles`` and ``validation`` then do
            not count.
    """
    _check_share("emoji_scenario", validation)
    if split not in ("concepts", "styles"):
        raise ValueError(f"emoji_scenario: split must be 'concepts' or 'styles', got {split!r}")
    if not styles or isinstance(styles, str):
        raise ValueError(f"emoji_scenario: styles must be names of styles, got {styles!r}")
    if split == "styles":
        parts = concepts()
        train = classify30(TRAINED_STYLES, [i for part in parts for i in part])
        held_out = classify30(HELD_OUT_STYLE, parts.validation)
        test = classify30(HELD_OUT_STYLE, parts.fit + parts.test)
    else:
        train, held_out, test = (classify30(styles, part) for part in concepts(share=validation))
    if tasks == "categories":
        category = {concept.subcategory: concept.category for concept in EmojiStyles().concepts}
        names = sorted({category[name] for name in test.classes})
        cut = [
            [c for c, name in enumerate(test.classes) if category[name] == names[k]]
            for k in _order(5, seed)
        ]
    else:
        cut = _cut(_order(len(test.classes), seed), task_sizes(len(test.classes), tasks))
    return Scenario(train, held_out, test, cut, test.classes)


def folder_scenario(
    path: str | Path,
    tasks: int | None = None,
    seed: int = SEED,
    *,
    init_cls: int | None = None,
    increment: int | None = None,
    validation: float = 0.0,
) -> Scenario:
    """PILOT's layout: ``path``/train/<class>/… and ``path``/test/<class>/….

    Args:
        tasks, init_cls, increment: see `task_sizes`.
        seed: of the class order alone.
        validation: the share of each class's training images that is held out; the same for every
            seed.

    Raises ValueError where a folder is missing or flat, or train and test have different classes.
    """
    _check_share("folder_scenario", validation)
    whole = class_folder(Path(path) / "train", "folder_scenario")
    test = class_folder(Path(path) / "test", "folder_scenario")
    if whole.classes != test.classes:
        differing = sorted(set(whole.classes) ^ set(test.classes))[:5]
        raise ValueError(
            f"folder_scenario: train and test must have the same classes, they differ in "
            f"{differing}"
        )
    kept, held_out = stratified(whole.targets, share=validation)
    n = len(whole.classes)
    cut = _cut(_order(n, seed), task_sizes(n, tasks, init_cls, increment))
    return Scenario(whole.subset(kept), whole.subset(held_out), test, cut, whole.classes)


def _check_share(what: str, share: float) -> None:
    if not 0 <= share < 1:
        raise ValueError(f"{what}: validation must be at least 0 and less than 1, got {share}")
