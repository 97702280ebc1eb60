// The kernels of one instruction set: isa.cpp includes this once for each, with CLIPSTEER_LEVEL,
// ISA (a namespace) and TARGET (a function attribute) defined. The loops are vectorised by the
// compiler for each target. No include guard on purpose.

#include "lanes.h"
#include "topk.h"
#include "rows.h"
#include "drift.h"
#include "drrho.h"
#include "distill.h"
#include "siglip.h"
#include "adam.h"
#include "agreement.h"
#include "transpose.h"
#if CLIPSTEER_LEVEL > 0
#include "blocks.h"
#include "dots.h"
#endif
#include "gather.h"

namespace clipsteer::ISA {

template <class T>
constexpr RowProducts<T> kRowProducts = {
#if CLIPSTEER_LEVEL > 0
    .dots = dots,
    .spread = spread,
#endif
};

template <class V>
constexpr Kernels<V> kKernels = {
    .rows = kRowProducts<V>,
    .filter = filter,
    .seed = seed,
    .add = add<V, V>,
    .finish = add<V, V>,
    .row_dots = row_dots<V>,
    .dot = dot,
    .square = square,
    .distance = distance,
    .repel = repel,
    .log_weights = log_weights,
    .weights = weights,
    .settle = settle,
    .maxima = maxima,
    .pair_sums = pair_sums,
    .pair_weights = pair_weights,
    .cross_sums = cross_sums,
    .cross_weights = cross_weights,
    .sigmoid_weights = sigmoid_weights,
    .adam = adam,
    .largest = largest<V>,
    .length = length<V>,
    .integers = integers<V>,
    .larger_rows = larger_rows<V>,
    .order_rows = order_rows<V>,
    .larger = larger<V>,
    .apart = apart<V>,
    .add_columns = add_columns<V>,
    .signs = signs<V>,
    .signed_order = signed_order<V>,
    .turn = turn,
#if CLIPSTEER_LEVEL > 0
    .block_columns = kBlockBytes / sizeof(V),
    .block = block,
    .inner = inner<V, V>,
    .pack = pack,
#endif
};

template <class T>
  requires kNarrow<T>
constexpr Kernels<T> kKernels<T> = {
    .rows = kRowProducts<T>,
    .widen = widen,
    .narrow = narrow,
    .square = square,
    .settle = settle,
    .add = add<T, float>,
    .finish = add<T, T>,
    .row_dots = row_dots<T>,
    .turn = turn,
#if CLIPSTEER_LEVEL > 0
    .inner = inner<float, T>,
    .lay = lay<T>,
#endif
};

constexpr Isa table(int64_t level, Screening screening = {}, PairProducts pairs = {},
                    PairScreening by_pairs = {}) {
  return {kKernels<float>, kKernels<double>, kKernels<BFloat16>, kKernels<Half>, screening, pairs,
          by_pairs,        level};
}

}  // namespace clipsteer::ISA

#undef CLIPSTEER_LEVEL
#undef ISA
#undef TARGET
