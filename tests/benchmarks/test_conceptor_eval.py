"""The evaluation against the hooks it stands in for, on a small random model and random drawings."""

from __future__ import annotations

import functools
import itertools
import json

import pytest
import torch
import torch.nn.functional as F

from benchmarks.conceptors import experiment as conceptor_eval
from benchmarks.conceptors import run as conceptor_run
from benchmarks.conceptors.drawings import STYLES, Drawings, finish, fit_block, splits
from benchmarks.conceptors.experiment import EXPRESSIONS, Setting
from benchmarks.conceptors.report import lines, page
from clipsteer import AdditiveSteering, Conceptor, ConceptorSteering, steer
from clipsteer.clip.hooks import capture
from clipsteer.clip.model import CLIP

CONCEPTS, LAYERS, PLACE = 48, 3, "visual.transformer.resblocks.{}"


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Fewer points: what is tested does not depend on how fine the grid is."""
    for name in ("APERTURES", "TOWARDS_APERTURES"):
        monkeypatch.setattr(conceptor_eval, name, (0.3, 3.0))
    for name in ("BETAS", "TOWARDS_BETAS"):
        monkeypatch.setattr(conceptor_eval, name, (0.5,))
    monkeypatch.setattr(conceptor_eval, "ADDED", (-0.5, 1.0))
    monkeypatch.setattr(conceptor_eval, "TOWARDS_ADDED", (1.0, 4.0))


def pixels(rows):
    """A picture for each drawing, the same at every call: its concept's, moved by its style."""
    g = torch.Generator().manual_seed(3)
    concepts, styles = torch.randn(CONCEPTS, 3, 32, 32, generator=g), torch.randn(3, 3, 32, 32, generator=g)
    return torch.stack([concepts[i % CONCEPTS] + styles[i // CONCEPTS] for i in rows])


@functools.cache
def small():
    import open_clip

    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": LAYERS, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).eval()
    n = 3 * CONCEPTS
    with torch.no_grad(), capture(model, PLACE.format("?"), detach=True) as found:
        embedded = F.normalize(model.encode_image(pixels(range(n))), dim=-1)
    concept = torch.arange(n) % CONCEPTS
    of_concept = torch.arange(CONCEPTS) % 3
    data = Drawings(
        [found[PLACE.format(i)] for i in range(LAYERS)], torch.arange(n) // CONCEPTS, concept, of_concept[concept],
        ["a", "b", "c"], torch.arange(CONCEPTS) < 40, of_concept, embedded[:CONCEPTS],
    )  # fmt: skip
    return CLIP(model, lambda x: x, lambda x: x, "small", None), data


@pytest.mark.parametrize("block", range(LAYERS))
def test_the_rest_of_the_tower_equals_steering_by_hooks(block):
    clip, data = small()
    fitted = fit_block(data, block, splits(data, 0)["fit"])
    C = EXPRESSIONS["(noto OR fluent) AND NOT twemoji"](fitted.conceptors(1.0, True))
    for steering in (ConceptorSteering(C, 0.7), AdditiveSteering(fitted.means["trained"], fitted.mean, 0.5)):
        with torch.no_grad(), steer(clip, {PLACE.format(block): steering}):
            wanted = F.normalize(clip.model.encode_image(pixels(range(9))), dim=-1)
        torch.testing.assert_close(finish(clip, steering.apply(data.blocks[block][:9]), block), wanted)


def test_splits_are_disjoint_seen_and_drawn_by_seed():
    data = small()[1]
    first, again, other = splits(data, 0), splits(data, 0), splits(data, 1)
    everything = torch.cat(list(first.values()))
    assert sorted(everything.tolist()) == list(range(40))
    assert {n: len(v) for n, v in first.items()} == {"fit": 20, "validation": 10, "test": 10}
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["fit"], other["fit"])


def test_correlations_are_those_of_the_named_drawings():
    data = small()[1]
    concepts = splits(data, 0)["fit"]
    fitted = fit_block(data, 1, concepts)
    x = data.blocks[1].double().view(3, CONCEPTS, -1, 32)[:, concepts]
    mean = x.mean((0, 1, 2))
    torch.testing.assert_close(fitted.mean, mean)
    gram = lambda v: (v.reshape(-1, 32).mT @ v.reshape(-1, 32)) / (v.numel() / 32)
    torch.testing.assert_close(fitted.centred["fluent"], gram(x[STYLES.index("fluent")] - mean))
    torch.testing.assert_close(fitted.plain["b"], gram(x[:, concepts % 3 == 1]))
    torch.testing.assert_close(fitted.centred["style"], gram((x[0] - x[1]) / 2))
    torch.testing.assert_close(fitted.means["trained"], x[:2].mean((0, 1, 2)))


@pytest.mark.parametrize("within", [False, True])
def test_reported_figures_can_be_had_by_hand(within):
    clip, data = small()
    result = conceptor_eval.held_out_style(clip, data, 0, within=within)
    part = splits(data, 0)
    rows = data.rows(part["test"], "twemoji")
    assert rows.tolist() == sorted((part["test"] + 2 * CONCEPTS).tolist())
    method = "mean-centred conceptor: " + ("category AND NOT twemoji" if within else "NOT noto AND NOT fluent")
    chosen = result["methods"][method]
    fitted = fit_block(data, chosen["block"], part["fit"])
    parts = fitted.conceptors(chosen["aperture"], True)
    hits = []
    for row in rows.tolist():
        own = data.categories[data.category[row]]
        C = parts[own] & ~parts["twemoji"] if within else ~parts["noto"] & ~parts["fluent"]
        with torch.no_grad(), steer(clip, {PLACE.format(chosen["block"]): ConceptorSteering(C, chosen["beta"])}):
            score = (F.normalize(clip.model.encode_image(pixels([row])), dim=-1) @ data.head.T)[0]
        candidates = [i for i in range(CONCEPTS) if not within or i % 3 == row % CONCEPTS % 3]
        hits.append(max(candidates, key=lambda i: float(score[i])) == row % CONCEPTS)
    assert chosen["test"] == pytest.approx(sum(hits) / len(hits))
    clean = result["unsteered"]["test"] * len(hits)
    assert sum(hits) == pytest.approx(clean + chosen["gained"] - chosen["lost"])
    # the choice is the best of what validation saw
    assert chosen["validation"] >= max(v for m, _, _, v in result["grid"] if m == method)


def test_aperture_is_relative_to_the_size_of_the_activations():
    data = small()[1]
    concepts = splits(data, 0)["fit"]
    larger = Drawings(**{**data.__dict__, "blocks": [7 * b for b in data.blocks]})
    one, seven = (fit_block(d, 0, concepts).conceptors(2.0, False)["noto"] for d in (data, larger))
    assert float((one.matrix - seven.matrix).norm()) < 1e-5
    assert isinstance(one, Conceptor)
    assert seven.aperture == pytest.approx(one.aperture / 7)


def test_composition_moves_drawings_and_reports_shares():
    clip, data = small()
    result = conceptor_eval.composition(clip, data, 0)
    assert result["targets"] == 6
    for found in (result["unsteered"], *result["methods"].values()):
        assert 0 <= found["target"] <= min(found["category"], found["style"]) <= 1
    # adding four times the mean of the target's own drawings must lead there more often than doing nothing
    assert result["methods"]["mean-centred addition: fitted to both"]["target"] > result["unsteered"]["target"]
    assert all(0 <= row["AND_similarity"] <= 1 for row in result["closeness"])
    # what overwrites the images is no gentle way to steer
    for method, found in result["gentle"].items():
        assert found["variance"] > 0.3 * result["unsteered"]["variance"]
        assert found["validation"] <= result["methods"][method]["validation"]


def test_composition_is_chosen_on_drawings_spread_evenly(monkeypatch):
    """The drawings come category by category: the first ones would be of few categories."""
    clip, data = small()
    seen = []
    monkeypatch.setattr(conceptor_eval, "finish", lambda clip, x, block: seen.append(x) or finish(clip, x, block))
    conceptor_eval.composition(clip, data, 0, block=1, images=4)
    rows, x = data.rows(splits(data, 0)["validation"], "twemoji"), data.blocks[1]
    unsteered = [call for call in seen if len(call) == 4 and any(torch.equal(call[0], x[r]) for r in rows)]
    assert len(unsteered) == 6
    for call, own in zip(unsteered, (0, 0, 1, 1, 2, 2)):
        others = rows[data.category[rows] != own]
        places = [next(i for i, r in enumerate(others) if torch.equal(image, x[r])) for image in call]
        gaps = [b - a for a, b in itertools.pairwise([*places, len(others)])]
        assert places[0] == 0
        assert max(gaps) - min(gaps) <= 1


def test_evaluation_sums_up_its_seeds():
    clip, data = small()
    result = conceptor_eval.evaluate(clip, 2, data)
    runs = [conceptor_eval.held_out_style(clip, data, s) for s in (0, 1)]
    for method, found in result["held_out"]["methods"].items():
        tests = [r["methods"][method]["test"] for r in runs]
        assert found["test"]["mean"] == pytest.approx(sum(tests) / 2)
        assert found["test"]["sd"] == pytest.approx(abs(tests[0] - tests[1]) / 2**0.5)
        assert any(method in line for line in lines(result))
    assert len(result["evidence"][0]) == LAYERS
    html = page(result).html()
    assert html.count("<svg") > 10
    with pytest.raises(ValueError, match="seeds"):
        conceptor_eval.evaluate(clip, 0, data)


def test_setting_names_its_method():
    assert Setting("NOT style", True, 1, 1.0, 0.3).method == "mean-centred conceptor: NOT style"
    assert Setting("trained", False, 1, 1.0).method == "addition: trained"


def test_the_command_writes_figures_and_a_page(capsys, monkeypatch, tmp_path):
    clip, data = small()
    monkeypatch.setattr(conceptor_run, "load", lambda *a, **k: clip)
    monkeypatch.setattr(conceptor_eval, "harvest_drawings", lambda clip: data)
    args = [
        "--seeds",
        "1",
        "--out",
        str(tmp_path / "a" / "e.json"),
        "--page",
        str(tmp_path / "e.html"),
    ]
    assert conceptor_run.main(args) == 0
    out = capsys.readouterr().out
    figures = json.loads((tmp_path / "a" / "e.json").read_text())
    html = (tmp_path / "e.html").read_text()
    for method in figures["held_out"]["methods"]:
        assert f"| {method} |" in out
        assert method in html
