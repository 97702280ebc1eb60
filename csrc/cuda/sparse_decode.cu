// sparse_decode (a weighted gather of rows of W), gather_dot, and the sorted-segment sums of their gradients.
#include "cuda.cuh"
#include "segment.cuh"

namespace clipsteer::cuda {
namespace {

constexpr int kThreads = 128;

template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    decode_kernel(const T* acts, const int64_t* indices, const T* w, const T* b, int64_t k, int64_t d, T* out) {
  __shared__ float act[kThreads];
  __shared__ int64_t index[kThreads];
  const int64_t row = blockIdx.x;
  const int64_t column = (blockIdx.y * int64_t(kThreads) + threadIdx.x) * N;
  float sum[N] = {};
  for (int64_t start = 0; start < k; start += kThreads) {
    const int count = int(min(int64_t(kThreads), k - start));
    __syncthreads();
    if (threadIdx.x < count) {
      act[threadIdx.x] = widen(acts[row * k + start + threadIdx.x]);
      index[threadIdx.x] = indices[row * k + start + threadIdx.x];
    }
    __syncthreads();
    if (column >= d) continue;
#pragma unroll 4
    for (int j = 0; j < count; ++j) {
      float x[N];
      load<N>(w + index[j] * d + column, x);
#pragma unroll
      for (int v = 0; v < N; ++v) sum[v] += act[j] * x[v];
    }
  }
  if (column >= d) return;
  if (b) {
    float x[N];
    load<N>(b + column, x);
#pragma unroll
    for (int v = 0; v < N; ++v) sum[v] += x[v];
  }
  store<N>(sum, out + row * d + column);
}

// A warp a (row, feature) pair.
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    dot_kernel(const T* rows, const int64_t* indices, const T* w, int64_t pairs, int64_t k, int64_t d, T* out) {
  const int64_t pair = (blockIdx.x * int64_t(kThreads) + threadIdx.x) / 32;
  if (pair >= pairs) return;
  const int lane = threadIdx.x % 32;
  const T* const x_row = rows + pair / k * d;
  const T* const w_row = w + indices[pair] * d;
  float sum = 0;
#pragma unroll 2
  for (int64_t column = lane * N; column < d; column += 32 * N) {
    float x[N], y[N];
    load<N>(x_row + column, x);
    load<N>(w_row + column, y);
#pragma unroll
    for (int v = 0; v < N; ++v) sum += x[v] * y[v];
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (lane == 0) narrow(sum, out[pair]);
}

__global__ void narrow_indices_kernel(const int64_t* indices, int64_t count, int32_t* out) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i < count) out[i] = int32_t(indices[i]);
}

__global__ void offsets_kernel(const int32_t* sorted, int64_t count, int64_t n, int64_t* offsets) {
  const int64_t feature = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (feature <= n) offsets[feature] = segment_start(sorted, count, feature);
}

// A block a feature: every row of dW is written, once, by sums in ascending order of pairs.
template <class T, int N>
__global__ void __launch_bounds__(kThreads, 8)
    outer_kernel(const T* coeff, const int64_t* pairs, const int64_t* offsets, const T* rows, int64_t k, int64_t d,
                 T* dw, T* db) {
  const int64_t feature = blockIdx.x;
  const int64_t first = offsets[feature], last = offsets[feature + 1];
  const auto coefficient = [coeff](int64_t pair) { return widen(coeff[pair]); };
  for (int64_t column = threadIdx.x * N; column < d; column += kThreads * N) {
    float sum[N] = {};
    add_segment<N>(
        pairs, first, last, k, coefficient,
        [rows, d, column](int64_t row, float(&x)[N]) { load<N>(rows + row * d + column, x); }, sum);
    store<N>(sum, dw + feature * d + column);
  }
  if (threadIdx.x == 0) {
    float none[1] = {};
    const float total = add_segment<1>(
        pairs, first, last, k, coefficient, [](int64_t, float(&x)[1]) { x[0] = 0; }, none);
    narrow(total, db[feature]);
  }
}

std::tuple<Tensor, Tensor> stable_sort(const Tensor& keys) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 4> stack{from(keys), from(std::optional<bool>(true)), from(int64_t(0)), from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  Tensor values = to<Tensor>(stack[0]);
  return {values, to<Tensor>(stack[1])};
}

// Calls body(N) as a type: 16 bytes an access where rows allow it, else one element.
template <class T, class Body>
void with_pack(bool packed, Body body) {
  if (packed) {
    body(std::integral_constant<int, kPack<T>>());
  } else {
    body(std::integral_constant<int, 1>());
  }
}

}  // namespace

Tensor sparse_decode(Tensor acts, Tensor indices, Tensor w, std::optional<Tensor> b) {
  const DeviceGuard guard(w.get_device_index());
  const int64_t rows = acts.size(0), k = acts.size(1), d = w.size(1);
  Tensor out = empty_like(w, w.scalar_type(), {rows, d});
  if (out.numel() == 0) return out;
  dispatch("sparse_decode", w.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* const bias = b ? data<T>(*b) : nullptr;
    with_pack<T>(packable<T>(d, {data<T>(w), bias, data<T>(out)}), [&](auto n) {
      constexpr int N = decltype(n)::value;
      const dim3 grid(blocks(rows), unsigned((d + kThreads * N - 1) / (kThreads * N)));
      decode_kernel<T, N><<<grid, kThreads, 0, stream_of(w)>>>(data<T>(acts), data<int64_t>(indices), data<T>(w), bias,
                                                              k, d, data<T>(out));
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

Tensor gather_dot(Tensor rows, Tensor indices, Tensor w) {
  const DeviceGuard guard(w.get_device_index());
  const int64_t count = indices.size(0), k = indices.size(1), d = w.size(1);
  Tensor out = empty_like(w, w.scalar_type(), {count, k});
  if (out.numel() == 0) return out;
  dispatch("gather_dot", w.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    with_pack<T>(packable<T>(d, {data<T>(rows), data<T>(w)}), [&](auto n) {
      constexpr int N = decltype(n)::value;
      const unsigned grid = blocks((count * k + kThreads / 32 - 1) / (kThreads / 32));
      dot_kernel<T, N><<<grid, kThreads, 0, stream_of(w)>>>(data<T>(rows), data<int64_t>(indices), data<T>(w),
                                                           count * k, k, d, data<T>(out));
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

void sparse_outer_out(Tensor coeff, Tensor indices, Tensor rows, Tensor dw, Tensor db) {
  const DeviceGuard guard(dw.get_device_index());
  const int64_t n = dw.size(0), d = dw.size(1), k = coeff.size(1), count = coeff.numel();
  if (n == 0) return;
  const cudaStream_t stream = stream_of(dw);
  // 32-bit keys take half the passes of the sort, which keeps a feature's pairs in ascending order.
  Tensor keys = empty_like(indices, ScalarType::Int, {count});
  if (count > 0) {
    narrow_indices_kernel<<<blocks((count + 255) / 256), 256, 0, stream>>>(data<int64_t>(indices), count,
                                                                          data<int32_t>(keys));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  const auto [sorted, pairs] = stable_sort(keys);
  Tensor offsets = empty_like(indices, ScalarType::Long, {n + 1});
  offsets_kernel<<<blocks((n + 256) / 256), 256, 0, stream>>>(data<int32_t>(sorted), count, n, data<int64_t>(offsets));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  const int64_t* const pairs_data = data<int64_t>(pairs);
  dispatch("sparse_outer", dw.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    with_pack<T>(packable<T>(d, {data<T>(rows), data<T>(dw)}), [&](auto width) {
      constexpr int N = decltype(width)::value;
      outer_kernel<T, N><<<blocks(n), kThreads, 0, stream>>>(data<T>(coeff), pairs_data, data<int64_t>(offsets),
                                                            data<T>(rows), k, d, data<T>(dw), data<T>(db));
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> sparse_outer(Tensor coeff, Tensor indices, Tensor rows, int64_t n) {
  const DeviceGuard guard(rows.get_device_index());
  Tensor dw = empty_like(rows, rows.scalar_type(), {n, rows.size(1)});
  Tensor db = empty_like(rows, rows.scalar_type(), {n});
  sparse_outer_out(coeff, indices, rows, dw, db);
  return {dw, db};
}

}  // namespace clipsteer::cuda
