// Blocks of a matrix product in registers; included by kernels.cpp as kernels.h is, for AVX2 and AVX-512. No include
// guard on purpose.

namespace clipsteer::ISA {

// A block of a matrix product in registers: c[i] = a[i] (k numbers) times the columns of b, rows of `stride` numbers.
template <class V, int ROWS>
TARGET static inline void block(const V* const* a, const V* b, int64_t stride, int64_t k, V* const* c) {
  constexpr int kVectors = kBlockBytes<CLIPSTEER_LEVEL> / kVectorBytes<CLIPSTEER_LEVEL>;
  typedef V Vec __attribute__((vector_size(kVectorBytes<CLIPSTEER_LEVEL>), aligned(sizeof(V)), may_alias));
  Vec sum[ROWS][kVectors] = {};
  for (int64_t q = 0; q < k; ++q) {
    const Vec* row = reinterpret_cast<const Vec*>(b + q * stride);
    Vec right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = row[v];
    for (int i = 0; i < ROWS; ++i) {
      const V left = a[i][q];
      for (int v = 0; v < kVectors; ++v) sum[i][v] += left * right[v];
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; ++i) {
    for (int v = 0; v < kVectors; ++v) reinterpret_cast<Vec*>(c[i])[v] = sum[i][v];
  }
}

template <class V>
TARGET static inline void block(const V* const* a, const V* b, int64_t stride, int64_t k, int rows, V* const* c) {
  switch (rows) {
    case 1: return block<V, 1>(a, b, stride, k, c);
    case 2: return block<V, 2>(a, b, stride, k, c);
    case 3: return block<V, 3>(a, b, stride, k, c);
    case 4: return block<V, 4>(a, b, stride, k, c);
    case 5: return block<V, 5>(a, b, stride, k, c);
    default: return block<V, 6>(a, b, stride, k, c);
  }
}

TARGET void block32(const float* const* a, const float* b, int64_t stride, int64_t k, int rows, float* const* c) {
  block<float>(a, b, stride, k, rows, c);
}

TARGET void block64(const double* const* a, const double* b, int64_t stride, int64_t k, int rows, double* const* c) {
  block<double>(a, b, stride, k, rows, c);
}

// out[q * width + l] = u[l * stride + q] for `columns` values of l (the rest of width: 0) and k of q.
template <class V>
TARGET static inline void pack(const V* u, int64_t stride, int64_t columns, int64_t k, V* __restrict out) {
  constexpr int64_t width = kBlockBytes<CLIPSTEER_LEVEL> / sizeof(V);
  int64_t l = 0;
#if CLIPSTEER_LEVEL == 2
  if constexpr (sizeof(V) == 4) {
    for (; l + 16 <= columns; l += 16) {
      int64_t q = 0;
      for (; q + 16 <= k; q += 16) {
        __m512 row[16], half[16];
        for (int i = 0; i < 16; ++i) row[i] = _mm512_loadu_ps(u + (l + i) * stride + q);
        // Four rounds, each of which interleaves rows that are 8 apart: the 16 x 16 block is transposed.
        const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
        for (int round = 0; round < 4; ++round) {
          for (int i = 0; i < 8; ++i) {
            half[2 * i] = _mm512_permutex2var_ps(row[i], low, row[i + 8]);
            half[2 * i + 1] = _mm512_permutex2var_ps(row[i], high, row[i + 8]);
          }
          for (int i = 0; i < 16; ++i) row[i] = half[i];
        }
        for (int i = 0; i < 16; ++i) _mm512_storeu_ps(out + (q + i) * width + l, row[i]);
      }
      for (; q < k; ++q) {
        for (int i = 0; i < 16; ++i) out[q * width + l + i] = u[(l + i) * stride + q];
      }
    }
  }
#endif
  for (; l < columns; ++l) {
    for (int64_t q = 0; q < k; ++q) out[q * width + l] = u[l * stride + q];
  }
  for (; l < width; ++l) {
    for (int64_t q = 0; q < k; ++q) out[q * width + l] = 0;
  }
}

TARGET void pack32(const float* u, int64_t stride, int64_t columns, int64_t k, float* out) {
  pack<float>(u, stride, columns, k, out);
}

TARGET void pack64(const double* u, int64_t stride, int64_t columns, int64_t k, double* out) {
  pack<double>(u, stride, columns, k, out);
}

}  // namespace clipsteer::ISA
