// Exponentials along a row of similarities S and down its columns at once, t = (S - S_ii) scale of
// either side; included by table.h after drift.h. No include guard on purpose.

namespace clipsteer::ISA {

constexpr int kPairLanes = 32;

// The largest of a row; `highest` takes the larger of itself and the row.
template <class V>
TARGET static inline V maxima(const V* __restrict S, V* __restrict highest, int64_t n) {
  V best[kPairLanes];
  for (int l = 0; l < kPairLanes; ++l) best[l] = -std::numeric_limits<V>::infinity();
  int64_t i = 0;
  for (; i + kPairLanes <= n; i += kPairLanes) {
    for (int l = 0; l < kPairLanes; ++l) {
      const V s = S[i + l];
      best[l] = s > best[l] ? s : best[l];
      highest[i + l] = s > highest[i + l] ? s : highest[i + l];
    }
  }
  for (; i < n; ++i) {
    best[0] = S[i] > best[0] ? S[i] : best[0];
    highest[i] = S[i] > highest[i] ? S[i] : highest[i];
  }
  for (int l = 1; l < kPairLanes; ++l) best[0] = best[l] > best[0] ? best[l] : best[0];
  return best[0];
}

// exp(t - peak) for t <= peak; a t of infinity has a peak of 0.
template <class V>
TARGET static inline V below_peak(V t, V peak) {
  const V x = t - peak;
  const V e = exponential(x > 0 ? V(0) : x);
  return t == std::numeric_limits<V>::infinity() ? t : e;
}

template <class V>
TARGET static inline V fold(V* sum) {
  for (int half = kPairLanes / 2; half; half /= 2) {
    for (int l = 0; l < half; ++l) sum[l] += sum[l + half];
  }
  return sum[0];
}

template <class V>
TARGET static inline V pair_sums(const V* __restrict S, V row_diag, V row_peak,
                                 const V* __restrict diag, const V* __restrict peak, V scale,
                                 V* __restrict total, int64_t n) {
  V sum[kPairLanes] = {};
  for (int64_t i = 0; i < n; i += kPairLanes) {
    const int lanes = int(std::min<int64_t>(kPairLanes, n - i));
    if (lanes == kPairLanes) {
      for (int l = 0; l < kPairLanes; ++l) {
        sum[l] += below_peak((S[i + l] - row_diag) * scale, row_peak);
        total[i + l] += below_peak((S[i + l] - diag[i + l]) * scale, peak[i + l]);
      }
    } else {
      for (int l = 0; l < lanes; ++l) {
        sum[l] += below_peak((S[i + l] - row_diag) * scale, row_peak);
        total[i + l] += below_peak((S[i + l] - diag[i + l]) * scale, peak[i + l]);
      }
    }
  }
  return fold(sum);
}

// w = exp(t - u) of both sides; returns w t. Past 88 weights saturate.
template <class V>
TARGET static inline V pair_weight(V here, V there, V row_u, V col_u, V& w) {
  const V a = here - row_u, b = there - col_u;
  const V first = exponential(a > 88 ? V(88) : a), second = exponential(b > 88 ? V(88) : b);
  w = first + second;
  return first * here + second * there;
}

template <class V>
TARGET static inline V pair_weights(const V* S, V* P, V row_diag, V row_u, const V* __restrict diag,
                                    const V* __restrict u, V scale, int64_t n) {
  V sum[kPairLanes] = {}, s[kPairLanes], w[kPairLanes];
  int64_t i = 0;
  for (; i + kPairLanes <= n; i += kPairLanes) {
    // through arrays of its own, as S may be P
    for (int l = 0; l < kPairLanes; ++l) s[l] = S[i + l];
    for (int l = 0; l < kPairLanes; ++l) {
      sum[l] += pair_weight((s[l] - row_diag) * scale, (s[l] - diag[i + l]) * scale, row_u,
                            u[i + l], w[l]);
    }
    for (int l = 0; l < kPairLanes; ++l) P[i + l] = w[l];
  }
  for (int l = 0; i + l < n; ++l) {
    const V one = S[i + l];
    sum[l] += pair_weight((one - row_diag) * scale, (one - diag[i + l]) * scale, row_u, u[i + l],
                          P[i + l]);
  }
  return fold(sum);
}

}  // namespace clipsteer::ISA
