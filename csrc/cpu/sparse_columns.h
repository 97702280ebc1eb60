// The sums of sparse_sums.h where the dictionary lies by columns, (d, n), as that of a linear layer does.
//
// A row of W would be a line of cache for each of its elements. So W is read once, in order, a few of its columns at a
// time: these are laid side by side in a panel, a line a feature, that stays in cache while all pairs are added.
#pragma once

#include "sparse_sums.h"

namespace clipsteer {

constexpr int64_t kPanel = 16;     // columns of a panel
constexpr int64_t kStretch = 256;  // features at a time, of which a panel's lines fit the first-level cache

inline int64_t panels(int64_t d) { return (d + kPanel - 1) / kPanel; }

// Which lines of a panel the features of pairs have: all features their own, or, where few are in use, only these.
struct Lines {
  std::vector<int64_t> features;  // in use, ascending; empty: all
  std::vector<int32_t> line;      // of each pair
  int64_t count;

  Lines(const int64_t* indices, int64_t pairs, int64_t n) : line(pairs), count(n) {
    std::vector<int32_t> number(n, -1);
    int64_t used = 0;
    for (int64_t p = 0; p < pairs; ++p) used += std::exchange(number[indices[p]], 0);
    used = -used;
    const bool few = used * 4 < n;
    for (int64_t i = 0, at = 0; few && at < used; ++i) {
      if (number[i] < 0) continue;
      features.push_back(i);
      number[i] = int32_t(at++);
    }
    for (int64_t p = 0; p < pairs; ++p) line[p] = few ? number[indices[p]] : int32_t(indices[p]);
    if (few) count = used;
  }
};

// A panel: columns first to first + kPanel of W, a line a feature; zeros past the last column.
template <class T>
void fill_panel(const Weight<const T>& w, const Lines& lines, int64_t first, Compute<T>* panel) {
  using V = Compute<T>;
  const int64_t columns = std::min(kPanel, w.d - first);
  if (columns < kPanel) std::fill_n(panel, lines.count * kPanel, V(0));
  V wide[kNarrow<T> ? kPanel * kStretch : 1];
  for (int64_t s = 0; s < lines.count; s += kStretch) {
    const int64_t features = std::min(kStretch, lines.count - s);
    V* to = panel + s * kPanel;
    if (!lines.features.empty()) {
      for (int64_t c = 0; c < columns; ++c) {
        const T* column = w.data + (first + c) * w.n;
        for (int64_t i = 0; i < features; ++i) to[i * kPanel + c] = V(column[lines.features[s + i]]);
      }
    } else if constexpr (kNarrow<T>) {
      for (int64_t c = 0; c < columns; ++c) {
        kernels<T>().widen(w.data + (first + c) * w.n + s, wide + c * kStretch, features);
      }
      kernels<V>().turn(wide, kStretch, columns, features, to, kPanel);
    } else {
      kernels<V>().turn(w.data + first * w.n + s, w.n, columns, features, to, kPanel);
    }
  }
}

// The same columns of the rows of a batch.
template <class T>
void fill_rows(const T* rows, int64_t count, int64_t d, int64_t first, Compute<T>* panel) {
  const int64_t columns = std::min(kPanel, d - first);
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t c = 0; c < columns; ++c) panel[r * kPanel + c] = Compute<T>(rows[r * d + first + c]);
    for (int64_t c = columns; c < kPanel; ++c) panel[r * kPanel + c] = 0;
  }
}

template <class T>
void decode_columns(const Grouped<T>& codes, const Weight<const T>& w, const T* b, const Spans& spans, T* y) {
  using V = Compute<T>;
  const Kernels<V>& kernel = kernels<V>();
  const int64_t d = w.d, pairs = spans.begin(spans.rows);
  const Lines lines(codes.indices, pairs, w.n);
  std::vector<V> wide_acts(kNarrow<T> ? pairs : 0);
  const V* acts = widened(codes.acts, wide_acts.data(), pairs);
  torch::stable::parallel_for(0, panels(d), 1, [&](int64_t begin, int64_t end) {
    std::vector<V> panel(lines.count * kPanel);
    for (int64_t first = begin * kPanel; first < std::min(d, end * kPanel); first += kPanel) {
      fill_panel(w, lines, first, panel.data());
      const int64_t columns = std::min(kPanel, d - first);
      alignas(64) V bias[kPanel] = {};
      for (int64_t c = 0; b && c < columns; ++c) bias[c] = V(b[first + c]);
      for (int64_t r = 0; r < spans.rows; ++r) {
        alignas(64) V sum[kPanel] = {};
        int64_t p = spans.begin(r);
        for (int64_t g = 0; g < codes.groups; ++g) {
          for (const int64_t stop = codes.end(r, g); p < stop; p += kGathered) {
            const int terms = int(std::min<int64_t>(kGathered, stop - p));
            const V* source[kGathered];
            for (int m = 0; m < terms; ++m) source[m] = panel.data() + lines.line[p + m] * kPanel;
            kernel.add(sum, sum, acts + p, source, nullptr, terms, nullptr, kPanel);
          }
          p = codes.end(r, g);
          T* out = y + (g * spans.rows + r) * d + first;
          for (int64_t c = 0; c < columns; ++c) out[c] = T(sum[c] + bias[c]);
        }
      }
    }
  });
}

template <class T>
void dot_columns(const T* rows, const Pairs& pairs, const Weight<const T>& w, T* out) {
  using V = Compute<T>;
  // The columns are shared out between a fixed number of sums, so that no bit depends on the thread count.
  constexpr int64_t kSums = 8;
  // A pair's products are added up in so many parts, which the compiler keeps in one vector.
  constexpr int64_t kLanes = 4;
  const int64_t count = pairs.count, d = w.d, each = (panels(d) + kSums - 1) / kSums;
  std::vector<int64_t> row(count);
  int64_t last = 0;
  for (int64_t p = 0; p < count; ++p) {
    row[p] = pairs.row_of(p);
    last = std::max(last, row[p] + 1);
  }
  const Lines lines(pairs.feature, count, w.n);
  std::vector<V> partial(kSums * count);
  torch::stable::parallel_for(0, kSums, 1, [&](int64_t begin, int64_t end) {
    std::vector<V> panel(lines.count * kPanel), x(last * kPanel), sums(count * kLanes);
    for (int64_t s = begin; s < end; ++s) {
      std::fill(sums.begin(), sums.end(), V(0));
      for (int64_t first = s * each * kPanel; first < std::min(d, (s + 1) * each * kPanel); first += kPanel) {
        fill_panel(w, lines, first, panel.data());
        fill_rows(rows, last, d, first, x.data());
        for (int64_t p = 0; p < count; ++p) {
          if (row[p] < 0) continue;
          const V* of_row = x.data() + row[p] * kPanel;
          const V* of_feature = panel.data() + lines.line[p] * kPanel;
          V part[kLanes] = {};
          for (int64_t c = 0; c < kPanel; c += kLanes) {
            for (int64_t l = 0; l < kLanes; ++l) part[l] += of_row[c + l] * of_feature[c + l];
          }
          for (int64_t l = 0; l < kLanes; ++l) sums[p * kLanes + l] += part[l];
        }
      }
      for (int64_t p = 0; p < count; ++p) {
        const V* sum = sums.data() + p * kLanes;
        partial[s * count + p] = (sum[0] + sum[2]) + (sum[1] + sum[3]);
      }
    }
  });
  for (int64_t p = 0; p < count; ++p) {
    V total = 0;
    for (int64_t s = 0; s < kSums; ++s) total += partial[s * count + p];
    out[p] = T(total);
  }
}

template <class T>
void outer_columns(const Segments<T>& segments, const T* rows, int64_t count, const Weight<T>& dw, T* db) {
  using V = Compute<T>;
  const Kernels<V>& kernel = kernels<V>();
  const int64_t n = dw.n, d = dw.d, stretches = (n + kStretch - 1) / kStretch;
  const std::vector<V>& factor = segments.coeff;
  for (int64_t i = 0; i < n; ++i) {
    V total = 0;
    for (int64_t p = segments.start(i); p < segments.end[i]; ++p) total += factor[p];
    db[i] = T(total);
  }
  torch::stable::parallel_for(0, panels(d) * stretches, stretches, [&](int64_t begin, int64_t end) {
    std::vector<V> x(count * kPanel);
    std::vector<V> tile(kStretch * kPanel), turned(kPanel * kStretch);
    alignas(64) T narrow[kStretch];
    int64_t laid = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / stretches * kPanel, i0 = task % stretches * kStretch;
      const int64_t features = std::min(kStretch, n - i0), columns = std::min(kPanel, d - first);
      if (laid != first) fill_rows(rows, count, d, first, x.data());
      laid = first;
      std::fill(tile.begin(), tile.end(), V(0));
      for (int64_t i = i0; i < i0 + features; ++i) {
        for (int64_t p = segments.start(i); p < segments.end[i]; p += kGathered) {
          const int terms = int(std::min<int64_t>(kGathered, segments.end[i] - p));
          const V* source[kGathered];
          for (int m = 0; m < terms; ++m) source[m] = x.data() + segments.row[p + m] * kPanel;
          V* sum = tile.data() + (i - i0) * kPanel;
          kernel.add(sum, sum, factor.data() + p, source, nullptr, terms, nullptr, kPanel);
        }
      }
      kernel.turn(tile.data(), kPanel, features, columns, turned.data(), kStretch);
      for (int64_t column = 0; column < columns; ++column) {
        const void* line = turned.data() + column * kStretch;
        if constexpr (kNarrow<T>) {
          kernels<T>().narrow(turned.data() + column * kStretch, narrow, features);
          line = narrow;
        }
        stream_copy(dw.data + (first + column) * n + i0, line, features * sizeof(T));
      }
    }
    stream_fence();
  });
}

}  // namespace clipsteer
