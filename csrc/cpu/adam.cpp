// Dense Adam on a dictionary whose gradient may be given by its rows that are not zero, in one pass over memory; rows
// that keep norm 1 lose the gradient's part along them before and are normalised after, while they are in cache.
#include "cpu.h"

namespace clipsteer {
namespace {

using torch::stable::parallel_for;

template <class V>
void adam(V* w, V* m, V* v, const V* g, const int64_t* features, int64_t count, int64_t n, int64_t d, bool unit,
          const AdamStep<V>& at) {
  const Kernels<V>& kernel = kernels<V>();
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, d));
  parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    std::vector<V> across(unit ? d : 0);
    const int64_t* next = features ? std::lower_bound(features, features + count, begin) : nullptr;
    for (int64_t r = begin; r < end; ++r) {
      V* row = w + r * d;
      const V* grad = nullptr;
      if (!features) {
        grad = g + r * d;
      } else if (next < features + count && *next == r) {
        grad = g + (next++ - features) * d;
      }
      if (unit && grad) {
        const V along = -kernel.dot(row, grad, nullptr, d);
        std::copy_n(grad, d, across.data());
        kernel.axpy(across.data(), &along, &row, nullptr, 1, d);
        grad = across.data();
      }
      kernel.adam(row, m + r * d, v + r * d, grad, at, d);
      if (unit) {
        // a row of zeros stays
        const V norm = std::sqrt(kernel.dot(row, row, nullptr, d));
        const V scale = 1 / std::max(norm, std::numeric_limits<V>::min());
        for (int64_t i = 0; i < d; ++i) row[i] *= scale;
      }
    }
  });
}

}  // namespace

void adam_rows(Tensor w, Tensor m, Tensor v, Tensor step, Tensor grad, std::optional<Tensor> features, bool unit,
               double lr, double beta1, double beta2, double eps) {
  const char* op = "adam_rows";
  check_dim(op, "W", w, 2);
  check_dim(op, "grad", grad, 2);
  const int64_t n = w.size(0), d = w.size(1), count = grad.size(0);
  const ScalarType dtype = w.scalar_type();
  check(op, "W", w, dtype, {n, d});
  check(op, "m", m, dtype, {n, d});
  check(op, "v", v, dtype, {n, d});
  check(op, "grad", grad, dtype, {features ? count : n, d});
  check(op, "step", step, ScalarType::Float, {});
  if (features) {
    check(op, "features", *features, ScalarType::Long, {count});
    check_indices(op, data<int64_t>(*features), count, n);
    const int64_t* f = data<int64_t>(*features);
    require(std::adjacent_find(f, f + count, std::greater_equal<>()) == f + count, op,
            "expected features in ascending order, each once");
  }
  const double t = *data<float>(step);
  dispatch(op, dtype, [&](auto zero) {
    using V = decltype(zero);
    if constexpr (kNarrow<V>) {
      require(false, op, "expected float32 or float64");
    } else {
      const AdamStep<V> at{V(lr / (1 - std::pow(beta1, t))), V(1 - beta1), V(beta2), V(1 - beta2),
                           V(std::sqrt(1 - std::pow(beta2, t))), V(eps)};
      adam<V>(data<V>(w), data<V>(m), data<V>(v), data<V>(grad), features ? data<int64_t>(*features) : nullptr, count,
              n, d, unit, at);
    }
  });
}

}  // namespace clipsteer
