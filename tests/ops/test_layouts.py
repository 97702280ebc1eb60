"""Dictionaries that lie as (d, n): read where they lie, and their gradients lie so, too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from clipsteer import ops, testing
from clipsteer.ops import REGISTRY

pytestmark = pytest.mark.skipif(not testing.supported("cpp"), reason="the C++ library is not built")

DECODERS = ("sparse_decode", "sparse_decode_prefixes", "ragged_decode")
decoders = pytest.mark.parametrize("name", DECODERS)


def case(name: str, shape: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Callable[..., Tensor], Tensor]:
    """An op as a function of its dictionary, and that dictionary, by columns."""
    spec = REGISTRY[name]
    inputs = spec.make(spec.shapes[shape], dtype, torch.Generator().manual_seed(0), 1.0, False)
    W = inputs.pop("W_dec")

    def op(W: Tensor, **options: object) -> Tensor:
        return spec.function(**inputs, W_dec=W, **options)

    return op, W.t().contiguous().t()


class Large(TorchDispatchMode):
    """Keeps the names of all operations that make a tensor of so many elements anew."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.made = size, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, Tensor) and t.numel() >= self.size and t.untyped_storage().data_ptr() not in given:
                self.made.append(str(function))
        return result


@decoders
def test_nothing_is_copied_but_the_gradient_that_is_asked_for(name):
    op, W = case(name, shape=2)
    W.requires_grad_()
    with Large(W.numel()) as large:
        loss = op(W).square().sum()
        assert large.made == []
        (grad,) = torch.autograd.grad(loss, W)
    assert grad.stride() == W.stride() == (1, len(W))
    assert len(large.made) == 1
    assert "outer" in large.made[0]


@decoders
@pytest.mark.parametrize("dtype", testing.supported("cpp"), ids=str)
@pytest.mark.parametrize("shape", range(8))
def test_both_layouts_give_the_same_numbers(name, dtype, shape):
    op, W = case(name, shape, dtype)
    found, grads = [], []
    for lying in (W, W.contiguous()):
        leaf = lying.clone().requires_grad_()
        found.append(op(leaf))
        grads.append(torch.autograd.grad(found[-1].float().square().sum(), leaf)[0])
    # sums over pairs are taken in one order, whatever the layout
    assert torch.equal(*found)
    assert torch.equal(*grads)


@decoders
def test_second_derivatives(name):
    spec = REGISTRY[name]
    inputs = spec.make(spec.small_shape, torch.float64, torch.Generator().manual_seed(1), 1.0, False)
    free = [n for n in spec.differentiable if n != "b_dec"]

    def smooth(*tensors: Tensor) -> Tensor:
        return spec.function(**{**inputs, **dict(zip(free, tensors))}, backend="cpp")

    leaves = [testing.transposed(inputs[n]).requires_grad_() for n in free]
    assert leaves[-1].stride(0) == 1
    assert torch.autograd.gradcheck(smooth, leaves)
    assert torch.autograd.gradgradcheck(smooth, leaves)


@pytest.mark.usefixtures("two_threads")
def test_a_few_codes_of_many_features_read_these_alone():
    g = torch.Generator().manual_seed(0)
    W = torch.full((40, 5000), float("nan"))
    used = torch.randperm(5000, generator=g)[:60]
    W[:, used] = torch.randn(40, 60, generator=g)
    acts, indices = torch.randn(20, 3, generator=g), used.view(20, 3)
    leaf = W.t().requires_grad_()
    acts.requires_grad_()
    x_hat = ops.sparse_decode(acts, indices, leaf)
    assert torch.equal(x_hat, ops.sparse_decode(acts, indices, W.t().contiguous()))
    d_acts, d_W = torch.autograd.grad(x_hat.square().sum(), (acts, leaf))
    expected = (2 * x_hat.detach()[:, None] * W.t()[indices]).sum(-1)
    torch.testing.assert_close(d_acts, expected, rtol=1e-5, atol=1e-4)
    assert d_W.count_nonzero(1).bool().nonzero().flatten().tolist() == sorted(used.tolist())


@decoders
@pytest.mark.parametrize("columns", [True, False], ids=["columns", "rows"])
def test_a_kept_buffer_in_either_layout(name, columns):
    op, W = case(name)
    leaf = W.clone().requires_grad_()
    (fresh,) = torch.autograd.grad(op(leaf).square().sum(), leaf)
    buffer = torch.full_like(W, float("nan"))
    buffer = buffer if columns else buffer.contiguous()
    (kept,) = torch.autograd.grad(op(leaf, grad_buffer=buffer).square().sum(), leaf)
    assert kept.data_ptr() == buffer.data_ptr()
    assert torch.equal(kept, fresh)


@decoders
def test_a_linear_layers_decoder_trains_as_a_dictionary_does(name):
    """``nn.Linear(n, d).weight`` is (d, n): its gradient is stolen, not copied."""
    op, W = case(name)
    layer = nn.Linear(*W.shape, bias=False)
    layer.weight.data.copy_(W.t())
    with Large(W.numel()) as large:
        op(layer.weight.t()).square().sum().backward()
    assert len(large.made) == 1
    leaf = W.clone().requires_grad_()
    (expected,) = torch.autograd.grad(op(leaf).square().sum(), leaf)
    assert torch.equal(layer.weight.grad.t(), expected)
    (rows,) = torch.autograd.grad(op(leaf, sparse_grad=True).square().sum(), leaf)
    assert rows.is_sparse
    assert torch.equal(rows.to_dense(), expected)
    with pytest.raises(RuntimeError, match="through a transposition"):
        op(layer.weight.t(), sparse_grad=True)


@decoders
def test_under_compile_export_vmap_and_fakes(name):
    op, W = case(name)
    leaf = W.requires_grad_()
    x_hat = op(leaf)
    (expected,) = torch.autograd.grad(x_hat.square().sum(), leaf)
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")(leaf)
    assert torch.equal(compiled, x_hat)
    (found,) = torch.autograd.grad(compiled.square().sum(), leaf)
    assert found.stride() == leaf.stride()
    assert torch.equal(found, expected)

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(W.detach().t())

        def forward(self, scale: Tensor) -> Tensor:
            return op(self.weight.t() * scale)

    program = torch.export.export(Module(), (torch.ones(()),)).module()
    exported = program(torch.ones(()))
    assert torch.equal(exported, x_hat)
    exported.square().sum().backward()
    assert torch.equal(next(program.parameters()).grad.t(), expected)
    scales = torch.tensor([1.0, 2.0])
    each = torch.func.vmap(lambda s: op(s * leaf.detach()))(scales)
    assert torch.equal(each[0], x_hat)
    grads = torch.func.vmap(torch.func.grad(lambda s: op(s * leaf.detach()).square().sum()))(scales)
    torch.testing.assert_close(grads[0], (expected * leaf).sum(), rtol=1e-4, atol=1e-3)
    meta = W.detach().to("meta").requires_grad_()
    spec = REGISTRY[name]
    inputs = spec.make(spec.shapes[1], torch.float32, torch.Generator().manual_seed(0), 1.0, False)
    inputs = {n: v.to("meta") if isinstance(v, Tensor) else v for n, v in inputs.items()}
    outputs = spec.function(**{**inputs, "W_dec": meta})
    assert outputs.shape == x_hat.shape


@pytest.mark.parametrize("op", ["sparse_outer", "ragged_outer"])
def test_segment_sums_by_columns_keep_torchs_contract(op):
    g = torch.Generator().manual_seed(0)
    coeff, rows = torch.randn(6, 4, generator=g), torch.randn(6, 10, generator=g)
    indices = torch.randint(17, (6, 4), generator=g)
    args = (coeff, indices, rows, 17, True)
    if op == "ragged_outer":
        args = (coeff.flatten(), indices.flatten(), torch.arange(24) // 4, rows, 17, True)
    torch.library.opcheck(
        getattr(torch.ops.clipsteer_cpp, op).default,
        args,
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_other_layouts_are_refused_by_the_kernels_themselves():
    W, acts = torch.zeros(9, 12)[:, ::2], torch.zeros(4, 2)
    indices = torch.zeros(4, 2, dtype=torch.int64)
    for bad in (W, torch.zeros(6, 18).t()[::2], torch.zeros(9, 1).expand(9, 6)):
        with pytest.raises((RuntimeError, ValueError), match="contiguous"):
            torch.ops.clipsteer_cpp.sparse_decode(acts, indices, bad, None)
        torch.testing.assert_close(ops.sparse_decode(acts, indices, bad), torch.zeros(4, 6))


ON_GPU_KERNELS = """
import torch
from clipsteer import ops

g = torch.Generator().manual_seed(0)
W = torch.randn(6, 50, generator=g).t()
acts, indices = torch.randn(9, 4, generator=g), torch.randint(50, (9, 4), generator=g)
for options in ({}, {"prefixes": (7, 50)}):
    found = []
    for backend in ("triton", "reference"):
        for buffer in (None, torch.full_like(W, 7.0), torch.full((50, 6), 7.0)):
            leaf, kept = W.clone().requires_grad_(), {"grad_buffer": buffer} if backend == "triton" else {}
            x_hat = ops.sparse_decode(acts, indices, leaf, backend=backend, **options, **kept)
            found.append((x_hat, torch.autograd.grad(x_hat.square().sum(), leaf)[0]))
    for x_hat, grad in found:
        torch.testing.assert_close(x_hat, found[-1][0])
        torch.testing.assert_close(grad, found[-1][1])
"""


def test_kernels_of_gpus_read_a_copy_and_leave_a_buffer_by_columns_alone(interpret):
    interpret(ON_GPU_KERNELS)


@pytest.mark.parametrize("op", ["topk_encode", "threshold_encode", "batch_topk_encode"])
def test_an_encoders_gradient_is_the_only_large_tensor(op):
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(8, 40, generator=g).requires_grad_(), torch.randn(40, 300, generator=g).t().requires_grad_()
    limit = {"topk_encode": {"k": 4}, "threshold_encode": {"threshold": 9.0}, "batch_topk_encode": {"count": 30}}
    with Large(W.numel()) as large:
        values = getattr(ops, op)(x, W, **limit[op])[0]
        grads = torch.autograd.grad(values.square().sum(), (x, W))
    # the encoders themselves may make pre-activations of their own
    assert [name for name in large.made if "encode" not in name] == [n for n in large.made if "outer" in n]
    assert grads[1].stride() == W.stride()
    by_rows = W.detach().contiguous().requires_grad_()
    values = getattr(ops, op)(x, by_rows, **limit[op])[0]
    for a, b in zip(grads, torch.autograd.grad(values.square().sum(), (x, by_rows))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
