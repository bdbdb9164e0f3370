// forecast_norm: check, lay out, launch. What the op means stands in lesa_kernels/reference.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cuda/entry.h"

namespace lesa::cuda {
namespace {

Tensor forecast_norm(const Tensor& ring, const Tensor& coefficients, const Tensor& offsets,
                     const std::vector<std::int64_t>& read, const std::vector<std::int64_t>& write, const Tensor& scale,
                     const Tensor& shift, double eps) {
  check_forecast_norm(ring, coefficients, offsets, read, write, scale, shift);
  const DeviceGuard guard(ring.get_device_index());
  const Shape shape = slot_shape(ring);
  Tensor out = torch::stable::new_empty(ring, {shape.sizes, shape.dims});
  const Target target = target_of("forecast_norm", ring);
  for_feature(ring.scalar_type(), [&]<typename T>() {
    const Rows rows = rows_of(ring);
    const auto slot = [&](std::int64_t index) {
      return static_cast<T*>(ring.data_ptr()) + index * rows.count * rows.channels;
    };
    NormedForecast<T> forecast{};
    forecast.rows = rows;
    forecast.rows_per_entry = rows.count / std::max<std::int64_t>(ring.size(1), 1);
    for (const std::int64_t index : read) {
      forecast.inputs.push_back(slot(index));
    }
    forecast.kept = write.empty() ? nullptr : slot(write[0]);
    forecast.out = static_cast<T*>(out.data_ptr());
    forecast.coefficients = parameter_of<T>(coefficients);
    forecast.offsets = parameter_of<T>(offsets);
    forecast.scale = parameter_of<T>(scale);
    forecast.shift = parameter_of<T>(shift);
    forecast.eps = static_cast<float>(eps);
    normalize(forecast, target);
  });
  return out;
}

}  // namespace
}  // namespace lesa::cuda

STABLE_TORCH_LIBRARY_IMPL(lesa, CUDA, m) { m.impl("forecast_norm", TORCH_BOX(&lesa::cuda::forecast_norm)); }
