// Two ways to bound a product from above at a fraction of its price: by bytes, and by pairs of bf16 numbers.
#pragma once

#include "topk_encode.h"

namespace clipsteer {

// Scales 2^e per dimension, in the middle between those that would level x and those that would level W, and their
// inverses. They only decide how tight the bounds are, so a sample of the rows will do.
template <class T>
void level(const T* x, int64_t rows, const Dictionary<T>& W, float* scale_x, float* scale_w) {
  const int64_t d = W.d, taken = std::min<int64_t>(rows, 64);
  std::vector<double> size_x(d), size_w(d);
  for (int64_t s = 0; s < taken; ++s) {
    const T* row = x + rows * s / taken * d;
    for (int64_t j = 0; j < d; ++j) size_x[j] += std::abs(float(row[j])) / double(taken);
  }
  W.sizes(size_w.data());
  for (int64_t j = 0; j < d; ++j) {
    const double ratio = size_w[j] / size_x[j];
    const double power = ratio > 0 && ratio <= std::numeric_limits<double>::max() ? std::log2(ratio) / 2 : 0;
    const int e = int(std::lround(std::clamp(power, -12.0, 12.0)));
    scale_x[j] = std::ldexp(1.0f, e);
    scale_w[j] = std::ldexp(1.0f, -e);
  }
}

// The same result from fewer float32 products. With x' = x * s and w' = w / s, s powers of two, and x' = x^ + r,
// w' = w^ + t, where x^ and w^ are steps times bytes:
//   |x . w - x^ . w^| <= |r| |w'| + |x^| |t|.
// With u = 2^-24, the float32 sum kept for a column differs from x . w by at most (d + 4) u |x'| |w'| + u |b| + what
// underflows, a sum in any other order by as much, and the bound as evaluated from the exact one by less than
// 30 u (|x'| |w'| + |b|), or |b| + |theta| where a threshold theta is taken off. Elements are at most 2^24 and the
// largest of a row at least 2^-24 (other rows are not screened), |log2 s| <= 12 and d <= 8192. So norms are good to
// 2^-10, and underflow, even if denormal numbers are read as zero, is below d 2^-89, against d 2^-71 of the second term.
// Hence rounding() and kWiden.
// A column's own factor f makes of x . w + b <= U and x . w + b >= L that f (x . w + b) is at most f U or, if f < 0, f L:
// the same sums of f times the digits' step and the bias and of |f| times the errors. f times the number kept, times one
// in any other order and times the step are rounded once more each: 2 (d + 4) + 33 u in all, where rounding() has
// 2 d + 64, and 35 u of the bias, where kBiasMargin is 64. With |f| in [2^-32, 2^32] everything above is multiplied by
// |f|, what underflows is below 2^-126 more, against d 2^-103, and nothing overflows that was finite but to an infinity,
// which passes. A factor of 0 makes a bound of 0, of which the numbers kept are zeros too, as they are finite before.
// A column with another factor always passes.
// Rows in half precision are the same numbers in float32, denormal ones too, so all of this holds of them: their bytes are
// made of the 16-bit numbers, what is kept is summed in float32 and rounded once, when all have been compared.
// A column that is not screened always passes, so that no NaN is missed. Every float32 product is
// summed in one order, that of dot<float>, so the result does not depend on what was ruled out, nor
// on threads or the other rows, nor on how W lies: one that lies across is turned, 64 features at a time.
// By pairs, x^ and w^ are rows of bf16 numbers as they are, so that nothing is rounded but the float32 sum of their
// products. What that loses is derived at `flushed` of ops/_bounds.py: (d + 1) u of |x| |w|, where by bytes a sum of
// integers loses nothing, and underflow, at most 2^-126 (2 d + |x|_1 + |w|_1), which is below d 2^-100, against d 2^-71. So
// rounding() is enough: 2 d + 5, and 33 of a column's factor, in place of 2 d + 64. On AMX tiles even and odd products of 16
// pairs are each added up in one chain, then both to each other, then to the sum; operands and results below 2^-126 are 0.
// A sum of d products takes d - 1 additions that can round, in any order, so both of these hold of it too.
constexpr float kWiden = 1 + 1.0f / 256, kBiasMargin = 1.0f / (1 << 18);
constexpr float kLeastFactor = 1.0f / (int64_t(1) << 32), kMostFactor = int64_t(1) << 32;

// An upper bound of a term that is not part of the product.
inline float raised(float term) { return term * (1 + (term > 0 ? kBiasMargin : -kBiasMargin)); }

inline float rounding(int64_t d) { return float(2 * d + 64) / (1 << 24); }

// The constants of column c times its factor.
inline void multiply_column(ScreenColumns& column, int64_t c, float factor) {
  const float size = std::abs(factor);
  const bool usual = factor == 0 || (size >= kLeastFactor && size <= kMostFactor);
  column.step[c] *= factor;
  column.norm[c] *= usual ? size : std::numeric_limits<float>::quiet_NaN();
  column.error[c] *= size;
}

// How far below an upper bound its value can be, from the error in it and its bias. The value is no more below the products
// than the bound is above them, so that is twice the error and twice the bias's margin; the rest is more than evaluating it
// takes, a few u of each.
inline float lowered(float error, float base) { return 2.25f * error + 4 * kBiasMargin * std::abs(base); }

inline int64_t padded(int64_t rows) { return (rows + kScreenTile - 1) / kScreenTile * kScreenTile; }

// A row's part of ScreenRow, and a column's of ScreenColumns.
inline ScreenRow bounded(const Digits& digits, int64_t d) {
  const float norm = digits.norm, error = digits.error;
  return {digits.step, (error + rounding(d) * norm) * kWiden, (norm + error) * kWiden, 0, false};
}
inline void set_column(ScreenColumns& column, int64_t c, const Digits& digits) {
  column.step[c] = digits.usable ? digits.step : 0;
  column.norm[c] = digits.usable ? digits.norm * kWiden : std::numeric_limits<float>::quiet_NaN();
  column.error[c] = digits.usable ? digits.error * kWiden : 0;
}

// Rows of x as bytes, and of W, 64 at a time; members of a team have their own of these.
template <class T>
class Bytes {
 public:
  Bytes(const Dictionary<T>& W, int64_t members, int64_t block)
      : W_(W),
        width_((W.d + 63) / 64 * 64),
        scale_x_(W.d),
        scale_w_(W.d),
        codes_(padded(block) * width_),
        flat_(members * 64 * width_),
        packed_(members * 64 * width_) {
    std::fill_n(codes_.get() + block * width_, (padded(block) - block) * width_, uint8_t(0));
  }

  // A block of rows comes next.
  void begin(const T* x, int64_t count) { level(x, count, W_, scale_x_.data(), scale_w_.data()); }

  // Row r of the block, in float32, and whether it can be screened.
  ScreenRow take_row(int64_t r, const float* wide, char& usable) {
    const Quantise<float>& of_x = isa();
    Digits digits;
    uint8_t* code = codes_.get() + r * width_;
    of_x.quantise(wide, scale_x_.data(), W_.d, width_, reinterpret_cast<int8_t*>(code), digits);
    for (int64_t i = 0; i < width_; ++i) code[i] ^= 0x80;
    usable = digits.usable;
    return bounded(digits, W_.d);
  }

  void take_columns(int64_t member, const T* const* feature, int64_t columns, ScreenColumns& column) const {
    const Quantise<T>& of_w = isa();
    const int64_t quads = width_ / 4;
    int8_t* bytes = flat_.get() + member * 64 * width_;
    for (int64_t c = 0; c < columns; ++c) {
      Digits digits;
      of_w.quantise(feature[c], scale_w_.data(), W_.d, width_, bytes + c * width_, digits);
      set_column(column, c, digits);
      column.offset[c] = digits.usable ? -128 * digits.sum : 0;
    }
    kernels<float>().pack(reinterpret_cast<const float*>(bytes), quads, columns, quads,
                          reinterpret_cast<float*>(panel(member)));
  }

  // A bit for each of the columns that were taken last, for each row from the `first` of the block on, a multiple of
  // kScreenTile.
  void screen(int64_t member, const T* const*, int64_t first, const ScreenRow* row, int64_t count, int64_t,
              const ScreenColumns& column, const ScreenAhead& next, uint64_t* pass) const {
    const Screening& bytes = isa();
    bytes.screen(codes_.get() + first * width_, width_, row, count, panel(member), column, next, pass);
  }

 private:
  int8_t* panel(int64_t member) const { return packed_.get() + member * 64 * width_; }

  const Dictionary<T>& W_;
  const int64_t width_;
  std::vector<float> scale_x_, scale_w_;
  Buffer<uint8_t> codes_;
  Buffer<int8_t> flat_, packed_;
};

// The same of rows of bf16 numbers as pairs. Those of W are multiplied where they lie, if they do so one after the other.
class Pairs {
 public:
  using T = BFloat16;

  Pairs(const Dictionary<T>& W, int64_t members, int64_t block)
      : W_(W),
        width_((W.d + 1) / 2 * 2),
        in_place_(W.d % 2 == 0 && (W.transposed() || !W.columns)),
        rows_(in_place_ ? 0 : block * width_),
        features_(in_place_ ? 0 : members * 64 * width_),
        products_(members * padded(block) * 64),
        left_(block),
        group_(kScreenTile * ((width_ / 2 + 15) / 16 * 16)),
        woven_(on_tiles() ? padded(block) / kScreenTile * group_ : 0),
        block_(padded(block)) {
    if (on_tiles()) std::fill_n(woven_.get(), block_ / kScreenTile * group_, 0.0f);
  }

  void begin(const T* x, int64_t) { x_ = x; }

  ScreenRow take_row(int64_t r, const float*, char& usable) {
    const T* own = x_ + r * W_.d;
    left_[r] = as_pairs(in_place_ ? own : copied(own, rows_.get() + r * width_));
    float* woven = woven_.get() + r / kScreenTile * group_ + r % kScreenTile;
    for (int64_t q = 0; on_tiles() && q < width_ / 2; ++q) std::memcpy(woven + q * kScreenTile, left_[r] + q, 4);
    const Digits digits = measured(own, left_[r]);
    usable = digits.usable;
    return bounded(digits, W_.d);
  }

  void take_columns(int64_t member, const T* const* feature, int64_t columns, ScreenColumns& column) const {
    for (int64_t c = 0; c < columns && !in_place_; ++c) copied(feature[c], features_.get() + (member * 64 + c) * width_);
    float square[64];
    squares(as_pairs(feature, member), columns, square);
    for (int64_t c = 0; c < columns; ++c) set_column(column, c, measured(feature[c], square[c]));
  }

  void screen(int64_t member, const T* const* feature, int64_t first, const ScreenRow* row, int64_t count,
              int64_t columns, const ScreenColumns& column, const ScreenAhead& next, uint64_t* pass) const {
    const PairScreening& pairs = isa();
    const int64_t k = width_ / 2;
    const float* w = as_pairs(feature, member);
    if (on_tiles()) {
      const float* x = woven_.get() + first / kScreenTile * group_;
      return pairs.sift_tiles(x, group_, row, count, w, k, columns, k, column, product(member, first), pass);
    }
    pairs.sift(left_.data() + first, row, count, w, k, columns, k, column, next, product(member, first), pass);
  }

  // The products of row r of the block with the columns that were taken last.
  float* product(int64_t member, int64_t r) const { return products_.get() + (member * block_ + r) * 64; }

 private:
  static const float* as_pairs(const T* row) { return reinterpret_cast<const float*>(row); }
  static bool on_tiles() {
    const PairScreening& pairs = isa();
    return pairs.sift_tiles;
  }

  const T* copied(const T* row, T* into) const {
    std::copy_n(row, W_.d, into);
    std::fill(into + W_.d, into + width_, T(0));
    return into;
  }
  const float* as_pairs(const T* const* feature, int64_t member) const {
    return as_pairs(in_place_ ? feature[0] : features_.get() + member * 64 * width_);
  }
  void squares(const float* rows, int64_t count, float* out) const {
    const PairScreening& pairs = isa();
    pairs.squares(rows, width_ / 2, width_ / 2, count, out);
  }

  // A row of such a square.
  Digits measured(const T* row, float square) const {
    Digits digits{1, std::sqrt(square), 0, 0, true};
    // of such norms the largest number is in range; what is beyond, or 0, is looked at closely
    if (digits.norm >= 2 * std::sqrt(float(W_.d)) * Digits::kLeast && digits.norm <= Digits::kMost / 2) return digits;
    float most = 0;
    bool zero = true;
    for (int64_t i = 0; i < W_.d; ++i) {
      uint16_t bits;
      std::memcpy(&bits, row + i, 2);
      zero &= uint16_t(bits << 1) == 0;
      most = std::max(most, std::abs(float(row[i])));
    }
    digits.usable = zero || (most >= Digits::kLeast && most <= Digits::kMost && std::isfinite(square));
    return digits;
  }
  Digits measured(const T* row, const float* pairs) const {
    float square;
    squares(pairs, 1, &square);
    return measured(row, square);
  }

  const Dictionary<T>& W_;
  const int64_t width_;
  const bool in_place_;
  const T* x_ = nullptr;
  Buffer<T> rows_, features_;
  Buffer<float> products_;
  std::vector<const float*> left_;
  const int64_t group_;  // of as many rows as a tile has, woven: a pair of each, then the next
  Buffer<float> woven_;
  const int64_t block_;
};

}  // namespace clipsteer
