// Two matrices of similarities of the same pairs, a student's S and a teacher's R, each with sides of its own; included by
// table.h after drrho.h. No include guard on purpose.

namespace clipsteer::ISA {

// e adds to the sum, e t to the sum of products: nothing where e is 0, though t be infinite.
template <class V>
TARGET static inline V weighted(V e, V t) {
  const V product = e * t;  // made in any case, so that the compiler chooses instead of branching
  return e == 0 ? V(0) : product;
}

// Sums of rows (returned) and of columns (4 lines of total, `step` apart): exp s and exp r below their peaks, then s times
// either.
template <class V>
TARGET static inline void cross_sums(const V* __restrict S, const V* __restrict R,
                                     const PairSide<V>& student, const PairSide<V>& teacher,
                                     V* total, int64_t step, V* out, int64_t n) {
  V sum[4][kRowLanes] = {}, room[6][kRowLanes], t[kRowLanes], part[4][kRowLanes];
  const V s_own = student.row_diag, s_row = student.row, s_scale = student.scale;
  const V r_own = teacher.row_diag, r_row = teacher.row, r_scale = teacher.scale;
  for (int64_t i = 0; i < n; i += kRowLanes) {
    const int lanes = int(std::min<int64_t>(kRowLanes, n - i));
    const V* s = filled(S + i, lanes, room[0]);
    const V* r = filled(R + i, lanes, room[1]);
    const V* s_diag = filled(student.diag + i, lanes, room[2]);
    const V* s_peak = filled(student.column + i, lanes, room[3]);
    const V* r_diag = filled(teacher.diag + i, lanes, room[4]);
    const V* r_peak = filled(teacher.column + i, lanes, room[5]);
    // a step at a time, through arrays: of all at once the compiler would take one number at a time
    const auto products = [&]() TARGET {
      for (int k = 0; k < 2; ++k) {
        for (int l = 0; l < kRowLanes; ++l) part[k + 2][l] = weighted(part[k][l], t[l]);
      }
    };
    for (int l = 0; l < kRowLanes; ++l) t[l] = (s[l] - s_own) * s_scale;
    for (int l = 0; l < kRowLanes; ++l) part[0][l] = below_peak(t[l], s_row);
    for (int l = 0; l < kRowLanes; ++l) part[1][l] = below_peak((r[l] - r_own) * r_scale, r_row);
    products();
    for (int k = 0; k < 4; ++k) add(sum[k], part[k], lanes);
    for (int l = 0; l < kRowLanes; ++l) t[l] = (s[l] - s_diag[l]) * s_scale;
    for (int l = 0; l < kRowLanes; ++l) part[0][l] = below_peak(t[l], s_peak[l]);
    for (int l = 0; l < kRowLanes; ++l) part[1][l] = below_peak((r[l] - r_diag[l]) * r_scale, r_peak[l]);
    products();
    for (int k = 0; k < 4; ++k) add(total + k * step + i, part[k], lanes);
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
  V room[6][kRowLanes], w[kRowLanes], v[kRowLanes];
  for (int64_t i = 0; i < n; i += kRowLanes) {
    const int lanes = int(std::min<int64_t>(kRowLanes, n - i));
    const V* s = filled(S + i, lanes, room[0]);
    const V* r = filled(R + i, lanes, room[1]);
    const V* s_diag = filled(student.diag + i, lanes, room[2]);
    const V* s_u = filled(student.column + i, lanes, room[3]);
    const V* r_diag = filled(teacher.diag + i, lanes, room[4]);
    const V* r_u = filled(teacher.column + i, lanes, room[5]);
    for (int l = 0; l < kRowLanes; ++l) {
      pair_weight((s[l] - s_own) * s_scale, (s[l] - s_diag[l]) * s_scale, s_row, s_u[l], w[l]);
    }
    for (int l = 0; l < kRowLanes; ++l) {
      pair_weight((r[l] - r_own) * r_scale, (r[l] - r_diag[l]) * r_scale, r_row, r_u[l], v[l]);
    }
    for (int l = 0; l < kRowLanes; ++l) w[l] = f * w[l] - g * v[l];
    put(w, lanes, P + i);
  }
}

}  // namespace clipsteer::ISA
