"""Sites of every kind of SAE, tower and data; builds that were stopped; folders that are somebody else's."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch

import _browse as _data
import clipsteer
from _command import run
from clipsteer import SAE
from clipsteer.browse import build_site
from clipsteer.browse.effects import Effects
from clipsteer.browse.explained import Explained
from clipsteer.browse.files import Folder, listed, number
from clipsteer.browse.survey import Survey
from clipsteer.clip.hooks import capture
from clipsteer.clip.zero_shot import zero_shot_head
from clipsteer.sae.evaluate import steerability


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return _data.tower(tmp_path_factory.mktemp("tower"))


def tokens_of(clip, images, hook_point=_data.HOOK):
    pixels = torch.stack([clip.preprocess(images[row][0]) for row in range(len(images))])
    with torch.no_grad(), capture(clip, hook_point) as found:
        clip.embed(pixels)
    return found[hook_point]


@pytest.mark.parametrize("architecture", ["relu", "jumprelu", "batch_topk", "gated"])
@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_every_architecture(tmp_path, clip, architecture, normalize):
    sae = SAE(32, 40, architecture, 4, normalize=normalize, metadata={"hook_point": _data.HOOK, "tokens": "patches"})
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name.startswith("b_") and name != "b_dec":
                parameter.fill_(-0.5)
    images = _data.pictures(9)
    build_site(sae.eval(), clip, images, tmp_path / "site", words=_data.WORDS, steer=3)
    acts = sae.encode(tokens_of(clip, images)[:, 1:])
    overview = _data.read(tmp_path / "site", "overview")
    assert overview["density"] == pytest.approx((acts > 0).float().mean((0, 1)).tolist(), rel=1e-3, abs=1e-6)
    site = _data.read(tmp_path / "site", "site")
    assert (site["prefix"], site["data"]["tokens"], site["sae"]["architecture"]) == (0, 16, architecture)
    assert site["steered"] == min(3, sum(peak > 0 for peak in overview["peak"]))


def test_a_transcoder_writes_where_it_writes(tmp_path, clip):
    """Its features are steered at the target, as ``steerability`` does it."""

    target = "visual.transformer.resblocks.1.mlp"
    known = {"hook_point": "visual.transformer.resblocks.1.ln_2", "target_hook_point": target}
    torch.manual_seed(1)
    sae = SAE(32, 40, "topk", 4, d_out=32, metadata=known).eval()
    with torch.no_grad():
        sae.W_dec.normal_()
    images = _data.pictures(8)
    out = tmp_path / "site"
    build_site(sae, clip, images, out, words=_data.WORDS)
    assert _data.read(out, "site")["model"]["target_hook_point"] == target
    records = [record for record in _data.read(out, "features/0")["features"] if record["steering"]]
    features = [record["index"] for record in records]
    peaks = torch.tensor(_data.read(out, "overview")["peak"])[features]
    head = zero_shot_head(clip, ["red", "blue", "green"], ("a photo of a {}.",))
    shown = images.subset(records[0]["steering"]["images"])
    found = steerability(sae, clip, shown, head, strength=peaks, features=features)
    assert [r["steering"]["score"] for r in records] == pytest.approx(found.score.tolist(), rel=2e-2, abs=1e-6)


def test_a_tower_without_text_knows_classes_by_their_images(tmp_path):
    pytest.importorskip("timm")
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    clip = clipsteer.load("timm:test_vit", "random", image_size=32)
    logging.disable(logging.NOTSET)
    hook_point = "visual.trunk.blocks.2"
    sae = SAE(64, 40, "topk", 4, metadata={"hook_point": hook_point}).eval()
    out = tmp_path / "classes"
    images = _data.pictures(9)
    images.classes.append("nowhere")
    build_site(sae, clip, images, out, words=["never", "asked"], steer=0)
    site = _data.read(out, "site")
    assert site["words"] is None
    assert site["predictions"] == {"names": ["red", "blue", "green"], "how": "class means"}
    assert site["data"]["classes"] == ["red", "blue", "green"]
    embeddings = clip.encode_images(images)
    labels = torch.tensor(images.targets)
    means = torch.stack([embeddings[labels == c].mean(0) for c in range(3)])
    p = (100 * embeddings @ torch.nn.functional.normalize(means, dim=1).T).softmax(-1)
    assert _data.read(out, "pictures")["p"] == pytest.approx(p.amax(1).tolist(), abs=1e-3)
    record = _data.read(out, "features/0")["features"][_data.read(out, "overview")["picture"].index(0)]
    assert record["words"] == record["concepts"] == []
    assert record["classes"]

    out = tmp_path / "none"
    build_site(sae, clip, _data.pictures(5, classes=False), out)
    site = _data.read(out, "site")
    assert site["predictions"] is site["words"] is site["data"]["classes"] is None
    assert _data.read(out, "pictures")["first"] == [-1] * 5
    assert set(_data.read(out, "overview")["steerability"]) == {None}
    assert _data.read(out, "images/0")["images"][0]["removed"] is None


@pytest.mark.parametrize("count", [1, 5])
def test_images_without_classes_are_told_apart_by_the_words(tmp_path, clip, count):
    out = tmp_path / "site"
    build_site(_data.sae(), clip, _data.pictures(count, classes=False), out, words=_data.WORDS, steer=1)
    assert _data.read(out, "site")["predictions"]["names"] == _data.WORDS
    assert _data.read(out, "overview")["selectivity"][0] is None
    assert _data.read(out, "pictures")["truth"] == [-1] * count


class Stopped(Exception):
    pass


@pytest.mark.parametrize("where", ["images", "effects", "writing", "thumbnail"])
def test_a_build_that_was_stopped_goes_on_to_the_same_bytes(tmp_path, clip, monkeypatch, where):
    images = _data.pictures()
    whole, again = tmp_path / "whole", tmp_path / "again"
    sae = _data.sae(d_sae=24)
    options = {"words": _data.WORDS, "title": "x", "steer": 2}
    build_site(sae, clip, images, whole, **options)
    owner, name, last = {
        "images": (Survey, "_encode", 1), "effects": (Effects, "_strengths", 0), "writing": (Folder, "put", 1),
        "thumbnail": (Folder, "write", 30),
    }[where]  # fmt: skip
    real = getattr(owner, name)
    calls = []

    def stopping(*args, **kwargs):
        if len(calls) == last:
            raise Stopped
        calls.append(0)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stopping)
        with pytest.raises(Stopped):
            build_site(sae, clip, images, again, **options)
    assert not (again / "index.html").exists()
    looked = []
    look = Survey._look
    monkeypatch.setattr(Survey, "_look", lambda self, shard: (looked.append(shard), look(self, shard)))
    build_site(sae, clip, images, again, **options)
    assert looked == {"images": [1], "thumbnail": [0, 1]}.get(where, [])
    assert _data.contents(again) == _data.contents(whole)
    # what is done is left as it is
    before = {path: path.stat().st_mtime_ns for path in again.rglob("*")}
    build_site(sae, clip, images, again, **options)
    assert {path: path.stat().st_mtime_ns for path in again.rglob("*")} == before


def test_a_folder_with_something_else_is_left_alone(tmp_path, clip):
    images = _data.pictures(4)
    for name, content in {"thesis.tex": "all of it", "site.json": '{"mine": 1}', "index.html": "<p>"}.items():
        out = tmp_path / name.replace(".", "-")
        out.mkdir()
        (out / name).write_text(content)
        with pytest.raises(ValueError, match="holds something else"):
            build_site(_data.sae(), clip, images, out, words=_data.WORDS)
        assert {path.name: path.read_text() for path in out.iterdir()} == {name: content}
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        build_site(_data.sae(), clip, images, tmp_path / "file", words=_data.WORDS)
    assert (tmp_path / "file").read_text() == "x"


def test_another_site_is_not_written_over(tmp_path, clip):
    images = _data.pictures(4)
    out = tmp_path / "site"
    build_site(_data.sae(), clip, images, out, words=_data.WORDS, steer=0)
    before = _data.contents(out)
    for sae, data, more, what in (
        (_data.sae(1), images, {}, "sae"),
        (_data.sae(), _data.pictures(5), {}, "data"),
        (_data.sae(), images, {"seed": 1}, "seed"),
        (_data.sae(), images, {"tokens": "cls"}, "tokens"),
    ):
        with pytest.raises(ValueError, match=rf"another site \(of another .*{what}"):
            build_site(sae, clip, data, out, words=_data.WORDS, **{"steer": 0, **more})
    assert _data.contents(out) == before


def test_what_cannot_be_built_is_said_before_anything_is_written(tmp_path, clip):
    out = tmp_path / "site"
    images = _data.pictures(4)
    wide = SAE(48, 40, "topk", 4, metadata={"hook_point": _data.HOOK}).eval()
    lost = SAE(32, 40, "topk", 4).eval()
    for sae, data, options, message in (
        (_data.sae(), images.subset([]), {}, "empty"),
        (wide, images, {}, r"d_in = 48.*\(1, 17, 32\)"),
        (lost, images, {}, "metadata do not name one"),
        (_data.sae(), images, {"hook_point": "visual.nothing"}, "must name one module"),
        (_data.sae(), images, {"target_hook_point": _data.HOOK}, "no transcoder"),
        (_data.sae(), images, {"words": ["one", "one"]}, "at least 2"),
        (_data.sae(), images, {"steer": -1}, "at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            build_site(sae, clip, data, out, **{"words": _data.WORDS, **options})
        assert not out.exists()


def test_two_saes_of_one_place_are_matched_by_direction(tmp_path, clip):
    mine, theirs = _data.sae(0), _data.sae(1)
    with torch.no_grad():
        for name in ("W_enc", "W_dec"):
            getattr(theirs, name)[7] = getattr(mine, name)[3]
    images = _data.pictures()
    out = tmp_path / "site"
    other = Explained.find(theirs, clip)
    build_site(mine, clip, images, out, words=_data.WORDS, steer=0, compare=other, compare_name="b")
    found = _data.read(out, "compare")
    cosines = torch.nn.functional.cosine_similarity(mine.W_dec[:, None], theirs.W_dec[None], dim=-1)
    assert found["match"] == cosines.argmax(1).tolist()
    assert found["match"][3] == 7
    assert found["cosine"] == pytest.approx(cosines.amax(1).tolist(), abs=1e-3)
    x = tokens_of(clip, images)
    with torch.no_grad():
        ours, others = (sae.encode(x).amax(1).double() for sae in (mine, theirs))
    for feature, match in enumerate(found["match"]):
        a, b = ours[:, feature], others[:, match]
        if a.max() > 0 and b.max() > 0:
            moved = 1 - torch.minimum(a / a.max(), b / b.max()).sum() / torch.maximum(a / a.max(), b / b.max()).sum()
            assert found["moved"][feature] == pytest.approx(float(moved), abs=2e-3)
            if a.std() > 1e-6 and b.std() > 1e-6:
                correlation = torch.corrcoef(torch.stack([a, b]))[0, 1]
                assert found["correlation"][feature] == pytest.approx(float(correlation), abs=2e-3)
    record = _data.read(out, "compare/0")["features"][3]
    assert record["match"] == 7
    assert [row for row, *_ in record["top"]] == others[:, 7].argsort(descending=True, stable=True)[:9].tolist()[
        : len(record["top"])
    ]
    assert _data.read(out, "site")["compare"]["kind"] == "sae"


def test_one_sae_on_two_models_and_two_of_different_places(tmp_path, clip):
    images = _data.pictures(12)
    sae = _data.sae()
    moved = _data.tower(tmp_path)
    with torch.no_grad():
        moved.model.visual.transformer.resblocks[1].mlp.c_fc.weight.add_(0.05)
    out = tmp_path / "models"
    build_site(sae, clip, images, out, words=_data.WORDS, steer=0, compare=Explained.find(sae, moved))
    found = _data.read(out, "compare")
    assert found["match"] == list(range(96))
    density = (sae.encode(tokens_of(moved, images)) > 0).float().mean((0, 1))
    assert found["density"] == pytest.approx(density.tolist(), rel=1e-3, abs=1e-6)
    assert _data.read(out, "site")["compare"]["kind"] == "model"

    first = SAE(32, 40, "topk", 4, metadata={"hook_point": "visual.transformer.resblocks.0"}).eval()
    out = tmp_path / "places"
    build_site(sae, clip, images, out, words=_data.WORDS, steer=0, compare=Explained.find(first, clip))
    found = _data.read(out, "compare")
    assert set(found["cosine"]) == {None}
    ours = sae.encode(tokens_of(clip, images)).amax(1)
    others = first.encode(tokens_of(clip, images, "visual.transformer.resblocks.0")).amax(1)
    both = torch.corrcoef(torch.cat([ours, others], 1).detach().T)[:96, 96:].nan_to_num(-1)
    for feature, match in enumerate(found["match"]):
        best = float(both[feature].max())
        assert (match == -1) == (best <= 0)
        if match >= 0:
            assert float(both[feature, match]) == pytest.approx(best, abs=1e-4)


def test_numbers_keep_four_digits_and_say_where_there_are_none():
    assert listed(np.array([0.123456, 1234567.0, np.nan, np.inf, 0.0])) == [0.1235, 1235000.0, None, None, 0.0]
    assert listed(np.array([[1, 2], [3, 4]])) == [[1, 2], [3, 4]]
    assert number(1e-30) == 1e-30


@pytest.fixture(scope="module")
def folder(tmp_path_factory, clip):
    """An SAE and pictures on disk, and the model that both are of."""
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("files")
    (root / "ViT-browse-test.json").write_text(json.dumps(_data.TOWER))
    weights = {name: tensor.contiguous() for name, tensor in clip.model.state_dict().items()}
    save_file(weights, root / "w.safetensors")
    known = {"clip_model": str(root / "ViT-browse-test.json"), "pretrained": str(root / "w.safetensors")}
    for seed in (0, 1):
        _data.sae(seed, **known).save_pretrained(root / f"sae{seed}")
    for row in range(9):
        place = root / "photos" / ["red", "blue", "green"][row % 3]
        place.mkdir(parents=True, exist_ok=True)
        _data.drawing(row).save(place / f"{row}.png")
    (root / "words.txt").write_text("\n".join(_data.WORDS))
    return root


def test_the_command_builds_a_site(capsys, folder, tmp_path):
    call = ["sae", "browse", folder / "sae0", "--data", folder / "photos", "--words", folder / "words.txt"]
    code, out, err = run(capsys, *call, "--out", tmp_path / "site", "--compare", folder / "sae1", "--steer", 2)
    assert code == 0, err
    assert out.strip().endswith(f"page  {tmp_path / 'site' / 'index.html'}")
    site = _data.read(tmp_path / "site", "site")
    assert site["title"] == "sae0 on photos"
    assert site["compare"]["name"] == "sae1"
    assert _data.read(tmp_path / "site", "pictures")["file"][:3] == ["1.png", "4.png", "7.png"]
    assert site["steered"] == 2


@pytest.mark.parametrize("library", ["saelens", "sparsify", "dictionary_learning"])
def test_saes_of_other_libraries(capsys, folder, tmp_path, library):
    """One command makes the site of a folder that another library wrote; it names neither model nor hook point."""
    from clipsteer.sae import formats

    torch.manual_seed(0)
    formats.export(SAE(32, 40, "topk", 4).eval(), tmp_path / "sae", library)
    call = ["sae", "browse", tmp_path / "sae", "--data", folder / "photos", "--words", folder / "words.txt"]
    model = ["--model", folder / "ViT-browse-test.json", "--pretrained", folder / "w.safetensors"]
    code, _, err = run(capsys, *call, *model, "--hook-point", _data.HOOK, "--out", tmp_path / "site", "--steer", 0)
    assert code == 0, err
    assert _data.read(tmp_path / "site", "site")["sae"]["d_sae"] == 40
    assert max(_data.read(tmp_path / "site", "overview")["peak"]) > 0


def test_the_command_says_what_is_wrong(capsys, folder, tmp_path):
    for sae, options, code, message in (
        (tmp_path / "none", [], 2, "none"),
        (folder / "photos", [], 1, "photos"),
        (folder / "sae0", ["--model", "emojiclip"], 2, "d_in = 32"),
        (folder / "sae0", ["--data", tmp_path], 2, "no image"),
        (folder / "sae0", ["--compare", folder / "photos"], 1, "photos"),
        (folder / "sae0", ["--out", folder], 2, "holds something else"),
    ):
        call = ["sae", "browse", sae, "--data", folder / "photos", "--words", folder / "words.txt"]
        found = run(capsys, *call, "--out", tmp_path / "site", *options)
        assert found[0] == code, found
        assert message in found[2]
        assert not (tmp_path / "site").exists()


def test_steer_takes_multiples_of_peaks_and_a_goal(capsys, folder):
    call = ["sae", "steer", folder / "sae0", "--data", folder / "photos", "--count", 3]
    sae = SAE.from_pretrained(folder / "sae0")
    clip = clipsteer.load(folder / "ViT-browse-test.json", folder / "w.safetensors")
    images = clipsteer.data.open_dataset(folder / "photos")
    peaks = sae.encode(tokens_of(clip, images)).amax((0, 1))
    feature = int(peaks.argmax())
    code, out, _ = run(capsys, *call, "--feature", f"{feature}=5x")
    assert code == 0
    assert f"feature {feature}: 5 × its peak of {float(peaks[feature]):.4g}" in out
    plain = run(capsys, *call, "--feature", f"{feature}={5 * float(peaks[feature])}")[1]
    assert out.splitlines()[1:] == plain.splitlines()
    code, out, _ = run(capsys, *call, "--towards", "red", "--pick", 1)
    assert code == 0
    line = out.splitlines()[0]
    assert line.endswith("points for 'red'")
    assert "+" in line.split("alone: ")[1]
    chosen = int(line.split()[1])
    # no other feature at its peak gives more

    head = zero_shot_head(clip, images.classes, ("a photo of a {}.",))
    rows = [row * 9 // 8 for row in range(8)]
    some = [int(f) for f in (peaks > 0).nonzero()]
    found = steerability(sae, clip, images.subset(rows), head, strength=peaks[some], features=some)
    gains = found.change[:, images.classes.index("red")]
    assert float(gains[some.index(chosen)]) == pytest.approx(float(gains.max()), abs=1e-3)
    # one that hardly leads there is not passed off as an answer
    assert ("no feature leads clearly to 'red'" in out) == (float(gains.max()) < 0.005)
    for options, message in (
        ([], "--feature or --towards"),
        (["--feature", "1=2", "--towards", "red"], "not both"),
        (["--towards", "red", "--times", 0], "--times"),
        (["--feature", "96=2x"], "must be in [0, 96)"),
        (["--feature", f"{int(peaks.argmin())}=2x"], "never active"),
    ):
        code, _, err = run(capsys, *call, *options)
        assert code == 2
        assert message in err


def test_serve_gets_the_site_its_sae_and_its_images(capsys, folder, tmp_path, monkeypatch):
    from clipsteer.browse import server

    asked = []
    monkeypatch.setattr(server, "serve", lambda *args, **options: asked.append((args, options)))
    call = ["sae", "browse", folder / "sae0", "--data", folder / "photos", "--words", folder / "words.txt"]
    code, _, err = run(capsys, *call, "--out", tmp_path / "site", "--steer", 0, "--serve", "--port", 8123)
    assert code == 0, err
    (((out, explained, images), options),) = asked
    assert (out, len(images), options) == (tmp_path / "site", 9, {"port": 8123})
    assert (explained.sae.d_sae, explained.site.hook_point) == (96, _data.HOOK)
