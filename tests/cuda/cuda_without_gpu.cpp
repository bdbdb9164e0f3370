// Stands in for the CUDA runtime under code that nvcc compiled, so that its host side runs without a GPU: it keeps the
// names under which kernels are registered and hands each launch to a callback (engines.py simulates it). Pointers to
// device memory are whatever the caller passes. It behaves as if a graph were being captured: a kernel must be loaded
// before it is launched, and in the relaxed mode.
#include <cuda_runtime_api.h>

#include <map>
#include <set>
#include <string>
#include <utility>

namespace {

using Launched = void (*)(const char* kernel, int blocks, int threads, const void* task);

Launched launched = nullptr;
cudaError_t launch_result = cudaSuccess;

cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
std::set<const void*> loaded;

std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> known;
  return known;
}

cudaError_t load(const void* host) {
  if (!loaded.contains(host) && mode != cudaStreamCaptureModeRelaxed) {
    return cudaErrorStreamCaptureUnsupported;
  }
  loaded.insert(host);
  return cudaSuccess;
}

}  // namespace

extern "C" {

void on_launch(Launched callback) { launched = callback; }

void fail_launches(int error) { launch_result = static_cast<cudaError_t>(error); }

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
  if (!loaded.contains(host) || mode == cudaStreamCaptureModeRelaxed) {
    return cudaErrorStreamCaptureUnsupported;
  }
  if (launch_result == cudaSuccess) {
    launched(names().at(host).c_str(), static_cast<int>(blocks.x), static_cast<int>(threads.x), arguments[0]);
  }
  return launch_result;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* other) {
  std::swap(mode, *other);
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void* host) { return load(host); }

const char* cudaGetErrorString(cudaError_t error) {
  return error == launch_result ? "the launch was refused" : "not permitted while a stream is captured";
}

// A device of one multiprocessor that holds two blocks: small inputs make threads loop.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 1;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* host, int, std::size_t,
                                                                   unsigned) {
  *blocks = 2;
  return load(host);
}

}  // extern "C"
