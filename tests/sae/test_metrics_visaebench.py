"""visaebench's definition against its own functions, on the same codes."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from clipsteer import SAE
from clipsteer.sae.metrics import evaluate_metrics
from clipsteer.sae.metrics.visaebench import THEIRS

visaebench = pytest.importorskip("visaebench")
METRICS = visaebench.METRIC_REGISTRY

SIDE, D, FEATURES, CLASSES = 5, 16, 200, 5
P = SIDE * SIDE


def sae_of(architecture="topk"):
    torch.manual_seed(3)
    sae = SAE(D, FEATURES, architecture, 6).eval()
    with torch.no_grad():
        sae.b_enc.normal_(0, 0.1)
        sae.b_dec.normal_(0, 0.5)
        if hasattr(sae, "threshold"):
            sae.threshold.fill_(0.8)
    return sae


class Theirs:
    def __init__(self, sae, scale=1.0):
        self.sae, self.scale = sae, scale

    @torch.no_grad()
    def encode(self, x):
        return self.scale * self.sae.encode(x)

    @torch.no_grad()
    def decode(self, codes):
        return self.sae.decode(codes / self.scale)


class Evaluator:
    def __init__(self, embeddings):
        self.embeddings = embeddings

    def extract_activations(self, images, *, layer=-1):
        return self.embeddings[torch.tensor(images)][:, None]


def pictures(n=230, noise=1.0, mean=0.0):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % CLASSES
    x = noise * torch.randn(n, P, D, generator=generator) + mean
    x[:, : P // 2] += torch.randn(CLASSES, D, generator=generator)[labels][:, None]
    # neighbours alike
    return 0.5 * (x + x.roll(1, 1)), labels


def theirs(name, model, x, labels, embeddings=None, **settings):
    more = {}
    if name in ("sparse_probing", "downstream_preservation", "absorption"):
        more["labels"] = labels.numpy()
    if name == "absorption":
        more["sibling_groups"] = {"all": {"class_indices": list(range(CLASSES)), "hierarchy_depth": 1}}
    if name == "monosemanticity":
        more |= {"images": range(len(x)), "evaluator_backbone": Evaluator(embeddings)}
    if name == "localization":
        settings["grid_size"] = (SIDE, SIDE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return METRICS[name](**settings).compute(model, x, device="cpu", **more)


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_agrees_with_its_own_functions(architecture):
    sae = sae_of(architecture)
    x, labels = pictures(mean=0.3)
    embeddings = torch.randn(len(x), 9, generator=torch.Generator().manual_seed(4))
    ours = evaluate_metrics(sae, x, labels=labels, embeddings=embeddings, definition="visaebench-0.1.0")
    assert set(ours) == set(THEIRS.values())
    for name, own in THEIRS.items():
        rows = x.flatten(0, 1) if name == "fvu" else x
        found = theirs(name, Theirs(sae), rows, labels, embeddings)
        assert ours[own].value == pytest.approx(found.value, abs=1e-5), name
        assert math.isnan(ours[own].low)
        if name == "localization":
            assert found.metadata["num_features_scored"] == ours[own].scored > 10
            counted = [c for c in found.metadata["per_feature_scores"] if c is not None]
            assert len(counted) == ours[own].details["candidates"]


@pytest.mark.parametrize("images", [40, 230])
def test_its_limits_of_images_and_features(images, monkeypatch):
    from clipsteer.sae.metrics import visaebench as ours

    monkeypatch.setattr(ours, "_IMAGES_PER_FEATURE", 70)
    monkeypatch.setattr(ours, "_LEAST_IMAGES", 20)
    monkeypatch.setitem(ours._FEATURES, "localisation", 10)
    sae = sae_of()
    x, labels = pictures(images)
    settings = {"max_images_per_feature": 70, "min_images_per_feature": 20, "max_features": 10}
    found = theirs("localization", Theirs(sae), x, labels, **settings)
    same = evaluate_metrics(sae, x, metrics="localisation", definition="visaebench-0.1.0")["localisation"]
    assert same.value == pytest.approx(found.value, abs=1e-5)
    assert same.scored == found.metadata["num_features_scored"]


def test_of_an_sae_that_never_fires():
    sae = sae_of("jumprelu")
    with torch.no_grad():
        sae.threshold.fill_(1e9)
    x, labels = pictures()
    embeddings = torch.randn(len(x), 9)
    ours = evaluate_metrics(sae, x, labels=labels, embeddings=embeddings, definition="visaebench-0.1.0")
    right = evaluate_metrics(sae, x, labels=labels, embeddings=embeddings)
    for name, own in (
        ("absorption", "absorption"),
        ("localization", "localisation"),
        ("monosemanticity", "monosemanticity"),
    ):
        found = theirs(name, Theirs(sae), x, labels, embeddings)
        assert ours[own].value == found.value == (1.0 if own == "absorption" else 0.0)
        assert math.isnan(right[own].value)
        assert right[own].scored == 0


def test_its_fvu_is_not_the_textbook_s():
    """The squared mean is taken d times too large."""
    sae = sae_of()
    x, _ = pictures(n=20, noise=0.3, mean=0.2)
    rows = x.flatten(0, 1)
    found = theirs("fvu", Theirs(sae), rows, None).value
    with torch.no_grad():
        error = sae(rows).x_hat - rows
    mean, left = rows.mean(), error.mean()
    wrong = (error.square().sum(1).mean() - D**2 * left**2) / (rows.square().sum(1).mean() - D**2 * mean**2)
    assert found == pytest.approx(float(wrong), rel=1e-4)
    right = evaluate_metrics(sae, x, metrics="fvu")["fvu"].value
    textbook = error.square().sum() / (rows - rows.mean(0)).square().sum()
    assert right == pytest.approx(float(textbook), rel=1e-5)
    assert abs(found - right) > 0.1


def test_its_probing_of_noise_is_not_at_chance():
    class Noise:
        def encode(self, x):
            return x

    generator = torch.Generator().manual_seed(0)
    x = torch.rand(250, 1, 3000, generator=generator)
    labels = torch.arange(250) % CLASSES
    assert theirs("sparse_probing", Noise(), x, labels).value > 0.5
    from clipsteer.sae.metrics import Recorder, sparse_probing

    recorder = Recorder(3000)
    recorder.add(x[:, 0], torch.arange(250))
    # 50 held-out images at chance .2: sd .057
    assert abs(sparse_probing(recorder.pooled(), labels).value - 0.2) < 3.5 * 0.057
    assert np.isfinite(sparse_probing(recorder.pooled(), labels).high)
