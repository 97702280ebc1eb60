// Transposed copies; included by table.h. No include guard on purpose.

namespace clipsteer::ISA {

#if CLIPSTEER_LEVEL == 2
TARGET static inline __m512 load(const float* p) { return _mm512_loadu_ps(p); }
TARGET static inline __m512d load(const double* p) { return _mm512_loadu_pd(p); }
TARGET static inline void store(float* p, __m512 v) { _mm512_storeu_ps(p, v); }
TARGET static inline void store(double* p, __m512d v) { _mm512_storeu_pd(p, v); }
// a0 b0 a1 b1 ... of the lower halves, and of the upper ones.
TARGET static inline void interleave(__m512 a, __m512 b, __m512& low, __m512& high) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  low = _mm512_permutex2var_ps(a, first, b);
  high = _mm512_permutex2var_ps(a, _mm512_add_epi32(first, _mm512_set1_epi32(8)), b);
}
TARGET static inline void interleave(__m512d a, __m512d b, __m512d& low, __m512d& high) {
  const __m512i first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  low = _mm512_permutex2var_pd(a, first, b);
  high = _mm512_permutex2var_pd(a, _mm512_add_epi64(first, _mm512_set1_epi64(4)), b);
}
#elif CLIPSTEER_LEVEL == 1
TARGET static inline __m256 load(const float* p) { return _mm256_loadu_ps(p); }
TARGET static inline __m256d load(const double* p) { return _mm256_loadu_pd(p); }
TARGET static inline void store(float* p, __m256 v) { _mm256_storeu_ps(p, v); }
TARGET static inline void store(double* p, __m256d v) { _mm256_storeu_pd(p, v); }
TARGET static inline void interleave(__m256 a, __m256 b, __m256& low, __m256& high) {
  const __m256 even = _mm256_unpacklo_ps(a, b), odd = _mm256_unpackhi_ps(a, b);
  low = _mm256_permute2f128_ps(even, odd, 0x20);
  high = _mm256_permute2f128_ps(even, odd, 0x31);
}
TARGET static inline void interleave(__m256d a, __m256d b, __m256d& low, __m256d& high) {
  const __m256d even = _mm256_unpacklo_pd(a, b), odd = _mm256_unpackhi_pd(a, b);
  low = _mm256_permute2f128_pd(even, odd, 0x20);
  high = _mm256_permute2f128_pd(even, odd, 0x31);
}
#endif

#if CLIPSTEER_LEVEL > 0
// A square of as many numbers a side as a vector has, transposed by as many rounds of interleaving
// rows half a square apart as its side has bits.
template <class V>
constexpr int kSquare = (CLIPSTEER_LEVEL == 2 ? 64 : 32) / sizeof(V);

template <class V>
TARGET static inline void transpose(const V* u, int64_t stride, V* out, int64_t width) {
  constexpr int kSide = kSquare<V>;
  decltype(load(u)) row[kSide], next[kSide];
  for (int i = 0; i < kSide; ++i) row[i] = load(u + i * stride);
  for (int bits = kSide; bits > 1; bits /= 2) {
    for (int i = 0; i < kSide / 2; ++i) {
      interleave(row[i], row[i + kSide / 2], next[2 * i], next[2 * i + 1]);
    }
    for (int i = 0; i < kSide; ++i) row[i] = next[i];
  }
  for (int i = 0; i < kSide; ++i) store(out + i * width, row[i]);
}
#endif

// out[j * out_stride + i] = u[i * stride + j] for `rows` values of i and `columns` of j.
template <class V>
TARGET static inline void turn(const V* u, int64_t stride, int64_t rows, int64_t columns,
                               V* __restrict out, int64_t out_stride) {
  constexpr int64_t kSide = 16, kLine = 64 / sizeof(V);
  for (int64_t i = 0; i < rows; i += kSide) {
    const int64_t height = std::min(kSide, rows - i);
    for (int64_t j = 0; j < columns; j += kSide) {
      const int64_t width = std::min(kSide, columns - j);
      // the next rows, whose lines no other fetches
      for (int64_t l = i + kSide; l < std::min(rows, i + 2 * kSide); ++l) {
        for (int64_t c = 0; c < width; c += kLine) __builtin_prefetch(u + l * stride + j + c);
      }
#if CLIPSTEER_LEVEL > 0
      if (height == kSide && width == kSide) {
        for (int64_t l = 0; l < kSide; l += kSquare<V>) {
          for (int64_t c = 0; c < kSide; c += kSquare<V>) {
            transpose(u + (i + l) * stride + j + c, stride, out + (j + c) * out_stride + i + l,
                      out_stride);
          }
        }
        continue;
      }
#endif
      for (int64_t c = 0; c < width; ++c) {
        for (int64_t l = 0; l < height; ++l) {
          out[(j + c) * out_stride + i + l] = u[(i + l) * stride + j + c];
        }
      }
    }
  }
}

// The same for 16-bit numbers, in pairs of rows as the numbers of 32 bits that they become.
template <class T>
  requires kNarrow<T>
TARGET static inline void turn(const T* u, int64_t stride, int64_t rows, int64_t columns, T* out,
                               int64_t out_stride) {
  constexpr int64_t kPairs = 16, kSide = 32;
  for (int64_t i = 0; i < rows; i += 2 * kPairs) {
    const int64_t height = std::min(2 * kPairs, rows - i);
    for (int64_t j = 0; j < columns; j += kSide) {
      const int64_t width = std::min(kSide, columns - j);
      for (int64_t l = i + 2 * kPairs; l < std::min(rows, i + 4 * kPairs); ++l) {
        __builtin_prefetch(u + l * stride + j);
        __builtin_prefetch(u + l * stride + j + width - 1);
      }
      alignas(64) uint32_t pair[kPairs][kSide];
      for (int64_t l = 0; l < height; l += 2) {
        uint16_t first[kSide] = {}, second[kSide] = {};
        std::memcpy(first, u + (i + l) * stride + j, width * 2);
        if (l + 1 < height) std::memcpy(second, u + (i + l + 1) * stride + j, width * 2);
        for (int c = 0; c < kSide; ++c) pair[l / 2][c] = first[c] | uint32_t(second[c]) << 16;
      }
      alignas(64) float turned[kSide][kPairs];
      turn(reinterpret_cast<const float*>(pair[0]), kSide, (height + 1) / 2, width, turned[0], kPairs);
      for (int64_t c = 0; c < width; ++c) {
        std::memcpy(static_cast<void*>(out + (j + c) * out_stride + i), turned[c], height * 2);
      }
    }
  }
}

}  // namespace clipsteer::ISA
