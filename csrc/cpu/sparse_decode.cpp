// sparse_decode (a weighted gather of rows of W) and the two ops its gradients are made of; the same of ragged pairs.
#include "sparse_columns.h"
#include "sparse_sums.h"

namespace clipsteer {
namespace {

// A dictionary (n, d) may lie as (d, n).
bool lies_across(const Tensor& w) {
  return w.dim() == 2 && !w.is_contiguous() && w.stride(0) == 1 && w.stride(1) == w.size(0);
}

void check_weight(const char* op, const char* name, const Tensor& w, ScalarType dtype, int64_t n, int64_t d) {
  if (lies_across(w)) {
    check(op, name, torch::stable::transpose(w, 0, 1), dtype, {d, n});
  } else {
    check(op, name, w, dtype, {n, d});
  }
}

template <class T>
Weight<T> weight_of(const Tensor& w) {
  return {data<std::remove_const_t<T>>(w), w.size(0), w.size(1), lies_across(w)};
}

Tensor new_weight(const Tensor& like, int64_t n, int64_t d, bool across) {
  const int64_t sizes[] = {across ? d : n, across ? n : d};
  Tensor w = allocate(like, {sizes, 2});
  prefer_huge_pages(w.data_ptr(), w.numel() * int64_t(w.element_size()));
  return across ? torch::stable::transpose(w, 0, 1) : w;
}

// Rows of W, summed with the weights of each row of the batch.
void decode(const char* op, const Tensor& acts, const Tensor& indices, const Tensor& w, const std::optional<Tensor>& b,
            const Spans& spans, const std::vector<int64_t>& prefixes, const Tensor& y) {
  dispatch(op, acts.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Grouped<T> codes(data<T>(acts), data<int64_t>(indices), spans, prefixes);
    const auto weight = weight_of<const T>(w);
    (weight.across ? decode_columns<T> : decode_rows<T>)(codes, weight, b ? data<T>(*b) : nullptr, spans, data<T>(y));
  });
}

void dot(const char* op, const Tensor& rows, const Pairs& pairs, const Tensor& w, const Tensor& out) {
  dispatch(op, rows.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto weight = weight_of<const T>(w);
    (weight.across ? dot_columns<T> : dot_rows<T>)(data<T>(rows), pairs, weight, data<T>(out));
  });
}

template <class T>
void outer(const Segments<T>& segments, const Tensor& rows, const Tensor& dw, const Tensor& db) {
  const auto weight = weight_of<T>(dw);
  if (weight.n == 0) return;
  if (weight.across) {
    outer_columns<T>(segments, data<T>(rows), rows.size(0), weight, data<T>(db));
  } else {
    outer_rows<T>(segments, data<T>(rows), weight, data<T>(db));
  }
}

void outer(const char* op, const Tensor& coeff, const Pairs& pairs, const Tensor& rows, const Tensor& dw,
           const Tensor& db) {
  dispatch(op, rows.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    outer<T>(Segments<T>(data<T>(coeff), pairs, dw.size(0)), rows, dw, db);
  });
}

// The same of the features in use alone: these, as the one row of indices that torch's sparse tensors have, and their
// sums.
std::tuple<Tensor, Tensor, Tensor> outer_used(const char* op, const Tensor& coeff, const Pairs& pairs,
                                              const Tensor& rows, int64_t n) {
  std::optional<std::tuple<Tensor, Tensor, Tensor>> found;
  dispatch(op, rows.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const UsedSegments<T> segments(data<T>(coeff), pairs, n);
    const int64_t count = int64_t(segments.used.size()), sizes[] = {1, count};
    Tensor features = allocate(rows, {sizes, 2}, ScalarType::Long);
    std::copy_n(segments.used.data(), count, data<int64_t>(features));
    Tensor dw = new_weight(rows, count, rows.size(1), false), db = allocate(rows, {&count, 1});
    outer<T>(segments, rows, dw, db);
    found.emplace(features, dw, db);
  });
  return *found;
}

}  // namespace

// ---------------------------------------------------------------- k pairs a row

Tensor sparse_decode(Tensor acts, Tensor indices, Tensor w, std::optional<Tensor> b) {
  const char* op = "sparse_decode";
  check_dim(op, "acts", acts, 2);
  check_dim(op, "W", w, 2);
  const int64_t rows = acts.size(0), k = acts.size(1), n = w.size(0), d = w.size(1);
  const ScalarType dtype = acts.scalar_type();
  check(op, "acts", acts, dtype, {rows, k});
  check(op, "indices", indices, ScalarType::Long, {rows, k});
  check_weight(op, "W", w, dtype, n, d);
  if (b) check(op, "b", *b, dtype, {d});
  check_indices(op, data<int64_t>(indices), rows * k, n);
  const int64_t sizes[] = {rows, d};
  Tensor y = allocate(acts, {sizes, 2});
  decode(op, acts, indices, w, b, {rows, k, rows * k, nullptr}, {n}, y);
  return y;
}

Tensor gather_dot(Tensor rows, Tensor indices, Tensor w) {
  const char* op = "gather_dot";
  check_dim(op, "rows", rows, 2);
  check_dim(op, "indices", indices, 2);
  check_dim(op, "W", w, 2);
  const int64_t count = rows.size(0), d = rows.size(1), k = indices.size(1), n = w.size(0);
  const ScalarType dtype = rows.scalar_type();
  check(op, "rows", rows, dtype, {count, d});
  check(op, "indices", indices, ScalarType::Long, {count, k});
  check_weight(op, "W", w, dtype, n, d);
  check_indices(op, data<int64_t>(indices), count * k, n);
  const int64_t sizes[] = {count, k};
  Tensor out = allocate(rows, {sizes, 2});
  dot(op, rows, {data<int64_t>(indices), nullptr, count * k, k}, w, out);
  return out;
}

namespace {

Pairs checked_outer(const char* op, const Tensor& coeff, const Tensor& indices, const Tensor& rows, int64_t n) {
  check_dim(op, "coeff", coeff, 2);
  check_dim(op, "rows", rows, 2);
  require(n >= 0, op, "expected n >= 0, got ", n);
  const int64_t count = coeff.size(0), k = coeff.size(1);
  const ScalarType dtype = coeff.scalar_type();
  check(op, "coeff", coeff, dtype, {count, k});
  check(op, "indices", indices, ScalarType::Long, {count, k});
  check(op, "rows", rows, dtype, {count, rows.size(1)});
  check_indices(op, data<int64_t>(indices), count * k, n);
  return {data<int64_t>(indices), nullptr, count * k, k};
}

void check_sums(const char* op, const Tensor& rows, const Tensor& dw, const Tensor& db) {
  check_weight(op, "dW", dw, rows.scalar_type(), dw.size(0), rows.size(1));
  check(op, "db", db, rows.scalar_type(), {dw.size(0)});
}

}  // namespace

void sparse_outer_out(Tensor coeff, Tensor indices, Tensor rows, Tensor dw, Tensor db) {
  const char* op = "sparse_outer";
  check_dim(op, "dW", dw, 2);
  const Pairs pairs = checked_outer(op, coeff, indices, rows, dw.size(0));
  check_sums(op, rows, dw, db);
  outer(op, coeff, pairs, rows, dw, db);
}

std::tuple<Tensor, Tensor, Tensor> sparse_outer_used(Tensor coeff, Tensor indices, Tensor rows, int64_t n) {
  const char* op = "sparse_outer_used";
  return outer_used(op, coeff, checked_outer(op, coeff, indices, rows, n), rows, n);
}

std::tuple<Tensor, Tensor> sparse_outer(Tensor coeff, Tensor indices, Tensor rows, int64_t n, bool across) {
  check_dim("sparse_outer", "rows", rows, 2);
  require(n >= 0, "sparse_outer", "expected n >= 0, got ", n);
  Tensor dw = new_weight(coeff, n, rows.size(1), across);
  Tensor db = allocate(coeff, {&n, 1});
  sparse_outer_out(coeff, indices, rows, dw, db);
  return {dw, db};
}

// ---------------------------------------------------------------- ragged pairs

// Without prefixes (rows, d) of all features, else (prefixes, rows, d).
Tensor ragged_decode(Tensor values, Tensor indices, Tensor offsets, Tensor w, std::optional<Tensor> b,
                     std::optional<std::vector<int64_t>> prefixes) {
  const char* op = "ragged_decode";
  check_dim(op, "values", values, 1);
  check_dim(op, "offsets", offsets, 1);
  check_dim(op, "W", w, 2);
  const int64_t pairs = values.size(0), rows = offsets.size(0) - 1, n = w.size(0), d = w.size(1);
  const std::vector<int64_t> limits = prefixes.value_or(std::vector<int64_t>{n});
  const ScalarType dtype = values.scalar_type();
  require(rows >= 0, op, "expected offsets of rows + 1 numbers");
  require(!limits.empty() && std::is_sorted(limits.begin(), limits.end()) && limits.back() == n, op,
          "expected ascending prefixes, the last of all features");
  check(op, "values", values, dtype, {pairs});
  check(op, "indices", indices, ScalarType::Long, {pairs});
  check(op, "offsets", offsets, ScalarType::Long, {rows + 1});
  check_weight(op, "W", w, dtype, n, d);
  if (b) check(op, "b", *b, dtype, {d});
  const int64_t* at = data<int64_t>(offsets);
  check_indices(op, data<int64_t>(indices), pairs, std::max<int64_t>(n, 1));
  require(at[0] == 0, op, "expected offsets from 0");
  for (int64_t r = 0; r < rows; ++r) require(at[r] <= at[r + 1], op, "expected ascending offsets");
  require(n > 0 || std::min(at[rows], pairs) == 0, op, "expected features, as there are codes");
  const int64_t sizes[] = {int64_t(limits.size()), rows, d};
  Tensor y = prefixes ? allocate(values, {sizes, 3}) : allocate(values, {sizes + 1, 2});
  decode(op, values, indices, w, b, {rows, 0, pairs, at}, limits, y);
  return y;
}

namespace {

// Pairs and the rows of a matrix that they name, -1 for none.
Pairs checked_pairs(const char* op, const Tensor& row_of, const Tensor& indices, const Tensor& rows, int64_t n) {
  check_dim(op, "indices", indices, 1);
  check_dim(op, "rows", rows, 2);
  check(op, "indices", indices, ScalarType::Long, {indices.size(0)});
  check(op, "row_of", row_of, ScalarType::Long, {indices.size(0)});
  check(op, "rows", rows, rows.scalar_type(), {rows.size(0), rows.size(1)});
  const int64_t pairs = indices.size(0), count = rows.size(0);
  check_indices(op, data<int64_t>(indices), pairs, n);
  const int64_t* row = data<int64_t>(row_of);
  for (int64_t p = 0; p < pairs; ++p) {
    if (row[p] < -1 || row[p] >= count) {
      throw std::out_of_range(std::string(op) + ": row " + std::to_string(row[p]) + " is out of range [-1, " +
                              std::to_string(count) + ")");
    }
  }
  return {data<int64_t>(indices), row, pairs, 0};
}

}  // namespace

Tensor ragged_dot(Tensor rows, Tensor row_of, Tensor indices, Tensor w) {
  const char* op = "ragged_dot";
  check_dim(op, "W", w, 2);
  const Pairs pairs = checked_pairs(op, row_of, indices, rows, w.size(0));
  check_weight(op, "W", w, rows.scalar_type(), w.size(0), rows.size(1));
  Tensor out = allocate(rows, {&pairs.count, 1});
  dot(op, rows, pairs, w, out);
  return out;
}

void ragged_outer_out(Tensor coeff, Tensor indices, Tensor row_of, Tensor rows, Tensor dw, Tensor db) {
  const char* op = "ragged_outer";
  check_dim(op, "dW", dw, 2);
  const Pairs pairs = checked_pairs(op, row_of, indices, rows, dw.size(0));
  check(op, "coeff", coeff, rows.scalar_type(), {pairs.count});
  check_sums(op, rows, dw, db);
  outer(op, coeff, pairs, rows, dw, db);
}

std::tuple<Tensor, Tensor, Tensor> ragged_outer_used(Tensor coeff, Tensor indices, Tensor row_of, Tensor rows,
                                                     int64_t n) {
  const char* op = "ragged_outer_used";
  require(n >= 0, op, "expected n >= 0, got ", n);
  const Pairs pairs = checked_pairs(op, row_of, indices, rows, n);
  check(op, "coeff", coeff, rows.scalar_type(), {pairs.count});
  return outer_used(op, coeff, pairs, rows, n);
}

std::tuple<Tensor, Tensor> ragged_outer(Tensor coeff, Tensor indices, Tensor row_of, Tensor rows, int64_t n,
                                        bool across) {
  check_dim("ragged_outer", "rows", rows, 2);
  require(n >= 0, "ragged_outer", "expected n >= 0, got ", n);
  Tensor dw = new_weight(rows, n, rows.size(1), across);
  Tensor db = allocate(rows, {&n, 1});
  ragged_outer_out(coeff, indices, row_of, rows, dw, db);
  return {dw, db};
}

}  // namespace clipsteer
