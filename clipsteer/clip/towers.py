"""The towers of a CLIP under one forward pass, as DistributedDataParallel needs them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from clipsteer.clip.axes import first_of


class Towers(nn.Module):
    """Image and text features of a model whose towers give tokens beside the pooled output.

    open_clip's plain CLIPs take the pooled output for all there is and fail over such towers
    (``output_tokens`` in an architecture file); its CoCa, which needs the tokens, does not.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        pixels: Tensor,  # (B, 3, H, W)
        tokens: Tensor,  # (B, L)
    ) -> tuple[Tensor, Tensor]:
        """Features (B, e) of images and of texts, not normalised."""
        image = first_of(self.model.encode_image(pixels))
        return image, first_of(self.model.encode_text(tokens))


def joint_module(model: nn.Module) -> nn.Module:
    """What to call with pixels and tokens for features of both: the model, or its `Towers`."""
    towers = [getattr(model, name, None) for name in ("visual", "text")]
    gives_tokens = any(getattr(tower, "output_tokens", False) for tower in towers)
    return Towers(model) if gives_tokens and not hasattr(model, "text_decoder") else model
