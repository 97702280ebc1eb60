"""What probes keep of a model without a text tower, against scikit-free arithmetic of one's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import clipsteer
from clipsteer import SAE
from clipsteer.sae.evaluate import evaluate_sae
from clipsteer.sae.judges import VARIANTS, Probes, _folds

pytest.importorskip("timm")

CLASSES = ["cat", "dog", "owl"]


def probed(clean, labels, **others):
    judge = Probes(len(CLASSES))
    for part in torch.arange(len(labels)).split(7):
        judge.add({name: others.get(name, clean)[part] for name in VARIANTS}, labels[part])
    return judge.result()


def clouds(n: int, spread: float, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(CLASSES), (n,), generator=generator)
    rows = torch.eye(8)[labels] + spread * torch.randn(n, 8, generator=generator)
    return torch.nn.functional.normalize(rows, dim=-1), labels


def test_what_is_apart_stays_apart_and_zeros_are_guesses():
    clean, labels = clouds(90, 0.1)
    same = torch.zeros_like(clean)
    same[:, 0] = 1
    found = probed(clean, labels, zero=same)
    assert found["probed_images"] == 90
    for probe in ("knn", "linear"):
        assert found[f"{probe}_clean"] == found[f"{probe}_sae"] == 1
        # one point for all: the probes name one class, right where it is
        assert found[f"{probe}_zero"] == (labels == 0).double().mean()
        assert found[f"{probe}_recovered"] == 1


def test_labels_at_random_are_chance():
    clean, _ = clouds(600, 0.1)
    labels = torch.arange(600) % 3
    found = probed(clean, labels[torch.randperm(600, generator=torch.Generator().manual_seed(1))])
    for probe in ("knn", "linear"):
        assert abs(found[f"{probe}_clean"] - 1 / 3) < 4 * (1 / 3 * 2 / 3 / 600) ** 0.5


def test_each_image_is_judged_by_probes_that_did_not_see_it():
    clean, labels = clouds(60, 0.5)
    folds = _folds(labels)
    for c in range(3):
        sizes = torch.bincount(folds[labels == c], minlength=5)
        assert int(sizes.max() - sizes.min()) <= 1
    x, y, out = clean.double().numpy(), np.eye(3)[labels], folds.numpy()
    hits = {"knn": 0, "linear": 0}
    for i in range(60):
        rest = out != out[i]
        near = np.argsort(-(x[rest] @ x[i]), kind="stable")[:10]
        votes = (np.exp(x[rest][near] @ x[i] / 0.07)[:, None] * y[rest][near]).sum(0)
        hits["knn"] += int(votes.argmax() == labels[i])
        mean, centre = x[rest].mean(0), y[rest].mean(0)
        gram = (x[rest] - mean).T @ (x[rest] - mean)
        ridge = 1e-3 * np.trace(gram) / len(gram)
        weight = np.linalg.inv(gram + ridge * np.eye(len(gram))) @ (x[rest] - mean).T @ (y[rest] - centre)
        hits["linear"] += int(((x[i] - mean) @ weight + centre).argmax() == labels[i])
    found = probed(clean, labels)
    for probe, count in hits.items():
        assert found[f"{probe}_clean"] == count / 60
        assert 0.4 < found[f"{probe}_clean"] < 1


@pytest.mark.parametrize("labels", [[0, 0, 0, 1], [0, 1, 2, 2], [1, 1, 1, 1]])
def test_without_two_classes_of_two_images_nothing_is_probed(labels):
    clean, _ = clouds(4, 0.1)
    assert probed(clean, torch.tensor(labels)) == {}


class Pictures:
    classes = CLASSES

    def __init__(self, labels):
        self.labels = labels
        self.images = torch.randn(len(labels), 3, 160, 160, generator=torch.Generator().manual_seed(2))

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]


def test_a_tower_without_text_is_judged_by_probes():
    torch.manual_seed(0)
    tower = clipsteer.load("timm:test_vit", "random")
    sae = SAE(64, 96, k=4)
    labels = [i % 3 for i in range(12)]
    at = {"hook_point": "visual.trunk.blocks.2", "batch_size": 5}
    found = evaluate_sae(sae, tower, Pictures(labels), **at)
    assert {"ev", "fvu", "l0"} < found.keys()
    assert not [name for name in found if name.startswith(("ce_", "top1_"))]
    assert found["probed_images"] == 12
    for probe in ("knn", "linear"):
        for name in VARIANTS:
            assert 0 <= found[f"{probe}_{name}"] <= 1
        assert f"{probe}_recovered" in found
    # an SAE that gives its input again takes nothing away
    with torch.no_grad():
        exact = SAE(64, 128, "relu")
        for weight in (exact.W_enc, exact.W_dec):
            weight.copy_(torch.cat([torch.eye(64), -torch.eye(64)]))
        for name, parameter in exact.named_parameters():
            if name.startswith("b_"):
                parameter.zero_()
    kept = evaluate_sae(exact, tower, Pictures(labels), **at)
    assert kept["fvu"] < 1e-10
    assert (kept["knn_sae"], kept["linear_sae"]) == (kept["knn_clean"], kept["linear_clean"])
    assert kept["knn_clean"] == found["knn_clean"]
    with pytest.raises(ValueError, match="label 3 is not below the 3 classes"):
        evaluate_sae(sae, tower, Pictures([0, 0, 1, 3]), **at)
    captions = evaluate_sae(sae, tower, Pictures([-1] * 4), **at)
    assert "probed_images" not in captions
