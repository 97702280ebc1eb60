// A student's pairs beside its teacher's: log-sums of both, and means of the student's under both; then the weights, and
// their products with the student's features.
#include "contrastive.h"

namespace clipsteer {
namespace {

struct Both {
  Sizes student, teacher;
};

Both checked(const char* op, const Tensor& rows, const Tensor& cols, const Tensor& diag, const Tensor& scale,
             const Tensor& teacher_rows, const Tensor& teacher_cols, const Tensor& teacher_diag,
             const Tensor& teacher_scale, int64_t offset) {
  const Both both{check_pairs(op, rows, cols, diag, scale, offset),
                  check_pairs(op, teacher_rows, teacher_cols, teacher_diag, teacher_scale, offset)};
  require(both.student.rows == both.teacher.rows && both.student.columns == both.teacher.columns &&
              both.student.dtype == both.teacher.dtype,
          op, "expected the teacher's features of the same pairs in the same dtype");
  return both;
}

}  // namespace

// Of rows and of columns: log-sums of exp t of the student and of the teacher, means of the student's t under the student's
// weights and under the teacher's (0 where there is no pair).
std::tuple<Tensor, Tensor, Tensor, Tensor> distill_sums(Tensor rows, Tensor cols, Tensor diag, Tensor scale,
                                                        Tensor teacher_rows, Tensor teacher_cols, Tensor teacher_diag,
                                                        Tensor teacher_scale, int64_t offset, bool keep) {
  const char* op = "distill_sums";
  const auto [size, other] =
      checked(op, rows, cols, diag, scale, teacher_rows, teacher_cols, teacher_diag, teacher_scale, offset);
  const int64_t m = size.rows, n = size.columns;
  Tensor row_sums = fresh(rows, {4, m}, size.wide), col_sums = fresh(rows, {4, n}, size.wide);
  Tensor kept = fresh(rows, {keep ? m : 0, row_stride(n)}, size.wide);
  Tensor teacher_kept = fresh(rows, {keep ? m : 0, row_stride(n)}, size.wide);
  dispatch(op, size.dtype, [&](auto zero) {
    using T = decltype(zero);
    using V = Compute<T>;
    Sweep<T> sweep(data<T>(rows), data<T>(cols), m, n, size.d);
    Sweep<T> teacher_sweep(data<T>(teacher_rows), data<T>(teacher_cols), m, n, other.d);
    Pairs<T> student(sweep, data<V>(diag), *data<V>(scale), offset);
    Pairs<T> teacher(teacher_sweep, data<V>(teacher_diag), *data<V>(teacher_scale), offset);
    V* total = data<V>(col_sums);
    // what sums, in order, are to become
    const auto end = [](const V* sums, V peak, V teacher_peak, V* out, int64_t step) {
      for (int k = 0; k < 2; ++k) {
        out[k * step] = V(std::log(double(sums[k])) + double(k ? teacher_peak : peak));
        out[(k + 2) * step] = sums[k] == 0 ? V(0) : sums[k + 2] / sums[k];
      }
    };
    sum_pairs<4, T, 2>(
        {&student, &teacher}, {keep ? data<V>(kept) : nullptr, keep ? data<V>(teacher_kept) : nullptr},
        {total, total + n, total + 2 * n, total + 3 * n},
        [&](int64_t row, int64_t i, int64_t j, int64_t count, V* some) {
          const auto side = [&](Pairs<T>& p) {
            return PairSide<V>{p.diag[offset + row], p.row_peaks.get()[i], p.diag + j, p.peaks.get() + j, p.scale};
          };
          const int64_t at = i * sweep.stride() + j;
          kernels<V>().cross_sums(student.S + at, teacher.S + at, side(student), side(teacher), total + j, n, some,
                                  count);
        },
        [&](int64_t row, int64_t i, const V* sums) {
          end(sums, student.row_peaks.get()[i], teacher.row_peaks.get()[i], data<V>(row_sums) + row, m);
        });
    for (int64_t j = 0; j < n; ++j) {
      const V sums[4] = {total[j], total[n + j], total[2 * n + j], total[3 * n + j]};
      end(sums, student.peaks.get()[j], teacher.peaks.get()[j], total + j, n);
    }
  });
  return {row_sums, col_sums, kept, teacher_kept};
}

// With the weights w of drrho_grad, v those of the teacher, and own_i on the partners: f0 w - f1 v times cols, and its
// transpose times rows. Both have a line of row_u and of col_u.
std::tuple<Tensor, Tensor> distill_grad(Tensor rows, Tensor cols, Tensor diag, Tensor scale, Tensor teacher_rows,
                                        Tensor teacher_cols, Tensor teacher_diag, Tensor teacher_scale, int64_t offset,
                                        Tensor row_u, Tensor col_u, Tensor own, Tensor factors, Tensor kept,
                                        Tensor teacher_kept, bool need_rows, bool need_cols) {
  const char* op = "distill_grad";
  const auto [size, other] =
      checked(op, rows, cols, diag, scale, teacher_rows, teacher_cols, teacher_diag, teacher_scale, offset);
  const int64_t m = size.rows, n = size.columns;
  check(op, "row_u", row_u, size.wide, {2, m});
  check(op, "col_u", col_u, size.wide, {2, n});
  check(op, "own", own, size.wide, {m});
  check(op, "factors", factors, size.wide, {2});
  check_kept(op, kept, size);
  check_kept(op, teacher_kept, size);
  Tensor d_rows = fresh(rows, {need_rows ? m : 0, size.d}, size.wide);
  Tensor d_cols = fresh(rows, {need_cols ? n : 0, size.d}, size.wide);
  dispatch(op, size.dtype, [&](auto zero) {
    using T = decltype(zero);
    using V = Compute<T>;
    Sweep<T> sweep(data<T>(rows), data<T>(cols), m, n, size.d);
    Sweep<T> teacher_sweep(data<T>(teacher_rows), data<T>(teacher_cols), m, n, other.d);
    const bool there = kept.size(0) > 0 && teacher_kept.size(0) > 0;
    const int64_t stride = sweep.stride();
    Buffer<V> tile(there ? 0 : sweep.tile_rows() * stride);
    if (!there) teacher_sweep.pack_columns();
    const V* f = data<V>(factors);
    const auto weigh = [&](int64_t at, int64_t count, V* P) {
      if (!there) {
        sweep.similarities(at, count, P);
        teacher_sweep.similarities(at, count, tile.get());
      }
      sweep.each_row(count, [&](int64_t i) {
        const V* S = there ? data<V>(kept) + (at + i) * stride : P + i * stride;
        const V* R = there ? data<V>(teacher_kept) + (at + i) * stride : tile.get() + i * stride;
        const int64_t self = offset + at + i, starts[] = {0, self + 1}, ends[] = {self, n};
        for (int half = 0; half < 2; ++half) {
          const int64_t j = starts[half];
          const auto side = [&](const Tensor& own_pairs, const Tensor& factor, int64_t k) {
            return PairSide<V>{data<V>(own_pairs)[self], data<V>(row_u)[k * m + at + i], data<V>(own_pairs) + j,
                               data<V>(col_u) + k * n + j, *data<V>(factor)};
          };
          kernels<V>().cross_weights(S + j, R + j, P + i * stride + j, side(diag, scale, 0),
                                     side(teacher_diag, teacher_scale, 1), f[0], f[1], ends[half] - j);
        }
        P[i * stride + self] = data<V>(own)[at + i];
      });
    };
    sweep.gradients(size.d, need_rows ? data<V>(d_rows) : nullptr, need_cols ? data<V>(d_cols) : nullptr, !there, weigh);
  });
  return {d_rows, d_cols};
}

}  // namespace clipsteer
