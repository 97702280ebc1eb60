// Dense Adam on a dictionary whose gradient may be given by its rows that are not zero, in one pass over memory; rows
// that keep norm 1 lose the gradient's part along them before and are normalised after, while they are in cache. A
// gradient of two uses of the dictionary is the sum of two such lists of rows.
#include "cpu.h"

namespace clipsteer {
namespace {

using torch::stable::parallel_for;

// Rows of a gradient, of features in ascending order; without these of all of them.
template <class V>
struct GradientRows {
  const V* rows;
  const int64_t* features;
  int64_t count;

  // Where to begin with features from `first` on.
  const int64_t* seek(int64_t first) const {
    return features ? std::lower_bound(features, features + count, first) : nullptr;
  }

  // The row of feature r, if it has one; `next` moves on.
  const V* of(int64_t r, int64_t d, const int64_t*& next) const {
    if (!features) return rows ? rows + r * d : nullptr;
    return next < features + count && *next == r ? rows + (next++ - features) * d : nullptr;
  }
};

template <class V>
void adam(V* w, V* m, V* v, const GradientRows<V>& first, const GradientRows<V>& second, int64_t n, int64_t d,
          bool unit, const AdamStep<V>& at) {
  const Kernels<V>& kernel = kernels<V>();
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, d));
  parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    std::vector<V> sum(d), across(unit ? d : 0);
    const int64_t* next[] = {first.seek(begin), second.seek(begin)};
    for (int64_t r = begin; r < end; ++r) {
      V* row = w + r * d;
      const V* grad = first.of(r, d, next[0]);
      if (const V* other = second.of(r, d, next[1])) {
        if (grad) {
          for (int64_t i = 0; i < d; ++i) sum[i] = grad[i] + other[i];
          other = sum.data();
        }
        grad = other;
      }
      if (unit && grad) {
        const V along = -kernel.dot(row, grad, d);
        kernel.add(across.data(), grad, &along, &row, nullptr, 1, nullptr, d);
        grad = across.data();
      }
      kernel.adam(row, m + r * d, v + r * d, grad, at, d);
      if (unit) {
        // a row of zeros stays
        const V norm = std::sqrt(kernel.square(row, d));
        const V scale = 1 / std::max(norm, std::numeric_limits<V>::min());
        for (int64_t i = 0; i < d; ++i) row[i] *= scale;
      }
    }
  });
}

void check_rows(const char* op, const char* name, const Tensor& rows, const std::optional<Tensor>& features, int64_t n,
                int64_t d, ScalarType dtype) {
  check_dim(op, name, rows, 2);
  const int64_t count = rows.size(0);
  check(op, name, rows, dtype, {features ? count : n, d});
  if (!features) return;
  check(op, "features", *features, ScalarType::Long, {count});
  const int64_t* f = data<int64_t>(*features);
  check_indices(op, f, count, n);
  require(std::adjacent_find(f, f + count, std::greater_equal<>()) == f + count, op,
          "expected features in ascending order, each once");
}

}  // namespace

void adam_rows(Tensor w, Tensor m, Tensor v, Tensor step, Tensor grad, std::optional<Tensor> features, bool unit,
               double lr, double beta1, double beta2, double eps, std::optional<Tensor> more,
               std::optional<Tensor> more_features) {
  const char* op = "adam_rows";
  check_dim(op, "W", w, 2);
  check_dim(op, "grad", grad, 2);
  const int64_t n = w.size(0), d = w.size(1);
  const ScalarType dtype = w.scalar_type();
  check(op, "W", w, dtype, {n, d});
  check(op, "m", m, dtype, {n, d});
  check(op, "v", v, dtype, {n, d});
  check(op, "step", step, ScalarType::Float, {});
  check_rows(op, "grad", grad, features, n, d, dtype);
  require(more.has_value() == more_features.has_value(), op, "expected more and more_features together");
  if (more) check_rows(op, "more", *more, more_features, n, d, dtype);
  const double t = *data<float>(step);
  dispatch(op, dtype, [&](auto zero) {
    using V = decltype(zero);
    if constexpr (kNarrow<V>) {
      require(false, op, "expected float32 or float64");
    } else {
      const AdamStep<V> at{V(lr / (1 - std::pow(beta1, t))), V(1 - beta1), V(beta2), V(1 - beta2),
                           V(std::sqrt(1 - std::pow(beta2, t))), V(eps)};
      GradientRows<V> second{nullptr, nullptr, 0};
      if (more) second = {data<V>(*more), data<int64_t>(*more_features), more->size(0)};
      const int64_t* listed = features ? data<int64_t>(*features) : nullptr;
      adam<V>(data<V>(w), data<V>(m), data<V>(v), {data<V>(grad), listed, grad.size(0)}, second, n, d, unit, at);
    }
  });
}

}  // namespace clipsteer
