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

from clipsteer import SAE, Conceptor, SAESteering, demo, report, steer
from clipsteer.clip.model import load
from clipsteer.clip.zero_shot import SIMPLE_TEMPLATES, zero_shot_head
from clipsteer.data.dataset import ImageDataset
from clipsteer.data.emoji import EmojiStyles, Split, split
from clipsteer.demo import conceptors as demo_conceptors
from clipsteer.demo import explore
from clipsteer.demo import pictures as demo_pictures
from clipsteer.demo import reference as demo_reference
from clipsteer.demo import sections as demo_sections
from clipsteer.demo import wise_ft as demo_wise_ft
from clipsteer.sae.features import feature_peaks

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
    assert result.page.read_text(encoding="utf-8").count("<section>") == 8
    figures = json.loads(result.metrics.read_text())
    assert figures["model"]["hook_point"] == "visual.transformer.resblocks.1"
    assert [row["images"] for row in figures["zero_shot"]] == [33, 9]
    assert all(3 in map(int, row["ways"]) for row in figures["zero_shot"])
    for row in figures["sae"]["evaluation"].values():
        assert 0 < row["ev"] < 1
        assert row["l0"] <= figures["sae"]["k"]
    assert figures["steering"]["probed"] >= len(figures["steering"]["features"]) >= 1
    assert result.lines()


def test_an_sae_that_there_is_and_words_of_ones_own(finished, tiny_model, tmp_path):
    (first, _), options = finished
    words = ["a ball", "a crate", "paint"]
    more = {**options, "model": tiny_model[0], "sae": first.sae, "words": words}
    result = demo.run(tmp_path / "out", **more)
    assert result.sae == first.sae
    assert not (tmp_path / "out" / "sae").exists()
    found, before = (json.loads(run.metrics.read_text()) for run in (result, first))
    assert {**found["sae"], "evaluation": None} == {**before["sae"], "evaluation": None}
    assert [*found["sae"]["evaluation"].values()] == [*before["sae"]["evaluation"].values()]
    # predictions are among the three classes as before, features are named in the words
    assert (found["vocabulary"], found["words"]) == (3, 3)
    assert (before["vocabulary"], before["words"]) == (3, 303)
    named = {name for feature in found["steering"]["features"] for name, _ in feature["looks_like"]}
    assert named
    assert named <= set(words)
    pushed = {name for feature in found["steering"]["features"] for name, _ in feature["effect"]}
    assert pushed <= {"red disc", "blue box", "green disc"}
    page = result.page.read_text(encoding="utf-8")
    assert "trained before" in page
    assert f"from_pretrained({str(first.sae)!r})" in html.unescape(page)
    # whether it has seen them nobody knows
    assert "held-out images" not in found["sae"]["evaluation"]
    # the file and the truth of each picture
    assert re.search(r"[✓✗] (red disc|blue box|green disc) · \d+\.png", page)
    with pytest.raises(ValueError, match=r"no.such.*matches 0"):
        demo.run(tmp_path / "no", **{**more, "hook_point": "visual.no.such"})


def test_a_new_folder_is_made_where_nothing_else_makes_it(finished, image_folder, tmp_path):
    """With an SAE that there is and images without classes the figures are the first file."""
    (first, _), options = finished
    (tmp_path / "flat").mkdir()
    for i, path in enumerate(sorted(image_folder.rglob("*.png"))[::2]):
        shutil.copy(path, tmp_path / "flat" / f"{i}.png")
    more = {**options, "data": tmp_path / "flat", "sae": first.sae, "words": ["red", "blue", "green"]}
    result = demo.run(tmp_path / "deep" / "out", **more)
    assert {path.name for path in result.page.parent.iterdir()} == {"metrics.json", "report.html"}


def test_what_one_picture_loses_of_its_own_name_is_no_effect():
    one = explore.Feature(3, 1.0, 0.1, [0], [])

    class Predictor:
        sae = clip = hook_point = None
        tokens = "all"
        head = torch.eye(3)
        of = staticmethod(lambda embeddings: embeddings)

    clean = torch.tensor([[0.9, 0.05, 0.05], [0.05, 0.5, 0.45], [0.05, 0.5, 0.45]])
    change = torch.tensor([[-0.3, 0.6, -0.3]])
    pictures = demo_pictures.Pictures(ImageDataset(None, [""] * 3), {}, [], [], None, None, ["a", "b", "c"], [])
    with pytest.MonkeyPatch.context() as patch:
        found = type("Found", (), {"change": change, "score": change.square().sum(1)})
        patch.setattr(explore, "steerability", lambda *args, **options: found)
        explore.probe(Predictor(), pictures, clean, [0, 1, 2], [one], 5.0)
    # "a" is lost by the first picture alone, "c" by two
    assert [name for name, _ in one.effect] == ["b", "c"]
    assert one.steerability == pytest.approx(0.54)


def test_a_tower_without_text_predicts_among_the_means_of_classes(image_folder, tmp_path):
    options = {"model": "timm:test_vit", "pretrained": "random", "data": image_folder, "minutes": 0.002}
    result = demo.run(tmp_path / "out", **options)
    found, page = json.loads(result.metrics.read_text()), result.page.read_text(encoding="utf-8")
    assert found["named_by"] == "class means"
    assert found["vocabulary"] == 3
    assert "Zero-shot" not in page
    assert "nearest class mean" in page
    assert "of a linear probe" in page
    # discs and boxes in three colours are told apart by any network
    assert found["zero_shot"][0]["ways"]["3"]["accuracy"] > 0.8
    assert any("nearest class mean" in line for line in result.lines())
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted(image_folder.glob("*/*.png"))):
        (flat / f"{i}.png").write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="no text tower"):
        demo.run(tmp_path / "other", **{**options, "data": flat})


def test_the_same_seed_gives_the_same_bytes(finished):
    (first, second), _ = finished
    assert first.metrics.read_bytes() == second.metrics.read_bytes()
    pages = [result.page.read_text(encoding="utf-8") for result in (first, second)]
    # the page names the folder that its snippets load from
    assert pages[0] == pages[1].replace(str(second.page.parent), str(first.page.parent))
    for name in ("sae/model.safetensors", "conceptors.safetensors"):
        assert (first.page.parent / name).read_bytes() == (second.page.parent / name).read_bytes()


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
    pictures = demo_pictures.folder_pictures(options["data"], 0, 1000)
    head = zero_shot_head(clip, pictures.vocabulary, SIMPLE_TEMPLATES)
    images = [pictures.dataset[i][0] for i in figures["steering"]["probe_rows"]]
    feature = figures["steering"]["features"][0]
    target = pictures.vocabulary.index(feature["response"]["target"])
    multiple = feature["response"]["multiples"][-2]
    steering = SAESteering(sae, {feature["index"]: multiple * feature["peak"]})
    with steer(clip, {sae.metadata["hook_point"]: steering}):
        p = (100 * clip.encode_images(images) @ head.T).softmax(-1)
    assert float(p[:, target].mean()) == pytest.approx(feature["response"]["probability"][-2], rel=1e-3)


def test_the_pages_snippet_runs(finished):
    (result, _), _ = finished
    sources = re.findall("<pre><code>(.*?)</code></pre>", result.page.read_text(encoding="utf-8"), re.DOTALL)
    conceptors, names = {}, {}
    exec(html.unescape(sources[0]), conceptors)
    assert 0 < float(conceptors["steering"].conceptor.quota) < float(conceptors["conceptors"].quota.max())
    (source,) = sources[1:]
    exec(html.unescape(source), names)
    feature = json.loads(result.metrics.read_text())["steering"]["features"][0]
    assert names["steering"].strengths == {feature["index"]: pytest.approx(5 * feature["peak"], abs=0.06)}
    assert names["embeddings"].shape == (8, TINY["embed_dim"])
    assert not torch.allclose(names["embeddings"], names["clip"].encode_images(names["images"]))


def test_conceptors_steer_as_the_metrics_say(finished):
    """From the saved file, with a plain hook and no ops: the recorded probabilities come out again."""
    (result, _), options = finished
    figures = json.loads(result.metrics.read_text())["conceptors"]
    clip = load(options["model"], options["pretrained"])
    saved = Conceptor.load(result.page.parent / "conceptors.safetensors")
    assert json.loads(saved.metadata["names"]) == ["blue box", "green disc", "red disc"]
    pictures = demo_pictures.folder_pictures(options["data"], 0, 1000)
    assert figures["minus"] == "others"
    assert figures["steered_images"] == figures["held_out"] == len(pictures.held_out) == 9
    head = zero_shot_head(clip, pictures.vocabulary, SIMPLE_TEMPLATES)
    images = [pictures.dataset[i][0] for i in pictures.held_out]
    module = clip.model.get_submodule(saved.metadata["hook_point"])
    for k, row in enumerate(figures["conceptors"]):
        own = saved.matrix[k].float()
        for way, matrix in (("itself", own), ("not", torch.eye(32) - own)):
            hook = module.register_forward_hook(lambda _, __, out, m=matrix: out @ m)
            p = (100 * clip.encode_images(images) @ head.T).softmax(-1)
            hook.remove()
            torch.testing.assert_close(p[:, :3].mean(0), torch.tensor(row["effect"][way]["mass"]), rtol=1e-3, atol=1e-5)
        assert row["quota"] == pytest.approx(float(saved.matrix[k].trace()) / 32)
        assert [r for _, r in row["most"]] == sorted((r for _, r in row["most"]), reverse=True)
        assert row["most"][0][1] >= row["least"][0][1]
    for example in figures["examples"]["not"]:
        assert pictures.truth[example["row"]] == figures["shown"]


def test_conceptors_tell_apart_what_differs_and_see_no_held_out_image():
    """Two kinds on different axes; a held-out token on neither axis changes nothing in the fit."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.zeros(24, 5, 6)
    kind = torch.arange(24) % 2
    for i in range(24):
        tokens[i, :, 3 * int(kind[i]) : 3 * int(kind[i]) + 3] = torch.randn(5, 3, generator=generator)
    kinds = demo_conceptors.Kinds("class", ["a", "b"], kind, torch.tensor([0, 1]), [])
    train = list(range(16))
    fitted = demo_conceptors.fit(tokens, kinds, train)
    share = torch.stack([demo_conceptors.kept_share(fitted.own[k], tokens[16:]) for k in range(2)], 1)
    assert (share.argmax(1) == kind[16:]).all()
    assert float(share.amin(1).max()) < 1e-10
    both = fitted.own[0] & ~fitted.minus[0]
    torch.testing.assert_close(both.matrix, fitted.own[0].matrix)  # nothing of b is in a
    uneven = demo_conceptors.Kinds(
        "class", ["a", "b", "c"], torch.tensor([0, 0, 0, 1, 2, 2, 2, 2]), torch.arange(3), []
    )
    random = torch.randn(8, 5, 6, generator=generator)
    minus = demo_conceptors.fit(random, uneven, range(8)).minus[2]
    torch.testing.assert_close(minus.matrix, Conceptor.fit(random[:4], minus.aperture).matrix)
    tokens[16:] = 100.0
    assert torch.equal(demo_conceptors.fit(tokens, kinds, train).own.matrix, fitted.own.matrix)
    # α is relative, so that the unit of the activations drops out
    torch.testing.assert_close(demo_conceptors.fit(tokens * 7, kinds, train).own.matrix, fitted.own.matrix)


def test_the_kinds_of_the_drawings_are_their_categories():
    pictures = demo_pictures.emoji_pictures(400)
    kinds = demo_conceptors.kinds_of(pictures, True)
    assert kinds.names == ["activities", "animals & nature", "food & drink", "objects", "travel & places"]
    assert kinds.of_image.tolist() == kinds.of_text[pictures.truth].tolist()
    assert kinds.pairs
    for a, b in kinds.pairs:
        assert pictures.truth[a] == pictures.truth[b]
        assert pictures.names[a] != pictures.names[b]
        assert {a, b} <= set(pictures.train)


def test_without_a_few_classes_the_conceptor_section_says_so():
    dataset = ImageDataset(lambda i: None, [0] * 40)
    groups = {"train": list(range(30)), "held-out": list(range(30, 40))}
    make = lambda classes, truth: demo_pictures.Pictures(
        dataset, groups, groups["train"], [""] * 40, classes, truth, ["x"] * 40, ["x"]
    )
    assert "no classes" in demo_conceptors.kinds_of(make(None, None), False)
    many = demo_conceptors.kinds_of(make([str(i) for i in range(10)], torch.arange(40) % 10), False)
    assert "2 to 8 classes" in many
    assert "there are 10" in many
    assert many in "".join(demo_sections.conceptors(None, {"skipped": many}, "", Path()))
    # a class of two training images is left out, and its images are nobody's
    truth = torch.tensor([2, 2] + [i % 2 for i in range(36)] + [2, 2])
    kinds = demo_conceptors.kinds_of(make(["a", "b", "c"], truth), False)
    assert kinds.names == ["a", "b"]
    assert kinds.of_image.tolist() == [-1, -1, *truth[2:38].tolist(), -1, -1]
    assert kinds.of_text.tolist() == [0, 1] + [-1] * 38


def test_the_reference_curves_are_committed_ones_and_say_so():
    means = json.loads(demo_reference.PLACE.read_text())
    markup = "".join(demo_reference.section())
    assert "not measured for this page" in markup
    assert f"{len(means['seeds'])} seeds of {means['date']}" in markup
    for title in demo_reference.SHOWN:
        lines = means["metrics"][title]
        assert all(len(values) == len(means["samples"]) for values in lines.values())
        for name, values in lines.items():
            assert f"{name}: {report.number(100 * values[-1])}" in markup
            assert all(0 <= v <= 1 for v in values)


def test_wise_ft_section_shows_its_rows():
    """Two concepts a class to tune on and one to test, one epoch: what the demo does, in little."""
    whole, concepts = split(), EmojiStyles().concepts
    few = lambda indices, n: [i for j, i in enumerate(indices) if sum(
        concepts[i].subcategory == concepts[k].subcategory for k in indices[:j]) < n]  # fmt: skip
    parts = Split(few(whole.fit, 2), [], few(whole.test, 1))
    found = demo_wise_ft.measure(3, parts=parts, epochs=1, alphas=(0.5,))
    assert found == demo_wise_ft.measure(3, parts=parts, epochs=1, alphas=(0.5,))
    rows = found["rows"]
    assert [r["set"] for r in rows[:3]] == ["twemoji", "noto", "fluent"]
    assert {(r["method"], r["alpha"]) for r in rows} == {(m, a) for m in ("weight", "output") for a in (0.0, 0.5, 1.0)}
    assert {(r["set"], r["n"]) for r in rows} == {("twemoji", 30), ("noto", 30), ("fluent", 29)}  # it lacks one
    markup = "".join(demo_sections.wise_ft(found))
    for r in rows[:9]:
        assert f"{100 * r['accuracy']:.1f} ({100 * r['low']:.1f}–{100 * r['high']:.1f})" in markup
    assert "one fine-tuning seed (3)" in markup
    better = [{**r, "accuracy": 0.9, "balanced": 0.2 if r["role"] == "shifted" else 0.9} if r["alpha"] == 0.5
              else {**r, "accuracy": 0.4, "balanced": 0.3} for r in rows]  # fmt: skip
    verdict = demo_sections._verdict(better)
    assert "by accuracy 1 of the 1 averages" in verdict
    assert "(the mean over classes) 0 of the 1" in verdict


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
    far = {**row, "ce_clean": 1.2, "ce_recovered": 0.35}
    found = {"sae": {"evaluation": {"near": row, "far": far}}, "named_by": "text"}
    history = [{"step": s, "fvu": 0.5, "dead": 0.0} for s in (1, 2)]
    markup = "".join(map(str, demo_sections.training(SAE(8, 16, k=2), found, history)))
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
    pictures = demo_pictures.emoji_pictures(40)
    assert len(pictures.groups) == 4
    assert sorted(i for rows in pictures.groups.values() for i in rows) == list(range(40))
    assert len(pictures.names) == len(pictures.dataset) == len(pictures.truth) == 40
    assert pictures.classes[pictures.truth[7]] in pictures.names[7]


def test_a_flat_folder_is_explored_without_classes(image_folder):
    flat = demo_pictures.folder_pictures(image_folder / "red_disc", 0, 12)
    assert (flat.classes, flat.truth) == (None, None)
    assert "red disc" not in flat.vocabulary
    assert all(name.endswith(".png") for name in flat.names)
    assert len(set(flat.names)) == len(flat.names) == 12
    sorted_ = demo_pictures.folder_pictures(image_folder, 0, 30)
    assert sorted_.classes == sorted_.vocabulary[:3] == ["blue box", "green disc", "red disc"]


def test_augmented_pictures_keep_size_and_depend_on_the_generator_alone():
    image = Image.new("RGB", (24, 16), (200, 10, 10))
    make = lambda seed: np.asarray(demo_pictures.augmented(image, torch.Generator().manual_seed(seed)))
    assert make(0).shape == (16, 24, 3)
    assert (make(0) == make(0)).all()
    assert (make(0) != make(1)).any()


def test_mistakes_are_explained(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="minutes"):
        demo.run(tmp_path, minutes=0)
    with pytest.raises(ValueError, match="max_images"):
        demo.run(tmp_path, max_images=3)
    with pytest.raises(ValueError, match=r"timm:test_vit has no text tower; .* pass --data, a folder CLASS/"):
        demo.run(tmp_path, model="timm:test_vit", pretrained="random")
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    with pytest.raises(ValueError, match="at least 10 images, got 1"):
        demo.run(tmp_path, model=tiny_model[0], pretrained=tiny_model[1], data=tmp_path)
