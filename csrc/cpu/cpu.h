// What the CPU sources share: the ops, the table of kernels per instruction set, ranked keys, and argument checks.
#pragma once

#include "../stable.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

namespace clipsteer {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor> topk_encode(Tensor x, Tensor w_enc, std::optional<Tensor> b_enc, int64_t k, bool screen);
std::tuple<Tensor, Tensor, Tensor> topk_encode_screened(Tensor x, Tensor w_enc, std::optional<Tensor> b_enc, int64_t k);
std::tuple<Tensor, Tensor> topk(Tensor pre, int64_t k);
Tensor sparse_decode(Tensor acts, Tensor indices, Tensor w, std::optional<Tensor> b);
Tensor gather_dot(Tensor rows, Tensor indices, Tensor w);
std::tuple<Tensor, Tensor> sparse_outer(Tensor coeff, Tensor indices, Tensor rows, int64_t n);
void sparse_outer_out(Tensor coeff, Tensor indices, Tensor rows, Tensor dw, Tensor db);
Tensor grouped_matmul(Tensor x, Tensor w, std::optional<Tensor> index, std::optional<Tensor> beta,
                      std::optional<Tensor> mean, bool transpose);
Tensor grouped_outer(Tensor a, Tensor b, std::optional<Tensor> index, int64_t k);
Tensor low_rank_project(Tensor x, Tensor u, Tensor s, std::optional<Tensor> index, std::optional<Tensor> mean);
std::tuple<Tensor, Tensor, Tensor> drift_sums(Tensor old, Tensor fresh, Tensor prototypes, Tensor scale);
std::tuple<Tensor, Tensor> mahalanobis_covariance_loss(Tensor fresh, Tensor old, Tensor labels, Tensor factor,
                                                       std::optional<Tensor> s, std::optional<Tensor> diag,
                                                       bool normalize, bool need_grad);
std::tuple<Tensor, Tensor, Tensor> drrho_sums(Tensor rows, Tensor cols, Tensor diag, Tensor scale, int64_t offset,
                                              bool keep);
std::tuple<Tensor, Tensor, Tensor> drrho_grad(Tensor rows, Tensor cols, Tensor diag, Tensor scale, int64_t offset,
                                              Tensor row_u, Tensor col_u, Tensor own, Tensor kept, int64_t width,
                                              bool need_rows, bool need_cols);
void adam_rows(Tensor w, Tensor m, Tensor v, Tensor step, Tensor grad, std::optional<Tensor> features, bool unit,
               double lr, double beta1, double beta2, double eps);
int64_t isa_level();

// A (value, column) pair as one key: the greater key has the larger value or, at equal values, the lower column.
// -0 is stored as +0, so that it ties with 0.
struct Key32 {
  uint64_t bits;
  static Key32 make(float value, uint32_t column) {
    value += 0.0f;
    uint32_t u;
    std::memcpy(&u, &value, 4);
    u ^= (u >> 31) ? 0xffffffffu : 0x80000000u;
    return {uint64_t(u) << 32 | uint32_t(~column)};
  }
  float value() const {
    uint32_t u = uint32_t(bits >> 32);
    u ^= (u >> 31) ? 0x80000000u : 0xffffffffu;
    float value;
    std::memcpy(&value, &u, 4);
    return value;
  }
  int64_t column() const { return uint32_t(~bits); }
  bool operator>(const Key32& other) const { return bits > other.bits; }
};

struct Key64 {
  double number;
  uint32_t index;
  static Key64 make(double value, uint32_t column) { return {value + 0.0, column}; }
  double value() const { return number; }
  int64_t column() const { return index; }
  bool operator>(const Key64& other) const {
    return number > other.number || (number == other.number && index < other.index);
  }
};

template <class V>
using Key = std::conditional_t<std::is_same_v<V, double>, Key64, Key32>;

// The columns of one row that may still be among its k largest. `bound` is a proven lower bound of the k-th value
// (NaN until k columns are known, which admits everything); columns come in ascending order, so a value equal to
// the bound has lost its tie already.
template <class V>
struct Candidates {
  static constexpr int64_t kSlack = 64 + 16;  // one block of columns, and the overhang of a vector store
  Key<V>* keys;
  int64_t count, limit, k;
  V bound;
  bool nan;

  // More room than k means fewer, cheaper tightenings; more than `columns` is never needed.
  static int64_t limit_for(int64_t k, int64_t columns) { return std::min(columns, k + std::max<int64_t>(k, 64)); }
  void reset(Key<V>* storage, int64_t row_limit, int64_t row_k) {
    *this = {storage, 0, row_limit, row_k, std::numeric_limits<V>::quiet_NaN(), false};
  }
  void tighten() {
    std::nth_element(keys, keys + (k - 1), keys + count, std::greater<>());
    count = k;
    bound = keys[k - 1].value();
  }
  // Takes a lower bound of the k-th value found by other means; columns that equal it must still be admitted. The
  // step below zero is a normal number, lest the processor be set to read denormal numbers as zero.
  void start_from(V lower) {
    constexpr V kTiny = std::numeric_limits<V>::min(), kInfinity = std::numeric_limits<V>::infinity();
    if (lower > -kInfinity) bound = lower > -kTiny && lower <= kTiny ? -kTiny : std::nextafter(lower, -kInfinity);
  }
};

// Rows that will be read soon, of elements of `element` bytes.
struct Ahead {
  const char* row[4];
  int element;
  // Columns first to first + 63, which are as many cache lines as an element has bytes.
  void fetch(int m, int64_t first) const {
    for (int line = 0; line < element; ++line) __builtin_prefetch(row[m] + first * element + 64 * line);
  }
};

// A block of a product: kBlockRows rows, whose sums fill the registers with the bytes of kBlockBytes of each.
constexpr int kBlockRows = 6;
template <int level>
constexpr int kVectorBytes = level == 2 ? 64 : 32;
template <int level>
constexpr int kBlockBytes = level == 2 ? 256 : 64;

// Where squared distances saturate, so that neither their sums nor their multiples overflow.
template <class V>
constexpr V kFar = std::numeric_limits<V>::max() / 16;

// A row v as signed bytes: v * scale = step * digit + rest, of which `norm` = |v * scale| and `error` = |rest|.
struct Digits {
  static constexpr float kLeast = 1.0f / (1 << 24), kMost = 1 << 24;  // of the largest element of a usable row
  float step, norm, error;
  int32_t sum;  // of the digits
  bool usable;
};

// Upper bounds of 64 pre-activations of a row, from the product of its digits with theirs: step * column.step * product
// + error * column.norm + norm * column.error + column.base.
struct ScreenRow {
  float step, error, norm, bound;
  bool wanted;
};
struct ScreenColumns {
  float step[64], norm[64], error[64], base[64];
  int32_t offset[64];
};

constexpr int64_t kScreenTile = 16;  // rows of bytes are there in multiples of this many

// Rows of W, up to this many at a time, whose products with many rows of x are computed from the first-level cache, and
// how many rows of x at a time.
constexpr int kDotColumns = 8, kDotRows = 4;

// Adam at one step: lr over the first bias correction, 1 - beta1, beta2, 1 - beta2, root of the second correction, eps.
template <class V>
struct AdamStep {
  V lr, rate1, beta2, rate2, scale, eps;
};

// One implementation of the inner loops per instruction set, all with the same selections.
struct Kernels {
  int64_t level;
  // Adds to `row` every column of value + bias (bias may be null) that may be among the k largest.
  void (*filter32)(const float* value, const float* bias, int64_t columns, uint32_t first, Candidates<float>& row);
  void (*filter64)(const double* value, const double* bias, int64_t columns, uint32_t first, Candidates<double>& row);
  // A lower bound of the k-th largest, or NaN; `rank` has room for every column.
  float (*seed32)(const float* value, int64_t columns, int64_t k, int32_t* rank);
  double (*seed64)(const double* value, int64_t columns, int64_t k, int64_t* rank);
  // y += sum_m c[m] * w[m], in the order of m, for 1 to 4 terms; `next`, if any, are rows to fetch meanwhile.
  void (*axpy32)(float* y, const float* c, const float* const* w, const Ahead* next, int terms, int64_t n);
  void (*axpy64)(double* y, const double* c, const double* const* w, const Ahead* next, int terms, int64_t n);
  float (*dot32)(const float* a, const float* b, const Ahead* next, int64_t n);
  double (*dot64)(const double* a, const double* b, const Ahead* next, int64_t n);
  // The sum of weight * (a - b)^2 (weight may be null: 1), and y += c (a - b).
  float (*distance32)(const float* a, const float* b, const float* weight, int64_t n);
  double (*distance64)(const double* a, const double* b, const double* weight, int64_t n);
  void (*repel32)(float* y, float c, const float* a, const float* b, int64_t n);
  void (*repel64)(double* y, double c, const double* a, const double* b, int64_t n);
  void (*widen_bf16)(const BFloat16* src, float* dst, int64_t n);
  void (*widen_f16)(const Half* src, float* dst, int64_t n);
  void (*narrow_bf16)(const float* src, BFloat16* dst, int64_t n);
  void (*narrow_f16)(const float* src, Half* dst, int64_t n);
  // From dot products with n rows of squared norms `square` to -kappa |row - prototype|^2, in place; their maximum.
  float (*log_weights32)(float* dot, const float* square, float own, float kappa, int64_t n);
  double (*log_weights64)(double* dot, const double* square, double own, double kappa, int64_t n);
  // log_w becomes exp(log_w - peak) + floor, for log_w <= peak; their sum.
  float (*weights32)(float* log_w, float peak, float floor, int64_t n);
  double (*weights64)(double* log_w, double peak, double floor, int64_t n);
  // The largest of a row of similarities; `highest` takes the larger of itself and the row, number by number.
  float (*maxima32)(const float* S, float* highest, int64_t n);
  double (*maxima64)(const double* S, double* highest, int64_t n);
  // With t = (S - diag) scale: returns the sum of exp(t - peak) of the row, adds that of every column to `total`.
  float (*pair_sums32)(const float* S, float row_diag, float row_peak, const float* diag, const float* peak,
                       float scale, float* total, int64_t n);
  double (*pair_sums64)(const double* S, double row_diag, double row_peak, const double* diag, const double* peak,
                        double scale, double* total, int64_t n);
  // P = w = exp(t - u) of the row plus that of each column; returns the sum of w t. P may be S.
  float (*pair_weights32)(const float* S, float* P, float row_diag, float row_u, const float* diag, const float* u,
                          float scale, int64_t n);
  double (*pair_weights64)(const double* S, double* P, double row_diag, double row_u, const double* diag,
                           const double* u, double scale, int64_t n);
  // Adam's rule on weights, both moments and gradient (null: zeros) of a row.
  void (*adam32)(float* p, float* m, float* v, const float* g, const AdamStep<float>& at, int64_t n);
  void (*adam64)(double* p, double* m, double* v, const double* g, const AdamStep<double>& at, int64_t n);
  // c[i] = a[i] (k numbers, `step` apart) @ b (k rows of block_bytes, `stride` numbers apart), += if `add`, for 1 to
  // kBlockRows rows.
  int64_t block_bytes;
  void (*block32)(const float* const* a, int64_t step, const float* b, int64_t stride, int64_t k, int rows,
                  float* const* c, bool add);
  void (*block64)(const double* const* a, int64_t step, const double* b, int64_t stride, int64_t k, int rows,
                  double* const* c, bool add);
  // c[i][j] = the inner product (k numbers) of a[i] with row j of w; a sum does not depend on the others.
  void (*inner32)(const float* const* a, int64_t rows, const float* w, int64_t stride, int64_t columns, int64_t k,
                  float* const* c);
  void (*inner64)(const double* const* a, int64_t rows, const double* w, int64_t stride, int64_t columns, int64_t k,
                  double* const* c);
  // The transpose of `columns` rows of k numbers, as such a b; what is missing of block_bytes is 0.
  void (*pack32)(const float* u, int64_t stride, int64_t columns, int64_t k, float* out);
  void (*pack64)(const double* u, int64_t stride, int64_t columns, int64_t k, double* out);
  // int8 screening (screen.h), or null.
  void (*quantise)(const float* v, const float* scale, int64_t d, int64_t width, int8_t* digit, Digits& row);
  void (*screen)(const uint8_t* x, int64_t width, const ScreenRow* row, int64_t rows, const int8_t* panel,
                 const ScreenColumns& column, const char* next, int64_t lines, uint64_t* pass);
  void (*dots)(const float* const* x, int rows, const float* w, int64_t d, int64_t columns, float (*out)[kDotColumns]);

  void filter(const float* v, const float* b, int64_t n, uint32_t first, Candidates<float>& row) const {
    filter32(v, b, n, first, row);
  }
  void filter(const double* v, const double* b, int64_t n, uint32_t first, Candidates<double>& row) const {
    filter64(v, b, n, first, row);
  }
  float seed(const float* v, int64_t n, int64_t k, int32_t* rank) const { return seed32(v, n, k, rank); }
  double seed(const double* v, int64_t n, int64_t k, int64_t* rank) const { return seed64(v, n, k, rank); }
  void axpy(float* y, const float* c, const float* const* w, const Ahead* next, int terms, int64_t n) const {
    axpy32(y, c, w, next, terms, n);
  }
  void axpy(double* y, const double* c, const double* const* w, const Ahead* next, int terms, int64_t n) const {
    axpy64(y, c, w, next, terms, n);
  }
  float dot(const float* a, const float* b, const Ahead* next, int64_t n) const { return dot32(a, b, next, n); }
  double dot(const double* a, const double* b, const Ahead* next, int64_t n) const { return dot64(a, b, next, n); }
  float distance(const float* a, const float* b, const float* w, int64_t n) const { return distance32(a, b, w, n); }
  double distance(const double* a, const double* b, const double* w, int64_t n) const {
    return distance64(a, b, w, n);
  }
  void repel(float* y, float c, const float* a, const float* b, int64_t n) const { repel32(y, c, a, b, n); }
  void repel(double* y, double c, const double* a, const double* b, int64_t n) const { repel64(y, c, a, b, n); }
  void block(const float* const* a, int64_t step, const float* b, int64_t stride, int64_t k, int rows, float* const* c,
             bool add) const {
    block32(a, step, b, stride, k, rows, c, add);
  }
  void block(const double* const* a, int64_t step, const double* b, int64_t stride, int64_t k, int rows,
             double* const* c, bool add) const {
    block64(a, step, b, stride, k, rows, c, add);
  }
  void inner(const float* const* a, int64_t rows, const float* w, int64_t stride, int64_t columns, int64_t k,
             float* const* c) const {
    inner32(a, rows, w, stride, columns, k, c);
  }
  void inner(const double* const* a, int64_t rows, const double* w, int64_t stride, int64_t columns, int64_t k,
             double* const* c) const {
    inner64(a, rows, w, stride, columns, k, c);
  }
  float maxima(const float* S, float* highest, int64_t n) const { return maxima32(S, highest, n); }
  double maxima(const double* S, double* highest, int64_t n) const { return maxima64(S, highest, n); }
  float pair_sums(const float* S, float own, float peak, const float* diag, const float* peaks, float scale,
                  float* total, int64_t n) const {
    return pair_sums32(S, own, peak, diag, peaks, scale, total, n);
  }
  double pair_sums(const double* S, double own, double peak, const double* diag, const double* peaks, double scale,
                   double* total, int64_t n) const {
    return pair_sums64(S, own, peak, diag, peaks, scale, total, n);
  }
  float pair_weights(const float* S, float* P, float own, float own_u, const float* diag, const float* u, float scale,
                     int64_t n) const {
    return pair_weights32(S, P, own, own_u, diag, u, scale, n);
  }
  double pair_weights(const double* S, double* P, double own, double own_u, const double* diag, const double* u,
                      double scale, int64_t n) const {
    return pair_weights64(S, P, own, own_u, diag, u, scale, n);
  }
  float log_weights(float* dot, const float* square, float own, float kappa, int64_t n) const {
    return log_weights32(dot, square, own, kappa, n);
  }
  double log_weights(double* dot, const double* square, double own, double kappa, int64_t n) const {
    return log_weights64(dot, square, own, kappa, n);
  }
  float weights(float* log_w, float peak, float floor, int64_t n) const { return weights32(log_w, peak, floor, n); }
  double weights(double* log_w, double peak, double floor, int64_t n) const {
    return weights64(log_w, peak, floor, n);
  }
  void adam(float* p, float* m, float* v, const float* g, const AdamStep<float>& at, int64_t n) const {
    adam32(p, m, v, g, at, n);
  }
  void adam(double* p, double* m, double* v, const double* g, const AdamStep<double>& at, int64_t n) const {
    adam64(p, m, v, g, at, n);
  }
  void pack(const float* u, int64_t stride, int64_t columns, int64_t k, float* out) const {
    pack32(u, stride, columns, k, out);
  }
  void pack(const double* u, int64_t stride, int64_t columns, int64_t k, double* out) const {
    pack64(u, stride, columns, k, out);
  }
  void widen(const BFloat16* s, float* d, int64_t n) const { widen_bf16(s, d, n); }
  void widen(const Half* s, float* d, int64_t n) const { widen_f16(s, d, n); }
  void narrow(const float* s, BFloat16* d, int64_t n) const { narrow_bf16(s, d, n); }
  void narrow(const float* s, Half* d, int64_t n) const { narrow_f16(s, d, n); }
};

// The best table this processor runs, or the one named by CLIPSTEER_CPU_ISA=portable|avx2|avx512|amx, where avx512
// leaves out AMX; chosen once.
const Kernels& kernels();

// fp16 and bf16 are computed in float; their rows pass through `buffer`, the others are used where they are.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
constexpr bool kNarrow = !std::is_same_v<T, Compute<T>>;

template <class T>
const Compute<T>* widened(const T* src, Compute<T>* buffer, int64_t n) {
  if constexpr (kNarrow<T>) {
    kernels().widen(src, buffer, n);
    return buffer;
  } else {
    return src;
  }
}

// The public functions check first and say more; this keeps direct calls of the ops from reading out of bounds.
inline void require(bool condition, const char* op, const std::string& what) {
  if (!condition) throw std::invalid_argument(std::string(op) + ": " + what);
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
      require(false, op, std::string("expected a floating dtype, got ") + torch::headeronly::toString(dtype));
  }
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

inline void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim) {
  require(t.dim() == dim, op,
          std::string("expected ") + name + " with " + std::to_string(dim) + " dimensions, got " +
              std::to_string(t.dim()));
}

inline void check(const char* op, const char* name, const Tensor& t, ScalarType dtype,
                  std::initializer_list<int64_t> shape) {
  std::string expected, got;
  for (int64_t size : shape) expected += (expected.empty() ? "" : ", ") + std::to_string(size);
  for (int64_t i = 0; i < t.dim(); ++i) got += (i ? ", " : "") + std::to_string(t.size(i));
  const std::string prefix = std::string("expected ") + name + " ";
  require(expected == got, op, prefix + "of shape (" + expected + "), got (" + got + ")");
  require(t.scalar_type() == dtype, op,
          prefix + "of dtype " + torch::headeronly::toString(dtype) + ", got " +
              torch::headeronly::toString(t.scalar_type()));
  require(t.is_contiguous() && t.is_cpu(), op, prefix + "contiguous and on the CPU");
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
