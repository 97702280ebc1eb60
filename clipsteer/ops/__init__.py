"""The public ops. Each has a plain torch reference that defines it and fast paths that are held to it."""

from clipsteer.ops._dispatch import BACKENDS, explain
from clipsteer.ops.conceptor_project import LOW_RANK_SPEC as _LOW_RANK
from clipsteer.ops.conceptor_project import SPEC as _CONCEPTOR
from clipsteer.ops.conceptor_project import LowRank, conceptor_project, conceptor_project_reference
from clipsteer.ops.drrho_loss import SPEC as _DRRHO
from clipsteer.ops.drrho_loss import drrho_loss, drrho_loss_reference
from clipsteer.ops.mahalanobis_covariance_loss import LOW_RANK_SPEC as _MAHALANOBIS_LOW_RANK
from clipsteer.ops.mahalanobis_covariance_loss import SPEC as _MAHALANOBIS
from clipsteer.ops.mahalanobis_covariance_loss import (
    LowRankDiag,
    mahalanobis_covariance_loss,
    mahalanobis_covariance_loss_reference,
)
from clipsteer.ops.semantic_drift import SPEC as _DRIFT
from clipsteer.ops.semantic_drift import semantic_drift, semantic_drift_reference
from clipsteer.ops.sparse_decode import SPEC as _SPARSE_DECODE
from clipsteer.ops.sparse_decode import sparse_decode, sparse_decode_reference
from clipsteer.ops.topk_encode import SPEC as _TOPK_ENCODE
from clipsteer.ops.topk_encode import topk_encode, topk_encode_reference

_SPECS = (_TOPK_ENCODE, _SPARSE_DECODE, _CONCEPTOR, _LOW_RANK, _MAHALANOBIS, _MAHALANOBIS_LOW_RANK, _DRIFT, _DRRHO)
REGISTRY = {spec.name: spec for spec in _SPECS}

__all__ = [
    "BACKENDS",
    "REGISTRY",
    "LowRank",
    "LowRankDiag",
    "conceptor_project",
    "conceptor_project_reference",
    "drrho_loss",
    "drrho_loss_reference",
    "explain",
    "mahalanobis_covariance_loss",
    "mahalanobis_covariance_loss_reference",
    "semantic_drift",
    "semantic_drift_reference",
    "sparse_decode",
    "sparse_decode_reference",
    "topk_encode",
    "topk_encode_reference",
]
