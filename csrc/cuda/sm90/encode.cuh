// The fused encode on Hopper: TMA feeds shared memory, wgmma multiplies, and only values that reach
// a row's threshold leave the registers. Six launches: a product with a sample of the columns,
// every row's threshold from it, the product itself, the k largest of what it listed, and for rows
// whose lists cannot be trusted product and selection once more. See plan.h for how the threshold
// is chosen and when lists cannot be trusted.
#pragma once

#include "../select.cuh"
#include "plan.h"
#include "product.cuh"
#include "ptx.cuh"

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

namespace clipsteer::cuda::sm90 {

constexpr int kSelectThreads = 128, kMaxSelectThreads = 256;
constexpr int kRedoThreads = kRedoColumns;
constexpr int kRedoRows = 16;
constexpr int kKeyBytes = 8;
// The most that any call asks for.
constexpr int kMaxSelectBytes = 2 * kMaxListed * kKeyBytes;
constexpr int kMaxRedoBytes = kRedoRows * power_of_two(kFusedMaxK + kRedoColumns) * kKeyBytes;

struct Workspace {
  void* entries;  // padded rows x max(lists x pitch entries, maxima)
  uint32_t* counts;
  float* thresholds;
  int* again;  // how many rows, and which
};

// A warp a row: the rank-th largest of the row's maxima, rounded down to 20 bits.
template <int kPerLane>
__global__ void __launch_bounds__(256)
    threshold_kernel(const float* maxima, int per_row, int rank, int rows, int padded_rows,
                     float* thresholds, int* again) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *again = 0;
  const int row = int(blockIdx.x) * 8 + int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  if (row >= padded_rows) return;
  uint32_t orders[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int at = lane + 32 * i;
    orders[i] = at < per_row ? ordered(maxima[int64_t(row) * per_row + at]) : 0u;
  }
  uint32_t bound = 0;
  for (uint32_t bit = 0x80000000u; bit >= 0x1000u; bit >>= 1) {
    int reach = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) reach += orders[i] >= (bound | bit);
    if (__reduce_add_sync(0xffffffffu, reach) >= rank) bound |= bit;
  }
  if (lane == 0) {
    // Nothing is below -inf, the least of all orders; rows past the end list nothing.
    float threshold = -INFINITY;
    if (bound > 0x80000000u - 0x7f800000u) {
      threshold = __uint_as_float(bound >= 0x80000000u ? bound - 0x80000000u
                                                       : 0x80000000u | (0x80000000u - bound));
    }
    thresholds[row] = row < rows ? threshold : INFINITY;
  }
}

struct SelectArgs {
  int rows, n, k, lists, pitch, max_listed;
};

// A block a row: sorts what was listed. Rows whose lists cannot be trusted go to `again`. For
// kAgain the rows are those of `again`, and the lists hold keys.
template <class T, bool kAgain>
__global__ void __launch_bounds__(kMaxSelectThreads)
    select_listed_kernel(const SelectArgs args, const void* entries, int64_t row_bytes,
                         const uint32_t* counts, int counts_pitch, const float* thresholds,
                         int* again, T* acts, int64_t* indices) {
  extern __shared__ uint64_t keys[];
  __shared__ DigitScratch scratch;
  __shared__ uint32_t listed, full, highest;
  uint64_t* const kept = keys + args.max_listed;
  const int total = kAgain ? *again : args.rows;
  for (int item = int(blockIdx.x); item < total; item += int(gridDim.x)) {
    const int64_t row = kAgain ? again[1 + item] : item;
    const void* const row_entries = static_cast<const char*>(entries) + row * row_bytes;
    if (threadIdx.x == 0) listed = full = highest = 0;
    __syncthreads();
    uint32_t high = 0;
    for (int list = int(threadIdx.x) / 4; list < args.lists; list += int(blockDim.x) / 4) {
      const uint32_t count = counts[row * counts_pitch + list];
      if (!kAgain && count >= uint32_t(args.pitch - 1)) full = 1;
      for (uint32_t first = threadIdx.x % 4; first < count; first += 16) {
        uint64_t found[4];
        uint32_t number = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t place = uint32_t(list * args.pitch) + first + 4 * i;
          found[i] = 0;  // no key
          if (first + 4 * i >= count) continue;
          if constexpr (kAgain) {
            found[i] = static_cast<const uint64_t*>(row_entries)[place];
          } else {
            const Entry entry = static_cast<const Entry*>(row_entries)[place];
            if (entry.column < args.n) found[i] = key_of(entry.value, uint32_t(entry.column));
          }
          number += found[i] != 0;
        }
        uint32_t slot = atomicAdd(&listed, number);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (found[i] == 0) continue;
          if (slot < uint32_t(args.max_listed)) keys[slot] = found[i];
          ++slot;
          high = max(high, order_of(found[i]));
        }
      }
    }
    atomicMax(&highest, high);
    __syncthreads();
    const uint32_t count = listed;
    if (!kAgain && (full || count < uint32_t(args.k) || count > uint32_t(args.max_listed))) {
      if (threadIdx.x == 0) again[1 + atomicAdd(again, 1)] = int(row);
    } else {
      const uint32_t low = kAgain ? 0u : ordered(thresholds[row]);
      sort_largest(Block(), keys, count, uint32_t(args.k), low, highest, kept, scratch);
      const bool nan = order_of(kept[0]) == kNaN;
      for (int j = int(threadIdx.x); j < args.k; j += int(blockDim.x)) {
        const float value = relu_of(nan ? kNaN : order_of(kept[j]));
        if constexpr (std::is_same_v<T, __half>) {
          acts[row * args.k + j] = __float2half_rn(value);
        } else {
          acts[row * args.k + j] = __float2bfloat16_rn(value);
        }
        indices[row * args.k + j] = column_of(kept[j]);
      }
    }
    __syncthreads();
  }
}

struct RedoArgs {
  int n, d, k, segments, buffer;
};

// The rows of `again`, 16 at a time and a range of columns a block: the k largest keys of the
// range, whatever the data. A buffer a row collects keys above the k-th so far; when it may
// overflow, it is sorted and cut down to k.
template <class T>
__global__ void __launch_bounds__(kRedoThreads)
    redo_kernel(const RedoArgs args, const T* x, const T* w, const T* bias, const int* again,
                void* entries, int64_t row_bytes, uint32_t* counts, int counts_pitch) {
  extern __shared__ uint64_t keys[];  // (16, buffer)
  __shared__ uint64_t bounds[kRedoRows];
  __shared__ uint32_t listed[kRedoRows];
  const int total = *again;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, d = args.d;
  const int width = ((args.n + args.segments - 1) / args.segments + kRedoColumns - 1) /
                    kRedoColumns * kRedoColumns;
  const auto cut = [&](int r) {
    const uint32_t count = listed[r];
    __syncthreads();
    if (count <= uint32_t(args.k)) return;
    uint64_t* const row_keys = keys + r * args.buffer;
    for (uint32_t i = count + threadIdx.x; i < uint32_t(args.buffer); i += kRedoThreads)
      row_keys[i] = 0;
    __syncthreads();
    sort_descending(Block(), row_keys, uint32_t(args.buffer));
    if (threadIdx.x == 0) {
      bounds[r] = row_keys[args.k - 1];
      listed[r] = uint32_t(args.k);
    }
    __syncthreads();
  };
  for (int item = int(blockIdx.x); item < (total + kRedoRows - 1) / kRedoRows * args.segments;
       item += int(gridDim.x)) {
    const int group = item / args.segments, segment = item % args.segments;
    const int live = min(total - group * kRedoRows, kRedoRows);
    if (threadIdx.x < kRedoRows) bounds[threadIdx.x] = listed[threadIdx.x] = 0;
    __syncthreads();
    const int row0 = lane / 4, row1 = lane / 4 + 8;
    const T* const x0 = x + int64_t(again[1 + group * kRedoRows + min(row0, live - 1)]) * d;
    const T* const x1 = x + int64_t(again[1 + group * kRedoRows + min(row1, live - 1)]) * d;
    const int begin = segment * width, end = min(begin + width, args.n);
    for (int column = begin; column < end; column += kRedoColumns) {
      float acc[4][4] = {};
      const int mine = column + warp * 32;
      for (int at = lane % 4 * 8; at < (d + 31) / 32 * 32; at += 32) {
        // Any order of d will do that is the same for both: 16 bytes a thread serve two products.
        const uint4 zero = {0, 0, 0, 0};
        const uint4 a = at < d ? *reinterpret_cast<const uint4*>(x0 + at) : zero;
        const uint4 b = at < d ? *reinterpret_cast<const uint4*>(x1 + at) : zero;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int c = mine + 8 * j + lane / 4;
          const uint4 v = at < d && c < args.n
                              ? *reinterpret_cast<const uint4*>(w + int64_t(c) * d + at)
                              : zero;
          mma<T>(acc[j], a.x, b.x, a.y, b.y, v.x, v.y);
          mma<T>(acc[j], a.z, b.z, a.w, b.w, v.z, v.w);
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int c = mine + 8 * j + lane % 4 * 2 + e % 2, r = e < 2 ? row0 : row1;
          if (c < end && r < live) {
            const uint64_t key =
                key_of(bias ? acc[j][e] + widened(bias[c]) : acc[j][e], uint32_t(c));
            if (key > bounds[r]) keys[r * args.buffer + atomicAdd(&listed[r], 1u)] = key;
          }
        }
      }
      __syncthreads();
      for (int r = 0; r < live; ++r) {
        if (listed[r] > uint32_t(args.buffer - kRedoColumns)) cut(r);
      }
      __syncthreads();
    }
    for (int r = 0; r < live; ++r) {
      cut(r);
      const int64_t row = again[1 + group * kRedoRows + r];
      uint64_t* const out =
          reinterpret_cast<uint64_t*>(static_cast<char*>(entries) + row * row_bytes);
      const uint32_t count = listed[r];
      for (uint32_t i = threadIdx.x; i < count; i += kRedoThreads) {
        out[segment * args.k + i] = keys[r * args.buffer + i];
      }
      if (threadIdx.x == 0) counts[row * counts_pitch + segment] = count;
    }
    __syncthreads();
  }
}

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // or the next launch would be blamed for it
  throw std::runtime_error(std::string("topk_encode: ") + what + ": " + cudaGetErrorString(error));
}

// A matrix of `rows` rows of d 16-bit items, `row_bytes` apart, in tiles of (tile_rows, kDepth).
template <class T>
CUtensorMap tensor_map(const T* data, int64_t rows, int64_t d, int64_t row_bytes, int tile_rows) {
  // The driver's library is open already and need not be linked with.
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                           cudaEnableDefault, &found),
          "cuTensorMapEncodeTiled");
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found),
          "cuTensorMapEncodeTiled");
#endif
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  CUtensorMap map;
  const cuuint64_t sizes[2] = {cuuint64_t(d), cuuint64_t(rows)};
  const cuuint64_t strides[1] = {cuuint64_t(row_bytes)};
  const cuuint32_t box[2] = {kDepth, cuuint32_t(tile_rows)}, steps[2] = {1, 1};
  const auto type = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                              : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  if (!encode || encode(&map, type, 2, const_cast<T*>(data), sizes, strides, box, steps,
                        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS) {
    throw std::runtime_error("topk_encode: cuTensorMapEncodeTiled failed");
  }
  return map;
}

// The limit of shared memory belongs to the kernel, whoever calls: it is always set to the same
// `most`, or one thread could lower it between another's setting and launch.
template <class... Parameters, class... Args>
void start(const char* what, void (*kernel)(Parameters...), int64_t blocks, int threads,
           int64_t shared, int most, cudaStream_t stream, const Args&... args) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), what);
  kernel<<<unsigned(blocks), threads, size_t(shared), stream>>>(args...);
  check(cudaGetLastError(), what);
}

inline Workspace workspace(const EncodePlan& plan, void* memory) {
  const auto places = static_cast<char*>(memory);
  const int64_t rows = plan.padded_rows();
  const auto counts = places + plan.entry_bytes();
  const auto thresholds = counts + rows * plan.lists() * 4;
  return {places, reinterpret_cast<uint32_t*>(counts), reinterpret_cast<float*>(thresholds),
          reinterpret_cast<int*>(thresholds + rows * 4)};
}

// x (rows, d) with rows <= plan.rows.
template <class T>
void launch(const EncodePlan& plan, const T* x, int64_t rows, const T* w, const T* bias,
            void* memory, T* acts, int64_t* indices, cudaStream_t stream) {
  const Workspace ws = workspace(plan, memory);
  const int64_t padded = (rows + kTileRows - 1) / kTileRows * kTileRows, item = sizeof(T);
  const int64_t sampled = (plan.n + plan.stride - 1) / plan.stride;
  const int row_tiles = int(padded / kTileRows);
  const CUtensorMap x_map = tensor_map(x, rows, plan.d, plan.d * item, kTileRows);
  const CUtensorMap w_map = tensor_map(w, plan.n, plan.d, plan.d * item, kTileColumns);
  const CUtensorMap sample_map =
      tensor_map(w, sampled, plan.d, plan.d * item * plan.stride, kTileColumns);
  // Beyond d both operands are zero; every part of a look needs its step.
  const int depth_steps = int(std::max<int64_t>((plan.d + kDepth - 1) / kDepth, kParts + 1));
  ProductArgs args{row_tiles,   plan.sample_tiles, depth_steps, int(sampled),
                   plan.stride, plan.maxima,       plan.pitch,  plan.lists()};

  const auto product = [&](const char* what, auto kernel, int segments, const CUtensorMap& map) {
    start(what, kernel, row_tiles * segments, kThreads, kSharedBytes, kSharedBytes, stream, x_map,
          map, bias, args, ws.thresholds, ws.entries, ws.counts);
  };
  product("sample", product_kernel<T, true>, plan.sample_segments, sample_map);

  start("thresholds",
        plan.maxima <= 32 * 16 ? threshold_kernel<16> : threshold_kernel<kMaxMaxima / 32>,
        padded / 8, 256, 0, 0, stream, static_cast<const float*>(ws.entries), plan.maxima,
        plan.rank, int(rows), int(padded), ws.thresholds, ws.again);

  args.tiles = plan.tiles, args.n = int(plan.n), args.bias_stride = 1;
  product("product", product_kernel<T, false>, plan.segments, w_map);

  const int64_t row_bytes = int64_t(plan.lists()) * plan.pitch * int64_t(sizeof(Entry));
  SelectArgs select{int(rows), int(plan.n), plan.k, plan.lists(), plan.pitch, plan.max_listed};
  const auto selection = [&](const char* what, auto kernel, int64_t blocks) {
    start(what, kernel, blocks, select.max_listed <= 1024 ? kSelectThreads : kMaxSelectThreads,
          2 * select.max_listed * kKeyBytes, kMaxSelectBytes, stream, select, ws.entries, row_bytes,
          ws.counts, plan.lists(), ws.thresholds, ws.again, acts, indices);
  };
  selection("selection", select_listed_kernel<T, false>, rows);

  // As often as not there is no row left, and these two return at once.
  const RedoArgs redo{int(plan.n), int(plan.d), plan.k, plan.redo_segments, plan.redo_buffer};
  const int64_t most = (rows + kRedoRows - 1) / kRedoRows * plan.redo_segments;
  start("rows again", redo_kernel<T>, std::min<int64_t>(most, 264), kRedoThreads,
        kRedoRows * plan.redo_buffer * kKeyBytes, kMaxRedoBytes, stream, redo, x, w, bias, ws.again,
        ws.entries, row_bytes, ws.counts, plan.lists());
  select.lists = plan.redo_segments, select.pitch = plan.k;
  select.max_listed = power_of_two(int64_t(plan.redo_segments) * plan.k);
  selection("selection again", select_listed_kernel<T, true>, std::min<int64_t>(rows, 528));
}

}  // namespace clipsteer::cuda::sm90
