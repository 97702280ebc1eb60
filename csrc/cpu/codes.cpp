// threshold_encode, jumprelu_encode and batch_topk_encode: codes of as many features as each row has, found like top-k's,
// without a (B, n) buffer.
#include "screening.h"

#include <atomic>

namespace clipsteer {
namespace {

// A pre-activation of a row; the greater is larger or, at equal values, comes first.
template <class V>
struct Entry {
  V value;
  int32_t row, column;
  bool operator>(const Entry& other) const {
    if (value != other.value) return value > other.value;
    return row < other.row || (row == other.row && column < other.column);
  }
};

// What both searches keep: entries of all rows, and which rows had a NaN.
template <class V>
struct Found {
  std::vector<Entry<V>> entries;
  std::vector<char> nan;
  int64_t first = 0;

  explicit Found(int64_t rows) : nan(rows) {}
  void begin(int64_t from, int64_t) { first = from; }
  bool done(int64_t r) const { return nan[first + r]; }
  bool bounded(int64_t) const { return true; }
};

// All above a threshold: the only one, or a column's own.
template <class V>
struct Above : Found<V> {
  const V* threshold;
  bool single;

  Above(int64_t rows, const V* thresholds, bool one) : Found<V>(rows), threshold(thresholds), single(one) {}
  // A column's own threshold is taken off its pre-activation before.
  V bound(int64_t) const { return single ? threshold[0] : 0; }
  const V* bounds() const { return single ? nullptr : threshold; }
  void take(int64_t r, V value, int64_t column) {
    if (value > threshold[single ? 0 : column]) {
      this->entries.push_back({value, int32_t(this->first + r), int32_t(column)});
    }
    this->nan[this->first + r] |= value != value;
  }
};

// The `most` largest positive ones of all rows. Rows come in blocks and columns in panels, so one that equals the least
// of them may still come before it. Each of several searches says above what it has its share of as many: as many are above
// the least that is said.
template <class V>
struct Largest : Found<V> {
  using Said = std::vector<std::atomic<V>>;
  int64_t most, share, room = 0;
  Said& said;
  int64_t own;
  V limit = 0;  // what is wanted is larger

  Largest(int64_t rows, int64_t number, Said& all, int64_t place)
      : Found<V>(rows), most(number), share((number + int64_t(all.size()) - 1) / int64_t(all.size())), said(all),
        own(place) {
    make_room();
  }
  V bound(int64_t) const { return limit; }
  const V* bounds() const { return nullptr; }
  void take(int64_t r, V value, int64_t column) {
    this->nan[this->first + r] |= value != value;
    if (!(value > limit)) return;
    this->entries.push_back({value, int32_t(this->first + r), int32_t(column)});
    if (int64_t(this->entries.size()) >= room) cut();
  }
  void cut() {
    std::vector<Entry<V>>& all = this->entries;
    if (most == 0) return all.clear();
    if (int64_t(all.size()) > share) {
      said[own].store(below(share), std::memory_order_relaxed);
      V least = std::numeric_limits<V>::infinity();
      for (const std::atomic<V>& one : said) least = std::min(least, one.load(std::memory_order_relaxed));
      limit = std::max(limit, least);
      all.erase(std::remove_if(all.begin(), all.end(), [&](const Entry<V>& e) { return e.value <= limit; }), all.end());
    }
    if (int64_t(all.size()) > most) {
      limit = std::max(limit, below(most));
      all.resize(most);
    }
    make_room();
  }

 private:
  void make_room() { room = std::max(share, int64_t(this->entries.size())) + share + 1024; }
  // Just below the rank-th largest, which comes to its place; never below zero, nor a number that the processor may read as
  // zero.
  V below(int64_t rank) {
    std::vector<Entry<V>>& all = this->entries;
    std::nth_element(all.begin(), all.begin() + (rank - 1), all.end(), std::greater<>());
    const V lower = std::nextafter(all[rank - 1].value, V(0));
    return lower >= std::numeric_limits<V>::min() ? lower : V(0);
  }
};

// The same search over panels of a whole product by torch's GEMM.
template <class T, class Search>
void search_whole(const T* x, const Dictionary<T>& W, int64_t rows, std::vector<Search>& searches) {
  using V = Compute<T>;
  const Kernels<V>& kernel = kernels<V>();
  constexpr int64_t kRows = 256, kRoom = kPanelColumns + Candidates<V>::kSlack;
  const int64_t slots = int64_t(searches.size());
  std::unique_ptr<Key<V>[]> keys(new Key<V>[slots * kRoom]);
  const auto begin_slot = [&](int64_t s, int64_t r0, int64_t count) { searches[s].begin(r0, count); };
  const auto take_row = [&](int64_t s, int64_t r, const V* sums, OfColumns<V> own, int64_t first, int64_t columns) {
    Search& search = searches[s];
    if (search.done(r)) return;
    Candidates<V> found{keys.get() + s * kRoom, 0, kRoom, kRoom, search.bound(r), false};
    if (search.bounds()) own.bound = search.bounds() + first;
    kernel.filter(sums, own, columns, uint32_t(first), found);
    if (found.nan) search.take(r, std::numeric_limits<V>::quiet_NaN(), first);
    for (int64_t i = 0; i < found.count; ++i) search.take(r, found.keys[i].value(), found.keys[i].column());
  };
  for_each_panel(x, W, rows, slots, std::min(rows, kRows), begin_slot, take_row, [](int64_t, int64_t) {});
}

template <class V>
struct Codes {
  std::vector<Entry<V>> entries;  // by row, then by column
  std::vector<int64_t> offsets;   // (rows + 1)
};

// Entries of several slots in order. A row with a NaN has one code, of NaN.
template <class V>
Codes<V> in_order(std::vector<Entry<V>>& all, const std::vector<char>& nan, int64_t rows) {
  Codes<V> codes;
  codes.offsets.assign(rows + 1, 0);
  for (const Entry<V>& entry : all) codes.offsets[entry.row + 1] += !nan[entry.row];
  for (int64_t r = 0; r < rows; ++r) codes.offsets[r + 1] += codes.offsets[r] + (nan[r] ? 1 : 0);
  codes.entries.resize(codes.offsets[rows]);
  std::vector<int64_t> next(codes.offsets.begin(), codes.offsets.end() - 1);
  for (const Entry<V>& entry : all) {
    if (!nan[entry.row]) codes.entries[next[entry.row]++] = entry;
  }
  for (int64_t r = 0; r < rows; ++r) {
    const auto from = codes.entries.begin() + codes.offsets[r], to = codes.entries.begin() + codes.offsets[r + 1];
    if (nan[r]) *from = {std::numeric_limits<V>::quiet_NaN(), int32_t(r), 0};
    std::sort(from, to, [](const Entry<V>& a, const Entry<V>& b) { return a.column < b.column; });
  }
  return codes;
}

template <class V, class Search>
std::vector<char> gather(std::vector<Search>& searches, std::vector<Entry<V>>& all, int64_t rows) {
  std::vector<char> nan(rows);
  for (Search& found : searches) {
    all.insert(all.end(), found.entries.begin(), found.entries.end());
    for (int64_t r = 0; r < rows; ++r) nan[r] |= found.nan[r];
  }
  return nan;
}

template <class T, class Search>
void search(const T* x, const Dictionary<T>& W, const float* threshold, int64_t rows, const Team& team,
            int64_t expected, std::vector<Search>& searches) {
  if constexpr (!std::is_same_v<T, double>) {
    const Screen screen = best_screen(rows, W, expected);
    if (screen != Screen::none) {
      const auto finish = [](int64_t, int64_t, int64_t, const int64_t*) {};
      return search_screened(x, W, threshold, rows, team, expected, searches, screen, finish);
    }
  }
  search_whole(x, W, rows, searches);
}

template <class T>
void write(const Codes<Compute<T>>& codes, const Dictionary<T>& W, int64_t capacity, T* values, int64_t* indices,
           int64_t* offsets) {
  using V = Compute<T>;
  const int64_t count = std::min<int64_t>(capacity, codes.entries.size());
  std::vector<V> wide(kNarrow<T> ? count : 0);
  for (int64_t i = 0; i < count; ++i) {
    indices[i] = W.feature(codes.entries[i].column);
    if constexpr (kNarrow<T>) {
      wide[i] = codes.entries[i].value;
    } else {
      values[i] = codes.entries[i].value;
    }
  }
  if constexpr (kNarrow<T>) kernels<T>().narrow(wide.data(), values, count);
  std::fill_n(values + count, capacity - count, T(0));
  std::fill_n(indices + count, capacity - count, 0);
  std::copy(codes.offsets.begin(), codes.offsets.end(), offsets);
}

// One threshold, or one a feature.
void check_threshold(const char* op, const Tensor& threshold, const Tensor& x, int64_t features) {
  const int64_t number = threshold.numel();
  require(number == 1 || number == features, op,
          "expected one threshold or one a feature, got ", number);
  if (threshold.dim() == 0) {
    check(op, "threshold", threshold, x.scalar_type(), {});
  } else {
    check(op, "threshold", threshold, x.scalar_type(), {number});
  }
}

// What is above a limit, which change() makes of a threshold, in the rows' precision.
template <class T, class Change>
Codes<Compute<T>> codes_above(const Tensor& x, const Dictionary<T>& W, const Tensor& threshold, Change&& change) {
  using V = Compute<T>;
  const int64_t rows = x.size(0), number = threshold.numel();
  const bool single = number == 1 && W.features != 1;
  std::vector<T> changed(number);
  std::vector<V> store;
  for (int64_t i = 0; i < number; ++i) changed[i] = T(change(V(data<T>(threshold)[i])));
  const V one = single ? V(changed[0]) : V(0);
  const V* limits = single ? &one : W.values(changed.data(), store);
  const Team team(rows, W.n, kScreenRows);
  std::vector<Above<V>> searches;
  for (int64_t m = 0; m < team.searches(); ++m) searches.emplace_back(rows, limits, single);
  const float* own = nullptr;
  if constexpr (std::is_same_v<V, float>) own = single ? nullptr : limits;
  if (rows > 0 && W.n > 0) search(data<T>(x), W, own, rows, team, 0, searches);
  std::vector<Entry<V>> all;
  const std::vector<char> nan = gather<V>(searches, all, rows);
  return in_order<V>(all, nan, rows);
}

// How many codes there is room for.
int64_t room_for(const char* op, int64_t capacity, size_t found) {
  require(capacity >= -1, op, "expected capacity >= 0, or -1 for no limit, got ", capacity);
  return capacity < 0 ? int64_t(found) : capacity;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> threshold_codes(Tensor x, Tensor w_enc, std::optional<Tensor> b_enc, Tensor threshold,
                                                   bool relu, int64_t capacity, std::optional<Tensor> scale,
                                                   std::optional<Tensor> columns) {
  const char* op = "threshold_encode";
  const DictionaryOptions options{b_enc, scale, columns};
  check_dictionary(op, x, w_enc, options);
  check_threshold(op, threshold, x, w_enc.size(0));
  const int64_t more = x.size(0) + 1;
  Tensor offsets = allocate(x, {&more, 1}, ScalarType::Long);
  std::optional<Tensor> values, indices;
  dispatch(op, x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Dictionary<T> W(w_enc, options);
    const auto codes = codes_above(x, W, threshold, [relu](auto t) { return relu && t < 0 ? 0 : t; });
    const int64_t size = room_for(op, capacity, codes.entries.size());
    values = allocate(x, {&size, 1});
    indices = allocate(x, {&size, 1}, ScalarType::Long);
    write<T>(codes, W, size, data<T>(*values), data<int64_t>(*indices), data<int64_t>(offsets));
  });
  return {*values, *indices, offsets};
}

std::tuple<Tensor, Tensor, Tensor> threshold_encode(Tensor x, Tensor w_enc, std::optional<Tensor> b_enc,
                                                    Tensor threshold, int64_t capacity, std::optional<Tensor> scale,
                                                    std::optional<Tensor> columns) {
  return threshold_codes(x, w_enc, b_enc, threshold, false, capacity, scale, columns);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> jumprelu_codes(Tensor x, Tensor w_enc, std::optional<Tensor> b_enc,
                                                          Tensor threshold, double bandwidth, int64_t capacity) {
  const char* op = "jumprelu_encode";
  const std::optional<Tensor> none;
  const DictionaryOptions options{b_enc, none, none};
  check_dictionary(op, x, w_enc, options);
  check_threshold(op, threshold, x, w_enc.size(0));
  const int64_t more = x.size(0) + 1;
  Tensor offsets = allocate(x, {&more, 1}, ScalarType::Long);
  std::optional<Tensor> values, indices, active;
  dispatch(op, x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using V = Compute<T>;
    const Dictionary<T> W(w_enc, options);
    const V half = V(T(V(bandwidth / 2)));  // as torch has it beside a tensor of halves
    const auto codes = codes_above(x, W, threshold, [=](V t) { return t - half; });
    const int64_t size = room_for(op, capacity, codes.entries.size());
    values = allocate(x, {&size, 1});
    indices = allocate(x, {&size, 1}, ScalarType::Long);
    active = allocate(x, {&size, 1});
    T *value = data<T>(*values), *above = data<T>(*active);
    int64_t* index = data<int64_t>(*indices);
    write<T>(codes, W, size, value, index, data<int64_t>(offsets));
    const T* limit = data<T>(threshold);
    const int64_t step = threshold.numel() == 1 ? 0 : 1, count = std::min<int64_t>(size, codes.entries.size());
    for (int64_t i = 0; i < size; ++i) {
      // a NaN is no number below it
      const bool there = i < count && !(V(value[i]) <= V(limit[step * index[i]]));
      if (!there) value[i] = T(0);
      above[i] = T(there);
    }
  });
  return {*values, *indices, offsets, *active};
}

std::tuple<Tensor, Tensor, Tensor> batch_topk_encode(Tensor x, Tensor w_enc, std::optional<Tensor> b_enc, int64_t count,
                                                     std::optional<Tensor> scale, std::optional<Tensor> columns) {
  const char* op = "batch_topk_encode";
  const DictionaryOptions options{b_enc, scale, columns};
  check_dictionary(op, x, w_enc, options);
  const int64_t rows = x.size(0);
  require(count >= 0, op, "expected count >= 0, got ", count);
  const int64_t size = std::max(count, rows), more = rows + 1;
  Tensor values = allocate(x, {&size, 1});
  Tensor indices = allocate(x, {&size, 1}, ScalarType::Long);
  Tensor offsets = allocate(x, {&more, 1}, ScalarType::Long);
  dispatch(op, x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using V = Compute<T>;
    const Dictionary<T> W(w_enc, options);
    const int64_t each = rows ? (count + rows - 1) / rows : 0;
    std::vector<char> nan(rows);
    std::vector<Entry<V>> all;
    const Team team(rows, W.n, kScreenRows);
    for (bool again = count > 0 && rows > 0 && W.n > 0; again;) {
      typename Largest<V>::Said said(team.searches());
      std::vector<Largest<V>> searches;
      for (int64_t m = 0; m < team.searches(); ++m) {
        searches.emplace_back(rows, count, said, m);
        searches.back().nan = nan;
      }
      search(data<T>(x), W, nullptr, rows, team, each, searches);
      all.clear();
      const std::vector<char> seen = gather<V>(searches, all, rows);
      // a row with a NaN may have crowded others out before the NaN was met: once more without it
      again = seen != nan;
      nan = seen;
    }
    // the one code of a row with a NaN is among them
    typename Largest<V>::Said said(1);
    Largest<V> joint(0, std::max<int64_t>(count - std::count(nan.begin(), nan.end(), 1), 0), said, 0);
    joint.entries = std::move(all);
    joint.cut();
    write<T>(in_order<V>(joint.entries, nan, rows), W, size, data<T>(values), data<int64_t>(indices),
             data<int64_t>(offsets));
  });
  return {values, indices, offsets};
}

}  // namespace clipsteer
