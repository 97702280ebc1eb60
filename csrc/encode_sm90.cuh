// The fused encode on Hopper: TMA feeds shared memory, wgmma multiplies, and only values that reach a row's threshold
// leave the registers. See encode_plan.h for how the threshold is chosen and what happens when it was chosen badly.
#pragma once

#include "encode_plan.h"
#include "select.cuh"

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

namespace clipsteer::cuda {

// A block of threads as the team of select.cuh.
struct Block {
  __device__ uint32_t rank() const { return threadIdx.x; }
  __device__ uint32_t size() const { return blockDim.x; }
  __device__ void sync() const { __syncthreads(); }
  __device__ uint32_t add(uint32_t& counter, uint32_t amount) const { return atomicAdd(&counter, amount); }
};

}  // namespace clipsteer::cuda

namespace clipsteer::cuda::sm90 {

constexpr int kDepth = 64;  // of a stage: 128 bytes, the widest swizzle
constexpr int kStages = 4;
constexpr uint32_t kRowsBytes = kTileRows * kDepth * 2;
constexpr uint32_t kStageBytes = kRowsBytes + kTileColumns * kDepth * 2;
constexpr int kConsumers = 2;  // warpgroups, 64 rows each
constexpr int kThreads = 128 * (kConsumers + 1);
// A swizzled tile begins at a multiple of 1024 bytes; dynamic shared memory need not.
constexpr uint32_t kSharedBytes = 1024 + kStages * kStageBytes + kConsumers * 2 * kTileColumns * 4 + 16 * kStages;
constexpr int kSelectThreads = 128;
constexpr int kRedoThreads = 256;
constexpr int kRedoRows = 16;

struct Workspace {
  void* entries;  // padded rows x max(lists x pitch entries, maxima)
  uint32_t* counts;
  float* thresholds;
  int* again;  // how many rows, and which
};

struct alignas(8) Entry {
  float value;
  int column;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CLIPSTEER_SM90 1
#endif
#if defined(__CUDA_ARCH__) && !defined(CLIPSTEER_SM90)
#define CLIPSTEER_CLUSTER(size)
#else
#define CLIPSTEER_CLUSTER(size) __cluster_dims__(size, 1, 1)
#endif

#ifdef CLIPSTEER_SM90

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// At the same place in the shared memory of a block of the cluster.
__device__ __forceinline__ void barrier_arrive(uint32_t barrier, uint32_t block) {
  asm volatile(
      "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(
          barrier),
      "r"(block)
      : "memory");
}

__device__ __forceinline__ void cluster_sync() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
#ifdef CLIPSTEER_SPIN_LIMIT
  const long long begin = clock64();
#endif
  uint32_t done = 0;
  while (true) {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    if (done) return;
#ifdef CLIPSTEER_SPIN_LIMIT
    if (clock64() - begin > (long long)(CLIPSTEER_SPIN_LIMIT)) __trap();
#endif
  }
}

__device__ __forceinline__ void tma_load(uint32_t to, const CUtensorMap* map, int column, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          to),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// Into the shared memory of both blocks of a cluster.
__device__ __forceinline__ void tma_load_both(uint32_t to, const CUtensorMap* map, int column, int row,
                                              uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(uint16_t(3))
      : "memory");
}

// Rows of 128 bytes, 8 of them a swizzle pattern of 1024 bytes.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address) {
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

#define CLIPSTEER_WGMMA(TYPE)                                                                                         \
  asm volatile(                                                                                                       \
      "{ .reg .pred p; setp.ne.b32 p, %130, 0; wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " "        \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                       \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                              \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                              \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                              \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                              \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                              \
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "                  \
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "             \
      "%128, %129, p, 1, 1, 0, 0; }"                                                                                  \
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3]), "+f"(acc[4]), "+f"(acc[5]), "+f"(acc[6]), "+f"(acc[7]),\
        "+f"(acc[8]), "+f"(acc[9]), "+f"(acc[10]), "+f"(acc[11]), "+f"(acc[12]), "+f"(acc[13]), "+f"(acc[14]), "+f"(acc[15]),\
        "+f"(acc[16]), "+f"(acc[17]), "+f"(acc[18]), "+f"(acc[19]), "+f"(acc[20]), "+f"(acc[21]), "+f"(acc[22]), "+f"(acc[23]),\
        "+f"(acc[24]), "+f"(acc[25]), "+f"(acc[26]), "+f"(acc[27]), "+f"(acc[28]), "+f"(acc[29]), "+f"(acc[30]), "+f"(acc[31]),\
        "+f"(acc[32]), "+f"(acc[33]), "+f"(acc[34]), "+f"(acc[35]), "+f"(acc[36]), "+f"(acc[37]), "+f"(acc[38]), "+f"(acc[39]),\
        "+f"(acc[40]), "+f"(acc[41]), "+f"(acc[42]), "+f"(acc[43]), "+f"(acc[44]), "+f"(acc[45]), "+f"(acc[46]), "+f"(acc[47]),\
        "+f"(acc[48]), "+f"(acc[49]), "+f"(acc[50]), "+f"(acc[51]), "+f"(acc[52]), "+f"(acc[53]), "+f"(acc[54]), "+f"(acc[55]),\
        "+f"(acc[56]), "+f"(acc[57]), "+f"(acc[58]), "+f"(acc[59]), "+f"(acc[60]), "+f"(acc[61]), "+f"(acc[62]), "+f"(acc[63]),\
        "+f"(acc[64]), "+f"(acc[65]), "+f"(acc[66]), "+f"(acc[67]), "+f"(acc[68]), "+f"(acc[69]), "+f"(acc[70]), "+f"(acc[71]),\
        "+f"(acc[72]), "+f"(acc[73]), "+f"(acc[74]), "+f"(acc[75]), "+f"(acc[76]), "+f"(acc[77]), "+f"(acc[78]), "+f"(acc[79]),\
        "+f"(acc[80]), "+f"(acc[81]), "+f"(acc[82]), "+f"(acc[83]), "+f"(acc[84]), "+f"(acc[85]), "+f"(acc[86]), "+f"(acc[87]),\
        "+f"(acc[88]), "+f"(acc[89]), "+f"(acc[90]), "+f"(acc[91]), "+f"(acc[92]), "+f"(acc[93]), "+f"(acc[94]), "+f"(acc[95]),\
        "+f"(acc[96]), "+f"(acc[97]), "+f"(acc[98]), "+f"(acc[99]), "+f"(acc[100]), "+f"(acc[101]), "+f"(acc[102]), "+f"(acc[103]),\
        "+f"(acc[104]), "+f"(acc[105]), "+f"(acc[106]), "+f"(acc[107]), "+f"(acc[108]), "+f"(acc[109]), "+f"(acc[110]), "+f"(acc[111]),\
        "+f"(acc[112]), "+f"(acc[113]), "+f"(acc[114]), "+f"(acc[115]), "+f"(acc[116]), "+f"(acc[117]), "+f"(acc[118]), "+f"(acc[119]),\
        "+f"(acc[120]), "+f"(acc[121]), "+f"(acc[122]), "+f"(acc[123]), "+f"(acc[124]), "+f"(acc[125]), "+f"(acc[126]), "+f"(acc[127])\
      : "l"(a), "l"(b), "r"(add))

// acc (64, 256) = or += a (64, 16) b^T (256, 16)
template <class T>
__device__ __forceinline__ void wgmma(float (&acc)[128], uint64_t a, uint64_t b, int add) {
  if constexpr (std::is_same_v<T, __half>) {
    CLIPSTEER_WGMMA("f16");
  } else {
    CLIPSTEER_WGMMA("bf16");
  }
}
#undef CLIPSTEER_WGMMA

#endif  // CLIPSTEER_SM90

__device__ __forceinline__ float widened(__half v) { return __half2float(v); }
__device__ __forceinline__ float widened(__nv_bfloat16 v) { return __bfloat162float(v); }

struct ProductArgs {
  int row_tiles, tiles, depth_steps;
  int n;             // columns of this product
  int bias_stride;
  int lag;           // steps by which the second warpgroup starts after the first, so that their epilogues alternate
  int maxima, pitch, lists;
};

// One block: 128 rows and a range of column tiles. Sampling, it writes the maxima of groups of 8 columns; else it lists
// the values that reach the threshold of their row, each thread in lists of its own, so that nothing is contended for.
// Two blocks of a cluster share the tiles of w: each fetches half of one for both.
template <class T, bool kSample, int kCluster>
__global__ void CLIPSTEER_CLUSTER(kCluster) __launch_bounds__(kThreads, 1)
    product_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map, const T* bias,
                   const ProductArgs args, const float* thresholds, void* entries, uint32_t* counts) {
#ifdef CLIPSTEER_SM90
  extern __shared__ uint8_t dynamic_shared[];
  const uint32_t base = (shared_address(dynamic_shared) + 1023) / 1024 * 1024;
  uint8_t* const shared = dynamic_shared + (base - shared_address(dynamic_shared));
  float* const biases = reinterpret_cast<float*>(shared + kStages * kStageBytes);
  const uint32_t full = base + kStages * kStageBytes + kConsumers * 2 * kTileColumns * 4;
  const uint32_t empty = full + 8 * kStages;
  const int row_tile = int(blockIdx.x) % args.row_tiles, segment = int(blockIdx.x) / args.row_tiles;
  const int first_tile = segment * args.tiles;
  const int tiles = min(args.tiles, (args.n + kTileColumns - 1) / kTileColumns - first_tile);

  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, 4 * kConsumers * kCluster);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  if constexpr (kCluster > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }

  const int warpgroup = int(threadIdx.x) / 128;
  int stage = 0;
  uint32_t parity = 0;
  if (warpgroup == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) {
      for (int tile = 0; tile < tiles; ++tile) {
        for (int step = 0; step < args.depth_steps; ++step) {
          barrier_wait(empty + 8 * stage, parity ^ 1);
          const uint32_t to = base + stage * kStageBytes;
          barrier_expect(full + 8 * stage, kStageBytes);
          tma_load(to, &x_map, step * kDepth, row_tile * kTileRows, full + 8 * stage);
          const int w_row = (first_tile + tile) * kTileColumns;
          if constexpr (kCluster > 1) {
            const int half = int(blockIdx.x) % 2;
            tma_load_both(to + kRowsBytes * (1 + half), &w_map, step * kDepth, w_row + half * kTileRows,
                          full + 8 * stage);
          } else {
            tma_load(to + kRowsBytes, &w_map, step * kDepth, w_row, full + 8 * stage);
          }
          if (++stage == kStages) stage = 0, parity ^= 1;
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int consumer = warpgroup - 1, thread = int(threadIdx.x) % 128, lane = thread % 32;
    // acc[4 j + 2 i + c] belongs to row 16 warp + lane / 4 + 8 i and column 8 j + 2 (lane % 4) + c.
    const int64_t row = int64_t(row_tile) * kTileRows + consumer * 64 + thread / 32 * 16 + lane / 4;
    const int lag = min(args.lag, tiles * args.depth_steps);
    float threshold0 = 0, threshold1 = 0;
    uint32_t count0 = 0, count1 = 0;
    Entry *list0 = nullptr, *list1 = nullptr;
    if constexpr (!kSample) {
      threshold0 = thresholds[row];
      threshold1 = thresholds[row + 8];
      list0 = static_cast<Entry*>(entries) + (row * args.lists + 4 * segment + lane % 4) * args.pitch;
      list1 = list0 + int64_t(8) * args.lists * args.pitch;
    }
    if (lag > 0 && consumer == 1) asm volatile("bar.sync 3, 256;" ::: "memory");
    float acc[128];
    for (int tile = 0; tile < tiles; ++tile) {
      float* const tile_bias = biases + (2 * consumer + tile % 2) * kTileColumns;
      const int first_column = (first_tile + tile) * kTileColumns;
      for (int c = thread; c < kTileColumns; c += 128) {
        const int column = first_column + c;
        // Columns past the end are never among the largest.
        float value = -INFINITY;
        if (column < args.n) value = bias ? widened(bias[int64_t(column) * args.bias_stride]) : 0.f;
        tile_bias[c] = value;
      }
      int previous = 0;
      for (int step = 0; step < args.depth_steps; ++step) {
        barrier_wait(full + 8 * stage, parity);
        const uint64_t a = matrix_descriptor(base + stage * kStageBytes + consumer * (kRowsBytes / kConsumers));
        const uint64_t b = matrix_descriptor(base + stage * kStageBytes + kRowsBytes);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int part = 0; part < kDepth / 16; ++part) {
          // 16 columns are 32 bytes, counted in units of 16
          wgmma<T>(acc, a + 2 * part, b + 2 * part, step > 0 || part > 0);
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        if (step > 0) {
          asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
          if (lane < kCluster) barrier_arrive(empty + 8 * previous, uint32_t(lane));
        }
        if (consumer == 0 && tile * args.depth_steps + step == lag - 1) asm volatile("bar.arrive 3, 256;" ::: "memory");
        previous = stage;
        if (++stage == kStages) stage = 0, parity ^= 1;
      }
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
      if (lane < kCluster) barrier_arrive(empty + 8 * previous, uint32_t(lane));
#pragma unroll
      for (int i = 0; i < 128; ++i) asm volatile("" : "+f"(acc[i])::"memory");
      // The biases are all written; those of two tiles ago are all read.
      asm volatile("bar.sync %0, 128;" ::"r"(1 + consumer) : "memory");
      const float2* const pairs = reinterpret_cast<const float2*>(tile_bias) + lane % 4;

      if constexpr (kSample) {
        float* const out = static_cast<float*>(entries) + row * args.maxima + (first_tile + tile) * kMaximaPerTile +
                           lane % 4 * 8;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float top0[4], top1[4];
#pragma unroll
          for (int g = 0; g < 4; ++g) {
            top0[g] = top1[g] = -INFINITY;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int j = 16 * half + 4 * g + i;
              const float2 add = pairs[4 * j];
              top0[g] = fmaxf(top0[g], fmaxf(acc[4 * j] + add.x, acc[4 * j + 1] + add.y));
              top1[g] = fmaxf(top1[g], fmaxf(acc[4 * j + 2] + add.x, acc[4 * j + 3] + add.y));
            }
          }
          reinterpret_cast<float4*>(out)[half] = make_float4(top0[0], top0[1], top0[2], top0[3]);
          reinterpret_cast<float4*>(out + int64_t(8) * args.maxima)[half] =
              make_float4(top1[0], top1[1], top1[2], top1[3]);
        }
      } else {
        const uint32_t last = uint32_t(args.pitch - 2);
#pragma unroll
        for (int j = 0; j < 32; ++j) {
          const float2 add = pairs[4 * j];
          const float v0 = acc[4 * j] + add.x, v1 = acc[4 * j + 1] + add.y;
          const float v2 = acc[4 * j + 2] + add.x, v3 = acc[4 * j + 3] + add.y;
          // A NaN is listed too.
          const bool h0 = !(v0 < threshold0), h1 = !(v1 < threshold0);
          const bool h2 = !(v2 < threshold1), h3 = !(v3 < threshold1);
          if (h0 || h1 || h2 || h3) {
            const int column = first_column + 8 * j + 2 * (lane % 4);
            if (h0) list0[count0++] = Entry{v0, column};
            if (h1) list0[count0++] = Entry{v1, column + 1};
            if (h2) list1[count1++] = Entry{v2, column};
            if (h3) list1[count1++] = Entry{v3, column + 1};
            // A list that is full stays at its last two places and says so.
            count0 = min(count0, last);
            count1 = min(count1, last);
          }
        }
      }
    }
    if constexpr (!kSample) {
      counts[row * args.lists + 4 * segment + lane % 4] = count0;
      counts[(row + 8) * args.lists + 4 * segment + lane % 4] = count1;
    }
  }
  // The other block may still write here.
  if constexpr (kCluster > 1) cluster_sync();
#endif
}

// A warp a row: the rank-th largest of the row's maxima, rounded down to 20 bits.
template <int kPerLane>
__global__ void __launch_bounds__(256)
    threshold_kernel(const float* maxima, int per_row, int rank, int rows, int padded_rows, float* thresholds, int* again) {
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
    for (int step = 16; step > 0; step /= 2) reach += __shfl_xor_sync(0xffffffffu, reach, step);
    if (reach >= rank) bound |= bit;
  }
  if (lane == 0) {
    // Nothing is below -inf, the least of all orders; rows past the end list nothing.
    float threshold = -INFINITY;
    if (bound > 0x80000000u - 0x7f800000u) {
      threshold = __uint_as_float(bound >= 0x80000000u ? bound - 0x80000000u : 0x80000000u | (0x80000000u - bound));
    }
    thresholds[row] = row < rows ? threshold : INFINITY;
  }
}

struct SelectArgs {
  int rows, n, k, lists, pitch, max_listed;
};

// A block a row: sorts what was listed. Rows whose lists cannot be trusted go to `again`. For kAgain the rows are those
// of `again`, and the lists hold keys.
template <class T, bool kAgain>
__global__ void __launch_bounds__(kSelectThreads)
    select_listed_kernel(const SelectArgs args, const void* entries, int64_t row_bytes, const uint32_t* counts,
                         int counts_pitch, const float* thresholds, int* again, T* acts, int64_t* indices) {
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
    for (int i = int(threadIdx.x); i < args.lists * args.pitch; i += kSelectThreads) {
      const int list = i / args.pitch, place = i % args.pitch;
      const uint32_t count = counts[row * counts_pitch + list];
      if (!kAgain && place == 0 && count >= uint32_t(args.pitch - 2)) full = 1;
      if (uint32_t(place) >= count) continue;
      uint64_t key;
      if constexpr (kAgain) {
        key = static_cast<const uint64_t*>(row_entries)[i];
      } else {
        const Entry entry = static_cast<const Entry*>(row_entries)[i];
        if (entry.column >= args.n) continue;
        key = key_of(entry.value, uint32_t(entry.column));
      }
      const uint32_t slot = atomicAdd(&listed, 1u);
      if (slot < uint32_t(args.max_listed)) keys[slot] = key;
      high = max(high, order_of(key));
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
      for (int j = int(threadIdx.x); j < args.k; j += kSelectThreads) {
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

template <class T>
__device__ __forceinline__ void mma(float (&acc)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1) {
#ifdef CLIPSTEER_SM90
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
#endif
}

struct RedoArgs {
  int n, d, k, segments, buffer;
};

// The rows of `again`, 16 at a time and a range of columns a block: the k largest keys of the range, whatever the data.
// A buffer a row collects keys above the k-th so far; when it may overflow, it is sorted and cut down to k.
template <class T>
__global__ void __launch_bounds__(kRedoThreads)
    redo_kernel(const RedoArgs args, const T* x, const T* w, const T* bias, const int* again, void* entries,
                int64_t row_bytes, uint32_t* counts, int counts_pitch) {
  extern __shared__ uint64_t keys[];  // (16, buffer)
  __shared__ uint64_t bounds[kRedoRows];
  __shared__ uint32_t listed[kRedoRows];
  const int total = *again;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, d = args.d;
  const int width = ((args.n + args.segments - 1) / args.segments + kTileColumns - 1) / kTileColumns * kTileColumns;
  const auto cut = [&](int r) {
    const uint32_t count = listed[r];
    __syncthreads();
    if (count <= uint32_t(args.k)) return;
    uint64_t* const row_keys = keys + r * args.buffer;
    for (uint32_t i = count + threadIdx.x; i < uint32_t(args.buffer); i += kRedoThreads) row_keys[i] = 0;
    __syncthreads();
    sort_descending(Block(), row_keys, uint32_t(args.buffer));
    if (threadIdx.x == 0) {
      bounds[r] = row_keys[args.k - 1];
      listed[r] = uint32_t(args.k);
    }
    __syncthreads();
  };
  for (int item = int(blockIdx.x); item < (total + kRedoRows - 1) / kRedoRows * args.segments; item += int(gridDim.x)) {
    const int group = item / args.segments, segment = item % args.segments;
    const int live = min(total - group * kRedoRows, kRedoRows);
    if (threadIdx.x < kRedoRows) bounds[threadIdx.x] = listed[threadIdx.x] = 0;
    __syncthreads();
    const int row0 = lane / 4, row1 = lane / 4 + 8;
    const T* const x0 = x + int64_t(again[1 + group * kRedoRows + min(row0, live - 1)]) * d;
    const T* const x1 = x + int64_t(again[1 + group * kRedoRows + min(row1, live - 1)]) * d;
    const int begin = segment * width, end = min(begin + width, args.n);
    for (int column = begin; column < end; column += kTileColumns) {
      float acc[4][4] = {};
      const int mine = column + warp * 32;
      for (int at = lane % 4 * 8; at < (d + 31) / 32 * 32; at += 32) {
        // Any order of d will do that is the same for both operands: 16 bytes a thread serve two products.
        const uint4 zero = {0, 0, 0, 0};
        const uint4 a = at < d ? *reinterpret_cast<const uint4*>(x0 + at) : zero;
        const uint4 b = at < d ? *reinterpret_cast<const uint4*>(x1 + at) : zero;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int c = mine + 8 * j + lane / 4;
          const uint4 v = at < d && c < args.n ? *reinterpret_cast<const uint4*>(w + int64_t(c) * d + at) : zero;
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
            const uint64_t key = key_of(bias ? acc[j][e] + widened(bias[c]) : acc[j][e], uint32_t(c));
            if (key > bounds[r]) keys[r * args.buffer + atomicAdd(&listed[r], 1u)] = key;
          }
        }
      }
      __syncthreads();
      for (int r = 0; r < live; ++r) {
        if (listed[r] > uint32_t(args.buffer - kTileColumns)) cut(r);
      }
      __syncthreads();
    }
    for (int r = 0; r < live; ++r) {
      cut(r);
      const int64_t row = again[1 + group * kRedoRows + r];
      uint64_t* const out = reinterpret_cast<uint64_t*>(static_cast<char*>(entries) + row * row_bytes);
      const uint32_t count = listed[r];
      for (uint32_t i = threadIdx.x; i < count; i += kRedoThreads) out[segment * args.k + i] = keys[r * args.buffer + i];
      if (threadIdx.x == 0) counts[row * counts_pitch + segment] = count;
    }
    __syncthreads();
  }
}

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("topk_encode: ") + what + ": " + cudaGetErrorString(error));
}

// A matrix of `rows` rows of d 16-bit items, `row_bytes` apart, read in tiles of (tile_rows, kDepth).
template <class T>
CUtensorMap tensor_map(const T* data, int64_t rows, int64_t d, int64_t row_bytes, int tile_rows) {
  // The driver's library is open already and need not be linked with.
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
          "cuTensorMapEncodeTiled");
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found),
          "cuTensorMapEncodeTiled");
#endif
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  CUtensorMap map;
  const cuuint64_t sizes[2] = {cuuint64_t(d), cuuint64_t(rows)}, strides[1] = {cuuint64_t(row_bytes)};
  const cuuint32_t box[2] = {kDepth, cuuint32_t(tile_rows)}, steps[2] = {1, 1};
  const auto type = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  if (!encode || encode(&map, type, 2, const_cast<T*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS) {
    throw std::runtime_error("topk_encode: cuTensorMapEncodeTiled failed");
  }
  return map;
}

template <class Kernel>
void allow_shared(Kernel kernel, size_t bytes) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)), "shared memory");
}

inline Workspace workspace(const EncodePlan& plan, void* memory) {
  const auto places = static_cast<char*>(memory);
  const int64_t rows = plan.padded_rows();
  const auto counts = places + plan.entry_bytes();
  const auto thresholds = counts + rows * plan.lists() * 4;
  return {places, reinterpret_cast<uint32_t*>(counts), reinterpret_cast<float*>(thresholds),
          reinterpret_cast<int*>(thresholds + rows * 4)};
}

constexpr int kPhases = 6;

// x (rows, d) with rows <= plan.rows. `after_phase(i)` is called between the launches.
template <class T, class AfterPhase>
void launch(const EncodePlan& plan, const T* x, int64_t rows, const T* w, const T* bias, void* memory, T* acts,
            int64_t* indices, cudaStream_t stream, int lag, bool cluster, AfterPhase after_phase) {
  const Workspace ws = workspace(plan, memory);
  const int64_t padded = (rows + kTileRows - 1) / kTileRows * kTileRows, item = sizeof(T);
  const int64_t sampled = (plan.n + plan.stride - 1) / plan.stride;
  const int row_tiles = int(padded / kTileRows);
  const bool pairs = cluster && row_tiles % 2 == 0;
  const int w_rows = pairs ? kTileRows : kTileColumns;
  const CUtensorMap x_map = tensor_map(x, rows, plan.d, plan.d * item, kTileRows);
  const CUtensorMap w_map = tensor_map(w, plan.n, plan.d, plan.d * item, w_rows);
  const CUtensorMap sample_map = tensor_map(w, sampled, plan.d, plan.d * item * plan.stride, w_rows);
  const int depth_steps = int((plan.d + kDepth - 1) / kDepth);
  ProductArgs args{row_tiles, plan.sample_tiles, depth_steps, int(sampled), plan.stride, lag,
                   plan.maxima, plan.pitch, plan.lists()};

  const auto product = [&](auto kernel, int segments, const CUtensorMap& map) {
    allow_shared(kernel, kSharedBytes);
    kernel<<<unsigned(row_tiles * segments), kThreads, kSharedBytes, stream>>>(x_map, map, bias, args, ws.thresholds,
                                                                               ws.entries, ws.counts);
  };
  product(pairs ? product_kernel<T, true, 2> : product_kernel<T, true, 1>, plan.sample_segments, sample_map);
  check(cudaGetLastError(), "sample");
  after_phase(0);

  const auto thresholds = [&](auto per_lane) {
    threshold_kernel<decltype(per_lane)::value><<<unsigned(padded / 8), 256, 0, stream>>>(
        static_cast<const float*>(ws.entries), plan.maxima, plan.rank, int(rows), int(padded), ws.thresholds, ws.again);
  };
  if (plan.maxima <= 32 * 16) {
    thresholds(std::integral_constant<int, 16>());
  } else {
    thresholds(std::integral_constant<int, kMaxMaxima / 32>());
  }
  check(cudaGetLastError(), "thresholds");
  after_phase(1);

  args.tiles = plan.tiles, args.n = int(plan.n), args.bias_stride = 1;
  product(pairs ? product_kernel<T, false, 2> : product_kernel<T, false, 1>, plan.segments, w_map);
  check(cudaGetLastError(), "product");
  after_phase(2);

  const int64_t row_bytes = int64_t(plan.lists()) * plan.pitch * int64_t(sizeof(Entry));
  SelectArgs select{int(rows), int(plan.n), plan.k, plan.lists(), plan.pitch, plan.max_listed};
  allow_shared(select_listed_kernel<T, false>, kMaxListed * 16);
  allow_shared(select_listed_kernel<T, true>, kMaxListed * 16);
  select_listed_kernel<T, false><<<unsigned(rows), kSelectThreads, plan.max_listed * 16, stream>>>(
      select, ws.entries, row_bytes, ws.counts, plan.lists(), ws.thresholds, ws.again, acts, indices);
  check(cudaGetLastError(), "selection");
  after_phase(3);

  // As often as not there is no row left, and these two return at once.
  const RedoArgs redo{int(plan.n), int(plan.d), plan.k, plan.redo_segments, plan.redo_buffer};
  const int redo_shared = kRedoRows * plan.redo_buffer * 8;
  allow_shared(redo_kernel<T>, size_t(redo_shared));
  const int64_t most = (rows + kRedoRows - 1) / kRedoRows * plan.redo_segments;
  redo_kernel<T><<<unsigned(std::min<int64_t>(most, 264)), kRedoThreads, size_t(redo_shared), stream>>>(
      redo, x, w, bias, ws.again, ws.entries, row_bytes, ws.counts, plan.lists());
  check(cudaGetLastError(), "rows again");
  after_phase(4);
  select.lists = plan.redo_segments, select.pitch = plan.k;
  select.max_listed = power_of_two(int64_t(plan.redo_segments) * plan.k);
  select_listed_kernel<T, true><<<unsigned(std::min<int64_t>(rows, 528)), kSelectThreads, select.max_listed * 16, stream>>>(
      select, ws.entries, row_bytes, ws.counts, plan.lists(), ws.thresholds, ws.again, acts, indices);
  check(cudaGetLastError(), "selection again");
  after_phase(5);
}

}  // namespace clipsteer::cuda::sm90
