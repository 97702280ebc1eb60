// Writing past the cache, and into pages that nobody has touched yet.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace clipsteer {

// Written past the cache: these rows are not read again soon, and a line need not be fetched to be overwritten.
inline void stream_zero(void* dst, int64_t bytes) {
  char* p = static_cast<char*>(dst);
#if defined(__SSE2__)
  const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<uintptr_t>(p) & 63);
  std::memset(p, 0, head);
  p += head;
  bytes -= head;
  const __m128i zero = _mm_setzero_si128();
  for (; bytes >= 64; p += 64, bytes -= 64) {
    for (int i = 0; i < 64; i += 16) _mm_stream_si128(reinterpret_cast<__m128i*>(p + i), zero);
  }
#endif
  std::memset(p, 0, bytes);
}

inline void stream_copy(void* dst, const void* src, int64_t bytes) {
  char* p = static_cast<char*>(dst);
  const char* q = static_cast<const char*>(src);
#if defined(__SSE2__)
  const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<uintptr_t>(p) & 63);
  std::memcpy(p, q, head);
  p += head;
  q += head;
  bytes -= head;
  for (; bytes >= 64; p += 64, q += 64, bytes -= 64) {
    for (int i = 0; i < 64; i += 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(p + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(q + i)));
    }
  }
#endif
  std::memcpy(p, q, bytes);
}

inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// A fresh 151 MB costs more in 4 KiB page faults than in arithmetic; this is only a hint.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t(2) << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + 4095) & ~uintptr_t(4095);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~uintptr_t(4095);
  if (end > begin && end - begin >= 4 * kHuge) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace clipsteer
