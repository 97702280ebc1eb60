// Log-sums of both sides' pairs, and weights that are differences in log space; the sweeps are in contrastive.h.
#include "contrastive.h"

namespace clipsteer {

std::tuple<Tensor, Tensor, Tensor> drrho_sums(Tensor rows, Tensor cols, Tensor diag, Tensor scale, int64_t offset,
                                              bool keep) {
  const char* op = "drrho_sums";
  const Sizes sizes = check_pairs(op, rows, cols, diag, scale, offset);
  Tensor row_lse = fresh(rows, {sizes.rows}, sizes.wide), col_lse = fresh(rows, {sizes.columns}, sizes.wide);
  Tensor kept = fresh(rows, {keep ? sizes.rows : 0, row_stride(sizes.columns)}, sizes.wide);
  dispatch(op, sizes.dtype, [&](auto zero) {
    using T = decltype(zero);
    using V = Compute<T>;
    Sweep<T> sweep(data<T>(rows), data<T>(cols), sizes.rows, sizes.columns, sizes.d);
    Pairs<T> pairs(sweep, data<V>(diag), *data<V>(scale), offset);
    const V* own = pairs.diag;
    const V* peaks = pairs.peaks.get();
    Buffer<V> total(sizes.columns);
    V* sums = total.get();
    V* lse = data<V>(row_lse);
    sum_pairs<1, T, 1>(
        {&pairs}, {keep ? data<V>(kept) : nullptr}, {sums},
        [&](int64_t row, int64_t i, int64_t j, int64_t count, V* some) {
          *some = kernels<V>().pair_sums(pairs.S + i * sweep.stride() + j, own[offset + row], pairs.row_peaks.get()[i],
                                         own + j, peaks + j, pairs.scale, sums + j, count);
        },
        [&](int64_t row, int64_t i, const V* sum) {
          lse[row] = V(std::log(double(*sum)) + double(pairs.row_peaks.get()[i]));
        });
    V* columns = data<V>(col_lse);
    for (int64_t j = 0; j < sizes.columns; ++j) columns[j] = V(std::log(double(sums[j])) + double(peaks[j]));
  });
  return {row_lse, col_lse, kept};
}

// With w_ij = exp(t_ij - row_u_i) + exp(t_ji - col_u_j) for j != i and w_ii = own_i: w cols and wᵀ rows, of the first
// `width` numbers of each, and the sum of w_ij t_ij.
std::tuple<Tensor, Tensor, Tensor> drrho_grad(Tensor rows, Tensor cols, Tensor diag, Tensor scale, int64_t offset,
                                              Tensor row_u, Tensor col_u, Tensor own, Tensor kept, int64_t width,
                                              bool need_rows, bool need_cols) {
  const char* op = "drrho_grad";
  const Sizes sizes = check_pairs(op, rows, cols, diag, scale, offset);
  check(op, "row_u", row_u, sizes.wide, {sizes.rows});
  check(op, "col_u", col_u, sizes.wide, {sizes.columns});
  check(op, "own", own, sizes.wide, {sizes.rows});
  check_kept(op, kept, sizes);
  require(width >= 0 && width <= sizes.d, op, "expected a width of at most that of the rows");
  Tensor d_rows = fresh(rows, {need_rows ? sizes.rows : 0, width}, sizes.wide);
  Tensor d_cols = fresh(rows, {need_cols ? sizes.columns : 0, width}, sizes.wide);
  Tensor moment = fresh(rows, {}, sizes.wide);
  dispatch(op, sizes.dtype, [&](auto zero) {
    using T = decltype(zero);
    using V = Compute<T>;
    Sweep<T> sweep(data<T>(rows), data<T>(cols), sizes.rows, sizes.columns, sizes.d);
    const int64_t stride = sweep.stride();
    const V* similarities = kept.size(0) > 0 ? data<V>(kept) : nullptr;
    const V* diagonal = data<V>(diag);
    const V* here = data<V>(row_u);
    const V* there = data<V>(col_u);
    const V factor = *data<V>(scale);
    std::vector<double> moments(sweep.tile_rows());
    double sum = 0;
    sweep.gradients(width, need_rows ? data<V>(d_rows) : nullptr, need_cols ? data<V>(d_cols) : nullptr, !similarities,
                    [&](int64_t at, int64_t count, V* P) {
                      if (!similarities) sweep.similarities(at, count, P);
                      sweep.each_row(count, [&](int64_t i) {
                        const V* S = similarities ? similarities + (at + i) * stride : P + i * stride;
                        const int64_t self = offset + at + i, starts[] = {0, self + 1}, ends[] = {self, sizes.columns};
                        moments[i] = 0;
                        for (int side = 0; side < 2; ++side) {
                          const int64_t j = starts[side];
                          moments[i] += double(kernels<V>().pair_weights(S + j, P + i * stride + j, diagonal[self],
                                                                         here[at + i], diagonal + j, there + j, factor,
                                                                         ends[side] - j));
                        }
                        P[i * stride + self] = data<V>(own)[at + i];
                      });
                      for (int64_t i = 0; i < count; ++i) sum += moments[i];
                    });
    *data<V>(moment) = V(sum);
  });
  return {d_rows, d_cols, moment};
}

}  // namespace clipsteer
