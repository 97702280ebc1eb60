// topk_encode: panels of pre-activations by torch's GEMM, each filtered while it is in cache; no (B, n) buffer. Large
// products, but for float64, are screened in int8 first (topk_screen.cpp).
#include "topk_encode.h"

namespace clipsteer {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kMaxBlockRows = 256;

template <class T>
void encode(const T* x, const Dictionary<T>& W, int64_t rows, int64_t k, bool relu, T* acts, int64_t* indices) {
  using V = Compute<T>;
  const int64_t n = W.n;
  const Kernels<V>& kernel = kernels<V>();
  const int64_t panels = (n + kPanelColumns - 1) / kPanelColumns;
  const int64_t slots = std::min<int64_t>(torch::stable::get_num_threads(), panels);
  const int64_t slot_columns = std::min(n, (panels + slots - 1) / slots * kPanelColumns);
  const int64_t limit = Candidates<V>::limit_for(k, slot_columns);
  const int64_t capacity = limit + Candidates<V>::kSlack;
  const int64_t row_bytes = slots * (kPanelColumns * sizeof(V) + capacity * sizeof(Key<V>));
  const int64_t block = std::min({rows, kMaxBlockRows, std::max<int64_t>(kScratchBytes / row_bytes, 16)});

  std::unique_ptr<Key<V>[]> keys(new Key<V>[slots * block * capacity]);
  std::vector<Candidates<V>> state(slots * block);
  const auto begin_slot = [&](int64_t s, int64_t, int64_t count) {
    for (int64_t r = s * block; r < s * block + count; ++r) state[r].reset(keys.get() + r * capacity, limit, k);
  };
  const auto take_row = [&](int64_t s, int64_t r, const V* sums, OfColumns<V> own, int64_t first, int64_t columns) {
    Candidates<V>& row = state[s * block + r];
    if (!row.nan) kernel.filter(sums, own, columns, uint32_t(first), row);
  };
  for_each_panel(x, W, rows, slots, block, begin_slot, take_row, [&](int64_t r0, int64_t count) {
    parallel_for(0, count, 32, [&](int64_t begin, int64_t end) {
      std::vector<Key<V>> merged;
      std::vector<V> buffer(k);
      for (int64_t r = begin; r < end; ++r) {
        merged.clear();
        bool nan = false;
        for (int64_t s = 0; s < slots; ++s) {
          const Candidates<V>& found = state[s * block + r];
          merged.insert(merged.end(), found.keys, found.keys + found.count);
          nan |= found.nan;
        }
        select<T, V>(merged.data(), merged.size(), k, nan, relu, buffer.data(), acts + (r0 + r) * k,
                     indices + (r0 + r) * k);
      }
    });
  });
}

template <class T>
void select_rows(const T* pre, int64_t rows, int64_t n, int64_t k, T* values, int64_t* indices) {
  using V = Compute<T>;
  const int64_t limit = Candidates<V>::limit_for(k, n);
  parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    std::unique_ptr<Key<V>[]> keys(new Key<V>[limit + Candidates<V>::kSlack]);
    std::vector<Rank<V>> rank(n);
    std::vector<V> wide(kNarrow<T> ? n : 0), buffer(k);
    for (int64_t r = begin; r < end; ++r) {
      const V* row = widened(pre + r * n, wide.data(), n);
      Candidates<V> found;
      found.reset(keys.get(), limit, k);
      found.start_from(kernels<V>().seed(row, n, k, rank.data()));
      kernels<V>().filter(row, {}, n, 0, found);
      select<T, V>(found.keys, found.count, k, found.nan, false, buffer.data(), values + r * k, indices + r * k);
    }
  });
}

std::tuple<Tensor, Tensor> outputs(const Tensor& like, int64_t rows, int64_t k) {
  const int64_t sizes[] = {rows, k};
  return {allocate(like, {sizes, 2}), allocate(like, {sizes, 2}, ScalarType::Long)};
}

void check_k(const char* op, int64_t k, int64_t n) {
  require(0 <= k && k <= n, op, "expected 0 <= k <= ", n, ", got ", k);
  require(n <= std::numeric_limits<int32_t>::max(), op,
          "expected fewer than 2**31 features, got ", n);
}

}  // namespace

std::tuple<Tensor, Tensor> topk_encode(Tensor x, Tensor w_enc, std::optional<Tensor> b_enc, int64_t k, bool screen,
                                       std::optional<Tensor> scale, std::optional<Tensor> columns, bool relu) {
  const char* op = "topk_encode";
  const DictionaryOptions options{b_enc, scale, columns};
  check_dictionary(op, x, w_enc, options);
  const int64_t rows = x.size(0);
  check_k(op, k, columns ? columns->size(0) : w_enc.size(0));
  const auto made = outputs(x, rows, k);
  const Tensor &acts = std::get<0>(made), &indices = std::get<1>(made);
  if (rows == 0 || k == 0) return {acts, indices};
  dispatch(op, x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Dictionary<T> W(w_enc, options);
    int64_t* found = data<int64_t>(indices);
    const Screen best = screen ? best_screen(rows, W, k) : Screen::none;
    if constexpr (!std::is_same_v<T, double>) {
      if (best != Screen::none) screened<T>(data<T>(x), W, rows, k, relu, best, data<T>(acts), found, nullptr);
    }
    if (best == Screen::none) encode<T>(data<T>(x), W, rows, k, relu, data<T>(acts), found);
    W.name(found, rows * k);
  });
  return {acts, indices};
}

// For tests and measurements: screened at any size, by bytes or by pairs, and how many columns of each row were computed in float32.
std::tuple<Tensor, Tensor, Tensor> topk_encode_screened(Tensor x, Tensor w_enc, std::optional<Tensor> b_enc, int64_t k,
                                                        std::optional<Tensor> scale, std::optional<Tensor> columns,
                                                        bool relu, bool pairs) {
  const char* op = "topk_encode_screened";
  const DictionaryOptions options{b_enc, scale, columns};
  check_dictionary(op, x, w_enc, options);
  const int64_t rows = x.size(0), d = x.size(1);
  require(x.scalar_type() != ScalarType::Double, op, "expected x of dtype Float, BFloat16 or Half");
  check_k(op, k, columns ? columns->size(0) : w_enc.size(0));
  require(isa().screen, op,
          "this processor (or CLIPSTEER_CPU_ISA) has no AVX512-VNNI; topk_encode always runs");
  const PairScreening& by_pairs = isa();
  require(!pairs || (by_pairs.sift && x.scalar_type() == ScalarType::BFloat16), op,
          "pairs=True needs bfloat16 and a processor (and a CLIPSTEER_CPU_ISA) with AVX512-BF16");
  require(k > 0, op, "expected k > 0");
  require(0 < d && d <= kScreenMaxDim, op, "expected 0 < d_in <= 8192, got ", d);
  const auto made = outputs(x, rows, k);
  const Tensor &acts = std::get<0>(made), &indices = std::get<1>(made);
  Tensor computed = allocate(x, {&rows, 1}, ScalarType::Long);
  dispatch(op, x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Dictionary<T> W(w_enc, options);
    int64_t* found = data<int64_t>(indices);
    if constexpr (!std::is_same_v<T, double>) {
      const Screen by = pairs ? Screen::pairs : Screen::bytes;
      if (rows) screened<T>(data<T>(x), W, rows, k, relu, by, data<T>(acts), found, data<int64_t>(computed));
    }
    W.name(found, rows * k);
  });
  return {acts, indices, computed};
}

std::tuple<Tensor, Tensor> topk(Tensor pre, int64_t k) {
  const char* op = "topk";
  check_dim(op, "pre", pre, 2);
  const int64_t rows = pre.size(0), n = pre.size(1);
  check(op, "pre", pre, pre.scalar_type(), {rows, n});
  check_k(op, k, n);
  const auto made = outputs(pre, rows, k);
  const Tensor &values = std::get<0>(made), &indices = std::get<1>(made);
  if (rows == 0 || k == 0) return {values, indices};
  dispatch(op, pre.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    select_rows<T>(data<T>(pre), rows, n, k, data<T>(values), data<int64_t>(indices));
  });
  return {values, indices};
}

}  // namespace clipsteer
