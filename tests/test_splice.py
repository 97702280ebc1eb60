"""Optimality conditions, closed forms and scikit-learn: none of them shares anything with the solver."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from clipsteer import SAE, ConceptDictionary, FileFormatError
from clipsteer.cli import main as cli
from clipsteer.clip.model import load
from clipsteer.clip.zero_shot import zero_shot_head
from clipsteer.data.emoji import EmojiStyles
from clipsteer.sae.evaluate import name_features, top_images
from clipsteer.splice import lasso as _lasso
from clipsteer.splice import nonnegative_lasso
from clipsteer.splice.dictionary import mean_embedding

DTYPES = (torch.float32, torch.float64)
TOL = 1e-6
# n below, at and above e; n = 1; n far above e, where the rows are strongly correlated
SHAPES = ((1, 4), (5, 12), (12, 12), (20, 12), (40, 6), (300, 24))


def unit(n, e, seed, dtype=torch.float64, spread=1.0):
    """Unit rows; a small spread makes them alike."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(e, generator=generator, dtype=torch.float64)
    rows = common + spread * torch.randn(n, e, generator=generator, dtype=torch.float64) if spread < 1 else None
    rows = torch.randn(n, e, generator=generator, dtype=torch.float64) if rows is None else rows
    return F.normalize(rows, dim=1).to(dtype)


def objective(w, z, C, l1):
    w, z, C = w.double(), z.double(), C.double()
    return (w @ C - z).square().sum(1) + l1 * w.sum(1)


def missed(w, z, C, l1):
    """Violation of the optimality conditions, in float64."""
    w, z, C = w.double(), z.double(), C.double()
    slack = 2 * (w @ C - z) @ C.T + torch.as_tensor(l1, dtype=torch.float64).expand(len(z))[:, None]
    return torch.where(w > 0, slack.abs(), (-slack).clamp_min(0)).amax(1)


def rounding(w, z, C):
    """How far the violation may move between the solver's dtype and float64: w, z and C are the same numbers in both,
    so it is the rounding of w (2u Σ w, unit rows), of the residual, and of e products and sums of it with a row."""
    u = torch.finfo(w.dtype).eps / 2
    residual = (w.double() @ C.double() - z.double()).norm(dim=1)
    return 2 * u * (1.01 * w.double().sum(1) + (C.shape[1] + 4) * residual + 1)


@given(
    seed=st.integers(0, 2**31 - 1),
    shape=st.sampled_from(SHAPES),
    rows=st.sampled_from((1, 2, 7)),
    l1=st.sampled_from((0.02, 0.1, 0.25, 0.8, 2.5)),
    spread=st.sampled_from((1.0, 0.5, 0.05, 1e-3)),
    dtype=st.sampled_from(DTYPES),
)
def test_the_optimality_conditions_hold(seed, shape, rows, l1, spread, dtype):
    C, z = unit(*shape, seed, dtype, spread), unit(rows, shape[1], seed + 1, dtype)
    found = nonnegative_lasso(z, C, l1, tol=TOL)
    assert bool(found.converged.all()), found.violation
    assert found.weights.dtype == dtype
    assert bool((found.weights >= 0).all())
    assert bool((missed(found.weights, z, C, l1) <= TOL + rounding(found.weights, z, C)).all())
    assert found.l0.tolist() == (found.weights != 0).sum(1).tolist()
    # no other point is better by more than the bound says: try the vertices and small steps
    better = objective(found.weights, z, C, l1) - objective(torch.zeros_like(found.weights), z, C, l1)
    assert bool((better <= 1e-12).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "e"), SHAPES)
def test_scikit_learn_agrees(n, e, dtype):
    """alpha = λ / 2e makes scikit-learn's objective ours over 2e."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    C, z = unit(n, e, 0, dtype, 0.7), unit(9, e, 1, dtype)
    for l1 in (0.05, 0.3):
        found = nonnegative_lasso(z, C, l1, tol=TOL)
        lasso = linear_model.Lasso(l1 / (2 * e), fit_intercept=False, positive=True, max_iter=10**6, tol=1e-14)
        theirs = torch.stack(
            [torch.from_numpy(lasso.fit(C.double().T.numpy(), row.double().numpy()).coef_.copy()) for row in z]
        )
        # convexity: f(w) - f* <= violation · (Σ w + Σ w*), for theirs as for ours
        ours, other = (
            missed(w, z, C, l1) * (found.weights.double().sum(1) + theirs.sum(1)) for w in (found.weights, theirs)
        )
        gap = objective(found.weights, z, C, l1) - objective(theirs, z, C, l1)
        assert bool((gap <= ours + 1e-15).all())
        assert bool((-gap <= other + 1e-15).all())
        # and where the minimiser is well determined, the weights are the same
        for mine, other in zip(found.weights.double(), theirs):
            on = mine > 0
            least = float(torch.linalg.eigvalsh(C.double()[on] @ C.double()[on].T).min()) if on.any() else 1.0
            if least > 0.05:
                torch.testing.assert_close(mine, other, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-6)


@given(seed=st.integers(0, 2**31 - 1), e=st.sampled_from((3, 16)), l1=st.sampled_from((0.0, 0.1, 0.5)))
def test_orthonormal_concepts_have_a_closed_form(seed, e, l1):
    C = torch.linalg.qr(torch.randn(e, e, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]
    C, z = C[: max(1, e - 1)], unit(5, e, seed)
    found = nonnegative_lasso(z, C, l1)
    torch.testing.assert_close(found.weights, (z @ C.T - l1 / 2).clamp_min(0), rtol=0, atol=TOL)


@pytest.mark.parametrize("dtype", DTYPES)
def test_from_the_largest_penalty_on_nothing_is_left(dtype):
    C, z = unit(50, 8, 0, dtype), unit(20, 8, 1, dtype)
    scores = z @ C.T
    largest = 2 * scores.amax(1)
    found = nonnegative_lasso(z, C, largest * (1 + 1e-5))
    assert bool((found.weights == 0).all())
    assert not bool(torch.signbit(found.weights).any())
    found = nonnegative_lasso(z, C, largest * 0.99)
    assert bool((found.l0 >= 1).all())
    single = found.l0 == 1
    assert bool(single.any())
    assert found.weights.argmax(1)[single].tolist() == scores.argmax(1)[single].tolist()
    # one concept: w = ⟨C_i, z⟩ - λ/2
    torch.testing.assert_close(found.weights.amax(1)[single], (scores.amax(1) * 0.01)[single], rtol=0, atol=TOL)


def test_planted_codes_are_recovered():
    C = unit(400, 64, 0)
    w = torch.zeros(30, 400, dtype=torch.float64)
    for row in range(30):
        w[row, torch.randperm(400, generator=torch.Generator().manual_seed(row))[:4]] = torch.tensor(
            [0.4, 0.5, 0.6, 0.7]
        ).double()
    found = nonnegative_lasso(w @ C, C, 1e-3)
    assert bool(((found.weights > 1e-2) == (w > 0)).all())
    torch.testing.assert_close(found.weights, w, rtol=0, atol=5e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_their_company(dtype, monkeypatch):
    C, z = unit(200, 16, 0, dtype), unit(70, 16, 1, dtype)
    l1 = torch.linspace(0.05, 1.0, 70, dtype=dtype)
    whole = nonnegative_lasso(z, C, l1)
    again = nonnegative_lasso(z, C, l1)
    assert torch.equal(whole.weights, again.weights)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(2))
    moved = nonnegative_lasso(z[order], C, l1[order])
    monkeypatch.setattr(_lasso, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(_lasso, "_GROUP_BYTES", 1)
    alone = nonnegative_lasso(z, C, l1)
    for other in (moved.weights[order.argsort()], alone.weights):
        torch.testing.assert_close(other, whole.weights, rtol=0, atol=2 * TOL)
    concepts = torch.randperm(200, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(
        nonnegative_lasso(z, C[concepts], l1).weights, whole.weights[:, concepts], rtol=0, atol=2 * TOL
    )


def test_empty_batches_and_single_rows():
    C = unit(10, 4, 0)
    found = nonnegative_lasso(C[:0], C, 0.1)
    assert found.weights.shape == (0, 10)
    assert found.converged.shape == found.violation.shape == found.l0.shape == (0,)
    assert nonnegative_lasso(torch.zeros(2, 4).double(), C, 0.1).weights.abs().max() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_concepts_that_are_the_same_share_the_weight(dtype):
    C, z = unit(30, 8, 0, dtype), unit(10, 8, 1, dtype)
    once = nonnegative_lasso(z, C, 0.1)
    twice = nonnegative_lasso(z, torch.cat([C, C]), 0.1)
    assert bool(twice.converged.all())
    torch.testing.assert_close(twice.weights[:, :30] + twice.weights[:, 30:], once.weights, rtol=0, atol=1e-5)


def test_float64_can_be_held_to_more():
    C, z = unit(500, 48, 0), unit(20, 48, 1)
    found = nonnegative_lasso(z, C, 0.05, tol=1e-11)
    assert bool(found.converged.all())
    assert float(missed(found.weights, z, C, 0.05).max()) <= 1e-11 + 1e-13
    assert float(found.l0.double().mean()) > 5


def test_rounds_are_few():
    """A sparse row takes few products with the dictionary: what makes the method fast."""
    C, z = unit(3000, 64, 0, torch.float32), unit(40, 64, 1, torch.float32)
    found = nonnegative_lasso(z, C, 0.25, max_iterations=15)
    assert bool(found.converged.all())
    assert float(found.l0.double().mean()) > 8


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_gives_what_the_cpu_gives(dtype):
    C, z = unit(2000, 64, 0, dtype), unit(50, 64, 1, dtype)
    found = nonnegative_lasso(z.cuda(), C.cuda(), 0.2)
    assert bool(found.converged.all())
    assert bool((missed(found.weights.cpu(), z, C, 0.2) <= TOL + rounding(found.weights.cpu(), z, C)).all())
    torch.testing.assert_close(found.weights.cpu(), nonnegative_lasso(z, C, 0.2).weights, rtol=0, atol=1e-5)


def test_without_a_penalty_it_is_non_negative_least_squares():
    C, z = unit(6, 12, 0), unit(5, 12, 1)
    found = nonnegative_lasso(z, C, 0.0)
    assert bool(found.converged.all())
    optimize = pytest.importorskip("scipy.optimize")
    theirs = [optimize.nnls(C.T.numpy(), row.numpy())[0] for row in z]
    np.testing.assert_allclose(found.weights.numpy(), theirs, rtol=0, atol=1e-5)


def test_too_few_iterations_are_owned_up_to():
    C, z = unit(300, 24, 0, spread=0.3), unit(12, 24, 1)
    found = nonnegative_lasso(z, C, 0.02, max_iterations=1)
    assert not bool(found.converged.all())
    assert bool((found.weights >= 0).all())
    torch.testing.assert_close(found.violation, missed(found.weights, z, C, 0.02), rtol=0, atol=1e-12)
    assert found.converged.tolist() == (found.violation <= TOL).tolist()


def test_autocast_and_gradients_are_kept_out():
    C, z = unit(60, 16, 0, torch.float32), unit(5, 16, 1, torch.float32).requires_grad_()
    plain = nonnegative_lasso(z, C, 0.1).weights
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = nonnegative_lasso(z, C, 0.1).weights
    assert torch.equal(inside, plain)
    assert not plain.requires_grad


@pytest.mark.parametrize(
    ("z", "C", "options", "error", "match"),
    [
        (torch.ones(2, 3), torch.ones(4, 5), {}, ValueError, r"z is \(2, 3\), C \(4, 5\)"),
        (torch.ones(3), torch.ones(4, 3), {}, ValueError, r"expected z \(B, e\)"),
        (torch.ones(2, 3), torch.ones(0, 3), {}, ValueError, "n, e >= 1"),
        (torch.ones(2, 3), torch.ones(4, 3).double(), {}, TypeError, "share float32 or float64"),
        (torch.ones(2, 3).half(), torch.ones(4, 3).half(), {}, TypeError, "float16"),
        (torch.ones(2, 3), torch.ones(4, 3), {"l1": -1.0}, ValueError, "l1 must be"),
        (torch.ones(2, 3), torch.ones(4, 3), {"l1": float("inf")}, ValueError, "l1 must be"),
        (torch.ones(2, 3), torch.ones(4, 3), {"l1": torch.ones(3)}, ValueError, "one a row"),
        (torch.full((2, 3), torch.nan), torch.ones(4, 3), {}, ValueError, "finite"),
        (torch.ones(2, 3), torch.ones(4, 3), {"tol": 0.0}, ValueError, "tol > 0"),
        (torch.ones(2, 3), torch.ones(4, 3), {"max_iterations": 0}, ValueError, "max_iterations >= 1"),
    ],
)
def test_mistakes_are_named(z, C, options, error, match):
    with pytest.raises(error, match=match):
        nonnegative_lasso(z, C, **{"l1": 0.1, **options})


# ---------------------------------------------------------------- the dictionary


def small(n=40, e=16, seed=0):
    texts = 0.8 * unit(1, e, seed) + 0.6 * unit(n, e, seed + 1)
    mean = 0.7 * unit(1, e, seed + 2)[0]
    return ConceptDictionary([f"word {i}" for i in range(n)], texts, mean), texts, mean


def test_rows_and_targets_are_their_formulas():
    dictionary, texts, mean = small()
    T = texts.numpy() / np.linalg.norm(texts.numpy(), axis=1, keepdims=True)
    T = T - T.mean(0)
    np.testing.assert_allclose(dictionary.matrix.numpy(), T / np.linalg.norm(T, axis=1, keepdims=True), atol=1e-12)
    x = 3 * torch.randn(7, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    X = x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True) - mean.numpy()
    np.testing.assert_allclose(dictionary.align(x).numpy(), X / np.linalg.norm(X, axis=1, keepdims=True), atol=1e-12)
    found = dictionary.decompose(x, 0.2)
    direct = nonnegative_lasso(dictionary.align(x), dictionary.matrix, 0.2)
    assert torch.equal(found.weights, direct.weights)
    assert torch.equal(dictionary.decompose(x[0], 0.2).weights, dictionary.decompose(x[:1], 0.2).weights)


def test_reconstruct_undoes_align():
    dictionary, _, _ = small()
    x = unit(25, 16, 7)
    # weights that hit z exactly (non-negative ones need not exist; the geometry does not ask)
    weights = torch.linalg.lstsq(dictionary.matrix.T, dictionary.align(x).T).solution.T
    torch.testing.assert_close(dictionary.reconstruct(3 * weights), x, rtol=0, atol=1e-9)
    nothing = dictionary.reconstruct(torch.zeros(1, 40))
    torch.testing.assert_close(nothing[0], F.normalize(dictionary.image_mean, dim=0))


def test_the_papers_recomposition_differs_by_how_far_it_goes():
    """It goes one unit from the mean; the sphere is further away where a direction points back by more than |μ|²/2."""
    dictionary, _, _ = small()
    mean = dictionary.image_mean
    x = F.normalize(mean + (1 - mean.square().sum()).sqrt() * unit(400, 16, 7), dim=1)  # scattered about it
    hit = torch.linalg.lstsq(dictionary.matrix.T, dictionary.align(x).T).solution.T
    for weights, exact in ((hit, True), (dictionary.decompose(x, 0.5).weights, False)):
        ray = F.normalize(weights @ dictionary.matrix, dim=1)
        ours = dictionary.reconstruct(weights)
        theirs = F.normalize(mean + ray, dim=1)
        length = ((ours - mean) * ray).sum(1)
        used = ray.norm(dim=1) > 0.5
        back = ray @ mean < -mean.square().sum() / 2
        assert torch.equal((length > 1)[used], back[used])
        near, nearer = (x * ours).sum(1), (x * theirs).sum(1)
        if exact:
            assert float(near.min()) > 1 - 1e-9 > float(nearer.min())
        else:
            assert float((nearer - near)[used & back].mean()) > 0  # coarse directions, and the longer way


def test_names_are_the_heaviest_concepts():
    dictionary, _, mean = small()
    x = unit(9, 16, 11)
    names = dictionary.name(x, 3, l1=0.3)
    z = dictionary.align(x)
    weights = dictionary.decompose(x, 0.3 * 2 * (z @ dictionary.matrix.T).amax(1)).weights
    for row, named in zip(weights, names):
        heavy = row.argsort(descending=True)[: min(3, int((row > 0).sum()))].tolist()
        assert [n for n, _ in named] == [f"word {i}" for i in heavy]
        assert [w for _, w in named] == pytest.approx(row[heavy].tolist(), abs=2 * TOL)
        assert named
    # a concept's own row is named after it, as a direction and as the image that lies that way
    assert [n[0][0] for n in dictionary.name(dictionary.matrix, 1, direction=True)] == dictionary.concepts
    there = dictionary.reconstruct(torch.eye(40, dtype=torch.float64))
    assert [n[0][0] for n in dictionary.name(there, 1)] == dictionary.concepts
    with pytest.raises(ValueError, match="count"):
        dictionary.name(x, 0)
    for share in (0.0, 1.0, -0.5):
        with pytest.raises(ValueError, match=r"in \(0, 1\)"):
            dictionary.decompose(x, share, relative=True)


def test_common_concepts_add_up():
    dictionary, _, _ = small()
    weights = torch.zeros(2, 40)
    weights[0, 3], weights[0, 5], weights[1, 5], weights[1, 7] = 0.4, 0.3, 0.3, 0.1
    assert [n for n, _ in dictionary.heaviest(weights.mean(0), 2)[0]] == ["word 5", "word 3"]
    assert dictionary.heaviest(torch.zeros(2, 40)) == [[], []]
    x = unit(9, 16, 11)
    weights = dictionary.decompose(x, 0.3, relative=True).weights
    named = dictionary.name_groups(x, [[2, 7, 4], [], [7]], 3)
    for names, mean in zip(named, (weights[[2, 7, 4]].mean(0), torch.zeros(40), weights[7])):
        expected = dictionary.heaviest(mean, 3)[0]
        assert [n for n, _ in names] == [n for n, _ in expected]
        assert [w for _, w in names] == pytest.approx([w for _, w in expected], abs=2 * TOL)
    assert dictionary.name_groups(x, [], 3) == []


def test_half_precision_embeddings_and_moves():
    dictionary, texts, mean = small()
    single = dictionary.to(dtype=torch.float32)
    assert (single.matrix.dtype, dictionary.matrix.dtype) == (torch.float32, torch.float64)
    x = unit(4, 16, 3)
    assert single.decompose(x.bfloat16()).weights.dtype == torch.float32
    assert ConceptDictionary(["a", "b"], texts[:2].half(), mean).matrix.dtype == torch.float32
    with pytest.raises(TypeError, match="float16"):
        dictionary.to(dtype=torch.float16)


def test_what_is_saved_comes_back(tmp_path):
    dictionary, _, _ = small()
    dictionary.metadata["clip_model"] = "tiny"
    dictionary.save(tmp_path / "a" / "b")
    back = ConceptDictionary.load(tmp_path / "a" / "b")
    assert torch.equal(back.matrix, dictionary.matrix)
    assert torch.equal(back.image_mean, dictionary.image_mean)
    assert (back.concepts, back.metadata) == (dictionary.concepts, {"clip_model": "tiny"})
    x = unit(3, 16, 1)
    assert torch.equal(back.decompose(x).weights, dictionary.decompose(x).weights)
    dictionary.metadata["odd"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        dictionary.save(tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_damaged_files_are_refused(tmp_path):
    folder = small()[0].save(tmp_path / "d")
    good = json.loads((folder / "concepts.json").read_text())
    for change in (
        {"format": "other"}, {"format_version": 2}, {"concepts": good["concepts"][1:]}, {"concepts": "abc"},
        {"concepts": [1] * 40}, {"metadata": 3},
    ):  # fmt: skip
        (folder / "concepts.json").write_text(json.dumps({**good, **change}))
        with pytest.raises(FileFormatError, match="concepts"):
            ConceptDictionary.load(folder)
    (folder / "concepts.json").write_text(json.dumps(good))
    data = (folder / "concepts.safetensors").read_bytes()
    (folder / "concepts.safetensors").write_bytes(data[:-8])
    with pytest.raises(FileFormatError):
        ConceptDictionary.load(folder)
    with pytest.raises(FileNotFoundError):
        ConceptDictionary.load(tmp_path / "nothing")


def test_dictionary_mistakes_are_named():
    texts, mean = unit(3, 4, 0), torch.zeros(4)
    for concepts, rows, centre in ((["a"], texts[:1], mean), (["a", "b"], texts, mean), (list("abc"), texts, mean[:3])):
        with pytest.raises(ValueError, match="n >= 2"):
            ConceptDictionary(concepts, rows, centre)
    with pytest.raises(ValueError, match="finite"):
        ConceptDictionary(list("abc"), texts * torch.nan, mean)
    with pytest.raises(ValueError, match="alike"):
        ConceptDictionary(list("abc"), texts[:1].expand(3, 4), mean)
    dictionary = ConceptDictionary(list("abc"), texts, mean)
    with pytest.raises(ValueError, match=r"must be \(4,\) or \(B, 4\), got \(2, 5\)"):
        dictionary.decompose(torch.ones(2, 5))
    with pytest.raises(ValueError, match="weights must be"):
        dictionary.reconstruct(torch.ones(2, 4))


# ---------------------------------------------------------------- with a model


@pytest.fixture(scope="module")
def emojiclip():
    pytest.importorskip("open_clip")
    return load()


@pytest.fixture(scope="module")
def drawings():
    emoji = EmojiStyles()
    return emoji.dataset([("noto", i) for i in emoji.indices("noto", seen=True)[::20]])


@pytest.fixture(scope="module")
def dictionary(emojiclip, drawings):
    return ConceptDictionary.from_clip(emojiclip, image_mean=drawings)


def test_a_dictionary_from_a_model(emojiclip, drawings, dictionary):
    labels = [c.label for c in EmojiStyles().concepts]
    assert dictionary.concepts == labels
    texts = zero_shot_head(emojiclip, labels, ["{}"]).numpy()
    texts = texts - texts.mean(0)
    np.testing.assert_allclose(
        dictionary.matrix.numpy(), texts / np.linalg.norm(texts, axis=1, keepdims=True), atol=1e-5
    )
    embeddings = emojiclip.encode_images(image for image, _ in drawings)
    torch.testing.assert_close(dictionary.image_mean, embeddings.mean(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(mean_embedding(emojiclip, drawings, 5), dictionary.image_mean, rtol=0, atol=1e-5)
    setup = emojiclip.setup.to_json()
    assert dictionary.metadata == {
        "clip_model": "emojiclip", "pretrained": None, "templates": ["{}"], "setup": setup,
    }  # fmt: skip


def test_drawings_are_named_after_what_they_show(emojiclip, drawings, dictionary):
    embeddings = emojiclip.encode_images(image for image, _ in drawings)
    names = dictionary.name(embeddings, 1)
    right = sum(named[0][0] == drawings.classes[t] for named, t in zip(names, drawings.targets))
    assert right >= 0.8 * len(drawings)
    found = dictionary.decompose(embeddings)
    assert bool(found.converged.all())
    assert 1 <= float(found.l0.double().mean()) <= 40
    plain = F.cosine_similarity(F.normalize(dictionary.image_mean, dim=0)[None], embeddings)
    near = F.cosine_similarity(dictionary.reconstruct(found.weights), embeddings)
    assert float(near.mean()) > float(plain.mean())


def test_features_are_named_by_their_top_images(emojiclip, drawings, dictionary):
    torch.manual_seed(0)
    hook = "visual.transformer.resblocks.4"
    sae = SAE(192, 64, k=4, metadata={"hook_point": hook, "tokens": "all"}).eval()
    features = [5, 0, 17]
    named = name_features(sae, emojiclip, drawings, dictionary, features, images=3, count=2, batch_size=16)
    top = top_images(sae, emojiclip, drawings, features, count=3)
    embeddings = emojiclip.encode_images(image for image, _ in drawings)
    for row, images in zip(named, top.images.tolist()):
        chosen = [i for i in images if i >= 0]
        weights = [dictionary.decompose(embeddings[i], 0.3, relative=True).weights[0] for i in chosen]
        expected = dictionary.heaviest(sum(weights) / len(chosen), 2)[0] if chosen else []
        assert [n for n, _ in row] == [n for n, _ in expected]
        assert [w for _, w in row] == pytest.approx([w for _, w in expected], abs=1e-4)
    with torch.no_grad():
        sae.b_enc.fill_(-1e9)
    assert name_features(sae, emojiclip, drawings, dictionary, [5, 0]) == [[], []]


def test_splice_on_the_command_line(capsys, tmp_path, drawings):
    files = []
    for i in range(2):
        drawings[i][0].save(tmp_path / f"{i}.png")
        files.append(str(tmp_path / f"{i}.png"))
        (tmp_path / "photos").mkdir(exist_ok=True)
        drawings[i + 2][0].save(tmp_path / "photos" / f"{i}.png")
    (tmp_path / "words.txt").write_text("\n".join(["dog", "cat", "", "cat", "car", "tree", "apple"]))
    args = ["splice", *files, "--data", tmp_path / "photos", "--words", tmp_path / "words.txt",
            "--dictionary", tmp_path / "d", "--l1", 0.1, "--out", tmp_path / "x.json"]  # fmt: skip
    assert cli.main([str(a) for a in args]) == 0
    first = capsys.readouterr().out
    found = json.loads((tmp_path / "x.json").read_text())
    assert [row["image"] for row in found["images"]] == files
    for row in found["images"]:
        assert row["l0"] == len(row["concepts"])
        assert {c for c, _ in row["concepts"]} <= {"dog", "cat", "car", "tree", "apple"}
        assert f"{row['image']}: {row['l0']} concepts" in first
    assert cli.main([str(a) for a in args]) == 0
    assert capsys.readouterr().out == first
    (tmp_path / "words.txt").write_text("dog\ncat")
    assert cli.main([str(a) for a in args]) == 2
    assert "other concepts" in capsys.readouterr().err
