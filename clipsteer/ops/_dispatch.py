"""Which implementation runs: availability, the choice, the GPU self-check, ``explain``.

Every backend registers the same low-level ops (CUDA C++ some of them) under a namespace of its own; ``call`` reaches
them.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipsteer.ops._spec import BACKENDS, measured_on

DTYPES = {
    "reference": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "cpp": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
SCHEMAS = {
    "topk_encode": "(Tensor x, Tensor W_enc, Tensor? b_enc, SymInt k) -> (Tensor, Tensor)",
    "sparse_decode": "(Tensor acts, Tensor indices, Tensor W, Tensor? b) -> Tensor",
    "gather_dot": "(Tensor rows, Tensor indices, Tensor W) -> Tensor",
    "sparse_outer": "(Tensor coeff, Tensor indices, Tensor rows, SymInt n) -> (Tensor, Tensor)",
    "sparse_outer_out": "(Tensor coeff, Tensor indices, Tensor rows, Tensor(a!) dW, Tensor(b!) db) -> ()",
    "grouped_matmul": "(Tensor x, Tensor W, Tensor? index, Tensor? beta, Tensor? mean, bool transpose) -> Tensor",
    "grouped_outer": "(Tensor a, Tensor b, Tensor? index, SymInt groups) -> Tensor",
    "low_rank_project": "(Tensor x, Tensor U, Tensor s, Tensor? index, Tensor? mean) -> Tensor",
    "drift_sums": "(Tensor old, Tensor new, Tensor prototypes, Tensor scale) -> (Tensor, Tensor, Tensor)",
    "mahalanobis_covariance_loss": "(Tensor new, Tensor old, Tensor labels, Tensor factor, Tensor? s, Tensor? diag, "
    "bool normalize, bool need_grad) -> (Tensor, Tensor)",
    "drrho_sums": "(Tensor rows, Tensor cols, Tensor diag, Tensor scale, SymInt offset, bool keep) "
    "-> (Tensor, Tensor, Tensor)",
    "drrho_grad": "(Tensor rows, Tensor cols, Tensor diag, Tensor scale, SymInt offset, Tensor row_u, Tensor col_u, "
    "Tensor own, Tensor kept, SymInt width, bool need_rows, bool need_cols) -> (Tensor, Tensor, Tensor)",
}
_FILES = {  # in kernels/, and the ops in each
    "topk_encode": ("topk_encode",),
    "sparse_decode": ("sparse_decode", "gather_dot", "sparse_outer", "sparse_outer_out"),
    "conceptor_project": ("grouped_matmul", "grouped_outer", "low_rank_project"),
    "semantic_drift": ("drift_sums",),
    "mahalanobis_covariance_loss": ("mahalanobis_covariance_loss",),
    "drrho_loss": ("drrho_sums", "drrho_grad"),
}


def _fake_topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, screen: bool = True
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int64)


def _fake_sparse_decode(acts: Tensor, indices: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    return W.new_empty(acts.shape[0], W.shape[1])


def _fake_gather_dot(rows: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    return rows.new_empty(indices.shape)


def _fake_sparse_outer(coeff: Tensor, indices: Tensor, rows: Tensor, n: int) -> tuple[Tensor, Tensor]:
    return rows.new_empty(n, rows.shape[1]), rows.new_empty(n)


def _fake_sparse_outer_out(coeff: Tensor, indices: Tensor, rows: Tensor, dW: Tensor, db: Tensor) -> None:
    return None


def _fake_grouped_matmul(
    x: Tensor, W: Tensor, index: Tensor | None, beta: Tensor | None, mean: Tensor | None, transpose: bool
) -> Tensor:
    return x.new_empty(x.shape[0], W.shape[1] if transpose else W.shape[2])


def _fake_grouped_outer(a: Tensor, b: Tensor, index: Tensor | None, groups: int) -> Tensor:
    return a.new_empty(groups, a.shape[1], b.shape[1])


def _fake_low_rank_project(x: Tensor, U: Tensor, s: Tensor, index: Tensor | None, mean: Tensor | None) -> Tensor:
    return torch.empty_like(x)


def _fake_drift_sums(old: Tensor, new: Tensor, prototypes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    C, dtype = prototypes.shape[0], torch.promote_types(old.dtype, torch.float32)
    shapes = ((C,), (C,), tuple(prototypes.shape))
    return tuple(prototypes.new_empty(shape, dtype=dtype) for shape in shapes)


def _fake_mahalanobis_covariance_loss(
    new: Tensor, old: Tensor, labels: Tensor, factor: Tensor, s: Tensor | None, diag: Tensor | None,
    normalize: bool, need_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide = torch.promote_types(new.dtype, torch.float32)
    return new.new_empty((), dtype=wide), new.new_empty(new.shape[0] if need_grad else 0, new.shape[1], dtype=wide)


def _fake_drrho_sums(
    rows: Tensor, cols: Tensor, diag: Tensor, scale: Tensor, offset: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    M, N = rows.shape[0], cols.shape[0]
    # whole panels and a line; see row_stride in drrho_loss.cpp
    return diag.new_empty(M), diag.new_empty(N), diag.new_empty(M if keep else 0, (N + 63) // 64 * 64 + 16)


def _fake_drrho_grad(
    rows: Tensor, cols: Tensor, diag: Tensor, scale: Tensor, offset: int, row_u: Tensor, col_u: Tensor, own: Tensor,
    kept: Tensor, width: int, need_rows: bool, need_cols: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    M, N = rows.shape[0] if need_rows else 0, cols.shape[0] if need_cols else 0
    return diag.new_empty(M, width), diag.new_empty(N, width), diag.new_empty(())


_FAKES: dict[str, Callable[..., Any]] = {name: globals()[f"_fake_{name}"] for name in SCHEMAS}
# Libraries that hold Python registrations live as long as the process.
_LIBRARIES: list[torch.library.Library] = []


def _load_binary(stem: str, namespace: str, how: str) -> str | None:
    path = Path(__file__).resolve().parent.parent / f"{stem}.so"
    if not path.exists():
        return f"{path.name} was not built; {how}"
    try:
        torch.ops.load_library(str(path))
        for name, fake in _FAKES.items():
            if stem == "_C" or hasattr(getattr(torch.ops, namespace), name):
                torch.library.register_fake(f"{namespace}::{name}", fake)
    except (OSError, RuntimeError) as error:
        return f"{path.name} does not load with torch {torch.__version__} ({error}); {how}"
    return None


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def _load_triton() -> str | None:
    try:
        import triton

        from clipsteer.kernels import _launch as launch

        modules = {
            name: importlib.import_module(f"clipsteer.kernels.{f}") for f, names in _FILES.items() for name in names
        }
    except Exception as error:  # another triton than the kernels were written for may lack any name they use
        return f"triton cannot be imported ({error}); install the triton that belongs to this torch build"
    library = torch.library.Library("clipsteer_triton", "DEF")
    _LIBRARIES.append(library)
    for name, schema in SCHEMAS.items():
        library.define(name + schema)
        for key in ("CPU", "CUDA") if interpreted() else ("CUDA",):
            library.impl(name, getattr(modules[name], name), key)
        torch.library.register_fake(f"clipsteer_triton::{name}", _FAKES[name], lib=library)
    if interpreted() and (failure := launch.interpreter_failure()) is not None:
        return f"the interpreter of triton {triton.__version__} fails here ({failure}); try another triton or numpy"
    return None


@functools.cache
def missing(backend: str) -> str | None:
    """Why ``backend`` cannot run at all in this process (and how to get it), or None when it can."""
    if backend == "cpp":
        return _load_binary("_C", "clipsteer_cpp", "reinstall clipsteer with a C++20 compiler on the PATH")
    if backend in ("triton", "cuda") and not torch.cuda.is_available() and not (backend == "triton" and interpreted()):
        return "no GPU is visible to torch" + (
            "; TRITON_INTERPRET=1 runs it on the CPU, slowly" * (backend == "triton")
        )
    if backend == "triton":
        return _load_triton()
    if backend == "cuda":
        return _load_binary("_C_cuda", "clipsteer_cuda", "reinstall clipsteer with nvcc on the PATH and a CUDA torch")
    return None


def unusable(backend: str, device: torch.device, dtype: torch.dtype, op: str | None = None) -> str | None:
    """Why ``backend`` cannot serve (public op ``op`` on) tensors of this device and dtype, or None when it can."""
    from clipsteer.ops import REGISTRY

    if op is not None and backend not in REGISTRY[op].backends:
        return f"it has no kernel for {op}, which {', '.join(REGISTRY[op].backends)} serve"
    if (reason := missing(backend)) is not None:
        return reason
    if dtype not in DTYPES[backend]:
        return f"it has no {str(dtype).removeprefix('torch.')} kernels"
    if backend == "cpp" and device.type != "cpu":
        return f"it serves CPU tensors, these are on {device}"
    if backend in ("triton", "cuda") and device.type != "cuda" and not (backend == "triton" and interpreted()):
        return f"it serves CUDA tensors, these are on {device}"
    return None


_VERDICTS: dict[tuple[str, str, torch.device, torch.dtype], str | None] = {}


def self_check(
    op: str, backend: str, device: torch.device, dtype: torch.dtype, verdict: Callable[..., str | None] | None = None
) -> str | None:
    """Run a GPU kernel against its bound on the device at hand; None when it passed, else what went wrong.
    ``verdict`` says it of a kernel that is none of the ops'.

    The verdict is kept, unless it says nothing about the kernel: no memory was left, or a CUDA graph is being captured.
    The caller's modes (inference, autocast, a default device) do not reach it.
    """
    key = (op, backend, device, dtype)
    if key in _VERDICTS:
        return _VERDICTS[key]
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "it cannot be checked while a CUDA graph is captured; run the op once before"
    try:
        with (
            torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False),
            torch.device("cpu"),
        ):  # fmt: skip
            _VERDICTS[key] = (verdict or _verdict)(op, backend, device, dtype)
    except torch.OutOfMemoryError as error:
        return f"its self-check ran out of memory: {error}"
    except Exception as error:  # a kernel that cannot launch must not take the caller's program down
        _VERDICTS[key] = f"self-check raised {type(error).__name__}: {error}"
    return _VERDICTS[key]


def _verdict(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    from clipsteer.ops import REGISTRY

    spec = REGISTRY[op]
    for seed, shape in enumerate((*spec.shapes[:3], *spec.device_shapes)):
        worst = spec_errors(spec, shape, dtype, seed=seed, backend=backend, device=device)
        if max(worst.values()) > 1:
            return f"self-check failed at {shape}: {worst}"
    return None


def spec_errors(
    spec: Any, shape: dict[str, int], dtype: torch.dtype, *, seed: int, backend: str, device: Any = "cpu",
    scale: float = 1.0, exact: bool = False, arrange: Callable[[Tensor], Tensor] = lambda t: t,
) -> dict[str, float]:  # fmt: skip
    """Worst error of every output and gradient of one drawn case, as a fraction of its bound.

    ``arrange`` may lay an input out anew (strides, fences) but not change its values.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = spec.make(shape, dtype, generator, scale, exact)
    moved = {name: arrange(v.detach().to(device)) if isinstance(v, Tensor) else v for name, v in drawn.items()}
    leaves = spec.leaves(moved)
    for name in leaves:
        moved[name].requires_grad_()
    result = spec.function(**moved, backend=backend)
    outputs = dict(zip(spec.outputs, result if isinstance(result, tuple) else (result,)))
    host = {name: value.detach().cpu() for name, value in outputs.items()}
    with measured_on(device):
        errors = spec.check(drawn, host)
    smooth = [name for name, value in outputs.items() if value.requires_grad]
    grad_out = {
        name: torch.randn(host[name].shape, generator=generator, dtype=torch.float64).to(dtype) for name in smooth
    }
    if exact:
        grad_out = {name: (2 * value).round() for name, value in grad_out.items()}
    if not leaves:
        return errors
    grads = torch.autograd.grad(
        [outputs[name] for name in smooth],
        [moved[name] for name in leaves],
        [grad_out[name].to(device) for name in smooth],
    )
    host_grads = {name: g.detach().cpu() for name, g in zip(leaves, grads)}
    with measured_on(device):
        found = spec.check_grads(drawn, host, grad_out, host_grads)
    return errors | {f"d {name}": e for name, e in found.items()}


def _gpu_order(op: str, device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    from clipsteer.ops import REGISTRY

    known = device.type == "cuda" and torch.cuda.is_available()
    return REGISTRY[op].gpu_order(torch.cuda.get_device_capability(device) if known else (0, 0), dtype)


def resolve(op: str, backend: str, device_type: str, device_index: int | None, dtype: torch.dtype) -> str:
    """The backend that runs: the keyword, then ``CLIPSTEER_BACKEND``, then the fastest one that is trusted here."""
    if backend == "auto":
        backend = os.environ.get("CLIPSTEER_BACKEND", "auto").lower() or "auto"
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"{op}: backend must be one of {('auto', *BACKENDS)}, got {backend!r}")
    device = torch.device(device_type, device_index) if device_index is not None else torch.device(device_type)
    if backend != "auto":
        if (reason := unusable(backend, device, dtype, op)) is not None:
            raise RuntimeError(f'{op}: backend "{backend}" cannot run: {reason}. backend="reference" always can.')
        return backend
    if device.type == "cpu":
        return "cpp" if unusable("cpp", device, dtype, op) is None else "reference"
    for candidate in _gpu_order(op, device, dtype):
        if unusable(candidate, device, dtype, op) is None:
            if (failure := self_check(op, candidate, device, dtype)) is None:
                return candidate
            _warn_once(f"clipsteer: {candidate} {op} is not trusted on {device} for {dtype}: {failure}")
    return "reference"


# What torch.compiler.assume_constant_result sets; calling that would import all of torch._dynamo here.
resolve._dynamo_marked_constant = True


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def choose(op: str, backend: str, tensor: Tensor) -> str:
    return resolve(op, backend, tensor.device.type, tensor.device.index, tensor.dtype)


def call(backend: str, op: str, *args: Any) -> Any:
    """Run low-level ``op`` of ``backend`` on contiguous tensors."""
    return getattr(getattr(torch.ops, f"clipsteer_{backend}"), op)(*args)


def tracked(*tensors: Tensor | None) -> bool:
    """Whether autograd has to know what is computed from these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


@dataclass(frozen=True)
class BackendStatus:
    backend: str
    usable: bool
    reason: str


class Explanation(tuple[BackendStatus, ...]):
    """The backends of one call, readable when printed."""

    def __str__(self) -> str:
        return "\n".join(f"{s.backend:<10}{'usable' if s.usable else 'not usable':<12}{s.reason}" for s in self)

    __repr__ = __str__


def explain(op: str, *tensors: Any, **named: Any) -> Explanation:
    """List every backend of ``op``, usable or why not, for these arguments (CPU float32 when none are given).

    ``explain("topk_encode", x, W_enc)`` prints as a table; the line of the backend that ``auto`` takes says so.
    """
    from clipsteer.ops import REGISTRY

    if op not in REGISTRY:
        raise ValueError(f"explain: op must be one of {sorted(REGISTRY)}, got {op!r}")
    found = [t for t in (*tensors, *named.values()) if isinstance(t, Tensor) and t.is_floating_point()]
    device, dtype = (found[0].device, found[0].dtype) if found else (torch.device("cpu"), torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chosen = resolve(op, "auto", device.type, device.index, dtype)
    rows = []
    for backend in BACKENDS:
        reason = unusable(backend, device, dtype, op)
        if reason is None and backend in ("triton", "cuda") and device.type == "cuda":
            reason = self_check(op, backend, device, dtype)
        rows.append(BackendStatus(backend, reason is None, reason or ("chosen by auto" if backend == chosen else "")))
    return Explanation(rows)


def status() -> list[BackendStatus]:
    """Every backend of this installation: usable, or why not and how to get it."""
    return [BackendStatus(b, (reason := missing(b)) is None, reason or "") for b in BACKENDS]
