// Builds the headers of this folder for each instruction set and picks one set when the library is first used.
#include "../cpu.h"

#include <cstdlib>
#include <functional>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(CLIPSTEER_PORTABLE)
#define CLIPSTEER_X86 1
#include <immintrin.h>
#if defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#define CLIPSTEER_AMX 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#define CLIPSTEER_LEVEL 0
#define ISA portable
#define TARGET
#include "kernels.h"
#include "drift.h"
#include "drrho.h"
#include "adam.h"
#undef CLIPSTEER_LEVEL
#undef ISA
#undef TARGET

#ifdef CLIPSTEER_X86
#define CLIPSTEER_LEVEL 1
#define ISA avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#include "kernels.h"
#include "drift.h"
#include "drrho.h"
#include "adam.h"
#include "blocks.h"
#undef CLIPSTEER_LEVEL
#undef ISA
#undef TARGET

#define CLIPSTEER_LEVEL 2
#define ISA avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#include "kernels.h"
#include "drift.h"
#include "drrho.h"
#include "adam.h"
#include "blocks.h"
#undef CLIPSTEER_LEVEL
#undef ISA
#undef TARGET
#include "screen.h"
#endif

namespace clipsteer {
namespace {

#define TABLE(level, isa, ...)                                                                              \
  {level,       isa::filter32, isa::filter64,   isa::seed32,    isa::seed64,      isa::axpy32, isa::axpy64, \
   isa::dot32, isa::dot64,    isa::distance32, isa::distance64, isa::repel32, isa::repel64,               \
   isa::widen_bf16, isa::widen_f16, isa::narrow_bf16, isa::narrow_f16,                                    \
   isa::log_weights32, isa::log_weights64, isa::weights32, isa::weights64,                                  \
   isa::maxima32, isa::maxima64, isa::pair_sums32, isa::pair_sums64, isa::pair_weights32, isa::pair_weights64, \
   isa::adam32, isa::adam64, __VA_ARGS__}
#define BLOCKS(level, isa)                                                                                  \
  kBlockBytes<level>, isa::block32, isa::block64, isa::inner32, isa::inner64, isa::pack32, isa::pack64

// Elsewhere torch's GEMM has the better inner loop.
const Kernels kPortable = TABLE(0, portable, 0, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr);
#ifdef CLIPSTEER_X86
const Kernels kAvx2 = TABLE(1, avx2, BLOCKS(1, avx2), nullptr, nullptr, nullptr);
const Kernels kAvx512 = TABLE(2, avx512, BLOCKS(2, avx512), nullptr, nullptr, nullptr);
const Kernels kVnni = TABLE(2, avx512, BLOCKS(2, avx512), vnni::quantise, vnni::screen, vnni::dots);
#ifdef CLIPSTEER_AMX
const Kernels kAmx = TABLE(3, avx512, BLOCKS(2, avx512), vnni::quantise, vnni::screen_tiles, vnni::dots);

// Whether the processor has AMX for bytes and the kernel lets this process use it.
bool tiles_granted() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 25 & 1)) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif
#endif

const Kernels& choose() {
#ifdef CLIPSTEER_X86
  const char* wanted = std::getenv("CLIPSTEER_CPU_ISA");
  const std::string name = wanted ? wanted : "";
  if (!name.empty() && name != "portable" && name != "avx2" && name != "avx512" && name != "amx") {
    throw std::runtime_error("CLIPSTEER_CPU_ISA must be portable, avx2, avx512 or amx, got " + name);
  }
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && name != "avx2" && name != "portable") {
    if (!__builtin_cpu_supports("avx512vnni")) return kAvx512;
#ifdef CLIPSTEER_AMX
    if (name != "avx512" && tiles_granted()) return kAmx;
#endif
    return kVnni;
  }
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
