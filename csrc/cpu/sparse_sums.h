// Sums over pairs of a row and a feature, where the dictionary lies by rows: (n, d).
#pragma once

#include "cpu.h"
#include "stream.h"

#include <utility>

namespace clipsteer {

// A dictionary of n features of width d; `across`: it lies as (d, n).
template <class T>
struct Weight {
  T* data;
  int64_t n, d;
  bool across;
};

// Pair p is of feature[p] and of row[p], -1 for none, or, where no rows are listed, of row p / k.
struct Pairs {
  const int64_t* feature;
  const int64_t* row;
  int64_t count, k;
  int64_t row_of(int64_t p) const { return row ? row[p] : p / k; }
};

// Where the pairs of each row are: `k` a row, or by offsets, of which no more than `pairs` are there.
struct Spans {
  int64_t rows, k, pairs;
  const int64_t* offsets;
  int64_t begin(int64_t r) const { return offsets ? std::min(offsets[r], pairs) : r * k; }
  int64_t end(int64_t r) const { return begin(r + 1); }
};

// The pairs of each row, those of the features below the first prefix before those below the second, and so on; within
// a group in the order given.
template <class T>
class Grouped {
 public:
  const T* acts;
  const int64_t* indices;
  const int64_t groups;

  Grouped(const T* acts, const int64_t* indices, const Spans& spans, const std::vector<int64_t>& prefixes)
      : acts(acts), indices(indices), groups(int64_t(prefixes.size())), spans_(spans) {
    if (groups == 1) return;
    const int64_t pairs = spans.begin(spans.rows);
    ends_.resize(spans.rows * groups);
    moved_acts_.resize(pairs);
    moved_indices_.resize(pairs);
    std::vector<int64_t> group(pairs);
    for (int64_t r = 0; r < spans.rows; ++r) {
      int64_t* end = ends_.data() + r * groups;
      const int64_t first = spans.begin(r), last = spans.end(r);
      for (int64_t p = first; p < last; ++p) {
        group[p] = std::upper_bound(prefixes.begin(), prefixes.end(), indices[p]) - prefixes.begin();
        ++end[group[p]];
      }
      // each group's number becomes where it starts, and then, as it is filled, where it ends
      for (int64_t g = 0, at = first; g < groups; ++g) at += std::exchange(end[g], at);
      for (int64_t p = first; p < last; ++p) {
        const int64_t to = end[group[p]]++;
        moved_acts_[to] = acts[p];
        moved_indices_[to] = indices[p];
      }
    }
    this->acts = moved_acts_.data();
    this->indices = moved_indices_.data();
  }

  int64_t end(int64_t r, int64_t g) const { return ends_.empty() ? spans_.end(r) : ends_[r * groups + g]; }

 private:
  const Spans& spans_;
  std::vector<int64_t> ends_, moved_indices_;
  std::vector<T> moved_acts_;
};

// The pairs of feature i, in ascending order: order[start(i)] to order[end[i]]. Pairs without a row are nobody's.
struct Segments {
  std::vector<int64_t> end, order;

  Segments(const Pairs& pairs, int64_t n) : end(n + 1, 0), order(pairs.count) {
    for (int64_t p = 0; p < pairs.count; ++p) end[pairs.feature[p] + 1] += pairs.row_of(p) >= 0;
    for (int64_t i = 0; i < n; ++i) end[i + 1] += end[i];
    // Filling moves each feature's offset from the start of its run to the end of it.
    for (int64_t p = 0; p < pairs.count; ++p) {
      if (pairs.row_of(p) >= 0) order[end[pairs.feature[p]]++] = p;
    }
  }

  int64_t start(int64_t i) const { return i == 0 ? 0 : end[i - 1]; }
};

template <class T>
void store(const Compute<T>* src, T* dst, int64_t n) {
  if constexpr (kNarrow<T>) {
    kernels<T>().narrow(src, dst, n);
  } else {
    std::copy_n(src, n, dst);
  }
}

// The rows of a matrix that belong to pairs from `first` on, and those that will be read kGathered pairs later; `row_of`
// knows the row of a pair, of which there are `pairs`.
template <class T>
struct Terms {
  const T *row[kGathered], *next[kGathered];

  template <class F>
  Terms(int64_t first, int terms, int64_t pairs, F&& row_of) {
    for (int m = 0; m < terms; ++m) {
      row[m] = row_of(first + m);
      next[m] = row_of(std::min(first + kGathered + m, pairs - 1));
    }
  }
};

// y[g, r] is row r's sum over the first g + 1 groups: each goes on where the last one stopped.
template <class T>
void decode_rows(const Grouped<T>& codes, const Weight<const T>& w, const T* b, const Spans& spans, T* y) {
  using V = Compute<T>;
  // Columns worked on at a time, whose sums stay in the first-level cache.
  constexpr int64_t kTile = 16384 / sizeof(V);
  const Kernels<T>& kernel = kernels<T>();
  const int64_t d = w.d, rows = spans.rows, pairs = spans.begin(rows);
  const int64_t mean = rows ? pairs / rows : 0;
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, mean * d));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    alignas(64) V sum[kTile];
    alignas(64) V total[kTile];
    std::vector<V> wide_acts;
    const V one = 1;
    for (int64_t r = begin; r < end; ++r) {
      const int64_t first = spans.begin(r), last = spans.end(r);
      if (kNarrow<T>) wide_acts.resize(last - first);
      const V* c = widened(codes.acts + first, wide_acts.data(), last - first);
      for (int64_t c0 = 0; c0 < d; c0 += kTile) {
        const int64_t columns = std::min(kTile, d - c0);
        // indices is one run over all rows of the batch: after the last of this row come the first of the next.
        const auto row_of = [&](int64_t p) { return w.data + codes.indices[p] * d + c0; };
        std::fill_n(sum, columns, V(0));
        int64_t p = first;
        for (int64_t g = 0; g < codes.groups; ++g) {
          for (const int64_t stop = codes.end(r, g); p < stop;) {
            const int terms = int(std::min<int64_t>(kGathered, stop - p));
            const Terms<T> of(p, terms, pairs, row_of);
            kernel.axpy(sum, c + (p - first), of.row, of.next, terms, columns);
            p += terms;
          }
          V* out = g + 1 < codes.groups ? total : sum;
          if (out == total) std::copy_n(sum, columns, total);
          if (b) {
            const T* bias = b + c0;
            kernel.axpy(out, &one, &bias, nullptr, 1, columns);
          }
          store<T>(out, y + (g * rows + r) * d + c0, columns);
        }
      }
    }
  });
}

// out[p] = <rows[row_of(p)], W[feature[p]]>; a pair without a row has 0.
template <class T>
void dot_rows(const T* rows, const Pairs& pairs, const Weight<const T>& w, T* out) {
  using V = Compute<T>;
  const Kernels<T>& kernel = kernels<T>();
  const int64_t d = w.d;
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, d));
  const auto feature_of = [&](int64_t p) { return w.data + pairs.feature[p] * d; };
  torch::stable::parallel_for(0, pairs.count, grain, [&](int64_t begin, int64_t end) {
    std::vector<V> wide_row(kNarrow<T> ? d : 0), buffer(end - begin);
    const V* row = nullptr;
    int64_t current = -1;
    for (int64_t p = begin; p < end;) {
      const int64_t r = pairs.row_of(p);
      if (r < 0) {
        ++p;
        continue;
      }
      if (r != current) row = widened(rows + r * d, wide_row.data(), d);
      current = r;
      int terms = 1;
      while (terms < kGathered && p + terms < end && pairs.row_of(p + terms) == r) ++terms;
      const Terms<T> of(p, terms, pairs.count, feature_of);
      kernel.row_dots(row, of.row, of.next, terms, d, buffer.data() + (p - begin));
      p += terms;
    }
    store<T>(buffer.data(), out + begin, end - begin);
  });
}

// dW[i] = sum of coeff * row over the pairs of feature i, in ascending order of the pair: one writer and one order
// for each element, whatever the thread count. Features without a pair are zeroed by the same pass.
template <class T>
void outer_rows(const T* coeff, const Pairs& pairs, const T* rows, const Weight<T>& dw, T* db) {
  using V = Compute<T>;
  const Kernels<T>& kernel = kernels<T>();
  const int64_t n = dw.n, d = dw.d;
  const Segments segments(pairs, n);
  std::vector<V> wide_coeff(kNarrow<T> ? pairs.count : 0);
  const V* c = widened(coeff, wide_coeff.data(), pairs.count);
  const auto row_of = [&](int64_t place) { return rows + pairs.row_of(segments.order[place]) * d; };

  // Parts of equal work, a row written and a pair added counting alike.
  const int64_t parts = std::min<int64_t>(n, torch::stable::get_num_threads());
  std::vector<int64_t> bounds(parts + 1, n);
  for (int64_t part = 0, i = 0; part < parts; ++part) {
    while (i < n && (i + segments.start(i)) * parts < (n + pairs.count) * part) ++i;
    bounds[part] = i;
  }
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<V> sum(d);
    std::vector<T> narrow(kNarrow<T> ? d : 0);
    for (int64_t i = bounds[begin]; i < bounds[end];) {
      int64_t p = segments.start(i);
      const int64_t last = segments.end[i];
      if (p == last) {
        const int64_t from = i;
        while (i < bounds[end] && segments.end[i] == last) ++i;
        stream_zero(dw.data + from * d, (i - from) * d * sizeof(T));
        stream_zero(db + from, (i - from) * sizeof(T));
        continue;
      }
      std::fill(sum.begin(), sum.end(), V(0));
      V total = 0;
      while (p < last) {
        const int terms = int(std::min<int64_t>(kGathered, last - p));
        const Terms<T> of(p, terms, segments.end[n - 1], row_of);
        V factor[kGathered];
        for (int m = 0; m < terms; ++m) {
          factor[m] = c[segments.order[p + m]];
          total += factor[m];
        }
        kernel.axpy(sum.data(), factor, of.row, of.next, terms, d);
        p += terms;
      }
      if constexpr (kNarrow<T>) {
        kernels<T>().narrow(sum.data(), narrow.data(), d);
        stream_copy(dw.data + i * d, narrow.data(), d * sizeof(T));
      } else {
        stream_copy(dw.data + i * d, sum.data(), d * sizeof(T));
      }
      store<T>(&total, db + i, 1);
      ++i;
    }
    stream_fence();
  });
}

}  // namespace clipsteer
