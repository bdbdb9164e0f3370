// What all kernels share: vectors, walks over strided tensors, and the launch.
#pragma once

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error \
    "lesa-kernels needs GPUs of compute capability 8.0 or newer: older ones have no instruction that rounds to bfloat16"
#endif

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/kernels.h"
#include "cuda/plan.h"
#include "strides.h"

namespace lesa::cuda {

// The unsigned integers that one load or store of this many bytes moves.
template <int kBytes>
struct Word;
template <>
struct Word<16> {
  using type = uint4;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<2> {
  using type = unsigned short;
};

template <typename T, int kWidth>
using Vector = std::array<T, kWidth>;

// A vector as it is loaded: 16-bit elements stay in pairs until they are widened.
template <typename T, int kWidth>
struct Packed {
  typename Word<kWidth * sizeof(T)>::type bits;

  // An element as a float. Of two bfloat16 in a word, one needs a shift and the other a mask, nothing more.
  __device__ float widened(int element) const {
    if constexpr (std::is_same_v<T, bfloat16> && kWidth % 2 == 0) {
      const std::uint32_t word = std::bit_cast<std::array<std::uint32_t, kWidth / 2>>(bits)[element / 2];
      return std::bit_cast<float>(element % 2 == 0 ? word << 16 : word & 0xffff0000u);
    } else {
      return widen(std::bit_cast<Vector<T, kWidth>>(bits)[element]);
    }
  }
};

template <typename T, int kWidth>
__device__ Packed<T, kWidth> load_packed(const void* address) {
  return {*static_cast<const typename Word<kWidth * sizeof(T)>::type*>(address)};
}

template <typename T, int kWidth>
__device__ Vector<T, kWidth> load(const void* address) {
  return std::bit_cast<Vector<T, kWidth>>(load_packed<T, kWidth>(address));
}

template <typename T, int kWidth>
__device__ void store(void* address, const Vector<T, kWidth>& vector) {
  using Bits = typename Word<kWidth * sizeof(T)>::type;
  *static_cast<Bits*>(address) = std::bit_cast<Bits>(vector);
}

template <typename A>
__device__ A sum_of_warp(A value) {
#pragma unroll
  for (int mask = kWarpThreads / 2; mask > 0; mask /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, mask);
  }
  return value;
}

// Writes a gradient of a parameter: float32 or the features' type.
template <typename T>
__device__ void write(const Result& result, std::int64_t index, double value) {
  if (result.is_float) {
    static_cast<float*>(result.data)[index] = static_cast<float>(value);
  } else {
    static_cast<T*>(result.data)[index] = narrow<T>(static_cast<float>(value));
  }
}

// The dimensions that a kernel walks, right-aligned (the others have size 1), in items along the last one.
struct Extent {
  Divisor sizes[kWalkedDims];
};

// Strides of one tensor along those dimensions, in bytes from item to item.
struct Steps {
  std::int64_t bytes[kWalkedDims];
};

using Coordinates = std::array<std::uint32_t, kWalkedDims>;

// Where an item lies in each tensor, in bytes from its first element. This one: in tensors of any strides, of at most
// kMostStrided items.
template <int kInputs>
struct StridedWalk {
  Extent extent;
  Steps inputs[kInputs];
  Steps outputs;

  __device__ Coordinates place(std::int64_t item) const {
    Coordinates result{};
    auto rest = static_cast<std::uint32_t>(item);
#pragma unroll
    for (int d = kWalkedDims - 1; d > 0; --d) {
      const std::uint32_t quotient = extent.sizes[d].quotient(rest);
      result[d] = rest - quotient * extent.sizes[d].size;
      rest = quotient;
    }
    result[0] = rest;
    return result;
  }

  __device__ static std::int64_t offset(const Steps& steps, const Coordinates& place) {
    std::int64_t result = 0;
#pragma unroll
    for (int d = 0; d < kWalkedDims; ++d) {
      result += place[d] * steps.bytes[d];
    }
    return result;
  }

  __device__ std::int64_t input(int k, const Coordinates& place) const { return offset(inputs[k], place); }
  __device__ std::int64_t output(const Coordinates& place) const { return offset(outputs, place); }
};

// The same in contiguous tensors, whose items have this many bytes.
template <int kInputBytes, int kOutputBytes>
struct ContiguousWalk {
  __device__ std::int64_t place(std::int64_t item) const { return item; }
  __device__ std::int64_t input(int, std::int64_t item) const { return item * kInputBytes; }
  __device__ std::int64_t output(std::int64_t item) const { return item * kOutputBytes; }
};

template <bool kStrided, int kInputs, int kInputBytes, int kOutputBytes>
using Walk = std::conditional_t<kStrided, StridedWalk<kInputs>, ContiguousWalk<kInputBytes, kOutputBytes>>;

inline Extent extent_of(const Geometry& geometry, int width) {
  Extent extent;
  for (int d = 0; d < geometry.dims; ++d) {
    const bool last = d == geometry.dims - 1;
    extent.sizes[kWalkedDims - geometry.dims + d] = Divisor(last ? geometry.sizes[d] / width : geometry.sizes[d]);
  }
  return extent;
}

inline Steps steps_of(const Geometry& geometry, const Operand& operand, int width, std::int64_t element_size) {
  Steps steps{};
  for (int d = 0; d < geometry.dims; ++d) {
    steps.bytes[kWalkedDims - geometry.dims + d] = operand.strides[d] * element_size;
  }
  steps.bytes[kWalkedDims - 1] *= width;
  return steps;
}

__host__ __device__ inline void* advance(void* data, std::int64_t bytes) {
  return static_cast<std::byte*>(data) + bytes;
}

inline void check(cudaError_t error, const Target& target) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("lesa::") + target.op + ": CUDA error: " + cudaGetErrorString(error));
  }
}

// Lets this thread load kernels and ask for facts while it captures a graph, which CUDA refuses by default: neither is
// work for a stream. A kernel's code comes to a device when it is first asked for.
class RelaxedCapture {
 public:
  explicit RelaxedCapture(const Target& target) { check(cudaThreadExchangeStreamCaptureMode(&mode_), target); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// A number that belongs to a device, asked for once; it is never 0.
template <typename Ask>
int remembered(std::array<std::atomic<int>, 128>& known, const Target& target, const Ask& ask) {
  auto& entry = known.at(target.device);
  int value = entry.load(std::memory_order_relaxed);
  if (value == 0) {
    const RelaxedCapture relaxed(target);
    value = ask();
    entry.store(value, std::memory_order_relaxed);
  }
  return value;
}

inline int multiprocessors(const Target& target) {
  static std::array<std::atomic<int>, 128> known{};
  return remembered(known, target, [&] {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, target.device), target);
    return count;
  });
}

// How many blocks of kBlock threads of a kernel the device holds at a time.
template <auto kKernel, int kBlock>
int resident_blocks(const Target& target) {
  static std::array<std::atomic<int>, 128> known{};
  return remembered(known, target, [&] {
    int each = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kKernel, kBlock, 0), target);
    return multiprocessors(target) * each;
  });
}

// Loads a kernel, unless the device has it: the launch may be captured, and would load it then.
template <auto kKernel>
void load_kernel(const Target& target) {
  static std::array<std::atomic<int>, 128> known{};
  remembered(known, target, [&] {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kKernel), target);
    return 1;
  });
}

template <auto kKernel, int kBlock = kThreads, typename Task>
void launch_blocks(const Task& task, std::int64_t blocks, const Target& target) {
  static_assert(sizeof(Task) <= 4096, "every driver passes this much, only newer ones more");
  if (blocks > std::numeric_limits<int>::max()) {
    throw std::runtime_error(std::string("lesa::") + target.op + ": needs " + std::to_string(blocks) +
                             " blocks, a grid has at most 2147483647");
  }
  load_kernel<kKernel>(target);
  void* arguments[] = {const_cast<Task*>(&task)};
  check(cudaLaunchKernel(kKernel, dim3(static_cast<unsigned>(blocks)), dim3(kBlock), arguments, 0, target.stream),
        target);
}

// Threads loop over the items, so that any grid is right; this one fills the device once.
template <auto kKernel, int kBlock = kThreads, typename Task>
void launch(const Task& task, int items_per_thread, const Target& target) {
  const std::int64_t items_per_block = std::int64_t{kBlock} * items_per_thread;
  const std::int64_t wanted = (task.items + items_per_block - 1) / items_per_block;
  launch_blocks<kKernel, kBlock>(task, std::min<std::int64_t>(wanted, resident_blocks<kKernel, kBlock>(target)),
                                 target);
}

}  // namespace lesa::cuda
