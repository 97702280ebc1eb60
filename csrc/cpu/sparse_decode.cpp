// sparse_decode (a weighted gather of rows of W) and the two ops its gradients are made of.
#include "cpu.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace clipsteer {
namespace {

using torch::stable::parallel_for;

// Columns worked on at a time: four widened rows and the sums stay in the first-level cache.
constexpr int64_t kTile = 1024;

constexpr int64_t kAhead = 4;

// Written past the cache: these rows are not read again soon, and a line need not be fetched to be overwritten.
void stream_zero(void* dst, int64_t bytes) {
  char* p = static_cast<char*>(dst);
#if defined(__SSE2__)
  const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<uintptr_t>(p) & 63);
  std::memset(p, 0, head);
  p += head;
  bytes -= head;
  const __m128i zero = _mm_setzero_si128();
  for (; bytes >= 64; p += 64, bytes -= 64) {
    for (int i = 0; i < 64; i += 16) _mm_stream_si128(reinterpret_cast<__m128i*>(p + i), zero);
  }
#endif
  std::memset(p, 0, bytes);
}

void stream_copy(void* dst, const void* src, int64_t bytes) {
  char* p = static_cast<char*>(dst);
  const char* q = static_cast<const char*>(src);
#if defined(__SSE2__)
  const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<uintptr_t>(p) & 63);
  std::memcpy(p, q, head);
  p += head;
  q += head;
  bytes -= head;
  for (; bytes >= 64; p += 64, q += 64, bytes -= 64) {
    for (int i = 0; i < 64; i += 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(p + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(q + i)));
    }
  }
#endif
  std::memcpy(p, q, bytes);
}

inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// A fresh 151 MB costs more in 4 KiB page faults than in arithmetic; this is only a hint.
void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t(2) << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + 4095) & ~uintptr_t(4095);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~uintptr_t(4095);
  if (end > begin && end - begin >= 4 * kHuge) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

template <class T>
void store(const Compute<T>* src, T* dst, int64_t n) {
  if constexpr (kNarrow<T>) {
    kernels<T>().narrow(src, dst, n);
  } else {
    std::copy_n(src, n, dst);
  }
}

// Where the pairs of each row are: `k` a row, or by offsets, of which no more than `pairs` are there.
struct Spans {
  int64_t rows, k, pairs;
  const int64_t* offsets;
  int64_t begin(int64_t r) const { return offsets ? std::min(offsets[r], pairs) : r * k; }
  int64_t end(int64_t r) const { return begin(r + 1); }
};

// y[g] is the sum over the features below prefix[g], of which there are `groups`; with more than one a row's features
// ascend, so that each sum goes on where the last one stopped.
template <class T>
void decode(const T* acts, const int64_t* indices, const T* w, const T* b, const Spans& spans, int64_t d,
            const int64_t* prefix, int64_t groups, T* y) {
  using V = Compute<T>;
  const Kernels<V>& kernel = kernels<V>();
  const int64_t rows = spans.rows, last_pair = spans.begin(rows);
  const int64_t mean = rows ? last_pair / rows : 0;
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, mean * d));
  parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    alignas(64) V sum[kTile];
    alignas(64) V total[kTile];
    alignas(64) V wide[kNarrow<T> ? 4 * kTile : 1];
    std::vector<V> wide_acts;
    const V one = 1;
    for (int64_t r = begin; r < end; ++r) {
      const int64_t first = spans.begin(r), k = spans.end(r) - first;
      if (kNarrow<T>) wide_acts.resize(k);
      const V* c = widened(acts + first, wide_acts.data(), k);
      const int64_t* index = indices + first;
      for (int64_t c0 = 0; c0 < d; c0 += kTile) {
        const int64_t columns = std::min(kTile, d - c0);
        std::fill_n(sum, columns, V(0));
        int64_t j = 0;
        for (int64_t g = 0; g < groups; ++g) {
          int64_t stop = k;
          if (g + 1 < groups) stop = std::lower_bound(index + j, index + k, prefix[g]) - index;
          while (j < stop) {
            const int terms = int(std::min<int64_t>(4, stop - j));
            const V* source[4];
            Ahead next{{}, sizeof(T)};
            // indices is one run over all rows of the batch: after the last of this row come the first of the next.
            const bool more = last_pair - (first + j) >= 8;
            for (int m = 0; m < terms; ++m) {
              source[m] = widened(w + index[j + m] * d + c0, wide + (kNarrow<T> ? m * kTile : 0), columns);
            }
            for (int m = 0; m < 4 && more; ++m) {
              next.row[m] = reinterpret_cast<const char*>(w + index[j + 4 + m] * d + c0);
            }
            kernel.axpy(sum, c + j, source, more ? &next : nullptr, terms, columns);
            j += terms;
          }
          V* out = g + 1 < groups ? total : sum;
          if (out == total) std::copy_n(sum, columns, total);
          if (b) {
            const V* bias = widened(b + c0, wide, columns);
            kernel.axpy(out, &one, &bias, nullptr, 1, columns);
          }
          store<T>(out, y + (g * rows + r) * d + c0, columns);
        }
      }
    }
  });
}

// out[p] = <rows[row_of(p)], W[indices[p]]>; a pair without a row has 0.
template <class T, class RowOf>
void dots(const T* rows, RowOf row_of, const int64_t* indices, const T* w, int64_t pairs, int64_t d, T* out) {
  using V = Compute<T>;
  const Kernels<V>& kernel = kernels<V>();
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, d));
  parallel_for(0, pairs, grain, [&](int64_t begin, int64_t end) {
    std::vector<V> wide_row(kNarrow<T> ? d : 0), wide_w(kNarrow<T> ? d : 0), buffer(end - begin);
    const V* row = nullptr;
    int64_t current = -1;
    for (int64_t p = begin; p < end; ++p) {
      const int64_t r = row_of(p);
      if (r < 0) continue;
      if (r != current) row = widened(rows + r * d, wide_row.data(), d);
      current = r;
      const bool more = p + kAhead < pairs;
      const Ahead next{{more ? reinterpret_cast<const char*>(w + indices[p + kAhead] * d) : nullptr}, sizeof(T)};
      const V* feature = widened(w + indices[p] * d, wide_w.data(), d);
      buffer[p - begin] = kernel.dot(row, feature, more ? &next : nullptr, d);
    }
    store<T>(buffer.data(), out + begin, end - begin);
  });
}

// dW[i] = sum of coeff * row over the pairs of feature i, in ascending order of the pair: one writer and one order
// for each element, whatever the thread count. Rows without a pair are zeroed by the same pass.
template <class T, class RowOf>
void outer(const T* coeff, const int64_t* indices, RowOf row_of, int64_t pairs, const T* rows, int64_t count, int64_t d,
           int64_t n, T* dw, T* db) {
  using V = Compute<T>;
  const Kernels<V>& kernel = kernels<V>();
  std::vector<int64_t> end_of(n + 1, 0), order(pairs);
  for (int64_t p = 0; p < pairs; ++p) end_of[indices[p] + 1] += row_of(p) >= 0;
  for (int64_t i = 0; i < n; ++i) end_of[i + 1] += end_of[i];
  // Filling moves each feature's offset from the start of its run to the end of it.
  for (int64_t p = 0; p < pairs; ++p) {
    if (row_of(p) >= 0) order[end_of[indices[p]]++] = p;
  }
  const auto start_of = [&](int64_t i) { return i == 0 ? 0 : end_of[i - 1]; };

  std::vector<V> wide_rows(kNarrow<T> ? count * d : 0), wide_coeff(kNarrow<T> ? pairs : 0);
  const V* x = widened(rows, wide_rows.data(), count * d);
  const V* c = widened(coeff, wide_coeff.data(), pairs);

  // Parts of equal work, a row written and a pair added counting alike.
  const int64_t parts = std::min<int64_t>(n, torch::stable::get_num_threads());
  std::vector<int64_t> bounds(parts + 1, n);
  for (int64_t part = 0, i = 0; part < parts; ++part) {
    while (i < n && (i + start_of(i)) * parts < (n + pairs) * part) ++i;
    bounds[part] = i;
  }
  parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<V> sum(d);
    std::vector<T> narrow(kNarrow<T> ? d : 0);
    for (int64_t i = bounds[begin]; i < bounds[end];) {
      int64_t p = start_of(i);
      const int64_t last = end_of[i];
      if (p == last) {
        const int64_t from = i;
        while (i < bounds[end] && end_of[i] == last) ++i;
        stream_zero(dw + from * d, (i - from) * d * sizeof(T));
        stream_zero(db + from, (i - from) * sizeof(T));
        continue;
      }
      std::fill(sum.begin(), sum.end(), V(0));
      V total = 0;
      for (; p < last; p += 4) {
        const int terms = int(std::min<int64_t>(4, last - p));
        const V* source[4];
        V factor[4];
        for (int m = 0; m < terms; ++m) {
          factor[m] = c[order[p + m]];
          source[m] = x + row_of(order[p + m]) * d;
          total += factor[m];
        }
        kernel.axpy(sum.data(), factor, source, nullptr, terms, d);
      }
      if constexpr (kNarrow<T>) {
        kernels<T>().narrow(sum.data(), narrow.data(), d);
        stream_copy(dw + i * d, narrow.data(), d * sizeof(T));
      } else {
        stream_copy(dw + i * d, sum.data(), d * sizeof(T));
      }
      store<T>(&total, db + i, 1);
      ++i;
    }
    stream_fence();
  });
}

}  // namespace

Tensor sparse_decode(Tensor acts, Tensor indices, Tensor w, std::optional<Tensor> b) {
  const char* op = "sparse_decode";
  check_dim(op, "acts", acts, 2);
  check_dim(op, "W", w, 2);
  const int64_t rows = acts.size(0), k = acts.size(1), n = w.size(0), d = w.size(1);
  const ScalarType dtype = acts.scalar_type();
  check(op, "acts", acts, dtype, {rows, k});
  check(op, "indices", indices, ScalarType::Long, {rows, k});
  check(op, "W", w, dtype, {n, d});
  if (b) check(op, "b", *b, dtype, {d});
  check_indices(op, data<int64_t>(indices), rows * k, n);
  const int64_t sizes[] = {rows, d};
  Tensor y = torch::stable::new_empty(acts, {sizes, 2});
  dispatch(op, dtype, [&](auto zero) {
    using T = decltype(zero);
    const Spans spans{rows, k, rows * k, nullptr};
    decode<T>(data<T>(acts), data<int64_t>(indices), data<T>(w), b ? data<T>(*b) : nullptr, spans, d, nullptr, 1,
              data<T>(y));
  });
  return y;
}

Tensor gather_dot(Tensor rows, Tensor indices, Tensor w) {
  const char* op = "gather_dot";
  check_dim(op, "rows", rows, 2);
  check_dim(op, "indices", indices, 2);
  check_dim(op, "W", w, 2);
  const int64_t count = rows.size(0), d = rows.size(1), k = indices.size(1), n = w.size(0);
  const ScalarType dtype = rows.scalar_type();
  check(op, "rows", rows, dtype, {count, d});
  check(op, "indices", indices, ScalarType::Long, {count, k});
  check(op, "W", w, dtype, {n, d});
  check_indices(op, data<int64_t>(indices), count * k, n);
  const int64_t sizes[] = {count, k};
  Tensor out = torch::stable::new_empty(rows, {sizes, 2});
  dispatch(op, dtype, [&](auto zero) {
    using T = decltype(zero);
    dots<T>(data<T>(rows), [k](int64_t p) { return p / k; }, data<int64_t>(indices), data<T>(w), count * k, d,
            data<T>(out));
  });
  return out;
}

void sparse_outer_out(Tensor coeff, Tensor indices, Tensor rows, Tensor dw, Tensor db) {
  const char* op = "sparse_outer";
  check_dim(op, "coeff", coeff, 2);
  check_dim(op, "rows", rows, 2);
  check_dim(op, "dW", dw, 2);
  const int64_t count = coeff.size(0), k = coeff.size(1), d = rows.size(1), n = dw.size(0);
  const ScalarType dtype = coeff.scalar_type();
  check(op, "coeff", coeff, dtype, {count, k});
  check(op, "indices", indices, ScalarType::Long, {count, k});
  check(op, "rows", rows, dtype, {count, d});
  check(op, "dW", dw, dtype, {n, d});
  check(op, "db", db, dtype, {n});
  check_indices(op, data<int64_t>(indices), count * k, n);
  if (n == 0) return;
  dispatch(op, dtype, [&](auto zero) {
    using T = decltype(zero);
    outer<T>(data<T>(coeff), data<int64_t>(indices), [k](int64_t p) { return p / k; }, count * k, data<T>(rows), count,
             d, n, data<T>(dw), data<T>(db));
  });
}

std::tuple<Tensor, Tensor> sparse_outer(Tensor coeff, Tensor indices, Tensor rows, int64_t n) {
  check_dim("sparse_outer", "rows", rows, 2);
  require(n >= 0, "sparse_outer", "expected n >= 0, got " + std::to_string(n));
  const int64_t sizes[] = {n, rows.size(1)};
  Tensor dw = torch::stable::new_empty(coeff, {sizes, 2});
  Tensor db = torch::stable::new_empty(coeff, {sizes, 1});
  prefer_huge_pages(dw.data_ptr(), dw.numel() * int64_t(dw.element_size()));
  sparse_outer_out(coeff, indices, rows, dw, db);
  return {dw, db};
}

Tensor ragged_decode(Tensor values, Tensor indices, Tensor offsets, Tensor w, std::optional<Tensor> b,
                    std::vector<int64_t> prefixes) {
  const char* op = "ragged_decode";
  check_dim(op, "values", values, 1);
  check_dim(op, "offsets", offsets, 1);
  check_dim(op, "W", w, 2);
  const int64_t pairs = values.size(0), rows = offsets.size(0) - 1, n = w.size(0), d = w.size(1);
  const int64_t groups = int64_t(prefixes.size());
  const ScalarType dtype = values.scalar_type();
  require(rows >= 0 && groups > 0, op, "expected offsets of rows + 1 numbers, and a prefix");
  check(op, "values", values, dtype, {pairs});
  check(op, "indices", indices, ScalarType::Long, {pairs});
  check(op, "offsets", offsets, ScalarType::Long, {rows + 1});
  check(op, "W", w, dtype, {n, d});
  if (b) check(op, "b", *b, dtype, {d});
  const int64_t* at = data<int64_t>(offsets);
  check_indices(op, data<int64_t>(indices), pairs, std::max<int64_t>(n, 1));
  require(at[0] >= 0, op, "expected offsets from 0 on");
  for (int64_t r = 0; r < rows; ++r) require(at[r] <= at[r + 1], op, "expected ascending offsets");
  require(n > 0 || std::min(at[rows], pairs) == 0, op, "expected features, as there are codes");
  const int64_t sizes[] = {groups, rows, d};
  Tensor y = torch::stable::new_empty(values, {sizes, 3});
  dispatch(op, dtype, [&](auto zero) {
    using T = decltype(zero);
    const Spans spans{rows, 0, pairs, at};
    decode<T>(data<T>(values), data<int64_t>(indices), data<T>(w), b ? data<T>(*b) : nullptr, spans, d,
              prefixes.data(), groups, data<T>(y));
  });
  return y;
}

namespace {

// Pairs and the rows of a matrix that they name, -1 for none.
void check_pairs(const char* op, const Tensor& row_of, const Tensor& indices, const Tensor& rows, int64_t n) {
  check_dim(op, "indices", indices, 1);
  check_dim(op, "rows", rows, 2);
  check(op, "indices", indices, ScalarType::Long, {indices.size(0)});
  check(op, "row_of", row_of, ScalarType::Long, {indices.size(0)});
  check(op, "rows", rows, rows.scalar_type(), {rows.size(0), rows.size(1)});
  const int64_t pairs = indices.size(0), count = rows.size(0);
  check_indices(op, data<int64_t>(indices), pairs, n);
  const int64_t* row = data<int64_t>(row_of);
  for (int64_t p = 0; p < pairs; ++p) {
    if (row[p] < -1 || row[p] >= count) {
      throw std::out_of_range(std::string(op) + ": row " + std::to_string(row[p]) + " is out of range [-1, " +
                              std::to_string(count) + ")");
    }
  }
}

}  // namespace

Tensor ragged_dot(Tensor rows, Tensor row_of, Tensor indices, Tensor w) {
  const char* op = "ragged_dot";
  check_dim(op, "W", w, 2);
  const int64_t n = w.size(0), d = w.size(1);
  check_pairs(op, row_of, indices, rows, n);
  check(op, "W", w, rows.scalar_type(), {n, rows.size(1)});
  const int64_t pairs = indices.size(0);
  Tensor out = torch::stable::new_empty(rows, {&pairs, 1});
  dispatch(op, rows.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const int64_t* row = data<int64_t>(row_of);
    dots<T>(data<T>(rows), [row](int64_t p) { return row[p]; }, data<int64_t>(indices), data<T>(w), pairs, d,
            data<T>(out));
  });
  return out;
}

std::tuple<Tensor, Tensor> ragged_outer(Tensor coeff, Tensor indices, Tensor row_of, Tensor rows, int64_t n) {
  const char* op = "ragged_outer";
  require(n >= 0, op, "expected n >= 0, got " + std::to_string(n));
  check_pairs(op, row_of, indices, rows, n);
  const int64_t pairs = indices.size(0), count = rows.size(0), d = rows.size(1);
  check(op, "coeff", coeff, rows.scalar_type(), {pairs});
  const int64_t sizes[] = {n, d};
  Tensor dw = torch::stable::new_empty(rows, {sizes, 2});
  Tensor db = torch::stable::new_empty(rows, {sizes, 1});
  if (n == 0) return {dw, db};
  prefer_huge_pages(dw.data_ptr(), dw.numel() * int64_t(dw.element_size()));
  dispatch(op, rows.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const int64_t* row = data<int64_t>(row_of);
    outer<T>(data<T>(coeff), data<int64_t>(indices), [row](int64_t p) { return row[p]; }, pairs, data<T>(rows), count,
             d, n, data<T>(dw), data<T>(db));
  });
  return {dw, db};
}

}  // namespace clipsteer
