"""What every op promises, generated from the registry. A new op is covered by its SPEC alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from _night import day_and_night
from clipsteer import ops, testing
from clipsteer.ops import REGISTRY, _dispatch, specs
from clipsteer.ops._lowlevel import DTYPES, LOW_LEVEL, OPS
from clipsteer.ops._spec import spec_errors

ON_CPU = [
    (name, backend, dtype)
    for name in REGISTRY
    for backend in ("reference", "cpp")
    for dtype in testing.supported(backend)
]
# An op without gradient is a statistic: what is about derivatives passes it by.
SMOOTH = [name for name, spec in REGISTRY.items() if spec.differentiable]
LIGHT = [(name, backend) for name in REGISTRY for backend in ("reference", "cpp") if testing.supported(backend)]


def label(value: object) -> str:
    return str(value).removeprefix("torch.")


def small(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, shape: int = 0) -> dict:
    spec = REGISTRY[name]
    return spec.make(spec.shapes[shape], dtype, torch.Generator().manual_seed(seed), 1.0, False)


def outputs(name: str, inputs: dict, **options) -> tuple[Tensor, ...]:
    result = REGISTRY[name].function(**inputs, **options)
    return result if isinstance(result, tuple) else (result,)


def assert_agree(name: str, backend: str, inputs: dict, found: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> None:
    """Our own sums to the bit; what torch multiplied, and may in another order, within the bound of the same inputs."""
    spec = REGISTRY[name]
    for output, a, b in zip(spec.outputs, found, others):
        assert b.shape == a.shape
        assert backend == "reference" or output in spec.torch_sums or torch.equal(a, b), output
    assert all(error <= 1 for error in spec.check(inputs, dict(zip(spec.outputs, others))).values())


def with_grad(name: str, inputs: dict) -> dict:
    return {
        n: v.clone().requires_grad_(n in REGISTRY[name].differentiable) if isinstance(v, Tensor) else v
        for n, v in inputs.items()
    }


def gradients(name: str, live: dict, seed: int = 0, **options) -> dict[str, Tensor]:
    """Every output, and the gradient of every input under one fixed cotangent."""
    spec, g = REGISTRY[name], torch.Generator().manual_seed(seed)
    found = dict(zip(spec.outputs, outputs(name, live, **options)))
    smooth = [t for t in found.values() if t.requires_grad]
    grad_out = [torch.randn(t.shape, generator=g).to(t.dtype) for t in smooth]
    leaves = spec.leaves(live)
    grads = torch.autograd.grad(smooth, [live[n] for n in leaves], grad_out) if leaves else ()
    return {n: t.detach() for n, t in found.items()} | {f"d {n}": t for n, t in zip(leaves, grads)}


@pytest.mark.hypothesis
@pytest.mark.parametrize("prop", testing.PROPERTIES)
@pytest.mark.parametrize(("name", "backend", "dtype"), ON_CPU, ids=label)
def test_property(name, backend, dtype, prop):
    @given(testing.cases(backend, dtype, REGISTRY[name]))
    def holds(case):
        errors = testing.PROPERTIES[prop](case)
        assert all(error <= 1 for error in errors.values()), errors

    holds()


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("name", "backend"), LIGHT)
@pytest.mark.parametrize("shape", range(8))
def test_every_edge_shape(name, backend, shape):
    errors = spec_errors(REGISTRY[name], REGISTRY[name].shapes[shape], torch.float32, seed=shape, backend=backend)
    assert all(error <= 1 for error in errors.values()), errors


@pytest.mark.parametrize("name", SMOOTH)
def test_reference_has_first_and_second_derivatives(name):
    spec = REGISTRY[name]
    inputs = spec.make(spec.small_shape, torch.float64, torch.Generator().manual_seed(1), 1.0, False)
    names = [n for n in spec.differentiable if n not in spec.estimated]
    fixed = {n: v for n, v in inputs.items() if n not in names}

    def smooth(*tensors):
        result = spec.reference(**fixed, **dict(zip(names, tensors)))
        return result[0] if isinstance(result, tuple) else result

    free = [inputs[n].requires_grad_() for n in names]
    assert torch.autograd.gradcheck(smooth, free)
    assert torch.autograd.gradgradcheck(smooth, free)


@pytest.mark.parametrize("name", SMOOTH)
def test_fast_path_has_first_and_second_derivatives(name):
    spec = REGISTRY[name]
    if not testing.supported("cpp"):
        pytest.skip("the C++ library is not built")
    inputs = spec.make(spec.small_shape, torch.float64, torch.Generator().manual_seed(1), 1.0, False)
    names = [n for n in spec.differentiable if n not in spec.estimated]
    fixed = {n: v for n, v in inputs.items() if n not in names}

    def smooth(*tensors):
        result = spec.function(**fixed, **dict(zip(names, tensors)), backend="cpp")
        return result[0] if isinstance(result, tuple) else result

    free = [inputs[n].requires_grad_() for n in names]
    assert torch.autograd.gradcheck(smooth, free)
    assert torch.autograd.gradgradcheck(smooth, free)


@pytest.mark.parametrize(("name", "backend"), [case for case in LIGHT if case[0] in SMOOTH])
def test_each_subset_of_requires_grad(name, backend):
    spec, inputs = REGISTRY[name], small(name)
    full = with_grad(name, inputs)
    result = outputs(name, full, backend=backend)[0]
    leaves = spec.leaves(full)
    expected = dict(zip(leaves, torch.autograd.grad(result.sum(), [full[n] for n in leaves])))
    for bits in range(1, 2 ** len(leaves)):
        chosen = [n for i, n in enumerate(leaves) if bits >> i & 1]
        some = {
            n: v.clone().requires_grad_(n in chosen) if isinstance(v, Tensor) and v.is_floating_point() else v
            for n, v in inputs.items()
        }
        outputs(name, some, backend=backend)[0].sum().backward()
        for n in leaves:
            assert (some[n].grad is None) == (n not in chosen)
            if n in chosen:
                torch.testing.assert_close(some[n].grad, expected[n], rtol=0, atol=0)
    plain = outputs(name, inputs, backend=backend)[0]
    assert not plain.requires_grad


@pytest.mark.parametrize(("name", "backend"), LIGHT)
def test_leading_shapes_and_optional_inputs(name, backend):
    spec, inputs = REGISTRY[name], small(name, shape=1)
    flat = outputs(name, inputs, backend=backend)
    if spec.rows:
        lifted = {n: v.unflatten(0, (3, 11)) if n in spec.rows else v for n, v in inputs.items()}
        found = outputs(name, lifted, backend=backend)
        assert all(b.shape == (3, 11, *a.shape[1:]) for a, b in zip(flat, found))
        assert_agree(name, backend, inputs, flat, tuple(b.flatten(0, 1) for b in found))
        one = outputs(name, {n: v[0] if n in spec.rows else v for n, v in inputs.items()}, backend=backend)
        assert all(b.shape == a.shape[1:] for a, b in zip(flat, one))
    for optional in spec.optional:
        without = outputs(name, {**inputs, optional: None}, backend=backend)
        zeroed = {**inputs, optional: torch.zeros_like(inputs[optional])}
        assert_agree(name, backend, zeroed, without, outputs(name, zeroed, backend=backend))


@pytest.mark.parametrize("name", REGISTRY)
def test_determinism_and_thread_count(name):
    """50 repeats with changing thread counts: our own sums do not move by a bit."""
    if not testing.supported("cpp"):
        pytest.skip("the C++ library is not built")
    spec = REGISTRY[name]
    inputs = spec.make(spec.repeat_shape, torch.float32, torch.Generator().manual_seed(3), 1.0, False)
    before, first = torch.get_num_threads(), None
    try:
        for repeat in range(50):
            torch.set_num_threads(1 + repeat % 4)
            got = gradients(name, with_grad(name, inputs), backend="cpp")
            first = first or got
            assert all(torch.equal(first[n], got[n]) for n in got if n not in spec.torch_sums)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", [n for n, spec in REGISTRY.items() if spec.scalable])
def test_power_of_two_scaling_is_exact(name):
    inputs = small(name)
    scaled = {n: v * 8 if n in REGISTRY[name].scalable else v for n, v in inputs.items()}
    for a, b in zip(outputs(name, inputs), outputs(name, scaled)):
        assert torch.equal(a * 8 if a.is_floating_point() else a, b)


def test_permuting_rows_and_features():
    inputs = small("topk_encode")
    acts, indices = ops.topk_encode(**inputs)
    order = torch.randperm(inputs["W_enc"].shape[0], generator=torch.Generator().manual_seed(0))
    permuted = {**inputs, "W_enc": inputs["W_enc"][order], "b_enc": inputs["b_enc"][order]}
    acts_p, indices_p = ops.topk_encode(**permuted)
    live = acts > 0
    bound = (
        2
        * (inputs["x"].shape[1] + 2)
        * 2.0**-24
        * (inputs["x"].abs() @ inputs["W_enc"].abs().T + inputs["b_enc"].abs()).max()
    )
    assert (acts - acts_p).abs().max() <= bound
    assert torch.equal(torch.where(live, order[indices_p], -1), torch.where(live, indices, -1))


def test_k_equal_d_sae_is_the_dense_autoencoder():
    x, W, b, _ = small("topk_encode", torch.float64).values()
    acts, indices = ops.topk_encode(x, W, b, k=W.shape[0])
    dense = torch.relu(x @ W.T + b)
    torch.testing.assert_close(torch.zeros_like(dense).scatter(-1, indices, acts), dense, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(ops.sparse_decode(acts, indices, W), dense @ W, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["topk_encode", "sparse_decode"])
def test_duplicate_and_constant_inputs(name):
    inputs = small(name)
    if name == "sparse_decode":
        same = {**inputs, "indices": torch.full_like(inputs["indices"], 3)}
        expected = (
            inputs["acts"].double().sum(-1, keepdim=True) * inputs["W_dec"][3].double() + inputs["b_dec"].double()
        )
        assert REGISTRY[name].check(same, {"x_hat": ops.sparse_decode(**same)})["x_hat"] <= 1
        torch.testing.assert_close(ops.sparse_decode(**same).double(), expected, rtol=1e-5, atol=1e-5)
    else:
        acts, indices = ops.topk_encode(inputs["x"], torch.zeros_like(inputs["W_enc"]), k=5)
        assert torch.equal(indices, torch.arange(5).expand_as(indices))
        assert not acts.any()


@pytest.mark.parametrize("name", [n for n, spec in REGISTRY.items() if spec.grad_buffer])
@pytest.mark.parametrize("sparse", [False, True], ids=["buffer", "row-sparse"])
def test_kept_buffer_and_row_sparse_gradients_equal_the_fresh_one(name, sparse):
    if not testing.supported("cpp"):
        pytest.skip("the C++ library is not built")
    weight = REGISTRY[name].grad_buffer
    inputs = small(name)
    fresh, kept = with_grad(name, inputs), with_grad(name, inputs)
    outputs(name, fresh)[0].square().sum().backward()
    buffer = torch.full_like(inputs[weight], float("nan"))
    options = {"sparse_grad": True} if sparse else {"grad_buffer": buffer}
    outputs(name, kept, **options)[0].square().sum().backward()
    if sparse:
        assert kept[weight].grad.is_sparse
        assert torch.equal(kept[weight].grad.to_dense(), fresh[weight].grad)
    else:
        assert kept[weight].grad.data_ptr() == buffer.data_ptr()
        assert torch.equal(buffer, fresh[weight].grad)
    for n in REGISTRY[name].differentiable:
        if n != weight:
            assert torch.equal(kept[n].grad, fresh[n].grad)


@pytest.mark.parametrize("name", [n for n, spec in REGISTRY.items() if spec.grad_buffer])
def test_a_kept_buffer_accumulates_as_a_fresh_gradient_does(name):
    if not testing.supported("cpp"):
        pytest.skip("the C++ library is not built")
    weight, inputs = REGISTRY[name].grad_buffer, small(name)
    fresh, kept = with_grad(name, inputs), with_grad(name, inputs)
    buffer = torch.empty_like(inputs[weight])
    for step in range(4):
        outputs(name, fresh)[0].square().sum().backward()
        outputs(name, kept, grad_buffer=buffer)[0].square().sum().backward()
        assert torch.equal(kept[weight].grad, fresh[weight].grad)
        if step == 2:  # as zero_grad(set_to_none=False) does
            fresh[weight].grad.zero_()
            kept[weight].grad.zero_()


@pytest.mark.parametrize("name", [n for n, spec in REGISTRY.items() if spec.grad_buffer])
def test_second_derivatives_of_kept_and_sparse_gradients_are_refused(name):
    if not testing.supported("cpp"):
        pytest.skip("the C++ library is not built")
    weight = REGISTRY[name].grad_buffer
    for options in ({"sparse_grad": True}, {"grad_buffer": torch.empty_like(small(name)[weight])}):
        live = with_grad(name, small(name))
        result = outputs(name, live, **options)[0].square().sum()
        with pytest.raises(RuntimeError, match="first derivatives only"):
            torch.autograd.grad(result, live[weight], create_graph=True)


@pytest.mark.parametrize("name", REGISTRY)
def test_fake_and_meta_tensors(name):
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = outputs(name, small(name))
    on_meta = {n: v.to("meta") if isinstance(v, Tensor) else v for n, v in small(name).items()}
    assert [t.shape for t in outputs(name, on_meta)] == [t.shape for t in real]
    with FakeTensorMode() as mode:
        fake = {n: mode.from_tensor(v) if isinstance(v, Tensor) else v for n, v in small(name).items()}
        assert [t.shape for t in outputs(name, fake)] == [t.shape for t in real]


@pytest.mark.parametrize("backend", [b for b in ("reference", "cpp") if testing.supported(b)])
def test_empty_sums(backend):
    none, W = torch.zeros(4, 0), torch.randn(9, 6)
    indices = torch.zeros(4, 0, dtype=torch.int64)
    assert torch.equal(ops.sparse_decode(none, indices, W, torch.ones(6), backend=backend), torch.ones(4, 6))
    bias = torch.tensor([0.0, 3.0, 1.0])
    acts, indices = ops.topk_encode(none, torch.zeros(3, 0), bias, k=2, backend=backend)
    assert acts.tolist() == [[3.0, 1.0]] * 4
    assert indices.tolist() == [[1, 2]] * 4


def test_an_op_writes_only_into_its_outputs():
    if not testing.supported("cpp"):
        pytest.skip("the C++ library is not built")
    g = torch.Generator().manual_seed(0)
    for dtype in testing.supported("cpp"):
        store = torch.full((9 * 7 + 128,), float("nan"), dtype=dtype)
        dW, bias = store[64:-64].view(9, 7), torch.full((9 + 128,), float("nan"), dtype=dtype)
        coeff, rows = torch.randn(5, 3, generator=g).to(dtype), torch.randn(5, 7, generator=g).to(dtype)
        indices = torch.randint(9, (5, 3), generator=g)
        _dispatch.call("cpp", "sparse_outer_out", coeff, indices, rows, dW, bias[64:-64])
        assert bool(dW.isfinite().all())
        assert bool(bias[64:-64].isfinite().all())
        assert all(bool(t.isnan().all()) for t in (store[:64], store[-64:], bias[:64], bias[-64:]))


@pytest.mark.parametrize("name", ["topk_encode", "sparse_decode"])
def test_gradients_under_distributed_data_parallel(name, tmp_path):
    import torch.distributed as dist

    weight, inputs = REGISTRY[name].grad_buffer, small(name)

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(inputs[weight].clone())

        def forward(self, **given: object) -> Tensor:
            return outputs(name, {**given, weight: self.weight})[0]

    rest = {n: v for n, v in inputs.items() if n != weight}
    plain = Layer()
    plain(**rest).square().sum().backward()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(Layer())
        parallel(**rest).square().sum().backward()
        assert torch.equal(parallel.module.weight.grad, plain.weight.grad)
    finally:
        dist.destroy_process_group()


def test_bounds_know_the_sign_of_an_overflow():
    from clipsteer.ops._bounds import fraction_of_bound

    huge, inf = torch.tensor([3.7e38], dtype=torch.float64), float("inf")
    assert fraction_of_bound(torch.tensor([inf]), huge, huge, 4) == 0
    assert fraction_of_bound(torch.tensor([-inf]), huge, huge, 4) == inf
    assert fraction_of_bound(torch.tensor([float("nan")]), huge, huge, 4) == inf
    assert fraction_of_bound(torch.tensor([float("nan")]), huge, 4 * huge, 4) == 0
    assert fraction_of_bound(torch.tensor([-inf]), inf * huge, inf * huge, 4) == inf


def test_same_bits_tells_zeros_and_numbers_apart():
    zero, nan = torch.zeros(1), torch.tensor([float("nan")])
    assert testing.same_bits(nan, -nan)
    assert not testing.same_bits(zero, -zero)
    assert not testing.same_bits(nan, torch.tensor([7.0]))
    assert not testing.same_bits(torch.tensor([float("inf")]), torch.tensor([torch.finfo(torch.float32).max]))


ISA = """
import sys, torch
from clipsteer import testing
rows = testing.validate(backends=["cpp"], cases=int(sys.argv[2]))
print(testing.table(rows))
level = torch.ops.clipsteer_cpp.isa_level()
sys.exit(any(r.verdict != "pass" for r in rows) or level > int(sys.argv[1]))
"""


@pytest.mark.parametrize("cases", day_and_night(5, 10))
@pytest.mark.parametrize(
    ("isa", "level"),
    [("portable", 0), ("avx2", 1), pytest.param("avx512f", 2, marks=pytest.mark.nightly), ("avx512", 2)],
)
def test_every_instruction_set(isa, level, cases):
    if not testing.supported("cpp"):
        pytest.skip("the C++ library is not built")
    env = {**os.environ, "CLIPSTEER_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ISA, str(level), str(cases)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_an_unknown_instruction_set_is_refused():
    if not testing.supported("cpp"):
        pytest.skip("the C++ library is not built")
    code = "from clipsteer import ops; import torch; ops.topk_encode(torch.ones(2, 3), torch.ones(4, 3), k=1)"
    env = {**os.environ, "CLIPSTEER_CPU_ISA": "avx1024"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0
    assert "must be portable, avx2, avx512f, avx512 or amx" in done.stderr


def test_tf32_is_read_from_torchs_new_setting_too():
    code = (
        "import torch; from clipsteer.kernels._precision import tf32_allowed\n"
        "before = tf32_allowed(); torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
        "assert (before, tf32_allowed()) == (False, True)\n"
        "torch.backends.cuda.matmul.fp32_precision = 'ieee'; assert not tf32_allowed()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", SMOOTH)
def test_autocast_casts_like_linear(name):
    inputs = with_grad(name, small(name))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = outputs(name, inputs)[0]
    assert result.dtype == (torch.float32 if REGISTRY[name].wide else torch.bfloat16)
    result.float().sum().backward()
    assert all(inputs[n].grad.dtype == torch.float32 for n in REGISTRY[name].differentiable)
    narrow = {n: v.bfloat16() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in small(name).items()}
    assert torch.equal(result, outputs(name, narrow)[0])


@pytest.mark.parametrize(("name", "backend"), LIGHT)
def test_compiles_to_one_graph_with_dynamic_shapes(name, backend):
    torch._dynamo.reset()

    def step(**kwargs):
        return REGISTRY[name].function(**kwargs, backend=backend)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    spec = REGISTRY[name]
    for shape in (0, 1):
        inputs = small(name, shape=shape)
        eager, live = outputs(name, inputs, backend=backend), with_grad(name, inputs)
        graph = compiled(**live)
        graph = graph if isinstance(graph, tuple) else (graph,)
        host = tuple(t.detach() for t in graph)
        assert_agree(name, backend, inputs, eager, host)
        leaves, smooth = spec.leaves(live), {n: t for n, t in zip(spec.outputs, graph) if t.requires_grad}
        if leaves:
            cotangents = {n: torch.ones_like(t) for n, t in smooth.items()}
            found = torch.autograd.grad([*smooth.values()], [live[n] for n in leaves], [*cotangents.values()])
            errors = spec.check_grads(inputs, dict(zip(spec.outputs, host)), cotangents, dict(zip(leaves, found)))
            assert all(error <= 1 for error in errors.values()), errors


@pytest.mark.slow
@pytest.mark.parametrize("name", REGISTRY)
def test_inductor_equals_eager(name):
    torch._dynamo.reset()
    inputs = small(name)
    compiled = torch.compile(REGISTRY[name].function, fullgraph=True)
    graph = compiled(**inputs)
    graph = graph if isinstance(graph, tuple) else (graph,)
    if not (spec := REGISTRY[name]).opaque:
        assert all(error <= 1 for error in spec.check(inputs, dict(zip(spec.outputs, graph))).values())
    else:
        assert all(torch.equal(a, b) for a, b in zip(outputs(name, inputs), graph))


def pairs_of(t: dict, width: int = 10) -> tuple[Tensor, ...]:
    """Rows and columns of this width, their own pairs' similarities, a scale."""
    return t["x"][:, :width].contiguous(), t["W"][:, :width].contiguous(), t["b_n"], torch.tensor(2.0)


def dense_and_sparse(t: dict) -> tuple:
    """Both sides of pairs of rows."""
    return t["x"], None, None, 10, t["b_n"][:12].clone(), t["code"], t["offsets"], 5


def batch_of(t: dict, width: int = 10) -> tuple[Tensor, ...]:
    """Features of this width of the same pairs."""
    return t["x"][:, :width].contiguous(), t["W"][:6, :width].contiguous()


YES = (True, True, True)
LOW_LEVEL_ARGUMENTS = {
    "grouped_matmul": lambda t: (t["x"], t["C"], t["group"], t["beta"], t["mean"], True),
    "grouped_outer": lambda t: (t["acts"], t["x"], t["group"], 3),
    "low_rank_project": lambda t: (
        t["x"],
        t["C"][..., :4].contiguous(),
        t["mean"][:, :4].contiguous(),
        t["group"],
        t["mean"],
    ),
    "drift_sums": lambda t: (t["x"], t["x"] + t["b_d"], t["W"], torch.tensor([1.0, 0.5, -2.0], dtype=torch.float64)),
    "moved_prototypes": lambda t: LOW_LEVEL_ARGUMENTS["drift_sums"](t),
    "drrho_sums": lambda t: (t["x"], t["W"], t["b_n"], torch.tensor(2.0), 11, True),
    "drrho_grad": lambda t: (
        t["x"],
        t["W"],
        t["b_n"],
        torch.tensor(2.0),
        11,
        t["acts"][:, 0].contiguous(),
        t["b_n"],
        t["acts"][:, 1].contiguous(),
        t["x"].new_zeros(0, 80),
        7,
        True,
        True,
    ),
    "drrho_loss": lambda t: (*batch_of(t), torch.tensor(0.5), t["b_n"][:12].view(2, 6), 0.6, 1e-8, 0.5, 7, True, *YES),
    "contrast_grad": lambda t: (torch.tensor(2.0), t["x"], torch.tensor(3.0), 12, *batch_of(t), *t["b_n"][:2].unbind()),
    "clip_loss": lambda t: (*batch_of(t), torch.tensor(2.0), True, *YES),
    "siglip_loss": lambda t: (*batch_of(t), torch.tensor(2.0), torch.tensor(-3.0), True, False),
    "distill_loss": lambda t: (*batch_of(t), torch.tensor(2.0), *batch_of(t, 4), torch.tensor(3.0), True),
    "distill_loss_grad": lambda t: (
        torch.tensor(1.0),
        torch.tensor(-2.0),
        *batch_of(t),
        torch.tensor(2.0),
        *batch_of(t, 4),
        torch.tensor(3.0),
        t["x"][:4, :6].reshape(2, 2, 6).contiguous(),
        t["W"][:4, :6].reshape(2, 2, 6).abs().contiguous(),
        t["b_n"][:2],
        t["x"][:, 0].contiguous(),
        t["x"][:, 1].contiguous(),
        t["x"].new_zeros(0, 80),
        t["x"].new_zeros(0, 80),
        True,
        True,
    ),
    "siglip_sweep": lambda t: (t["x"], t["W"], torch.tensor(2.0), torch.tensor(-3.0), 11, True, True),
    "agreement_sums": lambda t: (*dense_and_sparse(t), t["group"], 0, 2),
    "agreement_counts": lambda t: (*dense_and_sparse(t), 1, 2, True, False),
    "rand_index": lambda t: (*dense_and_sparse(t), False, True),
    "rand_index_grad": lambda t: (torch.tensor(2.0), t["x"], t["x"][:0], t["x"].bfloat16(), 12),
    "concept_distances": lambda t: (*dense_and_sparse(t), t["group"]),
    "distill_sums": lambda t: (*pairs_of(t), *pairs_of(t, 4), 11, True),
    "distill_grad": lambda t: (
        *pairs_of(t),
        *pairs_of(t, 4),
        11,
        t["acts"].T[:2].contiguous(),
        torch.stack([t["b_n"], t["b_n"]]),
        t["acts"][:, 2].contiguous(),
        torch.tensor([0.5, 2.0]),
        t["x"].new_zeros(0, 80),
        t["x"].new_zeros(0, 80),
        True,
        True,
    ),
    "mahalanobis_covariance_loss": lambda t: (t["x"], t["x"] + 1, t["group"], t["C"], None, None, True, True),
    "topk_encode": lambda t: (t["x"], t["W"], t["b_n"], 4, True, t["b_n"] + 1, t["code"], False),
    "threshold_encode": lambda t: (t["x"], t["W"], t["b_n"], t["b_n"], 50, t["b_n"] + 1, t["code"]),
    "batch_topk_encode": lambda t: (t["x"], t["W"], t["b_n"], 24, t["b_n"] + 1, t["code"]),
    "ragged_decode": lambda t: (t["b_n"][:12], t["code"], t["offsets"], t["W"], t["b_d"], [9, 17]),
    "ragged_dot": lambda t: (t["x"], t["row"], t["code"], t["W"]),
    "ragged_outer": lambda t: (t["b_n"][:12], t["code"], t["row"], t["x"], 17),
    "ragged_outer_out": lambda t: (t["b_n"][:12], t["code"], t["row"], t["x"], t["W"], t["acts"].new_zeros(17)),
    "ragged_outer_used": lambda t: (t["b_n"][:12], t["code"], t["row"], t["x"], 17),
    "sparse_decode": lambda t: (t["acts"], t["indices"], t["W"], t["b_d"]),
    "gather_dot": lambda t: (t["x"], t["indices"], t["W"]),
    "sparse_outer": lambda t: (t["acts"], t["indices"], t["x"], 17),
    "threshold_codes": lambda t: (t["x"], t["W"], t["b_n"], t["b_n"], True, 50, t["b_n"] + 1, t["code"]),
    "jumprelu_codes": lambda t: (t["x"], t["W"], t["b_n"], t["b_n"], 0.5, 50),
    "sparse_outer_used": lambda t: (t["acts"], t["indices"], t["x"], 17),
    "sparse_outer_out": lambda t: (t["acts"], t["indices"], t["x"], t["W"], t["b_n"]),
}


@pytest.mark.parametrize("op", LOW_LEVEL)
def test_opcheck(op):
    if not testing.supported("cpp"):
        pytest.skip("the C++ library is not built")
    g = torch.Generator().manual_seed(0)
    t = {
        "x": torch.randn(6, 10, generator=g),
        "W": torch.randn(17, 10, generator=g),
        "b_n": torch.randn(17, generator=g),
    }
    t |= {"acts": torch.randn(6, 4, generator=g), "b_d": torch.randn(10, generator=g)}
    t["indices"] = torch.randint(17, (6, 4), generator=g)
    t |= {"C": torch.randn(3, 10, 10, generator=g), "mean": torch.randn(3, 10, generator=g)}
    t |= {"beta": torch.randn(3, generator=g), "group": torch.randint(3, (6,), generator=g)}
    t["code"], t["row"] = torch.arange(12) % 5, torch.arange(12) // 2
    t["offsets"] = torch.tensor([0, 0, 5, 5, 10, 10, 12])
    torch.library.opcheck(
        getattr(torch.ops.clipsteer_cpp, op).default,
        LOW_LEVEL_ARGUMENTS[op](t),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def mistakes():
    x, W, b = torch.zeros(4, 6), torch.zeros(9, 6), torch.zeros(9)
    acts, indices = torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.int64)
    yield ValueError, "x must be of shape", lambda: ops.topk_encode(x[:, :5], W, b, k=2)
    yield ValueError, "b_enc must be of shape", lambda: ops.topk_encode(x, W, b[:5], k=2)
    yield ValueError, "k must be in", lambda: ops.topk_encode(x, W, b, k=0)
    yield ValueError, "k must be in", lambda: ops.topk_encode(x, W, b, k=10)
    yield TypeError, "k must be an int", lambda: ops.topk_encode(x, W, b, k=2.0)
    yield TypeError, "dtype", lambda: ops.topk_encode(x, W.double(), b, k=2)
    yield TypeError, "tensor", lambda: ops.topk_encode([1.0], W, b, k=2)
    yield TypeError, "floating", lambda: ops.topk_encode(x.long(), W, b, k=2)
    yield ValueError, "device", lambda: ops.topk_encode(x, W.to("meta"), b, k=2)
    yield ValueError, "backend must be one of", lambda: ops.topk_encode(x, W, b, k=2, backend="fast")
    yield ValueError, "acts must be of indices' shape", lambda: ops.sparse_decode(acts[:, :1], indices, W)
    yield TypeError, "indices must be int64", lambda: ops.sparse_decode(acts, indices.int(), W)
    yield ValueError, r"indices must be in \[0, 9\)", lambda: ops.sparse_decode(acts, indices + 9, W)
    yield ValueError, r"indices must be in \[0, 9\)", lambda: ops.sparse_decode(acts, indices - 1, W)
    yield ValueError, "b_dec must be of shape", lambda: ops.sparse_decode(acts, indices, W, b)
    yield ValueError, "grad_buffer", lambda: ops.sparse_decode(acts, indices, W, grad_buffer=W[:3])
    yield RuntimeError, "cannot run", lambda: ops.sparse_decode(acts, indices, W, backend="cuda")


@pytest.mark.parametrize("number", range(len(list(mistakes()))))
def test_mistakes_are_named(number):
    error, message, call = list(mistakes())[number]
    if number == len(list(mistakes())) - 1 and torch.cuda.is_available():
        pytest.skip("a GPU is there")
    with pytest.raises(error, match=message):
        call()


def test_kernels_check_indices_themselves():
    if not testing.supported("cpp"):
        pytest.skip("the C++ library is not built")
    acts, W = torch.zeros(4, 2), torch.zeros(9, 6)
    for bad in (9, -1, 2**40):
        indices = torch.full((4, 2), bad)
        for op, args in (
            ("sparse_decode", (acts, indices, W, None)),
            ("gather_dot", (torch.zeros(4, 6), indices, W)),
            ("sparse_outer", (acts, indices, torch.zeros(4, 6), 9)),
        ):
            with pytest.raises((RuntimeError, ValueError, IndexError), match=str(bad)):
                _dispatch.call("cpp", op, *args)


def test_explain_and_environment(monkeypatch):
    x = torch.zeros(2, 3)
    told = ops.explain("topk_encode", x, x)
    assert [s.backend for s in told] == list(ops.BACKENDS)
    assert all(s.usable or s.reason for s in told)
    assert sum("chosen by auto" in s.reason for s in told) == 1
    with pytest.raises(ValueError, match="op must be one of"):
        ops.explain("nothing")
    monkeypatch.setenv("CLIPSTEER_BACKEND", "reference")
    assert _dispatch.choose("topk_encode", "auto", x) == "reference"
    monkeypatch.setenv("CLIPSTEER_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="backend must be one of"):
        ops.topk_encode(x, x, k=1)


def test_gpu_kernels_must_pass_their_self_check(monkeypatch):
    """A backend whose self-check fails is warned about once and not chosen; one that passes is."""
    monkeypatch.setattr(_dispatch, "unusable", lambda backend, device, dtype, op: None)
    verdicts = {"triton": "self-check failed", "cuda": None}
    monkeypatch.setattr(_dispatch, "self_check", lambda op, backend, device, dtype: verdicts[backend])
    _dispatch._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="triton topk_encode is not trusted"):
        assert _dispatch.resolve("topk_encode", "auto", "cuda", 0, torch.float32) == "cuda"
    verdicts["cuda"] = "wrong"
    with pytest.warns(RuntimeWarning, match="cuda topk_encode is not trusted"):
        assert _dispatch.resolve("topk_encode", "auto", "cuda", 0, torch.float32) == "reference"
    _dispatch._warn_once.cache_clear()


def test_self_check_finds_a_wrong_kernel(monkeypatch):
    import dataclasses

    spec, real = REGISTRY["sparse_decode"], specs.spec_errors
    wrong = dataclasses.replace(spec, function=lambda **kw: spec.function(**kw) * (1 + 1e-4))
    monkeypatch.setattr(_dispatch, "_VERDICTS", {})
    assert _dispatch.self_check("sparse_decode", "reference", torch.device("cpu"), torch.float32) is None
    monkeypatch.setattr(_dispatch, "_VERDICTS", {})
    monkeypatch.setattr(specs, "spec_errors", lambda s, *a, **kw: real(wrong, *a, **kw))
    assert "failed" in _dispatch.self_check("sparse_decode", "reference", torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    "mode", [torch.inference_mode, torch.no_grad, lambda: torch.device("meta"), lambda: torch.autocast("cpu")]
)
def test_self_check_does_not_depend_on_the_callers_modes(monkeypatch, mode):
    monkeypatch.setattr(_dispatch, "_VERDICTS", {})
    with mode():
        assert _dispatch.self_check("topk_encode", "reference", torch.device("cpu"), torch.float32) is None


@pytest.mark.parametrize(
    "transform", [torch.func.grad, torch.func.vmap, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))]
)
def test_self_check_does_not_depend_on_the_callers_transforms(monkeypatch, transform):
    monkeypatch.setattr(_dispatch, "_VERDICTS", {})
    found = []

    def inside(x):
        found.append(_dispatch.self_check("topk_encode", "cpp", torch.device("cpu"), torch.float32))
        return x.sum()

    if not testing.supported("cpp"):
        pytest.skip("the C++ library is not built")
    transform(inside)(torch.ones(3))
    assert found == [None]


def test_a_self_check_that_says_nothing_is_not_kept(monkeypatch):
    def no_memory(*args, **options):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(_dispatch, "_VERDICTS", {})
    with monkeypatch.context() as patch:
        patch.setattr(specs, "spec_errors", no_memory)
        assert "none left" in _dispatch.self_check("sparse_decode", "reference", torch.device("cpu"), torch.float32)
    assert _dispatch.self_check("sparse_decode", "reference", torch.device("cpu"), torch.float32) is None


def test_a_self_check_is_of_the_precision_at_hand(monkeypatch):
    """What a kernel does under TF32 says nothing about IEEE, and the other way round; of halves there is one way."""
    asked = []

    def verdict(op, backend, device, dtype):
        asked.append((dtype, torch.get_float32_matmul_precision()))
        return "wrong" if torch.get_float32_matmul_precision() == "high" and dtype == torch.float32 else None

    monkeypatch.setattr(_dispatch, "_VERDICTS", {})
    before = torch.get_float32_matmul_precision()
    try:
        for _ in range(2):
            for setting in ("highest", "high"):
                torch.set_float32_matmul_precision(setting)
                for dtype in (torch.float32, torch.bfloat16):
                    found = _dispatch.self_check("sparse_decode", "reference", torch.device("cpu"), dtype, verdict)
                    assert (found == "wrong") == (setting == "high" and dtype == torch.float32)
    finally:
        torch.set_float32_matmul_precision(before)
    assert asked == [(torch.float32, "highest"), (torch.bfloat16, "highest"), (torch.float32, "high")]


@pytest.mark.skipif(_dispatch.missing("cpp") is not None, reason="the C++ library is not built")
def test_a_gradient_may_take_another_backend_than_its_encode(monkeypatch):
    asked = []

    def choose(op, backend, tensor):
        asked.append((op, backend))
        return "cpp" if op == "topk_encode" else "other"

    def call(backend, op, *args):
        asked.append((op, backend))
        return _dispatch.call("cpp", op, *args)

    # the package's attributes of these names are the ops
    monkeypatch.setattr(sys.modules["clipsteer.ops.topk_encode"], "choose", choose)
    monkeypatch.setattr(sys.modules["clipsteer.ops._sparse"], "call", call)
    x, W = torch.randn(5, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)
    with torch.no_grad():
        ops.topk_encode(x, W, k=3)
    assert asked == [("topk_encode", "auto")]
    ops.topk_encode(x, W, k=3)[0].sum().backward()
    assert asked[1:] == [
        ("topk_encode", "auto"), ("sparse_decode", "auto"), ("sparse_decode", "other"), ("sparse_outer", "other")
    ]  # fmt: skip


def test_device_shapes_take_the_gpu_kernels_through_their_branches():
    """What the main shapes do on a GPU, the self-check and the GPU tests do too: many buckets, a redone one, …"""
    kernels = pytest.importorskip("clipsteer.kernels.topk_encode")
    hopper = pytest.importorskip("clipsteer.kernels._launch").chip_named("sm_90")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        seen = set()
        for shape in REGISTRY["topk_encode"].device_shapes:
            precision = "tf32x3" if dtype == torch.float32 else "ieee"
            config = kernels.tile_config(dtype, precision, hopper, tma=True)
            buckets, k = -(-shape["n"] // config["BLOCK_N"]), shape["k"]
            J = kernels.candidates_per_bucket(buckets, k)
            if k > kernels.MAX_K or J > kernels.MAX_CANDIDATES_PER_BUCKET:
                seen.add("whole rows")
                continue
            seen.add("whole tiles" if shape["d"] % config["BLOCK_D"] == 0 else "a partial tile")
            seen |= {"many buckets"} if buckets > 8 and shape["n"] % config["BLOCK_N"] else set()
            seen |= {"may redo"} if k > J else set()
            inputs = REGISTRY["topk_encode"].make(shape, dtype, torch.Generator().manual_seed(0), 1.0, False)
            winners = ops.topk_encode(inputs["x"], inputs["W_enc"], inputs["b_enc"], k=k)[1] // config["BLOCK_N"]
            if int(torch.stack([(winners == b).sum(1) for b in range(buckets)]).max()) > J:
                seen.add("redo")
        assert seen == {"whole rows", "whole tiles", "a partial tile", "many buckets", "may redo", "redo"}, dtype
    # the CUDA selection filters groups of columns only in rows longer than it can sort at once
    assert max(shape["n"] for shape in REGISTRY["topk_encode"].device_shapes) > 4096


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("name", "backend"), LIGHT)
def test_device_shapes_hold_on_the_cpu(name, backend):
    for shape in REGISTRY[name].device_shapes:
        errors = spec_errors(REGISTRY[name], shape, torch.float32, seed=1, backend=backend)
        assert all(error <= 1 for error in errors.values()), errors


@pytest.mark.parametrize("name", REGISTRY)
def test_bounds_catch_planted_bugs(name):
    """One element that is wrong by a thousandth exceeds the bound."""
    spec, inputs = REGISTRY[name], small(name)
    good = dict(zip(spec.outputs, outputs(name, inputs)))
    assert max(spec.check(inputs, good).values()) <= 1
    first = spec.outputs[0]
    bad = {**good, first: good[first].clone()}
    bad[first].view(-1)[0] *= 1 + 1e-3
    assert max(spec.check(inputs, bad).values()) > 1


def test_bounds_catch_a_dropped_term_and_a_swapped_winner():
    inputs, spec = small("sparse_decode"), REGISTRY["sparse_decode"]
    dropped = {**inputs, "acts": inputs["acts"].clone()}
    dropped["acts"][0, 0] = 0
    assert max(spec.check(inputs, {"x_hat": ops.sparse_decode(**dropped)}).values()) > 1
    inputs, spec = small("topk_encode"), REGISTRY["topk_encode"]
    acts, indices = ops.topk_encode(**inputs)
    indices[0, 0] = next(i for i in range(inputs["W_enc"].shape[0]) if i not in indices[0].tolist())
    assert max(spec.check(inputs, {"acts": acts, "indices": indices}).values()) > 1


INTERPRETED = """
from clipsteer import testing
rows = testing.validate(backends=["triton"], cases=CASES)
print(testing.table(rows))
without = {"generalised_rand_index_sparse", "concept_distances_sparse"}  # they have no kernels
passed = {r.op for r in rows if r.verdict == "pass"}
failed = {r.op for r in rows if r.verdict != "pass"}
sys.exit(failed != without or len(passed) < 8)
"""


@pytest.mark.slow
@pytest.mark.parametrize("cases", day_and_night(15, 40))
def test_triton_in_the_interpreter(interpret, cases):
    """The same properties on interpreted kernels."""
    interpret(INTERPRETED.replace("CASES", str(cases)))


GPU = [
    (name, backend, dtype)
    for name, spec in REGISTRY.items()
    for backend in ("triton", "cuda")
    if backend in OPS[name].backends
    for dtype in DTYPES[backend]
]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "backend", "dtype"), GPU, ids=label)
def test_properties_on_gpu(name, backend, dtype):
    # all properties in one test, so that kernels are compiled once
    if (reason := _dispatch.missing(backend)) is not None:
        pytest.skip(reason)

    @settings(max_examples=12)
    @given(testing.cases(backend, dtype, REGISTRY[name], "cuda"))
    def holds(case):
        for prop, check in testing.PROPERTIES.items():
            errors = check(case)
            assert all(error <= 1 for error in errors.values()), (prop, errors)

    holds()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES["triton"], ids=label)
@pytest.mark.parametrize("name", REGISTRY)
def test_auto_trusts_a_kernel_on_gpu_and_is_right(name, dtype):
    assert _dispatch.resolve(name, "auto", "cuda", 0, dtype) in ("triton", "cuda"), ops.explain(
        name, torch.empty(1, dtype=dtype, device="cuda")
    )
    # forward and backward may take different backends
    spec = REGISTRY[name]
    errors = spec_errors(spec, spec.shapes[1], dtype, seed=1, backend="auto", device="cuda")
    assert max(errors.values()) <= 1, errors


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_offsets_beyond_2_to_the_31(backend):
    """Inputs and gradients of more elements than 32 bits can number; the last rows must be what they are alone."""
    if (reason := _dispatch.missing(backend)) is not None:
        pytest.skip(reason)
    d, many = 1024, 2**21 + 77  # many · d = 2^31 + 78,848
    g = torch.Generator("cuda").manual_seed(0)
    big = torch.randn(many, d, device="cuda", dtype=torch.bfloat16, generator=g)
    few = torch.randn(64, d, device="cuda", dtype=torch.bfloat16, generator=g)
    tail = slice(-50, None)

    acts, indices = ops.topk_encode(big, few, k=4, backend=backend)
    alone = ops.topk_encode(big[tail].clone(), few, k=4, backend=backend)
    assert torch.equal(acts[tail], alone[0])
    assert torch.equal(indices[tail], alone[1])
    del acts, indices

    big[tail] *= 8  # so that features of the end win
    acts, indices = ops.topk_encode(few, big, k=4, backend=backend)
    alone = ops.topk_encode(few, big[tail].clone(), k=4, backend=backend)
    assert torch.equal(indices, alone[1] + many - 50)
    torch.testing.assert_close(acts, alone[0], rtol=2**-7, atol=0)

    W = big.requires_grad_()
    x_hat = ops.sparse_decode(acts.detach(), indices, W, backend=backend)
    assert torch.equal(x_hat, ops.sparse_decode(acts.detach(), alone[1], W[tail].detach().clone(), backend=backend))
    end = W[tail].detach().clone().requires_grad_()
    ops.sparse_decode(acts.detach(), alone[1], end, backend=backend).backward(few)
    x_hat.backward(few)
    assert torch.equal(W.grad[tail], end.grad)
    assert not W.grad[:-50].any()


@pytest.mark.gpu
def test_conceptor_offsets_beyond_2_to_the_31():
    d, many = 1024, 2**21 + 77
    x = torch.randn(many, d, device="cuda", dtype=torch.bfloat16, generator=torch.Generator("cuda").manual_seed(0))
    C = torch.randn(3, d, d, device="cuda", dtype=torch.bfloat16) / d
    index = torch.arange(many, device="cuda") % 3
    out = ops.conceptor_project(x, C, index=index, backend="triton")
    alone = ops.conceptor_project(x[-50:].clone(), C, index=index[-50:], backend="triton")
    assert torch.equal(out[-50:], alone)


@pytest.mark.gpu
@pytest.mark.parametrize("name", REGISTRY)
def test_gpu_graph_capture_needs_no_synchronisation(name):
    inputs = {n: v.cuda() if isinstance(v, Tensor) else v for n, v in small(name).items()}
    for _ in range(3):
        eager = outputs(name, inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outputs(name, inputs)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(eager, captured))
