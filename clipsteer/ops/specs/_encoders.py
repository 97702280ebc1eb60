"""What the specs of the encoders have in common: their options drawn, pre-activations in float64
and by how much these may be off, and the gradients through a feature's scale."""

from __future__ import annotations

import torch
from torch import Tensor

from clipsteer.ops._bounds import ACCUMULATE, UNIT, operand_error, smallest_normal
from clipsteer.ops._spec import Draw, Inputs

# what of the parameters that an encoder may have its gradients are checked of
PARAMETERS = ("x", "W_enc", "b_enc", "scale")


def draw_dictionary(case: Draw) -> Inputs:
    """x, W_enc, b_enc, of the keys B, d, n."""
    B, d, n = (case.shape[name] for name in ("B", "d", "n"))
    x = case.tensor(B, d)
    W_enc = case.tensor(n, d, scale=1.0)
    return {"x": x, "W_enc": W_enc, "b_enc": case.tensor(n)}


def draw_options(case: Draw) -> Inputs:
    """Keys plain=1: no scale; m: how many columns there are, in any order."""
    n = case.shape["n"]
    m = case.shape.get("m")
    scale = None if case.shape.get("plain") else case.tensor(n, scale=1.0)
    order = torch.randperm(n, generator=case.generator)
    return {"scale": scale, "columns": None if m is None else order[:m]}


def options_of(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The scale of every feature (n,), 1 where there is none, and the features looked at (m,)."""
    W = inputs["W_enc"]
    scale = inputs.get("scale")
    columns = inputs.get("columns")
    if scale is None:
        scale = torch.ones(len(W))
    return scale.double(), torch.arange(len(W)) if columns is None else columns


def terms_of(inputs: Inputs) -> int:
    """Of a pre-activation: a scale is one product more."""
    return inputs["x"].shape[1] + (inputs.get("scale") is not None)


def before_scale(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """x W_encᵀ + b_enc of all features in float64, and its magnitude: (B, n) each."""
    x64 = inputs["x"].double()
    W64 = inputs["W_enc"].double()
    b64 = inputs["b_enc"].double()
    return x64 @ W64.T + b64, x64.abs() @ W64.abs().T + b64.abs()


def pre_activations(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Of the features looked at, in float64: their values (B, m), magnitudes, and by how much any
    backend may be off before it rounds to its dtype."""
    dtype = inputs["x"].dtype
    scale, columns = options_of(inputs)
    pre, magnitude = before_scale(inputs)
    pre = (pre * scale)[:, columns]
    magnitude = (magnitude * scale.abs())[:, columns]
    gamma = (terms_of(inputs) + 1) * ACCUMULATE[dtype] + operand_error(dtype)
    slack = gamma * magnitude + underflow(inputs)[columns]
    return pre, magnitude, torch.where(pre.isinf(), 0.0, slack)


def rounded(inputs: Inputs, pre: Tensor, slack: Tensor) -> Tensor:
    """``slack`` and the rounding to its dtype, where a backend may compare afterwards."""
    dtype = inputs["x"].dtype
    slack = slack + UNIT[dtype] * (pre.abs() + slack)
    if dtype == torch.float16:
        slack = slack + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return torch.where(pre.isinf(), 0.0, slack)


def underflow(inputs: Inputs) -> Tensor:
    """What may be lost of every feature's sum, and of its product with the scale: (n,)."""
    scale, _ = options_of(inputs)
    x = inputs["x"]
    return smallest_normal(x.dtype) * ((x.shape[1] + 2) * scale.abs().clamp_min(1) + 1)


def places(inputs: Inputs, indices: Tensor) -> Tensor:
    """Where features stand among those that are looked at; -1: nowhere."""
    n = len(inputs["W_enc"])
    _, columns = options_of(inputs)
    at = torch.full((n,), -1)
    at[columns] = torch.arange(len(columns))
    return torch.where((indices >= 0) & (indices < n), at[indices.clamp(0, max(n - 1, 0))], -1)


def least(dtype: torch.dtype) -> float:
    """What rounding to ``dtype`` may lose of a number that is subnormal in it."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def scale_error(inputs: Inputs) -> float:
    """How far each term of the scale's gradient may be off beside its sum: the value is one of
    ``terms_of`` products; it is rounded to its dtype, divided, and multiplied by the gradient."""
    dtype = inputs["x"].dtype
    sums = (terms_of(inputs) + 1) * ACCUMULATE[dtype]
    return sums + operand_error(dtype) + 3 * UNIT[dtype]


def factor_error(inputs: Inputs) -> float:
    """A gradient times the scale is rounded to its dtype before it is summed."""
    return 0.0 if inputs.get("scale") is None else UNIT[inputs["x"].dtype]
