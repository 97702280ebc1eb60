// What the CPU sources share: the ops, the kernels of an instruction set, and argument checks.
#pragma once

#include "../stable.h"
#include "isa/isa.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

namespace clipsteer {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor> topk_encode(Tensor x, Tensor w_enc, std::optional<Tensor> b_enc, int64_t k, bool screen,
                                       std::optional<Tensor> scale, std::optional<Tensor> columns, bool relu);
std::tuple<Tensor, Tensor, Tensor> topk_encode_screened(Tensor x, Tensor w_enc, std::optional<Tensor> b_enc, int64_t k,
                                                        std::optional<Tensor> scale, std::optional<Tensor> columns,
                                                        bool relu, bool pairs);
std::tuple<Tensor, Tensor> topk(Tensor pre, int64_t k);
std::tuple<Tensor, Tensor, Tensor> threshold_encode(Tensor x, Tensor w_enc, std::optional<Tensor> b_enc, Tensor threshold,
                                                    int64_t capacity, std::optional<Tensor> scale,
                                                    std::optional<Tensor> columns);
std::tuple<Tensor, Tensor, Tensor> threshold_codes(Tensor x, Tensor w_enc, std::optional<Tensor> b_enc, Tensor threshold,
                                                   bool relu, int64_t capacity, std::optional<Tensor> scale,
                                                   std::optional<Tensor> columns);
std::tuple<Tensor, Tensor, Tensor, Tensor> jumprelu_codes(Tensor x, Tensor w_enc, std::optional<Tensor> b_enc,
                                                          Tensor threshold, double bandwidth, int64_t capacity);
std::tuple<Tensor, Tensor, Tensor> batch_topk_encode(Tensor x, Tensor w_enc, std::optional<Tensor> b_enc, int64_t count,
                                                     std::optional<Tensor> scale, std::optional<Tensor> columns);
Tensor ragged_decode(Tensor values, Tensor indices, Tensor offsets, Tensor w, std::optional<Tensor> b,
                     std::optional<std::vector<int64_t>> prefixes);
Tensor ragged_dot(Tensor rows, Tensor row_of, Tensor indices, Tensor w);
std::tuple<Tensor, Tensor> ragged_outer(Tensor coeff, Tensor indices, Tensor row_of, Tensor rows, int64_t n,
                                        bool across);
void ragged_outer_out(Tensor coeff, Tensor indices, Tensor row_of, Tensor rows, Tensor dw, Tensor db);
Tensor sparse_decode(Tensor acts, Tensor indices, Tensor w, std::optional<Tensor> b);
Tensor gather_dot(Tensor rows, Tensor indices, Tensor w);
std::tuple<Tensor, Tensor> sparse_outer(Tensor coeff, Tensor indices, Tensor rows, int64_t n, bool across);
void sparse_outer_out(Tensor coeff, Tensor indices, Tensor rows, Tensor dw, Tensor db);
std::tuple<Tensor, Tensor, Tensor> sparse_outer_used(Tensor coeff, Tensor indices, Tensor rows, int64_t n);
std::tuple<Tensor, Tensor, Tensor> ragged_outer_used(Tensor coeff, Tensor indices, Tensor row_of, Tensor rows,
                                                     int64_t n);
Tensor grouped_matmul(Tensor x, Tensor w, std::optional<Tensor> index, std::optional<Tensor> beta,
                      std::optional<Tensor> mean, bool transpose);
Tensor grouped_outer(Tensor a, Tensor b, std::optional<Tensor> index, int64_t k);
Tensor low_rank_project(Tensor x, Tensor u, Tensor s, std::optional<Tensor> index, std::optional<Tensor> mean);
std::tuple<Tensor, Tensor, Tensor> drift_sums(Tensor old, Tensor fresh, Tensor prototypes, Tensor scale);
Tensor moved_prototypes(Tensor old, Tensor fresh, Tensor prototypes, Tensor scale);
std::tuple<Tensor, Tensor> mahalanobis_covariance_loss(Tensor fresh, Tensor old, Tensor labels, Tensor factor,
                                                       std::optional<Tensor> s, std::optional<Tensor> diag,
                                                       bool normalize, bool need_grad);
std::tuple<Tensor, Tensor, Tensor> drrho_sums(Tensor rows, Tensor cols, Tensor diag, Tensor scale, int64_t offset,
                                              bool keep);
std::tuple<Tensor, Tensor, Tensor> drrho_grad(Tensor rows, Tensor cols, Tensor diag, Tensor scale, int64_t offset,
                                              Tensor row_u, Tensor col_u, Tensor own, Tensor kept, int64_t width,
                                              bool need_rows, bool need_cols);
std::tuple<Tensor, Tensor, Tensor> siglip_sweep(Tensor rows, Tensor cols, Tensor scale, Tensor bias, int64_t offset,
                                                bool need_rows, bool need_cols);
std::tuple<Tensor, Tensor, Tensor, Tensor> distill_sums(Tensor rows, Tensor cols, Tensor diag, Tensor scale,
                                                        Tensor teacher_rows, Tensor teacher_cols, Tensor teacher_diag,
                                                        Tensor teacher_scale, int64_t offset, bool keep);
std::tuple<Tensor, Tensor> distill_grad(Tensor rows, Tensor cols, Tensor diag, Tensor scale, Tensor teacher_rows,
                                        Tensor teacher_cols, Tensor teacher_diag, Tensor teacher_scale, int64_t offset,
                                        Tensor row_u, Tensor col_u, Tensor own, Tensor factors, Tensor kept,
                                        Tensor teacher_kept, bool need_rows, bool need_cols);
std::tuple<Tensor, Tensor> agreement_sums(Tensor P, std::optional<Tensor> p_indices, std::optional<Tensor> p_offsets,
                                          int64_t p_concepts, Tensor Q, std::optional<Tensor> q_indices,
                                          std::optional<Tensor> q_offsets, int64_t q_concepts,
                                          std::optional<Tensor> images, int64_t part, int64_t parts);
std::tuple<Tensor, Tensor> agreement_counts(Tensor P, std::optional<Tensor> p_indices, std::optional<Tensor> p_offsets,
                                            int64_t p_concepts, Tensor Q, std::optional<Tensor> q_indices,
                                            std::optional<Tensor> q_offsets, int64_t q_concepts, int64_t part,
                                            int64_t parts, bool need_p, bool need_q);
std::tuple<Tensor, Tensor, Tensor> rand_index(Tensor P, std::optional<Tensor> p_indices, std::optional<Tensor> p_offsets,
                                              int64_t p_concepts, Tensor Q, std::optional<Tensor> q_indices,
                                              std::optional<Tensor> q_offsets, int64_t q_concepts, bool need_p,
                                              bool need_q);
std::tuple<Tensor, Tensor> rand_index_grad(Tensor grad, Tensor p_counts, Tensor q_counts, Tensor values, int64_t rows);
std::tuple<Tensor, Tensor> concept_distances(Tensor P, std::optional<Tensor> p_indices, std::optional<Tensor> p_offsets,
                                             int64_t p_concepts, Tensor Q, std::optional<Tensor> q_indices,
                                             std::optional<Tensor> q_offsets, int64_t q_concepts,
                                             std::optional<Tensor> images);
std::tuple<Tensor, Tensor, Tensor, Tensor> clip_loss(Tensor image, Tensor text, Tensor scale, bool keep, bool need_image,
                                                     bool need_text, bool need_scale);
std::tuple<Tensor, Tensor, Tensor, Tensor> contrast_grad(Tensor grad, Tensor image, std::optional<Tensor> scale,
                                                         int64_t count, Tensor d_image, Tensor d_text, Tensor d_scale,
                                                         std::optional<Tensor> d_bias);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> drrho_loss(Tensor rows, Tensor cols, Tensor tau,
                                                              std::optional<Tensor> past, double gamma, double eps,
                                                              double rho, int64_t width, bool keep, bool need_rows,
                                                              bool need_cols, bool need_tau);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> siglip_loss(Tensor image, Tensor text, Tensor scale, Tensor bias,
                                                               bool need_image, bool need_text);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> distill_loss(
    Tensor image, Tensor text, Tensor scale, Tensor teacher_image, Tensor teacher_text, Tensor teacher_scale, bool keep);
std::tuple<Tensor, Tensor, Tensor> distill_loss_grad(Tensor contrastive, Tensor distill, Tensor image, Tensor text,
                                                     Tensor scale, Tensor teacher_image, Tensor teacher_text,
                                                     Tensor teacher_scale, Tensor u, Tensor others, Tensor d_scales,
                                                     Tensor diag, Tensor teacher_diag, Tensor kept, Tensor teacher_kept,
                                                     bool need_image, bool need_text);
void adam_rows(Tensor w, Tensor m, Tensor v, Tensor step, Tensor grad, std::optional<Tensor> features, bool unit,
               double lr, double beta1, double beta2, double eps, std::optional<Tensor> more,
               std::optional<Tensor> more_features);

// Narrow rows pass through `buffer`, the others are used where they are.
template <class T>
const Compute<T>* widened(const T* src, Compute<T>* buffer, int64_t n) {
  if constexpr (kNarrow<T>) {
    kernels<T>().widen(src, buffer, n);
    return buffer;
  } else {
    return src;
  }
}

// A message of its parts: strings and numbers.
template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << op << ": ";
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// The public functions check first and say more; this keeps direct calls of the ops from reading out of bounds.
// The parts become a string only where one is thrown: at every call that would take as long as a small op does.
template <class... Parts>
void require(bool condition, const char* op, const Parts&... parts) {
  if (!condition) [[unlikely]] fail(op, parts...);
}

// Calls f with a zero of the element type of the tensors of an op.
template <class F>
void dispatch(const char* op, ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(BFloat16{});
    case ScalarType::Half: return f(Half{});
    default:
      fail(op, "expected a floating dtype, got ", torch::headeronly::toString(dtype));
  }
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// What torch::stable::new_empty gives on a CPU, past the dispatcher, which looks it up by its name.
inline Tensor allocate(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                       std::optional<ScalarType> dtype = std::nullopt) {
  constexpr size_t kMaxDim = 8;
  require(sizes.size() <= kMaxDim, "allocate", "expected at most ", kMaxDim, " dimensions, got ", sizes.size());
  int64_t strides[kMaxDim], stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  int32_t type = 0;
  if (dtype) {
    type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &type));
  }
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides, type,
                                                         aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

inline void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim) {
  require(t.dim() == dim, op, "expected ", name, " with ", dim, " dimensions, got ", t.dim());
}

inline std::string listed(const int64_t* sizes, int64_t count) {
  std::string text;
  for (int64_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text;
}

inline void check(const char* op, const char* name, const Tensor& t, ScalarType dtype,
                  std::initializer_list<int64_t> shape) {
  const auto sizes = t.sizes();
  if (!std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end())) {
    fail(op, "expected ", name, " of shape (", listed(shape.begin(), int64_t(shape.size())), "), got (",
         listed(sizes.data(), int64_t(sizes.size())), ")");
  }
  require(t.scalar_type() == dtype, op, "expected ", name, " of dtype ", torch::headeronly::toString(dtype), ", got ",
          torch::headeronly::toString(t.scalar_type()));
  require(t.is_contiguous() && t.is_cpu(), op, "expected ", name, " contiguous and on the CPU");
}

// std::out_of_range becomes Python's IndexError.
inline void check_indices(const char* op, const int64_t* indices, int64_t count, int64_t n) {
  for (int64_t i = 0; i < count; ++i) {
    if (indices[i] < 0 || indices[i] >= n) {
      throw std::out_of_range(std::string(op) + ": index " + std::to_string(indices[i]) + " is out of range [0, " +
                              std::to_string(n) + ")");
    }
  }
}

}  // namespace clipsteer
