"""Which implementation runs: availability, the choice, the GPU self-check, ``explain``.

It knows the ops by their records in ``_lowlevel``, and neither their files nor their specs.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipsteer._version import left_out
from clipsteer.kernels._precision import tf32_allowed
from clipsteer.ops import _vmap
from clipsteer.ops._calls import asked_backend, step
from clipsteer.ops._lowlevel import DTYPES, LIBRARIES, NAMESPACES, OPS, PORTABLE, RECORDS
from clipsteer.ops._record import BACKENDS, LowLevel

# Libraries that hold Python registrations live as long as the process.
_LIBRARIES: list[torch.library.Library] = []


def describe(name: str, low: LowLevel) -> None:
    """Tell torch what an op's outputs are like, and how torch.vmap runs it."""
    torch.library.register_fake(name, low.fake)
    if "!" not in low.schema:  # it writes into no argument
        namespace, op = name.split("::")
        function = getattr(getattr(torch.ops, namespace), op)
        torch.library.register_vmap(name, _vmap.rule(function, low))


def new_library(backend: str) -> torch.library.Library:
    """What defines ops in the namespace of ``backend``, for as long as the process lives."""
    space = NAMESPACES[backend]
    try:
        library = torch.library.Library(space, "DEF")
    except RuntimeError as error:
        what = f"another copy of clipsteer defines torch.ops.{space} in this process"
        raise RuntimeError(f"{what}; use that one, or start a process anew") from error
    _LIBRARIES.append(library)
    return library


def _load_binary(backend: str, how: str) -> str | None:
    # beside this file under the name it has here: where files are links into a store of contents,
    # what a link leads to has neighbours and a name of its own
    path = Path(__file__).absolute().parent.parent / f"{LIBRARIES[backend]}.so"
    if not path.exists():
        reason = left_out(path.name)
        return f"{path.name} was not built{reason and f' ({reason})'}; {how}"
    try:
        torch.ops.load_library(str(path))
        refusal = ctypes.CDLL(str(path)).clipsteer_refusal
        refusal.restype = ctypes.c_char_p
        if (reason := refusal()) is not None:
            return f"{path.name}: {reason.decode()}"
        for op in RECORDS:
            for name, low in op.low_level.items():
                if backend in op.backends and (backend == "cpp" or not low.cpp_only):
                    describe(f"{NAMESPACES[backend]}::{name}", low)
    except (OSError, RuntimeError, AttributeError) as error:
        reason = f"{path.name} does not load with torch {torch.__version__} ({error}); {how}"
        _warn_once(f"clipsteer: {reason}")  # all works, slower, as after an update of torch
        return reason
    return None


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors
    (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def _load_triton() -> str | None:
    try:
        import triton

        from clipsteer.kernels import _launch as launch

        served = [op for op in RECORDS if op.kernels]
        modules = {}
        for op in served:
            modules[op.stem] = importlib.import_module(f"{launch.__package__}.{op.stem}")
    except Exception as error:
        # another triton than the kernels were written for may lack any name they use
        how = "install the triton that belongs to this torch build"
        return f"triton cannot be imported ({error}); {how}"
    try:
        library = new_library("triton")
    except RuntimeError as error:
        return str(error)
    for op in served:
        for name, low in op.kernels.items():
            library.define(name + low.schema)
            for key in ("CPU", "CUDA") if interpreted() else ("CUDA",):
                library.impl(name, getattr(modules[op.stem], name), key)
            describe(f"{NAMESPACES['triton']}::{name}", low)
    if interpreted() and (failure := launch.interpreter_failure()) is not None:
        what = f"the interpreter of triton {triton.__version__} fails here ({failure})"
        return f"{what}; try another triton or numpy"
    return None


def untransformed() -> contextlib.AbstractContextManager[Any]:
    """Outside of torch.func's transforms, which would take the tensors of a check for theirs."""
    if not torch._C._are_functorch_transforms_active():
        return contextlib.nullcontext()
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    return temporarily_clear_interpreter_stack()


@functools.cache
def missing(backend: str) -> str | None:
    """Why ``backend`` cannot run at all in this process (and how to get it), or None when it
    can."""
    with untransformed():
        return _load(backend)


def _load(backend: str) -> str | None:
    if backend == "cpp":
        return _load_binary("cpp", "reinstall clipsteer with a C++20 compiler on the PATH")
    if backend in ("triton", "cuda") and not torch.cuda.is_available():
        if backend == "cuda":
            return "no GPU is visible to torch"
        if not interpreted():
            how = "TRITON_INTERPRET=1 runs it on the CPU, slowly"
            return f"no GPU is visible to torch; {how}"
    if backend == "triton":
        return _load_triton()
    if backend == "cuda":
        return _load_binary("cuda", "reinstall clipsteer with nvcc on the PATH and a CUDA torch")
    return None


def unusable(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    op: str | None = None,
) -> str | None:
    """Why ``backend`` cannot serve (public op ``op`` on) tensors of this device and dtype, or None
    when it can."""
    if op is not None and backend not in (served := OPS[op].served_by(op)):
        what = op
        if OPS[op].options and op in OPS[op].variants:
            what = f"{OPS[op].stem} with {OPS[op].options}"
        return f"it has no kernel for {what}, which {', '.join(served)} serve"
    if (reason := missing(backend)) is not None:
        return reason
    if dtype not in DTYPES[backend]:
        return f"it has no {str(dtype).removeprefix('torch.')} kernels"
    if backend == "cpp" and device.type != "cpu":
        return f"it serves CPU tensors, these are on {device}"
    elsewhere = backend in ("triton", "cuda") and device.type != "cuda"
    if elsewhere and (backend == "cuda" or not interpreted()):
        return f"it serves CUDA tensors, these are on {device}"
    return None


_portable: Callable[[], None] | None = None


def set_portable(function: Callable[[], None]) -> None:
    """``function`` defines ``torch.ops.clipsteer``: ops/__init__ hands it in, as it knows the ops'
    files, and they stand above this one."""
    global _portable
    _portable = function


@functools.cache
def register_portable() -> None:
    """Define ``torch.ops.clipsteer``, once and where it is asked for: that takes 20 ms."""
    assert _portable is not None
    _portable()


Verdict = Callable[[str, str, torch.device, torch.dtype], "str | None"]
# by op, backend, device and dtype, and by torch's setting for float32 products, which another
# kernel answers
_VERDICTS: dict[tuple[str, str, torch.device, torch.dtype, bool], str | None] = {}
_ops_verdict: Verdict | None = None


def set_verdict(function: Verdict) -> None:
    """``function`` says of an op's kernel what is wrong with it here, None when nothing is:
    ops/__init__ hands it in, as it draws cases from the ops' specs, and they stand above this
    file."""
    global _ops_verdict
    _ops_verdict = function


def self_check(
    op: str,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    verdict: Verdict | None = None,
) -> str | None:
    """Run a GPU kernel against its bound on the device at hand; None when it passed, else what went
    wrong. ``verdict`` says it of a kernel that is none of the ops'.

    The verdict is kept, for torch's setting of float32 products at hand, unless it says nothing
    about the kernel: no memory was left, or a CUDA graph is being captured. The caller's modes
    (inference, autocast, a default device, torch.func's transforms) do not reach it.
    """
    verdict = verdict or _ops_verdict
    assert verdict is not None
    key = (op, backend, device, dtype, dtype == torch.float32 and tf32_allowed())
    if key in _VERDICTS:
        return _VERDICTS[key]
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "it cannot be checked while a CUDA graph is captured; run the op once before"
    try:
        with (
            untransformed(),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
            torch.device("cpu"),
        ):
            _VERDICTS[key] = verdict(op, backend, device, dtype)
    except torch.OutOfMemoryError as error:
        return f"its self-check ran out of memory: {error}"
    except Exception as error:
        # a kernel that cannot launch must not take the caller's program down
        _VERDICTS[key] = f"self-check raised {type(error).__name__}: {error}"
    return _VERDICTS[key]


def _gpu_order(op: str, device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    known = device.type == "cuda" and torch.cuda.is_available()
    return OPS[op].gpu_order(torch.cuda.get_device_capability(device) if known else (0, 0), dtype)


def exporting_to_onnx() -> bool:
    """Whether ``torch.onnx.export`` traces this call: then it wants torch's own operations."""
    onnx = sys.modules.get("torch.onnx")
    return onnx is not None and onnx.is_in_onnx_export()


def resolve(
    op: str,
    backend: str,
    device_type: str,
    device_index: int | None,
    dtype: torch.dtype,
) -> str:
    """The backend that runs: the keyword, then ``CLIPSTEER_BACKEND``, then what an exported graph
    is to name, then the fastest one that is trusted here."""
    if backend == "auto":
        backend = (asked_backend() or "auto").lower()
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"{op}: backend must be one of {('auto', *BACKENDS)}, got {backend!r}")
    if backend == "auto" and exporting_to_onnx():
        return "reference"
    if backend == "auto" and torch.compiler.is_exporting():
        register_portable()
        return PORTABLE
    device = torch.device(device_type)
    if device_index is not None:
        device = torch.device(device_type, device_index)
    if backend != "auto":
        if (reason := unusable(backend, device, dtype, op)) is not None:
            name = OPS[op].stem if OPS[op].options else op
            what = f'{name}: backend "{backend}" cannot run: {reason}'
            raise RuntimeError(f'{what}. backend="reference" always can.')
        return backend
    if device.type == "cpu":
        return "cpp" if unusable("cpp", device, dtype, op) is None else "reference"
    for candidate in _gpu_order(op, device, dtype):
        if unusable(candidate, device, dtype, op) is None:
            if (failure := self_check(op, candidate, device, dtype)) is None:
                return candidate
            what = f"{candidate} {op} is not trusted on {device} for {dtype}"
            _warn_once(f"clipsteer: {what}: {failure}")
    return "reference"


# What torch.compiler.assume_constant_result sets; calling that would import all of torch._dynamo
# here.
for _constant in (resolve, exporting_to_onnx):
    vars(_constant)["_dynamo_marked_constant"] = True


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def choose(op: str, backend: str, tensor: Tensor) -> str:
    """The backend that runs ``op`` on a tensor like this one."""
    return resolve(op, backend, tensor.device.type, tensor.device.index, tensor.dtype)


# by backend and low-level op; looking for one takes three attributes
_OVERLOADS: dict[tuple[str, str], Any] = {}


def _overload(backend: str, op: str) -> Any:
    return getattr(getattr(torch.ops, NAMESPACES[backend]), op).default


def call(backend: str, op: str, *args: Any) -> Any:
    """Run low-level ``op`` of ``backend`` on contiguous tensors."""
    if torch.compiler.is_compiling():
        return _overload(backend, op)(*args)
    if (function := _OVERLOADS.get((backend, op))) is None:
        overload = _overload(backend, op)
        # what it calls itself, without a function of Python's around it: 0.6 µs
        function = _OVERLOADS[backend, op] = getattr(overload, "_op", overload)
    return step(function, *args)


@dataclass(frozen=True)
class BackendStatus:
    """One backend, usable or why not."""

    backend: str
    usable: bool
    reason: str


class Explanation(tuple[BackendStatus, ...]):
    """The backends of one call, readable when printed."""

    def __str__(self) -> str:
        lines = []
        for s in self:
            usable = "usable" if s.usable else "not usable"
            lines.append(f"{s.backend:<10}{usable:<12}{s.reason}")
        return "\n".join(lines)

    __repr__ = __str__


def explain(op: str, *tensors: Any, **named: Any) -> Explanation:
    """List every backend of ``op``, usable or why not, for these arguments (CPU float32 when none
    are given).

    ``explain("topk_encode", x, W_enc)`` prints as a table; the line of the backend that ``auto``
    takes says so.
    """
    if op not in OPS:
        raise ValueError(f"explain: op must be one of {sorted(OPS)}, got {op!r}")
    given = [t for t in (*tensors, *named.values()) if isinstance(t, Tensor)]
    found = [t for t in given if t.is_floating_point()]
    device = found[0].device if found else torch.device("cpu")
    dtype = found[0].dtype if found else torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chosen = resolve(op, "auto", device.type, device.index, dtype)
    rows = []
    for backend in BACKENDS:
        reason = unusable(backend, device, dtype, op)
        if reason is None and backend in ("triton", "cuda") and device.type == "cuda":
            reason = self_check(op, backend, device, dtype)
        usable = reason is None
        if reason is None:
            reason = "chosen by auto" if backend == chosen else ""
        rows.append(BackendStatus(backend, usable, reason))
    return Explanation(rows)


def load() -> list[BackendStatus]:
    """Make every low-level op of this installation known to torch, so that programs of
    ``torch.export`` and AOTInductor can be loaded. Returns every backend, usable or why not.

    Call it in a new process before ``torch.export.load`` or ``torch._inductor.aoti_load_package``.
    """
    register_portable()
    return status()


def status() -> list[BackendStatus]:
    """Every backend of this installation: usable, or why not and how to get it."""
    return [BackendStatus(b, (reason := missing(b)) is None, reason or "") for b in BACKENDS]
