// topk_encode by a cheaper product first.
#include "screening.h"

namespace clipsteer {
namespace {

// The k greatest keys of each row of a block, as heaps whose roots are the least of them.
struct Greatest {
  struct Row {
    int64_t count;
    bool nan;
  };
  int64_t k;
  std::unique_ptr<Key32[]> keys;
  std::vector<Row> state;

  Greatest(int64_t block, int64_t most) : k(most), keys(new Key32[block * most]), state(block) {}
  void begin(int64_t, int64_t count) { std::fill_n(state.begin(), count, Row{0, false}); }
  bool done(int64_t r) const { return state[r].nan; }
  bool bounded(int64_t r) const { return state[r].count == k; }
  float bound(int64_t r) const { return keys[r * k].value(); }
  void take(int64_t r, float value, int64_t column) {
    Row& row = state[r];
    Key32* heap = keys.get() + r * k;
    // columns ascend: one that equals the k-th value has lost its tie
    if (row.count == k && value <= heap[0].value()) return;
    row.nan |= value != value;
    if (row.count == k) std::pop_heap(heap, heap + row.count--, std::greater<>());
    heap[row.count++] = Key32::make(value, uint32_t(column));
    std::push_heap(heap, heap + row.count, std::greater<>());
  }
  bool nan(int64_t r) const { return state[r].nan; }
  void give(int64_t r, std::vector<Key32>& to) const {
    to.insert(to.end(), keys.get() + r * k, keys.get() + r * k + state[r].count);
  }
};

// The columns of each row of a block that may be among its k greatest, by lower and upper bounds.
struct Waiting {
  struct Entry {
    Key32 key;  // of the lower bound
    float upper;
    bool exact;
    bool operator>(const Entry& other) const { return key > other.key; }
  };
  struct Row {
    int64_t count;
    float bound;  // k values are at least this; NaN until so many are known
    bool nan;
  };
  int64_t k, room;
  std::unique_ptr<Entry[]> entries;
  std::vector<Row> state;

  static int64_t room_for(int64_t k) { return 2 * k + 64; }
  Waiting(int64_t block, int64_t most)
      : k(most), room(room_for(most)), entries(new Entry[block * room]), state(block) {}
  void begin(int64_t, int64_t count) {
    std::fill_n(state.begin(), count, Row{0, std::numeric_limits<float>::quiet_NaN(), false});
  }
  bool done(int64_t r) const { return state[r].nan; }
  bool bounded(int64_t) const { return true; }
  float bound(int64_t r) const { return state[r].bound; }
  bool nan(int64_t r) const { return state[r].nan; }
  void give(int64_t r, std::vector<Key32>& to) const {
    for (int64_t i = 0; i < state[r].count; ++i) to.push_back(entries[r * room + i].key);
  }

  bool note(int64_t r, float lower, float upper, int64_t column) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    if (lower != lower) lower = -kInfinity;
    if (upper != upper) upper = kInfinity;
    return add(r, lower, upper, column, false);
  }
  bool take(int64_t r, float value, int64_t column) {
    state[r].nan |= value != value;
    return !state[r].nan && add(r, value, value, column, true);
  }
  template <class Sums>
  void settle(int64_t r, Sums&& sums) {
    Row& row = state[r];
    Entry* own = entries.get() + r * room;
    if (row.nan) return;
    if (row.count > k) tighten(r);
    std::vector<int32_t> which;
    for (int64_t i = 0; i < row.count; ++i) {
      if (!own[i].exact) which.push_back(int32_t(own[i].key.column()));
    }
    std::vector<float> value(which.size());
    if (!which.empty()) sums(which.data(), int64_t(which.size()), value.data());
    for (int64_t i = 0, at = 0; i < row.count; ++i) {
      if (own[i].exact) continue;
      row.nan |= value[at] != value[at];
      own[i] = {Key32::make(value[at], uint32_t(which[at])), value[at], true};
      ++at;
    }
    if (row.count >= k) {
      std::nth_element(own, own + (k - 1), own + row.count, std::greater<>());
      row.count = k;
      row.bound = own[k - 1].key.value();
    }
  }

 private:
  // Columns ascend: one that is at most the bound loses to k that came before it.
  bool add(int64_t r, float lower, float upper, int64_t column, bool exact) {
    Row& row = state[r];
    if (upper <= row.bound) return false;
    entries[r * room + row.count++] = {Key32::make(lower, uint32_t(column)), upper, exact};
    if (row.count < room) return false;
    tighten(r);
    return row.count > k + 32;
  }
  void tighten(int64_t r) {
    Row& row = state[r];
    Entry* own = entries.get() + r * room;
    std::nth_element(own, own + (k - 1), own + row.count, std::greater<>());
    const float bound = own[k - 1].key.value();
    row.bound = bound;
    // one that equals it may have come before it
    row.count = std::remove_if(own, own + row.count, [=](const Entry& e) { return e.upper < bound; }) - own;
  }
};

template <class Search>
std::vector<Search> searches_of(const Team& team, int64_t k) {
  std::vector<Search> searches;
  for (int64_t m = 0; m < team.searches(); ++m) searches.emplace_back(team.each, k);
  return searches;
}

}  // namespace

template <class T>
void screened(const T* x, const Dictionary<T>& W, int64_t rows, int64_t k, bool relu, Screen screen, T* acts,
              int64_t* indices, int64_t* computed) {
  const int64_t row_bytes = Waiting::room_for(k) * int64_t(sizeof(Waiting::Entry));  // the larger of both
  const int64_t room = kScratchBytes / (torch::stable::get_num_threads() * row_bytes);
  const Team team(rows, W.n, std::clamp<int64_t>(room, Team::kLeastRows, kScreenRows));
  const auto searched_by = [&](auto searches) {
    const auto finish = [&](int64_t r0, int64_t begin, int64_t end, const int64_t* work) {
      std::vector<Key32> merged;
      std::vector<float> wide(k);
      for (int64_t r = begin; r < end; ++r) {
        const auto* found = &searches[r / team.each * team.slots];
        const int64_t own = r % team.each;
        bool nan = false;
        merged.clear();
        for (int64_t s = 0; s < team.slots; ++s) {
          found[s].give(own, merged);
          nan |= found[s].nan(own);
        }
        if (computed) computed[r0 + r] = work[r];
        select<T, float>(merged.data(), merged.size(), k, nan, relu, wide.data(), acts + (r0 + r) * k,
                         indices + (r0 + r) * k);
      }
    };
    search_screened(x, W, nullptr, rows, team, k, searches, screen, finish);
  };
  if constexpr (std::is_same_v<T, BFloat16>) {
    // features that lie across are at hand but once
    if (screen == Screen::pairs && !W.transposed()) return searched_by(searches_of<Waiting>(team, k));
  }
  searched_by(searches_of<Greatest>(team, k));
}

template void screened(const float*, const Dictionary<float>&, int64_t, int64_t, bool, Screen, float*, int64_t*,
                       int64_t*);
template void screened(const BFloat16*, const Dictionary<BFloat16>&, int64_t, int64_t, bool, Screen, BFloat16*, int64_t*,
                       int64_t*);
template void screened(const Half*, const Dictionary<Half>&, int64_t, int64_t, bool, Screen, Half*, int64_t*, int64_t*);

}  // namespace clipsteer
