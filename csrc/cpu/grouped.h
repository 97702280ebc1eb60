// A batch whose rows belong to groups, panels of one group's rows, and their products with the group's matrix.
#pragma once

#include "gemm.h"

namespace clipsteer {

// Columns of a product that torch's GEMM makes at a time, and that make a task of their own when there are few panels.
constexpr int64_t kTaskColumns = 256;
constexpr int64_t kTerms = 64;     // of our blocks' sums: as many rows of a matrix as are read on all their way at a time
// A transposed matrix is sooner multiplied by its rows than packed: for fewer rows than this, of as many terms.
constexpr int64_t kInnerRows = 48, kInnerPairRows = 14, kInnerTerms = 192;
constexpr int64_t kTileNumbers = 1 << 15;  // of a product that is rounded afterwards: beside W in the second-level cache
constexpr int64_t kLeastTileRows = 4;      // that are sooner multiplied on AMX tiles, so many columns at a time
constexpr int64_t kTileColumns = 256;

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

inline int64_t most_rows(const std::vector<Panel>& panels) {
  int64_t most = 0;
  for (const Panel& panel : panels) most = std::max(most, panel.rows);
  return most;
}

// A product's left side: rows of numbers, or of pairs of 16-bit numbers where they lie.
template <class V>
struct Left {
  const V* const* row;
  bool pairs;
};

// What one thread needs to take panels through matrices, y = beta (x - mean) W + mean; no sum has more than `depth`
// terms, no row of y more numbers.
template <class T>
class Worker {
 public:
  using V = Compute<T>;

  Worker(const Groups& groups, int64_t rows, int64_t depth, const V* beta, const T* mean)
      : groups_(groups),
        on_tiles_(pairs_ && pairs_->tiles && rows >= kLeastTileRows),
        own_(kernels<V>().block_columns > 0),
        width_(own_ ? kernels<V>().block_columns : kTaskColumns),
        tile_width_(on_tiles_ ? kTileColumns
                    : kNarrow<T> ? std::max(width_, kTileNumbers / std::max<int64_t>(rows, 1) / width_ * width_)
                                 : width_),
        beta_(beta),
        mean_(mean),
        packed_(on_tiles_ ? depth * tile_width_ / 2 : own_ || kNarrow<T> ? depth * width_ : 0),
        wide_(kNarrow<T> ? depth * width_ : 0),
        mean_row_(kNarrow<T> && mean ? depth : 0),
        tile_(rows * tile_width_),
        rows_(rows),
        targets_(rows),
        tile_rows_(rows) {
    for (int64_t i = 0; i < rows; ++i) tile_rows_[i] = tile_.get() + i * tile_width_;
  }

  int64_t width() const { return width_; }

  // Whether rows of d numbers are multiplied by pairs.
  bool in_pairs(int64_t d) const { return pairs_ && !mean_ && d % 2 == 0; }
  // Whether they are where they lie.
  bool in_place(int64_t d) const { return in_pairs(d) && !(on_tiles_ && !groups_.order.empty()); }

  // A panel's rows of x (.., d), centred; in place unless something changes them, torch has to read them or tiles do, which
  // take rows at equal distances.
  Left<V> gather(const T* x, int64_t d, const Panel& panel, Buffer<V>& buffer) {
    const V* mu = mean_ ? widened(mean_ + panel.group * d, mean_row_.get(), d) : nullptr;
    const bool pairs = in_pairs(d);
    for (int64_t i = 0; i < panel.rows; ++i) {
      const T* source = x + groups_.row(panel.first + i) * d;
      V* row = buffer.get() + i * d;
      if (pairs) {
        rows_[i] = pairs_of(source);
        if (in_place(d)) continue;
        rows_[i] = buffer.get() + i * (d / 2);
        std::copy_n(pairs_of(source), d / 2, buffer.get() + i * (d / 2));
        continue;
      }
      if constexpr (kNarrow<T>) {
        kernels<T>().widen(source, row, d);
      } else {
        if (!mu && own_) {
          rows_[i] = source;
          continue;
        }
        std::copy_n(source, d, row);
      }
      const V minus = -1;
      if (mu) kernels<V>().add(row, row, &minus, &mu, nullptr, 1, nullptr, d);
      rows_[i] = row;
    }
    return {rows_.data(), pairs};
  }

  // c[i][0 ...] = columns [first, last) of a[i] W, W (k, n), or stored (n, k) if transpose; rows of c go on to whole
  // widths.
  void product(Left<V> a, int64_t count, const T* w, bool transpose, int64_t k, int64_t n, int64_t first, int64_t last,
               V* const* c) {
    const int64_t terms = a.pairs ? k / 2 : k;
    int64_t whole = 0;
    if (own_ && transpose && k >= kInnerTerms && count < (a.pairs ? kInnerPairRows : kInnerRows)) {
      const T* rows = w + first * k;
      if constexpr (kNarrow<T>) {
        if (a.pairs) return pairs_->inner(a.row, count, pairs_of(rows), terms, last - first, terms, c);
      }
      return kernels<T>().inner(a.row, count, rows, k, last - first, k, c);
    }
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (a.pairs && on_tiles_ && k > 0) return tile_product(a.row, count, w, transpose, k, n, first, last, c);
    }
    // what has to be converted goes through a tile, up to the last column
    if (own_ && !transpose && k > 0) whole = kNarrow<T> ? last - first : (last - first) / width_ * width_;
    // Some rows of W at a time, from end to end: tiles of them stay in the first-level cache, and W is read in order.
    for (int64_t q = 0; whole > 0 && q < terms; q += kTerms) {
      const int64_t some = std::min(kTerms, terms - q);
      for (int64_t at = 0; at < whole; at += width_) {
        const int64_t columns = std::min(width_, last - first - at);
        if constexpr (kNarrow<T>) {
          blocks(a, count, q, tile(w, a.pairs, k, n, q, some, first + at, columns), width_, some, c, at, at == 0);
        } else {
          const V* right = w + q * n + first + at;
          for (int64_t t = 0; t < some; ++t) fetch<3>(right + t * n + 2 * width_, width_);
          blocks(a, count, q, right, n, some, c, at, at == 0);
        }
      }
    }
    for (int64_t at = whole; at < last - first; at += width_) {
      const int64_t columns = std::min(width_, last - first - at);
      if (k == 0) {
        for (int64_t i = 0; i < count; ++i) std::fill_n(c[i] + at, width_, V(0));
      } else if (own_) {
        blocks(a, count, 0, packed(w, a.pairs, transpose, k, n, first + at, columns), width_, terms, c, at,
               at == whole || !a.pairs);
      } else {
        const V* right = nullptr;
        int64_t row_stride = transpose ? 1 : n, column_stride = transpose ? k : 1;
        if constexpr (kNarrow<T>) {
          right = packed(w, false, transpose, k, n, first + at, columns);
          row_stride = width_;
          column_stride = 1;
        } else {
          right = w + (first + at) * column_stride;
        }
        const int64_t a_stride = count > 1 ? a.row[1] - a.row[0] : k, c_stride = count > 1 ? c[1] - c[0] : width_;
        multiply(matrix(a.row[0], count, k, a_stride, 1), matrix(right, k, columns, row_stride, column_stride),
                 matrix(c[0] + at, count, columns, c_stride, 1));
      }
    }
  }

  // Columns [first, last) of the panel's rows of y (.., n) = beta a W + mean.
  void write(Left<V> a, const Panel& panel, const T* w, bool transpose, int64_t k, int64_t n, int64_t first,
             int64_t last, T* y) {
    // whole widths of y are written in place, what is left goes through a tile
    const int64_t whole = own_ && !kNarrow<T> ? (last - first) / width_ * width_ : 0;
    for (int64_t at = first; at < last;) {
      const bool direct = at < first + whole;
      const int64_t columns = direct ? whole : std::min(tile_width_, last - at);
      if constexpr (!kNarrow<T>) {
        for (int64_t i = 0; direct && i < panel.rows; ++i) targets_[i] = y + groups_.row(panel.first + i) * n + at;
      }
      V* const* c = direct ? targets_.data() : tile_rows_.data();
      product(a, panel.rows, w, transpose, k, n, at, at + columns, c);
      const V* mu = mean_ ? widened(mean_ + panel.group * n + at, mean_row_.get(), columns) : nullptr;
      const V one = 1;
      for (int64_t i = 0; i < panel.rows; ++i) {
        V* row = c[i];
        if (beta_) {
          for (int64_t j = 0; j < columns; ++j) row[j] *= beta_[panel.group];
        }
        if (mu) kernels<V>().add(row, row, &one, &mu, nullptr, 1, nullptr, columns);
        T* target = y + groups_.row(panel.first + i) * n + at;
        if constexpr (kNarrow<T>) {
          kernels<T>().narrow(row, target, columns);
        } else if (!direct) {
          std::copy_n(row, columns, target);
        }
      }
      at += columns;
    }
  }

 private:
  template <int level, int write = 0>
  static void fetch(const V* from, int64_t n) {
    for (int64_t q = 0; q < n; q += 64 / int64_t(sizeof(V))) __builtin_prefetch(from + q, write, level);
  }

  // A tile of W, its rows q to q + terms, times all rows of a, in blocks.
  void blocks(Left<V> a, int64_t count, int64_t q, const V* tile, int64_t stride, int64_t terms, V* const* c,
              int64_t at, bool new_rows) {
    Block<V> block = kernels<V>().block;
    if constexpr (kNarrow<T>) {
      if (a.pairs) block = pairs_->block;
    }
    const V* left[kBlockRows];
    V* target[kBlockRows];
    for (int64_t i = 0; i < count; i += kBlockRows) {
      const int64_t rows = std::min<int64_t>(kBlockRows, count - i);
      for (int64_t l = 0; l < rows; ++l) {
        left[l] = a.row[i + l] + q;
        target[l] = c[i + l] + at;
      }
      // The next block's rows come into the second-level cache, as the matrix streams through the first.
      for (int64_t l = i + rows; l < std::min(count, i + rows + kBlockRows); ++l) {
        if (new_rows) fetch<2>(a.row[l] + q, terms);
        if (q == 0) fetch<3, 1>(c[l] + at, width_);
      }
      block(left, 1, tile, stride, terms, int(rows), target, q > 0);
    }
  }

  // The product of pairs on AMX tiles.
  void tile_product(const V* const* a, int64_t count, const T* w, bool transpose, int64_t k, int64_t n, int64_t first,
                    int64_t last, V* const* c) {
    const int64_t terms = k / 2, a_row = count > 1 ? a[1] - a[0] : terms, c_row = count > 1 ? c[1] - c[0] : width_;
    for (int64_t at = first; at < last; at += kTileColumns) {
      const int64_t end = std::min(last, at + kTileColumns);
      V* out = packed_.get();
      for (int64_t p = at; transpose && p < end; p += width_, out += width_ * terms) {
        kernels<V>().pack(pairs_of(w + p * k), terms, std::min(width_, end - p), terms, out);
      }
      for (int64_t q = 0; !transpose && q < terms; q += kTerms) {
        const int64_t some = std::min(kTerms, terms - q);
        const T* rows[2 * kTerms];
        for (int64_t t = 0; t < 2 * some; ++t) rows[t] = w + (2 * q + t) * n;
        for (int64_t p = at; p < end; p += width_) {
          pairs_->weave(rows, 2 * some, p, std::min(width_, end - p), out + (p - at) * terms + q * width_);
        }
      }
      pairs_->tiles(a[0], a_row, count, packed_.get(), width_ * terms, terms, end - at, c[0] + at - first, c_row, false);
    }
  }

  static const V* pairs_of(const T* from) { return reinterpret_cast<const V*>(from); }

  // Rows of W from q on, or pairs of rows, as `some` rows of width_ numbers or pairs.
  const V* tile(const T* w, bool pairs, int64_t k, int64_t n, int64_t q, int64_t some, int64_t first, int64_t columns) {
    V* out = packed_.get();
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (pairs) {
        const T* rows[2 * kTerms];
        for (int64_t t = 0; t < 2 * some; ++t) rows[t] = w + (2 * q + t) * n;
        pairs_->weave(rows, 2 * some, first, columns, out);
        return out;
      }
    }
    kernels<T>().lay(w + q * n + first, n, some, columns, out);
    return out;
  }

  // Columns of W as k rows of width_ numbers, or pairs of a transposed one as half as many, zero past the last column.
  const V* packed(const T* w, bool pairs, bool transpose, int64_t k, int64_t n, int64_t first, int64_t columns) {
    V* out = packed_.get();
    if (transpose && own_) {
      const T* from = w + first * k;
      const int64_t terms = pairs ? k / 2 : k;
      kernels<V>().pack(pairs ? pairs_of(from) : widened(from, wide_.get(), columns * k), terms, columns, terms, out);
      return out;
    }
    const V* rows = transpose ? widened(w + first * k, wide_.get(), columns * k) : nullptr;
    for (int64_t q = 0; q < k; ++q, out += width_) {
      if (transpose) {
        for (int64_t j = 0; j < columns; ++j) out[j] = rows[j * k + q];
      } else if constexpr (kNarrow<T>) {
        kernels<T>().widen(w + q * n + first, out, columns);
      } else {
        std::copy_n(w + q * n + first, columns, out);
      }
      std::fill_n(out + columns, width_ - columns, V(0));
    }
    return packed_.get();
  }

  const Groups& groups_;
  const PairProducts* const pairs_ = pair_products<T>();
  const bool on_tiles_;  // AMX
  const bool own_;  // our blocks where the processor has them, elsewhere torch's GEMM
  const int64_t width_, tile_width_;
  const V* beta_;
  const T* mean_;
  Buffer<V> packed_, wide_, mean_row_, tile_;
  std::vector<const V*> rows_;
  std::vector<V*> targets_, tile_rows_;
};

}  // namespace clipsteer
