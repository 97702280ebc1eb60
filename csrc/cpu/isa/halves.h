// Blocks of a product of bf16 numbers; included by isa.cpp where the compiler knows the instruction.
#pragma once

namespace clipsteer::bf16 {

#define CLIPSTEER_BF16_TARGET __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))

// As the block of floats in blocks.h, where a float is a pair of bf16 numbers that follow each other along k, and a product
// of two pairs the sum of two. VDPBF16PS rounds to nearest, each sum of a pair or to the rest once, takes denormal numbers
// for 0 and leaves none, whatever the processor is set to.
template <int ROWS>
CLIPSTEER_BF16_TARGET static inline void block(const float* const* a, int64_t step, const float* b, int64_t stride,
                                               int64_t k, float* const* c, bool add) {
  constexpr int kVectors = 4, kLanes = 16;
  __m512 sum[ROWS][kVectors];
  const float* left[ROWS];
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; ++i) {
    left[i] = a[i];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[i][v] = _mm512_setzero_ps();
  }
  for (int64_t q = 0; q < k; ++q) {
    __m512 right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) right[v] = _mm512_loadu_ps(b + q * stride + v * kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i) {
      int32_t pair;
      std::memcpy(&pair, left[i] + q * step, 4);
      const __m512bh one = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], one, (__m512bh)right[v]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* target = c[i] + v * kLanes;
      _mm512_storeu_ps(target, add ? _mm512_add_ps(_mm512_loadu_ps(target), sum[i][v]) : sum[i][v]);
    }
  }
}

CLIPSTEER_BF16_TARGET static inline void block(const float* const* a, int64_t step, const float* b, int64_t stride,
                                               int64_t k, int rows, float* const* c, bool add) {
  switch (rows) {
    case 1: return block<1>(a, step, b, stride, k, c, add);
    case 2: return block<2>(a, step, b, stride, k, c, add);
    case 3: return block<3>(a, step, b, stride, k, c, add);
    case 4: return block<4>(a, step, b, stride, k, c, add);
    case 5: return block<5>(a, step, b, stride, k, c, add);
    default: return block<6>(a, step, b, stride, k, c, add);
  }
}

#undef CLIPSTEER_BF16_TARGET

}  // namespace clipsteer::bf16
