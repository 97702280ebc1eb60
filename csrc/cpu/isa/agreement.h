// Distances of rows of integers from a panel of such rows; included by table.h. Sums of integers are the same in any
// order. No include guard on purpose.

namespace clipsteer::ISA {

constexpr int kScoreBytes = CLIPSTEER_LEVEL == 2 ? 64 : CLIPSTEER_LEVEL == 1 ? 32 : 16;

template <class I>
using Scores __attribute__((vector_size(kScoreBytes), aligned(sizeof(I)), may_alias)) = I;

// c[l][j] += (or -=) sum_q max(a[q][l], b[q][j]) for kScoreRows values of l and the kScoreColumns of the panel b; a is
// a panel, too, from its column l on.
template <class V>
TARGET static inline void larger(const Rank<V>* a, const Rank<V>* b, int64_t k, bool subtract, Rank<V>* c,
                                 int64_t stride) {
  using I = Rank<V>;
  using Vec = Scores<I>;
  using Sum = Scores<std::make_unsigned_t<I>>;  // wraps around
  constexpr int kLanes = kScoreBytes / sizeof(I), kVectors = CLIPSTEER_LEVEL == 2 ? 4 : 2;
  constexpr int kWidth = kScoreColumns<V>;
  for (int first = 0; first < kWidth; first += kVectors * kLanes) {
    Sum sum[kScoreRows][kVectors] = {};
    for (int64_t q = 0; q < k; ++q) {
      Vec right[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        right[v] = *reinterpret_cast<const Vec*>(b + q * kWidth + first + v * kLanes);
      }
#pragma GCC unroll 4
      for (int l = 0; l < kScoreRows; ++l) {
        const Vec left = a[q * kWidth + l] - Vec{};
        for (int v = 0; v < kVectors; ++v) sum[l][v] += (Sum)(left > right[v] ? left : right[v]);
      }
    }
#pragma GCC unroll 4
    for (int l = 0; l < kScoreRows; ++l) {
      for (int v = 0; v < kVectors; ++v) {
        Sum* target = reinterpret_cast<Sum*>(c + l * stride + first + v * kLanes);
        *target = subtract ? *target - sum[l][v] : *target + sum[l][v];
      }
    }
  }
}

// c = |2 c - own - base| of n numbers, and their sum.
template <class V>
TARGET static inline WideSum apart(Rank<V>* __restrict c, const Rank<V>* __restrict base, Rank<V> own, int64_t n) {
  using U = std::make_unsigned_t<Rank<V>>;
  uint64_t low = 0, high = 0;
  for (int64_t j = 0; j < n; ++j) {
    const U t = 2 * U(c[j]) - U(own) - U(base[j]);
    const U size = Rank<V>(t) < 0 ? U(0) - t : t;
    c[j] = Rank<V>(size);
    low += uint32_t(size);
    if constexpr (sizeof(V) == 8) high += size >> 32;
  }
  return {low, high};
}

// total[j] += c[j], in two halves as of a WideSum.
template <class V>
TARGET static inline void add_columns(const Rank<V>* __restrict c, uint64_t* __restrict low,
                                      uint64_t* __restrict high, int64_t n) {
  using U = std::make_unsigned_t<Rank<V>>;
  for (int64_t j = 0; j < n; ++j) {
    low[j] += uint32_t(c[j]);
    if constexpr (sizeof(V) == 8) high[j] += U(c[j]) >> 32;
  }
}

// c = the sign of 2 c - own - base.
template <class V>
TARGET static inline void signs(Rank<V>* __restrict c, const Rank<V>* __restrict base, Rank<V> own, int64_t n) {
  using U = std::make_unsigned_t<Rank<V>>;
  for (int64_t j = 0; j < n; ++j) {
    const Rank<V> t = Rank<V>(2 * U(c[j]) - U(own) - U(base[j]));
    c[j] = Rank<V>(t > 0) - Rank<V>(t < 0);
  }
}

// count[q] += sum_j sign[j] ((a[q] > b[q][j]) - (a[q] < b[q][j])) over so many panels b; a is a column of a panel.
template <class V>
TARGET static inline void signed_order(const Rank<V>* sign, const Rank<V>* a, const Rank<V>* b, int64_t panels,
                                       int64_t k, int64_t* count) {
  using I = Rank<V>;
  using Vec = Scores<I>;
  constexpr int kLanes = kScoreBytes / sizeof(I), kWidth = kScoreColumns<V>, kVectors = kWidth / kLanes;
  for (int64_t q = 0; q < k; ++q) {
    const Vec left = a[q * kWidth] - Vec{};
    Vec above = {}, below = {};
    for (int64_t p = 0; p < panels; ++p) {
      for (int v = 0; v < kVectors; ++v) {
        const Vec right = *reinterpret_cast<const Vec*>(b + (p * k + q) * kWidth + v * kLanes);
        const Vec s = *reinterpret_cast<const Vec*>(sign + p * kWidth + v * kLanes);
        above = left > right ? above + s : above;
        below = left < right ? below + s : below;
      }
    }
    int64_t total = 0;
    for (int l = 0; l < kLanes; ++l) total += above[l] - below[l];
    count[q] += total;
  }
}

}  // namespace clipsteer::ISA
