// Products of few rows with rows of W as they are in memory, or with columns of it; included by table.h for AVX2 and
// AVX-512. No include guard on purpose.

namespace clipsteer::ISA {

template <class V>
constexpr int kLanes = kVectorBytes / sizeof(V);

#if CLIPSTEER_LEVEL == 2
TARGET static inline float folded(Lanes<float> v) {
  const __m512 all = (__m512)v;
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  __m128 last = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  last = _mm_add_ps(last, _mm_movehl_ps(last, last));
  return _mm_cvtss_f32(_mm_add_ss(last, _mm_movehdup_ps(last)));
}
TARGET static inline double folded(Lanes<double> v) {
  const __m512d all = (__m512d)v;
  const __m256d half = _mm256_add_pd(_mm512_castpd512_pd256(all), _mm512_extractf64x4_pd(all, 1));
  const __m128d last = _mm_add_pd(_mm256_castpd256_pd128(half), _mm256_extractf128_pd(half, 1));
  return _mm_cvtsd_f64(_mm_add_sd(last, _mm_unpackhi_pd(last, last)));
}
#else
TARGET static inline float folded(Lanes<float> v) {
  const __m256 all = (__m256)v;
  __m128 last = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
  last = _mm_add_ps(last, _mm_movehl_ps(last, last));
  return _mm_cvtss_f32(_mm_add_ss(last, _mm_movehdup_ps(last)));
}
TARGET static inline double folded(Lanes<double> v) {
  const __m256d all = (__m256d)v;
  const __m128d last = _mm_add_pd(_mm256_castpd256_pd128(all), _mm256_extractf128_pd(all, 1));
  return _mm_cvtsd_f64(_mm_add_sd(last, _mm_unpackhi_pd(last, last)));
}
#endif

// Sums of 256 bytes of lanes each, in halves: those of float32 to the bit what dot<float> (rows.h) makes of the widened
// rows, on every instruction set.
template <class V>
constexpr int kSums = 256 / kVectorBytes;

// sum[i][j] += x[i] * w[j] from `at` on. The empty statements make the compiler load each vector once, not for each of its
// products.
template <int ROWS, int COLUMNS, class V, class T, class Sums>
TARGET static inline void add_products(const V* const* x, const T* const* w, int64_t at,
                                       Sums& sum) {
#pragma GCC unroll 8
  for (int v = 0; v < kSums<V>; ++v) {
    Lanes<V> right[COLUMNS];
#pragma GCC unroll 4
    for (int j = 0; j < COLUMNS; ++j) {
      right[j] = read(w[j] + at + v * kLanes<V>);
      __asm__("" : "+v"(right[j]));
    }
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) {
      Lanes<V> left = read(x[i] + at + v * kLanes<V>);
      if constexpr (COLUMNS > 1) __asm__("" : "+v"(left));
#pragma GCC unroll 4
      for (int j = 0; j < COLUMNS; ++j) sum[i][j][v] += left * right[j];
    }
  }
}

// out[i * stride + j * gap] = x[i] . w[j * gap].
template <int ROWS, int COLUMNS, class V, class T>
TARGET static inline void products(const V* const* x, const T* const* w, int64_t gap, int64_t d,
                                   V* out, int64_t stride) {
  constexpr int64_t kStep = kSums<V> * kLanes<V>;
  const T* feature[COLUMNS];
  for (int j = 0; j < COLUMNS; ++j) feature[j] = w[j * gap];
  Lanes<V> sum[ROWS][COLUMNS][kSums<V>] = {};
  int64_t at = 0;
  for (; at + kStep <= d; at += kStep) add_products<ROWS, COLUMNS>(x, feature, at, sum);
  if (at < d) {
    V left[ROWS][kStep] = {};
    T right[COLUMNS][kStep];
    std::memset(static_cast<void*>(right), 0, sizeof(right));
    const V* rows[ROWS];
    const T* columns[COLUMNS];
    for (int i = 0; i < ROWS; ++i) {
      std::memcpy(left[i], x[i] + at, (d - at) * sizeof(V));
      rows[i] = left[i];
    }
    for (int j = 0; j < COLUMNS; ++j) {
      std::memcpy(static_cast<void*>(right[j]), feature[j] + at, (d - at) * sizeof(T));
      columns[j] = right[j];
    }
    add_products<ROWS, COLUMNS>(rows, columns, 0, sum);
  }
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < COLUMNS; ++j) {
      // written out, so that sums stay in registers
      Lanes<V> quarter[4];
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        quarter[v] = sum[i][j][v];
        if constexpr (kSums<V> == 8) quarter[v] += sum[i][j][v + 4];
      }
      out[i * stride + j * gap] = folded((quarter[0] + quarter[2]) + (quarter[1] + quarter[3]));
    }
  }
}

// out[i * stride + c] = x[i] . w[c]. One row with columns a quarter of all apart, line by line: memory brings several
// streams faster than one. Then kDotRows rows at a time with what of these is in the second-level cache now.
template <class V, class T>
TARGET static inline void dots(const V* const* x, int64_t rows, const T* const* w, int64_t d,
                               int64_t columns, V* out, int64_t stride) {
  constexpr int kStreams = 4;
  constexpr int64_t kRun = 16;
  const int64_t gap = (columns + kStreams - 1) / kStreams;
  for (int64_t run = 0; run < gap; run += kRun) {
    for (int64_t i = 0, together = 0; i < rows; i += together) {
      together = std::min<int64_t>(gap >= kRun && i == 0 ? 1 : kDotRows, rows - i);
      for (int64_t g = run; g < std::min(gap, run + kRun); ++g) {
#if CLIPSTEER_LEVEL == 2
        if (together == 1 && g + (kStreams - 1) * gap < columns) {
          products<1, kStreams>(x + i, w + g, gap, d, out + i * stride + g, stride);
          continue;
        }
#endif
        for (int64_t c = g; c < columns; c += gap) {
          V* to = out + i * stride + c;
#if CLIPSTEER_LEVEL == 2
          switch (together) {
            case 1: products<1, 1>(x + i, w + c, 1, d, to, stride); break;
            case 2: products<2, 1>(x + i, w + c, 1, d, to, stride); break;
            case 3: products<3, 1>(x + i, w + c, 1, d, to, stride); break;
            default: products<kDotRows, 1>(x + i, w + c, 1, d, to, stride);
          }
#else
          for (int64_t l = 0; l < together; ++l) {
            products<1, 1>(x + i + l, w + c, 1, d, to + l * stride, stride);
          }
#endif
        }
      }
    }
  }
}

// out[i][c] = sum_q x[i][q] w[q * step + c], in the order of q.
template <class V, class T>
TARGET static inline void spread(const V* x, int64_t rows, const T* w, int64_t step, int64_t d,
                                 int64_t columns, V* out, int64_t stride) {
  constexpr int64_t kTerms = 4, kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < rows; ++i) std::fill_n(out + i * stride, columns, V(0));
  for (int64_t q = 0; q < d; q += kTerms) {
    const int terms = int(std::min(kTerms, d - q));
    const T* from[kTerms];
    for (int m = 0; m < kTerms; ++m) from[m] = w + (q + std::min(m, terms - 1)) * step;
    const int64_t next = std::min(kTerms, d - q - terms) * step;
    for (int64_t i = 0; i < rows; ++i) {
      V factor[kTerms] = {};
      std::copy_n(x + i * d + q, terms, factor);
      V* __restrict y = out + i * stride;
      int64_t c = 0;
      if (terms == kTerms) {
        for (; c + kLanes<V> <= columns; c += kLanes<V>) {
          if (i == 0 && next && c % kLine == 0) {
            for (int m = 0; m < kTerms; ++m) __builtin_prefetch(from[m] + next + c, 0, 2);
          }
          Lanes<V>& sum = *reinterpret_cast<Lanes<V>*>(y + c);
          Lanes<V> total = sum;
#pragma GCC unroll 4
          for (int m = 0; m < kTerms; ++m) total += factor[m] * read(from[m] + c);
          sum = total;
        }
      }
      for (; c < columns; ++c) {
        for (int m = 0; m < terms; ++m) y[c] += factor[m] * V(from[m][c]);
      }
    }
  }
}

}  // namespace clipsteer::ISA
