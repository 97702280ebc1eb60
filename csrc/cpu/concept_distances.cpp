// D(a, b) of all concepts without a pair of rows: as ||s| - |t|| = |s - t| + |s + t| - |s| - |t|, the sum over pairs is
// G(x - y) + G(x + y) - G(x) - G(y) of the concepts' numbers x and y, with G(z) = sum of |z_i - z_j| over i < j, which is
// that of (2 r - N + 1) z_r over the sorted numbers. Halves of the numbers are taken, so that no sum overflows. A
// concept that few rows have is a list of them.
#include "scores.h"

#include <algorithm>
#include <numeric>

namespace clipsteer {
namespace {

constexpr int64_t kThin = 8;       // a list is shorter than a row of numbers over this
constexpr int64_t kFew = 128;      // numbers that a comparison sort takes
constexpr int64_t kMany = 3000;    // numbers for which long tables of counts pay
constexpr int64_t kTogether = 32;  // concepts of Q in a task

// Numbers in an order of unsigned integers.
template <class V>
struct Ordered {
  using Key = std::conditional_t<sizeof(V) == 4, uint32_t, uint64_t>;
  static constexpr Key kSign = Key(1) << (8 * sizeof(V) - 1);
  static Key key(V value) {
    Key bits;
    std::memcpy(&bits, &value, sizeof(V));
    return bits & kSign ? ~bits : bits | kSign;
  }
  static V value(Key key) {
    const Key bits = key & kSign ? key ^ kSign : ~key;
    V value;
    std::memcpy(&value, &bits, sizeof(V));
    return value;
  }
};

// A number and whose it is.
template <class V>
struct Tagged {
  typename Ordered<V>::Key key;
  uint32_t row;
};

template <class Key>
Key key_of(Key item) {
  return item;
}
template <class V>
typename Ordered<V>::Key key_of(const Tagged<V>& item) {
  return item.key;
}

// Sorts n items by so many bits at a time; returns where they are, `items` or `other`.
template <int kBits, class Item>
Item* sorted_by_digits(Item* items, Item* other, int64_t n) {
  using Key = decltype(key_of(*items));
  constexpr int kPasses = (8 * sizeof(Key) + kBits - 1) / kBits;
  constexpr Key kMask = (1 << kBits) - 1;
  uint32_t count[kPasses][1 << kBits] = {};
  for (int64_t i = 0; i < n; ++i) {
    const Key key = key_of(items[i]);
    for (int p = 0; p < kPasses; ++p) ++count[p][key >> (p * kBits) & kMask];
  }
  for (int p = 0; p < kPasses; ++p) {
    if (count[p][key_of(items[0]) >> (p * kBits) & kMask] == n) continue;
    uint32_t at = 0;
    for (uint32_t& c : count[p]) at += std::exchange(c, at);
    for (int64_t i = 0; i < n; ++i) other[count[p][key_of(items[i]) >> (p * kBits) & kMask]++] = items[i];
    std::swap(items, other);
  }
  return items;
}

template <class Item>
Item* sorted(Item* items, Item* other, int64_t n) {
  if (n < kFew) {
    std::sort(items, items + n, [](const Item& a, const Item& b) { return key_of(a) < key_of(b); });
    return items;
  }
  return n < kMany ? sorted_by_digits<8>(items, other, n) : sorted_by_digits<11>(items, other, n);
}

// Concepts of one side, halved: of each all numbers, or those that are not 0 and their rows.
template <class V>
struct Halves {
  std::vector<V> numbers;
  std::vector<int64_t> rows;
  std::vector<int64_t> number_at, row_at;  // of each concept; row_at is -1 where there are all
  std::vector<int64_t> count;
  std::vector<Finite> finite;

  template <class T>
  Halves(const ScoreRows<T>& scores, bool lists) : count(scores.concepts), finite(scores.concepts, Finite::yes) {
    const int64_t N = scores.rows, K = scores.concepts;
    std::vector<Infinities> odd(K);
    const auto each = [&](auto&& f) {
      for (int64_t i = 0; i < N; ++i) {
        for (int64_t at = scores.begin(i); at < scores.end(i); ++at) {
          const V value = scores.number(at);
          if (value != 0) f(i, scores.column(i, at), value);
        }
      }
    };
    each([&](int64_t, int64_t a, V value) {
      ++count[a];
      if (!std::isfinite(value)) odd[a].add(value);
    });
    int64_t all = 0, listed = 0;
    for (int64_t a = 0; a < K; ++a) {
      const bool thin = lists && count[a] < N / kThin;
      finite[a] = odd[a].found();
      number_at.push_back(all);
      row_at.push_back(thin ? listed : -1);
      if (!thin) count[a] = N;
      all += count[a];
      listed += thin ? count[a] : 0;
    }
    numbers.resize(all);
    rows.resize(listed);
    std::vector<int64_t> next(K);
    each([&](int64_t i, int64_t a, V value) {
      const int64_t at = row_at[a] < 0 ? i : next[a]++;
      if (row_at[a] >= 0) rows[row_at[a] + at] = i;
      numbers[number_at[a] + at] = V(0.5) * value;
    });
  }
  bool thin(int64_t a) const { return row_at[a] >= 0; }
  const V* of(int64_t a) const { return numbers.data() + number_at[a]; }
  const int64_t* rows_of(int64_t a) const { return rows.data() + row_at[a]; }
};

// Which image each row belongs to, numbered from 0.
struct Images {
  std::vector<uint32_t> of;
  std::vector<int64_t> size;

  Images(const int64_t* images, int64_t N) : of(N) {
    std::vector<int64_t> names(images, images + N);
    std::sort(names.begin(), names.end());
    names.erase(std::unique(names.begin(), names.end()), names.end());
    size.resize(names.size());
    for (int64_t i = 0; i < N; ++i) {
      of[i] = uint32_t(std::lower_bound(names.begin(), names.end(), images[i]) - names.begin());
      ++size[of[i]];
    }
  }
};

template <class V>
class Spreads {
 public:
  using Key = typename Ordered<V>::Key;

  Spreads(int64_t N, const Images* images)
      : N_(N), images_(images), minus_(N), plus_(N), keys_(images ? 0 : N), more_keys_(images ? 0 : N),
        tagged_(images ? N : 0), more_tagged_(images ? N : 0), met_(images ? images->size.size() : 0), sum_(met_) {}

  // G of n numbers and N - n zeros; with images, `share` gets `sign` times what each image takes part in.
  double of(const V* z, int64_t n, double sign, std::vector<double>* share) {
    if (images_) return by_image(z, sign, *share);
    for (int64_t i = 0; i < n; ++i) keys_[i] = Ordered<V>::key(z[i]);
    const Key* key = sorted(keys_.data(), more_keys_.data(), n);
    const int64_t negative = std::lower_bound(key, key + n, Ordered<V>::key(V(0))) - key;
    const auto part = [&](int64_t begin, int64_t end, int64_t shift) {
      constexpr int kLanes = 8;
      double total[kLanes] = {};
      int64_t i = begin;
      for (; i + kLanes <= end; i += kLanes) {
        for (int l = 0; l < kLanes; ++l) total[l] += double(2 * (i + l + shift) - N_ + 1) * Ordered<V>::value(key[i + l]);
      }
      for (int l = 0; i < end; ++i, ++l) total[l] += double(2 * (i + shift) - N_ + 1) * Ordered<V>::value(key[i]);
      return ((total[0] + total[4]) + (total[1] + total[5])) + ((total[2] + total[6]) + (total[3] + total[7]));
    };
    return sign * (part(0, negative, 0) + part(negative, n, N_ - n));
  }

  // G(x - y) + G(x + y).
  double of_both(const Halves<V>& p, int64_t a, const Halves<V>& q, int64_t b, std::vector<double>* share) {
    V *minus = minus_.data(), *plus = plus_.data();
    const V *x = p.of(a), *y = q.of(b);
    int64_t n = 0;
    if (!p.thin(a) && !q.thin(b)) {
      for (; n < N_; ++n) {
        minus[n] = x[n] - y[n];
        plus[n] = x[n] + y[n];
      }
    } else if (!p.thin(a) || !q.thin(b)) {
      const bool few_y = q.thin(b);
      const V *all = few_y ? x : y, *few = few_y ? y : x;
      const int64_t* row = few_y ? q.rows_of(b) : p.rows_of(a);
      n = N_;
      std::copy_n(all, n, minus);
      std::copy_n(all, n, plus);
      for (int64_t l = 0; l < (few_y ? q.count[b] : p.count[a]); ++l) {
        minus[row[l]] -= few[l];
        plus[row[l]] += few[l];
      }
    } else {
      const int64_t *i = p.rows_of(a), *j = q.rows_of(b), *const i_end = i + p.count[a], *const j_end = j + q.count[b];
      for (; i < i_end || j < j_end; ++n) {
        const bool first = j == j_end || (i < i_end && *i <= *j), second = i == i_end || (j < j_end && *j <= *i);
        const V u = first ? *x : V(0), v = second ? *y : V(0);
        i += first, x += first, j += second, y += second;
        minus[n] = u - v;
        plus[n] = u + v;
      }
    }
    const double apart = of(minus, n, 1, share);
    return apart + of(plus, n, 1, share);
  }

 private:
  double by_image(const V* z, double sign, std::vector<double>& share) {
    double all = 0;
    for (int64_t i = 0; i < N_; ++i) {
      tagged_[i] = {Ordered<V>::key(z[i]), uint32_t(i)};
      all += z[i];
    }
    const Tagged<V>* item = sorted(tagged_.data(), more_tagged_.data(), N_);
    std::fill(met_.begin(), met_.end(), 0);
    std::fill(sum_.begin(), sum_.end(), 0);
    double total = 0, below = 0;
    for (int64_t r = 0; r < N_; ++r) {
      const double one = Ordered<V>::value(item[r].key);
      const uint32_t image = images_->of[item[r].row];
      total += double(2 * r - N_ + 1) * one;
      // of all rows, less what is counted from both ends within the image
      const double mine = double(2 * r - N_) * one + all - 2 * below;
      share[image] += sign * (mine - (met_[image] * one - sum_[image]));
      below += one;
      met_[image] += 1;
      sum_[image] += one;
    }
    return sign * total;
  }

  const int64_t N_;
  const Images* images_;
  std::vector<V> minus_, plus_;
  std::vector<Key> keys_, more_keys_;
  std::vector<Tagged<V>> tagged_, more_tagged_;
  std::vector<double> met_, sum_;
};

// The standard error of a value, from those without each image (Busing et al. 1999, where images differ in rows).
double jackknife(double sum, const std::vector<double>& share, const Images& images, int64_t N) {
  const auto value = [](double sum, double N) { return N > 1 ? 2 * sum / (N * (N - 1)) : 0.0; };
  const double whole = value(sum, double(N)), g = double(share.size());
  double mean = g * whole, total = 0;
  const auto without = [&](size_t b) { return value(sum - share[b], double(N - images.size[b])); };
  for (size_t b = 0; b < share.size(); ++b) mean -= (1 - double(images.size[b]) / N) * without(b);
  for (size_t b = 0; b < share.size(); ++b) {
    const double h = double(N) / images.size[b], pseudo = h * whole - (h - 1) * without(b);
    total += (pseudo - mean) * (pseudo - mean) / (h - 1);
  }
  return std::sqrt(total / g);
}

template <class T>
void distances(const ScoreRows<T>& P, const ScoreRows<T>& Q, const int64_t* names, Compute<T>* D, Compute<T>* error) {
  using V = Compute<T>;
  const int64_t N = P.rows, K = P.concepts, L = Q.concepts;
  const std::optional<Images> images = names ? std::optional<Images>(std::in_place, names, N) : std::nullopt;
  const Images* by = images ? &*images : nullptr;
  const Halves<V> p(P, !names), q(Q, !names);
  const size_t g = images ? images->size.size() : 0;
  std::vector<double> own(K + L);
  std::vector<std::vector<double>> shares(images ? K + L : 0, std::vector<double>(g));
  for_each(K + L, [&](int64_t begin, int64_t end) {
    Spreads<V> spreads(N, by);
    for (int64_t c = begin; c < end; ++c) {
      const Halves<V>& side = c < K ? p : q;
      const int64_t a = c < K ? c : c - K;
      if (side.finite[a] == Finite::yes) own[c] = spreads.of(side.of(a), side.count[a], -1, by ? &shares[c] : nullptr);
    }
  });
  const int64_t blocks = (L + kTogether - 1) / kTogether;
  for_each(K * blocks, [&](int64_t begin, int64_t end) {
    Spreads<V> spreads(N, by);
    std::vector<double> share(g);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t a = task / blocks, first = task % blocks * kTogether;
      for (int64_t b = first; b < std::min(L, first + kTogether); ++b) {
        V &value = D[a * L + b], *const spread = error ? error + a * L + b : nullptr;
        if (p.finite[a] != Finite::yes || q.finite[b] != Finite::yes) {
          value = N > 1 ? V(of_both(p.finite[a], q.finite[b])) : V(0);
          if (spread) *spread = std::numeric_limits<V>::quiet_NaN();
          continue;
        }
        for (size_t n = 0; n < g; ++n) share[n] = shares[a][n] + shares[K + b][n];
        const double sum = spreads.of_both(p, a, q, b, &share) + (own[a] + own[K + b]);
        value = N > 1 ? V(std::max(0.0, 2 * sum / (double(N) * double(N - 1)))) : V(0);
        if (spread) *spread = V(jackknife(sum, share, *images, N));
      }
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor> concept_distances(Tensor P, std::optional<Tensor> p_indices, std::optional<Tensor> p_offsets,
                                             int64_t p_concepts, Tensor Q, std::optional<Tensor> q_indices,
                                             std::optional<Tensor> q_offsets, int64_t q_concepts,
                                             std::optional<Tensor> images) {
  const char* op = "concept_distances";
  const ScalarType dtype = P.scalar_type();
  const ScalarType wide = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  require(Q.scalar_type() == dtype, op, "expected P and Q of one dtype");
  require(p_concepts >= 0 && q_concepts >= 0, op, "expected K and L of at least 0");
  const int64_t sizes[] = {p_concepts, q_concepts}, error_sizes[] = {images ? p_concepts : 0, q_concepts};
  Tensor D = allocate(P, {sizes, 2}, wide);
  Tensor error = allocate(P, {error_sizes, 2}, wide);
  dispatch(op, dtype, [&](auto zero) {
    using T = decltype(zero);
    using V = Compute<T>;
    const ScoreRows<T> p = score_rows<T>(op, "P", P, p_indices, p_offsets, p_concepts);
    const ScoreRows<T> q = score_rows<T>(op, "Q", Q, q_indices, q_offsets, q_concepts);
    require(p.rows == q.rows, op, "expected as many rows of P as of Q");
    require(p.rows < int64_t(1) << 32, op, "expected fewer than 2^32 rows");
    if (images) check(op, "images", *images, ScalarType::Long, {p.rows});
    distances<T>(p, q, images ? data<int64_t>(*images) : nullptr, data<V>(D), images ? data<V>(error) : nullptr);
  });
  return {D, error};
}

}  // namespace clipsteer
