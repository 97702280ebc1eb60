// Builds kernels.h for each instruction set and picks one when the library is first used.
#include "cpu.h"

#include <cstdlib>
#include <functional>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(CLIPSTEER_PORTABLE)
#define CLIPSTEER_X86 1
#include <immintrin.h>
#endif

#define CLIPSTEER_LEVEL 0
#define ISA portable
#define TARGET
#include "kernels.h"
#undef CLIPSTEER_LEVEL
#undef ISA
#undef TARGET

#ifdef CLIPSTEER_X86
#define CLIPSTEER_LEVEL 1
#define ISA avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#include "kernels.h"
#undef CLIPSTEER_LEVEL
#undef ISA
#undef TARGET

#define CLIPSTEER_LEVEL 2
#define ISA avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#include "kernels.h"
#undef CLIPSTEER_LEVEL
#undef ISA
#undef TARGET
#endif

namespace clipsteer {
namespace {

const Kernels kPortable = {
    0, portable::filter32, portable::filter64, portable::seed32, portable::seed64, portable::axpy32, portable::axpy64, portable::dot32, portable::dot64, portable::widen_bf16, portable::widen_f16, portable::narrow_bf16, portable::narrow_f16};

#ifdef CLIPSTEER_X86
const Kernels kAvx2 = {
    1, avx2::filter32, avx2::filter64, avx2::seed32, avx2::seed64, avx2::axpy32, avx2::axpy64, avx2::dot32, avx2::dot64, avx2::widen_bf16, avx2::widen_f16, avx2::narrow_bf16, avx2::narrow_f16};

// A block of eight doubles is filtered as fast in AVX2: the matrix product takes the time there.
const Kernels kAvx512 = {
    2, avx512::filter32, avx2::filter64, avx512::seed32, avx512::seed64, avx512::axpy32, avx512::axpy64, avx512::dot32, avx512::dot64, avx512::widen_bf16, avx512::widen_f16, avx512::narrow_bf16, avx512::narrow_f16};
#endif

const Kernels& choose() {
#ifdef CLIPSTEER_X86
  const char* wanted = std::getenv("CLIPSTEER_CPU_ISA");
  const std::string name = wanted ? wanted : "";
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && name != "avx2" && name != "portable") return kAvx512;
  if (has_avx2 && name != "portable") return kAvx2;
#endif
  return kPortable;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

int64_t isa_level() { return kernels().level; }

}  // namespace clipsteer
