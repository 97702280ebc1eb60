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

// A vector of numbers: where fewer are left, these and zeros behind them, which keeps the compiler from taking the last ones
// one at a time. What becomes of the zeros is nobody's: `add` leaves it out.
template <class V>
TARGET static inline const V* filled(const V* x, int lanes, V* room) {
  if (lanes == kPairLanes) return x;
  std::copy_n(x, lanes, room);
  std::fill(room + lanes, room + kPairLanes, V(0));
  return room;
}

// f(l) for as many whole steps as `lanes` take.
template <class V, class F>
TARGET static inline void each_of(int lanes, F&& f) {
  constexpr int kStep = 64 / sizeof(V);
  for (int from = 0; from < lanes; from += kStep) {
    for (int l = 0; l < kStep; ++l) f(from + l);
  }
}

template <class V>
TARGET static inline void add(V* __restrict sum, const V* __restrict x, int lanes) {
  if (lanes == kPairLanes) {
    for (int l = 0; l < kPairLanes; ++l) sum[l] += x[l];
  } else {
    for (int l = 0; l < lanes; ++l) sum[l] += x[l];
  }
}

template <class V>
TARGET static inline V pair_sums(const V* __restrict S, V row_diag, V row_peak,
                                 const V* __restrict diag, const V* __restrict peak, V scale,
                                 V* __restrict total, int64_t n) {
  V sum[kPairLanes] = {}, room[3][kPairLanes], row[kPairLanes], column[kPairLanes];
  for (int64_t i = 0; i < n; i += kPairLanes) {
    const int lanes = int(std::min<int64_t>(kPairLanes, n - i));
    const V* s = filled(S + i, lanes, room[0]);
    const V* own = filled(diag + i, lanes, room[1]);
    const V* top = filled(peak + i, lanes, room[2]);
    each_of<V>(lanes, [&](int l) TARGET { row[l] = below_peak((s[l] - row_diag) * scale, row_peak); });
    each_of<V>(lanes, [&](int l) TARGET { column[l] = below_peak((s[l] - own[l]) * scale, top[l]); });
    add(sum, row, lanes);
    add(total + i, column, lanes);
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
  V sum[kPairLanes] = {}, room[3][kPairLanes], moment[kPairLanes], w[kPairLanes];
  for (int64_t i = 0; i < n; i += kPairLanes) {
    const int lanes = int(std::min<int64_t>(kPairLanes, n - i));
    const V* s = filled(S + i, lanes, room[0]);
    const V* own = filled(diag + i, lanes, room[1]);
    const V* far = filled(u + i, lanes, room[2]);
    each_of<V>(lanes, [&](int l) TARGET {
      moment[l] = pair_weight((s[l] - row_diag) * scale, (s[l] - own[l]) * scale, row_u, far[l], w[l]);
    });
    add(sum, moment, lanes);
    std::copy_n(w, lanes, P + i);  // through an array of its own, as S may be P
  }
  return fold(sum);
}

}  // namespace clipsteer::ISA
