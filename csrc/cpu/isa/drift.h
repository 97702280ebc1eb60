// Gaussian weights in log space; included by table.h. No include guard on purpose.

#include <bit>

namespace clipsteer::ISA {

// exp(x) for x <= 0: x = n log 2 + r, a polynomial of degree 7 in |r| <= log(2)/2 (off by less than
// r^8/8!, an eighth of a rounding), and n into the exponent. Below -87, where numbers stop being
// normal, 0; NaN stays.
TARGET static inline float exponential(float x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer
  const float z = x * 1.442695041f + kShift;
  const float n = z - kShift;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float y = 1.0f / 5040;
  y = y * r + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const float scale = std::bit_cast<float>((std::bit_cast<uint32_t>(z) << 23) + 0x3f800000u);
  return x < -87.0f ? 0.0f : y * scale;
}

// The same with a polynomial of degree 13; below -708, 0.
TARGET static inline double exponential(double x) {
  constexpr double kShift = 0x1.8p52;
  const double z = x * 0x1.71547652b82fep0 + kShift;
  const double n = z - kShift;
  // log(2) in two parts, of which the first has room for n
  const double r = (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
  double y = 1.0 / 6227020800;
  y = y * r + 1.0 / 479001600;
  y = y * r + 1.0 / 39916800;
  y = y * r + 1.0 / 3628800;
  y = y * r + 1.0 / 362880;
  y = y * r + 1.0 / 40320;
  y = y * r + 1.0 / 5040;
  y = y * r + 1.0 / 720;
  y = y * r + 1.0 / 120;
  y = y * r + 1.0 / 24;
  y = y * r + 1.0 / 6;
  y = y * r + 0.5;
  y = y * r + 1.0;
  y = y * r + 1.0;
  const double scale = std::bit_cast<double>((std::bit_cast<uint64_t>(z) << 52) + 0x3ff0000000000000u);
  return x < -708.0 ? 0.0 : y * scale;
}

// Past kFar<V>, squares saturate: there rows count as equally far.
template <class V>
TARGET static inline V log_weight(V dot, V square, V own, V kappa) {
  V distance = (square + own) - 2 * dot;
  distance = distance < 0 ? V(0) : distance;
  return -kappa * (distance > kFar<V> ? kFar<V> : distance);
}

template <class V>
TARGET static inline V log_weights(V* __restrict dot, const V* __restrict square, V own, V kappa,
                                   int64_t n) {
  V best[kRowLanes], room[2][kRowLanes], t[kRowLanes];
  std::fill_n(best, kRowLanes, -std::numeric_limits<V>::infinity());
  for (int64_t i = 0; i < n; i += kRowLanes) {
    const int lanes = int(std::min<int64_t>(kRowLanes, n - i));
    const V* product = filled(dot + i, lanes, room[0]);
    const V* other = filled(square + i, lanes, room[1]);
    for (int l = 0; l < kRowLanes; ++l) t[l] = log_weight(product[l], other[l], own, kappa);
    raise(best, t, lanes);
    put(t, lanes, dot + i);
  }
  return largest_of(best);
}

template <class V>
TARGET static inline V weights(V* __restrict log_w, V peak, V floor, int64_t n) {
  V sum[kRowLanes] = {}, room[kRowLanes], w[kRowLanes];
  for (int64_t i = 0; i < n; i += kRowLanes) {
    const int lanes = int(std::min<int64_t>(kRowLanes, n - i));
    const V* t = filled(log_w + i, lanes, room);
    each_of<V>(lanes, [&](int l) TARGET { w[l] = exponential(t[l] - peak) + floor; });
    add(sum, w, lanes);
    put(w, lanes, log_w + i);
  }
  return fold(sum);
}

// mu + moved / total. By the product with the rounded reciprocal and what it leaves over: the mean of integers is theirs to the
// bit, as by division, which takes several times as long. A float's sum, rounded once, keeps what rounding takes from it: in
// double it would take three times as long. Infinities, and what overflows, leave nothing to add.
template <bool ONCE, class V>
TARGET static inline V settled(V mu, V moved, V total, V inverse) {
#if CLIPSTEER_LEVEL > 0
  const V mean = moved * inverse, rest = std::fma(-mean, total, moved);
  if constexpr (ONCE && sizeof(V) == 4) {
    const V sum = mu + mean, part = sum - mu;
    const V lost = std::fma(rest, inverse, (mu - (sum - part)) + (mean - part));
    return lost == lost ? sum + lost : sum;
  } else {
    return mu + (rest == rest ? std::fma(rest, inverse, mean) : mean);
  }
#else
  return V(double(mu) + double(moved) / double(total));
#endif
}

template <class V>
TARGET static inline void settle(const V* __restrict mu, const V* __restrict moved, V total, V* __restrict out,
                                 int64_t n) {
  const V inverse = 1 / total;
  for (int64_t i = 0; i < n; ++i) out[i] = settled<true>(mu[i], moved[i], total, inverse);
}

// Of numbers that are rounded again.
template <class T>
  requires kNarrow<T>
TARGET static inline void settle(const T* __restrict mu, const float* __restrict moved, float total, T* __restrict out,
                                 int64_t n) {
  const float inverse = 1 / total;
  float mean[kRowLanes];
  each_vector<kRowLanes>(n, [&](int64_t i, auto lanes) TARGET {
    widen(mu + i, mean, lanes);
    for (int l = 0; l < lanes; ++l) mean[l] = settled<false>(mean[l], moved[i + l], total, inverse);
    narrow(mean, out + i, lanes);
  });
}

}  // namespace clipsteer::ISA
