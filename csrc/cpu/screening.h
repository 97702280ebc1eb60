// A product searched in int8 first: most columns are ruled out by a proven bound, the rest is computed in float32.
#pragma once

#include "topk_encode.h"

namespace clipsteer {

// Scales 2^e per dimension, in the middle between those that would level x and those that would level W, and their
// inverses. They only decide how tight the bounds are, so a sample of the rows will do.
template <class T>
void level(const float* x, int64_t rows, const Dictionary<T>& W, float* scale_x, float* scale_w) {
  const int64_t d = W.d, taken = std::min<int64_t>(rows, 64);
  std::vector<double> size_x(d), size_w(d);
  for (int64_t s = 0; s < taken; ++s) {
    const float* row = x + rows * s / taken * d;
    for (int64_t j = 0; j < d; ++j) size_x[j] += std::abs(row[j]) / double(taken);
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
constexpr float kWiden = 1 + 1.0f / 256, kBiasMargin = 1.0f / (1 << 18);
constexpr float kLeastFactor = 1.0f / (int64_t(1) << 32), kMostFactor = int64_t(1) << 32;
constexpr int64_t kScreenRows = 512;
constexpr int64_t kWholeColumns = 8;  // of rows that are computed whole, which stay in the first-level cache

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

// What is looked for in the rows of a block, of which each slot of columns has its own:
//   begin(first, count)   rows first to first + count - 1 come next
//   done(r)               row r of the block had a NaN
//   bounded(r), bound(r)  columns whose pre-activation (less their threshold) is at most the bound are not wanted
//   take(r, value, c)     a column that may be; columns come in ascending order
// `threshold`, if any, is a column's own; `expected` is how many columns a row will have.
template <class T, class Search, class Finish>
void search_screened(const T* x, const Dictionary<T>& W, const float* threshold, int64_t rows, int64_t block,
                     int64_t expected, std::vector<Search>& searches, Finish&& finish) {
  using torch::stable::parallel_for;
  const int64_t n = W.n, d = W.d;
  const float *b = W.bias, *scale = W.scale;
  const Screening& int8 = isa();
  const Quantise<float>& of_x = isa();
  const Quantise<T>& of_w = isa();
  const int64_t width = (d + 63) / 64 * 64, quads = width / 4, panels = (n + 63) / 64;
  const int64_t slots = int64_t(searches.size());
  std::vector<float> scale_x(d), scale_w(d);
  const int64_t padded = (block + kScreenTile - 1) / kScreenTile * kScreenTile;
  Buffer<uint8_t> codes(padded * width);
  std::fill_n(codes.get() + block * width, (padded - block) * width, uint8_t(0));
  Buffer<int8_t> packed(slots * 64 * width), flat(slots * 64 * width);
  Buffer<T> turned(W.transposed() ? slots * 64 * d : 0);
  Buffer<float> wide_x(kNarrow<T> ? block * d : 0);
  std::vector<ScreenRow> bounds(block);
  std::vector<char> usable(block);
  std::vector<int64_t> computed(slots * block);

  for (int64_t r0 = 0; r0 < rows; r0 += block) {
    const int64_t count = std::min(block, rows - r0);
    const float* input = widened(x + r0 * d, wide_x.get(), count * d);
    level(input, count, W, scale_x.data(), scale_w.data());
    for (int64_t r = 0; r < count; ++r) {
      Digits row;
      uint8_t* code = codes.get() + r * width;
      of_x.quantise(input + r * d, scale_x.data(), d, width, reinterpret_cast<int8_t*>(code), row);
      for (int64_t i = 0; i < width; ++i) code[i] ^= 0x80;
      usable[r] = row.usable;
      bounds[r] = {row.step, (row.error + rounding(d) * row.norm) * kWiden, (row.norm + row.error) * kWiden, 0, false};
    }
    parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) {
      std::vector<uint16_t> whole;  // the rows that are computed whole; the others are wanted
      std::vector<ScreenRow> lines(bounds.begin(), bounds.begin() + count);
      std::vector<uint64_t> pass(count);
      std::vector<char> screened(count);  // as long as that pays
      Buffer<uint16_t> hits(64 * count);  // the rows that may have a column among theirs
      for (int64_t s = begin; s < end; ++s) {
        int8_t *bytes = flat.get() + s * 64 * width, *panel = packed.get() + s * 64 * width;
        Search& search = searches[s];
        search.begin(r0, count);
        int64_t* work = computed.data() + s * block;
        T* buffer = turned.get() + (W.transposed() ? s * 64 * d : 0);
        const T* feature[64];  // rows of W of a panel
        std::fill_n(work, count, 0);
        std::copy_n(usable.begin(), count, screened.begin());
        // Columns [c, c + columns) of a panel that begins with `first`, of some rows in float32, a row of W with several
        // rows of x at a time.
        const auto compute = [&](const uint16_t* which, int64_t chosen, int64_t first, int64_t c0, int64_t columns) {
          const float* left[kDotRows];
          float value[kDotRows][kWholeColumns];
          for (int64_t at = 0; at < chosen; at += kDotRows) {
            const int together = int(std::min<int64_t>(kDotRows, chosen - at));
            for (int i = 0; i < together; ++i) left[i] = input + which[at + i] * d;
            kernels<T>().rows.dots(left, together, feature + c0, d, columns, value[0], kWholeColumns);
            for (int i = 0; i < together; ++i) {
              work[which[at + i]] += columns;
              for (int64_t c = 0; c < columns; ++c) {
                const int64_t place = first + c0 + c;
                float found = value[i][c] + (b ? b[place] : 0);
                if (scale) found *= scale[place];
                search.take(which[at + i], found, place);
              }
            }
          }
        };
        const int64_t start = panels * s / slots, end_of_slot = panels * (s + 1) / slots;
        for (int64_t p = start; p < end_of_slot; ++p) {
          const int64_t first = p * 64, columns = std::min<int64_t>(64, n - first);
          W.rows(first, columns, buffer, feature);
          bool any = false;
          whole.clear();
          for (int64_t r = 0; r < count; ++r) {
            lines[r].wanted = screened[r] && !search.done(r) && search.bounded(r);
            lines[r].bound = lines[r].wanted ? search.bound(r) : 0;
            if (!search.done(r) && !lines[r].wanted) whole.push_back(uint16_t(r));
            any |= lines[r].wanted;
          }
          for (int64_t c = 0; c < columns; c += kWholeColumns) {
            compute(whole.data(), int64_t(whole.size()), first, c, std::min(kWholeColumns, columns - c));
          }
          if (!any) continue;
          ScreenColumns column = {};
          for (int64_t c = 0; c < columns; ++c) {
            Digits row;
            of_w.quantise(feature[c], scale_w.data(), d, width, bytes + c * width, row);
            column.step[c] = row.usable ? row.step : 0;
            column.norm[c] = row.usable ? row.norm * kWiden : std::numeric_limits<float>::quiet_NaN();
            column.error[c] = row.usable ? row.error * kWiden : 0;
            const float factor = scale ? scale[first + c] : 1;
            if (scale) multiply_column(column, c, factor);
            column.base[c] = b ? raised(b[first + c] * factor) : 0;
            if (threshold) column.base[c] += raised(-threshold[first + c]);
            column.offset[c] = row.usable ? -128 * row.sum : 0;
          }
          kernels<float>().pack(reinterpret_cast<const float*>(bytes), quads, columns, quads,
                                reinterpret_cast<float*>(panel));
          // The next features come from memory meanwhile.
          const int64_t coming = p + 1 < end_of_slot ? std::min<int64_t>(64, n - first - columns) : 0;
          int8.screen(codes.get(), width, lines.data(), count, panel, column, W.ahead(first + columns, coming),
                      pass.data());
          const uint64_t inside = columns == 64 ? ~uint64_t(0) : (uint64_t(1) << columns) - 1;
          int64_t hit[64] = {};
          for (int64_t r = 0; r < count; ++r) {
            for (uint64_t bits = lines[r].wanted ? pass[r] & inside : 0; bits; bits &= bits - 1) {
              const int c = __builtin_ctzll(bits);
              hits.get()[c * count + hit[c]++] = uint16_t(r);
            }
          }
          for (int64_t c = 0; c < columns; ++c) compute(hits.get() + c * count, hit[c], first, c, 1);
          // Computing more than this one by one costs more than computing the row whole.
          const int64_t most = 16 * expected + 512 + (p - start + 1) * 64 / 16;
          for (int64_t r = 0; r < count; ++r) screened[r] &= !lines[r].wanted || work[r] <= most;
        }
      }
    });
    for (int64_t s = 1; s < slots; ++s) {
      for (int64_t r = 0; r < count; ++r) computed[r] += computed[s * block + r];
    }
    finish(r0, count, computed.data());
  }
}

}  // namespace clipsteer
