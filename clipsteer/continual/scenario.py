"""Class-incremental scenarios: the classes of a data set, cut into tasks that are learnt one after
the other.

Class order and task sizes are those of PyCIL and PILOT (arXiv 2309.07117):
``RandomState(seed).permutation(C)``, first ``init_cls`` classes, then ``increment`` at a time, and
what remains in the last task.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
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
        C = len(self.classes)
        order = [c for task in self.tasks for c in task]
        if sorted(order) != list(range(C)) or not all(self.tasks):
            raise ValueError(
                f"Scenario: tasks must hold each class id below {C} once, and none be empty, "
                f"got {self.tasks}"
            )
        if self.class_order not in (None, order):
            raise ValueError(
                f"Scenario: class_order must be that of the tasks, {order}, got {self.class_order}"
            )
        object.__setattr__(self, "class_order", order)
        for part in ("train", "validation", "test"):
            targets = set(getattr(self, part).targets)
            if strange := targets - set(range(C)):
                shown = sorted(map(str, strange))[:5]
                raise ValueError(
                    f"Scenario: targets of {part} must be class ids below {C}, got {shown}"
                )
        if lacking := sorted(set(order) - set(self.train.targets)):
            raise ValueError(f"Scenario: no training image of {[self.classes[c] for c in lacking]}")
        if untested := [t for t in range(len(self.tasks)) if not self.rows("test", t)]:
            raise ValueError(f"Scenario: no test image of the classes of task(s) {untested}")

    def rows(self, part: Part, *tasks: int) -> list[int]:
        """Rows of the part's data set that show a class of these tasks, in the data set's order."""
        wanted = {c for t in tasks for c in self.tasks[self._number(t)]}
        targets = getattr(self, part).targets
        return [row for row, target in enumerate(targets) if target in wanted]

    def seen(self, task: int) -> list[int]:
        """Class ids of the tasks up to this one, in class order."""
        learnt = self.tasks[: self._number(task) + 1]
        return [c for classes in learnt for c in classes]

    def _number(self, task: int) -> int:
        """The task counted from 0; negative ones count from the end. IndexError for another."""
        return range(len(self.tasks))[task]

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
            "task_sizes: expected tasks, or increment with or without init_cls, got "
            f"tasks={tasks}, init_cls={init_cls}, increment={increment}"
        )
    if tasks is not None:
        if not 1 <= tasks <= classes:
            raise ValueError(
                f"task_sizes: tasks must be between 1 and {classes}, the number of classes, got "
                f"{tasks}"
            )
        least, larger = divmod(classes, tasks)
        return [least + (t < larger) for t in range(tasks)]
    assert increment is not None
    first = increment if init_cls is None else init_cls
    if increment < 1 or not 1 <= first <= classes:
        raise ValueError(
            f"task_sizes: init_cls must be between 1 and {classes}, the number of classes, and "
            f"increment at least 1, got {first} and {increment}"
        )
    later, rest = divmod(classes - first, increment)
    sizes = [first] + [increment] * later
    return [*sizes, rest] if rest else sizes


def _cut(order: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Tasks of these sizes from the class order."""
    rest = iter(order)
    return [list(itertools.islice(rest, size)) for size in sizes]


def _order(n: int, seed: int) -> list[int]:
    """PILOT's class order."""
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
        every = [i for part in parts for i in part]
        train = classify30(TRAINED_STYLES, every)
        held_out = classify30(HELD_OUT_STYLE, parts.validation)
        test = classify30(HELD_OUT_STYLE, parts.fit + parts.test)
    else:
        parts = concepts(share=validation)
        train = classify30(styles, parts.fit)
        held_out = classify30(styles, parts.validation)
        test = classify30(styles, parts.test)
    assert test.classes is not None
    classes = test.classes
    if tasks == "categories":
        cut = _by_category(classes, seed)
    else:
        cut = _cut(_order(len(classes), seed), task_sizes(len(classes), tasks))
    return Scenario(train, held_out, test, cut, classes)


def _by_category(classes: Sequence[str], seed: int) -> list[list[int]]:
    """Class ids of each of the bundled categories, the categories in shuffled order."""
    category = {concept.subcategory: concept.category for concept in EmojiStyles().concepts}
    members: dict[str, list[int]] = {}
    for c, name in enumerate(classes):
        members.setdefault(category[name], []).append(c)
    names = sorted(members)
    return [members[names[k]] for k in _order(len(names), seed)]


def folder_scenario(
    path: str | Path,
    tasks: int | None = None,
    seed: int = SEED,
    *,
    init_cls: int | None = None,
    increment: int | None = None,
    validation: float = 0.0,
    leave_out: Collection[Path] = (),
) -> Scenario:
    """PILOT's layout: ``path``/train/<class>/… and ``path``/test/<class>/….

    Args:
        tasks, init_cls, increment: see `task_sizes`.
        seed: of the class order alone.
        validation: the share of each class's training images that is held out; the same for every
            seed.
        leave_out: files that are passed over, such as unreadable ones.

    Raises ValueError where a folder is missing or flat, or train and test have different classes.
    """
    _check_share("folder_scenario", validation)
    whole = class_folder(Path(path) / "train", "folder_scenario", leave_out=leave_out)
    test = class_folder(Path(path) / "test", "folder_scenario", leave_out=leave_out)
    assert whole.classes is not None
    assert test.classes is not None
    classes = whole.classes
    if classes != test.classes:
        differing = sorted(set(classes) ^ set(test.classes))[:5]
        raise ValueError(
            "folder_scenario: train and test must have the same classes, they differ in "
            f"{differing}"
        )
    kept, held_out = stratified(whole.targets, share=validation)
    sizes = task_sizes(len(classes), tasks, init_cls, increment)
    cut = _cut(_order(len(classes), seed), sizes)
    return Scenario(whole.subset(kept), whole.subset(held_out), test, cut, classes)


def _check_share(what: str, share: float) -> None:
    if not 0 <= share < 1:
        raise ValueError(f"{what}: validation must be at least 0 and less than 1, got {share}")
