// Rows through the matrix of their group. Rows are grouped by a counting sort; a panel of one group's rows is multiplied
// with tiles of its matrix, in place where nothing has to be converted, so that no matrix is copied, save one tile. Every
// sum has an order, and every GEMM of torch's a shape and one thread, that do not depend on the thread count.
#include "cpu.h"

namespace clipsteer {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kDenseRows = 256;    // rows of a panel: the more, the less often a matrix is read
constexpr int64_t kLowRankRows = 128;  // here the panel shares the second-level cache with U
constexpr int64_t kTaskColumns = 256;  // columns of a product that make a task of their own
constexpr int64_t kFewPanels = 8;      // fewer than these are cut into tasks

// Memory on a 64-byte boundary: the sums of a GEMM may depend on the alignment of its operands.
template <class V>
class Buffer {
 public:
  explicit Buffer(int64_t n) : store_(n > 0 ? new char[n * sizeof(V) + 63] : nullptr) {}
  V* get() { return reinterpret_cast<V*>((reinterpret_cast<uintptr_t>(store_.get()) + 63) & ~uintptr_t(63)); }

 private:
  std::unique_ptr<char[]> store_;
};

template <class V>
Tensor matrix(const V* data, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
  const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
  constexpr ScalarType dtype = std::is_same_v<V, double> ? ScalarType::Double : ScalarType::Float;
  return torch::stable::from_blob(const_cast<V*>(data), {sizes, 2}, {strides, 2},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype);
}

void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  StableIValue stack[] = {from(a), from(b), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack, TORCH_ABI_VERSION));
  to<Tensor>(stack[0]);
}

// Runs f(begin, end) over the tasks, in a parallel region even when there is a single task: a GEMM that had the threads
// to itself could split its sums.
template <class F>
void for_each(int64_t tasks, F&& f) {
  parallel_for(0, std::max<int64_t>(tasks, 2), 1, [&](int64_t begin, int64_t end) {
    if (begin < std::min(end, tasks)) f(begin, std::min(end, tasks));
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
  // Runs of at most `most` rows of one group, of nearly equal length.
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

int64_t most_rows(const std::vector<Panel>& panels) {
  int64_t most = 0;
  for (const Panel& panel : panels) most = std::max(most, panel.rows);
  return most;
}

// What one thread needs to take panels through matrices of at most `depth` terms in a sum: y = beta (x - mean) W + mean.
template <class T>
class Worker {
 public:
  using V = Compute<T>;

  Worker(const Groups& groups, int64_t rows, int64_t depth, const V* beta, const T* mean)
      : groups_(groups),
        own_(kernels().block_bytes > 0),
        width_(own_ ? kernels().block_bytes / int64_t(sizeof(V)) : kTaskColumns),
        beta_(beta),
        mean_(mean),
        packed_(own_ || kNarrow<T> ? depth * width_ : 0),
        wide_(kNarrow<T> ? depth * width_ : 0),
        mean_row_(kNarrow<T> && mean ? depth : 0),
        tile_(rows * width_),
        rows_(rows),
        targets_(rows),
        tile_rows_(rows) {
    for (int64_t i = 0; i < rows; ++i) tile_rows_[i] = tile_.get() + i * width_;
  }

  int64_t width() const { return width_; }

  // Pointers to a panel's rows of x (.., d), centred; in place unless something changes them or torch has to read them.
  const V** gather(const T* x, int64_t d, const Panel& panel, Buffer<V>& buffer) {
    const V* mu = mean_ ? widened(mean_ + panel.group * d, mean_row_.get(), d) : nullptr;
    for (int64_t i = 0; i < panel.rows; ++i) {
      const T* source = x + groups_.row(panel.first + i) * d;
      V* row = buffer.get() + i * d;
      if constexpr (kNarrow<T>) {
        kernels().widen(source, row, d);
      } else {
        if (!mu && own_) {
          rows_[i] = source;
          continue;
        }
        std::copy_n(source, d, row);
      }
      const V minus = -1;
      if (mu) kernels().axpy(row, &minus, &mu, nullptr, 1, d);
      rows_[i] = row;
    }
    return rows_.data();
  }

  // c[i][first ...] = columns [first, first + width) of a[i] W, W (k, n), or stored (n, k) if transpose.
  void product(const V* const* a, int64_t count, const T* w, bool transpose, int64_t k, int64_t n, int64_t first,
               V* const* c, int64_t offset) {
    const int64_t columns = std::min(width_, n - first);
    if (k == 0) {
      for (int64_t i = 0; i < count; ++i) std::fill_n(c[i] + offset, width_, V(0));
      return;
    }
    const V* right = nullptr;
    int64_t row_stride = transpose ? 1 : n, column_stride = transpose ? k : 1;
    if constexpr (!kNarrow<T>) right = w + first * column_stride;
    if (own_ ? transpose || columns < width_ || kNarrow<T> : kNarrow<T>) {
      right = packed(w, transpose, k, n, first, columns);
      row_stride = width_;
      column_stride = 1;
    }
    if (!own_) {
      const int64_t a_stride = count > 1 ? a[1] - a[0] : k, c_stride = count > 1 ? c[1] - c[0] : width_;
      multiply(matrix(a[0], count, k, a_stride, 1), matrix(right, k, columns, row_stride, column_stride),
               matrix(c[0] + offset, count, columns, c_stride, 1));
      return;
    }
    V* target[kBlockRows];
    for (int64_t i = 0; i < count; i += kBlockRows) {
      const int64_t rows = std::min<int64_t>(kBlockRows, count - i);
      for (int64_t l = 0; l < rows; ++l) target[l] = c[i + l] + offset;
      // The next block's rows come into the second-level cache, as the matrix streams through the first.
      for (int64_t l = i + rows; l < std::min(count, i + rows + kBlockRows); ++l) {
        for (int64_t q = 0; q < k; q += 64 / int64_t(sizeof(V))) __builtin_prefetch(a[l] + q, 0, 2);
        for (int64_t j = 0; j < width_; j += 64 / int64_t(sizeof(V))) __builtin_prefetch(c[l] + offset + j, 1, 3);
      }
      kernels().block(a + i, right, row_stride, k, int(rows), target);
    }
  }

  // Columns [first, first + width) of the panel's rows of y (.., n) = beta a W + mean.
  void write(const V* const* a, const Panel& panel, const T* w, bool transpose, int64_t k, int64_t n, int64_t first,
             T* y) {
    const int64_t columns = std::min(width_, n - first);
    bool direct = false;
    if constexpr (!kNarrow<T>) {
      direct = own_ && columns == width_;
      for (int64_t i = 0; direct && i < panel.rows; ++i) targets_[i] = y + groups_.row(panel.first + i) * n + first;
    }
    V* const* c = direct ? targets_.data() : tile_rows_.data();
    product(a, panel.rows, w, transpose, k, n, first, c, 0);
    const V* mu = mean_ ? widened(mean_ + panel.group * n + first, mean_row_.get(), columns) : nullptr;
    const V one = 1;
    for (int64_t i = 0; i < panel.rows; ++i) {
      V* row = c[i];
      if (beta_) {
        for (int64_t j = 0; j < columns; ++j) row[j] *= beta_[panel.group];
      }
      if (mu) kernels().axpy(row, &one, &mu, nullptr, 1, columns);
      T* target = y + groups_.row(panel.first + i) * n + first;
      if constexpr (kNarrow<T>) {
        kernels().narrow(row, target, columns);
      } else if (!direct) {
        std::copy_n(row, columns, target);
      }
    }
  }

 private:
  // Columns of W as k rows of width_ numbers, zero past the last column.
  const V* packed(const T* w, bool transpose, int64_t k, int64_t n, int64_t first, int64_t columns) {
    V* out = packed_.get();
    if (transpose && own_) {
      kernels().pack(widened(w + first * k, wide_.get(), columns * k), k, columns, k, out);
      return out;
    }
    const V* rows = transpose ? widened(w + first * k, wide_.get(), columns * k) : nullptr;
    for (int64_t q = 0; q < k; ++q, out += width_) {
      if (transpose) {
        for (int64_t j = 0; j < columns; ++j) out[j] = rows[j * k + q];
      } else if constexpr (kNarrow<T>) {
        kernels().widen(w + q * n + first, out, columns);
      } else {
        std::copy_n(w + q * n + first, columns, out);
      }
      std::fill_n(out + columns, width_ - columns, V(0));
    }
    return packed_.get();
  }

  const Groups& groups_;
  const bool own_;  // our blocks where the processor has them, elsewhere torch's GEMM
  const int64_t width_;
  const V* beta_;
  const T* mean_;
  Buffer<V> packed_, wide_, mean_row_, tile_;
  std::vector<const V*> rows_;
  std::vector<V*> targets_, tile_rows_;
};

// y = beta (x - mean) W + mean with W (m, n) of the row's group, stored (n, m) if transpose.
template <class T>
void project(const T* x, const T* w, const Groups& groups, const Compute<T>* beta, const T* mean, bool transpose,
             int64_t m, int64_t n, T* y) {
  using V = Compute<T>;
  const std::vector<Panel> panels = groups.panels(kDenseRows);
  const int64_t rows = most_rows(panels), count = int64_t(panels.size());
  const int64_t columns = std::max<int64_t>(count < kFewPanels ? kTaskColumns : n, 1), parts = (n + columns - 1) / columns;
  for_each(count * parts, [&](int64_t begin, int64_t end) {
    Worker<T> worker(groups, rows, std::max(m, n), beta, mean);
    Buffer<V> input(rows * m);
    int64_t gathered = -1;
    const V** a = nullptr;
    for (int64_t task = begin; task < end; ++task) {
      const Panel& panel = panels[task / parts];
      if (gathered != task / parts) a = worker.gather(x, m, panel, input);
      gathered = task / parts;
      const int64_t last = std::min(n, (task % parts + 1) * columns);
      for (int64_t first = task % parts * columns; first < last; first += worker.width()) {
        worker.write(a, panel, w + panel.group * m * n, transpose, m, n, first, y);
      }
    }
  });
}

// y = U (s * U^T (x - mean)) + mean; the r numbers of a row stay in `inner`.
template <class T>
void project_low_rank(const T* x, const T* u, const Compute<T>* s, const Groups& groups, const T* mean, int64_t d,
                      int64_t r, T* y) {
  using V = Compute<T>;
  const std::vector<Panel> panels = groups.panels(kLowRankRows);
  const int64_t rows = most_rows(panels);
  for_each(int64_t(panels.size()), [&](int64_t begin, int64_t end) {
    Worker<T> worker(groups, rows, std::max(d, r), nullptr, mean);
    const int64_t stride = (r + worker.width() - 1) / worker.width() * worker.width();
    Buffer<V> input(rows * d), inner(rows * stride);
    std::vector<V*> inner_rows(rows);
    for (int64_t i = 0; i < rows; ++i) inner_rows[i] = inner.get() + i * stride;
    for (int64_t p = begin; p < end; ++p) {
      const Panel& panel = panels[p];
      const T* factor = u + panel.group * d * r;
      const V** a = worker.gather(x, d, panel, input);
      for (int64_t first = 0; first < r; first += worker.width()) {
        worker.product(a, panel.rows, factor, false, d, r, first, inner_rows.data(), first);
      }
      for (int64_t i = 0; i < panel.rows; ++i) {
        for (int64_t j = 0; j < r; ++j) inner_rows[i][j] *= s[panel.group * r + j];
      }
      for (int64_t first = 0; first < d; first += worker.width()) {
        worker.write(inner_rows.data(), panel, factor, true, r, d, first, y);
      }
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
    for (int64_t i = begin; i < end; ++i) {
      if constexpr (kNarrow<T>) {
        kernels().widen(x + groups.row(i) * d, buffer + i * d, d);
      } else {
        std::copy_n(x + groups.row(i) * d, d, buffer + i * d);
      }
    }
  });
  return buffer;
}

// out[k] (m, n) = the sum over the rows of group k of a_b b_b^T, one GEMM for each kTaskColumns of its rows.
template <class T>
void outer(const T* a, const T* b, const Groups& groups, int64_t rows, int64_t m, int64_t n, T* out) {
  using V = Compute<T>;
  const bool copied = kNarrow<T> || !groups.order.empty();
  Buffer<V> a_sorted(copied ? rows * m : 0), b_sorted(copied ? rows * n : 0);
  const V* left = sorted(a, rows, m, groups, a_sorted.get());
  const V* right = sorted(b, rows, n, groups, b_sorted.get());
  const int64_t parts = (m + kTaskColumns - 1) / kTaskColumns, count = int64_t(groups.offsets.size()) - 1;
  for_each(count * parts, [&](int64_t begin, int64_t end) {
    Buffer<V> product(kNarrow<T> ? std::min(m, kTaskColumns) * n : 0);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t k = task / parts, first = task % parts * kTaskColumns, height = std::min(kTaskColumns, m - first);
      const int64_t from = groups.offsets[k], terms = groups.offsets[k + 1] - from;
      T* target = out + (k * m + first) * n;
      if (terms == 0) {
        std::fill_n(target, height * n, T(0));
        continue;
      }
      V* result = nullptr;
      if constexpr (kNarrow<T>) {
        result = product.get();
      } else {
        result = target;
      }
      multiply(matrix(left + from * m + first, height, terms, 1, m), matrix(right + from * n, terms, n, n, 1),
               matrix(result, height, n, n, 1));
      if constexpr (kNarrow<T>) kernels().narrow(result, target, height * n);
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
    project<T>(data<T>(x), data<T>(w), groups, data_or_null<Compute<T>>(beta), data_or_null<T>(mean), transpose, m, n,
               data<T>(y));
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
