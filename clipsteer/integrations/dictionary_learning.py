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
from clipsteer.ops._calls import transformed
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

LINEAR = {"encoder.weight": 0, "decoder.weight": 1}  # and which dimension is of features
PLAIN = {"W_enc": 1, "W_dec": 0}


def _rows_of_features(ae: nn.Module) -> None:
    """Lay the dictionaries of a module out as rows of features in memory."""
    for name, dimension in (LINEAR if hasattr(ae, "encoder") else PLAIN).items():
        parameter = ae.get_parameter(name)
        rows = parameter.data.movedim(dimension, 0).contiguous()
        parameter.data = rows.movedim(0, dimension)


def _fits(x: Tensor) -> bool:
    return x.dim() == 2 and not (torch.compiler.is_compiling() or transformed())


def _pre(ae: Any, x: Tensor) -> Preactivations:
    """The pre-activations after their ReLU."""
    linear = hasattr(ae, "encoder")
    W = ae.encoder.weight if linear else ae.W_enc.t()
    b = ae.encoder.bias if linear else ae.b_enc
    kind = x.device.type
    mixed = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if mixed else x.dtype
    if not linear:  # a product, rounded, plus a bias in its own dtype
        dtype = torch.promote_types(dtype, b.dtype)
    return Preactivations.of(x, W, b, dtype, relu=True)


def _ragged(codes: SparseCodes, pre: Preactivations) -> Codes:
    values = codes.values.to(pre.dtype)
    return Codes.of(values, codes.indices, codes.offsets, pre.shape[-1])


def _above(ae: Any, pre: Preactivations) -> Codes:
    """The codes above the threshold of inference."""
    threshold = ae.threshold.detach().to(pre.x.dtype)
    return _ragged(threshold_encode(pre.x, pre.W, pre.b, threshold=threshold), pre)


def _batch_codes(ae: Any, pre: Preactivations, use_threshold: bool) -> Codes:
    if use_threshold:
        return _above(ae, pre)
    count = int(ae.k) * len(pre.x)
    return _ragged(batch_topk_encode(pre.x, pre.W, pre.b, count=count), pre)


class FastTopK(AutoEncoderTopK):
    """``AutoEncoderTopK`` whose codes are never dense."""

    def __init__(self, activation_dim: int, dict_size: int, k: int) -> None:
        super().__init__(activation_dim, dict_size, k)
        _rows_of_features(self)

    def encode(self, x: Tensor, return_topk: bool = False, use_threshold: bool = False) -> Any:
        """As ``AutoEncoderTopK.encode``."""
        if not _fits(x):
            return super().encode(x, return_topk, use_threshold)
        pre = _pre(self, x - self.b_dec)
        if use_threshold and not return_topk:
            return _above(self, pre)
        acts, indices = pre.topk(int(self.k), sorted=False)
        if use_threshold:
            codes = _above(self, pre)
        else:
            codes = Codes.of(acts, indices, None, pre.shape[-1])
        return (codes, acts, indices, pre) if return_topk else codes

    @staticmethod
    def from_pretrained(path: Any, k: int | None = None, device: Any = None) -> nn.Module:
        """Load a file that the library has written, or this class."""
        return fast(AutoEncoderTopK.from_pretrained(path, k, device))


class FastBatchTopK(BatchTopKSAE):
    """``BatchTopKSAE`` whose codes are never dense."""

    def __init__(self, activation_dim: int, dict_size: int, k: int) -> None:
        super().__init__(activation_dim, dict_size, k)
        _rows_of_features(self)

    def encode(self, x: Tensor, return_active: bool = False, use_threshold: bool = True) -> Any:
        """As ``BatchTopKSAE.encode``."""
        if not _fits(x):
            return super().encode(x, return_active, use_threshold)
        pre = _pre(self, x - self.b_dec)
        codes = _batch_codes(self, pre, use_threshold)
        return (codes, codes.sum(0) > 0, pre) if return_active else codes


class FastMatryoshkaBatchTopK(MatryoshkaBatchTopKSAE):
    """``MatryoshkaBatchTopKSAE`` whose codes are never dense."""

    def __init__(self, activation_dim: int, dict_size: int, k: int, group_sizes: list[int]) -> None:
        super().__init__(activation_dim, dict_size, k, group_sizes)
        _rows_of_features(self)

    def encode(self, x: Tensor, return_active: bool = False, use_threshold: bool = True) -> Any:
        """As ``MatryoshkaBatchTopKSAE.encode``."""
        if not _fits(x):
            return super().encode(x, return_active, use_threshold)
        pre = _pre(self, x - self.b_dec)
        codes = _batch_codes(self, pre, use_threshold)
        # features of groups that are not active are taken out after the selection
        stop = int(self.group_indices[self.active_groups])
        if stop < self.dict_size:
            codes = codes.like(torch.where(codes.indices < stop, codes.values, 0))
        return (codes, codes.sum(0) > 0, pre) if return_active else codes


class FastJumpReLU(JumpReluAutoEncoder):
    """``JumpReluAutoEncoder`` whose codes are never dense. ``JumpReluTrainer`` encodes by itself,
    densely: it computes the same with this class, and is not faster."""

    def __init__(self, activation_dim: int, dict_size: int, device: Any = "cpu") -> None:
        super().__init__(activation_dim, dict_size, device)
        _rows_of_features(self)

    def encode(self, x: Tensor, output_pre_jump: bool = False) -> Any:
        """As ``JumpReluAutoEncoder.encode``."""
        if output_pre_jump or not _fits(x):
            return super().encode(x, output_pre_jump)
        return _above(self, _pre(self, x - self.b_dec if self.apply_b_dec_to_input else x))

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> nn.Module:
        """As ``JumpReluAutoEncoder.from_pretrained``."""
        return fast(JumpReluAutoEncoder.from_pretrained(*arguments, **options))


FAST = {
    AutoEncoderTopK: FastTopK,
    BatchTopKSAE: FastBatchTopK,
    MatryoshkaBatchTopKSAE: FastMatryoshkaBatchTopK,
    JumpReluAutoEncoder: FastJumpReLU,
}


def fast(dictionary: nn.Module) -> nn.Module:
    """The same instance, of the class that is fast; TypeError where there is none."""
    if type(dictionary) in FAST.values():
        return dictionary
    if type(dictionary) not in FAST:
        names = ", ".join(cls.__name__ for cls in FAST)
        raise TypeError(f"fast: takes one of {names}, got {type(dictionary).__name__}")
    dictionary.__class__ = FAST[type(dictionary)]
    _rows_of_features(dictionary)
    return dictionary
