"""sparsify's SAEs and transcoders on the fused ops, for as long as a ``with`` block lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from clipsteer.integrations._codes import Preactivations
from clipsteer.integrations._memory import gradient_buffer, remove_parallel_, sign_step_, unit_rows_
from clipsteer.ops._autograd import transformed
from clipsteer.ops.sparse_decode import sparse_decode
from clipsteer.ops.topk_encode import topk_encode


@contextmanager
def sparsify() -> Iterator[None]:
    """Inside, what sparsify's ``SparseCoder`` computes with is clipsteer's: its fused encoder, its
    decoder, and the two loops over decoder rows that keep their norms.

    ``SparseCoder``, its files and ``Trainer`` stay as they are and compute the same. The
    pre-activations that its encoder returns are built when somebody looks at them; the largest of
    dead latents, for AuxK, are found without. As in sparsify they have no gradient. With
    ``activation="groupmax"`` the encoder stays sparsify's.
    """
    try:
        from sparsify import sparse_coder
        from sparsify.fused_encoder import EncoderOutput
        from sparsify.sign_sgd import SignSGD
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
        compiling = torch.compiler.is_compiling() or transformed()
        if activation != "topk" or compiling or not 1 <= k <= weight.shape[0]:
            return encoder(input, weight, bias, k, activation)
        acts, indices = topk_encode(input, weight, bias, k=k, grad_buffer=gradient_buffer(weight))
        b = None if bias is None else bias.detach()
        fixed = (input.detach(), weight.detach(), b)
        return EncoderOutput(acts, indices, Preactivations.of(*fixed, acts.dtype, relu=True))

    def decode(
        top_indices: Tensor,  # (B, k)
        top_acts: Tensor,  # (B, k)
        W_dec: Tensor,  # (d, n)
    ) -> Tensor:
        if torch.compiler.is_compiling() or transformed():
            return decoder(top_indices, top_acts, W_dec)
        W = W_dec.mT
        return sparse_decode(top_acts, top_indices, W, grad_buffer=gradient_buffer(W))

    def unit_norm(self: Any) -> None:
        unit_rows_(self.W_dec.data)

    def remove_parallel(self: Any) -> None:
        remove_parallel_(self.W_dec.grad, self.W_dec.data)

    @torch.no_grad()
    def sign_sgd(self: Any, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    sign_step_(parameter, parameter.grad, group["lr"])

    coder = sparse_coder.SparseCoder
    mine = [
        (sparse_coder, "fused_encoder", encode),
        (sparse_coder, "decoder_impl", decode),
        (coder, "set_decoder_norm_to_unit_norm", unit_norm),
        (coder, "remove_gradient_parallel_to_decoder_directions", remove_parallel),
        (SignSGD, "step", sign_sgd),
    ]
    theirs = [(place, name, getattr(place, name)) for place, name, _ in mine]
    for place, name, function in mine:
        setattr(place, name, function)
    try:
        yield
    finally:
        for place, name, function in theirs:
            setattr(place, name, function)
