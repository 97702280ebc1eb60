"""``testing.torture``: right selections pass without an alarm, planted bugs are each found by the case they are for."""

import json
import math

import pytest
import torch

from clipsteer import testing
from clipsteer.ops import sparse_decode, topk_encode
from clipsteer.testing import torture

STABLE = ["values descend", "ties to the lower index", "NaN is the largest", "indices in int64", "repeats bit for bit"]
OURS = ["values descend", "ties to the lower index", "a NaN makes its row NaN", "indices in int64",
        "repeats bit for bit"]  # fmt: skip


def stable(x, k):
    values, indices = torch.sort(x, dim=-1, descending=True, stable=True)
    return values[:, :k], indices[:, :k]


def of_key(x, k, key):
    """The k largest of a key, which is what bugs of comparison come to."""
    _, indices = torch.sort(key, dim=-1, descending=True, stable=True)
    return x.gather(-1, indices[:, :k]), indices[:, :k]


def last_tile_dropped(x, k, tile=64):
    whole = x.shape[1] // tile * tile
    return stable(x[:, :whole] if whole >= k else x, k)


def first_column_unseen(x, k):
    return of_key(x, k, torch.cat([torch.full_like(x[:, :1], -math.inf), x[:, 1:]], 1))


def bins_overflow(x, k, room=48):
    """Of each bin of the leading bits the first ``room`` alone are kept."""
    bins = x.view(torch.int32) >> 16
    same = (bins[:, :, None] == bins[:, None, :]).tril(-1).sum(-1) if x.shape[1] < 1500 else torch.zeros_like(bins)
    return of_key(x, k, torch.where((same < room) | (x.shape[1] <= 48 + k), x, -math.inf))


def lanes_hold_few(x, k, lane=32, room=6):
    """A thread keeps ``room`` of the columns that it strides over."""
    key = torch.full_like(x, -math.inf)
    for at in range(min(lane, x.shape[1])):
        own = x[:, at::lane]
        best = own.topk(min(room, own.shape[1])).indices
        key[:, at::lane] = key[:, at::lane].scatter(1, best, own.gather(1, best))
    return of_key(x, k, key) if x.shape[1] > lane * room else stable(x, k)


def tie_overflow(x, k, room=8):
    """Of what equals the k-th value ``room`` are written; what is left is column 0."""
    values, indices = stable(x, k)
    equal = (values == values[:, -1:]).cumsum(-1) > room
    return values, indices.masked_fill(equal, 0)


def one_wrong_index(x, k):
    values, indices = stable(x, k)
    if len(x) > 2 and x.shape[1] > k:
        indices = indices.clone()
        indices[2, -1] = torch.sort(x[2], descending=True, stable=True).indices[k]
    return values, indices


def absolute(x, k):
    return of_key(x, k, x.abs())


def unsigned_keys(x, k):
    """Negative numbers in the order of their bits."""
    return of_key(x, k, torch.where(x < 0, -1e30 / x.clamp(-1e30, -1e-30), x))


def half_precision(x, k):
    return of_key(x, k, x.bfloat16().float())


def flushed(x, k):
    return of_key(x, k, torch.where(x.abs() < torch.finfo(x.dtype).smallest_normal, 0.0, x))


def lowest_as_padding(x, k):
    """What is as small as padding is not taken, and its place stays at column 0."""
    values, indices = stable(x, k)
    lost = values <= torch.finfo(x.dtype).min
    return values, indices.masked_fill(lost, 0)


def nan_as_zero(x, k):
    return stable(x.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf), k)


def nan_spreads(x, k):
    values, indices = stable(x, k)
    return values + 0 * x.nan_to_num(posinf=0, neginf=0).sum() + (math.nan if x.isnan().any() else 0), indices


def threshold_of_the_row_before(x, k):
    """A row starts from the k-th value of the row before it."""
    values, indices = stable(x, k)
    for row in range(1, len(x)):
        if values[row, 0] < values[row - 1, -1]:
            indices[row], values[row] = torch.arange(k), 0.0
    return values, indices


def of_contiguous_memory(x, k):
    return stable(torch.as_strided(x, x.shape, (x.shape[1], 1)), k)


def offsets_of_32_bits(x, k):
    """Row offsets wrap around where they pass 2^31: here they land on the first row."""
    far = [row * x.stride(0) > 2**31 - 1 for row in range(len(x))]
    return stable(torch.stack([x[0] if beyond else row for beyond, row in zip(far, x)]), k) if len(x) else stable(x, k)


def unwritten(x, k):
    values, indices = stable(x, k)
    out = torch.empty_like(values)
    out[: len(x) - 1] = values[: len(x) - 1]
    return out if len(x) < 3 else torch.cat([values[:1], out[1:]]), indices


def in_place(x, k):
    result = stable(x, k)
    if x.numel():
        x[:, 0] = -math.inf
    return result


def too_few(x, k):
    return stable(x, min(k, 64))


def local_indices(x, k, tile=1024):
    values, indices = stable(x, k)
    return values, indices % tile


def past_the_end(x, k):
    """Reads on to a multiple of 4 behind the last row."""
    more = -(-x.shape[1] // 4) * 4 - x.shape[1]
    room = x.storage_offset() + x.numel() + more <= x.untyped_storage().nbytes() // x.element_size()
    if not (room and more and x.is_contiguous() and x.numel()):
        return stable(x, k)
    last = torch.as_strided(x, (1, x.shape[1] + more), (1, 1), x.storage_offset() + x.numel() - x.shape[1])
    values, indices = stable(last, k)
    before, places = stable(x[:-1], k)
    return torch.cat([before, values]), torch.cat([places, indices])


def signed_zero(x, k):
    """-0 below +0, as integer keys have it: equal values, another order."""
    return of_key(x, k, torch.where((x == 0) & x.signbit(), -1e-40, x))


def largest_capacity(x, k, room=2048):
    """Candidates beyond a buffer are lost, the largest among them."""
    threshold = stable(x, k)[0][:, -1:]
    late = (x >= threshold).cumsum(-1) > room
    return of_key(x, k, torch.where(late, -math.inf, x))


BUGS = {
    last_tile_dropped: "largest in the last tile",
    first_column_unseen: "a needle in every column",
    bins_overflow: "one bin holds everything",
    lanes_hold_few: "largest in one lane",
    tie_overflow: "more equal values than any capacity",
    one_wrong_index: "random",
    absolute: "negative rows",
    unsigned_keys: "every magnitude",
    half_precision: "larger in the last bit, behind a border",
    flushed: "denormals",
    lowest_as_padding: "lowest and largest finite numbers",
    nan_as_zero: "NaN",
    nan_spreads: "NaN",
    threshold_of_the_row_before: "rows of unlike size",
    of_contiguous_memory: "transposed in memory",
    offsets_of_32_bits: "rows 2^30 elements apart",
    unwritten: "random",
    in_place: "random",
    too_few: "k = n",
    local_indices: "largest in the last tile",
    past_the_end: "between infinities",
    largest_capacity: "the k-th value fills the row",
}


def failing(report):
    return {row.prop for row in report.rows if not row.passed}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_right_selections_raise_no_alarm(dtype):
    report = torture.topk(stable, promises=STABLE, dtypes=[dtype], sizes=[(3, 65, 7), (2, 700, 33)], seed=3)
    assert report, report
    assert min(row.cases for row in report.rows) > 0


def test_what_torch_promises():
    report = torture.topk(torch.topk, promises=["values descend", "NaN is the largest"], sizes=torture.SIZES[:4])
    assert report, report
    verdicts = {row.prop: row.verdict for row in report.rows}
    assert verdicts["NaN is the largest"] == "kept"
    assert verdicts["a NaN makes its row NaN"] == "not promised, not kept"


@pytest.mark.parametrize("seed", range(3))
def test_no_alarm_with_other_seeds_and_sizes(seed):
    def unsorted(x, k):
        values, indices = torch.topk(x, k, sorted=False)
        order = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
        return values[:, order], indices[:, order].int()

    report = torture.topk(unsorted, sizes=[(1, 2, 1), (1, 2, 2), (4, 63, 63), (3, 500, 17)], seed=seed)
    assert report, report
    assert "values descend" not in {row.prop for row in report.rows if row.worst == 0}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_planted_bugs_are_found_where_they_are_sought(bug):
    report = torture.topk(bug, cases=[BUGS[bug]])
    assert BUGS[bug] in failing(report), report
    row = next(row for row in report.rows if row.prop == BUGS[bug])
    assert row.where
    assert row.sizes in str(report)


def test_every_case_can_fail():
    def nothing(x, k):
        return torch.zeros(len(x), k, dtype=x.dtype) - 7, torch.arange(k).repeat(len(x), 1) * 0

    report = torture.topk(nothing, promises=list(torture.PROMISES), sizes=torture.SIZES[:4])
    seen = {row.prop for row in report.rows if row.prop not in torture.PROMISES}
    assert seen == set(torture.ROWS) | set(torture.LAYOUTS)
    assert failing(report) >= seen


@pytest.mark.parametrize(
    ("promise", "breaks"),
    [
        ("values descend", lambda x, k: tuple(t.flip(-1) for t in stable(x, k))),
        ("ties to the lower index", lambda x, k: (lambda v, i: (v, x.shape[1] - 1 - i))(*stable(x.flip(-1), k))),
        ("ties to the lower index", signed_zero),
        ("NaN is the largest", lambda x, k: of_key(x, k, x.masked_fill(x.isnan(), -math.inf))),
        ("NaN is the smallest", stable),
        ("a NaN makes its row NaN", stable),
        ("indices in int64", lambda x, k: (lambda v, i: (v, i.int()))(*stable(x, k))),
        ("repeats bit for bit", lambda x, k: torch.topk(x, k) if torch.rand(()) < 0.5 else stable(x, k)),
        ("a row alone gives the same", lambda x, k: stable(x, k) if len(x) > 1 else torch.topk(x, k)),
        ("shapes beyond 2^31 elements on meta", lambda x, k: (lambda v, i: (v, i[:1] if v.is_meta else i))(
            *stable(x, k)
        )),
    ],
)  # fmt: skip
def test_a_promise_that_is_broken_counts_only_for_who_made_it(promise, breaks):
    sizes = torture.SIZES[1:4:2]
    without = torture.topk(breaks, sizes=sizes)
    assert without, without
    row = next(row for row in without.rows if row.prop == promise)
    assert row.verdict == "not promised, not kept"
    held = torture.topk(breaks, promises=[promise], sizes=sizes)
    assert failing(held) == {promise}
    assert "NOT KEPT" in str(held)


def test_promises_that_others_make():
    def row_of_nan(x, k):
        values, indices = stable(x, k)
        return values.masked_fill(x.isnan().any(-1, keepdim=True), math.nan), indices

    def nan_last(x, k):
        left = torch.where(x.isnan(), -math.inf, x)
        indices = torch.sort(left.double() - x.isnan() * 1.0, descending=True, stable=True).indices
        number = torch.arange(x.shape[1]) + x.isnan() * x.shape[1]
        order = torch.sort(number.gather(-1, indices) // x.shape[1], stable=True).indices
        chosen = indices.gather(-1, order)[:, :k]
        return x.gather(-1, chosen), chosen

    sizes = torture.SIZES[:3]
    assert torture.topk(row_of_nan, promises=["a NaN makes its row NaN"], sizes=sizes)
    assert torture.topk(nan_last, promises=["NaN is the smallest"], sizes=sizes)


def test_the_failing_case_can_be_made_again():
    report = torture.topk(last_tile_dropped, sizes=[(3, 65, 7), (3, 257, 32)])
    row = next(row for row in report.rows if row.prop == "largest in the last tile")
    assert "x (3, 65), k 7" in row.sizes  # the smallest that shows it
    x, k = eval(row.again.split("=", 1)[1])
    assert not torch.equal(last_tile_dropped(x, k)[0], stable(x, k)[0])
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["passed"] is False
    assert data["machine"]["torch"] == torch.__version__
    assert {"verdict", "again", "promised"} <= data["rows"][0].keys()


def test_what_is_declined_is_no_fault():
    def up_to_64(x, k):
        if k > 64:
            raise NotImplementedError("k must be at most 64")
        return stable(x, k)

    report = torture.topk(up_to_64, refuses=(NotImplementedError,), sizes=torture.SIZES[:3])
    assert report, report
    row = next(row for row in report.rows if row.prop == "k = n")
    assert row.refused > 0
    assert row.cases > 0
    assert not torture.topk(up_to_64, sizes=torture.SIZES[:3])
    nothing = torture.topk(up_to_64, sizes=[(2, 100, 80)], refuses=(NotImplementedError,), cases=["random"])
    assert nothing.rows[0].verdict == "refused"


def plain_encoder(x, W, b, k):
    values, indices = stable(torch.nn.functional.linear(x, W, b), k)
    return values.relu(), indices


def encoder_bug(change):
    return lambda x, W, b, k: change(plain_encoder, x, W, b, k)


ENCODER_BUGS = {
    "product of integers": encoder_bug(lambda f, x, W, b, k: f(x, W, 0 * b, k)),
    "Gaussian product": encoder_bug(lambda f, x, W, b, k: f(x.bfloat16().float(), W.bfloat16().float(), b, k)),
    "features twice in the dictionary": encoder_bug(
        lambda f, x, W, b, k: (lambda v, i: (v, i % -(-len(W) // 2)))(*f(x, W, b, k))
    ),
    "NaN in a token": encoder_bug(lambda f, x, W, b, k: f(x.nan_to_num(), W, b, k)),
    "NaN in a feature": encoder_bug(
        lambda f, x, W, b, k: (lambda v, i: (v, i if W.isfinite().all() else 0 * i))(*f(x, W, b, k))
    ),
    "tokens of zeros": encoder_bug(
        lambda f, x, W, b, k: (lambda v, i: (v * x.any(-1, keepdim=True), i))(*f(x, W, b, k))
    ),
    "no active feature": encoder_bug(
        lambda f, x, W, b, k: (lambda v, i: (v, i.masked_fill(v == 0, 0)))(*f(x, W, b, k))
    ),
    "product of depth 1": encoder_bug(lambda f, x, W, b, k: f(x[:, 1:], W[:, 1:], b, k)),
    "transposed in memory": encoder_bug(
        lambda f, x, W, b, k: f(x, torch.as_strided(W, W.shape, (W.shape[1], 1)), b, k)
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ENCODER_BUGS)
def test_planted_bugs_of_encoders(case):
    report = torture.topk(ENCODER_BUGS[case], encoder=True, relu=True, cases=[case], sizes=torture.SIZES[:3])
    assert case in failing(report), report


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_our_encoders_keep_what_they_promise(backend):
    def ours(x, W_enc, b_enc, k):
        return topk_encode(x, W_enc, b_enc, k=k, backend=backend)

    report = torture.topk(ours, encoder=True, relu=True, promises=OURS, sizes=torture.SIZES[1:5:3])
    assert report, report
    assert not torture.topk(ours, encoder=True, cases=["negative rows"])  # its values are relu's


def test_relu_before_the_selection_is_right_too():
    def relu_first(x, W, b, k):
        return torch.nn.functional.linear(x, W, b).relu().topk(k)

    assert torture.topk(relu_first, encoder=True, relu=True, sizes=torture.SIZES[:3])


DECODERS = {
    "duplicates overwritten": lambda a, i, W: torch.zeros(len(a), len(W), dtype=W.dtype).scatter_(1, i, a) @ W,
    "the last activation dropped": lambda a, i, W: torch.einsum("bk,bkd->bd", a[:, :-1], W[i[:, :-1]]),
    "bfloat16 sums": lambda a, i, W: torch.einsum("bk,bkd->bd", a.bfloat16(), W.bfloat16()[i]).to(W.dtype),
    "the dense product": lambda a, i, W: torch.zeros(len(a), len(W), dtype=W.dtype).scatter_add_(1, i, a) @ W,
    "offsets of 32 bits": lambda a, i, W: torch.einsum(
        "bk,bkd->bd", a, W[torch.where(i * W.stride(0) > 2**31 - 1, 0, i)]
    ),
    "transposed memory": lambda a, i, W: torch.einsum(
        "bk,bkd->bd", a, torch.as_strided(W, W.shape, (W.shape[1], 1))[i]
    ),
    "negative activations lost": lambda a, i, W: torch.einsum("bk,bkd->bd", a.relu(), W[i]),
}  # fmt: skip
FOUND_BY = {
    "duplicates overwritten": "duplicated indices",
    "the dense product": "NaN where nobody reads",
    "bfloat16 sums": "Gaussian",
    "offsets of 32 bits": "features beyond 2^31 elements",
    "transposed memory": "transposed in memory",
}


@pytest.mark.parametrize("bug", DECODERS)
def test_planted_bugs_of_decoders(bug):
    report = torture.sparse_decode(DECODERS[bug])
    assert FOUND_BY.get(bug, "integers") in failing(report), report


def test_right_decoders_raise_no_alarm():
    def bags(acts, indices, W_dec):
        return torch.nn.functional.embedding_bag(indices, W_dec, per_sample_weights=acts, mode="sum")

    def ours(acts, indices, W_dec):
        return sparse_decode(acts, indices, W_dec, backend="cpp")

    for decode in (bags, ours):
        report = torture.sparse_decode(
            decode, promises=["repeats bit for bit"], dtypes=[torch.float32, torch.bfloat16], seed=1
        )
        assert report, report
    unsteady = torture.sparse_decode(
        lambda a, i, W: bags(a, i, W) * (1 + 1e-7 * torch.rand(())), promises=["repeats bit for bit"]
    )
    assert "repeats bit for bit" in failing(unsteady)


def test_wrong_calls():
    with pytest.raises(ValueError, match="promise must be one of"):
        torture.topk(stable, promises=["speed"])
    with pytest.raises(ValueError, match="case must be one of"):
        torture.topk(stable, cases=["randon"])
    with pytest.raises(ValueError, match="case must be one of"):
        torture.rows("randon", 1, 2, 1)
    with pytest.raises(ValueError, match="1 <= k <= n"):
        torture.rows("random", 1, 2, 3)
    with pytest.raises(ValueError, match="promise must be"):
        torture.sparse_decode(lambda a, i, W: a, promises=["speed"])
    report = torture.topk(lambda x, k: stable(x, k)[0], cases=["random"])
    assert "expected (values, indices)" in str(report)
    assert testing.torture is torture
