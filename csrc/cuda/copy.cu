// The kernel of push: a copy into a tensor of any strides, converting between feature dtypes.
#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>

#include "cuda/pass.cuh"

namespace lesa::cuda {
namespace {

template <typename To, typename From, int kWidth, bool kStrided>
struct CopyTask {
  void* to;
  void* from;
  std::int64_t items;
  Walk<kStrided, 1, kWidth * sizeof(From), kWidth * sizeof(To)> walk;
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
    copy_kernel(const __grid_constant__ CopyTask<To, From, kWidth, kStrided> task) {
  constexpr int kItems = kCopyItems<From, kWidth>;
  const std::int64_t threads = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t first = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; first < task.items;
       first += kItems * threads) {
    Packed<From, kWidth> values[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const std::int64_t item = first + i * threads;
      if (item < task.items) {
        values[i] = load_packed<From, kWidth>(advance(task.from, task.walk.input(0, task.walk.place(item))));
      }
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const std::int64_t item = first + i * threads;
      if (item < task.items) {
        store<To, kWidth>(advance(task.to, task.walk.output(task.walk.place(item))), convert<To>(values[i]));
      }
    }
  }
}

template <typename To, typename From>
struct CopyPass {
  Geometry geometry;
  std::array<Operand, 2> operands;  // to, from
  int num_inputs = 1;

  static constexpr std::int64_t element_size(std::size_t i) { return i == 0 ? sizeof(To) : sizeof(From); }
};

// For run_pass.
template <int... kCounts>
struct CopyKernels {
  static constexpr int kRowInputs = 1;
  static constexpr int kElementInputs = 1;
};

template <typename To, typename From, int kWidth, bool kStrided>
void launch_copy(const CopyPass<To, From>& pass, const Target& target) {
  const auto& [to, from] = pass.operands;
  CopyTask<To, From, kWidth, kStrided> task{to.data, from.data, pass.geometry.numel / kWidth, {}};
  if constexpr (kStrided) {
    task.walk.extent = extent_of(pass.geometry, kWidth);
    task.walk.inputs[0] = steps_of(pass.geometry, from, kWidth, sizeof(From));
    task.walk.outputs = steps_of(pass.geometry, to, kWidth, sizeof(To));
  }
  launch<copy_kernel<To, From, kWidth, kStrided>>(task, kCopyItems<From, kWidth>, target);
}

}  // namespace

template <typename To, typename From>
void copy(const Geometry& geometry, const Operand& to, const Operand& from, const Target& target) {
  constexpr int kBytes = std::max(sizeof(To), sizeof(From));
  run_pass<kBytes>(CopyKernels<1>{}, CopyPass<To, From>{geometry, {to, from}},
                   [&]<int, int kWidth, bool kStrided>(const CopyPass<To, From>& part) {
                     launch_copy<To, From, kWidth, kStrided>(part, target);
                   });
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
