// The columns of a row that may be among its k largest; included by table.h. The plain loops here
// and in its other headers are vectorised by the compiler for each target.
// No include guard on purpose.

namespace clipsteer::ISA {

// Does any column of a vector pass? Written so that NaN in the value or the bound passes.
#if CLIPSTEER_LEVEL == 1
TARGET static inline bool any_passes(const float* value, const float* bound) {
  __m256 any = _mm256_setzero_ps();
  for (int j = 0; j < kRowLanes; j += 8) {
    const __m256 v = _mm256_loadu_ps(value + j), limit = _mm256_loadu_ps(bound + j);
    any = _mm256_or_ps(any, _mm256_cmp_ps(v, limit, _CMP_NLE_UQ));
  }
  return _mm256_movemask_ps(any) != 0;
}
#endif

template <class V>
TARGET static inline bool any_passes(const V* value, const V* bound) {
  int any = 0;
  for (int j = 0; j < kRowLanes; ++j) any |= !(value[j] <= bound[j]);
  return any;
}

template <class V>
TARGET static inline void filter(const V* value, const OfColumns<V>& own, int64_t columns,
                                 uint32_t first, Candidates<V>& row) {
  V v[kRowLanes], bound[kRowLanes];
  std::fill_n(bound, kRowLanes, row.bound);
  for (int64_t c = 0; c < columns; c += kRowLanes) {
    const int lanes = int(std::min<int64_t>(kRowLanes, columns - c));
    put(value + c, lanes, v);
    if (own.bias) add(v, own.bias + c, lanes);
    if (own.scale) multiply(v, own.scale + c, lanes);
    if (own.bound) put(own.bound + c, lanes, bound);
    if (lanes == kRowLanes && !any_passes(v, bound)) continue;
    for (int l = 0; l < lanes; ++l) {
      if (v[l] <= bound[l]) continue;
      if (v[l] != v[l]) {
        row.nan = true;
        return;
      }
      row.keys[row.count++] = Key<V>::make(v[l], uint32_t(first + c + l));
    }
    if (row.count > row.limit) {
      row.tighten();
      std::fill_n(bound, kRowLanes, row.bound);
    }
  }
}

#if CLIPSTEER_LEVEL == 2
// Of float32 these instructions take the place of the loops.
TARGET static inline void filter(const float* value, const OfColumns<float>& own, int64_t columns,
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
      const OfColumns<float> at = own.from(c + 16 * j);
      v[j] = _mm512_maskz_loadu_ps(lane, value + c + 16 * j);
      if (at.bias) v[j] = _mm512_add_ps(v[j], _mm512_maskz_loadu_ps(lane, at.bias));
      if (at.scale) v[j] = _mm512_mul_ps(v[j], _mm512_maskz_loadu_ps(lane, at.scale));
      const __m512 limit = at.bound ? _mm512_maskz_loadu_ps(lane, at.bound) : bound;
      pass[j] = _mm512_mask_cmp_ps_mask(lane, v[j], limit, _CMP_NLE_UQ);
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
