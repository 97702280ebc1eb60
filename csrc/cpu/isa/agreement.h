// Distances of rows of integers from a panel of such rows; included by table.h. Sums of integers are the same in any
// order. No include guard on purpose.

namespace clipsteer::ISA {

constexpr int kScoreBytes = CLIPSTEER_LEVEL == 2 ? 64 : CLIPSTEER_LEVEL == 1 ? 32 : 16;

template <class I>
using Scores __attribute__((vector_size(kScoreBytes), aligned(sizeof(I)), may_alias)) = I;

// The size of the largest of n numbers; NaN where one is not finite.
template <class V>
TARGET static inline V largest(const V* x, int64_t n) {
  V size[kRowLanes] = {}, rest[kRowLanes] = {}, room[kRowLanes];
  for (int64_t i = 0; i < n; i += kRowLanes) {
    const V* number = filled(x + i, int(std::min<int64_t>(kRowLanes, n - i)), room);
    for (int l = 0; l < kRowLanes; ++l) {
      const V here = std::abs(number[l]);
      size[l] = here > size[l] ? here : size[l];
      rest[l] += here * 0;
    }
  }
  return largest_of(size) + fold(rest);
}

// The sum of the sizes of n numbers times both factors.
template <class V>
TARGET static inline double length(const V* x, double first, double second, int64_t n) {
  double sum[kRowLanes] = {};
  V room[kRowLanes];
  for (int64_t i = 0; i < n; i += kRowLanes) {
    const V* number = filled(x + i, int(std::min<int64_t>(kRowLanes, n - i)), room);
    for (int l = 0; l < kRowLanes; ++l) sum[l] += std::abs(double(number[l]) * first * second);
  }
  return fold(sum);
}

// The nearest integer of a number that has room in it.
TARGET static inline int32_t nearest(double x, int32_t) {
  const double shifted = x + 0x1.8p52;  // whose last digits are an integer's
  uint64_t bits;
  std::memcpy(&bits, &shifted, 8);
  return int32_t(uint32_t(bits));
}
TARGET static inline int64_t nearest(double x, int64_t) { return std::llrint(x); }

// Those of n numbers times both factors.
template <class V>
TARGET static inline void integers(const V* __restrict x, double first, double second, int64_t n,
                                   Rank<V>* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = nearest(double(x[i]) * first * second, Rank<V>());
}

// c[j] = sum_q max(p[0][q], p[1 + j][q]) - sum_q max(q[0][q], q[1 + j][q]) for `count` rows, whose lengths are multiples of
// kScoreBytes.
template <class V>
TARGET static inline void larger_rows(const Rank<V>* p, int64_t p_stride, const Rank<V>* q, int64_t q_stride,
                                      int64_t count, Rank<V>* c) {
  using I = Rank<V>;
  using Vec = Scores<I>;
  using Sum = Scores<std::make_unsigned_t<I>>;  // wraps around
  constexpr int kLanes = kScoreBytes / sizeof(I), kTogether = 4;
  for (int64_t j = 0; j < count; j += kTogether) {
    const int64_t rows = std::min<int64_t>(kTogether, count - j);
    Sum sum[kTogether] = {};
    const auto add = [&](const I* x, int64_t stride, bool subtract) TARGET {
      const I* other[kTogether];
      for (int l = 0; l < kTogether; ++l) other[l] = x + (1 + j + std::min<int64_t>(l, rows - 1)) * stride;
      for (int64_t at = 0; at < stride; at += kLanes) {
        const Vec left = *reinterpret_cast<const Vec*>(x + at);
#pragma GCC unroll 4
        for (int l = 0; l < kTogether; ++l) {
          const Vec right = *reinterpret_cast<const Vec*>(other[l] + at);
          const Sum most = (Sum)(left > right ? left : right);
          sum[l] = subtract ? sum[l] - most : sum[l] + most;
        }
      }
    };
    add(p, p_stride, false);
    add(q, q_stride, true);
    for (int64_t l = 0; l < rows; ++l) {
      std::make_unsigned_t<I> lane[kLanes];
      std::memcpy(lane, &sum[l], sizeof(lane));
      c[j + l] = I(fold(lane));
    }
  }
}

// With o = sign[j] ((x[0] > x[1 + j]) - (x[0] < x[1 + j])) of `count` rows: n[0] += o, n[1 + j] -= o.
template <class V>
TARGET static inline void order_rows(const V* x, int64_t stride, const Rank<V>* sign, int64_t count, Rank<V>* n) {
  using I = Rank<V>;
  using Vec = Scores<I>;
  constexpr int kLanes = kScoreBytes / sizeof(I);
  for (int64_t q = 0; q < stride; q += kLanes) {
    const Scores<V> own = *reinterpret_cast<const Scores<V>*>(x + q);
    Vec mine = *reinterpret_cast<const Vec*>(n + q);
    for (int64_t j = 1; j <= count; ++j) {
      const Scores<V> other = *reinterpret_cast<const Scores<V>*>(x + j * stride + q);
      const Vec s = sign[j - 1] - Vec{}, order = (own > other ? s : Vec{}) - (own < other ? s : Vec{});
      mine += order;
      *reinterpret_cast<Vec*>(n + j * stride + q) -= order;
    }
    *reinterpret_cast<Vec*>(n + q) = mine;
  }
}

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
