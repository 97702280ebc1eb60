// topk_encode: fused on Hopper (sm90/encode.cuh); else torch's matrix product a few rows at a time, then one block
// a row picks the k largest.
#include "cuda.cuh"
#include "select.cuh"
#include "sm90/encode.cuh"

namespace clipsteer::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int64_t kChunkBytes = int64_t(48) << 20;  // stays in the second-level cache of a large GPU

template <class T>
struct PreActs {
  const float* product;
  const T* bias;
  __device__ float operator()(uint32_t i) const { return bias ? product[i] + widen(bias[i]) : product[i]; }
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    select_kernel(const float* product, const T* bias, uint32_t n, uint32_t k, T* acts, int64_t* indices) {
  __shared__ SelectScratch scratch;
  const int64_t row = blockIdx.x;
  select_row(Block(), PreActs<T>{product + row * n, bias}, n, k, scratch);
  const bool nan = order_of(scratch.keys[0]) == kNaN;
  for (uint32_t j = threadIdx.x; j < k; j += blockDim.x) {
    narrow(relu_of(nan ? kNaN : order_of(scratch.keys[j])), acts[row * k + j]);
    indices[row * k + j] = column_of(scratch.keys[j]);
  }
}

// For k beyond the select: keys of whole rows as signed integers in the same order, which torch sorts.
template <class T>
__global__ void keys_kernel(const float* product, const T* bias, int64_t rows, uint32_t n, int64_t* keys) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < rows * n; i += int64_t(gridDim.x) * blockDim.x) {
    const uint32_t column = uint32_t(i % n);
    keys[i] = int64_t(key_of(PreActs<T>{product + (i - column), bias}(column), column) ^ (uint64_t(1) << 63));
  }
}

template <class T>
__global__ void unpack_kernel(const int64_t* keys, int64_t rows, int64_t n, int64_t k, T* acts, int64_t* indices) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < rows * k; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t* row = keys + i / k * n;
    const uint64_t key = uint64_t(row[i % k]) ^ (uint64_t(1) << 63);
    const bool nan = order_of(uint64_t(row[0]) ^ (uint64_t(1) << 63)) == kNaN;
    narrow(relu_of(nan ? kNaN : order_of(key)), acts[i]);
    indices[i] = column_of(key);
  }
}

// x W^T in float32, whatever the inputs are.
Tensor product_of(const Tensor& x, const Tensor& w_transposed) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(x), from(w_transposed), from(ScalarType::Float)};
  const char* overload = x.scalar_type() == ScalarType::Float ? "" : "dtype";
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor sorted_descending(const Tensor& keys) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(keys), from(int64_t(1)), from(true)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[1]);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// False where the shape or the device is not for the fused encode.
template <class T>
bool fused_encode(const Tensor& x, const Tensor& w, const T* bias, int64_t k, T* acts, int64_t* indices) {
  int major = 0, minor = 0, processors = 0;
  const int device = int(x.get_device_index());
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  // Code for sm_90a runs on 9.0 alone.
  if (major != 9 || minor != 0 || !packable<T>(x.size(1), {x.data_ptr(), w.data_ptr()})) return false;
  const EncodePlan plan = encode_plan(x.size(0), w.size(0), x.size(1), k, processors);
  if (plan.rows == 0) return false;
  const Tensor memory = empty_like(x, ScalarType::Byte, {plan.bytes()});
  for (int64_t start = 0; start < x.size(0); start += plan.rows) {
    sm90::launch(plan, data<T>(x) + start * plan.d, std::min(plan.rows, x.size(0) - start), data<T>(w), bias,
                 memory.data_ptr(), acts + start * k, indices + start * k, stream_of(x));
  }
  return true;
}

template <class T>
void encode(const Tensor& x, const Tensor& w, const T* bias, int64_t k, T* acts, int64_t* indices) {
  const int64_t total = x.size(0), n = w.size(0);
  const bool select = k <= kSelectMaxK;
  const int64_t row_bytes = n * int64_t(select ? sizeof(float) : sizeof(float) + 2 * sizeof(int64_t));
  int64_t chunk = std::max<int64_t>(1, kChunkBytes / row_bytes);
  // Whole tiles of the matrix product.
  if (chunk > 128) chunk -= chunk % 128;
  const cudaStream_t stream = stream_of(x);
  const Tensor w_transposed = torch::stable::transpose(w, 0, 1);
  for (int64_t start = 0; start < total; start += chunk) {
    const int64_t rows = std::min(chunk, total - start);
    Tensor part = x;
    const Tensor product = product_of(torch::stable::narrow(part, 0, start, rows), w_transposed);
    T* const acts_part = acts + start * k;
    int64_t* const indices_part = indices + start * k;
    if (select) {
      select_kernel<T><<<blocks(rows), kThreads, 0, stream>>>(data<float>(product), bias, uint32_t(n), uint32_t(k),
                                                             acts_part, indices_part);
    } else {
      const Tensor keys = empty_like(x, ScalarType::Long, {rows, n});
      const unsigned grid = unsigned(std::min<int64_t>((rows * n + 255) / 256, 65535));
      keys_kernel<T><<<grid, 256, 0, stream>>>(data<float>(product), bias, rows, uint32_t(n), data<int64_t>(keys));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      const Tensor sorted = sorted_descending(keys);
      unpack_kernel<T><<<grid, 256, 0, stream>>>(data<int64_t>(sorted), rows, n, k, acts_part, indices_part);
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

}  // namespace

std::tuple<Tensor, Tensor> topk_encode(Tensor x, Tensor w_enc, std::optional<Tensor> b_enc, int64_t k) {
  const DeviceGuard guard(x.get_device_index());
  const int64_t n = w_enc.size(0);
  if (k < 0 || k > n || n >= INT32_MAX) {
    throw std::invalid_argument("topk_encode: expected 0 <= k <= d_sae < 2^31, got k = " + std::to_string(k) +
                                ", d_sae = " + std::to_string(n));
  }
  Tensor acts = empty_like(x, x.scalar_type(), {x.size(0), k});
  Tensor indices = empty_like(x, ScalarType::Long, {x.size(0), k});
  if (acts.numel() > 0) {
    dispatch("topk_encode", x.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      if constexpr (!std::is_same_v<T, float>) {
        if (fused_encode<T>(x, w_enc, b_enc ? data<T>(*b_enc) : nullptr, k, data<T>(acts), data<int64_t>(indices))) return;
      }
      encode<T>(x, w_enc, b_enc ? data<T>(*b_enc) : nullptr, k, data<T>(acts), data<int64_t>(indices));
    });
  }
  return {acts, indices};
}

}  // namespace clipsteer::cuda
