"""The encoder around open_clip and timm towers: blocks, tokens, preprocessing, weights."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from _tiny import encoder, images, pixels
from clipsteer import FileFormatError
from clipsteer.clip.model import load
from clipsteer.clip.pixels import Samples
from clipsteer.continual.backbone import Encoder

TIMM = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def timm_encoder():
    torch.manual_seed(0)
    return Encoder.from_timm(TIMM, "random")


def test_an_open_clip_tower_gives_what_encode_image_gives():
    made, clip = Encoder.open("emojiclip")
    assert made.module is clip.model.visual
    assert made.blocks == [f"transformer.resblocks.{i}" for i in range(6)]
    assert (made.width, made.prefix) == (192, 1)
    x = torch.stack([clip.preprocess(Image.new("RGB", (40, 70), c)) for c in ("red", "white")])
    with torch.no_grad():
        features, cls, patches = made.tokens(x)
        assert torch.equal(features, clip.model.encode_image(x))
        assert torch.equal(features, made(x))
        # what is pooled is the normalised class token
        torch.testing.assert_close(cls @ clip.model.visual.proj, features)
    assert patches.shape == (2, 16, 192)


def test_random_crops_are_for_training_alone():
    made = Encoder.from_clip(load("emojiclip"), crop=0.3)
    image = images(0, 1)[0][0]
    torch.manual_seed(0)
    assert not torch.equal(made.train_transform(image), made.train_transform(image))
    assert torch.equal(made.preprocess(image), made.preprocess(image))


def test_a_timm_vit(timm_encoder):
    assert timm_encoder.blocks == [f"blocks.{i}" for i in range(12)]
    assert (timm_encoder.width, timm_encoder.prefix, timm_encoder.name) == (192, 1, f"timm:{TIMM}")
    x = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        features, cls, patches = timm_encoder.tokens(x)
        assert torch.equal(features, timm_encoder.module(x))
        torch.testing.assert_close(cls, features)
    assert patches.shape == (2, 196, 192)


def test_the_published_recipe_leaves_pixels_between_0_and_1():
    grey = Image.new("RGB", (300, 260), (51, 51, 51))
    plain, unit = (Encoder.from_timm(TIMM, "random", unit_range=u) for u in (False, True))
    torch.testing.assert_close(unit.preprocess(grey), torch.full((3, 224, 224), 0.2))
    torch.testing.assert_close(plain.preprocess(grey), torch.full((3, 224, 224), (0.2 - 0.5) / 0.5))  # timm's own
    crop = unit.train_transform(Image.effect_noise((300, 260), 90).convert("RGB"))
    assert crop.shape == (3, 224, 224)
    assert 0 <= float(crop.min()) < float(crop.max()) <= 1


def test_a_sample_of_a_timm_encoder_is_the_same_for_the_same_key(timm_encoder):
    samples = Samples(images(0, 1), timm_encoder.train_transform)
    first, again, other = (samples[key][0] for key in ((0, 5), (0, 5), (0, 6)))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_weights_come_from_a_file(timm_encoder, tmp_path):
    state = {k: v.contiguous() for k, v in timm_encoder.module.state_dict().items()}
    # a file with a classifier, as timm's own are
    save_file(
        {**state, "head.weight": torch.zeros(1000, 192), "head.bias": torch.zeros(1000)}, tmp_path / "w.safetensors"
    )
    made = Encoder.from_timm(TIMM, tmp_path / "w.safetensors")
    assert all(torch.equal(v, state[k]) for k, v in made.module.state_dict().items())
    del state["norm.weight"]
    save_file(state, tmp_path / "cut.safetensors")
    with pytest.raises(FileFormatError, match=r"norm\.weight"):
        Encoder.from_timm(TIMM, tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match="no model"):
        Encoder.from_timm("vit_of_nobody")


def test_a_clip_with_a_tower_of_timm():
    from open_clip.timm_model import TimmModel

    made = Encoder(TimmModel(TIMM, embed_dim=24, image_size=224, pool="", proj="linear").eval(), pixels)
    assert made.blocks[0] == "trunk.blocks.0"
    x = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        features, cls, patches = made.tokens(x)
        assert torch.equal(features, made(x))
    assert (features.shape, cls.shape, patches.shape) == ((2, 24), (2, 192), (2, 196, 192))


def test_towers_that_cannot_serve_are_refused():
    with pytest.raises(ValueError, match="no transformer blocks"):
        Encoder(nn.Sequential(nn.Conv2d(3, 4, 3)), pixels)
    made = encoder()
    made.prefix = 0
    with pytest.raises(ValueError, match="no class token"):
        made.tokens(torch.rand(1, 3, 32, 32))


def test_registers_alone_are_no_class_token():
    timm = pytest.importorskip("timm")
    tower = timm.create_model("vit_base_patch16_reg4_gap_256", pretrained=False, num_classes=0, img_size=32, depth=2)
    with pytest.raises(ValueError, match="no class token"):
        Encoder(tower, pixels).tokens(torch.rand(1, 3, 32, 32))


def test_features_are_at_least_float32():
    made = encoder().to(torch.bfloat16)
    assert made.dtype == torch.bfloat16
    with torch.no_grad():
        found = made.tokens(torch.rand(2, 3, 32, 32, dtype=torch.bfloat16))
    assert {t.dtype for t in found} == {torch.float32}
