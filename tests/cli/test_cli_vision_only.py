"""Towers of timm, without text, through the commands: what needs no text works, what needs it says so at once."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from _command import run
from _tiny import noise

timm = pytest.importorskip("timm")


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """Options that open a small ViT, whose weights are in a file."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), path)
    return ["--model", "timm:test_vit", "--pretrained", path, "--image-size", 64]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three classes of coloured noise in PILOT's layout."""
    return noise(tmp_path_factory.mktemp("images"), 3, 5, 3)


@pytest.fixture(scope="module")
def sae(tower, images, tmp_path_factory):
    from clipsteer.cli.main import main

    out = tmp_path_factory.mktemp("sae")
    size = ["--expansion", 2, "--k", 4, "--steps", 5, "--batch-size", 64]
    assert main([str(a) for a in ["sae", "train", *tower, "--data", images / "train", *size, "--out", out]]) == 0
    return out


@pytest.fixture
def learn(tower, images, tmp_path, capsys, caplog):
    """``clipsteer cil`` with some strategies: (exit code, stdout, stderr and log)."""
    call = ["cil", *tower, "--data", images, "--tasks", 3, "--seeds", 1, "--out", tmp_path, "--first-epochs", 1]
    call += ["--epochs", 1, "--batch-size", 8, "--projections", 16, "--align-samples", 4, "--align-epochs", 1]

    def learned(*strategies):
        code, out, err = run(capsys, *call, "--strategy", *strategies)
        return code, out, err + caplog.text

    return learned


def test_a_strategy_that_needs_text_is_refused_before_any_runs_and_a_group_goes_without(learn, tmp_path, monkeypatch):
    code, _, err = learn("ncm,zero_shot")
    assert code == 2
    assert "--strategy zero_shot needs a text tower, and timm:test_vit has none" in err
    assert not (tmp_path / "runs").exists()
    from clipsteer.continual import strategies

    few = {name: strategies.STRATEGIES[name] for name in ("ldc", "zero_shot")}
    monkeypatch.setattr(strategies, "STRATEGIES", few)
    code, out, err = learn("all")
    assert code == 0, err
    assert "timm:test_vit has no text tower: zero_shot is left out" in err
    assert "| ldc |" in out
    assert "zero_shot" not in out


@pytest.mark.nightly
def test_every_other_strategy_learns(learn):
    code, out, err = learn("all")
    assert code == 0, err
    strategies = ("finetune", "macil", "slca", "sdc", "ldc", "ncm", "ranpac", "joint")
    assert all(f"| {name} |" in out for name in strategies)


def test_a_tower_is_tuned_averaged_and_measured_from_its_class_means(tower, images, tmp_path, capsys):
    train, test = images / "train", images / "test"
    code, _, err = run(capsys, "finetune", *tower, "--data", train, "--val", test, "--epochs", 1, "--out", tmp_path)
    assert code == 0, err
    ends = [tmp_path / "zeroshot", tmp_path / "finetuned"]
    code, _, err = run(capsys, "wise-ft", "merge", *ends, "--out", tmp_path / "half")
    assert code == 0, err
    call = ["wise-ft", "curve", *ends, "--reference", train, "--shifted", test, "--alphas", 0, 0.5, 1]
    code, out, err = run(capsys, *call, "--out", tmp_path / "curve")
    assert code == 0, err
    assert "weight-space, α = 0.5" in out
    for asked in (["--template", "a {}"], ["--names", tmp_path / "names.json"]):
        (tmp_path / "names.json").write_text(json.dumps({"class_0": "red"}))
        code, _, err = run(capsys, "finetune", *tower, "--data", train, "--out", tmp_path / "other", *asked)
        assert code == 2
        assert "needs a text tower, and timm:test_vit has none" in err


def test_features_steer_to_class_means_and_names_need_text(tower, images, sae, tmp_path, capsys, monkeypatch):
    call = ["sae", "eval", sae, "--data", images / "test"]
    figures = tmp_path / "figures.json"
    code, out, err = run(capsys, *call, "--steer", 5, "--features", 3, "--out", figures)
    assert code == 0, err
    assert "timm:test_vit has no text tower: classes stand for the mean of their images" in out
    best = json.loads(figures.read_text())["steerability"]["best"]
    assert {row["concept"] for row in best} <= {"class_0", "class_1", "class_2"}
    code, out, err = run(capsys, "sae", "steer", sae, "--data", images / "test", "--feature", "1=5")
    assert code == 0, err
    assert "classes stand for" in out
    # what cannot be given is said before anything is measured
    monkeypatch.setattr("clipsteer.sae.evaluate.evaluate_sae", lambda *args, **named: pytest.fail("measured"))
    code, _, err = run(capsys, *call, "--name-features", 2)
    assert code == 2
    assert "--name-features needs a text tower, and timm:test_vit has none" in err
    code, _, err = run(capsys, "sae", "eval", sae, "--data", images / "test" / "class_0", "--steer", 5)
    assert code == 2
    assert "told apart by the means of their classes" in err
    (tmp_path / "words.txt").write_text("red\nblue\n")
    steer = ["sae", "steer", sae, "--data", images / "test", "--feature", "1=5", "--words", tmp_path / "words.txt"]
    code, _, err = run(capsys, *steer)
    assert code == 2
    assert "needs a text tower, and timm:test_vit has none" in err


def test_a_store_of_other_images_says_how_its_own_are_trained_on(tower, images, tmp_path, capsys):
    call = ["sae", "train", *tower, "--expansion", 2, "--k", 4, "--steps", 2, "--batch-size", 32]
    call += ["--store", tmp_path / "acts", "--out", tmp_path / "sae"]
    assert run(capsys, *call, "--data", images / "train")[0] == 0
    code, _, err = run(capsys, *call)
    assert code == 2
    assert "No --data was given, so the bundled drawings are meant" in err
    assert "leave out --model" in err
    # other settings of the harvest, whose images are given, are refused as ever
    code, _, err = run(capsys, *call, "--data", images / "train", "--tokens", "cls")
    assert code == 2
    assert "No --data" not in err


def test_a_batch_of_more_rows_than_there_are_says_what_fits(tower, images, tmp_path, capsys):
    call = ["sae", "train", *tower, "--expansion", 2, "--k", 4, "--steps", 2, "--batch-size", 100_000]
    code, _, err = run(capsys, *call, "--data", images / "train", "--out", tmp_path)
    assert code == 2
    rows = 15 * (64 // 16) ** 2  # of patches, and of a class token
    assert "take a batch_size (--batch-size) of at most" in err
    assert int(err.split("at most ")[1].split(",")[0]) >= rows
