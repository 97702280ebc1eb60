"""Image sizes that are no whole patches: refused where they are asked for, kept where a model has them."""

from __future__ import annotations

import json

import pytest
from torch import nn

import clipsteer
from _command import run
from clipsteer import clip
from clipsteer.clip.patches import patch_of
from clipsteer.clip.setup import Setup, header_of
from clipsteer.io.files import write_json, write_safetensors

open_clip = pytest.importorskip("open_clip")
timm = pytest.importorskip("timm")

from _published import CONV, RESNET, TOWER, VIT, publisher  # noqa: E402

ODD = {**VIT, "image_size": 36}  # of patches of 8


@pytest.fixture
def publish(tmp_path, monkeypatch):
    return publisher(tmp_path, monkeypatch)


@pytest.mark.parametrize(("vision", "size", "near"), [
    (VIT, 36, "patches of 8 pixels, and image size 36 is not whole patches; take 32 or 40"),
    (VIT, (32, 36), "image size 32x36 is not whole patches; take 32 or 32x40"),
    (TOWER, 100, "patches of 16 pixels, and image size 100 is not whole patches; take 96 or 112"),
    (CONV, 101, "patches of 4 pixels, and image size 101 is not whole patches; take 100 or 104"),
])  # fmt: skip
def test_a_size_that_is_asked_for_is_whole_patches(publish, tmp_path, vision, size, near):
    name, weights = publish(vision, tags=("plain",))
    write_json(tmp_path / "open_clip_config.json", {"model_cfg": open_clip.get_model_config(name)})
    for given in ((name, "plain"), (name, weights), (f"local-dir:{tmp_path}", weights)):
        with pytest.raises(ValueError, match=near):
            clipsteer.load(*given, image_size=size)
        with pytest.raises(ValueError, match=near):
            clipsteer.load(*given, preprocess={"size": size})


@pytest.mark.parametrize(("name", "near"), [("test_vit", "96 or 112"), ("test_convnext", "100 or 104")])
def test_so_it_is_with_timm(name, near):
    with pytest.raises(ValueError, match=f"timm:{name} divides .* image size 101 is not whole patches; take {near}"):
        clipsteer.load(f"timm:{name}", "random", image_size=101)
    with pytest.raises(ValueError, match=r"image size 3x101 is not whole patches; take (16x112|4x104)$"):
        clipsteer.load(f"timm:{name}", "random", image_size=(3, 101))
    with pytest.raises(ValueError, match=near):
        clipsteer.load(f"timm:{name}", "random", preprocess={"input_size": (3, 101, 101)})


@pytest.mark.parametrize("kind", ["Dinov2", "Siglip2Vision", "SiglipVision", "CLIPVision"])
def test_so_it_is_with_transformers(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
             "patch_size": 14}  # fmt: skip
    grid = {"num_patches": 4} if kind == "Siglip2Vision" else {"image_size": 28}
    config = getattr(transformers, f"{kind}Config")(**sizes, **grid)
    given = getattr(transformers, f"{kind}Model")(config)
    assert patch_of(given) == (14, 14)
    with pytest.raises(ValueError, match="patches of 14 pixels, and image size 100 is not whole patches; take 98 or"):
        clipsteer.load(given, image_size=100)
    assert clipsteer.load(given, image_size=98).setup.image_size == (98, 98)


def test_a_size_that_a_model_has_is_kept(publish):
    """Some are published with images of 384 pixels in patches of 14."""
    name, weights = publish(ODD, tags=("plain",))
    assert clipsteer.load(name, weights).setup.image_size == (36, 36)
    assert clipsteer.load(name, weights, image_size=36).setup.image_size == (36, 36)
    name = "timm:vit_tiny_patch16_224"
    setup = clipsteer.load(name, "random", image_size=96).setup
    odd = Setup({**setup.preprocess, "input_size": (3, 100, 100)}).to_json()
    again = clip.load_origin({"clip_model": name, "pretrained": "random", "setup": odd})
    assert again.setup.image_size == (100, 100)


def test_what_was_written_with_such_a_size_opens(publish, tmp_path):
    name, weights = publish(VIT, tags=("plain",))
    loaded = clipsteer.load(name, weights)
    odd = Setup({**loaded.setup.preprocess, "size": (36, 36)}, loaded.setup.quick_gelu)
    write_safetensors(tmp_path / "odd.safetensors", loaded.model.state_dict(), header_of(odd))
    for asked in (None, 36):
        assert clipsteer.load(name, tmp_path / "odd.safetensors", image_size=asked).setup.image_size == (36, 36)
    with pytest.raises(ValueError, match="take 40 or 48"):
        clipsteer.load(name, tmp_path / "odd.safetensors", image_size=44)


def test_what_pads_or_overlaps_takes_any_size(publish):
    assert patch_of(timm.create_model("test_vit", dynamic_img_pad=True)) is None
    assert patch_of(nn.Conv2d(3, 8, 4, 4, padding=1)) is None
    assert patch_of(nn.Conv2d(3, 8, 4, 2)) is None
    assert patch_of(nn.Conv2d(3, 8, (4, 2), (4, 2))) == (4, 2)
    name, weights = publish(RESNET, tags=("plain",))
    assert patch_of(clipsteer.load(name, weights).model.visual) is None


def test_a_description_of_such_a_size_is_warned_of(tmp_path, caplog):
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    (tmp_path / "odd-sides.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": ODD, "text_cfg": text}))
    clipsteer.load(tmp_path / "odd-sides.json")
    said = [r.getMessage() for r in caplog.records if "whole patches" in r.getMessage()]
    assert len(said) == 1
    assert "images of 36 pixels are not whole patches of 8: the last 4 are seen by none" in said[0]


def test_commands_say_so(capsys, tmp_path):
    args = ("sae", "train", "--model", "timm:test_vit", "--pretrained", "random", "--out", tmp_path / "out")
    code, _, err = run(capsys, *args, "--image-size", "100")
    assert code != 0
    assert "patches of 16 pixels, and image size 100 is not whole patches; take 96 or 112" in err
