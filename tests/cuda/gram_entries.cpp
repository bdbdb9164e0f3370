// gram as C functions.
#include "entries.h"

using namespace lesa::cuda::entries;

extern "C" {

std::int64_t workspace_of_gram() { return lesa::cuda::GramKernels<float>::workspace(kTarget); }

const char* run_gram(const char* dtype, int dims, const std::int64_t* sizes, int inputs, const lesa::TensorView* views,
                     double* workspace, double* result) {
  return guarded([&] {
    for_type(dtype, [&]<typename T>() {
      lesa::cuda::GramKernels<T>::sum_products(tensors_of(dims, sizes, inputs, views, inputs), workspace, result,
                                               kTarget);
    });
  });
}

}  // extern "C"
