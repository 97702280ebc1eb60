"""clipsteer.clip against open_clip's own outputs, over architectures and layouts, at random initialisation."""

from __future__ import annotations

import json
import sys
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import clipsteer
from clipsteer import FileFormatError, assets, clip
from clipsteer.clip import hooks as clip_hooks
from clipsteer.clip.tokens import layout_at
from clipsteer.data.emoji import EmojiStyles
from clipsteer.sae import site as _sae_site

open_clip = pytest.importorskip("open_clip")

VISION = {"image_size": 32, "layers": 3, "width": 48, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
CONFIGS: dict[str, dict] = {
    "plain": {},
    "quick-gelu": {"quick_gelu": True},
    "no-pre-norm": {"vision_cfg": {"no_ln_pre": True}},
    "norm-after-pool": {"vision_cfg": {"final_ln_after_pool": True, "pool_type": "avg"}},
    "average-pool": {"vision_cfg": {"pool_type": "avg"}},
    "attention-pool": {"vision_cfg": {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 5}},
    "sin-cos": {"vision_cfg": {"pos_embed_type": "sin_cos_2d"}},
    "layer-scale": {"vision_cfg": {"ls_init_value": 0.1}},
    "custom-blocks": {"vision_cfg": {"qk_norm": True, "scale_heads": True, "scale_fc": True, "scale_attn": True}},
    "patch-dropout": {"vision_cfg": {"patch_dropout": 0.5}},
    "oblong": {"vision_cfg": {"image_size": [16, 40]}},
    "custom-text": {"custom_text": True},
    "sigmoid-bias": {"init_logit_bias": -10},
}
BLOCK = "visual.transformer.resblocks.1"


@pytest.fixture(scope="session", autouse=True)
def configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    for name, change in CONFIGS.items():
        config = {"embed_dim": 24, "vision_cfg": dict(VISION), "text_cfg": dict(TEXT)}
        for key, value in change.items():
            config[key] = {**config[key], **value} if isinstance(value, dict) else value
        (folder / f"tiny-{name}.json").write_text(json.dumps(config))
    resnet = {"embed_dim": 24, "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}, "text_cfg": TEXT}
    timm = {"embed_dim": 24, "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "", "image_size": 160}}
    (folder / "tiny-resnet.json").write_text(json.dumps(resnet))
    (folder / "tiny-timm.json").write_text(json.dumps({**timm, "text_cfg": TEXT}))
    open_clip.add_model_config(folder)


def tiny(name: str = "plain") -> clip.CLIP:
    torch.manual_seed(0)
    return clip.load(f"tiny-{name}")


def pixels(model: nn.Module, n: int = 3) -> torch.Tensor:
    size = model.visual.image_size
    height, width = size if isinstance(size, tuple | list) else (size, size)
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(1))


def sequence_first(model: nn.Module) -> nn.Module:
    """The same function, computed on (T, B, d) inside the image tower."""
    model.visual.transformer.batch_first = False
    for block in model.visual.transformer.resblocks:
        block.attn.batch_first = False
    return model


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def image_features(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    out = model.encode_image(x)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("output_tokens", [False, True])
@pytest.mark.parametrize("name", [*CONFIGS, "sequence-first"])
@torch.no_grad()
def test_captured_blocks_are_open_clips_intermediates(name, output_tokens):
    model = sequence_first(tiny().model) if name == "sequence-first" else tiny(name).model
    model.visual.output_tokens = output_tokens
    x = pixels(model)
    expected = model.visual.forward_intermediates(x, output_fmt="NLC", output_extra_tokens=True)
    plain = image_features(model, x)
    with clip.capture(model, "visual.transformer.resblocks.?") as found:
        assert torch.equal(image_features(model, x), plain)
    assert list(found) == [f"visual.transformer.resblocks.{i}" for i in range(VISION["layers"])]
    for i, acts in enumerate(found.values()):
        prefix, patches = expected["image_intermediates_prefix"][i], expected["image_intermediates"][i]
        assert torch.equal(acts, torch.cat([prefix, patches], 1))
    for tokens, wanted in {"cls": prefix, "patches": patches, "all": torch.cat([prefix, patches], 1)}.items():
        last = next(reversed(found))
        rows = torch.cat(list(clip.harvest(model, [(x[:2], 0), (x[2:], 0)], last, tokens=tokens)))
        torch.testing.assert_close(rows, wanted.flatten(0, 1))
    assert hooks(model) == 0


@torch.no_grad()
def test_vit_b_32():
    loaded = clip.load("ViT-B-32")
    x = pixels(loaded.model, 2)
    expected = loaded.model.visual.forward_intermediates(x, indices=[9], output_fmt="NLC", output_extra_tokens=True)
    rows = next(clip.harvest(loaded.model, [x], "visual.transformer.resblocks.9", tokens="patches"))
    assert rows.shape == (2 * 49, 768)
    assert torch.equal(rows, expected["image_intermediates"][0].flatten(0, 1))
    assert torch.equal(expected["image_features"], loaded.model.encode_image(x))
    assert loaded.preprocess(EmojiStyles().image("noto", 0)).shape == (3, 224, 224)


@torch.no_grad()
def test_sequence_first_shows_every_module_batch_first():
    batch_first, model = tiny().model, sequence_first(tiny().model)
    x = pixels(model)
    with clip.capture(batch_first, "visual.*") as a, clip.capture(model, "visual.*") as b:
        batch_first.encode_image(x)
        model.encode_image(x)
    assert list(a) == list(b)
    assert len(a) > 20
    for name in a:
        assert a[name].shape == b[name].shape, name
        assert a[name].shape[0] == len(x), name
        torch.testing.assert_close(a[name], b[name], msg=name)


@torch.no_grad()
def test_other_towers():
    resnet = tiny("resnet")
    x = pixels(resnet.model)
    acts = next(clip.harvest(resnet.model, [x], "visual.layer3"))
    with clip.capture(resnet.model, "visual.layer3") as found:
        resnet.model.encode_image(x)
    assert acts.shape == (3 * 4 * 4, 128)
    assert found["visual.layer3"].shape == (3, 16, 128)
    raw = resnet.model.visual.layer3(
        resnet.model.visual.layer2(resnet.model.visual.layer1(resnet.model.visual.stem(x)))
    )
    torch.testing.assert_close(acts, raw.permute(0, 2, 3, 1).reshape(-1, 128))
    with pytest.raises(ValueError, match="no class token"):
        next(clip.harvest(resnet.model, [x], "visual.layer3", tokens="cls"))

    timm = tiny("timm")
    prefix = timm.model.visual.trunk.num_prefix_tokens
    total = next(clip.harvest(timm.model, [pixels(timm.model)], "visual.trunk.blocks.0"))
    patches = next(clip.harvest(timm.model, [pixels(timm.model)], "visual.trunk.blocks.0", tokens="patches"))
    assert len(total) == len(patches) + 3 * prefix

    words = tiny()
    tokens = words.tokenizer(["a dog", "two small cats"])
    acts = next(clip.harvest(words.model, [tokens], "transformer.resblocks.1"))
    assert acts.shape == (2 * TEXT["context_length"], TEXT["width"])


def test_harvest_leaves_the_model_as_it_was():
    model = tiny("patch-dropout").model
    model.train()
    model.transformer.eval()
    before = {n: m.training for n, m in model.named_modules()}
    loader = iter([pixels(model), pixels(model)])
    rows = clip.harvest(model, loader, BLOCK)
    assert next(rows).shape == (3 * 17, 48)  # in eval mode no patch is dropped
    assert {n: m.training for n, m in model.named_modules()} == before
    assert hooks(model) == 0


def test_harvest_in_low_precision():
    loaded = clip.load("tiny-plain", dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert next(clip.harvest(loaded.model, [pixels(loaded.model)], BLOCK)).dtype == torch.bfloat16


def test_gradients_flow_through_captured_activations():
    model = tiny().model
    with clip.capture(model, BLOCK) as found:
        out = model.encode_image(pixels(model))
    (grad,) = torch.autograd.grad(out.sum(), found[BLOCK])
    assert grad.abs().sum() > 0
    with clip.capture(model, BLOCK, detach=True) as found:
        model.encode_image(pixels(model))
    assert not found[BLOCK].requires_grad


@pytest.mark.parametrize("name", [*CONFIGS, "sequence-first"])
@torch.no_grad()
def test_identity_leaves_every_output_bit_identical(name):
    model = sequence_first(tiny().model) if name == "sequence-first" else tiny(name).model
    x = pixels(model)
    with clip.capture(model, "visual*") as before:
        plain = model.encode_image(x)
    for fn in (lambda x: x, lambda x: x.clone(memory_format=torch.preserve_format)):
        with clip.capture(model, "visual*") as after, clip.apply_at(model, {"visual*": fn}) as same:
            assert same is model
            edited = model.encode_image(x)
        assert torch.equal(plain, edited)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("layout", ["batch-first", "sequence-first"])
@torch.no_grad()
def test_an_edit_goes_where_it_should(layout):
    model = tiny().model
    if layout == "sequence-first":
        sequence_first(model)
    x, last = pixels(model), "visual.transformer.resblocks.2"
    shift = torch.randn(3, 17, 48)
    with clip.capture(model, last) as found:
        plain = model.encode_image(x)
    with clip.apply_at(model, {last: lambda acts: acts + shift}):
        edited = model.encode_image(x)
    pooled, _ = model.visual._pool(found[last] + shift)
    torch.testing.assert_close(edited, pooled @ model.visual.proj)
    assert torch.equal(plain, model.encode_image(x))
    assert not torch.allclose(plain, edited)


@torch.no_grad()
def test_several_patterns_apply_in_the_order_given():
    model = tiny().model
    x = pixels(model)
    seen = []

    def double(acts):
        seen.append("double")
        return acts * 2

    def add(acts):
        seen.append("add")
        return acts + 1

    with (
        clip.apply_at(model, {"visual.ln_p*e": double, "visual.ln_pre": add}),
        clip.capture(model, "visual.ln_pre") as found,
    ):
        model.encode_image(x)
    with clip.capture(model, "visual.ln_pre") as plain:
        model.encode_image(x)
    assert seen == ["double", "add"]
    assert torch.equal(found["visual.ln_pre"], plain["visual.ln_pre"] * 2 + 1)


@torch.no_grad()
def test_tuple_outputs_keep_their_kind():
    Pair = namedtuple("Pair", ["x", "extra"])

    class Toy(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.inner = nn.Identity()
            self.inner.forward = lambda x: wrap(x)

        def forward(self, x):
            return self.inner(x)

    x = torch.arange(6.0).view(1, 2, 3)
    for wrap in (lambda x: (x, None), lambda x: [x, 5], lambda x: Pair(x, 7)):
        toy = Toy(wrap)
        with clip.apply_at(toy, {"inner": lambda x: x + 1}):
            out = toy(x)
        assert type(out) is type(wrap(x))
        assert torch.equal(out[0], x + 1)
        assert out[1] == wrap(x)[1]
    toy = Toy(lambda x: {"x": x})
    with clip.apply_at(toy, {"inner": torch.abs}), pytest.raises(TypeError, match="2, 3 or 4 dimensions, got dict"):
        toy(x)


def test_hooks_go_also_after_errors():
    model = tiny().model
    x = pixels(model)

    def fail(acts):
        raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no luck"), clip.apply_at(model, {BLOCK: fail}):
        model.encode_image(x)
    with pytest.raises(KeyError), clip.capture(model, "*"):
        raise KeyError
    wrong = r"must return shape \(3, 17, 48\), got \(3, 48\)"
    with pytest.raises(ValueError, match=wrong), clip.apply_at(model, {BLOCK: lambda x: x[:, 0]}):
        model.encode_image(x)
    with pytest.raises(ValueError, match="matches hook point"), clip.apply_at(model, {BLOCK: fail, "nothing.*": fail}):
        pass
    harvesting = clip.harvest(model, [x, torch.zeros(1)], BLOCK)
    next(harvesting)
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        next(harvesting)
    assert hooks(model) == 0
    with (
        pytest.raises(RuntimeError, match="no luck"),
        clip.apply_at(model, {BLOCK: lambda x: x}),
        clip.capture(model, "*"),
    ):
        fail(None)
    assert hooks(model) == 0


def test_hook_point_names_and_errors():
    model = tiny().model
    names = clip.hook_points(model)
    assert names == [n for n, _ in model.named_modules() if n]
    assert clip.hook_points(model, "visual.transformer.resblocks.?") == [
        f"visual.transformer.resblocks.{i}" for i in range(3)
    ]
    assert clip.hook_points(model, "nothing") == []
    with pytest.raises(ValueError, match=r"near matches: visual\.transformer\.resblocks\.1"):
        next(clip.harvest(model, [pixels(model)], "visual.transformer.resblock.1"))
    with pytest.raises(ValueError, match="which matches 3"):
        next(clip.harvest(model, [pixels(model)], "visual.transformer.resblocks.?"))
    with pytest.raises(ValueError, match="tokens must be"):
        next(clip.harvest(model, [pixels(model)], BLOCK, tokens="class"))
    with pytest.raises(ValueError, match="never calls"):
        next(clip.harvest(model, [pixels(model)], f"{BLOCK}.attn.out_proj"))
    pooled = tiny("norm-after-pool").model
    with pytest.raises(ValueError, match="no patch tokens"):
        next(clip.harvest(pooled, [pixels(pooled)], "visual.ln_post", tokens="patches"))


@torch.no_grad()
def test_which_tokens_are_meant_is_read_from_the_output():
    model = tiny().model
    x, grid = pixels(model), (VISION["image_size"] // VISION["patch_size"]) ** 2
    raw = next(clip.harvest(model, [x], "visual.conv1"))
    assert torch.equal(next(clip.harvest(model, [x], "visual.conv1", tokens="patches")), raw)
    assert raw.shape == (3 * grid, VISION["width"])
    with pytest.raises(ValueError, match=f"'visual.conv1' has no class token among its {grid}"):
        next(clip.harvest(model, [x], "visual.conv1", tokens="cls"))
    pooled, queries = tiny("norm-after-pool").model, tiny("attention-pool").model
    for other, name in ((pooled, "visual.ln_post"), (queries, "visual.attn_pool")):
        for tokens, missing in (("cls", "class token"), ("patches", "patch tokens")):
            steering = clipsteer.VectorSteering(torch.ones(VISION["width"]), tokens=tokens)
            with pytest.raises(ValueError, match=f"no {missing} among"):
                next(clip.harvest(other, [x], name, tokens=tokens))
            with pytest.raises(ValueError, match=f"no {missing} among"), clipsteer.steer(other, {name: steering}):
                other.encode_image(x)
        assert len(next(clip.harvest(other, [x], name))) in (3, 15)
    # a patch embedding has the patches alone, also with steering
    clean = image_features(model, x)
    steered = {}
    for tokens in ("patches", "all"):
        vector = clipsteer.VectorSteering(torch.linspace(-9, 9, VISION["width"]), tokens=tokens)
        with clipsteer.steer(model, {"visual.conv1": vector}):
            steered[tokens] = image_features(model, x)
    assert torch.equal(steered["patches"], steered["all"])
    assert not torch.allclose(steered["all"], clean)
    timm = tiny("timm").model
    x, name = pixels(timm), "visual.trunk.patch_embed"
    grid = timm.visual.trunk.patch_embed.grid_size
    whole = next(clip.harvest(timm, [x], name)).unflatten(0, (3, *grid))
    assert torch.equal(whole, timm.visual.trunk.patch_embed.proj(x).permute(0, 2, 3, 1))
    with clip.apply_at(timm, {name: lambda tokens: 2 * tokens}), clip.capture(timm, name) as found:
        timm.encode_image(x)
    assert torch.equal(found[name].unflatten(1, grid), 2 * whole)
    with pytest.raises(ValueError, match="no class token"):
        next(clip.harvest(timm, [x], name, tokens="cls"))
    timm.visual.trunk.dynamic_img_size = False
    assert layout_at(timm, name).before_patches(grid[0] * grid[1]) == 0
    assert layout_at(timm, name).before_patches(grid[0] * grid[1] + 1) == 1
    assert layout_at(timm, name).before_patches(1) is None


class Wrapped(nn.Module):
    """As DistributedDataParallel names things."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module(*args)

    def encode_image(self, x):
        return self.module.encode_image(x)


@torch.no_grad()
def test_class_tokens_are_known_under_wrappers():
    model = tiny().model
    x, wrapped = pixels(model), Wrapped(tiny().model)
    assert clip.class_tokens(wrapped, f"module.{BLOCK}") == 1
    assert clip.class_tokens(Wrapped(tiny("timm").model), "module.visual.trunk.blocks.0") == 1
    steering = clipsteer.VectorSteering(torch.linspace(-9, 9, VISION["width"]), tokens="patches")
    with clipsteer.steer(model, {BLOCK: steering}), clipsteer.steer(wrapped, {f"module.{BLOCK}": steering}):
        assert torch.equal(model.encode_image(x), wrapped.encode_image(x))
    model.visual = Wrapped(model.visual)
    assert clip.class_tokens(model, BLOCK.replace("visual", "visual.module")) == 1
    compiled = torch.compile(tiny().model, backend="eager")
    assert clip.class_tokens(compiled, f"_orig_mod.{BLOCK}") == 1


@pytest.fixture
def dynamo():
    import torch._dynamo

    torch._dynamo.reset()
    clip_hooks._warn_of_compilation.cache_clear()
    yield torch._dynamo
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@torch.no_grad()
def test_hooks_are_refused_where_compiled_code_would_leave_them_out(dynamo, caplog):
    push = clipsteer.VectorSteering(torch.linspace(-9, 9, VISION["width"]))
    model = tiny().model
    x = pixels(model)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    with pytest.raises(RuntimeError, match=r"steer the model that is not compiled, or set torch\._dynamo\.config"):
        clipsteer.steer(compiled, {f"_orig_mod.{BLOCK}": push})
    # from inside, what was compiled around the model cannot be seen
    warned = lambda: [r.message for r in caplog.records if "skip_nnmodule_hook_guards" in r.message]
    assert not warned()
    with clipsteer.steer(model, {BLOCK: push}):
        pass
    with clipsteer.steer(model, {BLOCK: push}):
        pass
    assert len(warned()) == 1

    part = tiny().model
    part.visual.compile(backend="eager")
    with pytest.raises(RuntimeError, match="'visual' is compiled"):
        clipsteer.steer(part, {BLOCK: push})
    with pytest.raises(RuntimeError, match="'visual' is compiled"), clip.capture(part, BLOCK):
        pass
    with pytest.raises(RuntimeError, match="'visual' is compiled"):
        next(clip.harvest(part, [x], BLOCK))
    with clipsteer.steer(part, {"transformer.resblocks.0": clipsteer.VectorSteering(torch.ones(TEXT["width"]))}):
        pass
    assert hooks(part) == 0

    # a hook on the wrapper itself runs outside of the compiled code
    inside = tiny().model
    inside.visual = torch.compile(inside.visual, backend="eager")
    before = inside.encode_image(x)
    with clipsteer.steer(inside, {"visual": clipsteer.VectorSteering(5 * torch.ones(before.shape[1]))}):
        torch.testing.assert_close(inside.encode_image(x), before + 5)
    with pytest.raises(RuntimeError, match="'visual' is compiled"):
        clipsteer.steer(inside, {BLOCK.replace("visual", "visual._orig_mod"): push})


@torch.no_grad()
def test_what_is_compiled_inside_of_the_block_is_clean_afterwards(dynamo):
    model, push = tiny().model, clipsteer.VectorSteering(torch.linspace(-9, 9, VISION["width"]))
    x = pixels(model)
    clean, compiled = model.encode_image(x), torch.compile(model.encode_image, backend="eager")
    with clipsteer.steer(model, {BLOCK: push}):
        steered = model.encode_image(x)
        torch.testing.assert_close(compiled(x), steered)
    torch.testing.assert_close(compiled(x), clean)
    assert not torch.allclose(steered, clean)


@torch.no_grad()
def test_compiled_models_are_steered_once_dynamo_guards_hooks(dynamo):
    model = tiny().model
    x, push = pixels(model), clipsteer.VectorSteering(torch.linspace(-9, 9, VISION["width"]))
    with clipsteer.steer(model, {BLOCK: push}):
        expected = model.encode_image(x)
    with dynamo.config.patch(skip_nnmodule_hook_guards=False):
        model.visual.compile(backend="eager")
        before = model.encode_image(x)
        with clipsteer.steer(model, {BLOCK: push}):
            torch.testing.assert_close(model.encode_image(x), expected)
        assert torch.equal(model.encode_image(x), before)
    assert not torch.allclose(before, expected)


@pytest.mark.parametrize("name", [*CONFIGS, "sequence-first", "timm"])
@torch.no_grad()
def test_what_follows_a_block_runs_alone(name):
    loaded = tiny("plain" if name == "sequence-first" else name)
    if name == "sequence-first":
        sequence_first(loaded.model)
    point = "visual.trunk.blocks.1" if name == "timm" else BLOCK
    # in double precision, in which what torch multiplies in another layout is nothing beside the bound
    loaded.model.double()
    blocks, x = loaded.model.get_submodule(point.rpartition(".")[0]), pixels(loaded.model).double()
    site = _sae_site.Site(point, "all", layout_at(loaded.model, point))
    acts, clean = _sae_site.clean_pass(loaded, x, site)
    go_on = _sae_site.from_site(loaded, x, site, acts, clean)
    new = acts + torch.randn(acts.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    calls = []
    handles = [b.mlp.register_forward_hook(lambda *_, i=i: calls.append(i)) for i, b in enumerate(blocks)]
    short = go_on(new)
    assert calls == list(range(2, len(blocks)))
    for handle in handles:
        handle.remove()
    whole = _sae_site.embed(loaded, x, site, lambda _: new)
    torch.testing.assert_close(short, whole, rtol=0, atol=1e-9)
    assert not torch.allclose(short, clean, atol=1e-3)
    assert torch.equal(go_on(acts), clean)
    assert torch.equal(_sae_site.clean_pass(loaded, x, site)[1], clean)
    assert hooks(loaded.model) == 0


class Branched(nn.Module):
    """Its blocks are a list, but not a chain: the first one's output is used again at the end."""

    def __init__(self):
        super().__init__()
        self.visual = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def encode_image(self, x):
        x = first = self.visual[0](x.flatten(2).transpose(1, 2))
        for layer in self.visual[1:]:
            x = layer(x).relu()
        return (x * first).sum(1)


class Elsewhere(Branched):
    """Its blocks are a chain, and run by what stands outside of the module tree, as towers of transformers do."""

    def __init__(self):
        super().__init__()
        self._tower = (list(self.visual),)

    def encode_image(self, x):
        x = x.flatten(2).transpose(1, 2)
        for layer in self._tower[0]:
            x = layer(x)
        return x.sum(1)


@pytest.mark.parametrize("kind", [Branched, Elsewhere])
@torch.no_grad()
def test_where_blocks_are_no_chain_that_a_copy_runs_the_whole_tower_does(kind):
    torch.manual_seed(0)
    loaded = clip.CLIP(kind(), lambda i: i, lambda t: t, "branched", None)
    x, site = torch.randn(2, 6, 4, 4), _sae_site.Site("visual.1", "all", layout_at(loaded.model, "visual.1"))
    acts, clean = _sae_site.clean_pass(loaded, x, site)
    new = acts + 1
    got = _sae_site.from_site(loaded, x, site, acts, clean)(new)
    assert torch.equal(got, _sae_site.embed(loaded, x, site, lambda _: new))
    assert not torch.allclose(got, clean)


@pytest.mark.parametrize("name", ["plain", "custom-text"])
@torch.no_grad()
def test_zero_shot_head_is_its_definition(name):
    loaded = tiny(name)
    names = ["dog", "tin opener", "lighthouse"]
    head = clip.zero_shot_head(loaded, names, clip.CLIP_TEMPLATES, batch_size=4)
    rows = []
    for label in names:
        texts = loaded.tokenizer([t.format(label) for t in clip.CLIP_TEMPLATES])
        rows.append(F.normalize(F.normalize(loaded.model.encode_text(texts), dim=-1).mean(0), dim=0))
    torch.testing.assert_close(head, torch.stack(rows))
    theirs = open_clip.build_zero_shot_classifier(loaded.model, loaded.tokenizer, names, list(clip.CLIP_TEMPLATES))
    torch.testing.assert_close(head, theirs.T)
    assert not torch.allclose(head, clip.zero_shot_head(loaded, names, clip.SIMPLE_TEMPLATES))
    for bad in ({"classnames": []}, {"classnames": "dog"}, {"classnames": names, "templates": ["a photo"]}):
        with pytest.raises(ValueError, match="zero_shot_head"):
            clip.zero_shot_head(loaded, **bad)


def test_the_bundled_model_comes_by_open_clips_route():
    ours = clip.load("emojiclip")
    weights = assets.EMOJI / "emojiclip.safetensors"
    theirs, _, preprocess = open_clip.create_model_and_transforms("emojiclip", pretrained=str(weights))
    theirs.eval()
    emoji = EmojiStyles()
    image = emoji.image("noto", 3)
    x = ours.preprocess(image)
    assert torch.equal(x, preprocess(image))
    # 64 px drawings are neither resized nor cropped
    raw = torch.from_numpy(emoji.array("noto")[3].copy()).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (theirs.visual.image_mean, theirs.visual.image_std))
    torch.testing.assert_close(x, (raw - mean) / std)
    with torch.no_grad():
        assert torch.equal(ours.model.encode_image(x[None]), theirs.encode_image(x[None]))
    assert not ours.model.training
    assert ours.encode_images([image, image], batch_size=1).shape == (2, ours.model.visual.output_dim)
    assert sum(p.numel() for p in ours.model.parameters()) < 6e6


def test_the_bundled_tokenizer_knows_every_text():
    ours = clip.load()
    texts = ["a picture of a dog", "Zyzzyva — ökonom 東京 🦓", "x" * 200, ""]
    tokens = ours.tokenizer(texts)
    assert tokens.shape == (4, ours.model.context_length)
    assert tokens.max() == ours.model.vocab_size - 1 == ours.tokenizer.eot_token_id
    assert (tokens == ours.tokenizer.eot_token_id).sum(1).tolist() == [1] * 4
    full = open_clip.get_tokenizer("ViT-B-32")
    # ids below the cut are those of CLIP's own vocabulary
    assert ours.tokenizer.encode("dog") == full.encode("dog")
    assert ours.tokenizer.decode(ours.tokenizer.encode("zyzzyva ökonom")) == full.decode(full.encode("zyzzyva ökonom"))


@pytest.fixture(scope="module")
def emoji_scores():
    """style -> cosine of every drawing with every label (857, 857)."""
    loaded, emoji = clip.load(), EmojiStyles()
    head = clip.zero_shot_head(loaded, [concept.label for concept in emoji.concepts])
    styles = ("noto", "twemoji")
    return {s: loaded.encode_images(emoji.image(s, i) for i in range(857)) @ head.T for s in styles}


# the least that the bundled model was to reach: N-way zero-shot by label on seen concepts
@pytest.mark.parametrize(
    ("style", "ways", "least"),
    [
        *(("noto", ways, least) for ways, least in ((10, 0.95), (50, 0.82), (100, 0.77))),
        *(("twemoji", ways, least) for ways, least in ((10, 0.84), (50, 0.51), (100, 0.43))),
    ],
)
def test_the_bundled_model_knows_the_drawings(emoji_scores, style, ways, least):
    pool = torch.tensor(EmojiStyles().indices(style, seen=True))
    generator = torch.Generator().manual_seed(0)
    hits = []
    for _ in range(200):
        pick = pool[torch.randperm(len(pool), generator=generator)[:ways]]
        hits.append((emoji_scores[style][pick][:, pick].argmax(1) == torch.arange(ways)).float().mean())
    assert torch.stack(hits).mean() >= least


def test_the_bundled_model_transfers_to_unseen_concepts(emoji_scores):
    """Both the style and the concepts are new: 30-way 11 % was asked, 3.3 % is chance."""
    pool = torch.tensor(EmojiStyles().indices("twemoji", seen=False))
    generator = torch.Generator().manual_seed(0)
    hits = []
    for _ in range(200):
        pick = pool[torch.randperm(len(pool), generator=generator)[:30]]
        hits.append((emoji_scores["twemoji"][pick][:, pick].argmax(1) == torch.arange(30)).float().mean())
    assert torch.stack(hits).mean() >= 0.11


def test_local_weights_and_bad_ones(tmp_path):
    from safetensors.torch import save_file

    source = tiny()
    path = tmp_path / "weights.safetensors"
    save_file({k: v.contiguous() for k, v in source.model.state_dict().items()}, path)
    torch.manual_seed(7)
    loaded = clip.load("tiny-plain", path)
    assert all(torch.equal(v, loaded.model.state_dict()[k]) for k, v in source.model.state_dict().items())
    assert (loaded.name, loaded.pretrained) == ("tiny-plain", str(path))
    with pytest.raises(FileFormatError, match=r"weights\.safetensors: cannot be loaded as weights of tiny-layer-scale"):
        clip.load("tiny-layer-scale", path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(FileFormatError, match=r"weights\.safetensors"):
        clip.load("tiny-plain", path)
    with pytest.raises(ValueError, match="does not exist"):
        clip.load("tiny-plain", tmp_path / "absent.safetensors")


def test_wrong_names():
    with pytest.raises(ValueError, match="did you mean ViT-B-32"):
        clip.load("ViT-B-33")
    with pytest.raises(ValueError, match="one of ViT-B-32's tags"):
        clip.load("ViT-B-32", "laion9b")
    with pytest.raises(ValueError, match="brings its own weights"):
        clip.load("hf-hub:org/repo", "openai")


def test_torchvision_of_another_torch_is_explained(tmp_path, monkeypatch):
    (tmp_path / "open_clip.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "open_clip")
    with pytest.raises(RuntimeError, match=r"built for another torch.*pip install --upgrade torch torchvision"):
        clip.load("ViT-B-32")
    (tmp_path / "open_clip.py").write_text("import a_module_that_is_not_there")
    with pytest.raises(RuntimeError, match="pip install open_clip_torch"):
        clip.load("ViT-B-32")
