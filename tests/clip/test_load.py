"""The one door for models: every kind of name and every mistake, and what is taken as load returns it."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

import clipsteer
from clipsteer import FileFormatError, clip, data
from clipsteer.clip.module import module_of
from clipsteer.clip.open_clip_models import known_names
from clipsteer.clip.pixels import Samples, as_pixels, image_loader, pixel_batches
from clipsteer.continual.backbone import Encoder
from clipsteer.continual.plasticity import Plasticity, fit_saes
from clipsteer.io.files import write_json, write_safetensors
from clipsteer.reference.features import encode_texts, load_run
from clipsteer.reference.train import ContrastiveConfig, train_contrastive
from clipsteer.sae.activations import HarvestSource, harvest_to_store

pytest.importorskip("open_clip")
pytest.importorskip("timm")

TIMM = "timm:test_vit"
BLOCK = "visual.transformer.resblocks.1"
SMALL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def emoji():
    return clipsteer.load("emojiclip")


@pytest.fixture(scope="module")
def timm_model():
    torch.manual_seed(0)
    return clipsteer.load(TIMM, "random")


@pytest.fixture(scope="module")
def drawings():
    return data.open_dataset("emoji:noto:test").subset(range(5))


@pytest.fixture
def architecture(tmp_path):
    path = tmp_path / "small-doors.json"
    path.write_text(json.dumps(SMALL))
    return path


def same_weights(a, b):
    ours, theirs = a.model.state_dict(), b.model.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


# names


def test_the_bundled_model_is_what_is_opened_without_a_name(emoji):
    assert same_weights(clipsteer.load(), emoji)
    assert (emoji.name, emoji.pretrained, emoji.has_text) == ("emojiclip", None, True)


def test_an_unknown_name_is_answered_with_what_is_near_and_all_kinds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kinds = r"A model is emojiclip or emoji-tiny; .*\.json.*hf-hub:.*local-dir:.*timm:.*clipsteer train, finetune"
    with pytest.raises(ValueError, match=f"no model is called 'ViT-B-33'; did you mean ViT-B-32.*{kinds}"):
        clipsteer.load("ViT-B-33")
    with pytest.raises(ValueError, match="did you mean emojiclip"):
        clipsteer.load("emoji-clip")
    with pytest.raises(ValueError, match=f"'runs/nothing'; {kinds}"):
        clipsteer.load("runs/nothing")
    (tmp_path / "w.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"weights file goes with the name.*load\(NAME, 'w\.safetensors'\)"):
        clipsteer.load("w.safetensors")
    with pytest.raises(ValueError, match=r"no such file: absent\.json"):
        clipsteer.load("absent.json")
    assert known_names()[:2] == ["emojiclip", "emoji-tiny"]


def test_an_architecture_file(architecture):
    torch.manual_seed(3)
    made = clipsteer.load(architecture)
    assert made.name == str(architecture)
    assert made.embed(torch.zeros(1, 3, 32, 32)).shape == (1, 16)
    architecture.write_text("{}")
    with pytest.raises(FileFormatError, match="expected embed_dim, vision_cfg, text_cfg"):
        clipsteer.load(architecture)


def test_a_local_folder_of_open_clip_and_a_runs_weights_in_place_of_its_own(tmp_path, emoji):
    folder = tmp_path / "kept"
    folder.mkdir()
    preprocess = {k: v for k, v in emoji.model.visual.preprocess_cfg.items() if k in ("mean", "std")}
    torch.manual_seed(1)
    source = tmp_path / "source.json"
    source.write_text(json.dumps(SMALL))
    first, second = clipsteer.load(source), clipsteer.load(source)
    assert not same_weights(first, second)
    write_json(folder / "open_clip_config.json", {"model_cfg": SMALL, "preprocess_cfg": preprocess})
    write_safetensors(folder / "open_clip_model.safetensors", first.model.state_dict(), {"format": "pt"})
    name = f"local-dir:{folder}"
    opened = clipsteer.load(name)
    assert same_weights(opened, first)
    assert opened.name == name
    with pytest.raises(ValueError, match="brings its own weights"):
        clipsteer.load(name, "openai")
    with pytest.raises(ValueError, match=f"write {name}"):
        clipsteer.load(folder)
    run = tmp_path / "run"
    classifier = clip.zero_shot_classifier(second, torch.eye(16)[:2])
    clip.save_classifier(
        run, clip.CLIP(second.model, second.preprocess, second.tokenizer, name, None), classifier, "ab"
    )
    again = clipsteer.load(run)
    assert same_weights(again, second)
    # provenance says whose weights these are
    assert (again.name, again.pretrained) == (name, str(run / "model.safetensors"))
    write_safetensors(run / "model.safetensors", {"x": torch.ones(2)})
    with pytest.raises(FileFormatError, match=r"model\.safetensors: cannot be loaded as weights of local-dir"):
        clipsteer.load(run)


# folders of runs


def test_the_folder_of_a_classifier(tmp_path, emoji):
    changed = clip.CLIP(copy.deepcopy(emoji.model), emoji.preprocess, emoji.tokenizer, emoji.name, None)
    with torch.no_grad():
        changed.model.visual.proj.mul_(1.5)
    head = clip.zero_shot_head(changed, ["cat", "dog"])
    clip.save_classifier(tmp_path / "finetuned", changed, clip.zero_shot_classifier(changed, head), ["cat", "dog"])
    opened = clipsteer.load(tmp_path / "finetuned")
    assert same_weights(opened, changed)
    # as what it is, for prompts and provenance; and it opens again under these two
    assert (opened.name, opened.pretrained) == ("emojiclip", str(tmp_path / "finetuned" / "model.safetensors"))
    assert same_weights(clipsteer.load(opened.name, opened.pretrained), changed)
    by_classifier, classifier, classes = clip.load_classifier(tmp_path / "finetuned")
    assert same_weights(by_classifier, changed)
    assert classes == ["cat", "dog"]
    assert torch.equal(classifier.head.weight, head * changed.model.logit_scale.exp())
    assert clipsteer.load(tmp_path / "finetuned", dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="brings its own weights"):
        clipsteer.load(tmp_path / "finetuned", "openai")
    with pytest.raises(ValueError, match=r"run of clipsteer finetune; name .*finetuned$"):
        clipsteer.load(tmp_path)
    (tmp_path / "finetuned" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="weights are not there"):
        clipsteer.load(tmp_path / "finetuned")
    write_json(tmp_path / "finetuned" / "config.json", {"classes": ["cat"]})
    with pytest.raises(FileFormatError, match="expected the name of a model"):
        clipsteer.load(tmp_path / "finetuned")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"holds no model: expected config\.json and model\.safetensors"):
        clipsteer.load(tmp_path / "nothing")


def test_the_folder_of_a_classifier_brings_an_architecture_of_its_own(tmp_path, architecture, monkeypatch):
    torch.manual_seed(5)
    made = clipsteer.load(architecture)
    head = clip.zero_shot_head(made, ["cat", "dog"])
    clip.save_classifier(tmp_path / "a", made, clip.zero_shot_classifier(made, head), ["cat", "dog"])
    architecture.unlink()
    monkeypatch.chdir(tmp_path / "a")
    opened, _, _ = clip.load_classifier(".")
    assert same_weights(opened, made)
    assert same_weights(clipsteer.load(tmp_path / "a"), made)


def test_the_folder_of_a_contrastive_run(tmp_path, architecture):
    torch.manual_seed(2)
    made = clipsteer.load(architecture)
    pairs = data.open_dataset("emoji:noto:test", targets="caption").subset(range(8))
    config = ContrastiveConfig(loss="clip", batch_size=4, epochs=1, crop=1.0)
    train_contrastive(made, pairs, config, out=tmp_path / "run")
    architecture.unlink()
    opened = clipsteer.load(tmp_path / "run")
    assert same_weights(opened, made)
    assert same_weights(load_run(tmp_path / "run"), made)
    images = [pairs[i][0] for i in range(3)]
    assert torch.equal(opened.encode_images(images), made.encode_images(images))


# timm


def test_a_timm_model_is_an_image_tower_under_open_clips_names(timm_model, drawings, tmp_path):
    import timm

    assert (timm_model.name, timm_model.pretrained, timm_model.has_text) == (TIMM, "random", False)
    torch.manual_seed(0)
    trunk = timm.create_model("test_vit", pretrained=False, num_classes=0).eval()
    x = torch.stack([timm_model.preprocess(image) for image, _ in drawings])
    with torch.no_grad():
        expected = nn.functional.normalize(trunk(x), dim=-1)
    assert torch.equal(timm_model.encode_images(drawings), expected)
    hook = clip.default_hook_point(timm_model)
    assert hook in clip.hook_points(timm_model, "visual.trunk.blocks.*")
    assert clip.class_tokens(timm_model, hook) == trunk.num_prefix_tokens
    rows = HarvestSource(timm_model, drawings, hook, tokens="cls")
    origin = {"clip_model": TIMM, "pretrained": "random", "hook_point": hook, "tokens": "cls"}
    assert rows.provenance == {**origin, "setup": timm_model.setup.to_json()}
    # its own weights file, and the one that a run would leave
    write_safetensors(tmp_path / "own.safetensors", trunk.state_dict())
    write_safetensors(tmp_path / "run.safetensors", timm_model.model.state_dict())
    for name in ("own", "run"):
        assert same_weights(clipsteer.load(TIMM, tmp_path / f"{name}.safetensors"), timm_model)


def test_what_needs_a_text_tower_says_so(timm_model, drawings):
    missing = "needs a text tower, and timm:test_vit has none; load a CLIP"
    with pytest.raises(ValueError, match=f"zero_shot_head {missing}"):
        clip.zero_shot_head(timm_model, ["a", "b"])
    with pytest.raises(ValueError, match=f"encode_texts {missing}"):
        encode_texts(timm_model, ["a"])
    with pytest.raises(ValueError, match=f"zero_shot_classifier {missing}"):
        clip.zero_shot_classifier(timm_model, torch.eye(64)[:2])
    with pytest.raises(ValueError, match=f"train_contrastive {missing}"):
        train_contrastive(timm_model, drawings, ContrastiveConfig(loss="clip", batch_size=2, epochs=1))
    with pytest.raises(RuntimeError, match=missing):
        timm_model.tokenizer(["a"])
    with pytest.raises(RuntimeError, match="encode_text needs a text tower"):
        next(clip.harvest(timm_model, [torch.zeros(1, 4, dtype=torch.int64)], "visual.trunk.norm"))


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("timm:test_vitt", None, "timm has no model 'test_vitt'; did you mean test_vit"),
        ("timm:vit_of_nobody_at_all_xyz", None, "timm has no model"),
        ("timm:test_vit.in99k", None, r"weights of test_vit are .*got 'in99k'"),
        ("timm:test_vit", "absent.safetensors", "must be a safetensors file, 'random', or None.*absent"),
    ],
)
def test_wrong_timm_names(name, weights, message):
    with pytest.raises(ValueError, match=message):
        clipsteer.load(name, weights)


def test_timm_weights_of_another_model_and_a_download_that_fails(tmp_path, monkeypatch):
    import timm

    write_safetensors(tmp_path / "w.safetensors", {"x": torch.ones(2)})
    with pytest.raises(FileFormatError, match="cannot be loaded as weights of test_vit"):
        clipsteer.load(TIMM, tmp_path / "w.safetensors")

    def unreachable(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(RuntimeError, match=r"no route to host.*pass a safetensors file as pretrained, or 'random'"):
        clipsteer.load(TIMM)


def test_an_encoder_opens_through_the_same_door(tmp_path, timm_model, emoji):
    torch.manual_seed(0)
    tower, found = Encoder.open(TIMM, "random")
    assert found is None
    assert tower.blocks[0] == "blocks.0"  # timm's own names, as files of adapters and SAEs have them
    x = torch.rand(2, 3, 160, 160)
    with torch.no_grad():
        features = Encoder.from_clip(timm_model)(x)
        assert torch.equal(tower(x), features)
        assert torch.equal(nn.functional.normalize(features, dim=-1), timm_model.embed(x))
    head = clip.zero_shot_head(emoji, ["cat"])
    clip.save_classifier(tmp_path, emoji, clip.zero_shot_classifier(emoji, head), ["cat"])
    opened, whole = Encoder.open(str(tmp_path))
    assert same_weights(whole, emoji)
    assert opened.module is whole.model.visual


# what load returns is taken as it is


@torch.no_grad()
def test_what_load_returns_and_its_module_are_taken_alike(emoji, drawings, tmp_path):
    module = emoji.model
    images = [image for image, _ in drawings]
    x = torch.stack([emoji.preprocess(image) for image in images])
    assert module_of(emoji) is module
    assert module_of(module) is module
    assert clip.hook_points(emoji) == clip.hook_points(module)
    assert clip.class_tokens(emoji, BLOCK) == clip.class_tokens(module, BLOCK) == 1
    push = clipsteer.VectorSteering(torch.ones(module.visual.conv1.out_channels), tokens="cls")
    plain, found = emoji.encode_images(images), []
    for model in (emoji, module):
        with clip.capture(model, BLOCK, detach=True) as seen:
            emoji.encode_images(images)
        with clipsteer.steer(model, {BLOCK: push}):
            steered = emoji.encode_images(images)
        with clip.apply_at(model, {BLOCK: lambda acts: 2 * acts}) as given:
            doubled = emoji.encode_images(images)
        assert given is model
        module.train()
        with clip.evaluating(model):
            assert not module.visual.training
        assert module.visual.training
        module.eval()
        rows = torch.cat(list(clip.harvest(model, [x], BLOCK, tokens="patches")))
        found.append([seen[BLOCK], steered, doubled, rows])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(found[0][1], plain)
    assert torch.equal(emoji.encode_images(images), plain)
    store = harvest_to_store(emoji, drawings, BLOCK, tmp_path, tokens="patches", dtype="float32")
    assert torch.equal(store.read_shard(0), found[0][3])


def test_saes_of_blocks_are_fitted_on_what_load_returns(emoji, drawings):
    x = torch.stack([emoji.preprocess(image) for image, _ in drawings])
    usages, weights = [], []
    for model in (emoji, emoji.model):
        saes = fit_saes(model, [BLOCK], [x], d_sae=8, k=2, steps=2, seed=1)
        weights.append(saes[BLOCK].W_dec)
        usages.append(Plasticity(saes).usage(model, [x])[BLOCK])
    assert torch.equal(*weights)
    assert torch.equal(*usages)


@pytest.mark.parametrize("wrong", ["emojiclip", None, {"model": 3}, torch.ones(3)])
def test_what_is_no_model_is_refused(wrong):
    for call in (
        lambda: clip.hook_points(wrong),
        lambda: clipsteer.steer(wrong, {"x": clipsteer.VectorSteering(torch.ones(2))}),
        lambda: clip.class_tokens(wrong, "visual.x"),
        lambda: next(clip.harvest(wrong, [], "x")),
        lambda: clip.capture(wrong, "x").__enter__(),
        lambda: clip.apply_at(wrong, {}).__enter__(),
    ):
        with pytest.raises(
            TypeError, match=rf"a model of clipsteer\.load or a torch\.nn\.Module, got {type(wrong).__name__}"
        ):
            call()


# images


def test_images_are_taken_as_pictures_tensors_paths_batches_and_data_sets(emoji, drawings, tmp_path):
    images = [image for image, _ in drawings]
    pixels = torch.stack([emoji.preprocess(image) for image in images])
    with torch.no_grad():
        expected = emoji.embed(pixels)
    paths = []
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
        paths.append(tmp_path / f"{i}.png")
    ways = {
        "pictures": images,
        "a generator": (image for image in images),
        "tensors": list(pixels),
        "a batch": pixels,
        "paths": paths,
        "texts": list(map(str, paths)),
        "mixed": [images[0], pixels[1], paths[2], str(paths[3]), (images[4], "label")],
        "a data set": drawings,
        "a subset": torch.utils.data.Subset(drawings, range(5)),
        "a flat folder": data.open_dataset(tmp_path),
        "pairs": list(drawings),
        "tensors with labels": torch.utils.data.TensorDataset(pixels, torch.arange(5)),
        "a loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(pixels, torch.arange(5)), 2),
    }
    for name, given in ways.items():
        assert torch.equal(emoji.encode_images(given), expected), name
    in_twos = emoji.encode_images(pixels, batch_size=2)
    assert torch.equal(in_twos, emoji.encode_images(images, batch_size=2))
    torch.testing.assert_close(in_twos, expected)


def test_images_that_are_none_are_refused(emoji, drawings, tmp_path):
    image = drawings[0][0]
    pixels = emoji.preprocess(image)
    wrong = {
        "a path alone": (str(tmp_path), TypeError, r"write \[path\].*open_dataset\(path\)"),
        "a picture alone": (image, TypeError, "expected a list of images.*got Image"),
        "a tensor alone": (pixels, ValueError, r"batch \(B, 3, H, W\), got \(3, 64, 64\)"),
        "nothing": ([], ValueError, "images is empty"),
        "an empty batch": (pixels[None][:0], ValueError, "images is empty"),
        "a number": (5, TypeError, "got int"),
        "numbers": ([5], TypeError, "expected PIL images, paths, or preprocessed tensors.*got int"),
        "an array": ([np.asarray(image)], TypeError, "got ndarray"),
        "None": ([None], TypeError, "got NoneType"),
        "channels last": ([pixels.permute(1, 2, 0)], ValueError, r"\(3, H, W\).*got torch.float32 \(64, 64, 3\)"),
        "bytes": ([(pixels * 9).to(torch.uint8)], ValueError, "floating numbers, got torch.uint8"),
        "two sizes": ([pixels, pixels[:, :32, :32]], ValueError, "must have one size"),
        "no image": ([__file__], FileFormatError, "cannot be read as an image"),
        "no file": ([tmp_path / "absent.png"], FileNotFoundError, r"absent\.png"),
    }
    for given, error, message in wrong.values():
        with pytest.raises(error, match=message):
            emoji.encode_images(given)


def test_one_loader_serves_every_kind_of_image(emoji, drawings, tmp_path):
    image, target = drawings[0]
    image.save(tmp_path / "a.png")
    expected = emoji.preprocess(image)
    items = [image, (image, target), (tmp_path / "a.png", "a caption"), (expected, None), [expected, torch.tensor(7)]]
    (pixels, labels), *rest = image_loader(emoji, items, 4)
    assert [len(batch) for batch, _ in rest] == [1]
    assert all(torch.equal(one, expected) for one in pixels)
    assert labels.tolist() == [-1, target, -1, -1]
    assert rest[0][1].tolist() == [7]
    batches = list(pixel_batches(emoji, items, 2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert torch.equal(torch.cat(batches), torch.cat([pixels, rest[0][0]]))
    with pytest.raises(TypeError, match="got int"):
        as_pixels(3, emoji.preprocess)


def test_seeded_samples_leave_the_callers_generator_alone(drawings):
    def noise(image):
        return torch.rand(3, 4, 4)

    samples = Samples(drawings, noise)
    assert len(samples) == len(drawings)
    torch.manual_seed(9)
    state = torch.get_rng_state()
    first, again, other = samples[0, 1][0], samples[3, 1][0], samples[0, 2][0]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    expected = torch.rand(3, 4, 4)
    torch.manual_seed(9)
    assert torch.equal(samples[0][0], expected)  # without a seed from torch's own
