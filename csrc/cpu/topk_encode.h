// What the two ways of encoding share.
#pragma once

#include "gemm.h"

namespace clipsteer {

constexpr int64_t kScreenMaxDim = 8192;
constexpr int64_t kScratchBytes = int64_t(40) << 20;

constexpr int64_t kPanelColumns = 512;

// Panels of x W^T by torch's GEMM, for each block of rows: begin(s, first row, count), then row(s, r, values, bias, first
// column, columns) for every row of every panel of slot s, while the panel is in cache, and end(first row, count). A slot
// takes a run of panels, so one thread makes each GEMM, whatever the thread count.
template <class T, class Begin, class Row, class End>
void for_each_panel(const T* x, const T* w, const T* b, int64_t rows, int64_t n, int64_t d, int64_t slots, int64_t block,
                    Begin&& begin_slot, Row&& take_row, End&& end_block) {
  using V = Compute<T>;
  const int64_t panels = (n + kPanelColumns - 1) / kPanelColumns;
  std::unique_ptr<V[]> panel(new V[slots * block * kPanelColumns]);
  std::unique_ptr<V[]> wide_w(kNarrow<T> ? new V[slots * kPanelColumns * d] : nullptr);
  std::unique_ptr<V[]> wide_x(kNarrow<T> ? new V[block * d] : nullptr);
  std::unique_ptr<V[]> wide_b(kNarrow<T> && b ? new V[n] : nullptr);
  const V* bias = b ? widened(b, wide_b.get(), n) : nullptr;
  for (int64_t r0 = 0; r0 < rows; r0 += block) {
    const int64_t count = std::min(block, rows - r0);
    const Tensor input = matrix(widened(x + r0 * d, wide_x.get(), count * d), count, d, d, 1);
    torch::stable::parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        V* out = panel.get() + s * block * kPanelColumns;
        begin_slot(s, r0, count);
        for (int64_t p = panels * s / slots; p < panels * (s + 1) / slots; ++p) {
          const int64_t first = p * kPanelColumns, columns = std::min(kPanelColumns, n - first);
          if (d > 0) {
            const V* weights =
                widened(w + first * d, wide_w.get() + (kNarrow<T> ? s * kPanelColumns * d : 0), columns * d);
            multiply(input, matrix(weights, d, columns, 1, d), matrix(out, count, columns, columns, 1));
          } else {
            std::fill_n(out, count * columns, V(0));
          }
          for (int64_t r = 0; r < count; ++r) {
            take_row(s, r, out + r * columns, bias ? bias + first : nullptr, first, columns);
          }
        }
      }
    });
    end_block(r0, count);
  }
}

// Where screening pays: enough rows for the price of making bytes of W, few winners among many columns.
inline bool worth_screening(int64_t rows, int64_t n, int64_t d, int64_t k) {
  return isa().screen && rows >= 48 && n >= 4096 && d >= 128 && d <= kScreenMaxDim && k <= n / 128;
}

// Encodes with int8 screening (topk_screen.cpp). `computed`, if any, gets how many columns of each row were computed in
// float32.
void screened(const float* x, const float* w, const float* b, int64_t rows, int64_t n, int64_t d, int64_t k,
              float* acts, int64_t* indices, int64_t* computed);

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
