"""What each op promises: how cases are drawn, derived bounds, edge and benchmark shapes, baselines.
One file an op.

Loaded when ``ops.REGISTRY`` is asked for, or a GPU kernel has to prove itself; running an op needs
none of it.
"""

from __future__ import annotations

import importlib

import torch

from clipsteer.ops._lowlevel import RECORDS
from clipsteer.ops._spec import OpSpec, spec_errors

__all__ = ["REGISTRY", "verdict"]


def _registry() -> dict[str, OpSpec]:
    found: dict[str, OpSpec] = {}
    for op in RECORDS:
        specs = importlib.import_module(f"{__name__}.{op.stem}").SPECS
        assert tuple(spec.name for spec in specs) == op.names, op.stem
        found |= {spec.name: spec for spec in specs}
    return found


REGISTRY = _registry()


def verdict(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None when ``backend`` keeps ``op``'s bounds on ``device``, else what went wrong."""
    spec = REGISTRY[op]
    for seed, shape in enumerate((*spec.shapes[:3], *spec.device_shapes)):
        worst = spec_errors(spec, shape, dtype, seed=seed, backend=backend, device=device)
        if max(worst.values()) > 1:
            return f"self-check failed at {shape}: {worst}"
    return None
