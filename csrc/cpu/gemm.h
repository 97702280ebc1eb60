// Matrix products on memory of ours: torch's GEMM, and our blocks along a packed panel.
#pragma once

#include "cpu.h"

namespace clipsteer {

// Memory on a 64-byte boundary: the sums of a GEMM may depend on the alignment of its operands.
template <class V>
class Buffer {
 public:
  explicit Buffer(int64_t n) : store_(n > 0 ? new char[n * sizeof(V) + 63] : nullptr) {}
  V* get() const { return reinterpret_cast<V*>((reinterpret_cast<uintptr_t>(store_.get()) + 63) & ~uintptr_t(63)); }

 private:
  std::unique_ptr<char[]> store_;
};

// How this processor multiplies pairs of these numbers at once, or null.
template <class T>
const PairProducts* pair_products() {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const PairProducts& pairs = isa();
    return pairs.block ? &pairs : nullptr;
  }
  return nullptr;
}

// A view without autograd history: worker threads carry none of the caller's dispatch state.
template <class V>
Tensor matrix(const V* data, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
  const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
  constexpr ScalarType dtype = std::is_same_v<V, double> ? ScalarType::Double : ScalarType::Float;
  return torch::stable::from_blob(const_cast<V*>(data), {sizes, 2}, {strides, 2},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype);
}

// out = a @ b
inline void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  StableIValue stack[] = {from(a), from(b), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack, TORCH_ABI_VERSION));
  to<Tensor>(stack[0]);
}

// c (rows, a block's width) = or += a (rows, k), whose numbers lie a_row and a_step apart, times a packed panel, by our
// blocks or by `block`, `terms` of its k rows at a time. `panel_row`: how far these are apart, if not a block's width.
template <class V>
void multiply_panel(const V* a, int64_t a_row, int64_t a_step, int64_t rows, const V* panel, int64_t k, int64_t terms,
                    V* c, int64_t c_row, bool add, Block<V> block = kernels<V>().block, int64_t panel_row = 0) {
  const int64_t width = panel_row ? panel_row : kernels<V>().block_columns;
  for (int64_t q = 0; q < k; q += terms) {
    for (int64_t i = 0; i < rows; i += kBlockRows) {
      const int count = int(std::min<int64_t>(kBlockRows, rows - i));
      const V* left[kBlockRows];
      V* target[kBlockRows];
      for (int l = 0; l < count; ++l) {
        left[l] = a + (i + l) * a_row + q * a_step;
        target[l] = c + (i + l) * c_row;
      }
      block(left, a_step, panel + q * width, width, std::min(terms, k - q), count,
                         target, add || q > 0);
    }
  }
}

// Runs f(begin, end) over the tasks, in a parallel region even when there is a single task: a GEMM that had the threads
// to itself could split its sums.
template <class F>
void for_each(int64_t tasks, F&& f) {
  torch::stable::parallel_for(0, std::max<int64_t>(tasks, 2), 1, [&](int64_t begin, int64_t end) {
    if (begin < std::min(end, tasks)) f(begin, std::min(end, tasks));
  });
}

}  // namespace clipsteer
