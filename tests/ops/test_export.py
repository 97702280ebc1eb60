"""``torch.export``, its files and AOTInductor's: any batch, a new process, one name for an op on every device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from clipsteer import SAE, ops, testing
from clipsteer.ops import REGISTRY, _dispatch
from clipsteer.ops._lowlevel import LOW_LEVEL
from clipsteer.sae.architectures import ARCHITECTURES

# what has a row for each of the batch: all of it moves together
PER_ROW = {
    "mahalanobis_covariance_loss": ("new", "old", "labels"),
    "mahalanobis_covariance_loss_low_rank": ("new", "old", "labels"),
    "semantic_drift": ("old", "new"),
    "threshold_encode": ("x",),
    "jumprelu_encode": ("x",),
    "batch_topk_encode": ("x",),
    "threshold_encode_options": ("x",),
    "batch_topk_encode_options": ("x",),
    "sparse_decode_prefixes": ("acts", "indices"),
    "drrho_loss": ("image", "text", "ref_image", "ref_text", "u"),
    "clip_loss": ("image", "text"),
    "siglip_loss": ("image", "text"),
    "distill_loss": ("image", "text", "teacher_image", "teacher_text"),
    "generalised_rand_index": ("P", "Q"),
    "concept_distances": ("P", "Q"),
}


def rows_of(name: str) -> tuple[str, ...]:
    return PER_ROW.get(name, REGISTRY[name].rows)


def made(name: str, shape: int) -> dict:
    spec = REGISTRY[name]
    return spec.make(spec.shapes[shape], torch.float32, torch.Generator().manual_seed(0), 1.0, False)


class Op(nn.Module):
    """An op with its weights as parameters, called with what has rows."""

    def __init__(self, name: str, backend: str) -> None:
        super().__init__()
        self.op, self.backend = name, backend
        self.fixed = {}
        for n, value in made(name, 1).items():
            if n in rows_of(name):
                continue
            if isinstance(value, Tensor) and value.is_floating_point():
                self.register_parameter(f"_{n}", nn.Parameter(value))
            else:
                self.fixed[n] = value

    def forward(self, rows: dict[str, Tensor]) -> tuple[Tensor, ...]:
        weights = {n[1:]: p for n, p in self.named_parameters()}
        result = REGISTRY[self.op].function(**rows, **weights, **self.fixed, backend=self.backend)
        return result if isinstance(result, tuple) else (result,)


def batch(name: str, rows: dict, size: int) -> dict:
    """The same rows over and over, so many of them."""
    found = {}
    for n, t in rows.items():
        dim = 1 if n == "u" else 0
        found[n] = None if t is None else t.index_select(dim, torch.arange(size) % t.shape[dim])
    return found


def targets(program: torch.export.ExportedProgram) -> set[str]:
    """The clipsteer ops of a graph and of the graphs inside it."""
    graphs = [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    names = {str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"}
    return {name.removesuffix(".default") for name in names if name.startswith("clipsteer")}


@pytest.mark.parametrize(
    ("backend", "strict"),
    [("auto", False), ("auto", True), *((b, False) for b in ("reference", "cpp") if testing.supported(b))],
)
@pytest.mark.parametrize("name", [name for name in REGISTRY if rows_of(name)])
def test_any_batch(name: str, backend: str, strict: bool) -> None:
    module = Op(name, backend)
    rows = {n: t for n, t in made(name, 1).items() if n in rows_of(name)}
    size = len(rows[rows_of(name)[0]])
    dynamic = {n: None if t is None else {1 if n == "u" else 0: Dim.DYNAMIC} for n, t in rows.items()}
    program = export(module, (rows,), dynamic_shapes=(dynamic,), strict=strict)
    found = targets(program)
    if backend == "auto":
        assert found
        assert {t.split(".")[0] for t in found} == {"clipsteer"}
    elif backend == "reference":
        assert not found
    for other in (2, size, size + 1, 40 * size):
        given = batch(name, rows, other)
        for a, b in zip(program.module()(given), module(given)):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


class Part(nn.Module):
    def __init__(self, sae: SAE, what: str) -> None:
        super().__init__()
        self.sae, self.what = sae, what

    def forward(self, x: Tensor) -> tuple[Tensor | None, ...]:
        result = getattr(self.sae, self.what)(x)
        return (result,) if isinstance(result, Tensor) else tuple(result)[:3]


def sae_of(architecture: str, **options: object) -> SAE:
    torch.manual_seed(0)
    return SAE(16, 64, architecture, 4, normalize="layer_norm", **options).eval()


@pytest.mark.parametrize("what", ["forward", "encode"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_sae_of_any_batch(architecture: str, what: str) -> None:
    part = Part(sae_of(architecture), what)
    x = torch.randn(3, 5, 16)
    program = export(part, (x,), dynamic_shapes=({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},))
    for shape in ((2, 2), (7, 50)):
        x = torch.randn(*shape, 16)
        for a, b in zip(program.module()(x), part(x)):
            # the graph's dense products add up in an order of their own
            assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_an_exported_sae_trains_as_the_module_does() -> None:
    sae, x = sae_of("topk"), torch.randn(6, 16)
    program = export(Part(sae, "forward"), (x,), dynamic_shapes=({0: Dim.DYNAMIC},)).module()
    x = torch.randn(9, 16)
    for module in (program, sae):
        result = module(x)
        ((result[0] - x).square().sum() + result[1].sum()).backward()
    parameters = dict(program.named_parameters())
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(parameters[f"sae.{name}"].grad, parameter.grad)


@pytest.mark.parametrize("name", ["topk_encode", "threshold_encode", "batch_topk_encode"])
def test_an_exported_encoder_trains_with_its_options_and_without(name: str) -> None:
    """What is left out of an exported call has its default, in programs of before there was a scale as well."""
    for variant in (name, f"{name}_options"):
        part = Op(variant, "auto")
        rows = {n: t for n, t in made(variant, 1).items() if n in rows_of(variant)}
        program = export(part, (rows,)).module()
        for module in (program, part):
            module(rows)[0].square().sum().backward()
        parameters = dict(program.named_parameters())
        for n, parameter in part.named_parameters():
            if n != "_threshold":  # it has no gradient
                torch.testing.assert_close(parameters[n].grad, parameter.grad)


def test_an_exported_loss_says_that_it_does_not_train() -> None:
    module = Op("mahalanobis_covariance_loss", "auto")
    rows = {n: t for n, t in made("mahalanobis_covariance_loss", 1).items() if n in ("new", "old", "labels")}
    program = export(module, (rows,)).module()
    rows["new"].requires_grad_()
    with pytest.raises(RuntimeError, match='backend="reference"'):
        program(rows)[0].backward()


LOADED = """
import sys, torch
from clipsteer import ops
states = ops.load()
assert any(s.usable for s in states)
x, *expected = torch.load(sys.argv[2])
if sys.argv[3] == "export":
    found = torch.export.load(sys.argv[1]).module()(x)
else:
    found = torch._inductor.aoti_load_package(sys.argv[1])(x)
for a, b in zip(found, expected):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
assert torch.equal(found[2], expected[2])
"""


def in_a_new_process(program: Path, folder: Path, x: Tensor, module: nn.Module, kind: str) -> None:
    torch.save([x, *(t.detach() for t in module(x))], folder / "values.pt")
    command = [sys.executable, "-W", "ignore", "-c", LOADED, str(program), str(folder / "values.pt"), kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_program_loads_in_a_new_process(tmp_path: Path) -> None:
    module = Part(sae_of("topk"), "forward")
    program = export(module, (torch.randn(6, 16),), dynamic_shapes=({0: Dim.DYNAMIC},))
    torch.export.save(program, tmp_path / "sae.pt2")
    in_a_new_process(tmp_path / "sae.pt2", tmp_path, torch.randn(33, 16), module, "export")


@pytest.mark.slow
def test_a_compiled_program_loads_in_a_new_process(tmp_path: Path) -> None:
    module = Part(sae_of("topk"), "forward")
    program = export(module, (torch.randn(6, 16),), dynamic_shapes=({0: Dim.DYNAMIC},))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "sae.pt2"))
    in_a_new_process(Path(package), tmp_path, torch.randn(33, 16), module, "aoti")


def pairs_of(t: dict, width: int = 10) -> tuple[Tensor, ...]:
    return t["x"][:, :width].contiguous(), t["W"][:, :width].contiguous(), t["b_n"], torch.tensor(2.0)


def dense_and_sparse(t: dict) -> tuple:
    return t["x"], None, None, 10, t["b_n"][:12].clone(), t["code"], t["offsets"], 5


PORTABLE_ARGUMENTS = {
    "topk_encode": lambda t: (t["x"], t["W"], t["b_n"], 4, True, t["b_n"] + 1, t["code"][:5], False),
    "threshold_encode": lambda t: (t["x"], t["W"], t["b_n"], t["b_n"].abs(), 40, t["b_n"] + 1, t["code"][:5]),
    "batch_topk_encode": lambda t: (t["x"], t["W"], t["b_n"], 24, t["b_n"] + 1, t["code"][:5]),
    "ragged_decode": lambda t: (t["b_n"][:12].clone(), t["code"], t["offsets"], t["W"], t["b_d"], [9, 17]),
    "ragged_dot": lambda t: (t["x"], t["row"], t["code"], t["W"]),
    "ragged_outer": lambda t: (t["b_n"][:12].clone(), t["code"], t["row"], t["x"], 17),
    "sparse_decode": lambda t: (t["acts"], t["indices"], t["W"], t["b_d"]),
    "gather_dot": lambda t: (t["x"], t["indices"], t["W"]),
    "sparse_outer": lambda t: (t["acts"], t["indices"], t["x"], 17),
    "ragged_outer_out": lambda t: (
        t["b_n"][:12], t["code"], t["row"], t["x"], torch.empty(17, 10), torch.empty(17),
    ),
    "sparse_outer_out": lambda t: (t["acts"], t["indices"], t["x"], torch.empty(17, 10), torch.empty(17)),
    "grouped_matmul": lambda t: (t["x"], t["C"], t["group"], t["beta"], t["mean"], False),
    "grouped_outer": lambda t: (t["acts"], t["x"], t["group"], 3),
    "low_rank_project": lambda t: (t["x"], t["C"][..., :4].contiguous(), t["s"], t["group"], t["mean"]),
    "mahalanobis_covariance_loss": lambda t: (t["x"], 2 * t["x"] + 1, t["group"], t["C"], None, None, True, True),
    "drift_sums": lambda t: (t["x"], t["x"] + t["b_d"], t["W"], torch.tensor([1.0, 0.5, -2.0], dtype=torch.float64)),
    "drrho_sums": lambda t: (t["x"], t["W"], t["b_n"], torch.tensor(2.0), 11, False),
    "drrho_grad": lambda t: (
        t["x"], t["W"], t["b_n"], torch.tensor(2.0), 11, t["acts"][:, 0].contiguous(), t["b_n"],
        t["acts"][:, 1].contiguous(), t["x"].new_zeros(0, 80), 7, True, True,
    ),
    "siglip_sweep": lambda t: (t["x"], t["W"], torch.tensor(2.0), torch.tensor(-3.0), 11, True, True),
    "agreement_sums": lambda t: (*dense_and_sparse(t), t["group"], 0, 1),
    "agreement_counts": lambda t: (*dense_and_sparse(t), 0, 1, True, True),
    "concept_distances": lambda t: (*dense_and_sparse(t), t["group"]),
    "distill_sums": lambda t: (*pairs_of(t), *pairs_of(t, 4), 11, False),
    "distill_grad": lambda t: (
        *pairs_of(t), *pairs_of(t, 4), 11, t["acts"].T[:2].contiguous(), torch.stack([t["b_n"], t["b_n"]]),
        t["acts"][:, 2].contiguous(), torch.tensor([0.5, 2.0]), t["x"].new_zeros(0, 80), t["x"].new_zeros(0, 80),
        True, True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("op", [n for n, low in LOW_LEVEL.items() if not low.cpp_only])
def test_a_portable_op_without_any_compiled_backend(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that was exported where kernels are runs where none are: in plain torch, with the same values."""
    if not testing.supported("cpp"):
        pytest.skip("the C++ library is not built")
    ops.load()
    g = torch.Generator().manual_seed(0)
    shapes = {"x": (6, 10), "W": (17, 10), "b_n": (17,), "acts": (6, 4), "b_d": (10,), "C": (3, 10, 10)}
    shapes |= {"mean": (3, 10), "beta": (3,), "s": (3, 4)}
    t = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    t["indices"], t["group"] = torch.randint(17, (6, 4), generator=g), torch.randint(3, (6,), generator=g)
    t["code"], t["row"] = torch.arange(12) % 5, torch.arange(12) // 2
    t["row"][-1] = -1
    t["offsets"] = torch.tensor([0, 0, 5, 5, 10, 10, 12])
    found = []
    for backend in ("cpp", "reference"):
        monkeypatch.setenv("CLIPSTEER_BACKEND", backend)
        args = PORTABLE_ARGUMENTS[op](t)
        result = _dispatch.call("portable", op, *args)
        result = args[-2:] if op.endswith("_out") else result
        found.append(result if isinstance(result, tuple) else (result,))
    for a, b in zip(*found):
        assert a.dtype == b.dtype
    if op == "drift_sums":  # what sums are relative to is each backend's own
        found = [(peak + total.log(), moved / total.unsqueeze(1)) for peak, total, moved in found]
    for a, b in zip(*found):
        if op not in ("drrho_sums", "distill_sums") or a.shape[-1] != 80:  # kept similarities, of none
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_a_graph_moves_to_the_gpu() -> None:
    from torch.export.passes import move_to_device_pass

    module = Part(sae_of("topk"), "forward")
    program = export(module, (torch.randn(6, 16),), dynamic_shapes=({0: Dim.DYNAMIC},))
    moved = move_to_device_pass(program, "cuda").module()
    x = torch.randn(33, 16)
    for a, b in zip(moved(x.cuda()), module(x)):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-4)
