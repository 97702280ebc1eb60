// Screening of a product by pairs of bf16 numbers, where the processor multiplies those (halves.h). Included by isa.cpp;
// sieves.h derives the bound.
#pragma once

namespace clipsteer::bf16 {

#define PAIRS __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))

// out[c] = |w_c|^2 of at most 64 rows of k pairs, `stride` apart. Rows a quarter of all apart: memory brings several
// streams faster than one.
PAIRS static void squares(const float* w, int64_t stride, int64_t k, int64_t columns, float* out) {
  constexpr int kLanes = 16, kStreams = 4;
  const int64_t gap = (columns + kStreams - 1) / kStreams;
  for (int64_t c = 0; c < gap; ++c) {
    const float* row[kStreams];
    for (int s = 0; s < kStreams; ++s) row[s] = w + std::min(c + s * gap, columns - 1) * stride;
    __m512 sum[kStreams] = {};
    for (int64_t q = 0; q < k; q += kLanes) {
      const __mmask16 some = first_lanes(k - q);
#pragma GCC unroll 4
      for (int s = 0; s < kStreams; ++s) {
        const __m512bh pairs = (__m512bh)_mm512_maskz_loadu_ps(some, row[s] + q);
        sum[s] = _mm512_dpbf16_ps(sum[s], pairs, pairs);
      }
    }
    float four[kStreams];
    _mm_storeu_ps(four, fold(sum[0], sum[1], sum[2], sum[3]));
    for (int s = 0; s < kStreams && c + s * gap < columns; ++s) out[c + s * gap] = four[s];
  }
}

// product (rows, 64) = those of `rows` rows of k pairs that are wanted with at most 64 columns, `stride` apart, and pass[r]
// = above() of them. Meanwhile what is read next is fetched, a share with every block.
PAIRS static void sift(const float* const* x, const ScreenRow* row, int64_t rows, const float* w, int64_t stride,
                       int64_t columns, int64_t k, const ScreenColumns& column, const ScreenAhead& next, float* product,
                       uint64_t* pass) {
  constexpr int64_t kRows = 6, kSome = 8 * kRows, kNumbers = 5 << 10;  // of w, in the first-level cache beside rows of x
  const int64_t tile = std::max<int64_t>(4, kNumbers / std::max<int64_t>(k, 1) / 4 * 4);
  const int64_t calls = ((rows + kRows - 1) / kRows) * ((columns + 3) / 4), share = (next.lines + calls - 1) / calls;
  int64_t line = 0;
  for (int64_t from = 0; from < rows;) {
    const float* left[kSome];
    float* out[kSome];
    int64_t number[kSome], count = 0;
    for (; from < rows && count < kSome; ++from) {
      if (!row[from].wanted) continue;
      left[count] = x[from];
      out[count] = product + from * 64;
      number[count++] = from;
    }
    const int64_t blocks = (count + kRows - 1) / kRows;
    for (int64_t first = 0; first < columns; first += tile) {
      const int64_t last = std::min(columns, first + tile);
      for (int64_t b = 0; b < blocks; ++b) {  // of sizes as equal as can be: a single row waits for its own sums
        const int64_t i = count * b / blocks, some = count * (b + 1) / blocks - i;
        int64_t j = first;
        for (; j + 4 <= last; j += 4) {
          for (const int64_t end = std::min(next.lines, line + share); line < end; ++line) next.fetch(line);
          inner_rows<4>(left + i, some, w + j * stride, stride, k, out + i, j);
        }
        for (; j < last; ++j) inner_rows<1>(left + i, some, w + j * stride, stride, k, out + i, j);
      }
    }
    for (int64_t i = 0; i < count; ++i) pass[number[i]] = vnni::above(out[i], row[number[i]], column);
  }
}

#ifdef CLIPSTEER_AMX
#define TILES __attribute__((target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))

// sums (GROUPS, 64, 16): products of 64 / GROUPS rows of w, `stride` apart, with GROUPS times 16 rows of x, `group` apart,
// of 16 pairs a step. Four tiles of sums, as the instruction takes as long as four may follow each other.
template <int GROUPS>
TILES static inline void tile_sums(const float* x, int64_t group, const float* w, int64_t stride, int64_t steps,
                                   float* sums) {
  constexpr int64_t kTile = 256, kRow = 64;  // floats, and bytes of a row of a tile
  const int64_t bytes = 4 * stride, below = 16 * stride;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t q = 0; q < steps; ++q, x += kTile, w += 16) {
    _tile_loadd(4, x, kRow);
    _tile_loadd(6, w, bytes);
    _tile_loadd(7, w + below, bytes);
    _tile_dpbf16ps(0, 6, 4);
    _tile_dpbf16ps(1, 7, 4);
    if constexpr (GROUPS == 2) {
      _tile_loadd(5, x + group, kRow);
      _tile_dpbf16ps(2, 6, 5);
      _tile_dpbf16ps(3, 7, 5);
    } else {
      _tile_loadd(6, w + 2 * below, bytes);
      _tile_loadd(7, w + 3 * below, bytes);
      _tile_dpbf16ps(2, 6, 4);
      _tile_dpbf16ps(3, 7, 4);
    }
  }
  float* rest = sums + (GROUPS == 2 ? 4 : 2) * kTile;
  _tile_stored(0, sums, kRow);
  _tile_stored(1, sums + kTile, kRow);
  _tile_stored(2, rest, kRow);
  _tile_stored(3, rest + kTile, kRow);
}

// The same on tiles. Rows of x come by 16, `group` apart, pair q of all of them before pair q + 1, and with pairs of 0 up to
// a multiple of 16; `product` has room for such a multiple of rows. Nothing is fetched ahead: the products take so little
// time that squares() has brought w, by several streams, before a fetch would.
TILES static void sift_tiles(const float* x, int64_t group, const ScreenRow* row, int64_t rows, const float* w,
                             int64_t stride, int64_t columns, int64_t k, const ScreenColumns& column, float* product,
                             uint64_t* pass) {
  constexpr int64_t kSide = 16, kColumns = 64;
  const int64_t steps = (k + kSide - 1) / kSide;
  std::unique_ptr<float[]> whole;  // where rows end within a tile
  if (columns < kColumns || k % kSide != 0) {
    const int64_t width = steps * kSide;
    whole.reset(new float[kColumns * width]());
    for (int64_t c = 0; c < columns; ++c) std::copy_n(w + c * stride, k, whole.get() + c * width);
    w = whole.get();
    stride = width;
  }
  __asm__ volatile("" ::: "memory");  // nor is it what loads of tiles read
  _tile_loadconfig(const_cast<const void*>(static_cast<const volatile void*>(&kWholeTiles)));
  for (int64_t at = 0; at < rows;) {
    const int64_t some = std::min(rows - at, 2 * kSide), groups = (some + kSide - 1) / kSide;
    bool wanted = false;
    for (int64_t r = at; r < at + some; ++r) wanted |= row[r].wanted;
    if (wanted) {
      alignas(64) float sums[2][kColumns][kSide];
      const float* left = x + at / kSide * group;
      if (groups == 2) {
        tile_sums<2>(left, group, w, stride, steps, sums[0][0]);
        tile_sums<2>(left, group, w + kColumns / 2 * stride, stride, steps, sums[0][kColumns / 2]);
      } else {
        tile_sums<1>(left, group, w, stride, steps, sums[0][0]);
      }
      __asm__ volatile("" : "+m"(sums) : : "memory");  // what the stores write is not declared either
      for (int64_t g = 0; g < groups; ++g) {
        float* out = product + (at + g * kSide) * kColumns;
        for (int64_t c = 0; c < kColumns; c += kSide) avx512::transpose(sums[g][c], kSide, out + c, kColumns);
      }
      for (int64_t r = at; r < at + some; ++r) {
        if (row[r].wanted) pass[r] = vnni::above(product + r * kColumns, row[r], column);
      }
    }
    at += some;
  }
  _tile_release();
  __asm__ volatile("" ::: "memory");
}

#undef TILES
#endif

#undef PAIRS

}  // namespace clipsteer::bf16
