"""The public ops. Each has a plain torch reference that defines it and fast paths that are held to
it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch

from clipsteer.ops import _dispatch
from clipsteer.ops._dispatch import explain as explain
from clipsteer.ops._dispatch import load as load
from clipsteer.ops._lowlevel import RECORDS
from clipsteer.ops._record import BACKENDS as BACKENDS

if TYPE_CHECKING:  # at run time the loop below takes what each op's file names
    from clipsteer.ops._ragged import SparseCodes as SparseCodes
    from clipsteer.ops._ragged import code_rows as code_rows
    from clipsteer.ops.batch_topk_encode import batch_topk_encode as batch_topk_encode
    from clipsteer.ops.batch_topk_encode import (
        batch_topk_encode_reference as batch_topk_encode_reference,
    )
    from clipsteer.ops.clip_loss import clip_loss as clip_loss
    from clipsteer.ops.clip_loss import clip_loss_reference as clip_loss_reference
    from clipsteer.ops.conceptor_project import LowRank as LowRank
    from clipsteer.ops.conceptor_project import conceptor_project as conceptor_project
    from clipsteer.ops.conceptor_project import (
        conceptor_project_reference as conceptor_project_reference,
    )
    from clipsteer.ops.distill_loss import distill_loss as distill_loss
    from clipsteer.ops.distill_loss import distill_loss_reference as distill_loss_reference
    from clipsteer.ops.drrho_loss import drrho_loss as drrho_loss
    from clipsteer.ops.drrho_loss import drrho_loss_reference as drrho_loss_reference
    from clipsteer.ops.jumprelu_encode import JumpReLUCodes as JumpReLUCodes
    from clipsteer.ops.jumprelu_encode import jumprelu as jumprelu
    from clipsteer.ops.jumprelu_encode import jumprelu_encode as jumprelu_encode
    from clipsteer.ops.jumprelu_encode import jumprelu_encode_reference as jumprelu_encode_reference
    from clipsteer.ops.mahalanobis_covariance_loss import LowRankDiag as LowRankDiag
    from clipsteer.ops.mahalanobis_covariance_loss import (
        mahalanobis_covariance_loss as mahalanobis_covariance_loss,
    )
    from clipsteer.ops.mahalanobis_covariance_loss import (
        mahalanobis_covariance_loss_reference as mahalanobis_covariance_loss_reference,
    )
    from clipsteer.ops.pairwise_agreement import Jackknife as Jackknife
    from clipsteer.ops.pairwise_agreement import SparseScores as SparseScores
    from clipsteer.ops.pairwise_agreement import concept_distances as concept_distances
    from clipsteer.ops.pairwise_agreement import (
        concept_distances_jackknife as concept_distances_jackknife,
    )
    from clipsteer.ops.pairwise_agreement import (
        concept_distances_reference as concept_distances_reference,
    )
    from clipsteer.ops.pairwise_agreement import generalised_rand_index as generalised_rand_index
    from clipsteer.ops.pairwise_agreement import (
        generalised_rand_index_jackknife as generalised_rand_index_jackknife,
    )
    from clipsteer.ops.pairwise_agreement import (
        generalised_rand_index_reference as generalised_rand_index_reference,
    )
    from clipsteer.ops.ragged_decode import ragged_decode as ragged_decode
    from clipsteer.ops.ragged_decode import ragged_decode_reference as ragged_decode_reference
    from clipsteer.ops.semantic_drift import semantic_drift as semantic_drift
    from clipsteer.ops.semantic_drift import semantic_drift_reference as semantic_drift_reference
    from clipsteer.ops.siglip_loss import siglip_loss as siglip_loss
    from clipsteer.ops.siglip_loss import siglip_loss_reference as siglip_loss_reference
    from clipsteer.ops.sparse_decode import sparse_decode as sparse_decode
    from clipsteer.ops.sparse_decode import sparse_decode_reference as sparse_decode_reference
    from clipsteer.ops.specs import REGISTRY as REGISTRY
    from clipsteer.ops.threshold_encode import threshold_encode as threshold_encode
    from clipsteer.ops.threshold_encode import (
        threshold_encode_reference as threshold_encode_reference,
    )
    from clipsteer.ops.topk_encode import topk_encode as topk_encode
    from clipsteer.ops.topk_encode import topk_encode_reference as topk_encode_reference

_public: dict[str, Any] = {}
for _op in RECORDS:
    _module = importlib.import_module(f"{__name__}.{_op.stem}")
    _public |= {_name: getattr(_module, _name) for _name in _module.__all__}
# once all are imported, as importing a file binds its name to the module
globals().update(_public)

__all__ = ["BACKENDS", "REGISTRY", *sorted([*_public, "explain", "load"])]


def _verdict(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    from clipsteer.ops.specs import verdict

    return verdict(op, backend, device, dtype)


def _register_portable() -> None:
    from clipsteer.ops._portable import register

    register()


_dispatch.set_verdict(_verdict)
_dispatch.set_portable(_register_portable)


def __getattr__(name: str) -> Any:
    if name == "REGISTRY":
        from clipsteer.ops.specs import REGISTRY

        return REGISTRY
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
