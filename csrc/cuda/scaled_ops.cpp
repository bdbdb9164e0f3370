// push_scaled and forecast_scaled_into: check, lay out, launch. What each op means stands in lesa_kernels/reference.py.
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <vector>

#include "cuda/entry.h"

namespace lesa::cuda {
namespace {

// Calls body.operator()<Q>() for the type of a scaled ring's elements; the checks have admitted no other.
template <typename Body>
void for_scaled(ScalarType dtype, Body&& body) {
  for_dtype<std::int8_t, float8>(dtype, body);
}

template <typename Q>
ScaledSlot<Q> slot_of(const Tensor& ring, const Tensor& scales, std::int64_t index) {
  const auto [count, channels] = rows_of(ring);
  return {static_cast<Q*>(ring.data_ptr()) + index * count * channels,
          static_cast<float*>(scales.data_ptr()) + index * count};
}

void push_scaled(const Tensor& ring, const Tensor& scales, const Tensor& feature, std::int64_t slot) {
  check_push_scaled(ring, scales, feature, slot);
  const DeviceGuard guard(ring.get_device_index());
  const Target target = target_of("push_scaled", ring);
  for_scaled(ring.scalar_type(), [&]<typename Q>() {
    for_feature(feature.scalar_type(), [&]<typename T>() {
      copy_scaled(rows_of(ring), static_cast<const T*>(feature.data_ptr()), slot_of<Q>(ring, scales, slot), target);
    });
  });
}

void forecast_scaled_into(const Tensor& ring, const Tensor& scales, const Tensor& out, const Tensor& coefficients,
                          const Tensor& offsets, const std::vector<std::int64_t>& read,
                          const std::vector<std::int64_t>& write) {
  check_forecast_scaled_into(ring, scales, out, coefficients, offsets, read, write);
  const DeviceGuard guard(ring.get_device_index());
  const Target target = target_of("forecast_scaled_into", ring);
  for_scaled(ring.scalar_type(), [&]<typename Q>() {
    for_feature(out.scalar_type(), [&]<typename T>() {
      ScaledForecasts<Q, T> forecasts{};
      forecasts.rows = rows_of(ring);
      for (const std::int64_t index : read) {
        forecasts.inputs.push_back(slot_of<Q>(ring, scales, index));
      }
      for (const std::int64_t index : write) {
        forecasts.kept.push_back(index < 0 ? ScaledSlot<Q>{} : slot_of<Q>(ring, scales, index));
      }
      forecasts.out = static_cast<T*>(out.data_ptr());
      forecasts.coefficients = parameter_of<T>(coefficients);
      forecasts.offsets = parameter_of<T>(offsets);
      forecast_scaled(forecasts, target);
    });
  });
}

}  // namespace
}  // namespace lesa::cuda

STABLE_TORCH_LIBRARY_IMPL(lesa, CUDA, m) {
  m.impl("push_scaled", TORCH_BOX(&lesa::cuda::push_scaled));
  m.impl("forecast_scaled_into", TORCH_BOX(&lesa::cuda::forecast_scaled_into));
}
