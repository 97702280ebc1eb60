"""What an op promises, as plain data: tests, ``clipsteer validate`` and the benchmarks are
generated from it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clipsteer.kernels._precision import tf32_allowed

# Unit roundoff of the output, and of the arithmetic that accumulates it (halves accumulate in
# float32).
UNIT = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
ACCUMULATE = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-24,
    torch.bfloat16: 2.0**-24,
}
TF32_OPERAND = 2.0**-10


@dataclass(frozen=True)
class OpSpec:
    """One public op. Every callable takes and returns plain dictionaries keyed by argument or
    output name.

    ``make(shape, dtype, generator, scale, exact)`` draws keyword arguments, small integers if
    ``exact``, for which every backend must agree bit for bit unless the op itself takes roots or
    quotients. ``check`` and ``check_grads`` return, per output, the worst error as a fraction of
    the a priori bound (at most 1 passes, ``inf`` breaks a rule that allows no error).
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    outputs: tuple[str, ...]
    differentiable: tuple[
        str, ...
    ]  # in the order of the call; an input that is no tensor in a drawn case is left out;
    # empty for a statistic, which has no gradient and which autocast leaves alone
    make: Callable[..., dict[str, Any]]
    check: Callable[[dict[str, Any], dict[str, Tensor]], dict[str, float]]
    check_grads: Callable[
        [dict[str, Any], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]], dict[str, float]
    ]
    shapes: tuple[dict[str, int], ...]  # 8 edge shapes; the second has 33 rows
    small_shape: dict[str, int]  # small enough to differentiate numerically
    repeat_shape: dict[str, int]  # large enough that every thread has work
    bench_shapes: dict[str, dict[str, int]]  # on one CPU core
    gpu_bench_shapes: dict[str, dict[str, int]]
    device_shapes: tuple[
        dict[str, int], ...
    ] = ()  # these take a GPU kernel through the branches of its main shapes
    rows: tuple[
        str, ...
    ] = ()  # inputs (and so outputs) that lead with the batch, which may have any shape
    gate: tuple[
        str, ...
    ] = ()  # inputs that may be cut to a few before the benchmark's check, where ``rows`` may not
    # what larger sizes are cut to for that check, in a case of its own
    gate_sizes: dict[str, int] = field(default_factory=dict)
    optional: tuple[str, ...] = ()  # inputs that may be None, which means zeros
    scalable: tuple[
        str, ...
    ] = ()  # inputs that, multiplied by a power of two, multiply every output exactly
    grad_buffer: str | None = (
        None  # the input whose gradient ``grad_buffer=`` and ``sparse_grad=`` are about
    )
    wide: bool = False  # outputs of half-precision inputs are float32
    opaque: bool = (
        True  # outputs are the low-level op's own, so that a compiler cannot change a bit of them
    )
    exact: bool = (
        True  # on small integers every output is exact, so that backends agree bit for bit
    )
    # Outputs, and gradients as "d name", that hold torch's own GEMM: they repeat at a fixed thread
    # count only.
    torch_sums: tuple[str, ...] = ()
    baselines: dict[str, Callable[..., Any]] = field(default_factory=dict)
    # (floating-point operations, bytes moved in float32) that no implementation can avoid
    floor: Callable[[dict[str, int]], tuple[float, float]] = lambda shape: (0.0, 0.0)

    def leaves(self, inputs: dict[str, Any]) -> list[str]:
        """The names of the inputs of this case that can have a gradient."""
        return [name for name in self.differentiable if isinstance(inputs[name], Tensor)]


_ON_GPU = ContextVar("results were computed on a GPU", default=False)


@contextlib.contextmanager
def measured_on(device: Any) -> Iterator[None]:
    """What is checked inside was computed on ``device``: only a GPU's float32 products may have
    rounded operands."""
    token = _ON_GPU.set(torch.device(device).type != "cpu")
    try:
        yield
    finally:
        _ON_GPU.reset(token)


def operand_error(dtype: torch.dtype) -> float:
    """Relative error of a product when tensor cores may round float32 operands to TF32."""
    allowed = _ON_GPU.get() and tf32_allowed()
    return 2 * TF32_OPERAND + TF32_OPERAND**2 if dtype == torch.float32 and allowed else 0.0


def fraction_of_bound(
    value: Tensor,
    truth: Tensor,
    magnitude: Tensor,
    terms: Any,
    extra: float = 0.0,
    absolute: Any = 0.0,
) -> float:
    """Worst |value - truth| over its bound g·m + u(|truth| + g·m) + tiny, where g = (terms +
    1)·unit + ``extra``.

    ``truth`` and ``magnitude`` (the same sum taken over absolute values) are float64; ``terms``
    counts the products of each sum, ``absolute`` is what underflow may add beyond one smallest
    number a term. A NaN or an infinity has to stand exactly where the truth has one.
    """
    if value.numel() == 0:
        return 0.0
    u = UNIT[value.dtype]
    unit = ACCUMULATE[value.dtype]
    value64 = value.double()
    info = torch.finfo(value.dtype)
    g = (torch.as_tensor(terms, dtype=torch.float64) + 1) * unit + extra
    gm = g * magnitude
    # one product may underflow per term, and the result itself may be subnormal
    tiny = torch.finfo(
        torch.float32 if value.dtype != torch.float64 else torch.float64
    ).smallest_normal
    bound = gm + u * (truth.abs() + gm) + tiny * (torch.as_tensor(terms, dtype=torch.float64) + 2)
    bound = (
        bound
        + absolute
        + (info.smallest_normal * info.eps if value.dtype == torch.float16 else 0.0)
    )
    error = (value64 - truth).abs() / bound
    # Past the largest finite number (of the sum or of a partial sum) an infinity is right, of the
    # sum's sign; of the other sign, or a NaN, only where parts of both signs can pass it.
    largest = (
        min(info.max, torch.finfo(torch.float32).max) if value.dtype != torch.float64 else info.max
    ) * (1 - u)
    reach = torch.where(magnitude.isfinite(), magnitude * (1 + g), 0.0)
    agrees = value64.isinf() & (value64.sign() == truth.sign())
    overflowed = (agrees & (reach >= largest)) | (~value64.isfinite() & (reach >= 2 * largest))
    same = (value64 == truth) | (torch.isnan(value64) & torch.isnan(truth)) | overflowed
    error = torch.where(same, torch.zeros_like(error), error)
    return float(torch.nan_to_num(error, nan=float("inf"), posinf=float("inf")).max())


def draw(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    generator: torch.Generator,
    scale: float,
    exact: bool,
) -> Tensor:
    """A Gaussian tensor times ``scale``, or small integers (many ties) when ``exact``."""
    if exact:
        return torch.randint(-2, 3, shape, generator=generator).to(dtype)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def spec_errors(
    spec: Any,
    shape: dict[str, int],
    dtype: torch.dtype,
    *,
    seed: int,
    backend: str,
    device: Any = "cpu",
    scale: float = 1.0,
    exact: bool = False,
    arrange: Callable[[Tensor], Tensor] = lambda t: t,
) -> dict[str, float]:
    """Worst error of every output and gradient of one drawn case, as a fraction of its bound.

    ``arrange`` may lay an input out anew (strides, fences) but not change its values.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = spec.make(shape, dtype, generator, scale, exact)
    moved = {
        name: arrange(v.detach().to(device)) if isinstance(v, Tensor) else v
        for name, v in drawn.items()
    }
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
        name: torch.randn(host[name].shape, generator=generator, dtype=torch.float64).to(dtype)
        for name in smooth
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
