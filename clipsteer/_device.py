"""Constants of a forward pass beside the activations that they meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def beside(cache: dict[Any, Any], x: Tensor, make: Callable[..., Tensor], *sources: Tensor) -> Tensor:
    """``make(*sources)`` in x's dtype on x's device.

    If a source is on another device, the result is kept in ``cache`` until a source is changed: copying it anew would
    stop the host in every pass, and cannot be captured in a CUDA graph. Sources that need a gradient are never cached.
    """
    if all(s.device == x.device for s in sources) or any(s.requires_grad for s in sources):
        return make(*sources).to(x)
    key = ("beside", x.dtype, x.device)
    state = [(id(s), None if s.is_inference() else s._version) for s in sources]
    found = cache.get(key)
    if found is None or found[0] != state:
        # a tensor made under inference_mode could not be saved for a later backward pass
        with torch.inference_mode(False):
            # the sources are held, so that their ids are not given away
            cache[key] = found = (state, make(*sources).to(x), sources)
    return found[1]
