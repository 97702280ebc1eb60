"""``torch.func`` and forward mode on every op: the right derivatives, or a refusal that names the alternative."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from clipsteer import SAE, ops, testing
from clipsteer.ops import REGISTRY, _dispatch
from clipsteer.ops._lowlevel import LOW_LEVEL

BACKENDS = [b for b in ("reference", "cpp") if testing.supported(b)]
CASES = [
    (name, backend, argument)
    for name, spec in REGISTRY.items()
    for backend in BACKENDS
    for argument in spec.differentiable
]
every_argument = pytest.mark.parametrize(("name", "backend", "argument"), CASES)


def case(name: str, backend: str, argument: str) -> tuple[Callable, Callable, Tensor, Tensor]:
    """An op and its reference as functions of one argument, that argument, and a direction."""
    spec = REGISTRY[name]
    inputs = spec.make(spec.small_shape, torch.float64, torch.Generator().manual_seed(0), 1.0, False)

    def first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
        return result[0] if isinstance(result, tuple) else result

    def op(t: Tensor) -> Tensor:
        return first(spec.function(**{**inputs, argument: t}, backend=backend))

    def reference(t: Tensor) -> Tensor:
        return first(spec.reference(**{**inputs, argument: t}))

    t = inputs[argument]
    return op, reference, t, torch.randn(t.shape, dtype=t.dtype, generator=torch.Generator().manual_seed(1))


def squared(f: Callable) -> Callable:
    return lambda t: f(t).square().sum()


def gradient(loss: Callable, t: Tensor) -> Tensor:
    leaf = t.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


def second(loss: Callable, t: Tensor, along: Tensor) -> Tensor:
    leaf = t.clone().requires_grad_()
    (once,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    return torch.autograd.grad((once * along).sum(), leaf)[0]


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11 * float(expected.abs().max()))


@every_argument
def test_grad_vjp_and_jvp(name, backend, argument):
    op, reference, t, along = case(name, backend, argument)
    expected = gradient(squared(reference), t)
    assert_close(grad(squared(op))(t), expected)
    value, back = vjp(op, t)
    assert_close(back(2 * value)[0], expected)
    assert_close(jvp(squared(op), (t,), (along,))[1], (expected * along).sum())
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(squared(op)(forward_ad.make_dual(t, along))).tangent
    assert_close(tangent, (expected * along).sum())


@every_argument
def test_second_derivatives(name, backend, argument):
    op, reference, t, along = case(name, backend, argument)
    expected = second(squared(reference), t, along)
    assert_close(grad(lambda t: (grad(squared(op))(t) * along).sum())(t), expected)
    assert_close(jvp(grad(squared(op)), (t,), (along,))[1], expected)
    assert_close(grad(lambda t: jvp(squared(op), (t,), (along,))[1])(t), expected)


@pytest.mark.filterwarnings("error:There is a performance drop")
@every_argument
def test_vmap_equals_one_by_one(name, backend, argument):
    op, _, t, along = case(name, backend, argument)
    many = torch.stack([t, 1.5 * t, t + 0.01 * t * along.abs()])
    assert_close(vmap(op)(many), torch.stack([op(m) for m in many]))
    if t.dim():
        assert_close(vmap(op, in_dims=1, out_dims=0)(many.movedim(0, 1)), torch.stack([op(m) for m in many]))
    each = torch.stack([gradient(squared(op), m) for m in many])
    assert_close(vmap(grad(squared(op)))(many), each)
    assert_close(grad(lambda many: vmap(squared(op))(many).sum())(many), each)
    directions = torch.stack([along, -along])
    found = vmap(lambda u: jvp(squared(op), (t,), (u,))[1])(directions)
    assert_close(found, (directions * each[0]).reshape(2, -1).sum(1))
    twice = vmap(vmap(op))(torch.stack([many, 2 * many]))
    assert_close(twice[1, 2], op(2 * many[2]))


@pytest.mark.parametrize("name", [n for n, spec in REGISTRY.items() if not spec.differentiable])
def test_a_statistic_under_vmap(name):
    spec = REGISTRY[name]
    many = [spec.make(spec.small_shape, torch.float64, torch.Generator().manual_seed(s), 1.0, False) for s in range(3)]
    tensors = [n for n, v in many[0].items() if isinstance(v, Tensor)]
    rest = {n: v for n, v in many[0].items() if n not in tensors}
    stacked = [torch.stack([m[n] for m in many]) for n in tensors]
    found = vmap(lambda *ts: spec.function(**rest, **dict(zip(tensors, ts))))(*stacked)
    assert_close(found, torch.stack([spec.function(**{**rest, **{n: m[n] for n in tensors}}) for m in many]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_single_samples(backend):
    """What vmap and grad are mostly used for together, and an ensemble of dictionaries."""
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(6, 10, generator=g), torch.randn(24, 10, generator=g)

    def loss(W, x):
        acts, indices = ops.topk_encode(x, W, k=4, backend=backend)
        return (ops.sparse_decode(acts, indices, W, backend=backend) - x).square().sum()

    alone = torch.stack([gradient(lambda W, row=row: loss(W, row), W) for row in x])
    torch.testing.assert_close(vmap(grad(loss), in_dims=(None, 0))(W, x), alone, rtol=1e-6, atol=1e-5)
    ensemble = torch.stack([W, W.flip(0), 2 * W])
    alone = torch.stack([gradient(lambda W: loss(W, x), W) for W in ensemble])
    torch.testing.assert_close(vmap(grad(loss), in_dims=(0, None))(ensemble, x), alone, rtol=1e-6, atol=1e-4)
    sae = SAE(10, 24, k=4)
    parameters = dict(sae.named_parameters())

    def of_module(parameters, row):
        return (functional_call(sae, parameters, (row,)).x_hat - row).square().sum()

    found = vmap(grad(of_module), in_dims=(None, 0))(parameters, x)
    for row, each in zip(x, found["W_enc"]):
        sae.zero_grad()
        of_module(parameters, row).backward()
        torch.testing.assert_close(each, sae.W_enc.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_jacobians(backend):
    g = torch.Generator().manual_seed(0)
    acts, indices = torch.randn(3, 2, generator=g, dtype=torch.float64), torch.randint(7, (3, 2), generator=g)
    W = torch.randn(7, 4, generator=g, dtype=torch.float64)

    def f(acts):
        return ops.sparse_decode(acts, indices, W, backend=backend).sin()

    expected = torch.autograd.functional.jacobian(f, acts)
    assert_close(jacrev(f)(acts), expected)
    assert_close(jacfwd(f)(acts), expected)
    expected = torch.autograd.functional.hessian(lambda a: f(a).sum(), acts)
    assert_close(hessian(lambda a: f(a).sum())(acts), expected)


@pytest.mark.parametrize("op", [n for n, low in LOW_LEVEL.items() if "!" not in low.schema])
def test_every_low_level_op_has_a_rule_for_vmap(op):
    if not testing.supported("cpp"):
        pytest.skip("the C++ library is not built")
    assert _dispatch.missing("cpp") is None
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"clipsteer_cpp::{op}", "FuncTorchBatched")


def test_what_torch_func_does_not_take():
    if not testing.supported("cpp"):
        pytest.skip("the C++ library is not built")
    x, W = torch.randn(3, 4), torch.randn(8, 4)
    with pytest.raises(RuntimeError, match="leave sparse_grad out"):
        grad(lambda W: ops.topk_encode(x, W, k=2, sparse_grad=True)[0].sum())(W)
    buffer = torch.full_like(W, 7.0)
    with_buffer = grad(lambda W: ops.topk_encode(x, W, k=2, grad_buffer=buffer)[0].sum())(W)
    assert torch.equal(with_buffer, grad(lambda W: ops.topk_encode(x, W, k=2)[0].sum())(W))
    assert bool((buffer == 7).all())


def test_indices_are_still_looked_at():
    acts, W = torch.randn(3, 2), torch.randn(8, 4)
    bad = torch.full((3, 2), 8)
    with pytest.raises(ValueError, match=r"in \[0, 8\)"):
        grad(lambda W: ops.sparse_decode(acts, bad, W).sum())(W)
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        vmap(lambda i: ops.sparse_decode(acts[0], i, W))(bad)


def test_tangents_are_not_lost_where_nothing_requires_a_gradient():
    """The low-level ops know no tangents: one that reached them came out as zeros."""
    for name, spec in REGISTRY.items():
        if not spec.differentiable:
            continue
        op, reference, t, along = case(name, BACKENDS[-1], spec.differentiable[0])
        with forward_ad.dual_level(), torch.no_grad():
            tangent = forward_ad.unpack_dual(op(forward_ad.make_dual(t, along))).tangent
        assert tangent is not None, name
        assert_close(tangent, jvp(reference, (t,), (along,))[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_transforms_are_right(backend):
    """torch.compile makes tangents of zeros for what has no rule it knows."""
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(6, 10, generator=g), torch.randn(24, 10, generator=g)

    def loss(W, x):
        return ops.topk_encode(x, W, k=4, backend=backend)[0].square().sum()

    def forward(W):
        return jvp(lambda W: loss(W, x), (W,), (W,))[1]

    for f in (vmap(grad(loss), in_dims=(None, 0)), lambda W, x: forward(W)):
        torch._dynamo.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = torch.compile(f, backend="aot_eager")(W, x)
        torch.testing.assert_close(compiled, f(W, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [n for n, spec in REGISTRY.items() if spec.differentiable])
def test_tangents_of_halves_have_the_outputs_dtype(name):
    spec = REGISTRY[name]
    inputs = spec.make(spec.small_shape, torch.bfloat16, torch.Generator().manual_seed(0), 1.0, False)
    argument = spec.differentiable[0]

    def op(t):
        result = spec.function(**{**inputs, argument: t})
        return result[0] if isinstance(result, tuple) else result

    value, tangent = jvp(op, (inputs[argument],), (torch.ones_like(inputs[argument]),))
    assert tangent.dtype == value.dtype
