// int8 screening of a product, for AVX-512 with VNNI and for AMX: rows as signed bytes with what the rounding cost, and
// upper bounds of pre-activations. Included by isa.cpp; screening.h derives the bound.
#pragma once

namespace clipsteer {

// The first `count` of 16 lanes.
static inline __mmask16 first_lanes(int64_t count) {
  return __mmask16((1u << std::clamp<int64_t>(count, 0, 16)) - 1);
}

#ifdef CLIPSTEER_AMX
// Eight tiles of 16 rows of 64 bytes. In memory before any code runs, as the instruction's use of it is not declared.
alignas(64) static const volatile struct {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
} kWholeTiles;
#endif

}  // namespace clipsteer

namespace clipsteer::vnni {

#define VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))

// Numbers of any type as float32, which all of them are exactly; 0 in other lanes.
VNNI static inline __m512 widened(__mmask16 lane, const float* v) { return _mm512_maskz_loadu_ps(lane, v); }
VNNI static inline __m512 widened(__mmask16 lane, const BFloat16* v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lane, v)), 16));
}
VNNI static inline __m512 widened(__mmask16 lane, const Half* v) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lane, v));
}

// Whether all are zeros as bits, but for their signs.
template <class T>
static inline bool all_zero(const T* v, int64_t d) {
  std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t> any = 0, bits;
  for (int64_t i = 0; i < d; ++i) {
    std::memcpy(&bits, v + i, sizeof(T));
    any |= bits;
  }
  return (any << 1 & std::numeric_limits<decltype(bits)>::max()) == 0;
}

// Whether a row of d numbers of this size can be screened. Only true zeros may count as 0: the processor may be set to read
// denormal numbers as zero.
template <class T>
static inline bool is_usable(float peak, float norm, const T* v, int64_t d) {
  if (peak == 0) return all_zero(v, d);
  return peak >= Digits::kLeast && peak <= Digits::kMost && norm <= Digits::kMost * Digits::kMost;
}

// digit = round(v * scale / step) in [-127, 127] for d numbers, then zeros up to `width`; those of a row that is not
// usable mean nothing. The scales are powers of two.
template <class T>
VNNI void quantise(const T* v, const float* scale, int64_t d, int64_t width, int8_t* digit, Digits& row) {
  alignas(64) float scaled[kScreenMaxDim];
  constexpr int kLargerSize = 0b1011;  // max(|a|, |b|)
  constexpr int kChains = 4;  // of results that wait for each other
  __m512 most[kChains] = {};
  for (int64_t i = 0; i < d; i += 16 * kChains) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
      const int64_t at = i + 16 * c;
      const __mmask16 lane = first_lanes(d - at);
      const __m512 value = _mm512_mul_ps(widened(lane, v + at), _mm512_maskz_loadu_ps(lane, scale + at));
      _mm512_store_ps(scaled + at, value);
      most[c] = _mm512_range_ps(most[c], value, kLargerSize);
    }
  }
  const float peak = _mm512_reduce_max_ps(
      _mm512_max_ps(_mm512_max_ps(most[0], most[1]), _mm512_max_ps(most[2], most[3])));
  const float step = peak / 127;
  const __m512 inverse = _mm512_set1_ps(peak > 0 ? 127 / peak : 0), width_of = _mm512_set1_ps(step);
  __m512 square[kChains] = {}, missed[kChains] = {};
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < d; i += 16 * kChains) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
      const int64_t at = i + 16 * c;
      const __m512 value = _mm512_load_ps(scaled + at);
      const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(value, inverse));
      const __m512 rest = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(q), width_of, value);
      square[c] = _mm512_fmadd_ps(value, value, square[c]);
      missed[c] = _mm512_fmadd_ps(rest, rest, missed[c]);
      sum = _mm512_add_epi32(sum, q);
      _mm512_mask_cvtepi32_storeu_epi8(digit + at, first_lanes(d - at), q);
    }
  }
  const auto total = [](const __m512* part) VNNI {
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(part[0], part[1]), _mm512_add_ps(part[2], part[3])));
  };
  for (int64_t i = d; i < width; ++i) digit[i] = 0;
  row.step = step;
  row.norm = std::sqrt(total(square));
  row.error = std::sqrt(total(missed));
  row.sum = _mm512_reduce_add_epi32(sum);
  row.usable = is_usable(peak, row.norm, v, d);
}

// Products of 16 columns, of their bytes or themselves.
VNNI static inline __m512 products(const int32_t* sum, const int32_t* offset) {
  return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_loadu_si512(sum), _mm512_loadu_si512(offset)));
}
VNNI static inline __m512 products(const float* sum, const int32_t*) { return _mm512_loadu_ps(sum); }

// A bit for each of 64 columns whose pre-activation may exceed the row's bound (NaN: may), from sums of products.
template <class Sum>
VNNI static inline uint64_t above(const Sum* sum, const ScreenRow& row, const ScreenColumns& column) {
  const __m512 step = _mm512_set1_ps(row.step), bound = _mm512_set1_ps(row.bound);
  const __m512 error = _mm512_set1_ps(row.error), norm = _mm512_set1_ps(row.norm);
  uint64_t pass = 0;
  for (int v = 0; v < 4; ++v) {
    const __m512 base = _mm512_loadu_ps(column.base + 16 * v);
    __m512 upper = _mm512_fmadd_ps(norm, _mm512_loadu_ps(column.error + 16 * v), base);
    upper = _mm512_fmadd_ps(error, _mm512_loadu_ps(column.norm + 16 * v), upper);
    const __m512 scale = _mm512_mul_ps(step, _mm512_loadu_ps(column.step + 16 * v));
    upper = _mm512_fmadd_ps(products(sum + 16 * v, column.offset + 16 * v), scale, upper);
    pass |= uint64_t(_mm512_cmp_ps_mask(upper, bound, _CMP_NLE_UQ)) << (16 * v);
  }
  return pass;
}

// pass[r] = above() for rows of `width` bytes; those that are not wanted may be left as they are. Meanwhile what is read
// next is fetched, a share with every block.
VNNI void screen(const uint8_t* x, int64_t width, const ScreenRow* row, int64_t rows, const int8_t* panel,
                 const ScreenColumns& column, const ScreenAhead& next, uint64_t* pass) {
  const int64_t quads = width / 4, blocks = (rows + kBlockRows - 1) / kBlockRows;
  const int64_t share = (next.lines + blocks - 1) / blocks, step = (share + quads - 1) / quads;
  int64_t line = 0;
  for (int64_t at = 0; at < rows; at += kBlockRows, line += share) {
    const uint8_t* left[kBlockRows];
    bool wanted = false;
    for (int i = 0; i < kBlockRows; ++i) {
      left[i] = x + std::min(at + i, rows - 1) * width;
      wanted |= row[std::min(at + i, rows - 1)].wanted;
    }
    if (!wanted) continue;
    __m512i sum[kBlockRows][4] = {};
    const int8_t* w = panel;
    for (int64_t q = 0; q < quads; ++q, w += 256) {
      for (int64_t l = q * step; l < std::min(share, (q + 1) * step); ++l) next.fetch(line + l);
      const __m512i right[4] = {_mm512_loadu_si512(w), _mm512_loadu_si512(w + 64), _mm512_loadu_si512(w + 128),
                                _mm512_loadu_si512(w + 192)};
#pragma GCC unroll 6
      for (int i = 0; i < kBlockRows; ++i) {
        int32_t four;
        std::memcpy(&four, left[i] + 4 * q, 4);
        const __m512i one = _mm512_set1_epi32(four);
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) sum[i][v] = _mm512_dpbusd_epi32(sum[i][v], one, right[v]);
      }
    }
    // Plain stores, all of them unrolled, keep the sums in registers above.
    alignas(64) int32_t product[kBlockRows][64];
#pragma GCC unroll 6
    for (int i = 0; i < kBlockRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) _mm512_store_si512(product[i] + 16 * v, sum[i][v]);
    }
    for (int64_t r = at; r < std::min(rows, at + kBlockRows); ++r) pass[r] = above(product[r - at], row[r], column);
  }
}

#ifdef CLIPSTEER_AMX
// The same on tiles of 16 rows; `width` is a multiple of 64.
__attribute__((target("amx-tile,amx-int8,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))
void screen_tiles(const uint8_t* x, int64_t width, const ScreenRow* row, int64_t rows, const int8_t* panel,
                  const ScreenColumns& column, const ScreenAhead& next, uint64_t* pass) {
  const int64_t blocks = (rows + kScreenTile - 1) / kScreenTile, share = (next.lines + blocks - 1) / blocks;
  const int64_t step = (share * 64 + width - 1) / width;
  int64_t line = 0;
  __asm__ volatile("" ::: "memory");  // nor is it what loads of tiles read
  _tile_loadconfig(const_cast<const void*>(static_cast<const volatile void*>(&kWholeTiles)));
  for (int64_t at = 0; at < rows; at += kScreenTile, line += share) {
    bool wanted = false;
    for (int64_t r = at; r < std::min(rows, at + kScreenTile); ++r) wanted |= row[r].wanted;
    if (!wanted) continue;
    alignas(64) int32_t product[kScreenTile][64];
    const uint8_t* left = x + at * width;
    const int8_t* w = panel;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t q = 0; q < width; q += 64, w += 16 * 256) {
      for (int64_t l = q / 64 * step; l < std::min(share, (q / 64 + 1) * step); ++l) {
        next.fetch(line + l);
      }
      _tile_loadd(4, left + q, width);
      _tile_loadd(5, w, 256);
      _tile_dpbusd(0, 4, 5);
      _tile_loadd(6, w + 64, 256);
      _tile_dpbusd(1, 4, 6);
      _tile_loadd(7, w + 128, 256);
      _tile_dpbusd(2, 4, 7);
      _tile_loadd(5, w + 192, 256);
      _tile_dpbusd(3, 4, 5);
    }
    _tile_stored(0, product[0], 256);
    _tile_stored(1, product[0] + 16, 256);
    _tile_stored(2, product[0] + 32, 256);
    _tile_stored(3, product[0] + 48, 256);
    __asm__("" : "+m"(product));  // what the stores write is not declared either
    for (int64_t r = at; r < std::min(rows, at + kScreenTile); ++r) pass[r] = above(product[r - at], row[r], column);
  }
  _tile_release();
}
#endif

#undef VNNI

}  // namespace clipsteer::vnni
