// Similarities of rows with all columns, S = rows colsᵀ, one tile of rows at a time, and what both directions of the loss
// need of a tile while it is in cache: maxima and sums of exponentials along its rows and down its columns, or, once
// these are known, the weights of all pairs and their two products. Tiles follow each other and every sum has its place
// in them: no result depends on the thread count.
#include "gemm.h"

namespace clipsteer {
namespace {

constexpr int64_t kTerms = 256;         // of a product in registers: longer chains of sums lose digits
constexpr int64_t kTileRows = 192;      // a multiple of a block's rows
constexpr int64_t kTileBytes = 4 << 20;  // of a tile, beside which the packed columns stream past
constexpr int64_t kGrain = 4;           // panels of a task

// Of a row of similarities, in numbers: whole panels on every instruction set, and a line more, as rows that lie a power
// of two apart would share their place in the cache.
int64_t row_stride(int64_t columns) { return (columns + 63) / 64 * 64 + 16; }

template <class T>
class Sweep {
 public:
  using V = Compute<T>;

  Sweep(const T* rows, const T* cols, const V* diag, V scale, int64_t m, int64_t n, int64_t d, int64_t offset)
      : source_(rows),
        diag_(diag),
        scale_(scale),
        m_(m),
        n_(n),
        d_(d),
        offset_(offset),
        stride_(row_stride(n)),
        own_(kernels<V>().block_columns > 0),
        width_(own_ ? kernels<V>().block_columns : 64),
        panels_((n + width_ - 1) / width_),
        tile_rows_(std::max<int64_t>(kBlockRows, std::min(kTileRows, kTileBytes / int64_t(sizeof(V)) / stride_ /
                                                                         kBlockRows * kBlockRows))),
        wide_rows_(kNarrow<T> ? tile_rows_ * d : 0),
        wide_cols_(kNarrow<T> && !own_ ? n * d : 0),
        packed_(own_ ? panels_ * width_ * d : 0),
        cols_(cols) {}

  int64_t stride() const { return stride_; }

  // lse[i] = log sum exp (S_ij - S_ii) scale over j != i, of rows and of columns; S goes to `kept` if that is there.
  void sums(V* row_lse, V* col_lse, V* kept) {
    pack_columns();
    constexpr V kInfinity = std::numeric_limits<V>::infinity();
    Buffer<V> tile(kept ? 0 : tile_rows_ * stride_), highest(n_), peaks(n_), total(n_);
    std::fill_n(highest.get(), n_, -kInfinity);
    std::fill_n(peaks.get(), n_, V(0));
    std::fill_n(total.get(), n_, V(0));
    const int64_t chunk = kGrain * 64, chunks = (n_ + chunk - 1) / chunk;
    Buffer<V> partial(chunks * tile_rows_), row_peak(tile_rows_);
    for (int64_t at = 0; at < m_; at += tile_rows_) {
      const int64_t rows = std::min(tile_rows_, m_ - at);
      V* S = kept ? kept + at * stride_ : tile.get();
      similarities(at, rows, S);
      for (int64_t i = 0; i < rows; ++i) {
        S[i * stride_ + offset_ + at + i] = -kInfinity;
        if (kept) std::fill(S + i * stride_ + n_, S + (i + 1) * stride_, V(0));
      }
      each_chunk(chunk, [&](int64_t c, int64_t first, int64_t columns) {
        for (int64_t i = 0; i < rows; ++i) {
          partial.get()[c * tile_rows_ + i] =
              kernels<V>().maxima(S + i * stride_ + first, highest.get() + first, columns);
        }
      });
      for (int64_t i = 0; i < rows; ++i) {
        V best = -kInfinity;
        for (int64_t c = 0; c < chunks; ++c) {
          const V next = partial.get()[c * tile_rows_ + i];
          best = next > best ? next : best;
        }
        row_peak.get()[i] = peak(best, diag_[offset_ + at + i]);
      }
      each_chunk(chunk, [&](int64_t c, int64_t first, int64_t columns) {
        for (int64_t j = first; j < first + columns; ++j) {
          const V next = peak(highest.get()[j], diag_[j]);
          if (next != peaks.get()[j]) total.get()[j] *= total.get()[j] == 0 ? V(1) : std::exp(peaks.get()[j] - next);
          peaks.get()[j] = next;
        }
        for (int64_t i = 0; i < rows; ++i) {
          // its own partner apart: next to an infinite one not even -inf is safe
          const int64_t self = offset_ + at + i, end = first + columns;
          const int64_t starts[] = {first, std::clamp(self + 1, first, end)}, ends[] = {std::clamp(self, first, end), end};
          V sum = 0;
          for (int side = 0; side < 2; ++side) {
            const int64_t j = starts[side];
            sum += kernels<V>().pair_sums(S + i * stride_ + j, diag_[self], row_peak.get()[i],
                                          diag_ + j, peaks.get() + j, scale_, total.get() + j,
                                          ends[side] - j);
          }
          partial.get()[c * tile_rows_ + i] = sum;
        }
      });
      for (int64_t i = 0; i < rows; ++i) {
        V sum = 0;
        for (int64_t c = 0; c < chunks; ++c) sum += partial.get()[c * tile_rows_ + i];
        row_lse[at + i] = V(std::log(double(sum)) + double(row_peak.get()[i]));
      }
    }
    for (int64_t j = 0; j < n_; ++j) col_lse[j] = V(std::log(double(total.get()[j])) + double(peaks.get()[j]));
  }

  // With w_ij = exp(t_ij - row_u_i) + exp(t_ji - col_u_j) for j != i and w_ii = own_i: w cols and wᵀ rows, of the first
  // `width` numbers of each; returns the sum of w_ij t_ij.
  double grad(const V* row_u, const V* col_u, const V* own, const V* kept, int64_t width, V* d_rows, V* d_cols) {
    if (!kept || !own_) pack_columns();
    const int64_t right = (width + width_ - 1) / width_, padded = right * width_;
    const bool direct = padded == width || !own_;
    Buffer<V> tile(tile_rows_ * stride_), forth(own_ && d_rows ? n_ * padded : 0),
        back(own_ && d_cols ? tile_rows_ * padded : 0), row_sum(direct ? 0 : tile_rows_ * padded),
        col_sum(d_cols && (!direct || !own_) ? n_ * padded : 0);
    V* into = direct && own_ ? d_cols : col_sum.get();
    if (d_cols) std::fill_n(direct ? d_cols : into, n_ * (direct ? width : padded), V(0));
    if (own_ && d_rows) slices(cols_, n_, width, forth.get());
    std::vector<double> moments(tile_rows_);
    double moment = 0;
    for (int64_t at = 0; at < m_; at += tile_rows_) {
      const int64_t rows = std::min(tile_rows_, m_ - at);
      V* P = tile.get();
      if (!kept) similarities(at, rows, P);
      for_each((rows + kBlockRows - 1) / kBlockRows, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * kBlockRows; i < std::min(rows, end * kBlockRows); ++i) {
          const V* S = kept ? kept + (at + i) * stride_ : P + i * stride_;
          const int64_t self = offset_ + at + i, starts[] = {0, self + 1}, ends[] = {self, n_};
          moments[i] = 0;
          for (int side = 0; side < 2; ++side) {
            const int64_t j = starts[side];
            moments[i] += double(kernels<V>().pair_weights(S + j, P + i * stride_ + j, diag_[self],
                                                           row_u[at + i], diag_ + j, col_u + j,
                                                           scale_, ends[side] - j));
          }
          P[i * stride_ + self] = own[at + i];
        }
      });
      for (int64_t i = 0; i < rows; ++i) moment += moments[i];
      if (!own_) {
        portable_products(at, rows, P, width, d_rows, d_cols, into);
        continue;
      }
      if (d_rows) {
        V* target = direct ? d_rows + at * width : row_sum.get();
        products(P, stride_, 1, rows, forth.get(), n_, right, target, padded, false);
        for (int64_t i = 0; !direct && i < rows; ++i) {
          std::copy_n(row_sum.get() + i * padded, width, d_rows + (at + i) * width);
        }
      }
      if (d_cols) {
        slices(source_ + at * d_, rows, width, back.get());
        products(P, 1, stride_, n_, back.get(), rows, right, into, padded, true);
      }
    }
    for (int64_t j = 0; d_cols && !direct && j < n_; ++j) std::copy_n(into + j * padded, width, d_cols + j * width);
    return moment;
  }

 private:
  // What is subtracted before an exponential is taken; sums that are infinite, or empty, need none.
  V peak(V highest, V diag) const {
    const V t = (highest - diag) * scale_;
    return std::isinf(t) || highest == -std::numeric_limits<V>::infinity() ? V(0) : t;
  }

  template <class F>
  void each_chunk(int64_t chunk, F&& f) {
    for_each((n_ + chunk - 1) / chunk, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) f(c, c * chunk, std::min(chunk, n_ - c * chunk));
    });
  }

  void pack_columns() {
    if (!own_) {
      if constexpr (kNarrow<T>) kernels<T>().widen(cols_, wide_cols_.get(), n_ * d_);
      return;
    }
    for_each(panels_, [&](int64_t begin, int64_t end) {
      Buffer<V> wide(kNarrow<T> ? width_ * d_ : 0);
      for (int64_t p = begin; p < end; ++p) {
        const int64_t columns = std::min(width_, n_ - p * width_);
        const V* from = widened(cols_ + p * width_ * d_, wide.get(), columns * d_);
        kernels<V>().pack(from, d_, columns, d_, packed_.get() + p * width_ * d_);
      }
    });
  }

  // Panels of the first `width` numbers of some rows: out[p][row][0 ... width_), what is missing is 0.
  void slices(const T* from, int64_t rows, int64_t width, V* out) {
    const int64_t panels = (width + width_ - 1) / width_, grain = 64;
    for_each((rows + grain - 1) / grain, [&](int64_t begin, int64_t end) {
      Buffer<V> wide(kNarrow<T> ? d_ : 0);
      for (int64_t i = begin * grain; i < std::min(rows, end * grain); ++i) {
        const V* row = widened(from + i * d_, wide.get(), width);
        for (int64_t p = 0; p < panels; ++p) {
          const int64_t columns = std::min(width_, width - p * width_);
          V* target = out + (p * rows + i) * width_;
          std::copy_n(row + p * width_, columns, target);
          std::fill_n(target + columns, width_ - columns, V(0));
        }
      }
    });
  }

  const V* wide_rows(int64_t at, int64_t rows) { return widened(source_ + at * d_, wide_rows_.get(), rows * d_); }

  void similarities(int64_t at, int64_t rows, V* S) {
    const V* left = wide_rows(at, rows);
    if (own_) {
      products(left, d_, 1, rows, packed_.get(), d_, panels_, S, stride_, false);
      return;
    }
    const V* right = kNarrow<T> ? wide_cols_.get() : reinterpret_cast<const V*>(cols_);
    each_chunk(kGrain * 64, [&](int64_t, int64_t first, int64_t columns) {
      multiply(matrix(left, rows, d_, d_, 1), matrix(right + first * d_, d_, columns, 1, d_),
               matrix(S + first, rows, columns, stride_, 1));
    });
  }

  // c (rows, panels * width_) = or += a (rows, k), whose numbers lie a_row and a_step apart, times panels of (k, width_).
  void products(const V* a, int64_t a_row, int64_t a_step, int64_t rows, const V* b, int64_t k, int64_t panels, V* c,
                int64_t c_row, bool add) {
    // few panels are cut into more tasks
    const int64_t part = 16 * kBlockRows, parts = (rows + part - 1) / part;
    for_each(panels * parts, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t p = task / parts, from = task % parts * part, to = std::min(rows, from + part);
        multiply_panel(a + from * a_row, a_row, a_step, to - from, b + p * k * width_, k, kTerms,
                       c + from * c_row + p * width_, c_row, add);
      }
    });
  }

  void portable_products(int64_t at, int64_t rows, const V* P, int64_t width, V* d_rows, V* d_cols, V* product) {
    const V* left = wide_rows(at, rows);
    const V* right = kNarrow<T> ? wide_cols_.get() : reinterpret_cast<const V*>(cols_);
    if (d_rows) {
      for_each(1, [&](int64_t, int64_t) {
        multiply(matrix(P, rows, n_, stride_, 1), matrix(right, n_, width, d_, 1),
                 matrix(d_rows + at * width, rows, width, width, 1));
      });
    }
    if (!d_cols) return;
    each_chunk(kGrain * 64, [&](int64_t, int64_t first, int64_t columns) {
      multiply(matrix(P + first, columns, rows, 1, stride_), matrix(left, rows, width, d_, 1),
               matrix(product + first * width, columns, width, width, 1));
      for (int64_t j = first * width; j < (first + columns) * width; ++j) d_cols[j] += product[j];
    });
  }

  const T* source_;
  const V* diag_;
  const V scale_;
  const int64_t m_, n_, d_, offset_, stride_;
  const bool own_;  // our blocks where the processor has them, elsewhere torch's GEMM
  const int64_t width_, panels_, tile_rows_;
  Buffer<V> wide_rows_, wide_cols_, packed_;
  const T* cols_;
};

struct Sizes {
  int64_t rows, columns, d;
  ScalarType dtype, wide;
};

Sizes checked(const char* op, const Tensor& rows, const Tensor& cols, const Tensor& diag, const Tensor& scale,
              int64_t offset) {
  check_dim(op, "rows", rows, 2);
  check_dim(op, "cols", cols, 2);
  const ScalarType dtype = rows.scalar_type(), wide = dtype == ScalarType::Double ? dtype : ScalarType::Float;
  const Sizes sizes{rows.size(0), cols.size(0), rows.size(1), dtype, wide};
  check(op, "rows", rows, dtype, {sizes.rows, sizes.d});
  check(op, "cols", cols, dtype, {sizes.columns, sizes.d});
  check(op, "diag", diag, wide, {sizes.columns});
  check(op, "scale", scale, wide, {});
  require(offset >= 0 && offset + sizes.rows <= sizes.columns, op, "expected the rows' own columns among all");
  return sizes;
}

Tensor fresh(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, {shape.begin(), shape.size()}, std::optional<ScalarType>(dtype));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> drrho_sums(Tensor rows, Tensor cols, Tensor diag, Tensor scale, int64_t offset,
                                              bool keep) {
  const char* op = "drrho_sums";
  const Sizes sizes = checked(op, rows, cols, diag, scale, offset);
  Tensor row_lse = fresh(rows, {sizes.rows}, sizes.wide), col_lse = fresh(rows, {sizes.columns}, sizes.wide);
  Tensor kept = fresh(rows, {keep ? sizes.rows : 0, row_stride(sizes.columns)}, sizes.wide);
  dispatch(op, sizes.dtype, [&](auto zero) {
    using T = decltype(zero);
    using V = Compute<T>;
    Sweep<T> sweep(data<T>(rows), data<T>(cols), data<V>(diag), *data<V>(scale), sizes.rows, sizes.columns, sizes.d,
                   offset);
    sweep.sums(data<V>(row_lse), data<V>(col_lse), keep ? data<V>(kept) : nullptr);
  });
  return {row_lse, col_lse, kept};
}

std::tuple<Tensor, Tensor, Tensor> drrho_grad(Tensor rows, Tensor cols, Tensor diag, Tensor scale, int64_t offset,
                                              Tensor row_u, Tensor col_u, Tensor own, Tensor kept, int64_t width,
                                              bool need_rows, bool need_cols) {
  const char* op = "drrho_grad";
  const Sizes sizes = checked(op, rows, cols, diag, scale, offset);
  check(op, "row_u", row_u, sizes.wide, {sizes.rows});
  check(op, "col_u", col_u, sizes.wide, {sizes.columns});
  check(op, "own", own, sizes.wide, {sizes.rows});
  check_dim(op, "kept", kept, 2);
  check(op, "kept", kept, sizes.wide, {kept.size(0) > 0 ? sizes.rows : 0, row_stride(sizes.columns)});
  require(width >= 0 && width <= sizes.d, op, "expected a width of at most that of the rows");
  Tensor d_rows = fresh(rows, {need_rows ? sizes.rows : 0, width}, sizes.wide);
  Tensor d_cols = fresh(rows, {need_cols ? sizes.columns : 0, width}, sizes.wide);
  Tensor moment = fresh(rows, {}, sizes.wide);
  dispatch(op, sizes.dtype, [&](auto zero) {
    using T = decltype(zero);
    using V = Compute<T>;
    Sweep<T> sweep(data<T>(rows), data<T>(cols), data<V>(diag), *data<V>(scale), sizes.rows, sizes.columns, sizes.d,
                   offset);
    *data<V>(moment) = V(sweep.grad(data<V>(row_u), data<V>(col_u), data<V>(own),
                                    kept.size(0) > 0 ? data<V>(kept) : nullptr, width,
                                    need_rows ? data<V>(d_rows) : nullptr, need_cols ? data<V>(d_cols) : nullptr));
  });
  return {d_rows, d_cols, moment};
}

}  // namespace clipsteer
