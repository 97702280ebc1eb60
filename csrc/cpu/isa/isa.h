// What is compiled once per instruction set: a table of functions for each type of number, and
// what these functions take.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <type_traits>

namespace clipsteer {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// fp16 and bf16 are computed in float.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
constexpr bool kNarrow = !std::is_same_v<T, Compute<T>>;

// A (value, column) pair as one key: the greater key has the larger value or, at equal values, the
// lower column. -0 is stored as +0, so that it ties with 0.
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

// The columns of one row that may still be among its k largest. `bound` is a proven lower bound of
// the k-th value (NaN until k columns are known, which admits everything); columns come in
// ascending order, so a value equal to the bound has lost its tie already.
template <class V>
struct Candidates {
  // One block of columns, and the overhang of a vector store.
  static constexpr int64_t kSlack = 64 + 16;
  Key<V>* keys;
  int64_t count, limit, k;
  V bound;
  bool nan;

  // More room than k means fewer, cheaper tightenings; more than `columns` is never needed.
  static int64_t limit_for(int64_t k, int64_t columns) {
    return std::min(columns, k + std::max<int64_t>(k, 64));
  }
  void reset(Key<V>* storage, int64_t row_limit, int64_t row_k) {
    *this = {storage, 0, row_limit, row_k, std::numeric_limits<V>::quiet_NaN(), false};
  }
  void tighten() {
    std::nth_element(keys, keys + (k - 1), keys + count, std::greater<>());
    count = k;
    bound = keys[k - 1].value();
  }
  // Takes a lower bound of the k-th value found by other means; columns that equal it must still be
  // admitted. The step below zero is a normal number, lest the processor be set to read denormal
  // numbers as zero.
  void start_from(V lower) {
    constexpr V kTiny = std::numeric_limits<V>::min();
    constexpr V kInfinity = std::numeric_limits<V>::infinity();
    if (lower > -kInfinity) {
      bound = lower > -kTiny && lower <= kTiny ? -kTiny : std::nextafter(lower, -kInfinity);
    }
  }
};

// What columns have of their own beside their sums of products, each null where they have none: a pre-activation is
// (sum + bias) * scale, and wanted above its bound.
template <class V>
struct OfColumns {
  const V *bias = nullptr, *scale = nullptr, *bound = nullptr;
  OfColumns from(int64_t c) const {
    return {bias ? bias + c : nullptr, scale ? scale + c : nullptr, bound ? bound + c : nullptr};
  }
};

// Rows that are added, or multiplied, at a time.
constexpr int kGathered = 8;

// out = sum (zeros, if null) + sum_m c[m] * w[m] + bias (if any), in this order, rounded once, for 0 to kGathered rows of
// numbers T; `next`, if any, are as many rows that will be read soon. out may be sum.
template <class T, class Out>
using AddRows = void (*)(Out* out, const Compute<T>* sum, const Compute<T>* c, const T* const* w, const T* const* next,
                         int terms, const T* bias, int64_t n);
// out[m] = the inner product of a with w[m]; a sum does not depend on the others.
template <class T>
using RowDots = void (*)(const Compute<T>* a, const T* const* w, const T* const* next, int terms,
                         int64_t n, Compute<T>* out);

// A block of a product: this many rows of Kernels::block_columns sums, which fill the registers.
constexpr int kBlockRows = 6;

// Where squared distances saturate, so that neither their sums nor their multiples overflow.
template <class V>
constexpr V kFar = std::numeric_limits<V>::max() / 16;

// A row v as signed bytes: v * scale = step * digit + rest, of which `norm` = |v * scale| and
// `error` = |rest|.
struct Digits {
  // Of the largest element of a usable row.
  static constexpr float kLeast = 1.0f / (1 << 24), kMost = 1 << 24;
  float step, norm, error;
  int32_t sum;  // of the digits
  bool usable;
};

// Upper bounds of 64 pre-activations of a row, from the product of its digits with theirs:
// step * column.step * product + error * column.norm + norm * column.error + column.base.
struct ScreenRow {
  float step, error, norm, bound;
  bool wanted;
};
struct ScreenColumns {
  float step[64], norm[64], error[64], base[64];
  int32_t offset[64];
};

// What will be read next: cache lines, 2^together of which follow each other every `stride` bytes.
struct ScreenAhead {
  const char* from;
  int64_t stride, lines;
  int together;
  void fetch(int64_t line) const {
    const int64_t place = line & ((int64_t(1) << together) - 1);
    __builtin_prefetch(from + (line >> together) * stride + place * 64, 0, 2);
  }
};

constexpr int64_t kScreenMaxDim = 8192;  // numbers of a row
constexpr int64_t kScreenTile = 16;  // rows are there in multiples of this many

// Rows of x, up to this many at a time, whose products with rows of W are computed in registers.
constexpr int kDotRows = 4;

// Adam at one step: lr over the first bias correction, 1 - beta1, beta2, 1 - beta2, root of the
// second correction, eps.
template <class V>
struct AdamStep {
  V lr, rate1, beta2, rate2, scale, eps;
};

// An integer of as many bits, which can be put in the same order.
template <class V>
using Rank = std::conditional_t<sizeof(V) == 4, int32_t, int64_t>;

// Pairs of a row as a softmax sees them: t = (S - row_diag) scale and, of the column's side, (S - diag) scale; what either
// side takes off is `row` and `column`: a peak, or u.
template <class V>
struct PairSide {
  V row_diag, row;
  const V *diag, *column;
  V scale;
};

// Panels of integers: as many columns as 256 bytes have, of which blocks of kScoreRows are compared at a time.
template <class V>
constexpr int kScoreColumns = 256 / sizeof(V);
constexpr int kScoreRows = 4;

// A sum of unsigned numbers: low + 2^32 high.
struct WideSum {
  uint64_t low = 0, high = 0;
};

template <class V>
using Block = void (*)(const V* const* a, int64_t step, const V* b, int64_t stride, int64_t k, int rows, V* const* c,
                       bool add);
template <class V, class W>
using Inner = void (*)(const V* const* a, int64_t rows, const W* w, int64_t stride, int64_t columns, int64_t k,
                       V* const* c);

// Products of few rows x with W where it lies, of numbers T; null where torch's GEMM has the better inner loop.
template <class T>
struct RowProducts {
  using V = Compute<T>;
  // out[i * stride + c] = x[i] . w[c]; a sum does not depend on the others.
  void (*dots)(const V* const* x, int64_t rows, const T* const* w, int64_t d, int64_t columns,
               V* out, int64_t stride) = nullptr;
  // The same of rows d apart, where w[q * step + c] is number q of column c.
  void (*spread)(const V* x, int64_t rows, const T* w, int64_t step, int64_t d, int64_t columns,
                 V* out, int64_t stride) = nullptr;
};

// Inner loops over numbers V; every instruction set makes the same selections.
template <class V>
struct Kernels {
  RowProducts<V> rows;
  // Adds to `row` every column that may be among the k largest or, where columns have bounds, is above its own.
  void (*filter)(const V* value, const OfColumns<V>& own, int64_t columns, uint32_t first,
                 Candidates<V>& row);
  // A lower bound of the k-th largest, or NaN; `rank` has room for every column.
  V (*seed)(const V* value, int64_t columns, int64_t k, Rank<V>* rank);
  AddRows<V, V> add, finish;
  RowDots<V> row_dots;
  V (*dot)(const V* a, const V* b, int64_t n);
  V (*square)(const V* a, int64_t n);  // dot of a row with itself
  // The sum of weight * (a - b)^2 (weight may be null: 1), and y += c (a - b).
  V (*distance)(const V* a, const V* b, const V* weight, int64_t n);
  void (*repel)(V* y, V c, const V* a, const V* b, int64_t n);
  // From dot products with n rows of squared norms `square` to -kappa |row - prototype|^2, in
  // place; their maximum.
  V (*log_weights)(V* dot, const V* square, V own, V kappa, int64_t n);
  // log_w becomes exp(log_w - peak) + floor, for log_w <= peak; their sum.
  V (*weights)(V* log_w, V peak, V floor, int64_t n);
  // out = mu + moved / total.
  void (*settle)(const V* mu, const V* moved, V total, V* out, int64_t n);
  // The largest of a row of similarities; `highest` takes the larger of itself and the row,
  // number by number.
  V (*maxima)(const V* S, V* highest, int64_t n);
  // With t = (S - diag) scale: returns the sum of exp(t - peak) of the row, adds that of every
  // column to `total`.
  V (*pair_sums)(const V* S, V row_diag, V row_peak, const V* diag, const V* peak, V scale,
                 V* total, int64_t n);
  // P = w = exp(t - u) of the row plus that of each column; returns the sum of w t. P may be S.
  V (*pair_weights)(const V* S, V* P, V row_diag, V row_u, const V* diag, const V* u, V scale,
                    int64_t n);
  // Sums of exp t below their peaks of two matrices, and of the first one's t times either: of the
  // row to `out`, of columns to 4 lines of `total`, `step` apart.
  void (*cross_sums)(const V* S, const V* R, const PairSide<V>& student,
                     const PairSide<V>& teacher, V* total, int64_t step, V* out, int64_t n);
  // P = f w - g v with the weights of both. P may be S.
  void (*cross_weights)(const V* S, const V* R, V* P, const PairSide<V>& student,
                        const PairSide<V>& teacher, V f, V g, int64_t n);
  // With z = sign (S scale + bias), S becomes w = sign sigmoid(z); the sums of log(1 + exp z), w S
  // and w to `out`.
  void (*sigmoid_weights)(V* S, V sign, V scale, V bias, V* out, int64_t n);
  // Adam's rule on weights, both moments and gradient (null: zeros) of a row.
  void (*adam)(V* p, V* m, V* v, const V* g, const AdamStep<V>& at, int64_t n);
  // Agreement of rows as integers, see agreement.h.
  V (*largest)(const V* x, int64_t n);
  double (*length)(const V* x, double first, double second, int64_t n);
  void (*integers)(const V* x, double first, double second, int64_t n, Rank<V>* out);
  void (*larger_rows)(const Rank<V>* p, int64_t p_stride, const Rank<V>* q, int64_t q_stride, int64_t count,
                      Rank<V>* c);
  void (*order_rows)(const V* x, int64_t stride, const Rank<V>* sign, int64_t count, Rank<V>* n);
  void (*larger)(const Rank<V>* a, const Rank<V>* b, int64_t k, bool subtract, Rank<V>* c,
                 int64_t stride);
  WideSum (*apart)(Rank<V>* c, const Rank<V>* base, Rank<V> own, int64_t n);
  void (*add_columns)(const Rank<V>* c, uint64_t* low, uint64_t* high, int64_t n);
  void (*signs)(Rank<V>* c, const Rank<V>* base, Rank<V> own, int64_t n);
  void (*signed_order)(const Rank<V>* sign, const Rank<V>* a, const Rank<V>* b, int64_t panels,
                       int64_t k, int64_t* count);
  // out[j * out_stride + i] = u[i * stride + j] for `rows` values of i and `columns` of j.
  void (*turn)(const V* u, int64_t stride, int64_t rows, int64_t columns, V* out,
               int64_t out_stride);
  // The rest is not there, and block_columns is 0, where torch's GEMM has the better inner loop.
  int64_t block_columns = 0;
  // c[i] = a[i] (k numbers, `step` apart) @ b (k rows of block_columns, `stride` apart), += if
  // `add`, for 1 to kBlockRows rows.
  Block<V> block = nullptr;
  // c[i][j] = the inner product (k numbers) of a[i] with row j of w; a sum does not depend on
  // the others.
  Inner<V, V> inner = nullptr;
  // The transpose of `columns` rows of k numbers, as such a b; missing columns are 0.
  void (*pack)(const V* u, int64_t stride, int64_t columns, int64_t k, V* out) = nullptr;
};

template <class T>
  requires kNarrow<T>
struct Kernels<T> {
  RowProducts<T> rows;
  void (*widen)(const T* src, float* dst, int64_t n);
  void (*narrow)(const float* src, T* dst, int64_t n);
  float (*square)(const T* a, int64_t n);
  void (*settle)(const T* mu, const float* moved, float total, T* out, int64_t n);
  AddRows<T, float> add;
  AddRows<T, T> finish;
  RowDots<T> row_dots;
  // As that of floats.
  void (*turn)(const T* u, int64_t stride, int64_t rows, int64_t columns, T* out,
               int64_t out_stride);
  // Kernels<float>::inner with rows w of these, and `columns` of k rows of these as a
  // Kernels<float>::block's b; null where those are.
  Inner<float, T> inner = nullptr;
  void (*lay)(const T* w, int64_t stride, int64_t k, int64_t columns, float* out) = nullptr;
};

// Products of bf16 numbers by pairs that follow each other along k (halves.h), or null: as
// Kernels<float> has them, with pairs in the place of its floats.
struct PairProducts {
  Block<float> block = nullptr;
  Inner<float, float> inner = nullptr;
  // `columns` of k rows, from column `first` on, as pairs of rows that make such a b; what is
  // missing is 0.
  void (*weave)(const BFloat16* const* rows, int64_t k, int64_t first, int64_t columns,
                float* out) = nullptr;
  // On AMX tiles (tiles.h), or null: c (rows, columns) = or += a (rows, k pairs) @ b, whose panels of (k, block_columns)
  // pairs are `b_panel` apart; rows of a and of c lie a_row and c_row apart. Nothing is read or written beside them but
  // the rest of the last panel. A sum does not depend on the others. A call takes half a microsecond for itself: many
  // panels at once.
  void (*tiles)(const float* a, int64_t a_row, int64_t rows, const float* b, int64_t b_panel, int64_t k,
                int64_t columns, float* c, int64_t c_row, bool add) = nullptr;
  // Float32 numbers as sums of two such, both as pairs along a row, or down columns, whose pairs are then a row each,
  // out_row apart. Whole lines are written, and whole squares of 16 columns and 16 pairs; what is missing is 0.
  void (*split)(const float* v, int64_t n, float* high, float* low) = nullptr;
  void (*split_columns)(const float* v, int64_t stride, int64_t rows, int64_t columns, float* high, float* low,
                        int64_t out_row) = nullptr;
  // `tiles` of a = high + low.
  void (*tiles_of_two)(const float* high, const float* low, int64_t a_row, int64_t rows, const float* b,
                       int64_t b_panel, int64_t k, int64_t columns, float* c, int64_t c_row, bool add) = nullptr;
  // Of b = b + b_low as well, without the product of both low parts.
  void (*tiles_of_both)(const float* high, const float* low, int64_t a_row, int64_t rows, const float* b,
                        const float* b_low, int64_t b_panel, int64_t k, int64_t columns, float* c, int64_t c_row) = nullptr;
  // As split, n numbers alone, but rounded to nearest: `low` is at most 2^-8 of v, and its products with such another may be
  // left out. False if a number is as large as 2^126, or none.
  bool (*halve)(const float* v, int64_t n, BFloat16* high, BFloat16* low) = nullptr;
};

template <class T>
struct Quantise {
  void (*quantise)(const T* v, const float* scale, int64_t d, int64_t width, int8_t* digit,
                   Digits& row);
};

// int8 screening (screen.h), or null.
struct Screening : Quantise<float>, Quantise<BFloat16>, Quantise<Half> {
  void (*screen)(const uint8_t* x, int64_t width, const ScreenRow* row, int64_t rows,
                 const int8_t* panel, const ScreenColumns& column, const ScreenAhead& next,
                 uint64_t* pass);
};

// Screening by pairs of bf16 numbers (pairs.h), or null.
struct PairScreening {
  void (*squares)(const float* w, int64_t stride, int64_t k, int64_t columns, float* out) = nullptr;
  void (*sift)(const float* const* x, const ScreenRow* row, int64_t rows, const float* w,
               int64_t stride, int64_t columns, int64_t k, const ScreenColumns& column,
               const ScreenAhead& next, float* product, uint64_t* pass) = nullptr;
  // The same on AMX tiles, of rows of x that lie for it.
  void (*sift_tiles)(const float* x, int64_t group, const ScreenRow* row, int64_t rows,
                     const float* w, int64_t stride, int64_t columns, int64_t k,
                     const ScreenColumns& column, float* product, uint64_t* pass) = nullptr;
};

struct Isa : Kernels<float>,
             Kernels<double>,
             Kernels<BFloat16>,
             Kernels<Half>,
             Screening,
             PairProducts,
             PairScreening {
  int64_t level;
};

// The best that this processor runs, or the one named by
// CLIPSTEER_CPU_ISA=portable|avx2|avx512f|avx512|amx, where avx512 leaves out AMX and avx512f VNNI
// and BF16 too; chosen once.
const Isa& isa();

template <class V>
const Kernels<V>& kernels() {
  return isa();
}

}  // namespace clipsteer
