// forecast, forecast_into and push on CUDA: check, allocate, launch. What each op means stands in
// lesa_kernels/ops/forecast.py.
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <vector>

#include "cuda/cuda_common.h"

namespace lesa::cuda {
namespace {

// The views are the inputs, one for each column of coefficients, then the outputs.
void combine(const char* op, const Tensor& like, Shape shape, const std::vector<TensorView>& views,
             const Tensor& coefficients, const Tensor& offsets) {
  const DeviceGuard guard(like.get_device_index());
  const Target target = target_of(op, like);
  const Tensors tensors = merge_tensors(op, shape, views, coefficients.size(1));
  for_feature(like.scalar_type(), [&]<typename T>() {
    ForecastKernels<T>::combine(tensors, {parameter_of<T>(coefficients), parameter_of<T>(offsets), {}}, target);
  });
}

std::vector<Tensor> forecast(const std::vector<Tensor>& history, const Tensor& coefficients, const Tensor& offsets) {
  check_history("forecast", history);
  check_rows("forecast", coefficients, offsets, history.size(), {"history", 0}, history[0]);
  std::vector<TensorView> views = views_of(history);
  std::vector<Tensor> outputs;
  outputs.reserve(coefficients.size(0));
  for (std::int64_t m = 0; m < coefficients.size(0); ++m) {
    outputs.push_back(fresh_like(history[0]));
    views.push_back(view_of(outputs.back()));
  }
  combine("forecast", history[0], shape_of(history[0]), views, coefficients, offsets);
  return outputs;
}

void forecast_into(const Tensor& ring, const Tensor& coefficients, const Tensor& offsets,
                   const std::vector<std::int64_t>& read, const std::vector<std::int64_t>& write) {
  check_forecast_into(ring, coefficients, offsets, read, write);
  std::vector<TensorView> views = views_of({});
  for (const std::int64_t slot : read) {
    views.push_back(view_of_slot(ring, slot));
  }
  for (const std::int64_t slot : write) {
    views.push_back(view_of_slot(ring, slot));
  }
  combine("forecast_into", ring, slot_shape(ring), views, coefficients, offsets);
}

void push(const Tensor& ring, const Tensor& feature, std::int64_t slot) {
  check_push(ring, feature, slot);
  const Tensors tensors = merge_tensors("push", slot_shape(ring), {view_of(feature), view_of_slot(ring, slot)}, 1);
  const DeviceGuard guard(ring.get_device_index());
  const Target target = target_of("push", ring);
  for_feature(ring.scalar_type(), [&]<typename To>() {
    for_feature(feature.scalar_type(), [&]<typename From>() { IdentityKernels<To>::copy(From{}, tensors, target); });
  });
}

}  // namespace
}  // namespace lesa::cuda

STABLE_TORCH_LIBRARY_IMPL(lesa, CUDA, m) {
  m.impl("forecast", TORCH_BOX(&lesa::cuda::forecast));
  m.impl("forecast_into", TORCH_BOX(&lesa::cuda::forecast_into));
  m.impl("push", TORCH_BOX(&lesa::cuda::push));
}
