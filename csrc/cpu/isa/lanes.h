// A row as vectors of 32 numbers, the last one filled up; included by table.h. No include guard on purpose.

namespace clipsteer::ISA {

constexpr int kRowLanes = 32;

// The sum of all lanes, a power of two.
template <class V, int LANES>
TARGET static inline V fold(V (&sum)[LANES]) {
  for (int half = LANES / 2; half; half /= 2) {
    for (int l = 0; l < half; ++l) sum[l] += sum[l + half];
  }
  return sum[0];
}

// A vector of numbers: where fewer are left, these and zeros behind them, which keeps the compiler from taking the last ones
// one at a time. What becomes of the zeros is nobody's: `add` leaves it out.
template <class V>
TARGET static inline const V* filled(const V* x, int lanes, V* room) {
  if (lanes == kRowLanes) return x;
  std::fill_n(room, kRowLanes, V(0));
  std::copy_n(x, lanes, room);
  return room;
}

// f(i, lanes) for n numbers: of whole vectors the compiler knows how many lanes there are.
template <int LANES, class F>
TARGET static inline void each_vector(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) f(i, std::integral_constant<int, LANES>());
  f(i, int(n - i));
}

// f(l) for as many whole steps as `lanes` take.
template <class V, class F>
TARGET static inline void each_of(int lanes, F&& f) {
  constexpr int kStep = 64 / sizeof(V);
  for (int from = 0; from < lanes; from += kStep) {
    for (int l = 0; l < kStep; ++l) f(from + l);
  }
}

template <class V>
TARGET static inline void add(V* __restrict sum, const V* __restrict x, int lanes) {
  if (lanes == kRowLanes) {
    for (int l = 0; l < kRowLanes; ++l) sum[l] += x[l];
  } else {
    for (int l = 0; l < lanes; ++l) sum[l] += x[l];
  }
}

template <class V>
TARGET static inline void multiply(V* __restrict v, const V* __restrict x, int lanes) {
  if (lanes == kRowLanes) {
    for (int l = 0; l < kRowLanes; ++l) v[l] *= x[l];
  } else {
    for (int l = 0; l < lanes; ++l) v[l] *= x[l];
  }
}

// To where a row goes on, through an array, as that may be a row that was read.
template <class V>
TARGET static inline void put(const V* __restrict x, int lanes, V* __restrict out) {
  if (lanes == kRowLanes) {
    std::copy_n(x, kRowLanes, out);
  } else {
    std::copy_n(x, lanes, out);
  }
}

// Each lane of `best` that x exceeds becomes x's; a NaN exceeds nothing.
template <class V>
TARGET static inline void raise(V* __restrict best, const V* __restrict x, int lanes) {
  if (lanes == kRowLanes) {
    for (int l = 0; l < kRowLanes; ++l) best[l] = x[l] > best[l] ? x[l] : best[l];
  } else {
    for (int l = 0; l < lanes; ++l) best[l] = x[l] > best[l] ? x[l] : best[l];
  }
}

template <class V>
TARGET static inline V largest_of(const V* lane) {
  V best = lane[0];
  for (int l = 1; l < kRowLanes; ++l) best = lane[l] > best ? lane[l] : best;
  return best;
}

}  // namespace clipsteer::ISA
