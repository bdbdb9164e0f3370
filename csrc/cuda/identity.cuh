// The kernel of identity and push: a copy between tensors of any strides. The conversions between dtypes are push's.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <type_traits>

#include "cuda/launch.cuh"

namespace lesa::cuda {

template <typename To, typename From, int kWidth, bool kStrided>
struct CopyParams : FeatureParams<From, 1, kWidth, kStrided, To> {
  void* output;
};

template <typename To, typename From, int kWidth>
__device__ Vector<To, kWidth> convert(const Packed<From, kWidth>& values) {
  if constexpr (std::is_same_v<To, From>) {
    return std::bit_cast<Vector<To, kWidth>>(values);
  } else {
    Vector<To, kWidth> converted;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      converted[e] = narrow<To>(values.widened(e));
    }
    return converted;
  }
}

template <typename From, int kWidth>
inline constexpr int kCopyItems = items_in_flight(1, sizeof(From) * kWidth);

template <typename To, typename From, int kWidth, bool kStrided>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    copy_kernel(const __grid_constant__ CopyParams<To, From, kWidth, kStrided> params) {
  constexpr int kItems = kCopyItems<From, kWidth>;
  const std::int64_t threads = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t first = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; first < params.items;
       first += kItems * threads) {
    Packed<From, kWidth> values[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const std::int64_t item = first + i * threads;
      if (item < params.items) {
        values[i] = params.load_input(0, params.iterator.position(item));
      }
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const std::int64_t item = first + i * threads;
      if (item < params.items) {
        const std::int64_t offset = params.iterator.output(params.iterator.position(item));
        store<To, kWidth>(advance(params.output, offset), convert<To>(values[i]));
      }
    }
  }
}

template <typename To, typename From>
void launch_copies(const Tensors& tensors, const Target& target) {
  constexpr int kBytes = std::max(sizeof(To), sizeof(From));
  launch_parts<kBytes>(KernelSizes<1, 1, 1>{}, tensors, [&]<int, int kWidth, bool kStrided>(const Tensors& part) {
    CopyParams<To, From, kWidth, kStrided> params{};
    params.set_tensors(part, 1, 0);
    params.output = part.operands[1].data;
    launch<copy_kernel<To, From, kWidth, kStrided>>(params, kCopyItems<From, kWidth>, target);
  });
}

template <typename To>
void IdentityKernels<To>::copy(float, const Tensors& tensors, const Target& target) {
  launch_copies<To, float>(tensors, target);
}

template <typename To>
void IdentityKernels<To>::copy(float16, const Tensors& tensors, const Target& target) {
  launch_copies<To, float16>(tensors, target);
}

template <typename To>
void IdentityKernels<To>::copy(bfloat16, const Tensors& tensors, const Target& target) {
  launch_copies<To, bfloat16>(tensors, target);
}

}  // namespace lesa::cuda
