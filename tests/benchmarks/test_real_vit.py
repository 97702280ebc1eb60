"""Pictures of the real-ViT experiments: what is read out of a Qt resource, near-duplicates, splits; and the ways of
dealing learning rates."""

from __future__ import annotations

import functools
import struct
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from _tiny import CLASSES, TASKS, encoder, images
from benchmarks.real_vit import incremental
from benchmarks.real_vit.guided import plasticity_of
from benchmarks.real_vit.incremental import interval
from benchmarks.real_vit.pictures import Picture, _drawn, groups, members, split
from benchmarks.real_vit.positions import Distance, for_transformers
from benchmarks.real_vit.sharing import SharingLearner
from benchmarks.real_vit.shift import kinds_of, ridge_head
from benchmarks.real_vit.weights import for_timm
from clipsteer.continual.experiment import run_tasks
from clipsteer.continual.metrics import Run
from clipsteer.continual.plasticity import Plasticity
from clipsteer.continual.scenario import Scenario
from clipsteer.continual.strategies import strategy
from clipsteer.data.dataset import ImageDataset, _Reader
from clipsteer.sae.model import SAE


def resource(files: dict[str, bytes]) -> bytes:
    """A Qt resource of version 3 with one folder, "kind"."""
    names, data, where = b"", b"", {}
    for name in ("kind", *files):
        where[name] = len(names)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
    tree = struct.pack(">IHIIQ", 0, 2, 1, 1, 0) + struct.pack(">IHIIQ", where["kind"], 2, len(files), 2, 0)
    for name, content in files.items():
        tree += struct.pack(">IHHHIQ", where[name], 0, 0, 0, len(data), 0)
        data += struct.pack(">I", len(content)) + content
    head = b"qres" + struct.pack(">4I", 3, 20, 20 + len(tree), 20 + len(tree) + len(data))
    return head + tree + data + names


def test_files_of_a_qt_resource_are_found_with_their_bytes():
    files = {"a.webp": b"one", "ü.png": b"two" * 9}
    assert dict(members(resource(files))) == {f"kind/{name}": content for name, content in files.items()}
    with pytest.raises(ValueError, match="'qres'"):
        list(members(b"nothing of the kind"))


def test_variants_by_name_and_pictures_alike_share_a_group_and_numbers_alone_do_not():
    files = ["k/cat.png", "k/cat_mirror.png", "k/flower1.png", "k/flower2.png", "k/lion.png", "k/lion-2.png", "k/x.png"]
    seen = torch.nn.functional.normalize(torch.randn(7, 1024, generator=torch.Generator().manual_seed(0)), dim=1)
    seen[6] = seen[3].reshape(32, 32).flip(1).flatten()
    found = groups(files, seen.double())
    assert found[0] == found[1] != found[2]
    assert found[2] != found[3]
    assert found[4] == found[5] != found[0]
    assert found[6] == found[3]


def test_no_group_is_on_both_sides_of_a_split_and_every_kind_is_on_each():
    pictures = [Picture(f"{i}.png", f"kind {i % 3}", None, i // 6 * 3 + i % 3) for i in range(90)]
    kept, held = split(pictures, 0.3, seed=4)
    assert sorted(kept + held) == list(range(90))
    sides = [{pictures[r].group for r in rows} for rows in (kept, held)]
    assert not sides[0] & sides[1]
    assert {pictures[r].kind for r in held} == {pictures[r].kind for r in kept}
    assert len(sides[1]) == 3 * round(0.3 * 15)


def test_areas_of_one_colour_are_a_drawing_and_noise_a_photograph(tmp_path):
    noise = np.random.RandomState(0).randint(0, 255, (40, 40, 3)).astype(np.uint8)
    for name, pixels in (("photo.png", noise), ("drawing.png", np.kron(noise[:4, :4], np.ones((10, 10, 1), np.uint8)))):
        Image.fromarray(pixels).save(tmp_path / name)
    assert _drawn(tmp_path / "photo.png") is False
    assert _drawn(tmp_path / "drawing.png") is True


def test_kinds_with_both_and_a_head_that_separates_them():
    few = [Picture("", "few", drawn, 0) for drawn in (True, False) for _ in range(4)]
    both = [Picture("", "both", drawn, 0) for drawn in (True, False) for _ in range(6)]
    assert kinds_of([*few, *both]) == ["both"]
    y = torch.arange(30) % 3
    x = torch.eye(3)[y] * 2 + 5 + 0.01 * torch.randn(30, 3, generator=torch.Generator().manual_seed(1))
    W, b = ridge_head(x, y, 1e-3)
    assert (torch.nn.functional.linear(x, W, b) - torch.eye(3)[y]).abs().max() < 0.1


def test_an_interval_has_seeds_and_pictures_in_it():
    runs = []
    for seed, wrong in ((0, 2), (1, 4)):
        run = Run("x", seed, [[0], [1]])
        for t in range(2):
            truth = torch.tensor([0] * 5 + [1] * 5 * t)
            guess = truth.clone()
            guess[:wrong] = t
            run.add(t, guess, truth)
        runs.append(run)
    found = interval(runs)
    assert found["mean"] == pytest.approx(0.7)
    assert found["half_seeds"] == pytest.approx(12.706 * 0.1, rel=1e-3)
    assert found["half"] ** 2 == pytest.approx(found["half_seeds"] ** 2 + 1.96**2 * 0.7 * 0.3 / 10)


def test_other_ways_of_dealing_rates_keep_the_mean_or_the_values():
    torch.manual_seed(0)
    own = Plasticity({f"blocks.{i}": SAE(4, 6, k=2) for i in range(5)})
    usage = lambda seed: {b: torch.rand(6, generator=torch.Generator().manual_seed(seed + i))
                          for i, b in enumerate(own.saes)}  # fmt: skip
    history, task = [usage(0), usage(50)], usage(99)
    factors = {way: plasticity_of(way, own).multipliers(task, history) for way in ("guided", "uniform", "dealt")}
    assert factors["guided"] == own.multipliers(task, history)
    assert len(set(factors["uniform"].values())) == 1
    assert sum(factors["uniform"].values()) == pytest.approx(sum(factors["guided"].values()))
    assert sorted(factors["dealt"].values()) == sorted(factors["guided"].values())
    assert factors["dealt"] != factors["guided"]


def _stored(part: str, seed: int, each: int) -> ImageDataset:
    drawn = images(seed, each)
    reader = _Reader(lambda _, row: drawn[row][0], [(part, row) for row in range(len(drawn))])
    return ImageDataset(reader, drawn.targets, drawn.classes)


def test_networks_that_are_trained_alike_are_trained_once_and_runs_stay_what_they_are(tmp_path, monkeypatch):
    names = [str(c) for c in range(CLASSES)]
    whole = Scenario(_stored("train", 0, 4), images(1, 0), _stored("test", 2, 4), TASKS, names)
    trained = []
    own = SharingLearner.__mro__[1]._train
    monkeypatch.setattr(SharingLearner.__mro__[1], "_train", lambda *args: trained.append(1) or own(*args))
    shared = functools.partial(SharingLearner, store=tmp_path, data="these")
    wanted = {"finetune": 3, "ldc": 0, "macil": 2, "ncm": 0}
    for spec, tasks in wanted.items():
        config = strategy(spec, lr=0.05, batch_size=8, first_epochs=1, epochs=1, align_epochs=1, align_samples=8)
        before = len(trained)
        run = run_tasks(whole, encoder, config, learner=shared)
        assert len(trained) - before == tasks, spec
        if spec in ("ldc", "macil"):
            alone = run_tasks(whole, encoder, config)
            assert torch.equal(run.seen, alone.seen)
            for kind, errors in alone.drift_error.items():
                torch.testing.assert_close(run.drift_error[kind], errors, equal_nan=True, rtol=1e-4, atol=1e-6)


def test_weights_of_timm_go_to_transformers_names_and_back():
    shapes = {"cls_token": (1, 1, 4), "pos_embed": (1, 5, 4), "patch_embed.proj.weight": (4, 3, 2, 2)}
    shapes |= {"patch_embed.proj.bias": (4,), "norm.weight": (4,), "norm.bias": (4,)}
    for block in range(12):
        for name, size in (
            ("norm1", 4),
            ("attn.qkv", 12),
            ("attn.proj", 4),
            ("norm2", 4),
            ("mlp.fc1", 8),
            ("mlp.fc2", 4),
        ):
            shapes |= {f"blocks.{block}.{name}.weight": (size, 4), f"blocks.{block}.{name}.bias": (size,)}
        shapes |= {f"blocks.{block}.ls{i}.gamma": (4,) for i in (1, 2)}
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    back = for_timm(for_transformers(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_distances_of_tokens_are_over_all_pictures_together():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(5, 7, 3, dtype=torch.float64, generator=generator)
    found = reference + 0.1 * torch.randn(5, 7, 3, dtype=torch.float64, generator=generator)
    distance = Distance()
    for part in (slice(2), slice(2, 5)):
        distance.add(found[part], reference[part])
    off, size = (found - reference).norm(dim=-1), reference.norm(dim=-1)
    expected = [off.norm() / size.norm(), off[:, 0].norm() / size[:, 0].norm(), (off / size).max()]
    assert list(distance.value().values()) == pytest.approx([float(value) for value in expected])
    assert [*distance.value()] == ["tokens", "class token", "worst token"]


def test_epochs_that_are_asked_for_are_tried_where_a_choice_is_there_without_them(tmp_path, monkeypatch):
    tried = []

    def run(self, phase, images, config):
        tried.append((config.lr, config.epochs))
        value = 0.5 + 0.1 * (config.epochs == 8) - abs(config.lr - 0.01)
        return SimpleNamespace(A_avg=value, A_last=value)

    monkeypatch.setattr(incremental.Bench, "run", run)
    monkeypatch.setattr(incremental, "first_tasks", lambda *_: None)
    monkeypatch.setattr(incremental.Bench, "scenario", lambda *_: SimpleNamespace(on_validation=lambda: None))

    def bench(epochs, specs):
        return incremental.Bench(Namespace(work=tmp_path, lr=None, epochs=epochs, choice_tasks=2), specs)

    part = "macil:covariance=0"
    assert bench([3], [part]).choice("macil")["epochs"] == 3
    assert bench([3, 8], []).choice("macil")["epochs"] == 3
    found = bench([3, 8], [part]).choice("macil")
    assert (found["lr"], found["epochs"]) == (0.01, 8)
    assert (0.01, 8) in tried
    count = len(tried)
    assert bench([3, 8], [part]).config(part, 1993).epochs == 8
    assert len(tried) == count


def test_runs_on_the_tower_in_another_shape_are_refused(tmp_path):
    def bench(size):
        return incremental.Bench(Namespace(work=tmp_path, block=8, image_size=size, last=0))

    bench(98).check_tower("runs")
    bench(98).check_tower("runs")
    bench(70).check_tower("others")
    with pytest.raises(SystemExit, match=r"'image_size': 98.*'image_size': 70"):
        bench(70).check_tower("runs")
