// What the two ways of encoding share.
#pragma once

#include "dictionary.h"

namespace clipsteer {

constexpr int64_t kScratchBytes = int64_t(40) << 20;

constexpr int64_t kPanelColumns = 512;

// Of so few rows, reading W takes as long as multiplying it: a product that reads each number once, where it lies. Decided
// by all rows, so that the bits of a row do not depend on the blocks they are in. AVX2 has the registers for one at a time.
inline int64_t few_rows() { return isa().level >= 2 ? 12 : 4; }

// Panels of (x W^T + b) * scale by torch's GEMM or, of few rows, by our own products, for each block of rows:
// begin(s, first row, count), then row(s, r, sums, own, first column, columns) for every row of every panel of slot s,
// while the panel is in cache: sums of products, of which own.bias and own.scale make the pre-activations; and
// end(first row, count). A slot takes a run of panels, so one thread makes each GEMM, whatever the thread count.
template <class T, class Begin, class Row, class End>
void for_each_panel(const T* x, const Dictionary<T>& W, int64_t rows, int64_t slots, int64_t block, Begin&& begin_slot,
                    Row&& take_row, End&& end_block) {
  using V = Compute<T>;
  const int64_t d = W.d, n = W.n, panels = (n + kPanelColumns - 1) / kPanelColumns;
  std::unique_ptr<V[]> panel(new V[slots * block * kPanelColumns]);
  const bool few = rows <= few_rows() && W.multiplies_rows();
  std::unique_ptr<V[]> weights(!few && W.needs_buffer() ? new V[slots * kPanelColumns * d] : nullptr);
  Buffer<V> wide_x(kNarrow<T> ? block * d : 0);
  for (int64_t r0 = 0; r0 < rows; r0 += block) {
    const int64_t count = std::min(block, rows - r0);
    const V* left = widened(x + r0 * d, wide_x.get(), count * d);
    const Tensor input = matrix(left, count, d, d, 1);
    torch::stable::parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        V* out = panel.get() + s * block * kPanelColumns;
        begin_slot(s, r0, count);
        for (int64_t p = panels * s / slots; p < panels * (s + 1) / slots; ++p) {
          const int64_t first = p * kPanelColumns, columns = std::min(kPanelColumns, n - first);
          const OfColumns<V> own = OfColumns<V>{W.bias, W.scale}.from(first);
          if (few) {
            W.products(left, count, first, columns, out);
          } else if (d > 0) {
            V* buffer = weights.get() + (W.needs_buffer() ? s * kPanelColumns * d : 0);
            multiply(input, W.factor(first, columns, buffer), matrix(out, count, columns, columns, 1));
          } else {
            std::fill_n(out, count * columns, V(0));
          }
          for (int64_t r = 0; r < count; ++r) take_row(s, r, out + r * columns, own, first, columns);
        }
      }
    });
    end_block(r0, count);
  }
}

// How a product is searched before it is computed (sieves.h).
enum class Screen { none, bytes, pairs };

// Where that pays: not of so few rows that reading W takes as long as multiplying it; few winners among many columns. By
// pairs as many rows can be multiplied in the time that bytes of W take to make, and more where bytes rule less out; on AMX
// tiles any number of rows.
template <class T>
Screen best_screen(int64_t rows, const Dictionary<T>& W, int64_t k) {
  if (std::is_same_v<T, double> || W.d < 128 || W.d > kScreenMaxDim) return Screen::none;
  const bool bytes = isa().screen && rows > few_rows() && W.n >= 4096 && k <= W.n / 128;
  if constexpr (std::is_same_v<T, BFloat16>) {
    const PairScreening& pairs = isa();
    const int64_t least = W.transposed() ? few_rows() + 1 : 4, most = W.n < 16384 ? 80 : 40;
    const bool pays = rows >= least && W.n >= 1024 && k <= W.n / 32;
    if (pairs.sift && pays && (rows <= most || !bytes || pairs.sift_tiles)) return Screen::pairs;
  }
  return bytes ? Screen::bytes : Screen::none;
}

// Encodes with screening (topk_screen.cpp). `computed`, if any, gets how many columns of each row were computed in
// float32.
template <class T>
void screened(const T* x, const Dictionary<T>& W, int64_t rows, int64_t k, bool relu, Screen screen, T* acts,
              int64_t* indices, int64_t* computed);

// Writes the k greatest of `count` keys in order; a row with a NaN has NaN values and the first k indices.
template <class T, class V>
inline void select(Key<V>* keys, int64_t count, int64_t k, bool nan, bool relu, V* buffer, T* values, int64_t* indices) {
  if (nan) {
    for (int64_t j = 0; j < k; ++j) {
      values[j] = T(std::numeric_limits<V>::quiet_NaN());
      indices[j] = j;
    }
    return;
  }
  if (count > k) std::nth_element(keys, keys + k, keys + count, std::greater<>());
  std::sort(keys, keys + k, std::greater<>());
  for (int64_t j = 0; j < k; ++j) {
    const V value = keys[j].value();
    buffer[j] = relu && !(value > 0) ? V(0) : value;
    indices[j] = keys[j].column();
  }
  if constexpr (kNarrow<T>) {
    kernels<T>().narrow(buffer, values, k);
  } else {
    std::copy_n(buffer, k, values);
  }
}

}  // namespace clipsteer
