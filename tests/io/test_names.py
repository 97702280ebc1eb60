"""Names that are not UTF-8: kept as they are, wherever a path or a class goes, and opened by every library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save

import clipsteer
from clipsteer import clip, conceptors, data
from clipsteer.io import files
from clipsteer.io.names import escaped, spoken, unescaped, utf8_path
from clipsteer.reference.pairs import Pairs
from clipsteer.report import Chart, Page, write_csv
from clipsteer.report.layers import Line

CAFE = os.fsdecode(b"caf\xe9")  # Latin-1, as old archives unpack
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
TEXTS = ("", "plain", "naïve ☕", CAFE, "\ud83d", "json:", 'json:"x"', "json:" + CAFE, "a\\udce9", "a\0b\n")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("names") / CAFE
    for part in ("train", "test", "other"):
        for name in (CAFE, "red"):
            (folder / part / name).mkdir(parents=True)
            for i in range(4):
                with (folder / part / name / f"{i}\udcff.png").open("wb") as file:
                    Image.new("RGB", (20, 20), (200 - 9 * i, 9 * i, 0)).save(file, "PNG")
    (folder / "names-io.json").write_text(json.dumps(TINY))
    torch.manual_seed(0)
    # from a plain path: xdist cannot send what is logged of another
    plain = folder.parent / "names-io.json"
    plain.write_text(json.dumps(TINY))
    made = clipsteer.load(plain)
    (folder / "w.safetensors").write_bytes(save({k: v.contiguous() for k, v in made.model.state_dict().items()}))
    return folder


def test_texts_come_back(tmp_path):
    assert all(unescaped(escaped(text)) == text for text in TEXTS)
    assert all(escaped(text) == text for text in TEXTS[:3])
    files.write_json(tmp_path / "x.json", dict(enumerate(TEXTS)))
    assert list(files.read_json(tmp_path / "x.json").values()) == list(TEXTS)
    (tmp_path / "x.json").read_text(encoding="utf-8")
    files.write_safetensors(tmp_path / "x.safetensors", {"w": torch.ones(2)}, {f"k{i}": t for i, t in enumerate(TEXTS)})
    metadata = files.read_safetensors_header(tmp_path / "x.safetensors").metadata
    assert [metadata[f"k{i}"] for i in range(len(TEXTS))] == list(TEXTS)
    # what another program wrote is no text of ours
    assert [unescaped(text) for text in ("json:", "json:[1]", 'json:"cut')] == ["json:", "json:[1]", 'json:"cut']


def test_safetensors_are_read_from_any_path(root):
    path = root / "t.safetensors"
    files.write_safetensors(path, {"w": torch.arange(6.0)}, {"from": str(root)})
    assert torch.equal(files.read_safetensors(path)["w"], torch.arange(6.0))
    assert files.read_safetensors_header(path).metadata == {"from": str(root)}
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(clipsteer.FileFormatError) as caught:
        files.read_safetensors(path)
    assert "caf" in str(caught.value)
    assert "clipsteer-" not in str(caught.value)  # the name that the caller gave, not that of the link
    with utf8_path(root / "w.safetensors") as link:
        assert link.suffix == ".safetensors"
        link.name.encode()
    assert not link.exists()
    with utf8_path(Path("plain")) as same:
        assert same == Path("plain")


def test_a_model_a_classifier_and_a_conceptor_keep_their_names(root, tmp_path):
    model = clipsteer.load(root / "names-io.json", root / "w.safetensors")
    head = clip.zero_shot_head(model, [CAFE, "red"])
    saved = clip.save_classifier(root / "run", model, clip.zero_shot_classifier(model, head), [CAFE, "red"])
    loaded, _, classes = clip.load_classifier(saved)
    assert classes == [CAFE, "red"]
    images = data.open_dataset(root / "train")
    assert images.classes == [CAFE, "red"]
    assert torch.equal(loaded.encode_images(images), model.encode_images(images))
    metadata = {"clip_model": str(root), "classes": json.dumps([CAFE])}
    made = conceptors.Conceptor.fit(torch.randn(20, 4), metadata=metadata)
    made.save(root / "c.safetensors")
    again = conceptors.Conceptor.load(root / "c.safetensors")
    assert again.metadata == made.metadata


def test_tokenizers_are_given_text(root):
    """Those of Hugging Face refuse halves of pairs; open_clip's own puts U+FFFD in their place."""
    model = clipsteer.load(root / "names-io.json", root / "w.safetensors")

    def strict(texts):
        [text.encode() for text in texts]
        return model.tokenizer(texts)

    picky = clip.CLIP(model.model, model.preprocess, strict, model.name, model.pretrained)
    assert torch.equal(clip.zero_shot_head(picky, [CAFE]), clip.zero_shot_head(model, ["caf\ufffd"]))
    images = data.open_dataset(root / "train")
    assert torch.equal(Pairs(images, 1, picky)[0, 0][2], model.tokenizer(["caf\ufffd"])[0])
    assert spoken("naïve ☕") == "naïve ☕"


def test_pages_are_utf8_and_tables_hold_the_bytes_of_the_name(tmp_path):
    page = Page(CAFE)
    page.section(CAFE, CAFE)
    assert "caf" in page.write(tmp_path / "p.html").read_text(encoding="utf-8")
    chart = Chart(CAFE, Line(CAFE, [0, 1], [0, 1]), x="x")
    assert "caf" in chart.write(tmp_path / "c.svg")[0].read_text(encoding="utf-8")
    write_csv(tmp_path / "t.csv", [{"class": CAFE}])
    assert (tmp_path / "t.csv").read_bytes() == b"class\ncaf\xe9\n"


COMMANDS = {
    "finetune": "finetune --model ROOT/names-io.json --pretrained ROOT/w.safetensors --data ROOT/train --val ROOT/test "
    "--out OUT/ft --batch-size 4 --epochs 1",
    "finetune, again": "finetune --model ROOT/names-io.json --pretrained ROOT/w.safetensors --data ROOT/train "
    "--val ROOT/test --out OUT/ft --batch-size 4 --epochs 1",
    "wise-ft curve": "wise-ft curve OUT/ft/zeroshot OUT/ft/finetuned --reference ROOT/test --shifted ROOT/other "
    "--alphas 0 1 --out OUT/curve",
    "wise-ft merge": "wise-ft merge OUT/ft/zeroshot OUT/ft/finetuned --alpha 0.5 --out OUT/m.safetensors",
    "sae train": "sae train --model OUT/ft/finetuned --data ROOT/train --out OUT/sae --d-sae 48 --k 4 --batch-size 16 "
    "--steps 6 --warmup-steps 1",
    "sae train, again": "sae train --model OUT/ft/finetuned --data ROOT/train --out OUT/sae --d-sae 48 --k 4 "
    "--batch-size 16 --steps 6 --warmup-steps 1",
    "sae train --store": "sae train --model OUT/ft/finetuned --data ROOT/train --out OUT/sae2 --store OUT/acts "
    "--d-sae 48 --k 4 --batch-size 16 --steps 3 --warmup-steps 1",
    "sae eval": "sae eval OUT/sae --data ROOT/train --out OUT/m.json --name-features 2",
    "sae steer": "sae steer OUT/sae --data ROOT/train --feature 3=9 --count 2",
    "sae steer, flat": "sae steer OUT/sae --data ROOT/train/red --feature 3=9 --count 2",
    "conceptor fit": "conceptor fit --model OUT/ft/finetuned --data ROOT/train --per-class --out OUT/c.safetensors",
    "conceptor steer": f"conceptor steer OUT/c.safetensors --class {CAFE} --data ROOT/train --count 2",
    "splice": "splice --model OUT/ft/finetuned ROOT/train/red/0\udcff.png --data ROOT/train --out OUT/s.json "
    "--dictionary OUT/concepts",
    "train": "train --data ROOT/train --val ROOT/test --loss clip --batch-size 4 --epochs 1 --out OUT/train "
    "--model ROOT/names-io.json",
    "train, again": "train --data ROOT/train --val ROOT/test --loss clip --batch-size 4 --epochs 1 --out OUT/train "
    "--model ROOT/names-io.json",
    "cil": "cil --data ROOT --tasks 2 --seeds 1 --strategy ncm finetune:rank=2 --epochs 1 --first-epochs 1 "
    "--out OUT/cil",
}  # fmt: skip
SCRIPT = """
import os, sys
from clipsteer.cli import main
for line in sys.stdin.buffer.read().split(b"\\n"):
    print(">>", main.main([os.fsdecode(word) for word in line.split()]), flush=True)
"""


def test_every_command_works_in_folders_of_such_names(root):
    """In one process, so that torch is loaded once; its standard output is as strict as a terminal's."""
    lines = [COMMANDS[name].replace("ROOT", str(root)).replace("OUT", str(root / "out")) for name in COMMANDS]
    call = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=b"\n".join(os.fsencode(f"{line}{'' if 'merge' in line else ' --device cpu'}") for line in lines),
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict", "OMP_NUM_THREADS": "1"},
        timeout=600,
    )  # fmt: skip
    codes = [line[3:] for line in call.stdout.decode().splitlines() if line.startswith(">> ")]
    assert dict(zip(COMMANDS, codes)) == dict.fromkeys(COMMANDS, "0"), call.stderr.decode()[-2000:]
    assert b"caf\\udce9" in call.stdout
    out = root / "out"
    assert files.read_json(out / "ft" / "finetuned" / "config.json")["classes"] == [CAFE, "red"]
    assert clipsteer.SAE.from_pretrained(out / "sae").metadata["data"] == str(root / "train")
    assert files.read_json(out / "s.json")["images"][0]["image"] == str(root / "train" / "red" / "0\udcff.png")
    for page in ("cil/index.html", "curve/curve.html"):
        (out / page).read_text(encoding="utf-8")
