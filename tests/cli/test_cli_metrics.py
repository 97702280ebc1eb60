"""``clipsteer sae eval --metrics`` as a user meets it."""

from __future__ import annotations

import json
import math

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from _command import run
from clipsteer import SAE

HOOK = "visual.transformer.resblocks.0"
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
KINDS = {"red": (200, 0, 0), "blue": (0, 0, 200), "green": (0, 200, 0)}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Pictures of three kinds, a tower, and two SAEs of it."""
    open_clip = pytest.importorskip("open_clip")
    root = tmp_path_factory.mktemp("metrics")
    for name, colour in KINDS.items():
        (root / "images" / name).mkdir(parents=True)
        for i in range(8):
            picture = Image.new("RGB", (32, 32), "white")
            picture.paste(tuple(max(0, c - 9 * i) for c in colour), (4 * (i % 3), 0, 32, 16 + i))
            picture.save(root / "images" / name / f"{i}.png")
    (root / "ViT-metrics-test.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(root / "ViT-metrics-test.json")
    torch.manual_seed(0)
    weights = {k: v.contiguous() for k, v in open_clip.create_model("ViT-metrics-test").state_dict().items()}
    save_file(weights, root / "weights.safetensors")
    known = {"clip_model": "ViT-metrics-test", "pretrained": str(root / "weights.safetensors"), "hook_point": HOOK}
    for seed in (0, 1):
        torch.manual_seed(seed)
        SAE(32, 40, "topk", 4, metadata=known).save_pretrained(root / f"sae{seed}")
    return root


def test_all_metrics(capsys, files):
    pytest.importorskip("scipy")
    call = ["sae", "eval", files / "sae0", "--data", files / "images", "--out", files / "m.json"]
    more = ["--metrics-model", "ViT-metrics-test", "--metrics-pretrained", files / "weights.safetensors"]
    code, out, _ = run(capsys, *call, "--metrics", "all", *more, "--metrics-sae", files / "sae1")
    assert code == 0
    found = json.loads((files / "m.json").read_text())["metrics"]
    assert found.pop("definition") == "clipsteer"
    assert set(found) == {
        "fvu", "localisation", "probing", "preservation", "monosemanticity", "absorption", "coverage", "stability"
    }  # fmt: skip
    for name, part in found.items():
        line = next(line for line in out.splitlines() if line.startswith(f"{name} ") and part["unit"] in line)
        value = part["value"]
        assert (f"{value:.4f}" if value is not None and math.isfinite(value) else "—") in line
        assert str(part["scored"]) in line
    # 16 patches behind a class token
    assert found["localisation"]["details"]["random"] == pytest.approx(-1 / 15)
    assert found["fvu"]["scored"] == 24 * 17
    code, out, _ = run(capsys, *call, "--metrics", "fvu,coverage")
    assert code == 0
    assert set(json.loads((files / "m.json").read_text())["metrics"]) == {"definition", "fvu", "coverage"}


def test_groups_of_siblings(capsys, files):
    call = ["sae", "eval", files / "sae0", "--data", files / "images", "--metrics", "absorption"]
    (files / "groups.json").write_text('{"warm": ["red", "green"]}')
    code, out, _ = run(capsys, *call, "--metrics-groups", files / "groups.json", "--out", files / "g.json")
    assert code == 0
    rows = json.loads((files / "g.json").read_text())["metrics"]["absorption"]["details"]["classes"]
    assert {row["group"] for row in rows} <= {"warm"}
    (files / "groups.json").write_text('{"warm": ["red", "ochre"]}')
    code, _, err = run(capsys, *call, "--metrics-groups", files / "groups.json")
    assert code == 2
    assert "ochre" in err
    (files / "groups.json").write_text("[1]")
    code, _, err = run(capsys, *call, "--metrics-groups", files / "groups.json")
    assert code == 2
    assert "must be JSON" in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--metrics", "localization"], "did you mean 'localisation'"),
        (["--metrics", "stability"], "pass --metrics-sae"),
        (["--metrics", "monosemanticity"], "pass --metrics-model"),
        (["--metrics", "fvu", "--metrics-definition", "visaebench"], "visaebench-0.1.0"),
        (["--metrics", "coverage", "--metrics-definition", "visaebench-0.1.0"], "'coverage' is none of"),
        (["--metrics-sae", "x"], "--metrics-sae goes with --metrics"),
        (["--metrics", "all", "--metrics-model", "ViT-metrics-test"], "pass --metrics-pretrained"),
    ],
)
def test_what_is_missing_is_said(capsys, files, options, said):
    code, _, err = run(capsys, "sae", "eval", files / "sae0", "--data", files / "images", *options)
    assert code == 2
    assert said in err
    assert "Traceback" not in err


def test_pictures_without_kinds(capsys, files, tmp_path):
    for i in range(3):
        Image.new("RGB", (32, 32), (i, 9 * i, 0)).save(tmp_path / f"{i}.png")
    code, _, err = run(capsys, "sae", "eval", files / "sae0", "--data", tmp_path, "--metrics", "probing")
    assert code == 2
    assert "probing needs labels of at least two classes" in err
