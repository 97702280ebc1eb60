// Rows through the matrix of their group. Rows are grouped by a counting sort; a panel of one group's rows is
// multiplied with tiles of its matrix, in place where nothing has to be converted, so that no matrix is copied, save
// one tile. Every sum has an order, and every GEMM of torch's a shape and one thread, that do not depend on the thread
// count.
#include "grouped.h"
#include "stream.h"

namespace clipsteer {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kDenseRows = 256;    // rows of a panel: the more, the less often a matrix is read
constexpr int64_t kLowRankRows = 128;  // here the panel shares the second-level cache with U
constexpr int64_t kFewPanels = 8;      // fewer than these are cut into tasks
constexpr int64_t kOuterTerms = 64;    // pairs of rows whose panel stays in the first-level cache

// y = beta (x - mean) W + mean with W (m, n) of the row's group, stored (n, m) if transpose.
template <class T>
void project(const T* x, const T* w, const Groups& groups, const Compute<T>* beta, const T* mean, bool transpose,
             int64_t m, int64_t n, T* y) {
  using V = Compute<T>;
  const std::vector<Panel> panels = groups.panels(kDenseRows);
  const int64_t rows = most_rows(panels), count = int64_t(panels.size());
  const int64_t columns = std::max<int64_t>(count < kFewPanels ? kTaskColumns : n, 1);
  const int64_t parts = (n + columns - 1) / columns;
  for_each(count * parts, [&](int64_t begin, int64_t end) {
    Worker<T> worker(groups, rows, std::max(m, n), beta, mean);
    Buffer<V> input(worker.in_place(m) ? 0 : rows * m);
    int64_t gathered = -1;
    Left<V> a{};
    for (int64_t task = begin; task < end; ++task) {
      const Panel& panel = panels[task / parts];
      if (gathered != task / parts) a = worker.gather(x, m, panel, input);
      gathered = task / parts;
      const int64_t last = std::min(n, (task % parts + 1) * columns);
      worker.write(a, panel, w + panel.group * m * n, transpose, m, n, task % parts * columns, last, y);
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
    Buffer<V> input(worker.in_place(d) ? 0 : rows * d), inner(rows * stride);
    std::vector<V*> inner_rows(rows);
    for (int64_t i = 0; i < rows; ++i) inner_rows[i] = inner.get() + i * stride;
    for (int64_t p = begin; p < end; ++p) {
      const Panel& panel = panels[p];
      const T* factor = u + panel.group * d * r;
      const Left<V> a = worker.gather(x, d, panel, input);
      worker.product(a, panel.rows, factor, false, d, r, 0, r, inner_rows.data());
      for (int64_t i = 0; i < panel.rows; ++i) {
        for (int64_t j = 0; j < r; ++j) inner_rows[i][j] *= s[panel.group * r + j];
      }
      worker.write({inner_rows.data(), false}, panel, factor, true, r, d, 0, d, y);
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
        kernels<T>().widen(x + groups.row(i) * d, buffer + i * d, d);
      } else {
        std::copy_n(x + groups.row(i) * d, d, buffer + i * d);
      }
    }
  });
  return buffer;
}

// As `outer`, of bf16 numbers by pairs of rows.
void outer_in_pairs(const PairProducts& pairs, const BFloat16* a, const BFloat16* b, const Groups& groups, int64_t m,
                    int64_t n, BFloat16* out) {
  const int64_t width = kernels<float>().block_columns, panels = (n + width - 1) / width, stride = panels * width;
  const int64_t parts = (m + kTaskColumns - 1) / kTaskColumns, count = int64_t(groups.offsets.size()) - 1;
  int64_t most = 0;
  for (int64_t k = 0; k < count; ++k) most = std::max(most, groups.offsets[k + 1] - groups.offsets[k]);
  for_each(count * parts, [&](int64_t begin, int64_t end) {
    const int64_t height = std::min(m, kTaskColumns), depth = (most + 1) / 2;
    Buffer<float> left(depth * kTaskColumns), right((pairs.tiles ? depth : kOuterTerms) * width);
    Buffer<float> sum(most > 0 ? height * stride : 0), woven(pairs.tiles ? depth * width : 0);
    std::vector<const BFloat16*> a_rows(most), b_rows(most);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t k = task / parts, first = task % parts * kTaskColumns, last = std::min(m, first + kTaskColumns);
      const int64_t from = groups.offsets[k], rows = groups.offsets[k + 1] - from;
      BFloat16* target = out + (k * m + first) * n;
      if (rows == 0) {
        std::fill_n(target, (last - first) * n, BFloat16(0));
        continue;
      }
      for (int64_t i = 0; i < rows; ++i) {
        a_rows[i] = a + groups.row(from + i) * m;
        b_rows[i] = b + groups.row(from + i) * n;
      }
      const int64_t terms = (rows + 1) / 2;
      for (int64_t i = 0; i < last - first; i += width) {
        const int64_t some = std::min(width, last - first - i);
        float* into = left.get() + i * depth;
        pairs.weave(a_rows.data(), rows, first + i, some, pairs.tiles ? woven.get() : into);
        // tiles take its columns as rows
        if (pairs.tiles) kernels<float>().turn(woven.get(), width, terms, some, into, depth);
      }
      for (int64_t p = 0; pairs.tiles && p < panels; ++p) {
        const int64_t columns = std::min(width, n - p * width);
        pairs.weave(b_rows.data(), rows, p * width, columns, right.get());
        pairs.tiles(left.get(), depth, last - first, right.get(), 0, terms, columns, sum.get() + p * width, stride,
                    false);
      }
      for (int64_t p = 0; !pairs.tiles && p < panels; ++p) {
        for (int64_t q = 0; q < rows; q += 2 * kOuterTerms) {
          const int64_t some = std::min(2 * kOuterTerms, rows - q);
          pairs.weave(b_rows.data() + q, some, p * width, std::min(width, n - p * width), right.get());
          for (int64_t i = 0; i < last - first; i += width) {
            multiply_panel(left.get() + i * depth + q / 2 * width, 1, width, std::min(width, last - first - i),
                           right.get(), (some + 1) / 2, kOuterTerms, sum.get() + i * stride + p * width, stride, q > 0,
                           pairs.block);
          }
        }
      }
      for (int64_t i = 0; i < last - first; ++i) kernels<BFloat16>().narrow(sum.get() + i * stride, target + i * n, n);
    }
  });
}

// out[k] (m, n) = the sum over the rows of group k of a_b b_b^T, one GEMM for each kTaskColumns of its rows.
template <class T>
void outer(const T* a, const T* b, const Groups& groups, int64_t rows, int64_t m, int64_t n, T* out) {
  using V = Compute<T>;
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (const PairProducts* pairs = pair_products<T>()) return outer_in_pairs(*pairs, a, b, groups, m, n, out);
  }
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
      if constexpr (kNarrow<T>) kernels<T>().narrow(result, target, height * n);
    }
  });
}

Groups grouped(const char* op, const std::optional<Tensor>& index, int64_t rows, int64_t groups) {
  require(index || groups == 1, op, "expected an index, as there are ", groups, " groups");
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
  Tensor y = allocate(x, {sizes, 2});
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
  require(k >= 0, op, "expected groups >= 0, got ", k);
  const Groups groups = grouped(op, index, rows, k);
  const int64_t sizes[] = {k, m, n};
  Tensor out = allocate(a, {sizes, 3});
  prefer_huge_pages(out.data_ptr(), out.numel() * int64_t(out.element_size()));
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
  Tensor y = allocate(x, {sizes, 2});
  dispatch(op, dtype, [&](auto zero) {
    using T = decltype(zero);
    project_low_rank<T>(data<T>(x), data<T>(u), data<Compute<T>>(s), groups, data_or_null<T>(mean), d, r, data<T>(y));
  });
  return y;
}

}  // namespace clipsteer
