"""Transcoders: features of one activation that reconstruct another, such as an MLP's output from
its input.

    ŷ = f(x) W_dec + b_dec (+ W_skip x),   W_dec (d_sae, d_out), b_dec (d_out,)

Only the input is normalised, and the skip connection takes it as it came. Sources: Dunefsky et al.
2024 (arXiv 2406.11944), Paulo et al. 2025 (arXiv 2501.18823) for the skip connection.
"""

from __future__ import annotations

from typing import Any


def check_target(d_out: Any, skip: Any, apply_b_dec_to_input: Any) -> None:
    """Raises ValueError, TypeError for a width, a skip connection or a bias on the input that
    no transcoder, or no autoencoder, has."""
    if not isinstance(skip, bool):
        raise TypeError(f"SAE: skip must be a bool, got {type(skip).__name__}")
    if apply_b_dec_to_input is not None and not isinstance(apply_b_dec_to_input, bool):
        raise TypeError(
            f"SAE: apply_b_dec_to_input must be a bool or None, got {apply_b_dec_to_input!r:.40}"
        )
    if d_out is None:
        if skip:
            raise ValueError("SAE: skip needs d_out, the width of what a transcoder gives")
        return
    if isinstance(d_out, bool) or not isinstance(d_out, int):
        raise TypeError(f"SAE: d_out must be an int or None, got {type(d_out).__name__}")
    if d_out < 1:
        raise ValueError(f"SAE: d_out must be at least 1, got {d_out}")
    if apply_b_dec_to_input:
        raise ValueError(
            "SAE: apply_b_dec_to_input must be False with d_out, as the bias of a transcoder's "
            "decoder is one of its output"
        )
