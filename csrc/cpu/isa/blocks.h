// Blocks of a matrix product in registers; included by table.h for AVX2 and AVX-512.
// No include guard on purpose.

namespace clipsteer::ISA {

constexpr int kVectorBytes = CLIPSTEER_LEVEL == 2 ? 64 : 32;
constexpr int kBlockBytes = CLIPSTEER_LEVEL == 2 ? 256 : 64;

template <class V>
using Lanes __attribute__((vector_size(kVectorBytes), aligned(sizeof(V)), may_alias)) = V;

// A block of a matrix product in registers: c[i] = or += a[i] (k numbers, `step` apart) times the
// columns of b, whose rows lie `stride` apart.
template <class V, int ROWS>
TARGET static inline void block(const V* const* a, int64_t step, const V* b, int64_t stride,
                                int64_t k, V* const* c, bool add) {
  using Vec = Lanes<V>;
  constexpr int kVectors = kBlockBytes / kVectorBytes;
  Vec sum[ROWS][kVectors] = {};
  const V* left[ROWS];
  // one at a time: a vector of what was just written as single pointers would wait until all had reached the cache
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; ++i) {
    left[i] = a[i];
    __asm__("" : "+r"(left[i]));
  }
  for (int64_t q = 0; q < k; ++q) {
    const Vec* row = reinterpret_cast<const Vec*>(b + q * stride);
    Vec right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = row[v];
    for (int i = 0; i < ROWS; ++i) {
      const V one = left[i][q * step];
      for (int v = 0; v < kVectors; ++v) sum[i][v] += one * right[v];
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; ++i) {
    Vec* target = reinterpret_cast<Vec*>(c[i]);
    for (int v = 0; v < kVectors; ++v) target[v] = add ? target[v] + sum[i][v] : sum[i][v];
  }
}

template <class V>
TARGET static inline void block(const V* const* a, int64_t step, const V* b, int64_t stride,
                                int64_t k, int rows, V* const* c, bool add) {
  switch (rows) {
    case 1: return block<V, 1>(a, step, b, stride, k, c, add);
    case 2: return block<V, 2>(a, step, b, stride, k, c, add);
    case 3: return block<V, 3>(a, step, b, stride, k, c, add);
    case 4: return block<V, 4>(a, step, b, stride, k, c, add);
    case 5: return block<V, 5>(a, step, b, stride, k, c, add);
    default: return block<V, 6>(a, step, b, stride, k, c, add);
  }
}

// Half as many sums of neighbours: those of a, then those of b.
template <class V, int... I>
TARGET static inline Lanes<V> neighbours(Lanes<V> a, Lanes<V> b, std::integer_sequence<int, I...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, 2 * I...) + __builtin_shufflevector(a, b, 2 * I + 1 ...);
#else
  using Index = Lanes<std::conditional_t<sizeof(V) == 4, int32_t, int64_t>>;
  return __builtin_shuffle(a, b, Index{2 * I...}) + __builtin_shuffle(a, b, Index{2 * I + 1 ...});
#endif
}

// A vector of numbers in the precision they are computed in.
TARGET static inline Lanes<float> read(const float* from) {
  return *reinterpret_cast<const Lanes<float>*>(from);
}
TARGET static inline Lanes<double> read(const double* from) {
  return *reinterpret_cast<const Lanes<double>*>(from);
}
TARGET static inline Lanes<float> read(const Half* from) {
#if CLIPSTEER_LEVEL == 2
  return (Lanes<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
  return (Lanes<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
}
TARGET static inline Lanes<float> read(const BFloat16* from) {
#if CLIPSTEER_LEVEL == 2
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return (Lanes<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
#else
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (Lanes<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
#endif
}

// c[i][j] = the inner product of a[i] and row j of w, for ROWS and COLUMNS of them: lanes first,
// then neighbouring lanes, then what k has beyond whole vectors, so that a sum does not depend on
// the others.
template <class V, class W, int ROWS, int COLUMNS>
TARGET static inline void inner_block(const V* const* a, const W* w, int64_t stride, int64_t k,
                                      V* const* c, int64_t first) {
  using Vec = Lanes<V>;
  constexpr int kLanes = sizeof(Vec) / sizeof(V);
  constexpr auto kAll = std::make_integer_sequence<int, kLanes>();
  Vec sum[ROWS][COLUMNS] = {};
  int64_t q = 0;
  for (; q + kLanes <= k; q += kLanes) {
    Vec right[COLUMNS];
    for (int j = 0; j < COLUMNS; ++j) right[j] = read(w + j * stride + q);
    for (int i = 0; i < ROWS; ++i) {
      const Vec left = *reinterpret_cast<const Vec*>(a[i] + q);
      for (int j = 0; j < COLUMNS; ++j) sum[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; ++i) {
    Vec total = sum[i][0];
    int lanes = kLanes;
    if constexpr (COLUMNS == 4) {
      total = neighbours<V>(neighbours<V>(sum[i][0], sum[i][1], kAll),
                            neighbours<V>(sum[i][2], sum[i][3], kAll), kAll);
      lanes /= 4;
    }
    for (; lanes > 1; lanes /= 2) total = neighbours<V>(total, total, kAll);
    for (int j = 0; j < COLUMNS; ++j) {
      V one = total[j];
      for (int64_t rest = q; rest < k; ++rest) one += a[i][rest] * V(w[j * stride + rest]);
      c[i][first + j] = one;
    }
  }
}

// All rows, in blocks of as many as sums of four columns fit into the registers.
template <class V, class W, int COLUMNS>
TARGET static inline void inner_rows(const V* const* a, int64_t rows, const W* w, int64_t stride,
                                     int64_t k, V* const* c, int64_t first) {
  constexpr int kMost = CLIPSTEER_LEVEL == 2 ? 6 : 3;
  for (; rows > 0; rows -= kMost, a += kMost, c += kMost) {
    switch (std::min<int64_t>(rows, kMost)) {
      case 1: inner_block<V, W, 1, COLUMNS>(a, w, stride, k, c, first); break;
      case 2: inner_block<V, W, 2, COLUMNS>(a, w, stride, k, c, first); break;
      case 3: inner_block<V, W, 3, COLUMNS>(a, w, stride, k, c, first); break;
      case 4: inner_block<V, W, std::min(4, kMost), COLUMNS>(a, w, stride, k, c, first); break;
      case 5: inner_block<V, W, std::min(5, kMost), COLUMNS>(a, w, stride, k, c, first); break;
      default: inner_block<V, W, kMost, COLUMNS>(a, w, stride, k, c, first);
    }
  }
}

template <class V, class W>
TARGET static inline void inner(const V* const* a, int64_t rows, const W* w, int64_t stride,
                                int64_t columns, int64_t k, V* const* c) {
  int64_t j = 0;
  for (; j + 4 <= columns; j += 4) inner_rows<V, W, 4>(a, rows, w + j * stride, stride, k, c, j);
  for (; j < columns; ++j) inner_rows<V, W, 1>(a, rows, w + j * stride, stride, k, c, j);
}

// k rows of `columns` numbers, `stride` apart, as such a b; missing columns are 0.
template <class T>
TARGET static inline void lay(const T* w, int64_t stride, int64_t k, int64_t columns, float* out) {
  constexpr int64_t width = kBlockBytes / sizeof(float), kLanes = kVectorBytes / sizeof(float);
  for (int64_t q = 0; q < k; ++q, w += stride, out += width) {
    int64_t j = 0;
    __builtin_prefetch(w + 2 * width);
    for (; j + kLanes <= columns; j += kLanes) {
      *reinterpret_cast<Lanes<float>*>(out + j) = read(w + j);
    }
    for (; j < columns; ++j) out[j] = float(w[j]);
    for (; j < width; ++j) out[j] = 0;
  }
}

// out[q * width + l] = u[l * stride + q] for `columns` values of l (the rest of width: 0)
// and k of q.
template <class V>
TARGET static inline void pack(const V* u, int64_t stride, int64_t columns, int64_t k,
                               V* __restrict out) {
  constexpr int64_t width = kBlockBytes / sizeof(V), kSide = kSquare<V>;
  int64_t l = 0;
  for (; l + kSide <= columns; l += kSide) {
    int64_t q = 0;
    for (; q + kSide <= k; q += kSide) {
      transpose(u + l * stride + q, stride, out + q * width + l, width);
    }
    for (; q < k; ++q) {
      for (int64_t i = l; i < l + kSide; ++i) out[q * width + i] = u[i * stride + q];
    }
  }
  for (; l < columns; ++l) {
    for (int64_t q = 0; q < k; ++q) out[q * width + l] = u[l * stride + q];
  }
  for (; l < width; ++l) {
    for (int64_t q = 0; q < k; ++q) out[q * width + l] = 0;
  }
}

}  // namespace clipsteer::ISA
