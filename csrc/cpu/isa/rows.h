// Sums along rows and of rows, and rows of 16-bit numbers; included by table.h.
// No include guard on purpose.

namespace clipsteer::ISA {

// 64 partial sums let the compiler use whole vectors without reordering what is written here.
template <class V>
TARGET static inline V dot(const V* __restrict a, const V* __restrict b, int64_t n) {
  constexpr int kLanes = 64;
  V sum[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) sum[l] += a[i + l] * b[i + l];
  }
  for (int l = 0; i + l < n; ++l) sum[l] += a[i + l] * b[i + l];
  return fold(sum);
}

// The sum of weight * (a - b)^2, weights of 1 where there are none.
template <class V>
TARGET static inline V distance(const V* __restrict a, const V* __restrict b,
                                const V* __restrict weight, int64_t n) {
  constexpr int kLanes = 64;
  V sum[kLanes] = {};
  int64_t i = 0;
  if (weight) {
    for (; i + kLanes <= n; i += kLanes) {
      for (int l = 0; l < kLanes; ++l) {
        sum[l] += weight[i + l] * ((a[i + l] - b[i + l]) * (a[i + l] - b[i + l]));
      }
    }
  } else {
    for (; i + kLanes <= n; i += kLanes) {
      for (int l = 0; l < kLanes; ++l) sum[l] += (a[i + l] - b[i + l]) * (a[i + l] - b[i + l]);
    }
  }
  for (int l = 0; i + l < n; ++l) {
    sum[l] += (weight ? weight[i + l] : V(1)) * ((a[i + l] - b[i + l]) * (a[i + l] - b[i + l]));
  }
  return fold(sum);
}

template <class V>
TARGET static inline void repel(V* __restrict y, V c, const V* __restrict a, const V* __restrict b,
                                int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] += c * (a[i] - b[i]);
}

TARGET static inline void widen(const BFloat16* src, float* dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint16_t half;
    std::memcpy(&half, src + i, 2);
    const uint32_t u = uint32_t(half) << 16;
    std::memcpy(dst + i, &u, 4);
  }
}

TARGET static inline void narrow(const float* src, BFloat16* dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t u;
    std::memcpy(&u, src + i, 4);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
    const uint16_t half = uint16_t((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
    std::memcpy(static_cast<void*>(dst + i), &half, 2);
  }
}

TARGET static inline void widen(const Half* src, float* dst, int64_t n) {
  int64_t i = 0;
#if CLIPSTEER_LEVEL > 0
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(dst + i,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i))));
  }
#endif
  for (; i < n; ++i) dst[i] = float(src[i]);
}

TARGET static inline void narrow(const float* src, Half* dst, int64_t n) {
  int64_t i = 0;
#if CLIPSTEER_LEVEL > 0
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i), half);
  }
#endif
  for (; i < n; ++i) dst[i] = Half(src[i]);
}

template <class V>
TARGET static inline V square(const V* a, int64_t n) {
  return dot(a, a, n);
}

// The same of these numbers widened.
template <class T>
  requires kNarrow<T>
TARGET static inline float square(const T* a, int64_t n) {
  float sum[64] = {}, wide[64];
  each_vector<64>(n, [&](int64_t i, auto lanes) TARGET {
    widen(a + i, wide, lanes);
    for (int l = 0; l < lanes; ++l) sum[l] += wide[l] * wide[l];
  });
  return fold(sum);
}

}  // namespace clipsteer::ISA
