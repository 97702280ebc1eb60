"""What weights do not say of a model: preprocessing, activation and image size stay with it wherever it is written."""

from __future__ import annotations

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import clipsteer
from clipsteer import FileFormatError, clip
from clipsteer.clip.setup import TIMM_DATA, Setup, check_preprocess, header_of, read_setup
from clipsteer.continual.backbone import Encoder
from clipsteer.io.digests import described
from clipsteer.io.files import read_safetensors, write_json, write_safetensors

open_clip = pytest.importorskip("open_clip")
pytest.importorskip("timm")

from _published import CONV, PUBLISHED, RESNET, TOWER, VIT, publisher  # noqa: E402


@pytest.fixture(scope="module")
def pictures():
    def one(seed):
        noise = np.random.RandomState(seed).randint(0, 255, (40 + 13 * seed, 70, 3))
        return Image.fromarray(noise.astype(np.uint8))

    return [one(seed) for seed in range(3)]


@pytest.fixture
def publish(tmp_path, monkeypatch):
    return publisher(tmp_path, monkeypatch)


def saved(folder, model):
    head = nn.functional.normalize(torch.ones(2, model.embed(blank(model)).shape[1]), dim=-1)
    return clip.save_classifier(folder, model, clip.ImageClassifier(model.model.visual, head), ["a", "b"])


@torch.no_grad()
def blank(model):
    return torch.zeros(1, 3, *model.setup.image_size)


def same(ours, theirs, pictures):
    assert ours.setup == theirs.setup
    assert torch.equal(ours.encode_images(pictures), theirs.encode_images(pictures))


def said(caplog):
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
    return [record.getMessage() for record in warned if record.name.startswith("clipsteer")]


def without_setup(weights):
    """As a version that did not know of setups wrote it."""
    write_safetensors(weights, read_safetensors(weights), {"format": "pt"})


# every published pair


class Stub(nn.Module):
    """Has the outside of a CLIP: the size and the activation that it is made with."""

    def __init__(self, embed_dim, vision_cfg, text_cfg, quick_gelu=False, **_):
        super().__init__()
        self.visual = nn.Linear(1, 1)
        self.visual.image_size = vision_cfg.get("image_size", 224)
        self.logit_scale, self.logit_bias = nn.Parameter(torch.zeros(())), None
        self.act = open_clip.transformer.QuickGELU() if quick_gelu else nn.GELU()


PAIRS = open_clip.list_pretrained()


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    for kind in ("CLIP", "CustomTextCLIP", "CoCa"):
        monkeypatch.setattr(f"open_clip.factory.{kind}", Stub)
    weights = tmp_path / "stub.safetensors"
    write_safetensors(weights, Stub(1, {}, {}).state_dict())
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda cfg, **_: str(weights))
    monkeypatch.setattr("open_clip.get_tokenizer", lambda *_, **__: None)


@pytest.mark.filterwarnings("ignore:QuickGELU mismatch")
def test_every_published_model_keeps_open_clips_preprocessing(stubs, tmp_path):
    assert len(PAIRS) >= 196
    others = 0
    for name, tag in PAIRS:
        theirs = open_clip.create_model(name, tag).visual.preprocess_cfg
        loaded = clipsteer.load(name, tag)
        assert loaded.model.visual.preprocess_cfg == theirs, (name, tag)
        write_safetensors(tmp_path / "kept.safetensors", loaded.model.state_dict(), header_of(loaded.setup))
        again = clipsteer.load(name, tmp_path / "kept.safetensors")
        assert again.model.visual.preprocess_cfg == theirs, (name, tag)
        assert described(again.preprocess) == described(loaded.preprocess), (name, tag)
        assert again.setup == loaded.setup
        others += theirs["mean"] != open_clip.OPENAI_DATASET_MEAN or theirs["resize_mode"] != "shortest"
    assert others >= 50


@pytest.mark.filterwarnings("error:QuickGELU mismatch")
def test_every_published_model_has_the_activation_that_it_was_trained_with(stubs, caplog):
    differing = []
    for name, tag in PAIRS:
        published = open_clip.get_pretrained_cfg(name, tag).get("quick_gelu")
        own = open_clip.get_model_config(name).get("quick_gelu", False)
        caplog.clear()
        loaded = clipsteer.load(name, tag)
        # a tag that says nothing was trained as its architecture says
        assert loaded.setup.quick_gelu == (own if published is None else published), (name, tag)
        told = [line for line in said(caplog) if "trained with QuickGELU" in line]
        assert len(told) == (published not in (None, own))
        differing += told
        assert not clipsteer.load(name, tag, force_quick_gelu=False).setup.quick_gelu
    assert len(differing) >= 27
    assert clipsteer.load("roberta-ViT-B-32", "laion2b_s12b_b32k").setup.quick_gelu


def test_a_real_model_is_built_with_quick_gelu(monkeypatch):
    monkeypatch.setattr("open_clip.factory.load_checkpoint", lambda *_, **__: {})
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda cfg, **_: "unread")
    loaded = clipsteer.load("ViT-B-32", "openai")
    kinds = [type(block.mlp.gelu).__name__ for tower in (loaded.model.visual, loaded.model)
             for block in tower.transformer.resblocks]  # fmt: skip
    assert kinds == ["QuickGELU"] * 24
    assert loaded.setup.quick_gelu


def test_mobileclip_sees_the_same_after_a_save(tmp_path, monkeypatch, pictures):
    torch.manual_seed(0)
    weights = tmp_path / "weights.safetensors"
    write_safetensors(weights, open_clip.create_model("MobileCLIP2-S0").state_dict(), {"format": "pt"})
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda cfg, **_: str(weights))
    loaded = clipsteer.load("MobileCLIP2-S0", "dfndr2b")
    assert loaded.setup.preprocess["mean"] == (0, 0, 0)
    assert loaded.setup.preprocess["interpolation"] == "bilinear"
    saved(tmp_path / "run", loaded)
    same(clipsteer.load(tmp_path / "run"), loaded, pictures)
    same(clipsteer.load("MobileCLIP2-S0", weights), loaded, pictures)  # there is one published way


# a weights file says what it is, or is asked


@pytest.mark.parametrize("tag", list(PUBLISHED))
def test_a_run_sees_what_it_saw(publish, tmp_path, pictures, tag):
    name, weights = publish()
    loaded = clipsteer.load(name, tag)
    assert loaded.setup.preprocess["resize_mode"] == PUBLISHED[tag]["resize_mode"]
    assert loaded.setup.quick_gelu == PUBLISHED[tag].get("quick_gelu", False)
    saved(tmp_path / "run", loaded)
    kept = tmp_path / "run" / "model.safetensors"
    for again in (
        clipsteer.load(tmp_path / "run"),
        clip.load_classifier(tmp_path / "run")[0],
        clipsteer.load(name, kept),
        clipsteer.load(name, shutil.copy(kept, tmp_path / "moved.safetensors")),
    ):
        same(again, loaded, pictures)
    # asked for, another way comes first
    squashed = clipsteer.load(tmp_path / "run", preprocess="squash", force_quick_gelu=True)
    assert squashed.setup.preprocess["resize_mode"] == "squash"
    assert squashed.setup.quick_gelu
    # and is then what the run has
    saved(tmp_path / "run", squashed)
    same(clipsteer.load(tmp_path / "run"), squashed, pictures)


def test_a_file_that_does_not_say_is_warned_of(publish, tmp_path, caplog):
    name, weights = publish()
    loaded = clipsteer.load(name, weights)
    assert loaded.setup == clipsteer.load(name, "plain").setup
    preprocessing, activation = said(caplog)
    for word in (str(weights), "plain, quick", "bicubic, resize_mode shortest", "preprocess='bilinear'", "'squash'"):
        assert word in preprocessing
    assert "GELU is taken" in activation
    assert "force_quick_gelu=True" in activation
    for asked in ({"preprocess": "squash"}, {"force_quick_gelu": True}):
        caplog.clear()
        setup = clipsteer.load(name, weights, **asked).setup
        assert setup.preprocess["resize_mode"] == asked.get("preprocess", "shortest")
        assert len(said(caplog)) == 1
    caplog.clear()
    clipsteer.load(name, weights, preprocess={"mean": [0.5] * 3}, force_quick_gelu=False)
    assert said(caplog) == []
    # where all published weights have one way, that is the way of the file
    name, weights = publish(tags=("bilinear",))
    assert clipsteer.load(name, weights).setup == clipsteer.load(name, "bilinear").setup
    assert said(caplog) == []
    name, weights = publish(tags=("quick",))
    assert clipsteer.load(name, weights).setup.quick_gelu


def test_a_run_of_an_earlier_version_opens_as_it_did(publish, tmp_path, caplog, pictures):
    name, _ = publish(tags=("plain",))
    loaded = clipsteer.load(name, "plain")
    saved(tmp_path / "run", loaded)
    without_setup(tmp_path / "run" / "model.safetensors")
    same(clipsteer.load(tmp_path / "run"), loaded, pictures)
    assert said(caplog) == []
    name, _ = publish(tags=("quick", "bilinear"))
    saved(tmp_path / "run", clipsteer.load(name, "quick"))
    without_setup(tmp_path / "run" / "model.safetensors")
    caplog.clear()
    again = clipsteer.load(tmp_path / "run")
    # it was GELU that it was trained with
    assert again.setup == clipsteer.load(name, "quick", force_quick_gelu=False).setup
    assert ["several ways" in line for line in said(caplog)] == [True]


def test_what_the_header_says_is_checked(publish, tmp_path):
    name, weights = publish()
    good = clipsteer.load(name, "squash").setup
    for change in (
        {"preprocess": {**good.preprocess, "mean": [0.5]}},
        {"preprocess": {**good.preprocess, "std": [0, 1, 1]}},
        {"preprocess": {**good.preprocess, "size": -3}},
        {"preprocess": {**good.preprocess, "size": 10**9}},
        {"preprocess": {**good.preprocess, "resize_mode": "melt"}},
        {"preprocess": {**good.preprocess, "colour": "blue"}},
        {"preprocess": {"mean": [0.5] * 3}},
        {"preprocess": 3},
        {"quick_gelu": "yes"},
    ):
        header = {"clipsteer_setup": json.dumps({**good.to_json(), **change})}
        write_safetensors(tmp_path / "bad.safetensors", read_safetensors(weights), header)
        with pytest.raises(FileFormatError, match=r"bad\.safetensors: not a model's setup"):
            clipsteer.load(name, tmp_path / "bad.safetensors")
    for text in ("{", "[]", "null", "[" * 100_000):
        write_safetensors(tmp_path / "bad.safetensors", read_safetensors(weights), {"clipsteer_setup": text})
        with pytest.raises(FileFormatError, match=r"bad\.safetensors: not a model's setup"):
            read_setup(tmp_path / "bad.safetensors")
    assert Setup.from_json("x", good.to_json()) == good


def test_a_preprocessing_that_there_is_not_is_refused(publish, tmp_path):
    name, weights = publish()
    with pytest.raises(ValueError, match=r"tags \['plain', 'quick', 'bilinear', 'squash'\].*got 'nobody'"):
        clipsteer.load(name, weights, preprocess="nobody")
    with pytest.raises(ValueError, match=r"fields size, mode, mean.*got 'crop_pct'"):
        clipsteer.load(name, weights, preprocess={"crop_pct": 0.9})
    with pytest.raises(ValueError, match="interpolation must be 'bicubic'"):
        clipsteer.load(name, weights, preprocess={"interpolation": "cubic"})
    with pytest.raises(ValueError, match="one of timm's tags of test_vit, r160_in1k"):
        clipsteer.load("timm:test_vit", "random", preprocess="nobody")
    with pytest.raises(ValueError, match="number of pixels or"):
        clipsteer.load(name, weights, force_image_size=0)
    write_json(tmp_path / "open_clip_config.json", {"model_cfg": open_clip.get_model_config(name)})
    with pytest.raises(ValueError, match="has no tags"):
        clipsteer.load(f"local-dir:{tmp_path}", preprocess="plain")


def test_a_preprocess_of_ones_own_is_told_when_it_is_written(publish, tmp_path, caplog):
    import dataclasses

    name, _ = publish()
    loaded = clipsteer.load(name, "squash")
    caplog.clear()
    saved(tmp_path / "run", loaded)
    assert said(caplog) == []
    saved(tmp_path / "run", dataclasses.replace(loaded, preprocess=lambda image: torch.zeros(3, 32, 32)))
    assert "is not that of its setup" in said(caplog)[0]


# image sizes


@pytest.mark.parametrize(("vision", "sizes"), [
    (VIT, (64, (32, 64))), (RESNET, (128,)), (TOWER, (192, (160, 320))), (CONV, (192, (160, 320))),
])  # fmt: skip
def test_another_image_size(publish, tmp_path, pictures, vision, sizes):
    name, weights = publish(vision, tags=("squash",))
    folder = tmp_path / "folder"
    folder.mkdir()
    write_json(folder / "open_clip_config.json", {"model_cfg": open_clip.get_model_config(name)})
    shutil.copy(weights, folder / "open_clip_model.safetensors")
    for size in sizes:
        made = []
        for given in ((name, "squash"), (name, weights), (f"local-dir:{folder}",), (f"local-dir:{folder}", weights)):
            loaded = clipsteer.load(*given, force_image_size=size)
            height, width = (size, size) if isinstance(size, int) else size
            assert loaded.preprocess(pictures[0]).shape == (3, height, width)
            saved(tmp_path / "run", loaded)
            same(clipsteer.load(tmp_path / "run"), loaded, pictures)
            assert clipsteer.load(tmp_path / "run").setup.image_size == (height, width)
            made.append(loaded.model.state_dict())
        assert all(torch.equal(made[0][key], other[key]) for other in made[1:] for key in made[0])


@torch.no_grad()
def test_a_resnets_position_embeddings_are_resampled_as_a_vits(publish):
    name, weights = publish(RESNET, tags=("plain",))
    own = clipsteer.load(name, weights).model.visual.attnpool.positional_embedding
    other = clipsteer.load(name, weights, force_image_size=128).model.visual.attnpool.positional_embedding
    assert torch.equal(other[0], own[0])
    grid = own[1:].T.reshape(1, -1, 2, 2)
    wide = nn.functional.interpolate(grid, (4, 4), mode="bicubic", antialias=True, align_corners=False)
    assert torch.equal(other[1:], wide[0].flatten(1).T)


def test_an_image_size_that_a_tower_cannot_see(publish):
    name, weights = publish(RESNET, tags=("plain",))
    with pytest.raises(ValueError, match="sees square images only"):
        clipsteer.load(name, weights, force_image_size=(64, 128))
    with pytest.raises(ValueError, match="mixer_s32_224 cannot see 256x256 images"):
        clipsteer.load("timm:mixer_s32_224", "random", force_image_size=256)
    name, weights = publish({**TOWER, "timm_model_name": "mixer_s32_224", "image_size": 224}, tags=("plain",))
    with pytest.raises(ValueError, match="cannot see 256x256 images"):
        clipsteer.load(name, weights, force_image_size=256)


def test_an_activation_that_nothing_has(publish, tmp_path):
    with pytest.raises(ValueError, match=r"timm names its own, such as .*quickgelu"):
        clipsteer.load("timm:test_vit", "random", force_quick_gelu=True)
    name, weights = publish({**VIT, "act_kwargs": {"approximate": "tanh"}}, tags=("plain",))
    with pytest.raises(ValueError, match="cannot be built with QuickGELU"):
        clipsteer.load(name, weights, force_quick_gelu=True)


# timm


def test_a_timm_run_keeps_its_transforms(tmp_path, pictures, caplog):
    name = "timm:vit_tiny_patch16_224"
    torch.manual_seed(0)
    ways = ({}, {"preprocess": {"mean": [0, 0, 0], "crop_mode": "squash"}}, {"force_image_size": 96},
            {"preprocess": {"interpolation": "bilinear", "crop_pct": 1.0}, "force_image_size": (64, 96)})  # fmt: skip
    plain = clipsteer.load(name, "random")
    assert plain.setup.preprocess["mean"] == (0.5, 0.5, 0.5)
    for asked in ways:
        loaded = clipsteer.load(name, "random", **asked)
        saved(tmp_path / "run", loaded)
        caplog.clear()
        same(clipsteer.load(tmp_path / "run"), loaded, pictures)
        assert said(caplog) == []
        assert described(clip.train_transform(loaded, 0.5)) == described(
            clip.train_transform(clipsteer.load(tmp_path / "run"), 0.5)
        )
    encoder = Encoder.from_timm("test_vit", "random", unit_range=True)
    assert "mean=tensor([0., 0., 0.]), std=tensor([1., 1., 1.])" in described(encoder.preprocess)
    with pytest.raises(ValueError, match="leave one of them out"):
        Encoder.from_timm("test_vit", "random", unit_range=True, preprocess={"mean": [0.5] * 3})


def test_a_timm_file_that_does_not_say_is_warned_of(tmp_path, caplog):
    trunk = clipsteer.load("timm:vit_small_patch16_224", "random").model.visual.trunk
    write_safetensors(tmp_path / "w.safetensors", trunk.state_dict())
    caplog.clear()
    loaded = clipsteer.load("timm:vit_small_patch16_224", tmp_path / "w.safetensors")
    assert loaded.setup.preprocess["mean"] == (0.5, 0.5, 0.5)
    (line,) = said(caplog)
    assert "several ways" in line
    assert "dino" in line
    caplog.clear()
    dino = clipsteer.load("timm:vit_small_patch16_224.dino", tmp_path / "w.safetensors")
    assert dino.setup.preprocess["mean"] == (0.485, 0.456, 0.406)
    asked = clipsteer.load("timm:vit_small_patch16_224", tmp_path / "w.safetensors", preprocess="dino")
    assert asked.setup == dino.setup
    assert said(caplog) == []


def test_a_file_of_open_clips_is_none_of_timms(publish, tmp_path):
    name, _ = publish()
    saved(tmp_path / "run", clipsteer.load(name, "plain"))
    with pytest.raises(FileFormatError, match="weights of a model of open_clip's, not of timm:test_vit"):
        clipsteer.load("timm:test_vit", tmp_path / "run" / "model.safetensors")


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet", "test_efficientnet"])
def test_timms_own_files_hold_a_classifier_under_any_name(tmp_path, name):
    import timm

    torch.manual_seed(0)
    whole = timm.create_model(name, num_classes=7)
    write_safetensors(tmp_path / "own.safetensors", whole.state_dict())
    trunk = clipsteer.load(f"timm:{name}", tmp_path / "own.safetensors").model.visual.trunk
    assert trunk.state_dict().keys() < whole.state_dict().keys()
    assert all(torch.equal(tensor, whole.state_dict()[key]) for key, tensor in trunk.state_dict().items())


def test_every_preprocessing_of_timm_can_be_written():
    import timm
    from timm.data import resolve_data_config

    for name in timm.list_pretrained():
        cfg = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
        assert Setup.from_json(name, Setup(cfg).to_json()).preprocess == check_preprocess(cfg, TIMM_DATA)
