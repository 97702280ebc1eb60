// Numbers times a factor, rounded once.
#pragma once

#include "gemm.h"

namespace clipsteer {

// out = factor x
template <class T>
void scaled(const Tensor& x, Compute<T> factor, Tensor& out) {
  using V = Compute<T>;
  constexpr int64_t kPart = 4096;
  const int64_t n = x.numel();
  for_each((n + kPart - 1) / kPart, [&](int64_t begin, int64_t end) {
    V wide[kNarrow<T> ? kPart : 1];
    for (int64_t p = begin; p < end; ++p) {
      const V* from = data<V>(x) + p * kPart;
      T* to = data<T>(out) + p * kPart;
      const int64_t count = std::min(kPart, n - p * kPart);
      if constexpr (kNarrow<T>) {
        for (int64_t i = 0; i < count; ++i) wide[i] = factor * from[i];
        kernels<T>().narrow(wide, to, count);
      } else {
        for (int64_t i = 0; i < count; ++i) to[i] = factor * from[i];
      }
    }
  });
}

}  // namespace clipsteer
