"""How an SAE encodes: every architecture as sparse codes, and the same densely.

    pre = x' W_encᵀ + b_enc      x' centred rows; gated: pre = x' W_encᵀ
    relu        pre where it is above 0
    topk        the k largest of a row             batch_topk  the k · rows largest of a batch, or
    jumprelu    pre where it is above θ                        all above the saved threshold
    gated       relu(pre · exp(r_mag) + b_mag) where π = pre + b_gate is above 0

Sparse codes cost what is active, on CPUs with screened products. Densely an SAE is encoded where
that is faster (most features active, as relu starts), and where codes, of which there are as many
as the data say, would stop a compiler, an exporter or the host of a GPU.
"""

from __future__ import annotations

import os
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipsteer import ops
from clipsteer.ops import _dispatch
from clipsteer.ops._autograd import has_tangents, transformed
from clipsteer.ops.jumprelu_encode import jumprelu
from clipsteer.sae.architectures import batch_count, running_threshold
from clipsteer.sae.normalization import InputStats, normalize

# share of features active above which the products of all are faster than sums over codes
_DENSE_FROM = 1 / 8
# rows that tell the share
_PROBED = 8

Codes = tuple[Tensor, Tensor] | ops.SparseCodes | Tensor


class Encoded(NamedTuple):
    """Codes as ``SAE.decode`` takes them, and what training needs besides."""

    # (acts, indices) of (B, k), ragged codes, or dense acts (B, d_sae)
    codes: Codes
    # of the shape of their values; jumprelu: 1 where active, with a gradient for the threshold;
    # gated: π; else None
    gate: Tensor | None = None


def values_of(codes: Codes) -> Tensor:
    """The activations: (B, k), (m,) or (B, d_sae)."""
    return codes if isinstance(codes, Tensor) else codes[0]


def indices_of(codes: Codes) -> Tensor | None:
    """The feature of each activation; None where they are dense."""
    return None if isinstance(codes, Tensor) else codes[1]


def with_values(codes: Codes, values: Tensor) -> Codes:
    """The same features with other activations."""
    if isinstance(codes, Tensor):
        return values
    if isinstance(codes, ops.SparseCodes):
        return codes._replace(values=values)
    return values, codes[1]


def of_features(parameter: Tensor, codes: Codes) -> Tensor:
    """A parameter (d_sae,) as it goes with the values of codes; its gradient is summed in one
    order."""
    indices = indices_of(codes)
    return parameter if indices is None else F.embedding(indices, parameter[:, None])[..., 0]


def takes_codes(x: Tensor) -> bool:
    """Whether rows like these can be encoded to ragged codes without anyone waiting for how many
    there are."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or _dispatch.exporting_to_onnx():
        return False
    asked = os.environ.get("CLIPSTEER_BACKEND", "auto").lower() or "auto"
    if asked not in ("auto", "cpp") or transformed() or has_tangents():
        return False
    return _dispatch.unusable("cpp", x.device, x.dtype, "threshold_encode") is None


class Encoding(nn.Module):
    """The encoder of an SAE, to be inherited from."""

    d_in: int
    d_sae: int
    architecture: str
    k: int | float | None
    normalize: str
    apply_b_dec_to_input: bool
    d_out: int | None
    W_enc: nn.Parameter  # (d_sae, d_in)
    W_dec: nn.Parameter  # (d_sae, d_in), of a transcoder (d_sae, d_out)
    b_dec: nn.Parameter  # (d_in,), of a transcoder (d_out,)
    # those that only some architectures have
    b_enc: nn.Parameter  # (d_sae,)
    b_gate: nn.Parameter  # (d_sae,)
    b_mag: nn.Parameter  # (d_sae,)
    r_mag: nn.Parameter  # (d_sae,)
    threshold: Tensor  # (d_sae,) or ()

    def normalize_input(self, x: Tensor) -> tuple[Tensor, InputStats]:
        """(..., d_in) -> the normalised rows in the parameters' dtype, and what it takes to undo
        that (``clipsteer.sae.normalization``); in a transcoder's output nothing has to be.

        Raises TypeError, ValueError: no floating tensor, or one of another width.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x)
            raise TypeError(f"SAE: x must be a floating tensor, got {got}")
        if x.dim() == 0 or x.shape[-1] != self.d_in:
            raise ValueError(
                f"SAE: x must be of shape (..., d_in = {self.d_in}), got {tuple(x.shape)}"
            )
        rows, stats = normalize(x, self.normalize, self.W_enc.dtype)
        return rows, stats if self.d_out is None else InputStats(None, None)

    def _centred(self, x: Tensor) -> tuple[Tensor, InputStats]:
        """(..., d_in) -> what the encoder's product takes, and the normalisation's statistics."""
        x, stats = self.normalize_input(x)
        if self.apply_b_dec_to_input:
            x = x - self.b_dec
        return x, stats

    @property
    def encoder_bias(self) -> nn.Parameter:
        """(d_sae,) of what decides whether a feature is active."""
        return self.b_gate if self.architecture == "gated" else self.b_enc

    def codes(
        self,
        x: Tensor,  # (B, d_in), normalised and centred
        sparse_grad: bool = False,
    ) -> tuple[Tensor, Tensor] | ops.SparseCodes:
        """Sparse codes: (acts, indices) of (B, k) each for topk, ragged ones for the others.

        In training mode batch_topk selects over the batch. ``sparse_grad``: the gradient of W_enc
        is a sparse COO tensor of the rows in use.
        """
        return cast("tuple[Tensor, Tensor] | ops.SparseCodes", self.encoded(x, sparse_grad).codes)

    def encoded(
        self,
        x: Tensor,  # (B, d_in), normalised and centred
        sparse_grad: bool = False,
        *,
        bandwidth: float | Tensor | None = None,
        dense: bool = False,
    ) -> Encoded:
        """``codes``, and what training needs besides.

        bandwidth: of the rectangle that gives jumprelu's threshold its gradient
        (``ops.jumprelu_encode``); None: it has none. dense: activations of all features instead, of
        relu, jumprelu and gated.
        """
        if dense:
            return self._dense_encoded(x, bandwidth)
        if self.architecture == "topk":
            return Encoded(self._topk_encode(x, sparse_grad))
        if self.architecture == "batch_topk" and self.training:
            return Encoded(self._selected(x, sparse_grad))
        if self.architecture == "gated":
            # pre > -b_gate, so that the magnitude is of pre itself
            pre = ops.threshold_encode(
                x, self.W_enc, threshold=-self.b_gate, relu=False, sparse_grad=sparse_grad
            )
            return self._gated(pre)
        if self.architecture == "jumprelu" and bandwidth is not None:
            jumped = ops.jumprelu_encode(
                x,
                self.W_enc,
                self.b_enc,
                threshold=self.threshold,
                bandwidth=float(bandwidth),
                sparse_grad=sparse_grad,
            )
            return Encoded(jumped.codes, jumped.active)
        threshold = 0.0 if self.architecture == "relu" else self.threshold
        return Encoded(
            ops.threshold_encode(
                x, self.W_enc, self.b_enc, threshold=threshold, sparse_grad=sparse_grad
            )
        )

    def _dense_encoded(self, x: Tensor, bandwidth: float | Tensor | None) -> Encoded:
        if self.architecture == "gated":
            return self._gated(F.linear(x, self.W_enc))
        if self.architecture == "jumprelu" and bandwidth is not None:
            pre = F.linear(x, self.W_enc, self.b_enc)
            return Encoded(*jumprelu(pre, self.threshold, bandwidth))
        return Encoded(self._dense_acts(x))

    def _gated(self, pre: Tensor | ops.SparseCodes) -> Encoded:
        """Pre-activations without bias as gated activations, and π."""
        values = values_of(pre)
        gate = values + of_features(self.b_gate, pre)
        scaled = values * of_features(self.r_mag, pre).exp()
        magnitude = torch.relu(scaled + of_features(self.b_mag, pre))
        # NaN stays
        there = (gate > 0) | gate.isnan()
        if isinstance(pre, ops.SparseCodes):
            # padding has a bias, too
            there = there & (ops.code_rows(pre) < pre.offsets.shape[0] - 1)
        acts = torch.where(there, magnitude, 0)
        return Encoded(with_values(pre, acts), torch.where(there, gate, 0))

    @torch.no_grad()
    def mostly_active(
        self,
        x: Tensor,  # (B, d_in), normalised and centred
    ) -> bool:
        """Whether so many features are active that dense products are faster than codes, told by a
        few of the rows."""
        rows = x[:: max(1, len(x) // _PROBED)]
        pre = F.linear(rows, self.W_enc, self.encoder_bias)
        level = self.threshold if self.architecture == "jumprelu" else 0
        return bool((pre > level).sum() > _DENSE_FROM * pre.numel())

    def _dense_acts(
        self,
        x: Tensor,  # (..., d_in), normalised and centred
        features: Tensor | None = None,  # (m,) int64; None: all
    ) -> Tensor:
        """Activations (..., m) for every architecture but topk; of batch_topk those above its
        threshold."""

        def of(parameter: Tensor) -> Tensor:
            return parameter if features is None else parameter[features]

        if self.architecture == "gated":
            pre = F.linear(x, of(self.W_enc))
            magnitude = torch.relu(pre * of(self.r_mag).exp() + of(self.b_mag))
            return magnitude * (pre + of(self.b_gate) > 0)
        pre = F.linear(x, of(self.W_enc), of(self.b_enc))
        if self.architecture == "relu":
            return torch.relu(pre)
        threshold = of(self.threshold) if self.architecture == "jumprelu" else self.threshold
        return torch.relu(pre) * (pre > threshold)

    @torch.no_grad()
    def _update_threshold(self, acts: Tensor) -> None:
        """Take in the activations that batch_topk kept, of any shape, zeros among them."""
        if acts.numel() > 0:
            self.threshold.copy_(running_threshold(self.threshold, acts))

    def _topk_encode(
        self,
        x: Tensor,  # (..., d_in), normalised and centred
        sparse_grad: bool = False,
    ) -> tuple[Tensor, Tensor]:
        k = cast(int, self.k)
        return ops.topk_encode(x, self.W_enc, self.b_enc, k=k, sparse_grad=sparse_grad)

    def batch_codes(
        self,
        x: Tensor,  # (B, d_in), normalised and centred
        count: int,
        sparse_grad: bool = False,
    ) -> ops.SparseCodes:
        """The ``count`` largest activations of a batch (``ops.batch_topk_encode``)."""
        bias = self.encoder_bias
        return ops.batch_topk_encode(x, self.W_enc, bias, count=count, sparse_grad=sparse_grad)

    def encode_topk(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(..., d_in) -> acts (..., k), descending, and indices (..., k) int64. For architecture
        "topk" alone."""
        if self.architecture != "topk":
            raise ValueError(
                "SAE.encode_topk: needs architecture 'topk', this is "
                f"{self.architecture!r}; use encode"
            )
        return self._topk_encode(self._centred(x)[0])

    def encode(self, x: Tensor) -> Tensor:
        """(..., d_in) -> dense activations (..., d_sae). batch_topk selects over the batch in
        training mode."""
        if self.architecture == "topk":
            acts, indices = self.encode_topk(x)
            return acts.new_zeros(*acts.shape[:-1], self.d_sae).scatter(-1, indices, acts)
        x = self._centred(x)[0]
        codes = self._chosen(x, False, None)
        return codes if isinstance(codes, Tensor) else self._dense(codes, x.shape[:-1])

    def _chosen(
        self,
        x: Tensor,  # (..., d_in), normalised and centred
        sparse_grad: bool,
        bandwidth: float | None,
    ) -> Tensor | ops.SparseCodes:
        """Of every architecture but topk the dense activations (..., d_sae), or codes of the rows
        where they cost less."""
        selects = self.architecture == "batch_topk" and self.training
        # relu may have most of its features active
        if selects or sparse_grad or (self.architecture != "relu" and takes_codes(x)):
            rows = x.reshape(-1, self.d_in)
            found = self.encoded(rows, sparse_grad, bandwidth=bandwidth).codes
        else:
            found = self._dense_encoded(x, bandwidth).codes
        return cast("Tensor | ops.SparseCodes", found)

    def _selected(self, x: Tensor, sparse_grad: bool = False) -> ops.SparseCodes:
        """The k · rows largest activations of x (B, d_in), normalised and centred."""
        return self.batch_codes(x, batch_count(cast(float, self.k), len(x)), sparse_grad)

    def _dense(self, codes: ops.SparseCodes, shape: torch.Size) -> Tensor:
        """Ragged codes of rows of this shape as activations (..., d_sae)."""
        rows = ops.code_rows(codes)
        # padding goes to a spare row
        dense = codes.values.new_zeros(shape.numel() + 1, self.d_sae)
        dense = dense.index_put((rows, codes.indices), codes.values)
        return dense[:-1].reshape(*shape, self.d_sae)

    def feature_acts(self, x: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Activations of some features and the factor that brings a decoder row back to the scale
        of x.

        x (..., d_in), features (m,) int64 -> acts (..., m), scale (..., 1). Only these features are
        encoded, except for topk, where whether one is active depends on all; batch_topk uses its
        threshold in training mode too.
        """
        centred, stats = self._centred(x)
        scale = torch.ones_like(centred[..., :1]) if stats.scale is None else stats.scale
        if self.architecture != "topk":
            return self._dense_acts(centred, features), scale
        acts, indices = self._topk_encode(centred)  # (..., k) each
        chosen = indices.unsqueeze(-2) == features.unsqueeze(-1)  # (..., m, k)
        return torch.where(chosen, acts.unsqueeze(-2), 0).sum(-1), scale
