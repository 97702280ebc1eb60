"""SAELens's training SAEs on the fused ops.

``FastTopKTrainingSAE(cfg)`` stands for ``TopKTrainingSAE(cfg)``, and ``fast(sae)`` changes an
instance; SAELens's trainer and runner go on as before
(``LanguageModelSAETrainingRunner(cfg, override_sae=FastTopKTrainingSAE(cfg.sae))``).

Configs, parameters, hooks, losses and files are SAELens's. What it computes densely stays dense
where that is asked for: by a hook on ``hook_sae_acts_pre``, under ``torch.compile``, and with an
activation function of one's own. The codes and pre-activations of a ``TrainStepOutput`` are dense
tensors to whoever looks at them, and are built then.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from clipsteer.integrations._codes import Codes, Preactivations
from clipsteer.integrations._memory import gradient_buffer
from clipsteer.integrations._on_demand import waits
from clipsteer.ops._calls import transformed
from clipsteer.ops._ragged import SparseCodes, code_rows
from clipsteer.ops.batch_topk_encode import batch_topk_encode
from clipsteer.ops.sparse_decode import sparse_decode
from clipsteer.ops.threshold_encode import threshold_encode
from clipsteer.ops.topk_encode import topk_encode

try:
    from sae_lens.registry import get_sae_training_class
    from sae_lens.saes.batchtopk_sae import BatchTopK, BatchTopKTrainingSAE
    from sae_lens.saes.jumprelu_sae import (
        JumpReLU,
        JumpReLUTrainingSAE,
        Step,
        calculate_pre_act_loss,
    )
    from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE
    from sae_lens.saes.sae import TrainingSAE
    from sae_lens.saes.topk_sae import TopK, TopKTrainingSAE
except ImportError as error:
    raise ImportError(
        "clipsteer.integrations.saelens needs SAELens: pip install sae-lens"
    ) from error

__all__ = [
    "FastBatchTopKTrainingSAE",
    "FastJumpReLUTrainingSAE",
    "FastMatryoshkaBatchTopKTrainingSAE",
    "FastTopKTrainingSAE",
    "fast",
]

# JumpReLU codes that are denser than this are faster as a dense product.
DENSE = 0.1


def _hooked(module: nn.Module) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in hooks)


class _Fast(TrainingSAE):
    """What the fast classes share."""

    @classmethod
    def get_sae_class_for_architecture(cls, architecture: str) -> type:
        registered = get_sae_training_class(architecture)[0]
        if issubclass(cls, registered):
            return cls
        return super().get_sae_class_for_architecture(architecture)

    def _sparse(self, x: Tensor) -> bool:
        """Whether nobody asks for the dense pre-activations of these rows."""
        other = torch.compiler.is_compiling() or transformed()
        return not (other or _hooked(self.hook_sae_acts_pre)) and x.dim() >= 2

    def _seen(self, codes: Codes) -> Tensor:
        """The codes, as hooks on them find and leave them."""
        hook = self.hook_sae_acts_post
        return hook(codes.clone()) if _hooked(hook) else codes

    def _reconstructed(self, x_hat: Tensor) -> Tensor:
        """What SAELens's ``decode`` does after the decoder."""
        x_hat = self.run_time_activation_norm_fn_out(self.hook_sae_recons(x_hat))
        return self.reshape_fn_out(x_hat, self.d_head)


class FastTopKTrainingSAE(_Fast, TopKTrainingSAE):
    """``TopKTrainingSAE`` whose codes are never dense."""

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self._sparse(x) or type(self.activation_fn) is not TopK:
            return super().encode_with_hidden_pre(x)
        sae_in = self.process_sae_in(x)
        hidden_pre = self._hidden_pre(sae_in)
        acts, indices = topk_encode(
            sae_in,
            hidden_pre.W,
            self.b_enc,
            k=self.activation_fn.k,
            scale=_detached(hidden_pre.scale),
            grad_buffer=gradient_buffer(hidden_pre.W),
        )
        acts = acts.to(hidden_pre.dtype)
        if self.activation_fn.use_sparse_activations:
            return self.hook_sae_acts_post(_coo(acts, indices, self.cfg.d_sae)), hidden_pre
        return self._seen(self._codes(acts, indices, None, hidden_pre.scale)), hidden_pre

    def _hidden_pre(self, sae_in: Tensor) -> Preactivations:
        scale = self.W_dec.norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else None
        dtype = torch.promote_types(sae_in.dtype, self.b_enc.dtype)
        return Preactivations.of(sae_in, self.W_enc.t(), self.b_enc, dtype, scale=scale)

    def _codes(
        self,
        acts: Tensor,  # (…, k), or (m,)
        indices: Tensor,  # like acts
        offsets: Tensor | None,  # (B + 1,)
        scale: Tensor | None,  # (d_sae,)
    ) -> Codes:
        """Codes of scaled activations. The decoder divides by the scale again, so that what it
        reads does not depend on it, and the gradient of the reconstruction need not pass there."""
        if scale is None:
            return Codes.of(acts, indices, offsets, self.cfg.d_sae)
        mine = scale[indices]
        unscaled = acts / mine.detach()
        # the scale's gradient, and not a bit of the value
        seen = acts + unscaled.detach() * (mine - mine.detach())
        return Codes.of(seen, indices, offsets, self.cfg.d_sae, for_decoder=unscaled)

    def decode(self, feature_acts: Tensor) -> Tensor:
        if not waits(feature_acts, Codes):
            return super().decode(feature_acts)
        values = self._for_decoder(feature_acts)
        return self._reconstructed(feature_acts.decode(self.W_dec, values) + self.b_dec)

    def _for_decoder(self, codes: Codes) -> Tensor:
        if codes.for_decoder is not None:
            return codes.for_decoder
        if not self.cfg.rescale_acts_by_decoder_norm:
            return codes.values
        return codes.values / self.W_dec.norm(dim=-1)[codes.indices]

    def calculate_topk_aux_loss(
        self,
        sae_in: Tensor,
        sae_out: Tensor,
        hidden_pre: Tensor,
        dead_neuron_mask: Tensor | None,
    ) -> Tensor:
        normalized = self.cfg.normalize_activations in ("constant_norm_rescale", "layer_norm")
        dead = 0 if dead_neuron_mask is None else int(dead_neuron_mask.sum())
        if not waits(hidden_pre, Preactivations) or normalized or not dead:
            return super().calculate_topk_aux_loss(sae_in, sae_out, hidden_pre, dead_neuron_mask)
        assert dead_neuron_mask is not None
        residual = (sae_in - sae_out).detach()
        wanted = sae_in.shape[-1] // 2
        scale = _detached(hidden_pre.scale)
        values, indices = topk_encode(
            hidden_pre.x,
            hidden_pre.W,
            hidden_pre.b,
            k=min(wanted, dead),
            relu=False,
            scale=scale,
            columns=dead_neuron_mask.nonzero().flatten(),
        )
        values = values.to(hidden_pre.dtype)
        if scale is not None:
            # what the decoder divides by again: its gradient comes to nothing
            values = values / scale[indices]
        recons = sparse_decode(values, indices, self.W_dec)
        recons = self.reshape_fn_out(recons, self.d_head)
        loss = (recons - residual).pow(2).sum(dim=-1).mean()
        return self.cfg.aux_loss_coefficient * min(dead / wanted, 1.0) * loss


class FastBatchTopKTrainingSAE(FastTopKTrainingSAE, BatchTopKTrainingSAE):
    """``BatchTopKTrainingSAE`` whose codes are never dense."""

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        plain = type(self.activation_fn) is BatchTopK and x.dim() == 2
        if not plain or not self._sparse(x):
            return super().encode_with_hidden_pre(x)
        sae_in = self.process_sae_in(x)
        hidden_pre = self._hidden_pre(sae_in)
        count = int(self.activation_fn.k * len(sae_in))
        codes = batch_topk_encode(
            sae_in, self.W_enc.t(), self.b_enc, count=count, scale=_detached(hidden_pre.scale)
        )
        acts = codes.values.to(hidden_pre.dtype)
        found = self._codes(acts, codes.indices, codes.offsets, hidden_pre.scale)
        return self._seen(found), hidden_pre


class FastMatryoshkaBatchTopKTrainingSAE(FastBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAE):
    """``MatryoshkaBatchTopKTrainingSAE`` whose codes are never dense, and whose levels are
    decoded in one pass."""

    def decode(self, feature_acts: Tensor) -> Tensor:
        if not waits(feature_acts, Codes):
            return super().decode(feature_acts)
        return self._reconstructed(self._levels(feature_acts)[-1])

    def _levels(self, codes: Codes) -> Tensor:
        """The reconstruction (G, B, d_in) of every level, kept with the codes."""
        if codes.levels is None:
            values = self._for_decoder(codes)
            widths = self.cfg.matryoshka_widths
            codes.levels = codes.decode(self.W_dec, values, prefixes=widths) + self.b_dec
        return codes.levels

    def _iterable_decode(
        self, feature_acts: Tensor, include_outer_loss: bool = False
    ) -> Iterator[tuple[int, Tensor]]:
        if not waits(feature_acts, Codes):
            yield from super()._iterable_decode(feature_acts, include_outer_loss)
            return
        widths = self.cfg.matryoshka_widths
        wanted = len(widths) - (not include_outer_loss)
        for width, level in zip(widths[:wanted], self._levels(feature_acts)):
            yield width, self.run_time_activation_norm_fn_out(level)


class FastJumpReLUTrainingSAE(_Fast, JumpReLUTrainingSAE):
    """``JumpReLUTrainingSAE`` whose codes are sparse as soon as they are few.

    What counts are the pre-activations above the threshold and those within half a bandwidth of
    it, which its gradient is made of. An SAE that was just made has them at most features; it runs
    dense until they are few.
    """

    _share = 1.0  # of the pre-activations that counted in the last step

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self._sparse(x) or x.dim() != 2:
            return super().encode_with_hidden_pre(x)
        threshold = self.threshold.detach()
        # a little lower, for what rounding may do to the border; what is beyond adds nothing
        lowest = threshold - 0.5001 * self.bandwidth
        if self._share > DENSE:
            acts, hidden_pre = super().encode_with_hidden_pre(x)
            self._share = float((hidden_pre.detach() > lowest).float().mean())
            return acts, hidden_pre
        sae_in = self.process_sae_in(x)
        dtype = torch.promote_types(sae_in.dtype, self.b_enc.dtype)
        hidden_pre = Preactivations.of(sae_in, self.W_enc.t(), self.b_enc, dtype)
        near = threshold_encode(
            sae_in, self.W_enc.t(), self.b_enc, threshold=lowest.to(sae_in.dtype), relu=False
        )
        near = near._replace(values=near.values.to(dtype))
        self._share = len(near.values) / (len(x) * self.cfg.d_sae)
        hidden_pre.near = near
        acts = self._each(JumpReLU, near)
        return self._seen(Codes.of(acts, near.indices, near.offsets, self.cfg.d_sae)), hidden_pre

    def _each(self, function: Any, near: SparseCodes) -> Tensor:
        """SAELens's function of a pre-activation and its threshold, of each code."""
        threshold = self.threshold.to(near.values.dtype)[near.indices]
        ste = self.cfg.jumprelu_ste_to_input
        return function.apply(near.values[None], threshold, self.bandwidth, ste)[0]

    def decode(self, feature_acts: Tensor) -> Tensor:
        if not waits(feature_acts, Codes):
            return super().decode(feature_acts)
        return self._reconstructed(feature_acts.decode(self.W_dec) + self.b_dec)

    def calculate_aux_loss(
        self, step_input: Any, feature_acts: Any, hidden_pre: Any, sae_out: Tensor
    ) -> dict[str, Tensor]:
        sparse = waits(hidden_pre, Preactivations) and waits(feature_acts, Codes)
        near = hidden_pre.near if waits(hidden_pre, Preactivations) else None
        if not sparse or near is None:
            return super().calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)
        mode = self.cfg.jumprelu_sparsity_loss_mode
        if mode == "tanh":
            scale = self.cfg.jumprelu_tanh_scale * self.W_dec.norm(dim=1)[near.indices]
            each = torch.tanh(scale * feature_acts.values)
        else:
            each = self._each(Step, near)
        rows = len(sae_out)
        l0 = each.new_zeros(rows).index_add(0, code_rows(near), each)
        if mode == "quadratic":
            l0 = 2 / self.cfg.target_l0 * (l0 - self.cfg.target_l0) ** 2
        losses = {"l0_loss": (step_input.coefficients["l0"] * l0).mean()}
        if self.cfg.pre_act_loss_coefficient is not None:
            dead = step_input.dead_neuron_mask
            losses["pre_act_loss"] = self._pre_act_loss(hidden_pre, dead)
        return losses

    def _pre_act_loss(self, pre: Preactivations, dead: Tensor | None) -> Tensor:
        """SAELens's, of the dead features alone."""
        if dead is None or not dead.any():
            return pre.x.new_tensor(0.0)
        at = dead.nonzero().flatten()
        of_dead = (pre.x @ self.W_enc[:, at] + self.b_enc[at]).to(pre.dtype)
        return calculate_pre_act_loss(
            self.cfg.pre_act_loss_coefficient,
            self.threshold.to(pre.dtype)[at],
            of_dead,
            dead[at],
            self.W_dec[at].norm(dim=1),
        )


def _detached(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach()


def _coo(
    acts: Tensor,  # (…, k)
    indices: Tensor,  # (…, k)
    n: int,
) -> Tensor:
    """The sparse tensor that SAELens makes of codes when it is told to."""
    *rows, k = acts.shape
    each = torch.ones(*rows, k, dtype=torch.bool, device=acts.device).nonzero().t()[:-1]
    where = torch.cat([each, indices.flatten()[None]])
    return torch.sparse_coo_tensor(where, acts.flatten(), (*rows, n))


FAST = {
    TopKTrainingSAE: FastTopKTrainingSAE,
    BatchTopKTrainingSAE: FastBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAE: FastMatryoshkaBatchTopKTrainingSAE,
    JumpReLUTrainingSAE: FastJumpReLUTrainingSAE,
}


def fast(sae: TrainingSAE) -> TrainingSAE:
    """The same instance, of the class that is fast; TypeError where there is none."""
    if isinstance(sae, _Fast):
        return sae
    if type(sae) not in FAST:
        names = ", ".join(cls.__name__ for cls in FAST)
        raise TypeError(f"fast: takes one of {names}, got {type(sae).__name__}")
    sae.__class__ = FAST[type(sae)]
    return sae
