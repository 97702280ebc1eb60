// Sums over pairs of a row and a feature, where the dictionary lies by rows: (n, d).
#pragma once

#include "cpu.h"
#include "stream.h"

#include <utility>

namespace clipsteer {

// Bytes of a result up to which whoever reads it next finds it in the cache; larger ones are written past it.
constexpr int64_t kCached = int64_t(8) << 20;

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

  // f(pair, its row) for all pairs in turn, without a division for each.
  template <class F>
  void each(F&& f) const {
    for (int64_t p = 0; row && p < count; ++p) f(p, row[p]);
    for (int64_t p = 0, r = 0; !row && p < count; ++r) {
      for (const int64_t stop = p + k; p < stop; ++p) f(p, r);
    }
  }
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

// The rows and coefficients of each feature's pairs, in ascending order of the pair: those of feature i at start(i) to
// end[i]. Pairs without a row are nobody's.
template <class T>
struct Segments {
  using V = Compute<T>;
  std::vector<int64_t> end, row;
  std::vector<V> coeff;

  Segments() = default;

  // Of all n features.
  Segments(const T* given, const Pairs& pairs, int64_t n) : end(n + 1, 0) {
    std::vector<V> wide(kNarrow<T> ? pairs.count : 0);
    const V* c = widened(given, wide.data(), pairs.count);
    pairs.each([&](int64_t p, int64_t r) { end[pairs.feature[p] + 1] += r >= 0; });
    for (int64_t i = 0; i < n; ++i) end[i + 1] += end[i];
    row.resize(end[n]);
    coeff.resize(end[n]);
    // Filling moves each feature's offset from the start of its run to the end of it.
    pairs.each([&](int64_t p, int64_t r) {
      if (r < 0) return;
      const int64_t place = end[pairs.feature[p]]++;
      row[place] = r;
      coeff[place] = c[p];
    });
  }

  int64_t start(int64_t i) const { return i == 0 ? 0 : end[i - 1]; }
};

// Of the features in use alone, which are listed, ascending: found by a sort by digits, whatever n is.
template <class T>
struct UsedSegments : Segments<T> {
  using V = Compute<T>;
  std::vector<int64_t> used;

  UsedSegments(const T* given, const Pairs& pairs, int64_t n) {
    std::vector<V> wide(kNarrow<T> ? pairs.count : 0);
    const V* c = widened(given, wide.data(), pairs.count);
    std::vector<Entry> entries(pairs.count), other(pairs.count);
    int64_t count = 0;
    pairs.each([&](int64_t p, int64_t r) {
      entries[count] = {pairs.feature[p], r, c[p]};
      count += r >= 0;
    });
    for (int shift = 0; n > 1 && (n - 1) >> shift; shift += kBits) {
      int64_t place[kDigits] = {}, at = 0;
      for (int64_t e = 0; e < count; ++e) ++place[entries[e].feature >> shift & (kDigits - 1)];
      for (int64_t& first : place) at += std::exchange(first, at);
      for (int64_t e = 0; e < count; ++e) other[place[entries[e].feature >> shift & (kDigits - 1)]++] = entries[e];
      std::swap(entries, other);
    }
    this->row.resize(count);
    this->coeff.resize(count);
    this->end.reserve(count);
    used.reserve(count);
    for (int64_t e = 0; e < count; ++e) {
      this->row[e] = entries[e].row;
      this->coeff[e] = entries[e].coeff;
      if (e + 1 < count && entries[e + 1].feature == entries[e].feature) continue;
      used.push_back(entries[e].feature);
      this->end.push_back(e + 1);
    }
  }

 private:
  static constexpr int kBits = 8, kDigits = 1 << kBits;
  struct Entry {
    int64_t feature, row;
    V coeff;
  };
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

// A sum of rows as it grows, in `n` numbers of memory that it is lent.
template <class T>
class Running {
 public:
  using V = Compute<T>;
  Running(const Kernels<T>& kernel, V* sum, int64_t n) : kernel_(kernel), sum_(sum), n_(n) {}

  void add(const V* c, const Terms<T>& of, int terms) {
    kernel_.add(sum_, begun_ ? sum_ : nullptr, c, of.row, of.next, terms, nullptr, n_);
    begun_ = true;
  }

  // The sum with these rows, and the bias, as numbers T. It is as it was.
  void finish(T* out, const V* c, const Terms<T>& of, int terms, const T* bias = nullptr) const {
    kernel_.finish(out, begun_ ? sum_ : nullptr, c, of.row, of.next, terms, bias, n_);
  }

 private:
  const Kernels<T>& kernel_;
  V* sum_;
  int64_t n_;
  bool begun_ = false;
};

// y[g, r] is row r's sum over the first g + 1 groups: each goes on where the last one stopped.
template <class T>
void decode_rows(const Grouped<T>& codes, const Weight<const T>& w, const T* b, const Spans& spans, T* y) {
  using V = Compute<T>;
  // Columns worked on at a time, whose sums stay in the first-level cache.
  constexpr int64_t kTile = 16384 / sizeof(V);
  // A large result is not to push the rows of W out of the cache.
  const bool past_cache = codes.groups * spans.rows * w.d * int64_t(sizeof(T)) > kCached;
  const Kernels<T>& kernel = kernels<T>();
  const int64_t d = w.d, rows = spans.rows, pairs = spans.begin(rows);
  const int64_t mean = rows ? pairs / rows : 0;
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, mean * d));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    alignas(64) V sum[kTile];
    alignas(64) T line[kTile];
    std::vector<V> wide_acts;
    for (int64_t r = begin; r < end; ++r) {
      const int64_t first = spans.begin(r), last = spans.end(r);
      if (kNarrow<T>) wide_acts.resize(last - first);
      const V* c = widened(codes.acts + first, wide_acts.data(), last - first);
      for (int64_t c0 = 0; c0 < d; c0 += kTile) {
        const int64_t columns = std::min(kTile, d - c0);
        // indices is one run over all rows of the batch: after the last of this row come the first of the next.
        const auto row_of = [&](int64_t p) { return w.data + codes.indices[p] * d + c0; };
        Running<T> running(kernel, sum, columns);
        int64_t p = first;
        for (int64_t g = 0; g < codes.groups; ++g) {
          // the last rows of all are added as the sum is written; those of a shorter prefix go on into the next
          const int64_t stop = codes.end(r, g), kept = g + 1 < codes.groups ? 0 : kGathered;
          while (stop - p > kept) {
            const int terms = int(std::min<int64_t>(kGathered, stop - p));
            running.add(c + (p - first), Terms<T>(p, terms, pairs, row_of), terms);
            p += terms;
          }
          const int terms = int(stop - p);
          T* out = y + (g * rows + r) * d + c0;
          const Terms<T> of(p, terms, pairs, row_of);
          running.finish(past_cache ? line : out, c + (p - first), of, terms, b ? b + c0 : nullptr);
          if (past_cache) stream_copy(out, line, columns * sizeof(T));
          p = stop;
        }
      }
    }
    if (past_cache) stream_fence();
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
void outer_rows(const Segments<T>& segments, const T* rows, const Weight<T>& dw, T* db) {
  using V = Compute<T>;
  const Kernels<T>& kernel = kernels<T>();
  const int64_t n = dw.n, d = dw.d, pairs = segments.end[n - 1];
  const bool past_cache = n * d * int64_t(sizeof(T)) > kCached;
  const auto row_of = [&](int64_t place) { return rows + segments.row[place] * d; };

  // Parts of equal work, a row written and a pair added counting alike.
  const int64_t parts = std::min<int64_t>(n, torch::stable::get_num_threads());
  std::vector<int64_t> bounds(parts + 1, n);
  for (int64_t part = 0, i = 0; part < parts; ++part) {
    while (i < n && (i + segments.start(i)) * parts < (n + pairs) * part) ++i;
    bounds[part] = i;
  }
  std::vector<V> totals(n);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<V> sum(d);
    std::vector<T> line(past_cache ? d : 0);
    for (int64_t i = bounds[begin]; i < bounds[end];) {
      int64_t p = segments.start(i);
      const int64_t last = segments.end[i];
      if (p == last) {
        const int64_t from = i;
        while (i < bounds[end] && segments.end[i] == last) ++i;
        stream_zero(dw.data + from * d, (i - from) * d * sizeof(T));
        continue;
      }
      for (int64_t q = p; q < last; ++q) totals[i] += segments.coeff[q];
      Running<T> running(kernel, sum.data(), d);
      for (; last - p > kGathered; p += kGathered) {
        running.add(segments.coeff.data() + p, Terms<T>(p, kGathered, pairs, row_of), kGathered);
      }
      const int terms = int(last - p);
      T* out = past_cache ? line.data() : dw.data + i * d;
      running.finish(out, segments.coeff.data() + p, Terms<T>(p, terms, pairs, row_of), terms);
      if (past_cache) stream_copy(dw.data + i * d, out, d * sizeof(T));
      ++i;
    }
    stream_fence();
  });
  store<T>(totals.data(), db, n);
}

}  // namespace clipsteer
