// Products of bf16 numbers by pairs on AMX tiles of 16 rows of 16 pairs, or of 16 sums; included by isa.cpp after halves.h.
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

// c = or += a times columns of b, k pairs by `step`: 32 rows and columns if TALL, else 16 rows and a whole panel. Four sums
// at once, as a product's latency is that of four.
template <bool TALL>
TILES static inline void tile_block(const float* a, int64_t a_row, const float* b, int64_t k, int64_t step, float* c,
                                    int64_t c_row, bool add) {
  const int64_t left = 4 * a_row, right = 4 * kPanel, out = 4 * c_row;
  float* other = TALL ? c + kTileSide * c_row : c + 2 * kTileSide;
  if (add) {
    _tile_loadd(0, c, out);
    _tile_loadd(1, c + kTileSide, out);
    _tile_loadd(2, other, out);
    _tile_loadd(3, other + kTileSide, out);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t q = 0; q < k; q += step, a += step, b += step * kPanel) {
    _tile_loadd(4, a, left);
    _tile_loadd(6, b, right);
    _tile_loadd(7, b + kTileSide, right);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (TALL) {
      _tile_loadd(5, a + kTileSide * a_row, left);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    } else {
      _tile_loadd(6, b + 2 * kTileSide, right);
      _tile_loadd(7, b + 3 * kTileSide, right);
      _tile_dpbf16ps(2, 4, 6);
      _tile_dpbf16ps(3, 4, 7);
    }
  }
  _tile_stored(0, c, out);
  _tile_stored(1, c + kTileSide, out);
  _tile_stored(2, other, out);
  _tile_stored(3, other + kTileSide, out);
}

// Blocks of as many rows, one below the other, along the panels.
template <bool TALL>
TILES static void tile_blocks(const float* a, int64_t a_row, int64_t rows, const float* b, int64_t b_panel, int64_t k,
                              int64_t step, int64_t columns, float* c, int64_t c_row, bool add) {
  constexpr int64_t kHeight = TALL ? 2 * kTileSide : kTileSide, kWidth = TALL ? 2 * kTileSide : kPanel;
  for (int64_t j = 0; j < columns; j += kWidth) {
    const float* right = b + j / kPanel * b_panel + j % kPanel;
    const int64_t wide = std::min(columns - j, kWidth);
    for (int64_t i = 0; i < rows; i += kHeight) {
      float* target = c + i * c_row + j;
      if (wide == kWidth) {
        tile_block<TALL>(a + i * a_row, a_row, right, k, step, target, c_row, add);
        continue;
      }
      alignas(64) float part[kHeight * kWidth];
      const int64_t high = std::min(rows - i, kHeight), bytes = wide * int64_t(sizeof(float));
      for (int64_t r = 0; add && r < high; ++r) std::memcpy(part + r * kWidth, target + r * c_row, bytes);
      __asm__ volatile("" ::: "memory");  // what tiles read and write is not declared
      tile_block<TALL>(a + i * a_row, a_row, right, k, step, part, kWidth, add);
      __asm__ volatile("" ::: "memory");
      for (int64_t r = 0; r < high; ++r) std::memcpy(target + r * c_row, part + r * kWidth, bytes);
    }
  }
}

TILES static void tiles(const float* a, int64_t a_row, int64_t rows, const float* b, int64_t b_panel, int64_t k,
                        int64_t columns, float* c, int64_t c_row, bool add) {
  constexpr int64_t kHeight = 2 * kTileSide;
  constexpr int64_t kTerms = 256;  // of half a panel, in the first-level cache while rows pass by
  const int64_t whole = rows / kHeight * kHeight, rest = rows - whole;
  for (int64_t i = 0; k == 0 && !add && i < rows; ++i) std::fill_n(c + i * c_row, columns, 0.0f);
  for (int64_t q = 0; q < k;) {
    const int64_t step = std::min(kTileSide, k - q), some = std::min(kTerms, (k - q) / step * step);
    const float* left = a + q;
    const float* right = b + q * kPanel;
    if (whole) {
      const TileShapes shapes(kTileSide, kTileSide, step);
      __asm__ volatile("" ::"r"(&shapes) : "memory");
      _tile_loadconfig(&shapes);
      tile_blocks<true>(left, a_row, whole, right, b_panel, some, step, columns, c, c_row, add || q);
    }
    if (rest) {
      const bool tall = rest > kTileSide;
      const TileShapes shapes(tall ? kTileSide : rest, tall ? rest - kTileSide : rest, step);
      __asm__ volatile("" ::"r"(&shapes) : "memory");
      _tile_loadconfig(&shapes);
      const auto blocks = tall ? tile_blocks<true> : tile_blocks<false>;
      blocks(left + whole * a_row, a_row, rest, right, b_panel, some, step, columns, c + whole * c_row, c_row, add || q);
    }
    q += some;
  }
  _tile_release();
  __asm__ volatile("" ::: "memory");
}

#undef TILES

}  // namespace clipsteer::bf16
