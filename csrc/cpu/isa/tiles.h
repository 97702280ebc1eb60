// Products of bf16 numbers by pairs on AMX tiles of 16 rows of 16 pairs, or of 16 sums, and float32 numbers as two of
// bf16; included by isa.cpp after halves.h.
#pragma once

namespace clipsteer::bf16 {

#define TILES __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))

constexpr int64_t kTileSide = 16, kPanel = 64;

struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  // Tiles 0 to 3 are sums, of which the last two may be lower; 4 and 5 rows of a, 6 and 7 columns of b.
  TileShapes(int64_t upper, int64_t lower, int64_t pairs) {
    const int64_t heights[] = {upper, upper, lower, lower, upper, lower, pairs, pairs};
    for (int t = 0; t < 8; ++t) {
      rows[t] = uint8_t(heights[t]);
      bytes[t] = uint16_t(t == 4 || t == 5 ? 4 * pairs : 64);
    }
  }
};

// Rows of pairs, `row` apart, and panels of them; `low` further on lies what each number, as the upper part, leaves of what is
// multiplied, 0 if nothing is left.
struct TileRows {
  const float* at;
  int64_t row, low = 0;
  TileRows from(int64_t i, int64_t q) const { return {at + i * row + q, row, low}; }
};

struct TileColumns {
  const float* at;
  int64_t panel, low = 0;
  TileColumns from(int64_t j, int64_t q) const { return {at + j / kPanel * panel + j % kPanel + q * kPanel, panel, low}; }
};

// c = or += a times columns of b, k pairs by `step`: 32 rows and columns if TALL, else 16 rows and a whole panel. Four
// sums at once, as a product's latency is that of four. PARTS: 1 if neither leaves anything, 2 if a does, 3 if both do; their
// lower parts are not multiplied by each other. What is loaded meets all it has to at once: a load takes half a product's time.
template <bool TALL, int PARTS>
TILES static inline void tile_block(const TileRows& a, const TileColumns& b, int64_t k, int64_t step, float* c,
                                    int64_t c_row, bool add) {
  const int64_t left = 4 * a.row, right = 4 * kPanel, out = 4 * c_row;
  float* second = TALL ? c + kTileSide * c_row : c + 2 * kTileSide;
  if (add) {
    _tile_loadd(0, c, out);
    _tile_loadd(1, c + kTileSide, out);
    _tile_loadd(2, second, out);
    _tile_loadd(3, second + kTileSide, out);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const float* rows = a.at;
  const float* columns = b.at;
  for (int64_t q = 0; q < k; q += step, rows += step, columns += step * kPanel) {
    if constexpr (TALL) {
      const float* below = rows + kTileSide * a.row;
      _tile_loadd(6, columns, right);
      _tile_loadd(7, columns + kTileSide, right);
      if constexpr (PARTS > 1) {
        _tile_loadd(4, rows + a.low, left);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, below + a.low, left);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_loadd(4, rows, left);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, below, left);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      if constexpr (PARTS > 2) {
        _tile_loadd(6, columns + b.low, right);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        _tile_loadd(7, columns + b.low + kTileSide, right);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    } else {
      _tile_loadd(4, rows, left);
      if constexpr (PARTS > 1) _tile_loadd(5, rows + a.low, left);
      _tile_loadd(6, columns, right);
      if constexpr (PARTS > 1) _tile_dpbf16ps(0, 5, 6);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, columns + kTileSide, right);
      if constexpr (PARTS > 1) _tile_dpbf16ps(1, 5, 7);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(6, columns + 2 * kTileSide, right);
      if constexpr (PARTS > 1) _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(2, 4, 6);
      _tile_loadd(7, columns + 3 * kTileSide, right);
      if constexpr (PARTS > 1) _tile_dpbf16ps(3, 5, 7);
      _tile_dpbf16ps(3, 4, 7);
      if constexpr (PARTS > 2) {
        _tile_loadd(6, columns + b.low, right);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, columns + b.low + kTileSide, right);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(6, columns + b.low + 2 * kTileSide, right);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(7, columns + b.low + 3 * kTileSide, right);
        _tile_dpbf16ps(3, 4, 7);
      }
    }
  }
  _tile_stored(0, c, out);
  _tile_stored(1, c + kTileSide, out);
  _tile_stored(2, second, out);
  _tile_stored(3, second + kTileSide, out);
}

// Blocks of as many rows, one below the other, along the panels.
template <bool TALL, int PARTS>
TILES static void tile_blocks(const TileRows& a, int64_t rows, const TileColumns& b, int64_t k, int64_t step,
                              int64_t columns, float* c, int64_t c_row, bool add) {
  constexpr int64_t kHeight = TALL ? 2 * kTileSide : kTileSide, kWidth = TALL ? 2 * kTileSide : kPanel;
  for (int64_t j = 0; j < columns; j += kWidth) {
    const TileColumns right = b.from(j, 0);
    const int64_t wide = std::min(columns - j, kWidth);
    for (int64_t i = 0; i < rows; i += kHeight) {
      float* target = c + i * c_row + j;
      if (wide == kWidth) {
        tile_block<TALL, PARTS>(a.from(i, 0), right, k, step, target, c_row, add);
        continue;
      }
      alignas(64) float part[kHeight * kWidth];
      const int64_t high = std::min(rows - i, kHeight), bytes = wide * int64_t(sizeof(float));
      for (int64_t r = 0; add && r < high; ++r) std::memcpy(part + r * kWidth, target + r * c_row, bytes);
      __asm__ volatile("" ::: "memory");  // what tiles read and write is not declared
      tile_block<TALL, PARTS>(a.from(i, 0), right, k, step, part, kWidth, add);
      __asm__ volatile("" ::: "memory");
      for (int64_t r = 0; r < high; ++r) std::memcpy(target + r * c_row, part + r * kWidth, bytes);
    }
  }
}

template <int PARTS>
TILES static void tile_products(const TileRows& a, int64_t rows, const TileColumns& b, int64_t k, int64_t columns,
                                float* c, int64_t c_row, bool add) {
  constexpr int64_t kHeight = 2 * kTileSide;
  constexpr int64_t kTerms = PARTS > 2 ? 128 : 256;  // of half a panel, in the first-level cache while rows pass by
  const int64_t whole = rows / kHeight * kHeight, rest = rows - whole;
  for (int64_t i = 0; k == 0 && !add && i < rows; ++i) std::fill_n(c + i * c_row, columns, 0.0f);
  for (int64_t q = 0; q < k;) {
    const int64_t step = std::min(kTileSide, k - q), some = std::min(kTerms, (k - q) / step * step);
    const TileColumns right = b.from(0, q);
    if (whole) {
      const TileShapes shapes(kTileSide, kTileSide, step);
      __asm__ volatile("" ::"r"(&shapes) : "memory");
      _tile_loadconfig(&shapes);
      tile_blocks<true, PARTS>(a.from(0, q), whole, right, some, step, columns, c, c_row, add || q);
    }
    if (rest) {
      const bool tall = rest > kTileSide;
      const TileShapes shapes(tall ? kTileSide : rest, tall ? rest - kTileSide : rest, step);
      __asm__ volatile("" ::"r"(&shapes) : "memory");
      _tile_loadconfig(&shapes);
      const auto blocks = tall ? tile_blocks<true, PARTS> : tile_blocks<false, PARTS>;
      blocks(a.from(whole, q), rest, right, some, step, columns, c + whole * c_row, c_row, add || q);
    }
    q += some;
  }
  _tile_release();
  __asm__ volatile("" ::: "memory");
}

#undef TILES

static void tiles(const float* a, int64_t a_row, int64_t rows, const float* b, int64_t b_panel, int64_t k,
                  int64_t columns, float* c, int64_t c_row, bool add) {
  tile_products<1>({a, a_row}, rows, {b, b_panel}, k, columns, c, c_row, add);
}

static void tiles_of_two(const float* high, const float* low, int64_t a_row, int64_t rows, const float* b,
                         int64_t b_panel, int64_t k, int64_t columns, float* c, int64_t c_row, bool add) {
  tile_products<2>({high, a_row, low - high}, rows, {b, b_panel}, k, columns, c, c_row, add);
}

static void tiles_of_both(const float* high, const float* low, int64_t a_row, int64_t rows, const float* b,
                          const float* b_low, int64_t b_panel, int64_t k, int64_t columns, float* c, int64_t c_row) {
  tile_products<3>({high, a_row, low - high}, rows, {b, b_panel, b_low - b}, k, columns, c, c_row, false);
}

#define SPLIT __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))

// v is high + low but for 2^-16 of it and the smallest normal number, `high` in the upper halves of lanes and `low` still
// to be rounded. High is what v is cut to, and low is of its sign and not 0: an infinity times v is one times either.
SPLIT static inline void halves(__m512 v, __m512i& high, __m512& low) {
  constexpr int kZeros = 0x26, kNotFinite = 0x99;
  const __m512i bits = _mm512_castps_si512(v);
  high = _mm512_and_si512(bits, _mm512_set1_epi32(int(0xffff0000)));
  const __mmask16 finite = ~_mm512_fpclass_ps_mask(v, kNotFinite), some = ~_mm512_fpclass_ps_mask(v, kZeros);
  const __m512i sign = _mm512_and_si512(bits, _mm512_set1_epi32(int(0x80000000)));
  const __m512 least = _mm512_castsi512_ps(_mm512_or_si512(sign, _mm512_set1_epi32(0x00800000)));
  low = _mm512_maskz_sub_ps(finite, v, _mm512_castsi512_ps(high));
  low = _mm512_mask_add_ps(low, some, low, least);
}

SPLIT static void split(const float* v, int64_t n, float* high, float* low) {
  const __m512i count = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  // the upper halves of both vectors: 1 3 5 ... 63
  const __m512i twice = _mm512_slli_epi32(count, 2);
  const __m512i odd = _mm512_or_si512(_mm512_add_epi32(twice, _mm512_set1_epi32(1)),
                                      _mm512_slli_epi32(_mm512_add_epi32(twice, _mm512_set1_epi32(3)), 16));
  for (int64_t j = 0; j < n; j += 32, high += 16, low += 16) {
    __m512i upper[2];
    __m512 rest[2];
    for (int h = 0; h < 2; ++h) halves(_mm512_maskz_loadu_ps(first_lanes(n - j - 16 * h), v + j + 16 * h), upper[h], rest[h]);
    _mm512_storeu_si512(high, _mm512_permutex2var_epi16(upper[0], odd, upper[1]));
    _mm512_storeu_si512(low, (__m512i)_mm512_cvtne2ps_pbh(rest[1], rest[0]));
  }
}

SPLIT static void split_columns(const float* v, int64_t stride, int64_t rows, int64_t columns, float* high, float* low,
                                int64_t out_row) {
  const __m512i count = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i both = _mm512_or_si512(count, _mm512_slli_epi32(_mm512_add_epi32(count, _mm512_set1_epi32(16)), 16));
  for (int64_t j = 0; j < columns; j += 16) {
    const __mmask16 some = first_lanes(columns - j);
    for (int64_t i = 0; i < rows; i += 32) {
      alignas(64) float square[2][16 * 16];
      for (int64_t r = 0; r < 16; ++r) {
        __m512i upper[2];
        __m512 rest[2];
        for (int64_t h = 0; h < 2; ++h) {
          const int64_t row = i + 2 * r + h;
          const __m512 one = row < rows ? _mm512_maskz_loadu_ps(some, v + row * stride + j) : _mm512_setzero_ps();
          halves(one, upper[h], rest[h]);
        }
        _mm512_store_si512(square[0] + 16 * r, _mm512_or_si512(_mm512_srli_epi32(upper[0], 16), upper[1]));
        const __m512i low_pairs = (__m512i)_mm512_cvtne2ps_pbh(rest[1], rest[0]);
        _mm512_store_si512(square[1] + 16 * r, _mm512_permutexvar_epi16(both, low_pairs));
      }
      avx512::transpose(square[0], 16, high + j * out_row + i / 2, out_row);
      avx512::transpose(square[1], 16, low + j * out_row + i / 2, out_row);
    }
  }
}

SPLIT static bool halve(const float* v, int64_t n, BFloat16* high, BFloat16* low) {
  __mmask16 beyond = 0;
  for (int64_t j = 0; j < n; j += 16) {
    const __mmask16 some = first_lanes(n - j);
    const __m512 one = _mm512_maskz_loadu_ps(some, v + j);
    const __m256i upper = (__m256i)_mm512_cvtneps_pbh(one);
    const __m512 rounded = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(upper), 16));
    _mm256_mask_storeu_epi16(high + j, some, upper);
    _mm256_mask_storeu_epi16(low + j, some, (__m256i)_mm512_cvtneps_pbh(_mm512_sub_ps(one, rounded)));
    beyond |= _mm512_cmp_ps_mask(_mm512_abs_ps(one), _mm512_set1_ps(0x1p126f), _CMP_NLT_UQ);
  }
  return !beyond;
}

#undef SPLIT

}  // namespace clipsteer::bf16
