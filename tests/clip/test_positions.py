"""How position tables are resampled: two rules, by their definitions, for every kind of tower, and kept."""

from __future__ import annotations

import math

import pytest
import torch

import clipsteer
from clipsteer import clip
from clipsteer.cli.main import main
from clipsteer.clip.positions import origin_of, resampled
from clipsteer.clip.setup import Setup, header_of
from clipsteer.io.files import read_safetensors, write_safetensors

open_clip = pytest.importorskip("open_clip")
timm = pytest.importorskip("timm")

TINY = "timm:test_vit"  # 160 px, patches of 16, a class token


def cubic(x, a):
    """Keys' kernel."""
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def weights(old, new, antialias):
    """(new, old), by definition: taps around the centre of each new row, and the filter widened by the scale and
    cut at the edges where it is antialiased; else the edge is repeated."""
    found = torch.zeros(new, old, dtype=torch.float64)
    scale = old / new
    wide = max(scale, 1.0) if antialias else 1.0
    a = -0.5 if antialias else -0.75  # PIL's and torch's
    for i in range(new):
        centre = (i + 0.5) * scale - 0.5
        reach = math.ceil(2 * wide)
        for tap in range(math.floor(centre) - reach, math.floor(centre) + reach + 2):
            w = cubic((tap - centre) / wide, a)
            if antialias and not 0 <= tap < old:
                continue
            found[i, min(max(tap, 0), old - 1)] += w
    return found / found.sum(1, keepdim=True)


@pytest.mark.parametrize("rule", ["antialias", "bicubic"])
@pytest.mark.parametrize(("old", "new"), [((6, 6), (3, 3)), ((5, 4), (7, 3)), ((4, 9), (4, 5)), ((3, 3), (8, 8))])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_both_rules_are_their_definitions(rule, old, new, prefix):
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(prefix + old[0] * old[1], 3, generator=generator, dtype=torch.float64).float()
    found = resampled(table, old, new, prefix, rule)
    assert torch.equal(found[:prefix], table[:prefix])
    high, wide = (weights(o, n, rule == "antialias") for o, n in zip(old, new))
    grid = table[prefix:].double().unflatten(0, old)
    expected = torch.einsum("ih,jw,hwd->ijd", high, wide, grid).flatten(0, 1)
    # 16 to 64 products of size 1, each rounded at 6e-8
    torch.testing.assert_close(found[prefix:].double(), expected, atol=4e-6, rtol=0)


def test_the_same_grid_is_left_alone():
    table = torch.randn(10, 3)
    assert resampled(table, (3, 3), (3, 3), 1, "bicubic") is table


@pytest.mark.parametrize(("name", "rule"), [
    ("vit_small_patch14_dinov2.lvd142m", "bicubic"), ("vit_base_patch14_dinov2", "bicubic"),
    ("vit_small_patch14_reg4_dinov2.lvd142m", "antialias"), ("vit_base_patch16_224.dino", "bicubic"),
    ("vit_base_patch16_224.augreg_in21k", "antialias"), ("vit_base_patch16_clip_224.openai", "antialias"),
])  # fmt: skip
def test_the_rule_is_that_of_the_weights_origin(name, rule):
    assert timm.is_model(name.partition(".")[0])
    assert origin_of(name) == rule


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Weights of a ViT of timm at its own size, without a word on their setup."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vit") / "w.safetensors"
    model = timm.create_model(TINY.removeprefix("timm:"), num_classes=0)
    torch.nn.init.normal_(model.pos_embed)
    write_safetensors(path, model.state_dict())
    return path


def table(loaded):
    return loaded.model.visual.trunk.pos_embed.data[0]


def test_a_rule_that_is_asked_for_is_kept(file, tmp_path):
    own = read_safetensors(file)["pos_embed"][0]
    by_rule = {}
    for rule in ("antialias", "bicubic"):
        loaded = clipsteer.load(TINY, file, image_size=(80, 112), position_interpolation=rule)
        by_rule[rule] = table(loaded)
        assert torch.equal(by_rule[rule], resampled(own, (10, 10), (5, 7), 1, rule))
        assert loaded.setup.position_interpolation == rule
        write_safetensors(tmp_path / "kept.safetensors", loaded.model.state_dict(), header_of(loaded.setup))
        again = clipsteer.load(TINY, tmp_path / "kept.safetensors")
        assert again.setup == loaded.setup
        assert torch.equal(table(again), by_rule[rule])
        # to a third size from the one that is written, by the rule that is written
        third = clipsteer.load(TINY, tmp_path / "kept.safetensors", image_size=96)
        assert torch.equal(table(third), resampled(by_rule[rule], (5, 7), (6, 6), 1, rule))
        # metadata of what is fitted on it: the file has its own size, and is set up as it was
        origin = clip.load_origin({"clip_model": TINY, "pretrained": str(file), "setup": loaded.setup.to_json()})
        assert torch.equal(table(origin), by_rule[rule])
    assert (by_rule["antialias"] - by_rule["bicubic"]).norm() > 0.05 * by_rule["bicubic"].norm()


def test_what_was_written_before_there_were_two_rules_opens_as_it_did(file, tmp_path, monkeypatch):
    monkeypatch.setattr("clipsteer.clip.timm_models.origin_of", lambda name: "bicubic")
    loaded = clipsteer.load(TINY, file, image_size=80)
    assert loaded.setup.position_interpolation == "bicubic"
    old = {"preprocess": loaded.setup.to_json()["preprocess"]}
    assert Setup.from_json("old", old).to_json() == old
    before = clip.load_origin({"clip_model": TINY, "pretrained": str(file), "setup": old})
    own = read_safetensors(file)["pos_embed"][0]
    assert torch.equal(table(before), resampled(own, (10, 10), (5, 5), 1, "antialias"))
    assert before.setup.position_interpolation == "antialias"


@pytest.mark.parametrize("vision", [
    {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": ""},
    {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64},
], ids=["vit", "timm", "resnet"])  # fmt: skip
def test_open_clips_towers_have_both_rules(vision, tmp_path):
    import json

    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1}
    path = tmp_path / "tiny-rules.json"
    path.write_text(json.dumps({"embed_dim": 64, "vision_cfg": vision, "text_cfg": text}))
    size = 2 * vision["image_size"] if isinstance(vision.get("layers"), list) else vision["image_size"] // 2
    torch.manual_seed(0)
    model = clipsteer.load(path).model
    own = [p for name, p in model.named_parameters() if name.startswith("visual.") and "pos" in name]
    torch.nn.init.normal_(own[0])
    file = tmp_path / "w.safetensors"
    write_safetensors(file, model.state_dict())
    rows = own[0].detach().reshape(-1, own[0].shape[-1])
    side = math.isqrt(len(rows) - 1)
    shrink = vision["image_size"] // side
    for rule in ("antialias", "bicubic"):
        loaded = clipsteer.load(path, file, image_size=size, position_interpolation=rule)
        found = [p for name, p in loaded.model.named_parameters() if name.startswith("visual.") and "pos" in name]
        expected = resampled(rows, (side, side), (size // shrink, size // shrink), 1, rule)
        torch.testing.assert_close(found[0].reshape(expected.shape), expected, atol=1e-6, rtol=0)
        assert loaded.setup.position_interpolation == rule
        assert loaded.setup.image_size == (size, size)
        assert loaded.model.encode_image(torch.zeros(1, 3, size, size)).shape[0] == 1
        write_safetensors(tmp_path / "kept.safetensors", loaded.model.state_dict(), header_of(loaded.setup))
        again = clipsteer.load(path, tmp_path / "kept.safetensors")
        assert again.setup == loaded.setup
        kept = [p for name, p in again.model.named_parameters() if name.startswith("visual.") and "pos" in name]
        assert torch.equal(kept[0], found[0])
    assert clipsteer.load(path, file, image_size=size).setup.position_interpolation == "antialias"


def test_rules_and_sizes_that_there_are_not():
    with pytest.raises(ValueError, match="position_interpolation must be 'antialias' or 'bicubic', got 'nearest'"):
        clipsteer.load(TINY, "random", position_interpolation="nearest")
    with pytest.raises(ValueError, match="image_size and force_image_size are one thing"):
        clipsteer.load(TINY, "random", image_size=80, force_image_size=96)
    with pytest.raises(ValueError, match="is for towers with one table of positions"):
        clipsteer.load("timm:swin_tiny_patch4_window7_224", "random", image_size=256, position_interpolation="bicubic")


def test_the_agreement_with_transformers_dinov2():
    """timm's DINOv2 at another size is transformers' at that size, by the rule of its origin alone."""
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518, "patch_size": 14}
    torch.manual_seed(0)
    theirs = transformers.Dinov2Model(transformers.Dinov2Config(num_hidden_layers=1, **shape)).eval()
    torch.nn.init.normal_(theirs.embeddings.position_embeddings)
    x = torch.randn(1, 3, 224, 224)
    embeddings = theirs.embeddings(x)
    ours = clipsteer.load("timm:vit_small_patch14_dinov2.lvd142m", "random")
    trunk = ours.model.visual.trunk
    trunk.pos_embed.data.copy_(theirs.embeddings.position_embeddings.data)
    found = resampled(trunk.pos_embed.data[0], (37, 37), (16, 16), 1, ours.setup.position_interpolation)
    expected = theirs.embeddings.interpolate_pos_encoding(embeddings, 224, 224)[0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_the_commands_take_size_and_rule(tmp_path, file, capsys):
    from PIL import Image

    for i in range(4):
        Image.new("RGB", (90, 90), (60 * i, 99, 9)).save(tmp_path / f"{i}.png")
    run = tmp_path / "run"
    arguments = ["sae", "train", "--model", TINY, "--pretrained", file, "--image-size", "80", "--data", tmp_path,
                 "--position-interpolation", "bicubic", "--expansion", "2", "--k", "4", "--steps", "3",
                 "--batch-size", "32", "--out", run]  # fmt: skip
    assert main([str(argument) for argument in arguments]) == 0
    setup = clipsteer.SAE.from_pretrained(run).metadata["setup"]
    assert setup["position_interpolation"] == "bicubic"
    assert setup["preprocess"]["input_size"] == [3, 80, 80]
    assert main(["sae", "eval", str(run), "--data", str(tmp_path)]) == 0
    assert "fvu" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["sae", "train", "--position-interpolation", "nearest", "--out", str(run)])


def test_towers_without_text_steer_and_fine_tune_by_class_means(tmp_path, file, capsys):
    import numpy as np
    from PIL import Image

    for kind in ("a", "b"):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for i in range(3):
            noise = np.random.RandomState(i).randint(0, 255, (40, 40, 3)) // (1 + 3 * (kind == "b"))
            Image.fromarray(noise.astype(np.uint8)).save(tmp_path / "data" / kind / f"{i}.png")
    data, run = str(tmp_path / "data"), str(tmp_path / "run")
    model = ["--model", TINY, "--pretrained", str(file), "--data", data]
    train = ["--expansion", "2", "--k", "4", "--steps", "3", "--batch-size", "32", "--out", run]
    assert main(["sae", "train", *model, *train]) == 0
    capsys.readouterr()
    assert main(["sae", "steer", run, "--data", data, "--feature", "3=5"]) == 0
    shown = capsys.readouterr().out
    assert "has no text tower: classes stand for the mean of their images" in shown
    assert "mean change, in points" in shown
    (tmp_path / "words.txt").write_text("cat")
    for more in (["--data", data, "--words", str(tmp_path / "words.txt")], ["--data", data + "/a"]):
        assert main(["sae", "steer", run, "--feature", "3=5", *more]) == 2
        assert "text tower" in capsys.readouterr().err
    out = tmp_path / "tuned"
    assert main(["finetune", *model, "--epochs", "1", "--batch-size", "4", "--out", str(out)]) == 0
    start, classifier, classes = clip.load_classifier(out / "zeroshot")
    from clipsteer.data.files import open_dataset

    embeddings = start.encode_images(open_dataset(data))
    means = torch.nn.functional.normalize(embeddings.unflatten(0, (2, 3)).mean(1), dim=-1)
    assert classes == ["a", "b"]
    torch.testing.assert_close(classifier.head.weight.data, 100 * means, atol=1e-4, rtol=1e-4)
