"""Adam for an SAE whose decoder rows keep norm 1; each dictionary takes one pass over memory where
a kernel serves it, in C++ on a CPU and in Triton on a GPU."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipsteer.ops import _dispatch
from clipsteer.sae.model import SAE


class Rows(NamedTuple):
    """Rows of a dictionary."""

    features: Tensor  # (m,) int64, ascending, each once
    values: Tensor  # (m, d)


class UnitRowAdam(torch.optim.Adam):
    """torch's Adam (dense: moments decay where the gradient is 0) on ``sae``'s parameters. From
    W_dec's gradient the component along each row is taken before, and the rows are scaled to norm 1
    after (``SAE.has_unit_rows``).

    Where ``one_pass`` names a backend for W_enc or W_dec, its gradient's projection, Adam and the
    scaling of its rows are one kernel; where ``takes_row_sparse`` says so, its gradient may be
    row-sparse.
    """

    def __init__(self, sae: SAE, lr: float) -> None:
        thresholds = [p for name, p in sae.named_parameters() if name == "threshold"]
        others = [p for name, p in sae.named_parameters() if name != "threshold"]
        groups = [{"params": part} for part in (others, thresholds) if part]
        super().__init__(groups, lr=lr, fused=sae.W_enc.device.type in ("cpu", "cuda"))
        self.sae = sae
        # a GradScaler has to unscale gradients before, as the one pass does not
        self._step_supports_amp_scaling = False

    def set_lr(
        self,
        lr: float,
        scale: Tensor,  # ()
    ) -> None:
        """Of what follows; thresholds move by ``lr · scale``, as pre-activations do when rows of
        W_enc move by ``lr``."""
        self.param_groups[0]["lr"] = lr
        for group in self.param_groups[1:]:
            group["lr"] = lr * scale

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Any = None,
        factor: Tensor | None = None,  # ()
        more: Mapping[Tensor, Rows] = {},
    ) -> None:
        """One step with all gradients times ``factor``, a scalar tensor; not all of them are
        multiplied in place. ``more``: of dictionaries with a row-sparse gradient further rows of
        it."""
        if closure is not None:
            raise ValueError("UnitRowAdam.step: takes no closure")
        sae = self.sae
        taken: dict[Tensor, tuple[Tensor, str]] = {}
        for parameter in (sae.W_enc, sae.W_dec):
            grad = parameter.grad
            backend = None if grad is None else one_pass(parameter)
            if grad is None or backend is None:
                continue
            if backend == "cpp" or not grad.is_sparse:
                taken[parameter] = (grad, backend)
        if factor is not None:
            # the kernel on a GPU multiplies as it reads
            read = {p for p, (_, backend) in taken.items() if backend == "triton"}
            grads = [p.grad for p in sae.parameters() if p.grad is not None and p not in read]
            grads = [g._values() if g.is_sparse else g for g in grads]
            grads += [rows.values for rows in more.values()]
            if grads:
                torch._foreach_mul_(grads, factor)
        for weight, (grad, backend) in taken.items():
            self._one_pass(weight, grad, backend, factor, more.get(weight))
            # torch's own step passes over what has no gradient
            weight.grad = None
        unit = sae.has_unit_rows and sae.W_dec not in taken
        if unit:
            sae.remove_parallel_gradient_()
        super().step()
        if unit:
            sae.renormalize_decoder_()
        for weight, (grad, _) in taken.items():
            weight.grad = grad

    def _one_pass(
        self,
        parameter: Tensor,  # (d_sae, d_in)
        grad: Tensor,  # (d_sae, d_in), for "cpp" also row-sparse
        backend: str,
        factor: Tensor | None,  # ()
        more: Rows | None,
    ) -> None:
        state = self.state[parameter]
        group = self.param_groups[0]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        moments = (state["exp_avg"], state["exp_avg_sq"])
        unit = parameter is self.sae.W_dec and self.sae.has_unit_rows
        settings = (unit, group["lr"], *group["betas"], group["eps"])
        if backend == "triton":
            from clipsteer.kernels.adam_rows import adam_rows

            adam_rows(parameter, *moments, state["step"], grad.contiguous(), *settings, factor)
        else:
            features = None
            if grad.is_sparse:
                grad = in_order(grad)
                features = grad._indices()[0]
                grad = grad._values()
            step = torch.ops.clipsteer_cpp.adam_rows
            left = (None, None) if more is None else (more.values, more.features)
            step(parameter, *moments, state["step"], grad.contiguous(), features, *settings, *left)
        torch.autograd.graph.increment_version(parameter)


def one_pass(parameter: Tensor) -> str | None:
    """The backend whose kernel updates a dictionary in one pass over memory; None: torch does, in
    several."""
    asked = os.environ.get("CLIPSTEER_BACKEND", "auto").lower() or "auto"
    device = parameter.device
    dtype = parameter.dtype
    if not parameter.is_contiguous():
        return None
    if device.type == "cpu" and asked in ("auto", "cpp"):
        served = dtype in (torch.float32, torch.float64) and _dispatch.missing("cpp") is None
        return "cpp" if served else None
    if asked not in ("auto", "triton") or dtype != torch.float32:
        return None
    if _dispatch.unusable("triton", device, dtype) is not None:
        return None
    from clipsteer.kernels.adam_rows import MAX_COLUMNS

    if parameter.shape[1] > MAX_COLUMNS:
        return None
    failure = None
    if asked == "auto":
        failure = _dispatch.self_check("adam_rows", "triton", device, dtype, _verdict)
    if failure is not None:
        _dispatch._warn_once(
            f"clipsteer: triton adam_rows is not trusted on {device} for {dtype}: {failure}"
        )
        return None
    return "triton"


def in_order(
    grad: Tensor,  # (n, d), row-sparse
) -> Tensor:
    """With its rows ascending, each once, as the ops give them, though autograd does not keep the
    mark of it; those of several uses may be joined in another order."""
    features = grad._indices()[0]
    return grad if bool((features[1:] > features[:-1]).all()) else grad.coalesce()


def takes_row_sparse(parameter: Tensor) -> bool:
    """Whether the gradient of a dictionary may be given by its rows that are not zero."""
    return one_pass(parameter) == "cpp"


def _verdict(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None where a step of the kernel is Adam's in float64."""
    from clipsteer.kernels.adam_rows import adam_rows

    lr = 0.01
    beta1 = 0.9
    beta2 = 0.999
    eps = 1e-8
    t = 3
    generator = torch.Generator().manual_seed(0)
    w, m, v, grad = torch.randn(4, 5, 768, generator=generator, dtype=torch.float64)
    w = w / w.norm(dim=1, keepdim=True)
    v = v.abs()
    for unit in (False, True):
        got = [value.to(device, dtype) for value in (w, m, v)]
        step = torch.tensor(t, dtype=torch.float32, device=device)
        adam_rows(*got, step, grad.to(device, dtype), unit, lr, beta1, beta2, eps)
        g = grad - (grad * w).sum(1, keepdim=True) * w if unit else grad
        m1 = beta1 * m + (1 - beta1) * g
        v1 = beta2 * v + (1 - beta2) * g * g
        w1 = w - lr * (m1 / (1 - beta1**t)) / ((v1 / (1 - beta2**t)).sqrt() + eps)
        if unit:
            w1 /= w1.norm(dim=1, keepdim=True)
        error = max(float((a.cpu() - b).abs().max()) for a, b in zip(got, (w1, m1, v1)))
        if not error <= 1e-5:
            return f"self-check failed: a step of Adam is {error:.1e} off"
    return None
