"""A model's setup through every command: what is trained, fitted or kept with one sees the same images afterwards."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import _tiny
import clipsteer
from _command import run
from clipsteer import clip
from clipsteer.clip.pixels import pixel_batches
from clipsteer.clip.setup import Setup, read_setup
from clipsteer.conceptors.conceptor import Conceptor
from clipsteer.continual.backbone import Encoder
from clipsteer.continual.experiment import run_tasks
from clipsteer.continual.learner import ClassIncrementalLearner
from clipsteer.continual.plasticity import Plasticity, load_saes
from clipsteer.continual.strategies import strategy
from clipsteer.data.files import open_dataset
from clipsteer.ensembles.config import FinetuneConfig
from clipsteer.ensembles.finetuning import finetune
from clipsteer.ensembles.merging import wise_ft
from clipsteer.io.files import read_json, read_safetensors, write_json, write_safetensors
from clipsteer.reference import features
from clipsteer.reference.train import ContrastiveConfig, train_contrastive
from clipsteer.sae.activations import ActivationStore, harvest_to_store
from clipsteer.sae.evaluate import evaluate_sae
from clipsteer.sae.model import SAE
from clipsteer.splice.dictionary import ConceptDictionary
from clipsteer.training.settings import check_same_settings

pytest.importorskip("open_clip")

from _published import publisher

HOOK = "visual.transformer.resblocks.0"
COLOURS = {"red": (200, 60, 60), "green": (60, 180, 60), "blue": (70, 80, 210)}


@pytest.fixture
def publish(tmp_path, monkeypatch):
    return publisher(tmp_path, monkeypatch)


@pytest.fixture
def images(tmp_path):
    draw = np.random.RandomState(0)
    for name, colour in COLOURS.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            noisy = np.clip(np.array(colour) + draw.normal(0, 60, (48, 70 + 9 * i, 3)), 0, 255)
            Image.fromarray(noisy.astype(np.uint8)).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def seen(model, images):
    return model.encode_images(open_dataset(images))


@pytest.fixture
def captured(monkeypatch):
    """The models that ``sae eval``, ``sae steer`` and ``conceptor steer`` work on."""
    models = []
    monkeypatch.setattr("clipsteer.sae.evaluate.evaluate_sae", lambda sae, model, *_, **__: models.append(model) or {})
    for command in ("sae_steer", "conceptor"):
        monkeypatch.setattr(f"clipsteer.cli.{command}.show_steering", lambda _, model, *__: models.append(model) or 0)
    return models


@pytest.mark.parametrize("tag", ["bilinear", "squash", "quick"])
def test_finetune_then_curve_measures_what_finetune_measured(publish, images, tmp_path, capsys, tag):
    name, _ = publish()
    out = tmp_path / "run"
    args = ["--model", name, "--pretrained", tag, "--data", images, "--val", images, "--epochs", 3]
    code, _, err = run(capsys, "finetune", *args, "--lr", "1e-3", "--batch-size", 4, "--crop", 1, "--out", out)
    assert code == 0, err
    measured = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    last = [line for line in measured if "validation" in line][-1]
    ends = [out / "zeroshot", out / "finetuned"]
    curve = ["--reference", images, "--shifted", f"{images}/", "--alphas", 0, 0.5, 1, "--out", tmp_path / "curve"]
    code, _, err = run(capsys, "wise-ft", "curve", *ends, *curve)
    assert code == 0, err
    rows = [line.split(",") for line in (tmp_path / "curve" / "curve.csv").read_text().splitlines()]
    found = [dict(zip(rows[0], row)) for row in rows[1:]]
    at_one = [r for r in found if r["method"] == "weight" and float(r["alpha"]) == 1]
    assert float(at_one[0]["accuracy"]) == pytest.approx(last["validation"])
    # every folder has the setup of the model that it came from
    start = clipsteer.load(name, tag)
    assert run(capsys, "wise-ft", "merge", *ends, "--alpha", 0, 0.5, 1, "--out", out / "at-{alpha}")[0] == 0
    for folder in ("zeroshot", "finetuned", "at-0", "at-0.5", "at-1"):
        assert read_setup(out / folder / "model.safetensors") == start.setup
        assert clipsteer.load(out / folder).setup == start.setup
    assert torch.equal(seen(clipsteer.load(out / "at-0"), images), seen(start, images))
    assert torch.equal(seen(clipsteer.load(out / "at-1"), images), seen(clipsteer.load(ends[1]), images))
    # and a run is not gone on with another
    code, _, err = run(capsys, "finetune", *args, "--preprocess", "plain", "--lr", "1e-3", "--batch-size", 4,
                       "--crop", 1, "--out", out)  # fmt: skip
    assert (code, tag == "quick") in ((2, False), (0, True)), err


def test_a_classifier_gives_the_same_logits_after_a_save(publish, images, tmp_path):
    name, _ = publish()
    model = clipsteer.load(name, "bilinear", preprocess={"resize_mode": "longest", "fill_color": 9})
    data = open_dataset(images)
    head = clip.zero_shot_head(model, list(COLOURS))
    config = FinetuneConfig(batch_size=4, epochs=1, lr=1e-3)
    classifier = finetune(model, data, head, config, out=tmp_path / "run")
    again, loaded, _ = clip.load_classifier(tmp_path / "run" / "finetuned")
    ours = clip.predict(classifier, pixel_batches(model, data))
    assert torch.equal(clip.predict(loaded, pixel_batches(again, data)), ours)


def test_models_that_see_differently_are_not_averaged(publish, images, tmp_path, capsys):
    name, _ = publish()
    folders = {}
    for tag in ("plain", "squash", "quick", "rule"):
        rule = {"position_interpolation": "bicubic"} if tag == "rule" else {}
        model = clipsteer.load(name, "plain" if rule else tag, **rule)
        folders[tag] = tmp_path / tag
        head = nn.functional.normalize(torch.ones(3, 16), dim=-1)
        clip.save_classifier(folders[tag], model, clip.ImageClassifier(model.model.visual, head), list(COLOURS))
    for tag, differing in (
        ("squash", "resize_mode shortest and squash"),
        ("quick", "quick_gelu False and True"),
        ("rule", "position_interpolation antialias and bicubic"),
    ):
        ends = [folders["plain"], folders[tag]]
        files = [end / "model.safetensors" for end in ends]
        for given, out in ((ends, tmp_path / "out"), (files, tmp_path / "out.safetensors")):
            code, _, err = run(capsys, "wise-ft", "merge", *given, "--out", out)
            assert (code, differing in err) == (2, True), err
            assert not out.exists()
        curve = ["--reference", images, "--shifted", f"{images}/", "--out", tmp_path / "curve"]
        code, _, err = run(capsys, "wise-ft", "curve", *ends, *curve)
        assert (code, differing in err) == (2, True), err
        with pytest.raises(ValueError, match=differing):
            wise_ft(clipsteer.load(ends[0]).model, clipsteer.load(ends[1]).model)
        # as the message says
        asked = {"force_quick_gelu": False, "position_interpolation": "antialias"}
        model = clipsteer.load(folders[tag], preprocess="plain", **asked)
        assert isinstance(wise_ft(clipsteer.load(ends[0]).model, model.model), nn.Module)
    # of two files one of which does not say, the other's is the average's
    plain = tmp_path / "says-nothing.safetensors"
    write_safetensors(plain, read_safetensors(folders["squash"] / "model.safetensors"))
    written = wise_ft(plain, folders["squash"] / "model.safetensors", 0.5, tmp_path / "average.safetensors")
    assert read_setup(written) == clipsteer.load(name, "squash").setup


def test_a_contrastive_run_and_its_features_as_a_reference(publish, images, tmp_path, capsys, monkeypatch):
    name, weights = publish()
    model = clipsteer.load(name, "squash", force_image_size=48)
    pairs = open_dataset(images, targets="caption")
    config = ContrastiveConfig(loss="clip", batch_size=4, epochs=1, crop=1.0)
    train_contrastive(model, pairs, config, out=tmp_path / "run")
    for again in (clipsteer.load(tmp_path / "run"), features.load_run(tmp_path / "run")):
        assert again.setup == model.setup
        assert torch.equal(seen(again, images), seen(model, images))
    other = clipsteer.load(name, weights, preprocess="plain", force_image_size=48)
    with pytest.raises(ValueError, match=r"other settings.*setup"):
        train_contrastive(other, pairs, config, out=tmp_path / "run")
    kept = []
    monkeypatch.setattr(
        "clipsteer.reference.train.train_contrastive", lambda *_, reference, **__: kept.append(reference)
    )
    train = ["train", "--data", images, "--model", name, "--batch-size", 4, "--epochs", 1, "--out", tmp_path / "next"]
    code, _, err = run(capsys, *train, "--reference", tmp_path / "run")
    assert code == 0, err
    expected = features.compute(model, open_dataset(images, targets="captions"))
    # torch's products in batches of another size; another preprocessing moves them by hundredths
    torch.testing.assert_close(kept[0].image, nn.functional.normalize(expected.image, dim=-1))
    # a file that does not say what it is, is told by the options
    arguments = ["--reference", name, "--reference-pretrained", weights, "--reference-preprocess", "squash",
                 "--reference-force-quick-gelu", "--reference-force-image-size", 48, "--reference-live"]  # fmt: skip
    assert run(capsys, *train, *arguments)[0] == 0
    assert kept[1].setup.preprocess == model.setup.preprocess
    assert kept[1].setup.quick_gelu


def test_an_sae_remembers_the_model_that_it_was_trained_on(publish, images, tmp_path, capsys, captured, caplog):
    name, weights = publish()
    common = ["--data", images, "--hook-point", HOOK, "--batch-size", 8, "--steps", 2, "--d-sae", 64, "--k", 4]
    ways = {
        "tag": ["--pretrained", "squash"],
        "file": ["--pretrained", weights, "--preprocess", '{"mean": [0.1, 0.2, 0.3], "interpolation": "bilinear"}',
                 "--force-quick-gelu", "--force-image-size", "48"],
    }  # fmt: skip
    for way, options in ways.items():
        for store in ([], ["--store", tmp_path / f"store-{way}"]):
            out = tmp_path / f"sae-{way}-{len(store)}"
            code, _, err = run(capsys, "sae", "train", "--model", name, *options, *common, *store, "--out", out)
            assert code == 0, err
            captured.clear()
            assert run(capsys, "sae", "eval", out, "--data", images)[0] == 0
            assert run(capsys, "sae", "steer", out, "--data", images, "--feature", "1=2")[0] == 0
            assert run(capsys, "sae", "eval", out, "--data", images, "--model", name, "--pretrained", weights)[0] == 0
            assert run(capsys, "sae", "eval", out, "--data", images, "--preprocess", "plain")[0] == 0
            *same, other = captured
            assert len(same) == 3
            known = {"tag": {"preprocess": "squash"}, "file": {
                "preprocess": {"mean": (0.1, 0.2, 0.3), "interpolation": "bilinear"}, "force_quick_gelu": True,
                "force_image_size": 48,
            }}[way]  # fmt: skip
            expected = clipsteer.load(name, weights, **known)
            for model in same:
                assert model.setup == expected.setup
                assert torch.equal(seen(model, images), seen(expected, images))
            assert other.setup.preprocess["mean"] == clipsteer.load(name, "plain").setup.preprocess["mean"]
    caplog.clear()
    sae = SAE.from_pretrained(tmp_path / "sae-tag-0")
    evaluate_sae(sae, clipsteer.load(name, "squash"), open_dataset(images))
    assert "the SAE was trained on" not in caplog.text
    evaluate_sae(sae, clipsteer.load(name, "plain"), open_dataset(images))
    assert "the SAE was trained on" in caplog.text


def test_a_store_of_another_preprocessing_is_not_gone_on_with(publish, images, tmp_path, caplog):
    name, _ = publish()
    data = open_dataset(images)
    harvest_to_store(clipsteer.load(name, "plain"), data, HOOK, tmp_path / "store")
    with pytest.raises(ValueError, match=r"another harvest.*setup"):
        harvest_to_store(clipsteer.load(name, "plain", preprocess="squash"), data, HOOK, tmp_path / "store")
    # one of an earlier version says nothing
    described = read_json(tmp_path / "store" / "store.json")
    for new in ("setup", "data", "weights", "preprocess", "checksum"):
        del described[new]
    write_json(tmp_path / "store" / "store.json", described)
    assert "setup" not in ActivationStore(tmp_path / "store").provenance
    harvest_to_store(clipsteer.load(name, "plain"), data, HOOK, tmp_path / "store")
    assert "does not say how its images were preprocessed" in caplog.text
    with pytest.raises(ValueError, match="another harvest"):  # and built GELU
        harvest_to_store(clipsteer.load(name, "plain", force_quick_gelu=True), data, HOOK, tmp_path / "store")


def test_a_conceptor_remembers_the_model_that_it_was_fitted_on(publish, images, tmp_path, capsys, captured):
    name, weights = publish()
    options = ["--model", name, "--pretrained", weights, "--preprocess", "squash", "--force-quick-gelu"]
    fit = ["conceptor", "fit", "--data", images, "--hook-point", HOOK]
    assert run(capsys, *fit, *options, "--out", tmp_path / "a.safetensors")[0] == 0
    assert run(capsys, *fit, *options[:-1], "--no-force-quick-gelu", "--out", tmp_path / "b.safetensors")[0] == 0
    assert run(capsys, "conceptor", "steer", tmp_path / "a.safetensors", "--data", images)[0] == 0
    expected = clipsteer.load(name, weights, preprocess="squash", force_quick_gelu=True)
    assert captured[0].setup == expected.setup
    assert torch.equal(seen(captured[0], images), seen(expected, images))
    code, _, err = run(capsys, "conceptor", "steer", tmp_path / "a.safetensors", "--or", tmp_path / "b.safetensors")
    assert (code, "of one setup" in err) == (2, True)
    # one of an earlier version says nothing that could differ
    old = Conceptor.load(tmp_path / "b.safetensors")
    del old.metadata["setup"]
    old.save(tmp_path / "b.safetensors")
    both = [tmp_path / "a.safetensors", "--or", tmp_path / "b.safetensors", "--data", images]
    assert run(capsys, "conceptor", "steer", *both)[0] == 0


def test_a_dictionary_of_another_preprocessing_is_refused(publish, images, tmp_path, capsys):
    name, weights = publish()
    picture = images / "red" / "0.png"
    words = tmp_path / "words.txt"
    words.write_text("red\ngreen\nblue\n")
    common = ["splice", picture, "--model", name, "--pretrained", weights, "--data", images, "--words", words,
              "--dictionary", tmp_path / "kept"]  # fmt: skip
    assert run(capsys, *common, "--preprocess", "squash")[0] == 0
    setup = clipsteer.load(name, weights, preprocess="squash").setup
    assert ConceptDictionary.load(tmp_path / "kept").metadata["setup"] == setup.to_json()
    assert run(capsys, *common, "--preprocess", "squash")[0] == 0
    code, _, err = run(capsys, *common, "--preprocess", "plain")
    assert (code, "set up as" in err) == (2, True)


def test_cil_opens_its_tower_as_it_is_asked(publish, images, monkeypatch, tmp_path, capsys):
    name, weights = publish()
    asked = {"preprocess": "squash", "force_quick_gelu": True, "force_image_size": (48, 48)}
    encoder, model = Encoder.open(name, weights, **asked)
    assert model.setup == clipsteer.load(name, weights, **asked).setup
    jobs = []
    monkeypatch.setattr("clipsteer.continual.experiment.run_all", lambda found, **_: jobs.extend(found) or [])
    monkeypatch.setattr("clipsteer.continual.report.write_results", lambda *_, **__: [])
    options = ["--preprocess", "squash", "--force-quick-gelu", "--force-image-size", "48x48"]
    run(capsys, "cil", "--data", images, "--model", name, "--pretrained", weights, "--strategy", "finetune", *options,
        "--tasks", 3, "--seeds", 1, "--out", tmp_path / "cil")  # fmt: skip
    from clipsteer.cli.cil import _encoder, _run

    given = []
    monkeypatch.setattr("clipsteer.cli.cil._scenario", lambda *_: None)
    monkeypatch.setattr("clipsteer.continual.experiment.run_tasks", lambda *_, **named: given.append(named["asked"]))
    _run(**jobs[0][1])
    assert given == [asked]
    assert _encoder(*jobs[0][1]["encoder"])[1].setup == model.setup
    picture = Image.open(images / "red" / "0.png")
    assert torch.equal(encoder.preprocess(picture), model.preprocess(picture))


def test_a_class_incremental_run_of_another_setup_is_not_gone_on_with(tmp_path):
    arguments = (_tiny.scenario(), _tiny.encoder, strategy("ncm"))
    done = run_tasks(*arguments, out=tmp_path, asked={"force_image_size": (48, 48)})
    again = run_tasks(*arguments, out=tmp_path, asked={"force_image_size": (48, 48)})
    assert again.to_json() == done.to_json()
    with pytest.raises(ValueError, match="force_image_size"):
        run_tasks(*arguments, out=tmp_path, asked={"force_image_size": (64, 64)})


def test_a_run_of_an_earlier_version_is_gone_on_with_where_it_says_nothing():
    setup = Setup({"mean": (0, 0, 0)})
    check_same_settings("x", "out", {"lr": 1}, {"lr": 1, "setup": setup.to_json()})
    check_same_settings("x", "out", {"metadata": {}}, {"metadata": {"setup": setup.to_json()}})
    other = Setup({"mean": (1, 1, 1)})
    with pytest.raises(ValueError, match=r"setup\.preprocess\.mean"):
        check_same_settings("x", "out", {"setup": other.to_json()}, {"setup": setup.to_json()})
    with pytest.raises(ValueError, match=r"setup\.quick_gelu"):  # they all had GELU
        check_same_settings("x", "out", {}, {"setup": Setup(setup.preprocess, quick_gelu=True).to_json()})


NAMING = [
    ("demo",), ("sae", "train"), ("sae", "eval"), ("sae", "steer"), ("conceptor", "fit"), ("conceptor", "steer"),
    ("finetune",), ("train",), ("cil",), ("splice",), ("wise-ft", "curve"), ("align",),
]  # fmt: skip


@pytest.mark.parametrize("words", NAMING)
def test_every_command_that_names_a_model_has_the_options(capsys, words):
    code, out, _ = run(capsys, *words, "--help")
    assert code == 0
    for option in ("--preprocess ", "--force-quick-gelu", "--no-force-quick-gelu", "--force-image-size "):
        assert option in out
        assert words != ("train",) or f"--reference-{option.removeprefix('--')}" in out or "--no-" in option


def test_the_demo_says_how_its_model_is_opened(capsys, monkeypatch):
    given = {}

    def opened(*args, **named):
        given.update(named)
        raise ValueError("enough")

    monkeypatch.setattr("clipsteer.demo.findings.load", opened)
    run(capsys, "demo", "--model", "ViT-B-32", "--pretrained", "openai", "--preprocess", "laion2b_e16",
        "--no-force-quick-gelu", "--force-image-size", 288)  # fmt: skip
    assert given == {
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "preprocess": "laion2b_e16", "force_quick_gelu": False, "force_image_size": (288, 288),
    }  # fmt: skip


def test_the_saes_of_plasticity_belong_to_a_setup(publish, images, tmp_path, monkeypatch):
    from clipsteer.cli.cil import _fit_saes

    name, weights = publish()
    asked = {"preprocess": "squash", "force_quick_gelu": True}
    monkeypatch.setattr("clipsteer.cli.cil.SAE_STEPS", 3)
    _fit_saes(tmp_path / "saes", open_dataset(images), (name, str(weights), False, "cpu", asked))
    saes = load_saes(tmp_path / "saes")
    encoder, model = Encoder.open(name, weights, **asked)
    for block, sae in saes.items():
        assert sae.metadata["hook_point"] == f"visual.{block}"
        assert sae.metadata["setup"] == model.setup.to_json()
    config = strategy("macil", plasticity=True)
    ClassIncrementalLearner(encoder, config, 3, plasticity=Plasticity(saes))
    other, _ = Encoder.open(name, weights, preprocess="plain", force_quick_gelu=True)
    with pytest.raises(ValueError, match="another preprocessing, activation or image size"):
        ClassIncrementalLearner(other, config, 3, plasticity=Plasticity(saes))


@pytest.mark.parametrize(("option", "text"), [
    ("--preprocess", "{"), ("--force-image-size", "0"), ("--force-image-size", "3x"), ("--force-image-size", "1x2x3"),
])  # fmt: skip
def test_options_that_say_nothing(capsys, option, text):
    code, _, err = run(capsys, "splice", "x", option, text)
    assert (code, f"got {text!r}" in err) == (2, True)
