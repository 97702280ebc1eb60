from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clipsteer import clip as clip_module
from clipsteer import wise_ft
from clipsteer.clip.classifier import load_classifier, predict, save_classifier, zero_shot_classifier
from clipsteer.clip.open_clip_models import Parts
from clipsteer.clip.pixels import pixel_batches
from clipsteer.data.dataset import renamed
from clipsteer.data.files import image_folder
from clipsteer.ensembles.finetuning import FinetuneConfig, finetune
from clipsteer.ensembles.merging import RunningEnsemble
from clipsteer.io.files import FileFormatError, read_safetensors, write_json, write_safetensors

COLOURS = {"red thing": (210, 30, 20), "blue thing": (20, 40, 200), "green thing": (30, 180, 40)}
FAST = {"batch_size": 5, "epochs": 2, "lr": 1e-3, "log_every": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for name, colour in COLOURS.items():
        (root / name).mkdir()
        for i in range(4):
            Image.new("RGB", (40, 30), tuple(min(255, c + 9 * i) for c in colour)).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def clip():
    return clip_module.load()


@pytest.fixture
def head(clip):
    return clip_module.zero_shot_head(clip, sorted(COLOURS))


def tower(clip) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in clip.model.visual.state_dict().items()}


def assert_equal(a, b) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_zero_shot_classifier_scales_once(clip, head, folder):
    images = image_folder(folder)
    logits = predict(zero_shot_classifier(clip, head), pixel_batches(clip, images))
    embeddings = clip.encode_images([images[i][0] for i in range(len(images))])
    scale = clip.model.logit_scale.exp()
    torch.testing.assert_close(logits, (scale * embeddings @ head.T).detach())
    norms = zero_shot_classifier(clip, head).head.weight.norm(dim=1)
    torch.testing.assert_close(norms, scale.expand(3), rtol=1e-4, atol=0)


def test_end_to_end_learns_and_saves_what_loads(clip, head, folder, tmp_path):
    images, text = image_folder(folder), clip.model.transformer.resblocks[0].mlp.c_fc.weight.detach().clone()
    start = zero_shot_classifier(clip, head).state_dict()
    start = {k: v.clone() for k, v in start.items()}
    config = FinetuneConfig(**{**FAST, "epochs": 6})
    tuned = finetune(clip, images, head, config, out=tmp_path, validation=images)
    truth = torch.tensor(images.targets)
    logits = predict(tuned, pixel_batches(clip, images))
    assert float((logits.argmax(1) == truth).float().mean()) == 1
    assert not torch.equal(tuned.visual.conv1.weight, start["visual.conv1.weight"])
    assert torch.equal(clip.model.transformer.resblocks[0].mlp.c_fc.weight, text)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == list(range(1, 19))
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    assert log[-1]["validation"] == 1
    # the last epoch's running ensemble is wise_ft of the two ends
    again, both, classes = load_classifier(tmp_path / "finetuned")
    assert classes == sorted(COLOURS)
    assert_equal(both.state_dict(), tuned.state_dict())
    plain = clip_module.load("emojiclip", tmp_path / "finetuned" / "model.safetensors")
    assert_equal(tower(plain), tower(clip))
    _, zero, _ = load_classifier(tmp_path / "zeroshot")
    assert_equal(zero.state_dict(), start)
    both.load_state_dict(wise_ft(start, tuned.state_dict(), 0.5))
    right = predict(both, pixel_batches(again, images)).argmax(1) == truth
    assert log[-1]["validation_ensemble"] == pytest.approx(float(right.float().mean()))


def test_the_head_alone_leaves_the_tower_and_equals_output_averaging(clip, head, folder):
    images, before = image_folder(folder), tower(clip)
    start = {k: v.clone() for k, v in zero_shot_classifier(clip, head).state_dict().items()}
    tuned = finetune(clip, images, head, FinetuneConfig(**FAST, mode="lc"))
    assert_equal(tower(clip), before)
    assert not torch.equal(tuned.head.weight, start["head.weight"])
    batches = list(pixel_batches(clip, images))
    zero = zero_shot_classifier(clip, head)
    mixed = zero_shot_classifier(clip, head)
    mixed.load_state_dict(wise_ft(start, tuned.state_dict(), 0.3))
    one, two = predict(mixed, batches), 0.7 * predict(zero, batches) + 0.3 * predict(tuned, batches)
    # both ends' dot products of 256 terms with their biases: g(257) Σ|x||w|, twice, and the merge's own roundings
    u = 2.0**-24
    x = torch.cat([tuned.features(b) for b in batches]).detach().abs()
    m = F.linear(x, zero.head.weight.abs() + tuned.head.weight.abs(), tuned.head.bias.abs())
    assert bool(((one - two).abs() <= (2 * 257 + 8) * 1.01 * u * m).all())


def test_the_first_step_is_adamw_on_the_cross_entropy(clip, head, folder):
    """One full-batch step of the head against the update written out (Loshchilov & Hutter 2019, algorithm 2)."""
    images = image_folder(folder)
    config = FinetuneConfig(mode="lc", lr=1e-2, batch_size=12, epochs=1)
    zero = zero_shot_classifier(clip, head)
    x = torch.cat([zero.features(b) for b in pixel_batches(clip, images)]).detach()
    w = zero.head.weight.detach().clone().requires_grad_()
    b = torch.zeros(3, requires_grad=True)
    F.cross_entropy(x @ w.T + b, torch.tensor(images.targets)).backward()
    norm = math.sqrt(float(w.grad.square().sum() + b.grad.square().sum()))
    tuned = finetune(clip, images, head, config)
    for before, got in ((w, tuned.head.weight), (b, tuned.head.bias)):
        g = before.grad * min(1, 1 / (norm + 1e-6))
        expected = before.detach() * (1 - 1e-2 * 0.1) - 1e-2 * g / (g.abs() + 1e-8)
        torch.testing.assert_close(got.detach(), expected, rtol=1e-4, atol=1e-5)


def test_the_schedule():
    config = FinetuneConfig(lr=1.0, warmup_steps=500)
    assert config.lr_at(0, 10_000) == 1 / 500
    assert config.lr_at(499, 10_000) == 1
    assert config.lr_at(500, 10_000) == 1
    assert config.lr_at(5250, 10_000) == pytest.approx(0.5)
    assert config.lr_at(9_999, 10_000) < 1e-6
    assert config.lr_at(9, 100) == 1  # a tenth of a short run
    assert config.lr_at(0, 5) == 1
    assert (FinetuneConfig().peak, FinetuneConfig(mode="lc").peak) == (3e-5, 1e-3)


class Stopped(Exception):
    pass


def stop_at(last: int):
    def stop(classifier, step):
        if step == last:
            raise Stopped

    return stop


@pytest.mark.parametrize("mode", ["e2e", "lc"])
def test_a_folder_never_mixes_two_starts(mode, clip, head, folder, tmp_path):
    images, config = image_folder(folder), FinetuneConfig(**FAST, mode=mode)
    other = clip_module.zero_shot_head(clip, sorted(COLOURS), ["an ugly drawing of {}"])
    # stopped before its first checkpoint: the next run starts anew, from its own head
    with pytest.raises(Stopped):
        finetune(clip, images, head, config, out=tmp_path, on_step=stop_at(1))
    clip = clip_module.load()
    start = {k: v.clone() for k, v in zero_shot_classifier(clip, other).state_dict().items()}
    tuned = finetune(clip, images, other, config, out=tmp_path)
    assert_equal(load_classifier(tmp_path / "zeroshot")[1].state_dict(), start)
    # a run that is there refuses another head, other weights, and another order of the classes
    with pytest.raises(ValueError, match="another head"):
        finetune(clip_module.load(), images, head, config, out=tmp_path)
    nudged = clip_module.load()
    with torch.no_grad():
        nudged.model.visual.proj[0, 0] += 1e-3
    with pytest.raises(ValueError, match=r"other settings \(weights"):
        finetune(nudged, images, other, config, out=tmp_path)
    swapped = renamed(images, sorted(COLOURS, reverse=True))
    with pytest.raises(ValueError, match=r"other settings \(data"):
        finetune(clip_module.load(), swapped, other, config, out=tmp_path)
    # the same head with other last bits, as another machine gives it, is the same run
    again = finetune(clip_module.load(), images, other * (1 + 1e-5), config, out=tmp_path)
    assert_equal(again.state_dict(), tuned.state_dict())
    assert_equal(load_classifier(tmp_path / "zeroshot")[1].state_dict(), start)


def test_frozen_and_unused_parameters(folder, tmp_path):
    images, config = image_folder(folder), FinetuneConfig(**FAST, checkpoint_every=2)

    def fresh():
        model = clip_module.load()
        model.model.visual.conv1.requires_grad_(False)
        model.model.visual.unused = torch.nn.Parameter(torch.ones(3))  # takes part in nothing: never a gradient
        return model, images, clip_module.zero_shot_head(model, sorted(COLOURS)), config

    whole = finetune(*fresh(), out=tmp_path / "whole")
    assert torch.equal(whole.visual.conv1.weight, clip_module.load().model.visual.conv1.weight)
    assert torch.equal(whole.visual.unused, torch.ones(3))
    with pytest.raises(Stopped):
        finetune(*fresh(), out=tmp_path / "cut", on_step=stop_at(3))
    assert_equal(finetune(*fresh(), out=tmp_path / "cut").state_dict(), whole.state_dict())
    thawed, *rest = fresh()
    thawed.model.visual.conv1.requires_grad_(True)
    with pytest.raises(ValueError, match=r"other settings \(frozen"):
        finetune(thawed, *rest, out=tmp_path / "cut")


def test_workers_do_not_change_what_a_step_sees(clip, head, folder):
    images = image_folder(folder)
    config = FinetuneConfig(**{**FAST, "epochs": 1}, crop=0.5)
    one = {k: v.clone() for k, v in finetune(clip, images, head, config).state_dict().items()}
    two = finetune(clip_module.load(), images, head, config, workers=2)
    assert_equal(two.state_dict(), one)


def test_on_step_drives_a_running_ensemble(clip, head, folder):
    images = image_folder(folder)
    start = {k: v.clone() for k, v in zero_shot_classifier(clip, head).state_dict().items()}
    ensemble = RunningEnsemble(zero_shot_classifier(clip, head), 0.5)
    tuned = finetune(clip, images, head, FinetuneConfig(**FAST), on_step=lambda model, step: ensemble.update(model))
    assert_equal(ensemble.state_dict(), wise_ft(start, tuned.state_dict(), 0.5))


def test_renamed_matches_by_name(folder):
    images = image_folder(folder)
    classes = ["other", *sorted(COLOURS, reverse=True)]
    there = renamed(images, classes)
    assert [classes[t] for t in there.targets] == [images.classes[t] for t in images.targets]
    assert there[0][0].size == images[0][0].size
    with pytest.raises(ValueError, match="lacks: blue thing"):
        renamed(images, ["red thing", "green thing"])


def test_mistakes(clip, head, folder):
    images = image_folder(folder)
    for bad in ({"mode": "all"}, {"epochs": 0}, {"lr": -1.0}, {"crop": 0.0}):
        with pytest.raises(ValueError, match="FinetuneConfig"):
            FinetuneConfig(**bad)
    with pytest.raises(ValueError, match="rows of head"):
        finetune(clip, images, head[:2])
    with pytest.raises(ValueError, match=r"shape \(C, e\)"):
        zero_shot_classifier(clip, head[0])
    with pytest.raises(RuntimeError, match="loss is nan"):
        finetune(clip, images, head * math.nan, FinetuneConfig(**FAST))


def test_damaged_classifiers_are_refused(clip, head, folder, tmp_path):
    classifier = zero_shot_classifier(clip, head)
    save_classifier(tmp_path, clip, classifier, sorted(COLOURS))
    assert read_safetensors(tmp_path / "head.safetensors")["weight"].shape == (3, 256)
    (tmp_path / "config.json").write_text(json.dumps({"model": "emojiclip", "classes": ["one"]}))
    with pytest.raises(FileFormatError, match=r"head\.safetensors"):
        load_classifier(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(FileFormatError, match=r"config\.json"):
        load_classifier(tmp_path)


@pytest.mark.parametrize(
    ("weight", "bias"),
    [((3, 256), (1,)), ((3, 256), (7,)), ((3, 256), ()), ((3, 50), (3,)), ((2, 256), (3,)), ((3,), (3,))],
)
def test_heads_that_do_not_fit_are_refused(clip, head, tmp_path, weight, bias):
    save_classifier(tmp_path, clip, zero_shot_classifier(clip, head), sorted(COLOURS))
    write_safetensors(tmp_path / "head.safetensors", {"weight": torch.zeros(weight), "bias": torch.zeros(bias)})
    with pytest.raises(FileFormatError, match=r"head\.safetensors"):
        load_classifier(tmp_path)


def test_models_that_do_not_fit_are_refused(clip, head, tmp_path, monkeypatch):
    save_classifier(tmp_path, clip, zero_shot_classifier(clip, head), sorted(COLOURS))
    write_json(tmp_path / "config.json", {"model": "hf-hub:some/model", "classes": sorted(COLOURS)})
    fresh = clip_module.load()
    parts = Parts(fresh.model, fresh.preprocess, fresh.tokenizer)
    monkeypatch.setattr("clipsteer.clip.open_clip_models._create", lambda *_: parts)
    assert_equal(load_classifier(tmp_path)[1].state_dict(), zero_shot_classifier(clip, head).state_dict())
    write_safetensors(tmp_path / "model.safetensors", {"w": torch.zeros(3)})
    with pytest.raises(FileFormatError, match=r"model\.safetensors.*hf-hub:some/model"):
        load_classifier(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        load_classifier(tmp_path)


@pytest.mark.parametrize("seed", [2**62, 20_241_124 * 2**40, -3])
def test_any_seed_will_do(clip, head, folder, seed):
    config = FinetuneConfig(batch_size=12, epochs=1, seed=seed)
    assert not torch.equal(finetune(clip, image_folder(folder), head, config).head.weight, head)
