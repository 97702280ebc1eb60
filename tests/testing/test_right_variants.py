"""``prove`` believes right functions that are written in another way than their definition."""

import inspect
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from clipsteer import testing
from clipsteer.testing.proof import subject


def fma(a, b, c):
    """a b + c, rounded once."""
    return torch.addcmul(c.double(), a.double(), b.double()).to(b.dtype)


def backwards(x):
    """A sum over the last dimension in another order: of the halves, from the end."""
    x = x.flip(-1)
    half = x.shape[-1] // 2
    return x[..., :half].sum(-1) + x[..., half:].sum(-1)


def top(x):
    return x.detach().amax(-1, keepdim=True)


def normed(e):
    return e / e.sum(-1, keepdim=True)


def centred(x):
    return x - x.mean(-1, keepdim=True)


LOG2E = 1.4426950408889634
# definition, right variants; the names of the arguments are those of the definition's dimensions
VARIANTS = {
    "constants": (
        lambda x: x * 0.1 + 0.3,
        lambda x: x / 10 + 0.3,
        lambda x: torch.add(0.3, x, alpha=0.1),
        lambda x: x * torch.tensor(0.1) + torch.tensor(0.3),
    ),
    "a third": (lambda x: x / 3, lambda x: x * (1 / 3)),
    "a constant that cancels": (lambda x: x + torch.full_like(x, 0.7) - 0.7, lambda x: (x + 0.7) - 0.7),
    "a ramp": (
        lambda x: x + torch.linspace(0, 1, x.shape[-1], dtype=x.dtype),
        lambda x: x + torch.arange(x.shape[-1]).to(x.dtype) * (1 / max(x.shape[-1] - 1, 1)),
    ),
    "clamp": (
        lambda x: x.clamp(-0.1, 0.3) * 7,
        lambda x: torch.where(x < -0.1, -0.1, torch.where(x > 0.3, 0.3, x)) * 7,
    ),
    "where": (lambda x: torch.where(x > 0, 0.1, 0.7) * x, lambda x: x * 0.1 * (x > 0) + x * 0.7 * (x <= 0)),
    "fill": (lambda x: F.pad(x.masked_fill(x > 1, 0.1), (1, 1), value=0.7), lambda x: torch.cat(
        [torch.full_like(x[:, :1], 0.7), torch.where(x > 1, 0.1, x), torch.full_like(x[:, :1], 0.7)], 1
    )),
    "threshold": (lambda x: torch.where(x >= 0.1, x, 0 * x), lambda x: x * (x >= torch.tensor(0.1))),
    "power": (
        lambda x: (x.abs() + 0.1) ** 0.3,
        lambda x: torch.exp(0.3 * torch.log(x.abs() + 0.1)),
        lambda x: torch.exp2(0.3 * torch.log2(x.abs() + 0.1)),
    ),
    "power of -3/2": (
        lambda x: (x.square() + 0.1) ** -1.5,
        lambda x: (x.square() + 0.1).rsqrt() ** 3,
        lambda x: 1 / ((x.square() + 0.1) * (x.square() + 0.1).sqrt()),
    ),
    "exp": (torch.exp, lambda input: torch.exp2(input * LOG2E)),
    "silu": (F.silu, lambda input: input * torch.sigmoid(input), lambda input: input * F.logsigmoid(input).exp()),
    "sigmoid": (torch.sigmoid, lambda input: F.logsigmoid(input).exp()),
    "quick gelu": (lambda x: x * torch.sigmoid(1.702 * x), lambda x: F.silu(1.702 * x) / 1.702),
    "gelu, tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))),
        lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608028654 * x * (1 + 0.044715 * x * x))),
    ),
    "gelu": (F.gelu, lambda input: input * 0.5 * (1 + torch.erf(input * 0.7071067811865476))),
    "logsigmoid": (F.logsigmoid, lambda input: -F.softplus(-input)),
    "mish": (F.mish, lambda input: input * torch.tanh(F.softplus(input))),
    "elu": (F.elu, lambda input: torch.where(input > 0, input, torch.where(input > 0, 0.0, input).expm1())),
    "rms norm": (
        lambda x, w: F.rms_norm(x, x.shape[-1:], w[0], 1e-5),
        lambda x, w: x * w[0] * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5),
        lambda x, w: (x / (backwards(x * x).unsqueeze(-1) * (1 / x.shape[-1]) + 1e-5).sqrt()) * w[0],
        lambda x, w: x * (x.square().mean(-1, keepdim=True) + 1e-5).pow(-0.5) * w[0],
    ),
    "layer norm": (
        lambda x, w, b: F.layer_norm(x, x.shape[-1:], w[0], b[0], 1e-5),
        lambda x, w, b: centred(x) * (centred(x).square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w[0] + b[0],
        lambda x, w, b: centred(x) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * w[0] + b[0],
    ),
    "softmax": (
        lambda x: x.softmax(-1),
        lambda x: (x - x.logsumexp(-1, keepdim=True)).exp(),
        lambda x: x.log_softmax(-1).exp(),
        lambda x: (lambda e: e * e.sum(-1, keepdim=True).reciprocal())((x - top(x)).exp()),
        lambda x: normed(torch.exp2((x - top(x)) * LOG2E)),
        lambda x: normed(torch.exp2(x * LOG2E - top(x) * LOG2E)),
        lambda x: normed(torch.exp2(fma(torch.full_like(x, LOG2E), x, -top(x) * LOG2E))),
    ),
    "log softmax": (
        lambda x: x.log_softmax(-1),
        lambda x: x - x.logsumexp(-1, keepdim=True),
        lambda x: (lambda z: z - z.exp().sum(-1, keepdim=True).log())(x - top(x)),
    ),
    "logsumexp": (
        lambda x: x.logsumexp(-1),
        lambda x: (x - top(x)).exp().sum(-1).log() + top(x)[..., 0],
        lambda x: torch.exp2(x * LOG2E - top(x) * LOG2E).sum(-1).log2() / LOG2E + top(x)[..., 0],
    ),
    "cross entropy": (
        lambda x: F.cross_entropy(x, torch.zeros(len(x), dtype=torch.long), reduction="none"),
        lambda x: x.logsumexp(-1) - x[:, 0],
        lambda x: (x - top(x)).exp().sum(-1).log() + top(x)[:, 0] - x[:, 0],
    ),
    "attention": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        lambda q, k, v: ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1) @ v,
        lambda q, k, v: (lambda e: (e @ v) / e.sum(-1, keepdim=True))(
            (lambda s: torch.exp2(s - top(s)))(q @ k.mT * (LOG2E / math.sqrt(q.shape[-1])))
        ),
    ),
    "mean": (
        lambda x: x.mean(-1),
        lambda x: backwards(x) / x.shape[-1],
        lambda x: (x * (1 / x.shape[-1])).sum(-1),
    ),
    "variance": (lambda x: x.var(-1), lambda x: backwards(centred(x).square()) / (x.shape[-1] - 1)),
    "inner product": (
        lambda a, b: (a * b).sum(-1),
        lambda a, b: backwards(a * b),
        lambda a, b: torch.einsum("bd,bd->b", a, b),
        lambda a, b: (a.double() * b.double()).sum(-1).to(a.dtype),
    ),
    "polynomial": (
        lambda x: 1.1 + 2.3 * x + 0.7 * x * x,
        lambda x: fma(fma(torch.full_like(x, 0.7), x, torch.full_like(x, 2.3)), x, torch.full_like(x, 1.1)),
    ),
    "lerp": (
        lambda a, b: torch.lerp(a, b, 0.3),
        lambda a, b: a + 0.3 * (b - a),
        lambda a, b: fma(torch.full_like(a, 0.3), b - a, a),
    ),
    "mean square": (lambda a, b: F.mse_loss(a, b), lambda a, b: backwards((a - b).square()).sum() / a.numel()),
    "divergence": (
        lambda a, b: F.kl_div(a.log_softmax(-1), b.log_softmax(-1), log_target=True, reduction="sum"),
        lambda a, b: (b.softmax(-1) * (b.log_softmax(-1) - a.log_softmax(-1))).sum(),
    ),
    "cosine": (
        lambda a, b: F.cosine_similarity(a, b),
        lambda a, b: (F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(-1),
        lambda a, b: (a * b).sum(-1) * (a.square().sum(-1) * b.square().sum(-1)).rsqrt(),
    ),
    "linear": (
        lambda x, w, b: F.linear(x, w, b[0, :1].expand(len(w))),
        lambda x, w, b: x @ w.T + b[0, :1],
        lambda x, w, b: sum((x[:, at : at + 7] @ w[:, at : at + 7].T for at in range(0, x.shape[1], 7)), b[0, :1]),
    ),
    "a scaled product": (
        lambda x, w: (x @ w.T) * 0.7,
        lambda x, w: (x * 0.7) @ w.T,
        lambda x, w: torch.addmm(x.new_zeros(len(x), len(w)), x, w.T, beta=0, alpha=0.7),
    ),
}  # fmt: skip
SIZES = [{"B": B, "n": n, "d": d} for B, n, d in ((5, 4, 33), (16, 7, 8), (3, 9, 129))]
OTHER_ROWS = {"attention": ("k", "v"), "linear": ("w",), "a scaled product": ("w",)}


def _inputs(name, definition):
    names = list(inspect.signature(definition).parameters) if inspect.isfunction(definition) else ["input"]
    rows = OTHER_ROWS.get(name, ())
    cases = testing.Cases({each: "n d" if each in rows else "B d" for each in names[:3]}, SIZES)
    if name in ("gelu", "logsigmoid", "mish", "elu", "silu", "exp", "sigmoid"):
        cases = testing.Cases({"input": "B d"}, SIZES)

    def drawn(generator, scale, exact):
        # the smallest scale in place of one where exp is past the largest number of float32, or 0
        return cases(generator, 30.0 if scale < 1 else scale, exact)

    return drawn


def _by_position(function):
    return lambda **named: function(*named.values())


@pytest.mark.parametrize("name", VARIANTS)
def test_right_variants_raise_no_alarm(name):
    definition, *variants = VARIANTS[name]
    prove = partial(testing.prove, cases=6, properties=("values", "integers"))
    for at, variant in enumerate([definition, *variants]):
        report = prove(_by_position(variant), _by_position(definition), _inputs(name, definition))
        assert report, f"{at}: {report}"


def test_a_constant_of_any_maker_is_rounded():
    def made(x):
        table = torch.linspace(0, 1, 4, dtype=x.dtype)
        return x + table + torch.full_like(x, 0.1) + captured + x.new_tensor(0.7) - 0.3

    captured = torch.tensor([0.1, 0.2, 0.3, 0.5], dtype=torch.float64)
    x = torch.zeros(4)
    found = testing.bound(made, {"x": x}).outputs[0]
    float32 = made(x.double()).float()
    away = torch.nextafter(float32, torch.tensor(math.inf))
    assert found.fraction(away).max() <= 1
    assert found.fraction(float32 + 4e-6).min() > 1
    # what it holds is exact, in every maker
    exact = testing.bound(lambda x: (x + torch.full_like(x, 0.5)) * 3 - torch.arange(4.0), {"x": x})
    assert not exact.outputs[0].error.any()
    # a number takes the definition's own precision
    double = testing.bound(lambda x: x.masked_fill(x == 0, 0.1), {"x": x.double()}, dtype=torch.float64)
    assert double.outputs[0].value.eq(0.1).all()


def test_a_tie_with_a_constant_goes_either_way():
    x = torch.tensor([0.1, 0.2])
    found = testing.bound(lambda x: torch.where(x > 0.1, x, -x), {"x": x}).outputs[0]
    for first in (0.1, -0.1):
        assert found.fraction(torch.tensor([first, 0.2])).max() <= 1
    assert found.fraction(torch.tensor([0.1, -0.2])).max() > 1


def test_exp_of_a_large_argument_may_be_exp2_of_its_multiple_and_no_worse():
    x = torch.linspace(-80, 80, 4001)
    found = testing.bound(lambda x: x.exp(), {"x": x}).outputs[0]
    assert found.fraction(torch.exp2(x * LOG2E)).max() <= 1
    assert found.fraction(torch.exp2(x * 1.4427)).max() > 20


def test_inputs_may_be_rounded_first():
    x, w = torch.randn(5, 33), torch.randn(7, 33)
    given = {"input": x, "weight": w}
    rounded = F.linear(x.bfloat16().float(), w.bfloat16().float())
    assert testing.bound(F.linear, given).outputs[0].fraction(rounded).max() > 10
    allowed = testing.Arithmetic.of(torch.float32, inputs=torch.bfloat16)
    assert testing.bound(F.linear, given, arithmetic=allowed).outputs[0].fraction(rounded).max() <= 1


def test_a_chain_of_halves_is_judged_as_one():
    cases = testing.Cases({"x": "B d"}, [{"B": 5, "d": 33}])
    eager = partial(testing.prove, lambda x: (x.exp() + 1).log() * 3, lambda x: (x.exp() + 1).log() * 3, cases)
    options = {"dtypes": [torch.bfloat16, torch.float32], "properties": ["values"], "cases": 6}
    assert [row.passed for row in eager(**options).rows] == [False, True]
    assert eager(**options, arithmetic=partial(testing.Arithmetic.of, fused=False))
    # in float32 that allows no more
    low = partial(testing.prove, lambda x: (x.bfloat16() * 3).to(x.dtype), lambda x: x * 3, cases)
    assert not low(**options, arithmetic=partial(testing.Arithmetic.of, fused=False)).rows[1].passed


def test_what_a_nan_leaves_alone_keeps_its_bounds(monkeypatch):
    calls = []
    real = subject.bound
    monkeypatch.setattr(subject, "bound", lambda *given, **named: (calls.append(1), real(*given, **named))[1])
    cases = testing.Cases({"x": "B d"}, [{"B": 5, "d": 33}])
    report = testing.prove(torch.sigmoid, torch.sigmoid, _renamed(cases), cases=9, properties=["values", "nan"])
    assert report, report
    assert len(calls) <= 9
    wrong = testing.prove(
        lambda input: input.sigmoid() * (1 + 1e-5 * input.isnan().any()),
        torch.sigmoid, _renamed(cases), cases=9, properties=["values", "nan"],
    )  # fmt: skip
    assert [row.passed for row in wrong.rows] == [True, False]


def _renamed(cases):
    return lambda *given: {"input": cases(*given)["x"]}
