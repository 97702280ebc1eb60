"""Metrics on streamed codes against dense formulas, closed forms, and what they must not depend on."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clipsteer import SAE, ops
from clipsteer.sae.metrics import (
    Grid,
    ImageTokens,
    Recorder,
    absorption_rate,
    evaluate_metrics,
    label_coverage,
    monosemanticity_score,
    probe_preservation,
    record,
    seed_stability,
    sparse_probing,
)
from clipsteer.sae.metrics.estimate import blocks_of, held_out, interval, of_sums
from clipsteer.sae.metrics.localisation import Localisation

SIDE = 6
GRID = Grid(SIDE, SIDE)
P = SIDE * SIDE


def localised(maps, grid=GRID, **settings):
    """The estimate of dense maps (images, tokens, features)."""
    recorder = Recorder(maps.shape[-1], maps={"localisation": Localisation(maps.shape[-1], **settings)})
    recorder.add(maps.flatten(0, 1), torch.arange(len(maps)), grid=grid)
    return recorder.maps["localisation"].estimate()


def pooled(x, images=None):
    """Codes of images of one token, (N, F) dense."""
    recorder = Recorder(x.shape[1])
    recorder.add(x, torch.arange(len(x)) if images is None else images)
    return recorder.pooled()


def board(function):
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    return function(rows, columns).float().flatten()[None, :, None]


def dense_moran(v, neighbours):
    """By the weight matrix, in numpy."""
    n = len(v)
    w = np.zeros((n, n))
    for p in range(n):
        for q in range(n):
            down, right = abs(p // SIDE - q // SIDE), abs(p % SIDE - q % SIDE)
            w[p, q] = max(down, right) == 1 and (neighbours == 8 or down + right == 1)
    c = v - v.mean()
    return n / w.sum() * (c @ w @ c) / (c @ c)


# joins by side 2 n (n - 1), corners 2 (n - 1)²; a half plane has n joins between halves, 3 n - 2 with corners
SIDES, CORNERS = 2 * SIDE * (SIDE - 1), 2 * (SIDE - 1) ** 2


@pytest.mark.parametrize(
    ("picture", "neighbours", "expected"),
    [
        (lambda r, c: (r + c) % 2, 4, -1.0),
        (lambda r, c: (r + c) % 2, 8, (CORNERS - SIDES) / (CORNERS + SIDES)),
        (lambda r, c: c < SIDE // 2, 4, 1 - 2 * SIDE / SIDES),
        (lambda r, c: c < SIDE // 2, 8, 1 - 2 * (3 * SIDE - 2) / (SIDES + CORNERS)),
    ],
)
def test_morans_i_of_known_pictures(picture, neighbours, expected):
    found = localised(board(picture), neighbours=neighbours)
    assert found.value == pytest.approx(expected, abs=1e-12)
    assert (found.scored, found.unit) == (1, "features")


@pytest.mark.parametrize("neighbours", [4, 8])
@pytest.mark.parametrize("prefix", [0, 5])
def test_morans_i_is_its_formula(neighbours, prefix):
    torch.manual_seed(0)
    maps = torch.relu(torch.randn(7, prefix + P, 9, dtype=torch.float64))
    maps[..., 8] = 0
    grid = Grid(SIDE, SIDE, prefix)
    found = localised(maps, grid, neighbours=neighbours)
    each = [[dense_moran(image[prefix:, f].numpy(), neighbours) for image in maps] for f in range(8)]
    assert found.value == pytest.approx(np.mean(each), abs=1e-10)
    assert found.scored == 8
    assert found.details["maps"] == 56
    assert found.low < found.value < found.high


def test_morans_i_of_oblong_grids_and_of_maps_that_say_nothing():
    torch.manual_seed(0)
    maps = torch.relu(torch.randn(1, P, 1))
    wide = Grid(4, 9)
    assert localised(maps, wide).value != pytest.approx(localised(maps).value)
    few = board(lambda r, c: (r == 0) & (c < 4))
    full = torch.full((1, P, 1), 0.3)
    for nothing in (few, full, torch.zeros(1, P, 1)):
        found = localised(nothing)
        assert math.isnan(found.value)
        assert math.isnan(found.low)
        assert found.scored == 0


def test_random_maps_have_the_expectation_of_a_random_order():
    torch.manual_seed(1)
    maps = torch.relu(torch.randn(400, P, 4))
    found = localised(maps)
    assert found.details["random"] == -1 / (P - 1)
    # sd of I under a random order is about √(2 / joins), 1,600 maps
    assert abs(found.value + 1 / (P - 1)) < 5 * math.sqrt(2 / (2 * SIDES) / 1600)


def sae_of(architecture="topk", d_in=16, d_sae=60, **more):
    torch.manual_seed(3)
    sae = SAE(d_in, d_sae, architecture, 5, **more).eval()
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name.startswith("b_"):
                parameter.normal_(0, 0.1)
        if hasattr(sae, "threshold"):
            sae.threshold.fill_(0.3)
    return sae


def pictures(n=60, classes=4, prefix=1, d=16, seed=0):
    """Tokens (n, prefix + P, d) of images whose class moves a part of the patches, and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, prefix + P, d, generator=generator)
    labels = torch.arange(n) % classes
    directions = torch.randn(classes, d, generator=generator)
    x[:, prefix : prefix + P // 2] += 2 * directions[labels][:, None]
    return x, labels


def dense_truth(sae, x, labels, prefix):
    """FVU, localisation and pooled codes from dense activations of all tokens."""
    with torch.no_grad():
        out = sae(x)
        acts = sae.encode(x)
    error = (out.x_hat - x).double().square().sum()
    spread = (x.double() - x.double().mean((0, 1))).square().sum()
    means = []
    for f in range(sae.d_sae):
        each = []
        for image in acts[:, prefix:, f].double().numpy():
            if 5 <= (image > 0).sum() <= int(0.9 * P):
                each.append(dense_moran(image, 4))
        if each:
            means.append(np.mean(each))
    return float(error / spread), np.mean(means), len(means), acts.amax(1)


@pytest.mark.parametrize("architecture", ["topk", "relu", "jumprelu", "gated", "batch_topk"])
def test_streamed_is_dense(architecture):
    sae = sae_of(architecture)
    x, labels = pictures(n=12)
    fvu, moran, count, peaks = dense_truth(sae, x, labels, 1)
    found = evaluate_metrics(sae, x, metrics="fvu,localisation", prefix=1)
    assert found["fvu"].value == pytest.approx(fvu, rel=1e-6)
    assert found["fvu"].scored == 12 * (P + 1)
    assert found["localisation"].value == pytest.approx(moran, abs=1e-6)
    assert found["localisation"].scored == count
    codes = record(sae, x, prefix=1).pooled()
    torch.testing.assert_close(codes.columns(torch.arange(sae.d_sae)), peaks, rtol=1e-6, atol=1e-6)


def same(a, b, tolerance=1e-9):
    assert a.keys() == b.keys()
    for name in a:
        for part in ("value", "low", "high", "scored"):
            x, y = getattr(a[name], part), getattr(b[name], part)
            assert x == pytest.approx(y, abs=tolerance, nan_ok=True), (name, part)


def everything(sae, source, labels=None, seed=0):
    other = sae_of(d_in=sae.d_in, d_sae=sae.d_sae)
    embeddings = torch.randn(60, 7, generator=torch.Generator().manual_seed(5))
    others = {"others": [other], "embeddings": embeddings, "labels": labels}
    pytest.importorskip("scipy")
    return evaluate_metrics(sae, source, prefix=1, seed=seed, **others)


def parts_of(x, labels, size):
    for at in range(0, len(x), size):
        cut = slice(at, at + size)
        yield ImageTokens(x[cut], torch.arange(len(x))[cut], labels[cut], grid=Grid(SIDE, SIDE, 1))


def test_all_of_them_and_batches_make_no_difference():
    sae = sae_of()
    x, labels = pictures()
    whole = everything(sae, x, labels)
    assert set(whole) == {
        "fvu", "localisation", "probing", "preservation", "monosemanticity", "absorption", "coverage", "stability"
    }  # fmt: skip
    for name, found in whole.items():
        assert found.scored > 0, name
        if name != "absorption":
            assert found.low <= found.value <= found.high, name
        json.dumps(found.to_json(), allow_nan=False)
    same(whole, everything(sae, parts_of(x, labels, 7)))
    backwards = list(parts_of(x, labels, 13))[::-1]
    same(whole, everything(sae, backwards))


def test_processes_merge():
    sae = sae_of()
    x, labels = pictures()
    one = record(sae, parts_of(x, labels, 8))
    parts = list(parts_of(x, labels, 12))
    two = record(sae, parts[::2])
    two.merge(record(sae, parts[1::2]))
    assert two.pooled().images.tolist() == list(range(60))
    for a, b in zip(one.pooled(), two.pooled()):
        assert a == b if isinstance(a, int) else torch.equal(a, b)
    for a, b in ((one.maps["localisation"].estimate(), two.maps["localisation"].estimate()),
                 (one.reconstruction.fvu(), two.reconstruction.fvu())):  # fmt: skip
        same({"": a}, {"": b})
    with pytest.raises(ValueError, match="both have seen image 0"):
        two.merge(one)


def test_the_order_of_tokens_matters_to_localisation_alone():
    sae = sae_of()
    x, labels = pictures()
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(P)])
    a, b = everything(sae, x, labels), everything(sae, x[:, order], labels)
    moved = {"localisation": a.pop("localisation"), "": b.pop("localisation")}
    same(a, b, 1e-6)
    assert moved["localisation"].value > moved[""].value + 0.1


def test_scale_of_the_codes_makes_no_difference():
    torch.manual_seed(0)
    x, labels = torch.relu(torch.randn(80, 30)), torch.arange(80) % 4
    x[:, :4] += F.one_hot(labels)
    factors = torch.logspace(-6, 6, 30)
    a, b = pooled(x), pooled(x * factors)
    e = torch.randn(80, 5)
    for metric in (
        lambda codes: sparse_probing(codes, labels),
        lambda codes: absorption_rate(codes, labels),
        lambda codes: label_coverage(codes, labels),
        lambda codes: monosemanticity_score(codes, e),
    ):
        same({"": metric(a)}, {"": metric(b)}, 1e-5)
    maps = torch.relu(torch.randn(6, P, 3))
    tiny = localised(maps * 1e-9)
    assert tiny.value == pytest.approx(localised(maps).value, abs=1e-6)
    assert tiny.scored == 3


def test_noise_probes_at_chance():
    values = []
    for seed in range(4):
        torch.manual_seed(seed)
        codes = pooled(torch.relu(torch.randn(250, 800)))
        found = sparse_probing(codes, torch.arange(250) % 5, seed=seed)
        assert found.scored == 50
        values.append(found.value)
    # chance 0.2, sd of a share of 200 at most √(.2 · .8 / 200) = .028; choosing on all images gives .4 and more
    assert abs(np.mean(values) - 0.2) < 4 * 0.028


def test_probes_find_what_is_there():
    torch.manual_seed(0)
    labels = torch.arange(100) % 5
    x = torch.rand(100, 40)
    x[:, 7:12] = 3 * F.one_hot(labels)
    found = sparse_probing(pooled(x), labels, ks=(5,))
    assert found.value == 1
    assert set(found.details["features"]) == set(range(7, 12))
    assert found.details["chance"] == pytest.approx(0.2)
    cover = label_coverage(pooled(x), labels)
    assert (cover.value, cover.scored) == (1, 5)
    assert cover.details["features"] == list(range(7, 12))
    # each class has its own feature, and the best alone is as good as four
    own = x.clone()
    own[:, :7] = own[:, 12:] = 0
    assert absorption_rate(pooled(own), labels).details["classes"][0]["f1_narrow"] == 1


def test_absorption_of_classes_that_share_features_and_of_none():
    torch.manual_seed(0)
    labels = torch.arange(120) % 4
    shared = torch.rand(120, 40) + torch.linspace(0, 5, 40)
    found = absorption_rate(pooled(shared), labels, {"a": [0, 1], "b": [2, 3], "none": [9]})
    assert (found.value, found.scored) == (1, 4)
    assert {row["group"] for row in found.details["classes"]} == {"a", "b"}
    # ten features of each class's own
    apart = torch.zeros(120, 40)
    for c in range(4):
        apart[labels == c, 10 * c : 10 * c + 10] = 1 + torch.rand(30, 10)
    assert absorption_rate(pooled(apart), labels).value == 0


def test_an_sae_that_never_fires_scores_nothing():
    labels = torch.arange(40) % 4
    codes = pooled(torch.zeros(40, 30))
    e = torch.randn(40, 3)
    for found in (
        sparse_probing(codes, labels),
        absorption_rate(codes, labels),
        label_coverage(codes, labels),
        monosemanticity_score(codes, e),
    ):
        assert math.isnan(found.value)
        assert math.isnan(found.high)
        assert found.scored == 0
        assert found.to_json()["value"] is None


def test_one_class_scores_nothing():
    x, ones = torch.rand(20, 8), torch.ones(20, dtype=torch.int64)
    assert math.isnan(sparse_probing(pooled(x), ones).value)
    assert math.isnan(probe_preservation(x, x, torch.arange(20), ones).value)
    assert math.isnan(sparse_probing(pooled(x), -ones).value)


def test_preservation():
    torch.manual_seed(0)
    labels = torch.arange(200) % 4
    x = torch.randn(200, 10) + 3 * F.one_hot(labels, 10)
    images = torch.arange(200)
    kept = probe_preservation(x, x, images, labels)
    assert kept.value == 1
    assert kept.low == kept.high == 1
    lost = probe_preservation(x, x.mean(0).expand_as(x), images, labels)
    assert lost.details["reconstructions"] == pytest.approx(0.25)
    assert lost.value == pytest.approx(0.25 / lost.details["activations"])


def test_monosemanticity_is_its_formula():
    torch.manual_seed(0)
    x = torch.relu(torch.randn(20, 6))
    x[:, 4] = 0
    x[1:, 5] = 0
    x[:, 3] = x[:, 3] + 1  # fires everywhere: the smallest is subtracted
    e = torch.randn(20, 5)
    found = monosemanticity_score(pooled(x), e)
    cosines = F.normalize(e.double(), dim=1) @ F.normalize(e.double(), dim=1).T
    scores = []
    for f in range(4):
        a = x[:, f].double()
        a = (a - a.min()) / (a.max() - a.min())
        w = torch.outer(a, a).triu(1)
        scores.append(float((w * cosines).sum() / w.sum()))
    assert found.value == pytest.approx(np.mean(scores), abs=1e-9)
    assert found.scored == 4
    assert found.details["any_two"] == pytest.approx(float(cosines.triu(1).sum() / 190), abs=1e-9)
    alike = monosemanticity_score(pooled(x), torch.ones(20, 5))
    assert alike.value == pytest.approx(1)


def test_coverage_scores_other_images_than_it_chooses_on():
    torch.manual_seed(0)
    x = (torch.rand(60, 3000) < 0.3).float()
    found = label_coverage(pooled(x), torch.arange(60) % 6)
    # of 3,000 random features the best has F1 of .5 and more where it was chosen
    assert found.value < 0.35
    assert found.details["images"] == 12


def test_stability_finds_what_was_shuffled_and_what_was_not():
    pytest.importorskip("scipy")
    a, b = sae_of(d_in=24, d_sae=80), sae_of(d_in=24, d_sae=80)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        b.W_dec.copy_(3 * a.W_dec[order])
    found = seed_stability(a, [b])
    assert found.value == pytest.approx(1, abs=1e-6)
    assert found.details["above_0.7"] == 1
    assert found.scored == 80
    with torch.no_grad():
        b.W_dec.normal_()
    chance = seed_stability(a, [b])
    # random rows match as the null does: two draws of one distribution, sd over features well below .1
    assert chance.value == pytest.approx(chance.details["random"][0], abs=0.05)
    assert chance.value < 0.75
    smaller = sae_of(d_in=24, d_sae=40)
    assert seed_stability(a, [smaller]).scored == 40
    with pytest.raises(ValueError, match="width 24 and 16"):
        seed_stability(a, [sae_of()])


def test_kinds_of_codes_are_taken_alike():
    torch.manual_seed(0)
    x = torch.relu(torch.randn(20, 12) - 0.5)
    acts, indices = x.topk(12)
    rows, features = x.nonzero(as_tuple=True)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (x > 0).sum(1).cumsum(0)])
    padded = ops.SparseCodes(F.pad(x[rows, features], (0, 3)), F.pad(features, (0, 3)), offsets)
    images = torch.arange(5)
    found = []
    for codes in (x, (acts, indices), padded):
        recorder = Recorder(12)
        recorder.add(codes, images, grid=Grid(2, 2))
        found.append(recorder.pooled())
    for other in found[1:]:
        for a, b in zip(found[0], other):
            assert a == b if isinstance(a, int) else torch.equal(a, b)


def test_what_does_not_fit_is_said():
    recorder = Recorder(4)
    x = torch.rand(6, 4)
    with pytest.raises(ValueError, match="6 rows of codes do not fit 4 images"):
        recorder.add(x, torch.arange(4))
    with pytest.raises(ValueError, match=r"do not fit 3 images of 4 tokens"):
        recorder.add(x, torch.arange(3), grid=Grid(2, 2))
    with pytest.raises(ValueError, match="not finite"):
        recorder.add(x.masked_fill(x > x.median(), torch.nan), torch.arange(3))
    recorder.add(x, torch.arange(3))
    with pytest.raises(ValueError, match="come together"):
        recorder.add(x, torch.tensor([5, 2, 6]))
    sae = sae_of()
    tokens, labels = pictures(n=8)
    with pytest.raises(ValueError, match="did you mean 'localisation'"):
        evaluate_metrics(sae, tokens, metrics="localization")
    with pytest.raises(ValueError, match="definition"):
        evaluate_metrics(sae, tokens, definition="visaebench")
    for name, lack in (("monosemanticity", "another tower"), ("stability", "another SAE"), ("probing", "labels"),
                       ("localisation", "patch grid")):  # fmt: skip
        with pytest.raises(ValueError, match=lack):
            evaluate_metrics(sae, tokens, metrics=name)
    assert set(evaluate_metrics(sae, tokens)) == {"fvu"}
    with pytest.raises(TypeError, match="ImageTokens"):
        evaluate_metrics(sae, [tokens])
    with pytest.raises(ValueError, match=r"labels: expected \(8,\)"):
        evaluate_metrics(sae, tokens, labels=labels[:5])
    with pytest.raises(ValueError, match=r"must be \(8, e\)"):
        evaluate_metrics(sae, tokens, metrics="monosemanticity", embeddings=torch.randn(7, 3))


def test_held_out_images_and_blocks_follow_from_numbers():
    images, labels = torch.arange(1000), torch.arange(1000) % 7
    test = held_out(images, labels, 0)
    assert torch.bincount(labels[test], minlength=7).tolist() == [29, 29, 29, 29, 29, 29, 28]
    order = torch.randperm(1000)
    assert torch.equal(held_out(images[order], labels[order], 0), test[order])
    assert not torch.equal(held_out(images, labels, 1), test)
    assert held_out(torch.tensor([4, 9]), torch.tensor([0, 1]), 0).sum() == 0
    block = blocks_of(images, 0)
    assert torch.equal(blocks_of(images[order], 0), block[order])
    assert torch.bincount(block).min() > 25
    # held-out images are spread over the blocks
    assert torch.bincount(block[test], minlength=20).min() > 0


def test_intervals_cover():
    covered = 0
    generator = torch.Generator().manual_seed(0)
    sizes = torch.bincount(blocks_of(torch.arange(400), 0), minlength=20).double()
    block = blocks_of(torch.arange(400), 0)
    for _ in range(300):
        x = torch.rand(400, generator=generator)
        _, low, high = of_sums(torch.bincount(block, x, minlength=20), sizes, sizes.int().tolist())
        covered += low <= 0.5 <= high
    # 285 expected, sd 3.8
    assert 270 <= covered <= 298
    # with equal blocks it is the t-interval over their means
    means = [1.0, 2.0, 4.0, 5.0]
    low, high = interval(3.0, [(12 - m) / 3 for m in means], [5] * 4)
    reach = 3.18245 * np.std(means, ddof=1) / 2
    assert (low, high) == pytest.approx((3 - reach, 3 + reach), abs=1e-4)


def test_codes_of_some_images_are_theirs():
    generator = torch.Generator().manual_seed(3)
    dense = torch.rand(40, 9, generator=generator) * (torch.rand(40, 9, generator=generator) < 0.3)
    dense[[0, 7, 8, 39]] = 0  # with no code at all
    codes = pooled(dense)
    every = torch.arange(9)
    assert torch.equal(codes.columns(every), dense)
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        chosen = torch.rand(40, generator=generator) < share
        found = codes.of_images(chosen)
        assert torch.equal(found.images, chosen.nonzero().flatten())
        assert torch.equal(found.columns(every), dense[chosen])
        assert bool((found.rows.diff() >= 0).all())
        assert (found.rows.dtype, found.features.dtype) == (torch.int64, torch.int64)
        again = found.of_images(torch.ones(len(found.images), dtype=torch.bool))
        assert all(torch.equal(a, b) for a, b in zip(again[:4], found[:4]))
