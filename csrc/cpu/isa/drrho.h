// Exponentials along a row of similarities S and down its columns at once, t = (S - S_ii) scale of
// either side; included by table.h after drift.h. No include guard on purpose.

namespace clipsteer::ISA {

// The largest of a row; `highest` takes the larger of itself and the row.
template <class V>
TARGET static inline V maxima(const V* __restrict S, V* __restrict highest, int64_t n) {
  V best[kRowLanes];
  std::fill_n(best, kRowLanes, -std::numeric_limits<V>::infinity());
  for (int64_t i = 0; i < n; i += kRowLanes) {
    const int lanes = int(std::min<int64_t>(kRowLanes, n - i));
    raise(best, S + i, lanes);
    raise(highest + i, S + i, lanes);
  }
  return largest_of(best);
}

// exp(t - peak) for t <= peak; a t of infinity has a peak of 0.
template <class V>
TARGET static inline V below_peak(V t, V peak) {
  const V x = t - peak;
  const V e = exponential(x > 0 ? V(0) : x);
  return t == std::numeric_limits<V>::infinity() ? t : e;
}

template <class V>
TARGET static inline V pair_sums(const V* __restrict S, V row_diag, V row_peak,
                                 const V* __restrict diag, const V* __restrict peak, V scale,
                                 V* __restrict total, int64_t n) {
  V sum[kRowLanes] = {}, room[3][kRowLanes], row[kRowLanes], column[kRowLanes];
  for (int64_t i = 0; i < n; i += kRowLanes) {
    const int lanes = int(std::min<int64_t>(kRowLanes, n - i));
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
  V sum[kRowLanes] = {}, room[3][kRowLanes], moment[kRowLanes], w[kRowLanes];
  for (int64_t i = 0; i < n; i += kRowLanes) {
    const int lanes = int(std::min<int64_t>(kRowLanes, n - i));
    const V* s = filled(S + i, lanes, room[0]);
    const V* own = filled(diag + i, lanes, room[1]);
    const V* far = filled(u + i, lanes, room[2]);
    each_of<V>(lanes, [&](int l) TARGET {
      moment[l] = pair_weight((s[l] - row_diag) * scale, (s[l] - own[l]) * scale, row_u, far[l], w[l]);
    });
    add(sum, moment, lanes);
    put(w, lanes, P + i);
  }
  return fold(sum);
}

}  // namespace clipsteer::ISA
