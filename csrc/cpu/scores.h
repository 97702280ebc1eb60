// How near rows are to concepts: a matrix, or what is not 0 of one.
#pragma once

#include "gemm.h"

namespace clipsteer {

// values (N, K); or values (m,), indices (m,) and offsets (N + 1,), where entries from offsets[N] on are padding.
template <class T>
struct ScoreRows {
  const T* values;
  const int64_t *indices, *offsets;
  int64_t rows, concepts;

  bool sparse() const { return offsets != nullptr; }
  // What row i has: how many numbers from where on; a matrix has no indices.
  int64_t begin(int64_t i) const { return sparse() ? offsets[i] : i * concepts; }
  int64_t end(int64_t i) const { return sparse() ? offsets[i + 1] : (i + 1) * concepts; }
  int64_t column(int64_t i, int64_t at) const { return sparse() ? indices[at] : at - i * concepts; }
  // In float or double.
  Compute<T> number(int64_t at) const { return Compute<T>(values[at]); }
};

// Checks the tensors of one side. No row names a concept twice, but for zeros.
template <class T>
ScoreRows<T> score_rows(const char* op, const char* name, const Tensor& values, const std::optional<Tensor>& indices,
                        const std::optional<Tensor>& offsets, int64_t concepts) {
  const ScalarType dtype = values.scalar_type();
  require(indices.has_value() == offsets.has_value(), op, "expected indices and offsets, or neither");
  if (!indices) {
    check_dim(op, name, values, 2);
    check(op, name, values, dtype, {values.size(0), concepts});
    return {data<T>(values), nullptr, nullptr, values.size(0), concepts};
  }
  check_dim(op, name, values, 1);
  check_dim(op, "offsets", *offsets, 1);
  const int64_t m = values.size(0), rows = offsets->size(0) - 1;
  require(rows >= 0 && concepts >= 0, op, "expected offsets (N + 1,)");
  check(op, name, values, dtype, {m});
  check(op, "indices", *indices, ScalarType::Long, {m});
  check(op, "offsets", *offsets, ScalarType::Long, {rows + 1});
  const ScoreRows<T> found{data<T>(values), data<int64_t>(*indices), data<int64_t>(*offsets), rows, concepts};
  require(found.offsets[0] == 0 && found.offsets[rows] <= m, op, "expected offsets from 0 to at most m");
  for (int64_t i = 0; i < rows; ++i) {
    require(found.offsets[i] <= found.offsets[i + 1], op, "expected offsets that ascend");
  }
  check_indices(op, found.indices, m, concepts);
  std::vector<int64_t> seen(concepts, -1);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t at = found.begin(i); at < found.end(i); ++at) {
      if (found.number(at) == 0) continue;
      int64_t& last = seen[found.indices[at]];
      require(last != i, op, "row ", i, " names concept ", found.indices[at], " twice");
      last = i;
    }
  }
  return found;
}

// What is not 0 of every concept: the rows, ascending, and where their numbers are. A number may be a NaN.
struct ScoreColumns {
  std::vector<int64_t> offsets, rows, places;

  template <class T>
  explicit ScoreColumns(const ScoreRows<T>& scores) : offsets(scores.concepts + 1) {
    const auto each = [&](auto&& f) {
      for (int64_t i = 0; i < scores.rows; ++i) {
        for (int64_t at = scores.begin(i); at < scores.end(i); ++at) {
          if (scores.number(at) != 0) f(scores.column(i, at), i, at);
        }
      }
    };
    each([&](int64_t column, int64_t, int64_t) { ++offsets[column + 1]; });
    for (int64_t a = 0; a < scores.concepts; ++a) offsets[a + 1] += offsets[a];
    rows.resize(offsets.back());
    places.resize(offsets.back());
    std::vector<int64_t> next(offsets.begin(), offsets.end() - 1);
    each([&](int64_t column, int64_t i, int64_t at) {
      rows[next[column]] = i;
      places[next[column]++] = at;
    });
  }
};

// What infinities and NaN make of the differences of rows.
enum class Finite { yes, infinite, no };

// Of one concept's numbers, or of all (`add` for each): two infinities of a sign differ by a NaN.
struct Infinities {
  int positive = 0, negative = 0;
  bool nan = false;

  template <class V>
  void add(V value) {
    nan |= std::isnan(value);
    positive += value == std::numeric_limits<V>::infinity();
    negative += value == -std::numeric_limits<V>::infinity();
  }
  Finite found() const {
    if (nan || positive > 1 || negative > 1) return Finite::no;
    return positive + negative ? Finite::infinite : Finite::yes;
  }
};

// What an absolute difference of two sums is of which these are parts: infinite if one of them alone is.
inline double of_both(Finite a, Finite b) {
  const bool clear = (a == Finite::infinite && b == Finite::yes) || (a == Finite::yes && b == Finite::infinite);
  return clear ? std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
}

}  // namespace clipsteer
