"""Ways of checking a kernel that people use, on the inputs that they use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.proof.kernels import Function, Kernel
from clipsteer import testing

TRIALS = 5
Judge = Callable[[Kernel, Function, int], bool]  # whether it passes, with a seed
Check = Callable[[Tensor, Tensor, Tensor], bool]  # got, eager in the same dtype, float64


def prove(kernel: Kernel, fast: Function, seed: int) -> bool:
    report = testing.prove(fast, kernel.reference, kernel.cases, cases=30, seed=1000 * seed)
    return report.passed


def _run(function: Function, drawn: dict[str, Any], grads: tuple[Tensor, ...] | None) -> list[Tensor]:
    """Floating outputs, and gradients of all floating inputs where ``grads`` are given."""
    leaves = dict(drawn)
    for name, value in drawn.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            leaves[name] = value.clone().requires_grad_(grads is not None)
    result = function(**leaves)
    several = [t for t in (result if isinstance(result, tuple) else (result,)) if t.is_floating_point()]
    found = [t.detach() for t in several]
    smooth = [t for t in several if t.requires_grad]
    if grads is None or not smooth:
        return found
    inputs = [t for t in leaves.values() if isinstance(t, Tensor) and t.requires_grad]
    given = [g.to(t.dtype) for t, g in zip(smooth, grads)]
    back = torch.autograd.grad(smooth, inputs, given, allow_unused=True)
    return found + [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, back)]


def beside(check: Check, backward: bool) -> Judge:
    """A check of each output, and of gradients where its users look at them, on typical inputs."""

    def judge(kernel: Kernel, fast: Function, seed: int) -> bool:
        for trial in range(TRIALS):
            generator = torch.Generator().manual_seed(100 * seed + trial)
            wide = kernel.typical()(generator, 1.0, False)
            drawn = {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in wide.items()}
            exact = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in drawn.items()}
            shapes = [t.shape for t in _run(kernel.reference, drawn, None)]
            grads = tuple(torch.randn(shape, generator=generator) for shape in shapes) if backward else None
            try:
                got = _run(fast, drawn, grads)
            except Exception:
                return False
            eager, truth = _run(kernel.reference, drawn, grads), _run(kernel.reference, exact, grads)
            if len(got) != len(eager) or any(a.shape != b.shape for a, b in zip(got, eager)):
                return False
            if not all(check(*three) for three in zip(got, eager, truth)):
                return False
        return True

    return judge


def assert_close(got: Tensor, eager: Tensor, truth: Tensor) -> bool:
    try:
        torch.testing.assert_close(got, eager)
    except AssertionError:
        return False
    return True


def twice(got: Tensor, eager: Tensor, truth: Tensor) -> bool:
    return bool((got - truth).abs().max() <= 2 * (eager - truth).abs().max())


def twice_and_some(got: Tensor, eager: Tensor, truth: Tensor) -> bool:
    return bool((got - truth).abs().max() <= 2 * (eager - truth).abs().max() + 1e-5)


def rms_ratio(got: Tensor, eager: Tensor, truth: Tensor) -> bool:
    return bool((got - eager).square().mean().sqrt() <= 0.005 * eager.square().mean().sqrt())


def cosine(got: Tensor, eager: Tensor, truth: Tensor) -> bool:
    return bool(torch.cosine_similarity(got.flatten(), eager.flatten(), dim=0) > 0.999)


def loose(got: Tensor, eager: Tensor, truth: Tensor) -> bool:
    return torch.allclose(got, eager, atol=1e-2, rtol=1e-2)


def relative_to_eager(got: Tensor, eager: Tensor, truth: Tensor) -> bool:
    def off(t: Tensor) -> Tensor:
        return (t - truth).square().mean().sqrt() / truth.square().mean().sqrt()

    return bool(off(got) <= 3 * off(eager) + 1e-5)


def bitwise(got: Tensor, eager: Tensor, truth: Tensor) -> bool:
    return torch.equal(got, eager)


JUDGES: dict[str, Judge] = {
    "prove": prove,
    "assert_close, defaults": beside(assert_close, backward=True),
    "twice eager's largest error": beside(twice, backward=True),
    "twice eager's largest error + 1e-5": beside(twice_and_some, backward=True),
    "RMS ratio 0.005": beside(rms_ratio, backward=True),
    "cosine > 0.999": beside(cosine, backward=True),
    "allclose 1e-2, forward (KernelBench)": beside(loose, backward=False),
    "RMS error below 3 times eager's + 1e-5": beside(relative_to_eager, backward=True),
    "bit for bit": beside(bitwise, backward=True),
}
