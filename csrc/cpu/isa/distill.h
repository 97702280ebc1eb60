// Two matrices of similarities of the same pairs, a student's S and a teacher's R, each with sides of its own; included by
// table.h after drrho.h. No include guard on purpose.

namespace clipsteer::ISA {

// e adds to the sum, e t to the sum of products: nothing where e is 0, though t be infinite.
template <class V>
TARGET static inline V weighted(V e, V t) {
  return e == 0 ? V(0) : e * t;
}

// Sums of rows (returned) and of columns (4 lines of total, `step` apart): exp s and exp r below their peaks, then s times
// either.
template <class V>
TARGET static inline void cross_sums(const V* __restrict S, const V* __restrict R,
                                     const PairSide<V>& student, const PairSide<V>& teacher,
                                     V* total, int64_t step, V* out, int64_t n) {
  V sum[4][kPairLanes] = {};
  const V s_own = student.row_diag, s_row = student.row, s_scale = student.scale;
  const V r_own = teacher.row_diag, r_row = teacher.row, r_scale = teacher.scale;
  const V* __restrict s_diag = student.diag;
  const V* __restrict s_peak = student.column;
  const V* __restrict r_diag = teacher.diag;
  const V* __restrict r_peak = teacher.column;
  // a side at a time, and sums of columns through an array of their own: with ten streams at once the compiler would take
  // one number at a time
  V t[kPairLanes], part[4][kPairLanes];
  for (int64_t i = 0; i < n; i += kPairLanes) {
    const int lanes = int(std::min<int64_t>(kPairLanes, n - i));
    const auto row_side = [&](int l) TARGET {
      t[l] = (S[i + l] - s_own) * s_scale;
      const V e = below_peak(t[l], s_row), f = below_peak((R[i + l] - r_own) * r_scale, r_row);
      sum[0][l] += e;
      sum[1][l] += f;
      sum[2][l] += weighted(e, t[l]);
      sum[3][l] += weighted(f, t[l]);
    };
    const auto column_side = [&](int l) TARGET {
      const V c = (S[i + l] - s_diag[i + l]) * s_scale;
      part[0][l] = below_peak(c, s_peak[i + l]);
      part[1][l] = below_peak((R[i + l] - r_diag[i + l]) * r_scale, r_peak[i + l]);
      part[2][l] = weighted(part[0][l], c);
      part[3][l] = weighted(part[1][l], c);
    };
    if (lanes == kPairLanes) {
      for (int l = 0; l < kPairLanes; ++l) row_side(l);
      for (int l = 0; l < kPairLanes; ++l) column_side(l);
      for (int s = 0; s < 4; ++s) {
        V* into = total + s * step + i;
        for (int l = 0; l < kPairLanes; ++l) into[l] += part[s][l];
      }
    } else {
      for (int l = 0; l < lanes; ++l) row_side(l);
      for (int l = 0; l < lanes; ++l) column_side(l);
      for (int s = 0; s < 4; ++s) {
        for (int l = 0; l < lanes; ++l) total[s * step + i + l] += part[s][l];
      }
    }
  }
  for (int s = 0; s < 4; ++s) out[s] = fold(sum[s]);
}

// P = f times the student's weights of both sides - g times the teacher's; P may be S.
template <class V>
TARGET static inline void cross_weights(const V* S, const V* __restrict R, V* P,
                                        const PairSide<V>& student, const PairSide<V>& teacher, V f,
                                        V g, int64_t n) {
  const V s_own = student.row_diag, s_row = student.row, s_scale = student.scale;
  const V r_own = teacher.row_diag, r_row = teacher.row, r_scale = teacher.scale;
  const V* __restrict s_diag = student.diag;
  const V* __restrict s_u = student.column;
  const V* __restrict r_diag = teacher.diag;
  const V* __restrict r_u = teacher.column;
  V s[kPairLanes], w[kPairLanes], v[kPairLanes];
  for (int64_t i = 0; i < n; i += kPairLanes) {
    const int lanes = int(std::min<int64_t>(kPairLanes, n - i));
    // through arrays of its own, as S may be P
    for (int l = 0; l < lanes; ++l) s[l] = S[i + l];
    const auto one = [&](int l) TARGET {
      pair_weight((s[l] - s_own) * s_scale, (s[l] - s_diag[i + l]) * s_scale, s_row, s_u[i + l], w[l]);
      const V r = R[i + l];
      pair_weight((r - r_own) * r_scale, (r - r_diag[i + l]) * r_scale, r_row, r_u[i + l], v[l]);
    };
    if (lanes == kPairLanes) {
      for (int l = 0; l < kPairLanes; ++l) one(l);
    } else {
      for (int l = 0; l < lanes; ++l) one(l);
    }
    for (int l = 0; l < lanes; ++l) P[i + l] = f * w[l] - g * v[l];
  }
}

}  // namespace clipsteer::ISA
