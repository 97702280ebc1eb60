"""dictionary_learning's dictionaries on the fused ops: ``dict_class=FastTopK`` for its trainers.

Constructors, parameters, outputs and files are dictionary_learning's. Dictionaries lie in memory as
rows of features, whichever way their shape has it, which its trainers' own loops over features are
faster with, too. The dense codes and pre-activations that ``encode`` returns are built when
somebody looks at them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clipsteer.integrations._codes import Codes, Preactivations
from clipsteer.ops._ragged import SparseCodes
from clipsteer.ops.batch_topk_encode import batch_topk_encode
from clipsteer.ops.threshold_encode import threshold_encode

try:
    from dictionary_learning.dictionary import JumpReluAutoEncoder
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK
except ImportError as error:
    raise ImportError(
        "clipsteer.integrations.dictionary_learning needs it: pip install dictionary-learning"
    ) from error

__all__ = ["FastBatchTopK", "FastJumpReLU", "FastMatryoshkaBatchTopK", "FastTopK", "fast"]


def rows_of_features(module: nn.Module) -> None:
    """Lay the dictionaries of a module out as rows of features in memory."""
    for name, dimension in module._dictionaries.items():
        parameter = module.get_parameter(name)
        rows = parameter.data.movedim(dimension, 0).contiguous()
        parameter.data = rows.movedim(0, dimension)


class _Fast(nn.Module):
    """What the fast classes share: encoders by the weights that ``_encoder`` names."""

    _dictionaries: dict[str, int]  # and which of their dimensions is of features

    def _encoder(self) -> tuple[Tensor, Tensor]:
        """W_enc (n, d) and b_enc (n,)."""
        raise NotImplementedError

    def _sparse(self, x: Tensor) -> bool:
        return x.dim() == 2 and not torch.compiler.is_compiling()

    def _pre(self, x: Tensor) -> Preactivations:
        """The pre-activations after their ReLU."""
        W, b = self._encoder()
        kind = x.device.type
        mixed = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if mixed else x.dtype
        return Preactivations.of(x, W, b, dtype, relu=True)

    def _ragged(self, codes: SparseCodes, pre: Preactivations) -> Codes:
        values = codes.values.to(pre.dtype)
        return Codes.of(values, codes.indices, codes.offsets, self.dict_size)

    def _above(self, pre: Preactivations) -> Codes:
        """The codes above the threshold of inference."""
        codes = threshold_encode(pre.x, pre.W, pre.b, threshold=self.threshold.detach())
        return self._ragged(codes, pre)


class FastTopK(_Fast, AutoEncoderTopK):
    """``AutoEncoderTopK`` whose codes are never dense."""

    _dictionaries = {"encoder.weight": 0, "decoder.weight": 1}

    def __init__(self, activation_dim: int, dict_size: int, k: int) -> None:
        super().__init__(activation_dim, dict_size, k)
        rows_of_features(self)

    def _encoder(self) -> tuple[Tensor, Tensor]:
        return self.encoder.weight, self.encoder.bias

    def encode(self, x: Tensor, return_topk: bool = False, use_threshold: bool = False) -> Any:
        """As ``AutoEncoderTopK.encode``."""
        if not self._sparse(x):
            return super().encode(x, return_topk, use_threshold)
        pre = self._pre(x - self.b_dec)
        if use_threshold and not return_topk:
            return self._above(pre)
        acts, indices = pre.topk(int(self.k), sorted=False)
        codes = self._above(pre) if use_threshold else Codes.of(acts, indices, None, pre.shape[-1])
        return (codes, acts, indices, pre) if return_topk else codes

    @classmethod
    def from_pretrained(cls, path: Any, k: int | None = None, device: Any = None) -> FastTopK:
        """Load a file that the library has written, or this class."""
        state = torch.load(path, weights_only=True)
        n, d = state["encoder.weight"].shape
        if k is not None and k != state["k"].item():
            raise ValueError(f"k={k} != {state['k'].item()}=state_dict['k']")
        found = cls(d, n, state["k"].item())
        found.load_state_dict(state)
        return found.to(device)


class _FastBatch(_Fast):
    """The encoder that both batch top-k classes have."""

    def encode(self, x: Tensor, return_active: bool = False, use_threshold: bool = True) -> Any:
        """As in the class that this one stands for."""
        if not self._sparse(x):
            return super().encode(x, return_active, use_threshold)
        pre = self._pre(x - self.b_dec)
        if use_threshold:
            codes = self._above(pre)
        else:
            count = int(self.k) * x.size(0)
            found = batch_topk_encode(pre.x, pre.W, pre.b, count=count)
            codes = self._ragged(found, pre)
        codes = self._used(codes)
        return (codes, codes.sum(0) > 0, pre) if return_active else codes

    def _used(self, codes: Codes) -> Codes:
        return codes


class FastBatchTopK(_FastBatch, BatchTopKSAE):
    """``BatchTopKSAE`` whose codes are never dense."""

    _dictionaries = {"encoder.weight": 0, "decoder.weight": 1}

    def __init__(self, activation_dim: int, dict_size: int, k: int) -> None:
        super().__init__(activation_dim, dict_size, k)
        rows_of_features(self)

    def _encoder(self) -> tuple[Tensor, Tensor]:
        return self.encoder.weight, self.encoder.bias


class FastMatryoshkaBatchTopK(_FastBatch, MatryoshkaBatchTopKSAE):
    """``MatryoshkaBatchTopKSAE`` whose codes are never dense."""

    _dictionaries = {"W_enc": 1, "W_dec": 0}

    def __init__(
        self, activation_dim: int, dict_size: int, k: int, group_sizes: list[int]
    ) -> None:
        super().__init__(activation_dim, dict_size, k, group_sizes)
        rows_of_features(self)

    def _encoder(self) -> tuple[Tensor, Tensor]:
        return self.W_enc.t(), self.b_enc

    def _used(self, codes: Codes) -> Codes:
        if self.active_groups == len(self.group_sizes):
            return codes
        # features of groups that are not active are taken out after the selection
        stop = int(self.group_indices[self.active_groups])
        return codes.like(torch.where(codes.indices < stop, codes.values, 0))


class FastJumpReLU(_Fast, JumpReluAutoEncoder):
    """``JumpReluAutoEncoder`` whose codes are never dense. ``JumpReluTrainer`` encodes by itself,
    densely; it is not faster with this class, and gives the same."""

    _dictionaries = {"W_enc": 1, "W_dec": 0}

    def __init__(self, activation_dim: int, dict_size: int, device: Any = "cpu") -> None:
        super().__init__(activation_dim, dict_size, device)
        rows_of_features(self)

    def _encoder(self) -> tuple[Tensor, Tensor]:
        return self.W_enc.t(), self.b_enc

    def encode(self, x: Tensor, output_pre_jump: bool = False) -> Any:
        """As ``JumpReluAutoEncoder.encode``."""
        if output_pre_jump or not self._sparse(x):
            return super().encode(x, output_pre_jump)
        return self._above(self._pre(x - self.b_dec if self.apply_b_dec_to_input else x))


FAST = {
    AutoEncoderTopK: FastTopK,
    BatchTopKSAE: FastBatchTopK,
    MatryoshkaBatchTopKSAE: FastMatryoshkaBatchTopK,
    JumpReluAutoEncoder: FastJumpReLU,
}


def fast(dictionary: nn.Module) -> nn.Module:
    """The same instance, of the class that is fast; TypeError where there is none."""
    if isinstance(dictionary, _Fast):
        return dictionary
    if type(dictionary) not in FAST:
        names = ", ".join(cls.__name__ for cls in FAST)
        raise TypeError(f"fast: takes a {names}, got {type(dictionary).__name__}")
    dictionary.__class__ = FAST[type(dictionary)]
    rows_of_features(dictionary)
    return dictionary
