from __future__ import annotations

import copy
import json
from contextlib import nullcontext

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.utils import parametrize

from clipsteer import FileFormatError, clip
from clipsteer.continual.lora import VARIANTS, LoRA
from clipsteer.io.files import read_safetensors, write_safetensors

open_clip = pytest.importorskip("open_clip")
timm = pytest.importorskip("timm")
TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
SMALL = {"width": 64, "layers": 3, "head_width": 16, "patch_size": 16, "image_size": 32}
TEST_VIT = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160}
EVA = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}


def tower(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "emojiclip":
            made = clip.load().model.visual
        elif name == "vit":
            made = open_clip.model.CLIP(16, SMALL, TEXT).visual
        elif name == "custom":
            made = open_clip.model.CLIP(16, {**SMALL, "block_type": "custom", "qk_norm": True}, TEXT).visual
        elif name == "open_clip timm":
            made = open_clip.model.CLIP(16, TEST_VIT, TEXT).visual
        elif name == "timm":
            made = timm.create_model("test_vit", num_classes=0)
        else:  # separate projections
            made = timm.models.eva.Eva(**EVA, qkv_fused=False)
    return made.eval()


# the weight that is adapted in the first block, and the block
TOWERS = {
    "emojiclip": ("transformer.resblocks.0.attn.in_proj_weight", "transformer.resblocks.0"),
    "vit": ("transformer.resblocks.0.attn.in_proj_weight", "transformer.resblocks.0"),
    "custom": ("transformer.resblocks.0.attn.in_proj_weight", "transformer.resblocks.0"),
    "open_clip timm": ("trunk.blocks.0.attn.qkv.weight", "trunk.blocks.0"),
    "timm": ("blocks.0.attn.qkv.weight", "blocks.0"),
    "eva": ("blocks.0.attn.k_proj.weight", "blocks.0"),
}
SIZES = {"emojiclip": 64, "vit": 32, "custom": 32, "open_clip timm": 160, "timm": 160, "eva": 32}


def pixels(name: str, dtype=torch.float32) -> torch.Tensor:
    size = SIZES[name]
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def scramble(lora: LoRA, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def trained(name: str, tasks: int = 2, **settings) -> LoRA:
    lora = LoRA(tower(name), **{"rank": 3, **settings})
    for task in range(tasks):
        lora.begin_task(torch.Generator().manual_seed(task))
        scramble(lora, task)
    return lora


def weight(module: nn.Module, name: str) -> torch.Tensor:
    owner, _, last = name.rpartition(".")
    return getattr(module.get_submodule(owner), last)


@pytest.mark.parametrize("name", TOWERS)
def test_the_weight_is_w0_plus_all_products(name):
    plain, lora = tower(name), trained(name, tasks=3, alpha=6.0)
    adapted, block = TOWERS[name]
    W0, W = weight(plain, adapted), weight(lora.module, adapted)
    expected, state = W0.detach().double().clone(), lora.state_dict()
    d = len(W0) if name == "eva" else len(W0) // 3
    for i in range(3):
        A, B = state[f"{adapted}.A.{i}"].double(), state[f"{adapted}.B.{i}"].double()
        assert A.shape == (len(B), 3, W0.shape[1])
        for j, (a, b) in enumerate(zip(A, B)):
            row = 0 if name == "eva" else (j + 1) * d
            expected[row : row + d] += 2 * b @ a
    # 3 products of 3 terms and 3 sums, each within 2⁻²⁴ of magnitudes below 2
    torch.testing.assert_close(W.double(), expected, rtol=0, atol=2 * 12 * 2**-24 * float(expected.abs().max()))
    if name != "eva":
        assert torch.equal(W[:d], W0[:d])
        assert not torch.equal(W[d : 2 * d], W0[d : 2 * d])
    assert next(iter(lora.groups())) == block
    stem = block[:-1]
    assert list(lora.groups()) == [f"{stem}{i}" for i, _ in enumerate(plain.get_submodule(stem[:-1]))]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", TOWERS)
def test_begin_task_changes_no_bit_and_trains_the_newest_pair_alone(name, variant):
    module, x = tower(name), pixels(name)
    with torch.no_grad():
        before = module(x)
    lora = LoRA(module, rank=2, variant=variant)
    assert lora.parameters() == []
    for task in range(3):
        lora.begin_task()
        with torch.no_grad():
            assert torch.equal(module(x), before)
        scramble(lora, task)
        kept = {n: t.clone() for n, t in module.state_dict().items()}
        optimizer = torch.optim.SGD(lora.parameters(), lr=1.0)
        module(x).square().sum().backward()
        optimizer.step()
        assert all(p.grad is None for p in module.parameters() if not p.requires_grad)
        assert {id(p) for p in lora.parameters()} == {id(p) for p in module.parameters() if p.requires_grad}
        moved = {n for n, t in module.state_dict().items() if not torch.equal(t, kept[n])}
        ids = {"task": (task, task), "shared": (0, 0), "shared_a": (0, task)}[variant]
        assert {n.rsplit(".", 2)[1] + n.rsplit(".", 2)[2] for n in moved} == {f"A{ids[0]}", f"B{ids[1]}"}
        assert len(moved) == 2 * len(lora.sites) == len(lora.parameters())
        with torch.no_grad():
            before = module(x)
    assert lora.tasks == 3


def test_the_first_pairs_are_drawn_as_documented():
    module = tower("vit")
    lora = LoRA(module, rank=200)
    lora.begin_task(torch.Generator().manual_seed(3))
    A, B = lora.state_dict()["transformer.resblocks.1.attn.in_proj_weight.A.0"], lora.parameters()[1]
    # Kaiming with a = √5 is uniform on ±1/√fan_in
    bound = 64**-0.5
    assert 0.99 * bound < float(A.abs().max()) <= bound
    assert abs(float(A.std()) - bound / 3**0.5) < 0.02 * bound
    assert not B.any()
    assert not torch.equal(A[0], A[1])
    again = LoRA(tower("vit"), rank=200)
    again.begin_task(torch.Generator().manual_seed(3))
    assert torch.equal(again.state_dict()["transformer.resblocks.1.attn.in_proj_weight.A.0"], A)


@pytest.mark.parametrize("name", TOWERS)
def test_targets(name):
    q_only, plain = trained(name, targets=("q",)), tower(name)
    for site in q_only.sites:
        W, W0 = (weight(m, f"{site.owner}.{site.weight}") for m in (q_only.module, plain))
        d = len(W0) // site.panels
        assert not torch.equal(W[:d], W0[:d])
        assert torch.equal(W[d:], W0[d:])
    assert name == "eva" or len(q_only.sites) == len(q_only.groups())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", TOWERS)
def test_merge(name, variant):
    lora, x = trained(name, variant=variant), pixels(name)
    module, plain = lora.module, tower(name)
    with torch.no_grad():
        before = module(x)
    assert lora.merge() is module
    with torch.no_grad():
        after = module(x)
        assert torch.linalg.vector_norm(after - before) <= 1e-6 * torch.linalg.vector_norm(before)
        assert torch.linalg.vector_norm(after - plain(x)) > 1e-2 * torch.linalg.vector_norm(before)
    assert [(n, type(m)) for n, m in module.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    plain.load_state_dict(module.state_dict())
    with torch.no_grad():
        assert torch.equal(plain(x), after)
    with pytest.raises(ValueError, match="merged"):
        lora.begin_task()
    assert LoRA(module).tasks == 0


@pytest.mark.parametrize("name", TOWERS)
def test_copies_are_independent(name):
    lora, x = trained(name), pixels(name)
    module = lora.module
    with torch.no_grad():
        before = module(x)
    frozen, twin = copy.deepcopy(module), copy.deepcopy(lora)
    scramble(twin, 9)
    with torch.no_grad():
        assert torch.equal(module(x), before)
        changed = twin.module(x)
    assert not torch.equal(changed, before)
    # merging one must leave the others alone, with which it shares its class
    lora.merge()
    with torch.no_grad():
        assert torch.equal(frozen(x), before)
        assert torch.equal(twin.module(x), changed)
    twin.begin_task()
    twin.merge()
    with torch.no_grad():
        assert torch.equal(frozen(x), before)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["emojiclip", "eva"])
def test_save_load_and_resume(tmp_path, name, variant):
    lora, x = trained(name, variant=variant, alpha=2.0), pixels(name)
    lora.save(tmp_path / "pairs.safetensors")
    loaded = LoRA.load(tower(name), tmp_path / "pairs.safetensors")
    assert (loaded.config, loaded.tasks) == (lora.config, 2)
    assert loaded.state_dict().keys() == lora.state_dict().keys()
    assert all(torch.equal(t, lora.state_dict()[n]) for n, t in loaded.state_dict().items())
    with torch.no_grad():
        assert torch.equal(loaded.module(x), lora.module(x))
    # the next step and the next task are the same, too
    for each in (lora, loaded):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        each.module(x).square().sum().backward()
        optimizer.step()
        each.begin_task(torch.Generator().manual_seed(5))
    assert all(torch.equal(t, lora.state_dict()[n]) for n, t in loaded.state_dict().items())
    # back to an earlier state, as a resumed run may; the module's own state_dict carries the pairs as well
    lora.load_state_dict(read_safetensors(tmp_path / "pairs.safetensors"))
    assert lora.tasks == 2
    assert len(lora.parameters()) == 2 * len(lora.sites)
    other = trained(name, variant=variant, alpha=2.0)
    scramble(other, 8)
    other.module.load_state_dict(lora.module.state_dict())
    with torch.no_grad():
        assert torch.equal(other.module(x), lora.module(x))
    assert safetensors.torch.load_file(tmp_path / "pairs.safetensors").keys() == lora.state_dict().keys()


def test_states_and_files_that_do_not_fit(tmp_path):
    lora, path = trained("vit"), tmp_path / "pairs.safetensors"
    state = lora.state_dict()
    first = "transformer.resblocks.0.attn.in_proj_weight.A.0"
    for bad in (
        {**state, first: state[first][:1]},
        {n: t for n, t in state.items() if n != first},
        {**state, "x": torch.zeros(1)},
        {**state, "tasks": torch.tensor(3)},
        {**state, "tasks": torch.tensor(2**60)},
        {**state, "tasks": torch.tensor(-1)},
        {n: t for n, t in state.items() if n != "tasks"},
    ):
        with pytest.raises(ValueError, match=r"load_state_dict: .*expected"):
            lora.load_state_dict(bad)
        assert all(torch.equal(t, state[n]) for n, t in lora.state_dict().items())
    lora.save(path)
    other = tower("eva").requires_grad_(True)
    with pytest.raises(ValueError, match="expected shape"):
        LoRA.load(other, path)
    assert all(p.requires_grad for p in other.parameters())
    assert other.state_dict().keys() == tower("eva").state_dict().keys()
    about = {"format": "clipsteer-lora", "format_version": "1"}
    good = {"rank": 3, "variant": "task", "targets": ["k", "v"], "alpha": None}
    for config in ("", "[]", "{}", "3", json.dumps({**good, "rank": 0}), json.dumps({**good, "targets": [[]]}),
                   json.dumps({**good, "alpha": "x"}), json.dumps({**good, "more": 1})):  # fmt: skip
        write_safetensors(path, state, {**about, "config": config})
        with pytest.raises(FileFormatError, match="pairs"):
            LoRA.load(tower("vit"), path)
    write_safetensors(path, state, {**about, "format_version": "2", "config": json.dumps(good)})
    with pytest.raises(FileFormatError, match="not a LoRA file"):
        LoRA.load(tower("vit"), path)
    write_safetensors(path, {**state, first: state[first] * float("nan")}, {**about, "config": json.dumps(good)})
    with pytest.raises(FileFormatError, match="NaN"):
        LoRA.load(tower("vit"), path)


@pytest.mark.parametrize("name", TOWERS)
def test_16_bit_weights_and_autocast(name):
    lora = LoRA(tower(name).bfloat16(), rank=2)
    lora.begin_task()
    assert {p.dtype for p in lora.parameters()} == {torch.float32}
    with torch.no_grad():
        before = lora.module(pixels(name, torch.bfloat16))
    # far below what a bfloat16 weight resolves, but kept by the pairs
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.add_(1e-4)
    assert before.dtype == torch.bfloat16
    y = lora.module(pixels(name, torch.bfloat16))
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in lora.parameters())
    assert lora.module.requires_grad_(False) is lora.merge()
    assert {p.dtype for p in lora.module.parameters()} == {torch.bfloat16}

    wide = trained(name)
    exact = weight(wide.module, TOWERS[name][0])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(weight(wide.module, TOWERS[name][0]), exact)
        assert wide.module(pixels(name)).isfinite().all()
    wide.module.bfloat16()
    assert wide.module(pixels(name, torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["vit", "emojiclip"])
def test_the_fast_path_of_attention_reads_the_pairs(name, monkeypatch):
    lora, x = trained(name), pixels(name)
    calls, native = [], torch._native_multi_head_attention
    monkeypatch.setattr(torch, "_native_multi_head_attention", lambda *a, **k: calls.append(1) or native(*a, **k))
    with torch.no_grad():
        fast = lora.module.eval()(x)
        assert len(calls) == len(lora.groups())
        slow = lora.module.train()(x)
        assert len(calls) == len(lora.groups())
        plain = tower(name)(x)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    assert torch.linalg.vector_norm(fast - plain) > 1e-2 * torch.linalg.vector_norm(plain)


@pytest.mark.parametrize("name", TOWERS)
def test_a_cached_pass_is_the_same(name):
    lora, x = trained(name), pixels(name)
    gradients = []
    for context in (nullcontext, parametrize.cached):
        with context():
            y = lora.module(x)
        gradients.append((y, *torch.autograd.grad(y.square().sum(), lora.parameters())))
    for plain, cached in zip(*gradients):
        torch.testing.assert_close(cached, plain, rtol=1e-5, atol=1e-5 * float(plain.detach().abs().max()))
    scramble(lora, 4)
    with torch.no_grad():
        assert not torch.equal(lora.module(x), y)


def test_separate_parameters_of_attention_and_modules_outside_of_blocks():
    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, kdim=6, vdim=6)})])
            self.pool = nn.MultiheadAttention(8, 2)

        def forward(self, x, y):
            return self.blocks[0]["attn"](x, y, y)[0]

    module = Tower().eval()
    x, y = torch.randn(3, 2, 8), torch.randn(4, 2, 6)
    with torch.no_grad():
        plain = module(x, y)
    lora = LoRA(module, rank=2)
    assert [(s.owner, s.weight) for s in lora.sites] == [
        ("blocks.0.attn", "k_proj_weight"),
        ("blocks.0.attn", "v_proj_weight"),
    ]
    lora.begin_task()
    scramble(lora)
    with torch.no_grad():
        after = module(x, y)
        assert not torch.allclose(after, plain)
        with pytest.raises(ValueError, match="separate K and V parameters"):
            lora.export_peft("nowhere")
        lora.merge()
        assert torch.equal(module(x, y), after)


def test_arguments():
    module = tower("vit")
    for bad in ({"rank": 0}, {"rank": True}, {"variant": "x"}, {"targets": ()}, {"targets": ("k", "k")},
                {"targets": "kx"}, {"alpha": 0.0}, {"alpha": float("inf")}):  # fmt: skip
        with pytest.raises(ValueError, match=f"LoRA: {next(iter(bad))} must be"):
            LoRA(module, **bad)
    with pytest.raises(ValueError, match="no numbered blocks with attention weights"):
        LoRA(nn.Sequential(nn.Linear(2, 2)))
    assert all(p.requires_grad for p in module.parameters())
    lora = LoRA(module)
    with pytest.raises(ValueError, match="has pairs already"):
        LoRA(module)
    with pytest.raises(ValueError, match="no task has begun"):
        lora.export_peft("nowhere")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", TOWERS)
def test_peft_computes_the_same_from_an_export(tmp_path, name, variant):
    peft = pytest.importorskip("peft")
    lora, x = trained(name, variant=variant, alpha=5.0), pixels(name)
    lora.export_peft(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tower(name), str(tmp_path)).eval()
    with torch.no_grad():
        ours, got, plain = lora.module(x), theirs(x), tower(name)(x)
    # float32 products in another order, through a few blocks
    assert torch.linalg.vector_norm(got - ours) <= 1e-5 * torch.linalg.vector_norm(ours)
    assert torch.linalg.vector_norm(ours - plain) > 1e-2 * torch.linalg.vector_norm(plain)
    with torch.no_grad():
        merged = theirs.merge_and_unload()(x)
    assert torch.linalg.vector_norm(merged - ours) <= 1e-5 * torch.linalg.vector_norm(ours)
