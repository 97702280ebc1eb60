"""Where a model's patches lie on the picture: beside what the preprocessing does to marked pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageDraw
from torchvision import transforms

from clipsteer.clip.pixels import from_any_mode
from clipsteer.clip.seen import Box, seen_box
from clipsteer.data.dataset import ImageDataset
from clipsteer.demo import features
from clipsteer.demo.explore import Feature, Predictor
from clipsteer.demo.pictures import Pictures
from clipsteer.report import heat_overlay

MODES = ("shortest", "longest", "squash")
SIZES = [(640, 240), (240, 640), (33, 500), (64, 64), (20, 10), (501, 333)]


def open_clips(mode, size=64):
    return image_transform_v2(PreprocessCfg(size=size, resize_mode=mode, mean=(0,) * 3, std=(1,) * 3), is_train=False)


def timms(mode, share):
    from timm.data import create_transform

    return create_transform((3, 64, 64), crop_mode=mode, crop_pct=share, mean=(0,) * 3, std=(1,) * 3)


TRANSFORMS = {
    **{f"{mode} {size}": open_clips(mode, size) for mode in MODES for size in (64, (64, 32))},
    **{f"timm {mode}": timms(mode, 0.875) for mode in ("center", "squash", "border")},
    "any mode": from_any_mode(open_clips("shortest")),
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_box_is_where_marked_pixels_come_from(name, size):
    """The model's pixel at a share of its square shows the picture at that share of the box."""
    transform = TRANSFORMS[name]
    box = seen_box(transform, size)
    for axis, (low, high) in enumerate(((box.left, box.right), (box.top, box.bottom))):
        length = size[axis]
        ramp = (np.arange(length) + 0.5) / length  # the value of a pixel is its place
        rows = np.broadcast_to(ramp if axis == 0 else ramp[:, None], size[::-1])
        grey = Image.fromarray((rows * 254 + 1).round().astype(np.uint8)).convert("RGB")
        pixels = np.asarray(transform(grey))[0]  # (H, W)
        line = pixels[len(pixels) // 2] if axis == 0 else pixels[:, pixels.shape[1] // 2]
        places = low + (np.arange(len(line)) + 0.5) / len(line) * (high - low)
        inside = (places > 0.1) & (places < 0.9)
        assert inside.any()
        # half a pixel of the model's and of the picture's, and the rounding of a value and of a size
        slack = 0.75 * (high - low) / len(line) + 1 / length + 2 / 255
        assert np.abs((line[inside] * 255 - 1) / 254 - places[inside]).max() <= slack


def test_every_way_of_resizing():
    wide = (640, 240)
    assert seen_box(open_clips("shortest"), wide) == pytest.approx((200 / 640, 0, 440 / 640, 1), abs=0.005)
    assert seen_box(open_clips("longest"), wide) == pytest.approx((0, -200 / 240, 1, 440 / 240), abs=0.02)
    assert seen_box(open_clips("squash"), wide) == Box(0, 0, 1, 1)
    assert seen_box(timms("center", 0.5), (64, 64)) == Box(0.25, 0.25, 0.75, 0.75)


def test_a_step_that_nobody_knows_gives_no_box():
    assert seen_box(transforms.Compose([transforms.RandomResizedCrop(64), transforms.ToTensor()]), (64, 64)) is None
    assert seen_box(lambda image: image, (64, 64)) is None


# the glow


def blue_at_200():
    picture = Image.new("RGB", (640, 240), "white")
    ImageDraw.Draw(picture).rectangle((200, 90, 259, 149), fill=(0, 0, 255))
    return picture


def orange(overlay):
    """(H, W) how much more red than blue a pixel is."""
    pixels = np.asarray(overlay).astype(int)
    return pixels[..., 0] - pixels[..., 2]


def test_the_glow_lies_where_the_patch_was_and_the_rest_is_grey():
    """Of 640 × 240 the model sees x from 200 to 440; the first of two patches is 200 to 320."""
    picture = blue_at_200()
    seen = seen_box(open_clips("shortest"), picture.size)
    overlay = heat_overlay(picture, [[1.0, 0.0]], size=640, seen=seen)
    glow = orange(overlay)[10:60]  # beside the square
    assert glow[:, 205:255].min() > 60
    assert np.abs(glow[:, :195]).max() == 0
    assert np.abs(glow[:, 390:]).max() == 0
    shown = np.asarray(overlay).astype(int)
    assert (shown[10:60, 380:435] > 240).all()  # seen, and without heat
    assert (shown[:, [*range(195), *range(445, 640)]] < 200).all()  # not seen: white no more
    # over all of the picture the glow would lie where nothing was found
    whole = orange(heat_overlay(picture, [[1.0, 0.0]], size=640))[10:60]
    assert whole[:, :195].min() > 60


def test_the_glow_of_padding_is_not_shown():
    picture = blue_at_200()
    seen = seen_box(open_clips("longest"), picture.size)
    hot = np.zeros((8, 8))
    hot[0] = 1  # the padding above
    assert orange(heat_overlay(picture, hot, size=64, seen=seen))[16:].max() <= 0
    hot = np.zeros((8, 8))
    hot[3:5, :3] = 1  # the middle rows are the picture's
    assert orange(heat_overlay(picture, hot, size=64, seen=seen))[24:40, 2:16].min() > 60
    line = Image.new("RGB", (6000, 60), "white")  # nearly all of the grid lies outside
    overlay = heat_overlay(line, np.ones((7, 7)), size=64, seen=seen_box(open_clips("longest"), line.size))
    assert orange(overlay).min() > 60
    with pytest.raises(ValueError, match="of a part of the picture"):
        heat_overlay(picture, hot, seen=(1.2, 0, 1.5, 1))


def test_the_demo_draws_it_so(monkeypatch):
    """The demo's own function, with a model that crops the centre."""
    picture = blue_at_200()
    pictures = Pictures(ImageDataset(lambda _: picture, [0]), {}, [0], ["x"], None, None, [], [])
    grid = np.array([[1.0, 0.0], [1.0, 0.0]])

    class Clip:
        preprocess = staticmethod(open_clips("shortest"))

    class Plain:
        def before_patches(self, count):
            return 0

    predictor = object.__new__(Predictor)
    predictor.clip, predictor.sae, predictor.hook_point = Clip(), None, "x"
    monkeypatch.setattr(features, "layout_at", lambda *_: Plain())
    monkeypatch.setattr(features, "feature_heat", lambda *_: torch.tensor(grid))
    feature = Feature(0, 1.0, 1.0, [0], [("x", 1.0)])
    overlay = features._heat(predictor, pictures, torch.zeros(1, 4, 8), feature, 0)
    shown = orange(overlay.resize((640, 240)))[10:60]
    assert shown[:, 210:250].min() > 60
    assert np.abs(shown[:, :180]).max() < 5
    Clip.preprocess = staticmethod(lambda image: image)  # nobody knows where: no glow at a wrong place
    assert orange(features._heat(predictor, pictures, torch.zeros(1, 4, 8), feature, 0)).max() <= 5
