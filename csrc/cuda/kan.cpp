// kan_linear and its backward on CUDA: check, allocate, launch. What each op means stands in lesa_kernels/ops/kan.py.
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "cuda/cuda_common.h"

namespace lesa::cuda {
namespace {

// The arguments of kan_linear, contiguous.
struct Arguments {
  Tensor x, grid, base, spline, scaler;

  Arguments(const char* op, const Tensor& x_, const Tensor& grid_, const Tensor& base_, const Tensor& spline_,
            const Tensor& scaler_) {
    check_kan_linear(op, x_, grid_, base_, spline_, scaler_);
    const std::int64_t bases = spline_.size(2), order = grid_.size(1) - bases - 1;
    if (bases > kMostBases) {
      refuse(op, "spline_weight must have at most ", kMostBases, " bases on CUDA, got ", bases);
    }
    if (order > kMostOrder) {
      refuse(op, "grid must make splines of order ", kMostOrder, " or less on CUDA, got order ", order);
    }
    const DeviceGuard guard(x_.get_device_index());
    x = torch::stable::contiguous(x_);
    grid = torch::stable::contiguous(grid_);
    base = torch::stable::contiguous(base_);
    spline = torch::stable::contiguous(spline_);
    scaler = torch::stable::contiguous(scaler_);
  }

  template <typename T>
  KanLayer<T> layer() const {
    const std::int64_t inputs = x.size(x.dim() - 1);
    std::int64_t rows = 1;
    for (std::int64_t d = 0; d + 1 < x.dim(); ++d) {
      rows *= x.size(d);
    }
    const auto bases = static_cast<int>(spline.size(2));
    return {static_cast<const T*>(x.data_ptr()),
            flat<T>(grid),
            flat<T>(base),
            flat<T>(spline),
            flat<T>(scaler),
            rows,
            inputs,
            base.size(0),
            bases,
            static_cast<int>(grid.size(1)) - bases - 1};
  }

  // [..., O]
  std::vector<std::int64_t> output_sizes() const {
    std::vector<std::int64_t> sizes(x.sizes().begin(), x.sizes().end());
    sizes.back() = base.size(0);
    return sizes;
  }

 private:
  template <typename T>
  static Parameter<T> flat(const Tensor& tensor) {
    return {tensor.data_ptr(), 0, 1, tensor.scalar_type() == ScalarType::Float};
  }
};

Tensor kan_linear(const Tensor& x, const Tensor& grid, const Tensor& base_weight, const Tensor& spline_weight,
                  const Tensor& spline_scaler) {
  const Arguments arguments("kan_linear", x, grid, base_weight, spline_weight, spline_scaler);
  const DeviceGuard guard(x.get_device_index());
  Tensor out = torch::stable::new_empty(x, arguments.output_sizes());
  const Target target = target_of("kan_linear", x);
  for_feature(x.scalar_type(), [&]<typename T>() {
    KanKernels<T>::forward(arguments.layer<T>(), static_cast<T*>(out.data_ptr()), target);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> kan_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& grid,
                                                               const Tensor& base_weight, const Tensor& spline_weight,
                                                               const Tensor& spline_scaler) {
  const char* op = "kan_linear_backward";
  const Arguments arguments(op, x, grid, base_weight, spline_weight, spline_scaler);
  const std::vector<std::int64_t> sizes = arguments.output_sizes();
  check_gradient(op, grad, {sizes.data(), sizes.size()}, {"x"}, x);
  const DeviceGuard guard(x.get_device_index());
  const Tensor slopes = torch::stable::contiguous(grad);
  Tensor of_x = fresh_like(x), of_base = fresh_like(base_weight), of_spline = fresh_like(spline_weight),
         of_scaler = fresh_like(spline_scaler);
  const KanGradients gradients{of_x.data_ptr(), result_of(of_base), result_of(of_spline), result_of(of_scaler)};
  const Target target = target_of(op, x);
  for_feature(x.scalar_type(), [&]<typename T>() {
    KanKernels<T>::backward(arguments.layer<T>(), static_cast<const T*>(slopes.data_ptr()), gradients, target);
  });
  return {of_x, of_base, of_spline, of_scaler};
}

}  // namespace
}  // namespace lesa::cuda

STABLE_TORCH_LIBRARY_IMPL(lesa, CUDA, m) {
  m.impl("kan_linear", TORCH_BOX(&lesa::cuda::kan_linear));
  m.impl("kan_linear_backward", TORCH_BOX(&lesa::cuda::kan_linear_backward));
}
