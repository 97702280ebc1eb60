"""A kept buffer never changes a gradient: whatever stands between it and the parameter, and whoever holds on to it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clipsteer import ops, testing

pytestmark = pytest.mark.skipif(not testing.supported("cpp"), reason="the C++ library is not built")

N, D, K = 40, 12, 3
# the parameter's shape, and the dictionary (N, D) as it is made of it
VIEWS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "itself": ((N, D), lambda p: p),
    "squeeze": ((1, N, D), lambda p: p.squeeze(0)),
    "index": ((2, N, D), lambda p: p[1]),
    "flat": ((N * D,), lambda p: p.view(N, D)),
    "part of flat": ((N * D + 5,), lambda p: p[5:].view(N, D)),
    "transposed": ((D, N), lambda p: p.T),
    "reversed and back": ((N, D), lambda p: p.view(-1).view(N, D)),
    "expanded": ((1, D), lambda p: p.expand(N, D)),
    "times two": ((N, D), lambda p: p * 2),
}
# where the buffer's memory comes from
BUFFERS: dict[str, Callable[[], Tensor]] = {
    "own": lambda: torch.full((N, D), float("nan")),
    "a slice": lambda: torch.zeros(3, N, D)[1],
    "a view": lambda: torch.zeros(N * D).view(N, D),
    "numpy's": lambda: torch.from_numpy(torch.zeros(N, D).numpy().copy()),
}


def uses(x: Tensor, W: Tensor, how: str, buffer: Tensor | None) -> Tensor:
    """A loss that takes the dictionary in so many ways, all with the same buffer."""
    total = x.new_zeros(())
    acts = torch.linspace(1, 2, x.shape[0] * K).view(-1, K)
    indices = torch.arange(x.shape[0] * K).view(-1, K) % N
    for use in how:
        if use == "e":
            total = total + ops.topk_encode(x, W, k=K, grad_buffer=buffer)[0].square().mean()
        elif use == "d":
            total = total + ops.sparse_decode(acts, indices, W, grad_buffer=buffer).sin().sum()
        else:  # the dictionary without a buffer
            total = total + (x @ W.T).cos().mean()
    return total


@dataclass
class Run:
    """Steps of training with or without a buffer, and every gradient that could be seen on the way."""

    view: str
    buffer: Tensor | None
    seen: list[Tensor] = field(default_factory=list)
    kept: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        shape, self.dictionary = VIEWS[self.view]
        generator = torch.Generator().manual_seed(1)
        self.p = torch.randn(shape, generator=generator).requires_grad_()

    def step(self, number: int, how: str, action: str) -> None:
        x = torch.randn(7, D, generator=torch.Generator().manual_seed(number))
        loss = uses(x, self.dictionary(self.p), how, self.buffer)
        if action == "a gradient of its own":
            (grad,) = torch.autograd.grad(loss, self.p)
            self.kept.append(grad)
        elif action == "backward twice":
            loss.backward(retain_graph=True)
            loss.backward()
        elif action == "a hook keeps it":
            hook = self.p.register_hook(lambda grad: self.kept.append(grad))
            loss.backward()
            hook.remove()
        elif action == "numpy keeps it":
            loss.backward()
            self.kept.append(torch.from_numpy(self.p.grad.numpy()))
        else:
            loss.backward()
        if action == "none after":
            self.seen.append(self.p.grad.clone())
            self.p.grad = None
        elif action == "zero after":
            self.p.grad.zero_()
        elif action == "kept and none":
            self.kept.append(self.p.grad)
            self.p.grad = None
        elif action == "forgotten":
            self.kept.clear()
            self.p.grad = None
            gc.collect()
        if self.p.grad is not None:
            self.seen.append(self.p.grad.clone())
        self.seen += [t.clone() for t in self.kept]


ACTIONS = (
    "accumulate", "a gradient of its own", "backward twice", "a hook keeps it", "numpy keeps it", "none after",
    "zero after", "kept and none", "forgotten",
)  # fmt: skip


@settings(max_examples=4 * settings.default.max_examples)  # there are many ways to come to a gradient
@given(
    st.sampled_from(list(VIEWS)),
    st.sampled_from(list(BUFFERS)),
    st.lists(st.tuples(st.text("edp", min_size=1, max_size=4), st.sampled_from(ACTIONS)), min_size=1, max_size=5),
)
def test_a_buffer_changes_no_bit_of_any_gradient(view: str, buffer: str, steps: list[tuple[str, str]]) -> None:
    plain, kept = Run(view, None), Run(view, BUFFERS[buffer]())
    for number, (how, action) in enumerate(steps):
        plain.step(number, how, action)
        kept.step(number, how, action)
    assert len(plain.seen) == len(kept.seen)
    assert all(torch.equal(a, b) for a, b in zip(plain.seen, kept.seen))


@pytest.mark.parametrize("view", VIEWS)
def test_accumulation_through_a_view(view: str) -> None:
    """The second backward pass used to overwrite what it was then added to."""
    plain, kept = Run(view, None), Run(view, torch.empty(N, D))
    for number in range(3):
        plain.step(number, "e", "accumulate")
        kept.step(number, "e", "accumulate")
        assert torch.equal(plain.p.grad, kept.p.grad)


@pytest.mark.parametrize("how", ["ee", "dd", "ed", "epd"])
def test_several_uses_in_one_backward_pass(how: str) -> None:
    plain, kept = Run("itself", None), Run("itself", torch.empty(N, D))
    plain.step(0, how, "accumulate")
    kept.step(0, how, "accumulate")
    assert torch.equal(plain.p.grad, kept.p.grad)


@pytest.mark.parametrize("view", ["itself", "squeeze", "flat", "index", "part of flat", "times two"])
def test_the_buffer_is_used_again_once_it_is_free(view: str) -> None:
    run = Run(view, torch.full((N, D), float("nan")))
    for number in range(4):
        run.buffer.fill_(float("nan"))
        run.step(number, "d", "accumulate")
        assert bool(run.buffer.isfinite().all())
        if view in ("itself", "squeeze", "flat"):
            assert run.p.grad.data_ptr() == run.buffer.data_ptr()
        run.p.grad = None


def test_a_buffer_that_is_the_gradient_itself() -> None:
    """Nothing holds its memory but one tensor, and that one is held twice."""
    plain, kept = Run("itself", None), Run("itself", torch.zeros(N, D))
    kept.p.grad = kept.buffer
    plain.p.grad = torch.zeros(N, D)
    for number in range(3):
        plain.step(number, "de", "accumulate")
        kept.step(number, "de", "accumulate")
        assert torch.equal(plain.p.grad, kept.p.grad)


def test_a_buffer_under_gradient_accumulation_in_a_ddp_bucket(tmp_path) -> None:
    import torch.distributed as dist

    class Layer(torch.nn.Module):
        def __init__(self, buffer: Tensor | None) -> None:
            super().__init__()
            self.W = torch.nn.Parameter(torch.randn(1, N, D, generator=torch.Generator().manual_seed(0)))
            self.buffer = buffer

        def forward(self, x: Tensor) -> Tensor:
            return uses(x, self.W.squeeze(0), "ed", self.buffer)

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for as_view in (False, True):
            plain = Layer(None)
            model = torch.nn.parallel.DistributedDataParallel(Layer(torch.empty(N, D)), gradient_as_bucket_view=as_view)
            for number in range(3):
                x = torch.randn(7, D, generator=torch.Generator().manual_seed(number))
                plain(x).backward()
                model(x).backward()
                assert torch.equal(model.module.W.grad, plain.W.grad)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["e", "d", "ed", "r", "p", "rrp"])
@pytest.mark.parametrize("option", ["sparse", "float32 buffer", "half buffer"])
def test_the_options_inside_autocast(option: str, how: str, dtype: torch.dtype) -> None:
    """The gradient of what autocast made of the dictionary, cast back: sparse, or in the buffer, and bit for bit."""
    x = torch.randn(7, D, generator=torch.Generator().manual_seed(0))
    acts, indices = torch.linspace(1, 2, 7 * K).view(-1, K), torch.arange(7 * K).view(-1, K) % N
    W = torch.randn(N, D, generator=torch.Generator().manual_seed(1))
    offsets = torch.tensor([0, 4, 4, 9, 21])

    def gradient(leaf: Tensor, steps: int, **options: Any) -> Tensor:
        for _ in range(steps):
            with torch.autocast("cpu", dtype=dtype):
                loss = x.new_zeros(())
                if "e" in how:
                    loss = loss + ops.topk_encode(x, leaf, k=K, **options)[0].float().square().mean()
                if "d" in how:
                    loss = loss + ops.sparse_decode(acts, indices, leaf, **options).float().sin().sum()
                for _ in range(how.count("r")):
                    x_hat = ops.ragged_decode(acts.flatten(), indices.flatten(), offsets, leaf, **options)
                    loss = loss + x_hat.float().sin().sum()
                if "p" in how:
                    x_hat = ops.sparse_decode(acts, indices, leaf, prefixes=(5, 20, N), **options)
                    loss = loss + x_hat.float().sin().sum()
            loss.backward()
        return leaf.grad

    buffer = torch.full((N, D), float("nan"), dtype=dtype if "half" in option else torch.float32)
    options = {"sparse_grad": True} if option == "sparse" else {"grad_buffer": buffer}
    for steps in (1, 2):
        leaf = W.clone().requires_grad_()
        found = gradient(leaf, steps, **options)
        assert found.dtype == torch.float32
        if option == "sparse":
            # as many rows as there are codes, at most: no dense gradient was made on the way
            assert found.is_sparse
            assert found._nnz() <= steps * len(how) * 7 * K
            found = found.coalesce().to_dense()
        elif option == "float32 buffer" and steps == 1 and len(how) == 1:
            assert found.data_ptr() == buffer.data_ptr()
        assert torch.equal(found, gradient(W.clone().requires_grad_(), steps))


def test_a_buffer_that_fits_neither_dtype_names_autocast() -> None:
    W, buffer = torch.randn(N, D, requires_grad=True), torch.empty(N, D, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="autocast makes of it"):
        ops.topk_encode(torch.randn(3, D), W, k=K, grad_buffer=buffer)
