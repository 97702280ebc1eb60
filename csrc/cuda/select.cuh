// The k largest of a row, exactly: plain C++ over a team of threads, so that the CPU tests run what the GPU runs.
//
// The k-th largest of the maxima of column groups is a lower bound of the k-th largest value, so only columns that
// reach it are collected and sorted. Where too many reach it (ties, or winners crowded into few groups) the k-th
// largest key is found digit by digit instead. Keys are distinct, so the result does not depend on thread order.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define CLIPSTEER_HD __host__ __device__ __forceinline__
#else
#define CLIPSTEER_HD inline
#endif

namespace clipsteer {

constexpr int kGroups = 2048;
constexpr int kCapacity = 4096;  // keys that fit beside the rest into 48 KB of shared memory
constexpr int kSelectMaxK = 2048;
constexpr uint32_t kNaN = 0xffffffffu;

// float -> uint32 in the same order: -0 ties with 0, NaN is greatest, and no value maps to 0.
CLIPSTEER_HD uint32_t ordered(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return kNaN;
  return (bits >> 31) ? 0x80000000u - magnitude : 0x80000000u + magnitude;
}

// The relu is exact on the ordered form too.
CLIPSTEER_HD float relu_of(uint32_t order) {
  const uint32_t bits = order == kNaN ? 0x7fc00000u : order > 0x80000000u ? order - 0x80000000u : 0u;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// Greater value first, then the lower column.
CLIPSTEER_HD uint64_t key_of(float value, uint32_t column) { return uint64_t(ordered(value)) << 32 | ~column; }
CLIPSTEER_HD uint32_t order_of(uint64_t key) { return uint32_t(key >> 32); }
CLIPSTEER_HD uint32_t column_of(uint64_t key) { return ~uint32_t(key); }

struct DigitScratch {
  uint32_t histogram[256];
  uint32_t partial[16];
  uint32_t count;
  uint32_t digit;
  uint32_t below;  // how many of the wanted remain to be found among the items that have the digit
};

struct SelectScratch : DigitScratch {
  uint64_t keys[kCapacity];
  uint32_t maxima[kGroups];
};

// The digit of the wanted-th largest item, from the histogram of all digits.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class Team>
CLIPSTEER_HD void find_digit(const Team& team, uint32_t wanted, DigitScratch& s) {
  for (uint32_t i = team.rank(); i < 16; i += team.size()) {
    uint32_t sum = 0;
    for (int j = 0; j < 16; ++j) sum += s.histogram[16 * i + j];
    s.partial[i] = sum;
  }
  team.sync();
  if (team.rank() == 0) {
    uint32_t left = wanted;
    int block = 15;
    while (block > 0 && s.partial[block] < left) left -= s.partial[block--];
    int digit = 16 * block + 15;
    while (digit > 16 * block && s.histogram[digit] < left) left -= s.histogram[digit--];
    s.digit = uint32_t(digit);
    s.below = left;
  }
  team.sync();
}

// The k-th largest of key(0) ... key(count - 1) as far as its digits down to bit `last_shift` say: a lower bound, and
// the key itself when that is 0. Every thread of the team gets the result.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class Team, class KeyAt>
CLIPSTEER_HD uint64_t radix_kth(const Team& team, KeyAt key, uint32_t count, uint32_t k, int first_shift,
                                int last_shift, SelectScratch& s) {
  uint64_t prefix = 0;
  uint32_t wanted = k;
  for (int shift = first_shift; shift >= last_shift; shift -= 8) {
    for (uint32_t i = team.rank(); i < 256; i += team.size()) s.histogram[i] = 0;
    team.sync();
    for (uint32_t i = team.rank(); i < count; i += team.size()) {
      const uint64_t item = key(i);
      // A shift by 64 has no meaning, so the first digit has no prefix to compare.
      if (shift == 56 || item >> (shift + 8) == prefix >> (shift + 8)) team.add(s.histogram[(item >> shift) & 255], 1u);
    }
    team.sync();
    find_digit(team, wanted, s);
    prefix |= uint64_t(s.digit) << shift;
    wanted = s.below;
    team.sync();
  }
  return prefix;
}

#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class Team>
CLIPSTEER_HD void sort_descending(const Team& team, uint64_t* keys, uint32_t size) {
  for (uint32_t run = 2; run <= size; run *= 2) {
    for (uint32_t step = run / 2; step > 0; step /= 2) {
      for (uint32_t t = team.rank(); t < size / 2; t += team.size()) {
        const uint32_t low = t % step + t / step * 2 * step;
        const uint64_t a = keys[low], b = keys[low + step];
        if ((a < b) == ((low & run) == 0)) {
          keys[low] = b;
          keys[low + step] = a;
        }
      }
      team.sync();
    }
  }
}

// Leaves the k largest of `count` >= k keys, whose orders lie in [low, high], in kept[0 .. k), descending. Only keys of
// the upper of 256 equal ranges, as many as hold k, are sorted. `kept` has room for a power of two >= count, >= 2.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class Team>
CLIPSTEER_HD void sort_largest(const Team& team, const uint64_t* keys, uint32_t count, uint32_t k, uint32_t low,
                               uint32_t high, uint64_t* kept, DigitScratch& s) {
  int shift = 0;
  while ((high - low) >> shift > 255) ++shift;
  for (uint32_t i = team.rank(); i < 256; i += team.size()) s.histogram[i] = 0;
  if (team.rank() == 0) s.count = 0;
  team.sync();
  for (uint32_t i = team.rank(); i < count; i += team.size()) {
    team.add(s.histogram[(order_of(keys[i]) - low) >> shift], 1u);
  }
  team.sync();
  find_digit(team, k, s);
  for (uint32_t i = team.rank(); i < count; i += team.size()) {
    if ((order_of(keys[i]) - low) >> shift >= s.digit) kept[team.add(s.count, 1u)] = keys[i];
  }
  team.sync();
  uint32_t size = 2;
  while (size < s.count) size *= 2;
  for (uint32_t i = s.count + team.rank(); i < size; i += team.size()) kept[i] = 0;
  team.sync();
  sort_descending(team, kept, size);
}

// Leaves the k largest of value(0) ... value(n - 1) as keys in s.keys[0 .. k), descending. 1 <= k <= min(n, kSelectMaxK).
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class Team, class ValueAt>
CLIPSTEER_HD void select_row(const Team& team, ValueAt value, uint32_t n, uint32_t k, SelectScratch& s) {
  uint64_t bound = 1;
  if (n > kCapacity) {
    for (uint32_t group = team.rank(); group < kGroups; group += team.size()) {
      uint32_t best = 0;
#ifdef __CUDACC__
#pragma unroll 4
#endif
      for (uint32_t i = group; i < n; i += kGroups) {
        const uint32_t order = ordered(value(i));
        best = order > best ? order : best;
      }
      s.maxima[group] = best;
    }
    team.sync();
    // Two digits suffice for a bound.
    const auto maximum = [&s](uint32_t i) { return uint64_t(s.maxima[i]); };
    bound = radix_kth(team, maximum, kGroups, k, 24, 16, s) << 32;
    bound = bound ? bound : 1;
  }
  if (team.rank() == 0) s.count = 0;
  team.sync();
  for (uint32_t i = team.rank(); i < n; i += team.size()) {
    const uint64_t key = key_of(value(i), i);
    if (key >= bound) {
      const uint32_t slot = team.add(s.count, 1u);
      if (slot < kCapacity) s.keys[slot] = key;
    }
  }
  team.sync();
  uint32_t count = s.count;
  team.sync();
  if (count > kCapacity) {
    const auto key = [&value](uint32_t i) { return key_of(value(i), i); };
    const uint64_t kth = radix_kth(team, key, n, k, 56, 0, s);
    if (team.rank() == 0) s.count = 0;
    team.sync();
    for (uint32_t i = team.rank(); i < n; i += team.size()) {
      const uint64_t item = key_of(value(i), i);
      if (item >= kth) s.keys[team.add(s.count, 1u)] = item;
    }
    team.sync();
    count = k;
  }
  uint32_t size = 2;
  while (size < count) size *= 2;
  for (uint32_t i = count + team.rank(); i < size; i += team.size()) s.keys[i] = 0;
  team.sync();
  sort_descending(team, s.keys, size);
}

}  // namespace clipsteer

#ifdef __CUDACC__
namespace clipsteer::cuda {

// A block of threads as such a team.
struct Block {
  __device__ uint32_t rank() const { return threadIdx.x; }
  __device__ uint32_t size() const { return blockDim.x; }
  __device__ void sync() const { __syncthreads(); }
  __device__ uint32_t add(uint32_t& counter, uint32_t amount) const {
    return atomicAdd(&counter, amount);
  }
};

}  // namespace clipsteer::cuda
#endif
