// topk_encode in int8 first: most columns are ruled out by a proven bound, the rest is computed in float32.
#include "topk_encode.h"

namespace clipsteer {
namespace {

using torch::stable::parallel_for;

// Scales 2^e per dimension, in the middle between those that would level x and those that would level W, and their
// inverses. They only decide how tight the bounds are, so a sample of the rows will do.
void level(const float* x, int64_t rows, const float* w, int64_t n, int64_t d, float* scale_x, float* scale_w) {
  std::vector<double> size_x(d), size_w(d);
  const auto add = [d](const float* m, int64_t count, std::vector<double>& size) {
    const int64_t taken = std::min<int64_t>(count, 64);
    for (int64_t s = 0; s < taken; ++s) {
      const float* row = m + count * s / taken * d;
      for (int64_t j = 0; j < d; ++j) size[j] += std::abs(row[j]) / double(taken);
    }
  };
  add(x, rows, size_x);
  add(w, n, size_w);
  for (int64_t j = 0; j < d; ++j) {
    const double ratio = size_w[j] / size_x[j];
    const double power = ratio > 0 && ratio <= std::numeric_limits<double>::max() ? std::log2(ratio) / 2 : 0;
    const int e = int(std::lround(std::clamp(power, -12.0, 12.0)));
    scale_x[j] = std::ldexp(1.0f, e);
    scale_w[j] = std::ldexp(1.0f, -e);
  }
}

// The k greatest keys seen, as a heap whose root is the least of them.
struct Greatest {
  Key32* keys;
  int64_t count, k, rescored;
  bool failed;

  void take(Key32 key) {
    if (count < k) {
      keys[count++] = key;
      if (count == k) std::make_heap(keys, keys + k, std::greater<>());
    } else if (key > keys[0]) {
      std::pop_heap(keys, keys + k, std::greater<>());
      keys[k - 1] = key;
      std::push_heap(keys, keys + k, std::greater<>());
    }
  }
  float bound() const { return count < k ? std::numeric_limits<float>::quiet_NaN() : keys[0].value(); }
};

// The same result from fewer float32 products. With x' = x * s and w' = w / s, s powers of two, and x' = x^ + r,
// w' = w^ + t, where x^ and w^ are steps times bytes:
//   |x . w - x^ . w^| <= |r| |w'| + |x^| |t|.
// With u = 2^-24, the float32 sum kept for a column differs from x . w by at most (d + 4) u |x'| |w'| + u |b| + what
// underflows, a sum in any other order by as much, and the bound as evaluated from the exact one by less than
// 30 u (|x'| |w'| + |b|). Elements are at most 2^24 and the largest of a row at least 2^-24 (other rows are not
// screened), |log2 s| <= 12 and d <= 8192. So norms are good to 2^-10, and underflow, even if denormal numbers are read
// as zero, is below d 2^-89, against d 2^-71 of the second term. Hence rounding() and kWiden.
// Columns come in ascending order: one whose upper bound equals the k-th value has lost its tie.
constexpr float kWiden = 1 + 1.0f / 256;
constexpr int64_t kScreenRows = 512;

float rounding(int64_t d) { return float(2 * d + 64) / (1 << 24); }

}  // namespace

void screened(const float* x, const float* w, const float* b, int64_t rows, int64_t n, int64_t d, int64_t k,
              float* acts, int64_t* indices, int64_t* rescored) {
  const Kernels& isa = kernels();
  const int64_t quads = (d + 3) / 4, width = 4 * quads, panels = (n + 63) / 64;
  const int64_t slots = std::min<int64_t>(torch::stable::get_num_threads(), panels);
  const int64_t block = std::min(rows, kScreenRows);
  std::vector<float> scale_x(d), scale_w(d), wide(k);
  Buffer<uint8_t> codes(block * width);
  Buffer<int8_t> packed(slots * 64 * width), flat(slots * 64 * width);
  std::vector<ScreenRow> bounds(block);
  std::vector<char> usable(block);
  std::unique_ptr<Key32[]> keys(new Key32[slots * block * k]);
  std::vector<Greatest> state(slots * block);
  std::vector<Key32> merged;
  std::vector<int64_t> left;  // the rows of a block that go to encode_panels

  for (int64_t r0 = 0; r0 < rows; r0 += block) {
    const int64_t count = std::min(block, rows - r0);
    const float* input = x + r0 * d;
    level(input, count, w, n, d, scale_x.data(), scale_w.data());
    for (int64_t r = 0; r < count; ++r) {
      Digits row;
      uint8_t* code = codes.get() + r * width;
      isa.quantise(input + r * d, scale_x.data(), d, width, reinterpret_cast<int8_t*>(code), row);
      for (int64_t i = 0; i < width; ++i) code[i] ^= 0x80;
      usable[r] = row.usable;
      bounds[r] = {row.step, (row.error + rounding(d) * row.norm) * kWiden, (row.norm + row.error) * kWiden, 0};
    }
    parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        int8_t *bytes = flat.get() + s * 64 * width, *panel = packed.get() + s * 64 * width;
        Greatest* slot = state.data() + s * block;
        std::vector<ScreenRow> limits(bounds.begin(), bounds.begin() + count);
        for (int64_t r = 0; r < count; ++r) {
          slot[r] = {keys.get() + (s * block + r) * k, 0, k, 0, !usable[r]};
          limits[r].bound = slot[r].bound();
        }
        const int64_t start = panels * s / slots;
        for (int64_t p = start; p < panels * (s + 1) / slots; ++p) {
          const int64_t first = p * 64, columns = std::min<int64_t>(64, n - first);
          if (std::all_of(slot, slot + count, [](const Greatest& g) { return g.failed; })) break;
          ScreenColumns column = {};
          for (int64_t c = 0; c < columns; ++c) {
            Digits row;
            isa.quantise(w + (first + c) * d, scale_w.data(), d, width, bytes + c * width, row);
            column.step[c] = row.usable ? row.step : 0;
            column.norm[c] = row.usable ? row.norm * kWiden : std::numeric_limits<float>::infinity();
            column.error[c] = row.usable ? row.error * kWiden : 0;
            column.base[c] = b ? b[first + c] + std::abs(b[first + c]) / (1 << 18) : 0;
            column.offset[c] = -128 * row.sum;
          }
          isa.pack32(reinterpret_cast<const float*>(bytes), quads, columns, quads, reinterpret_cast<float*>(panel));
          const uint64_t inside = columns == 64 ? ~uint64_t(0) : (uint64_t(1) << columns) - 1;
          // Rescoring more than this would cost more than the panels of float32 do.
          const int64_t most = 16 * k + 512 + (p - start + 1) * 64 / 16;
          for (int64_t r = 0; r < count; r += kBlockRows) {
            const uint8_t* lines[kBlockRows];
            ScreenRow few[kBlockRows];
            uint64_t pass[kBlockRows];
            for (int i = 0; i < kBlockRows; ++i) {
              const int64_t at = std::min(r + i, count - 1);
              lines[i] = codes.get() + at * width;
              few[i] = limits[at];
            }
            isa.screen(lines, few, panel, column, quads, pass);
            for (int64_t i = r; i < std::min(r + kBlockRows, count); ++i) {
              Greatest& row = slot[i];
              if (row.failed) continue;
              for (uint64_t bits = pass[i - r] & inside; bits; bits &= bits - 1) {
                const int64_t c = first + __builtin_ctzll(bits);
                const float dot = isa.dot(input + i * d, w + c * d, nullptr, d), value = b ? dot + b[c] : dot;
                // What overflows may do so in one order of summation only.
                if (!(std::abs(value) <= std::numeric_limits<float>::max())) row.failed = true;
                row.take(Key32::make(value, uint32_t(c)));
                ++row.rescored;
              }
              row.failed |= row.rescored > most;
              limits[i].bound = row.bound();
            }
          }
        }
      }
    });
    left.clear();
    for (int64_t r = 0; r < count; ++r) {
      bool failed = false;
      int64_t work = 0;
      merged.clear();
      for (int64_t s = 0; s < slots; ++s) {
        const Greatest& found = state[s * block + r];
        merged.insert(merged.end(), found.keys, found.keys + found.count);
        failed |= found.failed;
        work += found.rescored;
      }
      if (rescored) rescored[r0 + r] = failed ? -1 : work;
      if (failed) {
        left.push_back(r);
      } else {
        select<float, float>(merged.data(), merged.size(), k, false, true, wide.data(), acts + (r0 + r) * k,
                             indices + (r0 + r) * k);
      }
    }
    if (left.empty()) continue;
    const int64_t some = left.size();
    Buffer<float> gathered(some * d), values(some * k);
    std::unique_ptr<int64_t[]> places(new int64_t[some * k]);
    for (int64_t i = 0; i < some; ++i) std::copy_n(input + left[i] * d, d, gathered.get() + i * d);
    encode_panels(gathered.get(), w, b, some, n, d, k, values.get(), places.get());
    for (int64_t i = 0; i < some; ++i) {
      std::copy_n(values.get() + i * k, k, acts + (r0 + left[i]) * k);
      std::copy_n(places.get() + i * k, k, indices + (r0 + left[i]) * k);
    }
  }
}

}  // namespace clipsteer
