from __future__ import annotations

import csv
import importlib.util
import json
import shutil
import threading

import pytest
import torch
from PIL import Image

from _command import run
from benchmarks import wise_ft as style_shift
from clipsteer import wise_ft
from clipsteer.cli import main as cli
from clipsteer.data.emoji import EmojiStyles
from clipsteer.ensembles.robustness import Baseline
from clipsteer.io.files import read_safetensors, write_safetensors
from clipsteer.io.locks import NAME, only_writer, temporary_folder


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Two classes of drawings in two looks, and a run tuned on one."""
    root = tmp_path_factory.mktemp("cli")
    for look, lift in (("plain", 0), ("pale", 60)):
        for name, colour in (("red thing", (190, 20, 20)), ("blue thing", (20, 20, 190))):
            (root / look / name).mkdir(parents=True)
            for i in range(4):
                picture = Image.new("RGB", (30, 30), tuple(min(255, c + lift + 5 * i) for c in colour))
                picture.save(root / look / name / f"{i}.png")
    args = ["finetune", "--data", root / "plain", "--val", root / "pale", "--out", root / "run", "--batch-size", 4,
            "--epochs", 2, "--lr", 1e-3]  # fmt: skip
    assert cli.main([str(a) for a in args]) == 0
    return root


def test_finetune_leaves_both_ends(tuned, capsys):
    config = json.loads((tuned / "run" / "finetuned" / "config.json").read_text())
    assert config["classes"] == ["blue thing", "red thing"]
    assert config["finetune"]["epochs"] == 2
    ends = [read_safetensors(tuned / "run" / end / "head.safetensors") for end in ("zeroshot", "finetuned")]
    assert not torch.equal(ends[0]["weight"], ends[1]["weight"])
    names = tuned / "names.json"
    names.write_text(json.dumps({"red thing": "tomato", "blue thing": "sea"}))
    args = [
        "finetune",
        "--data",
        tuned / "plain",
        "--names",
        names,
        "--template",
        "a {}",
        "--epochs",
        1,
        "--mode",
        "lc",
    ]
    assert run(capsys, *args, "--out", tuned / "renamed")[0] == 0
    other = read_safetensors(tuned / "renamed" / "zeroshot" / "head.safetensors")
    assert not torch.equal(other["weight"], ends[0]["weight"])
    names.write_text("[]")
    code, _, err = run(capsys, *args, "--out", tuned / "bad")
    assert code == 2
    assert "JSON object" in err


def test_merge_of_files_and_of_runs(tuned, capsys):
    ends = [tuned / "run" / "zeroshot", tuned / "run" / "finetuned"]
    code, out, _ = run(capsys, "wise-ft", "merge", *ends, "--alpha", 0.25, 0.5, "--out", tuned / "m-{alpha}")
    assert code == 0
    assert [line.rsplit("/", 1)[1] for line in out.splitlines()] == ["m-0.25", "m-0.5"]
    for name in ("model.safetensors", "head.safetensors"):
        expected = wise_ft(ends[0] / name, ends[1] / name, 0.25)
        found = read_safetensors(tuned / "m-0.25" / name)
        assert all(torch.equal(found[k], v) for k, v in expected.items())
    assert json.loads((tuned / "m-0.25" / "config.json").read_text())["wise_ft_alpha"] == 0.25
    layers = ["--layer", "head.*=1", "--layer", "visual.*=0.5", "--layer", "*=0"]
    assert run(capsys, "wise-ft", "merge", *ends, *layers, "--out", tuned / "layers")[0] == 0
    head, model = (read_safetensors(tuned / "layers" / n) for n in ("head.safetensors", "model.safetensors"))
    assert torch.equal(head["weight"], read_safetensors(ends[1] / "head.safetensors")["weight"])
    start = read_safetensors(ends[0] / "model.safetensors")
    assert torch.equal(model["token_embedding.weight"], start["token_embedding.weight"])
    assert not torch.equal(model["visual.proj"], start["visual.proj"])

    files = [tuned / "x.safetensors", tuned / "y.safetensors"]
    for i, file in enumerate(files):
        write_safetensors(file, {"w": torch.full((3,), float(i))})
    assert run(capsys, "wise-ft", "merge", *files, "--out", tuned / "z.safetensors")[0] == 0
    assert read_safetensors(tuned / "z.safetensors")["w"].tolist() == [0.5] * 3
    write_safetensors(files[1], {"v": torch.zeros(3)})
    code, _, err = run(capsys, "wise-ft", "merge", *files, "--out", tuned / "z.safetensors")
    assert code == 2
    assert "only in the first (1): w" in err
    assert run(capsys, "wise-ft", "merge", *ends, "--alpha", 0, 1, "--out", tuned / "one")[0] == 2
    assert run(capsys, "wise-ft", "merge", *files, "--layer", "w", "--out", "z")[0] == 2


def test_a_merge_of_runs_is_whole_or_not_at_all(tuned, capsys):
    ends = [tuned / "run" / "zeroshot", tuned / "run" / "finetuned"]
    out, merge = tuned / "whole", ["wise-ft", "merge", *ends]
    before = sorted(p.name for p in tuned.iterdir())
    # the head's patterns are right, the model's are not
    code, _, err = run(capsys, *merge, "--layer", "head.*=1", "--out", out)
    assert code == 2
    assert "no pattern in alpha matches" in err
    assert (
        run(capsys, *merge, "--layer", "head.weight=1", "--layer", "*=0", "--layer", "nothing=1", "--out", out)[0] == 2
    )
    assert sorted(p.name for p in tuned.iterdir()) == before
    # each tensor of the head by its own pattern; what else is in the folder stays
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert run(capsys, *merge, "--layer", "head.bias=1", "--layer", "*=0", "--out", out)[0] == 0
    heads = [read_safetensors(folder / "head.safetensors") for folder in (out, *ends)]
    assert torch.equal(heads[0]["bias"], heads[2]["bias"])
    assert not torch.equal(heads[1]["bias"], heads[2]["bias"])
    assert torch.equal(heads[0]["weight"], heads[1]["weight"])
    kept = {p.name: p.read_bytes() for p in out.iterdir()}
    assert set(kept) == {"notes.txt", "config.json", "head.safetensors", "model.safetensors"}
    # a model that does not match leaves the folder as it was
    bad = tuned / "bad-end"
    shutil.copytree(ends[1], bad)
    write_safetensors(bad / "model.safetensors", {"w": torch.zeros(3)})
    assert run(capsys, "wise-ft", "merge", ends[0], bad, "--out", out)[0] == 2
    assert {p.name: p.read_bytes() for p in out.iterdir()} == kept
    assert not [p for p in tuned.iterdir() if p.suffix == ".tmp"]


def test_what_a_killed_merge_left_goes_with_the_next(tuned, capsys):
    ends = [tuned / "run" / "zeroshot", tuned / "run" / "finetuned"]
    left = [tuned / f".killed-{alpha}.0123456789ab.tmp" for alpha in (0.25, 0.5)]
    other = tuned / ".another.0123456789ab.tmp"
    for folder in (*left, other):
        folder.mkdir()
        (folder / "head.safetensors").write_bytes(b"half")
    merge = ["wise-ft", "merge", *ends, "--alpha", 0.25, 0.5, "--out", tuned / "killed-{alpha}"]
    with temporary_folder(tuned / "killed-0.5") as running:
        left[1].mkdir()  # the other merge has removed it
        assert run(capsys, *merge)[0] == 0
        assert running.is_dir()
    assert [folder for folder in (*left, running) if folder.exists()] == []
    assert other.is_dir()
    shutil.rmtree(other)


def test_commands_that_write_for_one_process_refuse_several(tuned, capsys, monkeypatch):
    ends = [tuned / "run" / "zeroshot", tuned / "run" / "finetuned"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command, says in (
        (["cil", "--data", "emoji"], "cil runs in one process: start it without torchrun; --jobs N"),
        (["finetune", "--data", "emoji:noto:train"], "finetune runs in one process"),
        (["wise-ft", "merge", *ends], "wise-ft merge runs in one process"),
        (["demo"], "demo runs in one process"),
    ):
        code, _, err = run(capsys, *command, "--out", tuned / "several")
        assert code == 2
        assert says in err
        assert not (tuned / "several").exists()
    assert run(capsys, "env")[0] == 0  # which writes nothing


def test_a_second_command_in_the_folder_is_told_who_writes_there(tuned, capsys):
    """Whatever the folder is of, and before anything is computed."""
    data = ["--data", tuned / "plain"]
    folder = tuned / "taken"
    for command in (
        ["finetune", *data],
        ["train", *data, "--loss", "clip"],
        ["cil", "--data", tuned],
        ["sae", "train"],
    ):
        told = []

        def second(command=command, told=told):
            told.append(run(capsys, *command, "--out", folder))

        with only_writer(folder, "first"):
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()
            assert [path.name for path in folder.iterdir()] == [NAME]
        code, _, err = told[0]
        assert code == 1
        assert f"{folder} is being written by another thread of this process" in err


def test_curve(tuned, capsys):
    baseline = tuned / "models.csv"
    baseline.write_text("reference,reference_n,shifted,shifted_n\n0.5,100,0.4,100\n0.8,100,0.6,100\n")
    ends = [tuned / "run" / "zeroshot", tuned / "run" / "finetuned"]
    args = ["wise-ft", "curve", *ends, "--reference", tuned / "plain", "--shifted", tuned / "pale", "--alphas", 0.5]
    code, out, _ = run(capsys, *args, "--baseline", baseline, "--out", tuned / "curve")
    assert code == 0
    assert "effective robustness" in out
    with (tuned / "curve" / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["method"], r["alpha"]) for r in rows[::2]] == [
        (m, a) for m in ("weight", "output") for a in ("0.0", "0.5", "1.0")
    ]
    assert {r["n"] for r in rows} == {"8"}
    assert "Clopper" in (tuned / "curve" / "curve.html").read_text()
    baseline.write_text("reference,shifted\n0.5,0.4\n")
    code, _, err = run(capsys, *args, "--baseline", baseline, "--out", tuned / "curve")
    assert code == 1
    assert "reference_n" in err
    code, _, err = run(capsys, *args[:5], "classify30:noto:test", "--shifted", tuned / "pale", "--out", tuned / "curve")
    assert code == 2
    assert "the classifier lacks" in err
    assert run(capsys, *args[:5], "classify30:noto", "--shifted", tuned / "pale", "--out", tuned / "curve")[0] == 2


def test_the_split_keeps_concepts_apart():
    emoji, parts = EmojiStyles(), style_shift.split()
    assert not set(parts.fit) & set(parts.validation)
    assert sorted(parts.fit + parts.validation) == emoji.indices(classify30="train")
    assert parts.test == emoji.indices(classify30="test")
    assert parts == style_shift.split()
    kinds = {emoji.concepts[i].subcategory for i in parts.validation}
    assert len(kinds) == 30
    assert {emoji.concepts[i].subcategory for i in parts.fit} == kinds
    test = style_shift.classify30("twemoji", parts.test)
    assert (len(test), test.classes) == (218, sorted(kinds))


def test_emoji_runs_from_end_to_end(capsys, tmp_path):
    args = ["--styles", "noto", "--seeds", 0, 1, "--mode", "lc", "--lrs", 1e-2, "--epochs", 2,
            "--alphas", 0.5, "--out", tmp_path]  # fmt: skip
    assert style_shift.main([str(a) for a in args]) == 0
    out = capsys.readouterr().out
    assert "tuned on noto" in out
    names = {
        "wise_ft_emoji.json",
        "wise_ft_emoji.csv",
        "wise_ft_emoji.md",
        "wise_ft_emoji.html",
        "wise_ft_emoji_noto.svg",
    }
    if importlib.util.find_spec("resvg_py"):
        names.add("wise_ft_emoji_noto.png")
        assert "wise_ft_emoji_noto.png" in out
    assert {p.name for p in tmp_path.iterdir()} == names
    found = json.loads((tmp_path / "wise_ft_emoji.json").read_text())["styles"]["noto"]
    with (tmp_path / "wise_ft_emoji.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 3 * 3  # seeds, methods, alphas, sets
    at = lambda alpha: [float(r["accuracy"]) for r in rows
                        if (r["method"], r["role"], float(r["alpha"])) == ("weight", "shifted", alpha)]  # fmt: skip
    assert found["accuracy"]["weight"]["default"]["shifted"] == pytest.approx(sum(at(0.5)) / 4, abs=1e-5)
    gain = sum(at(0.5)[:2]) / 2 - max(sum(at(a)[:2]) / 2 for a in (0.0, 1.0))
    assert found["accuracy_gain_over_both_ends"]["default"]["by_seed"][0] == pytest.approx(gain, abs=1e-5)
    # only the head is tuned: both ensembles are the same up to rounding
    weight, output = (found["accuracy"][m]["default"]["shifted"] for m in ("weight", "output"))
    assert weight == pytest.approx(output, abs=2 / 436)
    baseline = Baseline(**found["baseline"])
    assert baseline.models == 24
    zero = found["accuracy"]["weight"]["zeroshot"]
    assert zero["effective_robustness"] == pytest.approx(zero["shifted"] - baseline(zero["reference"], 218))
