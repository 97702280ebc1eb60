// int8 screening of a product, for AVX-512 with VNNI: rows as signed bytes with what the rounding cost, upper bounds of
// a block of pre-activations, and blocks computed whole. Included by kernels.cpp; topk_screen.cpp derives the bound.
#pragma once

namespace clipsteer::vnni {

#define VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))

// digit = round(v * scale / step) in [-127, 127] for d numbers, then zeros up to `width`. The scales are powers of two.
VNNI void quantise(const float* v, const float* scale, int64_t d, int64_t width, int8_t* digit, Digits& row) {
  __m512 most = _mm512_setzero_ps();
  __m512i any = _mm512_setzero_si512();
  for (int64_t i = 0; i < d; i += 16) {
    const __mmask16 lane = d - i >= 16 ? 0xffff : __mmask16((1u << (d - i)) - 1);
    const __m512 value = _mm512_maskz_loadu_ps(lane, v + i);
    any = _mm512_or_si512(any, _mm512_castps_si512(value));
    most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_mul_ps(value, _mm512_maskz_loadu_ps(lane, scale + i))));
  }
  const float peak = _mm512_reduce_max_ps(most);
  const float step = peak / 127;
  const __m512 inverse = _mm512_set1_ps(peak > 0 ? 127 / peak : 0), width_of = _mm512_set1_ps(step);
  __m512 square = _mm512_setzero_ps(), missed = _mm512_setzero_ps();
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < d; i += 16) {
    const __mmask16 lane = d - i >= 16 ? 0xffff : __mmask16((1u << (d - i)) - 1);
    const __m512 value = _mm512_mul_ps(_mm512_maskz_loadu_ps(lane, v + i), _mm512_maskz_loadu_ps(lane, scale + i));
    __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(value, inverse));
    q = _mm512_max_epi32(_mm512_min_epi32(q, _mm512_set1_epi32(127)), _mm512_set1_epi32(-127));
    const __m512 rest = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(q), width_of, value);
    square = _mm512_fmadd_ps(value, value, square);
    missed = _mm512_fmadd_ps(rest, rest, missed);
    sum = _mm512_add_epi32(sum, q);
    _mm512_mask_cvtepi32_storeu_epi8(digit + i, lane, q);
  }
  for (int64_t i = d; i < width; ++i) digit[i] = 0;
  row.step = step;
  row.norm = std::sqrt(_mm512_reduce_add_ps(square));
  row.error = std::sqrt(_mm512_reduce_add_ps(missed));
  row.sum = _mm512_reduce_add_epi32(sum);
  // Only true zeros may count as 0: the processor may be set to read denormal numbers as zero.
  const bool zero = _mm512_test_epi32_mask(any, _mm512_set1_epi32(INT32_MAX)) == 0;
  row.usable = zero || (peak >= Digits::kLeast && peak <= Digits::kMost && row.norm <= Digits::kMost * Digits::kMost);
}

// pass[i]: a bit for each of 64 columns whose pre-activation in row i may exceed the row's bound (NaN: may). Meanwhile
// `lines` cache lines from `next` on are fetched.
VNNI void screen(const uint8_t* const* x, const ScreenRow* row, const int8_t* w, const ScreenColumns& column,
                 int64_t quads, const char* next, int64_t lines, uint64_t* pass) {
  __m512i sum[kBlockRows][4] = {};
  for (int64_t q = 0; q < quads; ++q, w += 256) {
    if (q < lines) __builtin_prefetch(next + 64 * q, 0, 2);
    const __m512i right[4] = {_mm512_loadu_si512(w), _mm512_loadu_si512(w + 64), _mm512_loadu_si512(w + 128),
                              _mm512_loadu_si512(w + 192)};
#pragma GCC unroll 6
    for (int i = 0; i < kBlockRows; ++i) {
      int32_t four;
      std::memcpy(&four, x[i] + 4 * q, 4);
      const __m512i left = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) sum[i][v] = _mm512_dpbusd_epi32(sum[i][v], left, right[v]);
    }
  }
  // Plain stores, all of them unrolled, keep the sums in registers above.
  alignas(64) int32_t product[kBlockRows][64];
#pragma GCC unroll 6
  for (int i = 0; i < kBlockRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) _mm512_store_si512(product[i] + 16 * v, sum[i][v]);
  }
  for (int i = 0; i < kBlockRows; ++i) {
    pass[i] = 0;
    const __m512 step = _mm512_set1_ps(row[i].step), bound = _mm512_set1_ps(row[i].bound);
    const __m512 error = _mm512_set1_ps(row[i].error), norm = _mm512_set1_ps(row[i].norm);
    for (int v = 0; v < 4; ++v) {
      const __m512i sums = _mm512_add_epi32(_mm512_load_si512(product[i] + 16 * v),
                                            _mm512_loadu_si512(column.offset + 16 * v));
      const __m512 base = _mm512_loadu_ps(column.base + 16 * v);
      __m512 upper = _mm512_fmadd_ps(norm, _mm512_loadu_ps(column.error + 16 * v), base);
      upper = _mm512_fmadd_ps(error, _mm512_loadu_ps(column.norm + 16 * v), upper);
      const __m512 scale = _mm512_mul_ps(step, _mm512_loadu_ps(column.step + 16 * v));
      upper = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), scale, upper);
      pass[i] |= uint64_t(_mm512_cmp_ps_mask(upper, bound, _CMP_NLE_UQ)) << (16 * v);
    }
  }
}

VNNI static inline void add_products(const float* const* x, const float* const* w, int64_t at, __mmask16 lane,
                                     __m512 (*sum)[2]) {
  // The empty statements make the compiler load each vector once, not for each of its products.
  __m512 right[2];
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
    right[j] = _mm512_maskz_loadu_ps(lane, w[j] + at);
    __asm__("" : "+v"(right[j]));
  }
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    __m512 left = _mm512_maskz_loadu_ps(lane, x[i] + at);
    __asm__("" : "+v"(left));
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) sum[i][j] = _mm512_fmadd_ps(left, right[j], sum[i][j]);
  }
}

// out[i][c] = x[i] . w[c], to the bit what dot32 (kernels.h) makes of it: three rows by two columns at a time.
VNNI void dots(const float* const* x, const float* w, int64_t d, int64_t columns, float (*out)[kDotColumns]) {
  for (int64_t c = 0; c < columns; c += 2) {
    const float* right[2] = {w + c * d, w + std::min(c + 1, columns - 1) * d};
    __m512 sum[4][3][2] = {};
    int64_t at = 0;
    for (; at + 64 <= d; at += 64) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) add_products(x, right, at + 16 * v, 0xffff, sum[v]);
    }
    if (at < d) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const int64_t left = std::clamp<int64_t>(d - at - 16 * v, 0, 16);
        add_products(x, right, at + 16 * v, __mmask16((1u << left) - 1), sum[v]);
      }
    }
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const __m512 low = _mm512_add_ps(sum[0][i][j], sum[2][i][j]), high = _mm512_add_ps(sum[1][i][j], sum[3][i][j]);
        const __m512 both = _mm512_add_ps(low, high);
        const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(both), _mm512_extractf32x8_ps(both, 1));
        __m128 last = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
        last = _mm_add_ps(last, _mm_movehl_ps(last, last));
        out[i][std::min(c + j, columns - 1)] = _mm_cvtss_f32(_mm_add_ss(last, _mm_movehdup_ps(last)));
      }
    }
  }
}

#undef VNNI

}  // namespace clipsteer::vnni
