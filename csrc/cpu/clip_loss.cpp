// CLIP's loss of one process's batch as a whole; and the gradients of every loss of pairs, from what it keeps of them.
#include "softmaxes.h"

namespace clipsteer {

// The loss; the gradients of images and of texts, still times 2 B / scale; that of the scale.
std::tuple<Tensor, Tensor, Tensor, Tensor> clip_loss(Tensor image, Tensor text, Tensor scale, bool keep, bool need_image,
                                                     bool need_text, bool need_scale) {
  const char* op = "clip_loss";
  const Sizes sizes = check_batch(op, image, text);
  const int64_t n = sizes.rows;
  check(op, "scale", scale, sizes.wide, {});
  Tensor loss = fresh(image, {}, sizes.wide), d_scale = fresh(image, {}, sizes.wide);
  Tensor d_image = fresh(image, {need_image ? n : 0, sizes.d}, sizes.wide);
  Tensor d_text = fresh(image, {need_text ? n : 0, sizes.d}, sizes.wide);
  dispatch(op, sizes.dtype, [&](auto zero) {
    using T = decltype(zero);
    using V = Compute<T>;
    const V factor = *data<V>(scale);
    Softmaxes<T> all(data<T>(image), data<T>(text), n, sizes.d, factor, keep);
    Buffer<V> entropy(2 * n), own(n);
    V* u = entropy.get();
    double total = 0;
    for (int64_t i = 0; i < 2 * n; ++i) {
      u[i] = V(log_one_and(double(all.lse()[i])));
      total += double(u[i]);
    }
    *data<V>(loss) = V(total / double(2 * n));
    *data<V>(d_scale) = V(0);
    if (!need_image && !need_text && !need_scale) return;
    for (int64_t i = 0; i < n; ++i) {
      own.get()[i] = -(std::exp(all.lse()[i] - u[i]) + std::exp(all.lse()[n + i] - u[n + i]));
    }
    const double moment = all.gradients(u, own.get(), sizes.d, need_image ? data<V>(d_image) : nullptr,
                                        need_text ? data<V>(d_text) : nullptr);
    *data<V>(d_scale) = V(moment / double(factor) / double(2 * n));
  });
  return {loss, d_image, d_text, d_scale};
}

// What a cotangent of a loss makes of its gradients: of images and of texts, which are still times count / scale, in the
// dtype of `image`; of one number or of two.
std::tuple<Tensor, Tensor, Tensor, Tensor> contrast_grad(Tensor grad, Tensor image, std::optional<Tensor> scale,
                                                         int64_t count, Tensor d_image, Tensor d_text, Tensor d_scale,
                                                         std::optional<Tensor> d_bias) {
  const char* op = "contrast_grad";
  const ScalarType dtype = image.scalar_type(), wide = dtype == ScalarType::Double ? dtype : ScalarType::Float;
  for (const Tensor* t : {&d_image, &d_text}) {
    check_dim(op, "d_image, d_text", *t, 2);
    check(op, "d_image, d_text", *t, wide, {t->size(0), t->size(1)});
  }
  check(op, "grad", grad, wide, {});
  check(op, "d_scale", d_scale, wide, {});
  if (scale) check(op, "scale", *scale, wide, {});
  if (d_bias) check(op, "d_bias", *d_bias, wide, {});
  Tensor to_image = fresh(image, {d_image.size(0), d_image.size(1)}, dtype);
  Tensor to_text = fresh(image, {d_text.size(0), d_text.size(1)}, dtype);
  Tensor to_scale = fresh(image, {}, wide), to_bias = fresh(image, {}, wide);
  dispatch(op, dtype, [&](auto zero) {
    using T = decltype(zero);
    using V = Compute<T>;
    const V g = *data<V>(grad), factor = g * (scale ? *data<V>(*scale) : V(1)) / V(count);
    scaled<T>(d_image, factor, to_image);
    scaled<T>(d_text, factor, to_text);
    *data<V>(to_scale) = g * *data<V>(d_scale);
    *data<V>(to_bias) = d_bias ? g * *data<V>(*d_bias) : V(0);
  });
  return {to_image, to_text, to_scale, to_bias};
}

}  // namespace clipsteer
