// The loss over pairs of a class, and its gradient, in one call. Rows are grouped by class and moved so that the first
// of a class is the origin: differences stay, their digits are not lost in what the rows have in common, and the
// origin needs no product. A class's rows, new and old together, are multiplied with its factor; distances are sums
// over differences. A row sums what its partners do to it itself, in their order: no sum depends on the thread count.
#include "grouped.h"

namespace clipsteer {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kPanelRows = 256;  // rows of a panel: the more, the less often a factor is read
constexpr int64_t kFewPanels = 8;    // fewer than these are cut into tasks

// Rows that have a partner, sorted by class. Of a class of n, 2 n rows are stored: the new ones, then the old ones with
// the first of them at the end, so that all that are not an origin lie together.
struct Pairs {
  std::vector<int64_t> rows, index;
  Groups groups;

  Pairs(const int64_t* labels, int64_t batch, int64_t classes) : groups(nullptr, 0, classes) {
    std::vector<int64_t> count(classes, 0);
    for (int64_t b = 0; b < batch; ++b) {
      if (labels[b] >= 0) ++count[labels[b]];
    }
    for (int64_t b = 0; b < batch; ++b) {
      if (labels[b] < 0 || count[labels[b]] < 2) continue;
      rows.push_back(b);
      index.push_back(labels[b]);
    }
    groups = Groups(index.data(), int64_t(rows.size()), classes);
    for (int64_t& at : groups.order) at = rows[at];
    std::sort(index.begin(), index.end());  // now of the sorted rows
  }
  int64_t size() const { return int64_t(rows.size()); }
  int64_t first(int64_t at) const { return groups.offsets[index[at]]; }
  int64_t end(int64_t at) const { return groups.offsets[index[at] + 1]; }
  int64_t fresh(int64_t at) const { return first(at) + at; }
  int64_t old(int64_t at) const { return at == first(at) ? 2 * end(at) - 1 : end(at) + at - 1; }
};

double square_norm(const auto* x, int64_t n) {
  constexpr int kLanes = 16;
  double sum[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) sum[l] += double(x[i + l]) * double(x[i + l]);
  }
  for (int l = 0; i + l < n; ++l) sum[l] += double(x[i + l]) * double(x[i + l]);
  for (int half = kLanes / 2; half; half /= 2) {
    for (int l = 0; l < half; ++l) sum[l] += sum[l + half];
  }
  return sum[0];
}

template <class T>
class Loss {
 public:
  using V = Compute<T>;

  Loss(const int64_t* labels, int64_t batch, int64_t classes, int64_t d, int64_t r, const T* factor, const T* s,
       const T* diag, bool low_rank, bool normalize, bool need_grad)
      : pairs_(labels, batch, classes),
        batch_(batch),
        d_(d),
        r_(r),
        low_rank_(low_rank),
        normalize_(normalize),
        width_(Worker<T>(pairs_.groups, 0, 0, nullptr, nullptr).width()),
        stride_((r + width_ - 1) / width_ * width_),
        factor_(factor),
        scale_(2 * pairs_.size()) {
    const int64_t rows = pairs_.size(), back = need_grad ? rows : 0, kept = low_rank_ ? classes : 0;
    V** const parts[] = {&x_, &z_, &dx_, &dz_, &product_, &s_, &diag_};
    const int64_t sizes[] = {2 * rows * d,    2 * rows * stride_, back * columns(), back * stride_,
                             back * columns(), kept * r,          kept * d};
    // One piece of memory: several would go back to the system, and be faulted in again, at every call.
    constexpr int64_t kLine = 64 / int64_t(sizeof(V));
    int64_t total = 0;
    for (int64_t size : sizes) total += (size + kLine - 1) / kLine * kLine;
    store_ = std::make_unique<Buffer<V>>(total);
    V* next = store_->get();
    for (int part = 0; part < 7; ++part) {
      *parts[part] = next;
      next += (sizes[part] + kLine - 1) / kLine * kLine;
    }
    copy_wide(s, s_, kept * r);
    copy_wide(diag, diag_, kept * d);
  }

  // The loss; with `grad` (batch, d) also its gradient.
  double run(const T* fresh, const T* old, V* grad) {
    if (grad) std::fill_n(grad, batch_ * d_, V(0));
    if (pairs_.size() == 0) return 0;
    prepare(fresh, old);
    whiten();
    const double loss = distances(grad ? dx_ : nullptr, dz_);
    if (grad) back(fresh, dx_, dz_, grad);
    return loss;
  }

 private:
  static void copy_wide(const T* source, V* target, int64_t n) {
    if constexpr (kNarrow<T>) {
      kernels<T>().widen(source, target, n);
    } else {
      std::copy_n(source, n, target);
    }
  }
  // Of a row of the gradient, as the last product writes it.
  int64_t columns() const { return (d_ + width_ - 1) / width_ * width_; }
  V* x(int64_t at) { return x_ + at * d_; }
  V* z(int64_t at) { return z_ + at * stride_; }

  // scale (x_i - x_0) in double, rounded once.
  void prepare(const T* fresh, const T* old) {
    const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, d_));
    const auto each = [&](auto&& f) {
      parallel_for(0, pairs_.size(), grain, [&](int64_t begin, int64_t end) {
        Buffer<V> row(kNarrow<T> ? d_ : 0), origin(kNarrow<T> ? d_ : 0);
        for (int64_t at = begin; at < end; ++at) {
          for (int side = 0; side < 2; ++side) {
            const T* source = side ? old : fresh;
            const V* a = widened(source + pairs_.groups.row(at) * d_, row.get(), d_);
            f(at, side, a, [&] { return widened(source + pairs_.groups.row(pairs_.first(at)) * d_, origin.get(), d_); });
          }
        }
      });
    };
    each([&](int64_t at, int side, const V* a, auto&&) {
      const double norm = normalize_ ? std::sqrt(square_norm(a, d_)) : 1;
      scale_[2 * at + side] = norm > 0 ? 1 / norm : 0;
    });
    each([&](int64_t at, int side, const V* a, auto&& origin) {
      const double scale = scale_[2 * at + side], other = scale_[2 * pairs_.first(at) + side];
      const V* b = origin();
      V* target = x(side ? pairs_.old(at) : pairs_.fresh(at));
      for (int64_t k = 0; k < d_; ++k) target[k] = V(scale * a[k] - other * b[k]);
    });
  }

  // Panels of stored rows [first, first + rows) that are no origin.
  std::vector<Panel> panels() const {
    std::vector<Panel> found;
    // A product of torch's may treat a row by its place: there new and old rows go the same way, apart.
    const int sides = kernels<V>().block_columns > 0 ? 1 : 2;
    for (int64_t k = 0; k + 1 < int64_t(pairs_.groups.offsets.size()); ++k) {
      const int64_t from = pairs_.groups.offsets[k], n = pairs_.groups.offsets[k + 1] - from;
      const int64_t rows = 2 * (n - 1) / sides, parts = (rows + kPanelRows - 1) / kPanelRows;
      for (int side = 0; n > 0 && side < sides; ++side) {
        for (int64_t p = 0; p < parts; ++p) {
          const int64_t begin = rows * p / parts, end = rows * (p + 1) / parts;
          found.push_back({k, 2 * from + 1 + side * rows + begin, end - begin});
        }
      }
    }
    return found;
  }

  // Rows of `from` (stride m) times their factors into rows of `into` (stride `stride`).
  void multiply_panels(const std::vector<Panel>& panels, const V* from, int64_t m, int64_t depth, bool transpose,
                       int64_t n, V* into, int64_t stride) {
    const int64_t most = most_rows(panels), count = int64_t(panels.size());
    const int64_t chunk = std::max<int64_t>(count < kFewPanels ? kTaskColumns : n, 1), parts = (n + chunk - 1) / chunk;
    for_each(count * parts, [&](int64_t begin, int64_t end) {
      Worker<T> worker(pairs_.groups, most, depth, nullptr, nullptr);
      std::vector<const V*> a(most);
      std::vector<V*> c(most);
      for (int64_t task = begin; task < end; ++task) {
        const Panel& panel = panels[task / parts];
        const int64_t first = task % parts * chunk, last = std::min(n, first + chunk);
        for (int64_t i = 0; i < panel.rows; ++i) {
          a[i] = from + (panel.first + i) * m;
          c[i] = into + (panel.first + i) * stride + first;
        }
        worker.product({a.data(), false}, panel.rows, factor_ + panel.group * d_ * r_, transpose, depth, n, first, last,
                       c.data());
      }
    });
  }

  void whiten() {
    multiply_panels(panels(), x_, d_, d_, false, r_, z_, stride_);
    for (int64_t k = 0; k + 1 < int64_t(pairs_.groups.offsets.size()); ++k) {
      const int64_t from = pairs_.groups.offsets[k], to = pairs_.groups.offsets[k + 1];
      if (from == to) continue;
      std::fill_n(z(2 * from), stride_, V(0));
      std::fill_n(z(2 * to - 1), stride_, V(0));
    }
  }

  V square_distance(int64_t a, int64_t b, int64_t group) {
    const Kernels<V>& kernel = kernels<V>();
    if (!low_rank_) return kernel.distance(z(a), z(b), nullptr, r_);
    return kernel.distance(x(a), x(b), diag_ + group * d_, d_) +
           kernel.distance(z(a), z(b), s_ + group * r_, r_);
  }

  // Sums |D_new - D_old| over the pairs of each row, and what they do to the row.
  double distances(V* dx, V* dz) {
    constexpr V kFloor = V(1e-8);
    const Kernels<V>& kernel = kernels<V>();
    const int64_t count = pairs_.size();
    std::vector<double> sums(count, 0.0);
    parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) {
        const int64_t group = pairs_.index[at], here = pairs_.fresh(at), before = pairs_.old(at);
        V* gz = dz + at * stride_;
        V* gx = dx + at * columns();
        if (dx) std::fill_n(gz, stride_, V(0));
        if (dx && low_rank_) std::fill_n(gx, d_, V(0));
        for (int64_t j = dx ? pairs_.first(at) : at + 1; j < pairs_.end(at); ++j) {
          if (j == at) continue;
          const V square = square_distance(here, pairs_.fresh(j), group);
          const V square_old = square_distance(before, pairs_.old(j), group);
          // written so that NaN stays NaN
          const V distance = std::sqrt((square < 0 ? V(0) : square) + kFloor);
          const V change = distance - std::sqrt((square_old < 0 ? V(0) : square_old) + kFloor);
          if (j > at) sums[at] += std::abs(double(change));
          if (!dx || square < 0 || change == 0) continue;
          const V c = (change > 0 ? V(1) : change < 0 ? V(-1) : change) / (distance * V(batch_));
          kernel.repel(gz, c, z(here), z(pairs_.fresh(j)), r_);
          if (low_rank_) kernel.repel(gx, c, x(here), x(pairs_.fresh(j)), d_);
        }
        if (!dx || !low_rank_) continue;
        // what nothing pulls at stays 0 under an infinite weight too
        for (int64_t k = 0; k < r_; ++k) gz[k] = gz[k] == 0 ? V(0) : gz[k] * s_[group * r_ + k];
        for (int64_t k = 0; k < d_; ++k) gx[k] = gx[k] == 0 ? V(0) : gx[k] * diag_[group * d_ + k];
      }
    });
    double total = 0;
    for (double sum : sums) total += sum;
    return total / double(batch_);
  }

  // From the whitened rows back through the factors, then through the normalisation.
  void back(const T* fresh, const V* dx, V* dz, V* grad) {
    const int64_t count = pairs_.size(), width = columns();
    multiply_panels(pairs_.groups.panels(kPanelRows), dz, stride_, r_, true, d_, product_, width);
    const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, d_));
    parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      Buffer<V> row(kNarrow<T> ? d_ : 0);
      for (int64_t at = begin; at < end; ++at) {
        V* g = product_ + at * width;
        if (low_rank_) {
          for (int64_t k = 0; k < d_; ++k) g[k] += dx[at * width + k];
        }
        V* target = grad + pairs_.groups.row(at) * d_;
        if (!normalize_) {
          std::copy_n(g, d_, target);
          continue;
        }
        const double scale = scale_[2 * at];
        const V* a = widened(fresh + pairs_.groups.row(at) * d_, row.get(), d_);
        double along = 0;
        for (int64_t k = 0; k < d_; ++k) along += scale * a[k] * double(g[k]);
        for (int64_t k = 0; k < d_; ++k) target[k] = V(scale * (g[k] - scale * a[k] * along));
      }
    });
  }

  const Pairs pairs_;
  const int64_t batch_, d_, r_;  // r: columns of a factor
  const bool low_rank_, normalize_;
  const int64_t width_, stride_;
  const T* factor_;
  std::vector<double> scale_;  // 1 / norm of a new row and of the old one
  std::unique_ptr<Buffer<V>> store_;
  V *x_, *z_, *dx_, *dz_, *product_, *s_, *diag_;
};

}  // namespace

std::tuple<Tensor, Tensor> mahalanobis_covariance_loss(Tensor fresh, Tensor old, Tensor labels, Tensor factor,
                                                       std::optional<Tensor> s, std::optional<Tensor> diag,
                                                       bool normalize, bool need_grad) {
  const char* op = "mahalanobis_covariance_loss";
  check_dim(op, "new", fresh, 2);
  check_dim(op, "factor", factor, 3);
  const int64_t batch = fresh.size(0), d = fresh.size(1), classes = factor.size(0), r = factor.size(2);
  const ScalarType dtype = fresh.scalar_type();
  require(s.has_value() == diag.has_value(), op, "expected both s and diag, or neither");
  require(s || r == d, op, "expected square factors");
  check(op, "new", fresh, dtype, {batch, d});
  check(op, "old", old, dtype, {batch, d});
  check(op, "labels", labels, ScalarType::Long, {batch});
  check(op, "factor", factor, dtype, {classes, d, r});
  if (s) check(op, "s", *s, dtype, {classes, r});
  if (diag) check(op, "diag", *diag, dtype, {classes, d});
  for (int64_t b = 0; b < batch; ++b) {
    if (const int64_t label = data<int64_t>(labels)[b]; label != -1) check_indices(op, &label, 1, classes);
  }
  const ScalarType wide = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const int64_t sizes[] = {need_grad ? batch : 0, d};
  Tensor loss = allocate(fresh, {sizes, size_t(0)}, wide);
  Tensor grad = allocate(fresh, {sizes, size_t(2)}, wide);
  dispatch(op, dtype, [&](auto zero) {
    using T = decltype(zero);
    Loss<T> terms(data<int64_t>(labels), batch, classes, d, r, data<T>(factor), s ? data<T>(*s) : nullptr,
                  diag ? data<T>(*diag) : nullptr, s.has_value(), normalize, need_grad);
    *data<Compute<T>>(loss) = Compute<T>(
        terms.run(data<T>(fresh), data<T>(old), need_grad ? data<Compute<T>>(grad) : nullptr));
  });
  return {loss, grad};
}

}  // namespace clipsteer
