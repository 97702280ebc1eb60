"""Optimizers of other libraries' trainers."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["fuse"]


def fuse(optimizer: torch.optim.Adam) -> torch.optim.Adam:
    """Let an Adam or AdamW that some trainer has made take its step in torch's fused kernel: one
    pass over memory, where the plain one on a CPU takes a dozen.

    The same formula, rounded otherwise. The moments get the strides of their weights, now and
    whenever a state is loaded: the fused kernel on a CPU walks both in memory order.

    Raises:
        TypeError: not an Adam or AdamW.
    """
    if not isinstance(optimizer, torch.optim.Adam):
        raise TypeError(f"fuse: takes a torch.optim.Adam or AdamW, got {type(optimizer).__name__}")
    _fuse(optimizer)
    optimizer.register_load_state_dict_post_hook(_fuse)
    return optimizer


@torch.no_grad()
def _fuse(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        group.update(fused=True, foreach=False)
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            for name, moment in state.items():
                if name == "step":
                    state[name] = moment.to(parameter.device, torch.float32)
                elif moment.stride() != parameter.stride():
                    state[name] = torch.empty_like(parameter).copy_(moment)
