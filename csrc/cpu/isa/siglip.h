// Sigmoids of a row of similarities; included by table.h after drrho.h. No include guard on purpose.

namespace clipsteer::ISA {

// log(1 + e) for e in [0, 1]: twice the area tangent of e / (2 + e), whose series in its square, of at most 1/9, is off by
// less than a rounding after the eighth term.
TARGET static inline float log_above_one(float e) {
  const float s = e / (2.0f + e), q = s * s;
  float y = 1.0f / 15;
  y = y * q + 1.0f / 13;
  y = y * q + 1.0f / 11;
  y = y * q + 1.0f / 9;
  y = y * q + 1.0f / 7;
  y = y * q + 1.0f / 5;
  y = y * q + 1.0f / 3;
  return 2.0f * (s + s * (q * y));
}

TARGET static inline double log_above_one(double e) { return std::log1p(e); }

// With z = sign (S scale + bias): S becomes w = sign sigmoid(z); the sums of log(1 + exp z), of w S and of w.
template <class V>
TARGET static inline void sigmoid_weights(V* __restrict S, V sign, V scale, V bias, V* out,
                                          int64_t n) {
  V sum[3][kPairLanes] = {};
  for (int64_t i = 0; i < n; i += kPairLanes) {
    const int lanes = int(std::min<int64_t>(kPairLanes, n - i));
    const auto one = [&](int l) TARGET {
      const V s = S[i + l], z = sign * (s * scale + bias);
      const V e = exponential(z > 0 ? -z : z), share = 1 / (1 + e);
      const V w = sign * (z > 0 ? share : e * share);
      sum[0][l] += (z > 0 ? z : V(0)) + log_above_one(e);
      sum[1][l] += w * s;
      sum[2][l] += w;
      S[i + l] = w;
    };
    if (lanes == kPairLanes) {
      for (int l = 0; l < kPairLanes; ++l) one(l);
    } else {
      for (int l = 0; l < lanes; ++l) one(l);
    }
  }
  for (int s = 0; s < 3; ++s) out[s] = fold(sum[s]);
}

}  // namespace clipsteer::ISA
