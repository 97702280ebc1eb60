// Sigmoids of a row of similarities; included by table.h after drrho.h. No include guard on purpose.

namespace clipsteer::ISA {

// log(1 + e) for e in [0, 1], of s = e / (2 + e): twice its area tangent, whose series in its square, of at most 1/9, is off
// by less than a rounding after the eighth term; in double after the eighteenth.
TARGET static inline float log_above_one(float s) {
  const float q = s * s;
  float y = 1.0f / 15;
  y = y * q + 1.0f / 13;
  y = y * q + 1.0f / 11;
  y = y * q + 1.0f / 9;
  y = y * q + 1.0f / 7;
  y = y * q + 1.0f / 5;
  y = y * q + 1.0f / 3;
  return 2.0f * (s + s * (q * y));
}

TARGET static inline double log_above_one(double s) {
  const double q = s * s;
  double y = 1.0 / 35;
#pragma GCC unroll 16
  for (int k = 33; k > 1; k -= 2) y = y * q + 1.0 / k;
  return 2.0 * (s + s * (q * y));
}

// With z = sign (S scale + bias): S becomes w = sign sigmoid(z); the sums of log(1 + exp z), of w S and of w.
template <class V>
TARGET static inline void sigmoid_weights(V* __restrict S, V sign, V scale, V bias, V* out,
                                          int64_t n) {
  V sum[3][kRowLanes] = {}, room[kRowLanes], loss[kRowLanes], w[kRowLanes], moment[kRowLanes];
  for (int64_t i = 0; i < n; i += kRowLanes) {
    const int lanes = int(std::min<int64_t>(kRowLanes, n - i));
    const V* s = filled(S + i, lanes, room);
    each_of<V>(lanes, [&](int l) TARGET {
      const V z = sign * (s[l] * scale + bias);
      const V e = exponential(z > 0 ? -z : z), one = 1 + e, two = 2 + e;
      const V inverse = 1 / (one * two);  // divisions take longest: one is enough
      const V share = two * inverse;
      w[l] = sign * (z > 0 ? share : e * share);
      loss[l] = (z > 0 ? z : V(0)) + log_above_one(e * one * inverse);
      moment[l] = w[l] * s[l];
    });
    add(sum[0], loss, lanes);
    add(sum[1], moment, lanes);
    add(sum[2], w, lanes);
    put(w, lanes, S + i);
  }
  for (int s = 0; s < 3; ++s) out[s] = fold(sum[s]);
}

}  // namespace clipsteer::ISA
