"""Which tokens are class, registers and patches, on towers of every library: read from the module, or refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import clipsteer
from clipsteer import clip
from clipsteer.clip.tokens import layout_at
from clipsteer.sae.activations import HarvestSource

WIDTH, GRID = 32, 16


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states, attention_mask=None):
        return torch.tanh(self.q_proj(hidden_states)) * self.v_proj(hidden_states).mean(1, keepdim=True), None


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attention, self.mlp = nn.LayerNorm(WIDTH), Attention(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.attention(hidden_states=self.norm1(x))[0]
        return x + self.mlp(x)


class Embeddings(nn.Module):
    """As transformers' are: parameters for tokens, positions and masks, and a patch embedding."""

    def __init__(self, patches="patch_embeddings", **tokens):
        super().__init__()
        self.patches = patches
        setattr(self, patches, nn.Conv2d(3, WIDTH, 8, 8))
        for name, count in tokens.items():
            shape = (WIDTH,) if name == "class_embedding" else (1, count, WIDTH)
            setattr(self, name, nn.Parameter(torch.randn(shape)))
        self.tokens = list(tokens)
        self.mask_token = nn.Parameter(torch.zeros(1, WIDTH))
        self.position_embeddings = nn.Parameter(torch.randn(1, sum(tokens.values()) + GRID, WIDTH))

    def forward(self, pixels):
        x = getattr(self, self.patches)(pixels).flatten(2).transpose(1, 2)
        before = [getattr(self, name).expand(len(x), 1 if name == "class_embedding" else -1, WIDTH)
                  for name in self.tokens]  # fmt: skip
        return torch.cat([*before, x], 1) + self.position_embeddings


class Tower(nn.Module):
    """A vision tower with the names that transformers gives it, without transformers."""

    def __init__(self, embeddings, head=False):
        super().__init__()
        self.config = SimpleNamespace(image_size=32, patch_size=8)
        self.embeddings = embeddings
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(Layer() for _ in range(2))
        self.layernorm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH) if head else None

    def forward(self, pixel_values):
        x = self.embeddings(pixel_values)
        for layer in self.encoder.layers:
            x = layer(x)
        x = self.layernorm(x)
        return self.head(x.mean(1, keepdim=True))[:, 0] if self.head is not None else x[:, 0]


# name -> (embeddings, tokens before the patches, whether the first of them is a class token)
STAND_INS = {
    "clip": (lambda: Embeddings("patch_embedding", class_embedding=1), 1, True),
    "siglip": (lambda: Embeddings("patch_embedding"), 0, False),
    "dinov2": (lambda: Embeddings(cls_token=1), 1, True),
    "registers": (lambda: Embeddings(cls_token=1, register_tokens=4), 5, True),
    "distilled": (lambda: Embeddings(cls_token=1, distillation_token=1), 2, True),
    "registers alone": (lambda: Embeddings(register_tokens=4), 4, False),
}


def pixels(n=3):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def raw(model, name, x):
    seen = []
    hook = model.get_submodule(name).register_forward_hook(
        lambda m, a, o: seen.append(o[0] if isinstance(o, tuple) else o)
    )
    with torch.no_grad():
        model(pixel_values=x)
    hook.remove()
    return seen[0]


def check(model, name, prefix, has_class):
    """Class token and patches of a hook point with all the tower's tokens, to look at and to steer."""
    x, want = pixels(), raw(model, name, pixels())
    assert want.shape == (3, prefix + GRID, want.shape[-1])
    assert clip.class_tokens(model, name) == prefix
    patches = torch.cat(list(clip.harvest(model, [x[:2], x[2:]], name, tokens="patches")))
    torch.testing.assert_close(patches, want[:, prefix:].flatten(0, 1))
    vector = torch.linspace(-9, 9, want.shape[-1])
    for tokens, where in (("cls", slice(0, 1)), ("patches", slice(prefix, None)), ("all", slice(None))):
        steering = clipsteer.VectorSteering(vector, tokens=tokens)
        if tokens == "cls" and not has_class:
            with pytest.raises(ValueError, match=f"no class token at '{name}'"):
                clipsteer.steer(model, {name: steering})
            continue
        expected = want.clone()
        expected[:, where] += vector
        with clipsteer.steer(model, {name: steering}):
            torch.testing.assert_close(raw(model, name, x), expected)
    if has_class:
        rows = torch.cat(list(clip.harvest(model, [x], name, tokens="cls")))
        torch.testing.assert_close(rows, want[:, 0])


@pytest.mark.parametrize("kind", STAND_INS)
def test_prefix_tokens_are_read_from_the_embeddings(kind):
    make, prefix, has_class = STAND_INS[kind]
    torch.manual_seed(0)
    model = Tower(make()).eval()
    for name in ("embeddings", "encoder.layers.0", "encoder.layers.1.attention", "encoder.layers.1.norm1", "layernorm"):
        check(model, name, prefix, has_class)
    # the patch embedding comes before the class token
    patches = f"embeddings.{model.embeddings.patches}"
    assert len(next(clip.harvest(model, [pixels()], patches, tokens="patches"))) == 3 * GRID
    with pytest.raises(ValueError, match="no class token"):
        next(clip.harvest(model, [pixels()], patches, tokens="cls"))


def test_a_class_token_of_a_strange_tower_is_not_denied():
    model = nn.Module()
    model.class_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
    model.layer = nn.Linear(WIDTH, WIDTH)
    with pytest.raises(ValueError, match=r"not known which tokens are which at 'layer' \(Module does not say"):
        layout_at(model, "layer").check("steer", ["cls"])


def test_towers_are_found_inside_of_models_and_wrappers():
    model = nn.Module()
    model.vision_model = Tower(Embeddings(cls_token=1, register_tokens=4))
    model.text_model = nn.Module()
    model.text_model.embeddings, model.text_model.config = nn.Embedding(5, WIDTH), SimpleNamespace(hidden_size=WIDTH)
    model.text_model.layer = nn.Linear(WIDTH, WIDTH)
    assert clip.class_tokens(model, "vision_model.encoder.layers.0") == 5
    assert clip.class_tokens(model, "text_model.layer") == 0
    outer = nn.Module()
    outer.module = model
    assert clip.class_tokens(outer, "module.vision_model.encoder.layers.0") == 5


def test_pooled_outputs_and_tokens_that_nobody_places_are_refused():
    pooled = Tower(Embeddings("patch_embedding"), head=True).eval()
    with pytest.raises(ValueError, match=r"no patch tokens among its 1 \(it comes after the pooling"):
        next(clip.harvest(pooled, [pixels()], "head", tokens="patches"))
    detecting = Tower(Embeddings(cls_token=1, detection_tokens=3)).eval()
    for tokens in ("cls", "patches"):
        with pytest.raises(ValueError, match="does not say where its detection_tokens stand"):
            next(clip.harvest(detecting, [pixels()], "layernorm", tokens=tokens))
    assert next(clip.harvest(detecting, [pixels()], "layernorm")).shape == (3 * (4 + GRID), WIDTH)
    padded = Tower(Embeddings("patch_embedding"))
    padded.embeddings.patch_embedding = nn.Linear(3 * 8 * 8, WIDTH)
    with pytest.raises(ValueError, match="which are padding is not said"):
        next(clip.harvest(padded, [pixels()], "layernorm", tokens="patches"))


def test_a_batch_of_one_and_saes_see_the_same_tokens():
    model = Tower(Embeddings(cls_token=1, register_tokens=4)).eval()
    loaded = clip.CLIP(model, lambda image: image, lambda texts: texts, "tower", None)
    source = HarvestSource(loaded, list(pixels(5)), "encoder.layers.0", tokens="patches")
    assert (source.tokens_per_image, source.d_in) == (GRID, WIDTH)
    want = raw(model, "encoder.layers.0", pixels(5))[:, 5:].flatten(0, 1)
    rows = source.load_group(0, 0, 0)  # images in another order
    torch.testing.assert_close(rows[rows[:, 0].argsort()], want[want[:, 0].argsort()])


def timm_tower(name, **settings):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, num_classes=0, depth=2, **settings).eval()


@pytest.mark.parametrize(
    ("name", "prefix", "has_class"),
    [
        ("vit_tiny_patch16_224", 1, True),
        ("deit_tiny_distilled_patch16_224", 2, True),
        ("vit_small_patch14_reg4_dinov2", 5, True),
        ("vit_base_patch16_reg4_gap_256", 4, False),  # registers, and no class token
        ("vit_base_patch16_siglip_224", 0, False),
        ("eva02_tiny_patch14_224", 1, True),
        ("vit_small_patch16_dinov3", 5, True),  # images of any size
    ],
)
@torch.no_grad()
def test_timm_towers_on_their_own(name, prefix, has_class):
    tower = timm_tower(name, img_size=28 if "14" in name else 32)
    x = torch.randn(2, 3, *tower.patch_embed.img_size, generator=torch.Generator().manual_seed(1))
    assert clip.class_tokens(tower, "blocks.0") == prefix
    with clip.capture(tower, "blocks.0") as found:
        tower(x)
    want = found["blocks.0"]
    assert want.shape[1] == prefix + 4
    patches = next(clip.harvest(tower, [x], "blocks.0", tokens="patches"))
    assert torch.equal(patches, want[:, prefix:].flatten(0, 1))
    if has_class:
        assert torch.equal(next(clip.harvest(tower, [x], "blocks.0", tokens="cls")), want[:, 0])
    else:
        with pytest.raises(ValueError, match=r"no class token at 'blocks\.0'"):
            next(clip.harvest(tower, [x], "blocks.0", tokens="cls"))


@pytest.mark.parametrize(
    ("name", "hook_point"),
    [("crossvit_tiny_240", "blocks.0"), ("coat_tiny", "serial_blocks1.0"), ("pit_ti_224", "norm")],
)
def test_class_tokens_that_no_tower_places_are_refused(name, hook_point):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        tower = timm.create_model(name, pretrained=False, num_classes=0)
    for tokens in ("cls", "patches"):
        steering = clipsteer.VectorSteering(torch.ones(8), tokens=tokens)
        with pytest.raises(
            ValueError, match=r"not known which tokens are which at .*does not say where its class token"
        ):
            clipsteer.steer(tower, {hook_point: steering})


@torch.no_grad()
def test_outputs_of_towers_of_any_size_that_are_no_tokens():
    tower = timm_tower("vit_small_patch16_dinov3", img_size=32, qk_norm=True)
    x = torch.randn(2, 3, 32, 48)
    for name in clip.hook_points(tower, "blocks.0.attn.?_norm"):
        assert next(clip.harvest(tower, [x], name)).shape == (2 * 6 * 11, 64)  # heads, and their width
        with pytest.raises(ValueError, match="rows are heads of tokens"):
            next(clip.harvest(tower, [x], name, tokens="patches"))
    assert len(next(clip.harvest(tower, [x], "patch_embed"))) == 2 * 6


@torch.no_grad()
def test_as_many_queries_as_patches_are_no_patches():
    """CoCa's attention pooling has 256 queries over 256 patches."""
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 32, "layers": 1, "width": WIDTH, "head_width": 16, "patch_size": 8,
              "attentional_pool": True, "attn_pooler_heads": 2}  # fmt: skip
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    for queries in (GRID, GRID + 1):
        config = {**vision, "attn_pooler_queries": queries}
        model = open_clip.CLIP(embed_dim=WIDTH, vision_cfg=config, text_cfg=text).eval()
        for name in ("visual.attn_pool", "visual.ln_post"):
            assert len(next(clip.harvest(model, [pixels()], name))) == 3 * queries
            for tokens in ("cls", "patches"):
                with pytest.raises(ValueError, match=r"comes after the pooling of the tokens"):
                    next(clip.harvest(model, [pixels()], name, tokens=tokens))
        assert len(next(clip.harvest(model, [pixels()], "visual.ln_pre", tokens="patches"))) == 3 * GRID


# transformers' own towers, small and random: class -> (configuration, settings, prefix, has class, layers' name)
REAL = {
    "CLIPVisionModel": ("CLIPVisionConfig", {}, 1, True),
    "CLIPVisionModelWithProjection": ("CLIPVisionConfig", {"projection_dim": 16}, 1, True),
    "SiglipVisionModel": ("SiglipVisionConfig", {}, 0, False),
    "Dinov2Model": ("Dinov2Config", {}, 1, True),
    "Dinov2WithRegistersModel": ("Dinov2WithRegistersConfig", {"num_register_tokens": 4}, 5, True),
    "DINOv3ViTModel": ("DINOv3ViTConfig", {"num_register_tokens": 4}, 5, True),
    "ViTModel": ("ViTConfig", {}, 1, True),
    "DeiTModel": ("DeiTConfig", {}, 2, True),
}
SIZES = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "image_size": 32, "patch_size": 8}  # fmt: skip


def real(kind, settings):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, kind):
        pytest.skip(f"this transformers has no {kind}")
    torch.manual_seed(0)
    config = getattr(transformers, REAL[kind][0])(**{**SIZES, **settings})
    return getattr(transformers, kind)(config).eval()


@pytest.mark.parametrize("kind", REAL)
def test_transformers_towers(kind):
    _, settings, prefix, has_class = REAL[kind]
    model = real(kind, settings)
    assert clip.class_tokens(model, next(name for name in clip.hook_points(model) if name.endswith(".0"))) == prefix
    names = [name for name in clip.hook_points(model) if name.endswith((".0", ".1.mlp", "embeddings", "layer_norm1"))]
    names = [name for name in names if "rope" not in name and "patch" not in name]
    assert len(names) > 2
    for name in names:
        check(model, name, prefix, has_class)
    patches = next(name for name in clip.hook_points(model) if name.endswith(("patch_embedding", "patch_embeddings")))
    assert len(next(clip.harvest(model, [pixels()], patches, tokens="patches"))) == 3 * GRID


def test_transformers_heads_and_images_of_another_size():
    siglip = real("SiglipVisionModel", {})
    for name in clip.hook_points(siglip, "*head*"):
        if name.endswith("out_proj"):
            with pytest.raises(ValueError, match="never calls"):
                next(clip.harvest(siglip, [pixels()], name))
            continue
        assert next(clip.harvest(siglip, [pixels()], name)).shape[0] == 3
        with pytest.raises(ValueError, match="comes after the pooling"):
            next(clip.harvest(siglip, [pixels()], name, tokens="patches"))
    clip_tower = real("CLIPVisionModel", {})
    post = next(name for name in clip.hook_points(clip_tower) if name.endswith("post_layernorm"))
    with pytest.raises(ValueError, match="no class token among its 1"):
        next(clip.harvest(clip_tower, [pixels()], post, tokens="cls"))
    # with a patch grid of any size the registers still stand before the patches
    dinov2 = real("Dinov2WithRegistersModel", {"num_register_tokens": 4})
    name = next(name for name in clip.hook_points(dinov2) if name.endswith("layer.0"))
    oblong = torch.randn(2, 3, 40, 24)
    assert len(next(clip.harvest(dinov2, [oblong], name, tokens="patches"))) == 2 * 5 * 3


@torch.no_grad()
def test_transformers_whole_clip():
    transformers = pytest.importorskip("transformers")
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "vocab_size": 99, "max_position_embeddings": 8}  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=SIZES, projection_dim=16)
    model = transformers.CLIPModel(config).eval()
    x, name = pixels(), "vision_model.encoder.layers.0"
    with clip.capture(model, name) as found:
        model(input_ids=torch.ones(5, 8, dtype=torch.long), pixel_values=x)
    assert found[name].shape == (3, 1 + GRID, WIDTH)
    rows = torch.cat(list(clip.harvest(model, [x], name, tokens="cls")))
    torch.testing.assert_close(rows, found[name][:, 0])
    words = torch.randint(0, 98, (2, 8), generator=torch.Generator().manual_seed(0))
    assert next(clip.harvest(model, [words], "text_model.encoder.layers.0")).shape == (16, 16)
    with pytest.raises(ValueError, match="no class token"):
        next(clip.harvest(model, [words], "text_model.encoder.layers.0", tokens="cls"))


def test_siglip2_says_that_padding_is_among_its_tokens():
    transformers = pytest.importorskip("transformers")
    sizes = {**SIZES, "num_patches": GRID}
    del sizes["image_size"]
    model = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**sizes)).eval()
    name = next(name for name in clip.hook_points(model) if name.endswith("layers.0"))
    given = {"pixel_values": torch.randn(2, GRID, 3 * 8 * 8), "pixel_attention_mask": torch.ones(2, GRID),
             "spatial_shapes": torch.tensor([[4, 4], [4, 4]])}  # fmt: skip
    with torch.no_grad(), clip.capture(model, name) as found:
        model(**given)
    assert found[name].shape == (2, GRID, WIDTH)
    for tokens in ("cls", "patches"):
        with pytest.raises(ValueError, match="which are padding is not said"):
            layout_at(model, name).check("steer", [tokens])
