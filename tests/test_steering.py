from __future__ import annotations

import dataclasses
import textwrap

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import clipsteer
from clipsteer import SAE, AdditiveSteering, Conceptor, ConceptorSteering, SAESteering, VectorSteering, steer
from clipsteer.clip import apply_at, capture, harvest
from clipsteer.sae import ARCHITECTURES, NORMALIZATIONS

WIDTH, LAYERS, TOKENS = 32, 3, 5
BLOCK = "visual.transformer.resblocks.1"


def make_sae(architecture="topk", normalize="none", d_in=WIDTH, dtype=torch.float64, seed=0) -> SAE:
    torch.manual_seed(seed)
    sae = SAE(d_in, 48, architecture, k=6, normalize=normalize, dtype=dtype)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name.startswith("b_") or name == "r_mag":
                parameter.normal_(0, 0.1)
        if architecture in ("jumprelu", "batch_topk"):
            sae.threshold.fill_(0.2)
    return sae.eval()


@pytest.fixture(scope="module")
def model():
    import open_clip

    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": LAYERS, "width": WIDTH, "head_width": 16, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    return open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def block_output(model, images, name=BLOCK):
    seen = []
    hook = model.get_submodule(name).register_forward_hook(lambda m, i, o: seen.append(o.clone()))
    try:
        with torch.no_grad():
            model.encode_image(images)
    finally:
        hook.remove()
    return seen[0]


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_decoding_edited_activations_plus_error(architecture, normalize):
    sae = make_sae(architecture, normalize)
    x = 3 * torch.randn(4, 7, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 0.5
    with torch.no_grad():
        stats, acts = sae(x).stats, sae.encode(x)
        busy = acts.flatten(0, -2).sum(0).argsort(descending=True).tolist()
        strengths = {busy[0]: 5.0, busy[1]: 0.0, busy[2]: 1.5, busy[-1]: 2.0}
        edited = acts.clone()
        for feature, strength in strengths.items():
            edited[..., feature] = strength
        expected = sae.decode(edited, stats) + (x - sae(x).x_hat)
        steered = SAESteering(sae, strengths).apply(x)
    assert (acts[..., busy[1]] > 0).any()
    torch.testing.assert_close(steered, expected, rtol=1e-12, atol=1e-12)
    assert (steered - x).abs().amax() > 0.1


def test_zero_suppresses_and_present_strength_changes_nothing():
    sae = make_sae("relu")
    x = torch.randn(1, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    acts = sae.encode(x).detach()
    feature = int(acts.argmax())
    with torch.no_grad():
        torch.testing.assert_close(SAESteering(sae, {feature: float(acts[0, feature])}).apply(x), x)
        off = SAESteering(sae, {feature: 0.0}).apply(x)
        on = SAESteering(sae, {feature: 9.0}).apply(x)
    direction = sae.W_dec[feature].detach()
    torch.testing.assert_close(off, x - acts[0, feature] * direction)
    torch.testing.assert_close(on, x + (9.0 - acts[0, feature]) * direction)


@pytest.mark.parametrize("tokens", ["all", "cls", "patches"])
def test_hook_steers_the_named_tokens_and_no_other(model, images, tokens):
    sae = make_sae("topk", "layer_norm", dtype=torch.float32)
    clean = block_output(model, images)
    steering = SAESteering(sae, {3: 20.0}, tokens=tokens)
    with steer(model, {BLOCK: steering}) as handle, torch.no_grad():
        assert handle.hook_points == [BLOCK]
        got = block_output(model, images)
        expected = steering.apply(clean)
    where = {"all": slice(None), "cls": slice(0, 1), "patches": slice(1, None)}[tokens]
    untouched = torch.ones(clean.shape[1], dtype=torch.bool)
    untouched[where] = False
    assert clean.shape == (3, TOKENS, WIDTH)
    torch.testing.assert_close(got[:, where], expected[:, where])
    assert torch.equal(got[:, untouched], clean[:, untouched])


def test_model_is_bit_identical_afterwards_also_after_errors(model, images):
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with torch.no_grad():
        before = model.encode_image(images)
        with steer(model, {BLOCK: SAESteering(make_sae(dtype=torch.float32), {1: 30.0})}):
            during = model.encode_image(images)
        with pytest.raises(ZeroDivisionError), steer(model, {BLOCK: VectorSteering(torch.ones(WIDTH), 3.0)}):
            1 / 0  # noqa: B018
        wrong = VectorSteering(torch.ones(WIDTH + 1))
        with pytest.raises(ValueError, match=f"d_in = {WIDTH + 1}.*{WIDTH}"), steer(model, {BLOCK: wrong}):
            model.encode_image(images)
        after = model.encode_image(images)
    assert torch.equal(before, after)
    assert (during - before).abs().amax() > 1e-3
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_handle_stays_until_removed(model, images):
    with torch.no_grad():
        clean = model.encode_image(images)
        handle = steer(model, {BLOCK: VectorSteering(torch.ones(WIDTH), 4.0)})
        try:
            assert not torch.equal(model.encode_image(images), clean)
            assert not torch.equal(model.encode_image(images), clean)
        finally:
            handle.remove()
        handle.remove()
        assert torch.equal(model.encode_image(images), clean)


def test_lists_apply_in_order_and_patterns_reach_every_match(model, images):
    sae, vector = make_sae("relu", dtype=torch.float32), torch.linspace(-2, 2, WIDTH)
    clean = block_output(model, images)
    both = [VectorSteering(vector, 2.0), SAESteering(sae, {0: 4.0})]
    with torch.no_grad(), steer(model, {BLOCK: both}):
        got = block_output(model, images)
        expected = both[1].apply(both[0].apply(clean))
    torch.testing.assert_close(got, expected)
    with torch.no_grad(), steer(model, {"visual.transformer.resblocks.?": VectorSteering(vector)}) as handle:
        every = model.encode_image(images)
    assert handle.hook_points == [f"visual.transformer.resblocks.{i}" for i in range(LAYERS)]
    with torch.no_grad(), steer(model, {name: VectorSteering(vector) for name in handle.hook_points}):
        torch.testing.assert_close(model.encode_image(images), every, rtol=0, atol=0)
    with torch.no_grad(), steer(model, {BLOCK: VectorSteering(vector)}):
        assert not torch.allclose(model.encode_image(images), every)


def test_steering_lets_gradients_through(model, images):
    vector = torch.zeros(WIDTH, requires_grad=True)
    with steer(model, {BLOCK: VectorSteering(vector)}):
        model.encode_image(images).square().sum().backward()
    assert vector.grad.abs().sum() > 0
    model.zero_grad()


def test_half_precision_activations_keep_their_dtype():
    sae = make_sae("relu", dtype=torch.float32)
    x = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(4)).bfloat16()
    with torch.no_grad():
        out = SAESteering(sae, {5: 3.0}).apply(x)
        exact = SAESteering(sae, {5: 3.0}).apply(x.float())
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, exact.bfloat16())
    assert VectorSteering(torch.ones(WIDTH)).apply(x).dtype == torch.bfloat16


def test_a_forward_pass_copies_nothing_to_the_device(model, images, monkeypatch):
    steering = SAESteering(make_sae("relu", dtype=torch.float32), {3: 20.0, 5: 0.0})
    expected = steering.apply(torch.ones(2, WIDTH))

    def refuse(*args, **kwargs):
        raise AssertionError("a tensor is made of Python numbers")

    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, refuse)
    assert torch.equal(steering.apply(torch.ones(2, WIDTH)), expected)
    with steer(model, {BLOCK: steering}):
        model.encode_image(images)


class NoTransfers(TorchDispatchMode):
    """Refuses what moves a tensor to another device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        target = (kwargs or {}).get("device")
        if func is torch.ops.aten._to_copy.default and target not in (None, args[0].device):
            raise AssertionError(f"a copy to {target}")
        return func(*args, **(kwargs or {}))


def constants():
    mean, C = draw(5, WIDTH), Conceptor.fit(draw(6, 4, WIDTH), 0.7, mean=draw(5, WIDTH))
    return [VectorSteering(mean, 2.0), AdditiveSteering(mean), AdditiveSteering(mean, draw(1, WIDTH), 0.5),
            ConceptorSteering(C), ConceptorSteering(C, 1.5, draw(2, WIDTH)),
            ConceptorSteering(Conceptor.fit(draw(6, 90, WIDTH), 0.7, mean=mean))]  # fmt: skip


@pytest.mark.parametrize("which", range(6))
def test_constants_move_to_another_device_once(which):
    """The meta device stands in for a GPU."""
    steering, x = constants()[which], torch.empty(2, WIDTH, device="meta")
    with pytest.raises(AssertionError, match="a copy"), NoTransfers():
        steering.apply(x)
    steering.apply(x)
    with NoTransfers():
        assert steering.apply(x).shape == x.shape


def test_a_vector_that_changes_is_moved_again():
    steering, x = VectorSteering(draw(5, WIDTH)), torch.empty(2, WIDTH, device="meta")
    steering.apply(x)
    steering.vector.mul_(2)
    with pytest.raises(AssertionError, match="a copy"), NoTransfers():
        steering.apply(x)


@pytest.mark.parametrize("which", range(6))
def test_first_use_under_inference_mode_leaves_gradients_possible(which):
    steering = constants()[which]
    with torch.inference_mode():
        steering.apply(torch.ones(2, WIDTH))
    x = torch.ones(2, WIDTH, requires_grad=True)
    steering.apply(x).sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("which", range(6))
def test_autocast_does_not_round_the_residual_stream(which):
    steering, x = constants()[which], 30 * draw(7, 2, WIDTH).float()
    with torch.autocast("cpu", torch.bfloat16):
        got = steering.apply(x)
        kept = ConceptorSteering(Conceptor.identity(WIDTH)).apply(x)
    assert got.dtype == torch.float32
    assert torch.equal(got, steering.apply(x))
    assert torch.equal(kept, x)


def test_steering_made_in_inference_mode_follows_its_sae():
    sae = make_sae("relu", dtype=torch.float32)
    with torch.inference_mode():
        steering = SAESteering(sae, {3: 20.0})
        steering.apply(torch.ones(2, WIDTH))
    x = torch.ones(2, WIDTH, requires_grad=True)
    steering.apply(x).sum().backward()
    assert x.grad.abs().sum() > 0
    sae.double()
    assert steering.apply(x.double()).dtype == torch.float64
    assert steering._tables(sae.W_dec)[1].dtype == torch.float64


def test_mistakes_are_explained(model):
    sae, vector = make_sae(), torch.ones(WIDTH)
    with pytest.raises(ValueError, match=r"resblocks\.9'.*near matches: visual\.transformer\.resblocks\.\d"):
        steer(model, {"visual.transformer.resblocks.9": VectorSteering(vector)})
    with pytest.raises(ValueError, match=r"\[0, 48\).*got 48"):
        SAESteering(sae, {48: 1.0})
    with pytest.raises(ValueError, match="got -1"):
        SAESteering(sae, {-1: 1.0})
    with pytest.raises(ValueError, match="finite"):
        SAESteering(sae, {0: float("nan")})
    with pytest.raises(ValueError, match="mapping"):
        SAESteering(sae, {})
    with pytest.raises(ValueError, match="tokens"):
        SAESteering(sae, {0: 1.0}, tokens="class")
    with pytest.raises(ValueError, match="shape"):
        VectorSteering(torch.ones(2, 3))
    with pytest.raises(TypeError, match="got SAE"):
        steer(model, {BLOCK: sae})
    with pytest.raises(ValueError, match="mapping"):
        clipsteer.steer(model, {})
    with pytest.raises(TypeError):
        SAESteering(sae, {1.5: 1.0})
    with pytest.raises(ValueError, match=r"no class token at 'transformer\.resblocks\.0'"):
        steer(model, {"transformer.resblocks.0": VectorSteering(vector, tokens="patches")})


# hook points that the forward pass never calls -> what to take instead
NEVER = {
    f"{BLOCK}.attn.out_proj": f"'{BLOCK}.attn'",
    "visual.transformer.resblocks": r"'visual\.transformer\.resblocks\.0'",
}


@pytest.mark.parametrize("name", NEVER)
@torch.no_grad()
def test_a_module_that_is_never_called_is_an_error_at_the_end(model, images, name):
    push = VectorSteering(torch.ones(WIDTH))
    with (
        pytest.raises(ValueError, match=f"steer: the forward pass never calls '{name}' as a module; .*{NEVER[name]}"),
        steer(model, {name: push}),
    ):
        clean = model.encode_image(images)
    assert torch.equal(clean, model.encode_image(images))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    # the same of a handle, and of those that ran beside it
    handle = steer(model, {name: push, BLOCK: push})
    model.encode_image(images)
    with pytest.raises(ValueError, match=f"never calls '{name}'"):
        handle.remove()
    handle.remove()
    assert torch.equal(clean, model.encode_image(images))
    for door in (lambda: capture(model, name), lambda: apply_at(model, {name: torch.neg})):
        with pytest.raises(ValueError, match=f"never calls '{name}'"), door():
            model.encode_image(images)
    with pytest.raises(ValueError, match=f"harvest: the forward pass never calls '{name}'"):
        next(harvest(model, [images], name))


@torch.no_grad()
def test_of_a_pattern_every_module_must_be_called(model, images):
    every = f"{BLOCK}.attn*"
    with (
        pytest.raises(ValueError, match=rf"never calls '{BLOCK}\.attn\.out_proj'"),
        steer(model, {every: VectorSteering(torch.ones(WIDTH))}),
    ):
        model.encode_image(images)
    # what only looks takes what there is, unless there is nothing
    with capture(model, every) as found, apply_at(model, {every: lambda x: x}):
        model.encode_image(images)
    assert list(found) == [f"{BLOCK}.attn"]
    with (
        pytest.raises(ValueError, match=rf"never calls 'visual\.\*\.out_proj', {LAYERS} modules, as a module"),
        capture(model, "visual.*.out_proj"),
    ):
        model.encode_image(images)


@torch.no_grad()
def test_when_a_module_that_does_not_run_is_no_error(model, images):
    push = VectorSteering(torch.ones(WIDTH))
    out_proj = f"{BLOCK}.attn.out_proj"
    # nothing ran
    with steer(model, {out_proj: push}):
        pass

    # an error of the block's own goes first, also where the handle is removed by hand
    def fail():
        model.encode_image(images)
        raise ZeroDivisionError

    def fail_by_hand():
        handle = steer(model, {out_proj: push})
        try:
            fail()
        finally:
            handle.remove()

    with pytest.raises(ZeroDivisionError), steer(model, {out_proj: push}):
        fail()
    with pytest.raises(ZeroDivisionError):
        fail_by_hand()
    with pytest.raises(RuntimeError), steer(model, {out_proj: push}):
        model.encode_image(images[:, :1])
    # of two towers the one that nothing was given to
    both = {BLOCK: push, "transformer.resblocks.0": push}
    with steer(model, both):
        model.encode_image(images)
    with steer(model, both):
        model.encode_text(torch.ones(2, 8, dtype=torch.long))
    with (
        pytest.raises(ValueError, match=f"'{BLOCK}' did not run, though other parts of the model did"),
        steer(model, {BLOCK: push}),
    ):
        model.encode_text(torch.ones(2, 8, dtype=torch.long))


@torch.no_grad()
def test_dropout_of_fused_attention_is_never_called():
    timm = pytest.importorskip("timm")
    tower = timm.create_model("test_vit", pretrained=False, num_classes=0).eval()
    x, push = torch.randn(2, 3, 160, 160), VectorSteering(torch.ones(64))
    with (
        pytest.raises(ValueError, match=r"never calls 'blocks\.0\.attn\.attn_drop'"),
        steer(tower, {"blocks.0.attn.attn_drop": push, "blocks.1": push}),
    ):
        tower(x)


@torch.no_grad()
def test_the_example_in_the_docstring_runs(model, images, monkeypatch):
    vision = {"image_size": 32, "layers": 12, "width": WIDTH, "head_width": 16, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    import open_clip

    deep = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).eval()
    loaded = clipsteer.clip.CLIP(deep, lambda image: image, lambda texts: texts, "deep", None)
    asked = []
    monkeypatch.setattr(clipsteer, "load", lambda *names: asked.append(names) or loaded)
    points = []
    monkeypatch.setattr(
        clipsteer, "steer", lambda *given: (handle := steer(*given), points.append(handle.hook_points))[0]
    )
    lines = steer.__doc__.splitlines()
    first = next(i for i, line in enumerate(lines) if "clipsteer.load" in line)
    example = "\n".join(lines[first : lines.index("", first)])
    sae = make_sae("relu", dtype=torch.float32)
    wide = SAE(WIDTH, 200, "topk", k=6)
    names = {"clipsteer": clipsteer, "sae": wide, "images": list(images)}
    exec(textwrap.dedent(example), names)
    assert asked == [("ViT-B-32", "laion2b_s34b_b79k")]
    assert points == [[BLOCK.replace("1", "9")], [BLOCK.replace("1", str(i)) for i in (6, 7, 8, 9)]]
    assert names["features"].shape == (3, 16)
    # the pattern of its arguments, and what it warns of
    assert '"visual.transformer.resblocks.[6-9]"' in steer.__doc__
    with (
        pytest.raises(ValueError, match=r"activations at 'visual\.transformer\.resblocks\.0\."),
        steer(model, {"visual.transformer.resblocks.*": SAESteering(sae, {0: 1.0})}),
    ):
        model.encode_image(images)


def test_width_errors_name_the_hook_point(model, images):
    wrong = {"the SAE": SAESteering(make_sae(d_in=WIDTH + 1, dtype=torch.float32), {0: 1.0}),
             "the vector": VectorSteering(torch.ones(WIDTH + 1)),
             "the conceptor": ConceptorSteering(Conceptor.identity(WIDTH + 1))}  # fmt: skip
    for what, steering in wrong.items():
        with (
            pytest.raises(ValueError, match=f"{what} has d_in = {WIDTH + 1}, but the activations at '{BLOCK}' are"),
            steer(model, {BLOCK: steering}),
        ):
            model.encode_image(images)
        with pytest.raises(ValueError, match=f"{what} has d_in = {WIDTH + 1}, but the activations at this hook point"):
            steering.apply(torch.ones(2, WIDTH))


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rows", [4, 90])  # low rank and dense
@pytest.mark.parametrize("centred", [False, True])
def test_conceptor_steering_is_its_formula(rows, centred):
    mean = draw(5, WIDTH) if centred else None
    C = Conceptor.fit(draw(6, rows, WIDTH), 0.7, mean=mean)
    x = 3 * draw(7, 2, TOKENS, WIDTH)
    mu = mean if centred else torch.zeros(WIDTH, dtype=torch.float64)
    wanted = 1.5 * (x - mu) @ C.matrix + mu
    torch.testing.assert_close(ConceptorSteering(C, 1.5).apply(x), wanted, rtol=1e-12, atol=1e-12)
    other = draw(8, WIDTH)
    wanted = 1.5 * (x - other) @ C.matrix + other
    torch.testing.assert_close(ConceptorSteering(C, 1.5, other).apply(x), wanted, rtol=1e-12, atol=1e-12)
    assert ConceptorSteering(C).apply(x.bfloat16()).dtype == torch.bfloat16
    residual = ConceptorSteering(C, 1.5, form="residual")
    torch.testing.assert_close(residual.apply(x), 1.5 * (x - mu) @ C.matrix + x, rtol=1e-12, atol=1e-12)
    residual = ConceptorSteering(C, 1.5, other, form="residual")
    torch.testing.assert_close(residual.apply(x), 1.5 * (x - other) @ C.matrix + x, rtol=1e-12, atol=1e-12)
    assert torch.equal(ConceptorSteering(C, 0.0, form="residual").apply(x), x) or centred
    with pytest.raises(ValueError, match="form must be 'project' or 'residual', got 'added'"):
        ConceptorSteering(C, form="added")
    everything = ConceptorSteering(Conceptor.identity(WIDTH))
    torch.testing.assert_close(everything.apply(x), x)


def test_additive_steering_adds_the_difference_of_means():
    rows, background = draw(1, 6, 5, WIDTH), draw(2, WIDTH)
    x = draw(3, 2, WIDTH)
    plain, centred = AdditiveSteering.fit(rows, beta=2.0), AdditiveSteering.fit(rows.split(2), background, beta=-0.5)
    torch.testing.assert_close(plain.apply(x), x + 2 * rows.mean((0, 1)))
    torch.testing.assert_close(centred.apply(x), x - 0.5 * (rows.mean((0, 1)) - background))
    assert AdditiveSteering(torch.ones(WIDTH)).apply(x.bfloat16()).dtype == torch.bfloat16
    assert isinstance(centred, VectorSteering)
    assert torch.equal(centred.apply(x), VectorSteering(centred.mean - background.double(), -0.5).apply(x))
    assert (centred.beta, centred.strength, centred.tokens) == (-0.5, -0.5, "all")
    assert torch.equal(centred.background, background)


@pytest.mark.parametrize("tokens", ["all", "cls", "patches"])
def test_conceptors_and_additions_steer_through_hooks(model, images, tokens):
    clean = block_output(model, images)
    C = Conceptor.fit(clean, 0.3) & ~Conceptor.fit(draw(4, 3, WIDTH), 2.0)
    both = [AdditiveSteering.fit(clean, beta=0.5, tokens=tokens), ConceptorSteering(C, 0.8, tokens=tokens)]
    with torch.no_grad(), steer(model, {BLOCK: both}):
        got = block_output(model, images)
        expected = both[1].apply(both[0].apply(clean))
    where = {"all": slice(None), "cls": slice(0, 1), "patches": slice(1, None)}[tokens]
    untouched = torch.ones(TOKENS, dtype=torch.bool)
    untouched[where] = False
    torch.testing.assert_close(got[:, where], expected[:, where])
    assert (got[:, where] - clean[:, where]).abs().amax() > 0.05
    assert torch.equal(got[:, untouched], clean[:, untouched])
    assert torch.equal(block_output(model, images), clean)


def test_conceptor_steering_lets_gradients_through(model, images):
    C = Conceptor.fit(block_output(model, images), 0.3)
    pixels = images.clone().requires_grad_()
    with steer(model, {BLOCK: ConceptorSteering(C)}):
        model.encode_image(pixels).square().sum().backward()
    assert pixels.grad.abs().sum() > 0
    model.zero_grad()


def test_mistakes_with_conceptors_are_explained(model, images):
    C = Conceptor.fit(draw(0, 9, WIDTH), 1.0)
    batch = Conceptor.stack([C, C])
    for call, message in (
        (lambda: ConceptorSteering(batch), "batch of 2"),
        (lambda: ConceptorSteering(C, mean=torch.ones(3)), rf"\({WIDTH},\)"),
        (lambda: ConceptorSteering(C, float("inf")), "finite"),
        (lambda: ConceptorSteering(C, tokens="some"), "tokens"),
        (lambda: AdditiveSteering(torch.ones(2, 2)), "shape"),
        (lambda: AdditiveSteering(torch.ones(3), torch.ones(4)), r"\(3,\)"),
        (lambda: AdditiveSteering(torch.ones(3), beta=float("nan")), "finite"),
        (lambda: AdditiveSteering.fit([]), "no row"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="got Tensor"):
        ConceptorSteering(C.matrix)
    narrow = Conceptor.identity(WIDTH - 1)
    with pytest.raises(ValueError, match=f"{WIDTH - 1}"), steer(model, {BLOCK: ConceptorSteering(narrow)}):
        model.encode_image(images)


def test_strengths_relative_to_peaks():
    torch.manual_seed(0)
    sae = SAE(16, 24, "topk", 4)
    x = torch.randn(3, 5, 16)
    peaks = torch.linspace(0, 4.6, 24)
    relative = SAESteering(sae, {3: 2.0, 7: 0.0}, relative=True, peaks=peaks)
    absolute = SAESteering(sae, {3: 2 * float(peaks[3]), 7: 0.0})
    assert relative.activations == absolute.activations
    assert torch.equal(relative.apply(x), absolute.apply(x))
    # what is given again with another field is not multiplied twice
    assert dataclasses.replace(relative, tokens="cls").activations == absolute.activations
    for options, message in (
        ({"relative": True}, "go together"),
        ({"peaks": peaks}, "go together"),
        ({"relative": True, "peaks": peaks[:5]}, r"d_sae = 24"),
        ({"relative": True, "peaks": peaks * 0}, "never active"),
    ):
        with pytest.raises(ValueError, match=message):
            SAESteering(sae, {3: 2.0}, **options)
