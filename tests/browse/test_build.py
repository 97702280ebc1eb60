"""What a site says is what the model and the SAE do, worked out again the long way."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import _browse as _data
from clipsteer import SAESteering, VectorSteering, steer
from clipsteer.browse import build_site
from clipsteer.browse.explained import Explained
from clipsteer.browse.probes import Probes
from clipsteer.clip.hooks import capture
from clipsteer.clip.zero_shot import zero_shot_head
from clipsteer.sae.evaluate import name_features, steerability, top_images
from clipsteer.splice.dictionary import ConceptDictionary


class Built:
    """A site and what it is of."""

    def __init__(self, root):
        self.clip = _data.tower(root)
        self.sae = _data.sae(d_sae=72)
        self.images = _data.pictures()
        self.out = root / "site"
        self.page = build_site(self.sae, self.clip, self.images, self.out, words=_data.WORDS, name="tiny")
        self.site = _data.read(self.out, "site")
        self.overview = _data.read(self.out, "overview")
        self.features = [
            record for shard in range(2) for record in _data.read(self.out, f"features/{shard}")["features"]
        ]
        pixels = torch.stack([self.clip.preprocess(self.images[row][0]) for row in range(len(self.images))])
        with torch.no_grad(), capture(self.clip, _data.HOOK) as found:
            self.embeddings = self.clip.embed(pixels)
        with torch.no_grad():
            self.acts = self.sae.encode(found[_data.HOOK])  # (N, T, n)
        self.head = zero_shot_head(self.clip, ["red", "blue", "green"], ("a photo of a {}.",))

    def predicted(self, rows, features=None):
        """Probabilities of images, with features set to activations."""
        images = [self.images[row][0] for row in rows]
        if features is None:
            embeddings = self.clip.encode_images(images)
        else:
            with steer(self.clip, {_data.HOOK: SAESteering(self.sae, features)}):
                embeddings = self.clip.encode_images(images)
        return (100 * embeddings @ self.head.T).softmax(-1)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return Built(tmp_path_factory.mktemp("browse"))


def test_the_overview_counts_what_is_active(built):
    on = built.acts > 0
    peak = built.acts.amax((0, 1))
    mean = built.acts.sum((0, 1)) / on.sum((0, 1)).clamp_min(1)
    assert built.overview["density"] == pytest.approx(on.float().mean((0, 1)).tolist(), rel=1e-3)
    assert built.overview["images"] == pytest.approx(on.any(1).float().mean(0).tolist(), rel=1e-3)
    assert built.overview["peak"] == pytest.approx(peak.tolist(), rel=1e-3)
    assert built.overview["mean"] == pytest.approx(mean.tolist(), rel=1e-3)
    dead = (peak == 0).nonzero()[:, 0].tolist()
    assert dead
    for feature in dead:
        assert built.overview["picture"][feature] == -1
        assert built.overview["steerability"][feature] is None
        record = built.features[feature]
        assert (record["histogram"], record["top"], record["intervals"], record["words"][:0]) == ([], [], [], [])
    assert [record["index"] for record in built.features] == list(range(72))


def test_pictures_of_a_feature_are_its_strongest_with_their_heat(built):
    found = top_images(built.sae, built.clip, built.images, list(range(72)), count=9)
    for feature, record in enumerate(built.features):
        rows = [row for row in found.images[feature].tolist() if row >= 0]
        assert [image for image, *_ in record["top"]] == rows
        acts = [act for _, act, _ in record["top"]]
        assert acts == pytest.approx(found.activations[feature][: len(rows)].tolist(), rel=1e-3)
        for place, (row, _, heat) in enumerate(record["top"]):
            wanted = built.acts[row, 1:, feature] / built.acts[..., feature].max() * 255
            assert list(bytes.fromhex(heat)) == pytest.approx(wanted.tolist(), abs=1)
            assert record["prefix_acts"][place] == pytest.approx([float(built.acts[row, 0, feature])], rel=1e-3)


def test_intervals_and_histograms_hold_every_picture_and_token(built):
    for feature, record in enumerate(built.features):
        acts = built.acts[..., feature]
        if not record["top"]:
            continue
        peak = float(acts.max())
        counts, _ = np.histogram(acts[acts > 0].double().numpy(), bins=40, range=(0, peak))
        assert sum(record["histogram"]) == counts.sum()
        # a value on an edge may fall to either side
        assert np.abs(np.cumsum(record["histogram"]) - np.cumsum(counts)).max() <= 1
        peaks = acts.amax(1)
        assert sum(part["count"] for part in record["intervals"]) == int((peaks > 0).sum())
        for part in record["intervals"]:
            assert len(part["pictures"]) == min(4, part["count"])
            assert len({row for row, *_ in part["pictures"]}) == len(part["pictures"])
            for row, act, _ in part["pictures"]:
                assert act == pytest.approx(float(peaks[row]), rel=1e-3)
                assert part["low"] * (1 - 1e-3) <= act <= part["high"] * (1 + 1e-3)


def test_relations_are_cosines_correlations_and_class_means(built):
    unit = F.normalize(built.sae.W_dec.detach(), dim=1)
    cosines = (unit @ unit.T).fill_diagonal_(-2)
    on = (built.acts > 0).flatten(0, 1).double()
    labels = torch.tensor(built.images.targets)
    peaks = built.acts.amax(1)
    for feature, record in enumerate(built.features):
        assert record["similar"][0][0] == int(cosines[feature].argmax())
        assert [c for _, c in record["similar"]] == pytest.approx(cosines[feature].topk(8).values.tolist(), abs=1e-3)
        for other, phi, share in record["coactive"]:
            both = torch.corrcoef(on[:, [feature, other]].T)[0, 1]
            assert phi == pytest.approx(float(both), rel=2e-3)
            assert share == pytest.approx(float((on[:, feature] * on[:, other]).sum() / on[:, feature].sum()), rel=1e-3)
        if not record["top"]:
            continue
        means = torch.stack([peaks[labels == c, feature].mean() for c in range(3)])
        top = int(means.argmax())
        rest = (means.sum() - means[top]) / 2
        assert built.overview["top_class"][feature] == record["classes"][0][0] == top
        wanted = float((means[top] - rest) / (means[top] + rest))
        assert built.overview["selectivity"][feature] == pytest.approx(wanted, rel=2e-3, abs=1e-6)
        share = (peaks[labels == top, feature] > 0).float().mean()
        assert record["classes"][0][1] == pytest.approx(float(share), rel=1e-3)
    busiest = int(on.sum(0).argmax())
    phis = torch.corrcoef(on.T)[busiest].nan_to_num(-2)
    phis[busiest] = -2
    assert built.features[busiest]["coactive"][0][1] == pytest.approx(float(phis.max()), rel=2e-3)


def test_words_lie_where_a_little_of_the_feature_takes_the_embedding(built):
    """The derivative against a difference: the direction is added to every token, a little of it."""
    explained = Explained.find(built.sae, built.clip)
    rows = [row * 70 // 8 for row in range(8)]
    pixels = torch.stack([built.clip.preprocess(built.images[row][0]) for row in rows])
    jacobian = Probes(explained, pixels).jacobian().double()
    feature = int(built.acts.amax((0, 1)).argmax())
    moved = []
    for sign in (1, -1):
        vector = VectorSteering(built.sae.W_dec[feature].detach(), sign * 1e-2)
        with torch.no_grad(), steer(built.clip, {_data.HOOK: vector}):
            moved.append(built.clip.embed(pixels).double().mean(0))
    slope = (moved[0] - moved[1]) / 2e-2
    found = jacobian @ built.sae.W_dec[feature].detach().double()
    assert (found - slope).norm() < 2e-2 * slope.norm()
    texts = zero_shot_head(built.clip, _data.WORDS, ("a photo of a {}.",)).double()
    centred = F.normalize(texts - texts.mean(0), dim=1)
    cosines = centred @ F.normalize(slope, dim=0)
    record = built.features[feature]
    assert record["words"][0][0] == _data.WORDS[int(cosines.argmax())] == built.overview["word"][feature]
    assert record["words"][0][1] == pytest.approx(float(cosines.max()), abs=0.02)
    assert record["opposite"][0][0] == _data.WORDS[int(cosines.argmin())]
    assert "8 pictures" in built.site["words"]["how"]


def test_concepts_are_those_of_name_features(built):
    dictionary = ConceptDictionary.from_clip(
        built.clip, _data.WORDS, image_mean=built.embeddings.mean(0), templates=("a photo of a {}.",)
    )
    names = name_features(built.sae, built.clip, built.images, dictionary, list(range(72)))
    for record, wanted in zip(built.features, names):
        assert [name for name, _ in record["concepts"]] == [name for name, _ in wanted]
        assert [w for _, w in record["concepts"]] == pytest.approx([w for _, w in wanted], rel=5e-3, abs=1e-4)


def test_steering_is_what_steer_does(built):
    rows = [0, 17, 35, 52]
    tabled = [record for record in built.features if record["steering"]]
    assert len(tabled) == built.site["steered"] == sum(bool(record["top"]) for record in built.features)
    for record in tabled[:6]:
        feature, table = record["index"], record["steering"]
        assert table["images"] == rows
        clean = built.predicted(rows)[:, table["classes"]]
        assert np.array(table["clean"]) == pytest.approx(clean.numpy(), abs=1e-3)
        peak = float(built.acts[..., feature].max())
        for place in (0, 4, 8):
            p = built.predicted(rows, {feature: built.site["strengths"][place] * peak})
            assert np.array(table["probability"][place]) == pytest.approx(p[:, table["classes"]].numpy(), abs=1e-3)
    features = [record["index"] for record in tabled]
    strength = built.acts.amax((0, 1))[features]
    shown = built.images.subset(rows)
    found = steerability(built.sae, built.clip, shown, built.head, strength=strength, features=features)
    scores = [built.overview["steerability"][feature] for feature in features]
    assert scores == pytest.approx(found.score.tolist(), rel=5e-3, abs=1e-6)
    assert len(built.site["strengths"]) == 9


def test_pictures_say_what_is_active_where_and_what_removing_it_does(built):
    clean = built.predicted(range(70))
    listed = _data.read(built.out, "pictures")
    assert listed["truth"] == built.images.targets
    assert listed["first"] == clean.argmax(1).tolist()
    assert listed["name"][:3] == ["red", "blue", "green"]
    for shard, first in ((0, 0), (1, 64)):
        for row, record in enumerate(_data.read(built.out, f"images/{shard}")["images"], first):
            patches = record["patches"]
            assert record["active"] == (built.acts[row] > 0).sum(-1).tolist()
            for token, (begin, end) in enumerate(zip(patches["offsets"], patches["offsets"][1:])):
                acts, order = built.acts[row, token].sort(descending=True)
                assert patches["acts"][begin:end] == pytest.approx(acts[acts > 0].tolist(), rel=1e-3)
                assert set(patches["features"][begin:end]) == set(order[acts > 0].tolist())
            if row not in (0, 69):
                continue
            first_seen = int(clean[row].argmax())
            for feature, change, now in record["removed"]:
                p = built.predicted([row], {feature: 0.0})[0]
                assert change == pytest.approx(float(p[first_seen] - clean[row, first_seen]), abs=1e-3)
                assert p[now] == pytest.approx(float(p.max()), abs=1e-3)


def test_thumbnails_are_what_the_model_sees_each_once(built):
    names = _data.read(built.out, "pictures")["thumb"]
    assert {f"{name}.webp" for name in names} == {path.name for path in (built.out / "thumbs").iterdir()}
    thumb = Image.open(io.BytesIO((built.out / "thumbs" / f"{names[4]}.webp").read_bytes())).convert("RGB")
    assert thumb.size[0] == thumb.size[1]
    # the model sees the middle 40 of 64 columns
    seen = _data.drawing(4).crop((12, 0, 52, 40)).resize(thumb.size)
    assert np.abs(np.asarray(thumb, float) - np.asarray(seen, float)).mean() < 8


def test_equal_pictures_share_a_thumbnail(tmp_path, built):
    images = _data.pictures(3).subset([0, 1, 0, 0])
    out = tmp_path / "site"
    build_site(built.sae, built.clip, images, out, words=_data.WORDS, steer=0)
    assert len(list((out / "thumbs").iterdir())) == 2
    assert _data.read(out, "site")["steered"] == 0
    assert _data.read(out, "features/0")["features"][0]["steering"] is None


def test_a_site_opens_without_a_server(built):
    assert built.page == built.out / "index.html"
    assert {"index.html", "app.js", "app.css"} <= {path.name for path in built.out.iterdir()}
    assert not (built.out / ".work").exists()
    assert built.site["title"] == "tiny on images"
    assert built.site["grid"] == [4, 4]
    assert built.site["prefix"] == 1
