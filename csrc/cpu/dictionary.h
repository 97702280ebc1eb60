// A dictionary as it lies in memory, either way, and the features of it that are looked at.
#pragma once

#include "gemm.h"

namespace clipsteer {

// What an encoder is given besides x: (x W^T + b) * scale of the features `columns`.
struct DictionaryOptions {
  const std::optional<Tensor>&bias, &scale, &columns;
};

// Whether w (n, d) lies as (d, n) in memory.
inline bool is_transposed(const Tensor& w) { return !w.is_contiguous(); }

template <class T>
class Dictionary {
 public:
  using V = Compute<T>;

  Dictionary(const Tensor& w, const DictionaryOptions& options)
      : d(w.size(1)),
        features(w.size(0)),
        n(options.columns ? options.columns->size(0) : features),
        columns(options.columns ? data<int64_t>(*options.columns) : nullptr),
        w_(data<T>(w)),
        transposed_(is_transposed(w)) {
    if (options.bias) bias = values(data<T>(*options.bias), bias_);
    if (options.scale) scale = values(data<T>(*options.scale), scale_);
  }

  Dictionary(const Dictionary&) = delete;

  const int64_t d, features;
  const int64_t n;               // how many features are looked at
  const int64_t* const columns;  // their numbers, or null: all of them
  const V* bias = nullptr;       // of those that are looked at, or null
  const V* scale = nullptr;

  bool transposed() const { return transposed_; }
  const T* row(int64_t i) const { return w_ + feature(i) * d; }
  int64_t feature(int64_t i) const { return columns ? columns[i] : i; }

  // One number a feature for those that are looked at, in `store` unless they lie so already.
  const V* values(const T* all, std::vector<V>& store) const {
    if constexpr (!kNarrow<T>) {
      if (!columns) return all;
    }
    store.resize(n);
    for (int64_t i = 0; i < n; ++i) store[i] = V(all[feature(i)]);
    return store.data();
  }

  bool needs_buffer() const { return kNarrow<T> || columns; }

  // The factor (d, count) of a product from the `first` feature on, in `buffer` unless it can be multiplied where it is.
  Tensor factor(int64_t first, int64_t count, V* buffer) const {
    if constexpr (!kNarrow<T>) {
      if (!columns && transposed_) return matrix(w_ + first, d, count, features, 1);
      if (!columns) return matrix(w_ + first * d, d, count, 1, d);
    }
    if (transposed_) {
      for (int64_t i = 0; i < d; ++i) copy_across(i, first, count, buffer + i * count);
      return matrix(buffer, d, count, count, 1);
    }
    for (int64_t c = 0; c < count; ++c) {
      if constexpr (kNarrow<T>) {
        if (!columns) {
          kernels<T>().widen(row(first), buffer, count * d);
          break;
        }
        kernels<T>().widen(row(first + c), buffer + c * d, d);
      } else {
        std::copy_n(row(first + c), d, buffer + c * d);
      }
    }
    return matrix(buffer, d, count, 1, d);
  }

  // Rows of d numbers of `count` features, in `buffer` (count, d) where they do not lie so.
  void rows(int64_t first, int64_t count, T* buffer, const T** row_of) const {
    for (int64_t c = 0; c < count; ++c) row_of[c] = transposed_ ? buffer + c * d : row(first + c);
    if (transposed_ && columns) {
      for (int64_t i = 0; i < d; ++i) {
        for (int64_t c = 0; c < count; ++c) buffer[c * d + i] = w_[i * features + feature(first + c)];
      }
    } else if (transposed_) {
      kernels<T>().turn(w_ + first, features, d, count, buffer, d);
    }
  }

  // Where `count` features lie, at most 64, unless they are scattered.
  ScreenAhead ahead(int64_t first, int64_t count) const {
    if (columns || count == 0) return {nullptr, 0, 0, 0};
    constexpr int64_t kBytes = sizeof(T);
    if (!transposed_) return {reinterpret_cast<const char*>(row(first)), 64, count * d * kBytes / 64, 0};
    // 64 numbers of a dimension lie in as many lines as a number has bytes
    return {reinterpret_cast<const char*>(w_ + first), features * kBytes, kBytes * d, int(std::log2(kBytes))};
  }

  // Whether rows of x can be multiplied with it where it lies: products().
  bool multiplies_rows() const { return kernels<T>().rows.dots && !(transposed_ && columns); }

  // out (count, number) = x (count, d) times features from the `first` on, which are not copied.
  void products(const V* x, int64_t count, int64_t first, int64_t number, V* out) const {
    if (transposed_) return kernels<T>().rows.spread(x, count, w_ + first, features, d, number, out, number);
    std::vector<const T*> feature(number);
    std::vector<const V*> left(count);
    for (int64_t c = 0; c < number; ++c) feature[c] = row(first + c);
    for (int64_t r = 0; r < count; ++r) left[r] = x + r * d;
    kernels<T>().rows.dots(left.data(), count, feature.data(), d, number, out, number);
  }

  // The mean size of each dimension over some of the features.
  void sizes(double* size) const {
    // neighbours share what is fetched from a dictionary that lies across
    const int64_t taken = std::min<int64_t>(n, 64), run = transposed_ ? std::min<int64_t>(taken, 16) : 1;
    std::fill_n(size, d, 0.0);
    for (int64_t s = 0; s < taken; s += run) {
      const int64_t first = std::min(n * s / taken, n - run);
      for (int64_t j = 0; j < d; ++j) {
        for (int64_t i = 0; i < run; ++i) {
          const int64_t at = feature(first + i);
          size[j] += std::abs(V(transposed_ ? w_[j * features + at] : w_[at * d + j])) / double(taken);
        }
      }
    }
  }

  // From places among the features that are looked at to the features' own numbers.
  void name(int64_t* indices, int64_t count) const {
    if (!columns) return;
    for (int64_t i = 0; i < count; ++i) indices[i] = columns[indices[i]];
  }

 private:
  // Dimension i of `count` features of a dictionary that lies across.
  void copy_across(int64_t i, int64_t first, int64_t count, V* out) const {
    const T* from = w_ + i * features;
    if constexpr (kNarrow<T>) {
      if (!columns) return kernels<T>().widen(from + first, out, count);
    }
    for (int64_t c = 0; c < count; ++c) out[c] = V(from[feature(first + c)]);
  }

  const T* const w_;
  const bool transposed_;
  std::vector<V> bias_, scale_;
};

// x (rows, d), W (n, d) either way in memory, and one number a feature.
inline void check_dictionary(const char* op, const Tensor& x, const Tensor& w, const DictionaryOptions& options) {
  check_dim(op, "x", x, 2);
  check_dim(op, "W_enc", w, 2);
  const ScalarType dtype = x.scalar_type();
  const int64_t d = x.size(1), n = w.size(0), most = std::numeric_limits<int32_t>::max();
  check(op, "x", x, dtype, {x.size(0), d});
  const bool across = is_transposed(w) && w.size(1) == d && w.stride(0) == 1 && w.stride(1) == n;
  // what lies across is checked as if it did not
  if (across) {
    require(w.scalar_type() == dtype && w.is_cpu(), op, "expected W_enc of x's dtype and on the CPU");
  } else {
    check(op, "W_enc", w, dtype, {n, d});
  }
  if (options.bias) check(op, "b_enc", *options.bias, dtype, {n});
  if (options.scale) check(op, "scale", *options.scale, dtype, {n});
  require(n < most && x.size(0) < most, op, "expected fewer than 2**31 rows and features");
  if (!options.columns) return;
  check_dim(op, "columns", *options.columns, 1);
  check(op, "columns", *options.columns, ScalarType::Long, {options.columns->size(0)});
  check_indices(op, data<int64_t>(*options.columns), options.columns->size(0), n);
}

}  // namespace clipsteer
