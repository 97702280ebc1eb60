"""The definitions in plain torch are held to what the kernels are held to: halves, sums by index, their order."""

from __future__ import annotations

import pytest
import torch

from clipsteer import ops, testing
from clipsteer.cli.main import main
from clipsteer.ops import REGISTRY
from clipsteer.ops._lowlevel import DTYPES
from clipsteer.ops._spec import spec_errors

BACKENDS = [b for b in ("reference", "cpp") if testing.supported(b)]
HALVES = (torch.bfloat16, torch.float16)
# many rows name the same few entries of a table
CROWDED = {
    "topk_encode": {"B": 3000, "d": 8, "n": 2, "k": 1},
    "sparse_decode": {"B": 3000, "d": 8, "n": 2, "k": 1},
    "ragged_decode": {"B": 3000, "d": 8, "n": 2, "k": 1},
    "threshold_encode": {"B": 3000, "d": 8, "n": 2, "k": 1},
    "jumprelu_encode": {"B": 3000, "d": 8, "n": 2, "k": 1},
    "batch_topk_encode": {"B": 3000, "d": 8, "n": 2, "k": 1},
    "topk_encode_options": {"B": 3000, "d": 8, "n": 2, "k": 1},
    "threshold_encode_options": {"B": 3000, "d": 8, "n": 2, "k": 1},
    "batch_topk_encode_options": {"B": 3000, "d": 8, "n": 2, "k": 1},
    "sparse_decode_prefixes": {"B": 3000, "d": 8, "n": 2, "k": 1, "G": 2},
    "conceptor_project": {"B": 3000, "K": 2, "d": 8},
    "conceptor_project_low_rank": {"B": 3000, "K": 2, "d": 8, "r": 3},
    "mahalanobis_covariance_loss": {"B": 600, "C": 1, "d": 8},
    "mahalanobis_covariance_loss_low_rank": {"B": 600, "C": 1, "d": 8, "r": 3},
    "semantic_drift": {"N": 3000, "C": 2, "d": 8},
    "drrho_loss": {"B": 600, "d": 8},
    "clip_loss": {"B": 600, "d": 8, "other": 1, "smooth": 1},
    "siglip_loss": {"B": 600, "d": 8},
    "distill_loss": {"B": 600, "d": 8, "e": 8},
    "generalised_rand_index": {"N": 300, "K": 3, "L": 2},
    "concept_distances": {"N": 300, "K": 3, "L": 2},
    "generalised_rand_index_sparse": {"N": 300, "K": 3, "L": 2, "k": 1},
    "concept_distances_sparse": {"N": 300, "K": 3, "L": 2, "k": 1},
}


def label(value: object) -> str:
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_by_index_does_not_stop_where_halves_end(backend):
    W = torch.ones(4, 8, dtype=torch.bfloat16, requires_grad=True)
    acts = torch.ones(10_000, 1, dtype=torch.bfloat16)
    ops.sparse_decode(acts, torch.zeros(10_000, 1).long(), W, None, backend=backend).sum().backward()
    assert W.grad[0, 0] == 9984  # 10,000 in bfloat16; 256 where the partial sums are kept in it


@pytest.mark.parametrize("name", REGISTRY)
@pytest.mark.parametrize("dtype", HALVES, ids=label)
@pytest.mark.parametrize("backend", BACKENDS)
def test_crowded_sums_keep_the_bound_in_halves(name, dtype, backend):
    for exact in (False, True):
        errors = spec_errors(REGISTRY[name], CROWDED[name], dtype, seed=3, backend=backend, exact=exact)
        assert all(error <= 1 for error in errors.values()), errors


@pytest.mark.parametrize("dtype", HALVES, ids=label)
def test_second_derivatives_by_index_are_summed_in_float32(dtype):
    """Those of a mean that a thousand rows share, behind the gradient of what is applied to them."""
    if not testing.supported("cpp"):
        pytest.skip("the C++ library is not built")
    h = torch.ones(1000, 4, dtype=dtype)
    index = torch.zeros(1000).long()
    for backend in BACKENDS:
        C = torch.eye(4, dtype=dtype).expand(2, 4, 4).clone().requires_grad_()
        mean = torch.zeros(2, 4, dtype=dtype, requires_grad=True)
        y = ops.conceptor_project(h, C, index, mean=mean, backend=backend)
        (d_C,) = torch.autograd.grad(y.sum(), C, create_graph=True)
        (d_mean,) = torch.autograd.grad(d_C.sum(), mean)
        assert d_mean[0].tolist() == [-4 * 1000] * 4, backend


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("name", ["sparse_decode", "conceptor_project", "mahalanobis_covariance_loss_low_rank"])
def test_gradients_of_the_reference_repeat_with_two_threads(name):
    spec = REGISTRY[name]
    shape = CROWDED[name] | {"d": 64} | ({"B": 20_000} if "B" in CROWDED[name] and "C" not in CROWDED[name] else {})
    inputs = spec.make(shape, torch.float32, torch.Generator().manual_seed(1))
    leaves = spec.leaves(inputs)
    found = set()
    for _ in range(12):
        live = {n: v.clone().requires_grad_(n in leaves) if n in leaves else v for n, v in inputs.items()}
        result = spec.function(**live, backend="reference")
        grads = torch.autograd.grad(result.square().sum(), [live[n] for n in leaves])
        found.add(b"".join(grad.numpy().tobytes() for grad in grads))
    assert len(found) == 1


def test_validate_holds_the_reference_to_the_bounds_in_every_dtype(capsys):
    arguments = "validate --backends reference --ops sparse_decode mahalanobis_covariance_loss --cases 10 --dtypes"
    for dtype in map(label, DTYPES["reference"]):
        assert main([*arguments.split(), dtype]) == 0
        shown = capsys.readouterr().out
        assert shown.count(f"reference  {dtype}") == 2
        assert shown.count("pass") == 2
