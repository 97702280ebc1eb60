"""Plain CLIPs of an architecture file whose towers give tokens beside the pooled output: the first output counts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from _command import run
from clipsteer import clip
from clipsteer.data.files import captions, image_folder
from clipsteer.ensembles.config import FinetuneConfig
from clipsteer.ensembles.finetuning import finetune
from clipsteer.reference.features import compute, load_run
from clipsteer.reference.train import ContrastiveConfig, train_contrastive

pytest.importorskip("open_clip")

POOLING = {"attentional_pool": True, "attn_pooler_queries": 3, "attn_pooler_heads": 2}
CASES = {
    "attention pooling": ({**POOLING, "output_tokens": True}, {}, False),
    "images": ({"output_tokens": True}, {}, False),
    "texts too": ({**POOLING, "output_tokens": True}, {"output_tokens": True}, True),
}


def architecture(vision, text, custom):
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16, **vision},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1, **text},
    }
    return {**config, "custom_text": True} if custom else config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Architectures with tokens and without, and eight pictures with captions and in folders of two classes."""
    root = tmp_path_factory.mktemp("given")
    lines = ["image,caption"]
    for i in range(8):
        name = ("dark", "light")[i % 2]
        (root / "classes" / name).mkdir(parents=True, exist_ok=True)
        noise = np.random.RandomState(i).randint(0, 60, (40, 40, 3)) + 120 * (i % 2)
        Image.fromarray(noise.astype(np.uint8)).save(root / "classes" / name / f"{i}.png")
        lines.append(f"classes/{name}/{i}.png,a {name} thing number {i}")
    (root / "pairs.csv").write_text("\n".join(lines))
    for case, (vision, text, custom) in CASES.items():
        stem = case.replace(" ", "-")
        (root / f"towers-{stem}.json").write_text(json.dumps(architecture(vision, text, custom)))
        alone = {key: value for key, value in vision.items() if key != "output_tokens"}
        (root / f"towers-{stem}-alone.json").write_text(json.dumps(architecture(alone, {}, custom)))
    return root


def both(folder, case):
    """The same weights with tokens beside the output and without, in double precision."""
    found = []
    for end in ("", "-alone"):
        torch.manual_seed(0)
        found.append(clip.load(folder / f"towers-{case.replace(' ', '-')}{end}.json", dtype=torch.float64))
    return found


@pytest.mark.parametrize("case", CASES)
def test_embeddings_are_the_first_output(case, folder):
    tokens, alone = both(folder, case)
    with torch.no_grad():
        assert isinstance(tokens.model.encode_image(torch.zeros(1, 3, 32, 32).double()), tuple)
    data = captions(folder / "pairs.csv")
    images = [data[i][0] for i in range(8)]
    assert torch.equal(tokens.encode_images(images), alone.encode_images(images))
    words = ["dark", "light"]
    assert torch.equal(clip.zero_shot_head(tokens, words), clip.zero_shot_head(alone, words))
    kept, wanted = compute(tokens, data), compute(alone, data)
    assert torch.equal(kept.image, wanted.image)
    assert torch.equal(kept.text, wanted.text)


@pytest.mark.parametrize("settings", [{}, {"micro_batch": 3}, {"reference": True}], ids=["whole", "parts", "live"])
@pytest.mark.parametrize("case", CASES)
def test_contrastive_training_is_that_without_tokens(case, settings, folder, tmp_path):
    data = captions(folder / "pairs.csv")
    config = ContrastiveConfig(
        batch_size=4, epochs=2, lr=1e-3, log_every=1, loss="distill" if "reference" in settings else "clip",
        micro_batch=settings.get("micro_batch"),
    )  # fmt: skip
    logs, ends = [], []
    for end, model in zip(("tokens", "alone"), both(folder, case)):
        reference = both(folder, case)[end == "alone"] if "reference" in settings else None
        out, lines = tmp_path / end, []
        train_contrastive(model, data, config, reference=reference, out=out, on_log=lines.append,
                          validation={"pairs": data})  # fmt: skip
        logs.append([line["loss"] for line in lines])
        ends.append(model)
    # a loss of float32 numbers; one way normalises twice
    assert logs[0] == pytest.approx(logs[1], rel=1e-6)
    assert len(set(logs[0])) > 1
    again = load_run(tmp_path / "tokens")
    images = [data[i][0] for i in range(8)]
    torch.testing.assert_close(
        again.encode_images(images).double(), ends[0].encode_images(images), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("case", CASES)
def test_finetuning_is_that_without_tokens(case, folder):
    data = image_folder(folder / "classes")
    ends = []
    for model in both(folder, case):
        head = clip.zero_shot_head(model, data.classes)
        config = FinetuneConfig(batch_size=4, epochs=1, warmup_steps=0, lr=1e-3)
        ends.append(finetune(model, data, head, config))
    assert all(torch.equal(a, b) for a, b in zip(ends[0].parameters(), ends[1].parameters()))


def test_the_command_trains_one(folder, tmp_path, capsys):
    code, _, err = run(
        capsys, "train", "--data", folder / "pairs.csv", "--model", folder / "towers-attention-pooling.json",
        "--out", tmp_path / "run", "--device", "cpu", "--batch-size", 4, "--epochs", 1, "--temperature", 0.1,
        "--loss", "clip", "--val", folder / "pairs.csv",
    )  # fmt: skip
    assert code == 0, err
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want = F.normalize(load_run(tmp_path / "run").model.encode_image(pixels)[0], dim=-1)
    torch.testing.assert_close(clip.load(tmp_path / "run").embed(pixels), want)
