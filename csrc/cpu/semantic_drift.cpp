// Gaussian sums over rows, for every prototype in one pass. A tile of rows is packed once; a block of prototypes takes
// it through two products, distances and movements, while its weights stay in cache. A prototype keeps the largest
// log-weight it has met and rescales its sums when that rises. Rows are cut into parts, whose number depends on the
// shapes alone and which are merged in order: no sum depends on the thread count.
#include "gemm.h"

namespace clipsteer {
namespace {

constexpr int64_t kRows = 256;             // of a tile, a multiple of every block's width
constexpr int64_t kBlock = 16 * kBlockRows;  // prototypes whose weights share the second-level cache with the tile
constexpr int64_t kTerms = 128;            // of a product in registers, whose panel stays in the first-level cache meanwhile
constexpr int64_t kPrototypes = 512;       // of a task
constexpr int64_t kTasks = 16;
constexpr int64_t kLeastRows = 1024;       // of a part: the less, the more of the work is merging

template <class V>
struct Sums {
  V *peak, *total, *moved;  // (C,), (C,), (C, d)
};

template <class V>
struct Prototypes {
  const V *rows, *square;  // in units, those past kFar as 0
  int64_t count, d;
  V kappa, log_floor;
};

// |row|^2 of a row in units; a row past kFar is made 0, so that its products are, and counts as that far.
template <class V>
V measured(V* row, int64_t d) {
  const V square = kernels<V>().dot(row, row, nullptr, d);
  if (!(square > kFar<V>)) return square;
  std::fill_n(row, d, V(0));
  return kFar<V>;
}

template <class V, class T>
void scaled(const T* source, V unit, int64_t d, V* row) {
  const V* wide = widened(source, row, d);
  for (int64_t j = 0; j < d; ++j) row[j] = wide[j] * unit;
}

template <class T>
class Pass {
 public:
  using V = Compute<T>;

  explicit Pass(const Prototypes<V>& prototypes)
      : all_(prototypes),
        own_(kernels<V>().block_columns > 0),
        width_(own_ ? kernels<V>().block_columns : prototypes.d),
        panels_((prototypes.d + width_ - 1) / width_),
        tile_(kRows * prototypes.d),
        packed_(own_ ? kRows * prototypes.d : 0),
        change_(kRows * panels_ * width_),
        before_(kNarrow<T> ? prototypes.d : 0),
        after_(kNarrow<T> ? prototypes.d : 0),
        square_(kRows),
        weights_(kBlock * kRows),
        product_(kBlock * width_) {}

  // Adds rows [begin, end) to the sums of prototypes [first, last).
  void run(const T* old, const T* fresh, V unit, int64_t begin, int64_t end, int64_t first, int64_t last,
           const Sums<V>& sums) {
    for (int64_t c = first; c < last; ++c) {
      sums.peak[c] = all_.log_floor;
      sums.total[c] = 0;
    }
    std::fill_n(sums.moved + first * all_.d, (last - first) * all_.d, V(0));
    for (int64_t at = begin; at < end; at += kRows) {
      const int64_t rows = std::min(kRows, end - at);
      load(old + at * all_.d, fresh + at * all_.d, unit, rows);
      for (int64_t c = first; c < last; c += kBlock) {
        const int64_t count = std::min(kBlock, last - c);
        distances(c, count, rows);
        for (int64_t i = 0; i < count; ++i) weigh(c + i, weights_.get() + i * kRows, rows, sums);
        move(c, count, rows, sums.moved);
      }
    }
  }

 private:
  void load(const T* old, const T* fresh, V unit, int64_t rows) {
    const int64_t d = all_.d;
    V *tile = tile_.get(), *change = change_.get();
    for (int64_t i = 0; i < rows; ++i) {
      const V* before = widened(old + i * d, before_.get(), d);
      const V* after = widened(fresh + i * d, after_.get(), d);
      for (int64_t p = 0; p < panels_; ++p) {
        const int64_t from = p * width_, columns = std::min(width_, d - from);
        V* target = change + (p * kRows + i) * width_;
        for (int64_t j = 0; j < columns; ++j) target[j] = after[from + j] - before[from + j];
        std::fill_n(target + columns, width_ - columns, V(0));
      }
      V* row = tile + i * d;
      for (int64_t j = 0; j < d; ++j) row[j] = before[j] * unit;
      square_.get()[i] = measured(row, d);
    }
    for (int64_t i = 0; own_ && i < rows; i += width_) {
      kernels<V>().pack(tile + i * d, d, std::min(width_, rows - i), d, packed_.get() + i * d);
    }
  }

  // weights_[i] = the products of prototype c + i with the rows.
  void distances(int64_t c, int64_t count, int64_t rows) {
    const int64_t d = all_.d;
    if (!own_) {
      multiply(matrix(all_.rows + c * d, count, d, d, 1), matrix(tile_.get(), d, rows, 1, d),
               matrix(weights_.get(), count, rows, kRows, 1));
      return;
    }
    for (int64_t at = 0; at < rows; at += width_) {
      multiply_panel(all_.rows + c * d, d, 1, count, packed_.get() + at * d, d, kTerms, weights_.get() + at, kRows,
                     false);
    }
  }

  void weigh(int64_t c, V* dot, int64_t rows, const Sums<V>& sums) {
    const V highest =
        kernels<V>().log_weights(dot, square_.get(), all_.square[c], all_.kappa, rows);
    if (highest > sums.peak[c]) {
      const V shrink = std::exp(sums.peak[c] - highest);
      sums.peak[c] = highest;
      sums.total[c] *= shrink;
      for (int64_t j = 0; j < all_.d; ++j) sums.moved[c * all_.d + j] *= shrink;
    }
    const V floor = std::exp(all_.log_floor - sums.peak[c]);
    sums.total[c] += kernels<V>().weights(dot, sums.peak[c], floor, rows);
  }

  void move(int64_t c, int64_t count, int64_t rows, V* moved) {
    const int64_t d = all_.d;
    if (!own_) {
      multiply(matrix(weights_.get(), count, rows, kRows, 1), matrix(change_.get(), rows, d, d, 1),
               matrix(product_.get(), count, d, d, 1));
      for (int64_t j = 0; j < count * d; ++j) moved[c * d + j] += product_.get()[j];
      return;
    }
    for (int64_t p = 0; p < panels_; ++p) {
      const int64_t columns = std::min(width_, d - p * width_);
      const bool whole = columns == width_;  // else a block would write past the row
      const V* panel = change_.get() + p * kRows * width_;
      V* into = moved + c * d + p * width_;
      multiply_panel(weights_.get(), kRows, 1, count, panel, rows, kTerms, whole ? into : product_.get(),
                     whole ? d : width_, whole);
      for (int64_t i = 0; !whole && i < count; ++i) {
        for (int64_t j = 0; j < columns; ++j) into[i * d + j] += product_.get()[i * width_ + j];
      }
    }
  }

  const Prototypes<V>& all_;
  const bool own_;  // our blocks where the processor has them, elsewhere torch's GEMM
  const int64_t width_, panels_;
  Buffer<V> tile_, packed_, change_, before_, after_, square_, weights_, product_;
};

// into += from, both relative to the larger of their peaks.
template <class V>
void merge(const Sums<V>& into, const Sums<V>& from, int64_t count, int64_t d) {
  for (int64_t c = 0; c < count; ++c) {
    const V peak = from.peak[c] > into.peak[c] ? from.peak[c] : into.peak[c];
    const V a = std::exp(into.peak[c] - peak), b = std::exp(from.peak[c] - peak);
    into.peak[c] = peak;
    into.total[c] = into.total[c] * a + from.total[c] * b;
    V* __restrict sum = into.moved + c * d;
    const V* __restrict add = from.moved + c * d;
    for (int64_t j = 0; j < d; ++j) sum[j] = sum[j] * a + add[j] * b;
  }
}

template <class T>
void drift(const T* old, const T* fresh, const T* prototypes, const double* scale, int64_t rows, int64_t count,
           int64_t d, const Sums<Compute<T>>& sums) {
  using V = Compute<T>;
  const V unit = V(scale[0]);
  Buffer<V> means(count * d), square(count);
  for (int64_t c = 0; c < count; ++c) {
    scaled(prototypes + c * d, unit, d, means.get() + c * d);
    square.get()[c] = measured(means.get() + c * d, d);
  }
  const Prototypes<V> all{means.get(), square.get(), count, d, V(scale[1]), V(scale[2])};
  const int64_t blocks = (count + kPrototypes - 1) / kPrototypes;
  const int64_t parts = std::max<int64_t>(1, std::min(kTasks / blocks, rows / kLeastRows));
  Buffer<V> store((parts - 1) * count * (d + 2));
  const auto of_part = [&](int64_t part) -> Sums<V> {
    if (part == 0) return sums;
    V* own = store.get() + (part - 1) * count * (d + 2);
    return {own, own + count, own + 2 * count};
  };
  for_each(blocks * parts, [&](int64_t begin, int64_t end) {
    Pass<T> pass(all);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / blocks, block = task % blocks;
      pass.run(old, fresh, unit, rows * part / parts, rows * (part + 1) / parts, count * block / blocks,
               count * (block + 1) / blocks, of_part(part));
    }
  });
  for (int64_t part = 1; part < parts; ++part) merge(sums, of_part(part), count, d);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> drift_sums(Tensor old, Tensor fresh, Tensor prototypes, Tensor scale) {
  const char* op = "drift_sums";
  check_dim(op, "old", old, 2);
  check_dim(op, "prototypes", prototypes, 2);
  const int64_t rows = old.size(0), d = old.size(1), count = prototypes.size(0);
  const ScalarType dtype = old.scalar_type();
  check(op, "old", old, dtype, {rows, d});
  check(op, "new", fresh, dtype, {rows, d});
  check(op, "prototypes", prototypes, dtype, {count, d});
  check(op, "scale", scale, ScalarType::Double, {3});
  require(d > 0, op, "expected d > 0");
  const int64_t sizes[] = {count, d};
  const std::optional<ScalarType> wide = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor peak = allocate(old, {sizes, 1}, wide);
  Tensor total = allocate(old, {sizes, 1}, wide);
  Tensor moved = allocate(old, {sizes, 2}, wide);
  if (count > 0) {
    dispatch(op, dtype, [&](auto zero) {
      using T = decltype(zero);
      using V = Compute<T>;
      drift<T>(data<T>(old), data<T>(fresh), data<T>(prototypes), data<double>(scale), rows, count, d,
               {data<V>(peak), data<V>(total), data<V>(moved)});
    });
  }
  return {peak, total, moved};
}

}  // namespace clipsteer
