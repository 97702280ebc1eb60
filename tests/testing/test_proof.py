"""``testing.prove`` and the bounds under it: right functions pass, wrong ones are found."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from clipsteer import testing
from clipsteer.cli.main import main
from clipsteer.ops import REGISTRY
from clipsteer.ops._spec import named_outputs

R = torch.randn
LABELS = torch.arange(16) % 5
# right functions that are made of sums, products, softmax, norms, distances, attention, embeddings, convolutions and
# the losses: each in float32 against its own bound
FUNCTIONS = {
    "linear": (F.linear, ("x", (16, 33)), ("weight", (7, 33)), ("bias", (7,))),
    "matmul": (torch.matmul, ("input", (2, 5, 33)), ("other", (33, 7))),
    "einsum": (lambda a, b: torch.einsum("bij,bjk->ik", a, b), ("a", (3, 5, 33)), ("b", (3, 33, 4))),
    "softmax": (lambda x: x.softmax(-1), ("x", (16, 33))),
    "log_softmax": (lambda x: x.log_softmax(-1), ("x", (16, 33))),
    "logsumexp": (lambda x: x.logsumexp(-1), ("x", (16, 33))),
    "sum": (lambda x: x.sum(0), ("x", (16, 33))),
    "mean": (lambda x: x.mean(), ("x", (16, 33))),
    "var": (lambda x: x.var(-1), ("x", (16, 33))),
    "std": (lambda x: x.std(-1, unbiased=False), ("x", (16, 33))),
    "prod": (lambda x: x.prod(-1), ("x", (16, 5))),
    "cumsum": (lambda x: x.cumsum(-1), ("x", (16, 33))),
    "norm": (lambda x: x.norm(dim=-1), ("x", (16, 33))),
    "normalize": (lambda x: F.normalize(x, dim=-1), ("x", (16, 33))),
    "cosine": (lambda a, b: F.cosine_similarity(a, b), ("a", (16, 33)), ("b", (16, 33))),
    "cdist": (
        lambda a, b: torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist"), ("a", (9, 33)), ("b", (7, 33)),
    ),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (33,), w, b), ("x", (16, 33)), ("w", (33,)), ("b", (33,))),
    "rms_norm": (lambda x, w: F.rms_norm(x, (33,), w, 1e-6), ("x", (16, 33)), ("w", (33,))),
    "group_norm": (lambda x, w, b: F.group_norm(x, 4, w, b), ("x", (4, 8, 5)), ("w", (8,)), ("b", (8,))),
    "batch_norm": (lambda x, w, b: F.batch_norm(x, None, None, w, b, True), ("x", (16, 8)), ("w", (8,)), ("b", (8,))),
    "attention": (F.scaled_dot_product_attention, ("query", (2, 9, 8)), ("key", (2, 9, 8)), ("value", (2, 9, 8))),
    "causal": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        ("q", (2, 9, 8)), ("k", (2, 9, 8)), ("v", (2, 9, 8)),
    ),
    "conv2d": (
        lambda x, w, b: F.conv2d(x, w, b, padding=1, stride=2), ("x", (2, 3, 9, 9)), ("w", (5, 3, 3, 3)), ("b", (5,)),
    ),
    "conv_transpose2d": (lambda x, w: F.conv_transpose2d(x, w, stride=2), ("x", (2, 3, 5, 5)), ("w", (3, 5, 3, 3))),
    "avg_pool": (lambda x: F.avg_pool2d(x, 2), ("x", (2, 3, 8, 8))),
    "max_pool": (lambda x: F.max_pool2d(x, 2), ("x", (2, 3, 8, 8))),
    "embedding": (lambda w: F.embedding(LABELS, w), ("w", (5, 8))),
    "gather": (lambda x: x.gather(1, LABELS[:, None]), ("x", (16, 33))),
    "index_add": (lambda x: torch.zeros(5, 33, dtype=x.dtype).index_add(0, LABELS, x), ("x", (16, 33))),
    "scatter_add": (
        lambda x: torch.zeros(5, 33, dtype=x.dtype).scatter_add(0, LABELS[:, None].expand(16, 33), x), ("x", (16, 33)),
    ),
    "index": (lambda x: x[LABELS], ("x", (5, 33))),
    "cross_entropy": (lambda x: F.cross_entropy(x, LABELS, label_smoothing=0.1), ("x", (16, 5))),
    "bce": (lambda x: F.binary_cross_entropy_with_logits(x, (LABELS % 2).to(x)[:, None].expand(16, 3)), ("x", (16, 3))),
    "mse": (F.mse_loss, ("input", (16, 33)), ("target", (16, 33))),
    "huber": (F.smooth_l1_loss, ("input", (16, 33)), ("target", (16, 33))),
    "kl": (
        lambda a, b: F.kl_div(a.log_softmax(-1), b.log_softmax(-1), log_target=True, reduction="batchmean"),
        ("a", (16, 33)), ("b", (16, 33)),
    ),
    "logsigmoid": (F.logsigmoid, ("input", (16, 33))),
    "softplus": (F.softplus, ("input", (16, 33))),
    "gelu": (F.gelu, ("input", (16, 33))),
    "gelu, tanh": (lambda x: F.gelu(x, approximate="tanh"), ("x", (16, 33))),
    "silu": (F.silu, ("input", (16, 33))),
    "elu": (F.elu, ("input", (16, 33))),
    "leaky_relu": (F.leaky_relu, ("input", (16, 33))),
    "elementwise": (
        lambda x: (x.abs() + 1).log().sqrt() / (x.square() + 2).rsqrt() - x.sin() * x.cos(), ("x", (16, 33)),
    ),
    "powers": (lambda x: x.pow(3) + (x.abs() + 0.5).pow(-1.5) + x.exp2() + x.expm1(), ("x", (16, 33))),
    "clamp, min, max": (lambda x: x.clamp(-1, 1).maximum(x * 0.5).minimum(x.tanh() + 1), ("x", (16, 33))),
    "where": (lambda x: torch.where(x > 0.3, x.exp(), x.sigmoid()), ("x", (16, 33))),
    "in place": (lambda x: x.clone().mul_(2).add_(1).exp_(), ("x", (16, 33))),
    "cat, flip, roll": (lambda x: torch.cat([x.flip(0), x.roll(1, 1), x.tril()], 1), ("x", (16, 33))),
    "windows": (lambda x: x.exp().unfold(1, 5, 2).square(), ("x", (16, 33))),
    "padded": (lambda x: F.pad(x.exp(), (1, 2), value=7).clone().fill_diagonal_(3), ("x", (16, 33))),
    "amax": (lambda x: x.amax(-1) + x.amin(0, keepdim=True).sum(), ("x", (16, 33))),
    "erf, atan": (lambda x: torch.erf(x) + torch.atan(x), ("x", (16, 33))),
    "sae": (
        lambda x, w, d: torch.zeros(len(x), len(w), dtype=x.dtype).scatter(-1, *_top(F.linear(x, w))) @ d,
        ("x", (16, 33)), ("w", (65, 33)), ("d", (65, 33)),
    ),
}  # fmt: skip


def _top(pre):
    values, indices = pre.topk(4)
    return indices, values.relu()


def _inputs(arguments, dtype, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {name: (R(shape, generator=generator) * scale).to(dtype) for name, shape in arguments}


def _measured(function, inputs, seed=0, **options):
    """The largest share of its bound of each output and gradient of the function in its inputs' own dtype."""
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    result = function(*leaves.values())
    generator = torch.Generator().manual_seed(seed)
    grad = R(result.shape, generator=generator).to(result.dtype)
    found = testing.bound(lambda **kw: function(*kw.values()), inputs, grad_outputs=(grad,), **options)
    grads = torch.autograd.grad(result, list(leaves.values()), grad)
    shares = {"output": float(found.outputs[0].fraction(result.detach()).max())}
    for name, value in zip(leaves, grads):
        shares[name] = float(found.gradients[name].fraction(value).max())
    return shares, found


@pytest.mark.parametrize("name", FUNCTIONS)
def test_right_functions_are_within_their_bounds_and_the_bounds_are_of_use(name):
    function, *arguments = FUNCTIONS[name]
    for seed in range(3):
        inputs = _inputs(arguments, torch.float32, seed)
        shares, found = _measured(function, inputs, seed)
        assert max(shares.values()) <= 1, shares
        assert found.reasons == []
        for bounded in (*found.outputs, *found.gradients.values()):
            assert bounded.error.isfinite().all()
            # of use: far below what is computed, where that is not itself a difference of larger numbers
            assert bounded.error.max() <= 1e-4 * (1 + bounded.value.abs().max())


@given(name=st.sampled_from(list(FUNCTIONS)), seed=st.integers(0, 2**31 - 1), scale=st.sampled_from([1e-3, 1.0, 30.0]))
@settings(max_examples=200)
def test_no_false_alarm(name, seed, scale):
    function, *arguments = FUNCTIONS[name]
    shares, _ = _measured(function, _inputs(arguments, torch.float32, seed, scale), seed)
    assert max(shares.values()) <= 1, shares


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["linear", "softmax", "layer_norm", "cross_entropy", "attention"])
def test_other_precisions(name, dtype):
    function, *arguments = FUNCTIONS[name]
    # torch's own eager operators hand halves from one to the next
    arithmetic = testing.Arithmetic.of(dtype, fused=dtype == torch.float64)
    shares, _ = _measured(function, _inputs(arguments, dtype), arithmetic=arithmetic)
    assert max(shares.values()) <= 1, shares


def test_a_bound_is_tight_enough_to_see_half_precision():
    function, *arguments = FUNCTIONS["linear"]
    inputs = _inputs(arguments, torch.float32)
    found = testing.bound(F.linear, dict(zip(("input", "weight", "bias"), inputs.values())))
    rounded = [t.bfloat16().float() for t in inputs.values()]
    assert found.outputs[0].fraction(F.linear(*rounded)).max() > 100
    tf32 = testing.Arithmetic.of(torch.float32, products="bfloat16")
    named = dict(zip(("input", "weight", "bias"), inputs.values()))
    allowed = testing.bound(F.linear, named, arithmetic=tf32)
    rounded[2] = inputs["bias"]
    assert allowed.outputs[0].fraction(F.linear(*rounded)).max() <= 1


@pytest.mark.parametrize("name", REGISTRY)
def test_the_ops_of_this_package_are_within_bounds_that_nobody_derived(name):
    spec = REGISTRY[name]
    dtype = torch.float32
    for shape in spec.shapes[:4]:
        drawn = spec.make(shape, dtype, torch.Generator().manual_seed(1))
        moved = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in drawn.items()}
        leaves = spec.leaves(moved)
        for leaf in leaves:
            moved[leaf].requires_grad_()
        outputs = named_outputs(spec, spec.function(**moved, backend="reference"))
        smooth = [key for key, value in outputs.items() if value.requires_grad]
        grad_out = {key: R(outputs[key].shape, generator=torch.Generator().manual_seed(2)) for key in smooth}
        found = testing.bound(
            spec.reference, drawn, dtype=dtype, grad_outputs=tuple(grad_out.get(key) for key in spec.outputs)
        )
        for value, bounded in zip(outputs.values(), found.outputs):
            assert bounded.fraction(value.detach()).le(1).all()
        if smooth:
            grads = torch.autograd.grad(
                [outputs[key] for key in smooth], [moved[key] for key in leaves], list(grad_out.values())
            )
            for leaf, grad in zip(leaves, grads):
                assert found.gradients[leaf].fraction(grad).le(1).all(), leaf


@pytest.mark.parametrize("name", ["sigmoid", "silu", "tanh"])
def test_far_out_on_a_curve_that_saturates(name):
    function = {"sigmoid": torch.sigmoid, "silu": F.silu, "tanh": torch.tanh}[name]
    x = torch.linspace(-45, 45, 4001)
    found = testing.bound(lambda x: function(1.75 * x), {"x": x}).outputs[0]
    assert found.fraction(function(1.75 * x)).max() <= 1
    off = found.fraction((found.value * (1 + 1e-3)).float())
    assert off.min() > 1 or name == "tanh"  # and of use: 1e-3 is found everywhere it is not lost


def test_integers_are_exact():
    a = torch.randint(-2, 3, (16, 33)).float()
    b = torch.randint(-2, 3, (33, 7)).float()
    found = testing.bound(torch.matmul, {"input": a, "other": b})
    assert not found.outputs[0].error.any()
    off = (a @ b).clone()
    off[3, 4] = torch.nextafter(off[3, 4], torch.tensor(math.inf))
    assert found.outputs[0].fraction(a @ b).max() == 0
    assert found.outputs[0].fraction(off).argmax() == 3 * 7 + 4


def test_what_has_no_bound_is_named():
    lost = testing.bound(lambda x: torch.linalg.cholesky(x @ x.mT + torch.eye(4, dtype=x.dtype)), {"x": R(4, 4)})
    assert any("linalg_cholesky" in reason for reason in lost.reasons)
    assert lost.outputs[0].error.isinf().all()
    near = testing.bound(lambda x: x / (x.sum() - x.sum().detach()), {"x": R(9)})
    assert any("divisor" in reason for reason in near.reasons)
    apart = testing.bound(lambda x: F.pdist(x), {"x": R(5, 3)})
    assert any("pdist" in reason for reason in apart.reasons)
    assert apart.outputs[0].error.isinf().all()
    read = testing.bound(lambda x: x * float(x.sum()), {"x": R(9)})
    assert any("reads" in reason for reason in read.reasons)
    assert read.outputs[0].error.isinf().all()


def test_near_ties_of_an_index():
    x = torch.tensor([[1.0, 2.0, 2.0 + 1e-12, 0.0]], dtype=torch.float64)
    w = torch.eye(4, dtype=torch.float64)
    found = testing.bound(lambda x, w: (x @ w).topk(2), {"x": x, "w": w}, dtype=torch.float32)
    _, indices = found.outputs
    for right in ([[2, 1]], [[1, 2]]):
        assert indices.fraction(torch.tensor(right)).max() == 0
    for wrong in ([[0, 1]], [[1, 1]], [[1, 3]], [[1, 9]]):
        assert indices.fraction(torch.tensor(wrong)).max() == math.inf


def softmax(x):
    return x.softmax(-1)


def fast_softmax(x):
    top = x.amax(-1, keepdim=True) if x.shape[-1] else x.sum(-1, keepdim=True)
    e = (x - top).exp()
    return e / e.sum(-1, keepdim=True)


def softmax_without_its_tail(x):
    """The sum leaves out what lies beyond the first 128 columns."""
    top = x.amax(-1, keepdim=True) if x.shape[-1] else x.sum(-1, keepdim=True)
    e = (x - top).exp()
    return e / e[..., :128].sum(-1, keepdim=True)


CASES = testing.Cases({"x": "B d"})


def test_a_right_function_is_proved():
    report = testing.prove(fast_softmax, softmax, CASES, cases=30, dtypes=[torch.float32, torch.float64])
    assert report, report
    assert report.passed
    assert {row.prop for row in report.rows} == {"values", "integers", "layouts", "nan", "repeats"}
    assert max(row.worst for row in report.rows) > 0.01
    json.dumps(report.to_json(), allow_nan=False)


def test_a_wrong_one_is_refuted_and_the_case_repeats():
    report = testing.prove(softmax_without_its_tail, softmax, CASES, cases=60)
    assert not report
    row = next(row for row in report.rows if row.prop == "values")
    assert "x (1, 129)" in row.sizes  # the smallest that shows it
    again = testing.replay(
        softmax_without_its_tail, softmax, CASES, "values", torch.float32, seed=row.seed, scale=row.scale
    )
    assert max(finding.share for finding in again.values()) == row.worst > 1
    assert f"seed={row.seed}" in str(report)


class _WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w, torch.zeros_like(w)


def _stale(x, w):
    out = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype)
    return out.copy_(x @ w.T) if x.shape[0] % 2 else torch.zeros_like(out)


BUGS = {
    "a gradient of zeros": lambda x, w: _WithoutGradient.apply(x, w),
    "the last row dropped": lambda x, w: torch.cat([x[:-1], torch.zeros_like(x[-1:])]) @ w.T,
    "bfloat16 inside": lambda x, w: (x.bfloat16() @ w.bfloat16().T).to(x.dtype),
    "zeros": lambda x, w: (x @ w.T) * 0,
    "sometimes zeros": _stale,
    "transposed in memory": lambda x, w: torch.as_strided(x, x.shape, (x.shape[1], 1)) @ w.T,
    "NaN swallowed": lambda x, w: (x @ w.T).nan_to_num(0.0),
    "of another shape": lambda x, w: (x @ w.T).T,
    "an exception": lambda x, w: (x @ w.T).view(-1, 7),
    "no gradient": lambda x, w: (x @ w.T).detach(),
    "not repeatable": lambda x, w: x @ w.T * (1 + 1e-7 * torch.rand(())),
}  # fmt: skip


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_found(name):
    def product(x, w):
        return x @ w.T

    report = testing.prove(BUGS[name], product, testing.Cases({"x": "B d", "w": "n d"}), cases=25)
    assert not report, name
    right = testing.prove(lambda x, w: F.linear(x, w), product, testing.Cases({"x": "B d", "w": "n d"}), cases=25)
    assert right, right


@testing.property_tests(fast_softmax, softmax, CASES, dtypes=[torch.float32], cases=5)
def test_generated(report):
    assert report.passed
    assert len(report.rows) == 1


def test_what_is_drawn_stays_the_callers():
    mine = torch.ones(3, 4, dtype=torch.float64)
    calls = []

    def definition(x):
        calls.append(x.dtype)
        return x.softmax(-1)

    def inputs(generator, scale, exact):
        return {"x": mine}

    report = testing.prove(softmax, definition, inputs, dtypes=[torch.float64], properties=["nan"], cases=3)
    assert report, report
    assert mine.eq(1).all()
    assert len(calls) == 3  # the definition runs once a case


def test_cases_say_what_is_wrong():
    with pytest.raises(ValueError, match='like "B d"'):
        testing.Cases({"x": ""})
    with pytest.raises(ValueError, match="needs \\['d'\\]"):
        testing.Cases({"x": "B d"}, sizes=[{"B": 3}])
    drawn = testing.Cases({"x": "B 4", "index": "B < n", "n": "=n"}, fixed={"flag": True})
    for seed in range(20):
        case = drawn(torch.Generator().manual_seed(seed), 1.0, False)
        assert case["x"].shape[1] == 4
        assert case["flag"] is True
        assert (case["index"] < case["n"]).all()
    with pytest.raises(ValueError, match="property must be one of"):
        testing.prove(softmax, softmax, CASES, properties=["speed"])
    with pytest.raises(ValueError, match="no input is a floating tensor"):
        testing.bound(lambda i: i + 1, {"i": torch.arange(3)})


def test_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "kernels_of_somebody.py").write_text(
        "from clipsteer.testing import Cases\n"
        "cases = Cases({'x': 'B d'})\n"
        "def plain(x): return x.softmax(-1)\n"
        "def right(x): return x.log_softmax(-1).exp()\n"
        "def wrong(x): return x.softmax(0)\n"
    )
    monkeypatch.chdir(tmp_path)
    name = "kernels_of_somebody"
    common = [f"{name}:plain", "--inputs", f"{name}:cases", "--cases", "10", "--json", "report.json"]
    assert main(["prove", f"{name}:right", *common]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["passed"] is True
    assert main(["prove", f"{name}:right", *common, "--no-fused", "--products", "tf32"]) == 0
    assert main(["prove", f"{name}:wrong", *common]) == 1
    assert "testing.replay" in capsys.readouterr().out
    assert main(["prove", "nowhere:right", *common]) == 2
    assert "no module 'nowhere'" in capsys.readouterr().err
    assert main(["prove", f"{name}:absent", *common]) == 2
    assert main(["prove", name, *common]) == 2
