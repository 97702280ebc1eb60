// How a fused encode is laid out: tiles, sample, threshold rank and list capacities. Plain C++,
// tested on the CPU.
//
// A row's threshold is the rank-th largest of the maxima of groups of 8 sampled columns, every
// stride-th one. It need not be proven: a row whose lists hold at least k entries, all of them,
// holds the k largest. The rank makes fewer than k (and the capacities make an overflow) so rare on
// columns in no special order that such rows cost nothing on average; they are computed again,
// exactly.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace clipsteer {

constexpr int kTileRows = 128;
constexpr int kTileColumns = 192;
constexpr int kSampleGroup = 8;
constexpr int kMaximaPerTile = kTileColumns / kSampleGroup;
constexpr int kMaxMaxima = 1024;  // a row's maxima live in the registers of one warp
constexpr int kMaxSampled = kMaxMaxima / kMaximaPerTile * kTileColumns;
constexpr int kFusedMaxK = 512;
constexpr int kRedoColumns = 256;  // at a time
constexpr int kMaxListed = 4096;
constexpr int64_t kStride = 16;  // of the sampled columns, where it fits
constexpr double kRankSigmas = 4;
constexpr int64_t kMaxBytes = int64_t(29) << 20;  // of one go, beside the results

struct EncodePlan {
  int64_t rows = 0;  // of x in one go, the last go may have fewer; 0: not for this shape
  int64_t n = 0, d = 0;
  int k = 0;
  int stride = 0;  // of the sampled columns
  int rank = 0;
  int maxima = 0;  // a row
  int sample_segments = 0, segments = 0;  // column ranges, a block each
  int sample_tiles = 0, tiles = 0;        // of a segment
  int pitch = 0;          // entries of one thread's list: one of 4 a row and segment
  int max_listed = 0;     // keys of a row that are sorted, a power of two
  int redo_segments = 0;  // column ranges of a row that is computed again
  int redo_buffer = 0;    // keys, a power of two

  int64_t row_tiles() const { return (rows + kTileRows - 1) / kTileRows; }
  int64_t padded_rows() const { return row_tiles() * kTileRows; }
  int lists() const { return 4 * segments; }
  int64_t entry_bytes() const {
    return padded_rows() * std::max<int64_t>(int64_t(lists()) * pitch * 8, int64_t(maxima) * 4);
  }
  // Entries (or maxima, before there are any), counts, thresholds, rows to do again, their number.
  int64_t bytes() const {
    return entry_bytes() + padded_rows() * (4 * int64_t(lists()) + 4 + 4) + 4;
  }
};

constexpr int power_of_two(int64_t at_least) {
  int size = 2;
  while (size < at_least) size *= 2;
  return size;
}

// The number of column ranges that keeps `processors` blocks at a time busy for the shortest time.
inline int best_segments(int64_t row_tiles, int64_t tiles, int processors) {
  int64_t best = INT64_MAX;
  int chosen = 1;
  for (int64_t s = 1; s <= std::min<int64_t>(tiles, 4 * processors); ++s) {
    const int64_t waves = (row_tiles * s + processors - 1) / processors;
    // A block costs about a quarter of a tile to begin.
    const int64_t cost = waves * (4 * ((tiles + s - 1) / s) + 1);
    if (cost < best) {
      best = cost;
      chosen = int(s);
    }
  }
  return chosen;
}

inline EncodePlan encode_plan(int64_t batch, int64_t n, int64_t d, int64_t k, int processors) {
  EncodePlan p;
  if (batch < 1 || k < 1 || k > kFusedMaxK || n >= INT32_MAX || d < 8 || d % 8 != 0) return p;
  int64_t stride = std::max<int64_t>(kStride, (n + kMaxSampled - 1) / kMaxSampled);
  double rank = 0, groups = 0;
  for (; stride >= 1; stride /= 2) {
    const double winners = double(k) / double(stride);
    rank = std::ceil(winners + kRankSigmas * std::sqrt(winners) + 4);
    groups = double(n) / double(stride * kSampleGroup);
    if (groups >= 6 * rank) break;
  }
  if (stride < 1) return p;
  const int64_t sampled = (n + stride - 1) / stride;
  const int64_t sample_tiles = (sampled + kTileColumns - 1) / kTileColumns;
  const double listed = rank * (1 + rank / groups) * double(stride);
  if (sample_tiles * kMaximaPerTile > kMaxMaxima || listed * 8 > double(n)) return p;
  const double most_listed = listed * (1 + 6.5 / std::sqrt(rank));
  if (most_listed > kMaxListed) return p;
  p.n = n, p.d = d, p.k = int(k);
  p.stride = int(stride);
  p.rank = int(rank);
  p.maxima = int(sample_tiles) * kMaximaPerTile;
  p.max_listed = power_of_two(int64_t(most_listed));
  p.redo_buffer = power_of_two(k + kRedoColumns);
  const int64_t tiles = (n + kTileColumns - 1) / kTileColumns;
  for (int64_t parts = 1;; ++parts) {
    p.rows = (batch + parts - 1) / parts;
    if (p.rows < batch) p.rows = p.padded_rows();
    p.sample_segments = best_segments(p.row_tiles(), sample_tiles, processors);
    p.sample_tiles = int((sample_tiles + p.sample_segments - 1) / p.sample_segments);
    p.sample_segments = int((sample_tiles + p.sample_tiles - 1) / p.sample_tiles);
    p.segments = best_segments(p.row_tiles(), tiles, processors);
    p.tiles = int((tiles + p.segments - 1) / p.segments);
    p.segments = int((tiles + p.tiles - 1) / p.tiles);
    // A thread's share, its own scatter and the threshold's.
    const double share = listed * p.tiles / double(tiles) / 4;
    p.pitch = int(share + 5.5 * std::sqrt(share + share * share / rank) + 6 + 3) / 4 * 4;
    p.pitch = std::max(p.pitch, 8);
    if (p.bytes() <= kMaxBytes || p.rows <= kTileRows) break;
  }
  p.redo_segments =
      int(std::min<int64_t>({int64_t(p.lists()) * p.pitch / k, p.lists(), kMaxListed / k, tiles}));
  if (p.redo_segments < 1) p.rows = 0;
  return p;
}

}  // namespace clipsteer
