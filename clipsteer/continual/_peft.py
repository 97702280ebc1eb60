"""The folder of an adapter as the PEFT library reads it: ``PeftModel.from_pretrained(tower, folder)``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from clipsteer._files import write_json, write_safetensors


class Adapted(NamedTuple):
    """W + B A for the parameter ``weight`` of the module ``owner``."""

    owner: str
    weight: str
    A: Tensor  # (r, d)
    B: Tensor  # (rows, r)


def panels(B: Tensor, count: int, chosen: Sequence[int]) -> Tensor:
    """B (m, s, r) of m targets as one matrix (count·s, m·r) that is 0 wherever a panel and a target do not meet."""
    m, s, r = B.shape
    whole = B.new_zeros(count, s, m, r)
    for j, panel in enumerate(chosen):
        whole[panel, :, j] = B[j]
    return whole.reshape(count * s, m * r)


def write_adapter(folder: str | Path, adapted: Sequence[Adapted]) -> None:
    """Write adapter_model.safetensors and adapter_config.json. Raises ValueError for what PEFT cannot express."""
    if any(each.weight not in ("weight", "in_proj_weight") for each in adapted):
        raise ValueError("export_peft: PEFT adapts no separate K and V parameters of nn.MultiheadAttention")
    ranks = {each.A.shape[0] for each in adapted}
    if len(ranks) > 1:
        raise ValueError(f"export_peft: fused and separate weights in one tower need several ranks, {sorted(ranks)}")
    rank = ranks.pop()
    tensors: dict[str, Tensor] = {}
    for each in adapted:
        tensors[f"base_model.model.{each.owner}.lora_A.weight"] = each.A
        tensors[f"base_model.model.{each.owner}.lora_B.weight"] = each.B
    # a parameter that is not a linear layer's is wrapped by its own name
    parameters = [f"{each.owner}.{each.weight}" for each in adapted if each.weight != "weight"]
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [each.owner for each in adapted if each.weight == "weight"],
        "target_parameters": parameters or None,
        "inference_mode": True,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    write_json(folder / "adapter_config.json", config)
