// Lets g++ compile the kernels for the host, sanitizers included: the threads of a block run as fibers, one at a time,
// and switch where CUDA's threads wait for each other. A barrier or shuffle that some threads miss is an error. Blocks
// run one after the other, so a race does not show here; the PTX simulator looks for those.
#pragma once

#include <array>
#include <cstring>
#include <functional>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// Those of the fiber that runs.
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

constexpr int kWarp = 32;

// Runs body once for every thread of every block; throws std::runtime_error where threads wait for each other in vain.
void run_grid(dim3 blocks, dim3 threads, const std::function<void()>& body);

void wait_for_block();

// Hands 8 bytes of this lane to its warp and returns those of every lane.
const std::array<unsigned long long, kWarp>& exchange_in_warp(unsigned long long bits);

template <typename T>
T shuffled(T value, int view) {
  static_assert(sizeof(T) <= sizeof(unsigned long long));
  unsigned long long bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const auto& all = exchange_in_warp(bits);
  std::memcpy(&value, &all[view], sizeof(T));
  return value;
}

}  // namespace shim

inline void __syncthreads() { shim::wait_for_block(); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return shim::shuffled(value, static_cast<int>(threadIdx.x % shim::kWarp) ^ mask);
}

cudaError_t launch_result();

template <typename Task>
cudaError_t cudaLaunchKernel(void (*kernel)(Task), dim3 blocks, dim3 threads, void** arguments, std::size_t,
                             cudaStream_t) {
  if (launch_result() == cudaSuccess) {
    shim::run_grid(blocks, threads, [&] { kernel(*static_cast<const std::remove_cv_t<Task>*>(arguments[0])); });
  }
  return launch_result();
}

template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, std::size_t) {
  *blocks = 2;
  return cudaSuccess;
}
