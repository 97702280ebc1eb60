"""Metrics against plain numpy and plain forward hooks, which share nothing with the streaming code."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clipsteer import SAE, clip
from clipsteer.sae.evaluate import evaluate_sae, feature_statistics, steerability, top_images

BLOCK = "visual.transformer.resblocks.1"
WIDTH, N, TOKENS, GRID = 24, 50, 17, 4
CLASSES = ["cat", "dog", "owl", "eel", "yak"]
KINDS = {"all": slice(0, TOKENS), "cls": slice(0, 1), "patches": slice(1, TOKENS)}
SAES = [
    ("topk", "none"),
    ("relu", "layer_norm"),
    ("batch_topk", "constant_norm"),
    ("jumprelu", "none"),
    ("gated", "none"),
]


class Pictures:
    classes = CLASSES

    def __init__(self, labels=None, n=13):
        self.images = torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(2)).double()
        self.labels = labels if labels is not None else [i % len(CLASSES) for i in range(n)]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]


def tokenize(texts):
    rows = [[1 + ord(c) % 60 for c in text][:7] for text in texts]
    return torch.tensor([row + [63] + [0] * (7 - len(row)) for row in rows])


@pytest.fixture(scope="module")
def model():
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 3, "width": WIDTH, "head_width": 12, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    module = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).double().eval()
    return clip.CLIP(module, lambda image: image, tokenize, "tiny", None)


def make_sae(architecture="topk", normalize="none", **metadata):
    torch.manual_seed(3)
    sae = SAE(WIDTH, N, architecture, 5, normalize=normalize, dtype=torch.float64, metadata=metadata)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name.startswith("b_"):
                parameter.normal_(0, 0.1)
        if hasattr(sae, "threshold"):
            sae.threshold.fill_(0.3)
    return sae


@torch.no_grad()
def run(model, images, replace=None):
    """Embeddings and the block's output, with a plain hook; replace(x) -> the new output."""
    seen = []

    def hook(module, args, output):
        seen.append(output.clone())
        return None if replace is None else replace(output)

    handle = model.model.get_submodule(BLOCK).register_forward_hook(hook)
    try:
        embedded = model.model.encode_image(images)
    finally:
        handle.remove()
    return F.normalize(embedded, dim=-1), seen[0]


@torch.no_grad()
def text_head(model, names, template):
    return F.normalize(
        F.normalize(model.model.encode_text(tokenize([template.format(n) for n in names])), dim=-1), dim=-1
    )


def scores(embedded, head, labels):
    logits = 100 * (embedded @ head.T).numpy()
    shifted = logits - logits.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return -log_p[np.arange(len(labels)), labels].mean(), (logits.argmax(1) == labels).mean()


@pytest.mark.parametrize("tokens", KINDS)
@pytest.mark.parametrize(("architecture", "normalize"), SAES)
def test_metrics_are_their_formulas(model, architecture, normalize, tokens):
    data, sae, kind = Pictures(), make_sae(architecture, normalize, hook_point=BLOCK, tokens=tokens), KINDS[tokens]
    got = evaluate_sae(sae, model, data, templates=["a {}"], batch_size=5)
    clean, x = run(model, data.images)
    sae.eval()
    with torch.no_grad():
        rows = x[:, kind]
        x_hat, dense = sae(rows).x_hat, sae.encode(rows).numpy()
    ev, X, X_hat = [], rows.numpy(), x_hat.numpy()
    for at in range(0, len(data), 5):
        a, b = X[at : at + 5].reshape(-1, WIDTH), X_hat[at : at + 5].reshape(-1, WIDTH)
        ev += (1 - ((b - a) ** 2).sum(1) / ((a - a.mean(0)) ** 2).sum(1)).tolist()
    flat, flat_hat = X.reshape(-1, WIDTH), X_hat.reshape(-1, WIDTH)
    active = (dense > 0).astype(float)
    truth = {
        "images": 13,
        "tokens": 13 * (kind.stop - kind.start),
        "ev": np.mean(ev),
        "fvu": ((flat_hat - flat) ** 2).sum() / ((flat - flat.mean(0)) ** 2).sum(),
        "l0": active.sum(-1).mean(),
        "dead": 1 - active.any((0, 1)).mean(),
    }
    for name, value in truth.items():
        assert math.isclose(got[name], value, rel_tol=1e-9), name
    per_token = active.sum(-1).mean(0)
    np.testing.assert_allclose(got["l0_per_token"], per_token, rtol=1e-12)
    if tokens == "cls":
        assert "l0_map" not in got
    else:
        np.testing.assert_allclose(got["l0_map"], per_token[-GRID * GRID :].reshape(GRID, GRID), rtol=1e-12)

    head = text_head(model, CLASSES, "a {}")
    swapped, zeroed = x.clone(), x.clone()
    swapped[:, kind], zeroed[:, kind] = x_hat, 0
    ce, top1 = {}, {}
    for name, new in (("clean", x), ("sae", swapped), ("zero", zeroed)):
        ce[name], top1[name] = scores(run(model, data.images, lambda _, new=new: new)[0], head, data.labels)
        assert math.isclose(got[f"ce_{name}"], ce[name], rel_tol=1e-9), name
        assert got[f"top1_{name}"] == pytest.approx(top1[name])
    recovered = (got["ce_zero"] - got["ce_sae"]) / (got["ce_zero"] - got["ce_clean"])
    assert got["ce_recovered"] == pytest.approx(recovered)
    json.dumps(got, allow_nan=False)


def test_a_perfect_sae_recovers_everything_and_modes_come_back(model):
    sae = SAE(WIDTH, 2 * WIDTH, "relu", dtype=torch.float64)
    with torch.no_grad():
        for weight in (sae.W_enc, sae.W_dec):
            weight.copy_(torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)]))
    sae.train()
    got = evaluate_sae(sae, model, Pictures(), hook_point=BLOCK, templates=["a {}"])
    assert sae.training
    assert not model.model.training
    assert got["ev"] == pytest.approx(1)
    assert got["fvu"] < 1e-28
    assert got["ce_recovered"] == pytest.approx(1, abs=1e-9)
    assert got["top1_recovered"] in (None, 1.0)


def test_fvu_and_dead_do_not_depend_on_the_batch(model):
    sae = make_sae()
    one, two = (evaluate_sae(sae, model, Pictures(), hook_point=BLOCK, batch_size=b) for b in (2, 13))
    for name in ("fvu", "l0", "dead", "tokens", "ce_sae"):
        assert one[name] == pytest.approx(two[name], rel=1e-9), name


def test_without_labels_there_are_no_predictions(model):
    data = Pictures(labels=["a cat"] * 13)
    got = evaluate_sae(make_sae(), model, data, hook_point=BLOCK, classnames=None)
    assert not {name for name in got if name.startswith(("ce_", "top1_"))}


@pytest.mark.parametrize("chunk", [1, 7 * N])
def test_chunks_do_not_change_anything(model, monkeypatch, chunk):
    whole = evaluate_sae(make_sae("relu"), model, Pictures(), hook_point=BLOCK)
    monkeypatch.setattr("clipsteer.sae.site.BLOCK", chunk)
    parts = evaluate_sae(make_sae("relu"), model, Pictures(), hook_point=BLOCK)
    for name in ("ev", "fvu", "l0", "dead"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-12)


@torch.no_grad()
def dense_acts(model, sae, data, tokens):
    return sae.eval().encode(run(model, data.images)[1][:, KINDS[tokens]])  # (B, T, n)


@pytest.mark.parametrize(("architecture", "normalize"), SAES)
def test_feature_statistics(model, architecture, normalize):
    data, sae = Pictures(), make_sae(architecture, normalize)
    got = feature_statistics(sae, model, data, hook_point=BLOCK, tokens="patches", batch_size=4)
    acts = dense_acts(model, sae, data, "patches").numpy().reshape(-1, N)
    np.testing.assert_allclose(got.frequency.numpy(), (acts > 0).mean(0), rtol=1e-12)
    np.testing.assert_allclose(got.mean.numpy(), acts.mean(0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(got.maximum.numpy(), acts.max(0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tokens", KINDS)
@pytest.mark.parametrize(("architecture", "normalize"), SAES)
def test_top_images_are_those_of_a_sort(model, architecture, normalize, tokens):
    data, sae = Pictures(), make_sae(architecture, normalize)
    features = [41, 0, 7, 13]
    got = top_images(sae, model, data, features, count=4, hook_point=BLOCK, tokens=tokens, batch_size=5)
    acts = dense_acts(model, sae, data, tokens).numpy()
    maps = acts[:, 1:] if tokens == "all" else acts
    shape = (1, 1) if tokens == "cls" else (GRID, GRID)
    assert got.maps.shape == (4, 4, *shape)
    for row, feature in enumerate(features):
        peak = acts[..., feature].max(1)
        order = [i for i in np.argsort(-peak, kind="stable")[:4] if peak[i] > 0]
        unused = 4 - len(order)
        assert got.images[row].tolist() == order + [-1] * unused
        np.testing.assert_allclose(got.activations[row].numpy(), [*peak[order], *[0] * unused], rtol=1e-9)
        for place, image in enumerate(order):
            truth = maps[image, :, feature].reshape(shape)
            np.testing.assert_allclose(got.maps[row, place].numpy(), truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tokens", KINDS)
@pytest.mark.parametrize(("architecture", "normalize"), SAES)
def test_steerability_is_its_formula(model, architecture, normalize, tokens):
    data, sae, kind = Pictures(n=5), make_sae(architecture, normalize), KINDS[tokens]
    features, strength = [3, 30], torch.tensor([20.0, 0.0])
    got = steerability(
        sae, model, data, CLASSES, strength=strength, features=features, hook_point=BLOCK, tokens=tokens,
        templates=["a {}"], batch_size=3, threshold=1e-4,
    )  # fmt: skip
    head = text_head(model, CLASSES, "a {}").numpy()
    softmax = lambda z: np.exp(z - z.max(1, keepdims=True)) / np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True)
    clean, x = run(model, data.images)
    with torch.no_grad():
        acts, stats = sae.eval().encode(x[:, kind]), sae.normalize_input(x[:, kind])[1]
        for row, feature in enumerate(features):
            # decode(edited acts) + error term
            edited = acts.clone()
            edited[..., feature] = strength[row]
            new = x.clone()
            new[:, kind] += sae.decode(edited, stats) - sae.decode(acts, stats)
            steered = run(model, data.images, lambda _, new=new: new)[0]
            change = (softmax(100 * steered.numpy() @ head.T) - softmax(100 * clean.numpy() @ head.T)).mean(0)
            np.testing.assert_allclose(got.change[row].numpy(), change, rtol=0, atol=1e-10)
            assert float(got.score[row]) == pytest.approx(float(got.change[row].square().sum()))
            assert float(got.power[row]) == float(got.change[row].max())
            assert int(got.concept[row]) == int(got.change[row].argmax())
    assert float(got.change[0].abs().max()) > 1e-3
    assert got.share == float((got.score > 1e-4).double().mean())
    # texts and their embeddings are the same vocabulary
    again = steerability(
        sae, model, data, clip.zero_shot_head(model, CLASSES, ["a {}"]), strength=20.0, features=[3], hook_point=BLOCK,
        tokens=tokens, batch_size=3,
    )  # fmt: skip
    torch.testing.assert_close(again.change[0], got.change[0], rtol=0, atol=1e-12)


def test_mistakes_are_named(model):
    sae, data = make_sae(), Pictures()
    with pytest.raises(ValueError, match="hook_point: the SAE's metadata"):
        evaluate_sae(sae, model, data)
    with pytest.raises(ValueError, match="must name one module"):
        evaluate_sae(sae, model, data, hook_point="visual.transformer.resblocks.?")
    with pytest.raises(ValueError, match="tokens"):
        evaluate_sae(sae, model, data, hook_point=BLOCK, tokens="some")
    with pytest.raises(ValueError, match="empty"):
        evaluate_sae(sae, model, [], hook_point=BLOCK)
    with pytest.raises(ValueError, match="label 4 is not below the 2 classes"):
        evaluate_sae(sae, model, data, hook_point=BLOCK, classnames=["a", "b"], templates=["{}"])
    for wrong in ([], [50], [-1], [3, 3], [[1]]):
        with pytest.raises(ValueError, match="features"):
            top_images(sae, model, data, wrong, hook_point=BLOCK)
    with pytest.raises(ValueError, match="count"):
        top_images(sae, model, data, [1], hook_point=BLOCK, count=0)
    with pytest.raises(ValueError, match="d_in = 24"):
        evaluate_sae(sae, model, data, hook_point="visual.transformer.resblocks.1.mlp.c_fc")
