// What the kernels share on the device: vectors, and where the elements of strided tensors lie.
#pragma once

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error \
    "lesa-kernels needs GPUs of compute capability 8.0 or newer: older ones have no instruction that rounds to bfloat16"
#endif

#include <cuda_runtime.h>

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cuda/kernels.h"
#include "cuda/launch_config.h"
#include "strides.h"

namespace lesa::cuda {

// The unsigned integers that one load or store of this many bytes moves.
template <int kBytes>
using Word = std::conditional_t<
    kBytes == 16, uint4,
    std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, unsigned, unsigned short>>>;

template <typename T, int kWidth>
using Vector = std::array<T, kWidth>;

// A vector as it is loaded: 16-bit elements stay in pairs until they are widened.
template <typename T, int kWidth>
struct Packed {
  Word<kWidth * sizeof(T)> bits;

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
  return {*static_cast<const Word<kWidth * sizeof(T)>*>(address)};
}

template <typename T, int kWidth>
__device__ void store(void* address, const Vector<T, kWidth>& vector) {
  using Bits = Word<kWidth * sizeof(T)>;
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

__host__ __device__ inline void* advance(void* data, std::int64_t bytes) {
  return static_cast<std::byte*>(data) + bytes;
}

// The dimensions that a kernel iterates over, right-aligned (the others have size 1), in items along the last one.
struct Extent {
  Divisor sizes[kKernelDims];

  Extent() = default;
  Extent(const MergedShape& merged, int width) {
    for (int d = 0; d < merged.dims; ++d) {
      const bool last = d == merged.dims - 1;
      sizes[kKernelDims - merged.dims + d] = Divisor(last ? merged.sizes[d] / width : merged.sizes[d]);
    }
  }
};

// Strides of one tensor along those dimensions, in bytes from item to item.
struct Steps {
  std::int64_t bytes[kKernelDims] = {};

  Steps() = default;
  Steps(const MergedShape& merged, const Operand& operand, int width) {
    for (int d = 0; d < merged.dims; ++d) {
      bytes[kKernelDims - merged.dims + d] = operand.strides[d] * operand.bytes;
    }
    bytes[kKernelDims - 1] *= width;
  }
};

using Position = std::array<std::uint32_t, kKernelDims>;

// Where an item lies in each tensor, in bytes from its first element. This one: in tensors of any strides, of at most
// kMostStrided items.
template <int kInputs>
struct StridedIterator {
  Extent extent;
  Steps inputs[kInputs];
  Steps outputs;

  __device__ Position position(std::int64_t item) const {
    Position result{};
    auto rest = static_cast<std::uint32_t>(item);
#pragma unroll
    for (int d = kKernelDims - 1; d > 0; --d) {
      const std::uint32_t quotient = extent.sizes[d].quotient(rest);
      result[d] = rest - quotient * extent.sizes[d].size;
      rest = quotient;
    }
    result[0] = rest;
    return result;
  }

  __device__ static std::int64_t offset(const Steps& steps, const Position& position) {
    std::int64_t result = 0;
#pragma unroll
    for (int d = 0; d < kKernelDims; ++d) {
      result += position[d] * steps.bytes[d];
    }
    return result;
  }

  __device__ std::int64_t input(int k, const Position& position) const { return offset(inputs[k], position); }
  __device__ std::int64_t output(const Position& position) const { return offset(outputs, position); }
};

// The same in contiguous tensors, whose items have this many bytes.
template <int kInputBytes, int kOutputBytes>
struct ContiguousIterator {
  __device__ std::int64_t position(std::int64_t item) const { return item; }
  __device__ std::int64_t input(int, std::int64_t item) const { return item * kInputBytes; }
  __device__ std::int64_t output(std::int64_t item) const { return item * kOutputBytes; }
};

// The parameters that all kernels over features have: up to kInputs inputs and how to iterate over them and over the
// outputs, in items of kWidth elements.
template <typename T, int kInputs, int kWidth, bool kStrided, typename Out = T>
struct FeatureParams {
  void* inputs[kInputs];
  std::int64_t items;
  std::conditional_t<kStrided, StridedIterator<kInputs>, ContiguousIterator<kWidth * sizeof(T), kWidth * sizeof(Out)>>
      iterator;

  // Takes the first `count` tensors as inputs, from number `first` on; the others do not exist. Outputs share the
  // strides of the last tensor.
  void set_tensors(const Tensors& tensors, int count, int first) {
    const auto& [merged, operands, num_inputs] = tensors;
    items = merged.numel / kWidth;
    for (int k = 0; k < count; ++k) {
      inputs[first + k] = operands[k].data;
    }
    if constexpr (kStrided) {
      iterator.extent = Extent(merged, kWidth);
      iterator.outputs = Steps(merged, operands.back(), kWidth);
      for (int k = 0; k < count; ++k) {
        iterator.inputs[first + k] = Steps(merged, operands[k], kWidth);
      }
    }
  }

  __device__ Packed<T, kWidth> load_input(int k, const auto& position) const {
    return load_packed<T, kWidth>(advance(inputs[k], iterator.input(k, position)));
  }
};

}  // namespace lesa::cuda
