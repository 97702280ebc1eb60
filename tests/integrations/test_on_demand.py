"""Codes and pre-activations that are dense tensors to whoever looks at them. Needs none of the peers."""

from __future__ import annotations

import copy
import io
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from clipsteer.integrations._codes import Codes, Preactivations
from clipsteer.integrations._on_demand import waits
from clipsteer.integrations.optimizers import fuse

B, N, D, K = 6, 20, 5, 4


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codes_of(kind: str) -> tuple[torch.Tensor, Codes, torch.Tensor]:
    """The values, a leaf; the codes; and the same densely, of the same leaf."""
    order = torch.argsort(draw(B, N, seed=1), dim=-1)[:, :K]
    if kind == "top-k":
        values = draw(B, K).requires_grad_()
        return values, Codes.of(values, order, None, N), torch.zeros(B, N).scatter(-1, order, values)
    counts = torch.tensor([2, 0, 3, 1, 4, 2])
    offsets = F.pad(counts.cumsum(0), (1, 0))
    rows = torch.repeat_interleave(torch.arange(B), counts)
    indices = torch.cat([order[row, :count].sort().values for row, count in enumerate(counts.tolist())])
    if kind == "ragged, padded":
        indices = F.pad(indices, (0, 3))
    values = draw(len(indices)).requires_grad_()
    real = values[: len(rows)]
    if kind == "ragged, padded":
        with torch.no_grad():
            values[len(rows) :] = 0
    dense = torch.zeros(B, N).index_put((rows, indices[: len(rows)]), real)
    return values, Codes.of(values, indices, offsets, N), dense


class Gate(torch.autograd.Function):
    """As trainers write them: it sees neither subclasses nor their functions."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * (x > 0.1)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (x > 0.1)


def doubled(t):
    t = t * 1.0 if t.is_leaf else t
    t *= 2
    return t @ draw(N, D)


def cut(t):
    t[:, 7:] = 0
    return t


W = draw(N, D, seed=2)
SPARSE = {
    "matmul": lambda f: f @ W,
    "linear": lambda f: F.linear(f, W.t().contiguous(), draw(D)),
    "sum over rows": lambda f: f.sum(0),
    "sum over rows, from the end": lambda f: torch.sum(f, -2),
    "sum over features": lambda f: f.sum(-1),
    "how often": lambda f: f.bool().float().sum(-2),
    "how many": lambda f: (f != 0).float().sum(dim=-1),
    "fired": lambda f: f.bool().sum(0),
    "fired at all": lambda f: (f > 0).any(),
    "columns": lambda f: f[:, 3:11] @ W[3:11],
    "groups": lambda f: torch.stack([p @ w for p, w in zip(torch.split(f, [3, 8, 9], dim=1), W.split([3, 8, 9]))]),
}
DENSE = {
    "itself": lambda f: f.clone(),
    "times": lambda f: f * torch.arange(N),
    "a row": lambda f: f[2],
    "a mask": lambda f: f[f.abs() > 0.3],
    "its largest": lambda f: f.topk(2).values,
    "in place": doubled,
    "cut off": cut,
    "a function of autograd": lambda f: Gate.apply(f),
    "stack": lambda f: torch.stack([f, f]),
    "einsum": lambda f: torch.einsum("bn,nd->bd", f, W),
    "the other side": lambda f: torch.ones(3, B) @ f,
    "sum of all": lambda f: f.sum(),
    "norm": lambda f: f.norm(p=1, dim=-1),
    "where": lambda f: torch.where(f > 0, f, -1.0),
    "three dimensions": lambda f: f.view(2, 3, N).sum(1),
}


@pytest.mark.parametrize("kind", ["top-k", "ragged", "ragged, padded"])
@pytest.mark.parametrize("name", [*SPARSE, *DENSE])
def test_codes_are_the_dense_tensor(kind, name):
    values, codes, dense = codes_of(kind)
    what = {**SPARSE, **DENSE}[name]
    got, want = what(codes), what(dense)
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    torch.testing.assert_close(got.detach().clone(), want.detach())
    assert waits(codes, Codes) == (name in SPARSE)
    if not want.dtype.is_floating_point or not want.requires_grad:
        assert not got.requires_grad
        return
    back = draw(*want.shape, seed=3)
    (expected,) = torch.autograd.grad(want, values, back, retain_graph=True, allow_unused=True)
    (found,) = torch.autograd.grad(got, values, back, allow_unused=True)
    padding = int(codes.offsets[-1]) if codes.offsets is not None else None
    torch.testing.assert_close(found[:padding], expected[:padding])


@pytest.mark.parametrize("kind", ["ragged", "ragged, padded"])
def test_positive_values_come_in_the_order_of_the_dense_tensor(kind):
    _, codes, dense = codes_of(kind)
    assert torch.equal(codes[codes > 0], dense[dense > 0])
    assert waits(codes, Codes)


def test_a_built_tensor_is_what_counts():
    _, codes, dense = codes_of("top-k")
    with torch.no_grad():
        codes[:, :5] = 1
        dense[:, :5] = 1
    assert not waits(codes, Codes)
    torch.testing.assert_close(codes @ W, dense @ W)
    torch.testing.assert_close(codes.sum(0), dense.sum(0))


def test_it_can_be_copied_kept_and_read():
    _, codes, dense = codes_of("top-k")
    dense = dense.detach()
    assert torch.equal(torch.from_numpy(codes.detach().numpy()), dense)
    assert codes.tolist() == dense.tolist()
    with pytest.raises(RuntimeError, match=r"detach\(\)"):
        codes_of("top-k")[1].numpy()
    assert torch.equal(torch.from_numpy(codes_of("top-k")[1].bool().numpy()), dense.bool())
    assert str(codes.detach().clone()) == str(dense)
    assert torch.equal(copy.deepcopy(codes), dense)
    assert isinstance(codes, torch.Tensor)
    assert (codes.shape, codes.dtype, codes.is_sparse, len(codes)) == (dense.shape, dense.dtype, False, B)
    file = io.BytesIO()
    torch.save(codes.detach(), file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), dense)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("across", [True, False])
def test_largest_of_the_dead_without_the_others(relu, scaled, across):
    """As AuxK finds them: masked with -inf, the largest of a row, scattered into zeros, decoded."""
    leaves = [draw(B, D), draw(D, N, seed=1).t() if across else draw(N, D, seed=1), draw(N, seed=2)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    x, W_enc, b = leaves
    scale = draw(N, seed=3).abs().add(0.5).requires_grad_() if scaled else None
    wanted = [*leaves, scale] if scaled else leaves
    dead = draw(N, seed=4) > 0.2
    pre = Preactivations.of(x, W_enc, b, torch.float32, scale=scale, relu=relu)
    dense = F.linear(x, W_enc, b)
    dense = dense * scale if scaled else dense
    dense = dense.relu() if relu else dense

    def reconstructed(pre):
        values, indices = torch.where(dead[None], pre, -torch.inf).topk(3, sorted=False)
        acts = torch.zeros_like(pre).scatter_(dim=-1, index=indices, src=values)
        return F.linear(acts, W.t().contiguous())

    got, want = reconstructed(pre), reconstructed(dense)
    assert waits(pre, Preactivations)
    torch.testing.assert_close(got, want)
    back = draw(B, D, seed=5)
    for a, b in zip(torch.autograd.grad(got, wanted, back), torch.autograd.grad(want, wanted, back)):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(pre.clone(), dense)
    assert not waits(pre, Preactivations)


def test_inference_mode():
    with torch.inference_mode():
        pre = Preactivations.of(draw(B, D), draw(N, D), None, torch.float32, relu=True)
        values, indices = pre.topk(3)
        codes = Codes.of(values, indices, None, N)
        assert codes.sum().item() == pytest.approx(float(values.sum()), rel=1e-5)
        torch.testing.assert_close(pre.clone(), F.linear(draw(B, D), draw(N, D)).relu())


def test_what_is_made_of_changed_tensors_says_so():
    weight = draw(N, D)
    pre = Preactivations.of(draw(B, D), weight, None, torch.float32)
    weight.mul_(2)
    with pytest.raises(RuntimeError, match="has changed since"):
        pre.mean()


def test_scatter_that_ignores_what_is_returned():
    pre = Preactivations.of(draw(B, D), draw(N, D), None, torch.float32)
    zeros = torch.zeros_like(pre)
    values, indices = pre.topk(3)
    zeros.scatter_(-1, indices, values)
    want = torch.zeros(B, N).scatter(-1, indices, values)
    torch.testing.assert_close(zeros @ W, want @ W)
    assert torch.equal(zeros.clone(), want)


def test_of_two_values_at_one_feature_scatter_keeps_one():
    pre = Preactivations.of(draw(B, D), draw(N, D), None, torch.float32)
    indices = torch.tensor([[3, 3]]).expand(B, 2)
    got = torch.zeros_like(pre).scatter_(-1, indices, torch.tensor([[1.0, 5.0]]).expand(B, 2))
    assert got.sum(-1).tolist() in ([1.0] * B, [5.0] * B)


@pytest.mark.parametrize("strided", [True, False])
def test_fused_adam_goes_on_from_any_state(strided):
    """Plain and fused Adam agree after a resume, whatever strides the checkpoint's moments have."""

    def run(fused: bool) -> torch.Tensor:
        weight = (draw(N, D).t() if strided else draw(D, N)).clone().requires_grad_()
        first = torch.optim.Adam([weight], lr=0.1)
        for step in range(2):
            weight.grad = torch.empty_like(weight).copy_(draw(D, N, seed=step))
            first.step()
        state = copy.deepcopy(first.state_dict())
        for name in ("exp_avg", "exp_avg_sq"):
            state["state"][0][name] = state["state"][0][name].contiguous()
        second = torch.optim.Adam([weight], lr=0.1)
        if fused:
            fuse(second)
        second.load_state_dict(state)
        assert bool(second.param_groups[0]["fused"]) == fused
        weight.grad = torch.empty_like(weight).copy_(draw(D, N, seed=7))
        second.step()
        return weight.detach()

    torch.testing.assert_close(run(True), run(False), rtol=1e-6, atol=1e-6)


def test_only_adam_is_fused():
    with pytest.raises(TypeError, match="Adam"):
        fuse(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0))


def test_integrations_import_no_peer():
    code = """
import sys
import clipsteer, clipsteer.integrations
dir(clipsteer.integrations), clipsteer.integrations.sparsify, clipsteer.integrations.fuse
print([peer for peer in ("sae_lens", "dictionary_learning", "sparsify", "transformer_lens") if peer in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
