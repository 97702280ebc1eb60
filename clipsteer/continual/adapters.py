"""What ``LoRA`` adds to a tower: where its pairs go, the module that adds their products, and the
files in which PEFT takes them.

Panels: a fused weight (3d, d) holds those of Q, K and V, in this order; a weight of its own is one
panel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from clipsteer.io.files import write_json, write_safetensors


class LowRank(nn.Module):
    """A parametrisation: W with the pairs' products added to ``chosen`` ones of its panels.

    Attributes:
        A: of each pair, (m, r, d) for m chosen panels.
        B: of each pair, (m, s, r) for panels of s rows.
    """

    def __init__(self, panels: int, chosen: Sequence[int], scaling: float) -> None:
        super().__init__()
        self.panels = panels
        self.chosen = tuple(chosen)
        self.scaling = scaling
        self.A = nn.ParameterList()
        self.B = nn.ParameterList()

    def forward(
        self,
        W: Tensor,  # (panels·s, d)
    ) -> Tensor:  # (panels·s, d)
        """W + scaling · Σ_i B_i A_i in the chosen panels, of W's dtype."""
        if not len(self.B):
            return W
        # a parametrisation may not change the dtype, and small updates would be lost in 16 bits
        wide = torch.promote_types(W.dtype, self.B[0].dtype)
        with torch.autocast(W.device.type, enabled=False):
            panels = W.to(wide).unflatten(0, (self.panels, -1))  # (panels, s, d)
            moved = panels[list(self.chosen)]  # (m, s, d)
            # one after the other: a new pair, whose B is 0, changes no bit
            for i, B in enumerate(self.B):
                A = self.A[i % len(self.A)]  # one A may serve every B
                moved = torch.baddbmm(moved, B.to(wide), A.to(wide), alpha=self.scaling)
            rows = list(panels)
            for panel, values in zip(self.chosen, moved):
                rows[panel] = values
            return torch.cat(rows).to(W.dtype)


class Site(NamedTuple):
    """A weight that pairs are added to."""

    owner: str
    """name of the module"""
    weight: str
    """name of its parameter"""
    block: str
    """name of the numbered block that it is part of"""
    panels: int
    chosen: tuple[int, ...]
    """the panels that get pairs"""


def attention_sites(module: nn.Module, targets: Sequence[str]) -> Iterator[Site]:
    """Every attention weight in a numbered block of ``module`` that makes ``targets`` ("q", "k",
    "v").

    Poolers and the like stand outside of the blocks, and are left alone.
    """
    fused = tuple("qkv".index(target) for target in targets)
    for name, child in module.named_modules():
        block = _block_of(name)
        if not block:
            continue
        qkv = getattr(child, "qkv", None)
        separate = [getattr(child, f"{target}_proj", None) for target in targets]
        if isinstance(getattr(child, "in_proj_weight", None), Tensor):
            yield Site(name, "in_proj_weight", block, 3, fused)
        elif isinstance(child, nn.MultiheadAttention):
            for target in targets:
                yield Site(name, f"{target}_proj_weight", block, 1, (0,))
        elif isinstance(qkv, nn.Linear) and qkv.out_features % 3 == 0:
            yield Site(f"{name}.qkv", "weight", block, 3, fused)
        elif all(isinstance(projection, nn.Linear) for projection in separate):
            for target in targets:
                yield Site(f"{name}.{target}_proj", "weight", block, 1, (0,))


def _block_of(name: str) -> str:
    """A module's name up to its last number; "" without any."""
    parts = name.split(".")
    while parts and not parts[-1].isdecimal():
        parts.pop()
    return ".".join(parts)


class Adapted(NamedTuple):
    """W + B A for the parameter ``weight`` of the module ``owner``."""

    owner: str
    weight: str
    A: Tensor  # (r, d)
    B: Tensor  # (rows, r)


def spread_panels(
    B: Tensor,  # (m, s, r)
    panels: int,
    chosen: Sequence[int],
) -> Tensor:  # (panels·s, m·r)
    """B of m chosen panels as one matrix, 0 wherever a panel and a chosen one do not meet."""
    m, s, r = B.shape
    whole = B.new_zeros(panels, s, m, r)
    for j, panel in enumerate(chosen):
        whole[panel, :, j] = B[j]
    return whole.reshape(panels * s, m * r)


def write_adapter(folder: str | Path, adapted: Sequence[Adapted]) -> None:
    """Write adapter_model.safetensors and adapter_config.json, as PEFT reads them.

    Raises ValueError for what PEFT cannot express: separate K and V parameters of one module, and
    pairs of several ranks.
    """
    if any(each.weight not in ("weight", "in_proj_weight") for each in adapted):
        raise ValueError(
            "export_peft: PEFT adapts no separate K and V parameters of nn.MultiheadAttention"
        )
    ranks = {each.A.shape[0] for each in adapted}
    if len(ranks) > 1:
        raise ValueError(
            "export_peft: fused and separate weights in one tower need several ranks, "
            f"{sorted(ranks)}"
        )
    rank = ranks.pop()
    tensors: dict[str, Tensor] = {}
    modules = []
    parameters = []
    for each in adapted:
        tensors[f"base_model.model.{each.owner}.lora_A.weight"] = each.A
        tensors[f"base_model.model.{each.owner}.lora_B.weight"] = each.B
        # a parameter that is not a linear layer's is wrapped by its own name
        if each.weight == "weight":
            modules.append(each.owner)
        else:
            parameters.append(f"{each.owner}.{each.weight}")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules,
        "target_parameters": parameters or None,
        "inference_mode": True,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    write_json(folder / "adapter_config.json", config)
