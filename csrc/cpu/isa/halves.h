// Products of bf16 numbers by pairs; included by isa.cpp where the compiler knows the instruction.
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

// The sums of four vectors' lanes, by quarters: neighbours first, then quarters.
CLIPSTEER_BF16_TARGET static inline __m128 fold(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// As inner_block in blocks.h, of k pairs. The last vector is filled up with pairs of 0.
template <int ROWS, int COLUMNS>
CLIPSTEER_BF16_TARGET static inline void inner_block(const float* const* a, const float* w, int64_t stride, int64_t k,
                                                     float* const* c, int64_t first) {
  constexpr int kLanes = 16;
  __m512 sum[ROWS][4];
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[i][j] = _mm512_setzero_ps();
  }
  for (int64_t q = 0; q < k; q += kLanes) {
    const __mmask16 some = first_lanes(k - q);
    __m512 right[COLUMNS];
#pragma GCC unroll 4
    for (int j = 0; j < COLUMNS; ++j) right[j] = _mm512_maskz_loadu_ps(some, w + j * stride + q);
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i) {
      const __m512bh left = (__m512bh)_mm512_maskz_loadu_ps(some, a[i] + q);
#pragma GCC unroll 4
      for (int j = 0; j < COLUMNS; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, (__m512bh)right[j]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; ++i) {
    const __m128 total = fold(sum[i][0], sum[i][1], sum[i][2], sum[i][3]);
    if constexpr (COLUMNS == 4) {
      _mm_storeu_ps(c[i] + first, total);
    } else {
      _mm_store_ss(c[i] + first, total);
    }
  }
}

template <int COLUMNS>
CLIPSTEER_BF16_TARGET static inline void inner_rows(const float* const* a, int64_t rows, const float* w, int64_t stride,
                                                    int64_t k, float* const* c, int64_t first) {
  switch (rows) {
    case 1: return inner_block<1, COLUMNS>(a, w, stride, k, c, first);
    case 2: return inner_block<2, COLUMNS>(a, w, stride, k, c, first);
    case 3: return inner_block<3, COLUMNS>(a, w, stride, k, c, first);
    case 4: return inner_block<4, COLUMNS>(a, w, stride, k, c, first);
    case 5: return inner_block<5, COLUMNS>(a, w, stride, k, c, first);
    default: return inner_block<6, COLUMNS>(a, w, stride, k, c, first);
  }
}

CLIPSTEER_BF16_TARGET static inline void inner(const float* const* a, int64_t rows, const float* w, int64_t stride,
                                               int64_t columns, int64_t k, float* const* c) {
  constexpr int64_t kRows = 6, kNumbers = 5 << 10;  // of w, beside as many rows of a in the first-level cache
  const int64_t tile = std::max<int64_t>(4, kNumbers / std::max<int64_t>(k, 1) / 4 * 4);
  for (int64_t first = 0; first < columns; first += tile) {
    const int64_t last = std::min(columns, first + tile);
    for (int64_t i = 0; i < rows; i += kRows) {
      const int64_t some = std::min(kRows, rows - i);
      int64_t j = first;
      for (; j + 4 <= last; j += 4) inner_rows<4>(a + i, some, w + j * stride, stride, k, c + i, j);
      for (; j < last; ++j) inner_rows<1>(a + i, some, w + j * stride, stride, k, c + i, j);
    }
  }
}

CLIPSTEER_BF16_TARGET static inline void weave(const BFloat16* const* rows, int64_t k, int64_t first, int64_t columns,
                                               float* out) {
  constexpr int64_t kWidth = 64, kPart = 32;  // columns of a block, and of a vector of bf16 numbers
  // a0 b0 a1 b1 ... of the lower halves, and of the upper ones
  const __m512i count = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i lower = _mm512_or_si512(count, _mm512_slli_epi32(_mm512_add_epi32(count, _mm512_set1_epi32(32)), 16));
  const __m512i upper = _mm512_add_epi32(lower, _mm512_set1_epi32(16 << 16 | 16));
  for (int64_t q = 0; q < k; q += 2, out += kWidth) {
    for (int64_t j = 0; j < kWidth; j += kPart) {
      const int64_t left = std::clamp<int64_t>(columns - j, 0, kPart);
      const __mmask32 some = left < kPart ? (1u << left) - 1 : ~0u;
      const __m512i a = _mm512_maskz_loadu_epi16(some, rows[q] + first + j);
      const __m512i b = q + 1 < k ? _mm512_maskz_loadu_epi16(some, rows[q + 1] + first + j) : _mm512_setzero_si512();
      _mm512_storeu_si512(out + j, _mm512_permutex2var_epi16(a, lower, b));
      _mm512_storeu_si512(out + j + kPart / 2, _mm512_permutex2var_epi16(a, upper, b));
    }
  }
}

#undef CLIPSTEER_BF16_TARGET

}  // namespace clipsteer::bf16
