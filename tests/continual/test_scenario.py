"""Class-incremental scenarios: who comes when, and that no test concept is ever learnt from or chosen by."""

from __future__ import annotations

import copy
from collections import Counter
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clipsteer.continual.scenario import Scenario, emoji_scenario, folder_scenario, task_sizes
from clipsteer.data.dataset import ImageDataset
from clipsteer.data.emoji import EmojiStyles, split, stratified

EMOJI = EmojiStyles()


def dataset(targets: list[int], classes: int = 3) -> ImageDataset:
    return ImageDataset(lambda i: Image.new("RGB", (1, 1), (i, 0, 0)), targets, [f"c{i}" for i in range(classes)])


def concepts_of(images: ImageDataset) -> set[int]:
    """The concept of every row, told from its pixels."""
    known = {EMOJI.array(s)[i].tobytes(): i for s in EMOJI.styles for i in EMOJI.indices(s)}
    return {known[np.asarray(images[row][0]).tobytes()] for row in range(len(images))}


@given(classes=st.integers(1, 400), init=st.integers(1, 400), increment=st.integers(1, 400))
def test_sizes_against_pilots_loop(classes, init, increment):
    if init > classes:
        with pytest.raises(ValueError, match="init_cls must be between"):
            task_sizes(classes, init_cls=init, increment=increment)
        return
    sizes, left = [init], classes - init
    while left > 0:
        sizes.append(min(increment, left))
        left -= sizes[-1]
    assert task_sizes(classes, init_cls=init, increment=increment) == sizes
    if init == increment:
        assert task_sizes(classes, increment=increment) == sizes


@given(classes=st.integers(1, 400), tasks=st.integers(1, 400))
def test_nearly_equal_sizes(classes, tasks):
    if tasks > classes:
        with pytest.raises(ValueError, match="tasks must be between"):
            task_sizes(classes, tasks)
    else:
        assert task_sizes(classes, tasks) == [len(part) for part in np.array_split(range(classes), tasks)]


@pytest.mark.parametrize(
    "args", [{}, {"tasks": 2, "increment": 3}, {"init_cls": 2}, {"increment": 0}, {"tasks": 2, "init_cls": 5}]
)
def test_sizes_refuse(args):
    with pytest.raises(ValueError, match="task_sizes"):
        task_sizes(10, **args)


def test_emoji_parts_share_no_concept():
    scenario = emoji_scenario()
    train, validation, test = (concepts_of(part) for part in (scenario.train, scenario.validation, scenario.test))
    training = {i for i, c in enumerate(EMOJI.concepts) if c.classify30 == "train"}
    assert train | validation == training
    assert not train & validation
    assert test == {i for i, c in enumerate(EMOJI.concepts) if c.classify30 == "test"}
    sizes = Counter(EMOJI.concepts[i].subcategory for i in training)
    held = Counter(EMOJI.concepts[i].subcategory for i in validation)
    assert all(abs(held[name] - 0.2 * size) <= 0.5 for name, size in sizes.items())
    # every style is drawn, but for the concepts that one lacks
    lacking = {i for i in training if not EMOJI.drawn("fluent")[i]}
    assert len(scenario.train) + len(scenario.validation) == 3 * len(training) - len(lacking)
    row = scenario.rows("test", 2)[0]
    assert scenario.test[row][1] in scenario.tasks[2]


def test_emoji_order_is_the_seeds_and_the_split_is_not():
    first, again, other = emoji_scenario(), emoji_scenario(), emoji_scenario(seed=0)
    assert first.class_order == np.random.RandomState(1993).permutation(30).tolist() == again.class_order
    assert other.class_order == np.random.RandomState(0).permutation(30).tolist()
    assert [len(t) for t in first.tasks] == [6] * 5
    assert first.train.targets == other.train.targets
    assert concepts_of(first.validation) == concepts_of(other.validation)
    alone = emoji_scenario(6, styles=("twemoji",), validation=0)
    assert (len(alone.train), len(alone.validation), len(alone.test)) == (507, 0, 218)
    assert concepts_of(alone.train) == set(split().fit + split().validation)
    with pytest.raises(ValueError, match="no validation image"):
        alone.on_validation()
    chosen = first.on_validation()
    assert concepts_of(chosen.test) == concepts_of(first.validation)
    assert chosen.tasks == first.tasks


def test_emoji_categories():
    scenario = emoji_scenario("categories", seed=3)
    category = {c.subcategory: c.category for c in EMOJI.concepts}
    names = [{category[scenario.classes[c]] for c in task} for task in scenario.tasks]
    assert all(len(found) == 1 for found in names)
    assert len(set.union(*names)) == 5
    assert sorted(len(task) for task in scenario.tasks) == [3, 6, 6, 6, 9]
    orders = {tuple(map(tuple, emoji_scenario("categories", seed=s).tasks)) for s in range(4)}
    assert len(orders) > 1


def test_rows_and_seen():
    train, test = dataset([2, 0, 1, 0]), dataset([1, 1, 0, 2])
    scenario = Scenario(train, dataset([]), test, [[2], [0, 1]], train.classes)
    assert scenario.class_order == [2, 0, 1]
    assert [scenario.rows("train", t) for t in (0, 1)] == [[0], [1, 2, 3]]
    assert scenario.rows("test", 1) == scenario.rows("test", -1) == [0, 1, 2]
    assert scenario.rows("test", 0, 1) == [0, 1, 2, 3]
    assert scenario.rows("validation", 0) == []
    assert (scenario.seen(0), scenario.seen(1), scenario.seen(-1)) == ([2], [2, 0, 1], [2, 0, 1])
    with pytest.raises(IndexError):
        scenario.rows("train", 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"tasks": [[0], [1]]}, "each class id below 3 once"), ({"tasks": [[0, 1], [1, 2]]}, "each class id below 3 once"),
     ({"tasks": [[0, 1, 2], []]}, "none be empty"), ({"class_order": [0, 1, 2]}, "class_order must be"),
     ({"train": dataset([0, 1])}, "no training image of .*c2"), ({"test": dataset([0, 1])}, "no test image .*0"),
     ({"test": dataset([0, 1, 2, 3])}, "targets of test"), ({"train": dataset(["a"])}, "targets of train")],
)  # fmt: skip
def test_scenarios_that_do_not_fit(changes, message):
    whole = dataset([0, 1, 2])
    given = {"train": whole, "validation": dataset([]), "test": whole, "tasks": [[2], [0, 1]], "classes": whole.classes}
    with pytest.raises(ValueError, match=message):
        Scenario(**given | changes)


@pytest.fixture
def folder(tmp_path):
    for part, count in (("train", 5), ("test", 2)):
        for k, name in enumerate(["ant", "bee", "cat", "dog", "elk"]):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (4, 4), (40 * k, i, 0)).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def test_folders(folder):
    scenario = folder_scenario(folder, init_cls=1, increment=3)
    order = np.random.RandomState(1993).permutation(5).tolist()
    assert scenario.tasks == [order[:1], order[1:4], order[4:]]
    assert scenario.classes == ["ant", "bee", "cat", "dog", "elk"]
    assert (len(scenario.train), len(scenario.validation), len(scenario.test)) == (25, 0, 10)
    for row in scenario.rows("train", 1):
        image, target = scenario.train[row]
        assert image.getpixel((0, 0))[0] == 40 * target
        assert target in order[1:4]
    held = folder_scenario(folder, 2, seed=7, validation=0.2)
    assert Counter(held.validation.targets) == dict.fromkeys(range(5), 1)
    seen = {(t, image.getpixel((0, 0))[1]) for part in (held.train, held.validation) for image, t in part}
    assert len(seen) == 25
    assert held.tasks == [t.tolist() for t in np.array_split(np.random.RandomState(7).permutation(5), 2)]
    # loader processes can be spawned with it
    assert ForkingPickler.loads(ForkingPickler.dumps(held.train))[3][1] == held.train[3][1]


def test_folders_that_do_not_fit(folder):
    (folder / "test" / "bee").rename(folder / "test" / "wasp")
    with pytest.raises(ValueError, match=r"same classes, they differ in \['bee', 'wasp'\]"):
        folder_scenario(folder, 2)
    with pytest.raises(ValueError, match="must be a folder"):
        folder_scenario(folder / "train", 2)
    with pytest.raises(ValueError, match="validation must be"):
        folder_scenario(folder, 2, validation=1.0)
    for arguments in ({"styles": "noto"}, {"styles": ()}, {"validation": -0.1}):
        with pytest.raises(ValueError, match="emoji_scenario"):
            emoji_scenario(**arguments)


@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=6), share=st.floats(0, 0.99), seed=st.integers(0, 9))
def test_stratified_holds_out_a_share_of_each(sizes, share, seed):
    labels = [k for k, size in enumerate(sizes) for _ in range(size)]
    shuffled = copy.copy(labels)
    np.random.RandomState(seed).shuffle(shuffled)
    kept, held = stratified(shuffled, seed, share)
    assert sorted(kept + held) == list(range(len(labels)))
    counts = Counter(shuffled[i] for i in held)
    for k, size in enumerate(sizes):
        assert counts[k] <= size - 1
        if share == 0:
            assert counts[k] == 0
        elif size > 1:
            assert 1 <= counts[k] <= max(1, share * size + 0.5)
