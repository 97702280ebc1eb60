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

// A vector of numbers, rounded to those that are kept as `narrow` does it.
TARGET static inline void write(float* to, Lanes<float> from) {
  *reinterpret_cast<Lanes<float>*>(to) = from;
}
TARGET static inline void write(double* to, Lanes<double> from) {
  *reinterpret_cast<Lanes<double>*>(to) = from;
}
TARGET static inline void write(Half* to, Lanes<float> from) {
#if CLIPSTEER_LEVEL == 2
  const __m256i half = _mm512_cvtps_ph((__m512)from, _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
#else
  const __m128i half = _mm256_cvtps_ph((__m256)from, _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), half);
#endif
}
TARGET static inline void write(BFloat16* to, Lanes<float> from) {
#if CLIPSTEER_LEVEL == 2
  const __m512i bits = (__m512i)from;
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i carried = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)from, (__m512)from, _CMP_UNORD_Q);
  const __m512i half =
      _mm512_mask_mov_epi32(_mm512_srli_epi32(carried, 16), nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(half));
#else
  const __m256i bits = (__m256i)from;
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i carried = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = (__m256i)_mm256_cmp_ps((__m256)from, (__m256)from, _CMP_UNORD_Q);
  const __m256i half =
      _mm256_blendv_epi8(_mm256_srli_epi32(carried, 16), _mm256_set1_epi32(0x7fc0), nan);
  // the two lanes' first halves, one after the other
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(half, half), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
#endif
}

// The first numbers of a vector; the others are 0.
template <class T>
TARGET static inline auto read_some(const T* from, int64_t count) {
  T some[kVectorBytes / sizeof(Compute<T>)];
  std::memset(static_cast<void*>(some), 0, sizeof(some));
  std::memcpy(static_cast<void*>(some), from, count * sizeof(T));
  return read(some);
}

template <class T, int TERMS, bool BIAS, class Out>
TARGET static inline void add(Out* out, const Compute<T>* sum, const Compute<T>* c, const T* const* w,
                              const T* const* next, const T* bias, int64_t n) {
  using V = Compute<T>;
  using Vec = Lanes<V>;
  constexpr int64_t kLanes = kVectorBytes / sizeof(V);
  constexpr int kVectors = kLine<T> / kLanes;
  const T *row[TERMS + 1], *ahead[TERMS + 1];
  V factor[TERMS + 1];
  for (int m = 0; m < TERMS; ++m) {
    row[m] = w[m];
    ahead[m] = next ? next[m] : nullptr;
    factor[m] = c[m];
  }
  int64_t i = 0;
  for (; i + kLine<T> <= n; i += kLine<T>) {
    Vec total[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) total[v] = sum ? read(sum + i + v * kLanes) : Vec{};
#pragma GCC unroll 8
    for (int m = 0; m < TERMS; ++m) {
      if (next) fetch(ahead[m] + i);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) total[v] += factor[m] * read(row[m] + i + v * kLanes);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      if constexpr (BIAS) total[v] += read(bias + i + v * kLanes);
      write(out + i + v * kLanes, total[v]);
    }
  }
  for (int m = 0; next && i < n && m < TERMS; ++m) fetch(ahead[m] + i);
  for (; i < n; i += kLanes) {
    const int64_t count = std::min(kLanes, n - i);
    Vec total = sum ? read_some(sum + i, count) : Vec{};
    for (int m = 0; m < TERMS; ++m) total += factor[m] * read_some(row[m] + i, count);
    if constexpr (BIAS) total += read_some(bias + i, count);
    Out some[kLanes];
    write(some, total);
    std::memcpy(static_cast<void*>(out + i), some, count * sizeof(Out));
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

template <class T, int TERMS, bool BIAS, class Out>
static inline void add(Out* out, const Compute<T>* sum, const Compute<T>* c, const T* const* w,
                       const T* const* next, const T* bias, int64_t n) {
  using V = Compute<T>;
  V total[kBlock], wide[TERMS + 1][kBlock];
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t count = std::min(kBlock, n - i);
    const V* row[TERMS + 1];
    for (int m = 0; m < TERMS; ++m) {
      row[m] = block_of(w[m] + i, next ? next[m] + i : nullptr, wide[m], count);
    }
    const V* last = BIAS ? block_of<T>(bias + i, nullptr, wide[TERMS], count) : nullptr;
    for (int64_t l = 0; l < count; ++l) {
      V one = sum ? sum[i + l] : V(0);
#pragma GCC unroll 8
      for (int m = 0; m < TERMS; ++m) one += c[m] * row[m][l];
      if constexpr (BIAS) one += last[l];
      total[l] = one;
    }
    if constexpr (std::is_same_v<Out, V>) {
      std::copy_n(total, count, out + i);
    } else {
      narrow(total, out + i, count);
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
    out[m] = fold(sum);
  }
}

#endif

template <class T, bool BIAS, class Out>
TARGET static inline void add_some(Out* out, const Compute<T>* sum, const Compute<T>* c, const T* const* w,
                                   const T* const* next, int terms, const T* bias, int64_t n) {
  switch (terms) {
    case 0: return add<T, 0, BIAS>(out, sum, c, w, next, bias, n);
    case 1: return add<T, 1, BIAS>(out, sum, c, w, next, bias, n);
    case 2: return add<T, 2, BIAS>(out, sum, c, w, next, bias, n);
    case 3: return add<T, 3, BIAS>(out, sum, c, w, next, bias, n);
    case 4: return add<T, 4, BIAS>(out, sum, c, w, next, bias, n);
    case 5: return add<T, 5, BIAS>(out, sum, c, w, next, bias, n);
    case 6: return add<T, 6, BIAS>(out, sum, c, w, next, bias, n);
    case 7: return add<T, 7, BIAS>(out, sum, c, w, next, bias, n);
    default: return add<T, kGathered, BIAS>(out, sum, c, w, next, bias, n);
  }
}

template <class T, class Out>
TARGET static inline void add(Out* out, const Compute<T>* sum, const Compute<T>* c, const T* const* w,
                              const T* const* next, int terms, const T* bias, int64_t n) {
  (bias ? add_some<T, true, Out> : add_some<T, false, Out>)(out, sum, c, w, next, terms, bias, n);
}

// Eight rows, or four, two and one.
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
