// What the ops on CUDA share: the stream, and arguments as the kernels take them.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "contract.h"
#include "cuda/kernels.h"
#include "cuda/launch_config.h"

// Lives in libtorch_cuda. Weak, so that this library builds and loads beside a torch without CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(std::int32_t device, void** stream);

namespace lesa::cuda {

static_assert(kMaxHistory == kMostInputs && kMaxForecasts == kMostOutputs);

using torch::stable::accelerator::DeviceGuard;

inline Target target_of(const char* op, const Tensor& tensor) {
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    refuse(op, "CUDA kernels must run in a torch built with CUDA, got one without");
  }
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return {op, tensor.get_device_index(), static_cast<cudaStream_t>(stream)};
}

// Calls body.operator()<T>() for the features' type; the checks have admitted no other.
template <typename Body>
void for_feature(ScalarType dtype, Body&& body) {
  for_dtype<float, float16, bfloat16>(dtype, body);
}

inline Result result_of(const Tensor& tensor) { return {tensor.data_ptr(), tensor.scalar_type() == ScalarType::Float}; }

inline Tensor fresh(const Tensor& like, std::initializer_list<std::int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, dtype);
}

// With room for the tensors that an op adds.
inline std::vector<TensorView> views_of(const std::vector<Tensor>& tensors) {
  std::vector<TensorView> views;
  views.reserve(kMaxHistory + kMaxForecasts);
  for (const Tensor& tensor : tensors) {
    views.push_back(view_of(tensor));
  }
  return views;
}

// Merges the dimensions of `inputs` inputs and further tensors.
inline Tensors merge_tensors(const char* op, Shape shape, const std::vector<TensorView>& views, std::size_t inputs) {
  Tensors tensors{{}, std::vector<Operand>(views.size()), static_cast<int>(inputs)};
  tensors.merged = lay_out(op, shape, views, tensors.operands);
  return tensors;
}

}  // namespace lesa::cuda
