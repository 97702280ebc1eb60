"""What is special about clip_loss, siglip_loss and distill_loss; what every op promises is in test_ops.py."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from _processor import multiplies_pairs
from clipsteer import ops, testing
from clipsteer.ops import REGISTRY
from clipsteer.ops._spec import named_outputs, spec_errors
from clipsteer.ops._sweeps import KEEP
from clipsteer.ops.specs._softmaxes import Similarities

FAST = [b for b in ("reference", "cpp") if testing.supported(b)]
DOUBLE = torch.float64
LOSSES = ("clip_loss", "siglip_loss", "distill_loss")


def unit(B: int, *widths: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(B, d, generator=g, dtype=DOUBLE), dim=1).to(dtype) for d in widths]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("labelled", [False, True])
def test_clip_loss_is_the_mean_of_two_cross_entropies(backend, smoothing, labelled):
    """Value and gradients, with labels that repeat and leave some out."""
    image, text = (x.requires_grad_() for x in unit(9, 5, 5))
    scale = torch.tensor(7.0, dtype=DOUBLE, requires_grad=True)
    labels = torch.tensor([0, 3, 2, 2, 8, 0, 6, 7, 1]) if labelled else torch.arange(9)
    logits = scale * image @ text.T
    options = {"label_smoothing": smoothing}
    expected = (F.cross_entropy(logits, labels, **options) + F.cross_entropy(logits.T, labels, **options)) / 2
    given = {"labels": labels if labelled else None, **options}
    found = ops.clip_loss(image, text, logit_scale=scale, backend=backend, **given)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    live = (image, text, scale)
    for a, b in zip(torch.autograd.grad(found, live), torch.autograd.grad(expected, live)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", FAST)
def test_it_is_drrho_loss_with_another_constant(backend):
    image, text = unit(40, 11, 11)
    loss, _ = ops.drrho_loss(image, text, temperature=1 / 20, eps=1 / 40, backend=backend)
    found = ops.clip_loss(image, text, logit_scale=20.0, backend=backend)
    torch.testing.assert_close(found, loss * 20 + torch.tensor(40.0).double().log())


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("scale", [1.0, 1e2, 1e4, 1e6])
def test_large_logits_and_small_losses_keep_their_digits(backend, scale):
    """float32 beside float64, pairs as right and as wrong as can be, where a matrix of logits has lost all digits."""
    image, text = unit(50, 8, 8)
    narrow = [x.float() for x in (image, text)]
    for sign in (1.0, -1.0):
        given = (narrow[0], sign * narrow[0])
        exact = [x.double() for x in given]
        found = ops.clip_loss(*given, logit_scale=scale, backend=backend)
        truth = ops.clip_loss(*exact, logit_scale=scale, backend="reference")
        assert float(found) == pytest.approx(float(truth), rel=2e-5 * max(1, scale / 100), abs=1e-37)
        found = ops.siglip_loss(*given, logit_scale=scale, logit_bias=-10.0, backend=backend)
        truth = ops.siglip_loss(*exact, logit_scale=scale, logit_bias=-10.0, backend="reference")
        assert float(found) == pytest.approx(float(truth), rel=2e-4)
    # nothing but a small loss: pairs that are alone
    eye = torch.eye(8)
    assert float(ops.clip_loss(eye, eye, logit_scale=40.0, backend=backend)) == pytest.approx(
        7 * 4.248354e-18, rel=1e-5
    )
    apart = ops.siglip_loss(eye, eye, logit_scale=80.0, logit_bias=-40.0, backend=backend)
    assert float(apart) == pytest.approx(8 * 4.248354e-18, rel=1e-5)


@pytest.mark.parametrize("backend", FAST)
def test_siglip_may_have_any_scale_and_bias(backend):
    image, text = (x.requires_grad_() for x in unit(9, 5, 5))
    for scale, bias in ((-3.0, 2.0), (0.0, 0.0), (10.0, None)):
        s = torch.tensor(scale, dtype=DOUBLE, requires_grad=True)
        sign = 2 * torch.eye(9, dtype=DOUBLE) - 1
        expected = -F.logsigmoid(sign * (s * image @ text.T + (bias or 0))).sum() / 9
        found = ops.siglip_loss(image, text, logit_scale=s, logit_bias=bias, backend=backend)
        torch.testing.assert_close(found, expected)
        live = (image, text, s)
        for a, b in zip(torch.autograd.grad(found, live), torch.autograd.grad(expected, live)):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", FAST)
def test_distillation_is_the_cross_entropy_to_the_teachers_softmaxes(backend):
    image, text, teacher_image, teacher_text = unit(9, 5, 5, 4, 4)
    image.requires_grad_()
    teacher_image.requires_grad_()
    s, r = 6 * image @ text.T, 9 * (teacher_image @ teacher_text.T).detach()
    pairs = ((s, r), (s.T, r.T))
    soft = sum(-(b.softmax(1) * a.log_softmax(1)).sum(1).mean() for a, b in pairs) / 2
    features = (image, text, teacher_image, teacher_text)
    options = {"logit_scale": 6.0, "teacher_logit_scale": 9.0, "backend": backend}
    hard, found = ops.distill_loss(*features, **options)
    torch.testing.assert_close(found, soft)
    torch.testing.assert_close(hard, ops.clip_loss(image, text, logit_scale=6.0, backend=backend))
    # each of the two, and a mixture in which they partly cancel
    for weights in ((1.0, 0.0), (0.0, 1.0), (1.0, -1.0)):
        mixed = weights[0] * hard + weights[1] * found
        expected = weights[0] * (sum(F.cross_entropy(a, torch.arange(9)) for a, _ in pairs) / 2) + weights[1] * soft
        got = torch.autograd.grad(mixed, (image, teacher_image), retain_graph=True, allow_unused=True)
        assert got[1] is None  # a teacher is frozen
        torch.testing.assert_close(got[0], torch.autograd.grad(expected, image, retain_graph=True)[0])
    # a teacher that is the model itself has nothing to teach
    same = ops.distill_loss(image, text, image, text, logit_scale=6.0, teacher_logit_scale=6.0, backend=backend)
    assert float(torch.autograd.grad(same[1], image)[0].abs().max()) < 1e-14


@pytest.mark.skipif("cpp" not in FAST, reason="the C++ library is not built")
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_tiles_panels_and_both_ways_of_the_second_sweep(name, dtype):
    """Several tiles and tasks, widths that are no multiple of a block's; similarities kept or not."""
    kept = set()
    for B, d, e in ((450, 70, 130), (500, 20, 12), (391, 129, 130)):
        kept.add(2 * KEEP * (d if name == "clip_loss" else (d + e) // 2) >= B)
        shape = {"B": B, "d": d, "percent": 5, **({"e": e} if name == "distill_loss" else {})}
        errors = spec_errors(REGISTRY[name], shape, dtype, seed=B, backend="cpp")
        assert all(error <= 1 for error in errors.values()), (shape, errors)
    assert name == "siglip_loss" or kept == {True, False}  # which has one sweep


class Names(TorchDispatchMode):
    """What reaches a kernel, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def some_loss(name: str, dtype: torch.dtype, B: int = 16) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Of one value, and its leaves."""
    features = [x.requires_grad_() for x in unit(B, 24, 24, dtype=dtype)]
    wide = torch.promote_types(dtype, torch.float32)
    scale = torch.tensor(20.0, dtype=wide, requires_grad=True)
    if name == "clip_loss":
        return ops.clip_loss(*features, logit_scale=scale), (*features, scale)
    if name == "siglip_loss":
        bias = torch.tensor(-9.0, dtype=wide, requires_grad=True)
        return ops.siglip_loss(*features, logit_scale=scale, logit_bias=bias), (*features, scale, bias)
    teacher = unit(B, 10, 10, seed=1, dtype=dtype)
    if name == "drrho_loss":
        past = torch.linspace(-1, 1, 2 * B, dtype=wide).view(2, B)
        past[:, ::3] = torch.nan
        options = {"temperature": scale, "gamma": 0.3, "u": past, "eps": 1e-4, "rho": 0.5}
        return ops.drrho_loss(*features, *teacher, **options)[0], (*features, scale)
    hard, soft = ops.distill_loss(*features, *teacher, logit_scale=scale, teacher_logit_scale=30.0)
    return hard - 2 * soft, (*features, scale)


@pytest.mark.skipif("cpp" not in FAST, reason="the C++ library is not built")
@pytest.mark.parametrize("name", [*LOSSES, "drrho_loss"])
def test_a_batch_of_one_process_takes_one_call_each_way(name):
    """Small batches would spend their time on what lies between the sweeps."""
    with Names() as forward:
        loss, leaves = some_loss(name, torch.float32)
    with Names() as backward:
        torch.autograd.grad(loss, leaves)
    back = "distill_loss_grad" if name == "distill_loss" else "contrast_grad"
    for seen, whole in ((forward.seen, name), (backward.seen, back)):
        assert [op for op in seen if "clipsteer" in op] == [f"clipsteer_cpp.{whole}.default"]
    mixed = 4 if name == "distill_loss" else 0  # of the test's own sum of both losses
    assert len(backward.seen) <= 4 + mixed, backward.seen


@pytest.mark.skipif("cpp" not in FAST, reason="the C++ library is not built")
@pytest.mark.parametrize("B", [1, 16, 70])
@pytest.mark.parametrize("name", [*LOSSES, "drrho_loss"])
def test_one_call_is_what_the_sweeps_add_up_to(name, B, monkeypatch):
    """Values and gradients in float64, of some leaves alone too."""
    both = []
    for in_one in (True, False):
        if not in_one:
            for module in ("clip_loss", "siglip_loss", "distill_loss", "_drrho", "drrho_loss"):
                monkeypatch.setattr(sys.modules[f"clipsteer.ops.{module}"], "in_one_call", lambda *_: False)
        found = []
        loss, leaves = some_loss(name, DOUBLE, B)
        for wanted in (leaves, leaves[:1], leaves[1:2], leaves[2:]):
            found += torch.autograd.grad(loss, wanted, retain_graph=True)
        both.append([loss.detach(), *found])
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.skipif("cpp" not in FAST, reason="the C++ library is not built")
@pytest.mark.parametrize("d", [129, 130, 600])
def test_similarities_of_bfloat16_by_pairs(d):
    """Within the bound, with infinities and with numbers below the smallest normal one: a processor that multiplies
    pairs takes these for 0, and the bound knows."""
    g = torch.Generator().manual_seed(d)
    rows, cols = (torch.randn(70, d, generator=g).bfloat16() for _ in range(2))
    rows[3] = rows[:, 0] = 0
    rows[3, 0] = 2.0**-130
    cols[:, 0] = 2.0**60
    rows[5, 1] = torch.inf
    diag = torch.zeros(70)
    kept = torch.ops.clipsteer_cpp.drrho_sums(rows, cols, diag, torch.tensor(1e-3), 0, True)[2][:, :70]
    truth = Similarities(rows.double(), cols.double(), torch.bfloat16)
    others = ~torch.eye(70, dtype=torch.bool)
    finite = others & (torch.arange(70) != 5)[:, None]
    assert bool(((kept.double() - truth.S).abs() <= truth.off)[finite].all())
    assert torch.equal(kept[5].sign()[others[5]], truth.S[5].sign().float()[others[5]])
    assert bool(kept[5][others[5]].isinf().all())
    assert bool((kept[3][others[3]] == 0).all()) == (multiplies_pairs() and d % 2 == 0)


def similarities(rows: Tensor, cols: Tensor, first: int = 0) -> Tensor:
    """As the C++ library has them, without the rows' own pairs, which are columns ``first`` and so on."""
    n = len(cols)
    kept = torch.ops.clipsteer_cpp.drrho_sums(rows, cols, torch.zeros(n), torch.tensor(1e-3), first, True)[2][:, :n]
    return kept.masked_fill(torch.eye(n, dtype=torch.bool)[first : first + len(rows)], 0.0)


@pytest.mark.skipif("cpp" not in FAST, reason="the C++ library is not built")
@pytest.mark.parametrize(
    ("rows", "columns", "d"),
    [(4, 33, 2), (16, 64, 32), (17, 65, 34), (31, 100, 514), (33, 128, 62), (70, 129, 600), (150, 300, 1026)],
)
def test_sums_by_pairs_keep_their_bound_and_to_themselves(rows, columns, d):
    """Heights, widths and lengths about those of tiles; sums that cancel, numbers about and below the smallest normal
    one, and what one row or column has of NaN and infinities."""
    g = torch.Generator().manual_seed(d)
    a, b = (torch.randn(m, d, generator=g) for m in (rows, columns))
    sign = 1 - 2 * (torch.arange(d) % 2).float()
    tiny = 2.0 ** torch.randint(-75, -58, (d,), generator=g)
    cases = {
        "any": (a, b),
        "cancelling": (a[:, :1].expand(rows, d) * sign, b[:, :1] + b * 2.0**-7),
        "lost products": (a * tiny, b * tiny),
        "lost operands": (a * 2.0**-128, b * 2.0**60),
        "mixed": (a * 2.0 ** torch.randint(-140, 60, (rows, d), generator=g), b),
    }
    own = torch.eye(columns, dtype=torch.bool)[:rows]
    for name, (x, y) in cases.items():
        x, y = x.bfloat16(), y.bfloat16()
        found = similarities(x, y)
        truth = Similarities(x.double(), y.double(), torch.bfloat16)
        error = ((found.double() - truth.S).abs() / truth.off)[~own]
        assert float(error.max()) <= 1, (name, float(error.max()))
        # beside other rows (no fewer than tiles are for), unless torch multiplies, and what is not finite
        first = max(0, rows - max(9, rows // 3))
        ours = torch.ops.clipsteer_cpp.isa_level() > 0
        assert not ours or torch.equal(similarities(x[first:], y, first), found[first:]), name
        spoilt, others = x.clone(), y.clone()
        spoilt[rows // 2, d // 2] = torch.nan
        others[columns // 2, 0] = torch.inf
        others[columns - 1, d - 1] = -torch.inf
        clean = torch.ones(rows, columns, dtype=torch.bool)
        clean[rows // 2] = clean[:, columns // 2] = clean[:, -1] = False
        assert torch.equal(similarities(spoilt, others)[clean], found[clean]), name
        assert bool(similarities(spoilt, y)[rows // 2].isnan().sum() >= columns - 1), name


@pytest.mark.skipif("cpp" not in FAST, reason="the C++ library is not built")
@pytest.mark.parametrize("B", [8, 9, 16, 17, 31, 33, 65, 129])
@pytest.mark.parametrize("name", LOSSES)
def test_weights_of_two_bfloat16_numbers_keep_the_bound(name, B):
    """Heights and widths about those of tiles; weights that are all alike, or almost nothing."""
    for d, scale, percent in ((B + 1, 1.0, 25), (63, 1e-30, 100), (66, 1e30, 1)):
        shape = {"B": B, "d": d, "percent": percent, **({"e": 20} if name == "distill_loss" else {})}
        errors = spec_errors(REGISTRY[name], shape, torch.bfloat16, seed=B, backend="cpp", scale=scale)
        assert all(error <= 1 for error in errors.values()), (shape, errors)


@pytest.mark.skipif("cpp" not in FAST, reason="the C++ library is not built")
def test_an_infinity_times_a_weight_of_two_numbers_is_one():
    """A weight of 1, whose second number must not be 0."""
    image, text = (x.bfloat16() for x in unit(40, 32, 32))
    image[3, 2] = torch.inf
    text[:, 2] = text[:, 2].abs() + 0.125  # all weights of the third image are 1
    found, truth = [], []
    for into, backend, dtype in ((found, "cpp", torch.bfloat16), (truth, "reference", DOUBLE)):
        a, b = (x.to(dtype).requires_grad_() for x in (image, text))
        loss = ops.siglip_loss(a, b, logit_scale=4.0, logit_bias=-2.0, backend=backend)
        into += torch.autograd.grad(loss, (a, b))
    for a, b in zip(found, truth):
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.isinf(), b.isinf())
        assert torch.equal(a[a.isinf()].sign().double(), b[b.isinf()].sign())
    assert bool(found[1][:, 2].isinf().sum() > 30)


def test_bounds_catch_planted_bugs():
    """A pair left out, one side twice, another scale, another target, wrong gradients."""
    shapes = {
        "clip_loss": {"B": 37, "d": 24},
        "siglip_loss": {"B": 37, "d": 24},
        "distill_loss": {"B": 37, "d": 24, "e": 9},
    }
    for name, shape in shapes.items():
        spec = REGISTRY[name]
        inputs = spec.make(shape, torch.float32, torch.Generator().manual_seed(1), 1.0, False)

        def check(spec=spec, inputs=inputs, **changed):
            return spec.check(inputs, named_outputs(spec, spec.function(**{**inputs, **changed})))

        assert max(check().values()) <= 1
        s = inputs["logit_scale"]
        swapped = inputs["text"].clone()
        swapped[[3, 4]] = swapped[[4, 3]]
        for wrong in ({"logit_scale": s * (1 + 1e-3)}, {"text": swapped}):
            assert min(check(**wrong).values()) > 1, (name, wrong)
        last = spec.outputs[-1]
        if name == "distill_loss":
            assert check(teacher_logit_scale=inputs["teacher_logit_scale"] * 1.01)[last] > 1
            assert check(teacher_image=inputs["teacher_image"].roll(1, 0))[last] > 1
        if name == "clip_loss":
            assert check(label_smoothing=0.01)[last] > 1
        live = {
            n: v.clone().requires_grad_(n in spec.differentiable) if isinstance(v, Tensor) else v
            for n, v in inputs.items()
        }
        outputs = named_outputs(spec, spec.function(**live))
        grads = torch.autograd.grad(sum(outputs.values()), [live[n] for n in spec.differentiable])
        ones = {n: torch.ones(()) for n in outputs}
        for n, g in zip(spec.differentiable, grads):
            assert spec.check_grads(inputs, {}, ones, {n: g})[n] <= 1
            for bad in (-g, 0 * g, g * 1.01, g * 37 / 36, 2 * g):
                assert spec.check_grads(inputs, {}, ones, {n: bad})[n] > 1, (name, n)


@pytest.mark.skipif("cpp" not in FAST, reason="the C++ library is not built")
@pytest.mark.parametrize("name", LOSSES)
def test_forward_mode_is_the_references(name):
    spec = REGISTRY[name]
    inputs = spec.make(spec.small_shape, DOUBLE, torch.Generator().manual_seed(1), 1.0, False)
    fixed = {n: v for n, v in inputs.items() if n not in spec.differentiable}
    moves = tuple(torch.ones_like(inputs[n]) for n in spec.differentiable)
    found = []
    for backend in ("cpp", "reference"):

        def value(*given, backend=backend):
            return spec.function(**fixed, **dict(zip(spec.differentiable, given)), backend=backend)

        found.append(torch.func.jvp(value, tuple(inputs[n] for n in spec.differentiable), moves)[1])
    torch.testing.assert_close(*found)


def test_mistakes_are_named():
    image, text = unit(9, 5, 5)
    clip = lambda **changed: ops.clip_loss(**{"image": image, "text": text, "logit_scale": 1.0, **changed})
    for error, message, changed in (
        (TypeError, "image must be a tensor", {"image": [1.0]}),
        (ValueError, r"text must be of shape image's \(B, d\)", {"text": text[:, :3]}),
        (ValueError, r"image must be of shape \(B, d\), neither of them 0", {"image": image[:0], "text": text[:0]}),
        (ValueError, "logit_scale must be positive and finite", {"logit_scale": 0.0}),
        (ValueError, "logit_scale must be positive and finite", {"logit_scale": torch.tensor(-1.0)}),
        (ValueError, "logit_scale must be one number", {"logit_scale": torch.ones(2)}),
        (TypeError, "logit_scale must be a number or a tensor", {"logit_scale": "1"}),
        (TypeError, "labels must be an int64 tensor", {"labels": torch.zeros(9)}),
        (ValueError, r"labels must be of shape \(B,\) = \(9,\)", {"labels": torch.arange(8)}),
        (ValueError, r"labels must be in \[0, 9\)", {"labels": torch.arange(9) + 1}),
        (ValueError, r"label_smoothing must be in \[0, 1\]", {"label_smoothing": 1.5}),
    ):
        with pytest.raises(error, match=message):
            clip(**changed)
    teacher = unit(8, 4, 4)
    with pytest.raises(ValueError, match=r"teacher_image must be of shape \(B = 9, d\)"):
        ops.distill_loss(image, text, *teacher, logit_scale=1.0, teacher_logit_scale=1.0)
    with pytest.raises(TypeError, match="logit_bias must be a number or a tensor"):
        ops.siglip_loss(image, text, logit_scale=1.0, logit_bias=[1.0])
