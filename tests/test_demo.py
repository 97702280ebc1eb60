from __future__ import annotations

import html
import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from clipsteer import SAE, SAESteering, demo, demo_page, explore, steer
from clipsteer.clip import load
from clipsteer.sae_features import feature_peaks

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """The name of an open_clip architecture with random weights, and a file of weights for it."""
    import open_clip
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("configs")
    (folder / "ViT-tiny-for-tests.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder / "ViT-tiny-for-tests.json")
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-tiny-for-tests")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "weights.safetensors")
    return "ViT-tiny-for-tests", str(folder / "weights.safetensors")


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    random = np.random.RandomState(0)
    for name, colour in (("red_disc", (220, 30, 20)), ("blue_box", (20, 60, 210)), ("green_disc", (10, 160, 60))):
        (root / name).mkdir()
        for i in range(14):
            image = Image.new("RGB", (48, 40), tuple(random.randint(200, 256, 3).tolist()))
            x, y = random.randint(0, 20, 2).tolist()
            draw = ImageDraw.Draw(image)
            (draw.rectangle if "box" in name else draw.ellipse)((x, y, x + 20, y + 18), fill=colour)
            image.save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def finished(tiny_model, image_folder, tmp_path_factory):
    name, weights = tiny_model
    options = {"model": name, "pretrained": weights, "data": image_folder, "minutes": 0.002}
    outs = [tmp_path_factory.mktemp(f"run{i}") for i in range(2)]
    return [demo.run(out, **options, seed=seed) for out, seed in zip(outs, (0, 0))], options


def test_demo_runs_on_a_users_model_and_images(finished):
    (result, _), options = finished
    assert result.page.read_text(encoding="utf-8").count("<section>") == 5
    figures = json.loads(result.metrics.read_text())
    assert figures["model"]["hook_point"] == "visual.transformer.resblocks.1"
    assert [row["images"] for row in figures["zero_shot"]] == [33, 9]
    assert all(3 in map(int, row["ways"]) for row in figures["zero_shot"])
    for row in figures["sae"]["evaluation"].values():
        assert 0 < row["ev"] < 1
        assert row["l0"] <= figures["sae"]["k"]
    assert figures["steering"]["probed"] >= len(figures["steering"]["features"]) >= 1
    assert result.lines()


def test_the_same_seed_gives_the_same_bytes(finished):
    (first, second), _ = finished
    assert first.metrics.read_bytes() == second.metrics.read_bytes()
    pages = [result.page.read_text(encoding="utf-8") for result in (first, second)]
    # the page names the folder that its snippet loads the SAE from
    assert pages[0] == pages[1].replace(str(second.sae), str(first.sae))
    name = "model.safetensors"
    assert (first.sae / name).read_bytes() == (second.sae / name).read_bytes()


def test_the_page_shows_what_the_metrics_say(finished):
    (result, _), _ = finished
    markup = result.page.read_text(encoding="utf-8")
    figures = json.loads(result.metrics.read_text())
    for feature in figures["steering"]["features"]:
        assert f"Feature {feature['index']}: " in markup
    assert f"{figures['steering']['steerable']} of {figures['steering']['probed']}" in markup
    assert len(re.findall("<img ", markup)) > 10
    assert not re.search(r"<script|https?://", markup)


def test_the_saved_sae_steers_as_the_metrics_say(finished):
    """From the saved files alone: the recorded response of a feature comes out again."""
    (result, _), options = finished
    figures = json.loads(result.metrics.read_text())
    clip, sae = load(options["model"], options["pretrained"]), SAE.from_pretrained(result.sae)
    assert sae.metadata["hook_point"] == figures["model"]["hook_point"]
    pictures = explore.folder_pictures(options["data"], 0, 1000)
    head = demo.zero_shot_head(clip, pictures.vocabulary, demo.SIMPLE_TEMPLATES)
    images = [pictures.dataset[i][0] for i in figures["steering"]["probe_rows"]]
    feature = figures["steering"]["features"][0]
    target = pictures.vocabulary.index(feature["response"]["target"])
    multiple = feature["response"]["multiples"][-2]
    steering = SAESteering(sae, {feature["index"]: multiple * feature["peak"]})
    with steer(clip.model, {sae.metadata["hook_point"]: steering}):
        p = (100 * clip.encode_images(images) @ head.T).softmax(-1)
    assert float(p[:, target].mean()) == pytest.approx(feature["response"]["probability"][-2], rel=1e-3)


def test_the_pages_snippet_runs(finished):
    (result, _), _ = finished
    (source,) = re.findall("<pre><code>(.*?)</code></pre>", result.page.read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    exec(html.unescape(source), names)
    feature = json.loads(result.metrics.read_text())["steering"]["features"][0]
    assert names["steering"].strengths == {feature["index"]: pytest.approx(5 * feature["peak"], abs=0.06)}
    assert names["embeddings"].shape == (8, TINY["embed_dim"])
    assert not torch.allclose(names["embeddings"], names["clip"].encode_images(names["images"]))


def test_the_readmes_steering_example_runs(finished):
    """Its own lines, with a model, an SAE and images that are here."""
    (result, _), options = finished
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"## Steer a CLIP\n```python\n(.*?)```", readme, re.DOTALL)
    hook = SAE.from_pretrained(result.sae).metadata["hook_point"]
    for there, here in (
        ('"ViT-B-32", "laion2b_s34b_b79k"', f"{options['model']!r}, {options['pretrained']!r}"),
        ('"visual.transformer.resblocks.9"', repr(hook)),
        ('"path/to/sae"', repr(str(result.sae))),
        ('"path/to/photos"', repr(str(options["data"]))),
    ):
        assert source.count(there) == 1
        source = source.replace(there, here)
    names: dict = {}
    exec(source.replace("print(", "shown = ("), names)
    assert names["shown"].shape == (42, 3)
    assert not torch.allclose(names["features"], names["model"].encode_images(names["images"]))


@pytest.mark.parametrize("count", [10, 16, 39])
def test_a_handful_of_images_is_enough(tiny_model, image_folder, tmp_path, count):
    for i, path in enumerate(sorted(image_folder.rglob("*.png"))[::-1][:count]):
        (tmp_path / "few" / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "few" / path.parent.name / f"{i}.png")
    name, weights = tiny_model
    result = demo.run(tmp_path / "out", model=name, pretrained=weights, data=tmp_path / "few", minutes=0.002)
    figures = json.loads(result.metrics.read_text())
    assert figures["data"]["images"] == count
    least, most = figures["steering"]["active_on"]
    assert 2 <= least <= most < count / 4
    for feature in figures["steering"]["features"]:
        assert least <= round(feature["density"] * count) <= most
        assert len(feature["top"]) == least
    assert f"active on {least} to {most} of the images" in result.page.read_text(encoding="utf-8")


def test_many_images_ask_for_six():
    assert [explore.few(n) for n in (120, 1000)] == [(6, 18), (6, 150)]


def test_steps_follow_the_minutes_and_wide_models_get_enough():
    narrow, wide = demo.steps_in(1.0, 1024, 192), demo.steps_in(1.0, 1024, 768)
    assert narrow > wide == 800
    assert demo.steps_in(2.0, 1024, 768) == 1600
    assert demo.steps_in(0.001, 1024, 192) == 50


def test_ce_recovered_is_shown_only_where_there_is_something_to_recover():
    row = {"ce_clean": 3.0, "ce_sae": 2.5, "ce_zero": 3.2, "ce_recovered": 3.5, "top1_clean": 0.1, "top1_sae": 0.1,
           "top1_zero": 0.1, "images": 7, "ev": 0.5, "l0": 3.0, "dead": 0.0}  # fmt: skip
    found = {"sae": {"evaluation": {"near": row, "far": {**row, "ce_clean": 1.2, "ce_recovered": 0.35}}}}
    history = [{"step": s, "fvu": 0.5, "dead": 0.0} for s in (1, 2)]
    markup = "".join(map(str, demo_page._training(SAE(8, 16, k=2), found, history)))
    assert "350.0" not in markup
    assert "35.0" in markup


def test_n_way_is_the_mean_over_all_draws():
    generator = torch.Generator().manual_seed(0)
    scores, truth = torch.rand(5, 7, generator=generator), torch.tensor([0, 3, 6, 2, 2])
    scores[3, 5] = scores[3, 2]  # a tie counts as lost
    for ways in (2, 3, 7):
        expected = []
        for row, t in zip(scores, truth.tolist()):
            others = [i for i in range(7) if i != t]
            draws = list(itertools.combinations(others, ways - 1))
            expected.append(sum(all(row[t] > row[i] for i in draw) for draw in draws) / len(draws))
        torch.testing.assert_close(explore.n_way(scores, truth, ways), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("architecture", ["topk", "relu"])
def test_feature_peaks_are_the_largest_dense_activations(architecture):
    torch.manual_seed(0)
    sae = SAE(8, 20, architecture, k=3).eval()
    tokens = torch.randn(5, 4, 8)
    with torch.no_grad():
        torch.testing.assert_close(feature_peaks(sae, tokens), sae.encode(tokens).amax(1))
        heat = explore.feature_heat(sae, torch.cat([torch.zeros(1, 8), tokens[0]]), 3, prefix=1)
        torch.testing.assert_close(heat, sae.encode(tokens[0])[:, 3].reshape(2, 2))
    assert explore.feature_heat(sae, tokens[0, :3], 3, prefix=0) is None


def test_emoji_pictures_are_the_four_cells():
    pictures = explore.emoji_pictures(40)
    assert len(pictures.groups) == 4
    assert sorted(i for rows in pictures.groups.values() for i in rows) == list(range(40))
    assert len(pictures.names) == len(pictures.dataset) == len(pictures.truth) == 40
    assert pictures.classes[pictures.truth[7]] in pictures.names[7]


def test_augmented_pictures_keep_size_and_depend_on_the_generator_alone():
    image = Image.new("RGB", (24, 16), (200, 10, 10))
    make = lambda seed: np.asarray(explore.augmented(image, torch.Generator().manual_seed(seed)))
    assert make(0).shape == (16, 24, 3)
    assert (make(0) == make(0)).all()
    assert (make(0) != make(1)).any()


def test_mistakes_are_explained(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="minutes"):
        demo.run(tmp_path, minutes=0)
    with pytest.raises(ValueError, match="max_images"):
        demo.run(tmp_path, max_images=3)
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    with pytest.raises(ValueError, match="at least 10 images, got 1"):
        demo.run(tmp_path, model=tiny_model[0], pretrained=tiny_model[1], data=tmp_path)
