// The softmaxes over a batch's pairs, relative to each one's own pair, and the gradients that their weights make.
#pragma once

#include "contrastive.h"
#include "scaled.h"

namespace clipsteer {

// The similarity of every pair.
template <class T>
void own_pairs(const T* rows, const T* cols, int64_t n, int64_t d, Compute<T>* diag) {
  using V = Compute<T>;
  constexpr int64_t kRows = 64;
  for_each((n + kRows - 1) / kRows, [&](int64_t begin, int64_t end) {
    Buffer<V> left(kNarrow<T> ? d : 0), right(kNarrow<T> ? d : 0);
    for (int64_t i = begin * kRows; i < std::min(n, end * kRows); ++i) {
      diag[i] = kernels<V>().dot(widened(rows + i * d, left.get(), d), widened(cols + i * d, right.get(), d), d);
    }
  });
}

// log of the sum of exp t of every row, and of every column over the rows here.
template <class T>
void log_sums(Pairs<T>& pairs, Compute<T>* kept, Compute<T>* row_lse, Compute<T>* col_lse) {
  using V = Compute<T>;
  const Sweep<T>& sweep = pairs.sweep;
  const V* own = pairs.diag;
  const V* peaks = pairs.peaks.get();
  Buffer<V> total(sweep.columns());
  V* sums = total.get();
  sum_pairs<1, T, 1>(
      {&pairs}, {kept}, {sums},
      [&](int64_t row, int64_t i, int64_t j, int64_t count, V* some) {
        *some = kernels<V>().pair_sums(pairs.S + i * sweep.stride() + j, own[pairs.offset + row],
                                       pairs.row_peaks.get()[i], own + j, peaks + j, pairs.scale, sums + j, count);
      },
      [&](int64_t row, int64_t i, const V* sum) {
        row_lse[row] = V(std::log(double(*sum)) + double(pairs.row_peaks.get()[i]));
      });
  for (int64_t j = 0; j < sweep.columns(); ++j) col_lse[j] = V(std::log(double(sums[j])) + double(peaks[j]));
}

// exp(t - u) of both sides, `own` on the partners.
template <class V>
struct Weights {
  const V* diag;
  V scale;
  int64_t offset;
  const V *row_u, *col_u, *own;
};

// With the weights w, w cols and w^T rows, of the first `width` numbers of each; the sum of w t. `packed`: see Sweep.
template <class T>
double gradients(Sweep<T>& sweep, const Weights<Compute<T>>& w, const Compute<T>* kept, int64_t width,
                 Compute<T>* d_rows, Compute<T>* d_cols, bool packed) {
  using V = Compute<T>;
  const int64_t stride = sweep.stride();
  std::vector<double> moments(sweep.tile_rows());
  double sum = 0;
  sweep.gradients(width, d_rows, d_cols, packed, [&](int64_t at, int64_t count, V* P) {
    if (!kept) sweep.similarities(at, count, P);
    sweep.each_row(count, [&](int64_t i) {
      const V* S = kept ? kept + (at + i) * stride : P + i * stride;
      const int64_t self = w.offset + at + i, starts[] = {0, self + 1}, ends[] = {self, sweep.columns()};
      moments[i] = 0;
      for (int side = 0; side < 2; ++side) {
        const int64_t j = starts[side];
        moments[i] += double(kernels<V>().pair_weights(S + j, P + i * stride + j, w.diag[self], w.row_u[at + i],
                                                       w.diag + j, w.col_u + j, w.scale, ends[side] - j));
      }
      P[i * stride + self] = w.own[at + i];
    });
    for (int64_t i = 0; i < count; ++i) sum += moments[i];
  });
  return sum;
}

// The pairs of one process's batch, of which no other knows. Log-sums lie by two lines, images first.
template <class T>
class Softmaxes {
 public:
  using V = Compute<T>;

  // `keep`: similarities stay for the gradients.
  Softmaxes(const T* rows, const T* cols, int64_t n, int64_t d, V scale, bool keep)
      : n_(n),
        scale_(scale),
        sweep_(rows, cols, n, n, d),
        diag_(n),
        lse_(2 * n),
        kept_(keep ? n * sweep_.stride() : 0) {
    own_pairs(rows, cols, n, d, diag_.get());
    Pairs<T> pairs(sweep_, diag_.get(), scale, 0);
    log_sums(pairs, kept_.get(), lse_.get(), lse_.get() + n);
  }

  const V* lse() { return lse_.get(); }

  double gradients(const V* u, const V* own, int64_t width, V* d_rows, V* d_cols) {
    const Weights<V> weights{diag_.get(), scale_, 0, u, u + n_, own};
    return clipsteer::gradients(sweep_, weights, kept_.get(), width, d_rows, d_cols, false);
  }

 private:
  const int64_t n_;
  const V scale_;
  Sweep<T> sweep_;
  Buffer<V> diag_, lse_, kept_;
};

// log(exp a + exp b)
inline double log_add(double a, double b) {
  if (a == b) return a + std::log(2.0);
  const double high = a > b ? a : b, low = a > b ? b : a;
  return high + std::log1p(std::exp(low - high));
}

// log(1 + exp x)
inline double log_one_and(double x) { return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }

}  // namespace clipsteer
