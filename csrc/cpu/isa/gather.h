// Weighted sums of rows, and products with rows, that lie anywhere in memory; 16-bit ones are read
// as they are. Several rows at a time keep as many places of memory on their way; included by
// table.h. No include guard on purpose.

namespace clipsteer::ISA {

// Fetched into the second-level cache, which can have more lines on their way than the first.
template <class T>
TARGET static inline void fetch(const T* from) {
  __builtin_prefetch(from, 0, 2);
}

#if CLIPSTEER_LEVEL > 0

// Numbers of a cache line, of which each row has one read, and one to come fetched, at a time.
template <class T>
constexpr int64_t kLine = 64 / sizeof(T);

// The first numbers of a vector; the others are 0.
template <class T>
TARGET static inline auto read_some(const T* from, int64_t count) {
  T some[kVectorBytes / sizeof(Compute<T>)];
  std::memset(static_cast<void*>(some), 0, sizeof(some));
  std::memcpy(static_cast<void*>(some), from, count * sizeof(T));
  return read(some);
}

template <class T, int TERMS>
TARGET static inline void axpy(Compute<T>* y, const Compute<T>* c, const T* const* w,
                               const T* const* next, int64_t n) {
  using V = Compute<T>;
  using Vec = Lanes<V>;
  constexpr int64_t kLanes = kVectorBytes / sizeof(V);
  constexpr int kVectors = kLine<T> / kLanes;
  const T *row[TERMS], *ahead[TERMS];
  V factor[TERMS];
  for (int m = 0; m < TERMS; ++m) {
    row[m] = w[m];
    ahead[m] = next ? next[m] : nullptr;
    factor[m] = c[m];
  }
  int64_t i = 0;
  for (; i + kLine<T> <= n; i += kLine<T>) {
    Vec sum[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[v] = read(y + i + v * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < TERMS; ++m) {
      if (next) fetch(ahead[m] + i);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[v] += factor[m] * read(row[m] + i + v * kLanes);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) *reinterpret_cast<Vec*>(y + i + v * kLanes) = sum[v];
  }
  for (int m = 0; next && i < n && m < TERMS; ++m) fetch(ahead[m] + i);
  for (; i < n; i += kLanes) {
    const int64_t count = std::min(kLanes, n - i);
    Vec sum = read_some(y + i, count);
    for (int m = 0; m < TERMS; ++m) sum += factor[m] * read_some(row[m] + i, count);
    std::memcpy(y + i, &sum, count * sizeof(V));
  }
}

// Lanes first, then neighbouring lanes.
template <class T, int TERMS>
TARGET static inline void row_dots(const Compute<T>* a, const T* const* w, const T* const* next,
                                   int64_t n, Compute<T>* out) {
  using V = Compute<T>;
  using Vec = Lanes<V>;
  constexpr int kLanes = kVectorBytes / sizeof(V);
  constexpr int kVectors = kLine<T> / kLanes;
  constexpr auto kAll = std::make_integer_sequence<int, kLanes>();
  const T *row[TERMS], *ahead[TERMS];
  Vec sum[TERMS];
  for (int m = 0; m < TERMS; ++m) {
    row[m] = w[m];
    ahead[m] = next ? next[m] : nullptr;
    sum[m] = Vec{};
  }
  int64_t i = 0;
  for (; i + kLine<T> <= n; i += kLine<T>) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Vec left = read(a + i + v * kLanes);
#pragma GCC unroll 8
      for (int m = 0; m < TERMS; ++m) {
        if (v == 0 && next) fetch(ahead[m] + i);
        sum[m] += left * read(row[m] + i + v * kLanes);
      }
    }
  }
  for (int m = 0; next && i < n && m < TERMS; ++m) fetch(ahead[m] + i);
  for (; i < n; i += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, n - i);
    const Vec left = read_some(a + i, count);
    for (int m = 0; m < TERMS; ++m) sum[m] += left * read_some(row[m] + i, count);
  }
  constexpr int kGroup = std::min(TERMS, kLanes);
#pragma GCC unroll 2
  for (int first = 0; first < TERMS; first += kGroup) {
    Vec* part = sum + first;
#pragma GCC unroll 3
    for (int count = kGroup / 2; count > 0; count /= 2) {
#pragma GCC unroll 4
      for (int m = 0; m < count; ++m) {
        part[m] = neighbours<V>(part[2 * m], part[2 * m + 1], kAll);
      }
    }
#pragma GCC unroll 4
    for (int lanes = kLanes / kGroup; lanes > 1; lanes /= 2) {
      part[0] = neighbours<V>(part[0], part[0], kAll);
    }
    for (int m = 0; m < kGroup; ++m) out[first + m] = part[0][m];
  }
}

#else

// Blocks of columns, which fit the first-level cache widened.
constexpr int64_t kBlock = 64;

template <class T>
static inline const Compute<T>* block_of(const T* row, const T* next, Compute<T>* buffer,
                                         int64_t n) {
  for (int64_t i = 0; next && i < n; i += 64 / int64_t(sizeof(T))) fetch(next + i);
  if constexpr (kNarrow<T>) {
    widen(row, buffer, n);
    return buffer;
  } else {
    return row;
  }
}

template <class T, int TERMS>
static inline void axpy(Compute<T>* __restrict y, const Compute<T>* c, const T* const* w,
                        const T* const* next, int64_t n) {
  using V = Compute<T>;
  V wide[TERMS][kBlock];
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t count = std::min(kBlock, n - i);
    const V* row[TERMS];
    for (int m = 0; m < TERMS; ++m) {
      row[m] = block_of(w[m] + i, next ? next[m] + i : nullptr, wide[m], count);
    }
    for (int64_t l = 0; l < count; ++l) {
      V sum = y[i + l];
#pragma GCC unroll 8
      for (int m = 0; m < TERMS; ++m) sum += c[m] * row[m][l];
      y[i + l] = sum;
    }
  }
}

template <class T, int TERMS>
static inline void row_dots(const Compute<T>* a, const T* const* w, const T* const* next,
                            int64_t n, Compute<T>* out) {
  using V = Compute<T>;
  for (int m = 0; m < TERMS; ++m) {
    V sum[kBlock] = {}, wide[kBlock];
    for (int64_t i = 0; i < n; i += kBlock) {
      const int64_t count = std::min(kBlock, n - i);
      const V* row = block_of(w[m] + i, next ? next[m] + i : nullptr, wide, count);
      for (int64_t l = 0; l < count; ++l) sum[l] += a[i + l] * row[l];
    }
    for (int half = kBlock / 2; half; half /= 2) {
      for (int l = 0; l < half; ++l) sum[l] += sum[l + half];
    }
    out[m] = sum[0];
  }
}

#endif

// Eight rows, or four, two and one.
template <class T>
TARGET static inline void axpy(Compute<T>* y, const Compute<T>* c, const T* const* w,
                               const T* const* next, int terms, int64_t n) {
  if (terms == kGathered) return axpy<T, kGathered>(y, c, w, next, n);
  int m = 0;
  if (terms & 4) {
    axpy<T, 4>(y, c, w, next, n);
    m = 4;
  }
  if (terms & 2) {
    axpy<T, 2>(y, c + m, w + m, next ? next + m : nullptr, n);
    m += 2;
  }
  if (terms & 1) axpy<T, 1>(y, c + m, w + m, next ? next + m : nullptr, n);
}

template <class T>
TARGET static inline void row_dots(const Compute<T>* a, const T* const* w, const T* const* next,
                                   int terms, int64_t n, Compute<T>* out) {
  if (terms == kGathered) return row_dots<T, kGathered>(a, w, next, n, out);
  int m = 0;
  if (terms & 4) {
    row_dots<T, 4>(a, w, next, n, out);
    m = 4;
  }
  if (terms & 2) {
    row_dots<T, 2>(a, w + m, next ? next + m : nullptr, n, out + m);
    m += 2;
  }
  if (terms & 1) row_dots<T, 1>(a, w + m, next ? next + m : nullptr, n, out + m);
}

}  // namespace clipsteer::ISA
