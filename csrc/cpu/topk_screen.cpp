// topk_encode in int8 first.
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
};

}  // namespace

template <class T>
void screened(const T* x, const Dictionary<T>& W, int64_t rows, int64_t k, bool relu, T* acts, int64_t* indices,
              int64_t* computed) {
  const int64_t slots = std::min<int64_t>(torch::stable::get_num_threads(), (W.n + 63) / 64);
  const int64_t room = kScratchBytes / (slots * k * int64_t(sizeof(Key32)));
  const int64_t block = std::min({rows, kScreenRows, std::max<int64_t>(room, 64)});
  std::vector<Greatest> searches;
  for (int64_t s = 0; s < slots; ++s) searches.emplace_back(block, k);
  std::vector<Key32> merged;
  std::vector<float> wide(k);
  search_screened(x, W, nullptr, rows, block, k, searches, [&](int64_t r0, int64_t count, const int64_t* work) {
    for (int64_t r = 0; r < count; ++r) {
      bool nan = false;
      merged.clear();
      for (const Greatest& found : searches) {
        const Key32* keys = found.keys.get() + r * k;
        merged.insert(merged.end(), keys, keys + found.state[r].count);
        nan |= found.state[r].nan;
      }
      if (computed) computed[r0 + r] = work[r];
      select<T, float>(merged.data(), merged.size(), k, nan, relu, wide.data(), acts + (r0 + r) * k,
                       indices + (r0 + r) * k);
    }
  });
}

template void screened(const float*, const Dictionary<float>&, int64_t, int64_t, bool, float*, int64_t*, int64_t*);
template void screened(const BFloat16*, const Dictionary<BFloat16>&, int64_t, int64_t, bool, BFloat16*, int64_t*,
                       int64_t*);
template void screened(const Half*, const Dictionary<Half>&, int64_t, int64_t, bool, Half*, int64_t*, int64_t*);

}  // namespace clipsteer
