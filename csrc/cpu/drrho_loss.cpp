// Log-sums of both sides' pairs, and weights that are differences in log space: sweep by sweep, and drrho_loss as a whole.
#include "softmaxes.h"

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
    log_sums(pairs, keep ? data<V>(kept) : nullptr, data<V>(row_lse), data<V>(col_lse));
  });
  return {row_lse, col_lse, kept};
}

// With w_ij = exp(t_ij - row_u_i) + exp(t_ji - col_u_j) for j != i and w_ii = own_i: w cols and w^T rows, of the first
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
    const V* similarities = kept.size(0) > 0 ? data<V>(kept) : nullptr;
    const Weights<V> weights{data<V>(diag),  *data<V>(scale), offset,
                             data<V>(row_u), data<V>(col_u),  data<V>(own)};
    *data<V>(moment) = V(gradients(sweep, weights, similarities, width, need_rows ? data<V>(d_rows) : nullptr,
                                   need_cols ? data<V>(d_cols) : nullptr, !similarities));
  });
  return {d_rows, d_cols, moment};
}

// The loss of a batch of one process, see ops/_drrho.py: loss, u of both sides; the gradients of rows and of columns, of the
// first `width` numbers of each and still times 2 B^2, and that of tau.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> drrho_loss(Tensor rows, Tensor cols, Tensor tau,
                                                              std::optional<Tensor> past, double gamma, double eps,
                                                              double rho, int64_t width, bool keep, bool need_rows,
                                                              bool need_cols, bool need_tau) {
  const char* op = "drrho_loss";
  const Sizes sizes = check_batch(op, rows, cols);
  const int64_t n = sizes.rows;
  check(op, "tau", tau, sizes.wide, {});
  if (past) check(op, "u", *past, sizes.wide, {2, n});
  require(width >= 0 && width <= sizes.d, op, "expected a width of at most that of the rows");
  Tensor loss = fresh(rows, {}, sizes.wide), u = fresh(rows, {2, n}, sizes.wide), d_tau = fresh(rows, {}, sizes.wide);
  Tensor d_rows = fresh(rows, {need_rows ? n : 0, width}, sizes.wide);
  Tensor d_cols = fresh(rows, {need_cols ? n : 0, width}, sizes.wide);
  dispatch(op, sizes.dtype, [&](auto zero) {
    using T = decltype(zero);
    using V = Compute<T>;
    Softmaxes<T> all(data<T>(rows), data<T>(cols), n, sizes.d, 1 / *data<V>(tau), keep);
    V* average = data<V>(u);
    const double log_eps = std::log(eps), log_n = std::log(double(n));
    double total = 0;
    for (int64_t i = 0; i < 2 * n; ++i) {
      const double fresh_log = log_add(double(all.lse()[i]) - log_n, log_eps);
      const V before = past ? data<V>(*past)[i] : std::numeric_limits<V>::quiet_NaN();
      // a first visit forgets nothing
      average[i] = V(std::isnan(before) ? fresh_log
                                        : log_add(double(before) + std::log(1 - gamma), fresh_log + std::log(gamma)));
      total += double(average[i]);
    }
    const double mean = total / double(2 * n) + rho;
    *data<V>(loss) = V(double(*data<V>(tau)) * mean);
    *data<V>(d_tau) = V(0);
    if (!need_rows && !need_cols && !need_tau) return;
    Buffer<V> own(n);
    for (int64_t i = 0; i < n; ++i) {
      // what the other pairs' weights make of a pair's own
      own.get()[i] = -(std::exp(all.lse()[i] - average[i]) + std::exp(all.lse()[n + i] - average[n + i]));
    }
    const double moment = all.gradients(average, own.get(), width, need_rows ? data<V>(d_rows) : nullptr,
                                        need_cols ? data<V>(d_cols) : nullptr);
    *data<V>(d_tau) = V(mean - moment / (2.0 * double(n) * double(n)));
  });
  return {loss, u, d_rows, d_cols, d_tau};
}

}  // namespace clipsteer
