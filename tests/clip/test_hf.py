"""Models of transformers through ``load("hf:…")``: features, hook points, tokens, preprocessing, text."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image

import clipsteer
from clipsteer import FileFormatError, clip
from clipsteer.clip.tokens import layout_at
from clipsteer.data.dataset import ImageDataset

transformers = pytest.importorskip("transformers")
pytest.importorskip("timm")

WIDTH, GRID, P = 32, 4, 8
SIZES = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
         "image_size": GRID * P, "patch_size": P}  # fmt: skip
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "vocab_size": 99, "max_position_embeddings": 8}  # fmt: skip
# class -> (settings, tokens before the patches, whether there is a class token, how its own code resamples positions)
TOWERS = {
    "CLIPVisionModel": ({}, 1, True, "bicubic"),
    "CLIPVisionModelWithProjection": ({"projection_dim": 16}, 1, True, "bicubic"),
    "MetaClip2VisionModel": ({}, 1, True, "bicubic"),
    "MetaClip2VisionModelWithProjection": ({"projection_dim": 16}, 1, True, "bicubic"),
    "SiglipVisionModel": ({}, 0, False, "bicubic"),
    "Siglip2VisionModel": ({"num_patches": GRID * GRID}, 0, False, None),
    "Dinov2Model": ({}, 1, True, "bicubic"),
    "Dinov2WithRegistersModel": ({"num_register_tokens": 4}, 5, True, "antialias"),
    "DINOv3ViTModel": ({"num_register_tokens": 4}, 5, True, None),
    "ViTModel": ({}, 1, True, "bicubic"),
}


def tower(kind, **more):
    if not hasattr(transformers, kind):
        pytest.skip(f"this transformers has no {kind}")
    settings = {**SIZES, **TOWERS[kind][0], **more}
    if kind == "Siglip2VisionModel":
        del settings["image_size"]
    config = getattr(transformers, kind.removesuffix("WithProjection").removesuffix("Model") + "Config")
    torch.manual_seed(0)
    arguments = {"add_pooling_layer": False} if kind == "ViTModel" else {}
    model = getattr(transformers, kind)(config(**settings), **arguments).eval()
    # positions as large as what they are added to, so that a wrong one shows
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "position_embedding" in name:
                parameter.normal_()
    return model


def pixels(height=GRID * P, width=GRID * P, n=2):
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(1))


def own(kind, model, x):
    """transformers' own forward, as its documentation calls it."""
    if kind == "Siglip2VisionModel":
        # row by row, each patch as (p, p, channels): what its image processor makes
        h, w = x.shape[2] // P, x.shape[3] // P
        rows = [
            x[:, :, i * P : (i + 1) * P, j * P : (j + 1) * P].permute(0, 2, 3, 1).flatten(1)
            for i in range(h)
            for j in range(w)
        ]
        mask = torch.ones(len(x), h * w, dtype=torch.long)
        given = {"pixel_values": torch.stack(rows, 1), "pixel_attention_mask": mask,
                 "spatial_shapes": torch.tensor([[h, w]] * len(x))}  # fmt: skip
    else:
        given = {"pixel_values": x}
        if kind.startswith(("CLIP", "MetaClip2", "Siglip", "ViT")):
            given["interpolate_pos_encoding"] = True
    return model(**given, output_hidden_states=True)


def feature(kind, found):
    if kind.endswith("WithProjection"):
        return found.image_embeds
    return found.last_hidden_state[:, 0] if kind == "ViTModel" else found.pooler_output


@torch.no_grad()
@pytest.mark.parametrize("kind", TOWERS)
def test_features_hook_points_and_tokens_are_those_of_the_module(kind, tmp_path):
    _, prefix, has_class, _ = TOWERS[kind]
    model = tower(kind)
    model.save_pretrained(tmp_path)
    loaded = clipsteer.load(f"hf:{tmp_path}")
    x = pixels()
    found = own(kind, model, x)
    torch.testing.assert_close(loaded.model.encode_image(x), feature(kind, found), atol=1e-5, rtol=1e-5)
    names = [f"visual.trunk.blocks.{i}" for i in range(3)]
    assert [name for name in clip.hook_points(loaded) if name in names] == names
    assert clip.default_hook_point(loaded) == names[1]
    with clip.capture(loaded, "visual.trunk.blocks.*") as seen:
        loaded.model.encode_image(x)
    # the last of transformers' hidden states is normalised in some of its classes
    for i in range(2):
        torch.testing.assert_close(seen[names[i]], found.hidden_states[i + 1], atol=1e-5, rtol=1e-5)
    # registers are no patches
    layout = layout_at(loaded, names[1])
    assert (layout.prefix, layout.has_class and prefix > 0) == (prefix, has_class)
    rows = torch.cat(list(clip.harvest(loaded, [x], names[1], "patches")))
    torch.testing.assert_close(rows, found.hidden_states[2][:, prefix:].flatten(0, 1), atol=1e-5, rtol=1e-5)
    assert len(rows) == 2 * GRID * GRID
    if has_class:
        (rows,) = clip.harvest(loaded, [x], names[1], "cls")
        torch.testing.assert_close(rows, found.hidden_states[2][:, 0], atol=1e-5, rtol=1e-5)
    else:
        with pytest.raises(ValueError, match="no class token"):
            next(clip.harvest(loaded, [x], names[1], "cls"))


@torch.no_grad()
@pytest.mark.parametrize("kind", TOWERS)
def test_the_rule_of_positions_is_that_of_the_class(kind, tmp_path):
    rule = TOWERS[kind][3]
    model = tower(kind)
    model.save_pretrained(tmp_path)
    for size in ((24, 24), (48, 24)):
        x = pixels(*size)
        theirs = feature(kind, own(kind, model, x))
        loaded = clipsteer.load(f"hf:{tmp_path}", image_size=size)
        assert loaded.setup.position_interpolation == (rule or "antialias")
        torch.testing.assert_close(loaded.model.encode_image(x), theirs, atol=1e-5, rtol=1e-5)
        if rule is None:
            continue
        same = clipsteer.load(f"hf:{tmp_path}", image_size=size, position_interpolation=rule)
        torch.testing.assert_close(same.model.encode_image(x), theirs, atol=1e-5, rtol=1e-5)
        asked = "antialias" if rule == "bicubic" else "bicubic"
        other = clipsteer.load(f"hf:{tmp_path}", image_size=size, position_interpolation=asked)
        assert (other.model.encode_image(x) - theirs).abs().max() > 1e-4
        # a copy, as ensembles and continual learning make them, keeps the rule
        assert torch.equal(copy.deepcopy(other.model).encode_image(x), other.model.encode_image(x))
    if rule is None:
        with pytest.raises(ValueError, match="has its own way"):
            clipsteer.load(f"hf:{tmp_path}", position_interpolation="bicubic")


@torch.no_grad()
def test_another_rule_is_the_other_class_of_dinov2():
    """Registers aside, DINOv2's two classes of transformers differ by the rule alone."""
    plain, with_registers = tower("Dinov2Model"), tower("Dinov2WithRegistersModel", num_register_tokens=0)
    with_registers.load_state_dict(plain.state_dict(), strict=False)
    x = pixels(24, 40)
    for given, like in ((plain, with_registers), (with_registers, plain)):
        rule = TOWERS[type(like).__name__][3]
        loaded = clipsteer.load(copy.deepcopy(given), image_size=(24, 40), position_interpolation=rule)
        torch.testing.assert_close(loaded.model.encode_image(x), like(x).pooler_output, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_run_keeps_weights_size_and_rule(tmp_path):
    model = tower("Dinov2Model")
    model.save_pretrained(tmp_path / "own")
    loaded = clipsteer.load(f"hf:{tmp_path / 'own'}", image_size=24, position_interpolation="antialias")
    for parameter in loaded.model.parameters():
        parameter.add_(0.01)
    head = torch.nn.functional.normalize(torch.ones(2, WIDTH), dim=-1)
    clip.save_classifier(tmp_path / "run", loaded, clip.ImageClassifier(loaded.model.visual, head), ["a", "b"])
    again, classifier, _ = clip.load_classifier(tmp_path / "run")
    x = pixels(24, 24)
    assert again.setup == loaded.setup
    assert again.setup.image_size == (24, 24)
    assert torch.equal(again.model.encode_image(x), loaded.model.encode_image(x))
    assert classifier(x).shape == (2, 2)
    # no weight is written twice
    assert len(loaded.model.state_dict()) == len(model.state_dict())
    wide = clipsteer.load(tmp_path / "run", image_size=48)
    assert wide.setup.position_interpolation == "antialias"


def processor(kind, **settings):
    name = {"CLIPVisionModel": "CLIPImageProcessor", "Dinov2Model": "BitImageProcessor",
            "SiglipVisionModel": "SiglipImageProcessor", "ViTModel": "ViTImageProcessor"}[kind]  # fmt: skip
    return getattr(transformers, name)(**settings)


@pytest.mark.parametrize(("kind", "settings"), [
    ("CLIPVisionModel", {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}),
    ("Dinov2Model", {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56},
                     "image_mean": [0.4, 0.5, 0.6]}),
    ("SiglipVisionModel", {"size": {"height": 32, "width": 32}, "resample": 2}),
    ("ViTModel", {"size": {"height": 32, "width": 32}, "do_normalize": False}),
])  # fmt: skip
def test_preprocessing_is_that_of_the_image_processor(kind, settings, tmp_path):
    tower(kind).save_pretrained(tmp_path)
    theirs = processor(kind, **settings)
    theirs.save_pretrained(tmp_path)
    loaded = clipsteer.load(f"hf:{tmp_path}")
    # smooth, so that rounding of a resampled level is all that differs
    y, x = np.mgrid[0:90, 0:120]
    image = Image.fromarray(np.stack([2 * y, 2 * x, y + x], -1).clip(0, 255).astype(np.uint8))
    ours, given = loaded.preprocess(image), theirs(image, return_tensors="pt").pixel_values[0]
    assert ours.shape == given.shape
    std = torch.tensor(loaded.setup.preprocess["std"])[:, None, None]
    assert ((ours - given) * std).abs().max() < 2.5 / 255
    assert ((ours - given) * std).abs().mean() < 0.5 / 255


def test_a_preprocessing_that_cannot_be_followed_is_refused(tmp_path, caplog):
    tower("CLIPVisionModel").save_pretrained(tmp_path)
    loaded = clipsteer.load(f"hf:{tmp_path}")
    assert "says how images are prepared" in caplog.text
    assert loaded.setup.preprocess["mean"] == (0.48145466, 0.4578275, 0.40821073)
    for wrong in (
        {"rescale_factor": 1 / 127.5},
        {"size": {"longest_edge": 3}},
        {"image_std": [0, 1, 1]},
        {"resample": 9},
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(wrong))
        with pytest.raises(FileFormatError, match="not a preprocessing that is known"):
            clipsteer.load(f"hf:{tmp_path}")


def whole(kind):
    """A CLIP or SigLIP with a tokenizer of letters."""
    name = kind.removesuffix("Model")
    projected = "clip" in name.lower()
    projection = {"projection_dim": 24} if projected else {}
    vision = SIZES if projected else {**SIZES, "hidden_size": 16}
    if name == "Siglip2":
        vision = {**vision, "num_patches": GRID * GRID}
    config = getattr(transformers, f"{name}Config")(text_config={**TEXT, "eos_token_id": 98, "pad_token_id": 1},
                                                    vision_config=vision, **projection)  # fmt: skip
    torch.manual_seed(0)
    return getattr(transformers, kind)(config).eval()


def tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    letters = {"<unk>": 0, "<pad>": 1, "</s>": 98, **{c: i + 2 for i, c in enumerate("abcdefghijklmnopqrstuvwxyz ")}}
    made = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 98)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>")
    fast.save_pretrained(folder)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["CLIPModel", "MetaClip2Model", "SiglipModel", "Siglip2Model"])
def test_text_towers_and_their_tokenizers(kind, tmp_path):
    model = whole(kind)
    model.save_pretrained(tmp_path)
    alone = clipsteer.load(f"hf:{tmp_path}")
    assert not alone.has_text
    with pytest.raises(ValueError, match=r"needs a text tower.*tokenizer's files are not there"):
        clip.zero_shot_head(alone, ["cat"])
    with pytest.raises(RuntimeError, match="text tower"):
        alone.tokenizer(["cat"])
    tokenizer(tmp_path)
    loaded = clipsteer.load(f"hf:{tmp_path}")
    words = ["cat", "a dog", "a very long word"]
    ids = loaded.tokenizer(words)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert torch.equal(
        ids, fast(words, padding="max_length", truncation=True, max_length=8, return_tensors="pt").input_ids
    )
    theirs = model.get_text_features(input_ids=ids)
    theirs = getattr(theirs, "pooler_output", theirs)
    torch.testing.assert_close(loaded.model.encode_text(ids), theirs, atol=1e-5, rtol=1e-5)
    head = clip.zero_shot_head(loaded, ["cat", "dog"], ["{}"])
    assert head.shape == (2, theirs.shape[1])
    # a hook in the text tower, by open_clip's name for it
    assert next(clip.harvest(loaded, [ids], "text.transformer.resblocks.1")).shape == (3 * 8, 16)
    if kind != "Siglip2Model":
        x = pixels()
        found = model(input_ids=ids[:2], pixel_values=x)
        image, text, scale = loaded.model(x, ids[:2])
        torch.testing.assert_close(image, found.image_embeds, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(text, found.text_embeds, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(scale, model.logit_scale.exp())
        bias = 0 if loaded.model.logit_bias is None else loaded.model.logit_bias
        torch.testing.assert_close(scale * image @ text.T + bias, found.logits_per_image, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_module_in_memory_is_shared(tmp_path):
    model = tower("Dinov2WithRegistersModel")
    loaded = clipsteer.load(model)
    assert loaded.name == "hf:Dinov2WithRegistersModel"
    x = pixels()
    torch.testing.assert_close(loaded.model.encode_image(x), model(x).pooler_output, atol=1e-5, rtol=1e-5)
    model.layernorm.weight.mul_(2)
    torch.testing.assert_close(loaded.model.encode_image(x), model(x).pooler_output, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="a module has its weights"):
        clipsteer.load(model, tmp_path / "w.safetensors")


def test_what_cannot_be_opened_says_why(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no such folder"):
        clipsteer.load("hf:/nowhere/at/all")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileFormatError, match=r"config\.json is not there"):
        clipsteer.load(f"hf:{tmp_path / 'empty'}")
    model = tower("Dinov2Model")
    model.save_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match="brings its own weights"):
        clipsteer.load(f"hf:{tmp_path / 'own'}", "laion2b")
    with pytest.raises(ValueError, match="open_clip's models"):
        clipsteer.load(f"hf:{tmp_path / 'own'}", force_quick_gelu=True)
    with pytest.raises(ValueError, match="has no tags"):
        clipsteer.load(f"hf:{tmp_path / 'own'}", preprocess="openai")
    # weights that the file lacks would be random
    from safetensors.torch import load_file, save_file

    file = tmp_path / "own" / "model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if "layernorm" not in k}, file, {"format": "pt"})
    with pytest.raises(FileFormatError, match="lacks weights"):
        clipsteer.load(f"hf:{tmp_path / 'own'}")
    clipsteer.load(f"hf:{tmp_path / 'own'}", "random")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="'bert' is no kind of model that is known"):
        clipsteer.load(f"hf:{tmp_path / 'bert'}")

    def fails(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fails)
    with pytest.raises(RuntimeError, match="could not be had"):
        clipsteer.load("hf:org/name")


def test_saes_steer_patches_and_never_registers():
    loaded = clipsteer.load(tower("Dinov2WithRegistersModel"))
    name = "visual.trunk.blocks.0"
    sae = clipsteer.SAE(d_in=WIDTH, d_sae=64, k=4)
    x = pixels()
    with clip.capture(loaded, name) as before:
        loaded.model.encode_image(x)
    steering = clipsteer.SAESteering(sae, {3: 50.0}, tokens="patches")
    with torch.no_grad(), clipsteer.steer(loaded, {name: steering}), clip.capture(loaded, "*blocks.1.norm1") as after:
        loaded.model.encode_image(x)
    with torch.no_grad(), clip.capture(loaded, "*blocks.1.norm1") as unsteered:
        loaded.model.encode_image(x)
    (moved,), (still,) = after.values(), unsteered.values()
    change = (moved - still).norm(dim=-1)
    assert torch.equal(moved[:, :5], still[:, :5])
    assert bool((change[:, 5:] > 1e-3).all())
    assert before[name].shape[1] == 5 + GRID * GRID


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Dinov2WithRegistersModel", "SiglipVisionModel"])
def test_an_sae_at_a_block_is_evaluated(kind):
    loaded = clipsteer.load(tower(kind))
    point = "visual.trunk.blocks.1"
    sae = clipsteer.SAE(loaded.model.visual.trunk.embed_dim, 32, k=4)
    drawn = [Image.new("RGB", (40, 40), (40 * i, 90, 200 - 40 * i)) for i in range(4)]
    images = ImageDataset(lambda row: drawn[row], [0, 1] * 2, ["a", "b"])
    found = clipsteer.sae.evaluate_sae(sae, loaded, images, hook_point=point)
    assert found["fvu"] > 0
    assert found["l0"] == 4
