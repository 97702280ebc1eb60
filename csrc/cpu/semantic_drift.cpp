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
constexpr int64_t kFew = 32;               // rows that are not worth packing
constexpr int64_t kFewBlock = 2 * kBlockRows;  // prototypes whose sums of so few rows stay in the first-level cache
constexpr int64_t kTileBlock = 32;             // prototypes that are multiplied on AMX tiles at once
constexpr int64_t kLeastTileRows = 4;          // whose distances are sooner found so
constexpr int64_t kLeastSplitRows = 16;        // whose movements are sooner added so, as three products

template <class V>
struct Sums {
  V *peak, *total, *moved;  // (C,), (C,), (C, d)
};

template <class T>
struct Prototypes {
  const T* rows;
  int64_t count, d;
  Compute<T> unit, kappa, log_floor;
};

// Whether products of rows with such squares neither overflow nor lose what counts: below the normal range less than 2^-40
// of a rounding of the smallest of these squares, and numbers whose square is 0 are too small for a weight to know them.
template <class V>
bool usual(V square) {
  constexpr V most = sizeof(V) == 4 ? V(0x1p60) : V(0x1p500), least = 1 / most;
  return square == 0 || (square >= least && square <= most);
}

// |row|^2 of a row in units; a row past kFar is made 0, so that its products are, and counts as that far.
template <class V>
V measured(V* row, int64_t d) {
  const V square = kernels<V>().square(row, d);
  if (!(square > kFar<V>)) return square;
  std::fill_n(row, d, V(0));
  return kFar<V>;
}

template <class T>
class Pass {
 public:
  using V = Compute<T>;

  // Of at most `rows` rows a part and `count` prototypes a task.
  Pass(const Prototypes<T>& prototypes, int64_t rows, int64_t count)
      : all_(prototypes),
        d_(prototypes.d),
        own_(kernels<V>().block_columns > 0),
        pairs_(pair_products<T>()),
        tiles_(pairs_ && pairs_->tiles && rows >= kLeastTileRows),
        few_(own_ && !tiles_ && rows <= kFew),
        in_place_(own_ && (pairs_ ? d_ % 2 == 0 : !kNarrow<T>)),
        plain_kappa_(prototypes.kappa * prototypes.unit * prototypes.unit),
        terms_(pairs_ ? (d_ + 1) / 2 : d_),
        width_(own_ ? kernels<V>().block_columns : d_),
        panels_((d_ + width_ - 1) / width_),
        height_(own_ && !few_ ? (std::min(rows, kRows) + width_ - 1) / width_ * width_ : std::min(rows, kRows)),
        block_(std::min(count, few_ ? kFewBlock : tiles_ ? kTileBlock : kBlock)),
        depth_(tiles_ ? (std::min(rows, kRows) + 1) / 2 * 2 : 0),
        tile_(height_ * terms_),
        packed_(own_ && !few_ ? height_ * terms_ : 0),
        change_(height_ * panels_ * width_),
        parts_(depth_ * panels_ * width_),
        split_(depth_ * block_),
        means_(block_ * terms_),
        row_(d_),
        before_(kNarrow<T> ? d_ : 0),
        after_(kNarrow<T> ? d_ : 0),
        square_(height_),
        mean_square_(count),
        block_square_(block_),
        weights_(block_ * height_),
        product_(block_ * (tiles_ ? std::max(d_, width_) : width_)),
        halves_(tiles_ ? 4 * d_ : 0) {}

  // The sums of prototypes [first, last) over rows [begin, end).
  void run(const T* old, const T* fresh, int64_t begin, int64_t end, int64_t first, int64_t last, const Sums<V>& sums) {
    measure(first, last);
    for (int64_t at = begin; at < end; at += kRows) {
      const int64_t rows = std::min(kRows, end - at);
      load(old + at * d_, fresh + at * d_, rows);
      for (int64_t c = first; c < last; c += block_) {
        const int64_t count = std::min(block_, last - c);
        add(c, count, rows, at == begin, {sums.peak + c, sums.total + c, sums.moved + c * d_});
      }
    }
  }

  // Prototypes [first, last) as a single tile of rows moves them.
  void run(const T* old, const T* fresh, int64_t rows, int64_t first, int64_t last, T* out) {
    Buffer<V> peak(block_), total(block_), moved(block_ * d_);
    for (int64_t c = first; c < last; c += block_) {
      const int64_t count = std::min(block_, last - c);
      const bool usual_before = usual_means_;
      measure(c, c + count);  // which are in the cache then
      if (!rows_ || usual_means_ != usual_before) load(old, fresh, rows);
      const Sums<V> sums{peak.get(), total.get(), moved.get()};
      add(c, count, rows, true, sums, rows <= kFew ? out + c * d_ : nullptr);
      settle(c, count, sums, out);
    }
  }

  // Prototypes [c, c + count) moved by their sums.
  void settle(int64_t c, int64_t count, const Sums<V>& sums, T* out) {
    for (int64_t i = 0; i < count; ++i) {
      kernels<T>().settle(all_.rows + (c + i) * d_, sums.moved + i * d_, sums.total[i], out + (c + i) * d_, d_);
    }
  }

 private:
  // Numbers that are written soon, when their memory has come into the second-level cache.
  static void expect(const T* out, int64_t n) {
    for (int64_t q = 0; q < n; q += 64 / int64_t(sizeof(T))) __builtin_prefetch(out + q, 1, 2);
  }

  // Squares of prototypes as they are, and whether units can be done without: those of a row and of a
  // prototype are all the same, and powers of two, so that without them not a bit is another.
  void measure(int64_t first, int64_t last) {
    first_ = first;
    usual_means_ = plain_kappa_ > 0 && usual(plain_kappa_);
    for (int64_t c = first; c < last; ++c) {
      mean_square_.get()[c - first] = kernels<T>().square(all_.rows + c * d_, d_);
      usual_means_ = usual_means_ && usual(mean_square_.get()[c - first]);
    }
  }

  // `next`, if any: what is written after this.
  void add(int64_t c, int64_t count, int64_t rows, bool begins, const Sums<V>& sums, const T* next = nullptr) {
    const bool direct = plain_ && in_place_;
    const V* means = direct ? reinterpret_cast<const V*>(all_.rows + c * d_) : means_.get();
    const V* square = plain_ ? mean_square_.get() + c - first_ : block_square_.get();
    for (int64_t i = 0; !direct && i < count; ++i) {
      lay(all_.rows + (c + i) * d_, means_.get() + i * terms_, block_square_.get()[i]);
    }
    distances(means, count, rows);
    for (int64_t i = 0; i < count; ++i) {
      weigh(i, square[i], rows, begins, sums);
      if (next) expect(next + i * d_, d_);
    }
    move(count, rows, begins, sums.moved);
  }

  // A row as the products take it: as it is or, where that cannot be, in units, with the square that it has there. As pairs it
  // loses nothing: the unit is a power of two.
  void lay(const T* source, V* into, V& square) {
    T* numbers = reinterpret_cast<T*>(into);
    if (plain_) {
      if (pairs_ || !kNarrow<T>) {
        std::copy_n(source, d_, numbers);
      } else if constexpr (kNarrow<T>) {
        kernels<T>().widen(source, into, d_);
      }
    } else {
      const V* row = widened(source, before_.get(), d_);
      V* scaled = pairs_ ? row_.get() : into;
      for (int64_t j = 0; j < d_; ++j) scaled[j] = row[j] * all_.unit;
      square = measured(scaled, d_);
      if constexpr (kNarrow<T>) {
        if (pairs_) kernels<T>().narrow(scaled, numbers, d_);
      }
    }
    if (pairs_ && d_ % 2) numbers[d_] = T(0);
  }

  void load(const T* old, const T* fresh, int64_t rows) {
    plain_ = usual_means_;
    for (int64_t i = 0; i < rows; ++i) {
      square_.get()[i] = kernels<T>().square(old + i * d_, d_);
      plain_ = plain_ && usual(square_.get()[i]);
    }
    const bool direct = plain_ && in_place_;
    for (int64_t i = 0; !direct && i < rows; ++i) lay(old + i * d_, tile_.get() + i * terms_, square_.get()[i]);
    rows_ = direct ? reinterpret_cast<const V*>(old) : tile_.get();
    for (int64_t i = 0; own_ && !few_ && i < rows; i += width_) {
      kernels<V>().pack(rows_ + i * terms_, terms_, std::min(width_, rows - i), terms_, packed_.get() + i * terms_);
    }
    splits_ = tiles_ && rows >= kLeastSplitRows && split_changes(old, fresh, rows);
    for (int64_t i = 0; !splits_ && i < rows; ++i) {
      const V* change = changed(old + i * d_, fresh + i * d_);
      for (int64_t p = 0; p < panels_; ++p) {
        const int64_t columns = std::min(width_, d_ - p * width_);
        V* target = change_.get() + (p * height_ + i) * width_;
        std::copy_n(change + p * width_, columns, target);
        std::fill_n(target + columns, width_ - columns, V(0));
      }
    }
  }

  // How a row moves.
  const V* changed(const T* old, const T* fresh) {
    const V* before = widened(old, before_.get(), d_);
    const V* after = widened(fresh, after_.get(), d_);
    V* change = row_.get();
    for (int64_t j = 0; j < d_; ++j) change[j] = after[j] - before[j];
    return change;
  }

  // Movements as panels of pairs of rows, high parts before low ones. False if one is too large, or no number.
  bool split_changes(const T* old, const T* fresh, int64_t rows) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      const int64_t pairs = (rows + 1) / 2;
      T* const halves = halves_.get();  // high parts of a pair of rows, then the low ones
      const T* const of[] = {halves, halves + d_, halves + 2 * d_, halves + 3 * d_};
      for (int64_t i = 0; i < rows; i += 2) {
        const int64_t some = std::min<int64_t>(2, rows - i);
        for (int64_t l = 0; l < some; ++l) {
          const V* change = changed(old + (i + l) * d_, fresh + (i + l) * d_);
          if (!pairs_->halve(change, d_, halves + l * d_, halves + (2 + l) * d_)) return false;
        }
        for (int64_t p = 0; p < panels_; ++p) {
          const int64_t columns = std::min(width_, d_ - p * width_);
          V* target = parts_.get() + (2 * pairs * p + i / 2) * width_;
          pairs_->weave(of, some, p * width_, columns, target);
          pairs_->weave(of + 2, some, p * width_, columns, target + pairs * width_);
        }
      }
      return true;
    }
    return false;
  }

  // weights_[i] = the products of the block's prototype i with the rows.
  void distances(const V* means, int64_t count, int64_t rows) {
    if (!own_) {
      multiply(matrix(means, count, d_, d_, 1), matrix(rows_, d_, rows, 1, d_),
               matrix(weights_.get(), count, rows, height_, 1));
      return;
    }
    if (few_) {
      const V* left[kFewBlock];
      V* into[kFewBlock];
      for (int64_t i = 0; i < count; ++i) {
        left[i] = means + i * terms_;
        into[i] = weights_.get() + i * height_;
      }
      if constexpr (kNarrow<T>) {
        if (pairs_) return pairs_->inner(left, count, rows_, terms_, rows, terms_, into);
      }
      return kernels<V>().inner(left, count, rows_, d_, rows, d_, into);
    }
    Block<V> block = kernels<V>().block;
    if constexpr (kNarrow<T>) {
      if (tiles_) {
        return pairs_->tiles(means, terms_, count, packed_.get(), width_ * terms_, terms_, rows, weights_.get(), height_,
                             false);
      }
      if (pairs_) block = pairs_->block;
    }
    for (int64_t at = 0; at < rows; at += width_) {
      multiply_panel(means, terms_, 1, count, packed_.get() + at * terms_, terms_, kTerms, weights_.get() + at, height_,
                     false, block);
    }
  }

  void weigh(int64_t i, V square, int64_t rows, bool begins, const Sums<V>& sums) {
    V* dot = weights_.get() + i * height_;
    const V kappa = plain_ ? plain_kappa_ : all_.kappa;
    const V highest = kernels<V>().log_weights(dot, square_.get(), square, kappa, rows);
    if (begins) {
      sums.peak[i] = highest > all_.log_floor ? highest : all_.log_floor;
      sums.total[i] = 0;
    } else if (highest > sums.peak[i]) {
      const V shrink = std::exp(sums.peak[i] - highest);
      sums.peak[i] = highest;
      sums.total[i] *= shrink;
      for (int64_t j = 0; j < d_; ++j) sums.moved[i * d_ + j] *= shrink;
    }
    const V floor = std::exp(all_.log_floor - sums.peak[i]);
    sums.total[i] += kernels<V>().weights(dot, sums.peak[i], floor, rows);
  }

  void move(int64_t count, int64_t rows, bool begins, V* moved) {
    if (!own_) {
      multiply(matrix(weights_.get(), count, rows, height_, 1), matrix(change_.get(), rows, d_, d_, 1),
               matrix(product_.get(), count, d_, d_, 1));
      for (int64_t j = 0; j < count * d_; ++j) moved[j] = (begins ? V(0) : moved[j]) + product_.get()[j];
      return;
    }
    if (splits_) return move_by_parts(count, rows, begins, moved);
    for (int64_t p = 0; p < panels_; ++p) {
      const int64_t columns = std::min(width_, d_ - p * width_);
      const bool whole = columns == width_;  // else a block would write past the row
      const V* panel = change_.get() + p * height_ * width_;
      V* into = moved + p * width_;
      multiply_panel(weights_.get(), height_, 1, count, panel, rows, kTerms, whole ? into : product_.get(),
                     whole ? d_ : width_, whole && !begins);
      for (int64_t i = 0; !whole && i < count; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
          into[i * d_ + j] = (begins ? V(0) : into[i * d_ + j]) + product_.get()[i * width_ + j];
        }
      }
    }
  }

  // Weights and movements are sums of two parts each; low parts times each other are left out.
  void move_by_parts(int64_t count, int64_t rows, bool begins, V* moved) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      const int64_t pairs = (rows + 1) / 2;
      for (int64_t i = 0; i < count; ++i) {
        V* weight = weights_.get() + i * height_;
        T* low = reinterpret_cast<T*>(split_.get() + i * 2 * pairs);
        if (rows % 2) weight[rows] = 0;
        pairs_->halve(weight, 2 * pairs, low + 2 * pairs, low);
      }
      V* into = begins ? moved : product_.get();
      const V *low = split_.get(), *rows_of = parts_.get();
      pairs_->tiles_of_both(low + pairs, low, 2 * pairs, count, rows_of, rows_of + pairs * width_, 2 * pairs * width_,
                            pairs, d_, into, d_);
      for (int64_t j = 0; !begins && j < count * d_; ++j) moved[j] += into[j];
    }
  }

  const Prototypes<T>& all_;
  const int64_t d_;
  const bool own_;  // our blocks where the processor has them, elsewhere torch's GEMM
  const PairProducts* const pairs_;
  const bool tiles_;  // AMX
  const bool few_;
  const bool in_place_;  // whether rows that need no units are multiplied where they are
  const V plain_kappa_;  // of numbers without units
  const int64_t terms_;  // of a row in units: numbers, or pairs of them
  const int64_t width_, panels_;
  const int64_t height_;  // rows of a tile
  const int64_t block_;   // prototypes that share a tile
  const int64_t depth_;   // pairs of a tile's rows, in parts
  int64_t first_ = 0;     // prototype whose square is known
  bool usual_means_ = false, plain_ = false;  // no units: of the prototypes, and of the tile as well
  bool splits_ = false;  // movements are in parts_, else in change_
  const V* rows_ = nullptr;
  Buffer<V> tile_, packed_, change_, parts_, split_, means_, row_, before_, after_, square_, mean_square_, block_square_;
  Buffer<V> weights_, product_;
  Buffer<T> halves_;
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
Prototypes<T> in_units(const Tensor& prototypes, const Tensor& scale) {
  using V = Compute<T>;
  const double* number = data<double>(scale);
  return {data<T>(prototypes), prototypes.size(0), prototypes.size(1), V(number[0]), V(number[1]), V(number[2])};
}

template <class T>
void drift(const T* old, const T* fresh, const Prototypes<T>& all, int64_t rows, const Sums<Compute<T>>& sums) {
  using V = Compute<T>;
  const int64_t count = all.count, d = all.d, blocks = (count + kPrototypes - 1) / kPrototypes;
  if (rows == 0) {
    std::fill_n(sums.peak, count, all.log_floor);
    std::fill_n(sums.total, count, V(0));
    std::fill_n(sums.moved, count * d, V(0));
    return;
  }
  const int64_t parts = std::max<int64_t>(1, std::min(kTasks / blocks, rows / kLeastRows));
  Buffer<V> store((parts - 1) * count * (d + 2));
  const auto of_part = [&](int64_t part) -> Sums<V> {
    if (part == 0) return sums;
    V* own = store.get() + (part - 1) * count * (d + 2);
    return {own, own + count, own + 2 * count};
  };
  for_each(blocks * parts, [&](int64_t begin, int64_t end) {
    Pass<T> pass(all, (rows + parts - 1) / parts, std::min(count, kPrototypes));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / blocks, block = task % blocks;
      pass.run(old, fresh, rows * part / parts, rows * (part + 1) / parts, count * block / blocks,
               count * (block + 1) / blocks, of_part(part));
    }
  });
  for (int64_t part = 1; part < parts; ++part) merge(sums, of_part(part), count, d);
}

// The prototypes as the rows move them; one tile needs no sums of all prototypes.
template <class T>
void moved(const T* old, const T* fresh, const Prototypes<T>& all, int64_t rows, T* out) {
  using V = Compute<T>;
  const int64_t count = all.count, blocks = (count + kPrototypes - 1) / kPrototypes;
  const bool one_tile = rows <= kRows;
  Buffer<V> store(one_tile ? 0 : count * (all.d + 2));
  const Sums<V> sums{store.get(), store.get() + count, store.get() + 2 * count};
  if (!one_tile) drift<T>(old, fresh, all, rows, sums);
  for_each(blocks, [&](int64_t begin, int64_t end) {
    Pass<T> pass(all, one_tile ? rows : 1, one_tile ? std::min(count, kPrototypes) : 1);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = count * block / blocks, last = count * (block + 1) / blocks;
      if (one_tile) {
        pass.run(old, fresh, rows, first, last, out);
      } else {
        pass.settle(first, last - first, {sums.peak + first, sums.total + first, sums.moved + first * all.d}, out);
      }
    }
  });
}

void check_rows(const char* op, const Tensor& old, const Tensor& fresh, const Tensor& prototypes, const Tensor& scale) {
  check_dim(op, "old", old, 2);
  check_dim(op, "prototypes", prototypes, 2);
  const int64_t rows = old.size(0), d = old.size(1), count = prototypes.size(0);
  const ScalarType dtype = old.scalar_type();
  check(op, "old", old, dtype, {rows, d});
  check(op, "new", fresh, dtype, {rows, d});
  check(op, "prototypes", prototypes, dtype, {count, d});
  check(op, "scale", scale, ScalarType::Double, {3});
  require(d > 0, op, "expected d > 0");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> drift_sums(Tensor old, Tensor fresh, Tensor prototypes, Tensor scale) {
  const char* op = "drift_sums";
  check_rows(op, old, fresh, prototypes, scale);
  const int64_t count = prototypes.size(0), sizes[] = {count, old.size(1)};
  const ScalarType dtype = old.scalar_type();
  const std::optional<ScalarType> wide = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor peak = allocate(old, {sizes, 1}, wide);
  Tensor total = allocate(old, {sizes, 1}, wide);
  Tensor moved = allocate(old, {sizes, 2}, wide);
  if (count > 0) {
    dispatch(op, dtype, [&](auto zero) {
      using T = decltype(zero);
      using V = Compute<T>;
      drift<T>(data<T>(old), data<T>(fresh), in_units<T>(prototypes, scale), old.size(0),
               {data<V>(peak), data<V>(total), data<V>(moved)});
    });
  }
  return {peak, total, moved};
}

// What semantic_drift returns.
Tensor moved_prototypes(Tensor old, Tensor fresh, Tensor prototypes, Tensor scale) {
  const char* op = "moved_prototypes";
  check_rows(op, old, fresh, prototypes, scale);
  require(old.size(0) > 0, op, "expected rows");
  const int64_t sizes[] = {prototypes.size(0), old.size(1)};
  Tensor out = allocate(prototypes, {sizes, 2});
  if (prototypes.size(0) > 0) {
    dispatch(op, old.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      moved<T>(data<T>(old), data<T>(fresh), in_units<T>(prototypes, scale), old.size(0), data<T>(out));
    });
  }
  return out;
}

}  // namespace clipsteer
