// What the two ways of encoding share.
#pragma once

#include "gemm.h"

namespace clipsteer {

constexpr int64_t kScreenMaxDim = 8192;
constexpr int64_t kScratchBytes = int64_t(40) << 20;

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
