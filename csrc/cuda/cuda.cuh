// What the CUDA sources share: the ops, the stream, typed access, and calls back into torch. LibTorch stable ABI only.
#pragma once

#include "../stable.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

namespace clipsteer::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

std::tuple<Tensor, Tensor> topk_encode(Tensor x, Tensor w_enc, std::optional<Tensor> b_enc, int64_t k);
Tensor sparse_decode(Tensor acts, Tensor indices, Tensor w, std::optional<Tensor> b);
Tensor gather_dot(Tensor rows, Tensor indices, Tensor w);
std::tuple<Tensor, Tensor> sparse_outer(Tensor coeff, Tensor indices, Tensor rows, int64_t n);
void sparse_outer_out(Tensor coeff, Tensor indices, Tensor rows, Tensor dw, Tensor db);

inline cudaStream_t stream_of(const Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline Tensor empty_like(const Tensor& t, ScalarType dtype, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(t, {sizes.begin(), sizes.size()}, dtype);
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// Calls body(T()) with the C++ type of dtype.
template <class Body>
void dispatch(const char* op, ScalarType dtype, Body body) {
  if (dtype == ScalarType::Float) return body(float());
  if (dtype == ScalarType::Half) return body(__half());
  if (dtype == ScalarType::BFloat16) return body(__nv_bfloat16());
  throw std::invalid_argument(std::string(op) + ": the CUDA backend takes float32, float16 and bfloat16");
}

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ void narrow(float v, float& out) { out = v; }
__device__ __forceinline__ void narrow(float v, __half& out) { out = __float2half_rn(v); }
__device__ __forceinline__ void narrow(float v, __nv_bfloat16& out) { out = __float2bfloat16_rn(v); }

// N neighbours in one access.
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T item[N];
};

template <class T>
constexpr int kPack = int(16 / sizeof(T));

// 16-byte accesses need every row to start on one.
template <class T>
bool packable(int64_t d, std::initializer_list<const void*> pointers) {
  bool good = d % kPack<T> == 0;
  for (const void* p : pointers) good = good && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  return good;
}

template <int N, class T>
__device__ __forceinline__ void load(const T* from, float (&to)[N]) {
  const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(from);
#pragma unroll
  for (int v = 0; v < N; ++v) to[v] = widen(pack.item[v]);
}

template <int N, class T>
__device__ __forceinline__ void store(const float (&from)[N], T* to) {
  Pack<T, N> pack;
#pragma unroll
  for (int v = 0; v < N; ++v) narrow(from[v], pack.item[v]);
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// A grid has at most 2^31 - 1 blocks in its first dimension.
inline unsigned blocks(int64_t count) {
  if (count > INT32_MAX) throw std::invalid_argument("clipsteer: more than 2^31 - 1 rows");
  return unsigned(count);
}

}  // namespace clipsteer::cuda
