// Rows as integers of one unit, and how far the rows of a strip are from those of a tile: |p - p'| summed is 2 max(p, p')
// - p - p' summed; of sparse rows it is |p| + |p'| less 2 min(|p|, |p'|) where both have a concept, with the same sign.
#pragma once

#include "scores.h"

namespace clipsteer {

constexpr int64_t kPanels = 8;   // of a tile
constexpr int64_t kTerms = 256;  // concepts of a panel that stay in the second-level cache with it

template <class V>
constexpr int64_t kWidth = kScoreColumns<V>;

// The integers of one side.
template <class V>
struct Side {
  using I = Rank<V>;
  int64_t rows, concepts;
  Buffer<I> panels{0};        // (N / width, K, width): of a matrix
  std::vector<I> base;        // (N,)
  std::vector<int64_t> row;   // (N + 1,): of a sparse one
  std::vector<int64_t> concept_of;
  std::vector<I> number;
  std::optional<ScoreColumns> columns;

  bool sparse() const { return columns.has_value(); }
  const I* panel(int64_t p) const { return panels.get() + p * concepts * kWidth<V>; }
};

// The largest number's size, or whether there is something else.
template <class V>
Finite largest(const ScoreRows<V>& scores, double& most) {
  const V size = kernels<V>().largest(scores.values, scores.end(scores.rows - 1));
  if (!std::isnan(size)) {
    most = std::max(most, double(size));
    return Finite::yes;
  }
  std::vector<Infinities> each(scores.concepts);
  for (int64_t i = 0; i < scores.rows; ++i) {
    for (int64_t at = scores.begin(i); at < scores.end(i); ++at) each[scores.column(i, at)].add(scores.number(at));
  }
  Finite worst = Finite::yes;
  for (const Infinities& one : each) worst = std::max(worst, one.found());
  return worst;
}

// 2^power times numbers, however large the power.
struct Shift {
  double first, second;
  explicit Shift(int power) : first(std::ldexp(1.0, power / 2)), second(std::ldexp(1.0, power - power / 2)) {}

  // The largest sum of the sizes of a row.
  template <class V>
  double longest(const ScoreRows<V>& scores) const {
    double most = 0;
    for (int64_t i = 0; i < scores.rows; ++i) {
      const int64_t at = scores.begin(i);
      most = std::max(most, kernels<V>().length(scores.values + at, first, second, scores.end(i) - at));
    }
    return most;
  }
  template <class V>
  void integers(const V* x, int64_t n, Rank<V>* out) const {
    kernels<V>().integers(x, first, second, n, out);
  }
};

// What both sides' numbers are counted in, so that the largest row has room; or what they have instead of finite numbers.
template <class V>
struct Unit {
  double size = 0, instead = 0;
  bool finite = true;
  Shift shift{0};

  Unit(const ScoreRows<V>& P, const ScoreRows<V>& Q) {
    if (P.rows == 0) return;
    double most = 0;
    const Finite of_p = largest(P, most), of_q = largest(Q, most);
    finite = of_p == Finite::yes && of_q == Finite::yes;
    if (!finite) instead = of_both(of_p, of_q);
    if (!finite || most == 0) return;
    int power;
    std::frexp(most, &power);
    // a row's sum of sizes may take all bits but two, and a half for the rounding of each number
    const double room = std::ldexp(1 - 0x1p-20, sizeof(V) * 8 - 2) - double(std::max(P.concepts, Q.concepts));
    require(room > 0, "agreement_sums", "expected fewer concepts");
    const Shift relative(-power);
    const double length = std::max(relative.longest(P), relative.longest(Q));
    power -= int(std::floor(std::log2(room / length)));
    size = std::ldexp(1.0, power);
    shift = Shift(-power);
  }
  bool empty() const { return size == 0; }
};

template <class V>
Side<V> integers(const ScoreRows<V>& scores, const Shift& shift) {
  using I = Rank<V>;
  const int64_t N = scores.rows, K = scores.concepts, width = kWidth<V>;
  Side<V> side{N, K};
  side.base.resize(N);
  if (scores.sparse()) {
    const int64_t m = scores.offsets[N];
    side.columns.emplace(scores);
    side.row.assign(scores.offsets, scores.offsets + N + 1);
    side.concept_of.assign(scores.indices, scores.indices + m);
    side.number.resize(m);
    shift.integers(scores.values, m, side.number.data());
    for (int64_t i = 0; i < N; ++i) {
      for (int64_t at = scores.begin(i); at < scores.end(i); ++at) side.base[i] -= std::abs(side.number[at]);
    }
    return side;
  }
  const int64_t panels = (N + width - 1) / width;
  side.panels = Buffer<I>(panels * K * width);
  for_each(panels, [&](int64_t begin, int64_t end) {
    std::vector<I> row(K);
    for (int64_t p = begin; p < end; ++p) {
      I* panel = side.panels.get() + p * K * width;
      std::fill_n(panel, K * width, I(0));
      for (int64_t i = p * width; i < std::min(N, (p + 1) * width); ++i) {
        shift.integers(scores.values + i * K, K, row.data());
        for (int64_t q = 0; q < K; ++q) {
          panel[q * width + i - p * width] = row[q];
          side.base[i] += row[q];
        }
      }
    }
  });
  return side;
}

// Numbers as integers of the same order, in panels: what a gradient compares.
template <class V>
Buffer<Rank<V>> ordered(const ScoreRows<V>& scores) {
  using I = Rank<V>;
  const int64_t N = scores.rows, K = scores.concepts, width = kWidth<V>;
  Buffer<I> panels((N + width - 1) / width * K * width);
  std::fill_n(panels.get(), (N + width - 1) / width * K * width, I(0));
  for (int64_t i = 0; i < N; ++i) {
    for (int64_t q = 0; q < K; ++q) {
      const V value = scores.number(i * K + q) + V(0);  // -0 ties with 0
      I bits;
      std::memcpy(&bits, &value, sizeof(I));
      panels.get()[(i / width * K + q) * width + i % width] = bits < 0 ? I(std::numeric_limits<I>::min() - bits) : bits;
    }
  }
  return panels;
}

// Both sides as integers.
template <class V>
struct Pair {
  using I = Rank<V>;
  Side<V> p, q;
  std::vector<I> base;  // of P less that of Q

  Pair(const ScoreRows<V>& P, const ScoreRows<V>& Q, const Shift& shift)
      : p(integers(P, shift)), q(integers(Q, shift)), base(P.rows) {
    for (int64_t i = 0; i < P.rows; ++i) {
      using U = std::make_unsigned_t<I>;
      base[i] = I(U(p.base[i]) - U(q.base[i]));
    }
  }
};

// The rows of a matrix one after the other, filled up with zeros to whole vectors: their integers, and the numbers.
template <class V>
struct Lines {
  using I = Rank<V>;
  int64_t stride;
  Buffer<I> integers;
  Buffer<V> numbers;
  std::vector<I> base;

  Lines(const ScoreRows<V>& scores, const Shift& shift, bool ordered)
      : stride((scores.concepts + kLanes - 1) / kLanes * kLanes),
        integers(scores.rows * stride),
        numbers(ordered ? scores.rows * stride : 0),
        base(scores.rows) {
    const int64_t K = scores.concepts;
    for (int64_t i = 0; i < scores.rows; ++i) {
      I* row = integers.get() + i * stride;
      shift.integers(scores.values + i * K, K, row);
      std::fill(row + K, row + stride, I(0));
      for (int64_t q = 0; q < K; ++q) base[i] += row[q];
      if (!ordered) continue;
      std::copy_n(scores.values + i * K, K, numbers.get() + i * stride);
      std::fill_n(numbers.get() + i * stride + K, stride - K, V(0));
    }
  }

 private:
  static constexpr int64_t kLanes = 64 / sizeof(I);
};

// The rows of one panel against tiles of kTile rows, in ascending order.
template <class V>
class Strip {
 public:
  using I = Rank<V>;
  static constexpr int64_t kTile = kPanels * kWidth<V>;

  Strip(const Side<V>& p, const Side<V>& q, int64_t panel)
      : p_(p), q_(q), first_(panel * kWidth<V>), last_(std::min(p.rows, first_ + kWidth<V>)),
        tile_(std::min((p.rows + kWidth<V> - 1) / kWidth<V> * kWidth<V>, kTile)),
        store_((last_ - first_ + kScoreRows - 1) / kScoreRows * kScoreRows * tile_) {}

  int64_t first() const { return first_; }
  int64_t last() const { return last_; }
  int64_t tile() const { return tile_; }
  I* row(int64_t i) { return store_.get() + (i - first_) * tile_; }

  // c of the strip's rows and rows [begin, end), where begin starts a panel.
  void fill(int64_t begin, int64_t end) {
    std::fill_n(store_.get(), (last_ - first_ + kScoreRows - 1) / kScoreRows * kScoreRows * tile_, I(0));
    add(p_, cursor_p_, begin, end, false);
    add(q_, cursor_q_, begin, end, true);
  }

 private:
  void add(const Side<V>& side, std::vector<int64_t>& cursor, int64_t begin, int64_t end, bool subtract) {
    if (side.sparse()) return add_shared(side, cursor, begin, end, subtract);
    const int64_t width = kWidth<V>, K = side.concepts;
    for (int64_t q = 0; q < K; q += kTerms) {
      const int64_t terms = std::min(kTerms, K - q);
      const I* own = side.panel(first_ / width) + q * width;
      for (int64_t j = begin; j < end; j += width) {
        const I* panel = side.panel(j / width) + q * width;
        for (int64_t i = 0; i < last_ - first_; i += kScoreRows) {
          kernels<V>().larger(own + i, panel, terms, subtract, store_.get() + i * tile_ + j - begin, tile_);
        }
      }
    }
  }

  // A concept's rows are met once by each row that has it: `cursor` is how far.
  void add_shared(const Side<V>& side, std::vector<int64_t>& cursor, int64_t begin, int64_t end, bool subtract) {
    const ScoreColumns& columns = *side.columns;
    const int64_t from = side.row[first_];
    const auto place = [&](int64_t at) {
      const auto start = columns.rows.begin() + columns.offsets[side.concept_of[at]];
      const auto stop = columns.rows.begin() + columns.offsets[side.concept_of[at] + 1];
      return std::lower_bound(start, stop, begin) - columns.rows.begin();
    };
    if (cursor.empty()) {
      for (int64_t at = from; at < side.row[last_]; ++at) cursor.push_back(place(at));
    }
    for (int64_t i = first_; i < last_; ++i) {
      I* c = row(i) - begin;
      for (int64_t at = side.row[i]; at < side.row[i + 1]; ++at) {
        const I own = side.number[at], size = std::abs(own);
        const int64_t stop = columns.offsets[side.concept_of[at] + 1];
        int64_t& next = cursor[at - from];
        if (own == 0) continue;
        for (; next < stop && columns.rows[next] < end; ++next) {
          const I other = side.number[columns.places[next]];
          if ((own < 0) != (other < 0)) continue;
          const I least = std::min<I>(size, std::abs(other));
          c[columns.rows[next]] += subtract ? least : -least;
        }
      }
    }
  }

  const Side<V>&p_, &q_;
  const int64_t first_, last_, tile_;  // numbers of a row of what is stored: as many as all rows, or a tile
  Buffer<I> store_;
  std::vector<int64_t> cursor_p_, cursor_q_;
};

}  // namespace clipsteer
