"""--skip-unreadable in every command that reads sets of images: done without them, counted and listed at the end."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import clipsteer
from _command import run
from clipsteer import FileFormatError, clip, data
from clipsteer.demo.pictures import folder_pictures

pytest.importorskip("open_clip")

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
BROKEN = ("cut.png", "text.jpg", "float.tif")


def fill(folder, count=4, broken=()):
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (20, 20), (200 - 9 * i, 9 * i, 0)).save(folder / f"{i}.png")
    if "cut.png" in broken:
        (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:50])
    if "text.jpg" in broken:
        (folder / "text.jpg").write_text("no image \033[31m")
    if "float.tif" in broken:
        Image.fromarray(np.ones((4, 4), np.float32)).save(folder / "float.tif")
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Classes, of which one cannot be read at all, a table, and PILOT's layout."""
    root = tmp_path_factory.mktemp("sets")
    fill(root / "classes" / "blue", broken=BROKEN)
    fill(root / "classes" / "red")
    fill(root / "classes" / "gone", 0, broken=("text.jpg",))
    fill(root / "flat", 12, broken=BROKEN)
    rows = [{"image": f"flat/{name}", "text": f"a {name}"} for name in ("0.png", "1.png", *BROKEN, "absent.png")]
    (root / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for part in ("train", "test"):
        fill(root / "pilot" / part / "blue", broken=("cut.png",))
        fill(root / "pilot" / part / "red")
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "skip-cli.json").write_text(json.dumps(TINY))
    torch.manual_seed(0)
    made = clipsteer.load(folder / "skip-cli.json")
    head = clip.zero_shot_head(made, ["red", "blue"])
    return clip.save_classifier(folder / "run", made, clip.zero_shot_classifier(made, head), ["blue", "red"])


@pytest.fixture(scope="module")
def sae(tmp_path_factory, model, sets):
    from clipsteer.cli import main as cli

    out = tmp_path_factory.mktemp("sae") / "run"
    args = ["sae", "train", "--model", model, "--data", sets / "classes" / "red", "--out", out, "--d-sae", 48, "--k", 4,
            "--batch-size", 16, "--steps", 6, "--warmup-steps", 2, "--device", "cpu"]  # fmt: skip
    assert cli.main([str(a) for a in args]) == 0
    return out


@pytest.fixture(scope="module")
def conceptor(tmp_path_factory, model, sets):
    from clipsteer.cli import main as cli

    out = tmp_path_factory.mktemp("conceptor") / "c.safetensors"
    args = ["conceptor", "fit", "--model", model, "--data", sets / "classes" / "red", "--out", out, "--device", "cpu"]
    assert cli.main([str(a) for a in args]) == 0
    return out


COMMANDS = {
    "sae train": "sae train --model MODEL --data SETS/classes --out OUT --d-sae 48 --k 4 --batch-size 16 --steps 3 "
    "--warmup-steps 1",
    "sae eval": "sae eval SAE --data SETS/classes",
    "sae eval, flat": "sae eval SAE --data SETS/flat",
    "sae steer": "sae steer SAE --data SETS/classes --feature 3=9 --count 2",
    "sae browse": "sae browse SAE --data SETS/classes --out OUT",
    "conceptor fit": "conceptor fit --model MODEL --data SETS/flat --centre SETS/classes --out OUT",
    "conceptor steer": "conceptor steer CONCEPTOR --data SETS/classes --count 2",
    "splice": "splice --model MODEL SETS/flat/0.png SETS/flat/cut.png --data SETS/flat",
    "finetune": "finetune --model MODEL --data SETS/classes --val SETS/classes --out OUT --batch-size 4 --epochs 1",
    "wise-ft curve": "wise-ft curve MODEL MODEL --reference SETS/pilot/train --shifted SETS/pilot/test --alphas 0 1 "
    "--out OUT",
    "train": "train --data SETS/t.jsonl --val SETS/classes --loss clip --batch-size 2 --epochs 1 --out OUT",
    "align": "align MODEL --data SETS/classes --score conceptor --tokens mean --out OUT",
    "cil": "cil --data SETS/pilot --tasks 2 --seeds 1 --strategy ncm --out OUT",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_done_without_what_cannot_be_read(capsys, sets, model, sae, conceptor, tmp_path, name):
    words = {"MODEL": model, "SETS": sets, "SAE": sae, "CONCEPTOR": conceptor, "OUT": tmp_path / "out"}
    args = COMMANDS[name]
    for word, path in words.items():
        args = args.replace(word, str(path))
    # a broken image ends the command, by its name, unless somebody would go on
    code, _, err = run(capsys, *args.split(), "--device", "cpu")
    if "steer" not in name:  # which looks at a few images alone
        assert code == 1, err
        assert any(broken in err for broken in BROKEN)
        assert "; --skip-unreadable leaves out images that cannot be read (--debug" in err
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    code, _, err = run(capsys, *args.split(), "--device", "cpu", "--skip-unreadable")
    assert code == 0, err
    lines = err.splitlines()
    heading = [i for i, line in enumerate(lines) if line.startswith("clipsteer: ") and "unreadable image(s)" in line]
    assert len(heading) == 1
    listed = lines[heading[0] + 1 :]
    assert lines[heading[0]] == f"clipsteer: {len(listed)} unreadable image(s) were left out:"
    assert all(line.startswith("  ") and any(b in line for b in (*BROKEN, "absent.png")) for line in listed)
    counts = {"sae eval, flat": 3, "conceptor fit": 7, "splice": 3, "train": 8, "cil": 2, "wise-ft curve": 2}
    assert len(listed) == counts.get(name, 4)
    assert "\033" not in err


def test_an_image_that_a_table_names_and_is_not_there(capsys, sets, tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps({"image": "absent.png", "text": "a"}))
    args = ("train", "--data", tmp_path / "t.jsonl", "--loss", "clip", "--batch-size", 1, "--epochs", 1,
            "--out", tmp_path / "out", "--device", "cpu")  # fmt: skip
    code, _, err = run(capsys, *args)
    assert code == 2
    assert "absent.png'; --skip-unreadable leaves out" in err
    (tmp_path / "t.jsonl").unlink()
    assert "--skip-unreadable" not in run(capsys, *args)[2]


def test_it_is_named_once_and_only_where_it_would_help(capsys, sets, sae, tmp_path):
    from clipsteer.cli.main import build_parser

    has_option = set()
    for name, command in commands(build_parser()):
        command.complete()
        options = {option for action in command._actions for option in action.option_strings}
        has_option |= {name} if "--skip-unreadable" in options else set()
    # each of them is run above, but for the demo, which opens its images as these do
    assert has_option - {"demo"} == {name.partition(",")[0] for name in COMMANDS}
    # a damaged file of another kind, and images that are left out already
    (tmp_path / "bad.safetensors").write_bytes(b"?" * 99)
    _, _, err = run(capsys, "sae", "eval", tmp_path / "bad.safetensors", "--data", sets / "classes" / "red")
    assert "error" in err
    assert "--skip-unreadable" not in err
    _, _, err = run(capsys, "sae", "eval", sae, "--data", sets / "classes" / "gone", "--skip-unreadable")
    assert "none of 1 images can be read" in err
    assert "--skip-unreadable" not in err


def commands(parser, name=""):
    """(name, parser) of every command that is no group."""
    groups = [action for action in parser._actions if isinstance(action.choices, dict)]
    if not groups:
        yield name, parser
    for group in groups:
        for word, command in group.choices.items():
            yield from commands(command, f"{name} {word}".strip())


def test_where_all_can_be_read_nothing_is_listed(capsys, sets, sae):
    code, _, err = run(capsys, "sae", "eval", sae, "--data", sets / "classes" / "red", "--skip-unreadable")
    assert code == 0, err
    assert "left out" not in err


def test_a_set_says_what_was_left_out_and_keeps_no_empty_class(sets):
    found = data.open_dataset(sets / "classes", skip_unreadable=True)
    assert found.classes == ["blue", "red"]
    assert found.targets == [0] * 4 + [1] * 4
    assert len(found.unreadable) == 4
    assert [image.size for image, _ in found] == [(20, 20)] * 8
    assert all(any(name in why for name in BROKEN) for why in found.unreadable)
    with pytest.raises(FileFormatError):
        [image for image, _ in data.open_dataset(sets / "classes")]
    flat = data.open_dataset(sets / "flat", skip_unreadable=True)
    assert flat.images_alone
    assert len(flat) == 12
    table = data.open_dataset(sets / "t.jsonl", skip_unreadable=True)
    assert table.targets == ["a 0.png", "a 1.png"]
    assert "absent.png" in table.unreadable[-1]
    with pytest.raises(ValueError, match=r"none of 1 images can be read; the first: .*text\.jpg"):
        data.open_dataset(sets / "classes" / "gone", skip_unreadable=True)


def test_the_demo_opens_its_images_as_it_is_told(sets):
    def readable(path):
        return data.open_dataset(path, skip_unreadable=True)

    pictures = folder_pictures(sets / "flat", 0, 100, readable)
    assert len(pictures.dataset) == 12
    assert {image.size for image, _ in pictures.dataset} == {(20, 20)}
    with pytest.raises(FileFormatError):
        [image for image, _ in folder_pictures(sets / "flat", 0, 100).dataset]
