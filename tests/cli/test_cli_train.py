from __future__ import annotations

import argparse
import csv
import json
import re

import pytest
import torch
from PIL import Image

from _command import run
from clipsteer.cli import main as cli
from clipsteer.cli.train import _validation
from clipsteer.data.files import captions
from clipsteer.io.files import read_safetensors, write_json
from clipsteer.reference.features import load_run

SMALL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("train")
    lines = ["image,caption"]
    for i in range(8):
        Image.new("RGB", (40, 40), (30 * i, 255 - 30 * i, 128)).save(root / f"{i}.png")
        lines.append(f"{i}.png,colour {i}")
    (root / "pairs.csv").write_text("\n".join(lines))
    write_json(root / "clipsteer-test-cli.json", SMALL)
    return root


def train(folder, out, *more):
    args = ["train", "--data", folder / "pairs.csv", "--model", folder / "clipsteer-test-cli.json", "--out", out,
            "--device", "cpu", "--batch-size", 4, "--epochs", 2, *more]  # fmt: skip
    return cli.main([str(a) for a in args])


def test_a_table_a_reference_and_the_excess(folder, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert train(folder, first, "--reference", "emojiclip", "--val", folder / "pairs.csv", "--temperature", 0.1) == 0
    shown = capsys.readouterr().out
    assert str(first / "model.safetensors") in shown
    assert re.search(r"the loss [\d.e+-]+ % of a step", shown)
    kept = read_safetensors(first / "reference.safetensors")
    assert kept["image"].shape == kept["text"].shape == (8, 256)
    lines = [json.loads(line) for line in (first / "log.jsonl").read_text().splitlines()]
    assert [line["samples"] for line in lines if "pairs/image_to_text_r1" in line] == [8, 16]
    # kept features, and a run as the reference of another
    again = tmp_path / "again"
    assert train(folder, again, "--reference", first / "reference.safetensors", "--temperature", 0.1) == 0
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    table = tmp_path / "excess.csv"
    assert train(folder, second, "--loss", "distill", "--reference", first, "--reference-live", "--excess", table) == 0
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(int(row["sample"]) for row in rows) == list(range(8))
    assert [float(row["excess"]) for row in rows] == sorted((float(row["excess"]) for row in rows), reverse=True)
    data, learner, reference = captions(folder / "pairs.csv"), load_run(second), load_run(first)
    sides = []
    for model in (learner, reference):
        image = model.encode_images([data[i][0] for i in range(8)])
        with torch.no_grad():
            text = torch.nn.functional.normalize(model.model.encode_text(model.tokenizer(data.targets)), dim=1)
        s = (image @ text.T).detach()
        sides += [(x - x.diagonal()[:, None]) / 0.05 for x in (s, s.T)]
    others = ~torch.eye(8, dtype=torch.bool)
    cost = lambda d: (d.exp() * others).mean(1).log() * 0.05
    expected = {
        "learner": (cost(sides[0]) + cost(sides[1])) / 2,
        "reference": (cost(sides[2]) + cost(sides[3])) / 2,
        "excess": (cost(sides[0] - sides[2]) + cost(sides[1] - sides[3])) / 2,
    }
    for row in rows:
        assert row["caption"] == f"colour {row['sample']}"
        for name, values in expected.items():
            assert float(row[name]) == pytest.approx(float(values[int(row["sample"])]), abs=1e-4)


def test_the_bundled_drawings_and_their_four_cells(tmp_path):
    args = ["train", "--loss", "clip", "--samples", 64, "--batch-size", 64, "--val", "emoji", "--out", tmp_path,
            "--device", "cpu"]  # fmt: skip
    assert cli.main([str(a) for a in args]) == 0
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    cells = {key.split("/")[0] for key in line if "/" in key}
    assert cells == {"trained style, new concepts", "held-out style, seen concepts", "held-out style, new concepts"}
    assert json.loads((tmp_path / "config.json").read_text())["train"]["pairs"] == 13292


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--loss", "drrho"], "needs --reference"),
        (["--loss", "clip", "--select", 0.5], "with --select or --excess needs --reference"),
        (["--reference", "no-such-model"], "no model is called 'no-such-model'"),
        (["--loss", "clip", "--batch-size", 9], "at most the 8 pairs"),
        (["--reference", "emojiclip", "--batch-size", 9], "at most the 8 pairs"),
        (["--loss", "global", "--temperature", -1], "--temperature must be positive"),
        (["--loss", "clip", "--grad-clip", 0], "--grad-clip must be positive"),
        (["--loss", "clip", "--logit-bias", -5], "--logit-bias must be left out for loss='clip', as siglip alone"),
        (["--loss", "siglip", "--logit-bias", "inf"], "--logit-bias must be finite"),
        (["--loss", "siglip", "--select", 0.5], "--loss siglip with --select or --excess needs --reference"),
    ],
)
def test_mistakes(folder, tmp_path, capsys, more, message):
    assert train(folder, tmp_path, *more) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())  # not after the reference's features were computed


def test_a_reference_may_have_its_architecture_in_a_file(folder, tmp_path, capsys):
    small = folder / "clipsteer-test-cli.json"
    assert train(folder, tmp_path / "a", "--reference", small) == 2
    assert "--reference-pretrained" in capsys.readouterr().err
    more = ["--loss", "clip", "--temperature", 0.1, "--log-every", 3, "--grad-clip", 0.01]
    assert train(folder, tmp_path / "b", *more) == 0
    lines = [json.loads(line) for line in (tmp_path / "b" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4]
    assert json.loads((tmp_path / "b" / "config.json").read_text())["train"]["grad_clip"] == 0.01
    weights = tmp_path / "b" / "model.safetensors"
    more = ["--reference", small, "--reference-pretrained", weights, "--temperature", 0.1]
    assert train(folder, tmp_path / "c", *more) == 0
    kept, model = read_safetensors(tmp_path / "c" / "reference.safetensors"), load_run(tmp_path / "b")
    data = captions(folder / "pairs.csv")
    torch.testing.assert_close(kept["image"], model.encode_images([data[i][0] for i in range(8)]).detach())


def test_kept_features_cannot_see_crops(folder, tmp_path, capsys):
    assert train(folder, tmp_path / "a", "--reference", "emojiclip", "--epochs", 1) == 0
    kept = tmp_path / "a" / "reference.safetensors"
    assert train(folder, tmp_path / "b", "--reference", kept, "--reference-live") == 2
    assert "--reference-live needs a model" in capsys.readouterr().err


def test_a_reference_without_weights_is_refused(tmp_path, capsys):
    (tmp_path / "pairs.csv").write_text("image,caption\na.png,a\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    code, _, err = run(capsys, "train", "--data", tmp_path / "pairs.csv", "--reference", "ViT-B-32", "--batch-size", 1,
                       "--out", tmp_path / "out")  # fmt: skip
    assert code == 2
    assert "--reference-pretrained" in err


def test_validation_sets_of_one_name_are_both_kept(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "val.csv").write_text("image,caption\nx.png,a\n")
    found = _validation(
        argparse.Namespace(
            val=[str(tmp_path / "a" / "val.csv"), str(tmp_path / "b" / "val.csv")], skip_unreadable=False
        )
    )
    assert list(found) == ["val", str(tmp_path / "b" / "val.csv")]
