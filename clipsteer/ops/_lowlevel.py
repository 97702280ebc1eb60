"""One record an op: the low-level ops beneath it, who serves them, and which backend a GPU tries
first.

Every backend registers the same low-level ops under a namespace of its own,
``torch.ops.clipsteer_<backend>`` (``NAMESPACES``). A record is all that dispatch, the registry of
specs and the public page know of an op; the rest is in the files of its name.
"""

from __future__ import annotations

import torch

from clipsteer.ops import _fakes, _loss_fakes
from clipsteer.ops._record import BACKENDS, LowLevel, Op, alone

# what an exported graph names; at every call it is the fastest of the others, where the tensors are
PORTABLE = "portable"
# what the namespaces of this copy begin with; a published copy has a name of its own (.ci/hub.py)
NAMESPACE = "clipsteer"
NAMESPACES = {PORTABLE: NAMESPACE, **{name: f"{NAMESPACE}_{name}" for name in BACKENDS}}
LIBRARIES = {"cpp": "_C", "cuda": "_C_cuda"}  # the file beside the package, where there is one
DTYPES = {
    "reference": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "cpp": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


def _hopper_takes_cuda(capability: tuple[int, int], dtype: torch.dtype) -> tuple[str, ...]:
    """CUDA C++ has a fused kernel for Hopper's tensor cores; elsewhere it makes the whole
    product."""
    if capability == (9, 0) and dtype != torch.float32:
        return ("cuda", "triton")
    return ("triton", "cuda")


# ---------------------------------------------------------------- the records

_WITHOUT_CUDA = ("reference", "cpp", "triton")

# two sides, each a matrix (N, K) or values, indices and offsets of K concepts
_SCORES = (
    "Tensor P, Tensor? P_indices, Tensor? P_offsets, SymInt K, "
    "Tensor Q, Tensor? Q_indices, Tensor? Q_offsets, SymInt L"
)

RECORDS = (
    Op(
        "topk_encode",
        {
            "topk_encode": LowLevel(
                "(Tensor x, Tensor W_enc, Tensor? b_enc, SymInt k, bool screen=True, "
                "Tensor? scale=None, Tensor? columns=None, bool relu=True) -> (Tensor, Tensor)",
                _fakes.topk_encode,
                rows=(0,),
            ),
        },
        variants=("topk_encode_options",),
        variant_backends=_WITHOUT_CUDA,
        options="scale, columns or relu=False",
        gpu_order=_hopper_takes_cuda,
    ),
    Op(
        "sparse_decode",
        {
            "sparse_decode": LowLevel(
                "(Tensor acts, Tensor indices, Tensor W, Tensor? b) -> Tensor",
                _fakes.sparse_decode,
                rows=(0, 1),
            ),
            "gather_dot": LowLevel(
                "(Tensor rows, Tensor indices, Tensor W) -> Tensor",
                _fakes.gather_dot,
                rows=(0, 1),
            ),
            "sparse_outer": LowLevel(
                "(Tensor coeff, Tensor indices, Tensor rows, SymInt n, bool across=False)"
                " -> (Tensor, Tensor)",
                _fakes.sparse_outer,
                rows=(0, 1, 2),
                groups=(1, 3),
            ),
            "sparse_outer_out": LowLevel(
                "(Tensor coeff, Tensor indices, Tensor rows, Tensor(a!) dW, Tensor(b!) db) -> ()",
                _fakes.sparse_outer_out,
            ),
            "sparse_outer_used": LowLevel(
                "(Tensor coeff, Tensor indices, Tensor rows, SymInt n)"
                # (1, u), (u, d), (u,)
                " -> (Tensor, Tensor, Tensor)",
                _fakes.sparse_outer_used,
                cpp_only=True,
            ),
        },
    ),
    Op(
        "ragged_decode",
        {
            "ragged_decode": LowLevel(
                "(Tensor values, Tensor indices, Tensor offsets, Tensor W, Tensor? b, "
                "SymInt[]? prefixes) -> Tensor",
                _fakes.ragged_decode,
            ),
            "ragged_dot": LowLevel(
                "(Tensor rows, Tensor row_of, Tensor indices, Tensor W) -> Tensor",
                _fakes.ragged_dot,
            ),
            "ragged_outer": LowLevel(
                "(Tensor coeff, Tensor indices, Tensor row_of, Tensor rows, SymInt n, "
                "bool across=False) -> (Tensor, Tensor)",
                _fakes.ragged_outer,
            ),
            "ragged_outer_out": LowLevel(
                "(Tensor coeff, Tensor indices, Tensor row_of, Tensor rows, Tensor(a!) dW, "
                "Tensor(b!) db) -> ()",
                _fakes.ragged_outer_out,
            ),
            "ragged_outer_used": LowLevel(
                "(Tensor coeff, Tensor indices, Tensor row_of, Tensor rows, SymInt n)"
                " -> (Tensor, Tensor, Tensor)",
                _fakes.ragged_outer_used,
                cpp_only=True,
            ),
        },
        variants=("sparse_decode_prefixes",),
        backends=_WITHOUT_CUDA,
    ),
    Op(
        "threshold_encode",
        {
            "threshold_encode": LowLevel(
                "(Tensor x, Tensor W_enc, Tensor? b_enc, Tensor threshold, SymInt capacity, "
                "Tensor? scale=None, Tensor? columns=None) -> (Tensor, Tensor, Tensor)",
                _fakes.threshold_encode,
            ),
            "threshold_codes": alone(
                "(Tensor x, Tensor W_enc, Tensor? b_enc, Tensor threshold, bool relu, "
                "SymInt capacity, Tensor? scale, Tensor? columns) -> (Tensor, Tensor, Tensor)",
                _fakes.threshold_codes,
            ),
        },
        variants=("threshold_encode_options",),
        backends=_WITHOUT_CUDA,
        options="scale or columns",
    ),
    Op(
        "jumprelu_encode",
        {
            # elsewhere, and with a gradient: threshold_encode's codes, and torch's operations on
            # their values
            "jumprelu_codes": alone(
                "(Tensor x, Tensor W_enc, Tensor? b_enc, Tensor threshold, float bandwidth, "
                "SymInt capacity) -> (Tensor, Tensor, Tensor, Tensor)",
                _fakes.jumprelu_codes,
            ),
        },
        backends=_WITHOUT_CUDA,
    ),
    Op(
        "batch_topk_encode",
        {
            "batch_topk_encode": LowLevel(
                "(Tensor x, Tensor W_enc, Tensor? b_enc, SymInt count, Tensor? scale=None, "
                "Tensor? columns=None) -> (Tensor, Tensor, Tensor)",
                _fakes.batch_topk_encode,
            ),
        },
        variants=("batch_topk_encode_options",),
        backends=_WITHOUT_CUDA,
        options="scale or columns",
    ),
    Op(
        "conceptor_project",
        {
            "grouped_matmul": LowLevel(
                "(Tensor x, Tensor W, Tensor? index, Tensor? beta, Tensor? mean, bool transpose)"
                # (B, n)
                " -> Tensor",
                _fakes.grouped_matmul,
                rows=(0, 2),
            ),
            "grouped_outer": LowLevel(
                "(Tensor a, Tensor b, Tensor? index, SymInt groups) -> Tensor",
                _fakes.grouped_outer,
                rows=(0, 1, 2),
                groups=(2, 3),
            ),
            "low_rank_project": LowLevel(
                "(Tensor x, Tensor U, Tensor s, Tensor? index, Tensor? mean) -> Tensor",
                _fakes.low_rank_project,
                rows=(0, 3),
            ),
        },
        variants=("conceptor_project_low_rank",),
        backends=_WITHOUT_CUDA,
    ),
    Op(
        "mahalanobis_covariance_loss",
        {
            "mahalanobis_covariance_loss": LowLevel(
                "(Tensor new, Tensor old, Tensor labels, Tensor factor, Tensor? s, Tensor? diag, "
                "bool normalize, bool need_grad) -> (Tensor, Tensor)",
                _fakes.mahalanobis_covariance_loss,
            ),
        },
        variants=("mahalanobis_covariance_loss_low_rank",),
        backends=_WITHOUT_CUDA,
    ),
    Op(
        "semantic_drift",
        {
            "drift_sums": LowLevel(
                "(Tensor old, Tensor new, Tensor prototypes, Tensor scale)"
                # (C,), (C,), (C, d)
                " -> (Tensor, Tensor, Tensor)",
                _fakes.drift_sums,
            ),
            "moved_prototypes": alone(
                "(Tensor old, Tensor new, Tensor prototypes, Tensor scale) -> Tensor",
                _fakes.moved_prototypes,
            ),
        },
        backends=_WITHOUT_CUDA,
    ),
    Op(
        "drrho_loss",
        {
            "drrho_sums": LowLevel(
                "(Tensor rows, Tensor cols, Tensor diag, Tensor scale, SymInt offset, "
                "bool keep) -> (Tensor, Tensor, Tensor)",
                _loss_fakes.drrho_sums,
            ),
            "drrho_grad": LowLevel(
                "(Tensor rows, Tensor cols, Tensor diag, Tensor scale, SymInt offset, "
                "Tensor row_u, Tensor col_u, Tensor own, Tensor kept, SymInt width, "
                "bool need_rows, bool need_cols) -> (Tensor, Tensor, Tensor)",
                _loss_fakes.drrho_grad,
            ),
            "drrho_loss": alone(
                "(Tensor rows, Tensor cols, Tensor tau, Tensor? u, float gamma, float eps, "
                "float rho, SymInt width, bool keep, bool need_rows, bool need_cols, "
                "bool need_tau) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
                _loss_fakes.drrho_loss,
            ),
            "contrast_grad": alone(
                "(Tensor grad, Tensor image, Tensor? scale, SymInt count, Tensor d_image, "
                "Tensor d_text, Tensor d_scale, Tensor? d_bias)"
                " -> (Tensor, Tensor, Tensor, Tensor)",
                _loss_fakes.contrast_grad,
            ),
        },
        backends=_WITHOUT_CUDA,
    ),
    # its sweeps are drrho_loss's
    Op(
        "clip_loss",
        {
            "clip_loss": alone(
                "(Tensor image, Tensor text, Tensor scale, bool keep, bool need_image, "
                "bool need_text, bool need_scale) -> (Tensor, Tensor, Tensor, Tensor)",
                _loss_fakes.clip_loss,
            ),
        },
        backends=_WITHOUT_CUDA,
    ),
    Op(
        "siglip_loss",
        {
            "siglip_sweep": LowLevel(
                "(Tensor rows, Tensor cols, Tensor scale, Tensor bias, SymInt offset, "
                "bool need_rows, bool need_cols) -> (Tensor, Tensor, Tensor)",
                _loss_fakes.siglip_sweep,
            ),
            "siglip_loss": alone(
                "(Tensor image, Tensor text, Tensor scale, Tensor bias, bool need_image, "
                "bool need_text) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
                _loss_fakes.siglip_loss,
            ),
        },
        backends=_WITHOUT_CUDA,
    ),
    Op(
        "distill_loss",
        {
            "distill_sums": LowLevel(
                "(Tensor rows, Tensor cols, Tensor diag, Tensor scale, Tensor teacher_rows, "
                "Tensor teacher_cols, Tensor teacher_diag, Tensor teacher_scale, SymInt offset, "
                "bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
                _loss_fakes.distill_sums,
            ),
            "distill_grad": LowLevel(
                "(Tensor rows, Tensor cols, Tensor diag, Tensor scale, Tensor teacher_rows, "
                "Tensor teacher_cols, Tensor teacher_diag, Tensor teacher_scale, SymInt offset, "
                "Tensor row_u, Tensor col_u, Tensor own, Tensor factors, Tensor kept, "
                "Tensor teacher_kept, bool need_rows, bool need_cols) -> (Tensor, Tensor)",
                _loss_fakes.distill_grad,
            ),
            "distill_loss": alone(
                "(Tensor image, Tensor text, Tensor scale, Tensor teacher_image, "
                "Tensor teacher_text, Tensor teacher_scale, bool keep) -> (Tensor, Tensor, "
                "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
                _loss_fakes.distill_loss,
            ),
            "distill_loss_grad": alone(
                "(Tensor contrastive, Tensor distill, Tensor image, Tensor text, Tensor scale, "
                "Tensor teacher_image, Tensor teacher_text, Tensor teacher_scale, Tensor u, "
                "Tensor others, Tensor d_scales, Tensor diag, Tensor teacher_diag, Tensor kept, "
                "Tensor teacher_kept, bool need_image, bool need_text)"
                " -> (Tensor, Tensor, Tensor)",
                _loss_fakes.distill_loss_grad,
            ),
        },
        backends=_WITHOUT_CUDA,
    ),
    Op(
        "pairwise_agreement",
        {
            "agreement_sums": LowLevel(
                f"({_SCORES}, Tensor? images, SymInt part, SymInt parts) -> (Tensor, Tensor)",
                _fakes.agreement_sums,
            ),
            "agreement_counts": LowLevel(
                f"({_SCORES}, SymInt part, SymInt parts, bool need_P, bool need_Q)"
                # each as its side's values
                " -> (Tensor, Tensor)",
                _fakes.agreement_counts,
            ),
            "rand_index": alone(
                f"({_SCORES}, bool need_P, bool need_Q) -> (Tensor, Tensor, Tensor)",
                _fakes.rand_index,
            ),
            "rand_index_grad": alone(
                "(Tensor grad, Tensor dP, Tensor dQ, Tensor values, SymInt rows)"
                " -> (Tensor, Tensor)",
                _fakes.rand_index_grad,
            ),
            "concept_distances": LowLevel(
                f"({_SCORES}, Tensor? images) -> (Tensor, Tensor)",
                _fakes.concept_distances,
            ),
        },
        ops=("generalised_rand_index", "concept_distances"),
        variants=("generalised_rand_index_sparse", "concept_distances_sparse"),
        backends=_WITHOUT_CUDA,
        variant_backends=("reference", "cpp"),
    ),
)

# by the names that dispatch knows, variants of one record among them
OPS: dict[str, Op] = {name: op for op in RECORDS for name in op.names}
LOW_LEVEL: dict[str, LowLevel] = {n: low for op in RECORDS for n, low in op.low_level.items()}
