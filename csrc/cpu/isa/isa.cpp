// Compiles table.h once per instruction set, and picks one when the library is first used.
#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(CLIPSTEER_PORTABLE)
#define CLIPSTEER_X86 1
#include <cpuid.h>
#include <immintrin.h>
#if defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#define CLIPSTEER_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#define CLIPSTEER_LEVEL 0
#define ISA portable
#define TARGET
#include "table.h"

#ifdef CLIPSTEER_X86
#define CLIPSTEER_LEVEL 1
#define ISA avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#include "table.h"

#define CLIPSTEER_LEVEL 2
#define ISA avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#include "table.h"

#include "screen.h"
#if defined(__clang__) || __GNUC__ >= 10
#define CLIPSTEER_BF16 1
#include "halves.h"
#include "pairs.h"
#ifdef CLIPSTEER_AMX
#include "tiles.h"
#endif
#endif
#endif

namespace clipsteer {
namespace {

constexpr Isa kPortable = portable::table(0);
#ifdef CLIPSTEER_X86
constexpr Isa kAvx2 = avx2::table(1);
constexpr Isa kAvx512 = avx512::table(2);

constexpr Screening screening_by(decltype(Screening::screen) screen) {
  return {{vnni::quantise<float>}, {vnni::quantise<BFloat16>}, {vnni::quantise<Half>}, screen};
}

constexpr Screening kBytes = screening_by(vnni::screen);

// Half precision's conversions; older clang does not know them by name.
bool converts_halves() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}

// Of processors that have it, and of no other; read once.
PairProducts pairs() {
#ifdef CLIPSTEER_BF16
  if (__builtin_cpu_supports("avx512bf16")) return {bf16::block, bf16::inner, bf16::weave};
#endif
  return {};
}

PairScreening screening_by_pairs() {
#ifdef CLIPSTEER_BF16
  if (__builtin_cpu_supports("avx512bf16")) return {bf16::squares, bf16::sift};
#endif
  return {};
}
#ifdef CLIPSTEER_AMX
constexpr Screening kTiles = screening_by(vnni::screen_tiles);

// What AMX multiplies, as bits of the processor's description.
constexpr int kTilesOfPairs = 22, kTilesOfBytes = 25;

// Whether the processor has AMX for these and the kernel lets this process use it.
bool tiles_granted(int numbers) {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> numbers & 1)) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

PairProducts pairs_on_tiles() {
  PairProducts found = pairs();
#ifdef CLIPSTEER_BF16
  if (found.block && tiles_granted(kTilesOfPairs)) {
    found.tiles = bf16::tiles;
    found.tiles_of_two = bf16::tiles_of_two;
    found.tiles_of_both = bf16::tiles_of_both;
    found.split = bf16::split;
    found.halve = bf16::halve;
    found.split_columns = bf16::split_columns;
  }
#endif
  return found;
}

PairScreening screening_on_tiles() {
  PairScreening found = screening_by_pairs();
#ifdef CLIPSTEER_BF16
  if (found.sift && tiles_granted(kTilesOfPairs)) found.sift_tiles = bf16::sift_tiles;
#endif
  return found;
}
#endif

// The highest level that CLIPSTEER_CPU_ISA allows.
int highest_level() {
  const char* wanted = std::getenv("CLIPSTEER_CPU_ISA");
  const std::string name = wanted ? wanted : "";
  if (name.empty() || name == "amx") return 4;
  if (name == "avx512") return 3;
  if (name == "avx512f") return 2;
  if (name == "avx2") return 1;
  if (name == "portable") return 0;
  throw std::runtime_error("CLIPSTEER_CPU_ISA must be portable, avx2, avx512f, avx512 or amx, got " + name);
}
#endif

Isa choose() {
#ifdef CLIPSTEER_X86
  const int highest = highest_level();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        converts_halves();
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (highest >= 2 && has_avx512) {
    if (highest == 2 || !__builtin_cpu_supports("avx512vnni")) return kAvx512;
#ifdef CLIPSTEER_AMX
    if (highest >= 4 && tiles_granted(kTilesOfBytes)) {
      return avx512::table(3, kTiles, pairs_on_tiles(), screening_on_tiles());
    }
#endif
    return avx512::table(2, kBytes, pairs(), screening_by_pairs());
  }
  if (highest >= 1 && has_avx2) return kAvx2;
#endif
  return kPortable;
}

}  // namespace

const Isa& isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace clipsteer
