// reduce as C functions.
#include "entries.h"

using namespace lesa::cuda::entries;

extern "C" {

std::int64_t workspace_of_reduce(int inputs) { return lesa::cuda::PredictKernels<float>::workspace(inputs, kTarget); }

const char* run_reduce(const char* dtype, int dims, const std::int64_t* sizes, int inputs, int count,
                       const lesa::TensorView* views, const Values* values, double* workspace,
                       const lesa::cuda::Gradients* gradients) {
  return guarded([&] {
    for_type(dtype, [&]<typename T>() {
      lesa::cuda::PredictKernels<T>::reduce(tensors_of(dims, sizes, count, views, inputs), map_of<T>(values), workspace,
                                            *gradients, kTarget);
    });
  });
}

}  // extern "C"
