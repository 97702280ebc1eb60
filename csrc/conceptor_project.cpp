// Rows through the matrix of their group. Rows are grouped by a counting sort; a panel of one group's rows is gathered
// into cache, multiplied by torch's GEMM, and scattered; no matrix is copied, save a tile of it that a half widens.
// Every GEMM has a shape and a thread (one) that do not depend on the thread count, and so has every result.
#include "cpu.h"

namespace clipsteer {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kDenseRows = 256;    // rows of a panel: the more, the less often a matrix is read
constexpr int64_t kLowRankRows = 128;  // here the panel shares the second-level cache with U
constexpr int64_t kTile = 256;         // columns of a product that make a task of their own
constexpr int64_t kFewPanels = 8;      // fewer than these are cut into tiles

// Memory on a 64-byte boundary: the sums of a GEMM may depend on the alignment of its operands.
template <class V>
class Buffer {
 public:
  explicit Buffer(int64_t n) : store_(n > 0 ? new char[n * sizeof(V) + 63] : nullptr) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(store_.get());
    data_ = reinterpret_cast<V*>((at + 63) & ~uintptr_t(63));
  }
  V* get() { return data_; }

 private:
  std::unique_ptr<char[]> store_;
  V* data_;
};

template <class V>
constexpr ScalarType kScalar = std::is_same_v<V, double> ? ScalarType::Double : ScalarType::Float;

// A matrix in memory: element (i, j) at data[i * row + j * column].
template <class V>
struct View {
  const V* data;
  int64_t row, column;
  View transposed() const { return {data, column, row}; }
};

template <class V>
Tensor tensor(const View<V>& v, int64_t rows, int64_t columns) {
  const int64_t sizes[] = {rows, columns}, strides[] = {v.row, v.column};
  return torch::stable::from_blob(const_cast<V*>(v.data), {sizes, 2}, {strides, 2},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), kScalar<V>);
}

// out (m, n) with rows `stride` apart = a (m, k) @ b (k, n)
template <class V>
void multiply(const View<V>& a, const View<V>& b, int64_t m, int64_t k, int64_t n, V* out, int64_t stride) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  if (k == 0) {
    for (int64_t i = 0; i < m; ++i) std::fill_n(out + i * stride, n, V(0));
    return;
  }
  const Tensor left = tensor(a, m, k), right = tensor(b, k, n), result = tensor<V>({out, stride, 1}, m, n);
  StableIValue stack[] = {from(left), from(right), from(result)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack, TORCH_ABI_VERSION));
  to<Tensor>(stack[0]);
}

// Runs f(task) for every task, each on one thread of a parallel region even when there is a single task: a GEMM that
// had the threads to itself could split its sums.
template <class F>
void for_each(int64_t tasks, F&& f) {
  parallel_for(0, std::max<int64_t>(tasks, 2), 1, [&](int64_t begin, int64_t end) {
    f(begin, std::min(end, tasks));
  });
}

struct Panel {
  int64_t group, first, rows;  // rows of the sorted batch
};

// The batch sorted by group, stably. Without an index there is one group and no order.
struct Groups {
  std::vector<int64_t> order, offsets;

  Groups(const int64_t* index, int64_t rows, int64_t groups) : offsets(groups + 1, 0) {
    if (!index) {
      offsets[groups] = rows;
      return;
    }
    for (int64_t b = 0; b < rows; ++b) ++offsets[index[b] + 1];
    for (int64_t k = 0; k < groups; ++k) offsets[k + 1] += offsets[k];
    std::vector<int64_t> next(offsets.begin(), offsets.end() - 1);
    order.resize(rows);
    for (int64_t b = 0; b < rows; ++b) order[next[index[b]]++] = b;
  }
  int64_t row(int64_t at) const { return order.empty() ? at : order[at]; }
  std::vector<Panel> panels(int64_t most) const {
    std::vector<Panel> found;
    for (int64_t k = 0; k + 1 < int64_t(offsets.size()); ++k) {
      const int64_t first = offsets[k], count = offsets[k + 1] - first, parts = (count + most - 1) / most;
      for (int64_t p = 0; p < parts; ++p) {
        const int64_t from = count * p / parts, to = count * (p + 1) / parts;
        found.push_back({k, first + from, to - from});
      }
    }
    return found;
  }
};

// What a panel is multiplied with on the way in and out: x - mean[group] before, beta[group] y + mean[group] after.
template <class T>
struct Affine {
  const Compute<T>* beta;
  const T* mean;
};

// Gathers the rows of a panel, centred, or returns them where they are.
template <class T>
const Compute<T>* gather(const T* x, int64_t d, const Groups& groups, const Panel& panel, const T* mean,
                         Compute<T>* buffer, Compute<T>* mean_buffer) {
  using V = Compute<T>;
  if constexpr (!kNarrow<T>) {
    if (groups.order.empty() && !mean) return x + panel.first * d;
  }
  const V* mu = mean ? widened(mean + panel.group * d, mean_buffer, d) : nullptr;
  for (int64_t i = 0; i < panel.rows; ++i) {
    const T* source = x + groups.row(panel.first + i) * d;
    V* row = buffer + i * d;
    if constexpr (kNarrow<T>) {
      kernels().widen(source, row, d);
    } else {
      std::copy_n(source, d, row);
    }
    if (mu) {
      for (int64_t j = 0; j < d; ++j) row[j] -= mu[j];
    }
  }
  return buffer;
}

// Writes columns [first, first + columns) of a panel's rows of y (rows, n).
template <class T>
void scatter(Compute<T>* product, int64_t columns, const Groups& groups, const Panel& panel, const Affine<T>& affine,
             int64_t first, int64_t n, T* y, Compute<T>* mean_buffer) {
  using V = Compute<T>;
  const V* mu = affine.mean ? widened(affine.mean + panel.group * n + first, mean_buffer, columns) : nullptr;
  const V beta = affine.beta ? affine.beta[panel.group] : V(1);
  for (int64_t i = 0; i < panel.rows; ++i) {
    V* row = product + i * columns;
    if (affine.beta) {
      for (int64_t j = 0; j < columns; ++j) row[j] *= beta;
    }
    if (mu) {
      for (int64_t j = 0; j < columns; ++j) row[j] += mu[j];
    }
    T* target = y + groups.row(panel.first + i) * n + first;
    if constexpr (kNarrow<T>) {
      kernels().narrow(row, target, columns);
    } else {
      std::copy_n(row, columns, target);
    }
  }
}

// Whether a product may be written to y at once.
template <class T>
bool in_place(const Groups& groups, const Affine<T>& affine) {
  return !kNarrow<T> && groups.order.empty() && !affine.beta && !affine.mean;
}

// y = beta (x - mean) W + mean with W (m, n) of the row's group, stored (n, m) if transpose.
template <class T>
void project(const T* x, const T* w, const Groups& groups, const Affine<T>& affine, bool transpose, int64_t m,
             int64_t n, T* y) {
  using V = Compute<T>;
  const std::vector<Panel> panels = groups.panels(kDenseRows);
  int64_t most = 0;
  for (const Panel& panel : panels) most = std::max(most, panel.rows);
  const bool tiled = kNarrow<T> || int64_t(panels.size()) < kFewPanels;
  const int64_t width = tiled ? std::min(n, kTile) : n, tiles = width ? (n + width - 1) / width : 0;
  const bool direct = in_place(groups, affine);

  for_each(int64_t(panels.size()) * tiles, [&](int64_t begin, int64_t end) {
    if (begin >= end) return;
    Buffer<V> input(most * m), product(direct ? 0 : most * width), wide(kNarrow<T> ? m * width : 0);
    Buffer<V> mean(kNarrow<T> && affine.mean ? std::max(m, n) : 0);
    int64_t gathered = -1;
    const V* rows = nullptr;
    for (int64_t task = begin; task < end; ++task) {
      const Panel& panel = panels[task / tiles];
      const int64_t first = task % tiles * width, columns = std::min(width, n - first);
      if (gathered != task / tiles) {
        rows = gather(x, m, groups, panel, affine.mean, input.get(), mean.get());
        gathered = task / tiles;
      }
      const T* matrix = w + panel.group * m * n;
      View<V> view;
      if constexpr (kNarrow<T>) {
        if (transpose) {
          kernels().widen(matrix + first * m, wide.get(), columns * m);
          view = {wide.get(), 1, m};
        } else {
          for (int64_t i = 0; i < m; ++i) kernels().widen(matrix + i * n + first, wide.get() + i * columns, columns);
          view = {wide.get(), columns, 1};
        }
      } else {
        view = transpose ? View<V>{matrix + first * m, 1, m} : View<V>{matrix + first, n, 1};
        if (direct) {
          multiply<V>({rows, m, 1}, view, panel.rows, m, columns, y + panel.first * n + first, n);
          continue;
        }
      }
      multiply<V>({rows, m, 1}, view, panel.rows, m, columns, product.get(), columns);
      scatter(product.get(), columns, groups, panel, affine, first, n, y, mean.get());
    }
  });
}

// y = U (s * U^T (x - mean)) + mean; the r numbers of a row stay in `inner`.
template <class T>
void project_low_rank(const T* x, const T* u, const Compute<T>* s, const Groups& groups, const T* mean, int64_t d,
                      int64_t r, T* y) {
  using V = Compute<T>;
  const std::vector<Panel> panels = groups.panels(kLowRankRows);
  int64_t most = 0;
  for (const Panel& panel : panels) most = std::max(most, panel.rows);
  const Affine<T> affine{nullptr, mean};
  const bool direct = in_place(groups, affine);

  for_each(int64_t(panels.size()), [&](int64_t begin, int64_t end) {
    if (begin >= end) return;
    Buffer<V> input(most * d), inner(most * r), product(direct ? 0 : most * d), wide(kNarrow<T> ? d * r : 0);
    Buffer<V> mean_row(kNarrow<T> && mean ? d : 0);
    int64_t widened_group = -1;
    for (int64_t p = begin; p < end; ++p) {
      const Panel& panel = panels[p];
      const V* rows = gather(x, d, groups, panel, mean, input.get(), mean_row.get());
      View<V> factor;
      if constexpr (kNarrow<T>) {
        if (widened_group != panel.group) kernels().widen(u + panel.group * d * r, wide.get(), d * r);
        widened_group = panel.group;
        factor = {wide.get(), r, 1};
      } else {
        factor = {u + panel.group * d * r, r, 1};
      }
      multiply<V>({rows, d, 1}, factor, panel.rows, d, r, inner.get(), r);
      const V* strength = s + panel.group * r;
      for (int64_t i = 0; i < panel.rows; ++i) {
        for (int64_t j = 0; j < r; ++j) inner.get()[i * r + j] *= strength[j];
      }
      const View<V> left{inner.get(), r, 1};
      if constexpr (!kNarrow<T>) {
        if (direct) {
          multiply<V>(left, factor.transposed(), panel.rows, r, d, y + panel.first * d, d);
          continue;
        }
      }
      multiply<V>(left, factor.transposed(), panel.rows, r, d, product.get(), d);
      scatter(product.get(), d, groups, panel, affine, 0, d, y, mean_row.get());
    }
  });
}

// The batch in sorted order and compute precision.
template <class T>
const Compute<T>* sorted(const T* x, int64_t rows, int64_t d, const Groups& groups, Compute<T>* buffer) {
  if constexpr (!kNarrow<T>) {
    if (groups.order.empty()) return x;
  }
  parallel_for(0, rows, 256, [&](int64_t begin, int64_t end) {
    gather<T>(x, d, groups, Panel{0, begin, end - begin}, nullptr, buffer + begin * d, nullptr);
  });
  return buffer;
}

// out[k] (m, n) = the sum over the rows of group k of a_b b_b^T, one GEMM for each tile of kTile of its rows.
template <class T>
void outer(const T* a, const T* b, const Groups& groups, int64_t rows, int64_t m, int64_t n, T* out) {
  using V = Compute<T>;
  const bool copied = kNarrow<T> || !groups.order.empty();
  Buffer<V> a_sorted(copied ? rows * m : 0), b_sorted(copied ? rows * n : 0);
  const V* left = sorted(a, rows, m, groups, a_sorted.get());
  const V* right = sorted(b, rows, n, groups, b_sorted.get());
  const int64_t tiles = (m + kTile - 1) / kTile, count = int64_t(groups.offsets.size()) - 1;
  for_each(count * tiles, [&](int64_t begin, int64_t end) {
    Buffer<V> product(kNarrow<T> && begin < end ? std::min(m, kTile) * n : 0);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t k = task / tiles, first = task % tiles * kTile, height = std::min(kTile, m - first);
      const int64_t from = groups.offsets[k], terms = groups.offsets[k + 1] - from;
      const View<V> at{left + from * m + first, 1, m}, bt{right + from * n, n, 1};
      T* target = out + (k * m + first) * n;
      if constexpr (kNarrow<T>) {
        multiply<V>(at, bt, height, terms, n, product.get(), n);
        kernels().narrow(product.get(), target, height * n);
      } else {
        multiply<V>(at, bt, height, terms, n, target, n);
      }
    }
  });
}

Groups grouped(const char* op, const std::optional<Tensor>& index, int64_t rows, int64_t groups) {
  require(index || groups == 1, op, "expected an index, as there are " + std::to_string(groups) + " groups");
  if (index) {
    check(op, "index", *index, ScalarType::Long, {rows});
    check_indices(op, data<int64_t>(*index), rows, groups);
  }
  return Groups(index ? data<int64_t>(*index) : nullptr, rows, groups);
}

template <class T>
T* data_or_null(const std::optional<Tensor>& t) {
  return t ? data<T>(*t) : nullptr;
}

ScalarType compute_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace

Tensor grouped_matmul(Tensor x, Tensor w, std::optional<Tensor> index, std::optional<Tensor> beta,
                      std::optional<Tensor> mean, bool transpose) {
  const char* op = "grouped_matmul";
  check_dim(op, "x", x, 2);
  check_dim(op, "W", w, 3);
  const int64_t rows = x.size(0), m = x.size(1), k = w.size(0), n = w.size(transpose ? 1 : 2);
  const ScalarType dtype = x.scalar_type();
  check(op, "x", x, dtype, {rows, m});
  check(op, "W", w, dtype, {k, transpose ? n : m, transpose ? m : n});
  if (beta) check(op, "beta", *beta, compute_type(dtype), {k});
  require(!mean || m == n, op, "expected square matrices beside a mean");
  if (mean) check(op, "mean", *mean, dtype, {k, m});
  const Groups groups = grouped(op, index, rows, k);
  const int64_t sizes[] = {rows, n};
  Tensor y = torch::stable::new_empty(x, {sizes, 2});
  dispatch(op, dtype, [&](auto zero) {
    using T = decltype(zero);
    const Affine<T> affine{data_or_null<Compute<T>>(beta), data_or_null<T>(mean)};
    project<T>(data<T>(x), data<T>(w), groups, affine, transpose, m, n, data<T>(y));
  });
  return y;
}

Tensor grouped_outer(Tensor a, Tensor b, std::optional<Tensor> index, int64_t k) {
  const char* op = "grouped_outer";
  check_dim(op, "a", a, 2);
  check_dim(op, "b", b, 2);
  const int64_t rows = a.size(0), m = a.size(1), n = b.size(1);
  const ScalarType dtype = a.scalar_type();
  check(op, "a", a, dtype, {rows, m});
  check(op, "b", b, dtype, {rows, n});
  require(k >= 0, op, "expected groups >= 0, got " + std::to_string(k));
  const Groups groups = grouped(op, index, rows, k);
  const int64_t sizes[] = {k, m, n};
  Tensor out = torch::stable::new_empty(a, {sizes, 3});
  dispatch(op, dtype, [&](auto zero) {
    using T = decltype(zero);
    outer<T>(data<T>(a), data<T>(b), groups, rows, m, n, data<T>(out));
  });
  return out;
}

Tensor low_rank_project(Tensor x, Tensor u, Tensor s, std::optional<Tensor> index, std::optional<Tensor> mean) {
  const char* op = "low_rank_project";
  check_dim(op, "x", x, 2);
  check_dim(op, "U", u, 3);
  const int64_t rows = x.size(0), d = x.size(1), k = u.size(0), r = u.size(2);
  const ScalarType dtype = x.scalar_type();
  check(op, "x", x, dtype, {rows, d});
  check(op, "U", u, dtype, {k, d, r});
  check(op, "s", s, compute_type(dtype), {k, r});
  if (mean) check(op, "mean", *mean, dtype, {k, d});
  const Groups groups = grouped(op, index, rows, k);
  const int64_t sizes[] = {rows, d};
  Tensor y = torch::stable::new_empty(x, {sizes, 2});
  dispatch(op, dtype, [&](auto zero) {
    using T = decltype(zero);
    project_low_rank<T>(data<T>(x), data<T>(u), data<Compute<T>>(s), groups, data_or_null<T>(mean), d, r, data<T>(y));
  });
  return y;
}

}  // namespace clipsteer
