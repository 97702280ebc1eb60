"""Adam for an SAE whose decoder rows keep norm 1; on a CPU the dictionaries take one pass over memory, in C++."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from clipsteer.ops import _dispatch
from clipsteer.sae import SAE


class UnitRowAdam(torch.optim.Adam):
    """torch's Adam (dense: moments decay where the gradient is 0) on ``sae``'s parameters. From W_dec's gradient the
    component along each row is taken before, and the rows are scaled to norm 1 after.

    On a CPU with the C++ backend, float32 and float64 gradients of W_enc and W_dec may also be row-sparse.
    """

    def __init__(self, sae: SAE, lr: float) -> None:
        super().__init__(sae.parameters(), lr=lr, fused=sae.W_enc.device.type in ("cpu", "cuda"))
        self.sae = sae

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if closure is not None:
            raise ValueError("UnitRowAdam.step: takes no closure")
        sae = self.sae
        grads = {p: p.grad for p in (sae.W_enc, sae.W_dec) if p.grad is not None and in_one_pass(p)}
        for parameter, grad in grads.items():
            self._one_pass(parameter, grad)
            parameter.grad = None
        if sae.W_dec not in grads:
            sae.remove_parallel_gradient_()
        super().step()
        if sae.W_dec not in grads:
            sae.renormalize_decoder_()
        for parameter, grad in grads.items():
            parameter.grad = grad

    def _one_pass(self, parameter: Tensor, grad: Tensor) -> None:
        state, group = self.state[parameter], self.param_groups[0]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        features = None
        if grad.is_sparse:
            # in ascending order, each once, as the ops give them; autograd does not keep the mark of it
            features, grad = grad._indices()[0], grad._values()
        torch.ops.clipsteer_cpp.adam_rows(
            parameter, state["exp_avg"], state["exp_avg_sq"], state["step"], grad.contiguous(), features,
            parameter is self.sae.W_dec, group["lr"], *group["betas"], group["eps"],
        )  # fmt: skip
        torch.autograd.graph.increment_version(parameter)


def in_one_pass(parameter: Tensor) -> bool:
    return (
        parameter.device.type == "cpu"
        and parameter.dtype in (torch.float32, torch.float64)
        and parameter.is_contiguous()
        and os.environ.get("CLIPSTEER_BACKEND", "auto").lower() in ("", "auto", "cpp")
        and _dispatch.missing("cpp") is None
    )
