"""``clipsteer cil`` from images in a folder to the page."""

from __future__ import annotations

import json

import pytest
import torch

from _command import run
from _tiny import noise
from clipsteer.cli import cil as cli_continual
from clipsteer.continual.backbone import Encoder
from clipsteer.continual.plasticity import fit_saes, save_saes
from clipsteer.continual.report import read_results

QUICK = ["--first-epochs", 1, "--epochs", 1, "--batch-size", 8]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Four classes of coloured noise in PILOT's layout."""
    return noise(tmp_path_factory.mktemp("images"), 4, 6, 3)


def test_strategies_and_seeds_end_in_a_page_and_a_second_call_adds_to_it(images, tmp_path, capsys):
    call = ["cil", "--data", images, "--increment", 2, "--seeds", 2, "--out", tmp_path / "out", *QUICK]
    code, out, err = run(capsys, *call, "--strategy", "ncm", "macil:rank=2,align_samples=8", "zero_shot")
    assert code == 0, err
    runs, notes = read_results(tmp_path / "out" / "runs.json")
    assert [(r.strategy, r.seed) for r in runs] == [
        (s, seed) for s in ("ncm", "macil:rank=2,align_samples=8", "zero_shot") for seed in (1993, 1994)
    ]
    assert all(len(task) == 2 for r in runs for task in r.tasks)
    assert runs[0].tasks != runs[1].tasks  # a class order a seed
    assert "24 images to learn from, 12 to measure on" in notes["data"]
    assert "| ncm |" in out
    assert (tmp_path / "out" / "index.html").is_file()
    made = {p: p.read_bytes() for p in (tmp_path / "out" / "runs").rglob("run.json")}
    assert len(made) == 6
    # more strategies in the same folder: what is there is not done again
    code, _, err = run(capsys, *call, "--strategy", "ncm", "ranpac:projections=32")
    assert code == 0, err
    assert all(p.read_bytes() == content for p, content in made.items())
    assert len(list((tmp_path / "out" / "runs").rglob("run.json"))) == 8


def test_lists_with_commas_several_processes_and_validation_images(images, tmp_path, capsys):
    call = ["cil", "--data", images, "--tasks", 2, "--seeds", 1, "--out", tmp_path / "out", *QUICK, "--jobs", 2]
    call += ["--strategy", "ncm,sdc", "finetune:rank=2", "--measure", "validation", "--bf16"]
    code, _, err = run(capsys, *call)
    assert code == 0, err
    runs, notes = read_results(tmp_path / "out" / "runs.json")
    assert [r.strategy for r in runs] == ["ncm", "sdc", "finetune:rank=2"]
    assert runs[1].settings["bf16"] is True
    # a fifth of six images a class
    assert "20 images to learn from, 4 to measure on (validation" in notes["data"]


def test_saes_of_ones_own_are_used_as_they_are(images, tmp_path, capsys):
    tower = Encoder.open("emojiclip")[0]
    pixels = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    save_saes(tmp_path / "mine", fit_saes(tower.module, tower.blocks, [pixels], d_sae=32, k=4, steps=5))
    before = {p: p.read_bytes() for p in (tmp_path / "mine").rglob("*") if p.is_file()}
    code, _, err = run(capsys, "cil", "--data", images, "--tasks", 2, "--seeds", 1, "--out", tmp_path / "out", *QUICK,
                       "--strategy", "finetune:plasticity=1,rank=2", "--saes", tmp_path / "mine",
                       "--sae-images", images / "train")  # fmt: skip
    assert code == 0, err
    assert all(p.read_bytes() == content for p, content in before.items())


def test_plasticity_trains_saes_once(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli_continual, "SAE_STEPS", 10)
    call = ["cil", "--data", images, "--tasks", 2, "--seeds", 1, "--out", tmp_path / "out", *QUICK,
            "--strategy", "finetune:plasticity=1,rank=2"]  # fmt: skip
    code, _, err = run(capsys, *call)
    assert code == 2
    assert "--sae-images" in err
    code, _, err = run(capsys, *call, "--sae-images", images / "train")
    assert code == 0, err
    saes = sorted(p.name for p in (tmp_path / "out" / "saes").iterdir())
    assert saes == ["background.safetensors", *(f"transformer.resblocks.{i}" for i in range(6))]
    settings = json.loads(next((tmp_path / "out" / "runs").rglob("run.json")).read_text())["settings"]
    assert settings["plasticity"] is True


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--strategy", "nothing"], "expected one of"),
        (["--tasks", "categories"], "is for emoji"),
        (["--tasks", 2, "--increment", 1], "task_sizes"),
        (["--tasks", 9], "between 1 and 4"),
        (["--tasks", 0], "at least 1"),
        (["--seeds", 0], "at least 1"),
        (["--jobs", 0], "at least 1"),
        (["--recipe", "paper", "--model", "emojiclip", "--tasks", 2], "are for timm models"),
        (
            ["--tasks", 2, "--strategy", "zero_shot", "--model", "timm:vit_tiny_patch16_224", "--pretrained", "random"],
            "CLIP",
        ),
        (["--tasks", 2, "--model", "timm:no_such_vit"], "no model"),
    ],
)
def test_mistakes_are_named(images, tmp_path, capsys, extra, says):
    code, _, err = run(capsys, "cil", "--data", images, "--seeds", 1, "--out", tmp_path / "out", *QUICK, *extra)
    assert code == 2
    assert says in err
