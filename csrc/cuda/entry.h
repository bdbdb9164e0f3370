// What the entries of all ops on CUDA share: the current stream and the features' type.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <cstdint>

#include "contract.h"
#include "cuda/kernels.h"

// Lives in libtorch_cuda. Weak, so that this library builds and loads beside a torch without CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(std::int32_t device, void** stream);

namespace lesa::cuda {

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

}  // namespace lesa::cuda
