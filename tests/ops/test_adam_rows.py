"""The optimiser's Triton kernel, interpreted and on a GPU; that UnitRowAdam is Adam is in test_sae_train.py."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from _adam import assert_step, norm_bound, step_and_bounds
from clipsteer import SAE, TrainConfig, ops
from clipsteer.ops import _dispatch
from clipsteer.sae.adam import UnitRowAdam, one_pass, takes_row_sparse
from clipsteer.sae.trainer import SAETrainer


def start(n: int, d: int, device: str) -> SAE:
    torch.manual_seed(0)
    sae = SAE(d, n, k=3).to(device)
    with torch.no_grad():
        sae.W_dec[5:7] = 0
        sae.W_enc[5] = 0
    return sae


def gradients(n: int, d: int, steps: int) -> list[dict[str, torch.Tensor]]:
    g, found = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        found.append({"b_enc": torch.randn(n, generator=g), "b_dec": torch.randn(d, generator=g)})
        for name in ("W_enc", "W_dec"):
            size = (torch.rand(n, 1, generator=g) < 0.6) * 10.0 ** torch.randint(-4, 2, (n, 1), generator=g)
            size[5], size[6], size[8] = 0, 1, 0
            found[-1][name] = torch.randn(n, d, generator=g) * size
    return found


def update(optimizer: UnitRowAdam, grads: dict[str, torch.Tensor], lr: float, factor: float | None = None) -> None:
    for name, p in optimizer.sae.named_parameters():
        p.grad = grads[name].to(p.device, copy=True)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step(factor=None if factor is None else torch.tensor(factor, device=p.device))


def holds_to_float64(n: int, d: int, device: str, steps: int, backend: str) -> None:
    """Each step of `backend`, the kernel or torch's path, against Adam in float64 from the same state."""
    sae = start(n, d, device)
    assert one_pass(sae.W_enc) == one_pass(sae.W_dec) == (None if backend == "reference" else backend)
    optimizer = UnitRowAdam(sae, 1e-2)
    for number, grads in enumerate(gradients(n, d, steps), 1):
        lr = 1e-2 / number
        factor = (None, 0.3)[number % 2]  # as clipping has it
        scaled = 1.0 if factor is None else float(torch.tensor(factor))
        expected, versions = {}, (sae.W_enc._version, sae.W_dec._version)
        for name, p in sae.named_parameters():
            moments = [optimizer.state[p].get(key, torch.zeros_like(p)) for key in ("exp_avg", "exp_avg_sq")]
            rows = [t.detach().cpu().reshape(-1, p.shape[-1]) for t in (p, *moments, grads[name])]
            # the kernel on a GPU that torch has for its path rounds 0.999 to float32
            rounded = device == "cuda" and (backend == "reference" or p.dim() == 1)
            given = rows[0], rows[1:3], rows[3], number, lr, name == "W_dec", scaled, rounded
            expected[name] = step_and_bounds(*given)
        update(optimizer, grads, lr, factor)
        if backend == "triton":
            assert sae.W_enc._version > versions[0]
            assert sae.W_dec._version > versions[1]
            assert torch.equal(sae.W_dec.grad.cpu(), grads["W_dec"])
        for name, p in sae.named_parameters():
            state = optimizer.state[p]
            assert state["step"].device == p.device
            assert float(state["step"]) == number
            assert_step({"weight": p, **state}, expected[name], f"{backend} {name} in step {number}")
    assert not sae.W_dec[5].any()
    norms = torch.cat([sae.W_dec[:5], sae.W_dec[6:]]).detach().cpu().double().norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=norm_bound(sae.W_dec), atol=0)


def repeats(n: int, d: int, device: str) -> None:
    ends = []
    for _ in range(2):
        optimizer = UnitRowAdam(start(n, d, device), 1e-2)
        for number, grads in enumerate(gradients(n, d, 5), 1):
            update(optimizer, grads, 1e-2 / number)
        ends.append([t for p in optimizer.sae.parameters() for t in (p.detach(), *optimizer.state[p].values())])
    assert all(torch.equal(a, b) for a, b in zip(*ends))


def says_no_to_the_rest(device: str) -> None:
    """What torch's path keeps, and that row-sparse gradients are not for this kernel."""
    W = torch.zeros(4, 8, device=device)
    assert one_pass(W) == "triton"
    assert not takes_row_sparse(W)
    for other in (W.bfloat16(), W.double(), W.T, torch.zeros(1, 8193, device=device)):
        assert one_pass(other) is None
    assert not SAETrainer(SAE(8, 16, k=2).to(device), TrainConfig(autocast="none"), 5)._sparse


def resumes(device: str) -> None:
    x = torch.randn(32, 20, device=device)
    trainers = []
    for _ in range(2):
        torch.manual_seed(0)
        config = TrainConfig(architecture="relu", autocast="none")  # on a CPU its step calls no op
        trainers.append(SAETrainer(SAE(20, 40, "relu").to(device), config, 9))
    whole, cut = trainers
    whole.step(x)
    whole.step(x)
    cut.load_state_tensors({name: t.clone() for name, t in whole.state_tensors().items()}, 2)
    assert cut.step(x).equal(whole.step(x))
    ends = [trainer.state_tensors() for trainer in trainers]
    assert all(torch.equal(t, ends[1][name]) for name, t in ends[0].items())


INTERPRETED = """
import pytest
import torch
import test_adam_rows as tests
from clipsteer.sae import adam as sae_adam
from clipsteer.kernels.adam_rows import adam_rows

with pytest.MonkeyPatch.context() as patch:
    patch.setenv("CLIPSTEER_BACKEND", "triton")
    for n, d, steps in ((70, 33, 8), (9, 770, 4), (64, 768, 3)):
        tests.holds_to_float64(n, d, "cpu", steps, "triton")
    tests.repeats(64, 33, "cpu")
    patch.setenv("CLIPSTEER_BACKEND", "reference")
    tests.holds_to_float64(64, 33, "cpu", 5, "reference")
    patch.setenv("CLIPSTEER_BACKEND", "triton")
    tests.says_no_to_the_rest("cpu")
    tests.resumes("cpu")
check = "adam_rows", "triton", torch.device("cpu"), torch.float32
assert sae_adam._verdict(*check) is None
with pytest.MonkeyPatch.context() as patch:
    patch.setattr("clipsteer.kernels.adam_rows.adam_rows", lambda *args: None)
    assert "failed" in sae_adam._verdict(*check)
# the corrections of both moments, at any step: a gradient of 1 from moments of 0 moves a weight by exactly that much
for t in (1, 2, 10, 1000, 10**6):
    for beta1, beta2 in ((0.9, 0.999), (0.0, 0.0), (0.99, 0.99999)):
        w, m, v = torch.zeros(3, 1, 1, dtype=torch.float32)
        step = torch.tensor(float(t))
        adam_rows(w, m, v, step, torch.ones(1, 1), False, 1, beta1, beta2, 0)
        expected = (1 - beta1) / (1 - beta1**t) / ((1 - beta2) / (1 - beta2**t)) ** 0.5
        assert abs(float(-w) / expected - 1) <= 5e-7, (t, beta1, beta2, float(-w), expected)
# a row narrower than its program, where 0 / 0 would be added outside
w, m, v, grad = torch.rand(4, 2, 33)
adam_rows(w, m, v, torch.tensor(1.0), grad, True, 0.1, 0.9, 0.999, 0)
assert w.isfinite().all() and ((w.norm(dim=1) - 1).abs() <= tests.norm_bound(w)).all()
"""


@pytest.mark.slow
def test_interpreted(interpret):
    here = Path(__file__).parent
    interpret(f"sys.path[:0] = [{str(here)!r}, {str(here.parent)!r}]\n" + INTERPRETED)


@pytest.mark.parametrize(
    ("asked", "failure", "expected"),
    [("auto", None, "triton"), ("auto", "wrong", None), ("triton", "wrong", "triton"), ("reference", None, None)],
)
def test_what_serves_a_gpu(monkeypatch, asked, failure, expected):
    """A kernel that fails its self-check leaves the dictionary to torch; one that is asked for is not checked."""
    pytest.importorskip("triton")
    monkeypatch.setenv("CLIPSTEER_BACKEND", asked)
    monkeypatch.setattr(_dispatch, "missing", lambda backend: None)
    monkeypatch.setattr(_dispatch, "self_check", lambda *args: failure)
    _dispatch._warn_once.cache_clear()
    W = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, shape=(4, 8), is_contiguous=lambda: True)
    with pytest.warns(RuntimeWarning, match="not trusted") if asked == "auto" and failure else nullcontext():
        assert one_pass(W) == expected
    _dispatch._warn_once.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "d"), [(300, 768), (64, 33)])
def test_on_gpu(n, d, monkeypatch):
    holds_to_float64(n, d, "cuda", 8, "triton")
    repeats(n, d, "cuda")
    monkeypatch.setenv("CLIPSTEER_BACKEND", "reference")
    holds_to_float64(n, d, "cuda", 8, "reference")
    monkeypatch.setenv("CLIPSTEER_BACKEND", "auto")
    says_no_to_the_rest("cuda")
    resumes("cuda")


@pytest.mark.gpu
def test_a_captured_step_is_the_step():
    from clipsteer.kernels.adam_rows import adam_rows

    w, m, v, grad = torch.rand(4, 50, 768, device="cuda")
    step, start = torch.ones((), device="cuda"), [t.clone() for t in (w, m, v)]
    call = lambda: adam_rows(w, m, v, step, grad, True, 1e-2, 0.9, 0.999, 1e-8)
    call()
    expected = [t.clone() for t in (w, m, v)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for t, before in zip((w, m, v), start):
        t.copy_(before)
    graph.replay()
    assert all(torch.equal(t, e) for t, e in zip((w, m, v), expected))


@pytest.mark.skipif(_dispatch.missing("cpp") is not None, reason="the C++ library is not built")
@pytest.mark.parametrize("joined", [False, True], ids=["by autograd", "one after the other"])
def test_row_sparse_gradients_of_several_uses_are_one_step(joined):
    """As AuxK's dead features beside the batch's: rows of one use, of the other, and of both."""
    g = torch.Generator().manual_seed(0)
    uses = [(torch.randn(6, 2, generator=g), torch.randint(n, n + 12, (6, 2), generator=g)) for n in (10, 0)]
    ends = []
    for sparse in (False, True):
        sae = start(24, 8, "cpu")
        optimizer = UnitRowAdam(sae, 1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            losses = [
                ops.sparse_decode(acts, indices, sae.W_dec, sparse_grad=sparse).square().sum() for acts, indices in uses
            ]
            if sparse and joined:
                parts = [torch.autograd.grad(loss, sae.W_dec)[0] for loss in losses]
                where = torch.cat([part._indices() for part in parts], 1)
                values = torch.cat([part._values() for part in parts])
                sae.W_dec.grad = torch.sparse_coo_tensor(where, values, sae.W_dec.shape, check_invariants=True)
            else:
                sum(losses).backward()
            assert sae.W_dec.grad.is_sparse == sparse
            optimizer.step()
        ends.append([sae.W_dec.detach(), *optimizer.state[sae.W_dec].values()])
    for a, b in zip(*ends):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
