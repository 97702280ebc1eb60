// A student's pairs beside its teacher's: log-sums of both, and means of the student's under both; then the weights, and
// their products with the student's features. Sweep by sweep, and distill_loss as a whole.
#include "softmaxes.h"

namespace clipsteer {
namespace {

struct Both {
  Sizes student, teacher;
};

Both same_pairs(const char* op, const Both& both) {
  require(both.student.rows == both.teacher.rows && both.student.columns == both.teacher.columns &&
              both.student.dtype == both.teacher.dtype,
          op, "expected the teacher's features of the same pairs in the same dtype");
  return both;
}

Both checked(const char* op, const Tensor& rows, const Tensor& cols, const Tensor& diag, const Tensor& scale,
             const Tensor& teacher_rows, const Tensor& teacher_cols, const Tensor& teacher_diag,
             const Tensor& teacher_scale, int64_t offset) {
  return same_pairs(op, {check_pairs(op, rows, cols, diag, scale, offset),
                         check_pairs(op, teacher_rows, teacher_cols, teacher_diag, teacher_scale, offset)});
}

// What sums, in order, are to become.
template <class V>
void finish(const V* sums, V peak, V teacher_peak, V* out, int64_t step) {
  for (int k = 0; k < 2; ++k) {
    out[k * step] = V(std::log(double(sums[k])) + double(k ? teacher_peak : peak));
    out[(k + 2) * step] = sums[k] == 0 ? V(0) : sums[k + 2] / sums[k];
  }
}

template <class T>
void cross_sums(Pairs<T>& student, Pairs<T>& teacher, Compute<T>* kept, Compute<T>* teacher_kept, Compute<T>* row_sums,
                Compute<T>* total) {
  using V = Compute<T>;
  const int64_t m = student.sweep.rows(), n = student.sweep.columns(), stride = student.sweep.stride();
  sum_pairs<4, T, 2>(
      {&student, &teacher}, {kept, teacher_kept}, {total, total + n, total + 2 * n, total + 3 * n},
      [&](int64_t row, int64_t i, int64_t j, int64_t count, V* some) {
        const auto side = [&](Pairs<T>& p) {
          return PairSide<V>{p.diag[p.offset + row], p.row_peaks.get()[i], p.diag + j, p.peaks.get() + j, p.scale};
        };
        const int64_t at = i * stride + j;
        kernels<V>().cross_sums(student.S + at, teacher.S + at, side(student), side(teacher), total + j, n, some, count);
      },
      [&](int64_t row, int64_t i, const V* sums) {
        finish(sums, student.row_peaks.get()[i], teacher.row_peaks.get()[i], row_sums + row, m);
      });
  for (int64_t j = 0; j < n; ++j) {
    const V sums[4] = {total[j], total[n + j], total[2 * n + j], total[3 * n + j]};
    finish(sums, student.peaks.get()[j], teacher.peaks.get()[j], total + j, n);
  }
}

// One model's part in the weights: what is subtracted on either side.
template <class V>
struct Model {
  const V* diag;
  V scale;
  const V *row_u, *col_u, *kept;
};

// P = f w - g v, own_i on the partners, times cols, and its transpose times rows.
template <class T>
void cross_gradients(Sweep<T>& sweep, Sweep<T>& teacher_sweep, const Model<Compute<T>>& student,
                     const Model<Compute<T>>& teacher, int64_t offset, const Compute<T>* own, Compute<T> f, Compute<T> g,
                     int64_t width, Compute<T>* d_rows, Compute<T>* d_cols) {
  using V = Compute<T>;
  const bool there = student.kept && teacher.kept;
  const int64_t stride = sweep.stride(), n = sweep.columns();
  Buffer<V> tile(there ? 0 : sweep.tile_rows() * stride);
  if (!there) teacher_sweep.pack_columns();
  sweep.gradients(width, d_rows, d_cols, !there, [&](int64_t at, int64_t count, V* P) {
    if (!there) {
      sweep.similarities(at, count, P);
      teacher_sweep.similarities(at, count, tile.get());
    }
    sweep.each_row(count, [&](int64_t i) {
      const V* S = there ? student.kept + (at + i) * stride : P + i * stride;
      const V* R = there ? teacher.kept + (at + i) * stride : tile.get() + i * stride;
      const int64_t self = offset + at + i, starts[] = {0, self + 1}, ends[] = {self, n};
      for (int half = 0; half < 2; ++half) {
        const int64_t j = starts[half];
        const auto side = [&](const Model<V>& x) {
          return PairSide<V>{x.diag[self], x.row_u[at + i], x.diag + j, x.col_u + j, x.scale};
        };
        kernels<V>().cross_weights(S + j, R + j, P + i * stride + j, side(student), side(teacher), f, g, ends[half] - j);
      }
      P[i * stride + self] = own[at + i];
    });
  });
}

template <class V>
const V* kept_or_none(const Tensor& kept) {
  return kept.size(0) > 0 ? data<V>(kept) : nullptr;
}

}  // namespace

// Of rows and of columns: log-sums of exp t of the student and of the teacher, means of the student's t under the student's
// weights and under the teacher's (0 where there is no pair).
std::tuple<Tensor, Tensor, Tensor, Tensor> distill_sums(Tensor rows, Tensor cols, Tensor diag, Tensor scale,
                                                        Tensor teacher_rows, Tensor teacher_cols, Tensor teacher_diag,
                                                        Tensor teacher_scale, int64_t offset, bool keep) {
  const char* op = "distill_sums";
  const Both both =
      checked(op, rows, cols, diag, scale, teacher_rows, teacher_cols, teacher_diag, teacher_scale, offset);
  const Sizes& size = both.student;
  const Sizes& other = both.teacher;
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
    cross_sums(student, teacher, keep ? data<V>(kept) : nullptr, keep ? data<V>(teacher_kept) : nullptr,
               data<V>(row_sums), data<V>(col_sums));
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
  const Both both =
      checked(op, rows, cols, diag, scale, teacher_rows, teacher_cols, teacher_diag, teacher_scale, offset);
  const Sizes& size = both.student;
  const Sizes& other = both.teacher;
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
    const Model<V> student{data<V>(diag), *data<V>(scale), data<V>(row_u), data<V>(col_u), kept_or_none<V>(kept)};
    const Model<V> teacher{data<V>(teacher_diag), *data<V>(teacher_scale), data<V>(row_u) + m, data<V>(col_u) + n,
                           kept_or_none<V>(teacher_kept)};
    const V* f = data<V>(factors);
    cross_gradients(sweep, teacher_sweep, student, teacher, offset, data<V>(own), f[0], f[1], size.d,
                    need_rows ? data<V>(d_rows) : nullptr, need_cols ? data<V>(d_cols) : nullptr);
  });
  return {d_rows, d_cols};
}

// Both losses of a batch of one process, and what their gradients take: u of both models and the weight of the other pairs
// in their softmaxes (side, model, n), the losses' derivatives in the scale, similarities of own pairs, and of all if kept.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> distill_loss(
    Tensor image, Tensor text, Tensor scale, Tensor teacher_image, Tensor teacher_text, Tensor teacher_scale, bool keep) {
  const char* op = "distill_loss";
  const Both both =
      same_pairs(op, {check_batch(op, image, text), check_batch(op, teacher_image, teacher_text)});
  const Sizes& size = both.student;
  const Sizes& other = both.teacher;
  const int64_t n = size.rows;
  check(op, "scale", scale, size.wide, {});
  check(op, "teacher_scale", teacher_scale, size.wide, {});
  Tensor contrastive = fresh(image, {}, size.wide), distill = fresh(image, {}, size.wide);
  Tensor u = fresh(image, {2, 2, n}, size.wide), others = fresh(image, {2, 2, n}, size.wide);
  Tensor d_scales = fresh(image, {2}, size.wide);
  Tensor diag = fresh(image, {n}, size.wide), teacher_diag = fresh(image, {n}, size.wide);
  Tensor kept = fresh(image, {keep ? n : 0, row_stride(n)}, size.wide);
  Tensor teacher_kept = fresh(image, {keep ? n : 0, row_stride(n)}, size.wide);
  dispatch(op, size.dtype, [&](auto zero) {
    using T = decltype(zero);
    using V = Compute<T>;
    own_pairs(data<T>(image), data<T>(text), n, size.d, data<V>(diag));
    own_pairs(data<T>(teacher_image), data<T>(teacher_text), n, other.d, data<V>(teacher_diag));
    Sweep<T> sweep(data<T>(image), data<T>(text), n, n, size.d);
    Sweep<T> teacher_sweep(data<T>(teacher_image), data<T>(teacher_text), n, n, other.d);
    Pairs<T> student(sweep, data<V>(diag), *data<V>(scale), 0);
    Pairs<T> teacher(teacher_sweep, data<V>(teacher_diag), *data<V>(teacher_scale), 0);
    Buffer<V> sums(8 * n);
    cross_sums(student, teacher, keep ? data<V>(kept) : nullptr, keep ? data<V>(teacher_kept) : nullptr, sums.get(),
               sums.get() + 4 * n);
    double entropy = 0, means[2] = {};
    for (int side = 0; side < 2; ++side) {
      for (int k = 0; k < 2; ++k) {
        for (int64_t i = 0; i < n; ++i) {
          const V* line = sums.get() + (4 * side + k) * n;
          const int64_t at = (2 * side + k) * n + i;
          const double lse = double(line[i]), here = log_one_and(lse), rest = std::exp(lse - here);
          data<V>(u)[at] = V(here);
          data<V>(others)[at] = V(rest);
          means[k] += rest * double(line[2 * n + i]);
          if (k == 0) entropy += here;
        }
      }
    }
    const double share = 0.5 / double(n), factor = double(*data<V>(scale));
    *data<V>(contrastive) = V(entropy * share);
    *data<V>(distill) = V((entropy - means[1]) * share);
    data<V>(d_scales)[0] = V(means[0] / factor * share);
    data<V>(d_scales)[1] = V((means[0] / factor - means[1] / factor) * share);
  });
  return {contrastive, distill, u, others, d_scales, diag, teacher_diag, kept, teacher_kept};
}

// The gradients of images, texts and scale, from cotangents of both losses and what distill_loss returned.
std::tuple<Tensor, Tensor, Tensor> distill_loss_grad(Tensor contrastive, Tensor distill, Tensor image, Tensor text,
                                                     Tensor scale, Tensor teacher_image, Tensor teacher_text,
                                                     Tensor teacher_scale, Tensor u, Tensor others, Tensor d_scales,
                                                     Tensor diag, Tensor teacher_diag, Tensor kept, Tensor teacher_kept,
                                                     bool need_image, bool need_text) {
  const char* op = "distill_loss_grad";
  const Both both =
      checked(op, image, text, diag, scale, teacher_image, teacher_text, teacher_diag, teacher_scale, 0);
  const Sizes& size = both.student;
  const Sizes& other = both.teacher;
  const int64_t n = size.rows;
  require(n == size.columns, op, "expected as many rows as columns");
  check(op, "contrastive", contrastive, size.wide, {});
  check(op, "distill", distill, size.wide, {});
  check(op, "u", u, size.wide, {2, 2, n});
  check(op, "others", others, size.wide, {2, 2, n});
  check(op, "d_scales", d_scales, size.wide, {2});
  check_kept(op, kept, size);
  check_kept(op, teacher_kept, size);
  Tensor d_image = fresh(image, {need_image ? n : 0, size.d}, size.dtype);
  Tensor d_text = fresh(image, {need_text ? n : 0, size.d}, size.dtype), d_scale = fresh(image, {}, size.wide);
  dispatch(op, size.dtype, [&](auto zero) {
    using T = decltype(zero);
    using V = Compute<T>;
    const V hard = *data<V>(contrastive), g = *data<V>(distill), f = hard + g;
    const V* slopes = data<V>(d_scales);
    *data<V>(d_scale) = hard * slopes[0] + g * slopes[1];
    if (!need_image && !need_text) return;
    const V* rest = data<V>(others);
    Buffer<V> own(n);
    for (int64_t i = 0; i < n; ++i) {
      own.get()[i] = (g * rest[n + i] - f * rest[i]) + (g * rest[3 * n + i] - f * rest[2 * n + i]);
    }
    Sweep<T> sweep(data<T>(image), data<T>(text), n, n, size.d);
    Sweep<T> teacher_sweep(data<T>(teacher_image), data<T>(teacher_text), n, n, other.d);
    const V* far = data<V>(u);
    const V factor = *data<V>(scale);
    const Model<V> student{data<V>(diag), factor, far, far + 2 * n, kept_or_none<V>(kept)};
    const Model<V> teacher{data<V>(teacher_diag), *data<V>(teacher_scale), far + n, far + 3 * n,
                           kept_or_none<V>(teacher_kept)};
    Tensor wide_image = d_image, wide_text = d_text;
    if constexpr (kNarrow<T>) {
      wide_image = fresh(image, {need_image ? n : 0, size.d}, size.wide);
      wide_text = fresh(image, {need_text ? n : 0, size.d}, size.wide);
    }
    cross_gradients(sweep, teacher_sweep, student, teacher, 0, own.get(), f, g, size.d,
                    need_image ? data<V>(wide_image) : nullptr, need_text ? data<V>(wide_text) : nullptr);
    scaled<T>(wide_image, factor / V(2 * n), d_image);
    scaled<T>(wide_text, factor / V(2 * n), d_text);
  });
  return {d_image, d_text, d_scale};
}

}  // namespace clipsteer
