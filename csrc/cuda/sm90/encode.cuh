// The fused encode on Hopper: TMA feeds shared memory, wgmma multiplies, and only values that reach a row's threshold
// leave the registers. Six launches: a product with a sample of the columns, every row's threshold from it, the product
// itself, the k largest of what it listed, and for rows whose lists cannot be trusted product and selection once more.
// See plan.h for how the threshold is chosen and when lists cannot be trusted.
#pragma once

#include "../select.cuh"
#include "plan.h"

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
constexpr int kStages = 5;
constexpr int kParts = 6;  // in which the values of a tile are looked at, one during each step of the next tile
constexpr uint32_t kRowsBytes = kTileRows * kDepth * 2;
constexpr uint32_t kColumnsBytes = kTileColumns * kDepth * 2;
constexpr uint32_t kStageBytes = kRowsBytes + kColumnsBytes;
constexpr int kConsumers = 2;  // warpgroups, 64 rows each
constexpr int kThreads = 128 * (kConsumers + 1);
// A swizzled tile begins at a multiple of 1024 bytes; dynamic shared memory need not.
constexpr uint32_t kSharedBytes = 1024 + kStages * kStageBytes + kConsumers * 2 * kTileColumns * 4 + 16 * kStages;
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

struct alignas(8) Entry {
  float value;
  int column;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CLIPSTEER_SM90 1
#endif

#ifdef CLIPSTEER_SM90

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// `block` is 0, this one, as there are no clusters. With an address in shared::cta, or a constant block, ptxas orders the
// instructions of the product differently: this is the order that was measured.
__device__ __forceinline__ void barrier_arrive(uint32_t barrier, uint32_t block) {
  asm volatile(
      "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(
          barrier),
      "r"(block)
      : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  do {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

__device__ __forceinline__ void tma_load(uint32_t to, const CUtensorMap* map, int column, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          to),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// A thread's: of a tile of 64 rows, 4 for every 8 columns.
using Accumulators = float[kTileColumns / 2];

// Rows of 128 bytes, 8 of them a swizzle pattern of 1024 bytes.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address) {
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

#define CLIPSTEER_WGMMA(TYPE)                                                                                         \
  asm volatile(                                                                                                       \
      "{ .reg .pred p; setp.ne.b32 p, %98, 0; wgmma.mma_async.sync.aligned.m64n192k16.f32." TYPE "." TYPE " "         \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                       \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                              \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                              \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                              \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                              \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "                             \
      "%96, %97, p, 1, 1, 0, 0; }"                                                                                    \
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3]), "+f"(acc[4]), "+f"(acc[5]),                           \
        "+f"(acc[6]), "+f"(acc[7]), "+f"(acc[8]), "+f"(acc[9]), "+f"(acc[10]), "+f"(acc[11]),                         \
        "+f"(acc[12]), "+f"(acc[13]), "+f"(acc[14]), "+f"(acc[15]), "+f"(acc[16]), "+f"(acc[17]),                     \
        "+f"(acc[18]), "+f"(acc[19]), "+f"(acc[20]), "+f"(acc[21]), "+f"(acc[22]), "+f"(acc[23]),                     \
        "+f"(acc[24]), "+f"(acc[25]), "+f"(acc[26]), "+f"(acc[27]), "+f"(acc[28]), "+f"(acc[29]),                     \
        "+f"(acc[30]), "+f"(acc[31]), "+f"(acc[32]), "+f"(acc[33]), "+f"(acc[34]), "+f"(acc[35]),                     \
        "+f"(acc[36]), "+f"(acc[37]), "+f"(acc[38]), "+f"(acc[39]), "+f"(acc[40]), "+f"(acc[41]),                     \
        "+f"(acc[42]), "+f"(acc[43]), "+f"(acc[44]), "+f"(acc[45]), "+f"(acc[46]), "+f"(acc[47]),                     \
        "+f"(acc[48]), "+f"(acc[49]), "+f"(acc[50]), "+f"(acc[51]), "+f"(acc[52]), "+f"(acc[53]),                     \
        "+f"(acc[54]), "+f"(acc[55]), "+f"(acc[56]), "+f"(acc[57]), "+f"(acc[58]), "+f"(acc[59]),                     \
        "+f"(acc[60]), "+f"(acc[61]), "+f"(acc[62]), "+f"(acc[63]), "+f"(acc[64]), "+f"(acc[65]),                     \
        "+f"(acc[66]), "+f"(acc[67]), "+f"(acc[68]), "+f"(acc[69]), "+f"(acc[70]), "+f"(acc[71]),                     \
        "+f"(acc[72]), "+f"(acc[73]), "+f"(acc[74]), "+f"(acc[75]), "+f"(acc[76]), "+f"(acc[77]),                     \
        "+f"(acc[78]), "+f"(acc[79]), "+f"(acc[80]), "+f"(acc[81]), "+f"(acc[82]), "+f"(acc[83]),                     \
        "+f"(acc[84]), "+f"(acc[85]), "+f"(acc[86]), "+f"(acc[87]), "+f"(acc[88]), "+f"(acc[89]),                     \
        "+f"(acc[90]), "+f"(acc[91]), "+f"(acc[92]), "+f"(acc[93]), "+f"(acc[94]), "+f"(acc[95])                      \
      : "l"(a), "l"(b), "r"(add))

// acc (64, 192) = or += a (64, 16) b^T (192, 16)
template <class T>
__device__ __forceinline__ void wgmma(Accumulators& acc, uint64_t a, uint64_t b, int add) {
  if constexpr (std::is_same_v<T, __half>) {
    CLIPSTEER_WGMMA("f16");
  } else {
    CLIPSTEER_WGMMA("bf16");
  }
}
#undef CLIPSTEER_WGMMA

// A list that is full stays at its last place and says so. A NaN reaches any threshold.
__device__ __forceinline__ void append_if(float value, float threshold, int column, Entry* entries, uint32_t& place,
                                          uint32_t last) {
  asm volatile(
      "{ .reg .pred p; .reg .b64 to; .reg .b32 next; setp.geu.f32 p, %1, %2; mad.wide.u32 to, %0, 8, %3; "
      "@p st.global.v2.b32 [to], {%4, %5}; add.u32 next, %0, 1; min.u32 next, next, %6; selp.b32 %0, next, %0, p; }"
      : "+r"(place)
      : "f"(value), "f"(threshold), "l"(entries), "r"(__float_as_int(value)), "r"(column), "r"(last));
}

#endif  // CLIPSTEER_SM90

__device__ __forceinline__ float widened(__half v) { return __half2float(v); }
__device__ __forceinline__ float widened(__nv_bfloat16 v) { return __bfloat162float(v); }

struct ProductArgs {
  int row_tiles, tiles, depth_steps;
  int n;             // columns of this product
  int bias_stride;
  int maxima, pitch, lists;
};

// One block: 128 rows and a range of column tiles. Sampling, it writes the maxima of groups of 8 columns; else it lists
// the values that reach the threshold of their row, each thread in lists of its own, so that nothing is contended for.
// One thread of warpgroup 0 fetches, kStages steps ahead; warpgroups 1 and 2 multiply 64 rows each, with two sets of
// accumulators, so that one tile's values are looked at while the tensor cores add up the next one's.
template <class T, bool kSample>
__global__ void __launch_bounds__(kThreads, 1)
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
      barrier_init(empty + 8 * s, 4 * kConsumers);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();

  // The shuffle tells the compiler that it is the same for a warp.
  const int warpgroup = __shfl_sync(0xffffffffu, int(threadIdx.x) / 128, 0);
  int stage = 0;
  uint32_t parity = 0;
  if (warpgroup == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x == 0) {
      for (int tile = 0; tile < tiles; ++tile) {
        for (int step = 0; step < args.depth_steps; ++step) {
          barrier_wait(empty + 8 * stage, parity ^ 1);
          const uint32_t to = base + stage * kStageBytes;
          barrier_expect(full + 8 * stage, kStageBytes);
          tma_load(to, &x_map, step * kDepth, row_tile * kTileRows, full + 8 * stage);
          tma_load(to + kRowsBytes, &w_map, step * kDepth, (first_tile + tile) * kTileColumns, full + 8 * stage);
          if (++stage == kStages) stage = 0, parity ^= 1;
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    const int consumer = warpgroup - 1, thread = int(threadIdx.x) % 128, lane = thread % 32;
    // acc[4 j + 2 i + c] belongs to row 16 warp + lane / 4 + 8 i and column 8 j + 2 (lane % 4) + c.
    const int64_t row = int64_t(row_tile) * kTileRows + consumer * 64 + thread / 32 * 16 + lane / 4;
    float threshold0 = 0, threshold1 = 0;
    // A thread lists values of two rows; where their lists begin, go on and end.
    const uint32_t begin0 = uint32_t((row * args.lists + 4 * segment + lane % 4) * args.pitch);
    const uint32_t begin1 = begin0 + uint32_t(8 * args.lists * args.pitch);
    uint32_t place0 = begin0, place1 = begin1;
    if constexpr (!kSample) {
      threshold0 = thresholds[row];
      threshold1 = thresholds[row + 8];
    }
    int held = 0, first_held = 0;
    // Gives the stages of all but the last `running` steps back, once these are done.
    const auto release = [&](int running) {
      for (; held > running; --held) {
        if (lane < 1) barrier_arrive(empty + 8 * first_held, uint32_t(lane));
        if (++first_held == kStages) first_held = 0;
      }
    };
    // One step: begins acc = or += 64 rows times a tile, for kDepth of d.
    const auto multiply = [&](Accumulators& acc, bool add) {
      barrier_wait(full + 8 * stage, parity);
      const uint64_t a = matrix_descriptor(base + stage * kStageBytes + consumer * (kRowsBytes / kConsumers));
      const uint64_t b = matrix_descriptor(base + stage * kStageBytes + kRowsBytes);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int part = 0; part < kDepth / 16; ++part) {
        // 16 columns are 32 bytes, counted in units of 16
        wgmma<T>(acc, a + 2 * part, b + 2 * part, add || part > 0);
      }
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      ++held;
      if (++stage == kStages) stage = 0, parity ^= 1;
    };
    // At one of kParts of a finished tile's values.
    const auto look = [&](Accumulators& acc, int tile, int part) {
      // The compiler must not look before the step that was begun last.
#pragma unroll
      for (int i = 0; i < kTileColumns / 2; ++i) {
        if (i * kParts / (kTileColumns / 2) == part) asm volatile("" : "+f"(acc[i])::"memory");
      }
      const float2* const pairs =
          reinterpret_cast<const float2*>(biases + (2 * consumer + tile % 2) * kTileColumns) + lane % 4;
      if constexpr (kSample) {
        float* const out = static_cast<float*>(entries) + row * args.maxima + (first_tile + tile) * kMaximaPerTile +
                           lane % 4 * (kMaximaPerTile / 4);
#pragma unroll
        for (int g = 0; g < kMaximaPerTile / 4; ++g) {
          if (g * kParts / (kMaximaPerTile / 4) != part) continue;
          float top0 = -INFINITY, top1 = -INFINITY;
#pragma unroll
          for (int j = 4 * g; j < 4 * g + 4; ++j) {
            const float2 add = pairs[4 * j];
            top0 = fmaxf(top0, fmaxf(acc[4 * j] + add.x, acc[4 * j + 1] + add.y));
            top1 = fmaxf(top1, fmaxf(acc[4 * j + 2] + add.x, acc[4 * j + 3] + add.y));
          }
          out[g] = top0;
          out[g + int64_t(8) * args.maxima] = top1;
        }
      } else {
        const uint32_t last0 = begin0 + uint32_t(args.pitch - 1), last1 = begin1 + uint32_t(args.pitch - 1);
        const int first_column = (first_tile + tile) * kTileColumns + 2 * (lane % 4);
#pragma unroll
        for (int j = 0; j < kTileColumns / 8; ++j) {
          if (j * kParts / (kTileColumns / 8) != part) continue;
          const float2 add = pairs[4 * j];
          const float v0 = acc[4 * j] + add.x, v1 = acc[4 * j + 1] + add.y;
          const float v2 = acc[4 * j + 2] + add.x, v3 = acc[4 * j + 3] + add.y;
          const bool any = !(v0 < threshold0) | !(v1 < threshold0) | !(v2 < threshold1) | !(v3 < threshold1);
          // One way for the whole warp: nearly always some thread has one.
          if (__any_sync(0xffffffffu, any)) {
            append_if(v0, threshold0, first_column + 8 * j, static_cast<Entry*>(entries), place0, last0);
            append_if(v2, threshold1, first_column + 8 * j, static_cast<Entry*>(entries), place1, last1);
            append_if(v1, threshold0, first_column + 8 * j + 1, static_cast<Entry*>(entries), place0, last0);
            append_if(v3, threshold1, first_column + 8 * j + 1, static_cast<Entry*>(entries), place1, last1);
          }
        }
      }
    };
    // The tensor cores are busy with a tile while `meanwhile` looks at the values of the one before it.
    const auto tile_product = [&](Accumulators& acc, int tile, auto meanwhile) {
      float tile_biases[2];  // on their way while the first steps run
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = (first_tile + tile) * kTileColumns + thread + 128 * i;
        // Columns past the end are never among the largest.
        tile_biases[i] = column >= args.n ? -INFINITY : bias ? widened(bias[int64_t(column) * args.bias_stride]) : 0.f;
      }
      multiply(acc, false);
      // The biases of the tile before are all written; those of the one before that are all read.
      asm volatile("bar.sync %0, 128;" ::"r"(1 + consumer) : "memory");
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        multiply(acc, true);
        meanwhile(part);
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        release(1);
      }
      float* const to = biases + (2 * consumer + tile % 2) * kTileColumns;
      to[thread] = tile_biases[0];
      if (thread < kTileColumns - 128) to[thread + 128] = tile_biases[1];
      for (int step = 1 + kParts; step < args.depth_steps; ++step) {
        multiply(acc, true);
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        release(1);
      }
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
      release(0);
    };
    const auto look_at_last = [&](Accumulators& acc) {
      asm volatile("bar.sync %0, 128;" ::"r"(1 + consumer) : "memory");
#pragma unroll
      for (int part = 0; part < kParts; ++part) look(acc, tiles - 1, part);
    };
    Accumulators even, odd;
    tile_product(even, 0, [](int) {});
    for (int tile = 1;; tile += 2) {
      if (tile >= tiles) {
        look_at_last(even);
        break;
      }
      tile_product(odd, tile, [&](int part) { look(even, tile - 1, part); });
      if (tile + 1 >= tiles) {
        look_at_last(odd);
        break;
      }
      tile_product(even, tile + 1, [&](int part) { look(odd, tile, part); });
    }
    if constexpr (!kSample) {
      counts[row * args.lists + 4 * segment + lane % 4] = place0 - begin0;
      counts[(row + 8) * args.lists + 4 * segment + lane % 4] = place1 - begin1;
    }
  }
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
    if (__reduce_add_sync(0xffffffffu, reach) >= rank) bound |= bit;
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
__global__ void __launch_bounds__(kMaxSelectThreads)
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
  const int width = ((args.n + args.segments - 1) / args.segments + kRedoColumns - 1) / kRedoColumns * kRedoColumns;
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
    for (int column = begin; column < end; column += kRedoColumns) {
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
        if (listed[r] > uint32_t(args.buffer - kRedoColumns)) cut(r);
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
  if (error == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // or the next launch would be blamed for it
  throw std::runtime_error(std::string("topk_encode: ") + what + ": " + cudaGetErrorString(error));
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

// The limit of shared memory belongs to the kernel, whoever calls: it is always set to the same `most`, or one thread
// could lower it between another's setting and launch.
template <class... Parameters, class... Args>
void start(const char* what, void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared, int most,
           cudaStream_t stream, const Args&... args) {
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
void launch(const EncodePlan& plan, const T* x, int64_t rows, const T* w, const T* bias, void* memory, T* acts,
            int64_t* indices, cudaStream_t stream) {
  const Workspace ws = workspace(plan, memory);
  const int64_t padded = (rows + kTileRows - 1) / kTileRows * kTileRows, item = sizeof(T);
  const int64_t sampled = (plan.n + plan.stride - 1) / plan.stride;
  const int row_tiles = int(padded / kTileRows);
  const CUtensorMap x_map = tensor_map(x, rows, plan.d, plan.d * item, kTileRows);
  const CUtensorMap w_map = tensor_map(w, plan.n, plan.d, plan.d * item, kTileColumns);
  const CUtensorMap sample_map = tensor_map(w, sampled, plan.d, plan.d * item * plan.stride, kTileColumns);
  // Beyond d both operands are zero; every part of a look needs its step.
  const int depth_steps = int(std::max<int64_t>((plan.d + kDepth - 1) / kDepth, kParts + 1));
  ProductArgs args{row_tiles, plan.sample_tiles, depth_steps, int(sampled), plan.stride,
                   plan.maxima, plan.pitch, plan.lists()};

  const auto product = [&](const char* what, auto kernel, int segments, const CUtensorMap& map) {
    start(what, kernel, row_tiles * segments, kThreads, kSharedBytes, kSharedBytes, stream, x_map, map, bias, args,
          ws.thresholds, ws.entries, ws.counts);
  };
  product("sample", product_kernel<T, true>, plan.sample_segments, sample_map);

  start("thresholds", plan.maxima <= 32 * 16 ? threshold_kernel<16> : threshold_kernel<kMaxMaxima / 32>, padded / 8,
        256, 0, 0, stream, static_cast<const float*>(ws.entries), plan.maxima, plan.rank, int(rows), int(padded),
        ws.thresholds, ws.again);

  args.tiles = plan.tiles, args.n = int(plan.n), args.bias_stride = 1;
  product("product", product_kernel<T, false>, plan.segments, w_map);

  const int64_t row_bytes = int64_t(plan.lists()) * plan.pitch * int64_t(sizeof(Entry));
  SelectArgs select{int(rows), int(plan.n), plan.k, plan.lists(), plan.pitch, plan.max_listed};
  const auto selection = [&](const char* what, auto kernel, int64_t blocks) {
    start(what, kernel, blocks, select.max_listed <= 1024 ? kSelectThreads : kMaxSelectThreads,
          2 * select.max_listed * kKeyBytes, kMaxSelectBytes, stream, select, ws.entries, row_bytes, ws.counts,
          plan.lists(), ws.thresholds, ws.again, acts, indices);
  };
  selection("selection", select_listed_kernel<T, false>, rows);

  // As often as not there is no row left, and these two return at once.
  const RedoArgs redo{int(plan.n), int(plan.d), plan.k, plan.redo_segments, plan.redo_buffer};
  const int64_t most = (rows + kRedoRows - 1) / kRedoRows * plan.redo_segments;
  start("rows again", redo_kernel<T>, std::min<int64_t>(most, 264), kRedoThreads,
        kRedoRows * plan.redo_buffer * kKeyBytes, kMaxRedoBytes, stream, redo, x, w, bias, ws.again, ws.entries,
        row_bytes, ws.counts, plan.lists());
  select.lists = plan.redo_segments, select.pitch = plan.k;
  select.max_listed = power_of_two(int64_t(plan.redo_segments) * plan.k);
  selection("selection again", select_listed_kernel<T, true>, std::min<int64_t>(rows, 528));
}

}  // namespace clipsteer::cuda::sm90
