// Adam's rule on a row; included by table.h. No include guard on purpose.

namespace clipsteer::ISA {

// Below the normal numbers 0: a row without gradients decays to there, where arithmetic is slow,
// and there it would stay.
template <class V>
TARGET static inline V normal(V value) {
  return std::abs(value) < std::numeric_limits<V>::min() ? V(0) : value;
}

template <class V>
TARGET static inline void adam(V* __restrict p, V* __restrict m, V* __restrict v,
                               const V* __restrict g, const AdamStep<V>& at, int64_t n) {
  const V lr = at.lr, eps = at.eps, scale = at.scale;
  const V rate1 = at.rate1, beta2 = at.beta2, rate2 = at.rate2;
  if (g) {
    for (int64_t i = 0; i < n; ++i) {
      m[i] = normal<V>(m[i] + rate1 * (g[i] - m[i]));
      v[i] = normal<V>(beta2 * v[i] + rate2 * g[i] * g[i]);
      p[i] -= lr * (m[i] / (std::sqrt(v[i]) / scale + eps));
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      m[i] = normal<V>(m[i] - rate1 * m[i]);
      v[i] = normal<V>(v[i] * beta2);
      p[i] -= lr * (m[i] / (std::sqrt(v[i]) / scale + eps));
    }
  }
}

}  // namespace clipsteer::ISA
