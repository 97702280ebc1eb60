// The sigmoid loss of all pairs and its gradients in one sweep: no pair's weight depends on another pair.
#include "softmaxes.h"

namespace clipsteer {
namespace {

// With z = S scale + bias, l = softplus(z) and w = sigmoid(z), of a row's own partner softplus(-z) and -sigmoid(-z): the
// sums of l, of w S and of w to `total`; w cols and w^T rows.
template <class T>
void sigmoid_sweep(Sweep<T>& sweep, Compute<T> scale, Compute<T> bias, int64_t offset, int64_t width,
                   Compute<T>* d_rows, Compute<T>* d_cols, double (&total)[3]) {
  using V = Compute<T>;
  const int64_t stride = sweep.stride(), n = sweep.columns();
  std::vector<double> parts(3 * sweep.tile_rows());
  sweep.gradients(width, d_rows, d_cols, true, [&](int64_t at, int64_t count, V* P) {
    sweep.similarities(at, count, P);
    sweep.each_row(count, [&](int64_t i) {
      V* row = P + i * stride;
      const int64_t self = std::min(offset + at + i, n);
      const int64_t starts[] = {0, self, std::min(self + 1, n), n};
      double* part = parts.data() + 3 * i;
      std::fill_n(part, 3, 0.0);
      for (int piece = 0; piece < 3; ++piece) {
        // of its own partner, with both signs exchanged
        const V sign = piece == 1 ? V(-1) : V(1);
        const int64_t j = starts[piece];
        V some[3];
        kernels<V>().sigmoid_weights(row + j, sign, scale, bias, some, starts[piece + 1] - j);
        for (int s = 0; s < 3; ++s) part[s] += double(some[s]);
      }
    });
    for (int64_t i = 0; i < 3 * count; ++i) total[i % 3] += parts[i];
  });
}

}  // namespace

// An offset of as many as there are columns: no row has its partner here.
std::tuple<Tensor, Tensor, Tensor> siglip_sweep(Tensor rows, Tensor cols, Tensor scale, Tensor bias, int64_t offset,
                                                bool need_rows, bool need_cols) {
  const char* op = "siglip_sweep";
  const Sizes sizes = check_features(op, rows, cols, offset, true);
  check(op, "scale", scale, sizes.wide, {});
  check(op, "bias", bias, sizes.wide, {});
  Tensor sums = fresh(rows, {3}, sizes.wide);
  Tensor d_rows = fresh(rows, {need_rows ? sizes.rows : 0, sizes.d}, sizes.wide);
  Tensor d_cols = fresh(rows, {need_cols ? sizes.columns : 0, sizes.d}, sizes.wide);
  dispatch(op, sizes.dtype, [&](auto zero) {
    using T = decltype(zero);
    using V = Compute<T>;
    Sweep<T> sweep(data<T>(rows), data<T>(cols), sizes.rows, sizes.columns, sizes.d);
    double total[3] = {};
    sigmoid_sweep(sweep, *data<V>(scale), *data<V>(bias), offset, sizes.d, need_rows ? data<V>(d_rows) : nullptr,
                  need_cols ? data<V>(d_cols) : nullptr, total);
    for (int s = 0; s < 3; ++s) data<V>(sums)[s] = V(total[s]);
  });
  return {sums, d_rows, d_cols};
}

// The loss of a batch of one process; the gradients of images and of texts, still times B / scale; those of scale and bias.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> siglip_loss(Tensor image, Tensor text, Tensor scale, Tensor bias,
                                                               bool need_image, bool need_text) {
  const char* op = "siglip_loss";
  const Sizes sizes = check_batch(op, image, text);
  const int64_t n = sizes.rows;
  check(op, "scale", scale, sizes.wide, {});
  check(op, "bias", bias, sizes.wide, {});
  Tensor numbers[3];  // loss, d_scale, d_bias
  for (Tensor& number : numbers) number = fresh(image, {}, sizes.wide);
  Tensor d_image = fresh(image, {need_image ? n : 0, sizes.d}, sizes.wide);
  Tensor d_text = fresh(image, {need_text ? n : 0, sizes.d}, sizes.wide);
  dispatch(op, sizes.dtype, [&](auto zero) {
    using T = decltype(zero);
    using V = Compute<T>;
    Sweep<T> sweep(data<T>(image), data<T>(text), n, n, sizes.d);
    double total[3] = {};
    sigmoid_sweep(sweep, *data<V>(scale), *data<V>(bias), 0, sizes.d, need_image ? data<V>(d_image) : nullptr,
                  need_text ? data<V>(d_text) : nullptr, total);
    for (int s = 0; s < 3; ++s) *data<V>(numbers[s]) = V(total[s] / double(n));
  });
  return {numbers[0], d_image, d_text, numbers[1], numbers[2]};
}

}  // namespace clipsteer
