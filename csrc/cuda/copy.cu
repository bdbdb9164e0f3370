// The kernel of push: a copy into a tensor of any strides, converting between feature dtypes.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/device.cuh"

namespace lesa::cuda {
namespace {

template <typename To, typename From, int kWidth, bool kStrided>
struct CopyTask {
  void* to;
  void* from;
  std::int64_t items;
  Walk<kStrided, 1, kWidth * sizeof(From), kWidth * sizeof(To)> walk;
};

template <typename To, typename From>
__device__ To convert(From value) {
  if constexpr (std::is_same_v<To, From>) {
    return value;
  } else {
    return narrow<To>(widen(value));
  }
}

template <typename To, typename From, int kWidth, bool kStrided>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    copy_kernel(const __grid_constant__ CopyTask<To, From, kWidth, kStrided> task) {
  const std::int64_t threads = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t first = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; first < task.items;
       first += kLoadsInFlight * threads) {
    Vector<From, kWidth> values[kLoadsInFlight];
#pragma unroll
    for (int i = 0; i < kLoadsInFlight; ++i) {
      const std::int64_t item = first + i * threads;
      if (item < task.items) {
        values[i] = load<From, kWidth>(advance(task.from, task.walk.input(0, task.walk.place(item))));
      }
    }
#pragma unroll
    for (int i = 0; i < kLoadsInFlight; ++i) {
      const std::int64_t item = first + i * threads;
      if (item < task.items) {
        Vector<To, kWidth> converted;
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          converted[e] = convert<To>(values[i][e]);
        }
        store<To, kWidth>(advance(task.to, task.walk.output(task.walk.place(item))), converted);
      }
    }
  }
}

template <typename To, typename From, int kWidth, bool kStrided>
void launch_copy(const Geometry& geometry, const Operand& to, const Operand& from, const Target& target) {
  CopyTask<To, From, kWidth, kStrided> task{to.data, from.data, geometry.numel / kWidth, {}};
  if constexpr (kStrided) {
    task.walk.extent = extent_of(geometry, kWidth);
    task.walk.inputs[0] = steps_of(geometry, from, kWidth, sizeof(From));
    task.walk.outputs = steps_of(geometry, to, kWidth, sizeof(To));
  }
  launch<copy_kernel<To, From, kWidth, kStrided>>(task, kLoadsInFlight, target);
}

}  // namespace

template <typename To, typename From>
void copy(const Geometry& geometry, const Operand& to, const Operand& from, const Target& target) {
  if (geometry.numel == 0) {
    return;
  }
  if (geometry.dims > kWalkedDims) {
    for (std::int64_t i = 0; i < geometry.sizes[0]; ++i) {
      copy<To, From>(without_first(geometry), at_first(to, i, sizeof(To)), at_first(from, i, sizeof(From)), target);
    }
    return;
  }
  constexpr int kWidth = vector_width(1, std::max(sizeof(To), sizeof(From)));
  if (!takes_vectors(geometry, to, kWidth, sizeof(To)) || !takes_vectors(geometry, from, kWidth, sizeof(From))) {
    launch_copy<To, From, 1, true>(geometry, to, from, target);
  } else if (geometry.dims > 1) {
    launch_copy<To, From, kWidth, true>(geometry, to, from, target);
  } else {
    const std::int64_t whole = geometry.numel / kWidth * kWidth;
    if (whole > 0) {
      launch_copy<To, From, kWidth, false>(geometry, to, from, target);
    }
    if (whole < geometry.numel) {
      launch_copy<To, From, 1, true>(from_element(geometry, whole), from_element(to, whole, sizeof(To)),
                                     from_element(from, whole, sizeof(From)), target);
    }
  }
}

template void copy<float, float>(const Geometry&, const Operand&, const Operand&, const Target&);
template void copy<float, float16>(const Geometry&, const Operand&, const Operand&, const Target&);
template void copy<float, bfloat16>(const Geometry&, const Operand&, const Operand&, const Target&);
template void copy<float16, float>(const Geometry&, const Operand&, const Operand&, const Target&);
template void copy<float16, float16>(const Geometry&, const Operand&, const Operand&, const Target&);
template void copy<float16, bfloat16>(const Geometry&, const Operand&, const Operand&, const Target&);
template void copy<bfloat16, float>(const Geometry&, const Operand&, const Operand&, const Target&);
template void copy<bfloat16, float16>(const Geometry&, const Operand&, const Operand&, const Target&);
template void copy<bfloat16, bfloat16>(const Geometry&, const Operand&, const Operand&, const Target&);

}  // namespace lesa::cuda
