"""What is special about drrho_loss; what every op promises is in test_ops.py."""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clipsteer import ops, testing
from clipsteer.ops import REGISTRY, _dispatch
from clipsteer.ops._spec import spec_errors
from clipsteer.ops._sweeps import KEEP

FAST = [b for b in ("reference", "cpp") if testing.supported(b)]
SPEC = REGISTRY["drrho_loss"]
DOUBLE = torch.float64


def unit(B: int, *widths: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> list[Tensor]:
    """An image and a text row of norm 1 for each width."""
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randn(B, d, generator=g, dtype=DOUBLE) for d in widths for _ in range(2)]
    return [torch.nn.functional.normalize(x, dim=1).to(dtype) for x in rows]


def textbook(image, text, ref_image=None, ref_text=None, *, temperature, eps, rho, past=None, gamma=1.0):
    """The loss as the papers write it, pair by pair; u is a number or has a gradient."""
    B, total, kept = len(image), 0.0, []
    s = lambda i, j: image[i] @ text[j]
    r = lambda i, j: ref_image[i] @ ref_text[j] if ref_image is not None else 0.0
    for side in range(2):
        for i in range(B):
            G = 0.0
            for j in range(B):
                a, b = ((i, j), (j, i))[side]
                if i != j:
                    G = G + torch.exp(((s(a, b) - s(i, i)) - (r(a, b) - r(i, i))) / temperature) / B
            inner = eps + G
            if past is not None and not past[side, i].isnan():
                inner = (1 - gamma) * past[side, i].exp() + gamma * inner
            kept.append(torch.as_tensor(inner, dtype=DOUBLE).log())
            total = total + kept[-1]
    return temperature * total / (2 * B) + rho * temperature, torch.stack(kept).view(2, B)


def gradients(f, *tensors: Tensor, which: int = 0) -> tuple[Tensor, ...]:
    live = [t.clone().requires_grad_() for t in tensors]
    result = f(*live)
    return tuple(torch.autograd.grad(result[which] if isinstance(result, tuple) else result, live))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("eps", [0.0, 1e-14, 1e-4, 0.5])
@pytest.mark.parametrize("reference", [True, False])
def test_gamma_one_is_autograd_of_the_closed_form(backend, eps, reference):
    """Value, u, and the gradients of image, text and τ, for every ε."""
    image, text, *ref = unit(7, 5, 3)
    tau, options = torch.tensor(0.15, dtype=DOUBLE), {"eps": eps, "rho": 2.5}
    ref = ref if reference else []
    ours = lambda i, t, tau: ops.drrho_loss(i, t, *ref, temperature=tau, backend=backend, **options)
    theirs = lambda i, t, tau: textbook(i, t, *ref, temperature=tau, **options)
    for a, b in zip(ours(image, text, tau), theirs(image, text, tau)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(ours, image, text, tau), gradients(theirs, image, text, tau)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", FAST)
def test_gamma_below_one_takes_the_averaged_denominator(backend):
    """Weights exp(d − u) with u held fixed; first visits count as γ = 1."""
    image, text, ref_image, ref_text = unit(7, 5, 3)
    tau, gamma, eps, rho = 0.15, 0.3, 1e-3, 2.5
    past = torch.linspace(-2, 3, 14, dtype=DOUBLE).view(2, 7)
    past[0, 2] = past[1, 5] = torch.nan
    options = {"temperature": tau, "eps": eps, "rho": rho}
    loss, u = ops.drrho_loss(image, text, ref_image, ref_text, gamma=gamma, u=past, backend=backend, **options)
    value, expected_u = textbook(image, text, ref_image, ref_text, past=past, gamma=gamma, **options)
    torch.testing.assert_close(u, expected_u, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss, value, rtol=1e-12, atol=1e-12)
    assert not u.requires_grad
    first = ops.drrho_loss(image, text, ref_image, ref_text, backend=backend, **options)[1]
    assert torch.equal(u[past.isnan()], first[past.isnan()])

    def by_hand(image, text, tau):
        """MATH's formula: weights detached, τ's gradient through d and u's own share."""
        s, r = image @ text.T, ref_image @ ref_text.T
        d = (torch.stack([s, s.T]) - s.diagonal()[:, None] - torch.stack([r, r.T]) + r.diagonal()[:, None]) / tau
        w = (d.detach() - u[:, :, None]).exp() * (1 - torch.eye(7, dtype=DOUBLE))
        # ∇: (τ/2)·mean Σ (w/B)·∇d; in τ: ½ Σ mean u + ρ − ½·mean Σ (w/B)·d
        moving = tau.detach() / 2 * (w * d).sum((1, 2)).sum() / 49
        return moving + tau * (u.mean(1).sum() / 2 + rho)

    ours = lambda i, t, tau: ops.drrho_loss(
        i, t, ref_image, ref_text, gamma=gamma, u=past, backend=backend, **{**options, "temperature": tau}
    )
    point = image, text, torch.tensor(tau, dtype=DOUBLE)
    for a, b in zip(gradients(ours, *point), gradients(by_hand, *point)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", FAST)
def test_a_constant_batch_is_a_fixed_point_of_the_average(backend):
    image, text = unit(9, 6)
    u = None
    for gamma in (1.0, 0.5, 0.1, 1e-3):
        loss, new = ops.drrho_loss(image, text, temperature=0.05, gamma=gamma, u=u, backend=backend)
        if u is not None:
            torch.testing.assert_close(new, u, rtol=1e-12, atol=1e-12)
        u = new


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("tau", [1.0, 0.1, 0.01, 1e-4])
def test_no_temperature_overflows(backend, tau):
    """Pairs as wrong as can be: d up to 4/τ, whose exponential no float holds."""
    image, text, ref_image, ref_text = unit(50, 8, 8, dtype=torch.float32)
    args = image, -image, ref_image, ref_image
    loss, u = ops.drrho_loss(*args, temperature=tau, backend=backend)
    wide, expected = ops.drrho_loss(*(x.double() for x in args), temperature=tau, backend="reference")
    assert float(u.max()) * tau > 1.5
    torch.testing.assert_close(u.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.double(), wide, rtol=1e-5, atol=1e-5)
    grads = gradients(lambda i, t: ops.drrho_loss(i, t, *args[2:], temperature=tau, backend=backend), *args[:2])
    assert all(bool(g.isfinite().all()) for g in grads)
    perfect = ops.drrho_loss(image, image, temperature=tau, backend=backend)
    assert all(bool(x.isfinite().all()) for x in perfect)


@pytest.mark.parametrize("backend", FAST)
def test_one_pair_has_no_other(backend):
    image, text = unit(1, 5)
    loss, u = ops.drrho_loss(image, text, temperature=0.2, eps=1e-6, rho=3.0, backend=backend)
    assert torch.equal(u, torch.full((2, 1), 1e-6, dtype=DOUBLE).log())
    assert float(loss) == pytest.approx(0.2 * math.log(1e-6) + 0.6)
    grads = gradients(lambda i, t: ops.drrho_loss(i, t, temperature=0.2, backend=backend), image, text)
    assert not any(bool(g.any()) for g in grads)


@pytest.mark.parametrize("backend", FAST)
def test_invariances(backend):
    """Shuffled pairs, exchanged sides, a rotation, a reference equal to the model, one without meaning."""
    image, text, ref_image, ref_text = unit(40, 11, 7)
    args = {"temperature": 0.07, "eps": 1e-6, "backend": backend}
    loss, u = ops.drrho_loss(image, text, ref_image, ref_text, **args)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    shuffled = ops.drrho_loss(*(x[order] for x in (image, text, ref_image, ref_text)), **args)
    torch.testing.assert_close(shuffled[0], loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(shuffled[1], u[:, order], rtol=1e-11, atol=0)
    swapped = ops.drrho_loss(text, image, ref_text, ref_image, **args)
    torch.testing.assert_close(swapped[1], u.flip(0), rtol=1e-11, atol=0)
    Q = torch.linalg.qr(torch.randn(11, 11, generator=torch.Generator().manual_seed(1), dtype=DOUBLE))[0]
    torch.testing.assert_close(ops.drrho_loss(image @ Q, text @ Q, ref_image, ref_text, **args)[1], u)
    level = ops.drrho_loss(image, text, image, text, **args)[1]
    torch.testing.assert_close(level, torch.full_like(level, math.log(1e-6 + 39 / 40)))
    none = ops.drrho_loss(image, text, torch.zeros(40, 3, dtype=DOUBLE), torch.ones(40, 3, dtype=DOUBLE), **args)[1]
    torch.testing.assert_close(none, ops.drrho_loss(image, text, **args)[1])


@pytest.mark.parametrize("backend", FAST)
def test_infonce_is_the_plain_loss_up_to_a_constant(backend):
    """Without reference and with ε = 1/B, log(ε + G) is the cross-entropy of one direction less log B."""
    image, text = unit(40, 11)
    tau = 0.1
    loss, u = ops.drrho_loss(image, text, temperature=tau, eps=1 / 40, backend=backend)
    logits, labels = image @ text.T / tau, torch.arange(40)
    for side, x in enumerate((logits, logits.T)):
        entropy = torch.nn.functional.cross_entropy(x, labels, reduction="none")
        torch.testing.assert_close(u[side], entropy - math.log(40), rtol=1e-11, atol=1e-11)


@pytest.mark.skipif("cpp" not in FAST, reason="the C++ library is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_tiles_panels_and_both_ways_of_the_second_sweep(dtype):
    """Several tiles and tasks, widths that are no multiple of a block's; similarities kept or not."""
    kept = set()
    for B, d, r in ((450, 70, 130), (500, 20, 12), (391, 129, 0), (700, 64, 300)):
        kept.add(2 * KEEP * (d + r) >= B)
        shape = {"B": B, "d": d, "percent": 5, **({"r": r} if r else {})}
        errors = spec_errors(SPEC, shape, dtype, seed=B, backend="cpp")
        assert all(error <= 1 for error in errors.values()), (shape, errors)
        inputs = SPEC.make(shape, DOUBLE, torch.Generator().manual_seed(B), 1.0, False)
        found, expected = (
            gradients(
                lambda i, t, tau, b=b, c=inputs: SPEC.function(
                    **{**c, "image": i, "text": t, "temperature": tau}, backend=b
                ),
                *(inputs[n] for n in SPEC.differentiable),
            )
            for b in ("cpp", "reference")
        )
        for a, b in zip(found, expected):
            assert float((a - b).norm()) <= 1e-10 * float(b.norm())
    assert kept == {True, False}


@pytest.mark.skipif("cpp" not in FAST, reason="the C++ library is not built")
@given(M=st.integers(0, 40), before=st.integers(0, 30), after=st.integers(0, 30), seed=st.integers(0, 99))
def test_a_block_of_rows_against_all_columns(M, before, after, seed):
    """What a process of several computes equals the plain sweeps, any block, kept similarities or not."""
    N = M + before + after
    if N == 0:
        return
    from clipsteer.ops._sweeps import _plain_grad, _plain_sums

    rows, cols = unit(N, 9, seed=seed)
    diag, scale = (rows * cols).sum(1), torch.tensor(8.0, dtype=DOUBLE)
    rows = rows[before : before + M].contiguous()
    expected = _plain_sums(rows, cols, diag, scale, before, False)
    u = [x.nan_to_num(neginf=0.0) + 0.3 for x in expected[:2]]
    own = torch.linspace(-1, 1, M, dtype=DOUBLE)
    for keep in (False, True):
        *found, kept = _dispatch.call("cpp", "drrho_sums", rows, cols, diag, scale, before, keep)
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        rest = (rows, cols, diag, scale, before, *u, own)
        for a, b in zip(
            _dispatch.call("cpp", "drrho_grad", *rest, kept, 7, True, True), _plain_grad(*rest, kept, 7, True, True)
        ):
            torch.testing.assert_close(a, torch.as_tensor(b, dtype=DOUBLE), rtol=1e-11, atol=1e-12)


def test_bounds_catch_planted_bugs():
    """1/(B − 1) for 1/B, a pair left in or out, one side twice, a reference without effect, wrong gradients."""
    inputs = SPEC.make({"B": 37, "d": 24, "r": 16}, torch.float32, torch.Generator().manual_seed(1), 1.0, False)
    check = lambda **changed: SPEC.check(inputs, dict(zip(("loss", "u"), SPEC.function(**{**inputs, **changed}))))
    assert max(check().values()) <= 1
    loss, u = SPEC.function(**inputs)
    tau = inputs["temperature"]
    assert SPEC.check(inputs, {"loss": loss, "u": u + math.log(37 / 36)})["u"] > 1
    assert SPEC.check(inputs, {"loss": loss + tau * math.log(37 / 36), "u": u})["loss"] > 1
    assert SPEC.check(inputs, {"loss": loss, "u": torch.logaddexp(u, torch.tensor(1 / 37).log())})["u"] > 1
    assert SPEC.check(inputs, {"loss": loss, "u": u[:1].expand(2, -1)})["u"] > 1
    assert check(ref_image=None, ref_text=None)["u"] > 1
    assert check(temperature=tau * (1 + 1e-3))["u"] > 1
    assert check(rho=0.501)["loss"] > 1
    swapped = inputs["text"].clone()
    swapped[[3, 4]] = swapped[[4, 3]]
    assert check(text=swapped)["u"] > 1

    names = SPEC.differentiable
    live = {n: v.clone().requires_grad_(n in names) if isinstance(v, Tensor) else v for n, v in inputs.items()}
    grads = torch.autograd.grad(SPEC.function(**live)[0], [live[n] for n in names])
    wrong = lambda name, g: SPEC.check_grads(inputs, {}, {"loss": torch.ones(())}, {name: g})[name]
    for name, g in zip(names, grads):
        assert wrong(name, g) <= 1
        for bad in (-g, 0 * g, g * 1.01, g * 37 / 36, 2 * g):
            assert wrong(name, bad) > 1, name
    assert wrong("image", grads[0].roll(1, 0)) > 1
    assert wrong("temperature", grads[2] - 0.5) > 1


@pytest.mark.parametrize("backend", FAST)
def test_only_features_and_temperature_have_gradients(backend):
    image, text, ref_image, ref_text = (x.requires_grad_() for x in unit(9, 5, 3))
    past = torch.zeros(2, 9, dtype=DOUBLE, requires_grad=True)
    loss, u = ops.drrho_loss(image, text, ref_image, ref_text, gamma=0.5, u=past, temperature=0.1, backend=backend)
    loss.backward()
    assert all(bool(x.grad.any()) for x in (image, text))
    assert ref_image.grad is None
    assert ref_text.grad is None
    assert past.grad is None
    assert not u.requires_grad


@pytest.mark.skipif("cpp" not in FAST, reason="the C++ library is not built")
@pytest.mark.parametrize("past", [False, True])
def test_second_derivatives_are_the_references(past):
    image, text, ref_image, ref_text = unit(6, 4, 3)
    tau = torch.tensor(0.3, dtype=DOUBLE)
    options = {"gamma": 0.4, "u": torch.zeros(2, 6, dtype=DOUBLE)} if past else {}

    def second(backend: str) -> tuple[Tensor, ...]:
        live = [x.clone().requires_grad_() for x in (image, text, tau)]
        loss, _ = ops.drrho_loss(
            *live[:2], ref_image, ref_text, temperature=live[2], eps=1e-3, rho=1.0, backend=backend, **options
        )
        once = torch.autograd.grad(loss.square(), live, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in once), live)

    for a, b in zip(second("cpp"), second("reference")):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_u_may_be_kept_in_another_precision():
    image, text = unit(9, 5, dtype=torch.bfloat16)
    past = torch.linspace(-1, 1, 18).view(2, 9)
    loss, u = ops.drrho_loss(image, text, gamma=0.5, u=past, temperature=0.1)
    assert (loss.dtype, u.dtype) == (torch.float32, torch.float32)
    expected = ops.drrho_loss(image.double(), text.double(), gamma=0.5, u=past, temperature=0.1)[1]
    torch.testing.assert_close(u.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", FAST)
def test_autocast_rounds_the_features_and_nothing_else(backend):
    image, text, *reference = unit(40, 24, 16, dtype=torch.float32)
    past = torch.linspace(-1, 1, 80).view(2, 40)
    call = lambda *rows: ops.drrho_loss(*rows, temperature=0.03, gamma=0.5, u=past, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = call(image, text, *reference)
    outside = call(*(x.bfloat16() for x in (image, text, *reference)))
    assert all(torch.equal(a, b) for a, b in zip(inside, outside))


MEMORY = """
import torch
from clipsteer import ops
from clipsteer.testing import bench
B, d, r = {B}, {d}, {r}
image, text, ref_image, ref_text = (torch.randn(B, n) / n**0.5 for n in (d, d, r, r))
live = [x.requires_grad_() for x in (image, text)]
def call():
    ops.drrho_loss(image, text, ref_image, ref_text, temperature=0.05, backend="cpp")[0].backward()
call()
for x in live:
    x.grad = None
print(bench.extra_memory(call, "cpu"))
"""


@pytest.mark.skipif("cpp" not in FAST or not os.path.exists("/proc/self/clear_refs"), reason="needs C++ on Linux")
@pytest.mark.parametrize(("B", "d", "r", "limit"), [(2048, 512, 512, 100), (8192, 32, 32, 40)])
def test_no_matrix_of_pairs(B, d, r, limit):
    """Forward and backward: at 8,192 pairs one B×B matrix would take 256 MiB, the features are 4."""
    code = MEMORY.format(B=B, d=d, r=r)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < limit * 2**20


@pytest.mark.skipif("cpp" not in FAST, reason="the C++ library is not built")
def test_kernels_check_their_arguments_themselves():
    x, diag, scale = torch.zeros(4, 6), torch.zeros(4), torch.ones(())
    for args in (
        (x, x[:, :5].contiguous(), diag, scale, 0),
        (x, x.double(), diag, scale, 0),
        (x, x, diag[:3], scale, 0),
        (x, x, diag, scale.double(), 0),
        (x, x, diag, scale.reshape(1), 0),
        (x, x, diag, scale, 1),
        (x, x, diag, scale, -1),
    ):
        with pytest.raises((RuntimeError, ValueError), match="expected"):
            _dispatch.call("cpp", "drrho_sums", *args, False)
    kept = _dispatch.call("cpp", "drrho_sums", x, x, diag, scale, 0, True)[2]
    for row_u, col_u, own, stored, width in (
        (diag[:3], diag, diag, kept, 6), (diag, diag[:3], diag, kept, 6), (diag, diag, diag[:3], kept, 6),
        (diag, diag, diag, kept[:3], 6), (diag, diag, diag, kept[:, :6].contiguous(), 6), (diag, diag, diag, kept, 7),
    ):  # fmt: skip
        with pytest.raises((RuntimeError, ValueError), match="expected"):
            _dispatch.call("cpp", "drrho_grad", x, x, diag, scale, 0, row_u, col_u, own, stored, width, True, True)


def mistakes():
    x, r, u, call = torch.zeros(4, 6), torch.zeros(4, 3), torch.zeros(2, 4), ops.drrho_loss
    yield ValueError, r"image must be of shape \(B, d\)", lambda: call(x[0], x[0])
    yield ValueError, r"image must be of shape \(B, d\)", lambda: call(x[:0], x[:0])
    yield ValueError, r"image must be of shape \(B, d\)", lambda: call(x[:, :0], x[:, :0])
    yield ValueError, "text must be of shape image's", lambda: call(x, x[:, :3])
    yield ValueError, "ref_text must be given when", lambda: call(x, x, r)
    yield ValueError, "ref_image must be given when", lambda: call(x, x, None, r)
    yield ValueError, r"ref_image must be of shape \(B = 4, d_ref\)", lambda: call(x, x, r[:3], r[:3])
    yield ValueError, "ref_text must be of shape ref_image's", lambda: call(x, x, r, r[:, :2])
    yield ValueError, r"gamma must be in \(0, 1\]", lambda: call(x, x, gamma=0.0)
    yield ValueError, r"gamma must be in \(0, 1\]", lambda: call(x, x, gamma=float("nan"))
    yield ValueError, "eps must be a finite number of at least 0", lambda: call(x, x, eps=-1e-3)
    yield ValueError, "eps must be positive when B = 1", lambda: call(x[:1], x[:1], eps=0.0)
    yield ValueError, "rho must be finite", lambda: call(x, x, rho=float("inf"))
    yield TypeError, "rho must be a number", lambda: call(x, x, rho="8")
    yield ValueError, "temperature must be positive and finite", lambda: call(x, x, temperature=0)
    yield ValueError, "temperature must be positive and finite", lambda: call(x, x, temperature=torch.tensor(-1.0))
    yield ValueError, "temperature must be one number", lambda: call(x, x, temperature=torch.ones(2))
    yield TypeError, "temperature must be floating point", lambda: call(x, x, temperature=torch.tensor(1))
    yield TypeError, "temperature must be a number or a tensor", lambda: call(x, x, temperature=None)
    yield ValueError, r"u must be of shape \(2, B = 4\)", lambda: call(x, x, u=u[:, :3])
    yield TypeError, "u must be a floating-point tensor", lambda: call(x, x, u=u.long())
    yield TypeError, "text must be a tensor", lambda: call(x, None)
    yield TypeError, "dtype", lambda: call(x, x.double())
    yield TypeError, "dtype", lambda: call(x, x, r.double(), r.double())
    yield ValueError, "device", lambda: call(x, x.to("meta"))
    yield ValueError, "backend must be one of", lambda: call(x, x, backend="fast")
    yield RuntimeError, "no kernel for drrho_loss", lambda: call(x, x, backend="cuda")


@pytest.mark.parametrize("number", range(len(list(mistakes()))))
def test_mistakes_are_named(number):
    error, message, call = list(mistakes())[number]
    with pytest.raises(error, match=message):
        call()


INTERPRETED = """
import torch
from clipsteer import ops
from clipsteer.kernels import drrho_loss as kernels
from clipsteer.ops import REGISTRY
from clipsteer.ops._sweeps import _plain_grad, _plain_sums
from clipsteer.ops._spec import spec_errors
spec = REGISTRY["drrho_loss"]
kernels.CHUNK, kernels.SUM_ROWS = 0, 128  # chunks of 128 rows: three of them, whose sums and products add up
shape = {"B": 300, "d": 140, "r": 9, "percent": 5, "past": 1}
errors = spec_errors(spec, shape, torch.float32, seed=0, backend="triton")
assert max(errors.values()) <= 1, errors
# a block of rows, as one process of several has it, and none at all
g = torch.Generator().manual_seed(0)
cols, all_rows = torch.randn(200, 33, generator=g) / 6, torch.randn(200, 33, generator=g) / 6
diag, scale = (all_rows * cols).sum(1), torch.tensor(10.0)
for first, last in ((60, 200), (0, 0)):
    rows = all_rows[first:last]
    expected = _plain_sums(rows, cols, diag, scale, first, False)
    found = _dispatch.call("triton", "drrho_sums", rows, cols, diag, scale, first, False)
    for a, b in zip(found[:2], expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    rest = (rows, cols, diag, scale, first, *(x.nan_to_num(neginf=0.0) for x in expected[:2]), diag[first:last])
    for a, b in zip(_dispatch.call("triton", "drrho_grad", *rest, found[2], 30, True, True),
                    _plain_grad(*rest, found[2], 30, True, True)):
        torch.testing.assert_close(a, torch.as_tensor(b, dtype=torch.float32), rtol=1e-4, atol=1e-4)
"""


@pytest.mark.slow
def test_interpreted_chunks_and_blocks_of_rows(interpret):
    interpret(INTERPRETED)


@pytest.mark.parametrize(
    ("op", "joint"),
    [("drrho_loss", "reference.DRRhoLoss"), ("semantic_drift", "continual.DriftAccumulator"),
     ("mahalanobis_covariance_loss", None)],
)  # fmt: skip
def test_ops_over_a_batch_say_that_it_is_this_processs(op, joint):
    """What of several processes has the joint batch is named, and is there."""
    text = " ".join(getattr(ops, op).__doc__.split())
    assert "this process" in text
    if joint is not None:
        assert f"``{joint}``" in text
        wing, name = joint.split(".")
        found = getattr(importlib.import_module(f"clipsteer.{wing}"), name)
        assert "process" in found.__doc__
