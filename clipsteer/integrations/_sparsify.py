"""sparsify's SAEs and transcoders on the fused ops, for as long as a ``with`` block lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from clipsteer.integrations._codes import Preactivations
from clipsteer.ops.sparse_decode import sparse_decode
from clipsteer.ops.topk_encode import topk_encode


@contextmanager
def sparsify() -> Iterator[None]:
    """Inside, sparsify's two functions, the fused encoder and the decoder, are clipsteer's.

    ``SparseCoder``, its files and ``Trainer`` stay as they are and compute the same. The
    pre-activations that its encoder returns are built when somebody looks at them; the largest of
    dead latents, for AuxK, are found without. As in sparsify they have no gradient. With
    ``activation="groupmax"`` the encoder stays sparsify's.
    """
    try:
        from sparsify import sparse_coder
        from sparsify.fused_encoder import EncoderOutput
    except ImportError as error:
        raise ImportError(
            "clipsteer.integrations.sparsify needs sparsify: pip install eai-sparsify"
        ) from error
    encoder = sparse_coder.fused_encoder
    decoder = sparse_coder.decoder_impl

    def encode(
        input: Tensor,  # (B, d)
        weight: Tensor,  # (n, d)
        bias: Tensor | None,  # (n,)
        k: int,
        activation: str,
    ) -> Any:
        compiling = torch.compiler.is_compiling()
        if activation != "topk" or compiling or not 1 <= k <= weight.shape[0]:
            return encoder(input, weight, bias, k, activation)
        acts, indices = topk_encode(input, weight, bias, k=k)
        fixed = [None if t is None else t.detach() for t in (input, weight, bias)]
        x, W, b = fixed
        return EncoderOutput(acts, indices, Preactivations.of(x, W, b, acts.dtype, relu=True))

    def decode(
        top_indices: Tensor,  # (B, k)
        top_acts: Tensor,  # (B, k)
        W_dec: Tensor,  # (d, n)
    ) -> Tensor:
        if torch.compiler.is_compiling():
            return decoder(top_indices, top_acts, W_dec)
        return sparse_decode(top_acts, top_indices, W_dec.mT)

    sparse_coder.fused_encoder = encode
    sparse_coder.decoder_impl = decode
    try:
        yield
    finally:
        sparse_coder.fused_encoder = encoder
        sparse_coder.decoder_impl = decoder
