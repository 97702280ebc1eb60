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
      const __mmask16 some = k - q < kLanes ? __mmask16((1u << (k - q)) - 1) : __mmask16(0xffff);
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

#undef PAIRS

}  // namespace clipsteer::bf16
