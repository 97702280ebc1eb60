"""SigLIP 2 through the command line, as open_clip and as transformers write it: SAEs trained, evaluated and steered
with, texts read as in its training."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import clipsteer
from _command import run
from clipsteer import clip
from clipsteer.io.files import write_json, write_safetensors

open_clip = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")
pytest.importorskip("timm")

COLOURS = {"red": (220, 20, 20), "blue": (20, 30, 220), "green": (20, 200, 40)}
LENGTH = 16


def save_tokenizer(folder):
    """Of letters, which knows capitals, as SigLIP 2's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    letters = sorted({*"abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ,."})
    vocabulary = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, **{c: i + 4 for i, c in enumerate(letters)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder)


def of_open_clip(folder):
    """As open_clip's own: a timm tower with attention pooling, canonical texts, a logit bias."""
    text = {"context_length": LENGTH, "vocab_size": 99, "hf_tokenizer_name": "timm/ViT-B-16-SigLIP2", "width": 64,
            "tokenizer_kwargs": {"clean": "canonicalize"}, "heads": 2, "layers": 2, "no_causal_mask": True,
            "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6},
            "act_kwargs": {"approximate": "tanh"}}  # fmt: skip
    vision = {"image_size": 160, "timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "map",
              "timm_proj": "none"}  # fmt: skip
    known = {"embed_dim": 64, "init_logit_bias": -10, "custom_text": True, "vision_cfg": vision, "text_cfg": text}
    half = [0.5, 0.5, 0.5]
    preprocess = {"mean": half, "std": half, "interpolation": "bicubic", "resize_mode": "squash"}
    folder.mkdir()
    write_json(folder / "open_clip_config.json", {"model_cfg": known, "preprocess_cfg": preprocess})
    write_json(folder.with_suffix(".json"), known)
    open_clip.add_model_config(folder.with_suffix(".json"))
    made = open_clip.create_model(folder.name)
    write_safetensors(folder / "open_clip_model.safetensors", made.state_dict())
    save_tokenizer(folder)
    return f"local-dir:{folder}"


SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}


def of_transformers(kind, folder):
    """Of any number of patches ("Siglip2"), or for images of one size, which go by SigLIP's name ("Siglip")."""
    vision = {**SIZES, "patch_size": 16}
    vision |= {"num_patches": 16} if kind == "Siglip2" else {"image_size": 64}
    text = {**SIZES, "vocab_size": 99, "max_position_embeddings": LENGTH, "projection_size": 64, "eos_token_id": 1,
            "pad_token_id": 0, "bos_token_id": 2}  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision)
    getattr(transformers, f"{kind}Model")(config).eval().save_pretrained(folder)
    if kind == "Siglip2":
        transformers.Siglip2ImageProcessor(patch_size=16, max_num_patches=16).save_pretrained(folder)
    else:
        transformers.SiglipImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    save_tokenizer(folder)
    return f"hf:{folder}"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("siglip2")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {
            "open_clip": of_open_clip(root / "tiny-siglip2"),
            "transformers": of_transformers("Siglip2", root / "hf-siglip2"),
            "transformers, one size": of_transformers("Siglip", root / "hf-siglip2-one-size"),
        }


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for name, colour in COLOURS.items():
        (root / name).mkdir()
        for i in range(4):
            Image.new("RGB", (40 + 9 * i, 50), tuple(c + 5 * i for c in colour)).save(root / name / f"{i}.png")
    return root


KINDS = ("open_clip", "transformers", "transformers, one size")


@pytest.mark.parametrize("kind", KINDS)
def test_saes_are_trained_evaluated_and_steered_with(capsys, models, pictures, tmp_path, kind):
    name = models[kind]
    args = ("sae", "train", "--model", name, "--data", pictures, "--out", tmp_path / "run", "--d-sae", 48, "--k", 4)
    code, _, err = run(capsys, *args, "--batch-size", 16, "--steps", 6, "--warmup-steps", 2, "--device", "cpu")
    assert code == 0, err
    code, out, err = run(capsys, "sae", "eval", tmp_path / "run", "--data", pictures, "--device", "cpu")
    assert code == 0, err
    assert "zero" in out.lower(), out
    code, out, err = run(
        capsys, "sae", "steer", tmp_path / "run", "--data", pictures, "--feature", "3=9", "--device", "cpu"
    )
    assert code == 0, err
    assert any(word in out for word in COLOURS)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_read_as_they_were_in_training(models, kind):
    loaded = clipsteer.load(models[kind])
    assert loaded.has_text
    upper, lower = loaded.tokenizer(["A Photo of RED"]), loaded.tokenizer(["a photo of red"])
    assert upper.shape == (1, LENGTH)
    assert torch.equal(upper, lower)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_zero_shot_is_that_of_the_library(models, pictures, kind):
    loaded = clipsteer.load(models[kind])
    names = [f"a photo of {name}" for name in COLOURS]
    images = [Image.open(pictures / name / "1.png") for name in COLOURS]
    head = clip.zero_shot_head(loaded, list(COLOURS), ["a photo of {}"])
    ours = loaded.encode_images(images) @ head.T
    folder = models[kind].partition(":")[2]
    if kind == "open_clip":
        model, _, transform = open_clip.create_model_and_transforms(models[kind])
        model.eval()
        tokens = open_clip.get_tokenizer(models[kind])(names)
        pixels = torch.stack([transform(image) for image in images])
        theirs = model.encode_image(pixels, normalize=True) @ model.encode_text(tokens, normalize=True).T
    else:
        model = transformers.AutoModel.from_pretrained(folder).eval()
        tokens = transformers.AutoTokenizer.from_pretrained(folder)
        ids = tokens(names, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids
        # images of one shape whose sides are whole patches: what differs otherwise is how they are resized
        images = [image.resize((64, 64), Image.Resampling.BILINEAR) for image in images]
        ours = loaded.encode_images(images) @ head.T
        given = transformers.AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")
        found = model(input_ids=ids, **given)
        theirs = (found.logits_per_image - model.logit_bias) / model.logit_scale.exp()
    torch.testing.assert_close(ours.float(), theirs, atol=2e-5, rtol=0)
