"""Remembered calls: the same bits, the same errors, and next to no Python."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from clipsteer import ops
from clipsteer.ops import REGISTRY, _calls, _dispatch
from clipsteer.ops._spec import OpSpec, Ran, cotangents, run

pytestmark = pytest.mark.skipif(_dispatch.missing("cpp") is not None, reason="the C++ library is not built")


def drawn(spec: OpSpec, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return spec.make(spec.small_shape, dtype, torch.Generator().manual_seed(seed))


def kinds() -> Counter[str]:
    """How many kinds of calls of all ops have been met once, are made in full, and are remembered."""
    names = {id(_calls._SEEN): "seen", id(_calls._FULL): "in full"}
    return Counter(names.get(id(plan), "remembered") for plans in _calls._PLANS for plan in plans.values())


def compared(a: Ran, b: Ran) -> None:
    for x, y in zip(a.outputs, b.outputs, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
    assert a.gradients.keys() == b.gradients.keys()
    for leaf, grad in a.gradients.items():
        torch.testing.assert_close(grad, b.gradients[leaf], rtol=0, atol=0, equal_nan=True)


def events(function: Any) -> int:
    """Calls of Python's and of C's functions in a call: work that does not depend on the machine."""
    seen = []
    sys.setprofile(lambda frame, event, arg: seen.append(event))
    try:
        function()
    finally:
        sys.setprofile(None)
    return sum(event.endswith("call") for event in seen) - 1  # but for setprofile's own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("with_grad", [False, True], ids=["inference", "gradients"])
@pytest.mark.parametrize("name", REGISTRY)
def test_a_remembered_call_is_the_call_in_full_bit_for_bit(name, with_grad, dtype):
    spec = REGISTRY[name]

    def called(seed: int) -> Ran:
        inputs = drawn(spec, seed, dtype)
        given = partial(cotangents, dtype=dtype, generator=torch.Generator().manual_seed(seed))
        return run(spec.function, inputs, spec.leaves(inputs) if with_grad else [], given)

    in_full = []
    for seed in range(4):
        _calls.forget()
        in_full.append(called(seed))
    _calls.forget()
    for seed in range(4):
        compared(called(seed), in_full[seed])
    found = kinds()  # jumprelu_encode calls threshold_encode, once before it is recorded itself
    assert found["remembered"] == 1
    assert not found["in full"]


# what is torch's operations around a low-level op, or a list of sparse scores
IN_PARTS = {"clip_loss", *(name for name in REGISTRY if name.endswith("_sparse"))}

# what has no gradient, and so nothing around its kernel
STATISTICS = {"semantic_drift", "concept_distances"}


@pytest.mark.parametrize("name", REGISTRY)
def test_a_remembered_call_is_next_to_no_python(name):
    """Calls of functions, which do not depend on the machine: 20 to 41 where 88 to 209 are made in full."""
    spec = REGISTRY[name]
    _calls.forget()
    inputs = drawn(spec, 0)
    for _ in range(3):
        spec.function(**inputs)
    most = 70 if name in IN_PARTS else 28 if name in STATISTICS else 45
    assert events(lambda: spec.function(**inputs)) <= most


def test_errors_are_those_of_the_call_in_full():
    """What a kind does not show, and a kernel or a step has to see: the values of numbers of rows, features and
    groups, and of a temperature."""
    x, W = torch.randn(3, 8), torch.randn(20, 8)
    acts, indices, offsets = torch.rand(3, 2), torch.randint(0, 20, (3, 2)), torch.tensor([0, 2, 3, 6])
    C, groups = torch.randn(4, 8, 8), torch.tensor([0, 3, 1])
    factor, labels = torch.randn(4, 8, 8), torch.tensor([0, -1, 3])
    columns, tau = torch.arange(12), torch.tensor(0.1)
    sides = ops.SparseScores(torch.rand(5), torch.tensor([0, 2, 1, 0, 3]), torch.tensor([0, 2, 4, 5]), 4)
    beyond = sides._replace(indices=torch.tensor([0, 2, 1, 0, 4]))
    later = sides._replace(offsets=torch.tensor([1, 2, 4, 5]))
    first = torch.tensor([1, 2, 3, 6])
    down = torch.tensor([0, 3, 2, 6])
    below = torch.tensor([[0, 0], [0, 0], [0, -1]])
    values, numbers = acts.view(-1), indices.view(-1)
    features = (x, -x, x + 1, x)
    cases: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]] = [
        (ops.sparse_decode, (acts, indices, W), {}, [(acts, indices + 20, W), (acts, below, W)]),
        (ops.ragged_decode, (values, numbers, offsets, W), {}, [
            (values, below.view(-1), offsets, W), (values, numbers, first, W), (values, numbers, down, W),
        ]),
        (ops.conceptor_project, (x, C, groups), {}, [(x, C, groups + 1), (x, C, groups - 1)]),
        (ops.mahalanobis_covariance_loss, (x, -x, labels, factor), {}, [
            (x, -x, labels + 1, factor), (x, -x, labels - 1, factor),
        ]),
        (partial(ops.topk_encode, k=2), (x, W), {"columns": columns}, [{"columns": columns + 9}]),
        (partial(ops.threshold_encode, threshold=0.5), (x, W), {"columns": columns}, [{"columns": columns - 1}]),
        (partial(ops.batch_topk_encode, count=5), (x, W), {"columns": columns}, [{"columns": columns + 9}]),
        (ops.drrho_loss, (x, -x), {"temperature": tau}, [{"temperature": -tau}]),
        (ops.clip_loss, (x, -x), {"logit_scale": tau}, [{"logit_scale": 0 * tau}]),
        (partial(ops.distill_loss, logit_scale=2.0), features, {"teacher_logit_scale": tau}, [
            {"teacher_logit_scale": -tau},
        ]),
        (ops.generalised_rand_index, (sides, x), {}, [(beyond, x), (later, x)]),
        (ops.concept_distances, (sides, x), {}, [(beyond, x), (later, x)]),
    ]  # fmt: skip
    for function, args, named, wrong in cases:
        for _ in range(3):
            function(*args, **named)
        for bad in wrong:
            given, options = (bad, named) if isinstance(bad, tuple) else (args, bad)
            with pytest.raises(ValueError) as found:  # and no IndexError, which is the kernels' own
                function(*given, **options)
            assert found.value.__context__ is None
        function(*args, **named)  # and the good ones go on


def test_what_is_not_of_the_tensors_is_of_the_kind(monkeypatch):
    x, W = torch.randn(3, 8), torch.randn(20, 8)
    encode = partial(ops.topk_encode, x, W, k=2)
    for _ in range(3):
        encode()
    with pytest.raises(TypeError, match="k must be an int, got bool"):
        ops.topk_encode(x, W, k=True)
    with pytest.raises(TypeError, match="must be of x's dtype"):
        ops.topk_encode(x, W.double(), k=2)
    monkeypatch.setenv("CLIPSTEER_BACKEND", "nothing")
    with pytest.raises(ValueError, match="backend must be one of"):
        encode()
    monkeypatch.setenv("CLIPSTEER_BACKEND", "")
    encode()
    with torch.autocast("cpu", torch.bfloat16):
        assert encode()[0].dtype == torch.bfloat16
    assert encode()[0].dtype == torch.float32
    W.requires_grad_()
    assert encode()[0].grad_fn is not None
    with torch.no_grad():
        assert encode()[0].grad_fn is None
    with torch.inference_mode():
        assert encode()[0].is_inference()
    each = torch.func.vmap(lambda row: ops.topk_encode(row[None], W, k=2)[0][0])(x)
    torch.testing.assert_close(each, encode()[0])
    tangent = torch.func.jvp(lambda W: ops.topk_encode(x, W, k=2)[0], (W.detach(),), (torch.ones_like(W),))[1]
    assert tangent.abs().max() > 0
    with pytest.raises(TypeError, match="W_enc must be a tensor, got list"):
        ops.topk_encode(x, [[1.0]], k=2)


def test_one_tensor_in_two_places():
    """It does not show what went where, so that its call teaches nothing."""
    a, b = torch.randn(4, 8), torch.randn(4, 8)
    _calls.forget()
    for _ in range(3):
        ops.siglip_loss(a, a, logit_scale=3.0)
    loss = ops.siglip_loss(a, b, logit_scale=3.0)
    torch.testing.assert_close(loss, ops.siglip_loss_reference(a, b, logit_scale=3.0))


def test_kinds_are_bounded(monkeypatch):
    """Ragged codes have another number of values each time: what never comes again is not recorded, nor kept."""
    monkeypatch.setattr(_calls, "_MOST", 7)
    W = torch.randn(20, 8)
    for m in range(30):
        ops.ragged_decode(torch.rand(m), torch.randint(0, 20, (m,)), torch.tensor([0, m]), W)
        assert kinds().total() <= 7
    assert kinds().keys() == {"seen"}


def test_threads_at_once():
    """Each call gets its own result, whichever is recorded meanwhile."""
    _calls.forget()
    wrong: list[Tensor] = []

    def work(seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        for _ in range(40):
            B = int(torch.randint(1, 5, (), generator=g))
            acts, W = torch.rand(B, 3, generator=g), torch.randn(30, 6, generator=g)
            indices = torch.randint(0, 30, (B, 3), generator=g)
            x_hat = ops.sparse_decode(acts, indices, W)
            truth = ops.sparse_decode_reference(acts, indices, W)
            if not torch.allclose(x_hat, truth, rtol=1e-4, atol=1e-5):
                wrong.append(x_hat)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_options_of_the_gradient_are_remembered_too():
    acts, W = torch.rand(3, 2), torch.randn(20, 8, requires_grad=True)
    indices = torch.randint(0, 20, (3, 2))
    buffer = torch.empty(20, 8)
    for _ in range(4):
        W.grad = None
        ops.sparse_decode(acts, indices, W, grad_buffer=buffer).sum().backward()
        assert W.grad.data_ptr() == buffer.data_ptr()
    for _ in range(4):
        W.grad = None
        ops.sparse_decode(acts, indices, W, sparse_grad=True).sum().backward()
        assert W.grad.is_sparse


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["threshold_encode", "jumprelu_encode"])
def test_an_encoder_with_thresholds_is_one_operator(name, dtype):
    """What is made of thresholds, and of codes by them, is bit for bit what torch's operations make of them where there
    is a gradient: with NaN, ties and padding."""
    op = getattr(ops, name)
    g = torch.Generator().manual_seed(0)
    for case in range(12):
        B, d, n = (int(torch.randint(1, most, (), generator=g)) for most in (7, 40, 70))
        x, W = (torch.randint(-4, 5, size, generator=g).to(dtype) / 4 for size in ((B, d), (n, d)))
        b = torch.randn(n, generator=g).to(dtype).round() / 4
        if case % 4 == 0:
            x[0, 0] = float("nan")
        threshold = (torch.randn((n,) if case % 2 else (), generator=g).to(dtype) * 4).round() / 8
        options = {"relu": bool(case % 3)} if name == "threshold_encode" else {"bandwidth": (0.1, 0.25, 0.37)[case % 3]}
        threshold = threshold if name == "threshold_encode" else threshold.abs()
        options |= {"capacity": (None, 3, 200)[case // 3 % 3], "backend": "cpp"}
        for _ in range(3):
            plain = op(x, W, b, threshold=threshold, **options)
            in_parts = op(x.clone().requires_grad_(), W, b, threshold=threshold, **options)
            for one, other in zip(plain, in_parts, strict=True):
                torch.testing.assert_close(one, other.detach(), rtol=0, atol=0, equal_nan=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        op(x, W, b, threshold=threshold, **options)
    elementwise = {"aten::sub", "aten::clamp_min", "aten::where", "aten::le", "aten::gather"}
    assert not elementwise & {event.key for event in seen.key_averages()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_jumprelu_without_a_gradient_is_jumprelu(dtype):
    """Bit for bit, with what is not finite and what lies on a threshold among it."""
    pre = torch.randn(300, dtype=torch.float64).to(dtype)
    pre[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
    threshold = torch.rand(300).to(dtype)
    pre[10:20] = threshold[10:20]
    for above in (None, torch.rand(300) < 0.5):
        plain = ops.jumprelu(pre, threshold, 0.25, above)
        with_grad = ops.jumprelu(pre.requires_grad_(), threshold.requires_grad_(), 0.25, above)
        for a, b in zip(plain, with_grad, strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=0, atol=0, equal_nan=True)
        pre, threshold = pre.detach(), threshold.detach()
