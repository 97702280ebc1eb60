// The inner loops, included once per instruction set by isa.cpp with ISA (a namespace) and TARGET (a function
// attribute) defined: the plain loops are vectorised by the compiler for each target, the filter has intrinsics.
// No include guard on purpose.

namespace clipsteer::ISA {

// Does any of 32 columns pass? Written so that NaN in the value or the bound passes.
#if CLIPSTEER_LEVEL == 1
TARGET static inline bool any_passes(const float* value, const float* bias, float bound) {
  const __m256 limit = _mm256_set1_ps(bound);
  __m256 any = _mm256_setzero_ps();
  for (int j = 0; j < 32; j += 8) {
    __m256 v = _mm256_loadu_ps(value + j);
    if (bias) v = _mm256_add_ps(v, _mm256_loadu_ps(bias + j));
    any = _mm256_or_ps(any, _mm256_cmp_ps(v, limit, _CMP_NLE_UQ));
  }
  return _mm256_movemask_ps(any) != 0;
}
#endif

template <class V>
TARGET static inline bool any_passes(const V* value, const V* bias, V bound) {
  int any = 0;
  if (bias) {
    for (int j = 0; j < 32; ++j) any |= !(value[j] + bias[j] <= bound);
  } else {
    for (int j = 0; j < 32; ++j) any |= !(value[j] <= bound);
  }
  return any;
}

template <class V>
TARGET static inline void filter(const V* value, const V* bias, int64_t columns, uint32_t first, Candidates<V>& row) {
  for (int64_t c = 0; c < columns; c += 32) {
    const int64_t end = std::min<int64_t>(c + 32, columns);
    if (end == c + 32 && !any_passes(value + c, bias ? bias + c : nullptr, row.bound)) continue;
    for (int64_t i = c; i < end; ++i) {
      const V v = bias ? value[i] + bias[i] : value[i];
      if (v <= row.bound) continue;
      if (v != v) {
        row.nan = true;
        return;
      }
      row.keys[row.count++] = Key<V>::make(v, uint32_t(first + i));
    }
    if (row.count > row.limit) row.tighten();
  }
}

TARGET void filter64(const double* value, const double* bias, int64_t columns, uint32_t first,
                     Candidates<double>& row) {
  filter<double>(value, bias, columns, first, row);
}

#if CLIPSTEER_LEVEL == 2

TARGET void filter32(const float* value, const float* bias, int64_t columns, uint32_t first, Candidates<float>& row) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  __m512 bound = _mm512_set1_ps(row.bound);
  for (int64_t c = 0; c < columns; c += 64) {
    const int64_t left = columns - c;
    const uint64_t inside = left >= 64 ? ~uint64_t(0) : (uint64_t(1) << left) - 1;
    __m512 v[4];
    __mmask16 pass[4];
    for (int j = 0; j < 4; ++j) {
      const __mmask16 lane = __mmask16(inside >> (16 * j));
      v[j] = _mm512_maskz_loadu_ps(lane, value + c + 16 * j);
      if (bias) v[j] = _mm512_add_ps(v[j], _mm512_maskz_loadu_ps(lane, bias + c + 16 * j));
      pass[j] = _mm512_mask_cmp_ps_mask(lane, v[j], bound, _CMP_NLE_UQ);
    }
    if (!(pass[0] | pass[1] | pass[2] | pass[3])) continue;
    for (int j = 0; j < 4; ++j) {
      if (!pass[j]) continue;
      if (_mm512_mask_cmp_ps_mask(pass[j], v[j], v[j], _CMP_UNORD_Q)) {
        row.nan = true;
        return;
      }
      __m512i u = _mm512_castps_si512(_mm512_add_ps(v[j], _mm512_setzero_ps()));
      u = _mm512_xor_epi32(u, _mm512_or_epi32(_mm512_srai_epi32(u, 31), _mm512_set1_epi32(INT32_MIN)));
      u = _mm512_maskz_compress_epi32(pass[j], u);
      __m512i column = _mm512_add_epi32(lanes, _mm512_set1_epi32(int32_t(first + c + 16 * j)));
      column = _mm512_maskz_compress_epi32(pass[j], _mm512_xor_epi32(column, _mm512_set1_epi32(-1)));
      _mm512_storeu_si512(row.keys + row.count, _mm512_permutex2var_epi32(column, low, u));
      _mm512_storeu_si512(row.keys + row.count + 8, _mm512_permutex2var_epi32(column, high, u));
      row.count += __builtin_popcount(pass[j]);
    }
    if (row.count > row.limit) {
      row.tighten();
      bound = _mm512_set1_ps(row.bound);
    }
  }
}

#else

TARGET void filter32(const float* value, const float* bias, int64_t columns, uint32_t first, Candidates<float>& row) {
  filter<float>(value, bias, columns, first, row);
}

#endif

// A lower bound of the k-th largest value: the k-th largest of the maxima of disjoint groups of columns, a group
// being one of 64 lanes over `height` steps. A NaN counts for nothing. NaN is returned when k is too large to bound.
template <class V, class Int>
TARGET static inline V seed(const V* value, int64_t columns, int64_t k, Int* rank) {
  constexpr int kLanes = 64;
  constexpr Int kMagnitude = std::numeric_limits<Int>::max();
  const int64_t height = std::max<int64_t>(1, columns / std::max<int64_t>(512, 6 * k));
  const int64_t groups = columns / (kLanes * height) * kLanes;
  if (groups < 2 * k) return std::numeric_limits<V>::quiet_NaN();
  for (int64_t g = 0; g < groups; g += kLanes) {
    const V* block = value + g * height;
    V best[kLanes];
    for (int l = 0; l < kLanes; ++l) best[l] = -std::numeric_limits<V>::infinity();
    for (int64_t step = 0; step < height; ++step, block += kLanes) {
      for (int l = 0; l < kLanes; ++l) best[l] = block[l] > best[l] ? block[l] : best[l];
    }
    // As integers in the same order, which bisection can halve.
    for (int l = 0; l < kLanes; ++l) {
      Int u;
      std::memcpy(&u, best + l, sizeof(u));
      rank[g + l] = u ^ ((u >> (8 * sizeof(u) - 1)) & kMagnitude);
    }
  }
  Int low = std::numeric_limits<Int>::min(), high = kMagnitude;
  while (low < high) {
    const Int middle = (low & high) + ((low ^ high) >> 1) + ((low ^ high) & 1);
    Int reach = 0;
    for (int64_t g = 0; g < groups; ++g) reach += rank[g] >= middle;
    if (reach >= k) {
      low = middle;
      if (reach == k) break;
    } else {
      high = middle - 1;
    }
  }
  low ^= (low >> (8 * sizeof(low) - 1)) & kMagnitude;
  V bound;
  std::memcpy(&bound, &low, sizeof(bound));
  return bound;
}

TARGET float seed32(const float* value, int64_t columns, int64_t k, int32_t* rank) {
  return seed<float, int32_t>(value, columns, k, rank);
}

TARGET double seed64(const double* value, int64_t columns, int64_t k, int64_t* rank) {
  return seed<double, int64_t>(value, columns, k, rank);
}

// Fetching the terms of the next call while this one is summed keeps several rows of W on their way at any time.
template <class V>
TARGET static inline void axpy(V* __restrict y, const V* c, const V* const* w, const Ahead* next, int terms,
                               int64_t n) {
  if (terms < 4) {
    for (int m = 0; m < terms; ++m) {
      const V cm = c[m];
      const V* __restrict wm = w[m];
      for (int64_t i = 0; i < n; ++i) y[i] += cm * wm[i];
    }
    return;
  }
  constexpr int kBlock = 64;
  const V c0 = c[0], c1 = c[1], c2 = c[2], c3 = c[3];
  const V* __restrict w0 = w[0];
  const V* __restrict w1 = w[1];
  const V* __restrict w2 = w[2];
  const V* __restrict w3 = w[3];
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    if (next) {
      for (int m = 0; m < 4; ++m) next->fetch(m, i);
    }
    for (int64_t l = i; l < i + kBlock; ++l) y[l] = (((y[l] + c0 * w0[l]) + c1 * w1[l]) + c2 * w2[l]) + c3 * w3[l];
  }
  for (; i < n; ++i) y[i] = (((y[i] + c0 * w0[i]) + c1 * w1[i]) + c2 * w2[i]) + c3 * w3[i];
}

TARGET void axpy32(float* y, const float* c, const float* const* w, const Ahead* next, int terms, int64_t n) {
  axpy<float>(y, c, w, next, terms, n);
}

TARGET void axpy64(double* y, const double* c, const double* const* w, const Ahead* next, int terms,
                   int64_t n) {
  axpy<double>(y, c, w, next, terms, n);
}

// 64 partial sums let the compiler use whole vectors without reordering what is written here.
template <class V>
TARGET static inline V dot(const V* __restrict a, const V* __restrict b, const Ahead* next, int64_t n) {
  constexpr int kLanes = 64;
  V sum[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    if (next) next->fetch(0, i);
    for (int l = 0; l < kLanes; ++l) sum[l] += a[i + l] * b[i + l];
  }
  for (int l = 0; i + l < n; ++l) sum[l] += a[i + l] * b[i + l];
  for (int half = kLanes / 2; half; half /= 2) {
    for (int l = 0; l < half; ++l) sum[l] += sum[l + half];
  }
  return sum[0];
}

TARGET float dot32(const float* a, const float* b, const Ahead* next, int64_t n) { return dot<float>(a, b, next, n); }
TARGET double dot64(const double* a, const double* b, const Ahead* next, int64_t n) {
  return dot<double>(a, b, next, n);
}

// The sum of weight * (a - b)^2, weights of 1 where there are none.
template <class V>
TARGET static inline V distance(const V* __restrict a, const V* __restrict b, const V* __restrict weight, int64_t n) {
  constexpr int kLanes = 64;
  V sum[kLanes] = {};
  int64_t i = 0;
  if (weight) {
    for (; i + kLanes <= n; i += kLanes) {
      for (int l = 0; l < kLanes; ++l) sum[l] += weight[i + l] * ((a[i + l] - b[i + l]) * (a[i + l] - b[i + l]));
    }
  } else {
    for (; i + kLanes <= n; i += kLanes) {
      for (int l = 0; l < kLanes; ++l) sum[l] += (a[i + l] - b[i + l]) * (a[i + l] - b[i + l]);
    }
  }
  for (int l = 0; i + l < n; ++l) {
    sum[l] += (weight ? weight[i + l] : V(1)) * ((a[i + l] - b[i + l]) * (a[i + l] - b[i + l]));
  }
  for (int half = kLanes / 2; half; half /= 2) {
    for (int l = 0; l < half; ++l) sum[l] += sum[l + half];
  }
  return sum[0];
}

TARGET float distance32(const float* a, const float* b, const float* weight, int64_t n) {
  return distance<float>(a, b, weight, n);
}
TARGET double distance64(const double* a, const double* b, const double* weight, int64_t n) {
  return distance<double>(a, b, weight, n);
}

template <class V>
TARGET static inline void repel(V* __restrict y, V c, const V* __restrict a, const V* __restrict b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] += c * (a[i] - b[i]);
}

TARGET void repel32(float* y, float c, const float* a, const float* b, int64_t n) { repel<float>(y, c, a, b, n); }
TARGET void repel64(double* y, double c, const double* a, const double* b, int64_t n) { repel<double>(y, c, a, b, n); }

TARGET void widen_bf16(const BFloat16* src, float* dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint16_t half;
    std::memcpy(&half, src + i, 2);
    const uint32_t u = uint32_t(half) << 16;
    std::memcpy(dst + i, &u, 4);
  }
}

TARGET void narrow_bf16(const float* src, BFloat16* dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t u;
    std::memcpy(&u, src + i, 4);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
    const uint16_t half = uint16_t((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
    std::memcpy(static_cast<void*>(dst + i), &half, 2);
  }
}

TARGET void widen_f16(const Half* src, float* dst, int64_t n) {
  int64_t i = 0;
#if CLIPSTEER_LEVEL > 0
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i))));
  }
#endif
  for (; i < n; ++i) dst[i] = float(src[i]);
}

TARGET void narrow_f16(const float* src, Half* dst, int64_t n) {
  int64_t i = 0;
#if CLIPSTEER_LEVEL > 0
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i), half);
  }
#endif
  for (; i < n; ++i) dst[i] = Half(src[i]);
}

}  // namespace clipsteer::ISA
