"""The sparse autoencoder: five architectures, three input normalisations, one module.

    x' = (x - mean) / scale,  pre = (x' - b_dec) W_encᵀ + b_enc,  f = activation(pre),
    x̂ = (f W_dec + b_dec) · scale + mean

Both dictionaries are (d_sae, d_in), a feature a row. Sources: ``clipsteer.sae.architectures``; for
the normalisations and the initialisation Joseph et al. 2025 (arXiv 2504.08729). Prefixes of the
dictionary are in ``clipsteer.sae.matryoshka``, what differs in a transcoder is in
``clipsteer.sae.transcoder``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipsteer import ops
from clipsteer.io.doors import door
from clipsteer.io.files import FileFormatError
from clipsteer.sae import formats
from clipsteer.sae.architectures import batch_count, check, checked_k
from clipsteer.sae.encoding import Encoding
from clipsteer.sae.foreign import Described
from clipsteer.sae.matryoshka import checked_prefixes, decode_prefixes
from clipsteer.sae.normalization import InputStats, denormalize
from clipsteer.sae.rows import geometric_median, unit_rows
from clipsteer.sae.transcoder import check_target


class SAEOutput(NamedTuple):
    """What a forward pass gives; acts are in descending order for topk, dense for the others."""

    x_hat: Tensor  # (..., d_in), in x's dtype; (..., d_out) of a transcoder
    acts: Tensor  # (..., k) for topk, else (..., d_sae)
    indices: Tensor | None  # (..., k) int64 for topk, else None
    stats: InputStats  # of the input, as ``decode`` takes them


class SAE(Encoding):
    """Sparse autoencoder over activations of width ``d_in``, with ``d_sae`` features.

    Args:
        d_in: width of the activations.
        d_sae: number of features.
        architecture: "relu"; "topk" (``ops.topk_encode`` and ``ops.sparse_decode``: no dense code
            is built); "batch_topk" (in training the k·rows largest of the batch, else all above a
            saved running threshold); "jumprelu" (above a threshold a feature); "gated".
        k: active features a row, for topk and batch_topk (where it is an average and may be
            fractional); else unused.
        normalize: "none"; "layer_norm" (mean and unbiased standard deviation of the row, plus
            1e-5); "constant_norm" (rows scaled to norm √d_in). The output is un-normalised with the
            same values.
        apply_b_dec_to_input: subtract the decoder bias before encoding; None: unless it is a
            transcoder, which cannot.
        matryoshka: sizes n_1 < … < d_sae of the prefixes of the dictionary that are to reconstruct
            by themselves; for every architecture but gated. Only training and evaluation differ.
        d_out: width of what a transcoder gives, also where it is d_in; None: an autoencoder.
        skip: add W_skip x to what a transcoder gives.
        dtype, device: of the parameters. Rows of another dtype are cast to it; x_hat comes back in
            theirs.
        metadata: what it was trained on: "clip_model", "pretrained", "hook_point", "tokens" and
            whatever else is JSON.

    Parameters W_enc and W_dec (d_sae, d_in), b_dec (d_in,), b_enc (d_sae,); gated has b_gate, b_mag
    and r_mag (d_sae,) in place of b_enc; jumprelu has ``threshold`` (d_sae,), batch_topk a buffer
    ``threshold`` () that is negative until trained. Of a transcoder W_dec is (d_sae, d_out), b_dec
    (d_out,) and W_skip (d_out, d_in).

    Raises:
        ValueError, TypeError: unknown names, sizes or k out of range.
    """

    W_skip: nn.Parameter  # (d_out, d_in), where ``skip``

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        architecture: str = "topk",
        k: int | float | None = 64,
        *,
        normalize: str = "none",
        apply_b_dec_to_input: bool | None = None,
        matryoshka: Sequence[int] | None = None,
        d_out: int | None = None,
        skip: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check(d_in, d_sae, architecture, normalize, dtype)
        check_target(d_out, skip, apply_b_dec_to_input)
        self.d_in = d_in
        self.d_sae = d_sae
        self.architecture = architecture
        self.normalize = normalize
        self.apply_b_dec_to_input = d_out is None and apply_b_dec_to_input is not False
        self.matryoshka = checked_prefixes(matryoshka, architecture, d_sae)
        self.d_out = d_out
        self.skip = skip
        self.metadata: dict[str, Any] = dict(metadata or {})
        self.k = checked_k(k, architecture, d_sae)

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.W_enc = nn.Parameter(empty(d_sae, d_in))
        self.W_dec = nn.Parameter(empty(d_sae, d_in if d_out is None else d_out))
        self.b_dec = nn.Parameter(empty(self.W_dec.shape[1]))
        if skip:
            self.W_skip = nn.Parameter(empty(self.W_dec.shape[1], d_in))
        for name in ("b_gate", "b_mag", "r_mag") if architecture == "gated" else ("b_enc",):
            self.register_parameter(name, nn.Parameter(empty(d_sae)))
        if architecture == "jumprelu":
            self.register_parameter("threshold", nn.Parameter(empty(d_sae)))
        elif architecture == "batch_topk":
            self.register_buffer("threshold", empty())
        # the loader builds on "meta", where there is nothing to fill
        if not self.W_enc.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Decoder rows uniform, then of unit norm; W_enc = W_dec; biases 0; thresholds of jumprelu
        0.01, that of batch_topk unset (-1). Of a transcoder W_enc uniform, within 1 / √d_in, and
        W_dec and W_skip 0 (Paulo et al. 2025, arXiv 2501.18823)."""
        if self.d_out is None:
            self.W_dec.uniform_(-1, 1)
            self.W_dec.copy_(unit_rows(self.W_dec))
            self.W_enc.copy_(self.W_dec)
        else:
            bound = self.d_in**-0.5
            self.W_enc.uniform_(-bound, bound)
            self.W_dec.zero_()
        for name, parameter in self.named_parameters():
            if name not in ("W_enc", "W_dec"):
                parameter.zero_()
        if self.architecture in ("jumprelu", "batch_topk"):
            self.threshold.fill_(0.01 if self.architecture == "jumprelu" else -1.0)

    @property
    def has_unit_rows(self) -> bool:
        """Whether training keeps decoder rows at norm 1: not those of a transcoder, which start
        at 0."""
        return self.d_out is None

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that rebuild this module, without dtype, device and metadata."""
        names = ("d_in", "d_sae", "architecture", "k", "normalize", "apply_b_dec_to_input")
        found = {name: getattr(self, name) for name in names}
        # not in files of versions that had none
        optional = {name: getattr(self, name) for name in formats.OPTIONAL}
        return found | {name: value for name, value in optional.items() if value}

    def extra_repr(self) -> str:
        """The configuration, as ``repr`` shows it."""
        return ", ".join(
            f"{name}={value!r}" for name, value in self.config.items() if value is not None
        )

    def decode(
        self,
        acts: Tensor | tuple[Tensor, Tensor] | ops.SparseCodes,
        stats: InputStats | None = None,
        *,
        sparse_grad: bool = False,
        frozen: bool = False,
    ) -> Tensor:
        """Dense activations (..., d_sae), or a pair (acts, indices) of (..., k) each -> (...,
        d_in); ragged codes of B rows -> (B, d_in). Of a transcoder (..., d_out), without W_skip x.

        Without ``stats`` the result is in the normalised space; with those of ``normalize_input``
        it is in x's own. ``frozen``: gradients reach the activations alone.
        """
        W_dec = self.W_dec.detach() if frozen else self.W_dec
        b_dec = self.b_dec.detach() if frozen else self.b_dec
        if isinstance(acts, ops.SparseCodes):
            x_hat = ops.ragged_decode(*acts, W_dec, b_dec, sparse_grad=sparse_grad)
        elif isinstance(acts, tuple):
            values, indices = acts
            x_hat = ops.sparse_decode(values, indices, W_dec, b_dec, sparse_grad=sparse_grad)
        elif acts.dim() == 0 or acts.shape[-1] != self.d_sae:
            raise ValueError(
                f"SAE.decode: acts must be (..., d_sae = {self.d_sae}), got {tuple(acts.shape)}"
            )
        else:
            x_hat = F.linear(acts.to(W_dec.dtype), W_dec.T, b_dec)
        return x_hat if stats is None else denormalize(x_hat, stats)

    def decode_prefixes(
        self,
        acts: Tensor | tuple[Tensor, Tensor] | ops.SparseCodes,
        stats: InputStats | None = None,
        *,
        sparse_grad: bool = False,
    ) -> Tensor:
        """``decode`` with the features of each prefix of ``matryoshka`` alone: (G, ..., d_in). The
        last is ``decode``'s; without ``matryoshka`` there is none but that."""
        if self.matryoshka is None:
            return self.decode(acts, stats, sparse_grad=sparse_grad).unsqueeze(0)
        x_hats = decode_prefixes(acts, self.W_dec, self.b_dec, self.matryoshka, sparse_grad)
        return x_hats if stats is None else denormalize(x_hats, stats)

    def with_skip(self, x_hat: Tensor, x: Tensor, *, frozen: bool = False) -> Tensor:
        """What was decoded (..., d_out) plus W_skip x where there is one, in the dtype of the rows
        x (..., d_in); ``frozen`` as in ``decode``."""
        if self.skip:
            W_skip = self.W_skip.detach() if frozen else self.W_skip
            x_hat = x_hat + F.linear(x.to(W_skip.dtype), W_skip)
        return x_hat.to(x.dtype)

    def forward(
        self, x: Tensor, *, sparse_grad: bool = False, bandwidth: float | None = None
    ) -> SAEOutput:
        """(..., d_in) -> ``SAEOutput``. Gradients reach x and every parameter that the outputs
        change with.

        sparse_grad: the gradients of both dictionaries are sparse COO tensors of the rows in use,
        as in ``ops.sparse_decode`` (a compiled backend is needed).
        bandwidth: jumprelu's threshold gets a gradient, by a rectangle of this width
        (``ops.jumprelu_encode``); None: it has none.
        """
        centred, stats = self._centred(x)
        if self.architecture == "topk":
            acts, indices = self._topk_encode(centred, sparse_grad)
            x_hat = self.decode((acts, indices), stats, sparse_grad=sparse_grad)
            return SAEOutput(self.with_skip(x_hat, x), acts, indices, stats)
        codes = self._chosen(centred, sparse_grad, bandwidth)
        x_hat = self.decode(codes, sparse_grad=sparse_grad)
        x_hat = denormalize(x_hat.reshape(*x.shape[:-1], len(self.b_dec)), stats)
        if isinstance(codes, Tensor):
            acts = codes
        else:
            if self.architecture == "batch_topk" and self.training:
                self._update_threshold(codes.values)
            acts = self._dense(codes, x.shape[:-1])
        return SAEOutput(self.with_skip(x_hat, x), acts, None, stats)

    @torch.no_grad()
    def init_b_dec_(self, x: Tensor, *, max_iterations: int = 200, tolerance: float = 1e-7) -> None:
        """Set b_dec to the geometric median of the normalised rows of x (..., d_in), the point of
        least total distance, in float64 (``clipsteer.sae.rows.geometric_median``). For a transcoder
        x are rows (..., d_out) of its target, which are not normalised."""
        rows = self.normalize_input(x)[0] if self.d_out is None else x
        rows = rows.reshape(-1, len(self.b_dec)).double()
        if rows.shape[0] == 0:
            raise ValueError(f"SAE.init_b_dec_: x must hold at least one row, got {tuple(x.shape)}")
        self.b_dec.copy_(geometric_median(rows, max_iterations, tolerance))

    @torch.no_grad()
    def init_threshold_(self, x: Tensor, k: int | float) -> None:
        """Of jumprelu and gated: let, of the rows of x (..., d_in), k features through on average;
        nothing to do for the others."""
        if self.architecture not in ("jumprelu", "gated"):
            return
        rows = self._centred(x)[0].reshape(-1, self.d_in)
        codes = self.batch_codes(rows, batch_count(min(k, self.d_sae), len(rows)))
        level = torch.where(codes.values > 0, codes.values, torch.inf).amin()
        if self.architecture == "gated":
            self.b_gate.add_(torch.where(level.isfinite(), -level, 0))
        else:
            self.threshold.copy_(torch.where(level.isfinite(), level, self.threshold))

    @torch.no_grad()
    def renormalize_decoder_(self) -> None:
        """Scale every decoder row to norm 1; a row of zeros stays."""
        self.W_dec.copy_(unit_rows(self.W_dec))

    @torch.no_grad()
    def remove_parallel_gradient_(self) -> None:
        """Take from W_dec's gradient, row by row, its component along the row; nothing to do
        without a gradient."""
        grad = self.W_dec.grad
        if grad is None:
            return
        unit = unit_rows(self.W_dec)
        grad.sub_((grad * unit).sum(-1, keepdim=True) * unit)

    def described(self) -> Described:
        """What is written to a file: the arguments that rebuild this module, its tensors on the
        CPU, its metadata."""
        weights = {name: tensor.detach().cpu() for name, tensor in self.state_dict().items()}
        return Described(self.config, weights, self.metadata)

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write ``cfg.json`` and ``model.safetensors`` into a folder (made if missing), each in one
        atomic step.

        Raises ValueError when a weight is NaN (it could not be loaded again), OSError when the disk
        refuses.
        """
        return formats.save(self, directory)

    @classmethod
    @door
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> SAE:
        """Load an SAE, in evaluation mode, from a folder or from the Hugging Face hub.

        Args:
            path: a folder as written by clipsteer, SAELens, sparsify or ViT-Prisma (found out by
                looking), a ViT-Prisma ``.pt`` file, or ``"hf-hub:org/repo/subfolder"``. No code
                from the file or the hub is run.
            device, dtype: where and as what; by default the file's dtype.

        Raises:
            FileNotFoundError: nothing there.
            clipsteer.FileFormatError: not a readable SAE, or one that cannot be run here.
            RuntimeError: the hub cannot be reached.
        """
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"SAE.from_pretrained: dtype must be a floating type, got {dtype}")
        folder, found = formats.read(path)
        try:
            # on "meta" nothing is allocated, whatever sizes the file claims
            sae = cls(**found.config, device="meta", metadata=found.metadata)
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise FileFormatError(f"{folder}: {error}") from None
        weights = formats.fitting(folder, found.weights, sae.state_dict())
        dtype = dtype or weights["W_enc"].dtype
        state = {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}
        sae.load_state_dict(state, assign=True)
        return sae.requires_grad_(True).eval().to(device)
