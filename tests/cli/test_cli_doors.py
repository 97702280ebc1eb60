"""What --model and --data may name, in every command: folders of runs, flat folders, drawings by style and part."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest
import torch
from PIL import Image

import clipsteer
from _command import run
from clipsteer import clip, data
from clipsteer.cli.cil import _scenario
from clipsteer.cli.train import _pairs, _validation
from clipsteer.data.emoji import TRAINED_STYLES, classify30

pytest.importorskip("open_clip")

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
LAYOUT = "FOLDER/CLASS/image.jpg"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder as `clipsteer finetune` leaves it, of a model whose architecture is a file."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "doors-cli.json").write_text(json.dumps(TINY))
    torch.manual_seed(0)
    made = clipsteer.load(folder / "doors-cli.json")
    head = clip.zero_shot_head(made, ["red", "blue"])
    return clip.save_classifier(folder / "run", made, clip.zero_shot_classifier(made, head), ["red", "blue"])


def fill(folder, count=8):
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (20, 20), (200 - 9 * i, 9 * i, 0)).save(folder / f"{i}.png")
    (folder / "._0.png").write_bytes(b"a resource fork")
    return folder


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("images") / "flat")


@pytest.fixture(scope="module")
def sorted_(tmp_path_factory):
    root = tmp_path_factory.mktemp("images") / "sorted"
    for name in ("blue", "red", ".ipynb_checkpoints"):
        fill(root / name, 4)
    return root


@pytest.fixture(scope="module")
def sae(tmp_path_factory, model, flat):
    from clipsteer.cli import main as cli

    out = tmp_path_factory.mktemp("sae") / "run"
    args = ["sae", "train", "--model", model, "--data", flat, "--out", out, "--d-sae", 48, "--k", 4, "--batch-size", 16,
            "--steps", 20, "--warmup-steps", 5, "--device", "cpu"]  # fmt: skip
    assert cli.main([str(a) for a in args]) == 0
    return out


def test_commands_that_need_no_classes_go_on_with_a_flat_folder(capsys, sae, model, flat, tmp_path):
    # provenance names what opens again, whatever the folder of the run is called
    trained = clipsteer.SAE.from_pretrained(sae)
    assert trained.metadata["clip_model"] == str(model / "architecture.json")
    assert trained.metadata["pretrained"] == str(model / "model.safetensors")
    code, out, err = run(capsys, "sae", "eval", sae, "--data", flat, "--out", tmp_path / "m.json", "--device", "cpu")
    assert code == 0, err
    figures = json.loads((tmp_path / "m.json").read_text())
    assert figures["images"] == 8
    assert not [name for name in figures if name.startswith(("ce_", "top1_"))]
    code, out, err = run(
        capsys, "sae", "steer", sae, "--data", flat, "--feature", "3=9", "--count", 2, "--device", "cpu"
    )
    assert code == 0, err
    assert out.splitlines()[0] == "0.png"
    more = ["--data", flat, "--centre", flat, "--out", tmp_path / "c.safetensors", "--device", "cpu"]
    code, _, err = run(capsys, "conceptor", "fit", "--model", model, *more)
    assert code == 0, err
    code, out, err = run(capsys, "splice", flat / "0.png", "--data", flat, "--device", "cpu")
    assert code == 0, err
    assert "concepts, cosine" in out


def test_commands_that_need_classes_or_captions_name_the_layout(capsys, model, flat, sorted_, tmp_path):
    common = ["--out", tmp_path / "out", "--device", "cpu"]
    for args, option in (
        (["finetune", "--model", model, "--data", flat], "--data"),
        (["finetune", "--model", model, "--data", sorted_, "--val", flat], "--val"),
        (["wise-ft", "curve", model, model, "--reference", sorted_, "--shifted", flat], "--shifted"),
        (["train", "--loss", "clip", "--batch-size", 4, "--data", flat], "--data"),
        (["train", "--loss", "clip", "--batch-size", 4, "--data", sorted_, "--val", flat], "--val flat"),
    ):
        code, _, err = run(capsys, *args, *common)
        assert code == 2, err
        assert f"clipsteer: error: {option}: these images have n" in err
        assert LAYOUT in err
    for part in ("train", "test"):
        fill(tmp_path / "pilot" / part)
    code, _, err = run(capsys, "cil", "--data", tmp_path / "pilot", "--tasks", 2, *common)
    assert code == 2
    assert "folder_scenario: " in err
    assert LAYOUT in err
    code, _, err = run(capsys, "conceptor", "fit", "--model", model, "--data", flat, "--per-class", *common)
    assert code == 2
    assert "folder of class folders" in err
    assert not (tmp_path / "out").exists()


def test_one_class_folder_is_no_classes_to_tell_apart(capsys, sae, model, tmp_path):
    """A folder too high: every prediction would be right, and a head of one row learns nothing."""
    fill(tmp_path / "one" / "red", 4)
    fill(tmp_path / "two" / "red", 4)
    fill(tmp_path / "two" / "blue", 4)
    common = ["--out", tmp_path / "out", "--device", "cpu"]
    code, _, err = run(
        capsys, "sae", "eval", sae, "--data", tmp_path / "one", "--out", tmp_path / "m.json", "--device", "cpu"
    )
    assert code == 0, err
    figures = json.loads((tmp_path / "m.json").read_text())
    assert not [name for name in figures if name.startswith(("ce_", "top1_"))]
    steer = ["sae", "steer", sae, "--feature", "3=9", "--count", 1, "--top", 1, "--device", "cpu"]
    code, out, err = run(capsys, *steer, "--data", tmp_path / "one")
    assert code == 0, err
    assert "red 100%" not in out
    train = ["train", "--loss", "clip", "--batch-size", 4, "--data", tmp_path / "two", "--val", tmp_path / "one"]
    finetune = ["finetune", "--model", model, "--data", tmp_path / "one"]
    for args, option in ((finetune, "--data"), (train, "--val one")):
        code, _, err = run(capsys, *args, *common)
        assert code == 2, err
        assert f"clipsteer: error: {option}: one class alone, 'red'; expected" in err
        assert LAYOUT in err
    assert not (tmp_path / "out").exists()


def test_hidden_folders_are_no_classes(capsys, model, sorted_, tmp_path):
    args = ["finetune", "--model", model, "--data", sorted_, "--batch-size", 4, "--epochs", 1, "--mode", "lc"]
    code, out, err = run(capsys, *args, "--out", tmp_path / "run", "--device", "cpu")
    assert code == 0, err
    assert "8 images, 2 classes" in out
    _, _, classes = clip.load_classifier(tmp_path / "run" / "finetuned")
    assert classes == ["blue", "red"]
    # merged, it still brings its architecture
    ends = [tmp_path / "run" / "zeroshot", tmp_path / "run" / "finetuned"]
    code, _, err = run(capsys, "wise-ft", "merge", *ends, "--out", tmp_path / "half")
    assert code == 0, err
    merged = clipsteer.load(tmp_path / "half")
    assert merged.name == str(tmp_path / "half" / "architecture.json")
    code, _, err = run(capsys, "wise-ft", "merge", *ends, "--out", tmp_path / "half")  # over what is there
    assert code == 0, err
    code, _, err = run(capsys, "sae", "train", "--model", tmp_path / "run", "--out", tmp_path / "x")
    assert code == 2
    assert "holds a run of clipsteer finetune; name" in err


def test_drawings_by_style_and_part(capsys, tmp_path):
    args = ["conceptor", "fit", "--data", "emoji:noto:test", "--per-class", "--device", "cpu"]
    code, _, err = run(capsys, *args, "--aperture", 1, "--out", tmp_path / "c.safetensors")
    assert code == 0, err
    kept = clipsteer.Conceptor.load(tmp_path / "c.safetensors")
    assert json.loads(kept.metadata["classes"]) == data.open_dataset("emoji:noto:test").classes
    code, _, err = run(capsys, *args[:3], "emoji:notto", "--out", tmp_path / "d.safetensors")
    assert code == 2
    assert "did you mean 'noto'" in err


def test_what_the_drawings_are_for_a_contrastive_run():
    emoji = data.EmojiStyles()
    cells = emoji.cells()
    args = Namespace(data="emoji", val=["emoji", "emoji:fluent:seen"], skip_unreadable=False)
    assert _pairs(args).targets == emoji.captioned(cells["trained", True], "noisy").targets
    found = _validation(args)
    expected = {
        "trained style, new concepts": cells["trained", False],
        "held-out style, seen concepts": cells["held-out", True],
        "held-out style, new concepts": cells["held-out", False],
        "emoji:fluent:seen": emoji.drawings("fluent", "seen"),
    }
    assert list(found) == list(expected)
    for name, drawings in expected.items():
        wanted = emoji.captioned(drawings, "label")
        assert (found[name].targets, found[name].sources) == (wanted.targets, wanted.sources)


def test_styles_of_a_class_incremental_run():
    place = (5, None, None, "concepts", "test", 1993)
    trained = _scenario("emoji:trained", *place)
    assert trained.train.sources == classify30(TRAINED_STYLES, data.split(share=0.0).fit).sources
    assert len(_scenario("emoji", *place).train) > len(trained.train) > len(_scenario("emoji:noto", *place).train)
    for wrong, split in (("emoji:notto", "concepts"), ("emoji:noto:seen", "concepts"), ("emoji:noto", "styles")):
        with pytest.raises(ValueError, match="--data must be emoji or, with --split concepts, emoji:STYLE"):
            _scenario(wrong, 5, None, None, split, "test", 1993)
