// The instructions that the fused encode is made of: barriers in shared memory, TMA, wgmma, mma
// and stores under a condition.
#pragma once

#include "plan.h"

#include <cuda.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace clipsteer::cuda::sm90 {

// A value that reached the threshold of its row.
struct alignas(8) Entry {
  float value;
  int column;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CLIPSTEER_SM90 1
#endif

#ifdef CLIPSTEER_SM90

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// `block` is 0, this one, as there are no clusters. With an address in shared::cta, or a constant
// block, ptxas orders the instructions of the product differently: this is the order that was
// measured.
__device__ __forceinline__ void barrier_arrive(uint32_t barrier, uint32_t block) {
  asm volatile(
      "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; "
      "mbarrier.arrive.shared::cluster.b64 _, [there]; }"
      :
      : "r"(barrier), "r"(block)
      : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  do {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; "
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

__device__ __forceinline__ void tma_load(uint32_t to, const CUtensorMap* map, int column, int row,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];"
      :
      : "r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// A thread's: of a tile of 64 rows, 4 for every 8 columns.
using Accumulators = float[kTileColumns / 2];

// Rows of 128 bytes, 8 of them a swizzle pattern of 1024 bytes.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address) {
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 |
         uint64_t(1) << 62;
}

#define CLIPSTEER_ACC8(i)                                                               \
  "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3]), "+f"(acc[i + 4]), \
      "+f"(acc[i + 5]), "+f"(acc[i + 6]), "+f"(acc[i + 7])
#define CLIPSTEER_WGMMA(TYPE)                                                             \
  asm volatile(                                                                           \
      "{ .reg .pred p; setp.ne.b32 p, %98, 0; "                                           \
      "wgmma.mma_async.sync.aligned.m64n192k16.f32." TYPE "." TYPE " "                    \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "  \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "  \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "  \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "  \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, " \
      "%96, %97, p, 1, 1, 0, 0; }"                                                        \
      : CLIPSTEER_ACC8(0), CLIPSTEER_ACC8(8), CLIPSTEER_ACC8(16), CLIPSTEER_ACC8(24),     \
        CLIPSTEER_ACC8(32), CLIPSTEER_ACC8(40), CLIPSTEER_ACC8(48), CLIPSTEER_ACC8(56),   \
        CLIPSTEER_ACC8(64), CLIPSTEER_ACC8(72), CLIPSTEER_ACC8(80), CLIPSTEER_ACC8(88)    \
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
#undef CLIPSTEER_ACC8

// A list that is full stays at its last place and says so. A NaN reaches any threshold.
__device__ __forceinline__ void append_if(float value, float threshold, int column, Entry* entries,
                                          uint32_t& place, uint32_t last) {
  asm volatile(
      "{ .reg .pred p; .reg .b64 to; .reg .b32 next; setp.geu.f32 p, %1, %2; "
      "mad.wide.u32 to, %0, 8, %3; @p st.global.v2.b32 [to], {%4, %5}; add.u32 next, %0, 1; "
      "min.u32 next, next, %6; selp.b32 %0, next, %0, p; }"
      : "+r"(place)
      : "f"(value), "f"(threshold), "l"(entries), "r"(__float_as_int(value)), "r"(column),
        "r"(last));
}

#endif  // CLIPSTEER_SM90

// acc (16, 8) += a (16, 16) b^T (8, 16); nothing where the kernels that call it never run.
template <class T>
__device__ __forceinline__ void mma(float (&acc)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                    uint32_t a3, uint32_t b0, uint32_t b1) {
#ifdef CLIPSTEER_SM90
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
#endif
}

}  // namespace clipsteer::cuda::sm90
