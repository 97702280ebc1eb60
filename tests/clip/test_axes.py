"""Which axes of an output are batch, tokens and channels: against what changes with the size of the image."""

from __future__ import annotations

import json
from contextlib import ExitStack

import pytest
import torch
from torch import nn

import clipsteer
from _command import run
from clipsteer import SAE, Conceptor, clip
from clipsteer.clip.axes import Axes
from clipsteer.clip.calls import Calls
from clipsteer.continual.plasticity import fit_saes
from clipsteer.sae.activations import HarvestSource, harvest_to_store
from clipsteer.sae.evaluate import evaluate_sae
from clipsteer.sae.site import find_site

timm = pytest.importorskip("timm")
open_clip = pytest.importorskip("open_clip")

SIZE = 128
# families of timm with small random models: name -> what makes one of a size
WINDOWS = {"window_size": 4}
FAMILIES: dict[str, dict] = {
    "swin_tiny_patch4_window7_224": {"img_size": True, **WINDOWS, "embed_dim": 24, "num_heads": (2, 2, 4, 8)},
    "swinv2_tiny_window8_256": {"img_size": True, **WINDOWS, "embed_dim": 24, "num_heads": (2, 2, 4, 8)},
    "swinv2_cr_tiny_224": {"img_size": True, **WINDOWS},
    "convnext_atto": {},
    "convnextv2_atto": {},
    "maxvit_rmlp_pico_rw_256": {"img_size": True},
    "coatnet_pico_rw_224": {"img_size": True},
    "fastvit_t8": {},
    "efficientformerv2_s0": {"img_size": True},
    "vitamin_small_224": {"img_size": True},
    "sam2_hiera_tiny": {},
    "davit_tiny": {},
    "focalnet_tiny_srf": {},
    "pvt_v2_b0": {},
    "twins_svt_small": {},
    "edgenext_xx_small": {},
    "tiny_vit_5m_224": {},
    "poolformer_s12": {},
    "mambaout_femto": {},
    "sequencer2d_s": {"img_size": True},
    "densenet121": {},
    "efficientnet_b0": {},
    "resnet18": {},
}
QUICK = ("swin_tiny_patch4_window7_224", "swinv2_cr_tiny_224", "convnext_atto", "vitamin_small_224", "pvt_v2_b0")


def make(name: str, height: int, width: int) -> nn.Module:
    settings = dict(FAMILIES[name])
    if settings.pop("img_size", False):
        settings["img_size"] = (height, width)
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, num_classes=0, **settings).eval()


def tensors(output):
    return output[0] if isinstance(output, tuple | list) else output


@torch.no_grad()
def shapes(model: nn.Module, x: torch.Tensor) -> dict[str, tuple[int, ...]]:
    found = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda m, a, o, name=name: found.update({name: tuple(getattr(tensors(o), "shape", ()))})
        )
    model(x)
    del found[""]
    return found


@torch.no_grad()
def orders(model: nn.Module, x: torch.Tensor) -> dict[str, tuple[int, ...] | str]:
    names = [name for name, _ in model.named_modules() if name]
    calls, found = Calls("test", model, {name: [name] for name in names}), {}

    def look(name):
        def hook(module, args, output):
            try:
                found[name] = calls.axes[name].order(output, calls.seen())
            except (TypeError, ValueError) as error:
                found[name] = str(error)

        return hook

    with ExitStack() as stack:
        calls.stand(stack, [(name, look(name)) for name in names])
        model(x)
    return found


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.nightly) for name in FAMILIES]
)
def test_channels_are_the_axis_that_does_not_grow_with_the_image(name):
    """The truth comes from a second image, higher by half and twice as wide: the axis that keeps its size has the
    channels, at every module of the tower that gives a map."""
    x = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    square, found = shapes(make(name, SIZE, SIZE), x), orders(make(name, SIZE, SIZE), x)
    oblong = shapes(make(name, SIZE * 3 // 2, SIZE * 2), torch.randn(2, 3, SIZE * 3 // 2, SIZE * 2))
    known = told = 0
    for module, shape in square.items():
        other = oblong[module]
        if len(shape) != 4 or shape[0] != 2 or other[0] != 2 or len(other) != 4:
            continue
        kept = [axis for axis in (1, 3) if shape[axis] == other[axis]]
        if len(kept) != 1 or shape[2] == other[2]:
            continue
        known += 1
        if isinstance(found[module], tuple):
            told += 1
            assert found[module][-1] == kept[0], (module, shape, other)
        else:
            # as high and wide as it has channels, with layers of both kinds in it
            assert "axis 1 or axis 3" in found[module]
            assert len(set(shape[1:])) == 1
    assert told >= max(10, 0.9 * known)


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """Models as load gives them, around towers whose maps have channels last, first, and both."""
    folder = tmp_path_factory.mktemp("towers")
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    for name in ("swin_tiny_patch4_window7_224", "convnext_atto"):
        vision = {"timm_model_name": name, "timm_pool": "", "timm_proj": "linear", "image_size": 224}
        config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
        (folder / f"tiny-{name.partition('_')[0]}-axes.json").write_text(json.dumps(config))

    def made(name):
        torch.manual_seed(0)
        return clip.load(folder / f"tiny-{name}-axes.json")

    return {name: made(name) for name in ("swin", "convnext")}


# hook point -> (tokens, channels), of 224 px
PLACES = {
    "swin": {
        "visual.trunk.patch_embed": (3136, 96),
        "visual.trunk.layers.2": (196, 384),
        "visual.trunk.layers.2.blocks.5": (196, 384),
        "visual.trunk.layers.2.blocks.5.norm1": (196, 384),
        "visual.trunk.layers.2.blocks.5.mlp": (196, 384),
        "visual.trunk.layers.2.blocks.5.mlp.act": (196, 1536),
        "visual.trunk.layers.3.downsample": (49, 768),
        "visual.trunk.norm": (49, 768),
    },
    "convnext": {
        "visual.trunk.stem": (3136, 40),
        "visual.trunk.stages.2": (196, 160),
        "visual.trunk.stages.2.blocks.5": (196, 160),
        "visual.trunk.stages.2.blocks.5.conv_dw": (196, 160),
        "visual.trunk.stages.2.blocks.5.norm": (196, 160),
        "visual.trunk.stages.2.blocks.5.mlp": (196, 160),
        "visual.trunk.stages.2.blocks.5.mlp.act": (196, 640),
        "visual.trunk.stages.3.downsample": (49, 320),
    },
}


def own(module: nn.Module, output: torch.Tensor) -> torch.Tensor:
    """A map as (B, T, d) by its shape: in these towers no map is as high as it has channels."""
    if output.ndim == 3:
        return output
    return output.flatten(1, 2) if output.shape[1] == output.shape[2] else output.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("which", PLACES)
@torch.no_grad()
def test_every_door_sees_the_same_rows(which, towers, tmp_path):
    loaded = towers[which]
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    wanted = {}
    handles = []
    for name in PLACES[which]:
        hook = lambda m, a, o, name=name: wanted.update({name: own(m, o)})
        handles.append(loaded.model.get_submodule(name).register_forward_hook(hook))
    with clip.capture(loaded, PLACES[which]) as found:
        loaded.model.encode_image(x)
    for handle in handles:
        handle.remove()
    for name, (tokens, width) in PLACES[which].items():
        assert wanted[name].shape == (2, tokens, width)
        assert torch.equal(found[name], wanted[name]), name
    for name in [*PLACES[which]][2:4]:
        want = wanted[name]
        assert torch.equal(next(clip.harvest(loaded, [x], name)), want.flatten(0, 1)), name
        # a direction of the channels, and no other, is what steering adds
        push = clipsteer.VectorSteering(torch.linspace(-3, 3, want.shape[-1]))
        with clipsteer.steer(loaded, {name: push}), clip.capture(loaded, name) as steered:
            loaded.model.encode_image(x)
        torch.testing.assert_close(steered[name], want + push.vector)
        keep = clipsteer.ConceptorSteering(Conceptor.fit(want, 1.0))
        with clipsteer.steer(loaded, {name: keep}), clip.capture(loaded, name) as steered:
            loaded.model.encode_image(x)
        torch.testing.assert_close(steered[name], keep.apply(want))


def test_saes_are_trained_and_evaluated_on_the_channels(towers, tmp_path):
    loaded, name = towers["swin"], "visual.trunk.layers.2.blocks.5"
    images = list(torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(2)))
    source = HarvestSource(loaded, images, name)
    assert (source.tokens_per_image, source.d_in) == (196, 384)
    store = harvest_to_store(loaded, images, name, tmp_path / "acts", dtype="float32")
    assert (store.d_in, len(store)) == (384, 4 * 196)
    sae = SAE(384, 48, "topk", k=4, metadata={"hook_point": name})
    figures = evaluate_sae(sae, loaded, images, batch_size=2)
    assert figures["tokens"] == 4 * 196
    assert len(figures["l0_map"]) == 14
    narrow = SAE(14, 48, "topk", k=4)
    with pytest.raises(ValueError, match=f"d_in = 14, but the activations at '{name}' are"):
        evaluate_sae(narrow, loaded, images, hook_point=name)
    assert find_site(sae, loaded, None, None).d_in == 384
    block = name.removeprefix("visual.trunk.")
    saes = fit_saes(loaded.model.visual.trunk, [block], [torch.stack(images)], 48, 4, 2)
    assert saes[block].d_in == 384


@torch.no_grad()
def test_windows_are_refused_also_of_a_single_image(towers):
    for n in (1, 2):
        x = torch.randn(n, 3, 224, 224)
        for part in ("attn", "attn.qkv", "attn.proj"):
            name = f"visual.trunk.layers.1.blocks.0.{part}"
            with pytest.raises(ValueError, match=rf"'{name}': axis 0 of its output .* windows .* block around it"):
                next(clip.harvest(towers["swin"], [x], name))
            steering = clipsteer.VectorSteering(torch.ones(192))
            with pytest.raises(ValueError, match="windows"), clipsteer.steer(towers["swin"], {name: steering}):
                towers["swin"].model.encode_image(x)
        # a pattern takes what there is
        with clip.capture(towers["swin"], "visual.trunk.layers.1.blocks.0*") as found:
            towers["swin"].model.encode_image(x)
        assert {len(x) for x in found.values()} == {n}
        assert "visual.trunk.layers.1.blocks.0.mlp" in found
        # a window as large as the map is the map
        assert next(clip.harvest(towers["swin"], [x], "visual.trunk.layers.3.blocks.0.attn")).shape == (n * 49, 768)


class Cube(nn.Module):
    """As high and wide as it has channels, with layers of both kinds: nothing tells."""

    def __init__(self):
        super().__init__()
        self.block = nn.Module()
        self.block.conv, self.block.linear = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8)
        self.block.forward = lambda x: self.block.linear(self.block.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward(self, x):
        return self.block(x).mean((2, 3))


@torch.no_grad()
def test_what_cannot_be_told_is_refused_and_can_be_said():
    torch.manual_seed(0)
    model, x = Cube().eval(), torch.randn(2, 3, 32, 32)
    said = r"axis 1 or axis 3 of its output \(2, 8, 8, 8\).*output_fmt = 'NCHW' or 'NHWC'"
    with pytest.raises(ValueError, match=said):
        next(clip.harvest(model, [x], "block"))
    raw = model.block.forward(x)
    model.block.output_fmt = "NCHW"
    torch.testing.assert_close(next(clip.harvest(model, [x], "block")), raw.permute(0, 2, 3, 1).reshape(-1, 8))
    model.block.output_fmt = "NHWC"
    torch.testing.assert_close(next(clip.harvest(model, [x], "block")), raw.reshape(-1, 8))
    del model.block.output_fmt
    # an image of another shape tells
    oblong = torch.randn(2, 3, 32, 64)
    assert next(clip.harvest(model, [oblong], "block")).shape == (2 * 8 * 16, 8)


def test_a_checkpointed_block_is_read_alike_when_it_runs_again():
    tower = make("convnext_atto", 64, 64)
    name = "stages.2.blocks.3"
    vector = torch.zeros(160, requires_grad=True)
    grads = []
    for again in (False, True):
        tower.set_grad_checkpointing(again)
        tower.train()
        vector.grad = None
        x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        with clipsteer.steer(tower, {name: clipsteer.VectorSteering(vector)}):
            tower(x).square().sum().backward()
        grads.append(vector.grad.clone())
    torch.testing.assert_close(grads[0], grads[1])
    assert grads[0].abs().sum() > 0


class Odd(nn.Module):
    """Attention maps, channels before tokens, a sequence before the batch, and rows of no image."""

    def __init__(self):
        super().__init__()
        self.patch, self.attn, self.conv = nn.Conv2d(3, 24, 8, 8), nn.Module(), nn.Conv1d(24, 24, 1)
        self.attn.drop, self.attn.q_norm, self.attn.proj = nn.Dropout(), nn.Identity(), nn.Linear(24, 24)
        self.norm, self.linear, self.table = nn.LayerNorm(24), nn.Linear(24, 24), nn.Embedding(5, 24)
        self.pool = nn.AvgPool1d(2)

    def forward(self, x):
        x = self.patch(x).flatten(2)  # (B, 24, 16)
        x = self.conv(x).transpose(1, 2)
        heads = self.attn.q_norm(x.unflatten(2, (3, 8)).transpose(1, 2))  # (B, 3, 16, 8)
        mixed = self.attn.drop((heads @ heads.mT).softmax(-1)) @ heads
        x = x + self.attn.proj(mixed.transpose(1, 2).flatten(2))
        x = self.linear(x.transpose(0, 1)).transpose(0, 1)
        self.pool(x.transpose(1, 2))
        return self.norm(x).mean(1) + self.table(torch.arange(5)).mean(0)


@torch.no_grad()
def test_maps_of_attention_tables_and_other_orders():
    torch.manual_seed(0)
    model, x = Odd().eval(), torch.randn(3, 3, 32, 32)
    with pytest.raises(ValueError, match="axis 1 or axis 3"):
        next(clip.harvest(model, [x], "attn.drop"))
    with pytest.raises(ValueError, match="axis 1 is: set batch_first = False"):
        next(clip.harvest(model, [x], "linear"))
    with clip.capture(model, "*") as found:
        model(x)
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "patch": (3, 16, 24), "conv": (3, 16, 24), "norm": (3, 16, 24), "pool": (3, 8, 24), "table": (1, 5, 24),
        "attn.q_norm": (3, 48, 8), "attn.proj": (3, 16, 24),
    }  # fmt: skip
    assert torch.equal(found["conv"].mT, model.conv(model.patch(x).flatten(2)))
    with pytest.raises(ValueError, match="the same for all of them"):
        next(clip.harvest(model, [x], "table"))


@pytest.mark.parametrize("name", ["mixer_s32_224", "resmlp_12_224", "gmlp_ti16_224"])
@torch.no_grad()
def test_parts_that_mix_tokens_keep_their_channels(name):
    shapes_of = []
    for size in (64, 96):
        tower = timm.create_model(name, pretrained=False, num_classes=0, img_size=size).eval()
        with clip.capture(tower, "blocks.*") as found:
            tower(torch.randn(2, 3, size, size))
        shapes_of.append({name: x.shape for name, x in found.items()})
    assert len(shapes_of[0]) > 10
    mixing = [name for name in shapes_of[0] if "tokens" in name or "gate.proj" in name]
    assert len(mixing) >= 2
    for name, shape in shapes_of[0].items():
        assert shape[0] == 2
        assert shape[2] == shapes_of[1][name][2], name  # channels, whatever the number of patches


@torch.no_grad()
def test_images_and_texts_of_other_numbers_in_one_pass():
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
    model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).eval()
    both = ("visual.transformer.resblocks.0", "transformer.resblocks.0")
    with clip.capture(model, both) as found:
        model(torch.randn(2, 3, 32, 32), torch.randint(1, 60, (7, 8)))
        assert [len(found[name]) for name in both] == [2, 7]
        model.encode_image(torch.randn(5, 3, 32, 32))
        assert [len(found[name]) for name in both] == [5, 7]
        with pytest.raises(RuntimeError):
            model(torch.randn(2, 4, 32, 32))
        model.encode_image(torch.randn(3, 3, 32, 32))
    assert [len(found[name]) for name in both] == [3, 7]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_scripted_parts_may_stand_beside():
    root = nn.Sequential(torch.jit.script(nn.Linear(4, 4)), nn.Linear(4, 4))
    x = torch.ones(2, 4)
    with clip.capture(root, "1") as found:
        out = root(x)
    assert torch.equal(found["1"][:, 0], out)


def test_axes_of_a_module_are_those_of_its_kind():
    root = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Linear(8, 8), nn.LayerNorm(8), nn.BatchNorm2d(8), nn.RMSNorm(8))
    cube = torch.zeros(2, 8, 8, 8)
    assert [Axes(root, str(i)).order(cube, None)[-1] for i in range(5)] == [1, 3, 3, 1, 3]
    with pytest.raises(TypeError, match="2, 3 or 4 dimensions, got dict"):
        Axes(root, "0").order({"x": cube}, None)


def test_the_commands_train_on_channels_and_refuse_windows(capsys, tmp_path, monkeypatch):
    from PIL import Image

    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "b").mkdir()
    for i in range(4):
        Image.new("RGB", (32, 32), (60 * i, 10, 10)).save(tmp_path / "images" / "ab"[i % 2] / f"{i}.png")
    args = ["--model", "timm:swin_tiny_patch4_window7_224", "--pretrained", "random", "--device", "cpu"]
    args += ["--data", tmp_path / "images"]
    train = ["sae", "train", *args, "--out", tmp_path / "sae", "--d-sae", 32, "--k", 4, "--steps", 2]
    train += ["--batch-size", 64, "--warmup-steps", 1]
    code, _, err = run(capsys, *train, "--hook-point", "visual.trunk.layers.2.blocks.5.attn.proj")
    assert code == 2
    assert "windows" in err
    code, _, err = run(capsys, *train, "--hook-point", "visual.trunk.layers.2.blocks.5")
    assert code == 0, err
    assert SAE.from_pretrained(tmp_path / "sae").d_in == 384
    file = tmp_path / "c.safetensors"
    code, _, err = run(capsys, "conceptor", "fit", *args, "--hook-point", "visual.trunk.norm", "--out", file)
    assert code == 0, err
    assert Conceptor.load(file).d == 768
