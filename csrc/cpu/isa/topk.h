// The columns of a row that may be among its k largest; included by table.h. The plain loops here
// and in its other headers are vectorised by the compiler for each target.
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
TARGET static inline void filter(const V* value, const V* bias, int64_t columns, uint32_t first,
                                 Candidates<V>& row) {
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

#if CLIPSTEER_LEVEL == 2
// Of float32 these instructions take the place of the loops.
TARGET static inline void filter(const float* value, const float* bias, int64_t columns,
                                 uint32_t first, Candidates<float>& row) {
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
      u = _mm512_xor_epi32(u,
                           _mm512_or_epi32(_mm512_srai_epi32(u, 31), _mm512_set1_epi32(INT32_MIN)));
      u = _mm512_maskz_compress_epi32(pass[j], u);
      __m512i column = _mm512_add_epi32(lanes, _mm512_set1_epi32(int32_t(first + c + 16 * j)));
      column =
          _mm512_maskz_compress_epi32(pass[j], _mm512_xor_epi32(column, _mm512_set1_epi32(-1)));
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

#endif

// A lower bound of the k-th largest value: the k-th largest of the maxima of disjoint groups of
// columns, a group being one of 64 lanes over `height` steps. A NaN counts for nothing. NaN is
// returned when k is too large to bound.
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

}  // namespace clipsteer::ISA
