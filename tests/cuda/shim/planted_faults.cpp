// Kernels that are wrong on purpose: tests/cuda/planted_faults.py checks that the shim and the sanitizers say
// so.
#include "../entries.h"
#include "cuda/launch.cuh"

namespace {

struct Nothing {};

struct Place {
  void* data;
};

__global__ void misaligned_load(const Place task) {
  const auto packed = lesa::cuda::load_packed<float, 4>(lesa::cuda::advance(task.data, 4));
  lesa::cuda::store<float, 4>(task.data, std::bit_cast<std::array<float, 4>>(packed));
}

__global__ void partial_barrier(const Nothing) {
  if (threadIdx.x >= 32) {
    __syncthreads();
  }
}

__global__ void partial_shuffle(const Nothing) {
  if (threadIdx.x != 5) {
    __shfl_xor_sync(0xffffffffu, 1.0f, 1);
  }
}

}  // namespace

using namespace lesa::cuda;

extern "C" {

const char* run_misaligned_load(void* data) {
  return entries::guarded([=] { launch_blocks<misaligned_load>(Place{data}, 1, entries::kTarget); });
}

const char* run_partial_barrier() {
  return entries::guarded([] { launch_blocks<partial_barrier>(Nothing{}, 1, entries::kTarget); });
}

const char* run_partial_shuffle() {
  return entries::guarded([] { launch_blocks<partial_shuffle>(Nothing{}, 1, entries::kTarget); });
}

}  // extern "C"
