// The schemas of the CUDA backend, and what the GPU runs for them.
#include "cuda.cuh"
#include "../registration.h"

namespace clipsteer::cuda {
namespace {

void define(StableLibrary& m) {
  m.def("topk_encode(Tensor x, Tensor W_enc, Tensor? b_enc, int k) -> (Tensor acts, Tensor indices)");
  m.def("sparse_decode(Tensor acts, Tensor indices, Tensor W, Tensor? b) -> Tensor");
  m.def("gather_dot(Tensor rows, Tensor indices, Tensor W) -> Tensor");
  m.def("sparse_outer(Tensor coeff, Tensor indices, Tensor rows, SymInt n) -> (Tensor dW, Tensor db)");
  m.def("sparse_outer_out(Tensor coeff, Tensor indices, Tensor rows, Tensor(a!) dW, Tensor(b!) db) -> ()");
}

void implement(StableLibrary& m) {
  m.impl("topk_encode", TORCH_BOX(&clipsteer::cuda::topk_encode));
  m.impl("sparse_decode", TORCH_BOX(&clipsteer::cuda::sparse_decode));
  m.impl("gather_dot", TORCH_BOX(&clipsteer::cuda::gather_dot));
  m.impl("sparse_outer", TORCH_BOX(&clipsteer::cuda::sparse_outer));
  m.impl("sparse_outer_out", TORCH_BOX(&clipsteer::cuda::sparse_outer_out));
}

const Registration registration("cuda", {{StableLibrary::Kind::DEF, nullptr, define},
                                         {StableLibrary::Kind::IMPL, "CUDA", implement}});

}  // namespace
}  // namespace clipsteer::cuda

extern "C" __attribute__((visibility("default"))) const char* clipsteer_refusal() {
  return clipsteer::cuda::registration.refusal();
}
