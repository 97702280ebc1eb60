// topk_encode: panels of pre-activations by torch's GEMM, each filtered while it is in cache; no (B, n) buffer. Large
// float32 products are screened in int8 first (screened, below).
#include "gemm.h"

namespace clipsteer {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kPanelColumns = 512;
constexpr int64_t kMaxBlockRows = 256;
constexpr int64_t kScratchBytes = int64_t(40) << 20;

// Writes the k greatest of `count` keys in order; a row with a NaN has NaN values and the first k indices.
template <class T, class V>
void select(Key<V>* keys, int64_t count, int64_t k, bool nan, bool relu, V* buffer, T* values, int64_t* indices) {
  if (nan) {
    for (int64_t j = 0; j < k; ++j) {
      values[j] = T(std::numeric_limits<V>::quiet_NaN());
      indices[j] = j;
    }
    return;
  }
  if (count > k) std::nth_element(keys, keys + k, keys + count, std::greater<>());
  std::sort(keys, keys + k, std::greater<>());
  for (int64_t j = 0; j < k; ++j) {
    const V value = keys[j].value();
    buffer[j] = relu && !(value > 0) ? V(0) : value;
    indices[j] = keys[j].column();
  }
  if constexpr (kNarrow<T>) {
    kernels().narrow(buffer, values, k);
  } else {
    std::copy_n(buffer, k, values);
  }
}

template <class T>
void encode(const T* x, const T* w, const T* b, int64_t rows, int64_t n, int64_t d, int64_t k, T* acts,
            int64_t* indices) {
  using V = Compute<T>;
  const Kernels& isa = kernels();
  const int64_t panels = (n + kPanelColumns - 1) / kPanelColumns;
  // Each slot takes a run of panels with its own bounds, so one thread makes each GEMM, whatever the thread count.
  const int64_t slots = std::min<int64_t>(torch::stable::get_num_threads(), panels);
  const int64_t slot_columns = std::min(n, (panels + slots - 1) / slots * kPanelColumns);
  const int64_t limit = Candidates<V>::limit_for(k, slot_columns);
  const int64_t capacity = limit + Candidates<V>::kSlack;
  const int64_t row_bytes = slots * (kPanelColumns * sizeof(V) + capacity * sizeof(Key<V>));
  const int64_t block = std::min({rows, kMaxBlockRows, std::max<int64_t>(kScratchBytes / row_bytes, 16)});

  std::unique_ptr<V[]> panel(new V[slots * block * kPanelColumns]);
  std::unique_ptr<Key<V>[]> keys(new Key<V>[slots * block * capacity]);
  std::vector<Candidates<V>> state(slots * block);
  std::unique_ptr<V[]> wide_w(kNarrow<T> ? new V[slots * kPanelColumns * d] : nullptr);
  std::unique_ptr<V[]> wide_x(kNarrow<T> ? new V[block * d] : nullptr);
  std::unique_ptr<V[]> wide_b(kNarrow<T> && b ? new V[n] : nullptr);
  const V* bias = b ? widened(b, wide_b.get(), n) : nullptr;

  for (int64_t r0 = 0; r0 < rows; r0 += block) {
    const int64_t count = std::min(block, rows - r0);
    const Tensor input = matrix(widened(x + r0 * d, wide_x.get(), count * d), count, d, d, 1);
    parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        V* out = panel.get() + s * block * kPanelColumns;
        Candidates<V>* slot = state.data() + s * block;
        for (int64_t r = 0; r < count; ++r) slot[r].reset(keys.get() + (s * block + r) * capacity, limit, k);
        for (int64_t p = panels * s / slots; p < panels * (s + 1) / slots; ++p) {
          const int64_t first = p * kPanelColumns, columns = std::min(kPanelColumns, n - first);
          if (d > 0) {
            const V* weights =
                widened(w + first * d, wide_w.get() + (kNarrow<T> ? s * kPanelColumns * d : 0), columns * d);
            multiply(input, matrix(weights, d, columns, 1, d), matrix(out, count, columns, columns, 1));
          } else {
            std::fill_n(out, count * columns, V(0));
          }
          for (int64_t r = 0; r < count; ++r) {
            if (!slot[r].nan) isa.filter(out + r * columns, bias ? bias + first : nullptr, columns, first, slot[r]);
          }
        }
      }
    });
    parallel_for(0, count, 32, [&](int64_t begin, int64_t end) {
      std::vector<Key<V>> merged;
      std::vector<V> buffer(k);
      for (int64_t r = begin; r < end; ++r) {
        merged.clear();
        bool nan = false;
        for (int64_t s = 0; s < slots; ++s) {
          const Candidates<V>& found = state[s * block + r];
          merged.insert(merged.end(), found.keys, found.keys + found.count);
          nan |= found.nan;
        }
        select<T, V>(merged.data(), merged.size(), k, nan, true, buffer.data(), acts + (r0 + r) * k,
                     indices + (r0 + r) * k);
      }
    });
  }
}

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
  std::vector<int64_t> left;  // the rows of a block that go to `encode`

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
    encode<float>(gathered.get(), w, b, some, n, d, k, values.get(), places.get());
    for (int64_t i = 0; i < some; ++i) {
      std::copy_n(values.get() + i * k, k, acts + (r0 + left[i]) * k);
      std::copy_n(places.get() + i * k, k, indices + (r0 + left[i]) * k);
    }
  }
}

constexpr int64_t kScreenMaxDim = 8192;

// Where screening pays: enough rows for the price of making bytes of W, few winners among many columns.
bool worth_screening(int64_t rows, int64_t n, int64_t d, int64_t k) {
  return kernels().screen && rows >= 64 && n >= 4096 && d >= 128 && d <= kScreenMaxDim && k <= n / 128;
}

template <class T>
void select_rows(const T* pre, int64_t rows, int64_t n, int64_t k, T* values, int64_t* indices) {
  using V = Compute<T>;
  const int64_t limit = Candidates<V>::limit_for(k, n);
  parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    std::unique_ptr<Key<V>[]> keys(new Key<V>[limit + Candidates<V>::kSlack]);
    std::vector<std::conditional_t<sizeof(V) == 4, int32_t, int64_t>> rank(n);
    std::vector<V> wide(kNarrow<T> ? n : 0), buffer(k);
    for (int64_t r = begin; r < end; ++r) {
      const V* row = widened(pre + r * n, wide.data(), n);
      Candidates<V> found;
      found.reset(keys.get(), limit, k);
      found.start_from(kernels().seed(row, n, k, rank.data()));
      kernels().filter(row, nullptr, n, 0, found);
      select<T, V>(found.keys, found.count, k, found.nan, false, buffer.data(), values + r * k, indices + r * k);
    }
  });
}

std::tuple<Tensor, Tensor> outputs(const Tensor& like, int64_t rows, int64_t k) {
  const int64_t sizes[] = {rows, k};
  return {torch::stable::new_empty(like, {sizes, 2}), torch::stable::new_empty(like, {sizes, 2}, ScalarType::Long)};
}

void check_k(const char* op, int64_t k, int64_t n) {
  require(0 <= k && k <= n, op, "expected 0 <= k <= " + std::to_string(n) + ", got " + std::to_string(k));
  require(n <= std::numeric_limits<int32_t>::max(), op,
          "expected fewer than 2**31 features, got " + std::to_string(n));
}

}  // namespace

std::tuple<Tensor, Tensor> topk_encode(Tensor x, Tensor w_enc, std::optional<Tensor> b_enc, int64_t k, bool screen) {
  const char* op = "topk_encode";
  check_dim(op, "x", x, 2);
  check_dim(op, "W_enc", w_enc, 2);
  const int64_t rows = x.size(0), d = x.size(1), n = w_enc.size(0);
  const ScalarType dtype = x.scalar_type();
  check(op, "x", x, dtype, {rows, d});
  check(op, "W_enc", w_enc, dtype, {n, d});
  if (b_enc) check(op, "b_enc", *b_enc, dtype, {n});
  check_k(op, k, n);
  auto [acts, indices] = outputs(x, rows, k);
  if (rows == 0 || k == 0) return {acts, indices};
  dispatch(op, dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (std::is_same_v<T, float>) {
      if (screen && worth_screening(rows, n, d, k)) {
        return screened(data<float>(x), data<float>(w_enc), b_enc ? data<float>(*b_enc) : nullptr, rows, n, d, k,
                        data<float>(acts), data<int64_t>(indices), nullptr);
      }
    }
    encode<T>(data<T>(x), data<T>(w_enc), b_enc ? data<T>(*b_enc) : nullptr, rows, n, d, k, data<T>(acts),
              data<int64_t>(indices));
  });
  return {acts, indices};
}

// For tests and measurements: screened at any size. How many columns of each row were rescored, or -1 where it gave up.
std::tuple<Tensor, Tensor, Tensor> topk_encode_screened(Tensor x, Tensor w_enc, std::optional<Tensor> b_enc,
                                                        int64_t k) {
  const char* op = "topk_encode_screened";
  check_dim(op, "x", x, 2);
  check_dim(op, "W_enc", w_enc, 2);
  const int64_t rows = x.size(0), d = x.size(1), n = w_enc.size(0);
  check(op, "x", x, ScalarType::Float, {rows, d});
  check(op, "W_enc", w_enc, ScalarType::Float, {n, d});
  if (b_enc) check(op, "b_enc", *b_enc, ScalarType::Float, {n});
  check_k(op, k, n);
  require(kernels().screen, op, "this processor (or CLIPSTEER_CPU_ISA) has no AVX512-VNNI; topk_encode always runs");
  require(k > 0, op, "expected k > 0");
  require(0 < d && d <= kScreenMaxDim, op, "expected 0 < d_in <= 8192, got " + std::to_string(d));
  auto [acts, indices] = outputs(x, rows, k);
  Tensor rescored = torch::stable::new_empty(x, {&rows, 1}, ScalarType::Long);
  if (rows) {
    screened(data<float>(x), data<float>(w_enc), b_enc ? data<float>(*b_enc) : nullptr, rows, n, d, k,
             data<float>(acts), data<int64_t>(indices), data<int64_t>(rescored));
  }
  return {acts, indices, rescored};
}

std::tuple<Tensor, Tensor> topk(Tensor pre, int64_t k) {
  const char* op = "topk";
  check_dim(op, "pre", pre, 2);
  const int64_t rows = pre.size(0), n = pre.size(1);
  check(op, "pre", pre, pre.scalar_type(), {rows, n});
  check_k(op, k, n);
  auto [values, indices] = outputs(pre, rows, k);
  if (rows == 0 || k == 0) return {values, indices};
  dispatch(op, pre.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    select_rows<T>(data<T>(pre), rows, n, k, data<T>(values), data<int64_t>(indices));
  });
  return {values, indices};
}

}  // namespace clipsteer
