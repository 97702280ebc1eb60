// The product of the fused encode: x W^T in registers, of which only maxima, or what reaches a
// threshold, is written.
#pragma once

#include "plan.h"
#include "ptx.cuh"

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace clipsteer::cuda::sm90 {

constexpr int kDepth = 64;  // of a stage: 128 bytes, the widest swizzle
constexpr int kStages = 5;
// In which the values of a tile are looked at, one during each step of the next tile.
constexpr int kParts = 6;
constexpr uint32_t kRowsBytes = kTileRows * kDepth * 2;
constexpr uint32_t kColumnsBytes = kTileColumns * kDepth * 2;
constexpr uint32_t kStageBytes = kRowsBytes + kColumnsBytes;
constexpr int kConsumers = 2;  // warpgroups, 64 rows each
constexpr int kThreads = 128 * (kConsumers + 1);
// A swizzled tile begins at a multiple of 1024 bytes; dynamic shared memory need not.
constexpr uint32_t kSharedBytes =
    1024 + kStages * kStageBytes + kConsumers * 2 * kTileColumns * 4 + 16 * kStages;

__device__ __forceinline__ float widened(__half v) { return __half2float(v); }
__device__ __forceinline__ float widened(__nv_bfloat16 v) { return __bfloat162float(v); }

struct ProductArgs {
  int row_tiles, tiles, depth_steps;
  int n;  // columns of this product
  int bias_stride;
  int maxima, pitch, lists;
};

// One block: 128 rows and a range of column tiles. Sampling, it writes the maxima of groups of 8
// columns; else it lists the values that reach the threshold of their row, each thread in lists of
// its own, so that nothing is contended for. One thread of warpgroup 0 fetches, kStages steps
// ahead; warpgroups 1 and 2 multiply 64 rows each, with two sets of accumulators, so that one
// tile's values are looked at while the tensor cores add up the next one's.
template <class T, bool kSample>
__global__ void __launch_bounds__(kThreads, 1)
    product_kernel(const __grid_constant__ CUtensorMap x_map,
                   const __grid_constant__ CUtensorMap w_map, const T* bias, const ProductArgs args,
                   const float* thresholds, void* entries, uint32_t* counts) {
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
          tma_load(to + kRowsBytes, &w_map, step * kDepth, (first_tile + tile) * kTileColumns,
                   full + 8 * stage);
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
      const uint64_t a =
          matrix_descriptor(base + stage * kStageBytes + consumer * (kRowsBytes / kConsumers));
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
          reinterpret_cast<const float2*>(biases + (2 * consumer + tile % 2) * kTileColumns) +
          lane % 4;
      if constexpr (kSample) {
        float* const out = static_cast<float*>(entries) + row * args.maxima +
                           (first_tile + tile) * kMaximaPerTile + lane % 4 * (kMaximaPerTile / 4);
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
        const uint32_t last0 = begin0 + uint32_t(args.pitch - 1),
                       last1 = begin1 + uint32_t(args.pitch - 1);
        const int first_column = (first_tile + tile) * kTileColumns + 2 * (lane % 4);
#pragma unroll
        for (int j = 0; j < kTileColumns / 8; ++j) {
          if (j * kParts / (kTileColumns / 8) != part) continue;
          const float2 add = pairs[4 * j];
          const float v0 = acc[4 * j] + add.x, v1 = acc[4 * j + 1] + add.y;
          const float v2 = acc[4 * j + 2] + add.x, v3 = acc[4 * j + 3] + add.y;
          const bool any =
              !(v0 < threshold0) | !(v1 < threshold0) | !(v2 < threshold1) | !(v3 < threshold1);
          // One way for the whole warp: nearly always some thread has one.
          if (__any_sync(0xffffffffu, any)) {
            append_if(v0, threshold0, first_column + 8 * j, static_cast<Entry*>(entries), place0,
                      last0);
            append_if(v2, threshold1, first_column + 8 * j, static_cast<Entry*>(entries), place1,
                      last1);
            append_if(v1, threshold0, first_column + 8 * j + 1, static_cast<Entry*>(entries),
                      place0, last0);
            append_if(v3, threshold1, first_column + 8 * j + 1, static_cast<Entry*>(entries),
                      place1, last1);
          }
        }
      }
    };
    // The tensor cores work on a tile while `meanwhile` looks at the values of the one before it.
    const auto tile_product = [&](Accumulators& acc, int tile, auto meanwhile) {
      float tile_biases[2];  // on their way while the first steps run
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = (first_tile + tile) * kTileColumns + thread + 128 * i;
        // Columns past the end are never among the largest.
        tile_biases[i] = column >= args.n ? -INFINITY
                         : bias           ? widened(bias[int64_t(column) * args.bias_stride])
                                          : 0.f;
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

}  // namespace clipsteer::cuda::sm90
