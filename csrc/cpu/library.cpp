// The schemas of the C++ backend, and what the CPU runs for them.
#include "cpu.h"
#include "../registration.h"

namespace clipsteer {
namespace {

int64_t isa_level() { return isa().level; }

void define(StableLibrary& m) {
  m.def(
      "topk_encode(Tensor x, Tensor W_enc, Tensor? b_enc, SymInt k, bool screen=True, Tensor? scale=None, "
      "Tensor? columns=None, bool relu=True) -> (Tensor acts, Tensor indices)");
  m.def(
      "topk_encode_screened(Tensor x, Tensor W_enc, Tensor? b_enc, int k, Tensor? scale=None, Tensor? columns=None, "
      "bool relu=True, bool pairs=False) -> (Tensor acts, Tensor indices, Tensor computed)");
  m.def("topk(Tensor pre, int k) -> (Tensor values, Tensor indices)");
  m.def(
      "threshold_encode(Tensor x, Tensor W_enc, Tensor? b_enc, Tensor threshold, SymInt capacity, Tensor? scale=None, "
      "Tensor? columns=None) -> (Tensor values, Tensor indices, Tensor offsets)");
  m.def(
      "threshold_codes(Tensor x, Tensor W_enc, Tensor? b_enc, Tensor threshold, bool relu, SymInt capacity, "
      "Tensor? scale, Tensor? columns) -> (Tensor values, Tensor indices, Tensor offsets)");
  m.def(
      "jumprelu_codes(Tensor x, Tensor W_enc, Tensor? b_enc, Tensor threshold, float bandwidth, SymInt capacity) "
      "-> (Tensor values, Tensor indices, Tensor offsets, Tensor active)");
  m.def(
      "batch_topk_encode(Tensor x, Tensor W_enc, Tensor? b_enc, SymInt count, Tensor? scale=None, "
      "Tensor? columns=None) -> (Tensor values, Tensor indices, Tensor offsets)");
  m.def("ragged_decode(Tensor values, Tensor indices, Tensor offsets, Tensor W, Tensor? b, SymInt[]? prefixes) -> Tensor");
  m.def("ragged_dot(Tensor rows, Tensor row_of, Tensor indices, Tensor W) -> Tensor");
  m.def(
      "ragged_outer(Tensor coeff, Tensor indices, Tensor row_of, Tensor rows, SymInt n, bool across=False) "
      "-> (Tensor dW, Tensor db)");
  m.def(
      "ragged_outer_out(Tensor coeff, Tensor indices, Tensor row_of, Tensor rows, Tensor(a!) dW, Tensor(b!) db) "
      "-> ()");
  m.def("sparse_decode(Tensor acts, Tensor indices, Tensor W, Tensor? b) -> Tensor");
  m.def("gather_dot(Tensor rows, Tensor indices, Tensor W) -> Tensor");
  m.def(
      "sparse_outer(Tensor coeff, Tensor indices, Tensor rows, SymInt n, bool across=False) "
      "-> (Tensor dW, Tensor db)");
  m.def("sparse_outer_out(Tensor coeff, Tensor indices, Tensor rows, Tensor(a!) dW, Tensor(b!) db) -> ()");
  m.def(
      "sparse_outer_used(Tensor coeff, Tensor indices, Tensor rows, SymInt n) "
      "-> (Tensor features, Tensor dW, Tensor db)");
  m.def(
      "ragged_outer_used(Tensor coeff, Tensor indices, Tensor row_of, Tensor rows, SymInt n) "
      "-> (Tensor features, Tensor dW, Tensor db)");
  m.def("grouped_matmul(Tensor x, Tensor W, Tensor? index, Tensor? beta, Tensor? mean, bool transpose) -> Tensor");
  m.def("grouped_outer(Tensor a, Tensor b, Tensor? index, SymInt groups) -> Tensor");
  m.def("low_rank_project(Tensor x, Tensor U, Tensor s, Tensor? index, Tensor? mean) -> Tensor");
  m.def("moved_prototypes(Tensor old, Tensor new, Tensor prototypes, Tensor scale) -> Tensor");
  m.def("drift_sums(Tensor old, Tensor new, Tensor prototypes, Tensor scale) -> (Tensor peak, Tensor total, Tensor moved)");
  m.def(
      "mahalanobis_covariance_loss(Tensor new, Tensor old, Tensor labels, Tensor factor, Tensor? s, Tensor? diag, "
      "bool normalize, bool need_grad) -> (Tensor loss, Tensor d_new)");
  m.def(
      "drrho_sums(Tensor rows, Tensor cols, Tensor diag, Tensor scale, SymInt offset, bool keep) "
      "-> (Tensor row_lse, Tensor col_lse, Tensor kept)");
  m.def(
      "drrho_grad(Tensor rows, Tensor cols, Tensor diag, Tensor scale, SymInt offset, Tensor row_u, Tensor col_u, "
      "Tensor own, Tensor kept, SymInt width, bool need_rows, bool need_cols) "
      "-> (Tensor d_rows, Tensor d_cols, Tensor moment)");
  m.def(
      "siglip_sweep(Tensor rows, Tensor cols, Tensor scale, Tensor bias, SymInt offset, bool need_rows, bool need_cols) "
      "-> (Tensor sums, Tensor d_rows, Tensor d_cols)");
  m.def(
      "distill_sums(Tensor rows, Tensor cols, Tensor diag, Tensor scale, Tensor teacher_rows, Tensor teacher_cols, "
      "Tensor teacher_diag, Tensor teacher_scale, SymInt offset, bool keep) "
      "-> (Tensor row_sums, Tensor col_sums, Tensor kept, Tensor teacher_kept)");
  m.def(
      "distill_grad(Tensor rows, Tensor cols, Tensor diag, Tensor scale, Tensor teacher_rows, Tensor teacher_cols, "
      "Tensor teacher_diag, Tensor teacher_scale, SymInt offset, Tensor row_u, Tensor col_u, Tensor own, "
      "Tensor factors, Tensor kept, Tensor teacher_kept, bool need_rows, bool need_cols) "
      "-> (Tensor d_rows, Tensor d_cols)");
  m.def(
      "agreement_sums(Tensor P, Tensor? P_indices, Tensor? P_offsets, SymInt K, Tensor Q, Tensor? Q_indices, "
      "Tensor? Q_offsets, SymInt L, Tensor? images, SymInt part, SymInt parts) -> (Tensor total, Tensor rows)");
  m.def(
      "agreement_counts(Tensor P, Tensor? P_indices, Tensor? P_offsets, SymInt K, Tensor Q, Tensor? Q_indices, "
      "Tensor? Q_offsets, SymInt L, SymInt part, SymInt parts, bool need_P, bool need_Q) -> (Tensor dP, Tensor dQ)");
  m.def(
      "rand_index(Tensor P, Tensor? P_indices, Tensor? P_offsets, SymInt K, Tensor Q, Tensor? Q_indices, "
      "Tensor? Q_offsets, SymInt L, bool need_P, bool need_Q) -> (Tensor index, Tensor dP, Tensor dQ)");
  m.def(
      "rand_index_grad(Tensor grad, Tensor dP, Tensor dQ, Tensor values, SymInt rows) -> (Tensor, Tensor)");
  m.def(
      "concept_distances(Tensor P, Tensor? P_indices, Tensor? P_offsets, SymInt K, Tensor Q, Tensor? Q_indices, "
      "Tensor? Q_offsets, SymInt L, Tensor? images) -> (Tensor D, Tensor error)");
  m.def(
      "clip_loss(Tensor image, Tensor text, Tensor scale, bool keep, bool need_image, bool need_text, bool need_scale) "
      "-> (Tensor loss, Tensor d_image, Tensor d_text, Tensor d_scale)");
  m.def(
      "contrast_grad(Tensor grad, Tensor image, Tensor? scale, SymInt count, Tensor d_image, Tensor d_text, "
      "Tensor d_scale, Tensor? d_bias) -> (Tensor to_image, Tensor to_text, Tensor to_scale, Tensor to_bias)");
  m.def(
      "drrho_loss(Tensor rows, Tensor cols, Tensor tau, Tensor? u, float gamma, float eps, float rho, SymInt width, "
      "bool keep, bool need_rows, bool need_cols, bool need_tau) "
      "-> (Tensor loss, Tensor new_u, Tensor d_rows, Tensor d_cols, Tensor d_tau)");
  m.def(
      "siglip_loss(Tensor image, Tensor text, Tensor scale, Tensor bias, bool need_image, bool need_text) "
      "-> (Tensor loss, Tensor d_image, Tensor d_text, Tensor d_scale, Tensor d_bias)");
  m.def(
      "distill_loss(Tensor image, Tensor text, Tensor scale, Tensor teacher_image, Tensor teacher_text, "
      "Tensor teacher_scale, bool keep) -> (Tensor contrastive, Tensor distill, Tensor u, Tensor others, "
      "Tensor d_scales, Tensor diag, Tensor teacher_diag, Tensor kept, Tensor teacher_kept)");
  m.def(
      "distill_loss_grad(Tensor contrastive, Tensor distill, Tensor image, Tensor text, Tensor scale, "
      "Tensor teacher_image, Tensor teacher_text, Tensor teacher_scale, Tensor u, Tensor others, Tensor d_scales, "
      "Tensor diag, Tensor teacher_diag, Tensor kept, Tensor teacher_kept, bool need_image, bool need_text) "
      "-> (Tensor d_image, Tensor d_text, Tensor d_scale)");
  m.def(
      "adam_rows(Tensor(a!) W, Tensor(b!) m, Tensor(c!) v, Tensor step, Tensor grad, Tensor? features, bool unit, "
      "float lr, float beta1, float beta2, float eps, Tensor? more=None, Tensor? more_features=None) -> ()");
  m.def("isa_level() -> int");
}

void implement(StableLibrary& m) {
  m.impl("topk_encode", TORCH_BOX(&clipsteer::topk_encode));
  m.impl("topk_encode_screened", TORCH_BOX(&clipsteer::topk_encode_screened));
  m.impl("topk", TORCH_BOX(&clipsteer::topk));
  m.impl("threshold_encode", TORCH_BOX(&clipsteer::threshold_encode));
  m.impl("threshold_codes", TORCH_BOX(&clipsteer::threshold_codes));
  m.impl("jumprelu_codes", TORCH_BOX(&clipsteer::jumprelu_codes));
  m.impl("batch_topk_encode", TORCH_BOX(&clipsteer::batch_topk_encode));
  m.impl("ragged_decode", TORCH_BOX(&clipsteer::ragged_decode));
  m.impl("ragged_dot", TORCH_BOX(&clipsteer::ragged_dot));
  m.impl("ragged_outer", TORCH_BOX(&clipsteer::ragged_outer));
  m.impl("ragged_outer_out", TORCH_BOX(&clipsteer::ragged_outer_out));
  m.impl("sparse_decode", TORCH_BOX(&clipsteer::sparse_decode));
  m.impl("gather_dot", TORCH_BOX(&clipsteer::gather_dot));
  m.impl("sparse_outer", TORCH_BOX(&clipsteer::sparse_outer));
  m.impl("sparse_outer_out", TORCH_BOX(&clipsteer::sparse_outer_out));
  m.impl("sparse_outer_used", TORCH_BOX(&clipsteer::sparse_outer_used));
  m.impl("ragged_outer_used", TORCH_BOX(&clipsteer::ragged_outer_used));
  m.impl("grouped_matmul", TORCH_BOX(&clipsteer::grouped_matmul));
  m.impl("grouped_outer", TORCH_BOX(&clipsteer::grouped_outer));
  m.impl("low_rank_project", TORCH_BOX(&clipsteer::low_rank_project));
  m.impl("moved_prototypes", TORCH_BOX(&clipsteer::moved_prototypes));
  m.impl("drift_sums", TORCH_BOX(&clipsteer::drift_sums));
  m.impl("mahalanobis_covariance_loss", TORCH_BOX(&clipsteer::mahalanobis_covariance_loss));
  m.impl("drrho_sums", TORCH_BOX(&clipsteer::drrho_sums));
  m.impl("drrho_grad", TORCH_BOX(&clipsteer::drrho_grad));
  m.impl("siglip_sweep", TORCH_BOX(&clipsteer::siglip_sweep));
  m.impl("distill_sums", TORCH_BOX(&clipsteer::distill_sums));
  m.impl("distill_grad", TORCH_BOX(&clipsteer::distill_grad));
  m.impl("agreement_sums", TORCH_BOX(&clipsteer::agreement_sums));
  m.impl("agreement_counts", TORCH_BOX(&clipsteer::agreement_counts));
  m.impl("rand_index", TORCH_BOX(&clipsteer::rand_index));
  m.impl("rand_index_grad", TORCH_BOX(&clipsteer::rand_index_grad));
  m.impl("concept_distances", TORCH_BOX(&clipsteer::concept_distances));
  m.impl("clip_loss", TORCH_BOX(&clipsteer::clip_loss));
  m.impl("contrast_grad", TORCH_BOX(&clipsteer::contrast_grad));
  m.impl("drrho_loss", TORCH_BOX(&clipsteer::drrho_loss));
  m.impl("siglip_loss", TORCH_BOX(&clipsteer::siglip_loss));
  m.impl("distill_loss", TORCH_BOX(&clipsteer::distill_loss));
  m.impl("distill_loss_grad", TORCH_BOX(&clipsteer::distill_loss_grad));
  m.impl("adam_rows", TORCH_BOX(&clipsteer::adam_rows));
}

// No tensor argument to choose a backend by.
void implement_anywhere(StableLibrary& m) { m.impl("isa_level", TORCH_BOX(&clipsteer::isa_level)); }

const Registration registration("cpp", {{StableLibrary::Kind::DEF, nullptr, define},
                                        {StableLibrary::Kind::IMPL, "CPU", implement},
                                        {StableLibrary::Kind::IMPL, "CompositeExplicitAutograd", implement_anywhere}});

}  // namespace
}  // namespace clipsteer

extern "C" __attribute__((visibility("default"))) const char* clipsteer_refusal() {
  return clipsteer::registration.refusal();
}
