// Stands in for the CUDA runtime, so that the host side of the kernels runs without a GPU: it keeps the names under
// which kernels are registered and hands each launch to a callback (test_cuda_ptx.py simulates it). Pointers to device
// memory are whatever the caller passes.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "cuda/kernels.h"

namespace {

using Launched = void (*)(const char* kernel, int blocks, int threads, const void* task);

Launched launched = nullptr;
cudaError_t launch_result = cudaSuccess;

std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> known;
  return known;
}

// lesa::Parameter without its type.
struct Values {
  const void* data;
  std::int64_t row_stride;
  std::int64_t column_stride;
  bool is_float;

  template <typename T>
  lesa::Parameter<T> as() const {
    return {data, row_stride, column_stride, is_float};
  }
};

constexpr lesa::cuda::Target kTarget{"test", 0, nullptr};

template <typename T>
void combine(std::span<const std::int64_t> sizes, std::span<const lesa::Source> sources, int inputs,
             const Values* values) {
  std::vector<lesa::Operand> operands(sources.size());
  const lesa::Geometry geometry = lesa::merge_dimensions(sizes, sources, operands);
  lesa::cuda::combine<T>({geometry, operands, inputs, values[0].as<T>(), values[1].as<T>(), values[2].as<T>()},
                         kTarget);
}

template <typename To, typename From>
void copy(std::span<const std::int64_t> sizes, const lesa::Source* sources) {
  lesa::Operand operands[2]{};
  const lesa::Geometry geometry = lesa::merge_dimensions(sizes, {sources, 2}, operands);
  lesa::cuda::copy<To, From>(geometry, operands[0], operands[1], kTarget);
}

// Calls body.operator()<T>() for float32, float16 or bfloat16.
template <typename Body>
void for_type(const std::string& name, Body&& body) {
  if (name == "float32") {
    body.template operator()<float>();
  } else if (name == "float16") {
    body.template operator()<lesa::float16>();
  } else {
    body.template operator()<lesa::bfloat16>();
  }
}

// Keeps the message of what body throws; an empty one means success.
template <typename Body>
const char* guarded(Body&& body) {
  static std::string message;
  message.clear();
  try {
    body();
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

}  // namespace

extern "C" {

void on_launch(Launched callback) { launched = callback; }

void fail_launches(int error) { launch_result = static_cast<cudaError_t>(error); }

const char* run_combine(const char* dtype, int dims, const std::int64_t* sizes, int inputs, int count,
                        const lesa::Source* sources, const Values* values) {
  return guarded([&] {
    for_type(dtype, [&]<typename T>() {
      combine<T>({sizes, static_cast<std::size_t>(dims)}, {sources, static_cast<std::size_t>(count)}, inputs, values);
    });
  });
}

const char* run_copy(const char* to, const char* from, int dims, const std::int64_t* sizes,
                     const lesa::Source* sources) {
  return guarded([&] {
    for_type(to, [&]<typename To>() {
      for_type(from, [&]<typename From>() { copy<To, From>({sizes, static_cast<std::size_t>(dims)}, sources); });
    });
  });
}

// What nvcc's code calls when it is loaded.
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  names()[host] = name;
}

// What the stubs of kernels would call; kernels are launched by cudaLaunchKernel alone.
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, std::size_t, cudaStream_t) {
  return cudaErrorNotSupported;
}
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, std::size_t*, void*) { return cudaErrorNotSupported; }

cudaError_t cudaLaunchKernel(const void* host, dim3 blocks, dim3 threads, void** arguments, std::size_t, cudaStream_t) {
  if (launch_result == cudaSuccess) {
    launched(names().at(host).c_str(), static_cast<int>(blocks.x), static_cast<int>(threads.x), arguments[0]);
  }
  return launch_result;
}

const char* cudaGetErrorString(cudaError_t) { return "the launch was refused"; }

// A device of one multiprocessor that holds two blocks: small inputs make threads loop.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 1;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, std::size_t,
                                                                   unsigned) {
  *blocks = 2;
  return cudaSuccess;
}

}  // extern "C"
