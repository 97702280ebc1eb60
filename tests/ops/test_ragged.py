"""Ragged codes beyond what the registry's properties see: screening, capacity, rows with a NaN, prefixes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clipsteer import ops, testing

needs_cpp = pytest.mark.skipif(not testing.supported("cpp"), reason="the C++ library is not built")


def integers(seed: int, *shape: int) -> Tensor:
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def dense(codes: ops.SparseCodes, n: int) -> Tensor:
    """(B, n): the values where a code is, elsewhere -inf."""
    rows = len(codes.offsets) - 1
    out = torch.full((rows + 1, n), -torch.inf, dtype=codes.values.dtype)
    out[ops.code_rows(codes), codes.indices] = codes.values
    return out[:-1]


@needs_cpp
@pytest.mark.parametrize("kind", ["one", "one a feature", "negative", "infinite", "not a number"])
def test_a_screened_threshold_is_exact(kind):
    # large enough to be screened in int8, where the processor can
    x, W, b = integers(0, 70, 130), integers(1, 4100, 130), integers(2, 4100)
    threshold = torch.tensor(40.0)
    if kind != "one":
        threshold = integers(3, 4100) * 20 + (60 if kind == "one a feature" else 0)
    if kind == "infinite":
        threshold[::2], threshold[1::4] = torch.inf, -torch.inf
    if kind == "not a number":
        threshold[::3] = torch.nan
    relu = kind != "negative"
    found = ops.threshold_encode(x, W, b, threshold=threshold, relu=relu, backend="cpp")
    expected = ops.threshold_encode(x, W, b, threshold=threshold, relu=relu, backend="reference")
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert len(found.values) > 0


@needs_cpp
@pytest.mark.parametrize("count", [1, 70, 1000, 4099, 150_000, 70 * 4100 + 9])
def test_a_screened_batch_is_exact_ties_included(count):
    x, W, b = integers(0, 70, 130), integers(1, 4100, 130), integers(2, 4100)
    x[7] *= 3  # one row takes more than its share
    found = ops.batch_topk_encode(x, W, b, count=count, backend="cpp")
    expected = ops.batch_topk_encode(x, W, b, count=count, backend="reference")
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("backend", [b for b in ("reference", "cpp") if testing.supported(b)])
@pytest.mark.parametrize("shape", [(5, 9, 40), (70, 130, 4100)])
def test_a_row_with_a_nan_does_not_crowd_others_out(backend, shape):
    B, d, n = shape
    x, W = integers(4, B, d), integers(5, n, d)
    x[:, 0] = 1
    x[2] *= 1000
    x[2, 0] = 0
    W[n - 1, 0] = torch.inf  # the last feature is no number in row 2 alone, when its others have been seen
    others = torch.arange(B) != 2
    expected = ops.batch_topk_encode(x[others], W, count=3 * B - 1, backend=backend)
    kept = dense(ops.batch_topk_encode(x, W, count=3 * B, backend=backend), n)
    assert torch.equal(kept[others], dense(expected, n))
    assert kept[2].isnan().nonzero().flatten().tolist() == [0]
    assert bool((kept[2, 1:] == -torch.inf).all())


@pytest.mark.parametrize("backend", [b for b in ("reference", "cpp") if testing.supported(b)])
def test_too_little_room_is_told_and_the_first_codes_are_kept(backend):
    x, W = integers(6, 9, 12), integers(7, 30, 12)
    whole = ops.threshold_encode(x, W, threshold=1.0, backend=backend)
    assert int(whole.offsets[-1]) == len(whole.values)
    for room in (0, 5, len(whole.values), len(whole.values) + 4):
        codes = ops.threshold_encode(x, W, threshold=1.0, capacity=room, backend=backend)
        there = min(room, len(whole.values))
        assert len(codes.values) == room
        assert torch.equal(codes.offsets, whole.offsets)
        assert torch.equal(codes.values[:there], whole.values[:there])
        assert torch.equal(codes.indices[:there], whole.indices[:there])
        assert not codes.values[there:].any()
        assert bool(codes.offsets[-1] > room) == (room < len(whole.values))
        # what is missing is missing from the reconstruction, and nothing else is read
        x_hat = ops.ragged_decode(*codes, W, backend=backend)
        code = dense(whole, 30).clamp_min(0)
        code[ops.code_rows(whole)[there:], whole.indices[there:]] = 0
        assert torch.equal(x_hat, code @ W)


@pytest.mark.parametrize("backend", [b for b in ("reference", "cpp") if testing.supported(b)])
def test_prefixes_are_the_decodes_of_cut_dictionaries(backend):
    W = torch.randn(40, 33, generator=torch.Generator().manual_seed(0))
    codes = ops.batch_topk_encode(torch.randn(11, 33, generator=torch.Generator().manual_seed(1)), W, count=90)
    b = torch.randn(33, generator=torch.Generator().manual_seed(2))
    prefixes = (1, 7, 8, 31, 40)
    together = ops.ragged_decode(*codes, W, b, prefixes=prefixes, backend=backend)
    assert together.shape == (5, 11, 33)
    for prefix, x_hat in zip(prefixes, together):
        kept = torch.where(codes.indices < prefix, codes.values, 0)
        assert torch.equal(x_hat, ops.ragged_decode(kept, codes.indices, codes.offsets, W, b, backend=backend))
    assert torch.equal(together[-1], ops.ragged_decode(*codes, W, b, backend=backend))


@pytest.mark.parametrize("backend", [b for b in ("reference", "cpp") if testing.supported(b)])
def test_prefixes_of_codes_in_any_order(backend):
    """As top-k gives them, by value: the features of the first prefix are found wherever they stand."""
    g = torch.Generator().manual_seed(0)
    W, b = torch.randn(40, 33, generator=g), torch.randn(33, generator=g)
    acts, indices = torch.randn(2, 6, 9, generator=g), torch.randint(40, (2, 6, 9), generator=g)
    prefixes = (1, 7, 8, 31, 40)
    together = ops.sparse_decode(acts, indices, W, b, prefixes=prefixes, backend=backend)
    assert together.shape == (5, 2, 6, 33)
    codes = acts.flatten(), indices.flatten(), torch.arange(13) * 9
    ragged = ops.ragged_decode(*codes, W, b, prefixes=prefixes, backend=backend)
    assert torch.equal(ragged, together.flatten(1, 2))
    for prefix, x_hat in zip(prefixes, together):
        kept = torch.where(indices < prefix, acts, 0)
        torch.testing.assert_close(x_hat, ops.sparse_decode(kept, indices, W, b, backend=backend))
    order = indices.argsort(dim=-1, stable=True)
    acts, indices = acts.gather(-1, order), indices.gather(-1, order)
    again = ops.sparse_decode(acts, indices, W, b, prefixes=prefixes, backend=backend)
    torch.testing.assert_close(again, together)
    one = ops.sparse_decode(acts[0, 0], indices[0, 0], W, b, prefixes=prefixes, backend=backend)
    assert torch.equal(one, again[:, 0, 0])


@pytest.mark.parametrize("backend", [b for b in ("reference", "cpp") if testing.supported(b)])
@pytest.mark.parametrize("prefixes", [None, (3, 20)])
def test_sparse_decode_takes_ragged_codes(backend, prefixes):
    codes = torch.randn(12), torch.arange(12) % 20, torch.tensor([0, 5, 5, 10])
    W, b = torch.randn(20, 7, requires_grad=True), torch.randn(7)
    found = ops.sparse_decode(*codes[:2], W, b, offsets=codes[2], prefixes=prefixes, backend=backend)
    expected = ops.ragged_decode(*codes, W, b, prefixes=prefixes, backend=backend)
    assert torch.equal(found, expected)
    d_found, d_expected = (torch.autograd.grad(t.square().sum(), W)[0] for t in (found, expected))
    assert torch.equal(d_found, d_expected)
    by_reference = ops.sparse_decode_reference(*codes[:2], W, b, offsets=codes[2], prefixes=prefixes)
    torch.testing.assert_close(found, by_reference)


@needs_cpp
@pytest.mark.parametrize("strict", [False, True])
def test_ragged_codes_of_any_number_are_exported(strict):
    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W = torch.nn.Parameter(torch.randn(20, 7))

        def forward(self, values: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
            return ops.sparse_decode(values, indices, self.W, offsets=offsets, prefixes=(3, 20))

    def codes(B: int, each: int) -> tuple[Tensor, Tensor, Tensor]:
        return torch.randn(B * each), torch.arange(B * each) % 20, torch.arange(B + 1) * each

    module, dynamic = Decoder(), torch.export.Dim.DYNAMIC
    dims = ({0: dynamic}, {0: dynamic}, {0: dynamic})
    program = torch.export.export(module, codes(6, 4), dynamic_shapes=dims, strict=strict).module()
    for given in (codes(2, 7), codes(11, 3)):
        assert torch.equal(program(*given), module(*given))


@needs_cpp
@pytest.mark.parametrize("dim", ["values", "dictionary", "all codes"])
def test_ragged_codes_under_vmap(dim):
    g = torch.Generator().manual_seed(0)
    values, W = torch.randn(3, 12, generator=g), torch.randn(3, 20, 7, generator=g)
    indices = torch.randint(20, (3, 12), generator=g)
    offsets = torch.tensor([[0, 5, 5, 12], [0, 0, 12, 12], [0, 3, 6, 9]])
    dims = {"values": (0, None, None, None), "dictionary": (None, None, None, 0), "all codes": (0, 0, 0, None)}[dim]
    given = [t[0] if d is None else t for t, d in zip((values, indices, offsets, W), dims)]

    def loss(values: Tensor, indices: Tensor, offsets: Tensor, W: Tensor) -> Tensor:
        x_hat = ops.sparse_decode(values, indices, W, offsets=offsets, prefixes=(6, 20))
        return x_hat.square().sum()

    arguments = (0, 3)
    found = torch.func.vmap(torch.func.grad(loss, argnums=arguments), in_dims=dims)(*given)
    for v in range(3):
        alone = torch.func.grad(loss, argnums=arguments)(*(g if d is None else g[v] for g, d in zip(given, dims)))
        for together, one in zip(found, alone):
            torch.testing.assert_close(together[v], one)


@needs_cpp
def test_ragged_codes_of_equal_length_decode_to_the_bit_as_top_k_ones():
    g = torch.Generator().manual_seed(0)
    W = torch.randn(500, 96, generator=g).requires_grad_()
    x = torch.randn(64, 96, generator=g)
    acts, indices = ops.topk_encode(x, W.detach(), k=8)
    order = indices.argsort(-1)
    acts, indices = acts.gather(-1, order), indices.gather(-1, order)
    values, offsets = acts.flatten(), torch.arange(0, 64 * 8 + 1, 8)
    x_hat = ops.sparse_decode(acts, indices, W)
    ragged = ops.ragged_decode(values, indices.flatten(), offsets, W)
    assert torch.equal(ragged, x_hat)
    expected = torch.autograd.grad(x_hat.square().sum(), W)[0]
    assert torch.equal(torch.autograd.grad(ragged.square().sum(), W)[0], expected)


@needs_cpp
@pytest.mark.parametrize("op", ["threshold_encode", "batch_topk_encode", "ragged_decode"])
def test_row_sparse_gradients_equal_the_dense_one(op):
    g = torch.Generator().manual_seed(0)
    x, values = torch.randn(13, 24, generator=g), torch.randn(40, generator=g)
    indices, offsets = torch.arange(40) % 20, torch.tensor([0, 20, 20, 40])

    def loss(W: Tensor, sparse: bool) -> Tensor:
        if op == "ragged_decode":
            return ops.ragged_decode(values, indices, offsets, W, sparse_grad=sparse).square().sum()
        limit = {"threshold": 9.0} if op == "threshold_encode" else {"count": 39}
        return getattr(ops, op)(x, W, **limit, sparse_grad=sparse).values.square().sum()

    W = torch.randn(100, 24, generator=g).requires_grad_()
    (fresh,) = torch.autograd.grad(loss(W, False), W)
    (rows,) = torch.autograd.grad(loss(W, True), W)
    assert rows.is_sparse
    assert rows._nnz() < 100
    assert torch.equal(rows.to_dense(), fresh)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(loss(W, True), W, create_graph=True)


def mistakes():
    x, W = torch.zeros(4, 6), torch.zeros(9, 6)
    codes = torch.zeros(3), torch.zeros(3, dtype=torch.int64), torch.tensor([0, 1, 3])
    yield ValueError, r"x must be of shape \(B, d_in = 6\)", lambda: ops.threshold_encode(x[:, :5], W, threshold=0.0)
    yield ValueError, "threshold must be a number or", lambda: ops.threshold_encode(x, W, threshold=torch.zeros(4))
    yield ValueError, "capacity must be None or", lambda: ops.threshold_encode(x, W, threshold=0.0, capacity=-1)
    yield TypeError, "count must be an int", lambda: ops.batch_topk_encode(x, W, count=2.5)
    yield ValueError, "count must be at least 0", lambda: ops.batch_topk_encode(x, W, count=-2)
    yield ValueError, "prefixes must ascend", lambda: ops.ragged_decode(*codes, W, prefixes=(3, 3, 9))
    yield ValueError, "prefixes must ascend", lambda: ops.ragged_decode(*codes, W, prefixes=(3, 8))
    acts, indices = torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.int64)
    yield ValueError, "prefixes must ascend", lambda: ops.sparse_decode(acts, indices, W, prefixes=(9, 3))
    yield ValueError, "prefixes must ascend", lambda: ops.sparse_decode(acts, indices, W, prefixes=())
    yield ValueError, "offsets must be ascending", lambda: ops.ragged_decode(*codes[:2], codes[2].flip(0) - 3, W)
    yield ValueError, "offsets must be from 0", lambda: ops.ragged_decode(*codes[:2], codes[2] + 1, W)
    yield ValueError, r"offsets must be of shape \(B \+ 1,\)", lambda: ops.ragged_decode(*codes[:2], codes[2][:0], W)
    yield (
        ValueError,
        r"acts must be of indices' shape \(m,\)",
        lambda: ops.sparse_decode(acts, indices, W, offsets=codes[2]),
    )
    yield TypeError, "offsets must be int64", lambda: ops.sparse_decode(*codes[:2], W, offsets=codes[2].int())
    yield (
        RuntimeError,
        "no kernel for sparse_decode_prefixes",
        lambda: ops.sparse_decode(acts, indices, W, prefixes=(3, 9), backend="cuda"),
    )
    yield ValueError, r"indices must be in \[0, 9\)", lambda: ops.ragged_decode(codes[0], codes[1] + 9, codes[2], W)
    yield ValueError, r"values must be of indices' shape", lambda: ops.ragged_decode(codes[0][:2], *codes[1:], W)
    yield (
        RuntimeError,
        "need a compiled backend",
        lambda: ops.batch_topk_encode(x, W, count=2, sparse_grad=True, backend="reference"),
    )


@pytest.mark.parametrize("number", range(len(list(mistakes()))))
def test_mistakes_are_named(number):
    error, message, call = list(mistakes())[number]
    with pytest.raises(error, match=message):
        call()


@needs_cpp
def test_kernels_check_offsets_and_rows_themselves():
    values, W = torch.ones(4), torch.ones(9, 6)
    call = torch.ops.clipsteer_cpp
    indices = torch.zeros(4, dtype=torch.int64)
    with pytest.raises((RuntimeError, ValueError), match="ascending offsets"):
        call.ragged_decode(values, indices, torch.tensor([0, 3, 1, 4]), W, None, [9])
    for bad in (6, -2, 2**40):
        row = torch.tensor([0, 1, bad, 2])
        with pytest.raises((RuntimeError, IndexError), match=str(bad)):
            call.ragged_dot(torch.ones(6, 6), row, indices, W)
        with pytest.raises((RuntimeError, IndexError), match=str(bad)):
            call.ragged_outer(values, indices, row, torch.ones(6, 6), 9)


CROWDED = """
import torch
from clipsteer import ops
from clipsteer.kernels import batch_topk_encode, threshold_encode

# one-hot rows of x pick a row of the table: its pre-activations are those values, exactly
n, generator = 200, torch.Generator().manual_seed(0)
table = torch.randint(-9, 9, (12, n), generator=generator).float()
table[1, 64:128] += 100  # all winners in one tile of 64
table[2] = 7.0  # ties throughout
table[3] = -table[3].abs()
table[4, ::3] = torch.inf
table[5, 70] = torch.nan
table[6] = 0.0
table[7, 3] = 1e-45  # the least positive number there is
x, W = torch.eye(12), table.nan_to_num(nan=0.0, posinf=1e30).T.contiguous()
bias = torch.zeros(n)

def same(found, expected):
    assert all(torch.equal(a.nan_to_num(nan=-1.0), b.nan_to_num(nan=-1.0)) for a, b in zip(found, expected))

for count in (5, 100, 700):
    found = batch_topk_encode.batch_topk_encode(x, W, bias, count)
    same(found, ops.batch_topk_encode(x, W, bias, count=count, backend="reference"))
for limit in (torch.tensor([6.0]), torch.tensor([0.0]), torch.randint(0, 9, (n,), generator=generator).float()):
    for room in (-1, 30):
        found = threshold_encode.threshold_encode(x, W, bias, limit, room)
        expected = ops.threshold_encode(
            x, W, bias, threshold=limit.squeeze(), capacity=None if room < 0 else room, backend="reference"
        )
        same(found, expected)
bias[3] = torch.nan
same(batch_topk_encode.batch_topk_encode(x, W, bias, 30), ops.batch_topk_encode(x, W, bias, count=30))
found = threshold_encode.threshold_encode(x, W, bias, torch.tensor([2.0]), -1)
same(found, ops.threshold_encode(x, W, bias, threshold=2.0))
assert threshold_encode.EMITTED < 64
"""


def test_crowded_tiles_are_multiplied_again(interpret):
    """More codes in a tile than are emitted of it, ties across the limit, infinities, rows with a NaN."""
    interpret(CROWDED)
