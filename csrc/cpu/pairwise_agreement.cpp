// Over all pairs of rows: how differently two sets of concepts take them for alike. The numbers are made integers, of
// a unit that leaves room for the largest row, whose sums are exact: neither tiles nor threads nor the instruction set
// nor processes change a bit. A strip, the rows of one panel, meets tiles of panels; no pair is met twice, but for
// gradients, which each row gathers for itself.
#include "scaled.h"
#include "strips.h"

namespace clipsteer {
namespace {

constexpr int64_t kFewRows = 64;

double number(const WideSum& sum) { return double((unsigned __int128)(sum.low) + ((unsigned __int128)(sum.high) << 32)); }

// The sums of a row, to which every strip may add.
struct RowSums {
  std::vector<uint64_t> low, high;
  explicit RowSums(int64_t rows) : low(rows), high(rows) {}
  void add(int64_t i, uint64_t l, uint64_t h) {
    __atomic_fetch_add(&low[i], l, __ATOMIC_RELAXED);
    __atomic_fetch_add(&high[i], h, __ATOMIC_RELAXED);
  }
};

// f(strip) for the strips whose number is `part` modulo `parts`, long and short ones by turns.
template <class V, class F>
void strips(const Side<V>& p, const Side<V>& q, int64_t part, int64_t parts, F&& f) {
  const int64_t count = (p.rows + kWidth<V> - 1) / kWidth<V>, pairs = (count + 1) / 2;
  const int64_t tasks = part < pairs ? (pairs - part + parts - 1) / parts : 0;
  for_each(tasks, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t one = part + task * parts, other = count - 1 - one;
      Strip<V> strip(p, q, one);
      f(strip);
      if (other == one) continue;
      Strip<V> its_twin(p, q, other);
      f(its_twin);
    }
  });
}

// What the sums of no pairs are, or of pairs that are not finite; whether they are that.
template <class V>
bool no_sums(const Unit<V>& unit, int64_t N, double* total, double* rows) {
  *total = N > 1 ? unit.instead : 0;
  if (rows) std::fill_n(rows, 2 * N, *total);
  return N < 2 || !unit.finite || unit.empty();
}

template <class V>
void sums(const ScoreRows<V>& P, const ScoreRows<V>& Q, const int64_t* images, int64_t part, int64_t parts,
          double* total, double* rows) {
  using I = Rank<V>;
  const int64_t N = P.rows;
  const Unit<V> unit(P, Q);
  if (no_sums(unit, N, total, images ? rows : nullptr)) return;
  const Pair<V> pair(P, Q, unit.shift);
  RowSums all(images ? N : 0), own(images ? N : 0);
  WideSum sum;
  strips(pair.p, pair.q, part, parts, [&](Strip<V>& strip) {
    constexpr int64_t kTile = Strip<V>::kTile;
    std::vector<uint64_t> low(images ? kTile : 0), high(low);
    uint64_t strip_low = 0, strip_high = 0;
    for (int64_t j = strip.first(); j < N; j += kTile) {
      const int64_t end = std::min(N, j + kTile);
      strip.fill(j, end);
      std::fill(low.begin(), low.end(), 0);
      std::fill(high.begin(), high.end(), 0);
      for (int64_t i = strip.first(); i < strip.last(); ++i) {
        const int64_t from = std::max(j, i + 1);
        if (from >= end) continue;
        I* c = strip.row(i) + from - j;
        const WideSum found = kernels<V>().apart(c, pair.base.data() + from, pair.base[i], end - from);
        strip_low += found.low;
        strip_high += found.high;
        if (!images) continue;
        all.add(i, found.low, found.high);
        kernels<V>().add_columns(c, low.data() + from - j, high.data() + from - j, end - from);
        for (int64_t l = from; l < end; ++l) {
          if (images[l] != images[i]) continue;
          const uint64_t one = uint64_t(c[l - from]);
          own.add(i, uint32_t(one), one >> 32);
          own.add(l, uint32_t(one), one >> 32);
        }
      }
      for (int64_t l = j; images && l < end; ++l) all.add(l, low[l - j], high[l - j]);
    }
    // carried, so that the sum over strips has room
    __atomic_fetch_add(&sum.low, uint32_t(strip_low), __ATOMIC_RELAXED);
    __atomic_fetch_add(&sum.high, strip_high + (strip_low >> 32), __ATOMIC_RELAXED);
  });
  // d is half of what was summed
  *total = number(sum) * unit.size * 0.5;
  for (int64_t i = 0; images && i < N; ++i) {
    rows[i] = number({all.low[i], all.high[i]}) * unit.size * 0.5;
    rows[N + i] = number({own.low[i], own.high[i]}) * unit.size * 0.5;
  }
}

// Of one side the counts of its numbers: a matrix's by panels of keys, a sparse row's from what every row without the
// concept adds and from the rows with it.
template <class V>
class Counts {
 public:
  using I = Rank<V>;

  Counts(const ScoreRows<V>& scores, const Side<V>& side, V* out, I sign)
      : scores_(scores), side_(side), out_(out), sign_(sign), keys_(scores.sparse() ? Buffer<I>(0) : ordered(scores)) {}

  // Adds row i's signs s towards rows [begin, end), which start a panel and end in one whose rest is 0.
  void add(int64_t i, const I* s, int64_t begin, int64_t end, int64_t* count) const {
    const int64_t width = kWidth<V>, K = scores_.concepts;
    if (!scores_.sparse()) {
      const I* own = keys_.get() + i / width * K * width + i % width;
      const I* panel = keys_.get() + begin / width * K * width;
      kernels<V>().signed_order(s, own, panel, (end - begin + width - 1) / width, K, count);
      return;
    }
    int64_t all = 0;
    for (int64_t j = begin; j < end; ++j) all += s[j - begin];
    const ScoreColumns& columns = *side_.columns;
    for (int64_t at = scores_.begin(i); at < scores_.end(i); ++at) {
      const auto start = columns.rows.begin() + columns.offsets[scores_.indices[at]];
      const auto stop = columns.rows.begin() + columns.offsets[scores_.indices[at] + 1];
      const auto number = [&](auto row) { return scores_.number(columns.places[row - columns.rows.begin()]); };
      // a zero may stand beside what the row has of the concept
      const auto own = std::lower_bound(start, stop, i);
      const V one = own != stop && *own == i ? number(own) : V(0);
      const int64_t order = (one > 0) - (one < 0);
      int64_t found = order * all;
      for (auto row = std::lower_bound(start, stop, begin); row != stop && *row < end; ++row) {
        const V other = number(row);
        found += s[*row - begin] * (((one > other) - (one < other)) - order);
      }
      count[at - scores_.begin(i)] += found;
    }
  }
  int64_t size(int64_t i) const { return scores_.end(i) - scores_.begin(i); }
  void store(int64_t i, const int64_t* count) const {
    V* out = out_ + scores_.begin(i);
    for (int64_t n = 0; n < size(i); ++n) out[n] = V(sign_ * count[n]);
  }

 private:
  const ScoreRows<V>& scores_;
  const Side<V>& side_;
  V* out_;
  I sign_;
  Buffer<I> keys_;
};

template <class V>
void counts(const ScoreRows<V>& P, const ScoreRows<V>& Q, int64_t part, int64_t parts, V* dp, V* dq) {
  using I = Rank<V>;
  const int64_t N = P.rows;
  const Unit<V> unit(P, Q);
  if (N < 2 || !unit.finite || unit.empty()) return;
  const Pair<V> pair(P, Q, unit.shift);
  std::vector<Counts<V>> sides;
  if (dp) sides.emplace_back(P, pair.p, dp, I(1));
  if (dq) sides.emplace_back(Q, pair.q, dq, I(-1));
  strips(pair.p, pair.q, part, parts, [&](Strip<V>& strip) {
    constexpr int64_t kTile = Strip<V>::kTile;
    std::vector<std::vector<std::vector<int64_t>>> count;
    for (const Counts<V>& side : sides) {
      count.emplace_back();
      for (int64_t i = strip.first(); i < strip.last(); ++i) count.back().emplace_back(side.size(i));
    }
    for (int64_t j = 0; j < N; j += kTile) {
      const int64_t end = std::min(N, j + kTile);
      strip.fill(j, end);
      for (int64_t i = strip.first(); i < strip.last(); ++i) {
        I* s = strip.row(i);
        kernels<V>().signs(s, pair.base.data() + j, pair.base[i], end - j);
        std::fill(s + end - j, s + strip.tile(), I(0));
        for (size_t n = 0; n < sides.size(); ++n) sides[n].add(i, s, j, end, count[n][i - strip.first()].data());
      }
    }
    for (size_t n = 0; n < sides.size(); ++n) {
      for (int64_t i = strip.first(); i < strip.last(); ++i) sides[n].store(i, count[n][i - strip.first()].data());
    }
  });
}

// Both of few rows of matrices, each of which is set beside those that follow: no panel would be full.
template <class V>
void few_rows(const ScoreRows<V>& P, const ScoreRows<V>& Q, double* total, V* dp, V* dq) {
  using I = Rank<V>;
  const int64_t N = P.rows;
  const Unit<V> unit(P, Q);
  if (no_sums(unit, N, total, nullptr)) return;
  const Lines<V> p(P, unit.shift, dp), q(Q, unit.shift, dq);
  std::vector<I> base(N), c(N), sign(N), p_count(dp ? N * p.stride : 0), q_count(dq ? N * q.stride : 0);
  for (int64_t i = 0; i < N; ++i) base[i] = p.base[i] - q.base[i];
  WideSum sum;
  for (int64_t i = 0; i < N; ++i) {
    const int64_t rest = N - 1 - i;
    kernels<V>().larger_rows(p.integers.get() + i * p.stride, p.stride, q.integers.get() + i * q.stride, q.stride, rest,
                             c.data());
    std::copy_n(c.data(), rest, sign.data());
    const WideSum found = kernels<V>().apart(c.data(), base.data() + i + 1, base[i], rest);
    sum.low += found.low;
    sum.high += found.high;
    if (!dp && !dq) continue;
    kernels<V>().signs(sign.data(), base.data() + i + 1, base[i], rest);
    const auto add = [&](const Lines<V>& side, std::vector<I>& count) {
      kernels<V>().order_rows(side.numbers.get() + i * side.stride, side.stride, sign.data(), rest,
                              count.data() + i * side.stride);
    };
    if (dp) add(p, p_count);
    if (dq) add(q, q_count);
  }
  *total = number(sum) * unit.size * 0.5;
  const auto store = [&](int64_t K, const Lines<V>& side, const std::vector<I>& count, I factor, V* out) {
    for (int64_t i = 0; out && i < N; ++i) {
      for (int64_t l = 0; l < K; ++l) out[i * K + l] = V(factor * count[i * side.stride + l]);
    }
  };
  store(P.concepts, p, p_count, 1, dp);
  store(Q.concepts, q, q_count, -1, dq);
}

template <class F>
void with_sides(const char* op, const Tensor& P, const std::optional<Tensor>& p_indices,
                const std::optional<Tensor>& p_offsets, int64_t p_concepts, const Tensor& Q,
                const std::optional<Tensor>& q_indices, const std::optional<Tensor>& q_offsets, int64_t q_concepts,
                int64_t part, int64_t parts, F&& f) {
  require(Q.scalar_type() == P.scalar_type(), op, "expected P and Q of one dtype");
  require(0 <= part && part < parts, op, "expected 0 <= part < parts");
  dispatch(op, P.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using V = Compute<T>;
    const ScoreRows<T> p = score_rows<T>(op, "P", P, p_indices, p_offsets, p_concepts);
    const ScoreRows<T> q = score_rows<T>(op, "Q", Q, q_indices, q_offsets, q_concepts);
    require(p.rows == q.rows, op, "expected as many rows of P as of Q");
    const auto wide = [](const ScoreRows<T>& x, const Tensor& values, Buffer<V>& buffer) {
      const V* numbers = widened(x.values, buffer.get(), values.numel());
      return ScoreRows<V>{numbers, x.indices, x.offsets, x.rows, x.concepts};
    };
    Buffer<V> wide_p(kNarrow<T> ? P.numel() : 0), wide_q(kNarrow<T> ? Q.numel() : 0);
    f(wide(p, P, wide_p), wide(q, Q, wide_q));
  });
}

// Of each side's numbers the counts, all 0, in the dtype that is computed in; none where they are not needed.
Tensor no_counts(const Tensor& values, bool needed) {
  const bool wide = values.scalar_type() == ScalarType::Double;
  int64_t sizes[] = {needed ? values.size(0) : 0, values.dim() == 2 ? values.size(1) : 0};
  Tensor out = allocate(values, {sizes, size_t(values.dim())}, wide ? ScalarType::Double : ScalarType::Float);
  std::memset(out.data_ptr(), 0, out.numel() * (wide ? 8 : 4));
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor> agreement_sums(Tensor P, std::optional<Tensor> p_indices, std::optional<Tensor> p_offsets,
                                          int64_t p_concepts, Tensor Q, std::optional<Tensor> q_indices,
                                          std::optional<Tensor> q_offsets, int64_t q_concepts,
                                          std::optional<Tensor> images, int64_t part, int64_t parts) {
  const char* op = "agreement_sums";
  const int64_t N = p_offsets ? p_offsets->size(0) - 1 : P.size(0);
  if (images) check(op, "images", *images, ScalarType::Long, {N});
  const int64_t sizes[] = {2, images ? N : 0};
  Tensor total = allocate(P, {sizes, size_t(0)}, ScalarType::Double);
  Tensor rows = allocate(P, {sizes, 2}, ScalarType::Double);
  with_sides(op, P, p_indices, p_offsets, p_concepts, Q, q_indices, q_offsets, q_concepts, part, parts,
             [&](const auto& p, const auto& q) {
               sums(p, q, images ? data<int64_t>(*images) : nullptr, part, parts, data<double>(total),
                    data<double>(rows));
             });
  return {total, rows};
}

std::tuple<Tensor, Tensor> agreement_counts(Tensor P, std::optional<Tensor> p_indices, std::optional<Tensor> p_offsets,
                                            int64_t p_concepts, Tensor Q, std::optional<Tensor> q_indices,
                                            std::optional<Tensor> q_offsets, int64_t q_concepts, int64_t part,
                                            int64_t parts, bool need_p, bool need_q) {
  Tensor dp = no_counts(P, need_p), dq = no_counts(Q, need_q);
  with_sides("agreement_counts", P, p_indices, p_offsets, p_concepts, Q, q_indices, q_offsets, q_concepts, part, parts,
             [&]<class V>(const ScoreRows<V>& p, const ScoreRows<V>& q) {
               counts(p, q, part, parts, need_p ? data<V>(dp) : nullptr, need_q ? data<V>(dq) : nullptr);
             });
  return {dp, dq};
}

// The index of one process, and both sides' counts.
std::tuple<Tensor, Tensor, Tensor> rand_index(Tensor P, std::optional<Tensor> p_indices, std::optional<Tensor> p_offsets,
                                              int64_t p_concepts, Tensor Q, std::optional<Tensor> q_indices,
                                              std::optional<Tensor> q_offsets, int64_t q_concepts, bool need_p,
                                              bool need_q) {
  const bool wide = P.scalar_type() == ScalarType::Double;
  const int64_t none = 0;
  Tensor index = allocate(P, {&none, size_t(0)}, wide ? ScalarType::Double : ScalarType::Float);
  Tensor dp = no_counts(P, need_p), dq = no_counts(Q, need_q);
  with_sides("rand_index", P, p_indices, p_offsets, p_concepts, Q, q_indices, q_offsets, q_concepts, 0, 1,
             [&]<class V>(const ScoreRows<V>& p, const ScoreRows<V>& q) {
               double total = 0;
               V *of_p = need_p ? data<V>(dp) : nullptr, *of_q = need_q ? data<V>(dq) : nullptr;
               if (p.rows <= kFewRows && !p.sparse() && !q.sparse()) {
                 few_rows(p, q, &total, of_p, of_q);
               } else {
                 sums(p, q, nullptr, 0, 1, &total, nullptr);
                 if (need_p || need_q) counts(p, q, 0, 1, of_p, of_q);
               }
               *data<V>(index) = V(1 - 2 * total / double(std::max<int64_t>(p.rows * (p.rows - 1), 1)));
             });
  return {index, dp, dq};
}

// The gradients of values of this dtype, from the index's and counts of so many rows.
std::tuple<Tensor, Tensor> rand_index_grad(Tensor grad, Tensor p_counts, Tensor q_counts, Tensor values, int64_t rows) {
  const char* op = "rand_index_grad";
  const ScalarType dtype = values.scalar_type();
  const ScalarType wide = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check(op, "grad", grad, wide, {});
  Tensor out[2];
  const Tensor* counts[] = {&p_counts, &q_counts};
  for (int side = 0; side < 2; ++side) {
    const Tensor& count = *counts[side];
    const int64_t sizes[] = {count.dim() > 0 ? count.size(0) : 0, count.dim() > 1 ? count.size(1) : 0};
    require(count.scalar_type() == wide && count.is_contiguous() && count.is_cpu() && 1 <= count.dim() && count.dim() <= 2,
            op, "expected counts as rand_index gives them");
    out[side] = allocate(values, {sizes, size_t(count.dim())});
  }
  dispatch(op, dtype, [&](auto zero) {
    using T = decltype(zero);
    using V = Compute<T>;
    const V factor = -*data<V>(grad) / V(std::max<int64_t>(rows * (rows - 1), 1));
    for (int side = 0; side < 2; ++side) scaled<T>(*counts[side], factor, out[side]);
  });
  return {out[0], out[1]};
}

}  // namespace clipsteer
