// What the contrastive losses share: similarities of rows with all columns, S = rows colsᵀ, one tile of rows at a time,
// and what both directions of a loss need of a tile while it is in cache: maxima along its rows and down its columns, or
// the weights of all pairs and their two products. Tiles follow each other and every sum has its place in them: no result
// depends on the thread count.
#pragma once

#include "gemm.h"

namespace clipsteer {

constexpr int64_t kTerms = 256;         // of a product in registers: longer chains of sums lose digits
constexpr int64_t kTileRows = 192;      // a multiple of a block's rows
constexpr int64_t kMostTileRows = 384;  // where sums of columns, one for each tile, take longer than products
constexpr int64_t kTileBytes = 4 << 20;  // of a tile, beside which the packed columns stream past
constexpr int64_t kLeastRows = 48;      // of a tile: with fewer these would come from memory more slowly than they go
constexpr int64_t kGrain = 4;           // panels of a task
constexpr int64_t kFew = 32;            // columns that are not worth packing
constexpr int64_t kFewOnTiles = 8;      // or rows or columns, for AMX tiles

// Of a row of similarities, in numbers: whole panels on every instruction set, and a line more, as rows that lie a power
// of two apart would share their place in the cache.
inline int64_t row_stride(int64_t columns) { return (columns + 63) / 64 * 64 + 16; }

template <class T>
class Sweep {
 public:
  using V = Compute<T>;

  Sweep(const T* rows, const T* cols, int64_t m, int64_t n, int64_t d)
      : source_(rows),
        m_(m),
        n_(n),
        d_(d),
        stride_(row_stride(n)),
        own_(kernels<V>().block_columns > 0),
        width_(own_ ? kernels<V>().block_columns : 64),
        panels_((n + width_ - 1) / width_),
        on_tiles_(has_tiles() && m > kFewOnTiles && n > kFewOnTiles),
        few_(own_ && !on_tiles_ && n <= kFew),
        terms_(pair_products<T>() && !few_ && d % 2 == 0 ? d / 2 : d),
        tile_rows_(fitting_rows(std::min(m, std::max(kLeastRows, kTileBytes / int64_t(sizeof(V)) / stride_)),
                                on_tiles_ ? kMostTileRows : kTileRows)),
        wide_rows_(kNarrow<T> && !(on_tiles_ && terms_ < d) ? tile_rows_ * d : 0),
        wide_cols_(kNarrow<T> && (!own_ || few_) ? n * d : 0),
        packed_(own_ && !few_ ? panels_ * width_ * terms_ : 0),
        cols_(cols) {}

  int64_t rows() const { return m_; }
  int64_t columns() const { return n_; }
  int64_t stride() const { return stride_; }
  int64_t tile_rows() const { return tile_rows_; }

  // A tile of similarities, which takes `pack_columns` once before.
  void similarities(int64_t at, int64_t rows, V* S) {
    if constexpr (kNarrow<T>) {
      if (terms_ < d_) {
        const V* left = pairs_of(source_ + at * d_);
        if (on_tiles_) {
          similarities_on_tiles(left, rows, S);
        } else {
          products(left, terms_, 1, rows, packed_.get(), terms_, panels_, S, stride_, false, pair_products<T>()->block);
        }
        return;
      }
    }
    const V* left = wide_rows(at, rows);
    if (own_ && !few_) {
      products(left, d_, 1, rows, packed_.get(), d_, panels_, S, stride_, false);
      return;
    }
    const V* right = kNarrow<T> ? wide_cols_.get() : reinterpret_cast<const V*>(cols_);
    if (few_) {
      inner_products(left, rows, right, S);
      return;
    }
    each_chunk(kGrain * 64, [&](int64_t, int64_t first, int64_t columns) {
      multiply(matrix(left, rows, d_, d_, 1), matrix(right + first * d_, d_, columns, 1, d_),
               matrix(S + first, rows, columns, stride_, 1));
    });
  }

  void pack_columns() {
    if (!own_ || few_) {
      if constexpr (kNarrow<T>) kernels<T>().widen(cols_, wide_cols_.get(), n_ * d_);
      return;
    }
    for_each(panels_, [&](int64_t begin, int64_t end) {
      Buffer<V> wide(kNarrow<T> ? width_ * d_ : 0);
      for (int64_t p = begin; p < end; ++p) {
        const int64_t columns = std::min(width_, n_ - p * width_);
        const T* source = cols_ + p * width_ * d_;
        const V* from = terms_ < d_ ? pairs_of(source) : widened(source, wide.get(), columns * d_);
        kernels<V>().pack(from, terms_, columns, terms_, packed_.get() + p * width_ * terms_);
      }
    });
  }

  template <class F>
  void each_chunk(int64_t chunk, F&& f) {
    for_each((n_ + chunk - 1) / chunk, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) f(c, c * chunk, std::min(chunk, n_ - c * chunk));
    });
  }

  // f(i) for the rows of a tile, in parallel.
  template <class F>
  void each_row(int64_t rows, F&& f) {
    for_each((rows + kBlockRows - 1) / kBlockRows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * kBlockRows; i < std::min(rows, end * kBlockRows); ++i) f(i);
    });
  }

  // w cols and wᵀ rows, of the first `width` numbers of each, where they are wanted: weigh(at, rows, P) writes the weights
  // of a tile of rows, which lie `stride()` apart. `packed`: whether `pack_columns` has to be done for the weights.
  template <class F>
  void gradients(int64_t width, V* d_rows, V* d_cols, bool packed, F&& weigh) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (on_tiles_) return gradients_on_tiles(width, d_rows, d_cols, packed, weigh);
    }
    const int64_t right = (width + width_ - 1) / width_, padded = right * width_;
    const bool direct = padded == width || !own_;
    const bool in_place = few_ && direct;  // few rows of features are read where they are
    if (packed || !own_ || in_place) pack_columns();
    const bool cut = own_ && !in_place;
    Buffer<V> tile(tile_rows_ * stride_), forth(cut && d_rows ? n_ * padded : 0),
        back(cut && d_cols ? tile_rows_ * padded : 0), row_sum(direct ? 0 : tile_rows_ * padded),
        col_sum(d_cols && (!direct || !own_) ? n_ * padded : 0);
    V* into = direct && own_ ? d_cols : col_sum.get();
    if (d_cols) std::fill_n(direct ? d_cols : into, n_ * (direct ? width : padded), V(0));
    if (cut && d_rows) slices(cols_, n_, width, forth.get());
    for (int64_t at = 0; at < m_; at += tile_rows_) {
      const int64_t rows = std::min(tile_rows_, m_ - at);
      V* P = tile.get();
      weigh(at, rows, P);
      if (!own_) {
        portable_products(at, rows, P, width, d_rows, d_cols, into);
        continue;
      }
      if (in_place) {
        const V* here = kNarrow<T> ? wide_cols_.get() : reinterpret_cast<const V*>(cols_);
        if (d_rows) {
          products(P, stride_, 1, rows, here, n_, right, d_rows + at * width, width, false, kernels<V>().block, d_);
        }
        here = wide_rows(at, rows);
        if (d_cols) products(P, 1, stride_, n_, here, rows, right, d_cols, width, true, kernels<V>().block, d_);
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
  }

 private:
  static bool has_tiles() { return pair_products<T>() && pair_products<T>()->tiles; }

  // Pairs of numbers as what they are moved as.
  static const V* pairs_of(const T* from) { return reinterpret_cast<const V*>(from); }

  static int64_t fitting_rows(int64_t rows, int64_t most) {
    return std::clamp((rows + kBlockRows - 1) / kBlockRows * kBlockRows, int64_t(kBlockRows), most);
  }

  void inner_products(const V* left, int64_t rows, const V* right, V* S) {
    for_each((rows + kBlockRows - 1) / kBlockRows, [&](int64_t begin, int64_t end) {
      const V* a[kTileRows];
      V* c[kTileRows];
      const int64_t first = begin * kBlockRows, count = std::min(rows, end * kBlockRows) - first;
      for (int64_t i = 0; i < count; ++i) {
        a[i] = left + (first + i) * d_;
        c[i] = S + (first + i) * stride_;
      }
      kernels<V>().inner(a, count, right, d_, n_, d_, c);
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

  // c (rows, panels * width_) = or += a (rows, k), whose numbers lie a_row and a_step apart, times panels of (k, width_),
  // or times rows of all panels, b_row apart.
  void products(const V* a, int64_t a_row, int64_t a_step, int64_t rows, const V* b, int64_t k, int64_t panels, V* c,
                int64_t c_row, bool add, Block<V> block = kernels<V>().block, int64_t b_row = 0) {
    // few panels are cut into more tasks
    const int64_t part = 16 * kBlockRows, parts = (rows + part - 1) / part;
    for_each(panels * parts, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t p = task / parts, from = task % parts * part, to = std::min(rows, from + part);
        multiply_panel(a + from * a_row, a_row, a_step, to - from, b + p * (b_row ? 1 : k) * width_, k, kTerms,
                       c + from * c_row + p * width_, c_row, add, block, b_row);
      }
    });
  }

  // The same of pairs on AMX tiles, from the columns that are packed.
  void similarities_on_tiles(const V* a, int64_t rows, V* S) {
    constexpr int64_t kHigh = 128, kWide = kGrain * 64;  // of a task
    const int64_t parts = (rows + kHigh - 1) / kHigh;
    for_each((n_ + kWide - 1) / kWide * parts, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t j = task / parts * kWide, i = task % parts * kHigh;
        pair_products<T>()->tiles(a + i * terms_, terms_, std::min(kHigh, rows - i), packed_.get() + j * terms_,
                                  width_ * terms_, terms_, std::min(kWide, n_ - j), S + i * stride_ + j, stride_, false);
      }
    });
  }

  // As `gradients`, where a weight is the sum of two bf16 numbers.
  template <class F>
  void gradients_on_tiles(int64_t width, V* d_rows, V* d_cols, bool packed, F&& weigh) {
    constexpr int64_t kHigh = 128;  // most rows of a task, whole squares of 16
    const PairProducts& pairs = *pair_products<T>();
    const auto halved = [](int64_t numbers) { return (numbers + 1) / 2; };
    // rows of pairs in whole lines, and a line more
    const auto row_of = [](int64_t numbers) { return (numbers + 31) / 32 * 16 + 16; };
    const int64_t padded = (width + width_ - 1) / width_ * width_, terms = halved(n_);
    if (packed) pack_columns();
    Buffer<V> tile(tile_rows_ * stride_), forth(d_rows ? terms * padded : 0),
        back(d_cols ? halved(tile_rows_) * padded : 0);
    if (d_rows) woven(cols_, n_, width, forth.get());
    for (int64_t at = 0; at < m_; at += tile_rows_) {
      const int64_t rows = std::min(tile_rows_, m_ - at);
      V* P = tile.get();
      weigh(at, rows, P);
      const auto each_part = [&](int64_t count, int64_t row, auto&& f) {
        const int64_t high = std::min(kHigh, (count + 15) / 16 * 16);
        for_each((count + high - 1) / high, [&](int64_t begin, int64_t end) {
          Buffer<V> parts(2 * high * row);
          for (int64_t i = begin * high; i < std::min(count, end * high); i += high) {
            f(i, std::min(high, count - i), parts.get(), parts.get() + high * row);
          }
        });
      };
      if (d_rows) {
        const int64_t row = row_of(n_);
        each_part(rows, row, [&](int64_t first, int64_t count, V* high, V* low) {
          for (int64_t i = 0; i < count; ++i) pairs.split(P + (first + i) * stride_, n_, high + i * row, low + i * row);
          pairs.tiles_of_two(high, low, row, count, forth.get(), terms * width_, terms, width,
                             d_rows + (at + first) * width, width, false);
        });
      }
      if (d_cols) {
        const int64_t row = row_of(rows);
        woven(source_ + at * d_, rows, width, back.get());
        each_part(n_, row, [&](int64_t first, int64_t count, V* high, V* low) {
          pairs.split_columns(P + first, stride_, rows, count, high, low, row);
          pairs.tiles_of_two(high, low, row, count, back.get(), halved(rows) * width_, halved(rows), width,
                             d_cols + first * width, width, at > 0);
        });
      }
    }
  }

  // Panels of the first `width` numbers of some rows, by pairs of rows.
  void woven(const T* from, int64_t rows, int64_t width, V* out) {
    constexpr int64_t kSome = 128;  // rows of a task
    const int64_t panels = (width + width_ - 1) / width_, terms = (rows + 1) / 2;
    for_each((rows + kSome - 1) / kSome, [&](int64_t begin, int64_t end) {
      const T* row[kSome];
      for (int64_t i = begin * kSome; i < std::min(rows, end * kSome); i += kSome) {
        const int64_t count = std::min(kSome, rows - i);
        for (int64_t l = 0; l < count; ++l) row[l] = from + (i + l) * d_;
        for (int64_t p = 0; p < panels; ++p) {
          pair_products<T>()->weave(row, count, p * width_, std::min(width_, width - p * width_),
                                    out + (p * terms + i / 2) * width_);
        }
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
  const int64_t m_, n_, d_, stride_;
  const bool own_;  // our blocks where the processor has them, elsewhere torch's GEMM
  const int64_t width_, panels_;
  const bool on_tiles_;  // products of bf16 numbers, or of two for each weight
  const bool few_;
  const int64_t terms_;  // of a product of similarities: numbers, or pairs of them
  const int64_t tile_rows_;
  Buffer<V> wide_rows_, wide_cols_, packed_;
  const T* cols_;
};

// The pairs of rows and columns as the softmaxes see them: t = (S - S_ii) scale of the row's own pair or the column's; row
// i's own partner is column offset + i, and no pair to them. Largest ones so far, and what is subtracted of them before an
// exponential is taken.
template <class T>
struct Pairs {
  using V = Compute<T>;

  Pairs(Sweep<T>& similarities, const V* own, V factor, int64_t first)
      : sweep(similarities),
        diag(own),
        scale(factor),
        offset(first),
        highest(sweep.columns()),
        peaks(sweep.columns()),
        row_peaks(sweep.tile_rows()),
        tile(0) {
    std::fill_n(highest.get(), sweep.columns(), -kInfinity);
    std::fill_n(peaks.get(), sweep.columns(), V(0));
  }

  // The similarities of a tile, in `kept` if that is there, with their own pairs at -inf; peaks of its rows.
  void begin(int64_t at, int64_t rows, V* kept) {
    if (!kept && at == 0) tile = Buffer<V>(sweep.tile_rows() * sweep.stride());
    const int64_t n = sweep.columns(), stride = sweep.stride(), chunks = (n + kChunk - 1) / kChunk;
    S = kept ? kept + at * stride : tile.get();
    sweep.similarities(at, rows, S);
    for (int64_t i = 0; i < rows; ++i) {
      S[i * stride + offset + at + i] = -kInfinity;
      if (kept) std::fill(S + i * stride + n, S + (i + 1) * stride, V(0));
    }
    std::vector<V> best(chunks * rows);
    sweep.each_chunk(kChunk, [&](int64_t c, int64_t first, int64_t columns) {
      for (int64_t i = 0; i < rows; ++i) {
        best[c * rows + i] = kernels<V>().maxima(S + i * stride + first, highest.get() + first, columns);
      }
    });
    for (int64_t i = 0; i < rows; ++i) {
      V largest = -kInfinity;
      for (int64_t c = 0; c < chunks; ++c) largest = best[c * rows + i] > largest ? best[c * rows + i] : largest;
      row_peaks.get()[i] = peak(largest, diag[offset + at + i]);
    }
  }

  // A column's peak with the tile's rows; its factor for what was summed below the one before.
  V raise(int64_t j) {
    const V next = peak(highest.get()[j], diag[j]), before = peaks.get()[j];
    peaks.get()[j] = next;
    return next == before ? V(1) : std::exp(before - next);
  }

  static constexpr V kInfinity = std::numeric_limits<V>::infinity();
  static constexpr int64_t kChunk = kGrain * 64;  // columns of a task
  Sweep<T>& sweep;
  const V* diag;
  const V scale;
  const int64_t offset;
  Buffer<V> highest, peaks, row_peaks, tile;
  V* S = nullptr;

 private:
  // Sums that are infinite, or empty, need none.
  V peak(V highest, V own) const {
    const V t = (highest - own) * scale;
    return std::isinf(t) || highest == -kInfinity ? V(0) : t;
  }
};

// Sums along rows and down columns of one matrix of pairs or of two. Sum s is below the peaks of pairs[s % kMatrices], of
// column j in total[s][j]; add(i, j, count, sums) adds row i's part from column j on, of columns to `total`, and gives the
// row's; end(row, sums, peaks) takes a row's.
template <int kSums, class T, size_t kMatrices, class Add, class End>
void sum_pairs(Pairs<T>* const (&pairs)[kMatrices], Compute<T>* const (&kept)[kMatrices],
               Compute<T>* const (&total)[kSums], Add&& add, End&& end) {
  using V = Compute<T>;
  Sweep<T>& sweep = pairs[0]->sweep;
  const int64_t n = sweep.columns(), m = sweep.rows(), tile_rows = sweep.tile_rows(), chunk = Pairs<T>::kChunk;
  const int64_t chunks = (n + chunk - 1) / chunk, offset = pairs[0]->offset;
  for (V* sums : total) std::fill_n(sums, n, V(0));
  Buffer<V> partial(chunks * tile_rows * kSums);
  for (auto* p : pairs) p->sweep.pack_columns();
  for (int64_t at = 0; at < m; at += tile_rows) {
    const int64_t rows = std::min(tile_rows, m - at);
    for (size_t k = 0; k < kMatrices; ++k) pairs[k]->begin(at, rows, kept[k]);
    sweep.each_chunk(chunk, [&](int64_t c, int64_t first, int64_t columns) {
      for (size_t k = 0; k < kMatrices; ++k) {
        for (int64_t j = first; j < first + columns; ++j) {
          const V factor = pairs[k]->raise(j);
          if (factor == 1) continue;
          for (size_t s = k; s < kSums; s += kMatrices) total[s][j] *= total[s][j] == 0 ? V(1) : factor;
        }
      }
      for (int64_t i = 0; i < rows; ++i) {
        // its own partner apart: next to an infinite one not even -inf is safe
        const int64_t self = offset + at + i, last = first + columns;
        const int64_t starts[] = {first, std::clamp(self + 1, first, last)}, ends[] = {std::clamp(self, first, last), last};
        V* sums = partial.get() + (c * tile_rows + i) * kSums;
        std::fill_n(sums, kSums, V(0));
        for (int side = 0; side < 2; ++side) {
          V some[kSums];
          add(at + i, i, starts[side], ends[side] - starts[side], some);
          for (int s = 0; s < kSums; ++s) sums[s] += some[s];
        }
      }
    });
    for (int64_t i = 0; i < rows; ++i) {
      V sums[kSums] = {};
      for (int64_t c = 0; c < chunks; ++c) {
        for (int s = 0; s < kSums; ++s) sums[s] += partial.get()[(c * tile_rows + i) * kSums + s];
      }
      end(at + i, i, sums);
    }
  }
}

struct Sizes {
  int64_t rows, columns, d;
  ScalarType dtype, wide;
};

// `apart`: an offset of as many as there are columns says that the rows' own columns are not among them.
inline Sizes check_features(const char* op, const Tensor& rows, const Tensor& cols, int64_t offset,
                            bool apart = false) {
  check_dim(op, "rows", rows, 2);
  check_dim(op, "cols", cols, 2);
  const ScalarType dtype = rows.scalar_type(), wide = dtype == ScalarType::Double ? dtype : ScalarType::Float;
  const Sizes sizes{rows.size(0), cols.size(0), rows.size(1), dtype, wide};
  check(op, "rows", rows, dtype, {sizes.rows, sizes.d});
  check(op, "cols", cols, dtype, {sizes.columns, sizes.d});
  const bool among = offset >= 0 && offset + sizes.rows <= sizes.columns;
  require(among || (apart && offset == sizes.columns), op, "expected the rows' own columns among all");
  return sizes;
}

// A batch of one process.
inline Sizes check_batch(const char* op, const Tensor& rows, const Tensor& cols) {
  const Sizes sizes = check_features(op, rows, cols, 0);
  require(sizes.rows == sizes.columns, op, "expected as many rows as columns");
  return sizes;
}

inline Sizes check_pairs(const char* op, const Tensor& rows, const Tensor& cols, const Tensor& diag, const Tensor& scale,
                         int64_t offset) {
  const Sizes sizes = check_features(op, rows, cols, offset);
  check(op, "diag", diag, sizes.wide, {sizes.columns});
  check(op, "scale", scale, sizes.wide, {});
  return sizes;
}

// Similarities that an earlier sweep left, or none.
inline void check_kept(const char* op, const Tensor& kept, const Sizes& sizes) {
  check_dim(op, "kept", kept, 2);
  check(op, "kept", kept, sizes.wide, {kept.size(0) > 0 ? sizes.rows : 0, row_stride(sizes.columns)});
}

inline Tensor fresh(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return allocate(like, {shape.begin(), shape.size()}, std::optional<ScalarType>(dtype));
}

}  // namespace clipsteer
