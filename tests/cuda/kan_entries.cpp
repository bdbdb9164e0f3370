// The kernels of kan as C functions.
#include "entries.h"

using namespace lesa::cuda::entries;

namespace {

struct Layer {
  const void* x;
  Values parameters[4];  // grid, base, spline, scaler
  std::int64_t rows;
  std::int64_t inputs;
  std::int64_t outputs;
  int bases;
  int order;

  template <typename T>
  lesa::cuda::KanLayer<T> as() const {
    return {static_cast<const T*>(x),
            parameters[0].as<T>(),
            parameters[1].as<T>(),
            parameters[2].as<T>(),
            parameters[3].as<T>(),
            rows,
            inputs,
            outputs,
            bases,
            order};
  }
};

}  // namespace

extern "C" {

const char* run_kan_forward(const char* dtype, const Layer* layer, void* out) {
  return guarded([&] {
    for_type(dtype,
             [&]<typename T>() { lesa::cuda::KanKernels<T>::forward(layer->as<T>(), static_cast<T*>(out), kTarget); });
  });
}

const char* run_kan_backward(const char* dtype, const Layer* layer, const void* grad,
                             const lesa::cuda::KanGradients* gradients) {
  return guarded([&] {
    for_type(dtype, [&]<typename T>() {
      lesa::cuda::KanKernels<T>::backward(layer->as<T>(), static_cast<const T*>(grad), *gradients, kTarget);
    });
  });
}

}  // extern "C"
