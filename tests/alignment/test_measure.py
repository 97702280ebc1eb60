"""Agreement of layers and of concepts: the paper's formulas read anew, brute force, and planted answers."""

from __future__ import annotations

import itertools

import pytest
import torch

from clipsteer.alignment.measure import (
    agreement,
    chance,
    follow_concepts,
    match_concepts,
    neighbours_agree_most,
    same_distances,
)
from clipsteer.alignment.scores import Proximity, of_classes, of_features, shares
from clipsteer.data.emoji import classify30, split
from clipsteer.ops import pairwise_agreement as op
from clipsteer.sae.metrics.estimate import blocks_of, interval
from clipsteer.sae.model import SAE


def papers_index(P, Q):
    """Equations 2 and 3, pair by pair: 1 - the mean of |E_P - E_Q|, E(i, j) = 1 - ½ ‖p_i - p_j‖₁."""
    P, Q = P.double(), Q.double()
    n, total = len(P), 0.0
    for i in range(n - 1):
        alike = [1 - (X[i] - X[i + 1 :]).abs().sum(1) / 2 for X in (P, Q)]
        total += float((alike[0] - alike[1]).abs().sum())
    return 1 - 2 * total / (n * (n - 1))


def papers_distances(P, Q):
    """Equation 4 as its authors divide: the sum over pairs by 2, and by the number of pairs."""
    P, Q = P.double(), Q.double()
    n = len(P)
    found = torch.zeros(P.shape[1], Q.shape[1], dtype=torch.float64)
    for a, b in itertools.product(range(P.shape[1]), range(Q.shape[1])):
        for i in range(n - 1):
            apart = ((P[i, a] - P[i + 1 :, a]).abs() - (Q[i, b] - Q[i + 1 :, b]).abs()).abs()
            found[a, b] += apart.sum() / 2
    return found / (n * (n - 1) / 2)


def random_scores(n, k, seed, sparse=False):
    x = torch.rand(n, k + 1, generator=torch.Generator().manual_seed(seed)) ** 4
    if sparse:
        x[:, :k][x[:, :k] < x.median()] = 0
    return (x / x.sum(1, keepdim=True))[:, :k].contiguous()


@pytest.fixture(scope="module")
def real():
    """Memberships of drawings: classes by conceptors of smaller pictures, features of an SAE of them."""
    drawings = classify30("noto", split().test[::3])
    x = torch.stack([torch.tensor(list(image.resize((6, 6)).tobytes())) for image, _ in drawings]).float() / 255
    classes = of_classes(x, torch.tensor(drawings.targets), drawings.classes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sae = SAE(x.shape[1], 24, k=3)
    return classes.scores, of_features(sae, x).scores


@pytest.mark.parametrize("case", ["random", "sparse", "hard", "real"])
def test_values_are_the_papers(case, real):
    if case == "real":
        P, Q = real
    elif case == "hard":
        P, Q = (torch.eye(5)[torch.arange(70) * step // 7 % 5] for step in (2, 3))
    else:
        P, Q = (random_scores(71, k, k, case == "sparse") for k in (9, 6))
    images = torch.arange(len(P))
    found = agreement(P, Q, images)
    assert found.value == pytest.approx(papers_index(P, Q), abs=1e-6)
    assert 0.0 < found.value < 1.0
    columns = [Proximity(X, [str(i) for i in range(X.shape[1])]) for X in (P, Q)]
    expected = papers_distances(P, Q)
    matches = match_concepts(*columns, images, count=99).matches
    assert len(matches) == min(expected.shape)
    for match in matches:
        assert match.distance.value == pytest.approx(float(expected[match.a, match.b]), abs=1e-6)
    # no other assignment is better
    from scipy.optimize import linear_sum_assignment

    best = expected.numpy()[linear_sum_assignment(expected.numpy())].sum()
    assert sum(m.distance.value for m in matches) == pytest.approx(best, abs=1e-6)


def test_the_jackknife_leaves_out_images():
    P, Q = random_scores(60, 5, 0), random_scores(60, 4, 1)
    images = torch.arange(20).repeat_interleave(3)
    without = [papers_index(P[images != i], Q[images != i]) for i in range(20)]
    found = agreement(P, Q, images)
    assert (found.low, found.high) == pytest.approx(interval(papers_index(P, Q), without, [1] * 20), abs=1e-5)
    assert found.scored == 20
    # rows of an image move together
    apart = agreement(P, Q, torch.arange(60))
    assert apart.value == pytest.approx(found.value, abs=1e-7)
    assert apart.low != pytest.approx(found.low, abs=1e-6)


def test_relative_distances_have_intervals_over_blocks_of_images():
    P, Q = random_scores(60, 3, 0), random_scores(60, 2, 1)
    images = torch.arange(30).repeat_interleave(2)
    block = blocks_of(images, 0)
    nothing = torch.zeros(60, 1)

    def relative(rows):
        below = papers_distances(P[rows], nothing[rows]) + papers_distances(Q[rows], nothing[rows]).T
        return papers_distances(P[rows], Q[rows]) / below

    there = block.unique().tolist()
    without = [relative(block != b) for b in there]
    sizes = [len(images[block == b].unique()) for b in there]
    names = [Proximity(X, [str(i) for i in range(X.shape[1])]) for X in (P, Q)]
    for m in match_concepts(*names, images).matches:
        value = float(relative(torch.arange(60))[m.a, m.b])
        assert m.relative.value == pytest.approx(value, abs=1e-6)
        expected = interval(value, [float(w[m.a, m.b]) for w in without], sizes)
        assert (m.relative.low, m.relative.high) == pytest.approx(expected, abs=1e-5)
        assert m.distance.low < m.distance.value < m.distance.high


def test_too_few_rows_and_images():
    assert agreement(torch.eye(2), torch.eye(2), torch.arange(2)).value == 1.0
    for images in (torch.zeros(3, dtype=torch.int64), torch.arange(1)):
        X = torch.eye(3)[: len(images)]
        with pytest.raises(ValueError, match="image"):
            agreement(X, X, images)
    with pytest.raises(ValueError, match="same rows"):
        agreement(torch.eye(3), torch.eye(4), torch.arange(3))


def test_chance_is_the_index_of_rows_that_have_nothing_to_do_with_each_other():
    P, Q = random_scores(60, 5, 0), torch.eye(4)[torch.arange(60) % 4]
    pairs = [torch.pdist(X.double(), p=1) / 2 for X in (P, Q)]
    expected = 1 - float((pairs[0][:, None] - pairs[1]).abs().mean())
    assert chance(P, Q) == pytest.approx(expected, abs=0.01)
    found = agreement(P, P, torch.arange(60))
    assert found.value == pytest.approx(1, abs=1e-7)
    assert found.details["above_chance"] == pytest.approx(1, abs=1e-5)
    shuffled = agreement(P, P[torch.randperm(60, generator=torch.Generator().manual_seed(0))], torch.arange(60))
    assert abs(shuffled.details["above_chance"]) < 0.15


def planted():
    """Three concepts that both layers have, in another order and with noise, and one more in the first."""
    rows = torch.arange(400)
    own = torch.zeros(400, 4)
    own[rows, rows % 4] = 0.9
    noise = 0.05 * torch.rand(400, 3, generator=torch.Generator().manual_seed(0))
    other = own[:, [2, 0, 1]] * 0.9 + noise
    return Proximity(own, ["a", "b", "c", "alone"]), Proximity(other, ["c", "a", "b"])


def test_planted_concepts_are_matched_and_the_lonely_one_is_unique():
    P, Q = planted()
    found = match_concepts(P, Q, torch.arange(400))
    assert {P.names[m.a]: Q.names[m.b] for m in found.matches} == {"a": "a", "b": "b", "c": "c"}
    assert len(found.universal()) == 3
    assert [P.names[m.a] for m in found.unique_a()] == ["alone"]
    assert found.unique_b() == []
    assert all(m.relative.low <= m.relative.value <= m.relative.high for m in found.matches)
    # the commonest alone
    assert len(match_concepts(P, Q, torch.arange(400), count=2).matches) == 2


def test_concepts_are_followed_by_their_names():
    P, Q = planted()
    found = follow_concepts(P, Q, torch.arange(400))
    assert [(P.names[m.a], m.b) for m in found] == [("a", 1), ("b", 2), ("c", 0), ("alone", -1)]
    assert all(m.relative.high < 0.3 for m in found[:3])
    assert found[3].relative.value == pytest.approx(1)
    distances = papers_distances(P.scores[:60], Q.scores[:60])
    same = same_distances(P.scores[:60, :3], Q.scores[:60, [1, 2, 0]])
    assert same.tolist() == pytest.approx([float(distances[i, j]) for i, j in ((0, 1), (1, 2), (2, 0))], abs=1e-7)


def test_namesakes_are_compared_as_the_op_compares_them():
    P, Q = random_scores(37, 5, 0), random_scores(37, 5, 1)
    expected = op.concept_distances_reference(P.double(), Q.double()).diagonal()
    torch.testing.assert_close(same_distances(P, Q), expected, rtol=1e-9, atol=1e-12)
    assert same_distances(P, P).tolist() == [0.0] * 5


def test_relative_distances_do_not_depend_on_how_common_a_concept_is():
    rows = torch.arange(600)
    P = torch.stack([(rows % 3 == 0), (rows % 60 == 1)], 1).float()
    Q = torch.stack([(rows % 3 == 0) & (rows % 2 == 0), (rows % 120 == 1)], 1).float()
    common, rare = follow_concepts(Proximity(P, ["x", "y"]), Proximity(Q, ["x", "y"]), rows)
    assert common.distance.value > 5 * rare.distance.value
    assert common.relative.value == pytest.approx(rare.relative.value, abs=0.12)


def test_the_sanity_check_of_neighbours():
    layers = [[1 - 0.1 * abs(i - j) for j in range(5)] for i in range(5)]
    assert neighbours_agree_most(layers) == 1.0
    layers[0][4] = layers[4][0] = 0.99
    assert neighbours_agree_most(layers) == pytest.approx(3 / 5)
    assert neighbours_agree_most(layers, reach=4) == 1.0
    # of equal ones the nearest counts
    assert neighbours_agree_most([[1.0, 0.5, 0.5], [0.5, 1.0, 0.5], [0.5, 0.5, 1.0]]) == 1.0
    with pytest.raises(ValueError, match="square"):
        neighbours_agree_most([[1.0, 0.5]])


def test_shares_keep_rows_of_zeros():
    found = shares(torch.tensor([[2.0, 6.0], [0.0, 0.0]]))
    assert found.tolist() == [[0.25, 0.75], [0.0, 0.0]]
