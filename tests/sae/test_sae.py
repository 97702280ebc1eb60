from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import clipsteer
from clipsteer import SAE, ops
from clipsteer.ops._dispatch import missing
from clipsteer.sae import ARCHITECTURES, NORMALIZATIONS

D, N, K = 12, 40, 5
CASES = [(a, n) for a in ARCHITECTURES for n in NORMALIZATIONS]


def make(architecture="topk", normalize="none", *, seed=0, dtype=torch.float64, apply_b_dec=True, k=K) -> SAE:
    """An SAE whose every parameter is random, W_enc and W_dec unrelated."""
    generator = torch.Generator().manual_seed(seed)
    sae = SAE(D, N, architecture, k, normalize=normalize, apply_b_dec_to_input=apply_b_dec, dtype=dtype)
    with torch.no_grad():
        for name, tensor in sae.state_dict().items():
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(values.abs() if name == "threshold" else values)
    return sae


def draw(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) * 3 + 1


def plain(sae: SAE, x: torch.Tensor, p: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The same function written densely with einsum, for autograd to differentiate: (x_hat, dense acts)."""
    mean, scale, seen = torch.zeros(()), torch.ones(()), x
    if sae.normalize == "layer_norm":
        mean = x.sum(-1, keepdim=True) / D
        scale = (((x - mean) ** 2).sum(-1, keepdim=True) / (D - 1)).sqrt()
        seen = (x - mean) / (scale + 1e-5)
    elif sae.normalize == "constant_norm":
        scale = (x * x).sum(-1, keepdim=True).sqrt() / math.sqrt(D)
        seen = x / scale
    if sae.apply_b_dec_to_input:
        seen = seen - p["b_dec"]
    pre = torch.einsum("...d,nd->...n", seen, p["W_enc"])
    if sae.architecture == "gated":
        acts = torch.where(pre + p["b_gate"] > 0, F.relu(torch.exp(p["r_mag"]) * pre + p["b_mag"]), 0)
    else:
        pre = pre + p["b_enc"]
        keep = torch.ones_like(pre, dtype=torch.bool)
        if sae.architecture == "topk":
            keep = pre >= pre.sort(-1).values[..., -sae.k, None]
        elif sae.architecture == "batch_topk" and sae.training:
            count = int(sae.k * pre.numel() / N)
            keep = pre >= pre.flatten().sort().values[-count]
        elif sae.architecture in ("jumprelu", "batch_topk"):
            keep = pre > sae.threshold
        acts = torch.where(keep, F.relu(pre), 0)
    return (torch.einsum("...n,nd->...d", acts, p["W_dec"]) + p["b_dec"]) * scale + mean, acts


def assert_same(got, expected):
    """Equal up to the rounding of float64 sums of N + D terms; the operands are of order one to a thousand."""
    assert got.shape == expected.shape
    scale = 1 + expected.abs().max() if expected.numel() else 1.0
    assert bool(((got - expected).abs() <= 64 * (N + D) * torch.finfo(torch.float64).eps * scale).all())


@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("architecture", "normalize"), CASES)
def test_values_and_every_gradient_equal_a_dense_einsum_version(architecture, normalize, training, apply_b_dec):
    sae = make(architecture, normalize, apply_b_dec=apply_b_dec).train(training)
    x = draw(3, 4).requires_grad_()
    twin = {name: parameter.detach().clone().requires_grad_() for name, parameter in sae.named_parameters()}
    x_twin = x.detach().clone().requires_grad_()
    expected, acts = plain(sae, x_twin, twin)
    out = sae(x)
    assert_same(out.x_hat, expected)
    dense = out.acts if out.indices is None else torch.zeros(3, 4, N).double().scatter(-1, out.indices, out.acts)
    assert_same(dense, acts)
    weight, weight_acts = draw(3, 4, seed=2), torch.linspace(-1, 1, N, dtype=torch.float64)
    ((out.x_hat * weight).sum() + (dense * weight_acts).sum()).backward()
    ((expected * weight).sum() + (acts * weight_acts).sum()).backward()
    assert_same(x.grad, x_twin.grad)
    for name, parameter in sae.named_parameters():
        if name in ("b_gate", "threshold"):
            # a step is flat; without a bandwidth nothing stands for its gradient
            assert parameter.grad is None
        else:
            assert twin[name].grad.any()
            assert_same(parameter.grad, twin[name].grad)


@pytest.mark.parametrize(("architecture", "normalize"), CASES)
def test_encode_decode_and_forward_agree(architecture, normalize):
    sae, x = make(architecture, normalize).eval(), draw(6)
    out, dense = sae(x), sae.encode(x)
    assert dense.shape == (6, N)
    assert_same(sae.decode(dense, out.stats), out.x_hat)
    if architecture == "topk":
        acts, indices = sae.encode_topk(x)
        assert torch.equal(acts, out.acts)
        assert torch.equal(indices, out.indices)
        assert bool((acts.diff(dim=-1) <= 0).all())
        assert_same(sae.decode((acts, indices), out.stats), out.x_hat)
        assert int((dense != 0).sum(-1).max()) <= K
    mean, scale = out.stats
    undone = sae.normalize_input(x)[0]
    if normalize == "layer_norm":
        assert_same(undone * (scale + 1e-5) + mean, x)
        assert_same(scale[:, 0], x.std(-1))
    elif normalize == "constant_norm":
        assert mean is None
        assert_same(undone.norm(dim=-1), torch.full((6,), math.sqrt(D), dtype=torch.float64))
    else:
        assert (mean, scale) == (None, None)


@pytest.mark.parametrize(("architecture", "normalize"), CASES)
def test_feature_acts_are_those_of_encode(architecture, normalize):
    sae, x = make(architecture, normalize).eval(), draw(2, 3)
    features = torch.tensor([7, 0, N - 1, 7])
    acts, scale = sae.feature_acts(x, features)
    assert_same(acts, sae.encode(x)[..., features])
    assert scale.shape == (2, 3, 1)
    stats = sae(x).stats
    assert torch.equal(scale, torch.ones_like(scale) if stats.scale is None else stats.scale)
    if architecture == "batch_topk":
        assert torch.equal(sae.train().feature_acts(x, features)[0], acts)


def test_topk_runs_on_the_fused_ops(monkeypatch):
    calls = []
    for name in ("topk_encode", "sparse_decode"):
        function = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, f=function, n=name, **k: calls.append(n) or f(*a, **k))
    make("topk")(draw(2))
    assert calls == ["topk_encode", "sparse_decode"]


@given(st.integers(0, 2**31), st.sampled_from([1, 2, 5, 9]), st.sampled_from([1, 3, 0.5, 2.25]))
def test_batch_topk_keeps_the_largest_of_the_batch_and_learns_a_threshold(seed, rows, k):
    sae = make("batch_topk", seed=seed, k=k).train()
    sae.threshold.fill_(-1.0)
    x = draw(rows, seed=seed + 1)
    acts = sae(x).acts
    pre = F.relu(F.linear(x - sae.b_dec, sae.W_enc, sae.b_enc))
    count = max(1, int(k * rows))
    assert_same(acts[acts > 0].sort().values, pre.flatten().sort().values[-count:][-int((acts > 0).sum()) :])
    assert int((acts > 0).sum()) == min(count, int((pre > 0).sum()))
    first = acts[acts > 0].min()
    assert sae.threshold == first
    other = draw(rows, seed=seed + 2)
    second = sae(other).acts
    expected = first + 0.01 * (second[second > 0].min() - first)
    assert abs(float((sae.threshold - expected).detach())) < 1e-12
    sae.eval()
    before = sae.threshold.clone()
    pre = F.relu(F.linear(x - sae.b_dec, sae.W_enc, sae.b_enc))
    assert_same(sae(x).acts, torch.where(pre > before, pre, 0))
    assert torch.equal(sae.threshold, before)
    assert "threshold" in sae.state_dict()


def test_encode_in_training_mode_does_not_move_the_threshold():
    sae = make("batch_topk").train()
    before = sae.threshold.clone()
    sae.encode(draw(4))
    assert torch.equal(sae.threshold, before)


def test_initialisation():
    torch.manual_seed(0)
    sae = SAE(d_in=32, d_sae=512)
    assert torch.equal(sae.W_enc, sae.W_dec)
    assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr()
    assert_unit = (sae.W_dec.norm(dim=-1) - 1).abs().max()
    assert float(assert_unit.detach()) < 32 * torch.finfo(torch.float32).eps
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()
    # uniform directions in the cube: no coordinate is favoured
    assert float(sae.W_dec.detach().mean().abs()) < 5 / math.sqrt(512 * 32) / math.sqrt(32) * 2
    assert list(sae.state_dict()) == ["W_enc", "W_dec", "b_dec", "b_enc"]
    assert set(SAE(4, 8, "jumprelu").state_dict()) == {"W_enc", "W_dec", "b_dec", "b_enc", "threshold"}
    assert set(SAE(4, 8, "gated").state_dict()) == {"W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"}
    assert "architecture='topk', k=64" in repr(sae)


def total_distance(point, rows):
    return float((rows - point.detach()).norm(dim=-1).sum())


@given(st.integers(0, 2**31), st.integers(1, 40), st.booleans())
def test_b_dec_starts_at_the_geometric_median(seed, rows, repeated):
    x = draw(rows, seed=seed)
    if repeated:
        x = torch.cat([x, x[:1].expand(rows + 1, D)])
    sae = make(seed=seed)
    sae.init_b_dec_(x)
    # a point's rounding error, from every row
    at = total_distance(sae.b_dec, x) - len(x) * 1e-13 * float(x.abs().max())
    if repeated:
        # more than half of the mass sits in one point, which is then the median
        assert float((sae.b_dec.detach() - x[0]).norm()) < 1e-5 * float(x.norm(dim=-1).mean())
    generator = torch.Generator().manual_seed(seed)
    for size in (1e-2, 1e-1, 1.0):
        step = torch.randn(D, generator=generator, dtype=torch.float64)
        assert at <= total_distance(sae.b_dec + size * step / step.norm(), x) * (1 + 1e-6)
    assert all(at <= total_distance(row, x) * (1 + 1e-6) for row in x)


def test_b_dec_starts_in_the_normalised_space():
    x, sae = draw(50), make("relu", "layer_norm")
    sae.init_b_dec_(x)
    other = make("relu", "none")
    other.init_b_dec_(sae.normalize_input(x)[0])
    assert torch.equal(sae.b_dec, other.b_dec)


@pytest.mark.parametrize(("architecture", "normalize"), CASES)
def test_row_sparse_gradients_are_the_dense_ones(architecture, normalize):
    if missing("cpp"):
        pytest.skip("the C++ library is not built")
    sae, x, grads = make(architecture, normalize), draw(3, 4), []
    for sparse in (False, True):
        sae.zero_grad()
        sae(x, sparse_grad=sparse).x_hat.square().sum().backward()
        assert (sae.W_enc.grad.is_sparse, sae.W_dec.grad.is_sparse) == (sparse,) * 2
        grads.append({name: p.grad.to_dense() for name, p in sae.named_parameters() if p.grad is not None})
    for name, grad in grads[0].items():
        if architecture == "relu":
            assert_same(grads[1][name], grad)  # densely, another order of summation
        else:
            assert torch.equal(grad, grads[1][name]), name


def test_decoder_norm_and_parallel_gradient():
    sae = make()
    with torch.no_grad():
        sae.W_dec[3] = 0
    sae.renormalize_decoder_()
    norms = sae.W_dec.detach().norm(dim=-1)
    assert float(norms[3]) == 0
    assert float((norms[torch.arange(N) != 3] - 1).abs().max()) < 1e-14
    sae.remove_parallel_gradient_()
    sae.W_dec.grad = torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = sae.W_dec.grad.clone()
    sae.remove_parallel_gradient_()
    assert float((sae.W_dec.grad * sae.W_dec).sum(-1).abs().max()) < 1e-14
    # only the component along the row is gone
    removed = before - sae.W_dec.grad
    along = (removed * sae.W_dec).sum(-1, keepdim=True) * sae.W_dec
    assert float((removed - along).abs().max()) < 1e-14
    assert torch.equal(sae.W_dec.grad[3], before[3])


@pytest.mark.parametrize(("architecture", "normalize"), CASES)
def test_forward_leaves_no_trace_on_the_module(architecture, normalize):
    sae = make(architecture, normalize).eval()
    before, state = dict(vars(sae)), copy.deepcopy(sae.state_dict())
    sae(draw(3))
    assert vars(sae) == before
    assert all(torch.equal(state[name], tensor) for name, tensor in sae.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("architecture", "normalize"), CASES)
def test_low_precision_and_mixed_dtypes(architecture, normalize, dtype):
    sae = make(architecture, normalize, dtype=dtype).eval()
    wide = make(architecture, normalize).eval()
    with torch.no_grad():
        for name, tensor in sae.state_dict().items():
            wide.state_dict()[name].copy_(tensor)
    x = draw(5, dtype=dtype)
    out = sae(x)
    assert out.x_hat.dtype == dtype
    assert out.acts.dtype == dtype
    assert out.x_hat.isfinite().all()
    assert sae(x.double()).x_hat.dtype == torch.float64
    if architecture in ("relu", "topk"):
        # a relative error of a few ulps of the largest value, amplified by the D + N terms of the two products
        truth = plain(wide, x.double(), dict(wide.named_parameters()))[0]
        tolerance = 8 * (D + N) * torch.finfo(dtype).eps * float(truth.abs().max())
        assert float((out.x_hat.double() - truth).abs().max()) < tolerance


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_autocast(architecture):
    sae = make(architecture, "layer_norm", dtype=torch.float32).train()
    x = draw(5, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sae(x)
    assert out.x_hat.dtype == torch.float32
    out.x_hat.square().sum().backward()
    assert all(
        p.grad.isfinite().all() and p.grad.dtype == torch.float32
        for n, p in sae.named_parameters()
        if n not in ("b_gate", "threshold")
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("architecture", "normalize"), [(a, "layer_norm") for a in ARCHITECTURES] + [("topk", "none")])
def test_compiles_to_one_graph(architecture, normalize, training):
    torch._dynamo.reset()
    sae = make(architecture, normalize).train(training)
    eager = copy.deepcopy(sae)
    compiled = torch.compile(sae, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (4, 7):
        x = draw(rows)
        got, expected = compiled(x), eager(x)
        torch.testing.assert_close(got.x_hat, expected.x_hat)
        torch.testing.assert_close(got.acts, expected.acts)
        got.x_hat.square().mean().backward()
        expected.x_hat.square().mean().backward()
        torch.testing.assert_close(sae.W_enc.grad, eager.W_enc.grad)
        torch.testing.assert_close(sae.W_dec.grad, eager.W_dec.grad)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (), (1,)])
@pytest.mark.parametrize(("architecture", "normalize"), CASES)
def test_leading_shapes(architecture, normalize, shape):
    for training in (True, False):
        sae = make(architecture, normalize).train(training)
        out = sae(draw(*shape))
        assert out.x_hat.shape == (*shape, D)
        assert out.acts.shape == (*shape, K if architecture == "topk" else N)
        assert sae.encode(draw(*shape)).shape == (*shape, N)


@pytest.mark.parametrize(("architecture", "normalize"), CASES)
def test_rows_without_spread_or_norm_give_numbers(architecture, normalize):
    sae = make(architecture, normalize, apply_b_dec=False)
    x = torch.stack([torch.zeros(D), torch.full((D,), 2.0)]).double().requires_grad_()
    out = sae(x)
    out.x_hat.sum().backward()
    assert out.x_hat.isfinite().all()
    assert x.grad.isfinite().all()
    if normalize == "layer_norm":
        # no spread: the reconstruction is the mean
        assert torch.equal(out.x_hat, x.detach())
    if normalize == "constant_norm":
        assert not out.x_hat[0].any()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"architecture": "tanh"}, ValueError, "architecture must be one of"),
        ({"normalize": "batch"}, ValueError, "normalize must be one of"),
        ({"k": 0}, ValueError, r"k must be in \[1, d_sae = 8\], got 0"),
        ({"k": 9}, ValueError, "got 9"),
        ({"k": 2.5}, TypeError, "k must be an int for topk"),
        ({"k": None, "architecture": "batch_topk"}, TypeError, "NoneType"),
        ({"k": float("nan"), "architecture": "batch_topk"}, ValueError, "got nan"),
        ({"d_in": 0}, ValueError, "d_in must be at least 1"),
        ({"d_sae": "8"}, TypeError, "d_sae must be an int"),
        ({"d_in": 1, "normalize": "layer_norm"}, ValueError, "at least 2"),
        ({"dtype": torch.int32}, TypeError, "floating"),
    ],
)
def test_mistakes_in_the_constructor(arguments, error, message):
    with pytest.raises(error, match=message):
        SAE(**{"d_in": 4, "d_sae": 8, "k": 2, **arguments})


def test_mistakes_in_calls():
    sae = make("relu")
    with pytest.raises(ValueError, match=r"\(\.\.\., d_in = 12\), got \(3, 11\)"):
        sae(torch.zeros(3, 11))
    with pytest.raises(TypeError, match="floating"):
        sae(torch.zeros(3, D, dtype=torch.int64))
    with pytest.raises(ValueError, match="use encode"):
        sae.encode_topk(draw(2))
    with pytest.raises(ValueError, match=r"d_sae = 40\), got \(2, 12\)"):
        sae.decode(draw(2))
    with pytest.raises(ValueError, match="at least one row"):
        sae.init_b_dec_(draw(0))


def test_names_at_the_top():
    assert clipsteer.SAE is SAE
    assert clipsteer.SAEOutput._fields == ("x_hat", "acts", "indices", "stats")
