"""The encoders' options beyond what the registry's properties see: screened sizes, layouts, what they are equal to."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from clipsteer import ops, testing
from clipsteer.ops import _dispatch

BACKENDS = [b for b in ("reference", "cpp") if testing.supported(b)]
needs_cpp = pytest.mark.skipif(not testing.supported("cpp"), reason="the C++ library is not built")
LIMITS = {
    "topk_encode": {"k": 7},
    "threshold_encode": {"threshold": torch.tensor(9.0)},
    "batch_topk_encode": {"k": 2.5},
}


def integers(seed: int, *shape: int) -> Tensor:
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def across(W: Tensor) -> Tensor:
    return W.t().contiguous().t()


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected))


@needs_cpp
@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize(("n", "m"), [(65, 20), (4400, 4200), (9000, 300)])  # the second is screened, where it can be
def test_options_are_exact_in_either_layout(name, n, m):
    x, W, b, scale = integers(0, 70, 130), integers(1, n, 130), integers(2, n), integers(3, n)
    columns = torch.randperm(n, generator=torch.Generator().manual_seed(4))[:m]
    for given in (None, scale):
        for chosen in (None, columns):
            options = {**LIMITS[name], "scale": given, "columns": chosen}
            for more in ({}, {"relu": False}) if name != "batch_topk_encode" else ({},):
                encode = getattr(ops, name)
                expected = encode(x, W, b, **options, **more, backend="reference")
                assert same(encode(x, W, b, **options, **more, backend="cpp"), expected)
                assert same(encode(x, across(W), b, **options, **more, backend="cpp"), expected)
                assert int(expected[1].max()) > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LIMITS)
def test_columns_are_an_encode_of_gathered_ones(name, backend):
    """Ties go to the earlier of the columns, and a row with a NaN in another column has none."""
    encode, limit = getattr(ops, name), LIMITS[name]
    x, W, b, scale = integers(0, 9, 12), integers(1, 80, 12), integers(2, 80), integers(3, 80)
    columns = torch.randperm(80, generator=torch.Generator().manual_seed(4))[:40]
    found = encode(x, W, b, **limit, scale=scale, columns=columns, backend=backend)
    gathered = encode(x, W[columns], b[columns], **limit, scale=scale[columns], backend=backend)
    assert torch.equal(found[0], gathered[0])
    there = torch.ones_like(found[1], dtype=torch.bool)
    if name != "topk_encode":
        there = ops.code_rows(found) < len(x)
    assert torch.equal(found[1][there], columns[gathered[1]][there])
    outside = W.clone()
    outside[[i for i in range(80) if i not in columns.tolist()]] = torch.nan
    assert same(encode(x, outside, b, **limit, scale=scale, columns=columns, backend=backend), found)
    inside = W.clone()
    inside[columns[-1], 0] = torch.nan
    spoiled = encode(x, inside, b, **limit, scale=scale, columns=columns, backend=backend)
    assert bool(spoiled[0][: len(x)].isnan().all())
    if name != "topk_encode":
        assert torch.equal(spoiled[1][: len(x)], columns[:1].expand(len(x)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("options", [False, True], ids=["plain", "options"])
def test_a_gradient_lies_as_its_dictionary(name, backend, options):
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(9, 12, generator=g), torch.randn(80, 12, generator=g)
    more = {"scale": torch.randn(80, generator=g), "columns": torch.arange(3, 70)} if options else {}
    found = []
    for lying in (weight, across(weight)):
        W = lying.clone().requires_grad_()
        assert W.stride() == lying.stride()
        getattr(ops, name)(x, W, **LIMITS[name], **more, backend=backend)[0].square().sum().backward()
        assert W.grad.shape == W.shape
        if backend == "cpp":
            assert W.grad.stride() == W.stride()
        found.append(W.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


@needs_cpp
@pytest.mark.parametrize("name", LIMITS)
def test_a_dictionary_is_read_where_it_lies(name, monkeypatch):
    """Neither a layout copy nor a gather of rows in torch: the kernel gets the caller's own memory."""
    seen = []

    def call(backend, op, *args):
        seen.append(args[1].data_ptr())
        return _dispatch.call(backend, op, *args)

    for module in ("topk_encode", "threshold_encode", "_ragged_encode"):
        monkeypatch.setattr(sys.modules[f"clipsteer.ops.{module}"], "call", call)
    x, W = torch.randn(5, 12), torch.randn(12, 80)
    getattr(ops, name)(x, W.t(), **LIMITS[name], columns=torch.arange(40), backend="cpp")
    assert seen == [W.data_ptr()]


@needs_cpp
@pytest.mark.parametrize("name", LIMITS)
def test_row_sparse_gradients_with_options(name):
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(13, 24, generator=g), torch.randn(100, 24, generator=g).requires_grad_()
    b, scale = torch.randn(100, generator=g).requires_grad_(), torch.randn(100, generator=g).requires_grad_()
    columns = torch.randperm(100, generator=g)[:60]
    encode = getattr(ops, name)
    found = []
    for sparse in (False, True):
        codes = encode(x, W, b, **LIMITS[name], scale=scale, columns=columns, sparse_grad=sparse)
        found.append(torch.autograd.grad(codes[0].square().sum(), (W, b, scale)))
    assert found[1][0].is_sparse
    assert same([t.to_dense() for t in found[1]], found[0])
    others = torch.ones(100, dtype=torch.bool)
    others[columns] = False
    assert not any(t[others].any() for t in found[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_of_zero_has_its_gradient_where_nothing_clips_it(backend):
    x, W, b = integers(0, 5, 8), integers(1, 30, 8), integers(2, 30)
    scale = torch.zeros(30).requires_grad_()
    acts, indices = ops.topk_encode(x, W, b, k=4, relu=False, scale=scale, backend=backend)
    assert not acts.any()
    assert torch.equal(indices, torch.arange(4).expand(5, 4))
    (found,) = torch.autograd.grad(acts.sum(), scale)
    expected = (x @ W.t() + b).sum(0)
    expected[4:] = 0
    assert torch.equal(found, expected)
    (clipped,) = torch.autograd.grad(ops.topk_encode(x, W, b, k=4, scale=scale, backend=backend)[0].sum(), scale)
    assert not clipped.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_negative_values_without_a_relu(backend):
    x, W, b = integers(0, 5, 8), integers(1, 30, 8), integers(2, 30) - 90
    acts, _ = ops.topk_encode(x, W, b, k=4, relu=False, backend=backend)
    assert torch.equal(acts, torch.topk(x @ W.t() + b, 4).values)
    x.requires_grad_()
    acts, indices = ops.topk_encode(x, W, b, k=4, relu=False, backend=backend)
    assert torch.equal(torch.autograd.grad(acts.sum(), x)[0], W[indices].sum(1))
    assert not ops.topk_encode(x.detach(), W, b, k=4, backend=backend)[0].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_is_asked_for_by_rows(backend):
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(7, 12, generator=g), torch.randn(40, 12, generator=g)
    for k, count in ((3, 21), (2.5, 17), (0.01, 1), (1 / 7, 1)):
        found = ops.batch_topk_encode(x, W, k=k, backend=backend)
        assert same(found, ops.batch_topk_encode(x, W, count=count, backend=backend))
        assert int(found.offsets[-1]) == count
    compiled = torch.compile(
        lambda x: ops.batch_topk_encode(x, W, k=1.5), fullgraph=True, backend="aot_eager", dynamic=True
    )
    assert same(compiled(x), ops.batch_topk_encode(x, W, count=10))
    assert same(compiled(x[:5]), ops.batch_topk_encode(x[:5], W, count=7))


@pytest.mark.parametrize("backend", BACKENDS)
def test_codes_say_their_threshold_and_whether_any_are_missing(backend):
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(7, 12, generator=g), torch.randn(40, 12, generator=g)
    codes = ops.batch_topk_encode(x, W, k=3, backend=backend)
    assert codes.threshold.shape == codes.overflowed.shape == ()
    assert codes.overflowed.dtype == torch.bool
    assert torch.equal(codes.threshold, codes.values.min())
    assert not codes.overflowed
    # what inference by this threshold finds, which is strict, is all but the least
    again = ops.threshold_encode(x, W, threshold=codes.threshold, backend=backend)
    assert len(again.values) == 20
    positive = ops.threshold_encode(x, W, threshold=-1.0, backend=backend)
    padded = ops.threshold_encode(x, W, threshold=0.0, capacity=7 * 40, backend=backend)
    assert torch.equal(padded.threshold, positive.values.min())  # and no padding's zero
    short = ops.threshold_encode(x, W, threshold=0.0, capacity=5, backend=backend)
    assert short.overflowed
    assert not padded.overflowed
    x[2, 0] = torch.nan
    spoiled = ops.batch_topk_encode(x, W, k=3, backend=backend)
    assert torch.equal(spoiled.threshold, spoiled.values.nan_to_num(nan=torch.inf).min())
    for none in (
        ops.threshold_encode(x, W, threshold=torch.inf, columns=torch.arange(0), backend=backend),
        ops.batch_topk_encode(x[:0], W, count=0, backend=backend),
    ):
        assert none.threshold == torch.inf
        assert not none.overflowed
    wanted = x.clone().nan_to_num().requires_grad_()
    assert not ops.batch_topk_encode(wanted, W, k=3, backend=backend).threshold.requires_grad


def test_codes_tell_inside_a_compiled_graph():
    x, W = torch.randn(7, 12), torch.randn(40, 12)

    def told(x: Tensor) -> tuple[Tensor, Tensor]:
        codes = ops.threshold_encode(x, W, threshold=0.0, capacity=30)
        return codes.threshold, codes.overflowed

    assert same(torch.compile(told, fullgraph=True, backend="aot_eager")(x), told(x))


def mistakes():
    x, W = torch.zeros(4, 6), torch.zeros(9, 6)
    columns = torch.arange(5)
    yield ValueError, r"scale must be of shape \(d_sae,\)", lambda: ops.topk_encode(x, W, k=2, scale=W[:4, 0])
    yield TypeError, "scale must be of x's dtype", lambda: ops.topk_encode(x, W, k=2, scale=torch.ones(9).double())
    yield TypeError, "columns must be int64", lambda: ops.topk_encode(x, W, k=2, columns=columns.int())
    yield ValueError, "columns must be the numbers of", lambda: ops.topk_encode(x, W, k=2, columns=columns[None])
    yield ValueError, r"columns must be in \[0, 9\)", lambda: ops.topk_encode(x, W, k=2, columns=columns + 5)
    yield ValueError, "the number of columns = 5", lambda: ops.topk_encode(x, W, k=6, columns=columns)
    yield ValueError, r"columns must be in \[0, 9\)", lambda: ops.batch_topk_encode(x, W, k=2, columns=columns - 1)
    yield (
        ValueError,
        r"columns must be in \[0, 9\)",
        lambda: ops.threshold_encode(x, W, threshold=0.0, columns=columns - 1),
    )
    yield ValueError, "count or k, one of them", lambda: ops.batch_topk_encode(x, W)
    yield ValueError, "count or k, one of them", lambda: ops.batch_topk_encode(x, W, k=2, count=8)
    yield TypeError, "k must be a number", lambda: ops.batch_topk_encode(x, W, k="2")
    yield ValueError, "k must be above 0", lambda: ops.batch_topk_encode(x, W, k=0)
    yield ValueError, "k must be above 0", lambda: ops.batch_topk_encode(x, W, k=float("inf"))
    cannot = (
        'topk_encode: backend "cuda" cannot run: it has no kernel for topk_encode with scale, columns or relu=False'
    )
    yield RuntimeError, cannot, lambda: ops.topk_encode(x, W, k=2, relu=False, backend="cuda")
    yield RuntimeError, cannot, lambda: ops.topk_encode(x, W, k=2, columns=columns, backend="cuda")


@pytest.mark.parametrize("number", range(len(list(mistakes()))))
def test_mistakes_are_named(number):
    error, message, call = list(mistakes())[number]
    with pytest.raises(error, match=message):
        call()


@needs_cpp
def test_kernels_check_columns_themselves():
    x, W = torch.zeros(4, 6), torch.zeros(9, 6)
    call = torch.ops.clipsteer_cpp
    for bad in (9, -1, 2**40):
        columns = torch.tensor([0, bad, 1])
        for op, limit in (
            ("topk_encode", (2, True)),
            ("threshold_encode", (x[0, :1], -1)),
            ("batch_topk_encode", (3,)),
        ):
            with pytest.raises((RuntimeError, ValueError, IndexError), match=str(bad)):
                getattr(call, op)(x, W, None, *limit, None, columns)
    with pytest.raises((RuntimeError, ValueError), match="contiguous"):
        call.topk_encode(x, torch.zeros(9, 12)[:, ::2], None, 2)


INTERPRETED = """
import torch
from clipsteer import ops

g = torch.Generator().manual_seed(0)
integers = lambda *shape: torch.randint(-2, 3, shape, generator=g).float()
x, W, b, s = integers(9, 20), integers(150, 20), integers(150), integers(150)
chosen, thresholds = torch.randperm(150, generator=g)[:100], integers(150) * 4 + 5

def check(name, W, b, **options):
    found = getattr(ops, name)(x, W, b, **options, backend="triton")
    expected = getattr(ops, name)(x, W, b, **options, backend="reference")
    parts = [(f.nan_to_num(nan=-1.0), e.nan_to_num(nan=-1.0)) for f, e in zip(found, expected)]
    assert all(torch.equal(f, e) for f, e in parts), (name, options)

for lying in (W, W.t().contiguous().t()):
    for scale in (None, s):
        for columns in (None, chosen):
            more = {"scale": scale, "columns": columns}
            for k in (7, 90):  # candidates of tiles, some of which are made again; whole rows
                check("topk_encode", lying, b, k=k, relu=k == 90, **more)
                check("topk_encode", lying, b, k=k, relu=k == 7, **more)
            check("threshold_encode", lying, b, threshold=torch.tensor(4.0), **more)
            check("threshold_encode", lying, b, threshold=thresholds, relu=False, **more)
            check("batch_topk_encode", lying, b, k=6.5, **more)
            spoiled = b.clone()
            spoiled[chosen[5]] = torch.nan
            check("batch_topk_encode", lying, spoiled, k=6.5, **more)
"""


@pytest.mark.slow
def test_triton_has_the_options_in_either_layout(interpret):
    interpret(INTERPRETED)
