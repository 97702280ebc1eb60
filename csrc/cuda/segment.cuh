// Sums over the segments of a sorted list of feature indices: plain C++, run by the GPU and by the CPU tests alike.
#pragma once

#include <cstdint>

#include "select.cuh"

namespace clipsteer {

// The first place in sorted[0 .. count) whose entry is not below `feature`.
CLIPSTEER_HD int64_t segment_start(const int32_t* sorted, int64_t count, int64_t feature) {
  int64_t low = 0;
  while (count > 0) {
    const int64_t half = count / 2;
    if (sorted[low + half] < feature) {
      low += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  return low;
}

// sum[v] += coeff(pair) * row(pair / k, v) over the pairs of one segment, in their order; returns the sum of coeff.
// row(r, v, out) fills out[0 .. WIDTH) with one row's columns.
template <int WIDTH, class Coeff, class Row>
CLIPSTEER_HD float add_segment(const int64_t* pairs, int64_t first, int64_t last, int64_t k, Coeff coeff, Row row,
                               float (&sum)[WIDTH]) {
  float total = 0;
#ifdef __CUDACC__
#pragma unroll 4
#endif
  for (int64_t at = first; at < last; ++at) {
    const int64_t pair = pairs[at];
    const float c = coeff(pair);
    float x[WIDTH];
    row(pair / k, x);
    for (int v = 0; v < WIDTH; ++v) sum[v] += c * x[v];
    total += c;
  }
  return total;
}

}  // namespace clipsteer
